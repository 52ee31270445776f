"""Options that name a file to write: none replaces an image, a caption, a sidecar or another user's file."""

import json

import pytest
import torch
from helpers import TINY, load_script, run_script
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from cachetrain import outputs

VAE = ("--model", TINY / "vae", "--vae")
# Script and required arguments, the option that names a file, the suffix of that file.
OPTIONS = [
    ("dataset_scripts/check_captions.py", ("--data_root", "data"), "--html", ".html"),
    ("dataset_scripts/check_images.py", ("--data_root", "data"), "--html", ".html"),
    ("dataset_scripts/compare_captions.py", ("data", "data"), "--out", ".html"),
    ("dataset_scripts/compare_imgdirs.py", ("data", "data"), "--out", ".html"),
    ("dataset_scripts/compare_imgdirs.py", ("data", "data"), "--png", ".png"),
    ("dataset_scripts/count_tags.py", ("--data_root", "data"), "--csv", ".csv"),
    ("dataset_scripts/count_tags.py", ("--data_root", "data"), "--html", ".html"),
    ("dataset_scripts/draw_shapes.py", ("--out", "drawn", "--num_images", 0), "--prompts", ".txt"),
    ("dataset_scripts/export_captions.py", ("--data_root", "data"), "--out", ".jsonl"),
    ("dataset_scripts/score_shapes.py", ("data",), "--json", ".json"),
    ("cache/show_vae_latent.py", (*VAE, "data"), "--sheet", ".png"),
    ("cache/validate_img_cache.py", (*VAE, "--data_root", "data"), "--sheet", ".png"),
    ("cache/validate_vae.py", (*VAE, "data"), "--out", ".png"),
    ("models/export_single_file.py", ("--model", "model"), "--out", ".safetensors"),
    ("report.py", ("run",), "--out", ".html"),
    ("sample.py", ("--model", "m", "--prompt", "a", "--out", "drawn"), "--grid", ".png"),
    ("sample.py", ("--model", "m", "--prompt", "a", "--out", "drawn"), "--grid", ".webp"),
]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder with files of a user, each named after its suffix."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data"
    folder.mkdir()
    chunks = PngInfo()
    chunks.add_itxt("Software", "cachetrain")
    for suffix in (".png", ".jpg", ".webp"):
        Image.new("RGB", (8, 8)).save(folder / f"a{suffix}", pnginfo=chunks)
    texts = {
        ".txt": "a red circle",
        ".html": "<!doctype html><title>cachetrain</title>",
        ".csv": "file_name,text\na.png,a red circle\n",
        ".json": '{"caption": "a red circle"}',
        ".jsonl": '{"file_name": "a.png", "text": "a red circle"}\n',
    }
    for suffix, text in texts.items():
        (folder / f"a{suffix}").write_text(text)
    for suffix in (".img_sdxl", ".safetensors"):
        save_file({"latent": torch.zeros(4, 8, 8)}, folder / f"a{suffix}", {"format": "pt"})
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("script", "argv", "option", "suffix"), OPTIONS)
def test_no_file_of_the_user_is_replaced(script, argv, option, suffix, data, capsys):
    before = contents(data)
    for name in sorted(before):
        try:
            assert run_script(script, *argv, option, data / name) == 2
            message = ""
        except SystemExit as exit:
            assert exit.code == 2
            message = capsys.readouterr().err
        except ValueError as error:
            message = str(error)
        wanted = "choose another" if name.endswith(suffix) else "choose another|file name that ends with"
        assert str(data / name) in message, (name, message)
        assert any(words in message for words in wanted.split("|")), message
    assert contents(data) == before


def test_what_a_tool_has_written_it_may_write_again(data, tmp_path):
    image = Image.new("RGB", (8, 8))
    compare, sheets = (
        load_script("dataset_scripts/compare_imgdirs.py"),
        [tmp_path / f"s.{s}" for s in ("png", "jpg", "webp")],
    )
    for path in sheets:
        outputs.save_sheet(image, path, model="m")
        assert outputs.grid(str(path)) == path
    assert run_script("dataset_scripts/compare_imgdirs.py", data, data, "--png", "compared.png") == 0
    for name in ("compared.png", "s.png"):
        assert compare.output_problem(tmp_path / name, ".png", compare.SHEET_MARK) is None
        assert outputs.sheet(name)
    for _ in range(2):
        assert run_script("dataset_scripts/compare_imgdirs.py", data, data) == 0
        run_script("dataset_scripts/check_captions.py", "--data_root", data, "--html", "compare.html")
        run_script("dataset_scripts/compare_captions.py", data, data)
    for seed in (0, 1):
        prompts = ("--prompts", "prompts.txt", "--num_prompts", 4 + seed)
        run_script("dataset_scripts/draw_shapes.py", "--out", f"drawn{seed}", "--num_images", 2, *prompts)
        assert run_script("dataset_scripts/score_shapes.py", f"drawn{seed}", "--json", "scores.json") == 0
    assert json.loads((tmp_path / "scores.json").read_text())["trained"]["num_images"] == 2
    (tmp_path / "empty.csv").touch()
    assert outputs.counts("empty.csv")


def test_a_folder_of_other_pictures_is_neither_drawn_into_nor_composed_over(data):
    (data / "00001.png").write_bytes(b"mine")
    before = contents(data)
    with pytest.raises(ValueError, match=r"00001\.png: was not drawn by this script"):
        run_script("dataset_scripts/draw_shapes.py", "--out", data, "--num_images", 3)
    parts = ("--unet", TINY / "unet", "--vae", TINY / "vae", "--clip", TINY / "clip", "--out", data, "--overwrite")
    with pytest.raises(ValueError, match=r"data: has no model_index\.json, so it is not replaced"):
        run_script("models/compose_sd.py", *parts)
    assert contents(data) == before
