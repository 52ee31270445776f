"""cache/create_img_*.py: the latents are the VAE's, only what is needed is encoded, bad images stop nothing."""

import copy
import errno
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_fixtures import (
    changed,
    make_custom_pipeline,
    make_pipeline,
    picture,
    save_pictures,
    sidecars,
    touch,
    waiting_at,
)
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from helpers import REPO, run_script
from PIL import Image, ImageOps
from safetensors.torch import save_file
from skimage import data as photographs

from cachetrain.atomic import temporary_path
from cachetrain.caching import buckets, encoders, images
from cachetrain.caching.freshness import is_of_others
from cachetrain.caching.image_run import load as image_run_load
from cachetrain.data import sidecar, walk
from cachetrain.data.sidecar import read_header, read_sidecar, write_sidecar

SUFFIX = ".img_sdxl"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_pipeline(tmp_path_factory.mktemp("models") / "pipeline", "clip")


@pytest.fixture(scope="module")
def vae(model):
    return AutoencoderKL.from_pretrained(model / "vae", torch_dtype=torch.float32).eval()


@pytest.fixture
def root(tmp_path):
    """A folder with three pictures, one of them in a sub-folder."""
    save_pictures(tmp_path / "data", ["a.png", "b.jpg", "sub/c.webp"])
    return tmp_path / "data"


@pytest.fixture
def cache(model, root):
    """Runs create_img_sdxl on `root` at 64 x 64 in this process and returns the exit code."""

    def run(*argv, resolution=64):
        size = ("--resolution", resolution) if resolution else ()
        return run_script(
            "cache/create_img_sdxl.py", "--data_root", root, "--model", model, "--num_workers", 0, *size, *argv
        )

    return run


def encoded(pixels):
    """uint8 [H, W, 3] -> float32 [1, 3, H, W] in [-1, 1], written independently of the package."""
    return torch.tensor(np.asarray(pixels)).permute(2, 0, 1)[None] / 127.5 - 1


# What is encoded


@torch.no_grad()
@pytest.mark.parametrize("workers", [0, 2])
def test_latents_are_the_posterior_mean_of_the_cover_resized_image(model, vae, tmp_path, workers):
    save_pictures(tmp_path, ["wide.png", "tall.png"], size=(150, 90))
    Image.fromarray(picture(70, 200)).save(tmp_path / "tall.png")
    argv = ["--data_root", tmp_path, "--model", model, "--target_width", 96, "--target_height", 64, "--flip"]
    assert run_script("cache/create_img_sdxl.py", *argv, "--num_workers", workers) == 0
    for name in ("wide", "tall"):
        image = ImageOps.fit(Image.open(tmp_path / f"{name}.png"), (96, 64), Image.Resampling.BICUBIC)
        pixels = encoded(image)
        tensors, header = read_sidecar(tmp_path / f"{name}.img_sdxl")
        expected = {"latent": vae.encode(pixels).latent_dist.mean, "latent_flip": vae.encode(pixels.flip(3))}
        expected["latent_flip"] = expected["latent_flip"].latent_dist.mean
        for key, latent in expected.items():
            assert tensors[key].dtype == torch.float16 and tensors[key].shape == (4, 8, 12)
            torch.testing.assert_close(tensors[key].float(), latent[0], rtol=2e-3, atol=2e-3)
        assert float(header.metadata["scaling_factor"]) == vae.config.scaling_factor
        assert float(header.metadata["shift_factor"]) == 0
    assert read_header(tmp_path / "wide.img_sdxl").metadata["crop_box"] == "7.5,0,142.5,90"


@torch.no_grad()
def test_photographs_through_both_image_scripts(model, vae, tmp_path):
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        Image.fromarray(getattr(photographs, name)()).save(tmp_path / f"{name}.png")
    for script, suffix in (("cache/create_img_sdvae.py", ".img_sdvae"), ("cache/create_img_sdxl.py", ".img_sdxl")):
        assert run_script(script, "--data_root", tmp_path, "--model", model) == 0
        assert len(sidecars(tmp_path, suffix)) == 4
        latent = read_sidecar(tmp_path / f"astronaut{suffix}")[0]["latent"]
        expected = vae.encode(encoded(photographs.astronaut())).latent_dist.mean[0]
        torch.testing.assert_close(latent.float(), expected, rtol=5e-3, atol=5e-3)


@torch.no_grad()
def test_deterministic_autoencoders_are_encoded_too():
    pixels = encoded(picture(64, 64))
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    deep = AutoencoderDC(
        latent_channels=4, attention_head_dim=4,
        encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
    )  # fmt: skip
    for vae in (tiny.eval(), deep.eval()):
        assert torch.equal(encoders.encode_images(vae, pixels), vae.encode(pixels, return_dict=False)[0])


@torch.no_grad()
def test_pixels_are_encoded_as_exactly_as_float32_allows(vae):
    pixels = torch.tensor(picture(256, 256))[None]
    latents = encoders.encode_images(vae, encoders.to_model_range(pixels, torch.float32))
    exact = copy.deepcopy(vae).double().encode(encoded(pixels[0]).double()).latent_dist.mean
    assert (latents - exact).norm() / exact.norm() < 1e-6


def test_latent_is_float16_unless_a_value_overflows():
    assert encoders.storage_dtype(torch.tensor([65504.0])).dtype == torch.float16
    assert encoders.storage_dtype(torch.tensor([-65520.0])).dtype == torch.float32


def test_latent_that_is_not_finite_is_reported_and_not_written(cache, root, monkeypatch, capsys):
    def broken(vae, inputs):
        return torch.full((len(inputs), 4, 8, 8), math.nan), None

    monkeypatch.setattr(encoders, "encode_posterior", broken)
    assert cache() == 1
    assert not sidecars(root, SUFFIX) and "not finite" in capsys.readouterr().err


# Decoding


def decoded(image, width=16, height=16, **save):
    """Pixels that `decode` gives of a Pillow image saved as PNG (or save["format"])."""
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "PNG", **save})
    return images.decode(buffer.getvalue(), [(width, height)])[0]


def test_transparency_shows_white_however_it_is_stored():
    rgba = np.zeros((16, 16, 4), np.uint8)
    rgba[:, 8:] = (200, 100, 0, 128)
    expected = np.full((16, 16, 3), 255, np.uint8)
    expected[:, 8:] = [round(c * 128 / 255 + 255 * 127 / 255) for c in (200, 100, 0)]
    assert np.abs(decoded(Image.fromarray(rgba)).astype(int) - expected).max() <= 1
    palette = Image.fromarray((np.arange(16) >= 8).astype(np.uint8)[None].repeat(16, 0), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    expected[:, 8:] = (40, 50, 60)
    assert np.array_equal(decoded(palette, transparency=0), expected)
    gray = np.zeros((16, 16, 2), np.uint8)
    gray[:, 8:] = (77, 255)
    expected[:, 8:] = 77
    assert np.array_equal(decoded(Image.fromarray(gray)), expected)


def test_cmyk_jpeg_shows_its_colors():
    cmyk = np.empty((16, 16, 4), np.uint8)
    cmyk[:] = (255, 0, 0, 64)  # cyan, a quarter black
    pixels = decoded(Image.fromarray(cmyk, "CMYK"), format="JPEG", quality=95)
    assert np.abs(pixels.astype(int) - (0, 191, 191)).max() <= 4


def test_gray_bilevel_and_animated_images_decode():
    gray = picture(16, 16)[..., 0]
    assert np.array_equal(decoded(Image.fromarray(gray)), gray[..., None].repeat(3, -1))
    bilevel = decoded(Image.fromarray(gray > 128))
    assert np.array_equal(bilevel, np.where(gray > 128, 255, 0)[..., None].repeat(3, -1))
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    first = decoded(frames[0], format="GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(first, np.broadcast_to([255, 0, 0], (16, 16, 3)))


@pytest.mark.parametrize("format_name", ["JPEG", "TIFF", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation, format_name):
    stored = picture(160, 128)
    # Where the EXIF standard puts the stored image's rows and columns.
    upright = {
        1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1],
        5: stored.transpose(1, 0, 2), 6: stored[::-1].transpose(1, 0, 2),
        7: stored[::-1, ::-1].transpose(1, 0, 2), 8: stored[:, ::-1].transpose(1, 0, 2),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    options = {"JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format_name, {})
    Image.fromarray(stored).save(buffer, format_name, exif=exif, **options)
    pixels, original_size, crop_box = images.decode(buffer.getvalue(), [(24, 16)])
    expected = ImageOps.fit(Image.fromarray(upright), (24, 16), Image.Resampling.BICUBIC)
    assert original_size == (upright.shape[1], upright.shape[0])
    assert np.abs(pixels.astype(int) - np.asarray(expected)).mean() < 2
    width, height = crop_box[2] - crop_box[0], crop_box[3] - crop_box[1]
    assert width / height == pytest.approx(24 / 16, rel=0.02)


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "rocket"])
def test_reduced_scale_decode_of_large_jpegs_is_not_visible(monkeypatch, name):
    buffer = io.BytesIO()
    Image.fromarray(getattr(photographs, name)()).save(buffer, "JPEG", quality=92)
    reduced = images.decode(buffer.getvalue(), [(64, 64)])
    monkeypatch.setattr(images, "_DRAFT_MARGIN", math.inf)
    full = images.decode(buffer.getvalue(), [(64, 64)])
    assert reduced[1:] == full[1:]
    mse = np.mean((reduced[0].astype(float) - full[0]) ** 2)
    assert 0 < mse < 255**2 / 10**4  # PSNR above 40 dB


def test_cover_box_has_the_ratio_is_centered_and_inside():
    for size in ((7, 1000), (1000, 7), (64, 64), (333, 777), (1, 1)):
        for width, height in ((64, 64), (96, 64), (512, 768)):
            left, top, right, bottom = images.cover_box(size, width, height)
            assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
            assert (left, top) == pytest.approx((size[0] - right, size[1] - bottom))
            assert (right - left) / (bottom - top) == pytest.approx(float(Fraction(width, height)))
            assert min(left, top) == 0


# Only what is needed


def test_second_run_encodes_nothing_and_writes_nothing(cache, root, monkeypatch, capsys):
    assert cache() == 0
    before = sidecars(root, SUFFIX)
    assert list(before) == ["a", "b", "sub/c"]
    monkeypatch.setattr(image_run_load, "load_vae", None)
    assert cache() == 0
    assert sidecars(root, SUFFIX) == before
    assert "0 encoded, 3 fresh" in capsys.readouterr().out


def test_nothing_to_do_needs_no_torch(cache, root, model):
    assert cache() == 0
    code = (
        "import runpy, sys; sys.argv[0] = 'cache/create_img_sdxl.py'\n"
        "try: runpy.run_path('cache/create_img_sdxl.py', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    argv = ["--data_root", str(root), "--model", str(model), "--resolution", "64"]
    result = subprocess.run([sys.executable, "-c", code, *argv], cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "0 encoded, 3 fresh" in result.stdout


def test_changed_image_is_encoded_again_and_touched_one_is_not(cache, root, capsys):
    cache()
    before = sidecars(root, SUFFIX)
    save_pictures(root, ["x", "sub/c.webp"][1:], size=(64, 80))
    assert cache() == 0
    after = sidecars(root, SUFFIX)
    assert changed(before, after) == ["sub/c"] and "1 encoded (1 stale), 2 fresh" in capsys.readouterr().out
    touch(root / "a.png")
    assert cache() == 0 and "0 encoded, 3 fresh" in capsys.readouterr().out
    assert read_header(root / "a.img_sdxl").metadata["source_mtime_ns"] == str((root / "a.png").stat().st_mtime_ns)
    settled = sidecars(root, SUFFIX)
    assert cache() == 0 and sidecars(root, SUFFIX) == settled


@pytest.mark.parametrize("argv", [("--target_width", 64, "--target_height", 72), ("--flip",), ("--dtype", "bf16")])
def test_changed_setting_encodes_all_again(cache, root, argv, capsys):
    cache()
    assert cache(*argv, resolution=None if "--target_width" in argv else 64) == 0
    assert "3 encoded (3 stale), 0 fresh" in capsys.readouterr().out


def test_changed_vae_encodes_all_again_and_a_copy_of_it_none(cache, root, model, tmp_path, capsys):
    cache()
    other = make_pipeline(tmp_path / "other", "clip")
    run = ["--data_root", root, "--model", other / "vae", "--vae", "--resolution", 64, "--num_workers", 0]
    assert run_script("cache/create_img_sdxl.py", *run) == 0
    assert "0 encoded, 3 fresh" in capsys.readouterr().out
    config = json.loads((other / "vae/config.json").read_text())
    (other / "vae/config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    assert run_script("cache/create_img_sdxl.py", *run) == 0
    assert "3 encoded (3 stale)" in capsys.readouterr().out


@pytest.mark.parametrize("field", ["kind", "encoder", "settings", "source_sha256"])
def test_sidecar_of_another_encoder_setting_or_source_is_stale(cache, root, field, capsys):
    cache()
    tensors, header = read_sidecar(root / "b.img_sdxl")
    altered = header.metadata | {field: "other"} | ({"source_size": "1"} if field == "source_sha256" else {})
    write_sidecar(root / "b.img_sdxl", tensors, altered)
    before = sidecars(root, SUFFIX)
    assert cache() == 0
    assert changed(before, sidecars(root, SUFFIX)) == ["b"] and "1 encoded (1 stale)" in capsys.readouterr().out


def test_each_header_field_altered_alone_flags_exactly_its_sidecar(cache, root, capsys):
    cache()
    path = root / "b.img_sdxl"
    good, fields = path.read_bytes(), read_header(path).metadata
    assert {"kind", "settings", "scaling_factor", "source_mtime_ns", "crop_box", "sha256"} < fields.keys()
    for field, value in fields.items():
        # The last character of the value, in the file's own bytes: neither size nor hashes are brought up to date.
        old = json.dumps(value)[1:-1]
        entry = f'"{field}":"{old}"'.encode()
        assert good.count(entry) == 1
        if value:
            path.write_bytes(good.replace(entry, entry[:-2] + bytes([entry[-2] ^ 1]) + b'"'))
        else:  # revision of a local model
            path.write_bytes(good.replace(entry, entry.replace(field.encode(), field[:-1].encode() + b"m")))
        before = sidecars(root, SUFFIX)
        capsys.readouterr()
        assert cache() == 0
        assert changed(before, sidecars(root, SUFFIX)) == ["b"], field
        assert "1 encoded (1 corrupt), 2 fresh" in capsys.readouterr().out


def test_full_finds_an_image_changed_under_its_old_size_and_time(cache, root, capsys):
    cache()
    stat = os.stat(root / "b.jpg")
    altered = bytearray((root / "b.jpg").read_bytes())
    altered[len(altered) // 2] ^= 1
    (root / "b.jpg").write_bytes(altered)
    os.utime(root / "b.jpg", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    before = sidecars(root, SUFFIX)
    assert cache() == 0 and not changed(before, sidecars(root, SUFFIX))
    assert cache("--full") == 0 and changed(before, sidecars(root, SUFFIX)) == ["b"]
    assert cache("--full") == 0 and "0 encoded, 3 fresh" in capsys.readouterr().out


def test_damaged_sidecars_are_made_again_and_named(cache, root, capsys):
    cache()
    good = (root / "a.img_sdxl").read_bytes()
    (root / "a.img_sdxl").write_bytes(good[:-7])
    (root / "b.img_sdxl").write_bytes(b"")
    flipped = (root / "sub/c.img_sdxl").read_bytes()
    latent = read_sidecar(root / "sub/c.img_sdxl")[0]["latent"]
    (root / "sub/c.img_sdxl").write_bytes(flipped[:-1] + bytes([flipped[-1] ^ 1]))
    assert cache() == 0
    output = capsys.readouterr()
    assert "2 encoded (2 corrupt), 1 fresh" in output.out
    assert "a.img_sdxl: damaged" in output.err and "b.img_sdxl: damaged" in output.err
    assert cache("--full") == 0 and "1 encoded (1 corrupt), 2 fresh" in capsys.readouterr().out
    # Alone in its batch now, so equal but for the rounding of float16.
    torch.testing.assert_close(read_sidecar(root / "sub/c.img_sdxl")[0]["latent"], latent, rtol=2e-3, atol=2e-3)


def test_foreign_sidecar_is_kept_until_overwrite(cache, root, capsys):
    save_file({"latent": torch.ones(4, 8, 8)}, root / "a.img_sdxl")
    assert cache() == 0
    assert "1 foreign kept" in capsys.readouterr().out and read_header(root / "a.img_sdxl").foreign
    assert cache("--overwrite") == 0
    assert "3 encoded" in capsys.readouterr().out and not read_header(root / "a.img_sdxl").foreign


# Files and folders of others


@pytest.mark.parametrize(
    "content", [b'{"a": 1}', b"{}", b"PK\3\4\x14\0\0\0\x08\0", b"\x93NUMPY\1\0v\0{'descr'", b"\xff\xd8"]
)
@pytest.mark.parametrize("argv", [(), ("--overwrite",)])
def test_file_that_was_never_a_sidecar_is_named_and_kept(cache, root, content, argv, capsys):
    (root / "a.json").write_bytes(content)
    assert cache("--cache_suffix", ".json", *argv) == 1
    assert (root / "a.json").read_bytes() == content
    assert f"{root / 'a.json'}: is some other file, no sidecar; delete it" in capsys.readouterr().err
    assert (root / "b.json").exists()


def test_any_piece_or_flipped_bit_of_a_sidecar_is_still_known_as_one(tmp_path):
    write_sidecar(tmp_path / "a", {"latent": torch.ones(4, 2, 2)}, {"kind": "img_sdxl"})
    data = (tmp_path / "a").read_bytes()
    damaged = [data[:size] for size in (0, *range(3, 40), len(data) - 1)] + [bytes(len(data)), bytes(5)]
    damaged += [bytes([*data[:i], data[i] ^ bit, *data[i + 1 :]]) for i in range(60) for bit in (1, 128)]
    for content in damaged:
        (tmp_path / "a").write_bytes(content)
        assert not is_of_others(tmp_path / "a"), content[:20]


def test_read_only_folder_in_which_all_is_fresh_is_no_error(cache, root, monkeypatch, capsys):
    save_pictures(root, ["small.png"], size=(32, 32))  # enlarged, so it is listed
    assert cache() == 0

    def read_only(path, data):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    for module in (buckets, sidecar):
        monkeypatch.setattr(module, "atomic_write", read_only)
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: read_only(path, None))  # of no file, too
    for change in (lambda: None, lambda: touch(root / "a.png")):
        change()
        capsys.readouterr()
        assert cache() == 0
        output = capsys.readouterr()
        assert "0 encoded, 4 fresh" in output.out and output.err == ""
    os.unlink(root / f"_upscaled{SUFFIX}.txt")
    assert cache() == 0
    output = capsys.readouterr()
    assert "warning: upscaled images are not listed: " in output.err and "are listed in" not in output.out
    os.unlink(root / "small.png")
    assert cache() == 0 and "not listed" not in capsys.readouterr().err


def test_folder_that_cannot_be_written_is_found_out_before_anything_is_encoded(cache, root, monkeypatch, capsys):
    real_access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != str(root / "sub") and real_access(path, mode))
    assert cache() == 1 and list(sidecars(root, SUFFIX)) == ["a", "b"]
    assert f"{root / 'sub/c.webp'}: its sidecar cannot be written" in capsys.readouterr().err
    monkeypatch.setattr(image_run_load, "load_vae", lambda *_: pytest.fail("nothing can be written"))
    assert cache() == 1 and "0 encoded, 2 fresh, 1 failed" in capsys.readouterr().out


# What goes wrong


def test_bad_images_are_named_and_the_rest_is_cached(cache, root, capsys):
    jpeg = io.BytesIO()
    Image.fromarray(picture(96, 96)).save(jpeg, "JPEG", quality=95)
    for percent in range(0, 100, 5):
        (root / f"cut{percent:02}.jpg").write_bytes(jpeg.getvalue()[: len(jpeg.getvalue()) * percent // 100])
    (root / "text.jpg").write_text("not an image")
    (root / "bomb.png").write_bytes(png_that_claims(60000, 60000))
    assert cache() == 1
    errors = capsys.readouterr().err
    bad = [f"cut{percent:02}" for percent in range(0, 100, 5)] + ["text", "bomb"]
    for stem in bad:
        assert f"{stem}." in errors and not (root / f"{stem}.img_sdxl").exists()
    assert list(sidecars(root, SUFFIX)) == ["a", "b", "sub/c"]
    assert "22 failed" in errors


def png_that_claims(width, height):
    import struct
    import zlib

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_wrong_extension_is_no_obstacle(cache, root):
    (root / "a.png").rename(root / "really_a_png.jpg")
    assert cache() == 0 and "really_a_png" in sidecars(root, SUFFIX)


def test_two_images_of_one_stem_are_reported_and_the_first_is_cached(cache, root, capsys):
    save_pictures(root, ["a.jpg"])
    assert cache() == 1
    errors = capsys.readouterr().err
    assert "a.png" in errors and "a.jpg" in errors
    assert read_header(root / "a.img_sdxl").metadata["source_size"] == str((root / "a.jpg").stat().st_size)


def test_scan_finds_images_only_in_a_fixed_order(tmp_path):
    names = ["b.JPG", "a.png", "z/a.webp", "m/n/x.gif", ".hidden/a.png", ".a.png", "_null_caption.png", "a.txt"]
    for name in [*names, "a.img_sdxl", "notes.md"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    pairs = walk.find_images([tmp_path, tmp_path], None)
    found = [Path(pair.image).relative_to(tmp_path).as_posix() for pair in pairs]
    assert found == ["a.png", "b.JPG", "m/n/x.gif", "z/a.webp"]


def test_temporary_files_of_dead_runs_are_removed_and_of_live_ones_kept(cache, root):
    own, me = temporary_path(root / "a.img_sdxl"), f"~{os.getpid()}~"
    gone, elsewhere, silent = (
        root / own.name.replace(me, f"~{2**22 + 1}~"),  # Linux gives no number as high
        root / own.name.replace(os.uname().nodename, "another-machine"),
        root / own.name.replace(os.uname().nodename, "a-third-machine"),
    )
    other = root / ".notes.tmp"
    for path in (own, gone, elsewhere, silent, other):
        path.write_text("half")
    for path in (silent, other):
        os.utime(path, (time.time() - 7200,) * 2)
    cache()
    assert sorted(root.glob(".*")) == sorted([own, elsewhere, other])


def test_dead_worker_ends_the_run_with_its_reason(cache, root, monkeypatch):
    monkeypatch.setattr(images.ImageFiles, "__getitem__", lambda self, index: os._exit(9))
    with pytest.raises(OSError, match="num_workers"):
        cache("--num_workers", 1)


def test_interrupt_leaves_only_whole_sidecars(model, tmp_path_factory, tmp_path):
    save_pictures(tmp_path, [f"{i:02}.png" for i in range(24)])
    folder = tmp_path_factory.mktemp("outside") / "patch"
    command = [sys.executable, REPO / "cache/create_img_sdxl.py", "--data_root", tmp_path, "--model", model]
    process = subprocess.Popen(
        [*command, "--batch_size", "1", "--resolution", "192"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=waiting_at(tmp_path / "12.png", folder),
    )
    pipe = None
    while process.poll() is None and not (pipe and sidecars(tmp_path, SUFFIX)):
        with suppress(OSError):  # nobody reads it yet
            pipe = pipe or os.open(folder / "pipe", os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal's Ctrl-C: to the workers too
    os.close(pipe)
    errors = process.communicate()[1]
    assert process.returncode == 130, errors
    assert "stopped; run again to continue" in errors and "Traceback" not in errors
    written = sidecars(tmp_path, SUFFIX)
    assert 0 < len(written) <= 12 and not list(tmp_path.glob(".*"))
    for name in written:
        read_sidecar(tmp_path / f"{name}{SUFFIX}")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--resolution", "500"), "steps of 64"),
        (("--target_width", "64"), "go together"),
        (("--target_width", "64", "--target_height", "60"), "from 8 to 8192 in steps of 8, got 60"),
        (("--resolution", "64", "--target_width", "64", "--target_height", "64"), "not both"),
        (("--cache_suffix", ".txt"), "expected a suffix"),
        (("--cache_suffix", ".256.jpg"), "expected a suffix"),
        (("--cache_suffix", ".txt_clipl"), "is the suffix of other caches"),
        (("--batch_size", "0"), "expected a whole number from 1 to 65536, got 0"),
    ],
)
def test_senseless_options_are_refused(root, argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        run_script("cache/create_img_sdvae.py", "--data_root", root, *argv)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_empty_or_missing_data_root_is_an_error(cache, model, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder, message in (("empty", "no images under"), ("absent", "no such directory")):
        with pytest.raises(ValueError, match=message):
            run_script("cache/create_img_sdvae.py", "--data_root", tmp_path / folder, "--model", model)


def test_repository_code_runs_only_with_custom(root, tmp_path):
    canary = tmp_path / "canary"
    model = make_custom_pipeline(tmp_path / "model", canary)
    run = ["cache/create_img_sdxl.py", "--data_root", root, "--model", model, "--resolution", 64, "--num_workers", 0]
    assert run_script(*run) == 0 and not canary.exists()
    plain = read_sidecar(root / "a.img_sdxl")
    assert run_script(*run, "--custom") == 0 and canary.exists()
    tensors, header = read_sidecar(root / "a.img_sdxl")
    assert torch.equal(tensors["latent"], plain[0]["latent"])
    assert header.metadata["encoder"] != plain[1].metadata["encoder"]
    before = sidecars(root, SUFFIX)
    (model / "pipeline.py").write_text((model / "pipeline.py").read_text() + "\n# edited\n")
    assert run_script(*run, "--custom") == 0 and len(changed(before, sidecars(root, SUFFIX))) == 3
