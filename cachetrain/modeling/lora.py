"""LoRA and DoRA adapters of a UNet, by peft: small trained matrices beside frozen layers. torch and peft are imported
only inside functions.

LoRA (Hu et al. 2021) adds alpha / rank x B A to a weight; DoRA (Liu et al. 2024) then scales each row of the sum to a
trained length. Files have diffusers' layout, which `pipeline.load_lora_weights` reads.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cachetrain.log import counted

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DConditionModel

FILE = "pytorch_lora_weights.safetensors"  # diffusers' LORA_WEIGHTNAME_SAFE
PREFIX = "unet."  # of the names in a file
NAME = "default"  # of the trained adapter, in peft

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
# The other linear layers and convolutions of transformers, resnets, down- and upsamplers, as kohya's sd-scripts.
_BLOCKS = ("proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv")
# value of --lora_targets: ends of the names of the modules that get an adapter.
TARGETS = {
    "attention": _ATTENTION,
    "attention_ff": _ATTENTION + _FEED_FORWARD,
    "all": _ATTENTION + _FEED_FORWARD + _BLOCKS,
}


class Adapter(NamedTuple):
    """An adapter outside a UNet.

    Attributes:
        tensors: {name: tensor}, where a name is that of the UNet's module and ".lora_A.weight" (down),
            ".lora_B.weight" (up) or ".lora_magnitude_vector" (DoRA).
        alphas: {name of the module: alpha}.
    """

    tensors: dict[str, torch.Tensor]
    alphas: dict[str, float]


def check_installed() -> None:
    """Raises a ValueError if peft is not installed, or is older than diffusers needs."""
    from diffusers.utils import USE_PEFT_BACKEND

    if not USE_PEFT_BACKEND:
        raise ValueError("adapters need peft 0.17 or newer: run `pip install -U peft`")


def add(
    unet: UNet2DConditionModel,
    rank: int,
    alpha: float,
    targets: str,
    *,
    dropout: float = 0.0,
    dora: bool = False,
    seed: int = 0,
) -> None:
    """Adds an adapter that changes nothing yet, and freezes all else. Call this before wrapping the UNet.

    Args:
        unet: float32, on any device; modified in place: an adapted layer `x` becomes `x.base_layer`.
        rank: of the matrices.
        alpha: the product of the matrices is scaled by alpha / rank.
        targets: key of TARGETS.
        dropout: share of the inputs of an adapter that are set to 0 in train mode; torch's global generator draws.
        dora: train the length of each row of the weights, too.
        seed: of the initial values.

    Raises:
        ValueError: peft is not there, or the UNet has none of the layers.
    """
    check_installed()
    import torch
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

    ends = tuple(f".{end}" for end in TARGETS[targets])
    if not any(name.endswith(ends) for name, _ in unet.named_modules()):
        raise ValueError(
            f"--lora_targets {targets}: this UNet has none of these layers ({', '.join(TARGETS[targets])})"
        )
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(TARGETS[targets]), lora_dropout=dropout, use_dora=dora
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(config, NAME)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_("lora_" in name)
    for module in unet.modules():
        # Autocast casts the inputs; a float32 copy of each would only take memory. DoRA's norms need float32.
        if isinstance(module, LoraLayer) and not dora:
            module.cast_input_dtype_enabled = False


def is_adapted(unet: torch.nn.Module) -> bool:
    """Whether a UNet has an adapter."""
    return bool(getattr(unet, "peft_config", None))


def trained_state(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns {name of the parameter in `unet`: tensor} of the adapter that `add` has added."""
    return {name: parameter.detach() for name, parameter in unet.named_parameters() if "lora_" in name}


def file_name_of(parameter_name: str) -> str:
    """Returns the name that a parameter of `add` has in a file, as of peft.get_peft_model_state_dict."""
    name = parameter_name.replace(f".{NAME}.weight", ".weight")
    return PREFIX + re.sub(r"(\.lora_magnitude_vector)\.weight$", r"\1", name)


def save(unet: torch.nn.Module, weights: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Writes FILE, with the adapter's settings in its header.

    Args:
        unet: with an adapter of `add`.
        weights: {name of the parameter in `unet`: CPU tensor}.
    """
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    layers = {file_name_of(name).removeprefix(PREFIX): tensor for name, tensor in weights.items()}
    config = unet.peft_config[NAME]
    # Only what is needed: older versions of peft refuse fields that they do not know, and a dropout would be active.
    settings = {"r": config.r, "lora_alpha": config.lora_alpha, "use_dora": config.use_dora}
    settings["target_modules"] = sorted(config.target_modules)
    StableDiffusionLoraLoaderMixin.save_lora_weights(directory, layers, unet_lora_adapter_metadata=settings)


def load(unet: torch.nn.Module, path: Path) -> None:
    """Loads a file of `save` into the adapter that `add` has added with the same settings.

    Raises:
        ValueError: the file does not hold exactly the tensors of this adapter.
    """
    import torch
    from safetensors.torch import load_file

    saved = load_file(path)
    parameters = {file_name_of(name): tensor for name, tensor in trained_state(unet).items()}
    wrong = sorted(parameters.keys() ^ saved.keys())
    wrong += sorted(name for name in parameters.keys() & saved.keys() if parameters[name].shape != saved[name].shape)
    if wrong:
        raise ValueError(
            f"{path}: is not the adapter of these settings: missing, left over or of another shape: "
            f"{counted(len(wrong), 'tensor')} (like {wrong[0]}); restore --lora_rank, --lora_targets and --dora"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])


def attach(unet: torch.nn.Module, adapter: Adapter, name: str = NAME) -> None:
    """Adds a trained adapter to a UNet, to draw with it or to merge it; its tensors get the dtype of the UNet.

    Args:
        unet: without adapters, or with those of earlier calls; modified in place.
        name: another one for each adapter.

    Raises:
        ValueError: peft is not there, or the adapter does not fit the UNet.
    """
    check_installed()
    _check_fit(unet, adapter)
    tensors = {PREFIX + key: tensor for key, tensor in adapter.tensors.items()}
    alphas = {f"{PREFIX}{module}.alpha": alpha for module, alpha in adapter.alphas.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # of the earlier calls
        unet.load_lora_adapter(tensors, prefix=PREFIX.rstrip("."), network_alphas=alphas, adapter_name=name)
    unet.requires_grad_(False)


def _check_fit(unet, adapter):
    modules = dict(unet.named_modules())
    for module in adapter.alphas:
        layer = modules.get(module)
        layer = getattr(layer, "base_layer", layer)
        down, up = (adapter.tensors.get(f"{module}.lora_{side}.weight") for side in "AB")
        if layer is None or getattr(layer, "weight", None) is None:
            raise ValueError(f"the adapter does not fit the UNet, which has no layer {module}; pass its base model")
        if down is None or up is None:
            raise ValueError(f"the adapter is incomplete: it lacks a tensor of {module}; get it again")
        shape = layer.weight.shape
        fits = down.ndim == up.ndim == len(shape) and down.shape[1:] == shape[1:]
        if not (fits and up.shape[:1] == shape[:1] and up.shape[1] == down.shape[0]):
            raise ValueError(
                f"the adapter does not fit the UNet: {module} is {list(shape)}, its matrices are {list(down.shape)} "
                f"and {list(up.shape)}; pass its base model"
            )
