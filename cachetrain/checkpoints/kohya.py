"""The key layout of web UIs for adapters, that of kohya's sd-scripts, from and to the names of the UNet's modules.

A key is "lora_unet_", the module's name with "_" for ".", and ".lora_down.weight", ".lora_up.weight", ".alpha" or
".dora_scale". Of SDXL's UNet, modules have the names of the original repository; of others, diffusers' names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cachetrain.checkpoints.original_layout import unet_names
from cachetrain.modeling import load
from cachetrain.modeling.lora import Adapter

if TYPE_CHECKING:
    import torch

PREFIX = "lora_unet_"
_PARTS = {
    "lora_down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
    "dora_scale": "lora_magnitude_vector",
}


def names_of(unet: torch.nn.Module) -> dict[str, str]:
    """Returns {name of a module: its name in keys, without PREFIX} of a UNet2DConditionModel without adapters.

    Raises:
        ValueError: a module has no place in the original layout of SDXL.
    """
    return _original_names(unet) if load.pooled_width(unet.config) else _diffusers_names(unet)


def to_kohya(adapter: Adapter, unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns an adapter under the keys of web UIs.

    Args:
        unet: UNet2DConditionModel without adapters, on any device.

    Raises:
        ValueError: a module has no place in the original layout of SDXL.
    """
    import torch

    names = names_of(unet)
    parts, tensors = {ours: theirs for theirs, ours in _PARTS.items()}, {}
    for key, tensor in adapter.tensors.items():
        module, part = _split(key)
        if part == "lora_magnitude_vector":  # one number for each row of the weight, as its norm with keepdim
            rows = unet.get_submodule(module).weight
            tensor = tensor.reshape(-1, *[1] * (rows.ndim - 1))
        tensors[f"{PREFIX}{names[module]}.{parts[part]}"] = tensor.contiguous()
    return tensors | {
        f"{PREFIX}{names[module]}.alpha": torch.tensor(alpha) for module, alpha in adapter.alphas.items()
    }


def from_kohya(tensors: Mapping[str, torch.Tensor], unet: torch.nn.Module) -> Adapter:
    """The inverse of `to_kohya`; of SDXL's UNet, diffusers' names are understood, too.

    Args:
        tensors: {key that begins with PREFIX: tensor}.
        unet: UNet2DConditionModel without adapters, on any device.

    Raises:
        ValueError: a key is none of this UNet, or of another kind of adapter.
    """
    modules = {name: module for module, name in _diffusers_names(unet).items()}
    if load.pooled_width(unet.config):
        modules |= {name: module for module, name in _original_names(unet).items()}
    found, alphas = {}, {}
    for key, tensor in tensors.items():
        name, _, part = key.removeprefix(PREFIX).partition(".")
        if name not in modules:
            raise ValueError(f"{key} belongs to no layer of the UNet; pass the adapter's base model")
        module = modules[name]
        if part == "alpha":
            if tensor.numel() != 1:
                raise ValueError(f"{key} is of shape {list(tensor.shape)}, expected one number; get it again")
            alphas[module] = tensor.item()
        elif part == "dora_scale":
            conv = unet.get_submodule(module).weight.ndim > 2
            found[f"{module}.lora_magnitude_vector"] = tensor.reshape(1, -1, 1, 1) if conv else tensor.flatten()
        elif part in _PARTS:
            found[f"{module}.{_PARTS[part]}"] = tensor
        else:
            raise ValueError(f"{key} is of another kind of adapter; LoRA and DoRA are supported")
    ranks = {_split(key)[0]: tensor.shape[0] for key, tensor in found.items() if key.endswith(".lora_A.weight")}
    if not all(math.isfinite(alpha) for alpha in alphas.values()):
        raise ValueError("an alpha is not a finite number; get the adapter again")
    # Without an alpha, it is the rank.
    return Adapter(found, {module: alphas.get(module, float(rank)) for module, rank in ranks.items()})


def _split(key):
    """(module, what comes after it) of a name in Adapter.tensors."""
    module, _, part = key.partition(".lora_")
    return module, f"lora_{part}"


def _diffusers_names(unet):
    return {name: name.replace(".", "_") for name, _ in unet.named_modules()}


def _original_names(unet):
    shapes = {key: tuple(tensor.shape) for key, tensor in unet.state_dict().items()}
    names = unet_names(shapes, unet.config)
    return {
        key.removesuffix(".weight"): name.removesuffix(".weight").replace(".", "_")
        for key, name in names.items()
        if key.endswith(".weight")
    }
