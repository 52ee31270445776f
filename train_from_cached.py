#!/usr/bin/env python3
"""Trains a Stable-Diffusion-class UNet from cached latents and text embeddings.

    ./train_from_cached.py --model models/t5_sd15 --train_data_dir /data --output_dir output/run1 \\
        --imgcache_suffix .img_sdxl --txtcache_suffix .txt_t5cache --batch_size 64 --lr 1e-5 --max_steps 10000
    torchrun --nproc_per_node 8 train_from_cached.py ...

Reads only sidecars: no VAE, no text encoder and no pixels in the loop. train_sd.sh and train_t5.sh are its front
ends. `step` is one optimizer update; the loss is the mean over batch_size x gradient_accum x ranks samples.
"""

import json
import shutil
import signal
import time
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

try:
    from cachetrain import cli
    from cachetrain.atomic import atomic_write
    from cachetrain.training import options
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: run ./quickstart.sh once, then `source .venv/bin/activate`") from None

if TYPE_CHECKING:
    from torch import Tensor

# --overfit has shown that training works once the loss has come down to this share of the first step's.
OVERFIT_SHARE = 0.1


def parse_args(argv=None):
    return options.parse_args(__doc__, argv)


def main(argv=None):
    args = parse_args(argv)
    output_dir = Path(args.output_dir)

    from cachetrain.checkpoints.resume import Resumed
    from cachetrain.checkpoints.save import checkpoints
    from cachetrain.distributed import World
    from cachetrain.log import recorded
    from cachetrain.modeling import load
    from cachetrain.training import checks

    with recorded() as record, ExitStack() as closing:
        world = World(load.pick_device(args.device))
        closing.callback(world.close)
        try:
            found = open_output_dir(args, output_dir, closing) if world.main else None
            found = world.gather(found)[0]  # rank 0 has made or found it, or has refused it and is gone
            return train(args, Resumed(*found), world, closing, record)
        except (RuntimeError, MemoryError) as error:
            closing.close()  # what is being saved is complete then
            kept = [str(path) for path in checkpoints(output_dir)[-1:]] or ["none yet"]
            if checks.is_out_of_memory(error):
                raise ValueError(f"{checks.memory_advice(args, error)}; last checkpoint: {kept[0]}") from error
            if world.lost(error):
                raise OSError(
                    f"rank {world.rank}: another rank has ended, its own output says why; last checkpoint: {kept[0]}"
                ) from error
            raise


def train(args, resumed, world, closing, record):
    """Runs the training; returns the exit code.

    Args:
        resumed: Resumed, the checkpoint to resume from, if any.
        world: World, the ranks.
        closing: ExitStack of what is to be closed, come what may.
        record: Record of warnings.
    """
    from tqdm import tqdm

    from cachetrain.checkpoints.resume import settings_of
    from cachetrain.checkpoints.save import Saving
    from cachetrain.data.loader import on_device
    from cachetrain.distributed import gradients_stay
    from cachetrain.training import checks, flags
    from cachetrain.training import run as opening
    from cachetrain.training.logs.run_logs import Logs
    from cachetrain.training.nonfinite import NonfiniteSteps, backward_seed, step_if_finite
    from cachetrain.training.optim import clip_gradients
    from cachetrain.training.plan import leftover

    # What is trained, on what, and what trains it.
    say = partial(print, flush=True) if world.main else lambda _: None
    run = opening.open_run(args, world)
    max_steps, settings = run.plan.max_steps, settings_of(args, run.plan, run.index, run.noise_scheduler, world)
    notes = checks.check_model(run) + resumed.check(settings, args.resume_anyway, flags.resume_meanings())
    if resumed.step >= max_steps:
        say(f"{resumed.path}: the run is complete; a higher --max_steps continues it")
        return 0
    checks.check_start(run, resumed)
    train_state, chosen = opening.open_train_state(run, resumed)
    unet, model, trained, optimizer, scaler, ema = train_state
    pairs, num_seen = opening.open_pairs(run), resumed.state.get("visits", 0)
    loader, batch_sampler = opening.open_loader(run, pairs, resumed.step, num_seen)

    # What is seen of it.
    samples = opening.open_samples(run) if world.main else None
    validation = opening.open_validation(run)
    if world.main:
        archive_settings(args, run.output_dir)
        record.start(run.output_dir / "warnings.jsonl", resumed.step)
    logs = Logs(run, unet, pairs, scaler, resumed.step if args.resume else None)
    stats, metrics = logs.statistics, logs.metrics
    closing.callback(logs.close)
    nonfinite = NonfiniteSteps(run.index, run.output_dir, world, args.max_nonfinite, scaler.is_enabled())
    saving = Saving(run, run.data_info(), metrics.flush, resumed.frozen)
    closing.callback(saving.wait)
    opening.restore_logs(resumed, stats, validation)
    say("\n".join([str(chosen), *notes, *run.describe(resumed)]))

    forward = partial(forward_pass, run=run, dtype=trained[0].dtype)
    draw = partial(draw_if_due, run, samples, unet, ema, metrics)
    if not resumed.path:
        draw(0, ())
    started, first_loss = time.perf_counter(), None
    batches = on_device(loader, run.device)
    signals = closing.enter_context(cli.deferred_signals())  # from here on they end the run after its step
    steps = range(resumed.step + 1, max_steps + 1)
    hidden = None if world.main else True  # None: hidden where there is no terminal
    progress = tqdm(steps, desc="train", total=max_steps, unit="step", initial=resumed.step, disable=hidden)
    for step in progress:
        record.step = step
        saving.report()
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate(step)

        for micro_step in range(1, args.gradient_accum + 1):
            waiting = time.perf_counter()
            batch = next(batches)
            stats.wait_s += time.perf_counter() - waiting
            with gradients_stay(model, micro_step == args.gradient_accum):
                result = forward(model, batch)
                mean = result.loss.mean() / args.gradient_accum
                scaler.scale(mean).backward(backward_seed(mean))
            stats.add(batch, result)
            nonfinite.add(batch["samples"], result.loss.detach())

        save_now, stop = saving.due(step, bool(signals))
        validate_now = validation is not None and validation.due(step, max_steps)
        log_now = logs.due(step) or save_now or validate_now  # what is saved was seen to be finite
        scaler.unscale_(optimizer)
        grad_norm = stats.gradients(log_now)
        if args.gradient_clip:
            clip_gradients(trained, grad_norm, args.gradient_clip)
        logs.diagnostics.before(step)
        finite = grad_norm.isfinite()
        stepped = step_if_finite(optimizer, scaler, finite)
        nonfinite.end_step(step, finite)
        optimizer.zero_grad(set_to_none=True)
        if ema:
            ema.update(step, stepped)
        if run.plan.ends_epoch(step):
            stats.epoch_end()

        if log_now:
            measured = validation.measure(unet, forward, step, ema) if validate_now else {}
            tags = logs.write(step, optimizer, measured)
            hopeless = nonfinite.read(stats.num_not_finite)
            save_now = save_now or hopeless
            logs.show(progress, say, step, tags)
        draw(step, batch["samples"])
        if save_now:
            if samples:
                samples.animate(run.output_dir / "samples", metrics, step)
            num_trained = num_seen + (step - resumed.step) * run.plan.effective_batch
            saving.save(step, unet, ema, train_state.to_save(step, num_trained, settings, stats, validation))
            if hopeless:
                raise ValueError(f"{nonfinite.advice()}; the last good weights are in {saving.finish()}")
            if stop:
                break

        if args.overfit and log_now:
            first_loss = first_loss or stats.loss_raw
            if stats.loss_raw < OVERFIT_SHARE * first_loss:
                break
    progress.close()
    saved = saving.finish()

    elapsed_s = time.perf_counter() - started
    say(f"{step - resumed.step} steps in {elapsed_s:.0f} s" + (f"; last checkpoint: {saved}" if saved else ""))
    if stop and step < max_steps:
        return report_stop(say, record, (signals or [signal.SIGTERM])[0], step, max_steps)
    if args.overfit:
        return report_overfit(say, first_loss, stats.loss_raw, step)
    say(leftover(run.index, batch_sampler))
    return 0


class ForwardResult(NamedTuple):
    """What a forward pass gives for a batch.

    Attributes:
        loss: float32 [B], what is optimised.
        squared_error: float32 [B], the plain one.
        prediction, target: [B, C, h, w], detached.
        alpha, sigma: float32 [B, 1, 1, 1]; the UNet has seen alpha * latents + sigma * noise.
    """

    loss: "Tensor"
    squared_error: "Tensor"
    prediction: "Tensor"
    target: "Tensor"
    alpha: "Tensor"
    sigma: "Tensor"


def forward_pass(model, batch, run, dtype):
    """One forward pass; returns a ForwardResult.

    Args:
        batch: as batching.collate makes it, on the device.
        dtype: of the model's weights.
    """
    from cachetrain.diffusion.objective import alpha_sigma, min_snr_weights, squared_error, target_of
    from cachetrain.modeling.conditioning import predict

    latents, noise, timesteps = batch["latents"], batch["noise"], batch["timesteps"]
    alpha, sigma = alpha_sigma(run.objective, timesteps, run.alphas_cumprod)
    with run.autocast():
        noisy = (alpha * latents + sigma * noise).to(dtype)
        prediction = predict(model, noisy, timesteps, batch["conditioning"])
    target = target_of(run.objective, latents, noise, alpha, sigma)
    error = squared_error(prediction, target)
    weights = min_snr_weights(run.objective, alpha, sigma, run.args.noise_gamma) if run.args.use_snr else None
    loss = error if weights is None else error * weights
    return ForwardResult(loss, error, prediction.detach(), target, alpha, sigma)


def draw_if_due(run, samples, unet, ema, metrics, step, last_samples):
    """Draws the run's sample prompts after a step if it is time to; of sharded models all ranks take part.

    Args:
        samples: SampleImages on rank 0, or None.
        last_samples: positions of the last batch's pairs.
    """
    from cachetrain.distributed import full_unet

    due = samples is not None and samples.due(step, run.plan.max_steps)
    if not (run.world.any(due) if run.args.fsdp else due):
        return
    with ema.applied() if ema else nullcontext():
        complete = full_unet(unet, run.world)
        if run.world.main:
            directory = run.output_dir / "samples" / f"step-{step:06d}"
            samples.draw(complete, directory, metrics, step, run.autocast, last_samples)


def open_output_dir(args, output_dir, closing):
    """Makes the run's directory, or finds in it what is to be resumed; one that another run writes to is refused.

    Returns:
        what resume.find_checkpoint does; (None, False) for a new run.
    """
    from cachetrain.atomic import locked_directory, remove_leftovers
    from cachetrain.checkpoints.resume import find_checkpoint

    if not args.resume and (output_dir / "args.json").exists():
        raise ValueError(
            f"{output_dir}: already holds a run; choose another --output_dir, or resume it with --resume latest"
        )
    closing.enter_context(locked_directory(output_dir))
    remove_leftovers(output_dir)
    remove_leftovers(output_dir / "samples")
    return find_checkpoint(args.resume, output_dir) if args.resume else (None, False)


def archive_settings(args, output_dir):
    """Keeps the settings with the run: args.json and the wrapper script."""
    atomic_write(output_dir / "args.json", (json.dumps(vars(args), indent=2) + "\n").encode())
    if args.copy_config:
        shutil.copy(args.copy_config, output_dir)


def report_stop(say, record, number, step, max_steps):
    """Says which signal ended the run; returns the exit code, 128 + its number."""
    record.add(f"the run ended: {signal.Signals(number).name} after step {step} of {max_steps}")
    say(f"stopped after step {step} of {max_steps}; --resume latest continues the run")
    return 128 + number


def report_overfit(say, first_loss, loss, step):
    """Says whether the samples were learned by heart; returns the exit code."""
    share = f"the loss on fixed noise went from {first_loss:.4f} to {loss:.4f} in {step} steps"
    if loss < OVERFIT_SHARE * first_loss:
        say(f"overfit: {share}: this script, these caches and this model train")
        return 0
    say(
        f"overfit: {share}, not below a tenth: give it more --max_steps or a higher --lr; if that does not help, "
        "something in caches, model or flags keeps it from training"
    )
    return 1


console_script = partial(cli.run, main)  # cachetrain-train

if __name__ == "__main__":
    console_script()
