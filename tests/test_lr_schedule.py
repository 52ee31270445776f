"""Learning-rate schedules against diffusers, transformers and the papers."""

import itertools

import pytest
import torch
from diffusers.optimization import get_scheduler
from transformers.optimization import (
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
)

from cachetrain.cli import Steps
from cachetrain.training.lr_schedule import SCHEDULES, lr_factor

PEAK = 1e-5


def reference_scheduler(name, optimizer, warmup_steps, decay_steps):
    if name == "cosine_with_min_lr":
        return get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup_steps, decay_steps, min_lr_rate=0.1)
    if name == "linear_with_min_lr":  # polynomial of power 1, with an end of its own
        return get_polynomial_decay_schedule_with_warmup(optimizer, warmup_steps, decay_steps, lr_end=0.1 * PEAK)
    return get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=decay_steps)


@pytest.mark.parametrize("warmup_steps", [0, 10])
@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "rex"])
def test_lr_factor_equals_diffusers_and_transformers(name, warmup_steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    reference = reference_scheduler(name, optimizer, warmup_steps, 100)
    for step in range(101):
        rate = PEAK * lr_factor(name, step, warmup_steps, 100, peak_lr=PEAK)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12 * PEAK)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("name", ["cosine", "cosine_with_min_lr"])
def test_num_cycles_is_that_of_transformers(name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    if name == "cosine":
        reference = get_cosine_schedule_with_warmup(optimizer, 10, 100, num_cycles=1.5)
    else:
        reference = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 10, 100, num_cycles=1.5, min_lr_rate=0.1)
    for step in range(101):
        rate = PEAK * lr_factor(name, step, 10, 100, peak_lr=PEAK, num_cycles=1.5)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12 * PEAK)
        optimizer.step()
        reference.step()


def test_rex_follows_its_paper():
    # Chen, Wolfe, Kyrillidis 2022: eta_t = eta_0 (1 - t/T) / (1/2 + 1/2 (1 - t/T)).
    for t in range(101):
        z = t / 100
        assert lr_factor("rex", 10 + t, 10, 110) == pytest.approx((1 - z) / (1 / 2 + 1 / 2 * (1 - z)))


@pytest.mark.parametrize("name", SCHEDULES)
def test_lr_factor_rises_in_the_warmup_and_never_again(name):
    factors = [lr_factor(name, step, 10, 100, peak_lr=PEAK) for step in range(400)]
    if name == "constant":
        assert factors == [1.0] * 400
        return
    assert factors[:11] == pytest.approx([step / 10 for step in range(11)])
    assert all(later <= earlier for earlier, later in itertools.pairwise(factors[10:]))
    ends = {"constant_with_warmup": 1.0, "polynomial": 1e-7 / PEAK}
    end = 0.1 if name.endswith("_with_min_lr") else ends.get(name, 0.0)
    assert factors[100:] == pytest.approx([end] * 300, abs=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_lr_factor_never_exceeds_the_peak_where_settings_are_odd(name):
    for warmup_steps, decay_steps, peak_lr in ((0, 0, 1e-5), (50, 20, 1e-5), (0, 100, 1e-8), (5, 10, 0.0)):
        factors = [lr_factor(name, step, warmup_steps, decay_steps, peak_lr=peak_lr) for step in range(200)]
        assert all(0 <= factor <= 1 for factor in factors)


def test_steps_may_be_epochs():
    assert Steps("500").resolve(188) == 500
    assert Steps("2e").resolve(187.5) == 375
    assert Steps("0.1e").resolve(187.5) == 19
    for wrong in ("1.5", "-1", "e", "many", "nane", "infe", "-0.1e"):
        with pytest.raises(ValueError):
            Steps(wrong)
