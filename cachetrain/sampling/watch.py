"""Draws a run's checkpoints as they appear, in a process and on a device of its own."""

import argparse
import functools
import json
import time
from pathlib import Path

import torch

from cachetrain.atomic import is_locked
from cachetrain.checkpoints.info import checkpoint_info
from cachetrain.checkpoints.manifest import read_manifest
from cachetrain.checkpoints.save import checkpoints, step_of
from cachetrain.data.index import open_index
from cachetrain.distributed import World
from cachetrain.log import warn
from cachetrain.modeling import load
from cachetrain.modeling.precision import autocast_for
from cachetrain.sampling.prompts import Prompts, read_prompts
from cachetrain.sampling.samples import FAILURES, SampleImages, default_latent_size

POLL_S = 3


def watch(args):
    """Draws each checkpoint of a run that has no samples yet, to where training would have drawn it, until the run
    has ended; waits for one to begin.

    Args:
        args: of sample.py; what they leave open is as the run has it.

    Returns:
        exit code: 1 if a checkpoint could not be drawn.

    Raises:
        ValueError, OSError: there are no prompts, or they cannot be read.
    """
    output_dir, source = Path(args.watch), _readable(args.prompts or args.prompt)
    run = _wait_for_run(output_dir)
    source = source or _readable(run.sample_prompts or run.sample_prompt)
    if source is None:
        raise ValueError(f"{output_dir}: the run has no sample prompts; pass --prompt or --prompts")
    artist, tried, drawn, failed = _Artist(args, run, source), set(), 0, 0
    while True:
        running = is_locked(output_dir)  # before looking for checkpoints: a run that has ended leaves no more of them
        waiting = (path for path in checkpoints(output_dir) if not (path in tried or _samples_dir(path).exists()))
        checkpoint = next(waiting, None)
        if checkpoint is None and not running:
            break
        if checkpoint is None:
            time.sleep(POLL_S)
            continue
        tried.add(checkpoint)
        started = time.perf_counter()
        artist.draw(checkpoint)
        if _samples_dir(checkpoint).exists():
            drawn += 1
            print(f"{checkpoint}: drawn in {time.perf_counter() - started:.0f} s", flush=True)
        else:
            failed += checkpoint.exists()
    print(f"{output_dir}: the run has ended; {drawn} checkpoints drawn" + (f", {failed} not" if failed else ""))
    return int(failed > 0)


def _readable(source):
    """`source` of prompts; a file that is broken raises now, not at the first checkpoint."""
    if isinstance(source, str):
        read_prompts(source)
    return source


def _wait_for_run(output_dir):
    """The run's settings, as its trainer parsed them."""
    path = output_dir / "args.json"
    if not path.exists():
        print(f"{output_dir}: holds no run yet; waiting for one to begin", flush=True)
    while not path.exists():
        time.sleep(POLL_S)
    return argparse.Namespace(**json.loads(path.read_text()))


def _samples_dir(checkpoint):
    return checkpoint.parent / "samples" / f"step-{step_of(checkpoint):06d}"


class _Artist:
    """Draws checkpoints as the run `run` draws its samples, but for what `args` say."""

    def __init__(self, args, run, source):
        self.args, self.run, self.source, self.samples = args, run, source, None
        self.device = load.pick_device(args.device)
        # CPUs are slow in other types, some of them a hundred times.
        self.precision = args.dtype or (run.precision if self.device.type == "cuda" else "fp32")
        self.open_index = functools.cache(lambda: open_index(run, World())[0])

    def draw(self, checkpoint):
        """Draws a checkpoint; a failure is a warning."""
        try:
            unet = self._load_unet(checkpoint)
            self._use(checkpoint, unet)
        except FAILURES as error:
            reason = error if checkpoint.exists() else "it was removed before it was drawn"
            warn(f"no samples of {checkpoint}: {reason}")
            return
        autocast = autocast_for(self.device, self.precision)
        self.samples.draw(unet, _samples_dir(checkpoint), None, step_of(checkpoint), autocast)

    def _load_unet(self, checkpoint):
        files = read_manifest(checkpoint)
        averaged = "unet_ema/config.json" in files and not self.args.raw_weights
        weights = "unet_ema" if averaged else "unet"
        missing = [name for name in files if name.startswith(f"{weights}/") and not (checkpoint / name).exists()]
        if missing:  # without weights a config would give a fresh UNet
            raise ValueError(f"it lacks {', '.join(missing)}")
        return load.load_unet(
            checkpoint / weights, torch.bfloat16 if self.precision == "bf16_pure" else torch.float32
        )

    def _use(self, checkpoint, unet):
        """Opens the Samples at the first checkpoint; later ones have the same text encoder and VAE."""
        if self.samples is None:
            args, run, info = self.args, self.run, checkpoint_info(checkpoint)
            defaults = Prompts(
                batch_size=args.batch_size,
                cfgs=tuple(args.cfgs or run.sample_cfgs),
                scheduler=args.sampler,
                num_inference_steps=args.sampler_steps or run.sampler_steps,
            )
            noise_scheduler = load.load_scheduler(checkpoint / "scheduler")
            samples = SampleImages(
                checkpoint,
                self.source,
                defaults,
                noise_scheduler,
                info,
                device=self.device,
                open_index=self.open_index,
                negative_prompt=args.negative_prompt,
                first_seed=args.seed,
            )
            samples.latent_size = default_latent_size(args, info, unet, samples.vae)
            self.samples = samples
        self.samples.model_dir = checkpoint  # the one before may have been removed
