"""Draws sample pictures during training."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from cachetrain.atomic import staged_directory
from cachetrain.data.index import PairIndex
from cachetrain.data.sidecar import read_sidecar
from cachetrain.data.variants import CaptionSettings
from cachetrain.diffusion.noise_schedulers import default_sampler, sampler_for
from cachetrain.log import describe, warn
from cachetrain.modeling import load
from cachetrain.modeling.conditioning import Conditioning
from cachetrain.modeling.files import read_config
from cachetrain.modeling.normalisation import of_values
from cachetrain.modeling.text_encoders import encode_like_cache
from cachetrain.modeling.vae import vae_reduction
from cachetrain.sampling.prompts import PromptFile, Prompts, Sample, caption_of, prompts_of, sample_seed, sample_size
from cachetrain.sampling.render import Drawing, Renderer, grid, native_latent_size, sample_name, save_png

_BATCH_SIZE = 8
_NUM_CAPTIONS = 4  # drawn if there are no prompts
_MAX_FRAMES = 50
_FRAME_SIDE = 128  # pixels


class SampleImages:
    """Draws the same prompts from the same noise at every call; picks up changes to the prompt file.

    Prompts are encoded in the constructor, and the text encoder is freed before training starts. Prompts added to the
    file later are encoded on the CPU, so that the text encoder never takes GPU memory beside the UNet. Noise comes
    from separate generators, so drawing does not affect training.

    Args:
        model_dir: pipeline directory with text encoder and VAE.
        source: path of a prompt file, or a list of prompts.
        defaults: settings from the flags; a .json prompt file overrides them.
        noise_scheduler: the model's noise scheduler.
        info: dict with "text", "latent_size" and perhaps "latents", as returned by `checkpoint_info`.
        device: device to draw on.
        dtype: dtype of the text encoder; default: bf16 on CUDA, fp32 elsewhere.
        open_index: function that returns the PairIndex of the training data, for samples that use its captions; None:
            captions cannot be used.
        negative_prompt: for samples without a negative prompt.
        first_seed: seed of the first sample; the next sample has the next seed, and so on.

    Raises:
        ValueError, OSError: prompts, text encoder or VAE cannot be read or used.
    """

    def __init__(
        self,
        model_dir: str | Path,
        source: str | Path | list[str],
        defaults: Prompts,
        noise_scheduler,
        info: Mapping,
        *,
        device: torch.device,
        dtype: torch.dtype | None = None,
        open_index: Callable[[], PairIndex] | None = None,
        negative_prompt: str = "",
        first_seed: int = 0,
    ):
        self.file = None if isinstance(source, list | tuple) else PromptFile(source)
        self.model_dir = model_dir
        self.defaults = defaults
        self.noise_scheduler = noise_scheduler
        self.text = info["text"]
        self.latent_size = info["latent_size"]
        self.scaling = of_values(info["latents"], model_dir) if "latents" in info else None
        self.device = device
        self.open_index = open_index
        self.negative_prompt = negative_prompt
        self.first_seed = first_seed
        unet_config = read_config(load.component_dir(model_dir, "unet"))
        self.conditioning = Conditioning.for_unet(self.text["kind"], unet_config, scale=self.text["scaling_factor"])
        self._conditions = {}
        self._file_names = {}
        self.vae = load.load_vae(load.component_dir(model_dir, "vae"))
        self._use(self.file.prompts if self.file else prompts_of(source), device, dtype)

    def due(self, step: int, max_steps: int) -> bool:
        """Whether to draw after optimizer step `step`; step 0 is before training."""
        if step == 0:
            return self.prompts.generate_pretrain_samples
        return step % self.prompts.generate_samples_every_n_steps == 0 or step == max_steps

    def draw(
        self,
        unet: torch.nn.Module,
        directory: Path,
        metrics,
        step: int,
        autocast: Callable,
        last_samples: Sequence[int] = (),
    ) -> None:
        """Writes one PNG per prompt and cfg to `directory`, and one labelled strip per prompt to TensorBoard.

        `directory` appears only when complete. After step 0 a failure is only a warning, and training continues.

        Args:
            unet: the UNet itself, not a distributed wrapper; on any device.
            metrics: Metrics; None: do not write to TensorBoard.
            autocast: function that makes the run's autocast context.
            last_samples: positions in the index of the pairs in the last batch; their captions are drawn if there are
                no prompts.
        """
        training = unet.training
        unet.eval()
        try:
            self._reload_file()
            unet.to(self.device)
            self.vae.to(self.device)
            drawings = self.drawings(unet, step, [int(i) for i in last_samples])
            rows = [[] for _ in drawings]
            for i, _, image in self.images(unet, drawings, autocast, self.prompts.show_progress_bars):
                rows[i].append(image)
            self._write(drawings, rows, directory, step)
            if metrics is not None:
                self._write_strips(drawings, rows, metrics, step)
        except Exception as error:  # any: pictures are not worth a run
            reason = describe(error)
            if step == 0:
                raise ValueError(f"no samples before training: {reason}") from error
            warn(f"no samples at step {step}: {reason}")
        finally:
            self.vae.to("cpu")
            unet.train(training)

    def animate(self, directory: Path, metrics, step: int) -> None:
        """Writes an animation of the latest pictures for each current prompt to `metrics`.

        The pictures are read from files, so that the animation of a resumed run includes pictures from before.

        Args:
            directory: the run's samples directory; pictures after optimizer step `step` are ignored.
        """
        found = ((re.fullmatch(r"step-([0-9]+)", path.name), path) for path in directory.glob("step-*"))
        folders = {int(match[1]): path for match, path in found if match and path.is_dir()}
        earlier = [(drawn_at, folders[drawn_at]) for drawn_at in sorted(folders) if drawn_at <= step]
        for tag, names in self._file_names.items():
            complete = [
                (drawn_at, path)
                for drawn_at, path in earlier
                if all((path / name).is_file() for name in names.values())
            ]
            if len(complete) > 1:
                metrics.animation(f"{tag} (progress)", _frames(dict(complete[-_MAX_FRAMES:]), names), step)

    def _reload_file(self):
        prompts = self.file.changed() if self.file else None
        if prompts is None:
            return
        try:
            self._use(prompts, "cpu", None)
        except Exception as error:  # any, as in `draw`
            warn(f"{self.file.path}: {describe(error)}; the prompts read before stay in use")

    def _use(self, prompts, device, dtype):
        """Switches to these prompts; if an error is raised, nothing has changed."""
        prompts = completed(prompts, self.defaults, self.negative_prompt)
        sampler = sampler_for(self.noise_scheduler, prompts.scheduler)
        texts = {"", *(s.negative_prompt for s in prompts.samples), *(s.prompt or "" for s in prompts.samples)}
        conditions = {text: self._conditions[text] for text in texts & self._conditions.keys()}
        missing = sorted(texts - conditions.keys())
        if missing:
            encoded = encode_like_cache(
                self.model_dir,
                self.text["kind"],
                self.text["settings"],
                missing,
                device=device,
                dtype=dtype or load.pick_dtype(None, device),
            )
            conditions |= dict(zip(missing, map(self.conditioning.of_caption, encoded), strict=True))
        self.prompts = prompts
        self.sampler = sampler
        self._conditions = conditions

    def drawings(self, unet: torch.nn.Module, step: int, last_samples: Sequence[int] = ()) -> list[Drawing]:
        """Resolves the captions, seeds and sizes of the samples.

        Args:
            step: determines random captions, and seeds of -1.
            last_samples: see `draw`.

        Raises:
            ValueError: a sample needs a caption of the training data, but there is none.
        """
        drawings = []
        for slot, sample in enumerate(self.prompts.samples):
            if sample.prompt is None:
                from_data = self._caption_of_data(sample, slot, step, last_samples)
                if from_data is None:
                    break
                name, prompt, condition = from_data
            else:
                name = prompt = sample.prompt
                condition = self._conditions[prompt]
            latent_size = latent_size_of(sample, native_latent_size(unet) or self.latent_size, self.vae)
            latent_size = latent_size or self.latent_size
            factor = vae_reduction(self.vae)
            of_size = self.conditioning.of_size(latent_size[0] * factor, latent_size[1] * factor)
            drawings.append(
                Drawing(
                    name,
                    prompt,
                    sample.negative_prompt,
                    seed=sample_seed(sample, self.prompts, slot, step, self.first_seed),
                    latent_size=latent_size,
                    condition=condition | of_size,
                    negative_condition=self._conditions[sample.negative_prompt] | of_size,
                )
            )
        return drawings

    def _caption_of_data(self, sample, slot, step, last_samples):
        """Returns (name, caption, condition) for a pair of the training data; None if the last batch is too small."""
        if self.open_index is None:
            raise ValueError('"random_caption" needs training data, which is not available here; use "prompt"')
        index = self.open_index()
        # Before the first batch, fall back to random captions.
        if sample.random_caption or not last_samples:
            name, pair = "random caption", int(np.random.default_rng([step, slot, 1]).integers(len(index)))
        elif slot < len(last_samples):
            name, pair = "caption of the last batch", last_samples[slot]
        else:
            return None
        tensors, header = read_sidecar(index.text_path(pair))
        settings = CaptionSettings.from_header(index.text_path(pair), header.metadata)
        return name, caption_of(index.caption_stem(pair), settings), self.conditioning.of_caption(tensors)

    def images(
        self,
        unet: torch.nn.Module,
        drawings: Sequence[Drawing],
        autocast: Callable = nullcontext,
        progress_bar: bool = False,
    ) -> Iterator[tuple[int, float, Image.Image]]:
        """Yields (position in `drawings`, cfg, image). UNet and VAE are used on the devices where they are."""
        cfgs, batch_size = self.prompts.cfgs, self.prompts.batch_size or _BATCH_SIZE
        steps = self.prompts.num_inference_steps
        renderer = Renderer(unet, self.vae, self.sampler, self.conditioning, steps, batch_size, scaling=self.scaling)
        # Eager, because a compiled UNet would be recompiled for each batch size and picture size.
        with torch.compiler.set_stance("force_eager"), autocast(), load.named(self.model_dir):
            yield from tqdm(
                renderer.draw(drawings, cfgs),
                desc="samples",
                total=len(drawings) * len(cfgs),
                unit="img",
                leave=False,
                disable=None if progress_bar else True,
            )

    def save(
        self, image: Image.Image, directory: Path, slot: int, drawing: Drawing, cfg: float, **more_settings
    ) -> None:
        """Writes one PNG; the settings of the drawing and `more_settings` are stored as text chunks."""
        save_png(
            image,
            directory / sample_name(slot, drawing.name, cfg),
            prompt=drawing.prompt,
            negative_prompt=drawing.negative_prompt,
            seed=drawing.seed,
            cfg=f"{cfg:g}",
            num_inference_steps=self.prompts.num_inference_steps,
            scheduler=self.prompts.scheduler or default_sampler(self.noise_scheduler),
            **more_settings,
        )

    def _write(self, drawings, rows, directory, step):
        with staged_directory(directory, overwrite=True) as stage:  # a resumed run may draw a step again
            for slot, (drawing, images) in enumerate(zip(drawings, rows, strict=True)):
                for cfg, image in zip(self.prompts.cfgs, images, strict=True):
                    self.save(image, stage, slot, drawing, cfg, step=step)

    def _write_strips(self, drawings, rows, metrics, step):
        cfgs = self.prompts.cfgs
        self._file_names = {}
        for slot, (drawing, images) in enumerate(zip(drawings, rows, strict=True)):
            tag = f"12_Generated_Samples/{slot:02d} {drawing.name[:60]}"
            caption = "" if drawing.name == drawing.prompt else f": {drawing.prompt}"
            metrics.image(tag, grid(images, [f"cfg {cfg:g}{caption}" for cfg in cfgs], len(cfgs)), step)
            self._file_names[tag] = {cfg: sample_name(slot, drawing.name, cfg) for cfg in cfgs}


def _frames(folders, names):
    """Yields a small strip per folder; strips that differ in size from the last one are left out.

    Sizes differ if the prompt file was changed during the run.

    Args:
        folders: {step: directory}.
        names: {cfg: file name}.
    """
    frames = []
    for step, folder in folders.items():
        images = []
        for name in names.values():
            with Image.open(folder / name, formats=["PNG"]) as image:
                image.thumbnail((_FRAME_SIDE, _FRAME_SIDE))
                images.append(image.copy())
        frames.append(grid(images, [f"cfg {cfg:g}, step {step}" for cfg in names], len(names), min_side=1))
    yield from (frame for frame in frames if frame.size == frames[-1].size)


def latent_size_of(sample: Sample, native: tuple[int, int], vae: torch.nn.Module) -> tuple[int, int] | None:
    """Returns the latent size (h, w) that a sample asks for, or None. `native`: (h, w) for an aspect ratio's area."""
    factor, (height, width) = vae_reduction(vae), native
    size = sample_size(sample, (width * factor, height * factor))
    return size and (size[1] // factor, size[0] // factor)


def default_latent_size(
    args: argparse.Namespace, info: Mapping, unet: torch.nn.Module, vae: torch.nn.Module
) -> tuple[int, int]:
    """Returns the latent size (h, w) for samples without a size.

    --height and --width, else the size trained on, else the size in the UNet's config.

    Raises:
        ValueError: --height or --width is not a multiple of the VAE's downsampling factor, or one is needed.
    """
    factor, size = vae_reduction(vae), info["latent_size"] or native_latent_size(unet)
    if size is None and not (args.height and args.width):
        raise ValueError("the config of the UNet has no sample_size; pass --height and --width")
    height, width = size or (0, 0)
    for flag, side in (("--height", args.height), ("--width", args.width)):
        if side and side % factor:
            raise ValueError(f"{flag} {side}: must be a multiple of {factor}")
    return args.height // factor if args.height else height, args.width // factor if args.width else width


def completed(prompts: Prompts, defaults: Prompts, negative_prompt: str = "") -> Prompts:
    """Fills in settings that are None from `defaults`; if there are no samples, captions of the data are drawn."""
    settings = (default if setting is None else setting for setting, default in zip(prompts, defaults, strict=True))
    samples = prompts.samples or (Sample(),) * _NUM_CAPTIONS
    samples = (sample._replace(negative_prompt=sample.negative_prompt or negative_prompt) for sample in samples)
    return Prompts(*settings)._replace(samples=tuple(samples))
