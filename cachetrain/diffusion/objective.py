"""The UNet's prediction targets and the loss weights, as pure functions of tensors.

All objectives share x_t = alpha_t x_0 + sigma_t noise; they differ in (alpha_t, sigma_t) and in the target.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING

import torch

from cachetrain.diffusion.noise_schedulers import objective_of

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


def timestep_fraction(
    sampling: str, uniform: float, logit_mean: float = 0.0, logit_std: float = 1.0, shift: float = 1.0
) -> float:
    """Maps a uniform number in [0, 1) to a position in the timestep range, in [0, 1).

    uniform: the number itself. logit_normal: sigmoid of a normal number of `logit_mean` and `logit_std`, densest in
    the middle for 0 (Esser et al. 2024, section 3.1). stratified: same as uniform, for numbers that come from
    `stratified`. A shift s then maps t to s t / (1 + (s - 1) t), for larger images (same paper, equation 23).
    """
    t = uniform
    if sampling == "logit_normal" and uniform > 0:
        # Far from 0 a float64 sigmoid rounds to 1, which no timestep is.
        t = min(1 / (1 + math.exp(-NormalDist(logit_mean, logit_std).inv_cdf(uniform))), 1 - 2**-24)
    return shift * t / (1 + (shift - 1) * t) if shift != 1 else t


def stratified(offset: float, slot: int, batch_size: int) -> float:
    """Returns the uniform number for one sample; each of `batch_size` equal parts of [0, 1) gets one number.

    frac(offset + slot / batch_size), the low-discrepancy sampler of Kingma et al. 2021.

    Args:
        offset: uniform in [0, 1), the same for the whole batch.
        slot: position of the sample in the batch.
    """
    return (offset + slot / batch_size) % 1.0


def alpha_sigma(
    objective: str, timesteps: torch.Tensor, alphas_cumprod: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Signal and noise scales at `timesteps`.

    Args:
        objective: "epsilon", "v_prediction" (DDPM schedule, Ho et al. 2020) or "flow" (Liu et al. 2022).
        timesteps: [B]; integers for DDPM, 1000 * sigma for flow.
        alphas_cumprod: float32 [T] on the same device (DDPM only).

    Returns:
        (alpha, sigma), float32 [B, 1, 1, 1].
    """
    if objective == "flow":
        sigma = timesteps.float() / 1000
        alpha = 1 - sigma
    else:
        signal = alphas_cumprod[timesteps]
        alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
    return alpha[:, None, None, None], sigma[:, None, None, None]


def target_of(
    objective: str, latents: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """The prediction target, same shape as `latents`.

    epsilon: noise. v: alpha noise - sigma x_0 (Salimans & Ho 2022, eq. after 11). flow: noise - x_0.
    """
    if objective == "epsilon":
        return noise
    if objective == "v_prediction":
        return alpha * noise - sigma * latents
    return noise - latents


def denoised(
    objective: str, noisy: torch.Tensor, prediction: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """The x_0 that a prediction for `noisy` = alpha x_0 + sigma noise amounts to; inverse of `target_of`."""
    if objective == "epsilon":
        return (noisy - sigma * prediction) / alpha
    if objective == "v_prediction":
        return alpha * noisy - sigma * prediction
    return noisy - sigma * prediction


def min_snr_weights(objective: str, alpha: torch.Tensor, sigma: torch.Tensor, gamma: float) -> torch.Tensor:
    """Min-SNR-gamma (Hang et al. 2023) as a weight on the squared error of the objective's target, float32 [B].

    min(snr, gamma) weights the error of x_0. For the error of the target, with snr = alpha^2 / sigma^2, this becomes
    epsilon: min(snr, g) / snr; v: min(snr, g) / (snr + 1); flow, where x_0 = x_t - sigma v: min(snr, g) sigma^2.
    """
    snr = (alpha / sigma).square().flatten()
    # At sigma = 0 snr is infinite; min() keeps the numerator finite and the weights tend to 0.
    capped = snr.clamp(max=gamma)
    if objective == "epsilon":
        return capped / snr
    if objective == "v_prediction":
        return capped / (snr + 1)
    return capped * sigma.flatten().square()


def debiased_weights(objective: str, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Debiased estimation (Yu et al. 2023) as a weight on the squared error of the objective's target, float32 [B].

    sqrt(snr) weights the error of x_0. For the error of the target this becomes, with alpha^2 + sigma^2 = 1,
    epsilon: sigma / alpha = 1 / sqrt(snr); v: alpha sigma; flow, where x_0 = x_t - sigma v: alpha sigma.
    """
    return (sigma / alpha if objective == "epsilon" else alpha * sigma).flatten()


def snr_weights(
    objective: str, alpha: torch.Tensor, sigma: torch.Tensor, use_snr: bool | str, gamma: float
) -> torch.Tensor:
    """The weights that --use_snr asks for, float32 [B]: Min-SNR, or "debiased"."""
    if use_snr == "debiased":
        return debiased_weights(objective, alpha, sigma)
    return min_snr_weights(objective, alpha, sigma, gamma)


def huber_error(
    prediction: torch.Tensor,
    target: torch.Tensor,
    timesteps: torch.Tensor,
    smallest: float,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean pseudo-Huber error of each sample, float32 [B]: 2 c (sqrt(d^2 + c^2) - c) of a difference d.

    That is d^2 where d is far below c, and 2 c |d| far above. c falls with the noise, c = smallest^(t / 1000), so
    that coarse outliers count less and fine details count as always (Khrapov et al. 2024, exponential schedule).

    Args:
        timesteps: [B], from 0 to 1000.
        smallest: c at timestep 1000.
        weights: [B, 1, h, w], as of `squared_error`.
    """
    c = (smallest ** (timesteps.float() / 1000))[:, None, None, None]
    difference = prediction.float() - target.float()
    errors = 2 * c * ((difference.square() + c.square()).sqrt() - c)
    return (errors if weights is None else errors * weights).flatten(1).mean(1)


def mask_weights(masks: torch.Tensor, unmasked_weight: float) -> torch.Tensor:
    """The weight of each position in the loss: 1 where a mask is 1, `unmasked_weight` where it is 0, linear between.

    Args:
        masks: float32 [B, 1, h, w] in [0, 1].
    """
    return unmasked_weight + (1 - unmasked_weight) * masks


def squared_error(
    prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean squared error of each sample, reduced in float32: [B].

    Args:
        weights: [B, 1, h, w], of positions. The mean is over all positions, not divided by the sum of the weights.
    """
    errors = (prediction.float() - target.float()).square()
    return (errors if weights is None else errors * weights).flatten(1).mean(1)


def noise_schedule(scheduler: SchedulerMixin, device: torch.device) -> torch.Tensor | None:
    """Returns alphas_cumprod, float32 [T] on `device`, of a DDPM-type scheduler; None for flow matching."""
    if objective_of(scheduler) == "flow":
        return None
    return scheduler.alphas_cumprod.to(device, torch.float32)
