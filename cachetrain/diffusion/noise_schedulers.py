"""Noise schedules for the training objectives, and samplers for drawing, as diffusers schedulers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

OBJECTIVES = ("epsilon", "v_prediction", "flow")

# Stable Diffusion's schedule (Rombach et al. 2022), as in the SD1.5 repository.
SD_SCHEDULE = {
    "num_train_timesteps": 1000,
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
        base: scheduler whose betas are kept; None: Stable Diffusion's betas.
        zero_terminal_snr: rescale the betas so that the last timestep is pure noise, and start sampling there (Lin et
            al. 2024, sections 3.1 and 3.3).

    Raises:
        ValueError: zero_terminal_snr with an objective other than "v_prediction".
    """
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    if zero_terminal_snr and objective != "v_prediction":
        reason = "always starts at pure noise" if objective == "flow" else "cannot be trained at pure noise"
        raise ValueError(f"--zero_terminal_snr: {objective} {reason}; use --objective v_prediction, or omit the flag")
    if objective == "flow":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    if zero_terminal_snr:
        config = SD_SCHEDULE if base is None or objective_of(base) == "flow" else base.config
        return DDIMScheduler.from_config(
            config, prediction_type=objective, rescale_betas_zero_snr=True, timestep_spacing="trailing"
        )
    if base is None or objective_of(base) == "flow":
        return DDIMScheduler(**SD_SCHEDULE, prediction_type=objective)
    return type(base).from_config(base.config, prediction_type=objective)


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
            f"{type(scheduler).__name__} has prediction_type {objective!r}; expected one of {OBJECTIVES}"
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
        ValueError: the name is unknown, or that sampler does not support the objective or the noise schedule.
    """
    import inspect

    import diffusers

    objective, config = objective_of(scheduler), dict(scheduler.config)
    samplers = FLOW_SAMPLERS if objective == "flow" else SAMPLERS
    if name is not None and name not in samplers:
        known = name in SAMPLERS or name in FLOW_SAMPLERS
        reason = f"does not sample {objective} models" if known else "is not known"
        raise ValueError(f"scheduler {name!r} {reason}; expected one of {', '.join(samplers)}")
    class_name, extra = samplers[name or default_sampler(scheduler)]
    cls = getattr(diffusers, class_name)
    if objective == "flow":
        shift = config.get("shift", config.get("flow_shift", 1.0))
        shift_key = "flow_shift" if extra else "shift"
        return cls(num_train_timesteps=config["num_train_timesteps"], **{shift_key: shift}, **extra)
    accepted = inspect.signature(cls).parameters
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in accepted:
        # Without the rescaled betas, sampling would use another noise schedule than training.
        raise ValueError(f"scheduler {name!r} cannot start at zero terminal SNR; use ddim, euler or dpm++")
    if "clip_sample" in accepted:
        extra = extra | {"clip_sample": False}
    return cls.from_config(config, **extra)
