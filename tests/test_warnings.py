"""warnings.jsonl: what real trainings warn of, and what ends them, with the step at which it was."""

import os
import signal
import threading
from datetime import UTC, datetime
from itertools import count

import pytest
import torch
from helpers import json_lines, load_script, refused, train, without_headers

from cachetrain.log import record_warnings, warn

trainer = load_script("train_from_cached.py")
FLAGS = ["--max_steps", 4, "--batch_size", 2, "--log_groups", 1, "--save_steps", 2]
BARE = [*FLAGS, "--vae_scaling_factor", 0.5]  # which caches without headers do not say


@pytest.fixture(scope="module")
def bare(shapes, tmp_path_factory):
    """Caches without headers, of which every run warns at its start."""
    return without_headers(shapes, tmp_path_factory.mktemp("bare"))


def at_forward(monkeypatch, number, action):
    """Calls action(loss) after the forward pass of step `number`; what it returns is added to the loss."""
    forward, calls = trainer.forward_pass, count(1)

    def acting(*args, **kwargs):
        result = forward(*args, **kwargs)
        return result._replace(loss=result.loss + (action() or 0.0)) if next(calls) == number else result

    monkeypatch.setattr(trainer, "forward_pass", acting)


def assert_lines(found, *expected):
    assert [line["step"] for line in found] == [step for step, _ in expected]
    for line, (_, words) in zip(found, expected, strict=True):
        assert words in line["message"]


def test_warnings_are_kept_with_their_steps_and_a_resume_adds_to_them(bare, model_t5, tmp_path, monkeypatch, capsys):
    out, prompts, started = tmp_path / "run", tmp_path / "prompts.txt", datetime.now(UTC).replace(microsecond=0)
    prompts.write_text("a star")
    flags = [*BARE, "--sample_prompts", prompts, "--sample_steps", 1, "--sampler_steps", 1, "--sample_cfgs", 1]
    with monkeypatch.context() as patch:
        at_forward(patch, 2, lambda: torch.nan)
        at_forward(patch, 3, lambda: prompts.write_bytes(b"\xff"))
        train(bare, model_t5, out, *flags)
    first = json_lines(out / "warnings.jsonl")
    assert_lines(
        first, (0, "cannot be verified"), (2, "not finite at step 2"), (3, "prompts read before stay in use")
    )
    said = [line.removeprefix("warning: ") for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    assert [line["message"] for line in first] == said
    times = [datetime.strptime(line["time"], "%Y-%m-%dT%H:%M:%S%z") for line in first]
    assert started <= times[0] <= times[-1] <= datetime.now(UTC)

    prompts.write_text("a ring")
    os.truncate(out / "checkpoint-000004" / "unet" / "diffusion_pytorch_model.safetensors", 100)
    train(bare, model_t5, out, *flags, "--resume", "latest")
    assert json_lines(out / "warnings.jsonl")[:3] == first
    assert_lines(
        json_lines(out / "warnings.jsonl")[3:], (2, "IS DAMAGED and stepped over"), (2, "cannot be verified")
    )


def out_of_memory():
    raise torch.OutOfMemoryError("no room")


def bug():
    raise KeyError("unheard of")


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (lambda: torch.nan, "the run ended: loss or gradients were not finite in 1 step in a row"),
        (out_of_memory, "the run ended: out of memory (no room); try --batch_size"),
        (bug, "the run ended: KeyError: 'unheard of'"),
    ],
)
def test_the_error_that_ends_a_run_is_its_last_line(action, words, shapes, model_t5, tmp_path, monkeypatch):
    at_forward(monkeypatch, 2, action)
    with pytest.raises((ValueError, KeyError)):
        train(shapes, model_t5, tmp_path / "run", *FLAGS, "--max_nonfinite", 1)
    *_, last = json_lines(tmp_path / "run" / "warnings.jsonl")
    assert_lines([last], (2, words))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_ends_a_run_is_its_last_line_but_ones_own_ctrl_c_is_no_warning(
    number, shapes, model_t5, tmp_path, monkeypatch
):
    at_forward(monkeypatch, 2, lambda: os.kill(os.getpid(), number))
    with pytest.raises(AssertionError):  # an exit code that is not 0
        train(shapes, model_t5, tmp_path / "run", *FLAGS)
    written = tmp_path / "run" / "warnings.jsonl"
    if number == signal.SIGINT:
        assert not written.exists()
    else:
        assert_lines(json_lines(written), (2, "the run ended: SIGTERM after step 2 of 4"))


def test_healthy_and_refused_runs_leave_no_file(bare, shapes, model_t5, tmp_path):
    out = tmp_path / "healthy"
    train(shapes, model_t5, out, *FLAGS)
    assert "vae_scaling_factor" in refused(bare, model_t5, tmp_path / "refused")  # after the warning of its caches
    assert "already holds a run" in refused(bare, model_t5, out)
    assert not list(tmp_path.rglob("warnings.jsonl"))


def test_a_full_disk_ends_no_run(bare, model_t5, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "warnings.jsonl").symlink_to("/dev/full")
    train(bare, model_t5, tmp_path / "run", *BARE)
    assert capsys.readouterr().err.count("warning: ") == 1


def test_lines_of_many_threads_are_whole_and_other_ranks_write_none(tmp_path, monkeypatch):
    with record_warnings() as record:
        record.start(tmp_path / "warnings.jsonl", 7)
        threads = [threading.Thread(target=lambda i=i: [warn(f"{i} {n}") for n in range(50)]) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        monkeypatch.setenv("RANK", "1")
        warn("the same on another rank")
    monkeypatch.delenv("RANK")
    warn("after the run")
    lines = json_lines(tmp_path / "warnings.jsonl")
    assert sorted(line["message"] for line in lines) == sorted(f"{i} {n}" for i in range(8) for n in range(50))
    assert {line["step"] for line in lines} == {7}
