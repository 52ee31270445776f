"""The noise schedule of each training objective, as a diffusers scheduler that also samples it."""

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


def make_scheduler(objective, base=None, zero_terminal_snr=False):
    """Makes the scheduler of an objective.

    Args:
        objective: "epsilon", "v_prediction" or "flow" (rectified flow, Liu et al. 2022).
        base: a scheduler whose betas are kept; Stable Diffusion's when None.
        zero_terminal_snr: rescale the betas so that the last timestep is pure noise, and sample from there (Lin et
            al. 2024, sections 3.1 and 3.3).

    Raises:
        ValueError: zero_terminal_snr with an objective that does not train at pure noise, or has it anyway.
    """
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    if zero_terminal_snr and objective != "v_prediction":
        reason = "starts at pure noise anyway" if objective == "flow" else "cannot tell the image from pure noise"
        raise ValueError(f"--zero_terminal_snr: {objective} {reason}; use it with --objective v_prediction")
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


def objective_of(scheduler):
    """Reads the objective that a scheduler samples: "epsilon", "v_prediction" or "flow".

    Raises:
        ValueError: the scheduler is of another kind (prediction_type "sample", say).
    """
    if "FlowMatch" in type(scheduler).__name__:
        return "flow"
    objective = scheduler.config.get("prediction_type", "epsilon")
    if objective not in OBJECTIVES:
        raise ValueError(
            f"{type(scheduler).__name__} has prediction_type {objective!r}; expected one of {OBJECTIVES}"
        )
    return objective


def sampler_for(scheduler):
    """The scheduler that draws samples during and after training: DDIM, or Euler for flow matching."""
    from diffusers import DDIMScheduler

    if objective_of(scheduler) == "flow":
        return scheduler
    return DDIMScheduler.from_config(scheduler.config, clip_sample=False)
