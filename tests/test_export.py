"""Single files in the original key layout: diffusers reads them back bit for bit, and their names are original."""

import json
import os
import shutil

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from helpers import TINY, run_script, weights_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from cachetrain.checkpoints import original_layout
from cachetrain.checkpoints.export import check_exportable, export_single_file
from cachetrain.checkpoints.original_layout import text_names, unet_names, vae_names, vae_shape
from cachetrain.diffusion.noise_schedulers import make_scheduler
from cachetrain.modeling.compose import Target, compose_sd, compose_t5
from cachetrain.modeling.projections import ProjectionOptions

torch.set_num_threads(1)
SD15_UNET = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
}
SD15_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Stable Diffusion 1.5's structure at small widths: a directory with unet/ and vae/, random weights."""
    out = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    unet = SD15_UNET | {"block_out_channels": (32, 64, 96, 96), "cross_attention_dim": 64, "sample_size": 8}
    UNet2DConditionModel(**unet).save_pretrained(out / "unet")
    vae = SD15_VAE | {"block_out_channels": (32, 32, 64, 64), "sample_size": 64}
    AutoencoderKL(**vae).save_pretrained(out / "vae")
    return out


def compose(parts, out, objective="epsilon", zero_terminal_snr=False):
    compose_sd(parts / "unet", parts / "vae", TINY / "clip", Target(out, objective))
    make_scheduler(objective, None, zero_terminal_snr).save_pretrained(out / "scheduler")
    return out


@pytest.fixture(scope="module")
def model(parts, tmp_path_factory):
    return compose(parts, tmp_path_factory.mktemp("export") / "sd", "v_prediction", zero_terminal_snr=True)


def assert_reads_back(path, model_dir, weights="unet"):
    """diffusers' from_single_file gives the pipeline directory's own weights, bit for bit."""
    read = StableDiffusionPipeline.from_single_file(str(path), config=str(model_dir), local_files_only=True)
    expected = {
        "unet": UNet2DConditionModel.from_pretrained(model_dir / weights, use_safetensors=True),
        "vae": AutoencoderKL.from_pretrained(model_dir / "vae"),
        "text_encoder": CLIPTextModel.from_pretrained(model_dir / "text_encoder"),
    }
    for name, module in expected.items():
        state = getattr(read, name).state_dict()
        assert state.keys() == module.state_dict().keys()
        for key, tensor in module.state_dict().items():
            assert torch.equal(state[key], tensor), f"{name}: {key}"


def test_export_reads_back_bit_identical(model, tmp_path):
    out = tmp_path / "run1-000100.safetensors"
    export_single_file(model, out)
    assert sorted(os.listdir(tmp_path)) == ["run1-000100.safetensors", "run1-000100.yaml"]
    assert out.stat().st_mode & 0o444 == out.with_suffix(".yaml").stat().st_mode & 0o444
    assert_reads_back(out, model)
    (tmp_path / "bar.yaml").write_text("a stranger's")
    command = ["models/export_single_file.py", "--model", model, "--out"]
    with pytest.raises(ValueError, match=r"bar\.yaml: exists, and is not of an earlier bar\.safetensors"):
        run_script(*command, tmp_path / "bar.safetensors")
    assert (tmp_path / "bar.yaml").read_text() == "a stranger's"
    out.unlink()  # a run that saves a step again owns both names
    export_single_file(model, out)
    assert_reads_back(out, model)


def test_tiny_default_reads_back_and_says_who_reads_it(model_sd, tmp_path):
    notes = export_single_file(model_sd, tmp_path / "tiny.safetensors")
    assert_reads_back(tmp_path / "tiny.safetensors", model_sd)
    assert any("norm_num_groups 8" in note and "only diffusers" in note for note in notes)


@pytest.mark.parametrize(
    "unet", [{}, {"attention_head_dim": [2, 4, 6, 6], "use_linear_projection": True}], ids=["SD1", "SD2"]
)
def test_original_config_gives_diffusers_the_same_modules(unet, model, tmp_path):
    # from_single_file builds UNet and VAE out of the .yaml alone here: no config of ours is read.
    own, out = shutil.copytree(model, tmp_path / "own"), tmp_path / "x.safetensors"
    UNet2DConditionModel.from_config(model / "unet", **unet).save_pretrained(own / "unet")
    export_single_file(own, out)
    for cls, name in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae")):
        expected = cls.from_pretrained(own / name)
        read = cls.from_single_file(str(out), original_config=str(out.with_suffix(".yaml")))
        different = {key for key, value in expected.config.items() if key[0] != "_" and value != read.config[key]}
        assert different <= {"sample_size"}  # diffusers takes it from the kind of model
        state = read.state_dict()
        assert all(torch.equal(state[key], tensor) for key, tensor in expected.state_dict().items())


def meta_shapes(cls, config):
    with torch.device("meta"):
        return {key: tensor.shape for key, tensor in cls(**config).state_dict().items()}


def test_sd15_names_and_shapes_are_the_originals():
    shapes = meta_shapes(UNet2DConditionModel, SD15_UNET)
    found = {name: tuple(shapes[key]) for key, name in unet_names(shapes, SD15_UNET).items()}
    assert len(found) == 686  # v1-5-pruned-emaonly: 686 + 248 + 196, and the tower's position_ids
    assert (
        found.items()
        >= {
            "time_embed.0.weight": (1280, 320),
            "input_blocks.0.0.weight": (320, 4, 3, 3),
            "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
            "input_blocks.3.0.op.weight": (320, 320, 3, 3),
            "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
            "input_blocks.4.1.proj_in.weight": (640, 640, 1, 1),
            "input_blocks.9.0.op.bias": (1280,),
            "input_blocks.11.0.emb_layers.1.weight": (1280, 1280),
            "middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
            "middle_block.2.out_layers.3.weight": (1280, 1280, 3, 3),
            "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),  # no attention before it
            "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
            "output_blocks.8.2.conv.weight": (640, 640, 3, 3),
            "output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
            "out.0.weight": (320,),
            "out.2.weight": (4, 320, 3, 3),
        }.items()
    )

    shapes = meta_shapes(AutoencoderKL, SD15_VAE)
    found = {name: vae_shape(name, shapes[key]) for key, name in vae_names(shapes, SD15_VAE).items()}
    assert len(found) == 248
    assert (
        found.items()
        >= {
            "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
            "encoder.mid.attn_1.norm.weight": (512,),
            "decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
            "encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
            "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
            "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
            "decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
            "encoder.conv_out.weight": (8, 512, 3, 3),
            "quant_conv.weight": (8, 8, 1, 1),
            "decoder.norm_out.weight": (128,),
        }.items()
    )

    with torch.device("meta"):
        tower = CLIPTextModel(CLIPTextConfig(num_hidden_layers=12, vocab_size=49408)).state_dict()
    names = set(text_names(tower).values())
    assert len(names) == 196
    assert names >= {
        "embeddings.position_embedding.weight",
        "encoder.layers.11.self_attn.q_proj.weight",
        "encoder.layers.0.mlp.fc1.bias",
        "final_layer_norm.bias",
    }


def test_export_takes_towers_with_and_without_prefix_and_leaves_out_what_is_no_tower():
    tower = ["embeddings.token_embedding.weight", "final_layer_norm.bias"]
    whole = [f"text_model.{name}" for name in tower]
    extra = ["text_model.embeddings.position_ids", "vision_model.encoder.x", "logit_scale", "text_projection.weight"]
    assert list(text_names(whole + extra).values()) == list(text_names(tower).values()) == tower


def test_vae_with_attention_names_of_older_diffusers_reads_back(model, tmp_path):
    older = shutil.copytree(model, tmp_path / "older")
    path, tensors = (older / "vae" / "diffusion_pytorch_model.safetensors", weights_of(model / "vae"))
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in names.items():
        tensors = {key.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): t for key, t in tensors.items()}
    assert "encoder.mid_block.attentions.0.query.weight" in tensors
    save_file(tensors, path)
    export_single_file(older, tmp_path / "x.safetensors")
    assert_reads_back(tmp_path / "x.safetensors", model)


@pytest.mark.parametrize("raw", [False, True], ids=["ema", "raw"])
def test_export_takes_ema_weights_unless_raw(model, raw, tmp_path):
    checkpoint = shutil.copytree(model, tmp_path / "checkpoint-000007")
    ema = UNet2DConditionModel.from_pretrained(model / "unet")
    with torch.no_grad():
        ema.conv_out.weight.add_(1)
    ema.save_pretrained(checkpoint / "unet_ema")
    info = {"step": 7, "text": {"kind": "txt_clipl", "settings": {"clip_skip": 2}}}
    (checkpoint / "cachetrain.json").write_text(json.dumps(info))
    out = tmp_path / "x.safetensors"
    argv = ["--model", checkpoint, "--out", out, *["--raw_weights"] * raw]
    assert run_script("models/export_single_file.py", *argv) == 0
    assert_reads_back(out, checkpoint, "unet" if raw else "unet_ema")
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert (metadata["step"], metadata["weights"]) == ("7", "unet" if raw else "unet_ema")
    assert metadata["modelspec.encoder_layer"] == "2"
    assert "Clip skip" in metadata["notes"]


@pytest.mark.parametrize(
    "objective, zero_snr, markers, parameterization",
    [
        ("epsilon", False, set(), "eps"),
        ("v_prediction", False, {"v_pred"}, "v"),
        ("v_prediction", True, {"v_pred", "ztsnr"}, "v"),
        ("flow", False, set(), None),
    ],
)
def test_export_marks_the_objective_as_web_uis_look_for_it(
    objective, zero_snr, markers, parameterization, parts, tmp_path, capsys
):
    model_dir = compose(parts, tmp_path / "model", objective, zero_snr)
    out = tmp_path / "x.safetensors"
    assert run_script("models/export_single_file.py", "--model", model_dir, "--out", out) == 0
    tensors = load_file(out)
    assert tensors.keys() & {"v_pred", "ztsnr"} == markers
    assert all(
        key in markers or key.split(".")[0] in ("model", "first_stage_model", "cond_stage_model") for key in tensors
    )
    with safe_open(out, "pt") as file:
        assert file.metadata()["objective"] == objective
    if parameterization is None:
        assert not out.with_suffix(".yaml").exists()
        assert "web UIs do not sample" in capsys.readouterr().out
    else:
        config = yaml.safe_load(out.with_suffix(".yaml").read_text())
        assert config["model"]["params"]["parameterization"] == parameterization


def test_export_in_fp16_halves_the_file_and_rounds_once(model, tmp_path):
    export_single_file(model, tmp_path / "full.safetensors")
    export_single_file(model, tmp_path / "half.safetensors", torch.float16)
    full, half = load_file(tmp_path / "full.safetensors"), load_file(tmp_path / "half.safetensors")
    assert full.keys() == half.keys()
    assert all(torch.equal(half[key], full[key].half()) for key in full if full[key].numel())


@pytest.mark.parametrize("trained", [False, True], ids=["frozen projection", "text_proj"])
def test_t5_export_holds_unet_and_vae_and_says_so(trained, parts, tmp_path):
    target, options = Target(tmp_path / "t5", "epsilon"), ProjectionOptions(trained=trained)
    compose_t5(parts / "unet", parts / "vae", TINY / "t5", target, options)
    out = tmp_path / "x.safetensors"
    notes = export_single_file(tmp_path / "t5", out)
    assert any("UNet and VAE only" in note and ("projection" in note) == trained for note in notes)
    with safe_open(out, "pt") as file:
        keys, said = set(file.keys()), file.metadata()["notes"]
    assert notes[0] in said
    assert {key.split(".")[0] for key in keys} == {"model", "first_stage_model"}
    assert not out.with_suffix(".yaml").exists()
    out.with_suffix(".yaml").touch()  # of an earlier export of another model, which it would contradict
    export_single_file(tmp_path / "t5", out)
    assert not out.with_suffix(".yaml").exists()
    vae = convert_ldm_vae_checkpoint(load_file(out), AutoencoderKL.load_config(parts / "vae"))
    stored = weights_of(parts / "vae")
    assert all(torch.equal(vae[key], tensor) for key, tensor in stored.items())


@pytest.mark.parametrize(
    "component, changes, reason",
    [
        ("unet", {"up_block_types": ["CrossAttnUpBlock2D"] * 4}, "mirror"),
        ("unet", {"layers_per_block": [1, 2, 2, 2]}, "layers_per_block differs"),
        ("unet", {"attention_head_dim": [4, 8, 8, 8]}, "heads"),
        ("unet", {"num_class_embeds": 3}, "class_embedding"),
        ("vae", {"use_quant_conv": False}, "quant_conv"),
        ("text_encoder", {"hidden_act": "gelu"}, "OpenCLIP"),
    ],
)
def test_a_model_without_a_place_in_the_layout_is_refused_by_name(component, changes, reason, model, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    path = other / component / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=reason):
        export_single_file(other, tmp_path / "x.safetensors")
    assert os.listdir(tmp_path) == ["other"]


def test_names_that_diffusers_reads_otherwise_are_refused(monkeypatch):
    monkeypatch.setitem(original_layout._VAE_ATTENTION, "to_q", "k")
    monkeypatch.setitem(original_layout._VAE_ATTENTION, "to_k", "q")
    with pytest.raises(ValueError, match=r"to_[qk].*\(8 of 248 tensors\)"):
        vae_names(meta_shapes(AutoencoderKL, SD15_VAE), SD15_VAE)


def test_a_failed_export_leaves_the_earlier_file(model, tmp_path, monkeypatch):
    out = tmp_path / "x.safetensors"
    export_single_file(model, out)
    before = out.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        export_single_file(model, out, torch.float16)
    assert out.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["x.safetensors", "x.yaml"]


def test_a_fresh_unet_can_be_checked_before_training(tmp_path, parts):
    model_dir = compose(parts, tmp_path / "fresh")
    for path in (model_dir / "unet").glob("*.safetensors"):
        path.unlink()
    _, config = check_exportable(model_dir, make_scheduler("v_prediction"))
    assert config["model"]["params"]["unet_config"]["params"]["channel_mult"] == [1, 2, 3, 3]
    assert config["model"]["params"]["parameterization"] == "v"  # of the scheduler asked for, not of the directory's
    with pytest.raises(ValueError, match=r"contains no diffusion_pytorch_model.safetensors"):
        export_single_file(model_dir, tmp_path / "x.safetensors")


def test_a_bare_unet_is_refused_by_what_it_lacks(parts, tmp_path):
    with pytest.raises(ValueError, match=r"unet/config.json: no such file; .* compose one"):
        export_single_file(parts / "unet", tmp_path / "x.safetensors")
