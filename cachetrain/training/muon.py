"""Muon for matrices and convolutions, AdamW for the rest."""

import torch
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS, muon
from torch.optim.adamw import adamw


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"), by torch's functions.

    Updates of weights of two dimensions or more are orthogonalized: momentum is replaced by the nearest matrix whose
    singular values are all about 1. A convolution's weight [out, in, h, w] is a matrix [out, in * h * w]. Weights of
    one dimension, biases and those of norms, are updated by AdamW.

    Updates are scaled to the size of AdamW's, so that its learning rates fit (Liu et al. 2025, "Muon is scalable for
    LLM training"). Weight decay is decoupled.

    Args:
        parameters: groups of parameters.
        lr: learning rate.
        betas: (momentum and AdamW's first beta, AdamW's second beta).
        eps: of AdamW.
    """

    def __init__(self, parameters, lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0):
        super().__init__(parameters, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Steps with the gradients of all parameters that have one."""
        assert closure is None
        for group in self.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            for p in with_gradient:
                self._init_state(p)
            self._step_matrices(group, [p for p in with_gradient if p.ndim > 1])
            self._step_vectors(group, [p for p in with_gradient if p.ndim < 2])

    def _init_state(self, p):
        state = self.state[p]
        if state:
            return
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        if p.ndim < 2:
            state["exp_avg_sq"] = torch.zeros_like(p)

    def _step_matrices(self, group, parameters):
        for p in parameters:
            self.state[p]["step"] += 1
        muon(
            [_as_matrix(p, p) for p in parameters],
            [_as_matrix(p.grad, p) for p in parameters],
            [_as_matrix(self.state[p]["exp_avg"], p) for p in parameters],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            momentum=group["betas"][0],
            nesterov=True,
            ns_coefficients=(DEFAULT_A, DEFAULT_B, DEFAULT_C),
            ns_steps=DEFAULT_NS_STEPS,
            eps=EPS,
            adjust_lr_fn="match_rms_adamw",
            has_complex=False,
        )

    def _step_vectors(self, group, parameters):
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _as_matrix(tensor, parameter):
    """A tensor [out, ...] of a parameter's shape as a matrix [out, others], a view if it has the parameter's layout.

    With channels last, the columns are in another order, which changes nothing but rounding.
    """
    if tensor.ndim > 2 and not parameter.is_contiguous():
        tensor = tensor.permute(0, *range(2, tensor.ndim), 1)
    return tensor.reshape(len(tensor), -1)
