"""Checkpoints whose files have been damaged since: noticed by name, stepped over, and never trained from."""

import os
import shutil
from pathlib import Path

import pytest
from helpers import WEIGHTS, refused, train

from cachetrain.checkpoints.manifest import NAME, damages, read_manifest, write_manifest
from cachetrain.checkpoints.resume import find_checkpoint
from cachetrain.checkpoints.save import is_frozen

FLAGS = ["--batch_size", 2, "--save_steps", 1, "--lr", 1e-3]


@pytest.fixture(scope="module")
def trained(shapes, model_t5, tmp_path_factory):
    """output_dir of a run with checkpoints of three steps. Copy it before damaging anything."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train(shapes, model_t5, out, "--max_steps", 3, *FLAGS, "--ema_decay", 0.9)
    return out


@pytest.fixture
def output_dir(trained, tmp_path):
    return copy(trained, tmp_path / "run")


def copy(source, target):
    """Copies a run; what is one file in several checkpoints of it stays one."""
    twins = {}

    def copy_file(path, new):
        inode = os.stat(path).st_ino
        if inode in twins:
            os.link(twins[inode], new)
        else:
            twins[inode] = shutil.copyfile(path, new)

    return shutil.copytree(source, target, copy_function=copy_file)


def flipped(place):
    def flip(data):
        position = min(int(place * len(data)), len(data) - 1)
        return data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :]

    return flip


# What becomes of a file's content; None: there is no file any more.
DAMAGES = {f"a bit at {place:.0%}": flipped(place) for place in (0, 0.01, 0.1, 0.35, 0.5, 0.8, 1)} | {
    "cut by a byte": lambda data: data[:-1],
    "cut in half": lambda data: data[: len(data) // 2],
    "a byte more": lambda data: data + b"\0",
    "zeroed": lambda data: bytes(len(data)),
    "emptied": lambda data: b"",
    "missing": lambda data: None,
}


class Damaged:
    """Damages a file in place, so that its hard links share it, and mends it in the end."""

    def __init__(self, path, damage):
        self.path, self.damage, self.aside = path, damage, path.with_name(".aside")

    def __enter__(self):
        self.content = self.path.read_bytes()
        content = self.damage(self.content)
        if content is None:
            self.path.rename(self.aside)
        else:
            self.path.write_bytes(content)

    def __exit__(self, *_):
        if self.aside.exists():
            self.aside.rename(self.path)
        else:
            self.path.write_bytes(self.content)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_noticed_by_name_and_stepped_over_unless_it_is_frozen(damage, output_dir, capsys):
    first, second, third = (output_dir / f"checkpoint-00000{step}" for step in (1, 2, 3))
    aside = third.with_name(f"{third.name}.damaged")
    names = [*read_manifest(third), NAME]
    assert {name.split("/")[0] for name in names} >= {"unet", "unet_ema", "training_state", "vae", "scheduler", NAME}
    for name in names:
        with Damaged(third / name, DAMAGES[damage]):
            found = find_checkpoint("latest", output_dir)
            errors = capsys.readouterr().err
            if is_frozen(name):
                assert found == (third, False) and f"{third / name}: IS DAMAGED" in errors
                assert "stepped over" not in errors and not aside.exists()
                continue
            assert found == (second, True) and not third.exists() and aside.exists()
            assert f"{third}: IS DAMAGED and stepped over" in errors and name in errors
            aside.rename(third)
    assert find_checkpoint("latest", output_dir) == (third, True) and not capsys.readouterr().err
    assert sorted(output_dir.glob("checkpoint*")) == [first, second, third]


def test_a_flip_of_any_bit_of_a_manifest_is_noticed(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "weights").write_bytes(b"weights")
    (tmp_path / "state.json").write_text("{}")
    written = write_manifest(tmp_path)
    assert read_manifest(tmp_path) == written and written["state.json"]["size"] == 2
    path = tmp_path / NAME
    manifest = path.read_bytes()
    trusted = []
    for bit in range(8 * len(manifest)):
        path.write_bytes(manifest[: bit // 8] + bytes([manifest[bit // 8] ^ 1 << bit % 8]) + manifest[bit // 8 + 1 :])
        try:
            trusted.append((bit, read_manifest(tmp_path)))
        except ValueError as error:
            assert str(path) in str(error)
    assert not trusted
    path.write_bytes(manifest)
    assert damages(tmp_path) == {}


@pytest.mark.parametrize("content", [b"", b"[]", b'"files"', b"7", b'{"files": 1}', b"\xff\xfe", b'{"files": {}}'])
def test_a_manifest_of_other_content_is_damaged(content, tmp_path):
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        read_manifest(tmp_path)


def test_resume_steps_over_a_damaged_checkpoint_and_ends_like_the_undisturbed_run(
    trained, output_dir, shapes, model_t5, capsys
):
    weights = f"unet/{WEIGHTS}"
    third = output_dir / "checkpoint-000003"
    (third / weights).write_bytes(DAMAGES["a bit at 50%"]((third / weights).read_bytes()))
    train(shapes, model_t5, output_dir, "--max_steps", 3, *FLAGS, "--ema_decay", 0.9, "--resume", "latest")
    said = capsys.readouterr()
    assert f"{third}: IS DAMAGED and stepped over: {weights} does not match its SHA-256" in said.err
    assert f"resumes from {output_dir / 'checkpoint-000002'}, after step 2" in said.out
    for name in (weights, weights.replace("unet", "unet_ema", 1), "training_state/tensors.safetensors"):
        assert (third / name).read_bytes() == (trained / third.name / name).read_bytes()
    assert set(damages(third.with_name(f"{third.name}.damaged"))) == {weights}


@pytest.mark.parametrize("damage", ["a bit at 80%", "missing"])
def test_resume_with_damaged_frozen_parts_goes_on_and_saves_the_models_own(
    damage, output_dir, shapes, model_t5, capsys
):
    name = f"vae/{WEIGHTS}"
    second, third = output_dir / "checkpoint-000002", output_dir / "checkpoint-000003"
    content = DAMAGES[damage]((third / name).read_bytes())
    (third / name).unlink() if content is None else (third / name).write_bytes(content)
    train(shapes, model_t5, output_dir, "--max_steps", 4, *FLAGS, "--ema_decay", 0.9,
        "--resume", "latest", "--resume_anyway")  # fmt: skip
    assert f"{third / name}: IS DAMAGED" in capsys.readouterr().err
    fourth = output_dir / "checkpoint-000004"
    assert damages(fourth) == {} and (fourth / name).read_bytes() == (model_t5 / name).read_bytes()
    assert set(damages(third)) == {name}
    assert damages(second).keys() == ({name} if content else set())  # they shared the damaged file


def test_without_an_intact_checkpoint_the_run_is_refused_and_nothing_is_renamed(output_dir, shapes, model_t5):
    for number, damage in enumerate(("cut in half", "zeroed", "a bit at 10%"), 1):
        path = output_dir / f"checkpoint-00000{number}" / "unet" / "config.json"
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    before = sorted(output_dir.rglob("*"))
    message = refused(shapes, model_t5, output_dir, "--resume", "latest")
    assert "has no intact checkpoint, only 3 damaged ones" in message and str(output_dir) in message
    path = output_dir / "checkpoint-000002"
    message = refused(shapes, model_t5, output_dir, "--resume", path)
    assert str(path) in message and "unet/config.json" in message
    assert sorted(set(output_dir.rglob("*")) - {output_dir / ".lock"}) == sorted(set(before) - {output_dir / ".lock"})


def test_several_damaged_checkpoints_are_put_aside_beside_earlier_ones(output_dir, capsys):
    second, third = output_dir / "checkpoint-000002", output_dir / "checkpoint-000003"
    (third / NAME).unlink()
    (second / "training_state" / "state.json").write_text("{}")
    Path(f"{third}.damaged").mkdir()
    assert find_checkpoint("latest", output_dir) == (output_dir / "checkpoint-000001", True)
    errors = capsys.readouterr().err
    assert f"{third}: has no {NAME}" in errors and "training_state/state.json has 2 bytes" in errors
    assert {path.name for path in output_dir.glob("checkpoint*")} == {
        "checkpoint-000001",
        "checkpoint-000002.damaged",
        "checkpoint-000003.damaged",
        "checkpoint-000003.damaged2",
    }
