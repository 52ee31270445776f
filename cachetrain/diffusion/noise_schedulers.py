"""Noise schedules for the training objectives, and samplers for drawing, as diffusers schedulers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

NUM_TIMESTEPS = 1000  # of all models
OBJECTIVES = ("epsilon", "v_prediction", "flow")

# Stable Diffusion's schedule (Rombach et al. 2022), as in the SD1.5 repository.
SD_SCHEDULE = {
    "num_train_timesteps": NUM_TIMESTEPS,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}

# Short name -> (diffusers class, options besides the model's noise schedule). The first is the default.
SAMPLERS = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
_FLOW_SOLVER = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
FLOW_SAMPLERS = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", **_FLOW_SOLVER}),
    "unipc": ("UniPCMultistepScheduler", _FLOW_SOLVER),
}


def make_scheduler(
    objective: str, base: SchedulerMixin | None = None, zero_terminal_snr: bool = False
) -> SchedulerMixin:
    """Makes the scheduler for an objective.

    Args:
        objective: "epsilon", "v_prediction" or "flow" (rectified flow, Liu et al. 2022).
        base: scheduler whose noise schedule is kept, the shift of flow matching included; None: Stable Diffusion's.
        zero_terminal_snr: rescale the betas so that the last timestep is pure noise, and start sampling there (Lin et
            al. 2024, sections 3.1 and 3.3).

    Returns:
        a scheduler that StableDiffusionPipeline can draw with: `base` itself where it already fits.

    Raises:
        ValueError: zero_terminal_snr with an objective other than "v_prediction", or `check_noise_schedule` refuses.
    """
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    if zero_terminal_snr and objective != "v_prediction":
        reason = "always starts at pure noise" if objective == "flow" else "cannot be trained at pure noise"
        raise ValueError(f"--zero_terminal_snr: {objective} {reason}; use --objective v_prediction, or omit the flag")
    base_objective = objective_of(base) if base is not None else None
    if objective == "flow" and (base_objective != "flow" or "FlowMatch" in type(base).__name__):
        # Not diffusers' FlowMatch classes: StableDiffusionPipeline needs init_noise_sigma, which those lack.
        shift = _flow_shift(base) if base_objective == "flow" else 1.0
        # The pipeline warns of another steps_offset, which does nothing here.
        scheduler = DPMSolverMultistepScheduler(**FLOW_SAMPLERS["dpm++"][1], flow_shift=shift, steps_offset=1)
    elif base_objective == objective and not zero_terminal_snr:
        scheduler = base
    elif zero_terminal_snr:
        scheduler = DDIMScheduler.from_config(
            SD_SCHEDULE if base_objective in (None, "flow") else base.config,
            prediction_type=objective,
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        )
    elif base_objective in (None, "flow"):
        scheduler = DDIMScheduler(**SD_SCHEDULE, prediction_type=objective)
    else:
        scheduler = type(base).from_config(base.config, prediction_type=objective)
    if base is not None:
        check_noise_schedule(base if base_objective == "flow" else scheduler)
    return scheduler


def check_noise_schedule(scheduler: SchedulerMixin) -> None:
    """Checks that a model's noise schedule can be trained and sampled.

    Raises:
        ValueError: the message names what is wrong with the scheduler's config.
    """
    config, name, objective = scheduler.config, type(scheduler).__name__, objective_of(scheduler)
    if config.get("num_train_timesteps") != NUM_TIMESTEPS:
        raise ValueError(
            f"{name} has num_train_timesteps {config.get('num_train_timesteps')}, expected {NUM_TIMESTEPS}; correct "
            "scheduler/scheduler_config.json of the model"
        )
    if objective == "flow":
        shift = _flow_shift(scheduler)
        if type(shift) not in (int, float) or not 0 < shift < math.inf:
            raise ValueError(
                f"{name} has shift {shift!r:.40}, expected a number above 0; correct scheduler/scheduler_config.json "
                "of the model"
            )
        return
    signal = getattr(scheduler, "alphas_cumprod", None)
    if signal is None:
        raise ValueError(f"{name} has no noise schedule like Stable Diffusion's; use DDIMScheduler, for example")
    if not (((signal >= 0) & (signal <= 1)).all() and (signal.diff() <= 0).all()):  # nan is refused, too
        raise ValueError(
            f"{name} has betas that are no noise schedule: the share of the image must fall from at most 1 to at "
            "least 0; correct scheduler/scheduler_config.json of the model"
        )
    if objective == "epsilon" and (config.get("rescale_betas_zero_snr") or signal[-1] == 0):
        raise ValueError(
            "the model's noise schedule ends in pure noise (zero terminal SNR), from which epsilon cannot tell the "
            "image; use --objective v_prediction, or set rescale_betas_zero_snr to false in "
            "scheduler/scheduler_config.json of the model"
        )


def _flow_shift(scheduler):
    """The shift of the noise levels at which a flow model is sampled; 1: none."""
    return scheduler.config.get("shift", scheduler.config.get("flow_shift", 1.0))


def objective_of(scheduler: SchedulerMixin) -> str:
    """Returns the objective that a scheduler is for: "epsilon", "v_prediction" or "flow".

    Raises:
        ValueError: the scheduler is for another objective, such as prediction_type "sample".
    """
    if "FlowMatch" in type(scheduler).__name__ or scheduler.config.get("prediction_type") == "flow_prediction":
        return "flow"
    objective = scheduler.config.get("prediction_type", "epsilon")
    if objective not in OBJECTIVES:
        raise ValueError(
            f"{type(scheduler).__name__} has prediction_type {objective!r}; expected one of {OBJECTIVES}; "
            "correct scheduler/scheduler_config.json of the model"
        )
    return objective


def default_sampler(scheduler: SchedulerMixin) -> str:
    """Short name of the default sampler for a model: "ddim", or "euler" for flow matching."""
    return next(iter(FLOW_SAMPLERS if objective_of(scheduler) == "flow" else SAMPLERS))


def sampler_for(scheduler: SchedulerMixin, name: str | None = None) -> SchedulerMixin:
    """Makes the scheduler that draws samples, with the noise schedule of `scheduler`.

    Args:
        scheduler: the model's scheduler.
        name: a key of SAMPLERS, or of FLOW_SAMPLERS for flow matching; None: `default_sampler`.

    Raises:
        ValueError: the name is unknown, that sampler does not support the objective or the noise schedule, or
            `check_noise_schedule` refuses.
    """
    import inspect

    import diffusers

    check_noise_schedule(scheduler)
    objective, config = objective_of(scheduler), dict(scheduler.config)
    samplers = FLOW_SAMPLERS if objective == "flow" else SAMPLERS
    if name is not None and name not in samplers:
        known = name in SAMPLERS or name in FLOW_SAMPLERS
        reason = f"does not sample {objective} models" if known else "is not known"
        raise ValueError(f"scheduler {name!r} {reason}; expected one of {', '.join(samplers)}")
    class_name, extra = samplers[name or default_sampler(scheduler)]
    cls = getattr(diffusers, class_name)
    if objective == "flow":
        shift_key = "flow_shift" if extra else "shift"
        return cls(**{shift_key: _flow_shift(scheduler)}, **extra)
    accepted = inspect.signature(cls).parameters
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in accepted:
        # Without the rescaled betas, sampling would use another noise schedule than training.
        raise ValueError(f"scheduler {name!r} cannot start at zero terminal SNR; use ddim, euler or dpm++")
    if "clip_sample" in accepted:
        extra = extra | {"clip_sample": False}
    return cls.from_config(config, **extra)
