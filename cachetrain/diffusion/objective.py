"""What the UNet is asked to predict, and how errors are weighted. Pure functions of tensors.

All objectives share x_t = alpha_t x_0 + sigma_t noise; they differ in (alpha_t, sigma_t) and in the target.
"""

import math
from statistics import NormalDist

import torch


def timestep_fraction(sampling, uniform):
    """Where in the range of timesteps a sample is trained, in [0, 1), from a uniform number in [0, 1).

    uniform: everywhere alike. logit_normal: most often in the middle, sigmoid of a standard normal number (Esser et
    al. 2024, section 3.1). stratified: as uniform, for numbers that are themselves spread over the batch (below).
    """
    if sampling != "logit_normal":
        return uniform
    if uniform == 0:
        return 0.0
    return 1 / (1 + math.exp(-NormalDist().inv_cdf(uniform)))


def stratified(offset, slot, batch_size):
    """The uniform number of one sample of a batch, such that the batch has one in each of `batch_size` equal parts of
    [0, 1): frac(offset + slot / batch_size) (the low-discrepancy sampler of Kingma et al. 2021). offset: uniform in
    [0, 1), one per batch.
    """
    return (offset + slot / batch_size) % 1.0


def alpha_sigma(objective, timesteps, alphas_cumprod=None):
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


def target_of(objective, latents, noise, alpha, sigma):
    """The prediction target, same shape as `latents`.

    epsilon: noise. v: alpha noise - sigma x_0 (Salimans & Ho 2022, eq. after 11). flow: noise - x_0.
    """
    if objective == "epsilon":
        return noise
    if objective == "v_prediction":
        return alpha * noise - sigma * latents
    return noise - latents


def min_snr_weights(objective, alpha, sigma, gamma):
    """Min-SNR-gamma (Hang et al. 2023) as a weight on the objective's own squared error, float32 [B].

    min(snr, gamma) weights the error of x_0. Seen from the target, with snr = alpha^2 / sigma^2:
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


def squared_error(prediction, target):
    """Mean squared error of each sample, reduced in float32: [B]."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def noise_schedule(scheduler, device):
    """alphas_cumprod of a DDPM-type scheduler on `device`, or None for flow matching."""
    return scheduler.alphas_cumprod.to(device, torch.float32) if hasattr(scheduler, "alphas_cumprod") else None
