"""The sidecar contract: what was written is read back, and damage anywhere is noticed."""

import io
import json
import os
import struct

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


def foreign(header, payload=b""):
    """Bytes of a safetensors file with this header: bytes, or a value that becomes JSON."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + payload


def entry(dtype="F16", shape=(4, 8, 8), end=512):
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(8),
        struct.pack("<Q", 2**63) + b"{}",
        foreign(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        foreign(b'{"a": ' + b"1" * 5000 + b"}"),
        foreign([1, 2]),
        foreign({"latent": []}),
        foreign({"latent": None}),
        *(foreign({"__metadata__": value, "latent": entry()}, bytes(512)) for value in ([], "x", None)),
        *(foreign({"latent": entry(shape=s)}, bytes(512)) for s in ("488", [-4, 8, 8], [4.0, 8, 8], [[4], 8], None)),
        foreign({"latent": entry(end="512")}, bytes(512)),
        foreign({"latent": entry("X9")}, bytes(512)),
        foreign({"latent": entry("F4", end=128)}, bytes(128)),
    ],
)
def test_a_malformed_sidecar_is_named(data, path):
    path.write_bytes(data)
    with pytest.raises(sidecar.SidecarError, match=r"a\.img_sdxl"):
        sidecar.read_sidecar(path)


def test_a_huge_header_is_named_before_it_is_read(path, monkeypatch):
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 10**8) + b'{"a": "')
        file.truncate(8 + 10**8)
    monkeypatch.setattr(sidecar, "open_regular", lambda path: Counting(path))
    with pytest.raises(sidecar.SidecarError, match=r"a\.img_sdxl"):
        sidecar.read_header(path)
    assert Counting.num_bytes <= 4096


class Counting(io.FileIO):
    num_bytes = 0

    def read(self, size=-1):
        data = super().read(size)
        Counting.num_bytes += len(data)
        return data


SIZES = {"width": "64", "height": "64", "original_width": "80", "original_height": "80", "crop_box": "0,0,80,80"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("scaling_factor", value) for value in ("nan", "inf", "-1", "x", "", "٣")),
        *(("shift_factor", value) for value in ("nan", "x")),
        *(("num_tokens", value) for value in ("x", "-1", "9" * 30)),
        *((name, value) for name in SIZES for value in ("x", "", "-1", "0")),
        *(("crop_box", value) for value in ("0,0,80", "nan,0,80,80", "0,0,0,0", "80,80,0,0")),
    ],
)
def test_a_header_field_that_is_no_such_number_is_named(name, value, path):
    sidecar.write_sidecar(path, {"latent": torch.zeros(4, 8, 8)}, METADATA | SIZES)
    sidecar.read_header(path)
    sidecar.write_sidecar(path, {"latent": torch.zeros(4, 8, 8)}, METADATA | SIZES | {name: value})
    with pytest.raises(sidecar.SidecarError, match=r"a\.img_sdxl: its header"):
        sidecar.read_header(path)


def test_a_crop_box_without_its_sizes_is_named(path):
    for name in SIZES.keys() - {"crop_box"}:
        fields = METADATA | {key: value for key, value in SIZES.items() if key != name}
        sidecar.write_sidecar(path, {"latent": torch.zeros(4, 8, 8)}, fields)
        with pytest.raises(sidecar.SidecarError, match=f"its header lacks '{name}'"):
            sidecar.read_header(path)


@pytest.mark.parametrize("settings", ["null", "[]", "{", "x", "[" * 5000])
def test_settings_that_are_no_object_are_named(settings, path):
    sidecar.write_sidecar(path, {"latent": torch.zeros(4, 8, 8)}, METADATA | {"settings": settings})
    with pytest.raises(ValueError, match=r"a\.img_sdxl: the settings in its header"):
        sidecar.settings_of(path, sidecar.read_header(path))
