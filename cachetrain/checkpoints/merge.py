"""Merges adapters into the UNet of their base model, and writes it as a pipeline directory or a single file."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cachetrain.atomic import staged_directory
from cachetrain.checkpoints.adapters import (
    adapter_file,
    attach,
    check_fingerprints,
    is_adapter,
    read_adapter,
    recorded_base,
    resolve_base,
)
from cachetrain.checkpoints.export import export_single_file
from cachetrain.checkpoints.info import FILE, checkpoint_info, write_info
from cachetrain.checkpoints.save import frozen_files, read_index, write_index
from cachetrain.log import warn
from cachetrain.modeling import load
from cachetrain.modeling.files import weight_files

if TYPE_CHECKING:
    import torch


class Weighted(NamedTuple):
    """An adapter to merge: its checkpoint, directory or file, and what its effect is multiplied by."""

    path: Path
    weight: float


def find_base(adapters: Sequence[Weighted], given: str | None = None) -> Path:
    """Returns the directory of the model to merge adapters into.

    Args:
        given: directory or Hugging Face model id; None: what the first checkpoint among the adapters was trained on.

    Raises:
        ValueError: none is known, or it is not there.
    """
    if given:
        return load.resolve_model(given)
    checkpoint = next((path for path, _ in adapters if is_adapter(path) and (path / FILE).exists()), None)
    if checkpoint is None:
        raise ValueError(f"{adapters[0].path}: does not record its base model; pass it with --model")
    return resolve_base(checkpoint, "--model")


def merged_unet(base: Path, adapters: Sequence[Weighted], raw_weights: bool = False) -> "torch.nn.Module":
    """Returns the UNet of a base model with adapters merged into its weights, in float32.

    Each adapter changes the weights by what it would change alone, at its weight: for LoRA, what diffusers draws with
    all of them active. (Beside others, its DoRA also rescales what the earlier ones have changed.)

    Args:
        base: pipeline directory or bare UNet.
        adapters: in any order.
        raw_weights: of checkpoints, the trained weights even if there are EMA weights.

    Raises:
        ValueError: an adapter cannot be read, does not fit the UNet, or was trained on another one.
    """
    unet = load.load_unet(load.component_dir(base, "unet")).requires_grad_(False)
    read = []
    for path, _ in adapters:  # all before the first is attached, which changes the names of layers
        file = adapter_file(path, raw_weights)
        adapter, recorded = read_adapter(file, unet)
        recorded = recorded_base(path) if (path / FILE).exists() else recorded
        if recorded is None:
            warn(f"{path}: does not record its base model, so that nothing says whether it was {base}")
        else:
            check_fingerprints(path, recorded, base)
        read.append((adapter, file))
    names = [f"adapter_{number}" for number in range(len(read))]
    for name, (adapter, file) in zip(names, read, strict=True):
        attach(unet, adapter, file, name)
    unet.set_adapters(names, [weight for _, weight in adapters])
    _fold(unet, names)
    unet.unload_lora()
    return unet


def _fold(unet, names):
    """Adds to each weight what each adapter alone would change. peft would merge one after another, so that a DoRA
    rescales what the earlier ones have changed."""
    from peft.tuners.lora import LoraLayer

    for module in unet.modules():
        if not isinstance(module, LoraLayer):
            continue
        weight = module.get_base_layer().weight
        before, total = weight.data.clone(), weight.data.clone()
        for name in names:
            module.merge(adapter_names=[name])
            module.merged_adapters.clear()
            total += weight.data - before
            weight.data = before.clone()
        weight.data = total


def write_merged(
    base: Path, adapters: Sequence[Weighted], out: Path, dtype: "torch.dtype | None" = None, *,
    raw_weights: bool = False, overwrite: bool = False,
) -> list[str]:  # fmt: skip
    """Merges adapters into a base model and writes the result, which appears only when complete.

    Args:
        base: of `find_base`.
        out: pipeline directory, or a path that ends in .safetensors for a single file as of export_single_file.
        dtype: of the UNet's weights, in a single file of all; None: that of the base model's UNet.
        raw_weights: see `merged_unet`.
        overwrite: replace `out` if it exists.

    Returns:
        notes for users of a single file; [] for a directory.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise ValueError(f"{out}: already exists; choose another --out, or add --overwrite")
    unet = merged_unet(base, adapters, raw_weights)
    unet.to(dtype or _stored_dtype(load.component_dir(base, "unet")))
    source = next((path for path, _ in adapters if (path / FILE).exists()), base)
    if out.suffix != ".safetensors":
        with staged_directory(out, overwrite, holds="unet/config.json") as stage:
            _write_pipeline(base, unet, source, stage, shutil.copyfile)
        return []
    with tempfile.TemporaryDirectory(prefix="cachetrain-") as directory:
        _write_pipeline(base, unet, source, Path(directory), lambda path, link: link.symlink_to(path.resolve()))
        return export_single_file(Path(directory), out, dtype)


def _write_pipeline(base, unet, source, stage, copy):
    """Writes a pipeline to the empty directory `stage`.

    Args:
        source: what scheduler and cachetrain.json are those of: the first checkpoint, or the base model.
        copy: function of two paths, for frozen parts.
    """
    unet.save_pretrained(stage / "unet")
    for name, path in frozen_files(base).items():
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        copy(path, stage / name)
    if (source / "scheduler").is_dir():
        scheduler = load.load_scheduler(source / "scheduler")
        scheduler.save_pretrained(stage / "scheduler")
        if (index := read_index(base, scheduler)) is not None:
            write_index(index, stage)
    if (source / FILE).exists():
        info = checkpoint_info(source)
        write_info(stage, info["step"], {key: value for key, value in info.items() if key not in ("step", "base")})


def _stored_dtype(directory):
    """The dtype of most of a component's tensors."""
    from safetensors.torch import load_file

    files = [path for path in weight_files(directory) if path.suffix == ".safetensors"]
    counts = Counter(tensor.dtype for path in files for tensor in load_file(path).values())
    return counts.most_common(1)[0][0]
