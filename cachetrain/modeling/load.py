"""Loads model components one by one, by known classes, from safetensors only.

No file of a model directory is executed and no pickle is read; `load_custom_pipeline` is the one exception, and
scripts call it only when the user said `--custom`.
"""

import hashlib
import json
import os
from pathlib import Path

WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
CONFIG_PATTERNS = ("*.json", "*.txt", "*.model")

# Config entries that do not change what a component computes.
_INCIDENTAL = ("transformers_version", "torch_dtype", "dtype", "architectures")


def pick_device(device=None):
    """`device`, or cuda where there is one (under a launcher: this process's own), else cpu."""
    import torch

    if device is None and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return torch.device(device or "cpu")


def pick_dtype(name, device):
    """Torch dtype of "fp32", "bf16" or "fp16"; None gives bf16 on cuda and fp32 elsewhere."""
    import torch

    if name is None:
        name = "bf16" if torch.device(device).type == "cuda" else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def resolve_model(model, revision=None, subfolders=(), code=False):
    """Returns the local directory of `model`, fetching a hub id's configs and safetensors if it is not a path.

    Args:
        model: directory, or hub id.
        revision: branch, tag or commit of a hub id.
        subfolders: components wanted; () fetches everything but pickles and code.
        code: fetch Python files too (nothing runs them here); only for users who said `--custom`.

    Raises:
        ValueError: neither a directory nor a hub id that can be fetched.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ValueError(f"{model}: no such directory (and not a hub id like owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    kinds = [*WEIGHT_PATTERNS, *CONFIG_PATTERNS, *(["*.py"] if code else [])]
    patterns = [f"{folder}/{kind}" for folder in subfolders or ("*",) for kind in kinds]
    # A bare component lies at the root, where pipelines keep single-file copies of all their weights: not those.
    patterns += ["model*.safetensors*", "diffusion_pytorch_model*.safetensors*", *kinds[len(WEIGHT_PATTERNS) :]]
    try:
        # Variants (fp16, non_ema) would be fetched beside the plain weights and are not read.
        snapshot = snapshot_download(
            model, revision=revision, allow_patterns=patterns, ignore_patterns=["*.fp16.*", "*.non_ema.*"]
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(f"{model}: no such directory, and the hub gave none: {error}") from error
    return Path(snapshot)


def component_dir(model_dir, name):
    """Directory of one component: `model_dir/name` of a pipeline, or `model_dir` if it is the bare component.

    Raises:
        ValueError: there is no such component.
    """
    model_dir = Path(model_dir)
    if (model_dir / name).is_dir():
        return model_dir / name
    if not (model_dir / "model_index.json").exists() and any(model_dir.glob("*config.json")):
        return model_dir
    raise ValueError(f"{model_dir}: has no component {name!r}; expected a directory {model_dir / name}")


def fingerprint(*directories):
    """SHA-256 (hex) over what the components in `directories` compute with: weights, configs, vocabularies.

    Bookkeeping entries of configs (library versions, paths) do not count.
    """
    digest = hashlib.sha256()
    for directory in directories:
        for path in sorted(p for p in Path(directory).iterdir() if p.is_file()):
            if path.suffix == ".json":
                content = json.loads(path.read_text(encoding="utf-8"))
                if isinstance(content, dict):
                    content = {k: v for k, v in content.items() if k[0] != "_" and k not in _INCIDENTAL}
                digest.update(path.name.encode() + json.dumps(content, sort_keys=True).encode())
            elif path.suffix in (".safetensors", ".txt", ".model", ".py"):
                with open(path, "rb") as file:
                    digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def load_vae(directory, dtype=None):
    """Loads any diffusers autoencoder, frozen and in eval mode; the class is the one its config names.

    Args:
        directory: of the component (holds config.json).
        dtype: torch dtype, float32 when None.
    """
    import diffusers

    name = json.loads((Path(directory) / "config.json").read_text())["_class_name"]
    cls = getattr(diffusers, name, None)
    if not (name.startswith(("Autoencoder", "AsymmetricAutoencoder")) and isinstance(cls, type)):
        raise ValueError(f"{directory}: {name} is not a diffusers autoencoder; pass a VAE, or a pipeline with one")
    return _load_diffusers(cls, directory, dtype)


def load_unet(directory, dtype=None, seed=0):
    """Loads a UNet2DConditionModel; a directory with a config only gives a fresh one, initialised from `seed`."""
    from diffusers import UNet2DConditionModel

    if any(Path(directory).glob("*.safetensors")):
        return _load_diffusers(UNet2DConditionModel, directory, dtype, train=True)
    unet = fresh_unet(UNet2DConditionModel.load_config(directory), seed)
    return (unet if dtype is None else unet.to(dtype)).train()


def fresh_unet(config, seed):
    """A float32 UNet2DConditionModel of `config` with initial weights from `seed`."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel.from_config(config)


def has_text_projection(unet_config):
    """Whether a UNet of this config (dict) projects raw text embeddings itself: diffusers' "text_proj"."""
    # diffusers takes a width without a type for text_proj.
    kind = unet_config.get("encoder_hid_dim_type")
    return kind == "text_proj" or (kind is None and unet_config.get("encoder_hid_dim") is not None)


def text_width(unet_config):
    """Width D of the text embeddings [B, T, D] that a UNet of this config (dict) takes."""
    return unet_config["encoder_hid_dim" if has_text_projection(unet_config) else "cross_attention_dim"]


def load_text_encoder(directory, dtype=None):
    """Loads a CLIP text tower or a T5 encoder, frozen and in eval mode, by the architecture its config names."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model_type = json.loads((Path(directory) / "config.json").read_text())["model_type"]
    classes = {
        "clip_text_model": transformers.CLIPTextModel,
        "clip": transformers.CLIPTextModel,
        "t5": transformers.T5EncoderModel,
    }
    if model_type not in classes:
        raise ValueError(f"{directory}: text encoder of type {model_type!r}; expected one of {sorted(classes)}")
    encoder = classes[model_type].from_pretrained(
        directory, dtype=dtype or torch.float32, use_safetensors=True, trust_remote_code=False
    )
    return encoder.eval().requires_grad_(False)


def load_tokenizer(directory, encoder):
    """Loads the tokenizer that belongs to `encoder` (CLIPTokenizer or T5Tokenizer)."""
    import transformers

    cls = transformers.T5Tokenizer if encoder.config.model_type == "t5" else transformers.CLIPTokenizer
    return cls.from_pretrained(directory)


def load_projection(directory, dtype=None):
    """Loads the T5Projection component, frozen and in eval mode."""
    from cachetrain.modeling.t5_projection import T5Projection

    return _load_diffusers(T5Projection, directory, dtype)


def load_scheduler(directory):
    """Loads the noise scheduler that the directory's config names."""
    import diffusers

    name = json.loads((Path(directory) / "scheduler_config.json").read_text())["_class_name"]
    if not hasattr(diffusers, name) or not name.endswith("Scheduler"):
        raise ValueError(f"{directory}: {name} is not a diffusers scheduler")
    return getattr(diffusers, name).from_pretrained(directory)


def load_custom_pipeline(model, revision=None, dtype=None):
    """Loads a pipeline WITH the code in its repository. Only for users who said `--custom`."""
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(
        model,
        revision=revision,
        custom_pipeline=model,
        trust_remote_code=True,
        use_safetensors=True,
        torch_dtype=dtype,
    )


def _load_diffusers(cls, directory, dtype, train=False):
    import torch

    module = cls.from_pretrained(
        directory, torch_dtype=dtype or torch.float32, use_safetensors=True, low_cpu_mem_usage=False
    )
    return module.train() if train else module.eval().requires_grad_(False)
