"""Schedules, EMA and gradient statistics against diffusers and closed forms."""

import pytest
import torch
from diffusers.optimization import get_scheduler

from cachetrain.cli import Steps
from cachetrain.training.optim import Ema, lr_factor, make_optimizer, mean_abs_grad


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine"])
def test_lr_factor_equals_diffusers_get_scheduler(name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = get_scheduler(name, optimizer, num_warmup_steps=10, num_training_steps=100)
    for step in range(100):
        assert lr_factor(name, step, 10, 100) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_lr_factor_never_rises_again_past_decay_steps(name):
    tail = [lr_factor(name, step, 10, 100) for step in range(100, 400)]
    assert max(tail) == tail[0] == pytest.approx(0, abs=1e-12)


def test_ema_is_the_warmed_up_average_of_the_weights():
    model = torch.nn.Linear(3, 3)
    ema = Ema(model, 0.9)
    expected = model.weight.detach().clone()
    for step in range(1, 40):
        with torch.no_grad():
            model.weight.add_(torch.randn(3, 3, generator=torch.Generator().manual_seed(step)))
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(ema.model.weight, expected)
    assert not ema.model.weight.requires_grad


def test_mean_abs_grad_is_the_mean_over_all_elements():
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((4, 5), (7,))]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape)
    expected = torch.cat([p.grad.flatten() for p in parameters]).abs().mean()
    torch.testing.assert_close(mean_abs_grad(parameters), expected)


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_optimizer_step_follows_its_paper(name):
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = make_optimizer(name, [weight], lr=0.1, betas=(0.9, 0.99), weight_decay=0.01)
    weight.grad = torch.tensor([0.5, -0.25, 2.0])
    before = weight.detach().clone()
    optimizer.step()
    # First step: AdamW moves by g/|g| after bias correction (Loshchilov & Hutter 2019), Lion by sign((1-b1) g)
    # (Chen et al. 2023); both decay the weight by lr * wd.
    expected = before * (1 - 0.1 * 0.01) - 0.1 * weight.grad.sign()
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-6)


def test_steps_may_be_epochs():
    assert Steps("500").resolve(188) == 500
    assert Steps("2e").resolve(187.5) == 375
    assert Steps("0.1e").resolve(187.5) == 19
    for wrong in ("1.5", "-1", "e", "many"):
        with pytest.raises(ValueError):
            Steps(wrong)
