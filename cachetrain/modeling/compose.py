"""Builds pipeline directories from parts. Frozen parts are copied byte for byte, so their fingerprints stay."""

import json
import shutil
from pathlib import Path

from cachetrain.atomic import staged_directory
from cachetrain.diffusion.noise_schedulers import make_scheduler
from cachetrain.modeling import load

HERE = Path(__file__).parent

# Used to scale a projection when the user gives no captions: any plain English does.
PLAIN_CAPTIONS = (
    "",
    "a photo of a cat",
    "a man riding a bicycle through a crowded street at night",
    "an oil painting of mountains above a lake, with a small wooden boat in the foreground",
    "two red apples on a white plate next to a glass of water",
    "portrait of an old woman laughing, black and white, shallow depth of field",
    "a small green triangle on the left on a yellow background",
    "aerial view of a city by the sea",
)


def copy_component(source, target, patterns=("config.json", *load.WEIGHT_PATTERNS)):
    """Copies the files of one component that match `patterns`; hub snapshots' links become files.

    Raises:
        ValueError: there are none.
    """
    target.mkdir(parents=True, exist_ok=True)
    names = {path for pattern in patterns for path in Path(source).glob(pattern)}
    if not names:
        raise ValueError(f"{source}: holds none of {', '.join(patterns)}")
    for path in sorted(names):
        shutil.copyfile(path, target / path.name)


def copy_tokenizer(model_dir, target):
    """Copies a tokenizer, also out of a bare model directory where it lies between the weights."""
    copy_component(load.component_dir(model_dir, "tokenizer"), target, load.CONFIG_PATTERNS)
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        (target / name).unlink(missing_ok=True)


def save_unet(unet_dir, vae, target, text_width, fresh, seed):
    """Copies the UNet, or saves a freshly initialised one; checks that VAE and text encoder fit it.

    Raises:
        ValueError: latent channels or text width differ from the UNet's.
    """
    config = json.loads((unet_dir / "config.json").read_text())
    fresh = fresh or not any(unet_dir.glob("*.safetensors"))
    channels = vae.config.latent_channels
    if config["in_channels"] != channels:
        raise ValueError(
            f"the VAE makes {channels} latent channels, the UNet in {unet_dir} takes {config['in_channels']}"
        )
    if text_width != load.text_width(config):
        raise ValueError(
            f"the text encoder is {text_width} wide, the UNet in {unet_dir} wants {load.text_width(config)}"
        )
    if not fresh:
        copy_component(unet_dir, target)
        return
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    load.load_unet(target, seed=seed).save_pretrained(target)


def write_model_index(stage, pipeline, components):
    """Writes model_index.json. `components`: name -> [library, class], or [None, None] where there is none."""
    import diffusers

    index = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__, **components}
    (stage / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def compose_sd(unet, vae, clip, out, objective, fresh_unet=False, seed=0, overwrite=False):
    """Composes a StableDiffusionPipeline directory: UNet + VAE + CLIP text tower.

    Args:
        unet, vae, clip: pipeline directories, bare components or hub ids.
        objective: see modeling.schedulers.OBJECTIVES.
        fresh_unet: take the UNet's config only and initialise its weights from `seed`.
    """
    unet_dir, vae_dir, clip_root = _resolve(unet, "unet"), _resolve(vae, "vae"), _text_root(clip)
    encoder_dir = load.component_dir(clip_root, "text_encoder")
    vae_module = load.load_vae(vae_dir)
    width = json.loads((encoder_dir / "config.json").read_text())["hidden_size"]
    with staged_directory(out, overwrite) as stage:
        save_unet(unet_dir, vae_module, stage / "unet", width, fresh_unet, seed)
        copy_component(vae_dir, stage / "vae")
        copy_component(encoder_dir, stage / "text_encoder")
        copy_tokenizer(clip_root, stage / "tokenizer")
        scheduler = make_scheduler(objective)
        scheduler.save_pretrained(stage / "scheduler")
        write_model_index(
            stage,
            "StableDiffusionPipeline",
            {
                "vae": ["diffusers", type(vae_module).__name__],
                "text_encoder": ["transformers", "CLIPTextModel"],
                "tokenizer": ["transformers", "CLIPTokenizer"],
                "unet": ["diffusers", "UNet2DConditionModel"],
                "scheduler": ["diffusers", type(scheduler).__name__],
                "safety_checker": [None, None],
                "feature_extractor": [None, None],
                "requires_safety_checker": False,
            },
        )


def compose_t5(
    unet,
    vae,
    t5,
    out,
    objective,
    fresh_unet=False,
    seed=0,
    overwrite=False,
    captions=None,
    train_projection=False,
    dtype=None,
    device="cpu",
):
    """Composes a StableDiffusionT5Pipeline directory: UNet + VAE + T5 encoder + projection to the UNet's width.

    Args:
        unet, vae, t5: pipeline directories, bare components or hub ids.
        captions: list of str to which the projection is fitted by PCA; None: random orthogonal from `seed`.
        train_projection: the projection becomes a layer of the UNet, as it is in a UNet that has one already.
        dtype, device: for running T5 while the projection is made.
    """
    unet_dir, vae_dir, t5_root = _resolve(unet, "unet"), _resolve(vae, "vae"), _text_root(t5)
    vae_module, encoder_dir = load.load_vae(vae_dir), load.component_dir(t5_root, "text_encoder")
    config = json.loads((unet_dir / "config.json").read_text())
    width, own = config["cross_attention_dim"], load.has_text_projection(config)
    keep = own and not fresh_unet and any(unet_dir.glob("*.safetensors"))
    if keep and (train_projection or captions):
        raise ValueError(
            f"{unet_dir}: has a projection already, which is kept; drop --train_projection and "
            "--fit_captions, or pass --fresh_unet"
        )
    with staged_directory(out, overwrite) as stage:
        text_width = json.loads((encoder_dir / "config.json").read_text())["d_model"] if own else width
        save_unet(unet_dir, vae_module, stage / "unet", text_width, fresh_unet, seed)
        copy_component(vae_dir, stage / "vae")
        copy_component(encoder_dir, stage / "text_encoder")
        copy_tokenizer(t5_root, stage / "tokenizer")
        if not keep:
            projection = make_projection(stage, width, captions, seed, dtype, device)
            (projection_into_unet if own or train_projection else save_projection)(stage, projection)
        shutil.copyfile(HERE / "t5_pipeline.py", stage / "pipeline.py")
        scheduler = make_scheduler(objective)
        scheduler.save_pretrained(stage / "scheduler")
        write_model_index(
            stage,
            ["pipeline", "StableDiffusionT5Pipeline"],
            {
                "vae": ["diffusers", type(vae_module).__name__],
                "text_encoder": ["transformers", "T5EncoderModel"],
                "tokenizer": ["transformers", "T5Tokenizer"],
                "projection": [None, None] if own or train_projection else ["t5_projection", "T5Projection"],
                "unet": ["diffusers", "UNet2DConditionModel"],
                "scheduler": ["diffusers", type(scheduler).__name__],
            },
        )


def save_projection(stage, projection):
    """Saves a T5Projection as the frozen component projection/, with the code that loads it elsewhere."""
    projection.save_pretrained(stage / "projection")
    shutil.copyfile(HERE / "t5_projection.py", stage / "projection" / "t5_projection.py")


def projection_into_unet(stage, projection):
    """Makes a T5Projection the encoder_hid_proj of the UNet in unet/; all other weights stay."""
    scale, linear = projection.config.scaling_factor, projection.linear
    linear.load_state_dict({name: scale * tensor for name, tensor in linear.state_dict().items()})
    unet = load.load_unet(stage / "unet")
    unet.encoder_hid_proj = linear
    unet.register_to_config(encoder_hid_dim=linear.in_features, encoder_hid_dim_type="text_proj")
    shutil.rmtree(stage / "unet")  # its weights may lie in other files than those saved now
    unet.save_pretrained(stage / "unet")


def make_projection(model_dir, width, captions, seed, dtype=None, device="cpu"):
    """Makes the T5Projection of a model directory that has text_encoder/ and tokenizer/.

    With captions: the `width` leading principal components of their hidden states, centred. Without: a random
    orthogonal map (orthonormal rows), which keeps distances as well as `width` dimensions can. Either way scaled to
    unit standard deviation over the captions (PLAIN_CAPTIONS without).
    """
    import torch

    from cachetrain.modeling.t5_projection import T5Projection
    from cachetrain.modeling.text_encoders import TextEncoder

    encoder = TextEncoder(model_dir, device, dtype or torch.float32, raw=True)
    hidden = torch.cat([encoder.encode_ids(encoder.tokenize([c])[0])[0].float() for c in captions or PLAIN_CAPTIONS])
    features = hidden.shape[1]
    if features < width:
        raise ValueError(f"T5 is {features} wide, less than the UNet's {width}; use a larger T5")
    projection = T5Projection(features, width)
    bias = torch.zeros(width)
    if captions:
        mean = hidden.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov(hidden.T, correction=0))
        weight = vectors[:, values.argsort(descending=True)[:width]].T
        bias = -weight @ mean
    else:
        weight = torch.empty(width, features)
        torch.nn.init.orthogonal_(weight, generator=torch.Generator().manual_seed(seed))
    projection.linear.load_state_dict({"weight": weight.contiguous(), "bias": bias})
    projection.register_to_config(scaling_factor=1 / (hidden @ weight.T + bias).std().item())
    return projection.eval().requires_grad_(False)


def _resolve(model, component):
    return load.component_dir(load.resolve_model(model, subfolders=(component,)), component)


def _text_root(model):
    return load.resolve_model(model, subfolders=("text_encoder", "tokenizer"))
