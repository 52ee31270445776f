"""Pictures of what the model draws, while it trains."""

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from cachetrain.atomic import staged_directory
from cachetrain.data.sidecar import read_sidecar
from cachetrain.diffusion.noise_schedulers import default_sampler, sampler_for
from cachetrain.log import warn
from cachetrain.modeling import load
from cachetrain.modeling.text_encoders import encode_like_cache
from cachetrain.sampling.prompts import PromptFile, Prompts, Sample, caption_of, prompts_of, sample_seed, sample_size
from cachetrain.sampling.render import (
    Drawing,
    grid,
    native_latent_size,
    render_drawings,
    sample_name,
    save_png,
    vae_factor,
)

# What may go wrong while pictures are drawn in the middle of a run: files, disks, memory (CUDA's is a RuntimeError).
FAILURES = (ValueError, OSError, RuntimeError, MemoryError)

_BATCH_SIZE, _CAPTIONS_OF_BATCH = 8, 4
_FRAMES, _FRAME_SIDE = 50, 128


class Samples:
    """Draws the same prompts from the same noise again and again, and what a file of prompts asks for by now.

    Prompts are encoded once, here, and the text encoder is dropped before training starts; only prompts that are new
    in the file are encoded later, on the CPU, so that the encoder never needs a place beside the UNet. Noise comes
    from generators of its own, so drawing never changes training.

    Args:
        model_dir: pipeline directory with text encoder and VAE.
        source: path of a file of prompts, or a list of prompts.
        defaults: Prompts, the choices of the flags; a .json's own win.
        scheduler: the model's noise schedule.
        info: dict with "text" and "latent_size", as `checkpoint_info` has it.
        open_index: function that returns the PairIndex trained on, whose captions may be asked for.
        negative_prompt: of samples without one; first_seed: of the first sample, the next has the next one.

    Raises:
        ValueError, OSError: prompts, text encoder or VAE cannot be read or used.
    """

    def __init__(
        self, model_dir, source, defaults, scheduler, info, open_index, device, negative_prompt="", first_seed=0
    ):
        self.file = None if isinstance(source, list | tuple) else PromptFile(source)
        self.model_dir, self.defaults, self.scheduler, self.open_index = model_dir, defaults, scheduler, open_index
        self.device, self.negative_prompt, self.first_seed = device, negative_prompt, first_seed
        self.text, self.latent_size = info["text"], info["latent_size"]
        self._embeddings, self._shown = {}, {}
        self.vae = load.load_vae(load.component_dir(model_dir, "vae"))
        self._use(self.file.prompts if self.file else prompts_of(source), device)

    def due(self, step, max_steps):
        """Whether to draw after optimizer step `step`; 0 is before training."""
        if step == 0:
            return self.prompts.generate_pretrain_samples
        return step % self.prompts.generate_samples_every_n_steps == 0 or step == max_steps

    def draw(self, unet, directory, metrics, step, autocast, last_samples=()):
        """Writes one PNG per prompt and cfg into `directory`, which appears when complete, and a labelled strip per
        prompt to TensorBoard.

        After step 0 a failure is a warning, and training goes on.

        Args:
            unet: the module itself, not its distributed wrapper; on any device.
            metrics: Metrics; None: no strips.
            autocast: function that opens the run's autocast context.
            last_samples: numbers of the last batch's pairs, whose captions are drawn where no prompts are given.
        """
        training = unet.training
        unet.eval()
        try:
            self._read_again()
            unet.to(self.device)
            self.vae.to(self.device)
            drawings = self._drawings(unet, step, [int(i) for i in last_samples])
            rows = self._render(unet, drawings, autocast)
            self._write(drawings, rows, directory, step)
            if metrics is not None:
                self._show(drawings, rows, metrics, step)
        except FAILURES as error:
            if step == 0:
                raise
            warn(f"no samples at step {step}: {error}")
        finally:
            self.vae.to("cpu")
            unet.train(training)

    def animate(self, directory, metrics, step):
        """Has the last pictures of each prompt that is drawn now written as one animation. They are read from their
        files, so that the animation of a resumed run goes on.

        Args:
            directory: of the run's samples, up to optimizer step `step`.
        """
        folders = {int(path.name.removeprefix("step-")): path for path in directory.glob("step-[0-9]*")}
        earlier = [(own, folders[own]) for own in sorted(folders) if own <= step]
        for tag, names in self._shown.items():
            complete = [
                (own, path) for own, path in earlier if all((path / name).exists() for name in names.values())
            ]
            if len(complete) > 1:
                metrics.animation(f"{tag} (progress)", _frames(dict(complete[-_FRAMES:]), names), step)

    def _read_again(self):
        prompts = self.file.changed() if self.file else None
        if prompts is None:
            return
        try:
            self._use(prompts, "cpu")
        except FAILURES as error:
            warn(f"{self.file.path}: {error}; the prompts read before stay in use")

    def _use(self, prompts, device):
        """Makes `prompts` those that are drawn, or raises and changes nothing."""
        prompts = completed(prompts, self.defaults, self.negative_prompt)
        sampler = sampler_for(self.scheduler, prompts.scheduler)
        texts = {"", *(s.negative_prompt for s in prompts.samples), *(s.prompt or "" for s in prompts.samples)}
        embeddings = {text: self._embeddings[text] for text in texts & self._embeddings.keys()}
        missing = sorted(texts - embeddings.keys())
        if missing:
            kind, settings, scale = (self.text[key] for key in ("kind", "settings", "scaling_factor"))
            dtype = load.pick_dtype(None, device)
            encoded = encode_like_cache(self.model_dir, kind, settings, missing, device, dtype)
            embeddings |= {text: emb * scale for text, emb in zip(missing, encoded, strict=True)}
        self.prompts, self.sampler, self._embeddings = prompts, sampler, embeddings

    def _drawings(self, unet, step, last_samples):
        """Resolves the samples of this step: captions, seeds and sizes."""
        drawings = []
        for slot, sample in enumerate(self.prompts.samples):
            name, prompt = sample.prompt, sample.prompt
            if prompt is not None:
                embedding = self._embeddings[prompt]
            else:
                index = self.open_index()
                # Before the first batch there is none to take a caption from.
                if sample.random_caption or not last_samples:
                    name, pair = "random caption", int(np.random.default_rng([step, slot, 1]).integers(len(index)))
                elif slot < len(last_samples):
                    name, pair = "caption of the last batch", last_samples[slot]
                else:
                    break
                prompt = caption_of(index.stem(pair))
                embedding = read_sidecar(index.text_path(pair))[0]["emb"].float() * self.text["scaling_factor"]
            seed = sample_seed(sample, self.prompts, slot, step, self.first_seed)
            negative = self._embeddings[sample.negative_prompt]
            size = latent_size_of(sample, unet, self.vae) or self.latent_size
            drawings.append(Drawing(name, prompt, sample.negative_prompt, seed, size, embedding, negative))
        return drawings

    def _render(self, unet, drawings, autocast):
        """Returns a list of images per drawing, one per cfg."""
        cfgs, rows = self.prompts.cfgs, [[] for _ in drawings]
        masked, batch_size = self.text["kind"] == "txt_t5cache", self.prompts.batch_size or _BATCH_SIZE
        # Not through a compiled UNet: each number and size of pictures would be compiled on its own.
        with tqdm(total=len(drawings) * len(cfgs), desc="samples", unit="img", leave=False,
                  disable=not self.prompts.show_progress_bars) as progress, \
                torch.compiler.set_stance("force_eager"), autocast():  # fmt: skip
            for i, _, image in render_drawings(unet, self.vae, self.sampler, drawings, cfgs,
                                               self.prompts.num_inference_steps, masked, batch_size):  # fmt: skip
                rows[i].append(image)
                progress.update()
        return rows

    def _write(self, drawings, rows, directory, step):
        with staged_directory(directory, overwrite=True) as stage:  # a resumed run draws a step again
            for slot, (drawing, images) in enumerate(zip(drawings, rows, strict=True)):
                for cfg, image in zip(self.prompts.cfgs, images, strict=True):
                    save_png(
                        image, stage / sample_name(slot, drawing.name, cfg), prompt=drawing.prompt,
                        negative_prompt=drawing.negative_prompt, seed=drawing.seed, cfg=f"{cfg:g}", step=step,
                        num_inference_steps=self.prompts.num_inference_steps,
                        scheduler=self.prompts.scheduler or default_sampler(self.scheduler),
                    )  # fmt: skip

    def _show(self, drawings, rows, metrics, step):
        cfgs, self._shown = self.prompts.cfgs, {}
        for slot, (drawing, images) in enumerate(zip(drawings, rows, strict=True)):
            tag = f"12_Generated_Samples/{slot:02d} {drawing.name[:60]}"
            words = "" if drawing.name == drawing.prompt else f": {drawing.prompt}"
            metrics.image(tag, grid(images, [f"cfg {cfg:g}{words}" for cfg in cfgs], len(cfgs)), step)
            self._shown[tag] = {cfg: sample_name(slot, drawing.name, cfg) for cfg in cfgs}


def _frames(folders, names):
    """Yields a small strip per folder, those of the size of the last one: the file of prompts may have changed it.

    Args:
        folders: {step: directory}; names: {cfg: file name}.
    """
    frames = []
    for step, folder in folders.items():
        images = []
        for name in names.values():
            with Image.open(folder / name) as image:
                image.thumbnail((_FRAME_SIDE, _FRAME_SIDE))
                images.append(image.copy())
        frames.append(grid(images, [f"cfg {cfg:g}, step {step}" for cfg in names], len(names), min_side=1))
    yield from (frame for frame in frames if frame.size == frames[-1].size)


def latent_size_of(sample, unet, vae):
    """(h, w) of the latents that a sample asks for, or None."""
    factor = vae_factor(vae)
    height, width = native_latent_size(unet) if sample.size is None else (0, 0)
    size = sample_size(sample, (width * factor, height * factor))
    return size and (size[1] // factor, size[0] // factor)


def default_latent_size(args, info, unet, vae):
    """(h, w) of the latents of samples that ask for no size: --height and --width, else what was trained, else the
    UNet's own."""
    factor, own = vae_factor(vae), info["latent_size"] or native_latent_size(unet)
    for flag, side in (("--height", args.height), ("--width", args.width)):
        if side and side % factor:
            raise ValueError(f"{flag} {side}: must be a multiple of {factor}")
    return tuple(side // factor if side else mine for side, mine in zip((args.height, args.width), own, strict=True))


def completed(prompts, defaults, negative_prompt=""):
    """Prompts with the choices of `defaults` (Prompts) where they make none; no samples at all become captions."""
    choices = (own if own is not None else default for own, default in zip(prompts, defaults, strict=True))
    samples = prompts.samples or (Sample(),) * _CAPTIONS_OF_BATCH
    samples = (sample._replace(negative_prompt=sample.negative_prompt or negative_prompt) for sample in samples)
    return Prompts(*choices)._replace(samples=tuple(samples))
