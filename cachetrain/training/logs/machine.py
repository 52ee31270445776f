"""Speed of the run, and its use of memory and disk."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from cachetrain.modeling.conditioning import predict

GIB = 2**30

# Dense bfloat16 peak in TFLOP/s, from the vendors' data sheets. The first name found in the device name is used.
PEAK_TFLOPS = {
    "H200": 989, "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "GH200": 989, "B200": 2250, "A100": 312,
    "L40S": 362, "L40": 181, "L4": 121, "A40": 150, "A10G": 70, "A10": 125, "A6000": 155,
    "RTX 6000 Ada": 364, "RTX 5090": 210, "RTX 4090": 165, "RTX 4080": 97, "RTX 3090": 71, "RTX 3080": 60,
}  # fmt: skip


def peak_tflops(device: torch.device) -> float | None:
    """Returns the dense bfloat16 peak of a GPU in TFLOP/s; None for CPUs, other GPUs and slices of a GPU (MIG)."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    name = f" {' '.join(words)} "
    return None if "MIG" in words else next((p for known, p in PEAK_TFLOPS.items() if f" {known} " in name), None)


def forward_flops(unet, latent_shape: tuple[int, int, int], example: Callable[[], dict]) -> int:
    """Counts the floating-point operations of the forward pass of one image, on a copy of the UNet without data.

    Args:
        unet: UNet2DConditionModel; only its config is used.
        latent_shape: (C, h, w).
        example: function that returns the UNet's conditioning arguments for one sample (Conditioning.example).
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        copy = type(unet).from_config(unet.config)
        latents, timesteps = torch.empty(1, *latent_shape), torch.empty(1)
        arguments = example()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        predict(copy, latents, timesteps, arguments)
    return counter.get_total_flops()


def speed_tags(
    images: int,
    steps: int,
    elapsed_s: float,
    wait_s: float,
    *,
    flops_per_image: int | None = None,
    peak: float | None = None,
) -> dict[str, float]:
    """Returns the scalars of group 05.

    Args:
        images: images trained on in `elapsed_s`, by all ranks.
        steps: optimizer steps in `elapsed_s`.
        elapsed_s: wall time.
        wait_s: part of `elapsed_s` in which this rank waited for batches.
        flops_per_image: of a forward and backward pass, or None. Recomputation by gradient checkpointing does not
            count (PaLM, Chowdhery et al. 2022, appendix B).
        peak: TFLOP/s of all GPUs together, or None.
    """
    tags = {
        "05_Performance/images_per_second": images / elapsed_s,
        "05_Performance/steps_per_second": steps / elapsed_s,
        "05_Performance/data_wait_fraction": wait_s / elapsed_s,
    }
    if flops_per_image:
        tflops = flops_per_image * images / elapsed_s / 1e12
        tags["05_Performance/model_tflops"] = tflops
        if peak:
            tags["05_Performance/mfu"] = tflops / peak
    return tags


def system_tags(device: torch.device, output_dir: Path) -> dict[str, float]:
    """Returns the scalars of group 14, for this process and its GPU. Peaks are since the start of the process."""
    tags = {}
    with suppress(OSError):  # the directory has been renamed
        tags["14_System/disk_free_gib"] = shutil.disk_usage(output_dir).free / GIB
    if device.type == "cuda":
        tags["14_System/gpu_peak_gib"] = torch.cuda.max_memory_allocated(device) / GIB
        tags["14_System/gpu_reserved_gib"] = torch.cuda.memory_reserved(device) / GIB
        tags["14_System/gpu_alloc_retries"] = torch.cuda.memory_stats(device).get("num_alloc_retries", 0)
    with suppress(OSError), open("/proc/self/statm") as file:  # Linux
        tags["14_System/rss_gib"] = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / GIB
    return tags
