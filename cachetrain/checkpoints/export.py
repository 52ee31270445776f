"""Exports a pipeline directory as one file in the original key layout of Stable Diffusion or SDXL, for web UIs."""

import inspect
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from cachetrain.atomic import staged_file
from cachetrain.checkpoints import original_layout as layout
from cachetrain.checkpoints.adapters import weights_of
from cachetrain.checkpoints.info import checkpoint_info
from cachetrain.diffusion.noise_schedulers import objective_of
from cachetrain.modeling import load, normalisation
from cachetrain.modeling.files import CONFIG, read_config, weight_files

if TYPE_CHECKING:
    import torch

ORIGINAL_SCALING_FACTOR, SDXL_SCALING_FACTOR = 0.18215, 0.13025

# Config fields that web UIs read from the keys, shapes or .yaml. For other fields they assume diffusers' default.
_UNET_FIELDS = {
    "sample_size", "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels",
    "layers_per_block", "cross_attention_dim", "attention_head_dim", "use_linear_projection", "dropout",
    "transformer_layers_per_block", "upcast_attention", "encoder_hid_dim", "encoder_hid_dim_type",
    "addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim",
}  # fmt: skip
_VAE_FIELDS = {
    "sample_size", "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels",
    "layers_per_block", "latent_channels", "scaling_factor", "shift_factor", "latents_mean", "latents_std",
    "force_upcast", "mid_block_add_attention",
}  # fmt: skip


def export_single_file(
    model_dir: Path, out: Path, dtype: "torch.dtype | None" = None, raw_weights: bool = False
) -> list[str]:
    """Writes a model as one .safetensors file, and beside it the .yaml that web UIs read of a model that is not SDXL;
    both only when complete.

    Args:
        model_dir: pipeline directory or checkpoint.
        out: path that ends in .safetensors; replaced if it exists.
        dtype: dtype of all weights; None: as stored.
        raw_weights: export the raw weights even if there are EMA weights.

    Returns:
        notes for users of the file; they are also stored in its metadata.

    Raises:
        ValueError: the layout cannot represent the model.
    """
    import yaml

    model_dir, out = Path(model_dir), Path(out)
    check_suffix(out)
    notes, config = check_exportable(model_dir)
    config_file = out.with_suffix(".yaml")  # of this name, web UIs take it for the model's
    weights = weights_of(model_dir, raw_weights)
    tensors = original_tensors(model_dir, weights)
    if dtype is not None:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    metadata, markers = _metadata(model_dir, weights, out.stem)
    if "modelspec.encoder_layer" in metadata:
        notes.append(
            f"captions were encoded with --clip_skip {metadata['modelspec.encoder_layer']}: set Clip skip to it"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stages:  # the config comes last: it is never alone
        if config:
            stages.enter_context(staged_file(config_file)).write_text(yaml.safe_dump(config, sort_keys=False))
        write_tensors(tensors | markers, out, metadata | {"notes": "\n".join(notes)})
    if not config:
        config_file.unlink(missing_ok=True)
    return notes


def check_suffix(out: Path) -> None:
    """Raises a ValueError if web UIs would not find a file of this name."""
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: web UIs find files by their suffix; name it .safetensors")


def write_tensors(tensors: "dict[str, torch.Tensor]", out: Path, metadata: dict[str, str]) -> None:
    """Writes a .safetensors file, which appears only when complete.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with staged_file(out) as stage:
        try:
            save_file(tensors, stage, metadata)
        except SafetensorError as error:
            raise OSError(f"{out}: {error}") from error


def check_exportable(
    model_dir: Path, scheduler=None, scaling: normalisation.LatentScaling | None = None
) -> tuple[list[str], dict | None]:
    """Checks that the layout can represent a model. Reads only configs, so that it can be called before training.

    Args:
        model_dir: pipeline directory; its UNet need not have weights.
        scheduler: diffusers scheduler of the objective to be trained; None: that of the directory.
        scaling: of the latents to be trained on; None: `latent_scaling` of the directory.

    Returns:
        (notes for users of the exported file,
        the original config for the .yaml; None if web UIs need none, as for SDXL, or cannot sample the model).

    Raises:
        ValueError: the layout cannot represent the model; the message says why.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel

    unet, vae, texts = _configs(model_dir)
    family = load.text_family(model_dir)
    problems = [*_unet_problems(unet), *_vae_problems(vae), *_text_problems(unet, texts)]
    if problems:
        raise ValueError(
            f"{model_dir}: the original Stable Diffusion layout cannot represent this model: {'; '.join(problems)}"
        )
    load.load_vae(Path(model_dir) / "vae")  # refuses one that is incomplete; the UNet's weights may not be there yet
    scaling = scaling or latent_scaling(model_dir)
    for name in texts if family != "t5" else ():
        load.load_text_encoder(Path(model_dir) / name, projected=name == "text_encoder_2")
    layout.unet_names(_shapes_of(UNet2DConditionModel, unet), unet)
    layout.vae_names(_shapes_of(AutoencoderKL, vae), vae)
    notes = []
    if family == "t5":
        notes.append(
            "holds UNet and VAE only: the layout has no place for a T5 encoder"
            f"{' and the projection of its embeddings in the UNet' if load.has_text_projection(unet) else ''}, "
            "and web UIs for Stable Diffusion cannot encode prompts with T5"
        )
    scheduler = scheduler or load.load_scheduler(Path(model_dir) / "scheduler")
    objective = objective_of(scheduler)
    is_sdxl = load.pooled_width(unet) > 0
    notes += objective_notes(objective, scheduler, is_sdxl)
    notes += _setting_notes(unet, vae, is_sdxl)
    notes += _scaling_notes(scaling, is_sdxl)
    needs_config = family == "clip" and objective != "flow"
    return notes, layout.original_config(unet, vae, scheduler, scaling.mean_factor) if needs_config else None


def latent_scaling(model_dir: Path) -> normalisation.LatentScaling:
    """Returns the LatentScaling that a checkpoint was trained with; of another model, that of its VAE.

    Raises:
        ValueError: the VAE does not say; or of `load.load_vae`.
    """
    if "latents" in (info := checkpoint_info(model_dir)):
        return normalisation.of_values(info["latents"], model_dir)
    scaling = normalisation.of_vae(load.load_vae(Path(model_dir) / "vae"))
    if scaling is None:
        raise ValueError(
            f"{model_dir}: its VAE does not say how its latents are scaled; export a checkpoint of a run"
        )
    return scaling


def original_tensors(model_dir: Path, weights: str = "unet") -> "dict[str, torch.Tensor]":
    """Returns {original name: CPU tensor} of a pipeline directory; tensors are memory-mapped.

    Args:
        model_dir: pipeline directory or checkpoint.
        weights: directory of the UNet's weights, "unet" or "unet_ema".
    """
    from diffusers import UNet2DConditionModel

    unet, vae, texts = _configs(model_dir)
    tensors = _stored(model_dir / weights)
    _check_shapes(model_dir / weights, tensors, _shapes_of(UNet2DConditionModel, unet))
    names = layout.unet_names({key: tensor.shape for key, tensor in tensors.items()}, unet)
    result = {layout.UNET + name: tensors[key] for key, name in names.items()}
    tensors = _stored(model_dir / "vae")
    names = layout.vae_names({key: tensor.shape for key, tensor in tensors.items()}, vae)
    result |= {
        layout.VAE + name: tensors[key].reshape(layout.vae_shape(name, tensors[key].shape))
        for key, name in names.items()
    }
    family = load.text_family(model_dir)
    if family == "t5":
        return result
    tensors = _stored(model_dir / "text_encoder")
    prefix = layout.TEXT if family == "clip" else layout.SDXL_TEXT[0]
    result |= {prefix + name: tensors[key] for key, name in layout.text_names(tensors).items()}
    if family == "sdxl":
        result |= _sdxl_text(model_dir, texts["text_encoder"]["max_position_embeddings"])
    return result


def _sdxl_text(model_dir, num_positions):
    """Returns {original name: tensor} of what SDXL's file holds besides Stable Diffusion's parts."""
    import torch

    first, second = layout.SDXL_TEXT
    tensors = layout.open_clip_tensors(_stored(model_dir / "text_encoder_2"))
    # A buffer of old versions of transformers, which is in the public file.
    positions = {f"{first}embeddings.position_ids": torch.arange(num_positions)[None]}
    return positions | {second + name: tensor.contiguous() for name, tensor in tensors.items()}


def _unet_problems(config):
    """Returns the reasons why the layout cannot represent a UNet of this config (dict), as a list of str."""
    down, up, channels = config["down_block_types"], config["up_block_types"], config["block_out_channels"]
    heads = config["attention_head_dim"]  # diffusers' name for the number of heads
    problems = []
    if set(down) - {"DownBlock2D", "CrossAttnDownBlock2D"} or config["mid_block_type"] != "UNetMidBlock2DCrossAttn":
        problems.append("the UNet has blocks that Stable Diffusion does not have")
    if [kind.replace("Up", "Down") for kind in reversed(up)] != list(down):
        problems.append("the UNet's up blocks do not mirror its down blocks")
    per_block = () if load.pooled_width(config) else ("transformer_layers_per_block",)  # SDXL's differ
    for name in ("layers_per_block", *per_block, "cross_attention_dim"):
        if not isinstance(config[name], int):
            problems.append(f"the UNet's {name} differs from block to block")
    if isinstance(heads, int):
        heads = [heads] * len(channels)
    widths = {width / number for width, number in zip(channels, heads, strict=True)}
    if len(set(heads)) > 1 and len(widths) > 1:
        problems.append("the UNet's attention heads differ between blocks both in number and in width")
    return problems + _width_problems("UNet", channels)


def _vae_problems(config):
    """Returns the reasons why the layout cannot represent a VAE of this config (dict), as a list of str."""
    problems = []
    if config["_class_name"] != "AutoencoderKL":
        problems.append(f"the VAE is an {config['_class_name']}, not an AutoencoderKL")
    if {*config["down_block_types"], *config["up_block_types"]} != {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
        problems.append("the VAE has blocks that Stable Diffusion does not have")
    if not (config["use_quant_conv"] and config["use_post_quant_conv"]):
        problems.append("the VAE has no quant_conv, which the layout requires")
    return problems + _width_problems("VAE", config["block_out_channels"])


def _text_problems(unet, texts):
    """Returns the reasons why the layout cannot represent text encoders beside a UNet, as a list of str.

    Args:
        texts: {component: config} of the text encoders.
    """
    activations = {"text_encoder": "quick_gelu", "text_encoder_2": "gelu"}
    problems = []
    for name, config in texts.items():
        expected = activations[name]
        if config["model_type"] != "t5" and config.get("hidden_act", "quick_gelu") != expected:
            also = " (an OpenCLIP one, as in SD 2.x)" if name == "text_encoder" else ""
            problems.append(f"{name} has hidden_act {config.get('hidden_act')}, expected {expected}{also}")
    clip = all(config["model_type"] != "t5" for config in texts.values())
    if clip and (len(texts) == 2) != (load.pooled_width(unet) > 0):
        problems.append(f"the UNet is {'not ' if len(texts) == 2 else ''}SDXL's, the text encoders are otherwise")
    return problems


def _width_problems(part, channels):
    if any(width % channels[0] for width in channels):
        return [f"the {part}'s widths {list(channels)} are not multiples of the first"]
    return []


def objective_notes(objective, scheduler, is_sdxl):
    """Returns notes on how to sample the exported file, a list of str."""
    if objective == "flow":
        return ["trained with flow matching, which web UIs do not sample with Stable Diffusion's UNet: use sample.py"]
    notes = []
    if objective == "v_prediction" and is_sdxl:
        notes.append("predicts v: AUTOMATIC1111 (its dev branch), Forge and ComfyUI detect it by the key v_pred")
    elif objective == "v_prediction":
        notes.append(
            "predicts v: keep the .yaml beside the file for AUTOMATIC1111 and Forge; in ComfyUI add "
            "ModelSamplingDiscrete, set to v_prediction, after the loader"
        )
    if scheduler.config.get("rescale_betas_zero_snr") and is_sdxl:
        notes.append("has zero terminal SNR: AUTOMATIC1111, Forge and ComfyUI detect it by the key ztsnr")
    elif scheduler.config.get("rescale_betas_zero_snr"):
        notes.append(
            "has zero terminal SNR: AUTOMATIC1111 and Forge detect it by the key ztsnr; in ComfyUI turn on zsnr in "
            "ModelSamplingDiscrete"
        )
    if scheduler.config.beta_schedule != "scaled_linear" or scheduler.config.get("trained_betas") is not None:
        notes.append("its betas are not the scaled_linear ones of Stable Diffusion, with which web UIs sample")
    return notes


def _setting_notes(unet, vae, is_sdxl):
    """Returns notes on settings in the configs (dicts) that web UIs do not respect, a list of str."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    unusual = _unusual("UNet", UNet2DConditionModel, unet, _UNET_FIELDS)
    unusual += _unusual("VAE", AutoencoderKL, vae, _VAE_FIELDS)
    # Web UIs recognize Stable Diffusion 1 and SDXL by these sizes.
    if unet["block_out_channels"][0] != 320 or unet["cross_attention_dim"] != (2048 if is_sdxl else 768):
        unusual.append(f"widths {unet['block_out_channels']} and cross_attention_dim {unet['cross_attention_dim']}")
    notes = []
    if unusual:
        notes.append(
            f"web UIs do not use these settings: {', '.join(unusual)}; only diffusers loads the file correctly, with "
            "config= of the pipeline directory"
        )
    return notes


def _scaling_notes(scaling, is_sdxl):
    """Returns notes on what web UIs do not know of the LatentScaling, a list of str."""
    original = SDXL_SCALING_FACTOR if is_sdxl else ORIGINAL_SCALING_FACTOR
    if not scaling.is_number:
        what = "shifted" if type(scaling.scaling_factor) is float else "scaled channel by channel"
        return [f"the VAE's latents are {what}, which web UIs cannot do: they draw wrong images; use sample.py"]
    if scaling.scaling_factor == original:
        return []
    without = "" if is_sdxl else " that do not read the .yaml"
    return [
        f"the VAE's scaling_factor is {scaling.scaling_factor}: web UIs{without} use {original} and draw wrong images"
    ]


def _metadata(model_dir, weights, title):
    """Returns (safetensors metadata, {name: empty tensor}), which describe the file to web UIs and people.

    The metadata follows Stability AI's ModelSpec. Web UIs look for tensors named v_pred and ztsnr.
    """
    import torch

    info = checkpoint_info(model_dir)
    scheduler = load.load_scheduler(model_dir / "scheduler")
    objective = objective_of(scheduler)
    zero_snr = bool(scheduler.config.get("rescale_betas_zero_snr"))
    is_sdxl = load.pooled_width(read_config(model_dir / "unet")) > 0
    repository = "Stability-AI/generative-models" if is_sdxl else "CompVis/stable-diffusion"
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base" if is_sdxl else "stable-diffusion-v1",
        "modelspec.implementation": f"https://github.com/{repository}",
        "modelspec.title": title,
        "modelspec.prediction_type": "v" if objective == "v_prediction" else objective,
        "step": str(info["step"]),
        "objective": objective,
        "zero_terminal_snr": str(zero_snr).lower(),
        "weights": weights,
        **latent_scaling(model_dir).header_fields(),
    }
    if clip_skip := info["text"]["settings"].get("clip_skip"):
        metadata["modelspec.encoder_layer"] = str(clip_skip)
    names = ["v_pred"] * (objective == "v_prediction") + ["ztsnr"] * zero_snr
    return metadata, {name: torch.empty(0) for name in names}


def _configs(model_dir):
    """Returns the configs (dicts) of UNet and VAE, and {component: config} of the text encoders."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    unet, vae = _config(model_dir, "unet", UNet2DConditionModel), _config(model_dir, "vae", AutoencoderKL)
    texts = {"text_encoder": _config(model_dir, "text_encoder")}
    if load.text_family(model_dir) == "sdxl":
        texts["text_encoder_2"] = _config(model_dir, "text_encoder_2")
    return unet, vae, texts


def _config(model_dir, name, cls=None):
    """Returns the config of a component as a dict; fields that are missing get the defaults of `cls`."""
    directory = Path(model_dir) / name
    if not (directory / CONFIG).exists():
        raise ValueError(
            f"{directory / CONFIG}: no such file; a single file needs a complete model, compose one with "
            "models/compose_*.py"
        )
    return (_defaults(cls) if cls else {}) | read_config(directory)


def _defaults(cls):
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return {parameter.name: parameter.default for parameter in parameters}


def _unusual(part, cls, config, known_fields):
    """Returns the settings that differ from the default and that web UIs cannot read, a list of str."""
    return [
        f"{part} {name} {config[name]}"
        for name, default in _defaults(cls).items()
        if name not in known_fields and config[name] != default
    ]


def _shapes_of(cls, config):
    import torch

    with torch.device("meta"):
        return {key: tensor.shape for key, tensor in cls.from_config(config).state_dict().items()}


def _stored(directory):
    """Returns all tensors of a component, memory-mapped."""
    from safetensors.torch import load_file

    files = [path for path in weight_files(directory) if path.suffix == ".safetensors"]
    return {key: tensor for path in files for key, tensor in load_file(path).items()}


def _check_shapes(directory, tensors, expected):
    found = {key: tensor.shape for key, tensor in tensors.items()}
    wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    if wrong:
        raise ValueError(
            f"{directory}: the weights are not those of config.json: {len(wrong)} missing, left over or of another "
            f"shape (like {wrong[0]}); get both again"
        )
