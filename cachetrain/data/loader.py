"""Finished batches on their way from the workers to the device, ahead of time and in one piece."""

import os
import signal
import threading
from functools import partial
from math import prod
from typing import NamedTuple

import torch
import torch._dynamo
from torch.utils.data import DataLoader

from cachetrain.data.batching import collate

_SIGNALS = {signal.SIGINT, signal.SIGTERM}  # that stop a run


class Packed(NamedTuple):
    """A batch as one tensor: one piece of shared memory to hand over and one copy to the device, not seven."""

    data: torch.Tensor  # uint8 [bytes]
    layout: dict  # the batch's own, with (dtype, shape) in place of each tensor


_ALIGNMENT = 64  # bytes, where each tensor starts


def pack(batch):
    """Packed of a dict of tensors, None, and such dicts."""
    num_bytes = sum(_room(tensor.nbytes) for tensor in _tensors(batch))
    packed = Packed(torch.empty(num_bytes, dtype=torch.uint8), _layout(batch))
    for place, tensor in zip(_tensors(unpack(packed)), _tensors(batch), strict=True):
        place.copy_(tensor)
    return packed


def unpack(packed):
    """The dict that was packed; its tensors share the memory of `packed.data`."""
    start = 0

    def tensor_of(dtype, shape):
        nonlocal start
        num_bytes = dtype.itemsize * prod(shape)
        tensor = packed.data[start : start + num_bytes].view(dtype).view(shape)
        start += _room(num_bytes)
        return tensor

    def batch_of(layout):
        return {
            name: batch_of(entry) if isinstance(entry, dict) else None if entry is None else tensor_of(*entry)
            for name, entry in layout.items()
        }

    return batch_of(packed.layout)


def _layout(batch):
    return {
        name: _layout(entry) if isinstance(entry, dict) else None if entry is None else (entry.dtype, entry.shape)
        for name, entry in batch.items()
    }


def _tensors(batch):
    """The tensors of a batch in the order of its layout."""
    for entry in batch.values():
        if isinstance(entry, dict):
            yield from _tensors(entry)
        elif entry is not None:
            yield entry


def _room(num_bytes):
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def make_loader(dataset, batch_sampler, num_workers, pin_memory, multiple=8):
    """DataLoader whose workers deliver finished batches, Packed; it draws from no global generator.

    Args:
        dataset: CachedPairs; batch_sampler: of its SampleKeys.
        multiple: of text lengths, as for collate.
    """
    return _Loader(
        dataset,
        batch_sampler=batch_sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=partial(_collate_packed, dataset.conditioning, multiple),
        prefetch_factor=4 if num_workers else None,
        generator=torch.Generator().manual_seed(0),
        persistent_workers=num_workers > 0,
        worker_init_fn=_block_signals,
    )


class _Loader(DataLoader):
    """Starts workers with the run's signals blocked: one that comes before they are ready would end them."""

    def __iter__(self):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _block_signals(_):
    """In a worker: Ctrl-C and a scheduler's SIGTERM reach all processes, and the step under way needs its batches.

    A SIGTERM of the trainer itself counts: it is how torch ends workers, and it waits for them then.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        threading.Thread(target=_leave_when_told, daemon=True).start()


def _leave_when_told():
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _collate_packed(conditioning, multiple, samples):
    return pack(collate(samples, conditioning, multiple))


def on_device(loader, device):
    """Yields the loader's batches, unpacked; on CUDA each is copied while the one before is computed on."""
    if device.type != "cuda":
        for packed in loader:
            yield unpack(_moved(packed, device))
        return
    copies, ahead = torch.cuda.Stream(device), None
    for packed in loader:
        with torch.cuda.stream(copies):
            moved = _moved(packed, device)
            arrived = copies.record_event()
        if ahead is not None:
            yield _arrived(*ahead)
        ahead = moved, arrived
    if ahead is not None:
        yield _arrived(*ahead)


def _moved(packed, device):
    return packed._replace(data=packed.data.to(device, non_blocking=True))


def _arrived(packed, event):
    """Makes the device, not the host, wait for the copy; its memory is not used again before the step is done."""
    stream = torch.cuda.current_stream()
    stream.wait_event(event)
    packed.data.record_stream(stream)
    return unpack(packed)
