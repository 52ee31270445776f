"""Learning-rate schedules against diffusers, transformers and the papers; what is asked of an optimizer."""

import itertools
import subprocess
import sys

import pytest
import torch
from diffusers.optimization import get_scheduler
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

from cachetrain.cli import Steps
from cachetrain.training.lr_schedule import (
    BETAS,
    KAHAN_OPTIMIZERS,
    SCHEDULES,
    check_optimizer,
    default_betas,
    lr_factor,
)

PEAK = 1e-5


def reference_scheduler(name, optimizer, warmup_steps, decay_steps):
    if name == "cosine_with_min_lr":
        return get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup_steps, decay_steps, min_lr_rate=0.1)
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
    end = {"constant_with_warmup": 1.0, "cosine_with_min_lr": 0.1, "polynomial": 1e-7 / PEAK}.get(name, 0.0)
    assert factors[100:] == pytest.approx([end] * 300, abs=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_lr_factor_never_exceeds_the_peak_where_settings_are_odd(name):
    for warmup_steps, decay_steps, peak_lr in ((0, 0, 1e-5), (50, 20, 1e-5), (0, 100, 1e-8)):
        factors = [lr_factor(name, step, warmup_steps, decay_steps, peak_lr=peak_lr) for step in range(200)]
        assert all(0 <= factor <= 1 for factor in factors)


def test_schedules_import_no_torch():
    code = "import sys, cachetrain.training.lr_schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("bf16_weights", [False, True])
@pytest.mark.parametrize("name", BETAS)
def test_default_betas_are_accepted(name, bf16_weights):
    if bf16_weights and name not in KAHAN_OPTIMIZERS:
        with pytest.raises(ValueError, match=r"--precision bf16_pure.*--optimizer adamw"):
            check_optimizer(name, 1.0, default_betas(name, True), True)
    else:
        check_optimizer(name, 1.0, default_betas(name, bf16_weights), bf16_weights)


def test_bf16_averages_can_follow_the_betas_that_are_accepted():
    every_bf16 = torch.arange(0x3F80, 0x4000, dtype=torch.int16).view(torch.bfloat16)  # all values from 1 to below 2
    with pytest.raises(ValueError, match=r"--betas 0.9 0.999: a bfloat16 average"):
        check_optimizer("adamw", 1e-5, (0.9, 0.999), True)
    check_optimizer("adamw", 1e-5, (0.9, 0.995), True)
    assert (every_bf16 * 0.999 == every_bf16).any()
    assert (every_bf16 * 0.995 < every_bf16).all()


def test_settings_with_which_an_optimizer_would_not_train_are_refused():
    with pytest.raises(ValueError, match="--learning_rate 1"):
        check_optimizer("prodigy", 1e-5, (0.9, 0.999), False)
    for betas in ((1.0, 0.9), (0.9, -0.1)):
        with pytest.raises(ValueError, match="--betas"):
            check_optimizer("adamw", 1e-5, betas, False)


def test_steps_may_be_epochs():
    assert Steps("500").resolve(188) == 500
    assert Steps("2e").resolve(187.5) == 375
    assert Steps("0.1e").resolve(187.5) == 19
    for wrong in ("1.5", "-1", "e", "many"):
        with pytest.raises(ValueError):
            Steps(wrong)
