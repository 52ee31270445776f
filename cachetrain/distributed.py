"""Several processes that train one model: torchrun, or any launcher that sets RANK and WORLD_SIZE."""

import os
import sys
import time
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


class World:
    """The ranks of a run; one process is a world of one.

    Attributes:
        rank, ranks: this process's number, and how many there are.
        main: whether this is rank 0, the only one that writes.
    """

    def __init__(self, device=None):
        """Joins the ranks. `device`: this rank's torch.device; "cuda" is the one of LOCAL_RANK.

        Raises:
            ValueError: the launcher's variables are not all there.
            OSError: the ranks do not find each other.
        """
        self.rank, self.ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        self.device = device or torch.device("cpu")
        if self.ranks == 1:
            return
        cuda = self.device.type == "cuda"
        if cuda:
            if self.device.index is None:
                self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        try:
            # gloo beside nccl: what is on the host is agreed upon there, without waiting for the device.
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        except dist.DistError as error:
            raise OSError(f"the ranks do not find each other: {_first_line(error)}; start all {self.ranks} of them, "
                          "with a free --master_port") from error  # fmt: skip

    def sum(self, tensor):
        """The tensor, summed over the ranks; every rank gets the same."""
        if self.ranks > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def sum_array(self, array):
        """`sum` of a numpy array of unsigned integers, in its dtype."""
        return self.sum(torch.from_numpy(array.astype(np.int32))).numpy().astype(array.dtype)

    def gather(self, thing):
        """What each rank gives, as a list in their order: anything that can be pickled among ourselves."""
        if self.ranks == 1:
            return [thing]
        things = [None] * self.ranks
        dist.all_gather_object(things, thing)
        return things

    def any(self, *flags):
        """Whether each flag is true on any rank: a bool for one, else a list. Nobody waits for a device."""
        if self.ranks > 1:
            flags = self.sum(torch.tensor(flags, dtype=torch.int32)).bool().tolist()  # between the hosts
        return flags[0] if len(flags) == 1 else list(flags)

    def barrier(self):
        if self.ranks > 1:
            dist.all_reduce(torch.zeros(()))  # gloo, on the host

    def lost(self, error):
        """Whether an exception says that another rank has ended: what it shared with this one broke."""
        return self.ranks > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error))

    def close(self):
        if self.ranks > 1:
            if sys.exception():
                # gloo's thread may have to let go of a tensor yet, for which it needs Python's lock. When DDP is
                # taken apart, torch waits for that thread with the lock held: for ever, if it has not had it before.
                time.sleep(0.5)
            dist.destroy_process_group()


def wrap(unet, world, fsdp):
    """Returns what the loop calls: the UNet itself, in DDP, or sharded in place by fully_shard.

    Gradients become means over the ranks. DDP gives every rank the weights of rank 0; fully_shard cuts the weights
    that each rank has loaded, down block, mid block and up block each for itself.
    """
    world.barrier()  # a rank that was refused is missed here, on the host, and not by the device
    if fsdp:
        from torch.distributed.fsdp import fully_shard

        mesh = dist.init_device_mesh(world.device.type, (world.ranks,))
        for block in [*unet.down_blocks, unet.mid_block, *unet.up_blocks]:
            if block is not None:
                fully_shard(block, mesh=mesh)
        # The root too: by default its weights stay gathered after a forward pass, and without a backward pass the
        # next one would not see that Ema.applied() has changed them.
        return fully_shard(unet, mesh=mesh, reshard_after_forward=True)
    if world.ranks == 1:
        return unet
    from torch.nn.parallel import DistributedDataParallel

    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(unet, device_ids=devices, gradient_as_bucket_view=True)


@contextmanager
def gradients_stay(model, last):
    """Around a micro-batch: gradients are exchanged only in the `last` one of a step."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    with nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():
        yield


def local_parts(tensors):
    """This rank's parts of sharded tensors (fully_shard), sharing their memory; other tensors as they are."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def full_unet(unet, world):
    """The UNet with all its weights, on rank 0; None on the others. All ranks take part.

    It is the UNet itself, or a copy of a sharded one in CPU memory.
    """
    state = unet.state_dict()
    if not any(isinstance(tensor, DTensor) for tensor in state.values()):
        return unet if world.main else None
    weights = on_host(state, world)
    if not world.main:
        return None
    with torch.device("meta"):
        copy = type(unet).from_config(unet.config)
    copy.load_state_dict(weights, assign=True)
    return copy


@torch.no_grad()
def on_host(tensors, world):
    """Copies of {name: tensor} in CPU memory, contiguous and unsharded; on rank 0, {} elsewhere. All take part.

    The host waits for the device here.
    """
    copies = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()  # one after the other: no device holds them all
        if world.main:
            copies[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return copies


def _first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]
