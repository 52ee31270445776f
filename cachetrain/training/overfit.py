"""The end of a run with --overfit: whether a handful of samples was learned by heart, and a picture of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from cachetrain.data.batching import collate
from cachetrain.data.dataset import CachedPairs, SampleKey
from cachetrain.diffusion.objective import denoised
from cachetrain.log import counted, describe, info, warn
from cachetrain.modeling import load
from cachetrain.modeling.conditioning import moved
from cachetrain.sampling.render import decode_image, grid, save_png

SHARE = 0.1  # --overfit succeeds once the loss falls below this share of the loss at step 1
SHEET = "overfit.png"
_MAX_PAIRS = 16


def report(run, pairs: CachedPairs, forward: Callable, unet: torch.nn.Module, losses: tuple, step: int) -> int:
    """Reports the result and writes the sheet; returns the exit code.

    Args:
        run: Run.
        pairs: the samples.
        forward: function of (UNet, batch) that returns a ForwardResult.
        losses: (first, last), with the fixed noise.
        step: optimizer steps done.
    """
    first, last = losses
    if run.world.main:
        count, shown = len(run.index), min(len(run.index), _MAX_PAIRS)
        more = [f"... and {count - shown:,} more"] if count > shown else []
        info("\n  ".join(["pairs that were trained:", *map(run.index.stem, range(shown)), *more]))
        try:
            _write_sheet(run, pairs, forward, unet)
        except Exception as error:  # any: pictures are not worth a run
            warn(f"no {SHEET}: {describe(error)}")
    result = f"the loss on fixed noise went from {first:.4f} to {last:.4f} in {counted(step, 'step')}"
    if last < SHARE * first:
        info(f"overfit succeeded: {result}; script, caches and model train")
        return 0
    info(
        f"overfit failed: {result}, not below a tenth of the first; raise --max_steps or --lr, and if that does not "
        "help, check the caches, the model and the flags"
    )
    return 1


@torch.no_grad()
def _write_sheet(run, pairs, forward, unet):
    """Draws three pictures of each of the first pairs: the pair, the noisy one, what the UNet makes of that."""
    if run.args.fsdp or not (run.model_dir / "vae").is_dir():  # a sharded UNet needs all ranks
        return
    vae, images, labels = load.load_vae(run.model_dir / "vae").to(run.device), [], []
    for i in range(min(len(run.index), _MAX_PAIRS)):
        batch = collate([pairs[SampleKey(0, i)]], run.conditioning)
        batch = {k: v.to(run.device) for k, v in batch.items() if isinstance(v, torch.Tensor)} | {
            "conditioning": moved(batch["conditioning"], run.device)
        }
        result, latents = forward(unet, batch), batch["latents"]
        noisy = result.alpha * latents + result.sigma * batch["noise"]
        clean = denoised(run.objective, noisy, result.prediction.float(), result.alpha, result.sigma)
        images += [decode_image(vae, part, pairs.scaling) for part in (latents, noisy, clean)]
        name, timestep = Path(run.index.stem(i)).name, int(batch["timesteps"])
        labels += [name, f"with the noise of timestep {timestep}", "what the UNet makes of it"]
    path = run.output_dir / SHEET
    save_png(grid(images, labels, columns=3), path)
    info(f"{path}: each pair, with its noise, and what the UNet makes of that")
