"""The mathematics of diffusion training: noise schedules, objectives, loss weights."""
