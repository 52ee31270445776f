"""Learning rates as functions of the step. Imports no torch."""

import math

POLYNOMIAL_END = 1e-7  # a learning rate, not a share of the peak, as in diffusers' get_scheduler

# Learning rate / peak after the warm-up. Arguments: progress through the decay, 0 to 1; final learning rate / peak.
_DECAYS = {
    "constant": lambda progress, end: 1.0,
    "constant_with_warmup": lambda progress, end: 1.0,
    "linear": lambda progress, end: 1.0 - progress,
    "cosine": lambda progress, end: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "cosine_with_min_lr": lambda progress, end: end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * progress)),
    "polynomial": lambda progress, end: end + (1.0 - end) * (1.0 - progress),  # power 1, the default of diffusers
    # REX (Chen, Wolfe, Kyrillidis 2022): (1 - z) / (1/2 + 1/2 (1 - z)).
    "rex": lambda progress, end: (1.0 - progress) / (1.0 - progress / 2.0),
}
SCHEDULES = tuple(_DECAYS)


def lr_factor(
    schedule: str, step: int, warmup_steps: int, decay_steps: int, *, min_lr_rate: float = 0.1, peak_lr: float = 1.0
) -> float:
    """Returns the learning rate / peak of the optimizer step after `step` finished steps.

    As diffusers' get_scheduler, and transformers' for cosine_with_min_lr. The learning rate rises linearly from 0
    during the warm-up (except for "constant"), never rises again, and stays at its final value after `decay_steps`.

    Args:
        schedule: one of SCHEDULES.
        step: finished optimizer steps, from 0.
        warmup_steps: optimizer steps.
        decay_steps: optimizer steps until the final learning rate is reached, warm-up included.
        min_lr_rate: final learning rate / peak of cosine_with_min_lr.
        peak_lr: peak learning rate, used by polynomial, whose final learning rate is POLYNOMIAL_END.
    """
    if step < warmup_steps and schedule != "constant":
        return step / warmup_steps
    progress = min(1.0, max(0, step - warmup_steps) / max(1, decay_steps - warmup_steps))
    end = min(1.0, POLYNOMIAL_END / peak_lr) if schedule == "polynomial" and peak_lr else min_lr_rate
    return _DECAYS[schedule](progress, end)
