"""Sidecars that are lost, damaged or replaced while a run trains on them: they count with weight 0, and are named."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import T5, json_lines, load_script, run_script, train, trainer_argv, weights_of
from safetensors.torch import save_file

from cachetrain.data.batching import BatchSampler
from cachetrain.data.index import PairIndex
from cachetrain.data.sidecar import read_sidecar, write_sidecar
from cachetrain.training import nonfinite
from cachetrain.training import run as opening
from cachetrain.training.nonfinite import QUARANTINE

trainer = load_script("train_from_cached.py")
FLAGS = ["--batch_size", 4, "--lr", 1e-3, "--cond_dropout", 0]


def rewrite(path, fields=(), **tensors):
    """Writes a sidecar again, right in itself, with other header fields or tensors."""
    old, header = read_sidecar(path)
    write_sidecar(path, old | tensors, header.metadata | dict(fields))


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def headless(path):
    save_file({name: tensor.clone() for name, tensor in read_sidecar(path)[0].items()}, path)


FAULTS = {
    "deleted": (0, lambda path: path.unlink(), "No such file"),
    "text deleted": (1, lambda path: path.unlink(), "No such file"),
    "flipped": (0, flip, "do not match their SHA-256"),
    "truncated": (1, lambda path: path.write_bytes(path.read_bytes()[:-9]), "the header expects"),
    "empty": (0, lambda path: path.write_bytes(b""), "not a readable safetensors file"),
    "a folder": (0, lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
    "other size": (0, lambda path: rewrite(path, latent=torch.zeros(4, 8, 12)), "the latent was (4, 8, 8), is"),
    "other width": (1, lambda path: rewrite(path, emb=torch.zeros(9, 32)), "widths were"),
    "other encoder": (0, lambda path: rewrite(path, {"encoder": "f" * 64}), "encoder was"),
    "other text encoder": (1, lambda path: rewrite(path, {"encoder": "f" * 64}), "encoder was"),
    "other scaling": (0, lambda path: rewrite(path, {"scaling_factor": "0.5"}), "scaling_factor was"),
    "foreign": (0, headless, "is ''"),
}


@pytest.fixture
def data(shapes, tmp_path):
    """A copy of the sidecars, which a test may spoil."""
    return shutil.copytree(shapes, tmp_path / "data")


def spoil_after_start(monkeypatch, spoil):
    """Calls spoil(index) once the run has read all headers."""
    open_pairs = opening.open_pairs

    def spoiled(run):
        spoil(run.index)
        return open_pairs(run)

    monkeypatch.setattr(opening, "open_pairs", spoiled)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_sidecar_that_no_longer_fits_counts_with_weight_0_and_is_named(
    fault, data, model_t5, tmp_path, monkeypatch, capsys
):
    """One step of 4 samples, against autograd's gradient of the sum over the other three, divided by 4."""
    half, spoil, reason = FAULTS[fault]
    chosen, forward, expected = [], trainer.forward_pass, []

    def forward_twice(model, batch, **kwargs):
        result = forward(model, batch, **kwargs)
        readable = batch["samples"] != chosen[0]
        loss = result.loss[readable].sum() / 4
        expected.append(
            torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], retain_graph=True)
        )
        return result

    def spoil_first(index):
        chosen.append(next(iter(BatchSampler(index, 4, 0, 1)))[1].sample)
        path = (index.image_path, index.text_path)[half](chosen[0])
        chosen.append(path)
        spoil(Path(path))

    gradients, real = [], nonfinite.step_if_finite

    def seen(optimizer, *args):
        gradients.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])
        return real(optimizer, *args)

    monkeypatch.setattr(nonfinite, "step_if_finite", seen)
    monkeypatch.setattr(trainer, "forward_pass", forward_twice)
    spoil_after_start(monkeypatch, spoil_first)
    train(data, model_t5, tmp_path / "run", "--max_steps", 1, "--gradient_clip", 0, *FLAGS)
    for got, right in zip(gradients[0], expected[0], strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-7)
    (line,) = (tmp_path / "run" / QUARANTINE).read_text().splitlines()
    assert line.startswith("1\tunreadable: ") and reason in line and chosen[1] in line
    assert "1 more pair could not be read" in capsys.readouterr().err


def test_a_run_with_an_unreadable_pair_trains_the_same_on_any_number_of_workers_and_resumes_bit_exact(
    data, model_t5, tmp_path
):
    flags = [*FLAGS, "--max_steps", 8]
    flip(Path(PairIndex([data], *T5).image_path(3)))
    _, whole = train(data, model_t5, tmp_path / "a", *flags, "--num_workers", 2)
    train(data, model_t5, tmp_path / "b", *flags, "--max_steps", 5)
    _, resumed = train(data, model_t5, tmp_path / "b", *flags, "--resume", "latest")
    assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.items())
    lines = json_lines(tmp_path / "a" / "metrics.jsonl")
    assert None not in [line["01_Training/loss"] for line in lines]


def test_too_many_unreadable_pairs_end_the_run_with_its_state_saved(data, model_t5, tmp_path, monkeypatch):
    spoil_after_start(monkeypatch, lambda index: [Path(index.image_path(i)).unlink() for i in range(12)])
    argv = trainer_argv(data, model_t5, tmp_path / "run", *FLAGS, "--max_steps", 50)
    with pytest.raises(ValueError, match=r"11 of 24 pairs cannot be read|12 of 24 pairs cannot be read") as error:
        run_script("train_from_cached.py", *argv)
    (kept,) = (tmp_path / "run").glob("checkpoint-*")
    assert str(kept) in str(error.value) and QUARANTINE in str(error.value) and "\n" not in str(error.value)
    assert weights_of(kept / "unet")


def test_a_pair_whose_name_is_no_text_is_listed_by_its_bytes(data, model_t5, tmp_path, monkeypatch, capsys):
    for path in data.glob("00005.*"):
        path.rename(path.with_name(b"\xff\xfe".decode(errors="surrogateescape") + path.suffix))
    spoil_after_start(
        monkeypatch, lambda index: [flip(p) for p in data.iterdir() if p.name.endswith("\udcfe.img_sdxl")]
    )
    train(data, model_t5, tmp_path / "run", "--max_steps", 6, *FLAGS)
    assert b"\xff\xfe.img_sdxl\t" in (tmp_path / "run" / QUARANTINE).read_bytes()
    assert "could not be read" in capsys.readouterr().err


def test_an_unreadable_pair_is_left_out_of_the_validation_loss(data, model_t5, tmp_path, monkeypatch, capsys):
    flags = [*FLAGS, "--max_steps", 1, "--val_data_dir", data.with_name("held"), "--val_steps", 1]
    shutil.copytree(data, data.with_name("held"))
    for path in data.glob("0000[0-7].*"):
        path.unlink()
    for path in data.with_name("held").glob("00[01][0-9][0-9].*"):
        if int(path.stem) > 7:
            path.unlink()
    open_validation = opening.open_validation

    def spoiled(run):
        flip(Path(run.held_out.image_path(2)))
        return open_validation(run)

    monkeypatch.setattr(opening, "open_validation", spoiled)
    lines, _ = train(data, model_t5, tmp_path / "run", *flags)
    assert "left out of the validation loss, which shifts it: 1 pair, " in capsys.readouterr().err
    for path in data.with_name("held").glob("00002.*"):
        path.unlink()
    monkeypatch.undo()
    fewer, _ = train(data, model_t5, tmp_path / "fewer", *flags)
    assert lines[-1]["val/loss"] == pytest.approx(fewer[-1]["val/loss"], rel=0.5)  # other noise: by place in the list


def test_a_pipe_in_place_of_a_sidecar_is_refused_and_not_waited_for(data, model_t5, tmp_path):
    (data / "00002.img_sdxl").unlink()
    os.mkfifo(data / "00002.img_sdxl")
    argv = trainer_argv(data, model_t5, tmp_path / "run", *FLAGS, "--max_steps", 1)
    with pytest.raises(OSError, match=r"is not a regular file: .*00002\.img_sdxl"):
        run_script("train_from_cached.py", *argv)
