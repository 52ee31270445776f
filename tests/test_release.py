"""--gradient_release: the same updates, one gradient at a time; what it skips, refuses, saves and resumes."""

import shutil
import threading
from pathlib import Path

import pytest
import torch
from helpers import REPO, json_lines, load_script, train, trainer_argv, weights_of
from runs import RESUME, content
from sdxl_fixtures import SDXL

from cachetrain.checkpoints import save
from cachetrain.checkpoints.resume import Resumed
from cachetrain.training.flags import resume_meanings
from cachetrain.training.nonfinite import backward_seed, step_if_finite
from cachetrain.training.optim import loss_scaler, make_optimizer
from cachetrain.training.release import GradientRelease

BF16, FP32 = torch.bfloat16, torch.float32
CASES = [
    ("adamw", BF16),
    *((name, dtype) for name in ("lion", "stableadamw", "muon", "adafactor") for dtype in (BF16, FP32)),
]
RELEASE = ["--gradient_release", "--precision", "bf16_pure"]


def network(dtype):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(6, 8), torch.nn.Linear(8, 8, bias=False), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3)]
    return torch.nn.Sequential(*layers).to(dtype)


def optimizer_of(name, model, release=True):
    return make_optimizer(name, list(model.parameters()), 1e-2, (0.9, 0.99), 0.05, gradient_release=release)


def loss_of(model, step, factor=1.0):
    inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
    return model(inputs.to(next(model.parameters()).dtype)).float().square().mean() * factor


def take(model, optimizer, step, factor=1.0):
    loss = loss_of(model, step, factor)
    loss.backward(backward_seed(loss))
    stepped = step_if_finite(optimizer, loss_scaler(torch.device("cpu"), "fp32"), torch.tensor(True))
    optimizer.zero_grad()
    return stepped


def everything(model, optimizer):
    """Bytes of the weights and of the optimizer's state."""
    state = optimizer.state_dict()
    numbers = {(n, k): v for n, one in state["state"].items() for k, v in one.items() if k != "group"}
    numbers |= {("group", k): v for k, v in state["param_groups"][0].items() if k == "pending_decay"}
    tensors = {k: v.float().tolist() if isinstance(v, torch.Tensor) else v for k, v in numbers.items()}
    return [p.detach().float().tolist() for p in model.parameters()], tensors


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_updates_are_those_of_the_optimizer_without_release(name, dtype):
    models = [network(dtype) for _ in range(2)]
    optimizers = [optimizer_of(name, model, release) for model, release in zip(models, (True, False), strict=True)]
    for step in range(6):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
            assert take(model, optimizer, step) is True
    assert all(torch.equal(*pair) for pair in zip(*(model.parameters() for model in models), strict=True))
    released, whole = (everything(*pair)[1] for pair in zip(models, optimizers, strict=True))
    assert all(released[key] == value for key, value in whole.items() if key[1] != "step")


def test_at_most_one_gradient_is_alive():
    model, alive = network(BF16), []
    optimizer = optimizer_of("adamw", model)
    step = optimizer._optimizer.step

    def counted(param):
        alive.append(sum(p.grad is not None for p in model.parameters()))
        step(param=param)

    optimizer._optimizer.step = counted
    take(model, optimizer, 0)
    assert alive == [1] * len(list(model.parameters())) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_loss_skips_the_whole_step_and_changes_no_bit(bad):
    model = network(BF16)
    optimizer = optimizer_of("adamw", model)
    take(model, optimizer, 0)
    before = everything(model, optimizer)
    assert take(model, optimizer, 1, factor=bad) is False
    assert everything(model, optimizer) == before
    assert take(model, optimizer, 2) is True and everything(model, optimizer) != before
    optimizer.check()  # a skipped step damages nothing


def test_bad_gradient_behind_good_ones_ends_the_run_unsaved():
    model = network(BF16)
    optimizer = optimizer_of("adamw", model)
    model[1].register_full_backward_pre_hook(lambda *_: (torch.full((5, 8), torch.nan, dtype=BF16),))
    take(model, optimizer, 0)
    assert not optimizer.updating
    with pytest.raises(ValueError, match=r"not finite after other weights had been updated.*--resume latest"):
        optimizer.check()
    assert optimizer.updating  # as Saving.rescue sees it


@pytest.fixture(scope="module")
def runs(shapes_sdxl, model_sdxl, tmp_path_factory):
    """Runs of four steps with and without release; returns (folder, flags)."""
    folder = tmp_path_factory.mktemp("release")
    flags = ["--batch_size", 2, "--max_steps", 4, "--save_steps", 2, "--lr", 1e-3, "--ema_decay", 0.9, *RELEASE]
    flags += ["--gradient_checkpointing", "--diagnostic_steps", 2, "--log_groups", 1, 2, 3, 4, 9, 11]
    train(shapes_sdxl, model_sdxl, folder / "released", *flags, suffixes=SDXL)
    whole = [flag for flag in flags if flag != "--gradient_release"]
    train(shapes_sdxl, model_sdxl, folder / "whole", *whole, "--gradient_clip", 0, suffixes=SDXL)
    return folder, flags


def test_a_run_with_release_is_the_run_without(runs):
    folder, _ = runs
    released, whole = (json_lines(folder / name / "metrics.jsonl") for name in ("released", "whole"))
    without = {
        tag for line in whole for tag in line if tag.startswith("09_Parameter_Stats/") and "weight_norm" not in tag
    }
    assert without and not any(tag in line for line in released for tag in without)  # updates: there is no "before"
    for ours, theirs in zip(released, whole, strict=True):
        theirs = {tag: value for tag, value in theirs.items() if tag not in without}
        assert ours.keys() == theirs.keys()
        # Queries' and keys' gradients are compared with their weights, which have been updated by then.
        moved = {tag for tag in ours if "qk_over_weight" in tag}
        for tag in ours.keys() - {tag for tag in ours if "minutes" in tag}:
            assert ours[tag] == pytest.approx(theirs[tag], rel=1e-2 if tag in moved else 1e-6), tag
    for part in ("unet", "unet_ema"):
        ours, theirs = (weights_of(folder / name / "checkpoint-000004" / part) for name in ("released", "whole"))
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_interrupted_run_with_release_resumes_bit_exact(runs, shapes_sdxl, model_sdxl, tmp_path):
    folder, flags = runs
    half = tmp_path / "half"
    half.mkdir()
    for name in ("args.json", "metrics.jsonl"):
        shutil.copy(folder / "released" / name, half)
    shutil.copytree(folder / "released" / "checkpoint-000002", half / "checkpoint-000002")
    train(shapes_sdxl, model_sdxl, half, *flags, *RESUME, suffixes=SDXL)
    assert content(folder / "released", 4) == content(half, 4)


def test_error_within_a_backward_pass_saves_nothing(shapes_sdxl, model_sdxl, tmp_path, monkeypatch, capsys):
    release, updated = GradientRelease._release, []

    def failing(self, parameter):
        release(self, parameter)
        updated.append(parameter)
        if len(updated) == 1.5 * len(list(self._parameters())) // 1:  # in the middle of step 2
            raise RuntimeError("CUDA error")

    monkeypatch.setattr(GradientRelease, "_release", failing)
    argv = trainer_argv(
        shapes_sdxl, model_sdxl, tmp_path / "run", "--max_steps", 3, "--batch_size", 2, *RELEASE, suffixes=SDXL
    )
    with pytest.raises(ValueError, match="CUDA error"):
        load_script("train_from_cached.py").main(argv)
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert "in the middle of an update" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--precision bf16_pure --gradient_clip 1", "cannot be combined with --gradient_clip: the norm of all"),
        ("--precision bf16_pure --gradient_accum 2", "cannot be combined with --gradient_accum: gradients are gone"),
        ("--precision bf16_pure --cpu_offload", "cannot be combined with --cpu_offload"),
        ("--precision bf16_pure --compile", "cannot be combined with --compile"),
        (
            "--precision bf16",
            "--optimizer adamw unless the weights are bfloat16; use --precision bf16_pure, or --optimizer lion",
        ),
        ("--precision fp16 --optimizer lion", "cannot be combined with --precision fp16"),
        ("--optimizer prodigy --lr 1", "cannot be combined with --optimizer prodigy unless the weights are bfloat16"),
    ],
)
def test_what_cannot_go_with_release_is_refused(flags, message, capsys):
    argv = ["--train_data_dir", "x", "--model", "m", "--output_dir", "o", "--gradient_release", *flags.split()]
    with pytest.raises(SystemExit):
        load_script("train_from_cached.py").parse_args(argv)
    assert message in capsys.readouterr().err


def test_several_gpus_cannot_release_gradients(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    argv = ["--train_data_dir", "x", "--model", "m", "--output_dir", "o", *RELEASE]
    with pytest.raises(SystemExit):
        load_script("train_from_cached.py").parse_args(argv)
    assert "--gradient_release works on one GPU only" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    parse = load_script("train_from_cached.py").parse_args
    assert (parse(argv).gradient_clip, parse(argv[:6]).gradient_clip) == (0.0, 1.0)


def measured_bytes(precision, optimizer, release):
    """Bytes per parameter that tensors hold: (weights, gradients at the end of a backward pass, state)."""
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(8)))
    model = model.to(BF16 if precision == "bf16_pure" else FP32)
    optimizer = optimizer_of(optimizer, model, release)
    numel = sum(parameter.numel() for parameter in model.parameters())
    model(torch.randn(2, 64, dtype=next(model.parameters()).dtype)).float().square().mean().backward()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    step_if_finite(optimizer, loss_scaler(torch.device("cpu"), "fp32"), torch.tensor(True))
    state = [value for one in optimizer.state_dict()["state"].values() for value in one.values()]
    state = sum(value.nbytes for value in state if isinstance(value, torch.Tensor) and value.ndim)
    return tuple(part / numel for part in (sum(p.nbytes for p in model.parameters()), gradients, state))


def test_documented_bytes_per_parameter_are_what_tensors_hold():
    rows = [row.strip("| \n").split(" | ") for row in (REPO / "docs" / "sdxl.md").read_text().splitlines()]
    rows = [row for row in rows if row[0] in ("`bf16`, `fp32`", "`bf16_pure`")]
    assert len(rows) == 3 + 2 + 2 * 3
    for precision, optimizer, release, *numbers in rows:
        weights, gradients, state, total, sdxl = map(float, numbers)
        expected = measured_bytes(precision.strip("`").split("`")[0], optimizer, release == "yes")
        assert (weights, gradients, state) == expected and total == sum(expected)
        assert sdxl == round(total * 2.567e9 / 2**30, 1)


def test_checkpoint_without_room_for_copies_is_written_before_training_goes_on(
    runs, shapes_sdxl, model_sdxl, tmp_path, monkeypatch
):
    folder, flags = runs
    monkeypatch.setattr(save, "available_bytes", lambda: 0)
    threads, write = [], save.Saving._write

    def watched(self, *arguments):
        threads.append(threading.current_thread())
        write(self, *arguments)

    monkeypatch.setattr(save.Saving, "_write", watched)
    train(shapes_sdxl, model_sdxl, tmp_path / "run", *flags, suffixes=SDXL)
    assert threads == 2 * [threading.main_thread()]
    assert content(tmp_path / "run", 4) == content(folder / "released", 4)
    assert content(tmp_path / "run", 2) == content(folder / "released", 2)


def test_run_of_a_version_without_the_flag_resumes_without_it_and_not_with_it():
    resumed = Resumed(None, False)
    resumed.path, resumed.state = Path("checkpoint-000002"), {"settings": {"optimizer": "adamw"}}
    settings = {"optimizer": "adamw", "gradient_release": False, "time_ids": None}
    assert resumed.check(settings, False, resume_meanings()) == []
    with pytest.raises(ValueError, match="gradient_release: None then, True now"):
        resumed.check(settings | {"gradient_release": True}, False, resume_meanings())
