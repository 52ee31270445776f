"""torch's Muon and Adafactor for a UNet: convolutions are matrices, bfloat16 weights have a Kahan sum."""

import re
from collections.abc import Callable, Iterable

import torch
from torch.optim._adafactor import adafactor  # torch.optim.Adafactor factors a convolution by its height and width
from torch.optim._muon import muon  # torch.optim.Muon itself refuses convolutions
from torch.optim.adamw import adamw

# First and last layers (Jordan et al. 2024 leave them to AdamW): their inputs or outputs are not hidden features.
_OUTER = re.compile(r"(^|\.)(conv_in|conv_out|\w*embedding|encoder_hid_proj)\.")
_MUON = {"nesterov": True, "ns_coefficients": (3.4445, -4.7750, 2.0315), "ns_steps": 5}  # torch's defaults
# Updates as large as AdamW's (Liu et al. 2025): the same learning rates fit.
_MUON |= {"eps": 1e-7, "adjust_lr_fn": "match_rms_adamw", "has_complex": False}
_ADAFACTOR = {"d": 1.0, "beta2_decay": -0.8, "eps2": 1e-3}  # torch's defaults
# torch squares its eps1, which is then the paper's 1e-30: the gradients of a UNet are small.
_ADAFACTOR |= {"eps1": 1e-15, "maximize": False, "has_complex": False}


class _MatrixOptimizer(torch.optim.Optimizer):
    """Steps in float32. bfloat16 weights get a Kahan sum, a second bfloat16 number that holds what their last bit
    cannot; a step then works on copies of one matrix at a time.

    Args:
        groups: one group of parameters, as of torch's optimizers.
        settings: of the group.
        outer: names of parameters that are not treated as matrices match it.
        names: of the parameters; None: none is outer.
    """

    def __init__(self, groups: Iterable[dict], settings: dict, outer: re.Pattern | None, names: list[str] | None):
        super().__init__(groups, settings)
        parameters = self.param_groups[0]["params"]
        pairs = zip(names if names and outer else [None] * len(parameters), parameters, strict=True)
        self._matrices = {p for name, p in pairs if _is_matrix(p) and not (name and outer.search(name))}

    @torch.no_grad()
    def step(self, closure: Callable | None = None, param: torch.nn.Parameter | None = None) -> None:
        """Updates all parameters that have a gradient, or one of them (release.GradientRelease)."""
        assert closure is None
        (group,) = self.param_groups
        parameters = [p for p in (group["params"] if param is None else [param]) if p.grad is not None]
        for parameter in parameters:
            if parameter in self._matrices:
                self._update([parameter], self._new_matrix, self._step_matrix)
        others = [parameter for parameter in parameters if parameter not in self._matrices]
        if others:
            self._update(others, self._new_other, self._step_others)

    def _update(self, parameters, new_state, function):
        """Calls a function with (weights, gradients, states), all in float32."""
        states = [self.state[p] for p in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state.keys() - {"group"}:  # which GradientRelease puts there
                state.update(new_state(parameter))
                if parameter.dtype == torch.bfloat16:
                    state["kahan_comp"] = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters]
        if parameters[0].dtype != torch.bfloat16:
            function(parameters, gradients, states)
            return
        weights = [p + state["kahan_comp"].float() for p, state in zip(parameters, states, strict=True)]
        copies = [{k: v.float() for k, v in s.items() if k not in ("kahan_comp", "group")} for s in states]
        function(weights, [gradient.float() for gradient in gradients], copies)
        for parameter, weight, state, values in zip(parameters, weights, states, copies, strict=True):
            for key, value in values.items():
                state[key].copy_(value)
            parameter.copy_(weight)
            state["kahan_comp"].copy_(weight - parameter)


class Muon(_MatrixOptimizer):
    """torch.optim.Muon for matrices, with convolutions as matrices [out, in x height x width], and torch.optim.AdamW
    for biases, norms, and the first and last layers. The orthogonalization computes in bfloat16, as torch's.

    Args:
        groups: one group of parameters, as of torch's optimizers.
        lr: learning rate of both; a matrix [m, n] takes 0.2 x sqrt(max(m, n)) of it.
        betas: (decay of the average of gradients, that of AdamW's average of squares).
        eps: of AdamW.
        names: of the parameters, by which it finds the first and last layers; None: there are none.
        gradient_release: `step` is called with one parameter at a time.
    """

    def __init__(self, groups, lr, betas, eps, names=None, gradient_release=False):
        # fused: as in torch's AdamW, loading a state then moves "step" to the device.
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "fused": True}
        super().__init__(groups, settings, _OUTER, names)

    def _new_matrix(self, parameter):
        return {"momentum_buffer": torch.zeros_like(parameter)}

    def _step_matrix(self, weights, gradients, states):
        (group,) = self.param_groups
        momenta = [state["momentum_buffer"] for state in states]
        settings = _MUON | {"lr": group["lr"], "momentum": group["betas"][0], "weight_decay": group["weight_decay"]}
        muon(*([_as_matrix(t) for t in tensors] for tensors in (weights, gradients, momenta)), **settings)

    def _new_other(self, parameter):
        step = torch.zeros((), device=parameter.device)
        return {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter), "step": step}

    def _step_others(self, weights, gradients, states):
        (group,) = self.param_groups
        averages, squares, steps = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
        settings = {"lr": group["lr"], "weight_decay": group["weight_decay"], "eps": group["eps"]}
        settings |= {"beta1": group["betas"][0], "beta2": group["betas"][1], "amsgrad": False, "maximize": False}
        adamw(weights, gradients, averages, squares, [], steps, fused=True, **settings)


class Adafactor(_MatrixOptimizer):
    """torch.optim.Adafactor, with convolutions as matrices [out, in x height x width]: of a matrix it keeps a number
    per row and one per column. The learning rate is relative to the root mean square of a weight.

    The host waits for the device twice per tensor.

    Args:
        groups: one group of parameters, as of torch's optimizers.
        lr: learning rate.
        betas: not used: there is no average of gradients, and that of their squares gets slower by itself.
        gradient_release: `step` is called with one parameter at a time.
    """

    def __init__(self, groups, lr, betas, gradient_release=False):
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0}, None, None)

    def load_state_dict(self, state_dict):
        """Loads a state; torch alone would round all of it to the dtype of the weights."""
        super().load_state_dict(state_dict)
        for number, values in state_dict["state"].items():
            parameter = self.param_groups[0]["params"][number]
            for key in values.keys() & {"row_var", "col_var", "variance"}:
                self.state[parameter][key] = values[key].to(parameter.device, copy=True)

    def _new_matrix(self, parameter):
        rows, columns = _as_matrix(parameter).shape
        new = {"device": parameter.device, "dtype": torch.float32}
        return {
            "row_var": torch.zeros(rows, 1, **new),
            "col_var": torch.zeros(1, columns, **new),
            "step": torch.zeros(()),
        }

    def _new_other(self, parameter):
        return {"variance": torch.zeros_like(parameter, dtype=torch.float32), "step": torch.zeros(())}

    def _step_matrix(self, weights, gradients, states):
        factors = ([state[key] for state in states] for key in ("row_var", "col_var"))
        self._step([_as_matrix(w) for w in weights], [_as_matrix(g) for g in gradients], *factors, [None], states)

    def _step_others(self, weights, gradients, states):
        weights, gradients, variances = (
            [t.detach().view(-1) for t in tensors]
            for tensors in (weights, gradients, [state["variance"] for state in states])
        )
        none = [None] * len(weights)
        self._step(weights, gradients, none, none, variances, states)

    def _step(self, weights, gradients, row_vars, col_vars, variances, states):
        (group,) = self.param_groups
        settings = _ADAFACTOR | {"lr": group["lr"], "weight_decay": group["weight_decay"], "foreach": False}
        adafactor(weights, gradients, row_vars, col_vars, variances, [s["step"] for s in states], **settings)


def _is_matrix(parameter):
    """Whether a weight is a matrix or convolution; DoRA's lengths of a convolution are [1, out, 1, 1]."""
    return parameter.ndim > 1 and 1 < parameter.shape[0] < parameter.numel()


def _as_matrix(tensor):
    """A view of a matrix or convolution as [out, rest]; of one in channels_last as [out, height x width x in]."""
    tensor = tensor.detach()
    if tensor.ndim == 4 and not tensor.is_contiguous():
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.view(len(tensor), -1)
