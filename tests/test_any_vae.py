"""Every image autoencoder of diffusers: latents normalised for the UNet, cached, trained on, drawn, exported."""

import itertools
import json
import shutil

import diffusers
import pytest
import torch
from helpers import refused, run_script, train
from safetensors import safe_open

from cachetrain.caching.encoders import check_vae, encode_posterior
from cachetrain.data.sidecar import read_sidecar
from cachetrain.modeling import load, normalisation, t5_pipeline
from cachetrain.modeling.normalisation import LatentScaling
from cachetrain.modeling.vae import REFUSED, latent_channels, vae_reduction
from cachetrain.sampling.render import decode_image

KL = {
    "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 8, 8), "norm_num_groups": 4, "mid_block_add_attention": False, "latent_channels": 4,
}  # fmt: skip
FRAMES = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True]}
# Class -> (a tiny config, what it says of its latents: one number, one for each channel, a batch norm, or nothing).
IMAGES = {
    "AutoencoderKL": (KL, "numbers"),
    "AutoencoderKL ": (KL, "number"),
    "AutoencoderKLFlux2": (KL, "batch norm"),
    "AutoencoderKLQwenImage": (FRAMES, "numbers"),
    "AutoencoderKLWan": (FRAMES | {"scale_factor_spatial": 4}, "numbers"),
    "AsymmetricAutoencoderKL": (
        {
            "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
            "down_block_out_channels": (8, 8), "up_block_out_channels": (8, 8), "norm_num_groups": 4,
        },
        "number",
    ),
    "AutoencoderDC": (
        {
            "latent_channels": 4, "attention_head_dim": 4,
            "encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock",
            "encoder_block_out_channels": (8,) * 3, "decoder_block_out_channels": (8,) * 3,
            "encoder_layers_per_block": (1,) * 3, "decoder_layers_per_block": (1,) * 3,
            "encoder_qkv_multiscales": ((),) * 3, "decoder_qkv_multiscales": ((),) * 3,
        },
        "number",
    ),
    "AutoencoderTiny": (
        {
            "encoder_block_out_channels": (8,) * 3, "decoder_block_out_channels": (8,) * 3,
            "num_encoder_blocks": (1,) * 3, "num_decoder_blocks": (1,) * 3,
        },
        "number",
    ),
    "AutoencoderKLHunyuanImage": (
        {
            "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (32,) * 3,
            "layers_per_block": 1, "spatial_compression_ratio": 4, "sample_size": 32,
        },
        "number",
    ),
    "AutoencoderKLKVAE": (
        {
            "channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4, "ch_mult": (1, 1, 1),
            "sample_size": 32,
        },
        "nothing",
    ),
    "VQModel": (
        {
            "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4, "num_vq_embeddings": 16,
        },
        "number",
    ),
}  # fmt: skip
# Words in the names of classes for videos, sounds and molecules.
OTHERS = (
    *("Allegro", "CogVideoX", "Cosmos", "HunyuanVideo", "KVAEVideo", "LTX", "Magvit", "MiniMax", "Mochi", "VidTok"),
    *("Temporal", "SR", "Audio", "Oobleck", "SAME", "Proteina", "ImageProcessor"),
)
CLASSES = [
    name
    for name in dir(diffusers)
    if any(word in name for word in ("Autoencoder", "VAE", "VQModel")) and not any(word in name for word in OTHERS)
]


def pictures(number=16):
    coarse = torch.rand(number, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")


def with_statistics(vae, kind, raw):
    """Writes the statistics of latents [B, C, h, w] where this kind of VAE keeps its own."""
    mean, std = raw.mean((0, 2, 3)), raw.std((0, 2, 3), correction=0)
    if kind == "numbers":
        own = {"latents_mean": mean.tolist(), "latents_std": std.tolist()}
        vae.register_to_config(**own | ({"scaling_factor": 1.0} if "scaling_factor" in vae.config else {}))
    elif kind == "number":
        vae.register_to_config(scaling_factor=1 / raw.std().item())
    elif kind == "batch norm":
        patches = diffusers.Flux2Pipeline._patchify_latents(raw)
        vae.bn.running_mean.copy_(patches.mean((0, 2, 3)))
        vae.bn.running_var.copy_(patches.var((0, 2, 3), correction=0))
    return std if kind != "number" else raw.std().expand(raw.shape[1])


@torch.no_grad()
@pytest.mark.parametrize("name", sorted({*CLASSES, *IMAGES, *REFUSED}))
def test_every_image_autoencoder_gives_the_unet_unit_variance_or_is_refused_by_name(name, tmp_path):
    if name in REFUSED:
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
        with pytest.raises(ValueError, match=f"{name} {REFUSED[name]}"):
            load.load_vae(tmp_path)
        return
    if name not in IMAGES:
        pytest.skip(f"{name} is new in diffusers: give it a row in IMAGES")
    config, kind = IMAGES[name]
    torch.manual_seed(0)
    vae = getattr(diffusers, name.strip())(**config).eval()
    assert kind not in ("batch norm", "nothing") or normalisation.of_vae(vae) is None  # never measured
    std = with_statistics(vae, kind, encode_posterior(vae, pictures())[0])
    vae.save_pretrained(tmp_path)
    vae = load.load_vae(tmp_path)
    check_vae(vae, [(32, 32)])
    raw = encode_posterior(vae, pictures())[0]
    reduction = 32 // raw.shape[-1]
    assert raw.shape[1] == latent_channels(vae) and vae_reduction(vae) == reduction == t5_pipeline.vae_reduction(vae)
    scaling = normalisation.of_vae(vae)
    if kind == "nothing":
        assert scaling is None
        with pytest.raises(ValueError, match=f"{name}.*does not say"):
            t5_pipeline.decode_latents(vae, raw)
        scaling = LatentScaling(tuple((1 / std).tolist()), tuple(raw.mean((0, 2, 3)).tolist()))
    latents = scaling(raw)
    assert latents.std(correction=0).item() == pytest.approx(1, rel=0.1)
    if kind != "number":
        assert latents.mean((0, 2, 3)).abs().max() < 0.1
        torch.testing.assert_close(latents.std((0, 2, 3), correction=0), torch.ones_like(std), rtol=0.1, atol=0)
    torch.testing.assert_close(scaling.inverse(latents), raw)
    decoded = t5_pipeline.decode_raw(vae, raw)
    assert decoded.shape == (16, 3, 32, 32) and decoded.isfinite().all() and decoded.std() > 0
    if kind != "nothing":
        torch.testing.assert_close(t5_pipeline.decode_latents(vae, latents), decoded, atol=1e-4, rtol=1e-4)


def test_the_map_is_that_of_diffusers_pipelines():
    raw = torch.randn(2, 4, 4, 4)
    mean, std = [0.1, -0.2, 0.3, 0.0], [0.5, 2.0, 1.0, 3.0]
    vae = diffusers.AutoencoderKL(**KL, latents_mean=mean, latents_std=std, scaling_factor=0.5)
    # As StableDiffusionXLPipeline undoes it: latents * latents_std / scaling_factor + latents_mean.
    latents = normalisation.of_vae(vae)(raw)
    column = torch.tensor([mean, std]).view(2, 1, 4, 1, 1)
    torch.testing.assert_close(latents * column[1] / 0.5 + column[0], raw)


@torch.no_grad()
def test_statistics_of_patches_give_each_channel_unit_variance_though_positions_differ():
    raw = torch.randn(8, 4, 16, 16)
    raw[:, :, ::2] = 3 * raw[:, :, ::2] + torch.tensor([1.0, -2.0, 0.0, 5.0]).view(4, 1, 1)
    vae = diffusers.AutoencoderKLFlux2(**KL)
    with_statistics(vae, "batch norm", raw)
    latents = normalisation.of_vae(vae)(raw)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3), correction=0), torch.ones(4), atol=1e-4, rtol=0)


# Files and headers


@pytest.mark.parametrize("scaling", [LatentScaling(0.18215), LatentScaling((0.5, 2e-5), (-0.25, 0.0))])
def test_headers_and_files_keep_the_map(scaling, tmp_path):
    assert normalisation.of_header(scaling.header_fields(), "x") == scaling
    (tmp_path / "norm.json").write_text(normalisation.to_file_text(scaling, encoder="e"))
    assert normalisation.of_file(tmp_path / "norm.json", "e") == scaling
    with pytest.raises(ValueError, match=r"norm\.json: was measured on latents of another VAE"):
        normalisation.of_file(tmp_path / "norm.json", "f")


def test_one_number_is_written_as_ever():
    assert LatentScaling(0.18215).header_fields() == {"scaling_factor": "0.18215", "shift_factor": "0.0"}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"scaling_factor": []},
        {"scaling_factor": [1, 0]},
        {"scaling_factor": True},
        {"scaling_factor": 1, "shift_factor": ["x"]},
    ],
)
def test_a_norm_file_with_other_values_is_named(values, tmp_path):
    (tmp_path / "norm.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"norm\.json: s\w+_factor is .*expected a number"):
        normalisation.of_file(tmp_path / "norm.json")


# From images to checkpoints


@pytest.fixture(scope="module")
def unknown(shapes, model_sd, tmp_path_factory):
    """(folder of pairs without latents, a model whose VAE says nothing of them, the arguments that cache them)."""
    root = tmp_path_factory.mktemp("unknown")
    model, data = shutil.copytree(model_sd, root / "sd"), root / "data"
    path = model / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scaling_factor": None}))
    data.mkdir()
    for file in itertools.chain(*(shapes.glob(f"{stem}*") for stem in ("00000", "_null"))):
        if ".img_" not in file.suffix and ".txt_t5" not in file.suffix:
            shutil.copy(file, data)
    size = ["--target_width", 64, "--target_height", 64, "--num_workers", 0]
    cache = ["cache/create_img_sdxl.py", "--data_root", data, "--model", model, *size]
    return data, model, cache


def test_measured_numbers_of_each_channel_reach_header_training_checkpoint_and_export(unknown, tmp_path, capsys):
    data, model, cache = unknown
    assert run_script(*cache) == 0
    said = capsys.readouterr()
    assert "--norm" in said.err + said.out and "--vae_scaling_factor" in said.err + said.out
    clip = {"suffixes": (".img_sdxl", ".txt_clipl")}
    message = refused(data, model, tmp_path / "a", **clip)
    assert "--norm" in message and "--vae_scaling_factor" in message

    path = tmp_path / "norm.json"
    assert run_script("cache/calculate_vae_scaling.py", data, "--per_channel", "--out", path) == 0
    assert "\n\nchannel 1\n" in capsys.readouterr().out
    before = {file: read_sidecar(file) for file in data.glob("*.img_sdxl")}
    capsys.readouterr()
    assert run_script(*cache, "--norm", path) == 0
    assert f" 0 encoded, {len(before)} fresh" in capsys.readouterr().out
    raw = torch.stack([tensors["latent"] for tensors, _ in before.values()]).float()
    for file, (tensors, header) in before.items():
        after, changed = read_sidecar(file)
        assert torch.equal(after["latent"], tensors["latent"])
        scaling = normalisation.of_header(changed.metadata, file)
        kept = {key for key, value in header.metadata.items() if changed.metadata.get(key) == value}
        assert header.metadata.keys() - kept == {"header_sha256"}
    latents = scaling(raw)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3), correction=0), torch.ones(4), atol=1e-4, rtol=0)

    call, seen = LatentScaling.__call__, set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatentScaling, "__call__", lambda self, latents: seen.add(self) or call(self, latents))
        flags = ["--max_steps", 1, "--batch_size", 2, "--sample_prompt", "x", "--ckpt_dir", tmp_path / "files"]
        train(data, model, tmp_path / "run", *flags, **clip)
    assert seen == {scaling}
    checkpoint = tmp_path / "run" / "checkpoint-000001"
    info = json.loads((checkpoint / "cachetrain.json").read_text())
    assert normalisation.of_values(info["latents"], "x") == scaling
    assert list((tmp_path / "run").rglob("*.png"))  # drawn, though the VAE says nothing
    assert "--ckpt_dir: the VAE's latents are scaled channel by channel" in "".join(capsys.readouterr())
    (exported,) = (tmp_path / "files").glob("*.safetensors")
    with safe_open(exported, "pt") as file:
        assert normalisation.of_header(file.metadata(), exported) == scaling
        assert "scaled channel by channel" in file.metadata()["notes"]
    assert f"scale_factor: {scaling.mean_factor}" in exported.with_suffix(".yaml").read_text()


@torch.no_grad()
def test_pictures_are_decoded_by_the_map_of_the_run(model_sd):
    vae = load.load_vae(model_sd / "vae")
    raw = encode_posterior(vae, pictures(1))[0]
    scaling = LatentScaling((0.5, 2.0, 1.0, 3.0), (0.1, -0.2, 0.3, 0.0))
    drawn = decode_image(vae, scaling(raw), scaling)
    assert drawn.tobytes() == decode_image(vae, normalisation.of_vae(vae)(raw)).tobytes()
    assert drawn.tobytes() != decode_image(vae, scaling(raw)).tobytes()


def test_numbers_for_another_number_of_channels_are_refused(unknown, tmp_path):
    data, _, cache = unknown
    copy = shutil.copytree(data, tmp_path / "data")
    (tmp_path / "norm.json").write_text(json.dumps({"scaling_factor": [1.0] * 3}))
    with pytest.raises(ValueError, match=r"norm\.json: gives a scaling_factor for each of 3 channels, expected 4"):
        run_script(*cache, "--data_root", copy, "--overwrite", "--norm", tmp_path / "norm.json")
