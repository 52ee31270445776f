"""Loads model components one by one, with known classes, from safetensors only.

No code from a model directory is run and no pickle is read. The one exception is `load_custom_pipeline`, which
scripts call only if the user passed `--custom`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cachetrain.log import describe, first_line
from cachetrain.modeling import lora, normalisation
from cachetrain.modeling.digests import sha256_of
from cachetrain.modeling.files import CONFIG, TOKENIZER, component_files, only_files, read_config, read_json
from cachetrain.modeling.names import download_patterns, split_subfolder, tokenizer_beside
from cachetrain.modeling.vae import REFUSED
from cachetrain.reading import read_text

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DConditionModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cachetrain.modeling.t5_projection import T5Projection

_MAX_TIMESTEPS = 10**5  # of a noise schedule, whose length takes memory

# Says in the config of a UNet without weights that composing a model initializes them.
FRESH = {"_weights": "fresh"}
# model_type in the config of a text encoder -> its architecture.
_TEXT_ARCHITECTURES = {"clip": "clip", "clip_text_model": "clip", "t5": "t5"}
# Tensors in the files of text encoders that are not part of the text encoder.
_NOT_TEXT = re.compile(
    r"(text_model\.)?embeddings\.position_ids|(vision_model|visual_projection|decoder|lm_head)\..*|logit_scale"
)
_NOT_PROJECTED_TEXT = re.compile(rf"{_NOT_TEXT.pattern}|text_projection\..*")
# Config entries that do not affect what a component computes.
_INCIDENTAL = ("transformers_version", "torch_dtype", "dtype", "architectures")


def pick_device(device: str | None = None) -> torch.device:
    """Returns `device`; None: cuda if available (under a launcher, the GPU of LOCAL_RANK), else cpu.

    Raises:
        ValueError: this machine has no such device.
    """
    import torch

    if device is None:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=device).item()
    except Exception as error:  # any: each kind of device has its own
        raise ValueError(f"--device {device}: {first_line(error)}; use cpu, or cuda where there is a GPU") from None
    return torch.device(device)


def pick_dtype(name: str | None, device: torch.device | str) -> torch.dtype:
    """Returns the torch dtype for "fp32", "bf16" or "fp16"; None: bf16 on cuda, fp32 elsewhere."""
    import torch

    if name is None:
        name = "bf16" if torch.device(device).type == "cuda" else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def resolve_model(
    model: str | Path, revision: str | None = None, subfolders: Sequence[str] = (), code: bool = False
) -> Path:
    """Returns the local directory of `model`; configs and safetensors of a Hugging Face model id are downloaded.

    Args:
        model: directory or Hugging Face model id, of a component followed by `:subfolder`.
        revision: branch, tag or commit of a Hugging Face model id.
        subfolders: components to download; () downloads all. Pickles are never downloaded.
        code: also download Python files (without running them); only if the user passed `--custom`.

    Raises:
        ValueError: `model` is neither a directory nor a model id that can be downloaded.
    """
    model, subfolder = split_subfolder(model)
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / subfolder).is_dir():
            raise ValueError(f"{path / subfolder}: no such directory; pass a folder of {path} after the colon")
        return (path / subfolder).resolve()
    owner, slash, name = model.partition("/")
    if not (slash and name) or "/" in name or owner.startswith((".", "~")) or _is_local_folder(owner):
        raise ValueError(f"{model}: no such directory{_where_it_comes_from(path)}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = download_patterns(subfolder, subfolders, code)
    try:
        # Variants (fp16, non_ema) are never read.
        snapshot = snapshot_download(
            model, revision=revision, allow_patterns=patterns, ignore_patterns=["*.fp16.*", "*.non_ema.*"]
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"{model}: no such directory, and downloading from the Hugging Face Hub failed: {error}"
        ) from error
    if not (Path(snapshot) / subfolder).is_dir():
        raise ValueError(f"{model}: has no folder {subfolder!r} with safetensors or configs; pass another one")
    return Path(snapshot) / subfolder


def _is_local_folder(name):
    """Whether a path that begins with this folder means this machine: the folder exists, or our commands make it."""
    return name in ("", "models", "output", "quickstart") or Path(name).exists()


def _where_it_comes_from(path):
    if path.parent.name == "models":
        return "; make it with one of models/compose_*.py, or pass another model"
    return "; a Hugging Face model id is owner/name, where no folder `owner` lies in the current directory"


def component_dir(model_dir: str | Path, name: str) -> Path:
    """Returns the directory of a component: `model_dir/name` in a pipeline, or `model_dir` for a bare component.

    The tokenizer of a bare text encoder may also be in the folder beside it, as in a pipeline.

    Raises:
        ValueError: there is no such component.
    """
    model_dir = Path(model_dir)
    if (model_dir / name).is_dir():
        return model_dir / name
    if name.startswith("tokenizer") and not any((model_dir / file).exists() for file in TOKENIZER):
        beside = model_dir.with_name(tokenizer_beside(model_dir.name))
        if beside != model_dir and beside.is_dir():
            return beside
    if not (model_dir / "model_index.json").exists() and any(model_dir.glob("*config.json")):
        return model_dir
    if (model_dir / lora.FILE).exists():
        raise ValueError(
            f"{model_dir}: is an adapter, not a model; merge it into its base model with models/merge_lora.py first"
        )
    raise ValueError(f"{model_dir}: has no component {name!r}; expected a directory {model_dir / name}")


def text_components(kind: str, settings: Mapping) -> list[str]:
    """Returns the components of a model that make a text cache of this kind with these settings (of its header)."""
    second = ["text_encoder_2", "tokenizer_2"] if kind == "txt_sdxl" else []
    projection = ["projection"] if settings.get("raw") is False else []
    return ["text_encoder", "tokenizer", *second, *projection]


def text_files(model_dir: str | Path, kind: str, settings: Mapping) -> list[Path]:
    """Returns the files of a model that decide what a text cache of this kind with these settings contains.

    Raises:
        ValueError: the model lacks a component, or its weights.
    """
    directories = {name: component_dir(model_dir, name) for name in text_components(kind, settings)}
    return [path for name, directory in directories.items() for path in component_files(directory, name)]


def all_files(*directories: str | Path) -> list[Path]:
    """Returns all weights, configs, vocabularies and code in directories, for models that run their own code."""
    kinds = (".json", ".safetensors", ".txt", ".model", ".py")
    return [
        path
        for directory in directories
        for path in sorted(Path(directory).iterdir())
        if path.is_file() and path.suffix in kinds
    ]


def fingerprint(files: Iterable[Path]) -> str:
    """SHA-256 (hex) of the names and contents of files: weights, configs, vocabularies, code.

    Config entries that do not affect the computation (library versions, paths) are left out.
    """
    digest = hashlib.sha256()
    for path in files:
        if path.suffix == ".json":
            content = _parsed(path)
            if isinstance(content, dict):
                content = {k: v for k, v in content.items() if k[:1] != "_" and k not in _INCIDENTAL}
            digest.update(path.name.encode() + json.dumps(content, sort_keys=True).encode())
        else:
            digest.update(path.name.encode() + sha256_of(path))
    return digest.hexdigest()


def _parsed(path):
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON ({error}); get the file again") from None


def load_vae(directory: str | Path, dtype: torch.dtype | None = None) -> ModelMixin:
    """Loads any diffusers autoencoder, frozen and in eval mode, with the class named in its config.

    Args:
        directory: the component's directory, with config.json.
        dtype: None: float32.

    Raises:
        ValueError: the config names no diffusers autoencoder.
    """
    import diffusers

    config = read_config(directory)
    normalisation.check_config(config, f"{directory}: {CONFIG}")
    name = str(config.get("_class_name"))
    cls = getattr(diffusers, name, None)
    if name in REFUSED:
        raise ValueError(f"{directory}: {name} {REFUSED[name]}")
    if not (name.startswith(("Autoencoder", "AsymmetricAutoencoder", "VQModel")) and isinstance(cls, type)):
        raise ValueError(f"{directory}: {name} is not a diffusers autoencoder; pass a VAE, or a pipeline with one")
    return _load_diffusers(cls, directory, "vae", dtype)


def load_unet(directory: str | Path, dtype: torch.dtype | None = None) -> UNet2DConditionModel:
    """Loads a UNet, in train mode.

    Args:
        directory: the component's directory, with config.json and weights.
        dtype: None: float32.

    Raises:
        ValueError: the weights are not there, or not those of the config.
    """
    from diffusers import UNet2DConditionModel

    return _load_diffusers(UNet2DConditionModel, directory, "unet", dtype, train=True)


def fresh_unet(config: Mapping, seed: int) -> UNet2DConditionModel:
    """Returns a float32 UNet with this config and initial weights from `seed`."""
    import torch
    from diffusers import UNet2DConditionModel

    config = {key: value for key, value in config.items() if key not in FRESH}
    with torch.random.fork_rng(devices=[]), named("the UNet's config.json"):
        torch.manual_seed(seed)
        return UNet2DConditionModel.from_config(config)


def empty_unet(directory: str | Path) -> UNet2DConditionModel:
    """Returns the UNet of a directory without its weights, on the meta device.

    Raises:
        ValueError: its config is not one of such a UNet.
    """
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"), named(Path(directory) / CONFIG):
        return UNet2DConditionModel.from_config(read_config(directory))


def has_text_projection(unet_config: Mapping) -> bool:
    """Whether a UNet with this config contains a projection of raw text embeddings: diffusers' "text_proj"."""
    # diffusers defaults to text_proj if the config has encoder_hid_dim but no type.
    kind = unet_config.get("encoder_hid_dim_type")
    return kind == "text_proj" or (kind is None and unet_config.get("encoder_hid_dim") is not None)


def text_width(unet_config: Mapping) -> int:
    """Width D of the text embeddings [B, T, D] that a UNet with this config takes."""
    return unet_config["encoder_hid_dim" if has_text_projection(unet_config) else "cross_attention_dim"]


def pooled_width(unet_config: Mapping) -> int:
    """Width of the pooled text vector that a UNet with this config takes beside time ids, as SDXL's does; 0: none.

    Raises:
        ValueError: the UNet takes something else.
    """
    kind = unet_config.get("addition_embed_type")
    if kind not in (None, "text_time"):
        raise ValueError(
            f"the UNet's addition_embed_type is {kind!r}; expected none, as in Stable Diffusion 1.5, or 'text_time', "
            "as in SDXL"
        )
    if kind is None:
        return 0
    return unet_config["projection_class_embeddings_input_dim"] - 6 * unet_config["addition_time_embed_dim"]


def text_architecture(directory: str | Path) -> str:
    """Returns the architecture of a text encoder, as its config says: "clip" or "t5".

    Raises:
        ValueError: the config names another architecture.
    """
    model_type = str(read_config(directory).get("model_type"))
    if model_type not in _TEXT_ARCHITECTURES:
        known = ", ".join(_TEXT_ARCHITECTURES)
        raise ValueError(f"{directory}: text encoder of type {model_type!r}; expected one of {known}")
    return _TEXT_ARCHITECTURES[model_type]


def text_family(model_dir: str | Path) -> str:
    """Returns what a model encodes captions with: "sdxl" (two CLIP encoders), "clip" or "t5".

    Raises:
        ValueError: the model has no text encoder, or one of another architecture.
    """
    if (Path(model_dir) / "text_encoder_2").is_dir() or any(_model_index(model_dir).get("text_encoder_2") or ()):
        return "sdxl"
    return text_architecture(component_dir(model_dir, "text_encoder"))


def zeros_for_empty_prompt(model_dir: str | Path) -> bool:
    """Whether an SDXL model takes zeros for the empty caption (diffusers' force_zeros_for_empty_prompt)."""
    return bool(_model_index(model_dir).get("force_zeros_for_empty_prompt", True))  # the pipeline's default


def missing_text_encoders(model_dir: str | Path) -> list[str]:
    """The text encoders that a pipeline's model_index.json names and that are not there."""
    index, names = _model_index(model_dir), ("text_encoder", "text_encoder_2")
    named = [name for name in names if isinstance(index.get(name), list) and index[name][:1] != [None]]
    return [name for name in named if not (Path(model_dir) / name).is_dir()]


def _model_index(model_dir):
    path = Path(model_dir) / "model_index.json"
    return read_json(path) if path.exists() else {}


def load_text_encoder(
    directory: str | Path, dtype: torch.dtype | None = None, projected: bool = False
) -> PreTrainedModel:
    """Loads a CLIP text encoder or a T5 encoder, as its config says; frozen and in eval mode.

    Args:
        directory: the component's directory, with config.json and weights.
        dtype: None: float32.
        projected: CLIP only. Also load the projection of the pooled output, as SDXL's second encoder has it.

    Raises:
        ValueError: the config names another architecture; the weights are not there, or not those of the config.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # what it would report is checked in _load_checked
    cls = transformers.T5EncoderModel if text_architecture(directory) == "t5" else transformers.CLIPTextModel
    cls, ignored = (transformers.CLIPTextModelWithProjection, _NOT_TEXT) if projected else (cls, _NOT_PROJECTED_TEXT)
    options = {"dtype": dtype or torch.float32, "trust_remote_code": False}
    encoder = _load_checked(cls, directory, "text_encoder", ignored=ignored, **options)
    return encoder.eval().requires_grad_(False)


def load_tokenizer(directory: str | Path, encoder: PreTrainedModel) -> PreTrainedTokenizerBase:
    """Loads the CLIPTokenizer or T5Tokenizer for `encoder`."""
    import transformers

    cls = transformers.T5Tokenizer if encoder.config.model_type == "t5" else transformers.CLIPTokenizer
    with only_files(component_files(directory, "tokenizer")) as copy, named(directory):
        return cls.from_pretrained(copy)


def load_projection(directory: str | Path, dtype: torch.dtype | None = None) -> T5Projection:
    """Loads the projection component, frozen and in eval mode."""
    from cachetrain.modeling.t5_projection import T5Projection

    return _load_diffusers(T5Projection, directory, "projection", dtype)


def load_scheduler(directory: str | Path) -> SchedulerMixin:
    """Loads the noise scheduler named in the directory's config.

    Raises:
        ValueError: the config names no diffusers scheduler, or one that cannot be made of it.
    """
    import diffusers

    path = Path(directory) / "scheduler_config.json"
    try:
        config = read_json(path)
        name, num_timesteps = config["_class_name"], config.get("num_train_timesteps")
        if not (isinstance(name, str) and name.endswith("Scheduler") and hasattr(diffusers, name)):
            raise ValueError(f"{name} is not a diffusers scheduler")
        if isinstance(num_timesteps, int) and num_timesteps > _MAX_TIMESTEPS:
            raise ValueError(f"num_train_timesteps is {num_timesteps}")
        return getattr(diffusers, name).from_pretrained(directory)
    except Exception as error:  # any: diffusers checks little of what it reads
        reason = "has no _class_name" if isinstance(error, KeyError) else describe(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: {reason}; expected the config of a scheduler, as diffusers saves it") from error


def load_custom_pipeline(
    model: str, revision: str | None = None, dtype: torch.dtype | None = None
) -> DiffusionPipeline:
    """Loads a pipeline and RUNS THE CODE in its repository; only if the user passed `--custom`."""
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(
        model,
        revision=revision,
        custom_pipeline=model,
        trust_remote_code=True,
        use_safetensors=True,
        torch_dtype=dtype,
    )


def _load_diffusers(cls, directory, name, dtype, train=False):
    import diffusers
    import torch

    diffusers.utils.logging.set_verbosity_error()  # what it would report is checked in _load_checked
    options = {"torch_dtype": dtype or torch.float32, "low_cpu_mem_usage": False}
    module = _load_checked(cls, directory, name, **options)
    return module.train() if train else module.eval().requires_grad_(False)


@contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Names the file or directory in whatever a library raises on what it holds, which becomes a ValueError."""
    try:
        yield
    except Exception as error:  # any: the libraries check little of what they read
        cause = error
        while cause:
            # The death of a loader's worker interrupts whatever runs; too little memory is nobody's fault.
            if isinstance(cause, MemoryError) or (
                isinstance(cause, RuntimeError) and re.search("DataLoader|memory", str(cause))
            ):
                raise cause from None
            cause = cause.__context__
        raise ValueError(f"{path}: cannot be used ({describe(error)}); get the files again") from error


def _load_checked(cls, directory, name, ignored=re.compile(""), **options):
    """from_pretrained of the files in `component_files` alone, which must have exactly the config's weights.

    Args:
        name: of the component.
        ignored: pattern of names that the files may have in addition.

    Raises:
        ValueError: they have not, or the files cannot be read.
    """
    files = component_files(directory, name)
    options |= {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        with only_files(files) as copy, named(directory):
            module, found = cls.from_pretrained(copy, **options)
    except RuntimeError as error:
        if "memory" in str(error) and "DataLoader" not in str(error):
            raise MemoryError(f"{directory}: {first_line(error)}") from error
        raise
    problems = {
        "missing": found["missing_keys"],
        "of another shape": [name for name, *_ in found["mismatched_keys"]],
        "left over": [name for name in found["unexpected_keys"] if not ignored.fullmatch(name)],
    }
    text = ", ".join(f"{len(names)} {what} (like {min(names)})" for what, names in problems.items() if names)
    if text:
        raise ValueError(f"{directory}: the weights are not those of config.json: {text}; get both again")
    return module
