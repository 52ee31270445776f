"""Saves behind training: what is in them, what they keep, and who may write where."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from helpers import HANG_S, REPO, WEIGHTS, digest, load_script, refused, train, trainer_argv, weights_of
from safetensors.torch import load_file

from cachetrain import atomic
from cachetrain.checkpoints import manifest, save
from cachetrain.checkpoints.manifest import damages
from cachetrain.checkpoints.save import Saving, checkpoints, step_of

trainer = load_script("train_from_cached.py")


class Gate:
    """Holds back the writing of checkpoints until `open` is set."""

    def __init__(self, monkeypatch):
        self.open, self.reached, self.writing, self.most = threading.Event(), threading.Event(), 0, 0
        real = Saving._write

        def write(*args):
            self.writing += 1
            self.most = max(self.most, self.writing)
            self.reached.set()
            assert self.open.wait(HANG_S)
            real(*args)
            self.writing -= 1

        monkeypatch.setattr(Saving, "_write", write)


def test_training_goes_on_while_a_checkpoint_of_its_own_step_is_written(shapes, model_t5, tmp_path, monkeypatch):
    gate, asked, passes = Gate(monkeypatch), {}, []
    real_save, real_forward = Saving.save, trainer.forward_pass

    def save(self, step, unet, *args):
        asked[step] = digest(unet.state_dict())
        real_save(self, step, unet, *args)

    def forward(*args, **kwargs):
        passes.append(1)
        if len(passes) == 4:  # two steps after the save of the second
            assert gate.reached.wait(HANG_S) and not checkpoints(tmp_path / "run")
            gate.open.set()
        return real_forward(*args, **kwargs)

    monkeypatch.setattr(Saving, "save", save)
    monkeypatch.setattr(trainer, "forward_pass", forward)
    flags = ["--max_steps", 5, "--save_steps", 2, "--batch_size", 2, "--lr", 1e-2, "--ema_decay", 0.5]
    train(shapes, model_t5, tmp_path / "run", *flags)
    assert list(asked) == [2, 4, 5] and len(set(asked.values())) == 3
    for step, expected in asked.items():
        path = tmp_path / "run" / f"checkpoint-{step:06d}"
        assert digest(weights_of(path / "unet")) == expected and damages(path) == {}
        state = load_file(path / "training_state" / "tensors.safetensors")
        steps = {int(tensor) for name, tensor in state.items() if name.endswith(".step")}
        assert steps == {step}  # the optimizer's, too


def test_one_save_at_most_is_in_flight(shapes, model_t5, tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    real = Saving.wait

    def wait(self):
        if self._thread is not None:
            gate.open.set()
        real(self)

    monkeypatch.setattr(Saving, "wait", wait)
    train(shapes, model_t5, tmp_path / "run", "--max_steps", 4, "--save_steps", 1, "--batch_size", 2)
    assert [step_of(path) for path in checkpoints(tmp_path / "run")] == [1, 2, 3, 4] and gate.most == 1


def test_whatever_goes_wrong_in_a_save_is_said_at_the_next_step(shapes, model_t5, tmp_path, monkeypatch, capsys):
    real_write, real_forward, said = Saving._write, trainer.forward_pass, []

    def write(self, step, *args):
        if step == 2:
            raise MemoryError("no room for a copy")
        real_write(self, step, *args)

    def forward(*args, **kwargs):
        said.append(capsys.readouterr().err)  # until before this step
        for thread in threading.enumerate():
            if thread.name == "checkpoint":
                thread.join()
        return real_forward(*args, **kwargs)

    monkeypatch.setattr(Saving, "_write", write)
    monkeypatch.setattr(trainer, "forward_pass", forward)
    train(shapes, model_t5, tmp_path / "run", "--max_steps", 6, "--save_steps", 2, "--batch_size", 2)
    # Saved behind the second step, failed during the third at the latest, said before the fourth.
    assert "saving step 2 failed: MemoryError: no room for a copy" in said[2] + said[3]
    assert "failed" not in "".join(said[:2] + said[4:])
    assert [step_of(path) for path in checkpoints(tmp_path / "run")] == [4, 6]


@pytest.fixture(scope="module")
def kept(shapes, model_t5, tmp_path_factory):
    """output_dir of a run of five saves that keeps the last two."""
    out = tmp_path_factory.mktemp("kept") / "run"
    flags = ["--max_steps", 5, "--save_steps", 1, "--keep_last", 2, "--batch_size", 2, "--ema_decay", 0.5]
    train(shapes, model_t5, out, *flags)
    return out


def test_frozen_parts_are_one_file_however_many_checkpoints_have_been_removed(kept, model_t5):
    first, second = checkpoints(kept)
    names = [name for name in save.read_manifest(second) if save.is_frozen(name)]
    assert {name.split("/")[0] for name in names} == {"vae", "text_encoder", "tokenizer", "projection", "pipeline.py"}
    for name in names:
        assert (second / name).samefile(first / name) and (second / name).stat().st_nlink == 2
        assert (second / name).read_bytes() == (model_t5 / name).read_bytes()
    assert (
        not (second / "unet" / WEIGHTS).samefile(first / "unet" / WEIGHTS) and damages(first) == damages(second) == {}
    )


def test_only_files_that_are_read_are_copied_into_checkpoints(shapes, model_t5, tmp_path):
    model, secret = tmp_path / "model", tmp_path / "secret.txt"
    shutil.copytree(model_t5, model)
    secret.write_text("of another program")
    for name in ("vae", "text_encoder", "tokenizer", "projection"):
        (model / name / "pytorch_model.bin").write_bytes(b"a pickle")
        (model / name / "code.py").write_text("import os")
        (model / name / "notes.txt").symlink_to(secret)
        (model / name / "sub").mkdir()
        (model / name / "sub" / "more.safetensors").write_bytes(b"")
    for name in ("pipeline.py", "projection/t5_projection.py"):
        (model / name).write_text("raise SystemExit('changed')")
    (model / "safety_checker").mkdir()
    index = json.loads((model / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (model / "model_index.json").write_text(json.dumps(index))
    for source, out in ((model, "other"), (model_t5, "plain")):
        train(shapes, source, tmp_path / out, "--max_steps", 1, "--batch_size", 2, "--lr", 1e-30)
    other, plain = (checkpoints(tmp_path / out)[0] for out in ("other", "plain"))
    files = {name for name in save.read_manifest(plain) if save.is_frozen(name)}
    assert {name for name in save.read_manifest(other) if save.is_frozen(name)} == files
    assert all((other / name).read_bytes() == (plain / name).read_bytes() for name in files)
    assert json.loads((other / "model_index.json").read_text())["safety_checker"] == [None, None]


def test_frozen_parts_are_copied_where_there_are_no_hard_links(shapes, model_t5, tmp_path, monkeypatch):
    def link(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", link)
    train(shapes, model_t5, tmp_path / "run", "--max_steps", 2, "--save_steps", 1, "--batch_size", 2)
    first, second = checkpoints(tmp_path / "run")
    name = "vae/diffusion_pytorch_model.safetensors"
    assert damages(first) == damages(second) == {} and not (second / name).samefile(first / name)
    assert (second / name).read_bytes() == (model_t5 / name).read_bytes()


def test_frozen_parts_that_somebody_removes_are_taken_from_the_model(shapes, model_t5, tmp_path, monkeypatch):
    real = Saving._write

    def write(self, step, *args):
        if step == 2:
            shutil.rmtree(tmp_path / "run" / "checkpoint-000001" / "vae")
        if step == 3:
            shutil.rmtree(tmp_path / "run" / "checkpoint-000002")
        real(self, step, *args)

    monkeypatch.setattr(Saving, "_write", write)
    train(shapes, model_t5, tmp_path / "run", "--max_steps", 3, "--save_steps", 1, "--batch_size", 2)
    last = checkpoints(tmp_path / "run")[-1]
    assert step_of(last) == 3 and damages(last) == {}
    for path in (model_t5 / "vae").iterdir():
        assert (last / "vae" / path.name).read_bytes() == path.read_bytes()


def test_checkpoint_holds_no_pickle(kept):
    files = [path for path in checkpoints(kept)[-1].rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".py", ".model", ".txt", ".yaml"}
    for path in files:
        start = path.read_bytes()[:2]
        assert start != b"PK" and not (start[:1] == b"\x80" and start[1] < 6)  # torch.save's zip, and bare pickle
        if path.suffix == ".json":
            json.loads(path.read_text())


def test_output_dir_that_holds_a_run_is_refused_and_stays_as_it_is(kept, shapes, model_t5):
    before = contents(kept)
    message = refused(shapes, model_t5, kept)
    assert str(kept) in message and "already holds a run" in message and "--resume latest" in message
    assert contents(kept) == before


def contents(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_leftovers_of_killed_saves_are_removed_at_the_next_start(kept, shapes, model_t5, tmp_path):
    out, web = shutil.copytree(kept, tmp_path / "run"), tmp_path / "web"
    for name in (".checkpoint-000006.stage", ".checkpoint-000003.removed"):
        shutil.copytree(checkpoints(kept)[-1], out / name)
    others = [web / f".{name}-000005.safetensors.stage" for name in ("run-2", "other", "run-000001")]
    for path in [web / ".run-000005.safetensors.stage", *others]:
        path.mkdir(parents=True)
        (path / ".tmpAbCdEf").write_bytes(bytes(1000))
    flags = ["--save_steps", 1, "--batch_size", 2, "--ema_decay", 0.5, "--resume", "latest", "--resume_anyway"]
    train(shapes, model_t5, out, "--max_steps", 6, *flags, "--ckpt_dir", web)
    assert {path.name for path in out.glob(".*")} == {atomic.LOCK}
    assert sorted(web.glob(".*.stage")) == sorted(others)  # other runs may be writing these
    assert [path.name for path in web.glob("[!.]*.safetensors")] == ["run-000006.safetensors"]


_HOLD = """
import os, sys
from cachetrain.atomic import locked_directory
with locked_directory(sys.argv[1]):
    if os.fork() == 0:  # as a loader's worker, which lives on for a while when its parent is killed
        sys.stdin.read()
        os._exit(0)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_second_process_on_an_output_dir_is_refused_until_the_first_is_dead(shapes, model_t5, tmp_path):
    out = tmp_path / "run"
    first = subprocess.Popen([sys.executable, "-c", _HOLD, out], cwd=REPO, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip
    try:
        assert first.stdout.readline() == "held\n"
        (out / ".checkpoint-000001.stage").mkdir()  # what it is writing
        message = refused(shapes, model_t5, out)
        assert str(out) in message and "another process" in message
        assert {path.name for path in out.iterdir()} == {atomic.LOCK, ".checkpoint-000001.stage"}
        first.kill()
        assert first.wait() == -signal.SIGKILL
        train(shapes, model_t5, out, "--max_steps", 1, "--batch_size", 2)
        assert {path.name for path in out.glob(".*")} == {atomic.LOCK}
        os.killpg(first.pid, 0)  # its child lived all the while
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()


# Directories and files that are not the run's own


BRIEF = ["--save_steps", 1, "--keep_last", 2, "--batch_size", 2]


def test_directories_of_other_trainers_are_neither_counted_nor_touched(shapes, model_t5, tmp_path):
    run = tmp_path / "run"
    for name in ("checkpoint-1", "checkpoint-500", "checkpoint-1000"):
        (run / name).mkdir(parents=True)
        (run / name / "optimizer.bin").write_bytes(b"of accelerate")
        (run / name / "manifest.json").write_text("{}")
    hidden = [run / ".photos.removed", run / ".notes.stage", run / "samples" / ".mine.stage"]
    for path in hidden:
        path.mkdir(parents=True)
    train(shapes, model_t5, run, "--max_steps", 3, *BRIEF)
    train(shapes, model_t5, run, "--max_steps", 4, *BRIEF, "--resume", "latest")
    own = ["checkpoint-000003", "checkpoint-000004"]
    assert sorted(path.name for path in run.glob("checkpoint-*")) == [
        *own,
        "checkpoint-1",
        "checkpoint-1000",
        "checkpoint-500",
    ]
    assert all((run / f"checkpoint-{number}" / "optimizer.bin").exists() for number in (1, 500, 1000))
    assert all(path.is_dir() for path in hidden)


def test_a_directory_renamed_while_training_is_made_again_and_can_be_resumed(
    shapes, model_t5, tmp_path, monkeypatch, capsys
):
    run, real_write = tmp_path / "run", Saving._write

    def write(self, step, *arguments):
        if step == 2:
            run.rename(tmp_path / "renamed")
        real_write(self, step, *arguments)

    monkeypatch.setattr(Saving, "_write", write)
    load_script("train_from_cached.py").main(trainer_argv(shapes, model_t5, run, "--max_steps", 2, *BRIEF))
    assert f"{run}: renamed or removed since the run started" in capsys.readouterr().err
    train(shapes, model_t5, run, "--max_steps", 3, *BRIEF, "--resume", "latest")
    assert [step_of(path) for path in checkpoints(run)] == [2, 3]


def test_a_checkpoint_that_was_moved_and_linked_is_resumed_and_only_the_link_is_removed(shapes, model_t5, tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    train(shapes, model_t5, run, "--max_steps", 1, *BRIEF)
    (run / "checkpoint-000001").rename(elsewhere)
    (run / "checkpoint-000001").symlink_to(elsewhere)
    train(shapes, model_t5, run, "--max_steps", 3, *BRIEF, "--resume", "latest")
    assert [step_of(path) for path in checkpoints(run)] == [2, 3]
    assert damages(elsewhere) == {} and not (run / "checkpoint-000001").is_symlink()


@pytest.mark.parametrize("name", ["vae/../../numpy.py", "../numpy.py", "/tmp/numpy.py", "vae//numpy.py", "", "vae/."])
def test_a_manifest_that_names_files_outside_its_checkpoint_is_refused(name, kept, tmp_path, shapes, model_t5):
    shutil.copytree(kept / "checkpoint-000005", tmp_path / "foreign" / "checkpoint-000005")
    path = tmp_path / "foreign" / "checkpoint-000005"
    files = manifest.read_manifest(path) | {name: {"size": 0, "sha256": hashlib.sha256().hexdigest()}}
    (path / manifest.NAME).write_bytes(manifest._encoded(files))
    said = refused(shapes, model_t5, tmp_path / "run", "--resume", path)
    assert f"{name!r}: " in said and "is not an entry of a checkpoint; do not use it" in said


@pytest.mark.parametrize("name", ["step-000001 (copy)", "step-000001.zip", "step-", "step-1.5"])
def test_other_names_in_the_samples_folder_are_left_alone(name, shapes, model_t5, tmp_path):
    (tmp_path / "run" / "samples" / name).mkdir(parents=True)
    flags = ["--sample_prompt", "star", "--sample_every", 1, "--num_inference_steps", 1, "--sample_cfgs", 1]
    train(shapes, model_t5, tmp_path / "run", "--max_steps", 2, "--batch_size", 2, *flags)
    assert (tmp_path / "run" / "samples" / name).exists()


@pytest.mark.parametrize("flags", [["--logdir", "a_file"], ["--copy_config", "absent.sh"]])
def test_a_run_that_could_not_start_leaves_its_directory_free(flags, shapes, model_t5, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").touch()
    steps = ["--max_steps", 1, "--batch_size", 2]
    with pytest.raises((OSError, ValueError)):
        train(shapes, model_t5, tmp_path / "run", *steps, *flags)
    train(shapes, model_t5, tmp_path / "run", *steps)
