#!/usr/bin/env -S python3 -P
"""Trains a Stable-Diffusion-class UNet from cached latents and text embeddings.

    ./train_from_cached.py --model models/t5_sd15 --train_data_dir /data --output_dir output/run1 \\
        --imgcache_suffix .img_sdxl --txtcache_suffix .txt_t5cache --batch_size 64 --lr 1e-5 --max_steps 10000
    torchrun --nproc_per_node 8 train_from_cached.py ...

Reads only cache files: training needs no VAE, no text encoder and no images. train_sd.sh and train_t5.sh run this
script with common settings. A step is one optimizer update; its loss is the mean over batch_size x gradient_accum x
ranks samples.
"""

import shutil
import signal
import sys
import time
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

try:
    from cachetrain import cli
    from cachetrain.atomic import atomic_write
    from cachetrain.training import options
except ImportError as error:
    print(f"{error}: run `pip install -e .`, or ./quickstart.sh and `source .venv/bin/activate`", file=sys.stderr)
    sys.exit(2)

if TYPE_CHECKING:
    from argparse import Namespace

    from torch import Tensor

# Files that a run writes into its directory.
RUN_FILES = ("args.json", "metrics.jsonl", "warnings.jsonl", "quarantine.tsv")


def parse_args(argv: list[str] | None = None) -> "Namespace":
    return options.parse_args(__doc__, argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    output_dir = Path(args.output_dir)

    from cachetrain.checkpoints.resume import Resumed
    from cachetrain.checkpoints.save import newest_checkpoint
    from cachetrain.distributed import World
    from cachetrain.log import record_warnings
    from cachetrain.modeling import load
    from cachetrain.training import checks

    with record_warnings() as warning_log:
        world = World(load.pick_device(args.device))
        try:
            with ExitStack() as cleanup:
                cleanup.callback(world.close)
                checkpoint = open_output_dir(args, output_dir, cleanup) if world.main else None
                checkpoint = world.gather(checkpoint)[0]  # the other ranks wait until rank 0 has opened the directory
                return train(args, Resumed(*checkpoint), world, cleanup, warning_log)
        except (RuntimeError, MemoryError) as error:  # before the first step; see Saving.rescue
            raise checks.explained(error, newest_checkpoint(output_dir), args, world) from error


def train(args, resumed, world, cleanup, warning_log) -> int:
    """Runs the training; returns the exit code.

    Args:
        args: parsed command line.
        resumed: Resumed, the checkpoint to resume from, or the beginning of a run.
        world: World, the ranks.
        cleanup: ExitStack, closed after the training, also after an error.
        warning_log: WarningLog.
    """
    from tqdm import tqdm

    from cachetrain.checkpoints.resume import settings_of
    from cachetrain.checkpoints.save import Saving
    from cachetrain.data.loader import on_device
    from cachetrain.log import counted, info
    from cachetrain.training import checks, flags, overfit
    from cachetrain.training import run as setup
    from cachetrain.training.logs.run_logs import Logs
    from cachetrain.training.nonfinite import NonfiniteSteps, backward_seed, step_if_finite
    from cachetrain.training.optim import clip_gradients
    from cachetrain.training.plan import data_coverage

    # Settings, model, optimizer and data.
    run = setup.open_run(args, world, resumed.state)
    cleanup.callback(run.sources.close)
    max_steps, settings = run.plan.max_steps, settings_of(args, run.plan, run.index, run.noise_scheduler, world)
    notes = checks.check_model(run) + resumed.check(settings, args.resume_anyway, flags.resume_meanings())
    if resumed.step >= max_steps:
        info(f"{resumed.path}: the run is complete; to continue it, use a higher --max_steps")
        return 0
    checks.check_start(run, resumed)
    train_state, trained_table = setup.open_train_state(run, resumed)
    unet, model, trained, optimizer, scaler, ema = train_state
    pairs, num_seen = setup.open_pairs(run), resumed.state.get("visits", 0)  # samples trained on so far
    loader, batch_sampler = setup.open_loader(run, pairs, resumed.step, num_seen)

    # Samples, validation, logs and checkpoints.
    samples = setup.open_samples(run) if world.main else None
    validation = setup.open_validation(run)
    logs = Logs(run, unet, pairs, scaler, resumed.step if args.resume else None, optimizer)
    stats, metrics = logs.statistics, logs.metrics
    cleanup.callback(logs.close)
    nonfinite = NonfiniteSteps(run.index, run.output_dir, world, args.max_nonfinite, scaler.is_enabled())
    saving = Saving(run, run.data_info(), metrics.flush, resumed.frozen)
    cleanup.callback(saving.wait)
    setup.restore_logs(resumed, stats, validation)
    info("\n".join([str(trained_table), *notes, *run.describe(resumed)]))

    def save(step: int) -> None:
        num_trained = num_seen + (step - resumed.step) * run.plan.effective_batch
        saving.save(step, unet, ema, train_state.to_save(run, step, num_trained, settings, stats, validation))

    forward = partial(forward_pass, run=run, dtype=trained[0].dtype)
    draw = partial(draw_if_due, run=run, samples=samples, unet=unet, ema=ema, metrics=metrics)
    if not resumed.path:
        draw(0, ())
    if world.main:  # now that all is open: a start that fails does not occupy the directory
        archive_settings(args, run.output_dir)
        warning_log.start(run.output_dir / "warnings.jsonl", resumed.step)
    started, first_loss = time.perf_counter(), None
    batches = on_device(loader, run.device)
    signals = cleanup.enter_context(cli.deferred_signals())  # a signal now ends the run after the current step
    cleanup.enter_context(saving.rescue(save, checks.explained, optimizer))  # an error: saves the last complete step
    steps = range(resumed.step + 1, max_steps + 1)
    hidden = None if world.main else True  # None: hidden unless stderr is a terminal
    progress = tqdm(steps, desc="train", total=max_steps, unit="step", initial=resumed.step, disable=hidden)
    for step in progress:
        warning_log.step = step
        saving.report()
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate(step)
        for micro_step in range(1, args.gradient_accum + 1):
            wait_start = time.perf_counter()
            batch = next(batches)
            stats.wait_s += time.perf_counter() - wait_start
            with setup.micro_step(run, model, step, micro_step):
                result = forward(model, batch)
                loss = (result.loss * batch["weights"]).mean() / args.gradient_accum  # weight 0: could not be read
                scaler.scale(loss).backward(backward_seed(loss))
            stats.add(batch, result)
            nonfinite.add(batch, result.loss.detach())

        save_now, stop = saving.due(step, bool(signals))
        validate_now = validation is not None and validation.due(step, max_steps)
        log_now = logs.due(step) or save_now or validate_now  # before a save, to check that all steps were finite
        scaler.unscale_(optimizer)
        grad_norm = stats.gradients(log_now)
        if args.gradient_clip:
            clip_gradients(trained, grad_norm, args.gradient_clip)
        logs.diagnostics.before(step)
        finite = grad_norm.isfinite()
        saving.intact = None
        stepped = step_if_finite(optimizer, scaler, finite)
        if ema:
            ema.update(step, stepped)
        saving.intact = step
        nonfinite.end_step(step, finite)
        optimizer.zero_grad(set_to_none=True)
        if run.plan.ends_epoch(step):
            stats.epoch_end()
        if log_now:
            measured = validation.measure(unet, forward, step, ema) if validate_now else {}
            tags = logs.write(step, optimizer, measured)
            diverged = nonfinite.read(stats.num_not_finite, optimizer)
            save_now = save_now or diverged
            logs.show(progress, step, tags)
        draw(step, batch["samples"])
        if save_now:
            if samples:
                samples.animate(run.output_dir / "samples", metrics, step)
            save(step)
            if diverged:
                raise ValueError(f"{nonfinite.advice()}; the last good weights are in {saving.finish()}")
            if stop:
                break
        if args.overfit and log_now:
            first_loss = first_loss or stats.loss_raw
            if stats.loss_raw < overfit.SHARE * first_loss:
                break
    progress.close()
    saved = saving.finish()
    in_time = f"{counted(step - resumed.step, 'step')} in {time.perf_counter() - started:.0f} s"
    info(in_time + (f"; last checkpoint: {saved}" if saved else ""))
    if stop and step < max_steps:
        return report_stop(warning_log, (signals or [signal.SIGTERM])[0], step, max_steps)
    if args.overfit:
        return overfit.report(run, pairs, forward, unet, (first_loss, stats.loss_raw), step)
    info(data_coverage(run.index, batch_sampler))
    return 0


class ForwardResult(NamedTuple):
    """Result of a forward pass.

    Attributes:
        loss: float32 [B], the loss of each sample as --loss, --use_snr and --unmasked_weight say.
        squared_error: float32 [B], the squared error without weights.
        prediction: [B, C, h, w], detached.
        target: [B, C, h, w].
        alpha, sigma: float32 [B, 1, 1, 1]; the UNet's input is alpha * latents + sigma * noise.
    """

    loss: "Tensor"
    squared_error: "Tensor"
    prediction: "Tensor"
    target: "Tensor"
    alpha: "Tensor"
    sigma: "Tensor"


def forward_pass(model, batch: dict, run, dtype) -> ForwardResult:
    """Runs the UNet on a batch and computes the loss of each sample.

    Args:
        model: UNet2DConditionModel or its distributed wrapper.
        batch: dict of data.batching.collate, on the device.
        run: Run.
        dtype: dtype of the model's weights.
    """
    from cachetrain.diffusion.objective import (
        alpha_sigma,
        huber_error,
        mask_weights,
        snr_weights,
        squared_error,
        target_of,
    )
    from cachetrain.modeling.conditioning import predict

    args, latents, noise, timesteps = run.args, batch["latents"], batch["noise"], batch["timesteps"]
    alpha, sigma = alpha_sigma(run.objective, timesteps, run.alphas_cumprod)
    with run.autocast():
        noisy = (alpha * latents + sigma * noise).to(dtype)
        prediction = predict(model, noisy, timesteps, batch["conditioning"])
    target = target_of(run.objective, latents, noise, alpha, sigma)
    loss = error = squared_error(prediction, target)
    weights = mask_weights(batch["mask"], args.unmasked_weight) if "mask" in batch else None
    if args.loss:
        loss = huber_error(prediction, target, timesteps, args.huber_c, weights)
    elif weights is not None:
        loss = squared_error(prediction, target, weights)
    if args.use_snr:
        loss = loss * snr_weights(run.objective, alpha, sigma, args.use_snr, args.noise_gamma)
    return ForwardResult(loss, error, prediction.detach(), target, alpha, sigma)


def draw_if_due(step, last_samples, *, run, samples, unet, ema, metrics) -> None:
    """Draws the sample prompts if they are due after `step`. With --fsdp, called by all ranks.

    Args:
        step: optimizer steps done.
        last_samples: numbers of the pairs in the last batch.
        run: Run.
        samples: SampleImages on rank 0, or None.
        unet: UNet2DConditionModel, not its distributed wrapper.
        ema: Ema, to draw with the averaged weights, or None.
        metrics: Metrics.
    """
    from cachetrain.distributed import gather_unet

    due = samples is not None and samples.due(step, run.plan.max_steps)
    if not (run.world.any(due) if run.args.fsdp else due):
        return
    with ema.applied() if ema else nullcontext():
        full_unet = gather_unet(unet, run.world)
        if run.world.main:
            directory = run.output_dir / "samples" / f"step-{step:06d}"
            samples.draw(full_unet, directory, metrics, step, run.autocast, last_samples)


def open_output_dir(args: "Namespace", output_dir: Path, cleanup: ExitStack) -> tuple[Path | None, bool]:
    """Creates and locks the run's directory, and finds the checkpoint to resume from.

    Args:
        args: parsed command line.
        output_dir: directory of the run.
        cleanup: releases the lock.

    Returns:
        the result of resume.find_checkpoint; (None, False) for a new run.

    Raises:
        ValueError: the directory holds another run, another process writes to it, or --resume finds nothing intact.
    """
    from cachetrain.atomic import locked_directory, remove_leftovers
    from cachetrain.checkpoints.resume import find_checkpoint
    from cachetrain.checkpoints.save import checkpoint_path, step_of

    if args.copy_config:
        check_copy(Path(args.copy_config), output_dir, args.resume)
    if not args.resume and (output_dir / "args.json").exists():
        raise ValueError(
            f"{output_dir}: already holds a run; choose another --output_dir, or resume it with --resume latest"
        )
    steps = {} if args.resume else {path: step_of(path) for path in output_dir.glob("checkpoint-*")}
    taken = [path for path, step in steps.items() if step is not None and path == checkpoint_path(output_dir, step)]
    if taken:
        raise ValueError(f"{taken[0]}: this run's checkpoints could need the name; choose another --output_dir")
    cleanup.enter_context(locked_directory(output_dir))
    remove_leftovers(output_dir, "checkpoint-[0-9]*")
    remove_leftovers(output_dir / "samples", "step-[0-9]*")
    return find_checkpoint(args.resume, output_dir) if args.resume else (None, False)


def check_copy(config: Path, output_dir: Path, resume: str | None) -> None:
    """Checks that the copy of --copy_config in the run's directory takes no other file's place.

    Raises:
        ValueError: it would, or there is no such file.
    """
    copy = output_dir / config.name
    if not config.is_file():
        raise ValueError(f"--copy_config {config}: no such file")
    if config.name in RUN_FILES or (copy.exists() and not resume and not copy.samefile(config)):
        raise ValueError(f"--copy_config {config}: {copy} is another file; rename one of them")


def archive_settings(args: "Namespace", output_dir: Path) -> None:
    """Writes the run's settings to its directory: a copy of the file that --copy_config names, and args.json."""
    from cachetrain.checkpoints.save import write_settings

    if args.copy_config:
        config = Path(args.copy_config)
        copy = output_dir / config.name
        atomic_write(copy, config.read_bytes())
        with suppress(OSError):  # a file system without permissions
            shutil.copymode(config, copy)
    write_settings(args, output_dir)


def report_stop(warning_log, signal_number: int, step: int, max_steps: int) -> int:
    """Reports the signal that ended the run; returns the exit code, 128 + the number of the signal.

    Of these, the user's own Ctrl-C is no warning.
    """
    from cachetrain.log import info

    if signal_number != signal.SIGINT:
        warning_log.add(f"the run ended: {signal.Signals(signal_number).name} after step {step} of {max_steps}")
    info(f"stopped after step {step} of {max_steps}; --resume latest continues the run")
    return 128 + signal_number


console_script = partial(cli.run, main)  # cachetrain-train

if __name__ == "__main__":
    console_script()
