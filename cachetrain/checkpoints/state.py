"""The training state of a checkpoint, stored as JSON and safetensors, without pickle."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor

DIRECTORY = "training_state"
_TENSOR = "__tensor__"  # key in the JSON that replaces a tensor; its value is the name in the safetensors file


def split_tensors(tree: object, prefix: str = "") -> tuple[object, dict[str, torch.Tensor]]:
    """Separates nested dicts and lists into a JSON-able tree and tensors.

    Args:
        tree: nested dicts, lists and tuples of tensors and JSON-able values.
        prefix: start of the tensors' names.

    Returns:
        (the tree with each tensor replaced by {"__tensor__": name}, {name: tensor}).
    """
    if isinstance(tree, torch.Tensor):
        return {_TENSOR: prefix}, {prefix: tree}
    if not isinstance(tree, dict | list | tuple):
        return tree, {}
    tensors, parts = {}, {}
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        parts[key], more = split_tensors(value, f"{prefix}.{key}".strip("."))
        tensors |= more
    return parts if isinstance(tree, dict) else list(parts.values()), tensors


def join_tensors(tree: object, tensors: dict[str, torch.Tensor]) -> object:
    """Inverse of `split_tensors`, for a tree read from JSON: decimal keys become ints."""
    if isinstance(tree, list):
        return [join_tensors(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if _TENSOR in tree:
        return tensors[tree[_TENSOR]]
    return {int(k) if k.isdecimal() else k: join_tensors(value, tensors) for k, value in tree.items()}


def write_state(checkpoint: Path, tree: object, tensors: dict[str, torch.Tensor]) -> None:
    """Writes a state separated by `split_tensors` to `<checkpoint>/training_state/`; tensors must be on the CPU."""
    directory = Path(checkpoint) / DIRECTORY
    directory.mkdir()
    save_file(tensors, directory / "tensors.safetensors")
    (directory / "state.json").write_text(json.dumps(tree, indent=1) + "\n")


def read_state(checkpoint: Path) -> dict:
    """Reads the state that was passed to `Saving.save`, with tensors on the CPU.

    Raises:
        ValueError: the checkpoint has no training state, or a tensor is missing.
    """
    directory = Path(checkpoint) / DIRECTORY
    if not (directory / "state.json").exists():
        raise ValueError(f"{checkpoint}: has no {DIRECTORY}; to start a new run from it, pass it as --model")
    tensors = load_file(directory / "tensors.safetensors")
    try:
        return join_tensors(json.loads((directory / "state.json").read_text()), tensors)
    except KeyError as error:
        raise ValueError(
            f"{checkpoint}: its {DIRECTORY} lacks the tensor {error}; resume from another checkpoint, or start "
            "a new run from this one with --model"
        ) from None


def placed_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Moves a saved tensor to the device and memory format of a parameter, and shards it like the parameter.

    The dtype does not change. Tensors of another shape (counters, tables) are returned unchanged.
    """
    if tensor.shape != parameter.shape:
        return tensor
    if isinstance(parameter, DTensor):
        tensor = tensor.to(parameter.device)
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
