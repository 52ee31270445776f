"""Training SDXL's UNet from caches: as diffusers' own training script does it, and what is refused before."""

import json
import shutil
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from helpers import (
    CLIP,
    FULL_LOG,
    T5,
    distance,
    json_lines,
    load_script,
    open_pairs,
    refused,
    run_script,
    train,
    trainer_argv,
    weights_of,
)
from PIL import Image
from runs import RESUME, content
from safetensors.torch import load_file, save_file
from sdxl_fixtures import SDXL, copy_with, ids_of_training_script, load_pipeline

from cachetrain.data.dataset import SampleKey
from cachetrain.data.index import PairIndex
from cachetrain.data.sidecar import read_sidecar, write_sidecar
from cachetrain.modeling import conditioning

STEPS = 5


@pytest.fixture(scope="module")
def trained(shapes_sdxl, model_sdxl, tmp_path_factory):
    """A run of five steps; returns (metrics lines, weights, the batches as they were trained)."""
    trainer, batches = load_script("train_from_cached.py"), []
    forward = trainer.forward_pass

    def watched(model, batch, **settings):
        batches.append({name: batch[name].clone() for name in ("samples", "noise", "timesteps", "dropped")})
        return forward(model, batch, **settings)

    flags = ["--max_steps", STEPS, "--batch_size", 3, "--lr", 1e-3, "--cond_dropout", 0.3, "--gradient_clip", 0.5]
    out = tmp_path_factory.mktemp("trained") / "run"
    with mock.patch.object(trainer, "forward_pass", watched):
        lines, weights = train(shapes_sdxl, model_sdxl, out, *flags, suffixes=SDXL)
    return lines, weights, batches


def test_five_steps_equal_the_loss_of_diffusers_training_script(trained, shapes_sdxl, model_sdxl):
    """train_text_to_image_sdxl.py of diffusers, from its formulas, with noise, timesteps and order of the run."""
    lines, weights, batches = trained
    pipeline = load_pipeline(model_sdxl)
    unet, scheduler = pipeline.unet.train(), DDPMScheduler.from_config(pipeline.scheduler.config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01, eps=1e-8)
    names = sorted(path.stem for path in shapes_sdxl.glob("*.png"))
    assert any(batch["dropped"].any() for batch in batches)
    losses = []
    for batch in batches:
        chosen = [names[i] for i in batch["samples"]]
        latents = torch.stack([load_file(shapes_sdxl / f"{name}.img_sdxl")["latent"].float() for name in chosen])
        model_input = latents * pipeline.vae.config.scaling_factor
        prompts = [(shapes_sdxl / f"{name}.txt").read_text() for name in chosen]
        embeds, null, pooled, pooled_null = pipeline.encode_prompt(prompts, device="cpu")
        dropped = batch["dropped"][:, None].float()
        embeds = torch.lerp(embeds, null, dropped[..., None])
        pooled = torch.lerp(pooled, pooled_null, dropped)
        time_ids = torch.tensor(
            [ids_of_training_script(*Image.open(shapes_sdxl / f"{name}.png").size, 64, 64) for name in chosen]
        )
        noisy = scheduler.add_noise(model_input, batch["noise"], batch["timesteps"])
        added = {"text_embeds": pooled, "time_ids": time_ids}
        prediction = unet(noisy, batch["timesteps"], embeds, added_cond_kwargs=added, return_dict=False)[0]
        loss = F.mse_loss(prediction.float(), batch["noise"].float(), reduction="mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    found = [line["01_Training/loss"] for line in lines if "01_Training/loss" in line]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=1e-4, atol=1e-5)
    assert distance(weights, unet.state_dict(), weights_of(model_sdxl / "unet")) < 1e-2


def test_interrupted_run_with_everything_resumes_bit_exact(shapes_sdxl, model_sdxl, tmp_path):
    flags = ["--objective", "v_prediction", "--zero_terminal_snr", "--use_snr", "--cache_in_ram", *FULL_LOG]
    flags += ["--gradient_checkpointing"]
    common = ["--batch_size", 2, "--gradient_accum", 2, "--max_steps", 4, "--save_steps", 2, "--lr", 1e-3, *flags]
    common += ["--ema_decay", 0.9, "--cond_dropout", 0.3, "--val_split", 0.2, "--diagnostic_steps", 2]
    whole, half = tmp_path / "whole", tmp_path / "half"
    lines, _ = train(shapes_sdxl, model_sdxl, whole, *common, suffixes=SDXL)
    assert any("val/loss" in line for line in lines)
    half.mkdir()
    for name in ("args.json", "metrics.jsonl"):
        shutil.copy(whole / name, half)
    shutil.copytree(whole / "checkpoint-000002", half / "checkpoint-000002")
    train(shapes_sdxl, model_sdxl, half, *common, *RESUME, suffixes=SDXL)
    assert content(whole, 4) == content(half, 4)
    assert json_lines(half / "metrics.jsonl")[-1]["01_Training/loss"] == lines[-1]["01_Training/loss"]
    for name in ("text_encoder_2", "tokenizer_2"):
        assert (whole / "checkpoint-000004" / name).is_dir()
    load_pipeline(whole / "checkpoint-000004")


def test_caches_of_another_model_are_refused_with_the_command_that_makes_the_right_ones(
    shapes_sdxl, model_sdxl, model_sd, model_t5, shapes, tmp_path
):
    bare = tmp_path / "bare"  # UNets alone: no text encoder tells the caches apart
    for name, model in (("sdxl", model_sdxl), ("sd", model_sd)):
        shutil.copytree(model / "unet", bare / name / "unet")
    with mock.patch.object(UNet2DConditionModel, "from_pretrained", side_effect=AssertionError("loaded")):
        for model, named in ((model_sdxl, model_sdxl), (bare / "sdxl", "MODEL")):
            message = refused(shapes, model, tmp_path / "run", suffixes=CLIP)
            assert f"cache/create_sdxl_text.py --model {named} --data_root {shapes}" in message
            assert "and pass --txtcache_suffix .txt_sdxl" in message
        for model, named in ((model_sd, model_sd), (bare / "sd", "MODEL")):
            message = refused(shapes_sdxl, model, tmp_path / "run", suffixes=SDXL)
            assert f"cache/create_clipl.py --model {named} --data_root {shapes_sdxl}" in message
        message = refused(shapes_sdxl, model_t5, tmp_path / "run", suffixes=SDXL)
        assert f"cache/create_t5cache_768.py --model {model_t5} --data_root {shapes_sdxl}" in message
        message = refused(shapes, model_sdxl, tmp_path / "run", suffixes=T5)
        assert f"cache/create_sdxl_text.py --model {model_sdxl} --data_root {shapes}" in message
        message = refused(shapes_sdxl, bare / "sdxl", tmp_path / "run", "--sample_prompt", "a", suffixes=SDXL)
        assert f"{bare / 'sdxl'}: a UNet without a VAE cannot draw samples" in message
    command = conditioning.cache_command("sdxl", model_sdxl, "d", "txt_sdxl", ".txt_mine")
    assert command == f"cache/create_sdxl_text.py --model {model_sdxl} --data_root d --cache_suffix .txt_mine"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"cross_attention_dim": 64}, r"text embeddings have width 80, the UNet expects 64; .*create_sdxl_text"),
        ({"projection_class_embeddings_input_dim": 98}, "pooled text vectors have width 40, the UNet expects 50"),
        ({"addition_embed_type": "image"}, "addition_embed_type is 'image'; expected none"),
    ],
)  # fmt: skip
def test_widths_and_additions_that_do_not_fit_are_refused(config, message, shapes_sdxl, model_sdxl, tmp_path):
    model = copy_with(model_sdxl, tmp_path / "model", "unet", **config)
    with pytest.raises(ValueError, match=message):
        train(shapes_sdxl, model, tmp_path / "run", "--max_steps", 1, "--batch_size", 2, suffixes=SDXL)


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_model_with_one_of_two_encoders_is_refused_by_name(name, shapes_sdxl, model_sdxl, tmp_path):
    model = shutil.copytree(model_sdxl, tmp_path / "model")
    shutil.rmtree(model / name)
    with mock.patch.object(UNet2DConditionModel, "from_pretrained", side_effect=AssertionError("loaded")):
        message = refused(shapes_sdxl, model, tmp_path / "run", suffixes=SDXL)
    assert f"has no {name}/, which its model_index.json names" in message


def test_model_with_another_null_than_the_caches_is_refused(shapes_sdxl, model_sdxl, tmp_path):
    model = shutil.copytree(model_sdxl, tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    message = refused(shapes_sdxl, model, tmp_path / "run", suffixes=SDXL)
    assert "differ in force_zeros_for_empty_prompt" in message and "cache/create_sdxl_text.py --model" in message


def test_pooled_vector_that_is_missing_is_refused_by_name(shapes_sdxl, model_sdxl, tmp_path):
    data = shutil.copytree(shapes_sdxl, tmp_path / "data")
    tensors = load_file(data / "3.txt_sdxl")
    for path in data.glob("*.txt_sdxl"):  # foreign, as other programs may write them
        save_file(load_file(path) if path.stem != "3" else {"emb": tensors["emb"]}, path)
    message = refused(data, model_sdxl, tmp_path / "run", suffixes=SDXL)
    assert "3.txt_sdxl: expected a tensor 'pooled' of 1 dimensions" in message


def test_images_without_a_header_need_time_ids(shapes_sdxl, model_sdxl, shapes, model_t5, tmp_path, capsys):
    data = shutil.copytree(shapes_sdxl, tmp_path / "data")
    for path in data.glob("*.img_sdxl"):
        save_file(load_file(path), path)
    flags = ["--vae_scaling_factor", 0.5]
    message = refused(data, model_sdxl, tmp_path / "run", *flags, suffixes=SDXL)
    assert "0.img_sdxl: the UNet needs each image's size and crop" in message and "pass --time_ids" in message
    time_ids = ["--time_ids", 512, 512, 0, 0, 64, 64]
    run = ["--max_steps", 1, "--batch_size", 2]
    train(data, model_sdxl, tmp_path / "run", *flags, *time_ids, *run, suffixes=SDXL)
    train(shapes_sdxl, model_sdxl, tmp_path / "run2", *time_ids, *run, suffixes=SDXL)
    assert "--time_ids does nothing" in capsys.readouterr().err
    assert "takes none; omit the flag" in refused(shapes, model_t5, tmp_path / "run3", *time_ids)


def test_flipped_images_have_mirrored_crops(model_sdxl, shapes_sdxl, tmp_path):
    data = shutil.copytree(shapes_sdxl, tmp_path / "data")
    size = ["--target_width", 64, "--target_height", 64, "--num_workers", 0, "--flip"]
    assert run_script("cache/create_img_sdxl.py", "--data_root", data, "--model", model_sdxl, *size) == 0
    tensors, header = read_sidecar(data / "4.img_sdxl")  # 128 x 64 pixels: crop the left half
    write_sidecar(data / "4.img_sdxl", tensors, header.metadata | {"crop_box": "0,0,64,64"})
    index = PairIndex([data], *SDXL)
    sample = open_pairs(index, flip_p=1.0)[SampleKey(0, 4)]
    assert torch.equal(sample["latents"], tensors["latent_flip"].float())
    assert sample["condition"]["time_ids"].tolist() == [64, 128, 0, 64, 64, 64]


ADAPTER = pytest.param(["--lora_rank", 2, "--lora_targets", "all"], marks=pytest.mark.slow)


@pytest.mark.parametrize("adapter", [[], ADAPTER], ids=["whole", "lora"])
def test_compiled_unet_is_one_graph(shapes_sdxl, model_sdxl, tmp_path, monkeypatch, adapter):
    made, compile_module = [], UNet2DConditionModel.compile

    def keep(graph, _):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(UNet2DConditionModel, "compile", lambda self, **kw: compile_module(self, backend=keep, **kw))
    torch._dynamo.reset()
    flags = ["--compile", "--max_steps", 2, "--batch_size", 2, "--log_groups", 1, "--gradient_checkpointing"]
    flags += adapter
    argv = trainer_argv(shapes_sdxl, model_sdxl, tmp_path / "run", *flags, suffixes=SDXL)
    assert run_script("train_from_cached.py", *argv) == 0
    torch._dynamo.reset()
    assert len(made) == 1  # fullgraph: a graph break would be an error
