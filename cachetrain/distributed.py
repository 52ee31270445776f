"""Training with several processes (ranks), started by torchrun or any launcher that sets RANK and WORLD_SIZE."""

import mmap
import os
import pickle
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from cachetrain.reading import open_regular

T = TypeVar("T")


class World:
    """The ranks of a run. Without a launcher there is one rank and nothing is communicated.

    Attributes:
        rank: number of this process, from 0.
        ranks: number of processes.
        main: whether this is rank 0, the only rank that writes files.
        first_of_machine: whether this is the first rank on its machine.
        device: torch.device of this rank.
        ddp: the DistributedDataParallel that `wrap` made, or None.
    """

    def __init__(self, device: torch.device | None = None):
        """Joins the process group.

        Args:
            device: default: the CPU. "cuda" without a number becomes the GPU numbered LOCAL_RANK.

        Raises:
            ValueError: an environment variable of the launcher is missing.
            OSError: the ranks cannot connect to each other.
        """
        self.rank = int(os.environ.get("RANK", 0))
        self.ranks = int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        self.first_of_machine = int(os.environ.get("LOCAL_RANK", self.rank)) == 0
        self.device = device or torch.device("cpu")
        self.ddp = None
        if self.ranks == 1:
            return
        cuda = self.device.type == "cuda"
        if cuda:
            if self.device.index is None:
                self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        try:
            # gloo beside nccl: CPU tensors are reduced without waiting for the device.
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        except dist.DistError as error:
            raise OSError(
                f"rank {self.rank} cannot connect to the other ranks: {_first_line(error)}; start all {self.ranks} "
                "ranks, with a free --master_port"
            ) from error

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over the ranks; every rank gets the result."""
        if self.ranks > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def sum_array(self, array: np.ndarray) -> np.ndarray:
        """Sums an array of unsigned integers over the ranks, as int32; the result has the array's dtype."""
        return self.sum(torch.from_numpy(array.astype(np.int32))).numpy().astype(array.dtype)

    def gather(self, value: object) -> list:
        """Returns the values of all ranks, in rank order; values must be picklable."""
        if self.ranks == 1:
            return [value]
        values = [None] * self.ranks
        dist.all_gather_object(values, value)
        return values

    def share(self, make: Callable[[], T], key: object = None) -> T:
        """Returns what `make` returns on the first rank of this machine, with one copy of its arrays in memory.

        Ranks that cannot have it make their own: those that run elsewhere, as in other containers, or that have
        another key.

        Args:
            make: returns what can be pickled. Where a rank writes to an array, it gets its own copy of that page.

        Raises:
            ValueError, OSError: of `make`; on all ranks.
        """
        if self.ranks == 1 or not hasattr(os, "memfd_create"):
            return make()
        value = memory = failure = offered = None
        if self.first_of_machine:
            try:
                value = make()
                memory, offered = _put_into_memory(value, key)
            except (ValueError, OSError) as error:
                failure = error
        offers = self.gather(failure or offered)  # the other ranks wait here
        if error := next((offer for offer in offers if isinstance(offer, Exception)), None):
            raise error
        taken = next(filter(None, (_take(offer) for offer in offers if offer and offer.key == key)), None)
        if taken is not None:
            value = taken.value
        elif value is None:
            value = make()
        self.barrier()  # the memory can be found until all have looked
        if memory is not None:
            os.close(memory)
        return value

    def any(self, *flags: bool) -> bool | list[bool]:
        """Whether each flag is true on any rank: a bool for one flag, else a list. Does not wait for the device."""
        if self.ranks > 1:
            flags = self.sum(torch.tensor(flags, dtype=torch.int32)).bool().tolist()  # CPU tensor: gloo
        return flags[0] if len(flags) == 1 else list(flags)

    def barrier(self) -> None:
        """Waits for all ranks, on the host."""
        if self.ranks > 1:
            dist.all_reduce(torch.zeros(()))  # CPU tensor: gloo

    def is_peer_failure(self, error: Exception) -> bool:
        """Whether an exception was raised because another rank has ended."""
        return self.ranks > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error))

    def close(self) -> None:
        """Leaves the process group."""
        if self.ranks == 1:
            return
        if self.ddp is not None:
            # Destroying the last reference to the process group joins gloo's thread, which may need the GIL to free a
            # tensor. Python releases the GIL while it waits; DDP's reducer does not, and would deadlock.
            del self.ddp.reducer, self.ddp.logger
            self.ddp = None
        dist.destroy_process_group()


class _Offer(NamedTuple):
    """Where other processes find the arrays of a value: a file without a name, which is gone when the last one ends.

    Attributes:
        path: of the file while its descriptor is open; of another file in a container with processes of its own.
        token: with which the file begins.
        stream: the value without its arrays.
        spans: where each array begins and ends.
        key: of World.share.
    """

    path: str
    token: bytes
    stream: bytes
    spans: list[tuple[int, int]]
    key: object


class _Taken(NamedTuple):
    value: object


def _put_into_memory(value, key):
    """Returns (descriptor, _Offer) of a value; (None, None) if there is no memory for it."""
    buffers = []
    stream = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    token, sizes = secrets.token_bytes(64), [buffer.raw().nbytes for buffer in buffers]
    starts = list(accumulate((-(-size // 64) * 64 for size in sizes), initial=len(token)))  # aligned
    descriptor = os.memfd_create("cachetrain")
    try:
        os.posix_fallocate(descriptor, 0, starts[-1])
    except OSError:
        os.close(descriptor)
        return None, None
    spans = [(start, start + size) for start, size in zip(starts, sizes, strict=False)]
    with mmap.mmap(descriptor, starts[-1]) as memory:
        memory[: len(token)] = token
        for (start, end), buffer in zip(spans, buffers, strict=True):
            memory[start:end] = buffer.raw()
    return descriptor, _Offer(f"/proc/{os.getpid()}/fd/{descriptor}", token, stream, spans, key)


def _take(offer):
    """Returns the _Taken value of an _Offer; None if it is of another machine."""
    try:
        with open_regular(offer.path) as file:
            memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
    except (OSError, ValueError):
        return None
    if memory[: len(offer.token)] != offer.token:
        return None
    view = memoryview(memory)
    return _Taken(pickle.loads(offer.stream, buffers=[view[start:end] for start, end in offer.spans]))


def wrap(unet: torch.nn.Module, world: World, fsdp: bool) -> torch.nn.Module:
    """Prepares the UNet for the ranks: unchanged on one rank, else wrapped in DDP or sharded in place by fully_shard.

    Gradients become means over the ranks. DDP copies the weights of rank 0 to every rank; fully_shard splits the
    weights that each rank has loaded, one group per down, mid and up block.

    Returns:
        the module that the training loop calls.
    """
    world.barrier()  # a rank that ended with an error is noticed here, on the host, not in a GPU collective
    if fsdp:
        from torch.distributed.fsdp import fully_shard

        mesh = dist.init_device_mesh(world.device.type, (world.ranks,))
        for block in [*unet.down_blocks, unet.mid_block, *unet.up_blocks]:
            if block is not None:
                fully_shard(block, mesh=mesh)
        # By default the root's weights stay gathered after a forward pass. Without a backward pass in between, the
        # next forward pass would then not see the weights that Ema.applied() has put in.
        return fully_shard(unet, mesh=mesh, reshard_after_forward=True)
    if world.ranks == 1:
        return unet
    from torch.nn.parallel import DistributedDataParallel

    devices = [world.device] if world.device.type == "cuda" else None
    world.ddp = DistributedDataParallel(unet, device_ids=devices, gradient_as_bucket_view=True)
    return world.ddp


@contextmanager
def gradient_sync(model: torch.nn.Module, enabled: bool) -> Iterator[None]:
    """Reduces the gradients of a backward pass over the ranks only where `enabled`, for gradient accumulation."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(enabled)
    with nullcontext() if enabled or not hasattr(model, "no_sync") else model.no_sync():
        yield


def local_shards(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """This rank's shards of sharded tensors (fully_shard), sharing their memory; other tensors unchanged."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def gather_unet(unet: torch.nn.Module, world: World) -> torch.nn.Module | None:
    """Returns the UNet with all its weights on rank 0, None on the other ranks. Called by all ranks.

    A UNet that is not sharded is returned itself, a sharded one as a copy in CPU memory.
    """
    state = unet.state_dict()
    if not any(isinstance(tensor, DTensor) for tensor in state.values()):
        return unet if world.main else None
    weights = copy_to_host(state, world)
    if not world.main:
        return None
    with torch.device("meta"):
        copy = type(unet).from_config(unet.config)
    copy.load_state_dict(weights, assign=True)
    return copy


@torch.no_grad()
def copy_to_host(tensors: dict[str, torch.Tensor], world: World, copy: bool = True) -> dict[str, torch.Tensor]:
    """Copies {name: tensor} to CPU memory, contiguous and unsharded; {} on ranks other than 0. Called by all ranks.

    The host waits for the device here.

    Args:
        copy: False: tensors that are so already are returned themselves.
    """
    copies = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()  # one at a time, so that no device holds all of them
        if world.main:
            copies[name] = tensor.detach().to("cpu", copy=copy, memory_format=torch.contiguous_format)
    return copies


def _first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]
