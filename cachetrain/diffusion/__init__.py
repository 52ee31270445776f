"""The mathematics of diffusion training: noise schedules, objectives and loss weights."""
