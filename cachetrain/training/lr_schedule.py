"""Learning rates as functions of the step. Imports no torch."""

import math

POLYNOMIAL_END = 1e-7  # a learning rate, not a share of the peak, as in diffusers' get_scheduler

# Learning rate / peak after the warm-up. Arguments: progress through the decay, 0 to 1; final learning rate / peak;
# number of waves of a cosine, 1/2 to fall once.
_DECAYS = {
    "constant": lambda progress, end, cycles: 1.0,
    "constant_with_warmup": lambda progress, end, cycles: 1.0,
    "linear": lambda progress, end, cycles: 1.0 - progress,
    "cosine": lambda progress, end, cycles: _wave(progress, cycles),
    "cosine_with_min_lr": lambda progress, end, cycles: end + (1.0 - end) * _wave(progress, cycles),
    "linear_with_min_lr": lambda progress, end, cycles: end + (1.0 - end) * (1.0 - progress),
    # Power 1, the default of diffusers.
    "polynomial": lambda progress, end, cycles: end + (1.0 - end) * (1.0 - progress),
    # REX (Chen, Wolfe, Kyrillidis 2022): (1 - z) / (1/2 + 1/2 (1 - z)).
    "rex": lambda progress, end, cycles: (1.0 - progress) / (1.0 - progress / 2.0),
}
SCHEDULES = tuple(_DECAYS)


def _wave(progress, cycles):
    return 0.5 * (1.0 + math.cos(2.0 * math.pi * cycles * progress))


def lr_factor(
    schedule: str,
    step: int,
    warmup_steps: int,
    decay_steps: int,
    *,
    min_lr_rate: float = 0.1,
    peak_lr: float = 1.0,
    num_cycles: float = 0.5,
) -> float:
    """Returns the learning rate / peak of the optimizer step after `step` finished steps.

    As diffusers' get_scheduler, and transformers' for cosine_with_min_lr. The learning rate rises linearly from 0
    during the warm-up (except for "constant"), never rises again unless `num_cycles` asks for it, and stays at its
    final value after `decay_steps`.

    Args:
        schedule: one of SCHEDULES.
        step: finished optimizer steps, from 0.
        warmup_steps: optimizer steps.
        decay_steps: optimizer steps until the final learning rate is reached, warm-up included.
        min_lr_rate: final learning rate / peak of cosine_with_min_lr and linear_with_min_lr.
        peak_lr: peak learning rate, used by polynomial, whose final learning rate is POLYNOMIAL_END.
        num_cycles: waves of cosine and cosine_with_min_lr; 0.5 falls once.
    """
    if step < warmup_steps and schedule != "constant":
        return step / warmup_steps
    progress = min(1.0, max(0, step - warmup_steps) / max(1, decay_steps - warmup_steps))
    end = min(1.0, POLYNOMIAL_END / peak_lr) if schedule == "polynomial" and peak_lr else min_lr_rate
    return _DECAYS[schedule](progress, end, num_cycles)
