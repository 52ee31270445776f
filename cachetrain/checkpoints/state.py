"""The training state of a checkpoint, stored as JSON and safetensors, without pickle."""

import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from cachetrain.log import describe
from cachetrain.reading import check_regular, read_json

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
        ValueError: the checkpoint has no training state, cannot be read, or lacks a tensor, or has a field with a
            value that no run writes.
    """
    directory = Path(checkpoint) / DIRECTORY
    if not (directory / "state.json").exists():
        raise ValueError(f"{checkpoint}: has no {DIRECTORY}; to start a new run from it, pass it as --model")
    advice = "resume from another checkpoint, or start a new run from this one with --model"
    try:
        check_regular(directory / "tensors.safetensors")
        tensors = load_file(directory / "tensors.safetensors")
        state = join_tensors(read_json(directory / "state.json"), tensors)
    except KeyError as error:
        raise ValueError(f"{checkpoint}: its {DIRECTORY} lacks the tensor {error}; {advice}") from None
    except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{checkpoint}: its {DIRECTORY} cannot be read: {describe(error)}; {advice}") from None
    _check_fields(state, f"{checkpoint}: its {DIRECTORY}", advice)
    return state


def _is_count(value):
    return type(value) is int and 0 <= value < 2**63


def _is_number(value):
    return type(value) in (int, float) and not math.isnan(value)


def _is_optimizer(value):
    """Whether a value has the form of an optimizer's state_dict: one group, and for each parameter a dict."""
    if not isinstance(value, dict) or value.keys() != {"state", "param_groups"}:
        return False
    state, groups = value["state"], value["param_groups"]
    if not (
        isinstance(state, dict) and isinstance(groups, list) and len(groups) == 1 and isinstance(groups[0], dict)
    ):
        return False
    numbers = groups[0].get("params")
    if not isinstance(numbers, list) or numbers != list(range(len(numbers))) or not state.keys() <= set(numbers):
        return False
    return all(isinstance(fields, dict) for fields in state.values())


def _is_settings(value):
    sizes = ("batch_size", "gradient_accum", "ranks")
    return isinstance(value, dict) and all(_is_count(value.get(name)) and value[name] for name in sizes)


def _is_statistics(value):
    if not isinstance(value, dict) or not isinstance(value.get("epoch"), list):
        return False
    numbers = [*value["epoch"], value.get("seconds")]
    return len(numbers) == 7 and all(_is_number(number) and abs(number) < math.inf for number in numbers)


def _is_validation(value):
    if not isinstance(value, dict):
        return value is None
    return _is_number(value.get("best")) and _is_count(value.get("stale")) and type(value.get("told")) is bool


def _is_shards(value):
    return isinstance(value, list) and all(
        names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names)) for names in value
    )


# What a run can have written into each field.
_FIELDS = {
    "step": _is_count,
    "visits": _is_count,
    "settings": _is_settings,
    "trained": _is_count,
    "optimizer": _is_optimizer,
    "scaler": lambda value: (
        isinstance(value, dict) and all(_is_number(v) and 0 <= v < math.inf for v in value.values())
    ),
    "statistics": _is_statistics,
    "validation": _is_validation,
}
_NEWER = {"shards": _is_shards}  # that checkpoints of earlier versions lack
# Visits of a step, as multiples of those of the last one: earlier parts of the run may have had larger batches.
_MAX_BATCH_RATIO = 1000


def _check_fields(state, where, advice):
    """Checks each field of a state, which need not come from a run of one's own."""
    if not isinstance(state, dict):
        raise ValueError(f"{where} is not a JSON object; {advice}")
    if missing := _FIELDS.keys() - state.keys():
        raise ValueError(f"{where} lacks {', '.join(sorted(missing))}; {advice}")
    wrong = [name for name, is_right in (_FIELDS | _NEWER).items() if name in state and not is_right(state[name])]
    if not wrong:
        settings = state["settings"]
        visits = state["step"] * settings["batch_size"] * settings["gradient_accum"] * settings["ranks"]
        wrong = ["visits"] if state["visits"] > _MAX_BATCH_RATIO * visits else []
    if wrong:
        found = f"{state[wrong[0]]!r:.80}"
        raise ValueError(f"{where} has a {wrong[0]} that no run writes: {found}; {advice}")


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
