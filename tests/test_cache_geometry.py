"""Sizes and encoders of the image cache: aspect buckets, upscaled images, posteriors, other autoencoders, dtypes."""

import shutil
from collections import Counter

import pytest
import torch
from cache_fixtures import changed, picture, save_pictures, sidecars
from diffusers import AsymmetricAutoencoderKL, AutoencoderDC, AutoencoderKL, AutoencoderKLCogVideoX, AutoencoderTiny
from helpers import run_script
from PIL import Image, ImageOps

from cachetrain.caching import buckets, summary
from cachetrain.data.sidecar import read_header, read_sidecar

SUFFIX = ".img_sdxl"
# Buckets of about 192² pixels up to 2:1: the square and both 256x128. Name -> (size, its bucket), (width, height).
PICTURES = {
    "square": ((200, 200), (192, 192)),
    "nearly": ((230, 200), (192, 192)),
    "wide": ((400, 220), (256, 128)),
    "panorama": ((900, 200), (256, 128)),
    "tall": ((150, 290), (128, 256)),
    "small": ((64, 64), (192, 192)),
}


@pytest.fixture(scope="module")
def vae(model_sd):
    return AutoencoderKL.from_pretrained(model_sd / "vae", torch_dtype=torch.float32).eval()


@pytest.fixture
def root(tmp_path):
    for seed, (name, (size, _)) in enumerate(PICTURES.items()):
        save_pictures(tmp_path / "data", [f"{name}.png"])
        Image.fromarray(picture(*size, seed)).save(tmp_path / "data" / f"{name}.png")
    return tmp_path / "data"


@pytest.fixture
def cache(model_sd, root):
    def run(*argv):
        size = () if "--resolution" in argv else ("--resolution", 192)
        return run_script(
            "cache/create_img_sdxl.py", "--data_root", root, "--model", model_sd, "--num_workers", 0, *size, *argv
        )

    return run


def fitted(path, size):
    """Float32 [1, 3, H, W] in [-1, 1], cover-resized to (width, height) by Pillow's own ImageOps.fit."""
    image = ImageOps.fit(Image.open(path), size, Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(size[1], size[0], 3)
    return pixels.permute(2, 0, 1)[None] / 127.5 - 1


# Buckets


@pytest.mark.parametrize("resolution", range(256, 2049, 64))
@pytest.mark.parametrize("limit", [1.0, 2.0, 4.0])
def test_bucket_sizes_are_multiples_of_64_of_about_the_square_within_the_limit(resolution, limit):
    sizes = buckets.bucket_sizes(resolution, limit)
    assert (resolution, resolution) in sizes and len(set(sizes)) == len(sizes)
    for width, height in sizes:
        assert width % 64 == 0 and height % 64 == 0 and (height, width) in sizes
        assert max(width, height) <= limit * min(width, height)
        # No other multiple of 64 on one of the sides comes nearer to the square's pixels.
        off = abs(width * height - resolution**2)
        assert off <= min(width, height) * 32 or off <= max(width, height) * 32
    assert (len(sizes) == 1) == (limit == 1)


def test_nearest_size_is_that_of_the_least_ratio_between_aspects():
    sizes = buckets.bucket_sizes(512, 2.0)
    for original in ((1, 1), (4, 3), (3, 4), (3, 2), (16, 9), (9, 16), (5, 1), (1, 9), (1000, 999)):
        width, height = buckets.nearest_size(original, sizes)

        def ratio(size, original=original):
            quotient = size[0] * original[1] / (size[1] * original[0])
            return max(quotient, 1 / quotient)

        assert ratio((width, height)) == pytest.approx(min(map(ratio, sizes)))


@torch.no_grad()
@pytest.mark.parametrize(("workers", "batch_size"), [(0, 2), (2, 3)])
def test_bucket_gives_each_image_the_latent_of_its_nearest_size(cache, root, vae, workers, batch_size):
    assert cache("--bucket", "--num_workers", workers, "--batch_size", batch_size) == 0
    for name, (_, (width, height)) in PICTURES.items():
        tensors, header = read_sidecar(root / f"{name}{SUFFIX}")
        assert tensors["latent"].shape == (4, height // 8, width // 8)
        assert (header.metadata["width"], header.metadata["height"]) == (str(width), str(height))
        expected = vae.encode(fitted(root / f"{name}.png", (width, height))).latent_dist.mean[0]
        torch.testing.assert_close(tensors["latent"].float(), expected, rtol=2e-3, atol=2e-3)


def test_bucket_batches_are_full_and_of_one_size(cache, root, monkeypatch):
    from cachetrain.caching import encoders

    encode, shapes = encoders.encode_posterior, []
    monkeypatch.setattr(encoders, "encode_posterior", lambda vae, x: shapes.append(tuple(x.shape)) or encode(vae, x))
    assert cache("--bucket", "--batch_size", 2) == 0
    assert Counter(shapes) == {(2, 3, 192, 192): 1, (1, 3, 192, 192): 1, (2, 3, 128, 256): 1, (1, 3, 256, 128): 1}


def test_bucket_coverage_says_how_many_and_how_much_is_cropped_also_when_all_is_fresh(cache, root, capsys):
    cropped = {}
    for size, bucket in PICTURES.values():
        scale = min(size[0] / bucket[0], size[1] / bucket[1])
        cropped.setdefault(bucket, []).append(1 - bucket[0] * bucket[1] * scale**2 / (size[0] * size[1]))
    for _ in range(2):
        assert cache("--bucket") == 0
        lines = capsys.readouterr().out.splitlines()
        rows = {row[0]: row[1:] for row in map(str.split, lines) if len(row) == 4}
        for (width, height), parts in cropped.items():
            count, share, lost = rows[f"{width}x{height}"]
            assert int(count) == len(parts)
            assert float(share.rstrip("%")) == pytest.approx(100 * len(parts) / len(PICTURES), abs=0.06)
            assert float(lost.rstrip("%")) == pytest.approx(100 * sum(parts) / len(parts), abs=0.06)
        assert int(rows["all"][0]) == len(PICTURES)


def test_turning_buckets_on_or_changing_their_limit_makes_all_again(cache, capsys):
    for argv in ((), ("--bucket",), ("--bucket", "--aspect_limit", 1.5), ("--bucket", "--resolution", 256)):
        assert cache(*argv) == 0
        assert f"{len(PICTURES)} encoded" in capsys.readouterr().out
    assert cache("--bucket", "--resolution", 256) == 0 and "0 encoded" in capsys.readouterr().out


def test_upscaled_images_are_listed_in_a_file_until_they_are_replaced(cache, root, capsys):
    listing = root / f"_upscaled{SUFFIX}.txt"
    for _ in range(2):  # made, then found fresh
        assert cache("--bucket") == 0
        assert listing.read_text() == f"{root / 'small.png'}\t64x64 -> 192x192\n"
        assert "1 image upscaled" in (output := capsys.readouterr().out) and str(listing) in output
    save_pictures(root, ["small.png"], size=(192, 192))
    assert cache("--bucket") == 0
    assert not listing.exists() and "upscaled" not in capsys.readouterr().out
    assert not [path for path in root.iterdir() if path.name.startswith(".")]


def test_it_is_said_early_that_all_images_are_upscaled(root, cache, monkeypatch, capsys):
    save_pictures(root / "small", [f"{i}.png" for i in range(5)], size=(64, 64))
    monkeypatch.setattr(summary, "_MAX_FIRST", 4)
    argv = ("--data_root", root / "small", "--overwrite", "--batch_size", 2)
    assert cache(*argv) == 0  # PICTURES come first, and are large
    assert "images so far" not in capsys.readouterr().err
    for path in root.glob("*.png"):
        path.unlink()
    assert cache("--batch_size", 2, "--overwrite") == 0
    errors = capsys.readouterr().err
    assert errors.count("all 4 images so far are smaller") == 1 and "0.png, 64x64 -> 192x192" in errors


def test_names_with_control_characters_keep_messages_and_lists_to_a_line_each(root, cache, capsys):
    shutil.rmtree(root)
    names = ["a\x1b[31m.png", "b\n.png", "c\td.png", "é.png"]
    save_pictures(root, names, size=(64, 64))
    (root / "z\x1b]0;title\x07\n.png").write_bytes(b"no image")
    save_pictures(root, ["x" * 247 + ".png"])
    assert cache() == 1
    output = capsys.readouterr()
    assert not set(map(chr, range(32))) - {"\n", "\r"} & set(output.out + output.err)
    assert r"z\x1b]0;title\x07\n.png: not an image" in output.err
    assert "xxx.png: the name of its sidecar would be too long; shorten" in output.err
    lines = (root / f"_upscaled{SUFFIX}.txt").read_text().split("\n")
    expected = [r"a\x1b[31m.png", r"b\n.png", r"c\td.png", "é.png"]
    assert lines == [f"{root}/{name}\t64x64 -> 192x192" for name in expected] + [""]


# What is stored


@torch.no_grad()
def test_store_posterior_keeps_the_logvar_beside_the_mean(cache, root, vae, capsys):
    assert cache() == 0
    assert "logvar" not in read_header(root / f"wide{SUFFIX}").shapes
    assert cache("--store_posterior") == 0
    for name in PICTURES:
        posterior = vae.encode(fitted(root / f"{name}.png", (192, 192))).latent_dist
        tensors = read_sidecar(root / f"{name}{SUFFIX}")[0]
        for stored, expected in ((tensors["latent"], posterior.mean), (tensors["logvar"], posterior.logvar)):
            torch.testing.assert_close(stored.float(), expected[0], rtol=2e-3, atol=2e-3)
    assert f"{len(PICTURES)} encoded ({len(PICTURES)} stale)" in capsys.readouterr().out


# Latents of a dtype against those of float32, relative to their standard deviation: root mean square and largest.
TOLERANCE = {"fp32": (1e-3, 4e-3), "bf16": (3e-2, 2e-1), "fp16": (4e-3, 3e-2)}


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_latents_of_each_dtype_are_those_of_float32_to_its_rounding(cache, root, vae, dtype):
    assert cache("--dtype", dtype) == 0
    expected = torch.cat([vae.encode(fitted(root / f"{name}.png", (192, 192))).latent_dist.mean for name in PICTURES])
    found = torch.stack([read_sidecar(root / f"{name}{SUFFIX}")[0]["latent"].float() for name in PICTURES])
    error = (found - expected) / expected.std()
    assert error.square().mean().sqrt() < TOLERANCE[dtype][0] and error.abs().max() < TOLERANCE[dtype][1]
    if dtype == "bf16":
        assert error.square().mean().sqrt() > TOLERANCE["fp32"][0]  # it was not float32 after all


# Other autoencoders


def kl(**config):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    small = {"block_out_channels": (8, 8, 8), "norm_num_groups": 4, "mid_block_add_attention": False}
    return AutoencoderKL(**blocks, **small, **config)


def deep():
    return AutoencoderDC(
        latent_channels=4, attention_head_dim=4, scaling_factor=0.41407,
        encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(8,) * 6, decoder_block_out_channels=(8,) * 6,
        encoder_layers_per_block=(1,) * 6, decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((),) * 6, decoder_qkv_multiscales=((),) * 6,
    )  # fmt: skip


def asymmetric():
    return AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        down_block_out_channels=(8, 8),
        norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2,
        up_block_out_channels=(8, 8),
        scaling_factor=0.5,
    )


def taesd():
    return AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    )


# name -> (VAE, latent shape at 192 x 128, scaling_factor, shift_factor)
AUTOENCODERS = {
    "16 channels, 4-fold, shifted": (
        lambda: kl(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609),
        (16, 32, 48),
        1.5305,
        0.0609,
    ),
    "AutoencoderDC, 32-fold": (deep, (4, 4, 6), 0.41407, 0),
    "AsymmetricAutoencoderKL": (asymmetric, (4, 64, 96), 0.5, 0),
    "AutoencoderTiny": (taesd, (4, 16, 24), 1, 0),
}


@torch.no_grad()
@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoder_named_in_the_config_is_used_with_its_own_shape_and_scale(root, tmp_path, name):
    make, shape, scaling_factor, shift_factor = AUTOENCODERS[name]
    torch.manual_seed(0)
    vae = make().eval()
    vae.save_pretrained(tmp_path / "vae")
    argv = ["--data_root", root, "--model", tmp_path / "vae", "--vae", "--num_workers", 0]
    assert run_script("cache/create_img_sdxl.py", *argv, "--target_width", 192, "--target_height", 128) == 0
    tensors, header = read_sidecar(root / f"wide{SUFFIX}")
    expected = vae.encode(fitted(root / "wide.png", (192, 128)), return_dict=False)[0]
    expected = expected.mean if hasattr(expected, "mean") and not isinstance(expected, torch.Tensor) else expected
    assert tensors["latent"].shape == shape
    torch.testing.assert_close(tensors["latent"].float(), expected[0], rtol=3e-3, atol=3e-3)
    assert float(header.metadata["scaling_factor"]) == scaling_factor
    assert float(header.metadata["shift_factor"]) == shift_factor


@pytest.mark.parametrize(
    ("make", "argv", "message"),
    [
        (lambda: kl(latents_mean=[0.1] * 4), (), "latents_std"),
        (
            lambda: AutoencoderKLCogVideoX(block_out_channels=(8,) * 4, norm_num_groups=4, layers_per_block=1),
            (),
            "encodes video",
        ),
        (deep, ("--target_width", 192, "--target_height", 72), "multiples of 32"),
        (taesd, ("--store_posterior",), "no posterior"),
    ],
)
def test_autoencoder_that_would_train_wrong_is_refused(root, tmp_path, make, argv, message):
    make().save_pretrained(tmp_path / "vae")
    before = sidecars(root, SUFFIX)
    size = () if "--target_width" in argv else ("--resolution", 192)
    with pytest.raises(ValueError, match=message):
        run_script(
            "cache/create_img_sdxl.py", "--data_root", root, "--model", tmp_path / "vae", "--vae", *size, *argv
        )
    assert changed(before, sidecars(root, SUFFIX)) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--aspect_limit", "3"), "needs --bucket"),
        (("--bucket", "--target_width", "64", "--target_height", "64"), "needs --resolution"),
        (("--bucket", "--aspect_limit", "0.5"), "1 to 16"),
        (("--bucket", "--aspect_limit", "nan"), "1 to 16"),
    ],
)
def test_senseless_bucket_options_are_refused(root, argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run_script("cache/create_img_sdxl.py", "--data_root", root, *argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err
