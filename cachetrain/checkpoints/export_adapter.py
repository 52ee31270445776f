"""Exports the adapter of a checkpoint as one file in the key layout of web UIs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from cachetrain.checkpoints.adapters import BASE_KEY, adapter_file, read_adapter
from cachetrain.checkpoints.export import check_suffix, objective_notes, write_tensors
from cachetrain.checkpoints.info import checkpoint_info
from cachetrain.checkpoints.kohya import names_of, to_kohya
from cachetrain.diffusion.noise_schedulers import objective_of
from cachetrain.modeling import load

if TYPE_CHECKING:
    import torch


def check_adapter_exportable(base: Path, scheduler=None) -> list[str]:
    """Checks that the layout can represent the adapters of a UNet. Reads only configs.

    Args:
        base: base model, a pipeline directory or a bare UNet.
        scheduler: diffusers scheduler of the trained objective; None: that of the base model.

    Returns:
        notes for users of the exported file.

    Raises:
        ValueError: the layout cannot represent them.
    """
    unet = load.empty_unet(load.component_dir(base, "unet"))
    names_of(unet)
    notes = []
    if (base / "text_encoder").is_dir() and load.text_family(base) == "t5":
        notes.append("its base model has a T5 encoder, with which web UIs for Stable Diffusion cannot encode prompts")
    scheduler = scheduler or load.load_scheduler(base / "scheduler")
    notes += objective_notes(objective_of(scheduler), scheduler, load.pooled_width(unet.config) > 0)
    return notes


def export_adapter(
    checkpoint: Path, base: Path, out: Path, dtype: "torch.dtype | None" = None, raw_weights: bool = False
) -> list[str]:
    """Writes the adapter of a checkpoint as one .safetensors file for web UIs, which appears only when complete.

    Args:
        checkpoint: of adapters.is_adapter.
        base: its base model, of adapters.base_of.
        out: path that ends in .safetensors; replaced if it exists.
        dtype: dtype of all weights; None: as stored.
        raw_weights: export the raw weights even if there are EMA weights.

    Returns:
        notes for users of the file; they are also stored in its metadata.

    Raises:
        ValueError: the layout cannot represent the adapter.
    """
    out = Path(out)
    check_suffix(out)
    notes = check_adapter_exportable(base, load.load_scheduler(checkpoint / "scheduler"))
    unet = load.empty_unet(load.component_dir(base, "unet"))
    file = adapter_file(checkpoint, raw_weights)
    adapter = read_adapter(file, unet)[0]
    tensors = to_kohya(adapter, unet)
    if dtype is not None:
        tensors = {name: tensor if name.endswith(".alpha") else tensor.to(dtype) for name, tensor in tensors.items()}
    metadata = _metadata(checkpoint, adapter, out.stem, load.pooled_width(unet.config) > 0)
    metadata |= {"weights": "unet" if file.parent == checkpoint else "unet_ema", "notes": "\n".join(notes)}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, out, metadata)
    return notes


def _metadata(checkpoint, adapter, title, is_sdxl):
    """Returns the safetensors metadata: kohya's names, ModelSpec's, and what a later merge needs to know."""
    info = checkpoint_info(checkpoint)
    module, alpha = next(iter(adapter.alphas.items()))
    return {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(adapter.tensors[f"{module}.lora_A.weight"].shape[0]),
        "ss_network_alpha": f"{alpha:g}",
        "ss_base_model_version": "sdxl_base_v1-0" if is_sdxl else "sd_v1",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"stable-diffusion-{'xl-v1-base' if is_sdxl else 'v1'}/lora",
        "modelspec.title": title,
        "step": str(info["step"]),
        "objective": info["objective"],
        BASE_KEY: json.dumps(info["base"]),
    }
