"""sample.py --watch: the pictures that training would have drawn, of every checkpoint, while a run goes on."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from helpers import REPO, WEIGHTS, WIDE, load_script, run_script, train, wait_until
from PIL import Image, ImageChops
from train_ranks import Ranks, open_trainer

from cachetrain.atomic import LOCK, is_locked
from cachetrain.sampling import watch

torch.set_num_threads(1)
HOLD = """
import sys
from cachetrain.atomic import locked_directory
with locked_directory(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def trained(shapes, model_t5, tmp_path_factory):
    """A run of 4 steps on wide images, with samples and checkpoints at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("watch")
    data, prompts = shutil.copytree(shapes, folder / "data"), folder / "prompts.json"
    cache = ["--data_root", data, "--model", model_t5, *WIDE, "--overwrite"]
    assert run_script("cache/create_img_sdxl.py", *cache) == 0
    prompts.write_text(json.dumps({"samples": [
        {"prompt": "a star", "negative_prompt": "red"}, {"prompt": "a ring", "seed": -1},
        {"random_caption": True}, {"prompt": "a wide star", "aspect_ratio": 2},
    ]}))  # fmt: skip
    flags = ["--max_steps", 4, "--save_steps", 2, "--batch_size", 2, "--lr", 1e-2, "--ema_decay", 0.5]
    flags += ["--val_split", 0.3, "--val_steps", 9, "--text_scaling_factor", 0.5, "--sample_prompts", prompts]
    flags += ["--sample_steps", 2, "--sampler_steps", 2, "--sample_cfgs", 1, 3, "--log_groups"]
    train(data, model_t5, folder / "run", *flags)
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run without its samples."""
    return shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("samples", "training_state"))


def change_settings(run, **changes):
    path = run / "args.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"sample_prompts": 5}'])
def test_a_directory_of_another_program_is_named(text, tmp_path):
    (tmp_path / "args.json").write_text(text)
    with pytest.raises(ValueError, match=r"args\.json"):
        watched(tmp_path)


def watched(run, *flags):
    return run_script("sample.py", "--watch", run, "--device", "cpu", *flags)


def pictures(folder):
    return {path.relative_to(folder).as_posix(): Image.open(path) for path in folder.rglob("*.png")}


def steps_drawn(run):
    return sorted(path.name for path in (run / "samples").iterdir())


def test_watched_pictures_equal_those_of_training_in_every_pixel_and_word(trained, run):
    assert watched(run) == 0
    expected, drawn = pictures(trained / "samples"), pictures(run / "samples")
    assert drawn.keys() == expected.keys() and len(drawn) == 2 * 4 * 2
    for name, image in drawn.items():
        assert image.size == expected[name].size and image.text == expected[name].text
        assert ImageChops.difference(image, expected[name]).getbbox() is None, name
    assert drawn["step-000002/00-a-star_cfg1.png"].size == (96, 64)


def test_flags_win_over_the_run_and_captions_alone_need_its_data(run, capsys):
    change_settings(run, train_data_dir=["/nowhere"])
    (run / "checkpoint-000002").rename(run.parent / "moved")
    flags = ["--cfgs", 2, "--seed", 7, "--sampler", "euler", "--sampler_steps", 1, "--negative_prompt", "red"]
    flags += ["--width", 64, "--height", 128]
    assert watched(run, "--prompt", "a ring", "a star", *flags) == 0
    star = pictures(run / "samples")["step-000004/01-a-star_cfg2.png"]
    assert star.size == (64, 128)
    assert star.text == {"prompt": "a star", "negative_prompt": "red", "seed": "8", "cfg": "2", "step": "4",
                         "num_inference_steps": "1", "scheduler": "euler"}  # fmt: skip
    shutil.move(run / "samples", run.parent / "averaged")
    assert watched(run, "--prompt", "a ring", "a star", *flags, "--raw_weights") == 0
    averaged = pictures(run.parent / "averaged")["step-000004/01-a-star_cfg2.png"]
    raw = pictures(run / "samples")["step-000004/01-a-star_cfg2.png"]
    assert ImageChops.difference(raw, averaged).getbbox() is not None
    shutil.rmtree(run / "samples")
    assert watched(run) == 1  # a random caption
    assert "no samples at step 4: /nowhere: no such directory" in capsys.readouterr().err


def test_a_file_without_prompts_draws_captions_of_the_data(run, tmp_path):
    (tmp_path / "empty.txt").touch()
    shutil.rmtree(run / "checkpoint-000004")
    assert watched(run, "--prompts", tmp_path / "empty.txt", "--cfgs", 1, "--sampler_steps", 1) == 0
    drawn = pictures(run / "samples" / "step-000002")
    assert sorted(drawn) == [f"{slot:02d}-random-caption_cfg1.png" for slot in range(4)]
    assert all(image.text["prompt"] for image in drawn.values())


def test_a_step_that_has_samples_is_left_alone(run, capsys):
    kept = run / "samples" / "step-000002" / "mine.png"
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert watched(run) == 0
    assert "1 checkpoint drawn" in capsys.readouterr().out
    assert steps_drawn(run) == ["step-000002", "step-000004"] and list(kept.parent.iterdir()) == [kept]


@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_a_broken_checkpoint_is_a_warning_and_the_others_are_drawn(damage, run, capsys):
    weights = run / "checkpoint-000002" / "unet_ema" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-9]) if damage == "cut" else weights.unlink()
    assert watched(run) == 1
    said = capsys.readouterr()
    assert f"no samples of {weights.parent.parent}: " in said.err and "1 checkpoint drawn, 1 failed" in said.out
    assert steps_drawn(run) == ["step-000004"]


def test_a_checkpoint_that_vanishes_is_a_warning_and_the_others_are_drawn(run, monkeypatch, capsys):
    original = watch.load.load_unet

    def load_unet(directory, dtype):
        if directory.parent.name == "checkpoint-000002":  # --keep_last
            shutil.rmtree(directory.parent)
        return original(directory, dtype)

    monkeypatch.setattr(watch.load, "load_unet", load_unet)
    assert watched(run) == 0
    assert "checkpoint-000002: the checkpoint was removed before it was drawn" in capsys.readouterr().err
    assert steps_drawn(run) == ["step-000004"]


def test_new_prompts_are_drawn_though_the_first_checkpoint_is_gone(run, tmp_path, monkeypatch):
    prompts, draw = tmp_path / "p.txt", watch._CheckpointDrawer.draw
    prompts.write_text("a star")

    def draw_and_remove(artist, checkpoint):
        draw(artist, checkpoint)
        shutil.rmtree(checkpoint)
        prompts.write_text("a ring")

    monkeypatch.setattr(watch._CheckpointDrawer, "draw", draw_and_remove)
    assert watched(run, "--prompts", prompts, "--cfgs", 1) == 0
    assert set(pictures(run / "samples")) == {"step-000002/00-a-star_cfg1.png", "step-000004/00-a-ring_cfg1.png"}


def test_it_waits_for_a_run_and_draws_until_that_has_let_go_of_its_lock(trained, tmp_path, monkeypatch):
    run, holder, sleeps = tmp_path / "run", None, []

    def bring(name):
        (shutil.copytree if name.startswith("checkpoint") else shutil.copy)(trained / name, run / name)

    def sleep(_):
        nonlocal holder
        sleeps.append(steps_drawn(run) if (run / "samples").exists() else [])
        if len(sleeps) == 1:
            command = [sys.executable, "-c", HOLD, run]
            holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            holder.stdout.readline()
            bring("args.json")
        elif len(sleeps) == 2:
            bring("checkpoint-000002")
        else:
            bring("checkpoint-000004")
            holder.communicate()

    monkeypatch.setattr(watch, "time", SimpleNamespace(sleep=sleep, perf_counter=lambda: 0.0))
    assert watched(run) == 0
    assert sleeps == [[], [], ["step-000002"]] and steps_drawn(run) == ["step-000002", "step-000004"]


def test_a_checkpoint_that_appears_as_the_run_ends_is_drawn(run, monkeypatch):
    (run / "checkpoint-000004").rename(run / "checkpoint-to-come")

    def end(_):
        if (run / "checkpoint-to-come").exists() and (run / "samples").exists():
            (run / "checkpoint-to-come").rename(run / "checkpoint-000004")
        return False

    monkeypatch.setattr(watch, "is_locked", end)
    assert watched(run) == 0
    assert steps_drawn(run) == ["step-000002", "step-000004"]


def test_a_look_at_the_lock_never_keeps_a_run_from_taking_it(tmp_path, monkeypatch):
    """A run takes the lock at the worst moment: between the look at it and the end of `is_locked`."""
    lockf, taken = os.lockf, []

    def look(*args):
        found = lockf(*args)
        take = "import sys\nfrom cachetrain.atomic import locked_directory\nwith locked_directory(sys.argv[1]): pass"
        taken.append(subprocess.run([sys.executable, "-c", take, tmp_path], cwd=REPO).returncode)
        return found

    (tmp_path / LOCK).touch()
    monkeypatch.setattr(os, "lockf", look)
    monkeypatch.setattr(fcntl, "lockf", look)
    assert not is_locked(tmp_path) and taken == [0]


def test_what_cannot_be_watched_is_refused(run, tmp_path, capsys):
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json, line 1"):  # before it waits for a run
        watched(tmp_path / "none yet", "--prompts", tmp_path / "broken.json")
    change_settings(run, sample_prompts=None)
    with pytest.raises(ValueError, match="no sample prompts; pass --prompt"):
        watched(run)
    for flags in (["--watch", "x", "--model", "y"], ["--watch", "x", "--out", "y"], ["--watch", "x", "--grid", "y"],
                  ["--model", "x", "--prompt", "y"], ["--model", "x", "--out", "y"], ["--prompt", "x"]):  # fmt: skip
        with pytest.raises(SystemExit):
            run_script("sample.py", *flags)
        assert flags[-2] in capsys.readouterr().err or "--watch" not in flags


def _hang_in_a_picture(env, argv, folder, rank, moment, cwd):
    """sample.py as a process that never gets further than its first picture, of which it makes the file "writing"."""
    from cachetrain.sampling import samples

    open_trainer(env, [], folder / f"rank{rank}.log")

    def save_png(image, path, **_):
        image.save(path)
        (folder / "writing").touch()
        threading.Event().wait()

    samples.save_png = save_png
    script = load_script("sample.py")
    sys.argv = ["sample.py", *argv]
    script.cli.run(script.main)


def test_ctrl_c_ends_it_with_code_130_and_no_half_directory(run, tmp_path):
    folder = tmp_path / "process"
    started = Ranks(["--watch", run, "--device", "cpu"], 1, folder, target=_hang_in_a_picture)
    wait_until((folder / "writing").exists, started.processes[0].is_alive)
    assert list((run / "samples").rglob("*.png"))
    os.kill(started.processes[0].pid, signal.SIGINT)
    (ended,) = started.finish()
    assert ended.code == 130 and "interrupted" in ended.output
    assert list((run / "samples").iterdir()) == []


def test_sample_script_draws_at_the_trained_size(run, tmp_path):
    checkpoint = run / "checkpoint-000004"
    argv = ["--model", checkpoint, "--prompt", "a star", "--out", tmp_path / "out", "--sampler_steps", 1]
    picture = tmp_path / "out" / "00-a-star_cfg4.png"
    assert run_script("sample.py", *argv) == 0 and Image.open(picture).size == (96, 64)
    assert run_script("sample.py", *argv, "--width", 128) == 0 and Image.open(picture).size == (128, 64)
    info = json.loads((checkpoint / "cachetrain.json").read_text())
    del info["latent_size"]  # an older checkpoint
    (checkpoint / "cachetrain.json").write_text(json.dumps(info))
    assert run_script("sample.py", *argv) == 0 and Image.open(picture).size == (64, 64)
