"""Learning rates as functions of the step, and what the command line asks of an optimizer. Imports no torch."""

import math

POLYNOMIAL_END = 1e-7  # an absolute rate, as get_scheduler of diffusers

# Rate / peak after the warm-up: of the progress through the decay (0..1) and the end rate / peak.
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

# Default betas of each optimizer.
BETAS = {
    "adamw": (0.9, 0.999),
    "lion": (0.9, 0.99),
    "stableadamw": (0.9, 0.99),
    "adamw8": (0.9, 0.999),
    "prodigy": (0.9, 0.999),
}
OPTIMIZERS = tuple(BETAS)
KAHAN_OPTIMIZERS = ("adamw", "lion", "stableadamw")  # these can update bfloat16 weights
# bfloat16 has 8 significant bits: an average that loses less than 2^-8 = 0.0039 of itself a step is rounded back.
_BF16_MAX_BETA = 0.995


def lr_factor(schedule, step, warmup_steps, decay_steps, *, min_lr_rate=0.1, peak_lr=1.0):
    """The learning rate over its peak, for the update after `step` finished ones.

    As diffusers' get_scheduler, and transformers' for cosine_with_min_lr. Rises linearly from 0 during the warm-up
    (not for "constant"), never rises again, and stays at its end value past `decay_steps`.

    Args:
        schedule: one of SCHEDULES.
        step: finished optimizer steps, from 0.
        warmup_steps: optimizer steps.
        decay_steps: the step at which the rate has come to its end value, warm-up included.
        min_lr_rate: end value / peak of cosine_with_min_lr.
        peak_lr: the peak itself; only polynomial needs it, which ends at an absolute rate.
    """
    if step < warmup_steps and schedule != "constant":
        return step / warmup_steps
    progress = min(1.0, max(0, step - warmup_steps) / max(1, decay_steps - warmup_steps))
    end = min(1.0, POLYNOMIAL_END / peak_lr) if schedule == "polynomial" else min_lr_rate
    return _DECAYS[schedule](progress, end)


def default_betas(optimizer, bf16_weights):
    """The betas of an optimizer; bfloat16 moments get a second one that they can follow."""
    first, second = BETAS[optimizer]
    return first, min(second, 0.99) if bf16_weights else second


def check_optimizer(optimizer, lr, betas, bf16_weights):
    """Refuses settings with which an optimizer would not train.

    Args:
        optimizer: one of OPTIMIZERS.
        lr: peak learning rate.
        betas: (first, second).
        bf16_weights: whether the weights themselves are bfloat16 (--precision bf16_pure).

    Raises:
        ValueError: a beta outside [0, 1); no Kahan sum or too slow a moment for bfloat16; prodigy with a small rate.
    """
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"--betas {betas[0]} {betas[1]}: expected two numbers from 0 to below 1")
    if optimizer == "prodigy" and lr < 0.1:
        raise ValueError(f"--optimizer prodigy finds the rate itself and scales it by --learning_rate: {lr} is far "
                         "too small; use --learning_rate 1")  # fmt: skip
    if bf16_weights and optimizer not in KAHAN_OPTIMIZERS:
        raise ValueError(f"--precision bf16_pure: {optimizer} has no Kahan sum and would lose small updates; use "
                         f"--optimizer {', '.join(KAHAN_OPTIMIZERS)}, or --precision bf16")  # fmt: skip
    if bf16_weights and max(betas) > _BF16_MAX_BETA:
        raise ValueError(f"--betas {betas[0]} {betas[1]}: a bfloat16 average cannot follow betas above "
                         f"{_BF16_MAX_BETA}; use 0.99, or --precision bf16")  # fmt: skip
