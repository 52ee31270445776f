"""The sidecar contract: what was written is read back, and damage anywhere is noticed."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from cachetrain.data import sidecar

METADATA = {"kind": "img_sdxl", "encoder": "e" * 64, "settings": '{"width": 64}', "scaling_factor": "0.13025"}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.img_sdxl"
    tensors = {"latent": torch.randn(2, 4, 4, dtype=torch.float16), "latent_flip": torch.zeros(2, 4, 4)}
    sidecar.write_sidecar(path, tensors, METADATA)
    return path


def test_sidecar_reads_back_and_opens_with_plain_safetensors(path):
    tensors, header = sidecar.read_sidecar(path)
    plain = load_file(path)
    assert set(plain) == {"latent", "latent_flip"}
    assert all(torch.equal(tensors[name], plain[name]) for name in plain)
    assert METADATA.items() <= header.metadata.items()
    assert header == sidecar.read_header(path)
    assert header.shapes["latent"] == (2, 4, 4) and header.dtypes["latent"] == "F16"


def test_fields_that_look_like_hashes_or_hold_quotes_are_kept(path):
    fields = {"a": "0" * 64, "b": f'"sha256":"{"0" * 64}"', "c": f'"header_sha256":"{"0" * 64}"', "d": "\\ü\n"}
    sidecar.write_sidecar(path, {"latent": torch.ones(3)}, fields)
    assert fields.items() <= sidecar.read_sidecar(path)[1].metadata.items()


def test_sidecar_with_any_byte_flipped_is_noticed(path):
    data = path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :])
        with pytest.raises(sidecar.SidecarError, match=r"a\.img_sdxl"):
            sidecar.read_sidecar(path)


def test_sidecar_cut_anywhere_is_noticed_by_its_header_alone(path):
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(sidecar.SidecarError, match=r"a\.img_sdxl"):
            sidecar.read_header(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(sidecar.SidecarError):
        sidecar.read_header(path)


def test_sidecar_with_zeroed_pages_is_noticed(path):
    data = path.read_bytes()
    for start in range(0, len(data), 64):
        zeroed = data[:start] + bytes(len(data[start : start + 64])) + data[start + 64 :]
        if zeroed == data:
            continue  # latent_flip is all zeros
        path.write_bytes(zeroed)
        with pytest.raises(sidecar.SidecarError):
            sidecar.read_sidecar(path)


def test_headerless_file_is_foreign_and_still_read(tmp_path):
    save_file({"latent": torch.ones(4, 8, 8)}, tmp_path / "a.img_sdxl")
    tensors, header = sidecar.read_sidecar(tmp_path / "a.img_sdxl")
    assert header.foreign and torch.equal(tensors["latent"], torch.ones(4, 8, 8))


def test_other_format_version_is_refused_by_name(path):
    tensors, header = sidecar.read_sidecar(path)
    save_file(tensors, path, {**header.metadata, "cachetrain_format": "2"})
    with pytest.raises(sidecar.SidecarError, match="format 2"):
        sidecar.read_header(path)


def test_failed_write_keeps_the_old_file_and_leaves_nothing_behind(path, monkeypatch):
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        sidecar.write_sidecar(path, {"latent": torch.ones(4, 8, 8)}, METADATA)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["a.img_sdxl"]


def test_sidecar_path_replaces_the_last_suffix_only():
    assert sidecar.sidecar_path("d/a.b.jpg", ".img_sdxl").as_posix() == "d/a.b.img_sdxl"
