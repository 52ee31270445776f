"""Training with several processes (ranks), started by torchrun or any launcher that sets RANK and WORLD_SIZE."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


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
