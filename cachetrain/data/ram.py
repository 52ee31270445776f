"""--cache_in_ram: reads every sidecar once, before training, and keeps the files' bytes in memory."""

from __future__ import annotations

from array import array
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load
from tqdm import tqdm

from cachetrain.data.index import PairIndex
from cachetrain.data.many_files import in_threads
from cachetrain.data.sidecar import metadata_of, read_verified
from cachetrain.modeling.conditioning import num_elements

_HEADER_BYTES = 2048  # about the size of a sidecar without its tensors
_ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4}


class RamCache:
    """The sidecars of an index in memory, verified once. Forked loader workers share the memory.

    Raises:
        ValueError: the sidecars do not fit into free memory, or a sidecar is damaged.
    """

    def __init__(self, index: PairIndex):
        needed, free = needed_bytes(index), available_bytes()
        if free is not None and needed > 0.9 * free:
            raise ValueError(
                f"--cache_in_ram: the caches need {needed / 2**30:.1f} GiB, but only {free / 2**30:.1f} GiB of "
                "memory are free; omit the flag (--num_workers read the files ahead of time)"
            )
        # A text sidecar used for all images is stored once, after the images.
        path_functions = [index.image_path] if index.one_text else [index.image_path, index.text_path]
        self._per_pair = len(path_functions)
        self._total = len(path_functions) * len(index) + bool(index.one_text)
        self._one_text = index.one_text is not None
        self._data = bytearray()
        self._ends = array("Q", [0])
        paths = (path_of(i) for i in range(len(index)) for path_of in path_functions)
        for _, (data, _) in tqdm(
            in_threads(read_verified, paths), desc="into memory", total=self._total, unit="file", disable=None
        ):
            self._append(data)
        if self._one_text:
            self._append(read_verified(index.one_text)[0])

    def image(self, i: int) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Same as Sidecars.image."""
        data = self._bytes(i * self._per_pair)
        return load(data), metadata_of(data)

    def text(self, i: int) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Same as Sidecars.text."""
        data = self._bytes(self._total - 1 if self._one_text else i * 2 + 1)
        return load(data), metadata_of(data)

    def _append(self, data):
        self._data += data
        self._ends.append(len(self._data))

    def _bytes(self, place):
        return bytes(memoryview(self._data)[self._ends[place] : self._ends[place + 1]])


def needed_bytes(index: PairIndex) -> int:
    """Estimates the memory that the sidecars of `index` take, in bytes."""
    elements = sum(
        int(np.prod(shape)) * int(count)
        for shape, count in zip(index.shapes, np.bincount(index.shape_ids, minlength=len(index.shapes)), strict=True)
    )
    images, texts = index.image_header, index.text_header
    per_element = sum(_ITEM_BYTES.get(dtype, 4) for dtype in images.dtypes.values())
    num_tokens = int(index.all_tokens.sum(dtype=np.int64))
    text = num_elements(index.text_kind, index.text_widths, num_tokens, len(index))
    text *= max(_ITEM_BYTES.get(dtype, 4) for dtype in texts.dtypes.values())
    return elements * per_element + (0 if index.one_text else text) + 2 * _HEADER_BYTES * len(index)


def available_bytes() -> int | None:
    """Memory that can be allocated without swapping, on the machine and in the container; None if it is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    limits = [number for number in (free, _container_bytes()) if number is not None]
    return min(limits) if limits else None


def _container_bytes(cgroup="/sys/fs/cgroup"):
    """What is left of a container's limit (cgroup v2), where pages of files can be dropped; None without a limit."""
    try:
        limit, used, stat = ((Path(cgroup) / f"memory.{name}").read_text() for name in ("max", "current", "stat"))
        droppable = dict(line.split() for line in stat.splitlines()).get("inactive_file", "0")
        return max(0, int(limit) - int(used) + int(droppable))
    except (OSError, ValueError):  # "max": no limit
        return None
