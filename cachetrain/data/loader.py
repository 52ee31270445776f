"""Finished batches on their way from the workers to the device, ahead of time and in one piece."""

import os
import signal
import threading
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
    layout: list  # of (name, dtype, shape); dtype None: no tensor


_ALIGNMENT = 64  # bytes, where each tensor starts


def pack(batch):
    """Packed of a dict of tensors and None."""
    tensors = {name: tensor for name, tensor in batch.items() if tensor is not None}
    data = torch.empty(sum(_room(tensor.nbytes) for tensor in tensors.values()), dtype=torch.uint8)
    layout = [(name, None, None) if t is None else (name, t.dtype, t.shape) for name, t in batch.items()]
    packed = Packed(data, layout)
    for name, place in unpack(packed).items():
        if place is not None:
            place.copy_(tensors[name])
    return packed


def unpack(packed):
    """The dict that was packed; its tensors share the memory of `packed.data`."""
    batch, start = {}, 0
    for name, dtype, shape in packed.layout:
        batch[name] = None
        if dtype is not None:
            num_bytes = dtype.itemsize * prod(shape)
            batch[name] = packed.data[start : start + num_bytes].view(dtype).view(shape)
            start += _room(num_bytes)
    return batch


def _room(num_bytes):
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def make_loader(dataset, batches, masked, num_workers, pin_memory, multiple=8):
    """DataLoader whose workers deliver finished batches, Packed; it draws from no global generator."""
    return _Loader(
        dataset, batch_sampler=batches, num_workers=num_workers, pin_memory=pin_memory,
        collate_fn=_Collate(masked, multiple), prefetch_factor=4 if num_workers else None,
        generator=torch.Generator().manual_seed(0), persistent_workers=num_workers > 0,
        worker_init_fn=_block_signals,
    )  # fmt: skip


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


class _Collate:
    """`collate` with its settings bound; a class, so that spawned workers can pickle it."""

    def __init__(self, masked, multiple):
        self.masked, self.multiple = masked, multiple

    def __call__(self, samples):
        return pack(collate(samples, self.masked, self.multiple))


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
