"""Draws the checkpoints of a run as they appear, in a separate process."""

import argparse
import functools
import time
from pathlib import Path

import torch

from cachetrain.atomic import is_locked
from cachetrain.checkpoints import adapters
from cachetrain.checkpoints.info import checkpoint_info
from cachetrain.checkpoints.manifest import read_manifest
from cachetrain.checkpoints.save import checkpoints, step_of
from cachetrain.data.split import open_index
from cachetrain.distributed import World
from cachetrain.log import counted, describe, info, warn
from cachetrain.modeling import load
from cachetrain.modeling.precision import autocast_for
from cachetrain.reading import read_json
from cachetrain.sampling.prompts import Prompts, read_prompts
from cachetrain.sampling.samples import SampleImages, default_latent_size

POLL_S = 3
# What is needed of a run's args.json before its first checkpoint, and its type.
_SETTINGS = {
    "precision": str,
    "sample_cfgs": list,
    "sample_prompt": (list, type(None)),
    "sample_prompts": (str, type(None)),
    "sampler_steps": int,
}
# Flags that the runs of older versions do not have.
_NEWER = {"kohya_repeats": False, "time_ids": None, "sizes": None, "shard_cache": None, "shard_cache_gb": None}


def watch(args: argparse.Namespace) -> int:
    """Draws each checkpoint of a run that has no samples yet, until the run has ended.

    Waits for the run if it has not started. The pictures are written where training would write them.

    Args:
        args: flags of sample.py; settings not given are taken from the run.

    Returns:
        exit code: 1 if a checkpoint could not be drawn.

    Raises:
        ValueError, OSError: there are no prompts, or the prompts cannot be read.
    """
    output_dir, source = Path(args.watch), _checked(args.prompts or args.prompt)
    run = _wait_for_run(output_dir)
    source = source or _checked(run.sample_prompts or run.sample_prompt)
    if source is None:
        raise ValueError(f"{output_dir}: the run has no sample prompts; pass --prompt or --prompts")
    drawer, tried, drawn, failed = _CheckpointDrawer(args, run, source), set(), 0, 0
    while True:
        running = is_locked(output_dir)  # checked before listing, so that the last checkpoint is not missed
        pending = (path for path in checkpoints(output_dir) if not (path in tried or _samples_dir(path).exists()))
        checkpoint = next(pending, None)
        if checkpoint is None and not running:
            break
        if checkpoint is None:
            time.sleep(POLL_S)
            continue
        tried.add(checkpoint)
        start = time.perf_counter()
        drawer.draw(checkpoint)
        if _samples_dir(checkpoint).exists():
            drawn += 1
            info(f"{checkpoint}: drawn in {time.perf_counter() - start:.0f} s")
        else:
            failed += checkpoint.exists()
    info(
        f"{output_dir}: the run has ended; {counted(drawn, 'checkpoint')} drawn"
        + (f", {failed} failed" if failed else "")
    )
    return int(failed > 0)


def _checked(source):
    """Returns `source`; reads a prompt file once, so that errors show now and not at the first checkpoint."""
    if isinstance(source, str):
        read_prompts(source)
    return source


def _wait_for_run(output_dir):
    """Returns the run's flags, as parsed by the trainer."""
    path = output_dir / "args.json"
    if not path.exists():
        info(f"{output_dir}: waiting for a run to start there")
    while not path.exists():
        time.sleep(POLL_S)
    return _settings_of(path)


def _settings_of(path):
    """Returns the flags in an args.json, which need not be that of a run of this project."""
    settings = read_json(path)
    for name, kinds in _SETTINGS.items():
        if name not in settings or not isinstance(settings[name], kinds):
            found = f"{settings[name]!r:.40}" if name in settings else "nothing"
            raise ValueError(f"{path}: is not that of a run: {name} is {found}; pass the --output_dir of training")
    return argparse.Namespace(**_NEWER | settings)


def _samples_dir(checkpoint):
    return checkpoint.parent / "samples" / f"step-{step_of(checkpoint):06d}"


class _CheckpointDrawer:
    """Draws checkpoints with the sample settings of the run (`run`), overridden by the flags (`args`)."""

    def __init__(self, args, run, source):
        self.args = args
        self.run = run
        self.source = source
        self.samples = None
        self.device = load.pick_device(args.device)
        # On a CPU always fp32: other dtypes can be a hundred times slower.
        self.precision = args.dtype or (run.precision if self.device.type == "cuda" else "fp32")
        self.open_index = functools.cache(lambda: open_index(run, World())[0])

    def draw(self, checkpoint):
        """Draws a checkpoint; warns on failure."""
        try:
            base = adapters.base_of(checkpoint, self.args.base) if adapters.is_adapter(checkpoint) else checkpoint
            unet = self._load_unet(checkpoint, base)
            self._open_samples(checkpoint, base, unet)
        except Exception as error:  # any: the next checkpoint may be drawn
            reason = describe(error) if checkpoint.exists() else "the checkpoint was removed before it was drawn"
            warn(f"no samples of {checkpoint}: {reason}")
            return
        autocast = autocast_for(self.device, self.precision)
        self.samples.draw(unet, _samples_dir(checkpoint), None, step_of(checkpoint), autocast)

    def _load_unet(self, checkpoint, base):
        read_manifest(checkpoint)  # refuses one that is incomplete
        dtype = torch.bfloat16 if self.precision == "bf16_pure" else torch.float32
        return adapters.load_unet(checkpoint, base, self.args.raw_weights, dtype)

    def _open_samples(self, checkpoint, base, unet):
        """Creates the SampleImages at the first checkpoint; text encoder and VAE are the same in later ones."""
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
                base,
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
        self.samples.model_dir = base  # the previous checkpoint may have been removed
