"""Brings batches from the workers to the device, ahead of time and each as a single tensor."""

import multiprocessing.queues
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from math import prod
from typing import NamedTuple

import torch
import torch._dynamo
from torch.utils.data import DataLoader

from cachetrain.cli import STOP_SIGNALS
from cachetrain.data.batching import BatchSampler, collate
from cachetrain.data.dataset import CachedPairs
from cachetrain.log import first_line


class Packed(NamedTuple):
    """A batch in one tensor, which takes one copy to the device instead of eight.

    Workers send it through a pipe, as numpy's bytes: torch would put it into /dev/shm, which has 64 MB in a docker
    container, and a batch for which there is no room would be lost without a word.
    """

    data: torch.Tensor  # uint8 [bytes]
    layout: dict  # the batch's dict, with a _Shape in place of each tensor

    def __reduce__(self):
        return _packed_from_numpy, (self.data.numpy(), self.layout)


class _Shape(NamedTuple):
    dtype: torch.dtype
    shape: torch.Size


_ALIGNMENT = 64  # bytes; each tensor starts at a multiple


def _packed_from_numpy(array, layout):
    return Packed(torch.from_numpy(array), layout)


def pack(batch: dict) -> Packed:
    """Packs a dict whose values are tensors, such dicts, or anything else, which stays as it is."""
    num_bytes = sum(_padded_size(tensor.nbytes) for tensor in _tensors(batch))
    packed = Packed(torch.empty(num_bytes, dtype=torch.uint8), _layout(batch))
    for target, tensor in zip(_tensors(unpack(packed)), _tensors(batch), strict=True):
        target.copy_(tensor)
    return packed


def unpack(packed: Packed) -> dict:
    """Returns the dict that was packed; the tensors are views of `packed.data`."""
    start = 0

    def tensor_of(dtype, shape):
        nonlocal start
        num_bytes = dtype.itemsize * prod(shape)
        tensor = packed.data[start : start + num_bytes].view(dtype).view(shape)
        start += _padded_size(num_bytes)
        return tensor

    def unpacked(entry):
        if isinstance(entry, dict):
            return {name: unpacked(value) for name, value in entry.items()}
        return tensor_of(*entry) if isinstance(entry, _Shape) else entry

    return unpacked(packed.layout)


def _layout(entry):
    if isinstance(entry, dict):
        return {name: _layout(value) for name, value in entry.items()}
    return _Shape(entry.dtype, entry.shape) if isinstance(entry, torch.Tensor) else entry


def _tensors(batch):
    """Yields the tensors of a batch, in the order of its layout."""
    for entry in batch.values():
        if isinstance(entry, dict):
            yield from _tensors(entry)
        elif isinstance(entry, torch.Tensor):
            yield entry


def _padded_size(num_bytes):
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def make_loader(
    dataset: CachedPairs, batch_sampler: BatchSampler, num_workers: int, pin_memory: bool, multiple: int = 8
) -> DataLoader:
    """Returns a DataLoader whose workers deliver collated batches, Packed. No global random generator is used.

    Args:
        multiple: text lengths are padded to a multiple of this, as in collate.
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
        worker_init_fn=_init_worker,
    )


class _Loader(DataLoader):
    """Starts workers with stop signals blocked: a signal during a worker's startup would kill the worker."""

    def __iter__(self):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def batches_of(loader: DataLoader) -> Iterator:
    """Starts the loader's workers, and returns an iterator over its batches.

    Raises:
        OSError: a worker process cannot be started, or has ended; one line that says what to change.
    """
    with _worker_failures():
        batches = iter(loader)
    return _guarded(batches)


def _guarded(batches):
    with _worker_failures():
        yield from batches


@contextmanager
def _worker_failures():
    try:
        yield
    except (RuntimeError, OSError) as error:
        # Not what a worker has raised itself, which torch raises again here, with the same type and without a number.
        if not is_worker_death(error) and getattr(error, "errno", None) is None:
            raise
        raise OSError(worker_death(error)) from error


def is_worker_death(error: BaseException) -> bool:
    """Whether torch raised it because a worker process has died, which interrupts whatever runs in this one."""
    return str(error).startswith("DataLoader worker")


def worker_death(error: BaseException) -> str:
    """The message for it, which says what to change."""
    return (
        f"a loader process died ({first_line(error)}); if memory is short, lower --num_workers (0 needs "
        "no such process), or give a container more (docker run --memory, --shm-size)"
    )


def never_wait_in_vain() -> None:
    """Makes a worker process end where it would wait for ever: when a batch cannot be sent, or, with a batch still to
    be sent, when the process that reads them is gone. Called in the worker."""
    queue, reader = multiprocessing.queues.Queue, os.getppid()

    def join(thread):
        while (sender := thread()) is not None and sender.is_alive() and os.getppid() == reader:
            sender.join(1)

    queue._on_queue_feeder_error = staticmethod(lambda error, batch: os._exit(1))
    queue._finalize_join = staticmethod(join)


def _init_worker(_):
    never_wait_in_vain()
    _block_signals()


def _block_signals():
    """Makes a worker ignore stop signals, except SIGTERM from the trainer.

    Ctrl-C, a hang-up and a scheduler's SIGTERM reach all processes, but the trainer still needs batches to finish its
    step. torch ends workers with SIGTERM and then waits for them.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        threading.Thread(target=_exit_on_sigterm_from_parent, daemon=True).start()


def _exit_on_sigterm_from_parent():
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _collate_packed(conditioning, multiple, samples):
    return pack(collate(samples, conditioning, multiple))


def on_device(loader: Iterable[Packed], device: torch.device) -> Iterator[dict]:
    """Yields the loader's batches on `device`, unpacked; on CUDA the next batch is copied during the current step.

    Raises:
        OSError: of `batches_of`.
    """
    if device.type != "cuda":
        for packed in batches_of(loader):
            yield unpack(_to_device(packed, device))
        return
    copy_stream, ahead = torch.cuda.Stream(device), None
    for packed in batches_of(loader):
        with torch.cuda.stream(copy_stream):
            moved = _to_device(packed, device)
            copied = copy_stream.record_event()
        if ahead is not None:
            yield _wait_for_copy(*ahead)
        ahead = moved, copied
    if ahead is not None:
        yield _wait_for_copy(*ahead)


def _to_device(packed, device):
    return packed._replace(data=packed.data.to(device, non_blocking=True))


def _wait_for_copy(packed, event):
    """Makes the device, not the host, wait for the copy; keeps the memory from being reused during the step."""
    stream = torch.cuda.current_stream()
    stream.wait_event(event)
    packed.data.record_stream(stream)
    return unpack(packed)
