"""Estimates the peak memory of training before any weights are loaded, and what to change where it does not fit.

One step runs on the meta device, whose tensors have shapes and dtypes but no memory, and the bytes of all tensors
that are alive at a time are added up: what autograd keeps for the backward pass, gradients, intermediate results.
Weights, EMA and optimizer state follow from the number of parameters.
"""

from __future__ import annotations

import math
import weakref
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from cachetrain.data.ram import available_bytes
from cachetrain.log import describe, info, warn
from cachetrain.modeling.conditioning import moved, predict
from cachetrain.modeling.lora import is_adapted
from cachetrain.modeling.precision import cast_weights
from cachetrain.training.optimizers import KAHAN_OPTIMIZERS, OPTIMIZERS

# What the tensors do not show: workspaces of convolutions, and memory that the allocator holds in unusable pieces.
OVERHEAD = 1.06


class Setup(NamedTuple):
    """What the memory of a run depends on, besides the UNet and its inputs.

    Attributes:
        batch_size: samples in one backward pass.
        precision: value of --precision.
        optimizer: key of OPTIMIZERS.
        checkpointing: whether activations are computed again in the backward pass.
        keeps_gradients: gradients are there during the forward pass, too: those of earlier micro-batches, or DDP's.
        ema: whether there is a moving average.
        offload: whether optimizer state and EMA are in the memory of the host.
        releases_gradients: each gradient is freed as soon as it has been computed (--gradient_release).
    """

    batch_size: int
    precision: str
    optimizer: str
    checkpointing: bool
    keeps_gradients: bool
    ema: bool
    offload: bool
    releases_gradients: bool = False

    @classmethod
    def of(cls, args: Namespace, ranks: int) -> Setup:
        return cls(
            batch_size=args.batch_size,
            precision=args.precision,
            optimizer=args.optimizer,
            checkpointing=args.gradient_checkpointing,
            keeps_gradients=args.gradient_accum > 1 or ranks > 1,
            releases_gradients=args.gradient_release,
            ema=bool(args.ema_decay),
            offload=args.cpu_offload,
        )


class Estimate(NamedTuple):
    """Bytes at the peak of a step.

    Attributes:
        weights: of the UNet.
        optimizer: the optimizer's state.
        ema: the averages.
        step: what is there during a step only: activations, gradients, intermediate results.
    """

    weights: int
    optimizer: int
    ema: int
    step: int

    @property
    def total(self) -> int:
        """All of it, with OVERHEAD."""
        return int(OVERHEAD * sum(self))

    def __str__(self):
        names = ("weights", "optimizer", "EMA", "activations and gradients")
        parts = ", ".join(f"{name} {_size(size)}" for name, size in zip(names, self, strict=True) if size)
        return f"about {_size(self.total)} at the peak of a step ({parts})"


def _size(num_bytes):
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


class MemoryModel:
    """Estimates the memory of training one UNet on inputs of one size.

    Args:
        unet: UNet2DConditionModel on the meta device; what is trained requires gradients.
        latent_shape: (C, h, w) of the largest latents.
        example: function of a batch size that returns the UNet's other arguments, as Conditioning.collate does.
    """

    def __init__(self, unet: torch.nn.Module, latent_shape: tuple[int, int, int], example: Callable[[int], dict]):
        self.unet = unet
        self.latent_shape = latent_shape
        self.example = example
        self._steps = {}

    def estimate(self, setup: Setup) -> Estimate:
        """Returns the Estimate of a run."""
        size = 2 if setup.precision == "bf16_pure" else 4
        cast_weights(self.unet, setup.precision)
        trained = sum(parameter.numel() for parameter in self.unet.parameters() if parameter.requires_grad)
        on_device = 0 if setup.offload else trained
        return Estimate(
            weights=sum(parameter.nbytes for parameter in self.unet.parameters()),
            optimizer=int(on_device * OPTIMIZERS[setup.optimizer].state_bytes(size)),
            ema=4 * on_device * setup.ema,
            step=self._step_bytes(setup),
        )

    def _step_bytes(self, setup):
        key = setup._replace(optimizer="", ema=False, offload=False)
        if key not in self._steps:
            self._steps[key] = self._run_step(setup)
        return self._steps[key]

    def _run_step(self, setup):
        """Runs a step on the meta device; returns the most bytes alive, without those of the weights."""
        parameters = list(self.unet.parameters())
        kernels = _Kernels({"bf16": torch.bfloat16, "fp16": torch.float16}.get(setup.precision))
        self.unet.disable_gradient_checkpointing()
        if setup.checkpointing:
            contexts = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), kernels)}
            self.unet.enable_gradient_checkpointing(partial(checkpoint, **contexts))
        with _AliveBytes(parameters) as alive:
            for parameter in parameters:
                keeps = setup.keeps_gradients and parameter.requires_grad
                parameter.grad = torch.empty_like(parameter) if keeps else None
            with torch.device("meta"), kernels:
                latents = torch.empty(setup.batch_size, *self.latent_shape)
                target, timesteps = torch.empty_like(latents), torch.zeros(setup.batch_size, dtype=torch.long)
                noisy = latents.to(next(p.dtype for p in parameters if p.requires_grad))
                prediction = predict(self.unet, noisy, timesteps, moved(self.example(setup.batch_size), "meta"))
            kernels.end_forward()
            trained = [p for p in parameters if p.requires_grad and setup.releases_gradients]
            hooks = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in trained]
            (prediction.float() - target).square().mean().backward()
        for hook in hooks:
            hook.remove()
        for parameter in parameters:
            parameter.grad = None
        return alive.peak

    def batch_that_fits(self, setup: Setup, room: int) -> int:
        """The largest batch size up to the one of `setup` whose estimate is at most `room` bytes; 0: there is none.

        The peak is convex in the batch size, so that a line between two sizes is never too low.
        """
        total = self.estimate(setup).total
        if total <= room:
            return setup.batch_size
        least = self.estimate(setup._replace(batch_size=1)).total
        if least > room:
            return 0
        return 1 + int((setup.batch_size - 1) * (room - least) / (total - least))


def report(run, unet: torch.nn.Module) -> None:
    """Prints the estimate beside the memory that is free; warns where it does not fit, and says what would.

    Not with --fsdp, which spreads the weights over the ranks.

    Args:
        run: Run.
        unet: its UNet on the meta device; what is trained requires gradients.
    """
    if run.args.fsdp or not run.world.main:
        return
    try:
        _report(run, unet)
    except Exception as error:  # any: the meta device may lack an operation of an unusual UNet, which still trains
        info(f"memory: no estimate ({describe(error)})")


def _report(run, unet):
    index, blank = run.index, run.conditioning.blank(run.index.text_widths, run.index.max_tokens)
    largest = max(index.shapes, key=math.prod)
    model = MemoryModel(unet, largest, lambda batch_size: run.conditioning.collate([blank] * batch_size))
    setup, (free, where) = Setup.of(run.args, run.world.ranks), free_memory(run.device)
    estimate = model.estimate(setup)
    info(f"memory: {estimate}" + (f"; {where} has {_size(free)} free" if free else ""))
    if free and estimate.total > free:
        warn(f"this run will probably not fit into the memory of {where}; {advice(model, setup, free)}")


def advice(model: MemoryModel, setup: Setup, room: int) -> str:
    """What to change so that a run fits into `room` bytes, with the batch size that fits then."""
    setup = setup._replace(keeps_gradients=not setup.releases_gradients)  # as it will be, with more micro-batches
    changes = {
        "--batch_size": setup,
        "--gradient_checkpointing": setup._replace(checkpointing=True),
        "--optimizer lion": setup._replace(optimizer="lion"),
    }
    if setup.optimizer in KAHAN_OPTIMIZERS:
        changes["--precision bf16_pure"] = setup._replace(precision="bf16_pure")
        small = setup._replace(checkpointing=True, precision="bf16_pure")
        changes["--gradient_checkpointing --precision bf16_pure"] = small
    fits = []
    for flags, changed in changes.items():
        batch_size = model.batch_that_fits(changed, room)
        if batch_size and (changed != setup or flags == "--batch_size"):
            smaller = f"--batch_size {batch_size}" if batch_size < setup.batch_size else ""
            fits.append(f"{flags.removeprefix('--batch_size')} {smaller}".strip())
    if not fits:
        flags = "--cpu_offload" if is_adapted(model.unet) else "--cpu_offload, --fsdp and --lora_rank"
        return f"no flags make it fit but {flags}; or train on smaller images"
    return f"what would fit: {'; '.join(fits)} (raise --gradient_accum as --batch_size falls)"


def free_memory(device: torch.device) -> tuple[int | None, str]:
    """Returns (bytes that are free on the device, its name); None: it cannot be known.

    For a CPU, it is what the machine, or the container, can still give to a process.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], torch.cuda.get_device_name(device)
    free = available_bytes() if device.type == "cpu" else None
    return free, "this machine" if device.type == "cpu" else str(device)


class _AliveBytes(TorchDispatchMode):
    """Adds up the storage of the tensors that operations make, until they are freed.

    Args:
        known: tensors whose storage does not count.

    Attributes:
        peak: most bytes that were alive at a time.
    """

    def __init__(self, known):
        super().__init__()
        self.peak = self._bytes = 0
        self._storages = {tensor.untyped_storage()._cdata: None for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else (results,):
            if isinstance(result, torch.Tensor):
                self._count(result.untyped_storage())
        return results

    def _count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def free(_):
            self._bytes -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, free)
        self._bytes += size
        self.peak = max(self.peak, self._bytes)


class _Kernels(TorchFunctionMode):
    """Lets the meta device do what a device does that trains: autocast, which the meta device does not have, and
    attention that keeps no scores, as all fused kernels.

    Args:
        low: bfloat16 or float16; None: no autocast.
    """

    _LOW = (F.linear, torch.conv2d, F.conv2d, torch.matmul, torch.bmm, F.scaled_dot_product_attention)
    _FLOAT32 = (F.layer_norm, F.group_norm)

    def __init__(self, low):
        super().__init__()
        self._dtypes = (
            {} if low is None else dict.fromkeys(self._LOW, low) | dict.fromkeys(self._FLOAT32, torch.float32)
        )
        self._weights = {}  # autocast's copies, which live until the forward pass has ended
        self._in_forward = True

    def end_forward(self):
        self._weights.clear()
        self._in_forward = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if dtype := self._dtypes.get(func):
            args = [self._cast(value, dtype) for value in args]
            kwargs = {name: self._cast(value, dtype) for name, value in kwargs.items()}
        if func is F.scaled_dot_product_attention:
            fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            return fused(*args, attn_mask=kwargs.get("attn_mask"), scale=kwargs.get("scale"))[0]
        return func(*args, **kwargs)

    def _cast(self, value, dtype):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not (self._in_forward and value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if id(value) not in self._weights:
            self._weights[id(value)] = value.to(dtype)
        return self._weights[id(value)]
