"""Weights that are not there, or not those of the config, are refused; so is a config that would run other code."""

import contextlib
import json
import math
import os
import shlex
import shutil

import pytest
import torch
from helpers import TINY, WEIGHTS, refused, run_script, train, weights_of
from safetensors.torch import load_file, save_file

from cachetrain.checkpoints.info import checkpoint_info
from cachetrain.modeling import load
from cachetrain.modeling.files import component_files

LOADERS = {
    "unet": load.load_unet,
    "vae": load.load_vae,
    "clip": load.load_text_encoder,
    "t5": load.load_text_encoder,
    "projection": load.load_projection,
}
COMPONENTS = pytest.mark.parametrize("component", LOADERS)


@pytest.fixture
def part(request, model_t5, model_sd, tmp_path):
    """A copy of a component, and the path of its weights."""
    name = request.getfixturevalue("component")
    source = {"clip": model_sd / "text_encoder", "t5": model_t5 / "text_encoder"}.get(name, model_t5 / name)
    shutil.copytree(source, tmp_path / "part")
    return tmp_path / "part", tmp_path / "part" / ("model.safetensors" if name in ("clip", "t5") else WEIGHTS)


def equal(module, tensors):
    """Whether a module has these tensors; transformers strips a prefix."""
    state = {name.removeprefix("text_model."): value for name, value in module.state_dict().items()}
    return all(torch.equal(state[name.removeprefix("text_model.")], value) for name, value in tensors.items())


def changed(tensors):
    """The name of the tensor that is removed or reshaped; not "shared.weight", which T5 has under two names."""
    return min(tensors)


def missing(tensors):
    del tensors[changed(tensors)]


def left_over(tensors):
    tensors["one.too.many"] = torch.zeros(3)


def other_shape(tensors):
    tensors[changed(tensors)] = torch.zeros(3, 5, 7)


@COMPONENTS
@pytest.mark.parametrize("fault", [missing, left_over, other_shape])
def test_weights_that_are_not_those_of_the_config_are_refused_by_name(component, fault, part):
    directory, path = part
    tensors = load_file(path)
    name = "one.too.many" if fault is left_over else changed(tensors)
    fault(tensors)
    save_file(tensors, path, {"format": "pt"})
    what = fault.__name__.replace("_", " ").replace("other", "of another")
    with pytest.raises(ValueError, match=f"part: the weights are not those .* 1 {what} .*; get both again") as error:
        LOADERS[component](directory)
    assert name.removeprefix("text_model.") in str(error.value)


@COMPONENTS
def test_damaged_weights_are_refused(component, part):
    directory, path = part
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"part: cannot be used .* get the files again"):
        LOADERS[component](directory)


@COMPONENTS
@pytest.mark.parametrize("kind", ["bin", "fp16"])
def test_weights_in_other_files_are_refused_with_the_command_that_converts_them(component, kind, part):
    directory, path = part
    tensors = load_file(path)
    if kind == "fp16":
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))
    else:
        torch.save(tensors, path.with_name("pytorch_model.bin" if path.stem == "model" else f"{path.stem}.bin"))
        path.unlink()
    with pytest.raises(ValueError, match="to convert it, run: python -c") as error:
        LOADERS[component](directory)
    python, flag, code = shlex.split(str(error.value).partition("run: ")[2])
    assert (python, flag) == ("python", "-c")
    exec(code)
    assert equal(LOADERS[component](directory), tensors)


def sharded(directory, names):
    """Splits a component's weights into two files with these names."""
    tensors = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    weight_map = {}
    for number, name in enumerate(names):
        keys = sorted(tensors)[number::2]
        weight_map |= dict.fromkeys(keys, name)
        (directory / name).parent.mkdir(exist_ok=True)
        if name.endswith(".safetensors"):
            save_file({key: tensors[key] for key in keys}, directory / name, {"format": "pt"})
        else:
            torch.save({key: tensors[key] for key in keys}, directory / name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return tensors


def test_shards_are_loaded_and_listed(tmp_path):
    shutil.copytree(TINY / "vae", tmp_path / "vae")
    tensors = sharded(tmp_path / "vae", ["a.safetensors", "b.safetensors"])
    assert equal(load.load_vae(tmp_path / "vae"), tensors)
    listed = [path.name for path in component_files(tmp_path / "vae", "vae")]
    assert listed == ["a.safetensors", "b.safetensors", "config.json", f"{WEIGHTS}.index.json"]


@pytest.mark.parametrize("second", ["b.bin", "../b.safetensors", "sub/b.safetensors", "/etc/b.safetensors"])
def test_an_index_of_other_files_is_refused(tmp_path, second):
    shutil.copytree(TINY / "vae", tmp_path / "vae")
    sharded(tmp_path / "vae", ["a.safetensors", "b.safetensors"])
    index = tmp_path / "vae" / f"{WEIGHTS}.index.json"
    index.write_text(index.read_text().replace("b.safetensors", second))
    with pytest.raises(ValueError, match="not a safetensors file in the same directory"):
        load.load_vae(tmp_path / "vae")


@pytest.mark.parametrize("content", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "absent.safetensors"}}'])
def test_a_broken_index_is_refused(tmp_path, content):
    shutil.copytree(TINY / "vae", tmp_path / "vae")
    (tmp_path / "vae" / WEIGHTS).unlink()
    (tmp_path / "vae" / f"{WEIGHTS}.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index.json: .* get the file again"):
        load.load_vae(tmp_path / "vae")


def test_two_sets_of_weights_are_refused(tmp_path):
    shutil.copytree(TINY / "vae", tmp_path / "vae")
    (tmp_path / "vae" / f"{WEIGHTS}.index.json").write_text("{}")
    with pytest.raises(ValueError, match="contains both"):
        load.load_vae(tmp_path / "vae")


@pytest.mark.parametrize(
    "entry",
    [
        {"attn_implementation": "owner/kernel"},
        {"_attn_implementation": "owner/kernel"},
        {"text_config": {"_attn_implementation_internal": "owner/kernel"}},
        {"experts_implementation": "flash"},
        {"auto_map": {"AutoModel": "code.Model"}},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        {"configuration_files": ["config.4.0.0.json"]},
        {"transformers_weights": "adapter_model.bin"},
    ],
)
@pytest.mark.parametrize("component", ["clip", "vae", "unet"])
def test_a_config_that_names_code_is_refused(component, entry, part):
    directory, _ = part
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | entry))
    with pytest.raises(ValueError, match="would run code that is not part of this project"):
        LOADERS[component](directory)


def test_a_tokenizer_that_names_another_vocabulary_is_refused(model_t5, tmp_path):
    tokenizer = shutil.copytree(model_t5 / "tokenizer", tmp_path / "tokenizer")
    path = tokenizer / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fast_tokenizer_files": ["tokenizer.4.0.0.json"]}))
    with pytest.raises(ValueError, match=r"'fast_tokenizer_files' is .* files that are not checked"):
        load.load_tokenizer(tokenizer, load.load_text_encoder(model_t5 / "text_encoder"))


@COMPONENTS
def test_the_libraries_see_only_the_files_that_are_checked_and_copied(component, part, monkeypatch):
    directory, _ = part
    for name in ("adapter_config.json", "config.4.0.0.json", "model.fp16.safetensors", "tokenizer.4.0.0.json"):
        (directory / name).write_text("{}")
    seen, real_listing = [], load.only_files

    @contextlib.contextmanager
    def watched(files):
        with real_listing(files) as copy:
            seen.append(sorted(path.name for path in copy.iterdir()))
            yield copy

    monkeypatch.setattr(load, "only_files", watched)
    LOADERS[component](directory)
    name = {"clip": "text_encoder", "t5": "text_encoder"}.get(component, component)
    assert seen == [[path.name for path in component_files(directory, name)]]


@pytest.mark.parametrize("content", ["", "[1]", "{"])
@pytest.mark.parametrize("component", ["clip", "vae", "unet"])
def test_a_config_that_is_no_json_object_is_refused(component, content, part):
    directory, _ = part
    (directory / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config.json: .* get the file again"):
        LOADERS[component](directory)


# A UNet without weights, in all that uses one


@pytest.fixture
def bin_only(model_t5, tmp_path):
    """A model whose UNet has only .bin weights."""
    model = tmp_path / "model"
    shutil.copytree(model_t5, model)
    torch.save(weights_of(model / "unet"), model / "unet" / "diffusion_pytorch_model.bin")
    (model / "unet" / WEIGHTS).unlink()
    return model


def test_pickled_weights_are_never_replaced_by_random_ones(bin_only, shapes, tmp_path):
    assert "pickles are never read; to convert it" in refused(shapes, bin_only, tmp_path / "run")
    parts = ["--unet", bin_only, "--vae", TINY / "vae", "--t5", TINY / "t5"]
    with pytest.raises(ValueError, match="pickles are never read"):
        run_script("models/compose_t5_sd.py", *parts, "--out", tmp_path / "composed")
    assert not (tmp_path / "composed").exists()
    with pytest.raises(ValueError, match="pickles are never read"):
        run_script("sample.py", "--model", bin_only, "--prompt", "a star", "--out", tmp_path / "drawn")


def test_only_a_flag_gives_a_config_random_weights(model_t5, shapes, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(model_t5, model)
    (model / "unet" / WEIGHTS).unlink()
    parts = ["--unet", model, "--vae", TINY / "vae", "--t5", TINY / "t5"]
    with pytest.raises(ValueError, match="use --fresh_unet of models/compose"):
        run_script("models/compose_t5_sd.py", *parts, "--out", tmp_path / "composed")
    assert run_script("models/compose_t5_sd.py", *parts, "--fresh_unet", "--out", tmp_path / "composed") == 0
    assert "or --reinit_unet" in refused(shapes, model, tmp_path / "refused")
    flags = ["--max_steps", 1, "--batch_size", 2, "--lr", 1e-30]
    _, trained = train(shapes, model, tmp_path / "run", *flags, "--reinit_unet")
    fresh = weights_of(tmp_path / "composed" / "unet")  # both of the default seed
    assert all(torch.allclose(trained[name], tensor, rtol=0, atol=1e-20) for name, tensor in fresh.items())


def test_trained_weights_are_kept_though_the_config_asks_for_fresh_ones(model_t5, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(model_t5, model)
    config = json.loads((model / "unet" / "config.json").read_text())
    (model / "unet" / "config.json").write_text(json.dumps(config | load.FRESH))
    parts = ["--unet", model, "--vae", TINY / "vae", "--t5", TINY / "t5", "--seed", 9]
    assert run_script("models/compose_t5_sd.py", *parts, "--out", tmp_path / "composed") == 0
    kept = weights_of(tmp_path / "composed" / "unet")
    assert all(torch.equal(kept[name], tensor) for name, tensor in weights_of(model_t5 / "unet").items())


def test_captions_are_not_cached_with_missing_weights(model_sd, tmp_path):
    shutil.copytree(model_sd, tmp_path / "model")
    path = tmp_path / "model" / "text_encoder" / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "layers.0" not in k}, path, {"format": "pt"})
    assert run_script("dataset_scripts/draw_shapes.py", "--out", tmp_path / "data", "--num_images", 1) == 0
    with pytest.raises(ValueError, match="16 missing"):
        run_script("cache/create_clipl.py", "--data_root", tmp_path / "data", "--model", tmp_path / "model")
    assert not list((tmp_path / "data").glob("*.txt_clipl"))


# Configs that the libraries fail on


@pytest.mark.parametrize(
    ("component", "entry"),
    [
        *(("unet", {"in_channels": value}) for value in (None, "x", -1, 1.5, [])),
        ("unet", {"block_out_channels": [0]}),
        ("unet", {"layers_per_block": 10**9}),
        ("unet", {"down_block_types": ["NoBlock"]}),
        ("unet", {"act_fn": []}),
        *(("vae", {"scaling_factor": value}) for value in ("x", -1, 0, math.nan, [])),
        *(("vae", {"shift_factor": value}) for value in ("x", math.inf)),
        ("vae", {"latent_channels": None}),
        ("vae", {"latent_channels": 10**9}),
        *(("clip", {"model_type": value}) for value in (None, [], {})),
        *(("clip", {"hidden_size": value}) for value in (None, "x", -1, 0)),
        ("clip", {"num_hidden_layers": 10**9}),
        ("t5", {"num_heads": "x"}),
        ("t5", {"feed_forward_proj": 7}),
        ("projection", {"in_features": -1}),
    ],
)
def test_a_config_with_a_value_of_another_kind_is_named(component, entry, part):
    directory, _ = part
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | entry))
    with pytest.raises((ValueError, MemoryError), match=str(directory)):
        LOADERS[component](directory)


def test_a_config_that_fails_only_in_training_is_named(shapes, model_t5, tmp_path):
    model = shutil.copytree(model_t5, tmp_path / "model")
    config = json.loads((model / "unet" / "config.json").read_text())
    (model / "unet" / "config.json").write_text(json.dumps(config | {"norm_eps": "x"}))
    assert f"check unet/config.json of {model}" in refused(shapes, model, tmp_path / "run", "--log_groups")


@pytest.mark.parametrize("component", ["clip", "vae", "unet", "t5", "projection"])
def test_a_pipe_among_the_files_of_a_component_is_named(component, part):
    directory, _ = part
    os.mkfifo(directory / "added_tokens.json")
    with pytest.raises(ValueError, match=r"added_tokens\.json: is a pipe"):
        LOADERS[component](directory)


def test_a_device_that_this_machine_lacks_is_named():
    for device in ("foo", "cuda:99", "meta", ""):
        with pytest.raises(ValueError, match=f"--device {device}: .*; use cpu"):
            load.pick_device(device)


INFO = {"step": 3, "text": {"kind": "txt_clipl", "settings": {}, "scaling_factor": 1.0}, "latent_size": [8, 8]}


@pytest.mark.parametrize(
    "entry",
    [
        *({"step": value} for value in ("x", -1, 1.5, None, True)),
        *({"latent_size": value} for value in ("x", [8], [8, 0], [8, 1e9], [8, "8"])),
        *({"text": value} for value in (None, [], {}, INFO["text"] | {"kind": "x"}, INFO["text"] | {"settings": []})),
        *({"text": INFO["text"] | {"scaling_factor": value}} for value in ("x", math.nan, 0, -1, None)),
    ],
)
def test_a_cachetrain_json_that_training_does_not_write_is_named(entry, tmp_path):
    (tmp_path / "cachetrain.json").write_text(json.dumps(INFO))
    assert checkpoint_info(tmp_path) == INFO
    (tmp_path / "cachetrain.json").write_text(json.dumps(INFO | entry))
    with pytest.raises(ValueError, match=r"cachetrain\.json: its"):
        checkpoint_info(tmp_path)
