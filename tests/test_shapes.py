"""The shapes data set and its ruler."""

import dataclasses
import math
import sys

import numpy as np
import pytest
from helpers import REPO, TINY, run_script
from PIL import Image, PngImagePlugin

sys.path.insert(0, str(REPO / "dataset_scripts"))

import draw_shapes
import score_shapes


def drawings(num_images, seed=7):
    """Returns scenes of all pairs, held-out ones included, with a drawing of each."""
    rng = np.random.default_rng(seed)
    scenes = draw_shapes.all_scenes()
    chosen = [scenes[i] for i in rng.choice(len(scenes), num_images, replace=False)]
    return [(scene, draw_shapes.draw(scene, rng)) for scene in chosen]


def share_followed(pairs):
    """Returns the share of (caption, image) pairs whose five attributes the ruler finds right."""
    return np.mean([score_shapes.judge("", image, caption).followed for caption, image in pairs])


def test_captions_round_trip():
    scenes = draw_shapes.all_scenes()
    assert len(scenes) == 3360
    assert len({scene.caption for scene in scenes}) == 3360
    assert all(draw_shapes.parse_caption(scene.caption) == scene for scene in scenes)


@pytest.mark.parametrize(
    "caption",
    ["", "a photo of a cat", "a small red circle on the left", "a small red circle on the left on a red background"],
)
def test_captions_of_other_worlds_are_refused(caption):
    with pytest.raises(ValueError, match="not a caption of this data set"):
        draw_shapes.parse_caption(caption)


def test_held_out_pairs_are_never_drawn_but_their_words_are():
    scenes = [draw_shapes.nth_image(0, index)[0] for index in range(1000)]
    assert not any((scene.shape, scene.color) in draw_shapes.HELD_OUT for scene in scenes)
    assert len(draw_shapes.TRAINED_SCENES) + len(draw_shapes.HELD_OUT_SCENES) == 3360
    assert len(draw_shapes.HELD_OUT_SCENES) == 6 * 7 * 5 * 2
    for field in dataclasses.fields(draw_shapes.Scene):
        drawn = {getattr(scene, field.name) for scene in scenes}
        assert drawn == {getattr(scene, field.name) for scene in draw_shapes.all_scenes()}


@pytest.mark.parametrize(
    ("shape", "area"),
    [("circle", math.pi), ("ring", math.pi * (1 - 0.55**2)), ("square", 1.64**2), ("triangle", 1.75)],
)
def test_shape_mask_has_the_area_of_geometry(shape, area):
    mask = np.asarray(draw_shapes.shape_mask(shape, (0.5, 0.5), 0.3)) / 255
    assert mask.sum() / (0.3 * 64) ** 2 == pytest.approx(area, rel=0.03)


def test_longer_data_set_begins_with_the_shorter_one(tmp_path):
    def run(folder, num_images):
        assert (
            run_script("dataset_scripts/draw_shapes.py", "--out", tmp_path / folder, "--num_images", num_images) == 0
        )
        return {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}

    short, long = run("short", 4), run("long", 9)
    assert set(short) < set(long)
    assert all(long[name] == content for name, content in short.items())
    assert run("short", 9) == long  # the missing five are added
    assert draw_shapes.nth_image(0, 8)[0].caption + "\n" == long["00008.txt"].decode()


def test_second_run_draws_only_what_is_missing(tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--num_images", "6"]
    assert run_script("dataset_scripts/draw_shapes.py", *arguments) == 0
    (tmp_path / "00003.txt").unlink()  # as a run killed between picture and caption leaves it
    kept = (tmp_path / "00002.png").stat().st_mtime_ns
    assert run_script("dataset_scripts/draw_shapes.py", *arguments) == 0
    assert "1 image drawn, 5 existed already" in capsys.readouterr().out
    assert (tmp_path / "00002.png").stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match="'seed': 0"):
        run_script("dataset_scripts/draw_shapes.py", *arguments, "--seed", 1)


def test_prompts_are_half_held_out_and_all_different(tmp_path):
    prompts = tmp_path / "lists" / "prompts.txt"
    arguments = ["--num_images", "0", "--prompts", str(prompts), "--num_prompts", "101"]
    assert run_script("dataset_scripts/draw_shapes.py", "--out", tmp_path / "out", *arguments) == 0
    lines = prompts.read_text().splitlines()
    assert len(set(lines)) == 101
    assert sum(draw_shapes.parse_caption(line).held_out for line in lines) == 50


def test_ruler_reads_drawings_right_and_shuffled_captions_wrong():
    pairs = [(scene.caption, image) for scene, image in drawings(300)]
    assert share_followed(pairs) >= 0.97
    captions, images = zip(*pairs, strict=True)
    assert share_followed(zip(captions[1:] + captions[:1], images, strict=True)) <= 0.02


@pytest.mark.parametrize("attribute", score_shapes.ATTRIBUTES)
def test_ruler_notices_exactly_the_wrong_attribute(attribute):
    values = sorted({getattr(scene, attribute) for scene in draw_shapes.all_scenes()})
    for scene, image in drawings(40, seed=3):
        taken = {scene.color, scene.background, getattr(scene, attribute)}
        other = next(value for value in values if value not in taken)
        judgement = score_shapes.judge("", image, dataclasses.replace(scene, **{attribute: other}).caption)
        assert [name for name, right in judgement.right.items() if not right] == [attribute]


def test_ruler_finds_no_shape_in_noise_or_plain_color():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for pixels in (noise, np.full((64, 64, 3), 128, np.uint8)):
        assert score_shapes.read_scene(Image.fromarray(pixels))["shape"] is None


def write_samples(folder):
    """Writes four right and one wrong sample, as sample.py does, with the prompt inside; and a grid without one."""
    folder.mkdir()
    scenes = [*draw_shapes.TRAINED_SCENES[:3], *draw_shapes.HELD_OUT_SCENES[:2]]
    rng = np.random.default_rng(0)
    for index, scene in enumerate(scenes):
        metadata = PngImagePlugin.PngInfo()
        prompt = draw_shapes.HELD_OUT_SCENES[-1].caption if index == 4 else scene.caption
        metadata.add_text("prompt", prompt)
        draw_shapes.draw(scene, rng).save(folder / f"{index}.png", pnginfo=metadata)
    Image.new("RGB", (200, 200)).save(folder / "grid.png")


def test_score_script_reports_and_fails_below_its_bounds(tmp_path, capsys):
    write_samples(tmp_path / "samples")
    report = tmp_path / "score.json"
    assert run_script("dataset_scripts/score_shapes.py", tmp_path, "--json", report) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == "prompt-following: 100% trained pairs, 50% held-out pairs"
    assert "left out 1 picture " in captured.err
    assert report.exists()
    assert run_script("dataset_scripts/score_shapes.py", tmp_path, "--min_trained", 90, "--min_held_out", 50) == 0
    assert run_script("dataset_scripts/score_shapes.py", tmp_path, "--min_trained", 90, "--min_held_out", 51) == 1


def test_score_script_says_so_when_there_is_nothing_to_score(tmp_path, capsys):
    assert run_script("dataset_scripts/score_shapes.py", tmp_path) == 2
    assert "found no PNG" in capsys.readouterr().err


def test_vae_reconstructions_still_show_what_was_drawn():
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(TINY / "vae", torch_dtype=torch.float32)
    scenes, images = zip(*drawings(100), strict=True)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    psnr = -10 * ((decoded - pixels) / 2).square().mean(dim=(1, 2, 3)).log10()
    assert psnr.mean() >= 31
    decoded = ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    captions = [scene.caption for scene in scenes]
    assert share_followed(zip(captions, map(Image.fromarray, decoded), strict=True)) >= 0.95
