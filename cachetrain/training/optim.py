"""Optimizers, the learning rate as a function of the step, and the EMA of the weights."""

import copy
import math

import torch


def make_optimizer(name, parameters, lr, betas, weight_decay):
    """Makes the optimizer: torch's fused AdamW, or torch-optimi's Lion."""
    parameters = list(parameters)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
    from optimi import Lion

    return Lion(parameters, lr=lr, betas=betas, weight_decay=weight_decay)


def lr_factor(schedule, step, warmup_steps, decay_steps):
    """The learning rate over its peak, for the update after `step` finished ones; as diffusers' get_scheduler.

    Past `decay_steps` the rate stays where it ended.
    """
    if schedule == "constant":
        warmup_steps = 0
    if step < warmup_steps:
        return step / warmup_steps
    if schedule.startswith("constant"):
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, decay_steps - warmup_steps))
    if schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))


class Ema:
    """Exponential moving average of a model's weights in float32, with warm-up of the decay.

    decay_t = min(decay, (1 + t) / (10 + t)), as TensorFlow's ExponentialMovingAverage(num_updates).
    """

    def __init__(self, model, decay):
        self.decay = decay
        self.model = copy.deepcopy(model).float().eval().requires_grad_(False)
        self._weights = list(model.parameters())
        self._averages = list(self.model.parameters())

    @torch.no_grad()
    def update(self, step):
        """Moves the average towards the weights after update number `step` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averages, [weight.float() for weight in self._weights], 1 - decay)


def qk_weights(model):
    """The to_q and to_k weights of all attention layers."""
    return [p for name, p in model.named_parameters() if name.endswith(("to_q.weight", "to_k.weight"))]


def mean_abs_grad(parameters):
    """Mean |gradient| over all elements of `parameters`, as one float32 tensor on the device; 0 without gradients."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    total = torch.stack(torch._foreach_norm(grads, 1, dtype=torch.float32)).sum()
    return total / sum(grad.numel() for grad in grads)
