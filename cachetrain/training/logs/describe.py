"""Logs written once, at the start of a run: planned learning rate, noise schedule, architecture, configuration."""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from cachetrain.log import counted
from cachetrain.training.logs.gradients import block_of, number_labels
from cachetrain.training.logs.metrics import Metrics

_PLANNED_POINTS = 1000
_PACKAGES = ("torch", "diffusers", "transformers", "torch-optimi", "safetensors", "numpy", "Pillow", "tensorboard")


def planned_learning_rate(
    metrics: Metrics, learning_rate: Callable[[int], float], max_steps: int, start_step: int = 0
) -> None:
    """Group 04: the learning rate of the whole run, at up to 1000 steps.

    Args:
        metrics: Metrics or NoMetrics.
        learning_rate: function of an optimizer step, from 1.
        max_steps: length of the run.
        start_step: optimizer steps done, in a resumed run; points up to it are in the log already.
    """
    steps = np.unique(np.linspace(1, max_steps, min(max_steps, _PLANNED_POINTS)).round().astype(int)).tolist()
    metrics.curve("04_Learning_Rate/planned", [(step, learning_rate(step)) for step in steps if step > start_step])


def noise_schedule(metrics: Metrics, alphas_cumprod: torch.Tensor | None) -> None:
    """Group 06: log SNR and beta over the timesteps, as images: TensorBoard's curves are over optimizer steps.

    Args:
        metrics: Metrics or NoMetrics.
        alphas_cumprod: float32 [T], or None for flow matching, which has no betas.
    """
    if alphas_cumprod is None:
        sigma = (np.arange(1000) + 0.5) / 1000
        metrics.image("06_Diffusion/snr", plot(2 * np.log10((1 - sigma) / sigma), "log10 SNR over t"), 0)
        return
    alphas_cumprod = alphas_cumprod.double().cpu().numpy()
    with np.errstate(divide="ignore"):
        log_snr = np.log10(alphas_cumprod / (1 - alphas_cumprod))
    betas = 1 - alphas_cumprod / np.concatenate([[1.0], alphas_cumprod[:-1]])
    metrics.image("06_Diffusion/snr", plot(log_snr, "log10 SNR over t"), 0)
    metrics.image("06_Diffusion/beta", plot(betas, "beta over t"), 0)


def plot(values: np.ndarray, title: str, size: tuple[int, int] = (480, 300)) -> Image.Image:
    """Plots a curve over 0 to N - 1 as an image of `size` (width, height); values that are not finite are skipped."""
    image = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=12)
    left, top, right, bottom = 60, 30, size[0] - 15, size[1] - 25
    positions = np.flatnonzero(np.isfinite(values))
    low, high = float(values[positions].min()), float(values[positions].max())
    span = high - low or 1.0
    for part in range(5):
        x, y = left + (right - left) * part / 4, bottom - (bottom - top) * part / 4
        draw.line([(left, y), (right, y)], fill="#dddddd")
        value = round(low + span * part / 4, 12)  # rounded so that zero is not shown as 1e-17
        draw.text((left - 5, y), f"{value:.3g}", fill="black", font=font, anchor="rm")
        draw.text((x, bottom + 5), f"{(len(values) - 1) * part / 4:.0f}", fill="black", font=font, anchor="mt")
    xs = left + (right - left) * positions / max(1, len(values) - 1)
    ys = bottom - (bottom - top) * (values[positions] - low) / span
    draw.line(list(zip(xs.tolist(), ys.tolist(), strict=True)), fill="#d06000", width=2)
    draw.text((left, 8), title, fill="black", font=font)
    return image


def architecture(metrics: Metrics, unet: torch.nn.Module) -> None:
    """Group 08: a table of the UNet's blocks."""
    named = list(unet.named_parameters())
    blocks, block_ids = number_labels([block_of(name) for name, _ in named])
    rows = [[0, 0, set()] for _ in blocks]
    for (_, parameter), block in zip(named, block_ids, strict=True):
        rows[block][0] += parameter.numel()
        rows[block][1] += parameter.numel() * parameter.requires_grad
        rows[block][2].add(str(parameter.dtype).removeprefix("torch."))
    total = [sum(row[0] for row in rows), sum(row[1] for row in rows), set().union(*(row[2] for row in rows))]
    lines = ["| block | parameters | trainable | dtype |", "|---|---:|---:|---|"]
    for name, (count, trained, dtypes) in zip([*blocks, "all"], [*rows, total], strict=True):
        lines.append(f"| {name} | {count:,} | {trained:,} | {', '.join(sorted(dtypes))} |")
    metrics.text("08_Model_Architecture/blocks", "\n".join(lines))


def configuration(
    metrics: Metrics, settings: dict, caches: str, device: torch.device, start_step: int | None = None
) -> None:
    """Group 15: settings, versions, cache fingerprint, and the HPARAMS tab.

    A resumed run writes the texts again, at its first step.

    Args:
        metrics: Metrics or NoMetrics.
        settings: the parsed command line.
        caches: of `cache_fingerprint`.
        device: of the run.
        start_step: optimizer steps done, in a resumed run.
    """
    step = start_step + 1 if start_step else 0
    metrics.text("15_Configuration/args", f"```\n{json.dumps(settings, indent=2)}\n```", step)
    packages = "\n".join(f"- {name} {version}" for name, version in versions(device))
    metrics.text("15_Configuration/versions", packages, step)
    metrics.text("15_Configuration/caches", caches, step)
    if step:
        return
    metrics.hparams(settings, ["01_Training/loss_raw", "val/loss", "05_Performance/images_per_second"])


def cache_fingerprint(index) -> str:
    """Returns a short hash of encoders, cache settings and number of pairs, followed by that number."""
    identity = repr((index.image_header.run_identity, index.text_header.run_identity, len(index)))
    return f"{hashlib.sha256(identity.encode()).hexdigest()[:12]} ({counted(index.num_pairs, 'pair')})"


def versions(device: torch.device) -> list[tuple[str, str]]:
    """Returns (name, version) of the software and hardware that results depend on."""
    packages = [(package, importlib.metadata.version(package)) for package in _PACKAGES]
    gpu = [("CUDA", torch.version.cuda), ("GPU", torch.cuda.get_device_name(device))] if device.type == "cuda" else []
    return [("Python", platform.python_version()), *packages, *gpu, ("system", platform.platform())]
