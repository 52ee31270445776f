"""One file in the original Stable Diffusion key layout, as web UIs read it, out of a pipeline directory."""

import inspect
import json
from pathlib import Path

from cachetrain.atomic import staged_file
from cachetrain.checkpoints import original_layout as layout
from cachetrain.checkpoints.info import checkpoint_info
from cachetrain.diffusion.noise_schedulers import objective_of
from cachetrain.modeling import load

ORIGINAL_SCALING_FACTOR = 0.18215

# What the layout's keys, shapes or .yaml tell of a config; a web UI takes diffusers' default for all else.
_UNET_TOLD = {
    "sample_size", "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels",
    "layers_per_block", "cross_attention_dim", "attention_head_dim", "use_linear_projection", "dropout",
    "transformer_layers_per_block", "upcast_attention", "encoder_hid_dim", "encoder_hid_dim_type",
}  # fmt: skip
_VAE_TOLD = {
    "sample_size", "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels",
    "layers_per_block", "latent_channels", "scaling_factor", "shift_factor", "force_upcast",
    "mid_block_add_attention",
}  # fmt: skip


def export_single_file(model_dir, out, dtype=None, raw_weights=False):
    """Writes a model as one .safetensors, and beside it the .yaml that web UIs read. Both appear only when complete.

    Args:
        model_dir: pipeline directory or checkpoint.
        out: path that ends in .safetensors; replaced if it exists.
        dtype: torch dtype of all weights; None: as they are stored.
        raw_weights: not the EMA weights, where there are any.

    Returns:
        list of str: what a user of the file has to know; also in its metadata.

    Raises:
        ValueError: the layout does not hold such a model.
    """
    import yaml
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    model_dir, out = Path(model_dir), Path(out)
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: web UIs find files by their suffix; name it .safetensors")
    notes, config = check_exportable(model_dir)
    weights = "unet" if raw_weights or not (model_dir / "unet_ema").is_dir() else "unet_ema"
    tensors = original_tensors(model_dir, weights)
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    metadata, markers = _marks(model_dir, weights, out.stem)
    if "modelspec.encoder_layer" in metadata:
        notes.append(
            f"captions were encoded with --clip_skip {metadata['modelspec.encoder_layer']}: set Clip skip so"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    if config:
        with staged_file(out.with_suffix(".yaml")) as stage:
            stage.write_text(yaml.safe_dump(config, sort_keys=False))
    with staged_file(out) as stage:
        try:
            save_file(tensors | markers, stage, metadata | {"notes": "\n".join(notes)})
        except SafetensorError as error:
            raise OSError(f"{out}: {error}") from error
    return notes


def check_exportable(model_dir, scheduler=None):
    """Whether the layout holds this model; reads configs only, so that it can be asked before training.

    Args:
        model_dir: pipeline directory; its UNet may have no weights yet.
        scheduler: of the objective that the model is to be trained on; None: the directory's own.

    Returns:
        (list of str: what a user of the file has to know,
        dict: the original config for the .yaml, or None where no web UI could sample the model by it).

    Raises:
        ValueError: it does not, and why.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel

    unet, vae, text = _configs(model_dir)
    problems = [*_unet_problems(unet), *_vae_problems(vae)]
    if text["model_type"] != "t5" and text.get("hidden_act", "quick_gelu") != "quick_gelu":
        problems.append("the text encoder is an OpenCLIP one (hidden_act is not quick_gelu), as in SD 2.x")
    if problems:
        raise ValueError(
            f"{model_dir}: the original Stable Diffusion layout has no place for it: {'; '.join(problems)}"
        )
    layout.unet_names(_shapes_of(UNet2DConditionModel, unet), unet)
    layout.vae_names(_shapes_of(AutoencoderKL, vae), vae)
    notes = []
    if text["model_type"] == "t5":
        notes.append(
            "holds UNet and VAE only: the layout has no place for a T5 encoder"
            f"{' and the UNet projection of its embeddings' if load.has_text_projection(unet) else ''}, "
            "and web UIs for Stable Diffusion cannot prompt it"
        )
    scheduler = scheduler or load.load_scheduler(Path(model_dir) / "scheduler")
    objective = objective_of(scheduler)
    notes += _objective_notes(objective, scheduler)
    notes += _setting_notes(unet, vae)
    sampled = text["model_type"] != "t5" and objective != "flow"
    return notes, layout.original_config(unet, vae, scheduler) if sampled else None


def original_tensors(model_dir, weights="unet"):
    """The weights of a pipeline directory under their original names: {name: CPU tensor}, mapped from the files."""
    unet, vae, text = _configs(model_dir)
    tensors = _stored(model_dir / weights)
    names = layout.unet_names({key: tensor.shape for key, tensor in tensors.items()}, unet)
    result = {layout.UNET + name: tensors[key] for key, name in names.items()}
    tensors = _stored(model_dir / "vae")
    names = layout.vae_names({key: tensor.shape for key, tensor in tensors.items()}, vae)
    result |= {
        layout.VAE + name: tensors[key].reshape(layout.vae_shape(name, tensors[key].shape))
        for key, name in names.items()
    }
    if text["model_type"] != "t5":
        tensors = _stored(model_dir / "text_encoder")
        result |= {layout.TEXT + name: tensors[key] for key, name in layout.text_names(tensors).items()}
    return result


def _unet_problems(config):
    """Why the layout cannot hold a UNet of this config (dict), as a list of str."""
    down, up, channels = config["down_block_types"], config["up_block_types"], config["block_out_channels"]
    heads = config["attention_head_dim"]  # diffusers' name for the number of heads
    found = []
    if set(down) - {"DownBlock2D", "CrossAttnDownBlock2D"} or config["mid_block_type"] != "UNetMidBlock2DCrossAttn":
        found.append("the UNet has other blocks than Stable Diffusion's")
    if [kind.replace("Up", "Down") for kind in reversed(up)] != list(down):
        found.append("the UNet's up blocks do not mirror its down blocks")
    for name in ("layers_per_block", "transformer_layers_per_block", "cross_attention_dim"):
        if not isinstance(config[name], int):
            found.append(f"the UNet's {name} differs from block to block")
    if isinstance(heads, int):
        heads = [heads] * len(channels)
    widths = {width / number for width, number in zip(channels, heads, strict=True)}
    if len(set(heads)) > 1 and len(widths) > 1:
        found.append("the UNet's heads are neither of one number nor of one width")
    return found + _width_problem("UNet", channels)


def _vae_problems(config):
    """Why the layout cannot hold a VAE of this config (dict), as a list of str."""
    found = []
    if config["_class_name"] != "AutoencoderKL":
        found.append(f"the VAE is an {config['_class_name']}, not an AutoencoderKL")
    if {*config["down_block_types"], *config["up_block_types"]} != {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
        found.append("the VAE has other blocks than Stable Diffusion's")
    if not (config["use_quant_conv"] and config["use_post_quant_conv"]):
        found.append("the VAE has no quant_conv, which the layout always has")
    if config["shift_factor"] or config["latents_mean"]:
        found.append("the VAE's latents are shifted, which the layout cannot say")
    return found + _width_problem("VAE", config["block_out_channels"])


def _width_problem(part, channels):
    odd = any(width % channels[0] for width in channels)
    return [f"the {part}'s widths {list(channels)} are not multiples of the first"] if odd else []


def _objective_notes(objective, scheduler):
    """What a user of the file has to know about sampling it, as a list of str."""
    if objective == "flow":
        return ["trained by flow matching, which web UIs do not sample with Stable Diffusion's UNet: use sample.py"]
    notes = []
    if objective == "v_prediction":
        notes.append(
            "predicts v: AUTOMATIC1111 and Forge read that from the .yaml, keep it beside the file; in "
            "ComfyUI put ModelSamplingDiscrete, v_prediction, behind the loader"
        )
    if scheduler.config.get("rescale_betas_zero_snr"):
        notes.append(
            "has zero terminal SNR: AUTOMATIC1111 and Forge take it from the key ztsnr; in ComfyUI switch "
            "zsnr on in ModelSamplingDiscrete"
        )
    if scheduler.config.beta_schedule != "scaled_linear" or scheduler.config.get("trained_betas") is not None:
        notes.append("its betas are not Stable Diffusion's scaled_linear ones, which web UIs sample with")
    return notes


def _setting_notes(unet, vae):
    """What of the configs (dicts) web UIs compute otherwise, as a list of str."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    unusual = _unusual("UNet", UNet2DConditionModel, unet, _UNET_TOLD)
    unusual += _unusual("VAE", AutoencoderKL, vae, _VAE_TOLD)
    # By these sizes web UIs recognise Stable Diffusion 1.
    if unet["block_out_channels"][0] != 320 or unet["cross_attention_dim"] != 768:
        unusual.append(f"widths {unet['block_out_channels']} and cross_attention_dim {unet['cross_attention_dim']}")
    notes = []
    if unusual:
        notes.append(
            f"web UIs compute with other settings than {', '.join(unusual)}: only diffusers loads it, with "
            "config= of the pipeline directory"
        )
    if vae["scaling_factor"] != ORIGINAL_SCALING_FACTOR:
        notes.append(
            f"the VAE's scaling_factor is {vae['scaling_factor']}: web UIs that do not read the .yaml take "
            f"{ORIGINAL_SCALING_FACTOR}, and their pictures are wrong"
        )
    return notes


def _marks(model_dir, weights, title):
    """Returns (safetensors metadata, {name: empty tensor}): what tells UIs and people what the file is.

    The keys are those of Stability AI's ModelSpec; the tensors v_pred and ztsnr are what web UIs look for.
    """
    import torch

    info = checkpoint_info(model_dir)
    scheduler = load.load_scheduler(model_dir / "scheduler")
    objective = objective_of(scheduler)
    zero_snr = bool(scheduler.config.get("rescale_betas_zero_snr"))
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1",
        "modelspec.implementation": "https://github.com/CompVis/stable-diffusion",
        "modelspec.title": title,
        "modelspec.prediction_type": "v" if objective == "v_prediction" else objective,
        "step": str(info["step"]),
        "objective": objective,
        "zero_terminal_snr": str(zero_snr).lower(),
        "weights": weights,
    }
    if clip_skip := info["text"]["settings"].get("clip_skip"):
        metadata["modelspec.encoder_layer"] = str(clip_skip)
    names = ["v_pred"] * (objective == "v_prediction") + ["ztsnr"] * zero_snr
    return metadata, {name: torch.empty(0) for name in names}


def _configs(model_dir):
    """Configs (dicts) of UNet, VAE and text encoder."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    return (
        _config(model_dir, "unet", UNet2DConditionModel),
        _config(model_dir, "vae", AutoencoderKL),
        _config(model_dir, "text_encoder"),
    )


def _config(model_dir, name, cls=None):
    """The config of a component as a dict; what it does not say (older versions) has the defaults of `cls`."""
    path = Path(model_dir) / name / "config.json"
    if not path.exists():
        raise ValueError(
            f"{path}: no such file; a single file holds a whole model, compose one (models/compose_*.py)"
        )
    return (_defaults(cls) if cls else {}) | json.loads(path.read_text())


def _defaults(cls):
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return {parameter.name: parameter.default for parameter in parameters}


def _unusual(part, cls, config, told):
    different = [name for name, default in _defaults(cls).items() if name not in told and config[name] != default]
    return [f"{part} {name} {config[name]}" for name in different]


def _shapes_of(cls, config):
    import torch

    with torch.device("meta"):
        return {key: tensor.shape for key, tensor in cls.from_config(config).state_dict().items()}


def _stored(directory):
    """All tensors of a component's safetensors files, mapped and not read; variants (fp16, non_ema) are left out."""
    from safetensors.torch import load_file

    indices = sorted(directory.glob("*.safetensors.index.json"))
    files = {shard for index in indices for shard in json.loads(index.read_text())["weight_map"].values()}
    files = files or {path.name for path in directory.glob("*.safetensors") if path.name.count(".") == 1}
    if not files:
        raise ValueError(f"{directory}: holds no weights; train it first, or pass a checkpoint")
    return {key: tensor for name in sorted(files) for key, tensor in load_file(directory / name).items()}
