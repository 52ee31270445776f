"""Adapters: what is trained and saved, against peft and diffusers, which load it; merging; the base model."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.utils import convert_state_dict_to_diffusers
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from helpers import (
    CLIP,
    T5,
    TINY,
    digest,
    distance,
    json_lines,
    load_script,
    refused,
    run_script,
    trainer_argv,
    weights_of,
)
from peft import get_peft_model_state_dict
from PIL import Image
from runs import Runs
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sdxl_fixtures import SDXL, load_pipeline

from cachetrain.checkpoints import adapters, kohya, merge
from cachetrain.distributed import World
from cachetrain.modeling import load, lora
from cachetrain.training import run as opening

KINDS = {"sd": CLIP, "t5": T5, "sdxl": SDXL}
# Validation, and samples as `DRAW` draws them.
WATCHED = ["--val_split", 0.3, "--sample_prompt", "a red circle", "--sample_cfgs", 3, "--sampler_steps", 2]
DRAW = ["--prompt", "a red circle", "--cfgs", 3, "--seed", 0, "--sampler_steps", 2, "--device", "cpu"]


def fresh_unet(model):
    """A UNet with the config of a model's, and other weights."""
    torch.manual_seed(99)
    return UNet2DConditionModel.from_config(load.read_config(model / "unet"))


def adapted(unet, targets="all", dora=False, rank=2, alpha=3.0, seed=1):
    """Adds an adapter that changes what the UNet computes."""
    lora.add(unet, rank, alpha, targets, dora=dora)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora.trained_state(unet).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return unet


def output_of(unet):
    """What a UNet makes of a fixed input."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    arguments = {"encoder_hidden_states": draw(1, 5, unet.config.cross_attention_dim)}
    if pooled := load.pooled_width(unet.config):
        arguments["added_cond_kwargs"] = {"text_embeds": draw(1, pooled), "time_ids": draw(1, 6)}
    with torch.no_grad():
        return unet.eval()(draw(1, 4, 8, 8), torch.tensor([500]), **arguments).sample


@pytest.fixture(scope="module")
def runs(shapes, shapes_sdxl, model_sd, model_t5, model_sdxl, tmp_path_factory):
    """{kind: (base model, output_dir)} of runs of 2 steps with averages, and a file for web UIs of each."""
    root, models, found = tmp_path_factory.mktemp("lora"), {"sd": model_sd, "t5": model_t5, "sdxl": model_sdxl}, {}
    for kind, suffixes in KINDS.items():
        targets = {"sd": "attention_ff", "t5": "attention", "sdxl": "all"}[kind]
        flags = ["--max_steps", 2, "--batch_size", 4, "--lr", 0.05, "--save_steps", 1, "--ema_decay", 0.5]
        flags += ["--lora_rank", 3, "--lora_alpha", 2, "--lora_targets", targets, "--ckpt_dir", root / "web"]
        flags += ["--log_groups", 1, 11, *(WATCHED if kind == "sd" else [])]
        data = shapes_sdxl if kind == "sdxl" else shapes
        argv = trainer_argv(data, models[kind], root / kind, *flags, suffixes=suffixes)
        assert run_script("train_from_cached.py", *argv) == 0
        found[kind] = models[kind], root / kind
    return found


def pipeline_of(kind, model):
    if kind == "sdxl":
        pipeline = load_pipeline(model)
    else:
        options = {"custom_pipeline": str(model), "trust_remote_code": True} if kind == "t5" else {}
        pipeline = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32, **options)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    return pipeline


def drawn(model, out, *flags):
    """The picture that sample.py draws, int [H, W, 3]."""
    assert run_script("sample.py", "--model", model, "--out", out, *DRAW, *flags) == 0
    (path,) = out.iterdir()
    return np.asarray(Image.open(path)).astype(int)


def drawn_by(pipeline):
    generator, size = torch.Generator().manual_seed(0), {"height": 64, "width": 64}
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "generator": generator, **size}
    return np.asarray(pipeline("a red circle", **settings).images[0]).astype(int)


@pytest.mark.parametrize(
    ("kind", "weights", "flags"),
    [("sd", "unet_ema", []), ("t5", ".", ["--raw_weights"]), ("sdxl", "unet_ema", [])],
)
def test_load_lora_weights_draws_what_sample_draws(runs, kind, weights, flags, tmp_path):
    model, run = runs[kind]
    checkpoint, pipeline = run / "checkpoint-000002", pipeline_of(kind, model)
    base = drawn_by(pipeline)
    pipeline.load_lora_weights(checkpoint / weights)
    expected = drawn_by(pipeline)
    assert np.abs(drawn(checkpoint, tmp_path / "out", *flags) - expected).max() <= 1
    assert np.abs(base - expected).max() > 1


def test_training_and_watch_draw_what_sample_draws(runs, tmp_path):
    _, run = runs["sd"]
    assert {"val/loss", "val/loss_ema"} <= json_lines(run / "metrics.jsonl")[-1].keys()
    copy, name = tmp_path / "run", "step-000002/00-a-red-circle_cfg3.png"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("samples"))
    assert run_script("sample.py", "--watch", copy, "--device", "cpu") == 0
    expected = drawn(run / "checkpoint-000002", tmp_path / "out")
    for folder in (run, copy):
        assert np.abs(np.asarray(Image.open(folder / "samples" / name)).astype(int) - expected).max() <= 1
    assert (copy / "samples" / "step-000001").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_an_adapter_and_its_training_state(runs, kind):
    model, run = runs[kind]
    checkpoint = run / "checkpoint-000002"
    names = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert names == {
        lora.FILE, f"unet_ema/{lora.FILE}", "cachetrain.json", "manifest.json", "scheduler/scheduler_config.json",
        "training_state/state.json", "training_state/tensors.safetensors",
    }  # fmt: skip
    assert adapters.base_of(checkpoint) == model
    with safe_open(checkpoint / lora.FILE, "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    assert settings["unet.r"] == 3 and settings["unet.lora_alpha"] == 2


def test_names_in_a_file_are_those_of_peft_and_load_gives_back_the_tensors(model_sd, tmp_path):
    unet = adapted(fresh_unet(model_sd), dora=True)
    state = {name: tensor.clone() for name, tensor in lora.trained_state(unet).items()}
    lora.save(unet, state, tmp_path)
    saved = load_file(tmp_path / lora.FILE)
    expected = {f"unet.{name}": tensor for name, tensor in get_peft_model_state_dict(unet).items()}
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    with torch.no_grad():
        for parameter in lora.trained_state(unet).values():
            parameter.zero_()
    lora.load(unet, tmp_path / lora.FILE)
    assert all(torch.equal(tensor, state[name]) for name, tensor in lora.trained_state(unet).items())
    attention = fresh_unet(model_sd)
    lora.add(attention, 2, 3.0, "attention")
    with pytest.raises(ValueError, match="is not the adapter of these settings"):
        lora.load(attention, tmp_path / lora.FILE)


def test_targets_are_the_layers_of_these_kinds(model_sd):
    modules = {name: module for name, module in fresh_unet(model_sd).named_modules() if hasattr(module, "weight")}
    dense = {name for name, m in modules.items() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
    attention = {name for name in dense if ".attn" in name}
    expected = {
        "attention": attention,
        "attention_ff": attention | {name for name in dense if ".ff." in name},
        "all": {name for name in dense if name.startswith(("down_blocks", "mid_block", "up_blocks"))},
    }
    for targets, names in expected.items():
        unet = fresh_unet(model_sd)
        lora.add(unet, 2, 2.0, targets)
        found = {name.partition(".lora_")[0] for name, p in unet.named_parameters() if p.requires_grad}
        assert found == names
        assert {name for name, p in unet.named_parameters() if not p.requires_grad and ".lora_" in name} == set()


def open_unet(shapes, model, *flags):
    argv = trainer_argv(shapes, model, TINY / "x", "--max_steps", 1, "--batch_size", 2, *flags)
    return opening.open_unet(opening.open_run(load_script("train_from_cached.py").parse_args(argv), World()))[0]


@pytest.mark.parametrize(
    ("precision", "frozen", "trained"),
    [
        ("fp32", torch.float32, torch.float32),
        ("bf16", torch.bfloat16, torch.float32),
        ("bf16_pure", torch.bfloat16, torch.bfloat16),
        ("fp16", torch.float16, torch.float32),
    ],
)
def test_the_base_is_frozen_in_the_dtype_of_the_precision(shapes, model_t5, precision, frozen, trained):
    unet = open_unet(shapes, model_t5, "--lora_rank", 2, "--precision", precision)
    for name, parameter in unet.named_parameters():
        adapter = "lora_" in name
        assert (parameter.dtype, parameter.requires_grad) == (trained if adapter else frozen, adapter), name


def test_only_the_adapter_trains(shapes, model_t5, tmp_path, monkeypatch):
    opened, open_unet = [], opening.open_unet

    def watched(*args):
        unet, table = open_unet(*args)
        opened.append((unet, {name: p.detach().clone() for name, p in unet.named_parameters()}))
        return unet, table

    monkeypatch.setattr(opening, "open_unet", watched)
    flags = ["--lora_rank", 2, "--precision", "bf16", "--max_steps", 2, "--batch_size", 4, "--lr", 0.01]
    assert run_script("train_from_cached.py", *trainer_argv(shapes, model_t5, tmp_path / "run", *flags)) == 0
    ((unet, before),) = opened
    for name, parameter in unet.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name
    saved = load_file(tmp_path / "run" / "checkpoint-000002" / lora.FILE)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_gradient_checkpointing_gives_the_same_gradients(shapes, model_t5):
    gradients = []
    for flags in ([], ["--gradient_checkpointing"]):
        unet = open_unet(shapes, model_t5, "--lora_rank", 2, *flags)
        torch.manual_seed(1)
        inputs = torch.randn(1, 4, 8, 8), torch.tensor([10]), torch.randn(1, 5, unet.config.cross_attention_dim)
        unet(*inputs).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in unet.named_parameters() if p.requires_grad})
    assert unet.is_gradient_checkpointing
    torch.testing.assert_close(*gradients)


def test_ranks_train_the_adapter_of_one_process(shapes, model_t5, tmp_path):
    runs, adapters_of = Runs(shapes, model_t5, tmp_path), []
    for ranks in (1, 2):
        out = runs.new()
        flags = ["--lora_rank", 2, "--lr", 1e-2, "--max_steps", 2, "--batch_size", 4 // ranks]
        results = runs.launch(out, ranks, *flags)
        assert [rank.code for rank in results] == [0] * ranks, [rank.output for rank in results]
        adapters_of.append(load_file(out / "checkpoint-000002" / lora.FILE))
    ups = [{name: tensor for name, tensor in a.items() if ".lora_B." in name} for a in adapters_of]
    assert distance(*ups, {name: torch.zeros_like(tensor) for name, tensor in ups[0].items()}) < 1e-3


def test_logs_call_the_gradients_of_adapters_by_their_name(runs):
    tags = json_lines(runs["sdxl"][1] / "metrics.jsonl")[-1].keys()
    attention = {name for name, _ in fresh_unet(runs["sdxl"][0]).named_modules() if name.endswith(("attn1", "attn2"))}
    for tag in ("lora_qk_rms", "lora_qk_over_v", "lora_qk_over_weight"):
        assert {f"11_Gradient_Stats/{tag}/{layer}" for layer in attention} <= tags
    assert "01_Training/lora_qk_grads_av" in tags
    assert not any("/qk_" in tag for tag in tags)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_lora_qk_rms_is_that_of_autograd(model_t5, dora):
    from cachetrain.training.logs.gradients import Gradients

    unet = adapted(fresh_unet(model_t5), "attention", dora)
    world = SimpleNamespace(ranks=1, sum=lambda tensor: tensor)
    gradients = Gradients(unet, world, torch.device("cpu"))
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([10]), torch.randn(1, 5, unet.config.cross_attention_dim)
    unet(*inputs).sample.square().mean().backward()
    gradients.measure(True)
    tags = gradients.tags({name: tensor.reshape(-1).numpy() for name, tensor in gradients.sums().items()})
    layer = "mid_block.attentions.0.transformer_blocks.0.attn2"
    parts = [p.grad.flatten() for name, p in unet.named_parameters()
             if p.requires_grad and name.startswith((f"{layer}.to_q.", f"{layer}.to_k."))]  # fmt: skip
    assert len(parts) == (6 if dora else 4)
    assert tags[f"11_Gradient_Stats/lora_qk_rms/{layer}"] == pytest.approx(
        torch.cat(parts).square().mean().sqrt().item()
    )


# Files of web UIs


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_file_of_web_uis_converted_back_by_diffusers_and_by_us_gives_the_same_tensors(
    kind, dora, model_sd, model_sdxl, tmp_path
):
    model = {"sd": model_sd, "sdxl": model_sdxl}[kind]
    unet = adapted(fresh_unet(model), dora=dora)
    expected = get_peft_model_state_dict(unet)
    modules = {name.partition(".lora_")[0] for name in expected}
    tensors = kohya.to_kohya(lora.Adapter(expected, dict.fromkeys(modules, 3.0)), fresh_unet(model))
    assert any("input_blocks" in key for key in tensors) == (kind == "sdxl")
    ours = kohya.from_kohya(tensors, fresh_unet(model))
    assert ours.alphas == dict.fromkeys(modules, 3.0)
    assert ours.tensors.keys() == expected.keys()
    assert all(torch.equal(ours.tensors[name], tensor) for name, tensor in expected.items())
    theirs = dict(tensors)
    if kind == "sdxl":
        theirs = _maybe_map_sgm_blocks_to_diffusers(theirs, unet.config)
    theirs, alphas = _convert_non_diffusers_lora_to_diffusers(theirs)
    theirs = convert_unet_state_dict_to_peft({key.removeprefix("unet."): t for key, t in theirs.items()})
    theirs = {key.replace("_vector.weight", "_vector"): tensor for key, tensor in theirs.items()}
    assert theirs.keys() == expected.keys() and set(alphas.values()) == {3.0} and len(alphas) == len(modules)
    assert all(torch.equal(theirs[name].flatten(), tensor.flatten()) for name, tensor in expected.items())


@pytest.mark.parametrize("kind", KINDS)
def test_ckpt_dir_gets_the_averages_as_diffusers_reads_them(runs, kind):
    model, run = runs[kind]
    file = run.parent / "web" / f"{kind}-000002.safetensors"
    mixin = StableDiffusionXLLoraLoaderMixin if kind == "sdxl" else StableDiffusionLoraLoaderMixin
    state, alphas = mixin.lora_state_dict(file, unet_config=fresh_unet(model).config)
    state = convert_unet_state_dict_to_peft(state)
    expected = load_file(run / "checkpoint-000002" / "unet_ema" / lora.FILE)
    assert state.keys() == expected.keys() and set(alphas.values()) == {2.0}
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"], metadata["weights"]) == ("3", "2", "unet_ema")
    assert metadata["ss_base_model_version"] == ("sdxl_base_v1-0" if kind == "sdxl" else "sd_v1")
    assert ("T5" in metadata["notes"]) == (kind == "t5")


def test_export_single_file_writes_the_same_file(runs, tmp_path):
    _, run = runs["sd"]
    out = tmp_path / "sd-000002.safetensors"
    for _ in range(2):  # over an earlier one, too
        assert run_script("models/export_single_file.py", "--model", run / "checkpoint-000002", "--out", out) == 0
    contents = []
    for path in (out, run.parent / "web" / out.name):
        with safe_open(path, "pt") as file:
            contents.append((digest(load_file(path)), file.metadata()))
    assert contents[0] == contents[1]


def test_older_layouts_of_diffusers_are_read_too(model_sd, tmp_path, capsys):
    unet = adapted(fresh_unet(model_sd), "attention_ff")
    expected = get_peft_model_state_dict(unet)
    old = {f"unet.{key}": tensor for key, tensor in convert_state_dict_to_diffusers(expected).items()}
    assert any(".lora.down." in key for key in old)
    old["text_encoder.x.lora_linear_layer.up.weight"] = torch.zeros(2, 2)
    save_file(old, tmp_path / "x.safetensors")
    adapter, base = adapters.read_adapter(tmp_path / "x.safetensors", fresh_unet(model_sd))
    assert "left out, because not for the UNet: 1 tensor (like text_encoder.x" in capsys.readouterr().err
    assert base is None and set(adapter.alphas.values()) == {2.0}  # without settings, alpha is the rank
    assert adapter.tensors.keys() == expected.keys()


def test_a_damaged_alpha_is_named(runs, model_sd, tmp_path):
    tensors = load_file(runs["sd"][1].parent / "web" / "sd-000002.safetensors")
    key = next(key for key in tensors if key.endswith(".alpha"))
    save_file(tensors | {key: torch.ones(2)}, path := tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=rf"{path}: {key} is of shape \[2\], expected one number; get it again"):
        adapters.read_adapter(path, fresh_unet(model_sd))


# Merging


def merge_script(*argv):
    return run_script("models/merge_lora.py", *argv)


@pytest.fixture(scope="module")
def random_adapters(model_sd, tmp_path_factory):
    """Directories of two LoRAs and a DoRA of the vanilla model."""
    root = tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(("one", "two", "dora")):
        targets = "attention" if name == "two" else "all"
        unet = adapted(load.load_unet(model_sd / "unet"), targets, name == "dora", rank=2 + number, seed=number)
        lora.save(unet, lora.trained_state(unet), root / name)
    return root


@pytest.mark.parametrize("weights", [{"one": 0.5, "two": -0.7}, {"dora": 0.6}], ids=str)
def test_merged_unet_computes_what_diffusers_computes_with_the_adapters_active(weights, model_sd, random_adapters):
    pipeline = StableDiffusionPipeline.from_pretrained(model_sd, torch_dtype=torch.float32, safety_checker=None)
    before = output_of(pipeline.unet)
    for name in weights:
        pipeline.load_lora_weights(random_adapters / name, adapter_name=name)
    pipeline.set_adapters(list(weights), list(weights.values()))
    expected = output_of(pipeline.unet)
    merged = merge.merged_unet(model_sd, [merge.Weighted(random_adapters / name, w) for name, w in weights.items()])
    torch.testing.assert_close(output_of(merged), expected, rtol=1e-4, atol=1e-5)
    assert (before - expected).abs().max() > 0.01


def test_each_merged_adapter_changes_what_it_changes_alone_in_any_order_and_layout(
    model_sd, random_adapters, tmp_path, capsys
):
    adapter, _ = adapters.read_adapter(random_adapters / "dora" / lora.FILE, fresh_unet(model_sd))
    save_file(kohya.to_kohya(adapter, fresh_unet(model_sd)), tmp_path / "dora.safetensors")
    one, dora = random_adapters / "one", tmp_path / "dora.safetensors"
    before = weights_of(model_sd / "unet")
    alone = [
        merge.merged_unet(model_sd, [merge.Weighted(path, 0.5)]).state_dict()
        for path in (one, random_adapters / "dora")
    ]
    assert merge_script("--lora", f"{dora}:0.5", f"{one}:0.5", "--model", model_sd, "--out", tmp_path / "out") == 0
    for name, weight in weights_of(tmp_path / "out" / "unet").items():
        torch.testing.assert_close(weight, alone[0][name] + alone[1][name] - before[name])
    assert "does not record its base model" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_pipeline_is_what_the_checkpoint_draws_with(runs, kind, tmp_path):
    model, run = runs[kind]
    checkpoint = run / "checkpoint-000002"
    assert merge_script("--lora", checkpoint, "--out", tmp_path / "merged") == 0
    merged = pipeline_of(kind, tmp_path / "merged").unet
    expected = output_of(adapters.load_unet(checkpoint, model, False, torch.float32))
    torch.testing.assert_close(output_of(merged), expected, rtol=1e-4, atol=1e-5)
    info = json.loads((tmp_path / "merged" / "cachetrain.json").read_text())
    assert info["text"]["kind"] == KINDS[kind][1].replace(".", "") and "base" not in info


def test_merging_into_a_single_file_is_exporting_the_merged_pipeline(runs, tmp_path):
    _, run = runs["sd"]
    checkpoint, out = run / "checkpoint-000002", tmp_path / "merged.safetensors"
    assert merge_script("--lora", f"{checkpoint}:0.5", "--out", out, "--dtype", "fp16") == 0
    assert merge_script("--lora", f"{checkpoint}:0.5", "--out", tmp_path / "merged") == 0
    flags = ["--model", tmp_path / "merged", "--out", tmp_path / "exported.safetensors", "--dtype", "fp16"]
    assert run_script("models/export_single_file.py", *flags) == 0
    ours, theirs = load_file(out), load_file(tmp_path / "exported.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for path in (out, tmp_path / "merged"):
        assert merge_script("--lora", checkpoint, "--out", path, "--overwrite") == 0


def test_merging_replaces_nothing_of_another_kind(runs, tmp_path, capsys):
    checkpoint = runs["sd"][1] / "checkpoint-000002"
    (data := tmp_path / "data").mkdir()
    (data / "a.txt").write_text("a red circle")
    save_file({"latent": torch.zeros(4, 8, 8)}, data / "a.safetensors", {"format": "pt"})
    before = {path.name: path.read_bytes() for path in data.iterdir()}
    with pytest.raises(ValueError, match=r"data: has no unet/config\.json, so it is not replaced"):
        merge_script("--lora", checkpoint, "--out", data, "--overwrite")
    with pytest.raises(SystemExit):
        merge_script("--lora", checkpoint, "--out", data / "a.safetensors", "--overwrite")
    assert "exists, and is no single file that these tools wrote" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in data.iterdir()} == before


def test_merged_weights_have_the_dtype_of_the_base_model(model_sd, runs, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(model_sd, half)
    unet = load.load_unet(model_sd / "unet", torch.float16)
    unet.save_pretrained(half / "unet")
    web = runs["sd"][1].parent / "web" / "sd-000002.safetensors"
    with pytest.raises(ValueError, match=r"was trained on the UNet of .*, and that of .*half is another one"):
        merge_script("--lora", web, "--model", half, "--out", tmp_path / "refused")
    unet = adapted(load.load_unet(model_sd / "unet"), "attention")
    lora.save(unet, lora.trained_state(unet), tmp_path / "adapter")
    assert merge_script("--lora", tmp_path / "adapter", "--model", half, "--out", tmp_path / "merged") == 0
    merged = weights_of(tmp_path / "merged" / "unet")
    assert {tensor.dtype for tensor in merged.values()} == {torch.float16}


# The base model


@pytest.fixture
def moved(runs, tmp_path):
    """(checkpoint whose base model is not where it was, that model, another one)."""
    model, run = runs["sd"]
    checkpoint = tmp_path / "checkpoint-000002"
    shutil.copytree(run / "checkpoint-000002", checkpoint)
    info = json.loads((checkpoint / "cachetrain.json").read_text())
    info["base"]["model"] = str(tmp_path / "gone")
    (checkpoint / "cachetrain.json").write_text(json.dumps(info))
    other = tmp_path / "other"
    shutil.copytree(model, other)
    fresh_unet(model).save_pretrained(other / "unet")
    return checkpoint, model, other


def test_an_adapter_is_drawn_and_merged_with_its_base_model_only(moved, tmp_path, capsys):
    checkpoint, model, other = moved
    with pytest.raises(
        ValueError, match=r"its base model is not there .*gone: no such directory.*; pass it with --base"
    ):
        drawn(checkpoint, tmp_path / "a")
    with pytest.raises(ValueError, match=r"was trained on the UNet of .*gone, and that of .*other is another one"):
        drawn(checkpoint, tmp_path / "b", "--base", other)
    with pytest.raises(ValueError, match="was trained on the UNet of"):
        merge_script("--lora", checkpoint, "--model", other, "--out", tmp_path / "merged")
    with pytest.raises(ValueError, match=r"its base model is not there .*; pass it with --model"):
        merge_script("--lora", checkpoint, "--out", tmp_path / "merged")
    drawn(checkpoint, tmp_path / "c", "--base", model)
    shutil.copytree(model / "unet", other / "unet", dirs_exist_ok=True)
    (other / "text_encoder" / "config.json").write_text(
        json.dumps(load.read_config(other / "text_encoder") | {"layer_norm_eps": 1e-4})
    )
    drawn(checkpoint, tmp_path / "d", "--base", other)
    assert "its text_encoder is not that of" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--base is for adapters"):
        drawn(model, tmp_path / "e", "--base", other)
    with pytest.raises(ValueError, match="--base is for adapters"):
        flags = ["--model", model, "--base", other, "--out", tmp_path / "x.safetensors"]
        run_script("models/export_single_file.py", *flags)


def test_a_run_resumes_on_its_base_model_only_and_as_what_it_was(runs, shapes, moved, tmp_path):
    run, (_, _, other) = runs["sd"][1], moved
    more = ["--lr", 0.05, "--lora_alpha", 2, "--lora_targets", "attention_ff", "--ema_decay", 0.5, "--batch_size", 4]
    resume = [*more, "--val_split", 0.3, "--max_steps", 2, "--resume", run / "checkpoint-000001"]
    out = tmp_path / "resumed"
    assert "was trained on the UNet of" in refused(shapes, other, out, "--lora_rank", 3, *resume, suffixes=CLIP)
    for rank, dora, line in ((4, [], "lora_rank: 3 then, 4 now"), (3, ["--dora"], "dora: False then, True now")):
        for anyway in ([], ["--resume_anyway"]):  # which cannot help
            flags = ["--lora_rank", rank, *dora, *resume, *anyway]
            message = refused(shapes, runs["sd"][0], out, *flags, suffixes=CLIP)
            assert f"holds another adapter: {line}; restore these settings" in message
    plain = ["--max_steps", 2, "--resume", run / "checkpoint-000001", "--resume_anyway"]
    assert "holds an adapter" in refused(shapes, runs["sd"][0], out, *plain, suffixes=CLIP)


def test_an_adapter_where_a_model_is_wanted_is_named(runs, shapes, tmp_path):
    checkpoint = runs["sd"][1] / "checkpoint-000002"
    message = "is an adapter, not a model; merge it into its base model with models/merge_lora.py first"
    assert message in refused(shapes, checkpoint, tmp_path / "run", suffixes=CLIP)
    for script in ("cache/create_img_sdxl.py", "cache/create_clipl.py"):
        with pytest.raises(ValueError, match=message):
            run_script(script, "--data_root", shapes, "--model", checkpoint)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, "belongs to no layer of the UNet"),
        ({"lora_unet_mid_block_resnets_0_conv1.hada_w1_a": torch.zeros(2, 2)}, "another kind of adapter"),
        ({"unet.conv_out.lora_A.weight": torch.zeros(2, 9)}, "is incomplete"),
        ({f"unet.conv_out.lora_{side}.weight": torch.zeros(2, 2, 1, 1) for side in "AB"},
         "does not fit the UNet: conv_out is"),
        ({"unet.conv_out.lora_A.weight": torch.full((2, 2), torch.nan)}, "are not all finite"),
        ({"x": torch.zeros(2)}, "no tensors of an adapter"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_adapter_of_the_unet_is_named_with_the_reason(model_sd, tmp_path, change, error):
    save_file(change, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=error) as caught:
        merge.merged_unet(model_sd, [merge.Weighted(tmp_path / "x.safetensors", 1.0)])
    assert str(tmp_path / "x.safetensors") in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"not an adapter; expected a .safetensors file"):
        merge.merged_unet(model_sd, [merge.Weighted(tmp_path / "nothing", 1.0)])


# Flags


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ("--dora", "--dora needs --lora_rank"),
        ("--lora_targets all", "--lora_targets needs --lora_rank"),
        ("--lora_rank 4 --unfreeze_attn2", "--lora_rank cannot be combined with --unfreeze_attn2: only the adapter"),
        ("--lora_rank 4 --unfreeze_up_blocks 0", "--lora_rank cannot be combined with --unfreeze_up_blocks"),
        ("--lora_rank 4 --reinit_unet", "--lora_rank cannot be combined with --reinit_unet"),
        ("--lora_rank 4 --targetted_training", "--lora_rank cannot be combined with --targetted_training"),
        (
            "--lora_rank 4 --gradient_release --optimizer lion",
            "--lora_rank cannot be combined with --gradient_release",
        ),
        ("--lora_rank 4 --fsdp", "--lora_rank cannot be combined with --fsdp"),
    ],
)
def test_flags_that_cannot_be_combined_with_adapters_are_refused_in_one_line(flags, error, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2" if "fsdp" in flags else "1")
    with pytest.raises(SystemExit):
        load_script("train_from_cached.py").parse_args([*trainer_argv("d", "m", TINY / "x"), *flags.split()])
    assert error in capsys.readouterr().err.splitlines()[-1]


def test_absence_of_peft_is_one_line(capsys, monkeypatch):
    from cachetrain.training import options

    monkeypatch.setattr(options, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        load_script("train_from_cached.py").parse_args([*trainer_argv("d", "m", TINY / "x"), "--lora_rank", "4"])
    assert capsys.readouterr().err.splitlines()[-1].endswith("--lora_rank needs peft: pip install peft")
    monkeypatch.setattr("diffusers.utils.USE_PEFT_BACKEND", False)
    with pytest.raises(ValueError, match=r"adapters need peft 0.17 or newer: run `pip install -U peft`"):
        lora.add(None, 2, 2.0, "attention")
