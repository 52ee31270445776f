"""Checkpoints that hold an adapter: the base model they belong to, the files of adapters, and UNets with adapters.

cachetrain.json records the base model by name and by the fingerprints of its components, which are compared wherever
an adapter meets a base model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cachetrain.checkpoints.info import checkpoint_info, is_base
from cachetrain.checkpoints.kohya import PREFIX as KOHYA_PREFIX
from cachetrain.checkpoints.kohya import from_kohya
from cachetrain.log import counted, describe, warn
from cachetrain.modeling import load, lora
from cachetrain.modeling.files import component_files
from cachetrain.modeling.names import is_local
from cachetrain.reading import check_regular

if TYPE_CHECKING:
    import torch

# Components that decide what pictures look like; the UNet must be the same, of the others a difference is a warning.
_COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "projection")
_SETTINGS = "lora_adapter_metadata"  # key in the header of a file, of diffusers
BASE_KEY = "cachetrain_base"  # key in the header of a file for web UIs


def base_info(model_dir: Path, model: str, revision: str | None) -> dict:
    """Returns what cachetrain.json records of the base model of an adapter.

    Args:
        model_dir: pipeline directory, or a bare UNet.
        model: as the user named it.
        revision: branch, tag or commit of a Hugging Face model id.

    Returns:
        dict: "model" (an absolute path, or a Hugging Face model id), "revision", and "fingerprints", a SHA-256 of
        each component.
    """
    names = [name for name in _COMPONENTS if name == "unet" or (model_dir / name).is_dir()]
    fingerprints = {name: _fingerprint(model_dir, name) for name in names}
    return {"model": str(model_dir) if is_local(model) else model, "revision": revision, "fingerprints": fingerprints}


def _fingerprint(model_dir, name):
    return load.fingerprint(component_files(load.component_dir(model_dir, name), name))


def is_adapter(directory: Path) -> bool:
    """Whether a directory is a checkpoint that holds an adapter."""
    return (Path(directory) / lora.FILE).exists() and not (Path(directory) / "model_index.json").exists()


def base_of(checkpoint: Path, given: str | None = None) -> Path:
    """Finds the base model of an adapter's checkpoint, and checks that it is the one that was trained on.

    Args:
        checkpoint: of `is_adapter`.
        given: directory or Hugging Face model id; None: the one that is recorded.

    Returns:
        the directory of the base model.

    Raises:
        ValueError: it is not there, or its UNet is another one.
    """
    model_dir = load.resolve_model(given) if given else resolve_base(checkpoint, "--base")
    check_base(checkpoint, model_dir)
    return model_dir


def resolve_base(checkpoint: Path, flag: str) -> Path:
    """Returns the directory of the base model that a checkpoint records; `flag`: the one that names another.

    Raises:
        ValueError: it is not there.
    """
    base = recorded_base(checkpoint)
    try:
        return load.resolve_model(base["model"], base["revision"])
    except ValueError as error:
        raise ValueError(f"{checkpoint}: its base model is not there ({error}); pass it with {flag}") from None


def check_base(checkpoint: Path, model_dir: Path) -> None:
    """Checks that a model is the base model of an adapter's checkpoint; warns of other components than the UNet.

    Raises:
        ValueError: the UNet is another one.
    """
    check_fingerprints(checkpoint, recorded_base(checkpoint), model_dir)


def check_fingerprints(where: Path, base: Mapping, model_dir: Path) -> None:
    """The same of what `base_info` recorded; `where`: the file or directory that recorded it."""
    expected, model_dir = base["fingerprints"], Path(model_dir)
    if _fingerprint(model_dir, "unet") != expected["unet"]:
        raise ValueError(
            f"{where}: the adapter was trained on the UNet of {base['model']}, and that of {model_dir} is another "
            "one; pass the model that it was trained on"
        )
    others = [name for name in expected if name != "unet" and (model_dir / name).is_dir()]
    if different := [name for name in others if _fingerprint(model_dir, name) != expected[name]]:
        warn(
            f"{model_dir}: its {', '.join(different)} is not that of {base['model']}, with which the adapter in "
            f"{where} was trained; pictures will differ"
        )


def recorded_base(checkpoint: Path) -> dict:
    """Returns what `base_info` recorded in a checkpoint."""
    base = checkpoint_info(checkpoint).get("base")
    if base is None:
        raise ValueError(f"{checkpoint}: does not record the base model of its adapter; get the checkpoint again")
    return base


def adapter_file(path: Path, raw_weights: bool = False) -> Path:
    """Returns the file of an adapter: `path` itself, or in a checkpoint that of the EMA weights if there are any.

    Args:
        path: file, or directory with one.
        raw_weights: that of the trained weights even if there are EMA weights.

    Raises:
        ValueError: there is none.
    """
    path = Path(path)
    averages = path / "unet_ema" / lora.FILE
    file = path if path.is_file() else averages if averages.exists() and not raw_weights else path / lora.FILE
    if file.suffix != ".safetensors" or not file.exists():
        raise ValueError(f"{path}: not an adapter; expected a .safetensors file, or a directory with {lora.FILE}")
    return file


def read_adapter(path: Path, unet: torch.nn.Module) -> tuple[lora.Adapter, dict | None]:
    """Reads the file of an adapter, in the layout of diffusers or of web UIs.

    What it holds for text encoders is left out, with a warning: captions are encoded before training.

    Args:
        path: .safetensors file.
        unet: UNet2DConditionModel without adapters, which the adapter must fit; on any device.

    Returns:
        (Adapter, what `base_info` recorded in the file of web UIs, or None).

    Raises:
        ValueError: it is not such a file, or holds nothing for a UNet.
    """
    from safetensors import safe_open

    check_regular(path)
    with load.named(path), safe_open(path, "pt") as file:
        header = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        settings, base = json.loads(header.get(_SETTINGS, "{}")), json.loads(header.get(BASE_KEY, "null"))
    ours = {key: tensor for key, tensor in tensors.items() if key.startswith((lora.PREFIX, KOHYA_PREFIX))}
    if not ours:
        raise ValueError(f"{path}: has no tensors of an adapter of a UNet")
    if left := tensors.keys() - ours.keys():
        warn(f"{path}: left out, because not for the UNet: {counted(len(left), 'tensor')} (like {min(left)})")
    try:
        of_web_uis = all(key.startswith(KOHYA_PREFIX) for key in ours)
        adapter = from_kohya(ours, unet) if of_web_uis else _from_diffusers(ours, settings)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {describe(error)}") from error
    if not all(tensor.isfinite().all() for tensor in adapter.tensors.values()):
        raise ValueError(f"{path}: its tensors are not all finite; get it again")
    return adapter, base if is_base(base) else None


def _from_diffusers(tensors, settings):
    """Adapter of a file in one of diffusers' layouts.

    Args:
        settings: dict of LoraConfig's fields under names that begin with "unet."; {}: alpha is the rank.
    """
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
    from peft.utils.other import get_pattern_key

    tensors = {key.removeprefix(lora.PREFIX): tensor for key, tensor in tensors.items()}
    tensors = convert_unet_state_dict_to_peft(tensors)  # a file may have names of several versions
    tensors = {key.replace("_vector.weight", "_vector"): tensor for key, tensor in tensors.items()}
    settings = {key.removeprefix(lora.PREFIX): value for key, value in settings.items()}
    pattern, alphas = settings.get("alpha_pattern") or {}, {}
    for key, tensor in tensors.items():
        module, down, _ = key.partition(".lora_A.weight")
        if down:
            rank = tensor.shape[0]
            alpha = float(pattern.get(get_pattern_key(pattern, module), settings.get("lora_alpha", rank)))
            alphas[module] = alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha
            if not math.isfinite(alphas[module]):
                raise ValueError(f"its alpha of {module} is {alpha}")
    return lora.Adapter(tensors, alphas)


def load_unet(model_dir: Path, base: Path, raw_weights: bool, dtype: torch.dtype) -> torch.nn.Module:
    """Loads the UNet of a model or checkpoint, in train mode: with its adapter if it is one.

    Args:
        model_dir: pipeline directory or checkpoint.
        base: of `base_of` if `model_dir` is an adapter, else `model_dir`.
        raw_weights: the trained weights even if there are EMA weights.
        dtype: of all weights.
    """
    if not is_adapter(model_dir):
        return load.load_unet(model_dir / weights_of(model_dir, raw_weights), dtype)
    unet = load.load_unet(load.component_dir(base, "unet"), dtype)
    file = adapter_file(model_dir, raw_weights)
    attach(unet, read_adapter(file, unet)[0], file)
    return unet


def attach(unet: torch.nn.Module, adapter: lora.Adapter, path: Path, name: str = lora.NAME) -> None:
    """lora.attach, with the path of the adapter in what it raises."""
    try:
        lora.attach(unet, adapter, name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def weights_of(model_dir: Path, raw_weights: bool = False) -> str:
    """Returns the directory of the weights to draw with: "unet_ema" if there is one, else "unet"."""
    return "unet" if raw_weights or not (Path(model_dir) / "unet_ema").is_dir() else "unet_ema"
