"""--cache_in_ram: reads every sidecar once, before training, and keeps the files' bytes in memory."""

from __future__ import annotations

from array import array
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load
from tqdm import tqdm

from cachetrain.data.index import PairIndex
from cachetrain.data.many_files import in_threads
from cachetrain.data.sidecar import metadata_of
from cachetrain.modeling.conditioning import num_elements

_HEADER_BYTES = 2048  # about the size of a sidecar without its tensors


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
        self._sizes = index.sizes
        self._one_text = index.one_text is not None
        self._per_pair = index.sizes + (not self._one_text)
        self._total = self._per_pair * index.num_pairs + self._one_text
        self._data = bytearray()
        self._ends = array("Q", [0])
        reads = (read for pair in range(index.num_pairs) for read in self._reads(index, pair))
        for _, data in tqdm(
            in_threads(lambda read: read(), reads), desc="into memory", total=self._total, unit="file", disable=None
        ):
            self._append(data)
        if self._one_text:
            self._append(index.text_sidecar(0))

    def image(self, i: int) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Same as Sidecars.image."""
        data = self._bytes(i // self._sizes * self._per_pair + i % self._sizes)
        return load(data), metadata_of(data)

    def text(self, i: int) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Same as Sidecars.text."""
        place = self._total - 1 if self._one_text else i // self._sizes * self._per_pair + self._sizes
        data = self._bytes(place)
        return load(data), metadata_of(data)

    def _reads(self, index, pair):
        """Yields functions that read a pair's sidecars."""
        samples = range(pair * index.sizes, (pair + 1) * index.sizes)
        yield from (partial(index.image_sidecar, i) for i in samples)
        if not self._one_text:
            yield partial(index.text_sidecar, samples[0])

    def _append(self, data):
        self._data += data
        self._ends.append(len(self._data))

    def _bytes(self, place):
        return bytes(memoryview(self._data)[self._ends[place] : self._ends[place + 1]])


def needed_bytes(index: PairIndex) -> int:
    """Estimates the memory that the sidecars of `index` take, in bytes."""
    text = num_elements(index.text_kind, index.text_widths, index.num_tokens, index.num_pairs) * index.item_bytes
    return index.num_image_bytes + (0 if index.one_text else text) + _HEADER_BYTES * (len(index) + index.num_pairs)


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
