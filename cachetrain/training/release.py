"""--gradient_release: each weight is updated, and its gradient freed, as soon as that has been computed."""

from __future__ import annotations

import torch

from cachetrain.training.optim import decay_bf16


class GradientRelease:
    """An optimizer of torch-optimi that steps in the backward pass, one parameter at a time, so that never more than
    one gradient takes memory.

    The updates are those of the same optimizer without release. Gradients exist only one after another, so that they
    cannot be clipped to a global norm. If the first gradient of a backward pass is not finite, as all are after a bad
    loss, the whole step is skipped; the host waits for the device to know, once a step. If a later one is not,
    weights have been updated already: `check` then ends the run.

    Args:
        optimizer: of torch-optimi, made with gradient_release=True.
        weight_decay: of bfloat16 weights, see `optim.decay_bf16`; None: the optimizer does it.

    Attributes:
        implementation: optimizers.Implementation.
        skipped: whether the current step is skipped.
        updating: from the first update of a step to its end: the weights are those of no step.
        l1_of: parameters of which the L1 norm is measured too; on a CPU such a norm takes a tenth of a step.
        norms: {parameter: float32 [1], the L2 norm of its gradient, or [2], both norms} of the current step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, weight_decay: float | None):
        self._optimizer = optimizer
        self._weight_decay = weight_decay
        self.implementation = optimizer.implementation
        self.param_groups = optimizer.param_groups
        self.l1_of = frozenset()
        self.norms = {}
        self.skipped = False
        self.updating = False
        self._damaged = None  # bool on the device: a step was neither complete nor skipped
        for parameter in self._parameters():
            parameter.register_post_accumulate_grad_hook(self._release)

    def _parameters(self):
        return (parameter for group in self.param_groups for parameter in group["params"])

    @torch.no_grad()
    def _release(self, parameter):
        """Updates a parameter and frees its gradient; called by autograd."""
        gradient = parameter.grad
        orders = (2, 1) if parameter in self.l1_of else (2,)
        norm = torch.stack([torch.linalg.vector_norm(gradient, order, dtype=torch.float32) for order in orders])
        if not self.norms:
            self.skipped = not norm[0].isfinite().item()  # the host waits for the device
            self.updating = not self.skipped
        self.norms[parameter] = norm
        if not self.skipped:
            self._optimizer.step(param=parameter)
        parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Ends a step, whose updates the backward pass has made."""
        if self.skipped or not self.norms:
            return
        bad = ~torch.cat(list(self.norms.values())).isfinite().all()
        self._damaged = bad if self._damaged is None else self._damaged | bad
        if self._weight_decay is not None:
            decay_bf16(self._weight_decay, self._optimizer)
        self.updating = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the norms of the last step; there are no gradients."""
        self.norms.clear()

    def check(self) -> None:
        """Checks the steps since the last call; the host waits for the device.

        Raises:
            ValueError: a gradient was not finite after other weights had been updated.
        """
        damaged, self._damaged = self._damaged, None
        if damaged is not None and damaged.item():
            self.updating = True
            raise ValueError(
                "a gradient was not finite after other weights had been updated, as --gradient_release does it: the "
                "weights in memory are damaged and are not saved; resume with --resume latest and a lower --lr, or "
                "start again without --gradient_release"
            )

    def state_dict(self) -> dict:
        """Returns the state of the optimizer, without its references to parameter groups."""
        state = self._optimizer.state_dict()
        without = {n: {k: v for k, v in one.items() if k != "group"} for n, one in state["state"].items()}
        return state | {"state": without}

    def load_state_dict(self, state: dict) -> None:
        self._optimizer.load_state_dict(state)
        self.param_groups = self._optimizer.param_groups
        for group in self.param_groups:
            for parameter in group["params"]:
                self._optimizer.state[parameter]["group"] = group
