"""What is logged once, at the start of a run: planned rates, noise schedule, architecture, configuration."""

import hashlib
import importlib.metadata
import json
import platform

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from cachetrain.training.logs.gradients import block_of, positions_of

_PLANNED_POINTS = 1000
_PACKAGES = ("torch", "diffusers", "transformers", "torch-optimi", "safetensors", "numpy", "Pillow", "tensorboard")


def planned_rates(metrics, rate, max_steps, start_step=0):
    """Group 04: the learning rate of the whole run, at up to 1000 steps.

    Args:
        rate: function of an optimizer step, from 1.
        start_step: of a resumed run; what was drawn of the rest has been purged with it.
    """
    steps = np.unique(np.linspace(1, max_steps, min(max_steps, _PLANNED_POINTS)).round().astype(int)).tolist()
    metrics.curve("04_Learning_Rate/planned", [(step, rate(step)) for step in steps if step > start_step])


def noise_schedule(metrics, alphas_cumprod):
    """Group 06: log SNR and beta over the timesteps, as a picture, for its x axis is not the optimizer step.

    Args:
        alphas_cumprod: float32 [T], or None for flow matching, which has no betas.
    """
    if alphas_cumprod is None:
        sigma = (np.arange(1000) + 0.5) / 1000
        metrics.image("06_Diffusion/snr", plot(2 * np.log10((1 - sigma) / sigma), "log10 SNR over t"), 0)
        return
    signal = alphas_cumprod.double().cpu().numpy()
    with np.errstate(divide="ignore"):
        snr = np.log10(signal / (1 - signal))
    betas = 1 - signal / np.concatenate([[1.0], signal[:-1]])
    metrics.image("06_Diffusion/snr", plot(snr, "log10 SNR over t"), 0)
    metrics.image("06_Diffusion/beta", plot(betas, "beta over t"), 0)


def plot(values, title, size=(480, 300)):
    """A PIL image (width, height) of one curve over 0..N-1; infinite values are left out."""
    image = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=12)
    left, top, right, bottom = 60, 30, size[0] - 15, size[1] - 25
    positions = np.flatnonzero(np.isfinite(values))
    low, high = float(values[positions].min()), float(values[positions].max())
    span = high - low or 1.0
    for part in range(5):
        x, y = left + (right - left) * part / 4, bottom - (bottom - top) * part / 4
        draw.line([(left, y), (right, y)], fill="#dddddd")
        value = round(low + span * part / 4, 12)  # no 1e-17 for zero
        draw.text((left - 5, y), f"{value:.3g}", fill="black", font=font, anchor="rm")
        draw.text((x, bottom + 5), f"{(len(values) - 1) * part / 4:.0f}", fill="black", font=font, anchor="mt")
    xs = left + (right - left) * positions / max(1, len(values) - 1)
    ys = bottom - (bottom - top) * (values[positions] - low) / span
    draw.line(list(zip(xs.tolist(), ys.tolist(), strict=True)), fill="#d06000", width=2)
    draw.text((left, 8), title, fill="black", font=font)
    return image


def architecture(metrics, unet):
    """Group 08: a table of the blocks."""
    named = list(unet.named_parameters())
    blocks, slots = positions_of([block_of(name) for name, _ in named])
    rows = [[0, 0, set()] for _ in blocks]
    for (_, parameter), slot in zip(named, slots, strict=True):
        rows[slot][0] += parameter.numel()
        rows[slot][1] += parameter.numel() * parameter.requires_grad
        rows[slot][2].add(str(parameter.dtype).removeprefix("torch."))
    total = [sum(row[0] for row in rows), sum(row[1] for row in rows), set().union(*(row[2] for row in rows))]
    lines = ["| block | parameters | trainable | dtype |", "|---|---:|---:|---|"]
    for name, (count, trained, dtypes) in zip([*blocks, "all"], [*rows, total], strict=True):
        lines.append(f"| {name} | {count:,} | {trained:,} | {', '.join(sorted(dtypes))} |")
    metrics.text("08_Model_Architecture/blocks", "\n".join(lines))


def configuration(metrics, settings, caches, device, start_step=None):
    """Group 15: resolved settings, versions, what the caches are, and the HPARAMS tab.

    A run that is resumed writes the texts again, at its first step.

    Args:
        settings: dict of the resolved arguments.
        caches: one line that tells caches of different encoders or settings apart.
    """
    step = start_step + 1 if start_step else 0
    metrics.text("15_Configuration/args", f"```\n{json.dumps(settings, indent=2)}\n```", step)
    packages = "\n".join(f"- {name} {found}" for name, found in versions(device))
    metrics.text("15_Configuration/versions", packages, step)
    metrics.text("15_Configuration/caches", caches, step)
    if step:
        return
    metrics.hparams(settings, ["01_Training/loss_raw", "val/loss", "05_Performance/images_per_second"])


def cache_fingerprint(index):
    """A short hash that is equal for runs on caches of the same encoders and settings."""
    identity = repr((index.image_header.run_identity, index.text_header.run_identity, len(index)))
    return f"{hashlib.sha256(identity.encode()).hexdigest()[:12]} ({len(index):,} pairs)"


def versions(device):
    """[(name, version)] of what a result depends on."""
    found = [(package, importlib.metadata.version(package)) for package in _PACKAGES]
    gpu = [("CUDA", torch.version.cuda), ("GPU", torch.cuda.get_device_name(device))] if device.type == "cuda" else []
    return [("Python", platform.python_version()), *found, *gpu, ("system", platform.platform())]
