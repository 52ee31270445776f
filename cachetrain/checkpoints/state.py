"""What a run is beside its weights, as JSON and safetensors: no pickle."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor

DIRECTORY = "training_state"
_TENSOR = "__tensor__"  # in the JSON it stands for a tensor, under its name in the safetensors file


def split_tensors(tree, prefix=""):
    """Takes the tensors out of nested dicts and lists.

    Returns:
        (the tree with {"__tensor__": name} in place of each, JSON-able if all else is; {name: tensor}).
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


def join_tensors(tree, tensors):
    """The inverse of `split_tensors`, after the tree has been JSON: keys that are numbers become ints again."""
    if isinstance(tree, list):
        return [join_tensors(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if _TENSOR in tree:
        return tensors[tree[_TENSOR]]
    return {int(k) if k.isdecimal() else k: join_tensors(value, tensors) for k, value in tree.items()}


def write_state(checkpoint, tree, tensors):
    """Writes what `split_tensors` gives into `<checkpoint>/training_state/`; tensors on the CPU."""
    directory = Path(checkpoint) / DIRECTORY
    directory.mkdir()
    save_file(tensors, directory / "tensors.safetensors")
    (directory / "state.json").write_text(json.dumps(tree, indent=1) + "\n")


def read_state(checkpoint):
    """The state of a run as `Saving.save` was given it; tensors on the CPU.

    Raises:
        ValueError: the checkpoint has none, or a tensor is missing.
    """
    directory = Path(checkpoint) / DIRECTORY
    if not (directory / "state.json").exists():
        raise ValueError(f"{checkpoint}: has no {DIRECTORY}; a new run can start from it with --model")
    tensors = load_file(directory / "tensors.safetensors")
    try:
        return join_tensors(json.loads((directory / "state.json").read_text()), tensors)
    except KeyError as error:
        raise ValueError(f"{checkpoint}: its {DIRECTORY} lacks the tensor {error}") from None


def alike(tensor, parameter):
    """A saved tensor as it belongs to a parameter: on its device, in its memory format, its part of it if sharded.

    The dtype stays; tensors of another shape (counters, tables) stay as they are.
    """
    if tensor.shape != parameter.shape:
        return tensor
    if isinstance(parameter, DTensor):
        tensor = tensor.to(parameter.device)
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
