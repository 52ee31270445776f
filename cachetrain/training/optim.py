"""Makes the optimizer, the loss scaler and gradient clipping."""

import importlib
from collections.abc import Callable, Iterable
from functools import partial

import torch

from cachetrain.distributed import local_shards
from cachetrain.training.optimizers import OPTIMIZERS, check_optimizer


def make_optimizer(
    name: str,
    parameters: Iterable[torch.nn.Parameter],
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    cpu_offload: bool = False,
    gradient_release: bool = False,
    names: list[str] | None = None,
) -> torch.optim.Optimizer:
    """Makes the optimizer of the trained parameters.

    Weight decay is decoupled in all optimizers: each step multiplies a weight by 1 - lr x weight_decay (StableAdamW
    and Prodigy: with the learning rate that they derive from lr). bfloat16 parameters get Kahan-compensated updates;
    their gradients are overwritten by the step.

    In a step of Prodigy the host waits for the device once per tensor; also in one of StableAdamW where optimi does
    not use its Triton kernels (sharded weights).

    Args:
        name: one of optimizers.OPTIMIZERS.
        parameters: the trained parameters, all of one dtype.
        lr: peak learning rate; the training loop sets param_groups[...]["lr"] before each step.
        betas: (first, second).
        weight_decay: decoupled.
        cpu_offload: keep the optimizer's state in CPU memory (CpuOffload).
        gradient_release: step in the backward pass (release.GradientRelease).
        names: of the parameters, by which muon finds first and last layers; None: there are none.

    Returns:
        the optimizer, or a GradientRelease; its attribute `implementation` is an optimizers.Implementation.

    Raises:
        ValueError: of optimizers.check_optimizer; or the optimizer's package is not installed.
    """
    parameters = list(parameters)
    assert len({p.dtype for p in parameters}) == 1, "one dtype for all trained parameters"
    bf16 = parameters[0].dtype == torch.bfloat16
    check_optimizer(name, lr, betas, bf16)
    make = partial(_make, name, lr=lr, betas=betas, weight_decay=weight_decay, bf16=bf16, names=names)
    if gradient_release:
        from cachetrain.training.release import GradientRelease

        return GradientRelease(make(parameters, gradient_release=True), weight_decay if bf16 else None)
    return CpuOffload(parameters, make) if cpu_offload else make(parameters)


def _make(name, parameters, lr, betas, weight_decay, bf16, names, **more_options):
    implementation = OPTIMIZERS[name].for_weights(bf16)
    module, _, class_name = implementation.constructor.rpartition(".")
    options = dict(implementation.options) | more_options
    # optimi's StableAdamW uses Triton kernels if Triton is installed, even for tensors that the kernels cannot read.
    if module == "optimi" and not all(p.is_cuda and type(p) is torch.nn.Parameter for p in parameters):
        options["triton"] = False
    if implementation.takes_names:
        options["names"] = names
    # Set per group because Prodigy's constructor prints a line if it gets a weight decay itself.
    groups = [{"params": parameters, "weight_decay": 0.0 if bf16 else weight_decay}]
    optimizer = getattr(_import(module, OPTIMIZERS[name].package), class_name)(groups, lr=lr, betas=betas, **options)
    optimizer.implementation = implementation
    if bf16:
        optimizer.param_groups[0]["pending_decay"] = 0.0  # in the group, to be part of state_dict
        if not more_options:  # a GradientRelease calls step() for each parameter, and decays itself
            optimizer.register_step_post_hook(lambda optimizer, *_: decay_bf16(weight_decay, optimizer))
    return optimizer


@torch.no_grad()
def decay_bf16(weight_decay: float, optimizer: torch.optim.Optimizer) -> None:
    """Applies weight decay to bfloat16 weights after a step, through their Kahan compensation.

    optimi multiplies the weight by 1 - lr x weight_decay, which rounds to 1 in bfloat16 if lr x weight_decay is below
    2^-9. The compensation holds 8 more bits; for smaller decays still, the decay of several steps is added up and
    applied once it reaches 2^-14. (StableAdamW thus decays with the plain learning rate, not with its clipped one.)
    """
    for group in optimizer.param_groups:
        group["pending_decay"] += group["lr"] * weight_decay
        if group["pending_decay"] < 2**-14:
            continue
        weights = [p for p in group["params"] if "kahan_comp" in optimizer.state[p]]  # with a gradient so far
        compensations = [optimizer.state[p]["kahan_comp"] for p in weights]
        torch._foreach_add_(compensations, weights, alpha=-group["pending_decay"])
        group["pending_decay"] = 0.0


def _import(module, package):
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        if package is None:
            raise
        raise ValueError(f"{package} is not installed: run `pip install {package}`") from None


class CpuOffload(torch.optim.Optimizer):
    """Runs an optimizer on copies of the parameters in CPU memory, so that its state takes no device memory.

    Each step copies the gradients to the CPU, steps there and copies the weights back; the host waits for the device
    once a step. Arithmetic and state_dict are those of the wrapped optimizer, so that a run can be resumed with or
    without CpuOffload. torch has no such optimizer; FSDP's CPUOffloadPolicy does the same for sharded models.

    Args:
        parameters: the trained parameters; they form one group.
        make: function that returns the optimizer of a list of parameters.

    Attributes:
        cpu_parameters: the copies, equal to the parameters after each step.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], make: Callable[..., torch.optim.Optimizer]):
        pin = parameters[0].is_cuda  # copies from and to pinned memory need no staging
        self.cpu_parameters = [_cpu_copy(p, pin).requires_grad_() for p in parameters]
        self._gradients = [_cpu_copy(p, pin) for p in parameters]
        self._optimizer = make(self.cpu_parameters)
        # Weights are copied back whether or not the optimizer skipped the step, so the host must decide to step.
        self.implementation = self._optimizer.implementation._replace(skips_on_device=False)
        super().__init__(parameters, {"lr": self._optimizer.param_groups[0]["lr"]})

    @torch.no_grad()
    def step(self, closure=None):
        """Steps with the gradients and the learning rate of `param_groups`."""
        assert closure is None
        parameters = self.param_groups[0]["params"]
        for parameter, copy, gradient in zip(parameters, self.cpu_parameters, self._gradients, strict=True):
            if parameter.grad is not None:
                gradient.copy_(parameter.grad, non_blocking=True)
            copy.grad = None if parameter.grad is None else gradient
        if parameters[0].is_cuda:
            torch.cuda.current_stream(parameters[0].device).synchronize()  # the host waits for the gradients
        self._optimizer.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        self._optimizer.step()
        for parameter, copy in zip(parameters, self.cpu_parameters, strict=True):
            parameter.copy_(copy, non_blocking=True)

    def state_dict(self):
        """Returns the state of the wrapped optimizer."""
        return self._optimizer.state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict):
        """Loads the optimizer's state, and copies the parameters, which must have been loaded before, to the CPU."""
        for copy, parameter in zip(self.cpu_parameters, self.param_groups[0]["params"], strict=True):
            copy.copy_(parameter)
        self._optimizer.load_state_dict(state_dict)
        self.param_groups[0]["lr"] = self._optimizer.param_groups[0]["lr"]


def _cpu_copy(tensor, pin):
    return torch.empty_like(tensor, device="cpu", pin_memory=pin, requires_grad=False).copy_(tensor.detach())


def loss_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Makes the loss scaler of float16 training; with other precisions it does nothing.

    With float16, fused AdamW skips a bad step on the device; for other optimizers GradScaler lets the host decide,
    which waits for the device once a step.

    Args:
        device: cuda or cpu.
        precision: value of --precision.
    """
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


@torch.no_grad()
def clip_gradients(parameters: Iterable[torch.nn.Parameter], norm: torch.Tensor, max_norm: float) -> None:
    """Scales gradients in place to a global norm of `max_norm`, if `norm` is larger.

    As torch.nn.utils.clip_grads_with_norm_, also for sharded gradients. Does not wait for the device.

    Args:
        parameters: parameters with gradients.
        norm: float32 0-dim, the global norm as measured before.
        max_norm: largest global norm allowed.
    """
    gradients = local_shards([parameter.grad for parameter in parameters if parameter.grad is not None])
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
