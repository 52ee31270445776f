"""Masks: from files or alpha channels to latents, what makes them stale, and the loss that they weight."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from cache_fixtures import changed, picture, save_pictures, sidecars, touch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from helpers import T5, open_pairs, refused, run_script, train
from PIL import Image, ImageOps

from cachetrain.data.batching import BatchSampler, collate
from cachetrain.data.dataset import SampleKey
from cachetrain.data.index import PairIndex
from cachetrain.data.ram import RamCache, needed_bytes
from cachetrain.data.sidecar import read_header, read_sidecar, write_sidecar
from cachetrain.modeling.conditioning import Conditioning

SUFFIX = ".img_sdxl"


@pytest.fixture(scope="module")
def cache(model_t5):
    """Runs create_img_sdxl on a folder at 96 x 64 and returns the exit code."""
    size = ["--target_width", 96, "--target_height", 64, "--num_workers", 0]
    return partial(run_script, "cache/create_img_sdxl.py", "--model", model_t5, *size, "--data_root")


def levels(seed, size):
    """A smooth mask of a size (width, height), as a Pillow image in mode L."""
    return Image.fromarray(picture(*size, seed)).getchannel("R")


def averaged(mask):
    """The latents' mask of an image in mode L, by Pillow and numpy alone: [1, 8, 12]."""
    pixels = np.asarray(ImageOps.fit(mask, (96, 64), Image.Resampling.BICUBIC), float) / 255
    return torch.tensor(pixels.reshape(8, 8, 12, 8).mean((1, 3)), dtype=torch.float32)[None]


def test_masks_are_cropped_and_resized_as_their_images_and_averaged_to_latents(cache, tmp_path):
    files, alphas = tmp_path / "files", tmp_path / "alphas"
    save_pictures(files, ["wide.png", "small.png", "none.png", "white.png"], size=(150, 90))
    tall, turned = levels(8, (70, 200)), Image.Exif()
    turned[0x0112] = 6  # stored lying, shown upright
    Image.fromarray(picture(200, 70, 3)).save(files / "turned.jpg", exif=turned)
    expected = {"wide": levels(7, (150, 90)), "small": levels(9, (75, 45)), "turned": tall}
    for name, mask in expected.items():
        mask.save(files / f"{name}.mask.png")
    Image.new("L", (150, 90), 255).save(files / "white.mask.png")
    plain = tmp_path / "plain"
    alphas.mkdir()
    plain.mkdir()
    for name in ("wide", "white"):
        image = Image.open(files / f"{name}.png")
        image.putalpha(expected.get(name, Image.new("L", image.size, 255)))
        image.save(alphas / f"{name}.png")
        white = Image.new("RGBA", image.size, "white")
        Image.alpha_composite(white, image).convert("RGB").save(plain / f"{name}.png")
    for folder, *flags in ((files, "--mask", "files", "--flip"), (alphas, "--mask", "alpha"), (plain,)):
        assert cache(folder, *flags) == 0
    for folder, name in ((files, "wide"), (files, "small"), (files, "turned"), (alphas, "wide")):
        tensors, header = read_sidecar(folder / (name + SUFFIX))
        mask = tensors["mask"]
        assert mask.shape == (1, 8, 12) and mask.dtype == torch.float16
        torch.testing.assert_close(mask.float(), averaged(expected[name]), atol=1e-3, rtol=0)
        assert float(header.metadata["mask_share"]) == pytest.approx(float(mask.float().mean()), abs=1e-4)
    for folder, name in ((files, "none"), (files, "white"), (alphas, "white")):  # nothing is left out: not stored
        assert "mask" not in read_header(folder / (name + SUFFIX)).shapes
    first, second = (read_sidecar(folder / ("wide" + SUFFIX))[0]["latent"] for folder in (plain, alphas))
    assert torch.equal(first, second)


def test_a_mask_that_changes_makes_its_image_again_and_no_other(cache, tmp_path, capsys):
    save_pictures(tmp_path, ["a.png", "b.png", "sub/c.png", "d.png"])
    for name in ("a", "b", "sub/c"):
        levels(1, (72, 64)).save(tmp_path / f"{name}.mask.png")

    def made(*flags):
        before = sidecars(tmp_path, SUFFIX)
        assert cache(tmp_path, "--mask", "files", *flags) == 0
        return changed(before, sidecars(tmp_path, SUFFIX))

    assert made() == ["a", "b", "d", "sub/c"]
    assert made() == [] and "4 fresh, 3 images masked" in capsys.readouterr().out
    levels(2, (72, 64)).save(tmp_path / "a.mask.png")
    (tmp_path / "sub/c.mask.png").unlink()
    levels(3, (72, 64)).save(tmp_path / "d.mask.png")
    assert run_script("cache/cache_status.py", "--data_root", tmp_path) == 1
    output = capsys.readouterr().out
    assert f"3 stale: a{SUFFIX}, d{SUFFIX}, sub/c{SUFFIX}" in output and "--mask files" in output
    assert "3 images masked; on average" in output and "not used" not in output
    assert made() == ["a", "d", "sub/c"] and made() == []
    touch(tmp_path / "b.mask.png")
    mtime = read_header(tmp_path / f"b{SUFFIX}").metadata["mask_mtime_ns"]
    assert made() == ["b"]  # its header only
    assert read_header(tmp_path / f"b{SUFFIX}").metadata["mask_mtime_ns"] != mtime and made("--full") == []
    before = sidecars(tmp_path, SUFFIX)
    assert cache(tmp_path) == 0 and changed(before, sidecars(tmp_path, SUFFIX)) == ["a", "b", "d", "sub/c"]


def test_mask_files_are_no_images_and_bad_ones_are_named(cache, tmp_path, capsys):
    save_pictures(tmp_path, ["a.png", "b.png", "c.png", "d.png", "e.png", "gone.mask.png", "F.MASK.PNG"])
    levels(1, (72, 64)).save(tmp_path / "a.mask.png")
    levels(1, (64, 72)).save(tmp_path / "b.mask.png")
    Image.new("LA", (72, 64), (255, 9)).save(tmp_path / "c.mask.png")
    (tmp_path / "d.mask.png").write_bytes(b"no image")
    save_pictures(tmp_path, ["link.png"])
    (tmp_path / "link.mask.png").symlink_to("moved away.png")
    assert cache(tmp_path, "--mask", "files") == 1
    output = "".join(capsys.readouterr())
    assert sorted(sidecars(tmp_path, SUFFIX)) == ["a", "e"]
    for line in (
        "{}/b.mask.png: is 64x72, its image 72x64; expected the same aspect ratio",
        "{}/c.mask.png: has transparent pixels",
        "{}/d.mask.png: not an image in one of the formats",
        "{}/link.mask.png: No such file or directory",
        "not used: 1 mask with a suffix in capitals (F.MASK.PNG), 1 mask without an image (gone.mask.png)\n",
    ):
        assert line.format(tmp_path) in output
    assert cache(tmp_path, "--overwrite") == 0
    output = "".join(capsys.readouterr())
    assert "found and not used: 6 *.mask.png (" in output and "; --mask files of the image cache scripts" in output
    assert cache(tmp_path, "--mask", "alpha") == 0
    assert "warning: --mask alpha: no image is transparent, so that nothing is masked" in "".join(capsys.readouterr())


@pytest.fixture(scope="module")
def masked(shapes, model_t5, tmp_path_factory):
    """The first 8 of the drawn shapes, cached with --flip; 6 of them have masks, all but one position of 00000."""
    data = tmp_path_factory.mktemp("masked")
    for path in [*shapes.glob("0000[0-7].*"), *shapes.glob("_null*")]:
        shutil.copy2(path, data)
    for number in range(6):
        levels(number, (64, 64)).save(data / f"0000{number}.mask.png")
    size = ["--target_width", 64, "--target_height", 64, "--num_workers", 0, "--mask", "files", "--flip"]
    assert run_script("cache/create_img_sdxl.py", "--data_root", data, "--model", model_t5, *size) == 0
    return data


FLAGS = ["--max_steps", 2, "--batch_size", 4, "--cond_dropout", 0, "--flip_p", 1, "--objective", "epsilon"]


def test_masked_loss_is_that_of_a_plain_loop_and_the_raw_loss_that_of_an_unmasked_run(
    masked, model_t5, tmp_path, capsys
):
    flags = [*FLAGS, "--unmasked_weight", 0.25, "--use_snr", "--gradient_accum", 2]
    held_out = shutil.copytree(masked, tmp_path / "held_out")
    (first, second), weights = train(masked, model_t5, tmp_path / "run", *flags, "--val_data_dir", held_out)
    assert ": 6 masks in the image caches; images without one are trained as a whole" in capsys.readouterr().out
    index = PairIndex([masked], *T5)
    scale = json.loads((model_t5 / "vae" / "config.json").read_text())["scaling_factor"]
    pairs = open_pairs(index, scale, flip_p=1.0)
    unet = UNet2DConditionModel.from_pretrained(model_t5 / "unet").train()
    ddpm = DDPMScheduler.from_pretrained(model_t5 / "scheduler")
    losses, raw, shares = [], [], []
    for keys in BatchSampler(index, 4, 0, 2):
        batch = collate([pairs[key] for key in keys], pairs.conditioning)
        assert "mask" not in batch
        masks = [read_sidecar(index.image_path(key.sample))[0].get("mask", torch.ones(1, 8, 8)) for key in keys]
        mask = torch.stack([mask.float().flip(2) for mask in masks])
        noisy = ddpm.add_noise(batch["latents"], batch["noise"], batch["timesteps"])
        hidden, text = (batch["conditioning"][f"encoder_{name}"] for name in ("hidden_states", "attention_mask"))
        with torch.no_grad():
            error = unet(noisy, batch["timesteps"], hidden, encoder_attention_mask=text).sample - batch["noise"]
        snr = compute_snr(ddpm, batch["timesteps"])
        loss = (error.square() * torch.where(mask == 1, 1.0, 0.25 + 0.75 * mask)).mean((1, 2, 3))
        losses.append(loss * snr.clamp(max=5) / snr)
        raw.append(error.square().mean((1, 2, 3)))
        shares.append(mask.mean((1, 2, 3)))
    found = [first[f"01_Training/{tag}"] for tag in ("loss", "loss_raw", "mask_share")]
    assert found == pytest.approx([float(torch.cat(part).mean()) for part in (losses, raw, shares)], rel=1e-4)
    assert 0.4 < found[2] < 0.9
    plain = [*FLAGS, "--use_snr", "--gradient_accum", 2]
    (unmasked, _), other = train(masked, model_t5, tmp_path / "plain", *plain)
    assert unmasked["01_Training/loss_raw"] == found[1] and "01_Training/mask_share" not in unmasked
    assert any(not torch.equal(weights[name], other[name]) for name in weights)
    assert "6 masks in the image caches not used: pass --unmasked_weight" in capsys.readouterr().out
    assert second["val/loss"] < second["val/loss_raw"]


def test_masks_in_memory_train_the_same_weights_and_fit_the_estimate(masked, model_t5, tmp_path):
    flags = [*FLAGS, "--unmasked_weight", 0]
    _, weights = train(masked, model_t5, tmp_path / "run", *flags)
    _, cached = train(masked, model_t5, tmp_path / "ram", *flags, "--cache_in_ram")
    assert all(torch.equal(weights[name], cached[name]) for name in weights)
    index = PairIndex([masked], *T5)
    assert 0.5 < len(RamCache(index)._data) / needed_bytes(index) < 1.1


def test_a_sidecar_with_a_mask_that_cannot_be_used_is_named(masked, shapes, model_t5, tmp_path):
    message = refused(shapes, model_t5, tmp_path / "run", "--unmasked_weight", 0.1)
    assert f"--unmasked_weight 0.1: no image cache in {shapes} holds a mask; cache the images again" in message
    data = shutil.copytree(masked, tmp_path / "data")
    path = data / f"00000{SUFFIX}"
    tensors, header = read_sidecar(path)
    write_sidecar(path, tensors | {"mask": tensors["mask"] + 1}, header.metadata)
    pairs = open_pairs(PairIndex([data], *T5), masked=True)
    sample = pairs[SampleKey(0, 0)]
    assert "its mask has values outside of 0 to 1" in sample["fault"] and sample["mask"].eq(1).all()
    assert collate([sample, pairs[SampleKey(0, 1)]], Conditioning("txt_t5cache"))["mask"].shape == (2, 1, 8, 8)
    write_sidecar(path, tensors | {"mask": torch.ones(1, 8, 9)}, header.metadata)
    with pytest.raises(ValueError, match=r"latent is \(4, 8, 8\), but mask \(1, 8, 9\)"):
        PairIndex([data], *T5)
