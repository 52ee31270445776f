"""Builds pipeline directories from parts. Frozen parts are copied byte for byte, which keeps their fingerprints."""

from __future__ import annotations

import json
import re
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cachetrain.atomic import staged_directory
from cachetrain.diffusion.noise_schedulers import make_scheduler
from cachetrain.log import warn
from cachetrain.modeling import load
from cachetrain.modeling.channels import change_channels
from cachetrain.modeling.files import component_files, has_weights, read_config
from cachetrain.modeling.projections import ProjectionOptions, make_projection, projection_into_unet, save_projection
from cachetrain.modeling.vae import check_takes_images, latent_channels
from cachetrain.reading import read_text

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Target:
    """What to compose.

    Attributes:
        out: pipeline directory to write.
        objective: see diffusion.noise_schedulers.OBJECTIVES; decides the scheduler.
        fresh_unet: use only the UNet's config and initialize the weights from `seed`. A config with
            "_weights": "fresh", like that of models/tiny/unet, does not need this.
        seed: seed of all new weights.
        overwrite: replace `out` if it is a pipeline directory.
        channels: how to give the UNet the VAE's number of latent channels, see channels.change_channels; None: refuse
            a VAE with another number.
    """

    out: str | Path
    objective: str
    fresh_unet: bool = False
    seed: int = 0
    overwrite: bool = False
    channels: str | None = None


class Stage(NamedTuple):
    """The directory that becomes the model, and where the components in it were copied from."""

    path: Path
    sources: dict[Path, Path]

    def copy(self, source: Path, name: str, component: str | None = None) -> None:
        """Copies the files of a component to `name`/; links in Hugging Face snapshots become files.

        Args:
            component: kind of component, as `component_files` takes it; default: `name`.

        Raises:
            ValueError: of `component_files`.
        """
        (target := self.path / name).mkdir()
        for path in component_files(source, component or name):
            shutil.copyfile(path, target / path.name)
        self.sources[target] = source


@contextmanager
def staged(target: Target) -> Iterator[Stage]:
    """Yields what becomes `target.out` once the block ends; an error in a copied component names the original.

    Raises:
        ValueError: `target.out` is a directory of something else, or exists and may not be replaced.
    """
    with staged_directory(target.out, target.overwrite, holds="model_index.json") as path:
        stage = Stage(path, {})
        try:
            yield stage
        except ValueError as error:
            message = str(error)
            for copy, source in stage.sources.items():
                message = re.sub(rf"{re.escape(str(copy))}(?![\w.-])", lambda _, source=source: str(source), message)
            raise ValueError(message) from error


def save_unet(
    stage: Stage, unet_dir: Path, vae: AutoencoderKL, text_width: int, target: Target, pooled_width: int = 0
) -> None:
    """Copies the UNet, or saves a freshly initialized one, or one with other channels; checks that VAE and text
    encoder fit the UNet.

    Args:
        pooled_width: of the pooled text vector beside the embeddings, for SDXL's UNet; 0: none.

    Raises:
        ValueError: latent channels or text widths differ from the UNet's.
    """
    check_takes_images(vae)
    config = read_config(unet_dir)
    channels = latent_channels(vae)
    other_channels = config["in_channels"] != channels
    if other_channels and not target.channels:
        raise ValueError(
            f"{unet_dir}: this UNet expects {config['in_channels']} latent channels, the VAE has {channels}; "
            "pass another --vae or --unet, or --channels to change the UNet"
        )
    if text_width != load.text_width(config):
        raise ValueError(
            f"{unet_dir}: this UNet expects text embeddings of width {load.text_width(config)}, the text encoder's "
            f"have {text_width}; pass another text encoder or --unet"
        )
    if pooled_width != load.pooled_width(config):
        raise ValueError(
            f"{unet_dir}: this UNet expects a pooled text vector of width {load.pooled_width(config)}, the text "
            f"encoders give {pooled_width}; pass another --clip_g or --unet"
        )
    if _starts_fresh(unet_dir, target):
        if other_channels and target.channels != "fresh":
            warn(f"--channels {target.channels}: the UNet starts with new weights, so there are none to keep")
        config |= {"in_channels": channels, "out_channels": channels} if other_channels else {}
        load.fresh_unet(config, target.seed).save_pretrained(stage.path / "unet")
    elif other_channels:
        unet = load.load_unet(unet_dir)
        with load.named(unet_dir):
            change_channels(unet, channels, target.channels, target.seed)
        unet.save_pretrained(stage.path / "unet")
    else:
        stage.copy(unet_dir, "unet")
        load.load_unet(stage.path / "unet")  # refuses files that are damaged or do not fit the config


def _check_kind(unet_dir, sdxl, scripts):
    """Refuses a UNet for the other script of a pair; scripts: (SD1.5's, SDXL's)."""
    if sdxl != (load.pooled_width(read_config(unet_dir)) > 0):
        what = "not SDXL's" if sdxl else "SDXL's"
        raise ValueError(f"{unet_dir}: this UNet is {what}; pass another --unet, or use models/{scripts[not sdxl]}")


def _check_architecture(encoder_dir, expected):
    found = load.text_architecture(encoder_dir)
    if found != expected:
        scripts = "compose_t5_sd.py or compose_t5_sdxl.py" if found == "t5" else "compose_sd.py or compose_sdxl.py"
        raise ValueError(f"{encoder_dir}: expected {expected.upper()}, found {found.upper()}; use models/{scripts}")


def _starts_fresh(unet_dir: Path, target: Target) -> bool:
    """Whether the new model's UNet gets new weights: if the user or the config itself says so."""
    return target.fresh_unet or (load.FRESH.items() <= read_config(unet_dir).items() and not has_weights(unet_dir))


def write_model_index(stage: Path, pipeline: str | list[str], components: dict) -> None:
    """Writes model_index.json. `components`: name -> [library, class], or [None, None] for an absent component."""
    import diffusers

    index = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__, **components}
    (stage / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def compose_sd(unet: str | Path, vae: str | Path, clip: str | Path, target: Target) -> None:
    """Composes a StableDiffusionPipeline directory: UNet + VAE + CLIP text encoder.

    Args:
        unet, vae, clip: pipeline directories, bare components or Hugging Face model ids.

    Raises:
        ValueError: a part cannot be found, or the parts do not fit together.
    """
    unet_dir, vae_dir, clip_root = _resolve(unet, "unet"), _resolve(vae, "vae"), _text_root(clip)
    _check_kind(unet_dir, False, ("compose_sd.py", "compose_sdxl.py"))
    encoder_dir = load.component_dir(clip_root, "text_encoder")
    _check_architecture(encoder_dir, "clip")
    vae_module = load.load_vae(vae_dir)
    width = load.load_text_encoder(encoder_dir).config.hidden_size
    with staged(target) as stage:
        save_unet(stage, unet_dir, vae_module, width, target)
        stage.copy(vae_dir, "vae")
        stage.copy(encoder_dir, "text_encoder")
        stage.copy(load.component_dir(clip_root, "tokenizer"), "tokenizer")
        scheduler = make_scheduler(target.objective)
        scheduler.save_pretrained(stage.path / "scheduler")
        write_model_index(
            stage.path,
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


def compose_sdxl(unet: str | Path, vae: str | Path, clip_l: str | Path, clip_g: str | Path, target: Target) -> None:
    """Composes a StableDiffusionXLPipeline directory: UNet + VAE + CLIP ViT-L + OpenCLIP bigG.

    Whether the empty caption is zeros (force_zeros_for_empty_prompt) comes from the pipeline of the UNet, which was
    trained with it; the default is diffusers': zeros.

    Args:
        unet, vae, clip_l, clip_g: pipeline directories, bare components or Hugging Face model ids. Of an SDXL
            pipeline, clip_l is text_encoder/ and clip_g is text_encoder_2/.

    Raises:
        ValueError: a part cannot be found, or the parts do not fit together.
    """
    from cachetrain.modeling.text_encoders import SdxlTextEncoder, check_second_encoder

    unet_root = load.resolve_model(unet, subfolders=("unet",))
    unet_dir, vae_dir = load.component_dir(unet_root, "unet"), _resolve(vae, "vae")
    roots = _text_root(clip_l), load.resolve_model(clip_g, subfolders=("text_encoder_2", "tokenizer_2"))
    parts = {}
    for name in ("text_encoder", "tokenizer"):
        second = f"{name}_2" if (roots[1] / f"{name}_2").is_dir() else name
        parts |= {name: load.component_dir(roots[0], name), f"{name}_2": load.component_dir(roots[1], second)}
    _check_kind(unet_dir, True, ("compose_sd.py", "compose_sdxl.py"))
    for name in ("text_encoder", "text_encoder_2"):
        _check_architecture(parts[name], "clip")
    check_second_encoder(parts["text_encoder_2"])
    vae_module = load.load_vae(vae_dir)
    with staged(target) as stage:
        for name, directory in parts.items():
            stage.copy(directory, name, name.removesuffix("_2"))
        text = SdxlTextEncoder(stage.path)  # refuses encoders and tokenizers that are not SDXL's
        widths = [encoder.config.hidden_size for encoder in text.encoders]
        pooled = text.encoders[1].config.projection_dim
        save_unet(stage, unet_dir, vae_module, sum(widths), target, pooled)
        stage.copy(vae_dir, "vae")
        scheduler = make_scheduler(target.objective)
        scheduler.save_pretrained(stage.path / "scheduler")
        write_model_index(
            stage.path,
            "StableDiffusionXLPipeline",
            {
                "vae": ["diffusers", type(vae_module).__name__],
                "text_encoder": ["transformers", "CLIPTextModel"],
                "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
                "tokenizer": ["transformers", "CLIPTokenizer"],
                "tokenizer_2": ["transformers", "CLIPTokenizer"],
                "unet": ["diffusers", "UNet2DConditionModel"],
                "scheduler": ["diffusers", type(scheduler).__name__],
                "image_encoder": [None, None],
                "feature_extractor": [None, None],
                "force_zeros_for_empty_prompt": load.zeros_for_empty_prompt(unet_root),
            },
        )


def compose_t5(
    unet: str | Path,
    vae: str | Path,
    t5: str | Path,
    target: Target,
    projection_options: ProjectionOptions | None = None,
    *,
    sdxl: bool = False,
) -> None:
    """Composes a StableDiffusionT5Pipeline directory: UNet + VAE + T5 encoder + projection to the UNet's width.

    A trained UNet that contains a projection keeps it. A UNet config with a projection gets a new one as a layer,
    even if `projection_options.trained` is False.

    Args:
        unet, vae, t5: pipeline directories, bare components or Hugging Face model ids.
        sdxl: the UNet is SDXL's; it gets zeros in place of a pooled text vector.

    Raises:
        ValueError: a part cannot be found, the parts do not fit together, or projection options are given for a UNet
            that keeps its projection.
    """
    options = projection_options or ProjectionOptions()
    unet_dir, vae_dir, t5_root = _resolve(unet, "unet"), _resolve(vae, "vae"), _text_root(t5)
    _check_kind(unet_dir, sdxl, ("compose_t5_sd.py", "compose_t5_sdxl.py"))
    encoder_dir = load.component_dir(t5_root, "text_encoder")
    _check_architecture(encoder_dir, "t5")
    vae_module = load.load_vae(vae_dir)
    config, fresh = read_config(unet_dir), _starts_fresh(unet_dir, target)
    pooled = load.pooled_width(config)  # the UNet gets zeros of this width
    width, has_projection = config["cross_attention_dim"], load.has_text_projection(config)
    keep_projection = has_projection and not fresh
    if keep_projection and (options.trained or options.captions):
        advice = "omit --train_projection and --fit_captions, or pass --fresh_unet"
        raise ValueError(f"{unet_dir}: this UNet already has a projection, which is kept; {advice}")
    in_unet = has_projection or options.trained
    with staged(target) as stage:
        t5_width = read_config(encoder_dir).get("d_model") if has_projection else width
        save_unet(stage, unet_dir, vae_module, t5_width, target, pooled)
        stage.copy(vae_dir, "vae")
        stage.copy(encoder_dir, "text_encoder")
        stage.copy(load.component_dir(t5_root, "tokenizer"), "tokenizer")
        if not keep_projection:
            projection = make_projection(stage.path, width, target.seed, options)
            (projection_into_unet if in_unet else save_projection)(stage.path, projection)
        shutil.copyfile(HERE / "t5_pipeline.py", stage.path / "pipeline.py")
        scheduler = make_scheduler(target.objective)
        scheduler.save_pretrained(stage.path / "scheduler")
        write_model_index(
            stage.path,
            ["pipeline", "StableDiffusionT5Pipeline"],
            {
                "vae": ["diffusers", type(vae_module).__name__],
                "text_encoder": ["transformers", "T5EncoderModel"],
                "tokenizer": ["transformers", "T5Tokenizer"],
                "projection": [None, None] if in_unet else ["t5_projection", "T5Projection"],
                "unet": ["diffusers", "UNet2DConditionModel"],
                "scheduler": ["diffusers", type(scheduler).__name__],
            },
        )


def compose_t5_of(args: Namespace, sdxl: bool) -> None:
    """Composes the model that the flags of compose_t5_sd.py or compose_t5_sdxl.py ask for.

    Raises:
        ValueError: of `compose_t5`; or the file of --fit_captions contains none.
    """
    captions = None
    if args.fit_captions:
        captions = [line.strip() for line in read_text(args.fit_captions).splitlines() if line.strip()]
        if not captions:
            raise ValueError(f"{args.fit_captions}: contains no captions; add some, or omit --fit_captions")
    device = load.pick_device(args.device)
    target = Target(args.out, args.objective, args.fresh_unet, args.seed, args.overwrite, args.channels)
    projection = ProjectionOptions(captions, args.train_projection, load.pick_dtype(args.dtype, device), device)
    compose_t5(args.unet, args.vae, args.t5, target, projection, sdxl=sdxl)


def _resolve(model, component):
    return load.component_dir(load.resolve_model(model, subfolders=(component,)), component)


def _text_root(model):
    return load.resolve_model(model, subfolders=("text_encoder", "tokenizer"))
