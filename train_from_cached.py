#!/usr/bin/env python3
"""Trains a Stable-Diffusion-class UNet from cached latents and text embeddings.

    ./train_from_cached.py --model models/t5_sd15 --train_data_dir /data --output_dir output/run1 \\
        --imgcache_suffix .img_sdxl --txtcache_suffix .txt_t5cache --batch_size 64 --lr 1e-5 --max_steps 10000
    torchrun --nproc_per_node 8 train_from_cached.py ...

Reads only sidecars: no VAE, no text encoder and no pixels in the loop. train_sd.sh and train_t5.sh are its front
ends. `step` is one optimizer update; the loss is the mean over batch_size x gradient_accum x ranks samples.
"""

import json
import math
import shutil
import signal
import time
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path

try:
    from cachetrain import cli
    from cachetrain.atomic import atomic_write
    from cachetrain.training import options
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: run ./quickstart.sh once, then `source .venv/bin/activate`") from None

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
    from cachetrain.training import setup

    with recorded() as record, ExitStack() as closing:
        world = World(load.pick_device(args.device))
        closing.callback(world.close)
        try:
            found = open_output_dir(args, output_dir, closing) if world.main else None
            found = world.gather(found)[0]  # rank 0 has made or found it, or has refused it and is gone
            return train(args, output_dir, Resumed(*found), world, closing, record)
        except (RuntimeError, MemoryError) as error:
            closing.close()  # what is being saved is complete then
            kept = [str(path) for path in checkpoints(output_dir)[-1:]] or ["none yet"]
            if setup.is_out_of_memory(error):
                raise ValueError(f"{setup.memory_advice(args, error)}; last checkpoint: {kept[0]}") from error
            if world.lost(error):
                raise OSError(f"rank {world.rank}: another rank has ended, its own output says why; "
                              f"last checkpoint: {kept[0]}") from error  # fmt: skip
            raise


def train(args, output_dir, resumed, world, closing, record):
    """Runs the training; returns the exit code.

    Args:
        resumed: Resumed, the checkpoint to go on from, if any.
        closing: ExitStack of what is to be closed, come what may.
        record: Record of what is warned of.
    """
    from tqdm import tqdm

    from cachetrain.checkpoints.info import data_info
    from cachetrain.checkpoints.resume import run_state, settings_of
    from cachetrain.checkpoints.save import Saving
    from cachetrain.data.index import open_index
    from cachetrain.data.loader import on_device
    from cachetrain.diffusion.noise_schedulers import objective_of
    from cachetrain.diffusion.objective import noise_schedule
    from cachetrain.distributed import gradients_stay, whole, wrap
    from cachetrain.modeling import load
    from cachetrain.modeling.precision import autocast_for
    from cachetrain.training import setup
    from cachetrain.training.ema import Ema
    from cachetrain.training.logs.run_logs import Logs
    from cachetrain.training.lr_schedule import lr_factor
    from cachetrain.training.nonfinite import Guard, seed_of, step_if_finite
    from cachetrain.training.optim import clip_gradients, loss_scaler, make_optimizer

    # What is trained, and on what.
    device, say = world.device, partial(print, flush=True) if world.main else lambda _: None
    index, held_out = open_index(args, world)
    model_dir = load.resolve_model(args.model, args.revision)
    setup.check_vae(index, model_dir)
    scheduler = setup.open_scheduler(model_dir, args.objective, args.zero_terminal_snr)
    notes = setup.check_export(args, model_dir, scheduler)
    objective = objective_of(scheduler)
    alphas_cumprod = noise_schedule(scheduler, device)
    plan = setup.make_plan(args, index.num_visits, world.ranks)
    settings = settings_of(args, plan, index, scheduler, world)
    notes += resumed.check(settings, args.resume_anyway)
    if resumed.step >= plan.max_steps:
        say(f"{resumed.path}: the run is complete; a higher --max_steps lets it go on")
        return 0
    setup.check_start(args, index, model_dir, plan, resumed.step, resumed.frozen is not None)
    unet, chosen = setup.open_unet(args, model_dir, len(index.shapes), device, resumed.path)
    pairs = setup.open_pairs(args, index, objective)
    visits = resumed.state.get("visits", 0)
    loader, batches = setup.open_loader(args, pairs, device, plan, world, resumed.step, visits)

    # What trains it.
    model = wrap(unet, world, args.fsdp)
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    autocast, scaler = autocast_for(device, args.precision), loss_scaler(device, args.precision)
    optimizer = make_optimizer(args.optimizer, trained, plan.peak_lr, args.betas, args.weight_decay, args.cpu_offload)
    offloaded = optimizer.cpu_parameters if args.cpu_offload else None
    ema = Ema(trained, args.ema_decay, "cpu" if args.cpu_offload else None, offloaded) if args.ema_decay else None
    resumed.restore(unet, trained, optimizer, ema, scaler)
    losses = partial(
        forward, objective=objective, alphas_cumprod=alphas_cumprod, autocast=autocast, dtype=trained[0].dtype,
        gamma=args.noise_gamma if args.use_snr else None,
    )  # fmt: skip

    def rate(step):
        factor = lr_factor(args.scheduler, step - 1, plan.warmup_steps, plan.decay_steps,
                           min_lr_rate=args.min_lr_rate, peak_lr=plan.peak_lr)  # fmt: skip
        return plan.peak_lr * factor

    # What is seen of it.
    samples = setup.open_samples(args, model_dir, scheduler, index, device) if world.main else None
    validation = setup.open_validation(args, held_out, objective, plan, device, world)
    if world.main:
        archive_settings(args, output_dir)
        record.start(output_dir / "warnings.jsonl", resumed.step)
    logs = Logs(args, world, unet, objective, alphas_cumprod, pairs, plan, rate, autocast, scaler, device,
                resumed.step if args.resume else None)  # fmt: skip
    stats, metrics = logs.statistics, logs.metrics
    closing.callback(logs.close)
    guard = Guard(index, output_dir, world, args.max_nonfinite, scaler.is_enabled())
    info = {"objective": objective, **data_info(index, args.text_scaling_factor)}
    saving = Saving(args, plan, world, model_dir, scheduler, info, metrics.flush, resumed.frozen)
    closing.callback(saving.wait)
    if resumed.path:
        stats.load_state_dict(resumed.state["statistics"])
        if validation and resumed.state["validation"]:
            validation.load_state_dict(resumed.state["validation"])
    say("\n".join([str(chosen), *notes, setup.coverage(index, plan, args, world)]))
    say(f"{plan.max_steps} steps of {args.batch_size} x {args.gradient_accum} x {world.ranks} = "
        f"{plan.effective_batch}; {objective}; {args.precision} on {device}"
        + (f"; goes on after step {resumed.step} of {resumed.path}" if resumed.path else ""))  # fmt: skip

    def draw_if_due(step, last_samples):
        due = samples is not None and samples.due(step, plan.max_steps)
        if not (world.any(due) if args.fsdp else due):
            return
        with ema.applied() if ema else nullcontext():
            complete = whole(unet, world)
            if world.main:
                directory = output_dir / "samples" / f"step-{step:06d}"
                samples.draw(complete, directory, metrics, step, autocast, last_samples)

    if not resumed.path:
        draw_if_due(0, ())
    started, first_loss = time.perf_counter(), None
    feed = on_device(loader, device)
    signals = closing.enter_context(cli.deferred_signals())  # from here on they end the run after its step
    steps = range(resumed.step + 1, plan.max_steps + 1)
    progress = tqdm(steps, desc="train", unit="step", initial=resumed.step, total=plan.max_steps,
                    disable=None if world.main else True)  # fmt: skip
    for step in progress:
        record.step = step
        saving.report()
        for group in optimizer.param_groups:
            group["lr"] = rate(step)

        for micro_step in range(1, args.gradient_accum + 1):
            waiting = time.perf_counter()
            batch = next(feed)
            stats.wait_s += time.perf_counter() - waiting
            with gradients_stay(model, micro_step == args.gradient_accum):
                loss, raw, *seen = losses(model, batch)
                mean = loss.mean() / args.gradient_accum
                scaler.scale(mean).backward(seed_of(mean))
            stats.add(batch, *seen, raw.detach(), loss.detach())
            guard.add(batch["samples"], loss.detach())

        save_now, stop = saving.due(step, bool(signals))
        validate_now = validation is not None and validation.due(step, plan.max_steps)
        log_now = logs.due(step) or save_now or validate_now  # what is saved was seen to be finite
        scaler.unscale_(optimizer)
        grad_norm = stats.gradients(log_now)
        if args.gradient_clip:
            clip_gradients(trained, grad_norm, args.gradient_clip)
        logs.diagnostics.before(step)
        finite = grad_norm.isfinite()
        stepped = step_if_finite(optimizer, scaler, finite)
        guard.end_step(step, finite)
        optimizer.zero_grad(set_to_none=True)
        if ema:
            ema.update(step, stepped)
        if plan.ends_epoch(step):
            stats.epoch_end()

        if log_now:
            measured = validation.measure(unet, lambda *a: losses(*a)[:2], step, ema) if validate_now else {}
            tags = logs.write(step, optimizer, measured)
            hopeless = guard.read(stats.num_not_finite)
            save_now = save_now or hopeless
            speed = tags.get("05_Performance/images_per_second", math.nan)
            progress.set_postfix(loss=f"{stats.loss_raw:.4f}", img_s=f"{speed:.1f}", refresh=False)
            if progress.disable:  # not a terminal
                say(logs.line(step, tags))
        draw_if_due(step, batch["samples"])
        if save_now:
            if samples:
                samples.animate(output_dir / "samples", metrics, step)
            seen = visits + (step - resumed.step) * plan.effective_batch
            state = run_state(step, seen, settings, unet, optimizer, scaler, stats, validation)
            saving.save(step, unet, ema, state)
            if hopeless:
                raise ValueError(f"{guard.advice()}; the last good weights are in {saving.finish()}")
            if stop:
                break

        if args.overfit and log_now:
            first_loss = first_loss or stats.loss_raw
            if stats.loss_raw < OVERFIT_SHARE * first_loss:
                break
    progress.close()
    saved = saving.finish()

    say(f"{step - resumed.step} steps in {time.perf_counter() - started:.0f} s"
        + (f"; last checkpoint: {saved}" if saved else ""))  # fmt: skip
    if stop and step < plan.max_steps:
        number = (signals or [signal.SIGTERM])[0]
        record.add(f"the run ended: {signal.Signals(number).name} after step {step} of {plan.max_steps}")
        say(f"stopped after step {step} of {plan.max_steps}; --resume latest goes on")
        return 128 + number
    if args.overfit:
        return report_overfit(say, first_loss, stats.loss_raw, step)
    say(setup.leftover(index, batches))
    return 0


def forward(model, batch, objective, alphas_cumprod, autocast, dtype, gamma):
    """One forward pass.

    Args:
        batch: as data.collate makes it, on the device.
        dtype: of the model's weights.
        gamma: of Min-SNR, or None: plain squared error.

    Returns:
        (loss to optimise, plain squared error: float32 [B]; prediction, target: [B, C, h, w], detached; alpha, sigma:
        float32 [B, 1, 1, 1]).
    """
    from cachetrain.diffusion.objective import alpha_sigma, min_snr_weights, squared_error, target_of

    latents, noise, timesteps = batch["latents"], batch["noise"], batch["timesteps"]
    alpha, sigma = alpha_sigma(objective, timesteps, alphas_cumprod)
    with autocast():
        prediction = model(
            (alpha * latents + sigma * noise).to(dtype),
            timesteps,
            encoder_hidden_states=batch["encoder_hidden_states"],
            encoder_attention_mask=batch["encoder_attention_mask"],
        ).sample
    target = target_of(objective, latents, noise, alpha, sigma)
    raw = squared_error(prediction, target)
    loss = raw if gamma is None else raw * min_snr_weights(objective, alpha, sigma, gamma)
    return loss, raw, prediction.detach(), target, alpha, sigma


def open_output_dir(args, output_dir, closing):
    """Makes the run's directory, or finds in it what is to be resumed; one that another run writes to is refused.

    Returns:
        what saves.resume.find_checkpoint does; (None, False) for a new run.
    """
    from cachetrain.atomic import locked_directory, remove_leftovers
    from cachetrain.checkpoints.resume import find_checkpoint

    if not args.resume and (output_dir / "args.json").exists():
        raise ValueError(
            f"{output_dir}: already holds a run; choose another --output_dir, or go on with --resume latest"
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


def report_overfit(say, first_loss, loss, step):
    """Says whether the samples were learned by heart; returns the exit code."""
    share = f"the loss on fixed noise went from {first_loss:.4f} to {loss:.4f} in {step} steps"
    if loss < OVERFIT_SHARE * first_loss:
        say(f"overfit: {share}: this script, these caches and this model train")
        return 0
    say(f"overfit: {share}, not below a tenth: give it more --max_steps or a higher --lr; if that does not help, "
        "something in caches, model or flags keeps it from training")  # fmt: skip
    return 1


if __name__ == "__main__":
    cli.run(main)
