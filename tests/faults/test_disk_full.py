"""No room while a checkpoint is saved: training goes on and says so, what existed stays, and later saves succeed."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from errno import ENOSPC
from types import SimpleNamespace

import pytest
from helpers import json_lines, load_script, read_events, refused, train, trainer_argv
from save_faults import NEW, NEXT, OLD, FullDisk, Run, check, copy, undisturbed, watched_disk

from cachetrain import cli
from cachetrain.atomic import staged_directory
from cachetrain.checkpoints.manifest import damages
from cachetrain.checkpoints.save import Saving, checkpoints, step_of
from cachetrain.training import checks
from cachetrain.training.logs.metrics import Metrics

GIB = 2**30


@pytest.fixture(scope="module")
def saved(model_t5, tmp_path_factory):
    return undisturbed(model_t5, tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("again_every", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_full_disk_at_any_operation_of_a_save_damages_nothing_and_the_next_save_succeeds(
    again_every, saved, model_t5, tmp_path, capsys
):
    start, expected, single_files = saved
    newest, full, number, step = [], True, 0, min(again_every, 3)
    while full:
        run = Run(model_t5, copy(start, tmp_path / "run"))
        disk = FullDisk(number)
        with watched_disk(disk):
            run.save(NEW)
        full = bool(disk.refused)
        errors = capsys.readouterr().err
        newest.append(check(run, expected, single_files))
        assert ("warning: saving step 3 failed: OSError" in errors and "No space left on device" in errors) == full
        assert not list(run.output_dir.glob(".*.stage")) and not list(run.ckpt_dir.glob(".*"))
        if full:
            with pytest.raises(ValueError, match=rf"last save failed: .*newest checkpoint is .*-00000{newest[-1]}$"):
                run.saving.finish()
        if number % again_every == 0:
            run.save(NEXT)
            assert check(run, expected, single_files) == NEXT == step_of(run.saving.finish())
            assert len(checkpoints(run.output_dir)) == 2 and not capsys.readouterr().err
        number += step
    assert newest == sorted(newest) and newest[0] == OLD and newest[-1] == NEW
    assert newest.count(OLD) > 90 / step and newest.count(NEW) > 8 / step


def test_failed_single_file_is_said_beside_the_checkpoint_that_is_complete(saved, model_t5, tmp_path, capsys):
    run = Run(model_t5, copy(saved[0], tmp_path / "run"))
    shutil.rmtree(run.ckpt_dir)
    run.ckpt_dir.touch()  # no directory
    path = run.save(NEW)
    assert f"{path} is complete, but its single file in --ckpt_dir was not written" in capsys.readouterr().err
    assert damages(path) == {}


def test_directory_that_cannot_be_replaced_is_put_back(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.txt").write_text("old")
    real = os.rename

    def rename(source, target):
        if source.suffix == ".stage":
            raise OSError(ENOSPC, os.strerror(ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="No space"), staged_directory(tmp_path / "out", overwrite=True) as stage:
        (stage / "a.txt").write_text("new")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["out", "out/a.txt"]
    assert (tmp_path / "out" / "a.txt").read_text() == "old"


class FileSizeLimit:
    """No file above 300 KB: weights do not fit, logs do."""

    def __init__(self, folder):
        self.output_dir = folder / "run"

    def shut(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))

    def open(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    reason = "File too large"


class SmallDisk:
    """A tmpfs, full but for 300 KB."""

    def __init__(self, folder):
        self.output_dir = folder / "small" / "run"
        self._filler = folder / "small" / "filler"

    def shut(self):
        self.open()
        free = shutil.disk_usage(self._filler.parent).free
        with open(self._filler, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, free - 300_000)

    def open(self):
        self._filler.unlink(missing_ok=True)

    reason = "No space left on device"


def mounted(folder):
    """Whether this machine lets us mount a small tmpfs at `folder`; else the file size limit has to do."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    if not mounted(tmp_path / "small"):
        yield FileSizeLimit(tmp_path)
        return
    yield SmallDisk(tmp_path)
    subprocess.run(["umount", "--lazy", tmp_path / "small"], check=True)


def train_in_fork(disk, full_at, argv, log):
    """Trains in a forked process for which there is no room at the steps `full_at`; returns its exit code."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        sys.stdout = sys.stderr = open(log, "w", buffering=1)
        real_save = Saving.save

        def save(saving, step, *args):
            (disk.shut if step in full_at else disk.open)()
            real_save(saving, step, *args)
            saving._thread.join()  # what is full then does not hit other files

        Saving.save = save
        trainer = load_script("train_from_cached.py")
        cli.run(lambda: trainer.main(argv))
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(end.code or 0)
    finally:
        os._exit(99)


@pytest.mark.parametrize("kind", ["file size limit", "small disk"])
@pytest.mark.parametrize(("full_at", "code", "kept"), [({2, 3}, 0, [1, 4, 5]), ({3, 5}, 2, [1, 2, 4])])
def test_training_goes_on_while_there_is_no_room_and_saves_once_there_is(
    kind, full_at, code, kept, shapes, model_t5, tmp_path, request
):
    disk = FileSizeLimit(tmp_path) if kind == "file size limit" else request.getfixturevalue("small_disk")
    flags = ["--logdir", tmp_path / "tb", "--max_steps", 5, "--batch_size", 2, "--save_steps", 1, "--ema_decay", 0.9]
    argv = trainer_argv(shapes, model_t5, disk.output_dir, *flags)
    assert train_in_fork(disk, full_at, argv, tmp_path / "log") == code
    said = (tmp_path / "log").read_text().replace("\r", "\n").splitlines()
    failures = [line for line in said if "warning: saving step" in line]
    assert len(failures) == len(full_at)
    for step, line in zip(sorted(full_at), failures, strict=True):
        assert f"saving step {step} failed: " in line and disk.reason in line
    found = checkpoints(disk.output_dir)
    assert [step_of(path) for path in found] == kept and all(damages(path) == {} for path in found)
    assert not list(disk.output_dir.glob(".*.stage"))
    assert len(json_lines(disk.output_dir / "metrics.jsonl")) == 5
    if code:
        assert "the last save failed: " in said[-1] and said[-1].endswith(f"newest checkpoint is {found[-1]}")
        assert "Traceback" not in "\n".join(said)
    else:
        assert f"last checkpoint: {found[-1]}" in "\n".join(said)


def test_logs_lose_what_a_full_disk_refuses_and_nothing_else(tmp_path):
    """RLIMIT_FSIZE of nothing, in a process of its own, while step 2 is logged."""
    reading, writing = os.pipe()
    if not (pid := os.fork()):
        try:
            sys.stderr = os.fdopen(writing, "w", buffering=1)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            metrics = Metrics(tmp_path, tmp_path / "tb")
            for step in (1, 2, 2, 3):
                resource.setrlimit(resource.RLIMIT_FSIZE, (1 if step == 2 else resource.RLIM_INFINITY, -1))
                metrics.scalars(step, {"loss": float(step)})
                metrics.text("text", "x", step)
                metrics.flush()
            metrics.close()
            os._exit(0)
        finally:
            os._exit(99)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = [line for line in pipe if line.startswith("warning")]
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert json_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}, {"step": 3, "loss": 3.0}]
    assert {1, 3} == {event.step for event in read_events(tmp_path / "tb").Scalars("loss")}
    assert len(said) == 2 and all("log entries are lost until writing works again" in line for line in said)


def pretend_free(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2 * free, used=free, free=free))


def test_run_without_room_for_a_checkpoint_is_refused_before_anything_is_loaded(
    shapes, model_t5, tmp_path, monkeypatch
):
    monkeypatch.setattr(checks, "_frozen_bytes", lambda _: 3 * GIB)
    monkeypatch.setattr(checks.load, "load_unet", lambda *_: pytest.fail("loaded"))
    pretend_free(monkeypatch, 2.5 * GIB)
    message = refused(shapes, model_t5, tmp_path / "run")
    assert f"{tmp_path / 'run'}: a checkpoint takes 3.0 GiB, but only 2.5 GiB are free" in message
    assert not (tmp_path / "run" / "args.json").exists()  # the next attempt needs no other directory


@pytest.mark.parametrize("flags", [[], ["--ema_decay", 0.9], ["--precision", "bf16_pure"], ["--optimizer", "lion"],
                                   ["--unfreeze_attn2", "--ema_decay", 0.9]])  # fmt: skip
def test_room_that_is_asked_for_is_what_a_checkpoint_takes(flags, shapes, model_t5, tmp_path, monkeypatch, capsys):
    train(shapes, model_t5, tmp_path / "run", "--max_steps", 1, "--batch_size", 2, *flags)
    files = [path for path in (tmp_path / "run" / "checkpoint-000001").rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    assert "planned" not in capsys.readouterr().err
    pretend_free(monkeypatch, 0.9 * size)
    assert "are free" in refused(shapes, model_t5, tmp_path / "refused", *flags)
    pretend_free(monkeypatch, 1.05 * size)
    train(shapes, model_t5, tmp_path / "tight", "--max_steps", 2, "--save_steps", 1, "--batch_size", 2, *flags)
    assert "are planned, but only 0.0 GiB are free: use --keep_last" in capsys.readouterr().err


def test_room_is_asked_for_where_the_single_files_go(shapes, model_t5, tmp_path, monkeypatch):
    real = shutil.disk_usage
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(free=1000) if path == tmp_path / "web" else real(path)
    )
    message = refused(shapes, model_t5, tmp_path / "run", "--ckpt_dir", tmp_path / "web")
    assert f"{tmp_path / 'web'}: a single-file checkpoint takes" in message
