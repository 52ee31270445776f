"""Errors between two saves: the last complete step is saved before the run ends, a step under way never."""

import errno
import os
import shutil
from itertools import count

import pytest
from helpers import CLIP, load_script, refused, run_script, train, trainer_argv
from runs import content
from torch.utils.tensorboard import SummaryWriter

from cachetrain import atomic
from cachetrain.checkpoints.save import checkpoints, step_of
from cachetrain.sampling.samples import SampleImages
from cachetrain.training import checks, nonfinite
from cachetrain.training.ema import Ema
from cachetrain.training.logs.run_logs import Logs

trainer = load_script("train_from_cached.py")
FLAGS = ["--batch_size", 2, "--lr", 1e-3, "--ema_decay", 0.9, "--cond_dropout", 0.2]
SAMPLES = ["--sample_prompt", "a star", "--sample_steps", 1, "--sampler_steps", 1, "--sample_cfgs", 1]


def fail_at(monkeypatch, owner, name, call, after=False):
    """Makes call number `call` of a function raise KeyError, after it has done its work or instead."""
    real, calls = getattr(owner, name), count(1)

    def failing(*args, **kwargs):
        number = next(calls)
        result = real(*args, **kwargs) if number != call or after else None
        if number == call:
            raise KeyError("injected")
        return result

    monkeypatch.setattr(owner, name, failing)


def stopped(data, model, out, *flags):
    """(message, steps saved) of a run that must end with an error."""
    argv = trainer_argv(data, model, out, *FLAGS, "--max_steps", 4, *flags)
    with pytest.raises(ValueError) as error:
        run_script("train_from_cached.py", *argv)
    assert "\n" not in str(error.value)
    return str(error.value), [step_of(path) for path in checkpoints(out)]


# (owner, name, number of the call in step 3, whether it has done its work, the step that is intact)
MOMENTS = {
    "forward": (trainer, "forward_pass", 5, False, 2),
    "in the middle of accumulation": (trainer, "forward_pass", 6, False, 2),
    "clipping": ("cachetrain.training.optim", "clip_gradients", 3, False, 2),
    "update": (nonfinite, "step_if_finite", 3, True, None),
    "average": (Ema, "update", 3, False, None),
    "bookkeeping": (nonfinite.NonfiniteSteps, "end_step", 3, False, 3),
    "log": (Logs, "write", 3, False, 3),
}


@pytest.fixture(scope="module")
def whole(shapes, model_t5, tmp_path_factory):
    """An undisturbed run of 4 steps, each saved."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(shapes, model_t5, out, *FLAGS, "--gradient_accum", 2, "--max_steps", 4, "--save_steps", 1)
    return out


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_error_saves_the_last_complete_step_and_resuming_is_bit_exact(
    moment, whole, shapes, model_t5, tmp_path, monkeypatch, capsys
):
    owner, name, call, after, intact = MOMENTS[moment]
    if isinstance(owner, str):
        import importlib

        owner = importlib.import_module(owner)
    out, flags = tmp_path / "run", ["--gradient_accum", 2]
    with monkeypatch.context() as patch:
        fail_at(patch, owner, name, call, after)
        message, saved = stopped(shapes, model_t5, out, *flags)
    assert "KeyError: 'injected'" in message and __file__ in message
    if intact is None:
        assert saved == [] and "middle of an update" in capsys.readouterr().err
        assert message.endswith("last checkpoint: none yet")
        return
    assert saved == [intact] and message.endswith(f"last checkpoint: {checkpoints(out)[-1]}")
    weights = {name: value for name, value in content(out, intact).items() if name.startswith("unet")}
    assert weights.items() <= content(whole, intact).items()
    train(shapes, model_t5, out, *FLAGS, *flags, "--max_steps", 4, "--resume", "latest")
    ours, theirs = content(out, 4), content(whole, 4)
    for each in (ours, theirs):
        del each["statistics"]  # of the current epoch: what was added since the last log step is not saved
    assert ours == theirs


def test_an_error_in_the_first_step_leaves_no_checkpoint(shapes, model_t5, tmp_path, monkeypatch):
    fail_at(monkeypatch, trainer, "forward_pass", 1)
    message, saved = stopped(shapes, model_t5, tmp_path / "run")
    assert saved == [] and message.endswith("last checkpoint: none yet")


def test_memory_advice_needs_no_message():
    args = trainer.parse_args(["--model", "x", "--train_data_dir", "x", "--output_dir", "x"])
    assert "out of memory (MemoryError); try --batch_size" in checks.memory_advice(args, MemoryError())


@pytest.mark.parametrize(
    "error", [TypeError("TextInputSequence must be str"), IndexError("index 1000"), MemoryError()]
)
def test_pictures_that_fail_are_left_out_and_the_run_goes_on(error, shapes, model_t5, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(SampleImages, "drawings", fail)
    train(shapes, model_t5, tmp_path / "run", *FLAGS, *SAMPLES, "--max_steps", 2)
    assert f"no samples at step 2: {type(error).__name__}" in capsys.readouterr().err


def test_strangers_in_the_samples_folder_and_a_trigger_that_is_a_folder_end_no_run(shapes, model_t5, tmp_path):
    out = tmp_path / "run"
    for name in ("samples/step-000001 (copy)", "samples/step-1e5", "trigger.checkpoint/x"):
        (out / name).mkdir(parents=True)
    (out / "samples" / "step-000000").touch()
    train(shapes, model_t5, out, *FLAGS, *SAMPLES, "--max_steps", 2)


def test_a_writer_that_raises_anything_and_a_renamed_output_dir_end_no_run(
    shapes, model_t5, tmp_path, monkeypatch, capsys
):
    def broken(*_, **__):
        raise AttributeError("wandb")

    out, write = tmp_path / "run", Logs.write

    def renamed(logs, step, *args):
        if step == 2:
            monkeypatch.setattr(SummaryWriter, "flush", broken)
            monkeypatch.setattr(logs.metrics.writer.file_writer, "add_summary", broken)
            out.rename(tmp_path / "renamed")
        return write(logs, step, *args)

    monkeypatch.setattr(Logs, "write", renamed)
    train_argv = trainer_argv(shapes, model_t5, out, *FLAGS, "--max_steps", 3)
    assert run_script("train_from_cached.py", *train_argv) == 0
    assert "AttributeError: wandb: log entries are lost" in capsys.readouterr().err
    assert [step_of(path) for path in checkpoints(out)] == [3]


@pytest.mark.parametrize("refusal", [errno.EPERM, errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_without_permissions_or_sync_of_directories_can_be_saved_to(refusal, tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse(*_, **__):
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(os, "chmod", refuse)
    monkeypatch.setattr(os, "fsync", lambda file: refuse() if os.path.isdir(f"/proc/self/fd/{file}") else fsync(file))
    with atomic.staged_directory(tmp_path / "out") as stage:
        (stage / "a").write_text("a")
    assert (tmp_path / "out" / "a").read_text() == "a"
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"), atomic.staged_directory(tmp_path / "other"):
        pass
    assert not (tmp_path / "other").exists()


def test_keep_last_counts_and_removes_only_checkpoints_of_the_run_and_follows_no_link(shapes, model_t5, tmp_path):
    out, moved = tmp_path / "run", tmp_path / "moved"
    (out / "checkpoint-500").mkdir(parents=True)
    (out / "checkpoint-1000").mkdir()
    flags = [*FLAGS, "--save_steps", 1, "--keep_last", 2]
    train(shapes, model_t5, out, *flags, "--max_steps", 2)
    assert [path.name for path in checkpoints(out)] == ["checkpoint-000001", "checkpoint-000002"]
    shutil.move(out / "checkpoint-000001", moved)
    (out / "checkpoint-000001").symlink_to(moved)
    train(shapes, model_t5, out, *flags, "--max_steps", 4, "--resume", "latest")
    assert [path.name for path in checkpoints(out)] == ["checkpoint-000003", "checkpoint-000004"]
    assert (moved / "manifest.json").exists() and not (out / "checkpoint-000001").is_symlink()
    assert (out / "checkpoint-500").is_dir() and (out / "checkpoint-1000").is_dir()


def test_a_model_index_that_is_broken_is_refused_at_the_start(shapes, model_t5, tmp_path):
    model = shutil.copytree(model_t5, tmp_path / "model")
    (model / "model_index.json").write_text("[1]")
    assert "model_index.json" in refused(shapes, model, tmp_path / "run")


def test_a_start_that_fails_does_not_occupy_the_directory(shapes, model_t5, tmp_path):
    out, file = tmp_path / "run", tmp_path / "file"
    file.touch()
    with pytest.raises(OSError):
        train(shapes, model_t5, out, *FLAGS, "--max_steps", 1, "--logdir", file)
    assert "--copy_config" in refused(shapes, model_t5, out, "--copy_config", tmp_path / "nope.sh")
    train(shapes, model_t5, out, *FLAGS, "--max_steps", 1)


def test_two_runs_of_one_name_share_neither_curves_nor_single_files(shapes, model_t5, tmp_path):
    first, second = tmp_path / "a" / "run", tmp_path / "b" / "run"
    flags = [*FLAGS, "--max_steps", 1, "--logdir", tmp_path / "tb"]
    train(shapes, model_t5, first, *flags)
    assert str(first) in refused(shapes, model_t5, second, "--logdir", tmp_path / "tb")
    shutil.rmtree(first)  # the name is free again
    train(shapes, model_t5, second, *flags)


def test_names_of_a_manifest_stay_in_its_checkpoint(shapes, model_t5, tmp_path):
    from cachetrain.checkpoints import manifest

    out = tmp_path / "a" / "run"
    train(shapes, model_t5, out, *FLAGS, "--max_steps", 1)
    checkpoint = out / "checkpoint-000001"
    files = manifest.read_manifest(checkpoint)
    for name in ("vae/../../../../numpy.py", "/etc/passwd", "..", "a/../b", "vae//x", "a\\b", "."):
        (checkpoint / manifest.NAME).write_bytes(manifest._encoded(files | {name: files["unet/config.json"]}))
        with pytest.raises(ValueError, match="is not an entry of a checkpoint"):
            manifest.read_manifest(checkpoint)
    (tmp_path / "secret").write_bytes((checkpoint / "unet" / "config.json").read_bytes())
    (checkpoint / "vae" / "link").symlink_to(tmp_path / "secret")
    (checkpoint / manifest.NAME).write_bytes(manifest._encoded(files | {"vae/link": files["unet/config.json"]}))
    assert manifest.damages(checkpoint) == {"vae/link": "is a link out of the checkpoint"}
    gone = {name: entry for name, entry in files.items() if not name.startswith("unet/")}
    (checkpoint / manifest.NAME).write_bytes(manifest._encoded(gone))
    message = refused(shapes, model_t5, tmp_path / "b", *FLAGS, "--resume", checkpoint)
    assert "its manifest lacks unet/config.json" in message


def test_two_runs_of_one_name_do_not_share_a_ckpt_dir(shapes, model_sd, tmp_path):
    first, second, web = tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "web"
    flags = [*FLAGS, "--max_steps", 1, "--ckpt_dir", web]
    train(shapes, model_sd, first, *flags, suffixes=CLIP)
    assert str(first) in refused(shapes, model_sd, second, "--ckpt_dir", web, suffixes=CLIP)
