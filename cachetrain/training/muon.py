"""Muon for a UNet: orthogonalized updates for its matrices and convolutions, AdamW for all else."""

import re
from collections.abc import Callable, Iterable

import torch
from torch.optim._muon import muon  # torch.optim.Muon itself refuses convolutions
from torch.optim.adamw import adamw

# First and last layers (Jordan et al. 2024 leave them to AdamW): their inputs or outputs are not hidden features.
_OUTER = re.compile(r"(^|\.)(conv_in|conv_out|\w*embedding|encoder_hid_proj)\.")
_MUON = {"nesterov": True, "ns_coefficients": (3.4445, -4.7750, 2.0315), "ns_steps": 5}  # torch's defaults
# Updates as large as AdamW's (Liu et al. 2025): the same learning rates fit.
_MUON |= {"eps": 1e-7, "adjust_lr_fn": "match_rms_adamw", "has_complex": False}


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon for matrices, with convolutions as matrices [out, in x height x width], and torch.optim.AdamW
    for biases, norms, and the first and last layers.

    bfloat16 weights get a Kahan sum: a second bfloat16 number that holds what their last bit cannot. A step computes
    in float32 (Muon's orthogonalization in bfloat16, as torch's) on copies of one matrix at a time.

    Args:
        groups: one group of parameters, as of torch's optimizers.
        lr: learning rate of both; a matrix [m, n] takes 0.2 x sqrt(max(m, n)) of it.
        betas: (decay of the average of gradients, that of AdamW's average of squares).
        eps: of AdamW.
        names: of the parameters; None: all matrices are hidden layers.
        gradient_release: `step` is called with one parameter at a time.
    """

    def __init__(
        self,
        groups: Iterable[dict],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        names: list[str] | None = None,
        gradient_release: bool = False,
    ):
        # fused: as in torch's AdamW, loading a state then moves "step" to the device.
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "fused": True})
        (group,) = self.param_groups
        names = names or [""] * len(group["params"])
        self._matrices = {
            p for name, p in zip(names, group["params"], strict=True) if _is_matrix(p) and not _OUTER.search(name)
        }

    @torch.no_grad()
    def step(self, closure: Callable | None = None, param: torch.nn.Parameter | None = None) -> None:
        """Updates all parameters that have a gradient, or one of them (release.GradientRelease)."""
        assert closure is None
        (group,) = self.param_groups
        parameters = [p for p in (group["params"] if param is None else [param]) if p.grad is not None]
        for parameter in parameters:
            if parameter in self._matrices:
                self._update([parameter], _step_muon, ("momentum_buffer",))
        others = [parameter for parameter in parameters if parameter not in self._matrices]
        if others:
            self._update(others, _step_adamw, ("exp_avg", "exp_avg_sq"))

    def _update(self, parameters, function, averages):
        """Calls a function with (group, weights, gradients, steps, *averages), in float32: lists of tensors."""
        states = [self.state[p] for p in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if averages[0] not in state:
                state.update({key: torch.zeros_like(parameter) for key in averages})
                if len(averages) > 1:
                    state["step"] = torch.zeros((), device=parameter.device)
                if parameter.dtype == torch.bfloat16:
                    state["kahan_comp"] = torch.zeros_like(parameter)
        steps = [state.get("step") for state in states]
        gradients = [p.grad for p in parameters]
        kept = [[state[key] for state in states] for key in averages]
        if parameters[0].dtype != torch.bfloat16:
            function(self.param_groups[0], parameters, gradients, steps, *kept)
            return
        weights = [p + state["kahan_comp"].float() for p, state in zip(parameters, states, strict=True)]
        in_float32 = [[tensor.float() for tensor in tensors] for tensors in (gradients, *kept)]
        function(self.param_groups[0], weights, in_float32[0], steps, *in_float32[1:])
        for tensors, values in zip((parameters, *kept), (weights, *in_float32[1:]), strict=True):
            torch._foreach_copy_(tensors, values)
        torch._foreach_sub_(weights, parameters)
        torch._foreach_copy_([state["kahan_comp"] for state in states], weights)


def _is_matrix(parameter):
    """Whether a weight is a matrix or convolution; DoRA's lengths of a convolution are [1, out, 1, 1]."""
    return parameter.ndim > 1 and 1 < parameter.shape[0] < parameter.numel()


def _as_matrix(tensor):
    """A view of a matrix or convolution as [out, rest]; of one in channels_last as [out, height x width x in]."""
    if tensor.ndim == 4 and not tensor.is_contiguous():
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.view(len(tensor), -1)


def _step_muon(group, weights, gradients, steps, momenta):
    weights, gradients, momenta = ([_as_matrix(t.detach()) for t in ts] for ts in (weights, gradients, momenta))
    settings = _MUON | {"lr": group["lr"], "momentum": group["betas"][0], "weight_decay": group["weight_decay"]}
    muon(weights, gradients, momenta, **settings)


def _step_adamw(group, weights, gradients, steps, averages, squares):
    beta1, beta2 = group["betas"]
    settings = {"lr": group["lr"], "weight_decay": group["weight_decay"], "eps": group["eps"]}
    settings |= {"beta1": beta1, "beta2": beta2, "amsgrad": False, "maximize": False}
    adamw(weights, gradients, averages, squares, [], steps, fused=True, **settings)
