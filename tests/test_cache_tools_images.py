"""cache/show_vae_latent.py, validate_img_cache.py, validate_vae.py: what they show is what the VAE gives."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from cache_fixtures import picture, save_pictures
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from helpers import TINY, run_script
from PIL import Image, ImageOps
from safetensors.torch import save_file
from skimage.metrics import peak_signal_noise_ratio

from cachetrain.caching.inspect import previews
from cachetrain.data.sidecar import read_sidecar, write_sidecar
from cachetrain.sampling.render import grid

torch.set_num_threads(1)
MODEL = TINY / "vae"
VAE = ("--model", MODEL, "--vae")
NAMES = [f"{index:05}" for index in range(6)]


@pytest.fixture(scope="module")
def vae():
    return AutoencoderKL.from_pretrained(MODEL, torch_dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def another_vae(tmp_path_factory, vae):
    """The tiny VAE with other weights at the decoder's entry."""
    directory = tmp_path_factory.mktemp("models") / "another"
    other = AutoencoderKL.from_pretrained(MODEL, torch_dtype=torch.float32)
    with torch.no_grad():
        other.decoder.conv_in.weight.copy_(other.decoder.conv_in.weight.flip(1))
    other.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """Six drawn shapes, two of them in a sub-folder, with .img_sdxl sidecars that hold latent and latent_flip."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    assert run_script("dataset_scripts/draw_shapes.py", "--out", root, "--num_images", 6) == 0
    (root / "sub").mkdir()
    for name in NAMES[4:]:
        (root / f"{name}.png").rename(root / f"sub/{name}.png")
    cache(root, "--flip")
    return root


@pytest.fixture
def root(cached, tmp_path):
    """A copy of `cached` to change."""
    return shutil.copytree(cached, tmp_path / "root")


def cache(root, *argv, resolution=("--resolution", 64), script="cache/create_img_sdxl.py"):
    assert run_script(script, "--data_root", root, *VAE, "--num_workers", 0, *resolution, *argv) == 0


def tamper(path, change):
    """Replaces a sidecar's latent by change(latent); header and hashes are those of a good sidecar."""
    tensors, header = read_sidecar(path)
    write_sidecar(path, tensors | {"latent": change(tensors["latent"])}, header.metadata)


@torch.no_grad()
def decoded(vae, path, name="latent"):
    """Pixels of one sidecar, written independently of the package."""
    sample = vae.decode(read_sidecar(path)[0][name].float()[None]).sample[0]
    return np.rint((sample.clamp(-1, 1).numpy().transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)


def assert_same_picture(path, pixels):
    """Equal to one level: batches of another size round differently."""
    found = np.asarray(Image.open(path))
    assert found.shape == pixels.shape and np.abs(found.astype(int) - pixels).max() <= 1


def files_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def table(output):
    """name without folders and suffix -> PSNR, of the lines `  36.50  path`."""
    return {name: float(value) for value, name in re.findall(r"^ *(-?[\d.]+|inf)  .*?([^/\n]+)\.\w+$", output, re.M)}


def holds(sheet, pixels):
    """Whether an array [h, w, 3] lies somewhere in a larger one, to one level."""
    h, w = pixels.shape[:2]
    sheet, pixels = sheet.astype(np.int16), pixels.astype(np.int16)
    corner = np.abs(sheet[: len(sheet) - h + 1, : sheet.shape[1] - w + 1] - pixels[0, 0]).max(-1) <= 1
    return any(np.abs(sheet[y : y + h, x : x + w] - pixels).max() <= 1 for y, x in np.argwhere(corner))


# What the pictures show


def test_previews_are_the_decoded_latents_in_the_sub_folders_of_their_sidecars(cached, vae, tmp_path, capsys):
    assert run_script("cache/show_vae_latent.py", *VAE, cached, "--out", tmp_path / "out") == 0
    sidecars = [*(f"{name}.img_sdxl" for name in NAMES[:4]), *(f"sub/{name}.img_sdxl" for name in NAMES[4:])]
    assert files_of(tmp_path / "out") == [f"{name}.png" for name in sidecars]
    for name in sidecars:
        assert_same_picture(tmp_path / "out" / f"{name}.png", decoded(vae, cached / name))
    output = capsys.readouterr()
    assert "6 of 6 latents decoded" in output.out and "warning" not in output.err


def test_flip_shows_the_latent_of_the_mirrored_image(cached, vae, tmp_path):
    assert run_script("cache/show_vae_latent.py", *VAE, cached / "00001.img_sdxl", "--out", tmp_path, "--flip") == 0
    assert files_of(tmp_path) == ["00001.img_sdxl.flip.png"]
    assert_same_picture(tmp_path / "00001.img_sdxl.flip.png", decoded(vae, cached / "00001.img_sdxl", "latent_flip"))
    mirrored = np.asarray(Image.open(cached / "00001.png").convert("RGB"))[:, ::-1]
    shown = np.asarray(Image.open(tmp_path / "00001.img_sdxl.flip.png"))
    assert peak_signal_noise_ratio(mirrored, shown) > 30


def test_sidecars_of_one_name_get_a_picture_each(tmp_path, monkeypatch, capsys):
    for folder in ("one/data", "two/data"):
        save_pictures(tmp_path / folder, ["a.png"], (64, 64))
        cache(tmp_path / folder)
    cache(tmp_path / "one/data", script="cache/create_img_sdvae.py")
    monkeypatch.chdir(tmp_path)
    paths = [tmp_path / "one/data", tmp_path / "two/data", "one/data/a.img_sdxl"]
    assert run_script("cache/show_vae_latent.py", *VAE, *paths, "--out", tmp_path / "out") == 0
    assert "3 of 3 latents decoded" in capsys.readouterr().out  # the one that is named twice counts once
    expected = ["one/data/a.img_sdvae.png", "one/data/a.img_sdxl.png", "two/data/a.img_sdxl.png"]
    assert files_of(tmp_path / "out") == expected
    only = ("--cache_suffix", ".img_sdvae")
    assert run_script("cache/show_vae_latent.py", *VAE, *paths[:2], "--out", tmp_path / "only", *only) == 0
    assert files_of(tmp_path / "only") == expected[:1]


def test_latents_of_different_sizes_are_shown_in_files_and_on_the_sheet(vae, tmp_path):
    sizes = {"wide": (192, 128), "tall": (128, 192), "square": (128, 128), "other": (192, 128)}
    for seed, (name, size) in enumerate(sizes.items()):
        (tmp_path / name).mkdir()
        Image.fromarray(picture(*size, seed)).save(tmp_path / name / "a.png")
        cache(tmp_path / name, resolution=("--target_width", size[0], "--target_height", size[1]))
    folders = [tmp_path / name for name in sizes]
    run = ["cache/show_vae_latent.py", *VAE, *folders, "--batch_size", 2]
    assert run_script(*run, "--out", tmp_path / "out") == 0
    assert run_script(*run, "--sheet", tmp_path / "sheet.png") == 0
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    for name in sizes:
        pixels = decoded(vae, tmp_path / name / "a.img_sdxl")
        assert_same_picture(tmp_path / "out" / name / "a.img_sdxl.png", pixels)
        assert holds(sheet, pixels)


def test_sheet_reduces_large_pictures(tmp_path):
    save_file({"latent": torch.zeros(4, 64, 48)}, tmp_path / "large.img_sdxl")
    assert run_script("cache/show_vae_latent.py", *VAE, tmp_path, "--sheet", tmp_path / "sheet.png") == 0
    assert Image.open(tmp_path / "sheet.png").width == 256 * 48 // 64 + 12


def test_sheet_shows_36_by_default_and_a_random_choice_keeps_its_order(tmp_path, capsys):
    latent = torch.zeros(4, 8, 8)
    for index in range(40):
        write_sidecar(tmp_path / f"{index:02}.img_sdxl", {"latent": latent}, {"kind": "img_sdxl"})
    sheet = tmp_path / "sheet.png"
    assert run_script("cache/show_vae_latent.py", *VAE, tmp_path, "--sheet", sheet) == 0
    assert "36 of 40" in capsys.readouterr().out
    assert Image.open(sheet).width == 6 * (128 + 6) + 6  # columns of 64 pixels shown twice as large
    assert run_script("cache/show_vae_latent.py", *VAE, tmp_path, "--out", tmp_path / "out", "--num_images", 3) == 0
    assert "3 of 40" in capsys.readouterr().out


def test_sheet_gives_long_names_their_own_lines():
    name = "a/path/without/any/space/" + "x" * 60
    label = grid([Image.new("RGB", (128, 128))], [name], 1)
    plain = grid([Image.new("RGB", (128, 128))], ["a"], 1)
    assert label.width == plain.width and label.height >= plain.height + 3 * 14
    pair = np.asarray(grid([Image.new("RGB", (128, 128), "white")] * 2, [name, ""], 2))
    assert (pair[:, :128] < 128).any() and (pair[:, 136:] == 255).all()  # nothing reaches into the next column


# Which VAE


def test_a_cache_of_another_vae_is_warned_of_in_one_line(cached, another_vae, tmp_path, capsys):
    run = ["cache/show_vae_latent.py", "--model", another_vae, "--vae", cached, "--out", tmp_path]
    assert run_script(*run) == 0
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and "another VAE" in errors[0] and str(MODEL) in errors[0]
    assert len(files_of(tmp_path)) == 6


def test_fingerprint_of_a_custom_pipeline_is_not_compared(root, tmp_path, capsys):
    for folder, settings in (("one", {"custom": True}), ("two", {})):
        (tmp_path / folder).mkdir()
        tensors, header = read_sidecar(root / "00000.img_sdxl")
        header.metadata.update(encoder="other", settings=json.dumps(settings))
        write_sidecar(tmp_path / folder / "a.img_sdxl", tensors, header.metadata)
        assert run_script("cache/show_vae_latent.py", *VAE, tmp_path / folder, "--out", tmp_path / "out") == 0
        assert ("another VAE" in capsys.readouterr().err) == (folder == "two")


def test_foreign_sidecars_are_decoded_without_a_warning(root, vae, tmp_path, capsys):
    latent = read_sidecar(root / "00000.img_sdxl")[0]["latent"]
    save_file({"latent": latent}, tmp_path / "foreign.img_sdxl", {"format": "pt", "settings": "not ours"})
    assert run_script("cache/show_vae_latent.py", *VAE, tmp_path / "foreign.img_sdxl", "--out", tmp_path / "out") == 0
    assert_same_picture(tmp_path / "out/foreign.img_sdxl.png", decoded(vae, root / "00000.img_sdxl"))
    assert "warning" not in capsys.readouterr().err


@torch.no_grad()
def test_other_autoencoders_decode(tmp_path):
    tiny = AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                           num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), latent_channels=4)  # fmt: skip
    deep = AutoencoderDC(
        latent_channels=4, attention_head_dim=4,
        encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
    )  # fmt: skip
    for index, vae in enumerate((tiny.eval(), deep.eval())):
        vae.save_pretrained(tmp_path / f"vae{index}")
        latent = torch.randn(vae.config.latent_channels, 8, 16, generator=torch.Generator().manual_seed(0))
        save_file({"latent": latent}, tmp_path / f"{index}.img_sdxl")
        run = [
            "cache/show_vae_latent.py",
            "--model",
            tmp_path / f"vae{index}",
            "--vae",
            tmp_path / f"{index}.img_sdxl",
        ]
        assert run_script(*run, "--out", tmp_path) == 0
        sample = vae.decode(latent[None]).sample[0].clamp(-1, 1).numpy().transpose(1, 2, 0)
        assert_same_picture(tmp_path / f"{index}.img_sdxl.png", np.rint((sample + 1) * 127.5).astype(np.uint8))
        Image.fromarray(picture(64, 64)).save(tmp_path / "a.png")
        run = [
            "cache/validate_vae.py",
            "--model",
            tmp_path / f"vae{index}",
            "--vae",
            tmp_path / "a.png",
            "--resolution",
            64,
        ]
        assert run_script(*run) == 0


def test_suffixes_that_are_there_are_found_and_one_that_is_asked_for_is_all(root, tmp_path, capsys):
    for path in (root / "sub").glob("*.img_sdxl"):
        path.rename(path.with_suffix(".img_mine"))
    assert run_script("cache/show_vae_latent.py", *VAE, root, "--out", tmp_path / "all") == 0
    assert [name.split(".")[1] for name in files_of(tmp_path / "all")] == [*["img_sdxl"] * 4, *["img_mine"] * 2]
    validate = ["cache/validate_img_cache.py", *VAE, "--data_root", root]
    assert run_script(*validate) == 0 and "of 6 cached" in capsys.readouterr().out
    assert run_script(*validate, "--cache_suffix", ".img_mine") == 0 and "of 2 cached" in capsys.readouterr().out


def test_an_image_is_enlarged_only_if_asked(tmp_path, capsys):
    for name, side in (("large", 512), ("small", 150), ("tiny", 40)):
        Image.fromarray(picture(side + 9, side)).save(tmp_path / f"{name}.png")
    run = ["cache/validate_vae.py", *VAE, *(tmp_path / f"{name}.png" for name in ("large", "small", "tiny"))]
    assert run_script(*run) == 1
    out = capsys.readouterr()
    assert "large.png\n" in out.out and "small.png  (128x128)\n" in out.out
    assert "tiny.png: is 49x40; to enlarge it, pass --resolution" in out.err
    assert run_script(*run, "--resolution", 192) == 0
    assert "at 192x192" in (out := capsys.readouterr().out) and "(128x128)" not in out


# What goes wrong


def test_sidecars_that_cannot_be_decoded_are_named_and_the_rest_is_done(root, tmp_path, capsys):
    good = (root / "00000.img_sdxl").read_bytes()
    (root / "00000.img_sdxl").write_bytes(good[:-7])
    (root / "00001.img_sdxl").write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    tamper(root / "00002.img_sdxl", lambda latent: torch.zeros(16, 8, 8))
    tamper(root / "00003.img_sdxl", lambda latent: torch.full_like(latent, float("nan")))
    save_file({"emb": torch.zeros(3, 8)}, root / "sub/00004.img_sdxl")
    assert run_script("cache/show_vae_latent.py", *VAE, root, "--out", tmp_path / "out") == 1
    assert files_of(tmp_path / "out") == ["sub/00005.img_sdxl.png"]
    output = capsys.readouterr()
    lines = sorted(output.err.splitlines())
    reasons = [
        "header expects",
        "SHA-256",
        r"\[16, 8, 8\].*wants \[4, h, w\]",
        "not finite",
        "has no latent, only emb",
    ]
    assert len(lines) == 5 and "1 of 6 latents decoded, 5 failed" in output.out
    for name, reason in zip(NAMES, reasons, strict=False):
        (line,) = (line for line in lines if name in line)
        assert re.search(reason, line) and line.count(f"{name}.img_sdxl") == 1
    assert run_script("cache/show_vae_latent.py", *VAE, root / "00000.img_sdxl", "--sheet", tmp_path / "x.png") == 1
    assert run_script("cache/validate_img_cache.py", *VAE, "--data_root", root) == 1
    assert "1 image of 6 cached, 0 stale, 5 failed" in capsys.readouterr().out


def test_missing_latent_flip_names_the_command_that_makes_it(root, tmp_path, capsys):
    cache(root, "--overwrite")
    assert run_script("cache/show_vae_latent.py", *VAE, root, "--out", tmp_path, "--flip") == 1
    assert "00000.img_sdxl: has no latent_flip, only latent; run the image cache script with --flip" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("script", "argv", "message"),
    [
        ("cache/show_vae_latent.py", ("x",), "one of the arguments --out --sheet is required"),
        ("cache/show_vae_latent.py", ("x", "--sheet", "a.jpg"), "ends with .png"),
        (
            "cache/show_vae_latent.py",
            ("x", "--out", "a", "--num_images", "-1"),
            "a whole number from 0 to 1000000000, got -1",
        ),
        ("cache/validate_vae.py", ("x", "--resolution", "72"), "steps of 64"),
        ("cache/validate_vae.py", ("x", "--resolution", "4096"), "64 to 2048"),
    ],
)
def test_senseless_options_are_refused(script, argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        run_script(script, *VAE, *argv)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_folders_without_what_is_looked_for_are_an_error(tmp_path):
    for argv in (
        ["cache/show_vae_latent.py", tmp_path, "--out", tmp_path],
        ["cache/validate_img_cache.py", "--data_root", tmp_path],
    ):
        with pytest.raises(ValueError, match=r"\.img_sdvae or \.img_sdxl under .*run an image cache script first"):
            run_script(*argv, *VAE)
    with pytest.raises(ValueError, match="no images under"):
        run_script("cache/validate_vae.py", *VAE, tmp_path)


# A cache against its images


def test_psnr_is_scikit_images():
    a, b = picture(64, 48, 0), picture(64, 48, 1)
    assert previews.psnr(a, b) == pytest.approx(peak_signal_noise_ratio(a, b), abs=1e-4)
    near = a.copy()
    near[0, 0, 0] ^= 1
    assert previews.psnr(a, near) == pytest.approx(peak_signal_noise_ratio(a, near), abs=1e-4)
    with np.errstate(all="raise"):
        assert previews.psnr(a, a) == float("inf")


def test_good_cache_has_the_psnr_of_its_vae(cached, vae, capsys):
    assert run_script("cache/validate_img_cache.py", *VAE, "--data_root", cached, "--min_psnr", 30) == 0
    output = capsys.readouterr().out
    expected = {}
    for name in NAMES:
        (image,) = cached.rglob(f"{name}.png")
        source = np.asarray(Image.open(image).convert("RGB"))
        expected[name] = peak_signal_noise_ratio(source, decoded(vae, image.with_suffix(".img_sdxl")))
    assert table(output) == pytest.approx(expected, abs=0.02)
    values = list(expected.values())
    mean, median = sum(values) / 6, np.median(values)
    line = re.search(r"mean (\S+) dB, median (\S+), min (\S+) over 6 images of 6 cached, 0 stale, 0 failed", output)
    assert [float(value) for value in line.groups()] == pytest.approx([mean, median, min(values)], abs=0.02)


@pytest.mark.parametrize(
    "change",
    [
        lambda latent: latent.roll(1, -1),
        lambda latent: latent.roll(-1, -2),
        lambda latent: latent.rot90(1, (1, 2)),
        lambda latent: latent * 0.18215,
    ],
    ids=["right by a cell", "up by a cell", "rotated", "scaling_factor applied"],
)
def test_changed_latent_is_the_worst_and_below_the_limit(root, change, capsys):
    tamper(root / "sub/00004.img_sdxl", change)
    assert run_script("cache/validate_img_cache.py", *VAE, "--data_root", root, "--min_psnr", 30) == 1
    output = capsys.readouterr().out
    values = table(output)
    assert next(iter(values)) == "00004" and values["00004"] < 26 and min(list(values.values())[1:]) > 30
    assert "1 of 6 below 30 dB" in output and "delete these sidecars and run the cache script again" in output


def test_latents_of_each_others_images_are_found_and_shown(root, vae, tmp_path, capsys):
    first, second = (read_sidecar(root / f"{name}.img_sdxl")[0]["latent"] for name in NAMES[:2])
    tamper(root / "00000.img_sdxl", lambda _: second)
    tamper(root / "00001.img_sdxl", lambda _: first)
    sheet = tmp_path / "sheet.png"
    assert (
        run_script("cache/validate_img_cache.py", *VAE, "--data_root", root, "--min_psnr", 30, "--sheet", sheet) == 1
    )
    values = table(capsys.readouterr().out)
    assert (
        set(list(values)[:2]) == {"00000", "00001"} and sorted(values.values())[1] < 20 < sorted(values.values())[2]
    )
    # The worst row comes first, 64 pixels shown twice as large: source, decoded, four times the difference.
    worst = next(iter(values))
    top = np.asarray(Image.open(sheet))[: 2 * 128]
    source = np.asarray(Image.open(root / f"{worst}.png").convert("RGB"))
    pixels = decoded(vae, root / f"{worst}.img_sdxl")
    difference = np.minimum(4 * np.abs(source.astype(int) - pixels), 255)
    for expected, tolerance in ((source, 0), (pixels, 1), (difference, 4)):
        assert holds((top // (tolerance or 1)), (expected // (tolerance or 1)).repeat(2, 0).repeat(2, 1))


def test_wrong_vae_is_below_the_limit_everywhere_and_warned_of(cached, another_vae, capsys):
    argv = ["cache/validate_img_cache.py", "--model", another_vae, "--vae", "--data_root", cached, "--min_psnr", 30]
    assert run_script(*argv) == 1
    output = capsys.readouterr()
    assert max(table(output.out).values()) < 26 and "6 of 6 below 30 dB" in output.out
    assert "If all of them are, --model has another VAE" in output.out and "another VAE" in output.err


def test_vae_of_another_reduction_is_named_for_each_sidecar(cached, tmp_path, capsys):
    blocks = ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3
    AutoencoderKL(
        down_block_types=blocks[0], up_block_types=blocks[1], block_out_channels=(8, 8, 8), norm_num_groups=4
    ).save_pretrained(tmp_path / "vae")
    argv = ["cache/validate_img_cache.py", "--model", tmp_path / "vae", "--vae", "--data_root", cached]
    assert run_script(*argv) == 1
    output = capsys.readouterr()
    assert output.err.count("decodes to 32x32 pixels, was made from 64x64") == 6
    assert "no image compared of 6 cached, 0 stale, 6 failed" in output.out


def test_geometry_is_repeated_from_the_header(cached, tmp_path, capsys):
    """A drawn shape, stored rotated with the EXIF entry that undoes it, cut out in two shapes."""
    drawn = Image.open(cached / "00001.png").convert("RGB").resize((256, 256), Image.Resampling.LANCZOS)
    exif = Image.Exif()
    exif[0x0112] = 6
    for folder, size in (("wide", (192, 128)), ("tall", (128, 192))):
        (tmp_path / folder).mkdir()
        drawn.rotate(90).save(tmp_path / folder / "a.jpg", quality=95, exif=exif)
        cache(tmp_path / folder, resolution=("--target_width", size[0], "--target_height", size[1]))
    argv = ["--data_root", tmp_path / "wide", "--data_root", tmp_path / "tall", "--sheet", tmp_path / "sheet.png"]
    assert run_script("cache/validate_img_cache.py", *VAE, *argv, "--min_psnr", 25) == 0
    assert "over 2 images of 2 cached" in capsys.readouterr().out
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    for size in ((192, 128), (128, 192)):
        upright = ImageOps.exif_transpose(Image.open(tmp_path / "wide/a.jpg"))
        upright = np.asarray(ImageOps.fit(upright, size, Image.Resampling.BICUBIC))
        assert holds(sheet, upright)


def test_changed_source_is_named_as_stale_and_not_compared(root, capsys):
    shutil.copy(root / "00001.png", root / "00000.png")
    assert run_script("cache/validate_img_cache.py", *VAE, "--data_root", root, "--min_psnr", 30) == 0
    output = capsys.readouterr().out
    assert re.search(r"00000\.img_sdxl: stale.*run the cache script again", output)
    assert "00000" not in table(output) and "over 5 images of 6 cached, 1 stale, 0 failed" in output


def test_foreign_sidecar_is_compared_with_the_center_crop_of_its_size(root, capsys):
    for name in NAMES[:2]:
        save_file({"latent": read_sidecar(root / f"{name}.img_sdxl")[0]["latent"]}, root / f"{name}.img_sdxl")
    shutil.copy(root / "00002.png", root / "00001.png")
    assert run_script("cache/validate_img_cache.py", *VAE, "--data_root", root, "--min_psnr", 30) == 1
    values = table(capsys.readouterr().out)
    assert values["00000"] > 30 and values["00001"] < 20


def test_num_images_compares_a_random_subset(cached, capsys):
    argv = ["cache/validate_img_cache.py", *VAE, "--data_root", cached, "--num_images", 2]
    subsets = set()
    for seed in range(8):
        assert run_script(*argv, "--seed", seed) == 0
        output = capsys.readouterr().out
        assert "over 2 images of 6 cached" in output
        subsets.add(tuple(sorted(table(output))))
    assert len(subsets) > 2
    assert run_script(*argv[:-1], 0) == 0 and "over 6 images" in capsys.readouterr().out


def test_every_image_below_the_limit_is_named(tmp_path, capsys):
    save_pictures(tmp_path, [f"{index:02}.png" for index in range(12)], (64, 64))
    cache(tmp_path)
    argv = ["cache/validate_img_cache.py", *VAE, "--data_root", tmp_path]
    assert run_script(*argv) == 0 and len(table(capsys.readouterr().out)) == 10
    assert run_script(*argv, "--min_psnr", 99) == 1 and len(table(capsys.readouterr().out)) == 12


# A VAE alone


@torch.no_grad()
def test_validate_vae_measures_the_round_trip_and_shows_it(vae, tmp_path, capsys):
    save_pictures(tmp_path / "photos", ["a.png", "sub/b.png"], (160, 140))
    Image.fromarray(picture(150, 200, 5)).save(tmp_path / "c.png")
    argv = [tmp_path / "c.png", tmp_path / "photos", "--resolution", 128, "--out", tmp_path / "out.png"]
    assert run_script("cache/validate_vae.py", *VAE, *argv) == 0
    output = capsys.readouterr().out
    sheet, expected = np.asarray(Image.open(tmp_path / "out.png")), {}
    for path in (tmp_path / "c.png", tmp_path / "photos/a.png", tmp_path / "photos/sub/b.png"):
        source = np.asarray(ImageOps.fit(Image.open(path), (128, 128), Image.Resampling.BICUBIC))
        latent = vae.encode(torch.tensor(source).permute(2, 0, 1)[None] / 127.5 - 1).latent_dist.mean
        sample = vae.decode(latent).sample[0].clamp(-1, 1).numpy().transpose(1, 2, 0)
        pixels = np.rint((sample + 1) * 127.5).astype(np.uint8)
        expected[path.stem] = peak_signal_noise_ratio(source, pixels)
        assert holds(sheet, source) and holds(sheet, pixels)
        difference = np.minimum(4 * np.abs(source.astype(int) - pixels), 255)
        assert holds(sheet // 8, difference // 8)
    assert table(output) == pytest.approx(expected, abs=0.02) and list(table(output)) == ["c", "a", "b"]
    mean = sum(expected.values()) / 3
    assert float(re.search(r"mean (\S+) dB.* over 3 images at 128x128", output)[1]) == pytest.approx(mean, abs=0.02)


def test_validate_vae_names_what_is_no_image_and_does_the_rest(tmp_path, capsys):
    save_pictures(tmp_path, ["a.png"], (64, 64))
    (tmp_path / "text.jpg").write_text("not an image")
    argv = [tmp_path / "absent.png", tmp_path, "--resolution", 64, "--batch_size", 1]
    assert run_script("cache/validate_vae.py", *VAE, *argv) == 1
    output = capsys.readouterr()
    assert "over 1 image" in output.out and len(output.err.splitlines()) == 2
    assert "absent.png: No such file" in output.err
    assert "text.jpg: not an image in one of the formats JPEG, PNG" in output.err


def test_validate_vae_takes_a_random_subset_of_a_folder(cached, capsys):
    argv = ["cache/validate_vae.py", *VAE, cached, "--resolution", 64, "--num_images", 2]
    subsets = set()
    for seed in range(8):
        assert run_script(*argv, "--seed", seed) == 0
        subsets.add(tuple(table(capsys.readouterr().out)))
    assert len(subsets) > 2 and {len(subset) for subset in subsets} == {2}


def test_pipelines_are_taken_as_well_as_bare_vaes(cached, tmp_path, capsys):
    (tmp_path / "model_index.json").write_text("{}")
    shutil.copytree(MODEL, tmp_path / "vae")
    config = json.loads((tmp_path / "vae/config.json").read_text())
    (tmp_path / "vae/config.json").write_text(json.dumps(config | {"_diffusers_version": "0"}))
    assert run_script("cache/show_vae_latent.py", "--model", tmp_path, cached, "--out", tmp_path / "out") == 0
    assert len(files_of(tmp_path / "out")) == 6 and "warning" not in capsys.readouterr().err
