"""What is measured over caches: factors with standard errors, and differences between two files or trees."""

import re

import numpy as np
import pytest
import torch
from helpers import run_script
from safetensors.torch import save_file

from cachetrain.caching.inspect import differences
from cachetrain.caching.inspect.statistics import Estimate, Moments
from cachetrain.data.sidecar import write_sidecar

VAE = {"kind": "img_sdxl", "encoder": "e" * 64, "settings": "{}", "scaling_factor": "0.13025", "shift_factor": "0.0"}
TEXT = {"kind": "txt_t5cache", "encoder": "t" * 64, "settings": "{}", "truncated": "0"}


def images(number, seed=0, channels=4):
    """Arrays [C, h, w] of different sizes whose values are alike within one image, as those of latents are."""
    rng = np.random.default_rng(seed)
    offsets = 3 * rng.standard_normal((channels, 1, 1)) + 5
    for _ in range(number):
        shape = (channels, *[(4, 4), (4, 6), (8, 3)][rng.integers(3)])
        level, contrast = rng.standard_normal((channels, 1, 1)), rng.gamma(4, size=(channels, 1, 1))
        yield offsets + level + contrast * rng.standard_normal(shape)


def write_latents(folder, arrays, dtype=torch.float32, suffix=".img_sdxl", **fields):
    """Writes sidecars 000, 001, ...; returns the values as they were stored, float64."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = []
    for i, array in enumerate(arrays):
        latent = torch.as_tensor(np.asarray(array)).to(dtype)
        write_sidecar(folder / f"{i:03d}{suffix}", {"latent": latent}, VAE | fields)
        stored.append(latent.double().numpy())
    return stored


def write_captions(folder, lengths, fields=TEXT, suffix=".txt_t5cache", width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    stored = []
    for i, length in enumerate(lengths):
        emb = (torch.randn(length, width, generator=generator) * (0.2 + 0.01 * i) + 0.1).to(torch.bfloat16)
        write_sidecar(folder / f"{i:03d}{suffix}", {"emb": emb}, fields)
        stored.append(emb.double().numpy())
    return stored


def measured(output, label):
    """(value, standard error) that a line of the output, starting with `label`, tells."""
    value, error = re.search(rf"^{re.escape(label)}[ =]+(\S+) ± (\S+?);?(?:\s|$)", output, re.MULTILINE).groups()
    return float(value), float("nan") if error == "n/a" else float(error)


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# ---- Moments ----


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_moments_equal_numpy_on_the_concatenated_groups(offset):
    groups = [group.reshape(4, -1) + offset for group in images(50)]
    moments = Moments()
    for group in groups:
        moments.add(group)
    together = np.concatenate(groups, axis=1)
    for row, values in zip(moments.statistics(), together, strict=True):
        assert row.mean.value == pytest.approx(values.mean(), rel=1e-12)
        assert row.std.value == pytest.approx(values.std(), rel=1e-9)
        assert row.inverse_std.value == pytest.approx(1 / values.std(), rel=1e-9)


def test_standard_errors_are_near_a_bootstrap_over_images():
    groups = [group.reshape(-1) for group in images(150, channels=2)]
    moments = Moments()
    for group in groups:
        moments.add(group[None])
    row = moments.statistics()[0]
    rng = np.random.default_rng(1)
    draws = [np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))]) for _ in range(2000)]
    assert row.mean.error == pytest.approx(np.std([draw.mean() for draw in draws]), rel=0.15)
    assert row.std.error == pytest.approx(np.std([draw.std() for draw in draws]), rel=0.15)
    assert row.inverse_std.error == pytest.approx(np.std([1 / draw.std() for draw in draws]), rel=0.15)
    # What it would be if all values were independent: far too small.
    values = np.concatenate(groups)
    assert row.mean.error > 1.5 * values.std() / len(values) ** 0.5


def test_estimate_is_printed_to_two_digits_of_its_error():
    assert str(Estimate(0.130662, 0.000423)) == "0.13066 ± 0.00042"
    assert str(Estimate(-1234.5, 67.8)) == "-1234 ± 68"
    assert str(Estimate(0.5, float("nan"))) == "0.5 ± n/a"
    assert Estimate(2.0, 0.5).distance(3) == "measured 2.0 standard errors below it"


# ---- calculate_vae_scaling.py ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_vae_scaling_equals_numpy_on_all_latents(tmp_path, capsys, dtype):
    scale = 1e5 if dtype == torch.float32 else 1  # values that need float32
    stored = write_latents(tmp_path / "sub", (scale * image for image in images(40)), dtype)
    assert run_script("cache/calculate_vae_scaling.py", tmp_path) == 0
    output = capsys.readouterr().out
    values = np.concatenate([latent.reshape(4, -1) for latent in stored], axis=1)
    factor, error = measured(output, "scaling_factor  1/std")
    assert factor == pytest.approx(1 / values.std(), abs=error / 10) and 0 < error < 0.1 * factor
    mean, error = measured(output, "shift_factor    mean")
    assert mean == pytest.approx(values.mean(), abs=error / 10)
    for i, channel in enumerate(values):
        mean, error = measured(output, f"channel {i}")
        assert mean == pytest.approx(channel.mean(), abs=error / 10)
        std = re.search(rf"^channel {i} .*± .* (\S+) ± (\S+)$", output, re.MULTILINE)
        assert float(std[1]) == pytest.approx(channel.std(), abs=float(std[2]) / 10)
    assert output.startswith("40 images, latents of 3 sizes")


def test_vae_scaling_tells_the_distance_from_the_header_in_standard_errors(tmp_path, capsys):
    stored = write_latents(tmp_path, images(40), shift_factor="-2.5")
    assert run_script("cache/calculate_vae_scaling.py", tmp_path) == 0
    output = capsys.readouterr().out
    for label, header, sign in (("scaling_factor  1/std", 0.13025, "above"), ("shift_factor    mean", -2.5, "above")):
        value, error = measured(output, label)
        distance = re.search(
            rf"{re.escape(label)}.*header {header}, measured (\S+) standard errors {sign} it", output
        )
        assert float(distance[1]) == pytest.approx(abs(value - header) / error, rel=0.06)
    for i, latent in enumerate(stored):
        save_file({"latent": torch.tensor(latent)}, tmp_path / f"{i:03d}.img_sdxl")
    assert run_script("cache/calculate_vae_scaling.py", tmp_path) == 0
    assert capsys.readouterr().out.count("; not in the header") == 2


def test_vae_scaling_of_one_image_has_no_standard_error(tmp_path, capsys):
    write_latents(tmp_path, images(1))
    assert run_script("cache/calculate_vae_scaling.py", tmp_path / "000.img_sdxl") == 0
    output = capsys.readouterr().out
    assert np.isnan(measured(output, "scaling_factor  1/std")[1])
    assert "distance in standard errors n/a" in output
    assert "nan" not in output and "± 0" not in output


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0])
def test_vae_scaling_refuses_constant_latents(tmp_path, value):
    write_latents(tmp_path, [np.full((4, 5, 7), value)] * 3)
    with pytest.raises(ValueError, match="std is 0"):
        run_script("cache/calculate_vae_scaling.py", tmp_path)


def test_vae_scaling_names_what_it_leaves_out_and_measures_the_rest(tmp_path, capsys):
    arrays = list(images(12))
    arrays[3][1, 2, 2] = np.nan
    arrays[4][0, 0, 0] = np.inf
    stored = write_latents(tmp_path, arrays)
    flip_a_byte(tmp_path / "005.img_sdxl")
    write_sidecar(tmp_path / "006.img_sdxl", {"emb": torch.ones(2, 3)}, VAE)
    assert run_script("cache/calculate_vae_scaling.py", tmp_path) == 1
    out, err = capsys.readouterr()
    assert [re.search(r"00\d\.img_sdxl", line)[0][:3] for line in err.splitlines()] == ["003", "004", "005", "006"]
    assert "1 of " in err.splitlines()[0] and "not finite" in err.splitlines()[0]
    assert "left out, named above: 4 sidecars" in out
    values = np.concatenate([stored[i].reshape(-1) for i in (0, 1, 2, *range(7, 12))])
    factor, error = measured(out, "scaling_factor  1/std")
    assert factor == pytest.approx(1 / values.std(), abs=error / 10)


def test_vae_scaling_refuses_latents_of_two_vaes_and_names_a_file_of_each(tmp_path):
    write_latents(tmp_path, images(2))
    write_latents(tmp_path, images(2), suffix=".img_sdvae", encoder="f" * 64)
    with pytest.raises(ValueError, match=r"000\.img_sdvae and .*000\.img_sdxl differ in encoder"):
        run_script("cache/calculate_vae_scaling.py", tmp_path)
    assert run_script("cache/calculate_vae_scaling.py", tmp_path, "--cache_suffix", ".img_sdvae") == 0


def test_vae_scaling_measures_a_random_subset(tmp_path, capsys):
    write_latents(tmp_path, images(30))

    def output(seed):
        assert run_script("cache/calculate_vae_scaling.py", tmp_path, "--num_images", 7, "--seed", seed) == 0
        return capsys.readouterr().out

    first = output(0)
    assert first.startswith("7 images")
    assert first == output(0) != output(1)


def test_vae_scaling_of_nothing_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="run the cache scripts first"):
        run_script("cache/calculate_vae_scaling.py", tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        run_script("cache/calculate_vae_scaling.py", tmp_path / "missing")


# ---- check_text_cache_std.py ----


def test_text_std_equals_numpy_on_all_tokens_without_the_null_caption(tmp_path, capsys):
    lengths = [5, 9, 3, 12, 7] * 6
    stored = np.concatenate(write_captions(tmp_path, lengths))
    write_sidecar(
        tmp_path / "000.txt_t5cache", {"emb": torch.tensor(stored[:5]).to(torch.bfloat16)}, TEXT | {"truncated": "1"}
    )
    null = torch.tensor([[10.0, -10.0, 10.0, -10.0, 10.0, -10.0]])
    write_sidecar(tmp_path / "_null_caption.txt_t5cache", {"emb": null}, TEXT)
    assert run_script("cache/check_text_cache_std.py", tmp_path) == 0
    output = capsys.readouterr().out
    assert output.startswith("30 captions of 3 to 12 tokens of width 6, 1 truncated\n")
    for label, value in (
        ("mean", stored.mean()),
        ("std", stored.std()),
        ("token norm", np.linalg.norm(stored, axis=1).mean()),
        ("1/std", 1 / stored.std()),
    ):
        found, error = measured(output, label)
        assert found == pytest.approx(value, abs=error / 10), label
    factor = re.search(r"--text_scaling_factor (\S+) gives them unit variance", output)[1]
    assert factor == re.search(r"1/std +(\S+) ±", output)[1]
    assert re.search(r"_null_caption\.txt_t5cache: std 10, shape \(1, 6\) \(not counted above\)", output)


def test_text_std_of_a_real_cache_is_measured_and_clip_keeps_its_scale(shapes, capsys):
    assert run_script("cache/check_text_cache_std.py", shapes, "--cache_suffix", ".txt_clipl") == 0
    output = capsys.readouterr().out
    assert output.startswith("24 captions of 77 to 77 tokens") and "leave --text_scaling_factor at 1" in output
    assert run_script("cache/check_text_cache_std.py", shapes, "--cache_suffix", ".txt_t5cache") == 0
    assert "--text_scaling_factor" in capsys.readouterr().out
    with pytest.raises(ValueError, match="mixed caches"):
        run_script("cache/check_text_cache_std.py", shapes)


def test_text_std_names_damaged_captions_and_a_damaged_null(tmp_path, capsys):
    write_captions(tmp_path, [4, 5, 6])
    emb = torch.ones(3, 6)
    emb[1, 2] = torch.nan
    write_sidecar(tmp_path / "001.txt_t5cache", {"emb": emb}, TEXT)
    write_sidecar(tmp_path / "_null_caption.txt_t5cache", {"emb": emb[:1]}, TEXT)
    flip_a_byte(tmp_path / "_null_caption.txt_t5cache")
    assert run_script("cache/check_text_cache_std.py", tmp_path) == 1
    out, err = capsys.readouterr()
    assert out.startswith("2 captions of 4 to 6 tokens")
    assert "001.txt_t5cache: 1 of 18 values" in err and "_null_caption.txt_t5cache" in err


def test_text_std_refuses_constant_embeddings_and_says_na_for_one(tmp_path, capsys):
    write_captions(tmp_path, [4])
    assert run_script("cache/check_text_cache_std.py", tmp_path) == 0
    assert np.isnan(measured(capsys.readouterr().out, "1/std")[1])
    save_file({"emb": torch.randn(3, 6)}, tmp_path / "000.txt_t5cache")
    assert run_script("cache/check_text_cache_std.py", tmp_path) == 0
    assert "0 truncated, 1 whose header does not say" in capsys.readouterr().out
    write_sidecar(tmp_path / "000.txt_t5cache", {"emb": torch.ones(4, 6)}, TEXT)
    with pytest.raises(ValueError, match="std is 0"):
        run_script("cache/check_text_cache_std.py", tmp_path)


# ---- compare_tensorfiles.py ----


def compared(output, name):
    cosine, relative_l2 = re.search(rf"{re.escape(name)}: cosine (\S+), relative L2 ([^\s,]+)", output).groups()
    return cosine, relative_l2


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float16, torch.bfloat16)], ids=str)
def test_compare_files_equals_torch(tmp_path, capsys, dtypes):
    torch.manual_seed(0)
    a = torch.randn(4, 33, 5).to(dtypes[0])
    b = (a.float() + 0.1 * torch.randn(a.shape)).to(dtypes[1])
    save_file({"latent": a}, tmp_path / "a.safetensors")
    save_file({"latent": b}, tmp_path / "b.safetensors")
    relative = ((a.double() - b.double()).norm() / a.double().norm()).item()
    for tolerance, code in ((0, 1), (relative * 0.999, 1), (relative * 1.001, 0)):
        command = (tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--tolerance", tolerance)
        assert run_script("cache/compare_tensorfiles.py", *command) == code
    output = capsys.readouterr().out
    cosine, relative_l2 = map(float, compared(output, "latent"))
    expected = torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0)
    assert cosine == pytest.approx(expected.item(), abs=1e-8)
    assert relative_l2 == pytest.approx(relative, rel=5e-3)
    assert ("dtype F16 against BF16" in output) == (dtypes[0] != dtypes[1])


def test_compare_takes_big_tensors_in_pieces(monkeypatch):
    torch.manual_seed(0)
    a, b = torch.randn(7, 101), torch.randn(7, 101)
    at_once = differences.compare_tensors("x", a, b)
    monkeypatch.setattr(differences, "_PIECE", 100)
    assert differences.compare_tensors("x", a, b)[1:3] == pytest.approx(at_once[1:3], rel=1e-12)


def test_compare_files_shows_the_header_fields_that_differ(tmp_path, capsys):
    latent = {"latent": torch.ones(4, 2, 2)}
    write_sidecar(tmp_path / "a.img_sdxl", latent, VAE | {"model": "one"})
    write_sidecar(tmp_path / "b.img_sdxl", latent, VAE | {"model": "two", "width": "64"})
    assert run_script("cache/compare_tensorfiles.py", tmp_path / "a.img_sdxl", tmp_path / "b.img_sdxl") == 0
    output = capsys.readouterr().out
    assert compared(output, "latent") == ("1.00000000", "0")
    assert "header model: one against two\n" in output and "header width: None against 64\n" in output
    assert "header encoder" not in output


@pytest.mark.parametrize(
    ("a", "b", "code", "said"),
    [
        (
            {"x": [1.0, float("nan")]},
            {"x": [1.0, float("nan")]},
            1,
            "cosine n/a, relative L2 n/a, 1 value not finite",
        ),
        ({"x": [1.0, float("inf")]}, {"x": [1.0, float("inf")]}, 0, "relative L2 0, 1 value not finite"),
        ({"x": [1.0, float("inf")]}, {"x": [2.0, float("inf")]}, 1, "relative L2 n/a, 1 value not finite"),
        ({"x": [0.0, 0.0]}, {"x": [0.0, 0.0]}, 0, "cosine 1.00000000, relative L2 0"),
        ({"x": [0.0, 0.0]}, {"x": [0.0, 1.0]}, 1, "cosine n/a, relative L2 inf"),
        ({"x": []}, {"x": []}, 0, "relative L2 0"),
        ({"x": [1, 2]}, {"x": [1, 2]}, 0, "relative L2 0"),
        ({"x": [1.0]}, {"x": [1.0, 2.0]}, 1, "shape (1,) against (2,)"),
        ({"x": [1.0], "y": [1.0]}, {"x": [1.0]}, 1, "y: cosine n/a, relative L2 n/a, only in A"),
        ({"x": [1.0]}, {"x": [1.0], "y": [1.0]}, 1, "y: cosine n/a, relative L2 n/a, only in B"),
    ],
)
def test_compare_files_exit_code_says_whether_they_are_equal(tmp_path, capsys, a, b, code, said):
    for name, tensors in (("a", a), ("b", b)):
        save_file({key: torch.tensor(value) for key, value in tensors.items()}, tmp_path / f"{name}.safetensors")
    assert run_script("cache/compare_tensorfiles.py", tmp_path / "a.safetensors", tmp_path / "b.safetensors") == code
    assert said in capsys.readouterr().out


def trees(tmp_path, number=12):
    """Two equal trees; pairs of each state are made by the tests."""
    for side in "ab":
        write_latents(tmp_path / side / "sub", images(number))
    return tmp_path / "a", tmp_path / "b"


def test_compare_equal_trees_exits_with_0(tmp_path, capsys):
    a, b = trees(tmp_path)
    assert run_script("cache/compare_tensorfiles.py", a, b) == 0
    output = capsys.readouterr().out
    assert output.startswith("12 pairs: 12 identical, 0 within tolerance, 0 different") and "worst" not in output


def test_compare_trees_counts_each_state_and_lists_the_worst(tmp_path, capsys):
    a, b = trees(tmp_path)
    arrays = list(images(12))
    for i, scale in ((2, 1.001), (3, 1.5), (4, 1.1)):
        write_sidecar(b / "sub" / f"00{i}.img_sdxl", {"latent": torch.tensor(arrays[i] * scale).float()}, VAE)
    write_sidecar(b / "sub" / "005.img_sdxl", {"latent": torch.ones(4, 2, 2)}, VAE)
    flip_a_byte(b / "sub" / "006.img_sdxl")
    (b / "sub" / "007.img_sdxl").unlink()
    (a / "sub" / "008.img_sdxl").unlink()
    (a / "sub" / "009.img_sdxl").unlink()
    assert run_script("cache/compare_tensorfiles.py", a, b, "--tolerance", 0.01) == 1
    out, err = capsys.readouterr()
    lines = [line.strip() for line in out.splitlines()]
    assert lines[-1] == (
        "9 pairs: 4 identical, 1 within tolerance, 2 different, 1 of other shapes or names, 1 damaged, "
        "1 only in A, 2 only in B"
    )
    worst = lines[1 + lines.index("worst:") : lines.index("only in A:")]
    assert [line[:12] for line in worst] == ["sub/005.img_", "sub/003.img_", "sub/004.img_", "sub/002.img_"]
    assert compared(worst[1], "latent") == ("1.00000000", "0.5")
    assert lines[1 + lines.index("only in A:")] == "sub/007.img_sdxl"
    assert lines[1 + lines.index("only in B:") :][:2] == ["sub/008.img_sdxl", "sub/009.img_sdxl"]
    assert str(b / "sub" / "006.img_sdxl") in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("state", ["different", "shape", "damaged", "only in A", "only in B"])
def test_compare_trees_exits_with_1_for_each_state_alone(tmp_path, state):
    a, b = trees(tmp_path, 3)
    target = (a if state == "only in B" else b) / "sub" / "001.img_sdxl"
    if state == "damaged":
        flip_a_byte(target)
    elif state.startswith("only"):
        target.unlink()
    else:
        shape = list(images(2))[1].shape if state == "different" else (4, 1, 1)
        write_sidecar(target, {"latent": torch.full(shape, 3.0)}, VAE)
    assert run_script("cache/compare_tensorfiles.py", a, b, "--tolerance", 0.01) == 1


def test_compare_trees_can_be_restricted_to_a_suffix(tmp_path, capsys):
    a, b = trees(tmp_path, 3)
    write_captions(a, [3])
    assert run_script("cache/compare_tensorfiles.py", a, b) == 1
    assert run_script("cache/compare_tensorfiles.py", a, b, "--cache_suffix", ".img_sdxl") == 0
    with pytest.raises(ValueError, match="pass --cache_suffix"):
        run_script("cache/compare_tensorfiles.py", a, b, "--cache_suffix", ".img_sdvae")


def test_compare_refuses_a_file_against_a_folder_and_names_a_damaged_file(tmp_path, capsys):
    a, b = trees(tmp_path, 1)
    files = [side / "sub" / "000.img_sdxl" for side in (a, b)]
    with pytest.raises(ValueError, match="two files or rows, or two folders"):
        run_script("cache/compare_tensorfiles.py", a, files[1])
    flip_a_byte(files[1])
    assert run_script("cache/compare_tensorfiles.py", *files) == 1
    assert str(files[1]) in capsys.readouterr().err
    files[0].write_bytes(files[0].read_bytes()[:-3])
    assert run_script("cache/compare_tensorfiles.py", *files) == 1
    assert str(files[0]) in capsys.readouterr().err
