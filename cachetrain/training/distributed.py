"""Several processes that train one model: torchrun, or any launcher that sets RANK and WORLD_SIZE."""

import os
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
import torch.distributed as dist


class World:
    """The ranks of a run; one process is a world of one.

    Attributes:
        rank, ranks: this process's number, and how many there are.
        main: whether this is rank 0, the only one that writes.
    """

    def __init__(self, device=None):
        """Joins the ranks. `device`: this rank's torch.device.

        Raises:
            ValueError: the launcher's variables are not all there.
        """
        self.rank, self.ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        self.device = device or torch.device("cpu")
        if self.ranks == 1:
            return
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.set_device(self.device)
        # gloo beside nccl: what is on the host is agreed upon there, without waiting for the device.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")

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

    def any(self, flag):
        """Whether `flag` is true on any rank. Agreed upon between the hosts: nobody waits for a device."""
        return bool(self.sum(torch.tensor(int(flag)))) if self.ranks > 1 else flag

    def barrier(self):
        if self.ranks > 1:
            dist.all_reduce(torch.zeros(()))  # gloo, on the host

    def close(self):
        if self.ranks > 1:
            dist.destroy_process_group()


def wrap(unet, world, fsdp):
    """Returns what the loop calls: the UNet itself, in DDP, or sharded in place by fully_shard.

    Gradients become means over the ranks. DDP gives every rank the weights of rank 0; fully_shard cuts the weights
    that each rank has loaded, down block, mid block and up block each for itself.
    """
    if fsdp:
        from torch.distributed.fsdp import fully_shard

        mesh = dist.init_device_mesh(world.device.type, (world.ranks,))
        for block in [*unet.down_blocks, unet.mid_block, *unet.up_blocks]:
            if block is not None:
                fully_shard(block, mesh=mesh)
        return fully_shard(unet, mesh=mesh)
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


def full_state_dict(module):
    """The module's whole state_dict on every rank; sharded weights are brought together on the CPU, one by one."""
    from torch.distributed.tensor import DTensor

    return {
        name: tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
        for name, tensor in module.state_dict().items()
    }
