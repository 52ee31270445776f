"""Objectives and loss weights against diffusers' own code and closed forms."""

import re
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr

from cachetrain.diffusion.noise_schedulers import SD_SCHEDULE, make_scheduler, objective_of, sampler_for
from cachetrain.diffusion.objective import (
    alpha_sigma,
    debiased_weights,
    denoised,
    huber_error,
    min_snr_weights,
    noise_schedule,
    snr_weights,
    squared_error,
    stratified,
    target_of,
    timestep_fraction,
)
from cachetrain.modeling.load import load_scheduler


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 6, 4, 8, 8, generator=generator)
    return latents, noise, torch.tensor([0, 1, 250, 500, 998, 999])


def ddpm():
    config = {k: v for k, v in SD_SCHEDULE.items() if k not in ("set_alpha_to_one", "steps_offset")}
    return DDPMScheduler(**config)


@pytest.mark.parametrize("objective", ["epsilon", "v_prediction"])
def test_ddpm_noising_and_targets_equal_diffusers(objective, batch):
    latents, noise, timesteps = batch
    reference = ddpm()
    alphas = noise_schedule(make_scheduler(objective), "cpu")
    alpha, sigma = alpha_sigma(objective, timesteps, alphas)
    noisy = alpha * latents + sigma * noise
    torch.testing.assert_close(noisy, reference.add_noise(latents, noise, timesteps))
    expected = noise if objective == "epsilon" else reference.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(target_of(objective, latents, noise, alpha, sigma), expected)
    torch.testing.assert_close(denoised(objective, noisy, expected, alpha, sigma), latents, atol=1e-4, rtol=1e-4)


def test_flow_noising_and_target_equal_diffusers_and_lead_back_to_the_image(batch):
    latents, noise, _ = batch
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    timesteps = scheduler.timesteps[[0, 100, 400, 600, 900, 999]]
    alpha, sigma = alpha_sigma("flow", timesteps)
    noisy = alpha * latents + sigma * noise
    torch.testing.assert_close(noisy, scheduler.scale_noise(latents, timesteps, noise))
    velocity = target_of("flow", latents, noise, alpha, sigma)
    torch.testing.assert_close(noisy - sigma * velocity, latents)


def test_min_snr_weights_match_paper(batch):
    timesteps = batch[2]
    snr = compute_snr(ddpm(), timesteps)
    capped = torch.minimum(snr, torch.full_like(snr, 5.0))
    for objective, expected in (("epsilon", capped / snr), ("v_prediction", capped / (snr + 1))):
        alpha, sigma = alpha_sigma(objective, timesteps, noise_schedule(make_scheduler(objective), "cpu"))
        torch.testing.assert_close(min_snr_weights(objective, alpha, sigma, 5.0), expected, rtol=1e-4, atol=1e-7)


def test_weights_of_all_objectives_weigh_the_error_of_x0_alike(batch):
    """The same error of x_0 must cost min(snr, gamma), or sqrt(snr), whichever way it is predicted."""
    latents, noise, _ = batch
    alpha = torch.tensor([0.99, 0.9, 0.7, 0.5, 0.3, 0.1])[:, None, None, None]
    error = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    for objective in ("epsilon", "v_prediction", "flow"):
        sigma = 1 - alpha if objective == "flow" else (1 - alpha**2).sqrt()
        snr = (alpha / sigma).square().flatten()
        noisy = alpha * latents + sigma * noise
        wrong = latents + error  # what the model believes x_0 to be, and the noise that follows from it
        wrong_noise = (noisy - alpha * wrong) / sigma
        prediction = target_of(objective, wrong, wrong_noise, alpha, sigma)
        raw = squared_error(prediction, target_of(objective, latents, noise, alpha, sigma))
        squares = error.square().flatten(1).mean(1)
        for use_snr, expected in ((True, snr.clamp(max=5.0) * squares), ("debiased", snr.sqrt() * squares)):
            cost = raw * snr_weights(objective, alpha, sigma, use_snr, 5.0)
            torch.testing.assert_close(cost, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("objective", ["epsilon", "v_prediction", "flow"])
def test_debiased_weights_are_finite_at_both_ends(objective):
    if objective == "flow":
        alpha, sigma = alpha_sigma("flow", torch.tensor([0.0, 1000.0]))
    else:
        alpha, sigma = alpha_sigma(
            objective, torch.tensor([0, 999]), noise_schedule(make_scheduler(objective), "cpu")
        )
    assert debiased_weights(objective, alpha, sigma).isfinite().all()


def test_huber_error_is_pseudo_huber_with_a_constant_that_falls_with_the_noise():
    difference = torch.tensor([0.001, 100.0, -100.0])[:, None, None, None].expand(3, 4, 8, 8)
    timesteps, zero = torch.tensor([0, 500, 1000]), torch.zeros(3, 4, 8, 8)
    error = huber_error(difference.bfloat16(), zero.bfloat16(), timesteps, 0.1)
    c = torch.tensor([1.0, 0.1**0.5, 0.1])
    # A small error is squared; a large one costs 2 c |d| - 2 c^2.
    expected = torch.stack([difference[0, 0, 0, 0] ** 2, 200 * c[1] - 2 * c[1] ** 2, 200 * c[2] - 2 * c[2] ** 2])
    assert error.dtype == torch.float32
    torch.testing.assert_close(error, expected, rtol=1e-2, atol=1e-7)
    middle = torch.full((1, 1, 1, 1), 0.3, dtype=torch.float64, requires_grad=True)
    huber_error(middle, torch.zeros(1, 1, 1, 1), torch.tensor([1000]), 0.1).backward()
    # The slope is that of the square, divided by sqrt(1 + (d / c)^2) (Charbonnier et al. 1997).
    torch.testing.assert_close(middle.grad.item(), 2 * 0.3 / (1 + 9) ** 0.5, rtol=1e-5, atol=0)


def test_zero_terminal_snr_is_that_of_diffusers_and_ends_in_pure_noise(batch):
    scheduler = make_scheduler("v_prediction", make_scheduler("epsilon"), zero_terminal_snr=True)
    expected = torch.cumprod(1 - rescale_zero_terminal_snr(ddpm().betas), 0)
    alphas = noise_schedule(scheduler, "cpu")
    torch.testing.assert_close(alphas, expected)
    assert alphas[-1] == 0 and scheduler.config.timestep_spacing == "trailing"
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999
    latents, noise, _ = batch
    alpha, sigma = alpha_sigma("v_prediction", torch.full((6,), 999), alphas)
    assert torch.equal(target_of("v_prediction", latents, noise, alpha, sigma), -latents)
    assert (min_snr_weights("v_prediction", alpha, sigma, 5.0) == 0).all()


@pytest.mark.parametrize("objective", ["epsilon", "flow"])
def test_zero_terminal_snr_is_refused_where_it_means_nothing(objective):
    with pytest.raises(ValueError, match="v_prediction"):
        make_scheduler(objective, zero_terminal_snr=True)


@pytest.mark.parametrize("from_objective", ["epsilon", "v_prediction"])
def test_epsilon_on_a_schedule_that_ends_in_pure_noise_is_refused_in_training_and_drawing(from_objective):
    config = make_scheduler("v_prediction", zero_terminal_snr=True).config
    base = DDIMScheduler.from_config(config, prediction_type=from_objective)
    with pytest.raises(ValueError, match=r"zero terminal SNR.*use --objective v_prediction"):
        make_scheduler("epsilon", base)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        sampler_for(DDIMScheduler.from_config(config, prediction_type="epsilon"))
    assert make_scheduler("v_prediction", base).config.rescale_betas_zero_snr
    one = DDIMScheduler(**SD_SCHEDULE | {"trained_betas": [0.001] * 999 + [1.0]})
    with pytest.raises(ValueError, match="zero terminal SNR"):
        make_scheduler("epsilon", one)


def test_a_model_keeps_its_scheduler_where_it_has_the_objective():
    for objective in ("epsilon", "v_prediction", "flow"):
        scheduler = make_scheduler(objective)
        assert make_scheduler(objective, scheduler) is scheduler
    shifted = make_scheduler("flow", FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert shifted.config.flow_shift == 3.0 and make_scheduler("flow", shifted) is shifted
    assert sampler_for(shifted).config.shift == sampler_for(shifted, "dpm++").config.flow_shift == 3.0
    assert make_scheduler("epsilon", shifted).config.beta_end == SD_SCHEDULE["beta_end"]


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDIMScheduler(num_train_timesteps=100), "num_train_timesteps 100, expected 1000"),
        (FlowMatchEulerDiscreteScheduler(num_train_timesteps=100), "num_train_timesteps 100, expected 1000"),
        (FlowMatchEulerDiscreteScheduler(shift=-1.0), "shift -1.0, expected a number above 0"),
        (EDMEulerScheduler(prediction_type="epsilon"), "no noise schedule like Stable Diffusion's"),
        (DDIMScheduler(beta_start=float("nan")), "betas that are no noise schedule"),
        (DDIMScheduler(beta_start=-0.1), "betas that are no noise schedule"),
    ],
)
def test_noise_schedule_that_cannot_be_trained_is_refused_by_name(scheduler, message):
    for make in (sampler_for, partial(make_scheduler, objective_of(scheduler))):
        with pytest.raises(ValueError, match=re.escape(message)):
            make(scheduler) if make is sampler_for else make(base=scheduler)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "scheduler_config.json: is not JSON (Expecting"),
        ("[]", "expected the config of a scheduler"),
        ('{"beta_start": 0.1}', "has no _class_name"),
        ('{"_class_name": "UNet2DConditionModel"}', "UNet2DConditionModel is not a diffusers scheduler"),
        ('{"_class_name": "DDIMScheduler", "beta_schedule": "sine"}', "sine"),
        ('{"_class_name": "DDIMScheduler", "num_train_timesteps": "many"}', "expected the config of a scheduler"),
    ],
)
def test_broken_scheduler_config_is_refused_by_name(config, message, tmp_path):
    (tmp_path / "scheduler_config.json").write_text(config)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_scheduler(tmp_path)


def test_logit_normal_timesteps_are_distributed_as_in_diffusers():
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    quantiles = torch.tensor([0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
    for mean, std in ((0.0, 1.0), (-0.5, 1.7)):
        ours = torch.tensor([timestep_fraction("logit_normal", u.item(), mean, std) for u in uniform])
        torch.manual_seed(0)
        theirs = compute_density_for_timestep_sampling("logit_normal", 200_000, logit_mean=mean, logit_std=std)
        torch.testing.assert_close(ours.quantile(quantiles), theirs.quantile(quantiles), rtol=0.02, atol=0.003)
    assert timestep_fraction("logit_normal", 0.0) == 0 and timestep_fraction("uniform", 0.3) == 0.3
    assert timestep_fraction("logit_normal", 1 - 2**-53, 10.0, 10.0) < 1


def test_shifted_timesteps_are_those_of_diffusers_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    ours = [1000 * timestep_fraction("uniform", step / 1000, shift=3.0) for step in (1000, 900, 500, 1)]
    torch.testing.assert_close(torch.tensor(ours), scheduler.timesteps[[0, 100, 500, 999]])


@pytest.mark.parametrize("offset", [0.0, 0.37, 0.999])
def test_stratified_numbers_fall_one_in_each_part(offset):
    numbers = [stratified(offset, slot, 16) for slot in range(16)]
    assert sorted(int(number * 16) for number in numbers) == list(range(16))


def test_squared_error_of_bf16_reduces_in_float32():
    prediction = torch.full((1, 4, 64, 64), 1.0, dtype=torch.bfloat16)
    error = squared_error(prediction, torch.full((1, 4, 64, 64), 1.25))
    assert error.dtype == torch.float32
    assert error.item() == 0.0625


@pytest.mark.parametrize("objective", ["epsilon", "v_prediction", "flow"])
def test_scheduler_of_objective_says_and_samples_it(objective, tmp_path):
    make_scheduler(objective).save_pretrained(tmp_path)
    scheduler = load_scheduler(tmp_path)
    assert objective_of(scheduler) == objective
    assert objective_of(sampler_for(scheduler)) == objective


@pytest.mark.parametrize("objective", ["epsilon", "v_prediction", "flow"])
def test_denoise_with_a_perfect_model_recovers_the_image(objective):
    """A UNet that knows x_0 must lead the sampler to it: schedules of training and sampling agree."""
    from cachetrain.modeling.t5_pipeline import denoise

    scheduler = sampler_for(make_scheduler(objective))
    x0 = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)).clamp(-2, 2)
    alphas = noise_schedule(scheduler, "cpu")

    def oracle(x, t):
        alpha, sigma = alpha_sigma(objective, t.reshape(1), alphas)
        return target_of(objective, x0, (x - alpha * x0) / sigma, alpha, sigma)

    latents = denoise(oracle, scheduler, torch.randn(1, 4, 8, 8), 1.0, 20)
    assert (latents - x0).abs().max() < 0.15  # DDIM ends at the noise of timestep 1, not at none
