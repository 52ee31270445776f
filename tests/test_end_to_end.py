"""The whole way in a minute, through a front end as a user starts it; and that its bound can be missed."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers import REPO, TINY, run_script

STEPS = 450
# A minute of training places and colors shapes; which shape it is takes the quickstart's five.
ATTRIBUTES = ("background", "color", "place", "size")
BOUND = 50


def script(name, *argv, **environment):
    """Runs a script as a user would, with this Python first in PATH; returns its output."""
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    done = subprocess.run(
        [REPO / name, *map(str, argv)],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": path, "VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"} | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A composed model, 1,000 cached pictures, and prompts."""
    work = tmp_path_factory.mktemp("end_to_end")
    parts = ["--unet", TINY / "unet", "--vae", TINY / "vae", "--t5", TINY / "t5", "--objective", "flow"]
    assert run_script("models/compose_t5_sd.py", *parts, "--out", work / "model") == 0
    prompts = ["--prompts", work / "prompts.txt", "--num_prompts", 60]
    assert run_script("dataset_scripts/draw_shapes.py", "--out", work / "data", "--num_images", 1000, *prompts) == 0
    cache = ["--data_root", work / "data", "--model", work / "model", "--batch_size", 64]
    assert run_script("cache/create_img_sdxl.py", *cache, "--resolution", 64, "--num_workers", 0) == 0
    assert run_script("cache/create_t5cache_768.py", *cache) == 0
    return work


def train(model, data, out, front_end="train_t5.sh"):
    """Trains through a front end; returns the last checkpoint."""
    settings = {"MODEL": model, "DATADIR": data, "OUTPUT": out, "LOGDIR": out.parent / "tb", "BATCH": 16, "ACCUM": 1}
    settings |= {"STEPS": STEPS, "OPTIMIZER": "adamw", "LR": "3e-3", "SCHED": "cosine", "GAMMA": 0, "DROPOUT": 0.1}
    settings |= {"EMA": 0.99, "PRECISION": "fp32"}
    flags = ["--betas", 0.9, 0.99, "--warmup_steps", 50, "--lr_decay_steps", STEPS]
    script(front_end, *flags, **{key: str(value) for key, value in settings.items()})
    assert (out / front_end).read_text() == (REPO / front_end).read_text()
    return out / f"checkpoint-{STEPS:06d}"


def score(world, model, out):
    """Draws the prompts, returns the mean score of ATTRIBUTES in percent."""
    draw = ["--model", model, "--prompts", world / "prompts.txt", "--out", out / "drawn"]
    assert run_script("sample.py", *draw, "--cfgs", 3, "--sampler_steps", 20, "--batch_size", 60) == 0
    assert run_script("dataset_scripts/score_shapes.py", out / "drawn", "--json", out / "score.json") == 0
    pairs = json.loads((out / "score.json").read_text())
    return sum(pairs[half][name] for half in ("trained", "held_out") for name in ATTRIBUTES) / 2 / len(ATTRIBUTES)


def test_a_minute_of_training_follows_prompts(world, tmp_path):
    assert score(world, train(world / "model", world / "data", tmp_path / "run"), tmp_path) >= BOUND


@pytest.mark.slow
def test_a_minute_of_training_sdxl_follows_prompts_too(world, tmp_path):
    model, data = tmp_path / "model", world / "data"
    parts = [
        "--unet",
        TINY / "sdxl_unet",
        "--vae",
        TINY / "vae",
        "--clip_l",
        TINY / "clip",
        "--clip_g",
        TINY / "clip_g",
    ]
    assert run_script("models/compose_sdxl.py", *parts, "--objective", "flow", "--out", model) == 0
    assert run_script("cache/create_sdxl_text.py", "--data_root", data, "--model", model, "--batch_size", 64) == 0
    assert score(world, train(model, data, tmp_path / "run", "train_sdxl.sh"), tmp_path) >= BOUND


def test_a_model_that_was_not_trained_fails_the_bound(world, tmp_path):
    assert score(world, world / "model", tmp_path) < BOUND - 10


@pytest.mark.slow
def test_a_model_trained_with_captions_of_other_images_fails_the_bound(world, tmp_path):
    shuffled = tmp_path / "shuffled"
    shutil.copytree(world / "data", shuffled)
    captions = sorted(shuffled.glob("[0-9]*.txt_t5cache"))
    contents = [path.read_bytes() for path in captions]
    for path, content in zip(captions, contents[1:] + contents[:1], strict=True):
        path.write_bytes(content)
    assert score(world, train(world / "model", shuffled, tmp_path / "run"), tmp_path) < BOUND - 10
