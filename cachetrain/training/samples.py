"""Pictures of what the model draws, while it trains."""

from collections import deque

import numpy as np
import torch
from tqdm import tqdm

from cachetrain.modeling import load
from cachetrain.modeling.pictures import (
    Drawing,
    grid,
    native_latent_size,
    render_drawings,
    sample_name,
    save_png,
    vae_factor,
)
from cachetrain.modeling.schedulers import default_sampler, sampler_for
from cachetrain.modeling.text import encode_like_cache
from cachetrain.sidecar import read_sidecar
from cachetrain.training.prompts import (
    PromptFile,
    Sample,
    caption_of,
    prompts_of,
    sample_seed,
    sample_size,
    warn,
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
        cfgs, num_inference_steps, every_n_steps: of the flags; a .json's own win.
        scheduler: the model's noise schedule.
        index: PairIndex, which says how captions were encoded and how large latents are.
        text_scale: multiplies all embeddings.

    Raises:
        ValueError, OSError: prompts, text encoder or VAE cannot be read or used.
    """

    def __init__(
        self, model_dir, source, cfgs, scheduler, index, text_scale, num_inference_steps, device, every_n_steps=250
    ):
        self.file = None if isinstance(source, list | tuple) else PromptFile(source)
        self.model_dir, self.scheduler, self.index, self.text_scale = model_dir, scheduler, index, text_scale
        self.cfgs, self.num_inference_steps, self.every_n_steps = cfgs, num_inference_steps, every_n_steps
        self.device, self._embeddings, self._frames = device, {}, {}
        commonest = np.bincount(index.shape_ids).argmax()
        self.latent_size = tuple(index.shapes[commonest][1:])
        self.vae = load.load_vae(load.component_dir(model_dir, "vae"))
        self._use(self.file.prompts if self.file else prompts_of(source), device)

    def due(self, step, max_steps):
        """Whether to draw after optimizer step `step`; 0 is before training."""
        if step == 0:
            return self.prompts.generate_pretrain_samples
        every = self.prompts.generate_samples_every_n_steps or self.every_n_steps
        return step % every == 0 or step == max_steps

    def draw(self, unet, directory, metrics, step, autocast, last_samples=()):
        """Writes one PNG per prompt and cfg into `directory`, and a labelled strip per prompt to TensorBoard.

        After step 0 a failure is a warning, and training goes on.

        Args:
            unet: the module itself, not its distributed wrapper; on any device.
            metrics: Metrics; None: nothing is written.
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
            if metrics is not None:
                self._write(drawings, rows, directory, metrics, step)
        except FAILURES as error:
            if step == 0:
                raise
            warn(f"no samples at step {step}: {error}")
        finally:
            self.vae.to("cpu")
            unet.train(training)

    def animate(self, metrics, step):
        """Writes, per prompt, the pictures of the last drawings as one animation."""
        for tag, frames in self._frames.items():
            if len(frames) > 1:
                metrics.animation(f"{tag} (progress)", list(frames), step)

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
        sampler = sampler_for(self.scheduler, prompts.scheduler)
        texts = {"", *(s.negative_prompt for s in prompts.samples), *(s.prompt or "" for s in prompts.samples)}
        embeddings = {text: self._embeddings[text] for text in texts & self._embeddings.keys()}
        missing = sorted(texts - embeddings.keys())
        if missing:
            kind, settings, _ = text_info(self.index, self.text_scale).values()
            dtype = load.pick_dtype(None, device)
            encoded = encode_like_cache(self.model_dir, kind, settings, missing, device, dtype)
            embeddings |= {text: emb * self.text_scale for text, emb in zip(missing, encoded, strict=True)}
        self.prompts, self.sampler, self._embeddings = prompts, sampler, embeddings

    def _drawings(self, unet, step, last_samples):
        """Resolves the samples of this step: captions, seeds and sizes."""
        drawings, samples = [], self.prompts.samples
        if not samples:
            # Before the first batch there is none to take them from.
            samples = [Sample(random_caption=not last_samples)] * min(_CAPTIONS_OF_BATCH, len(last_samples) or 4)
        for slot, sample in enumerate(samples):
            name, prompt = sample.prompt, sample.prompt
            if sample.random_caption:
                name, pair = "random caption", int(np.random.default_rng([step, slot, 1]).integers(len(self.index)))
            elif prompt is None:
                name, pair = "caption of the last batch", last_samples[slot]
            if prompt is None:
                prompt = caption_of(self.index.stem(pair))
                embedding = read_sidecar(self.index.text_path(pair))[0]["emb"].float() * self.text_scale
            else:
                embedding = self._embeddings[prompt]
            seed = sample_seed(sample, self.prompts, slot, step)
            negative = self._embeddings[sample.negative_prompt]
            size = self._latent_size(sample, unet)
            drawings.append(Drawing(name, prompt, sample.negative_prompt, seed, size, embedding, negative))
        return drawings

    def _latent_size(self, sample, unet):
        if sample.size is None and sample.aspect_ratio is None:
            return self.latent_size
        factor = vae_factor(self.vae)
        height, width = native_latent_size(unet) if sample.size is None else (0, 0)
        width, height = sample_size(sample, (width * factor, height * factor))
        return height // factor, width // factor

    def _render(self, unet, drawings, autocast):
        """Returns a list of images per drawing, one per cfg."""
        cfgs, rows = self.prompts.cfgs or self.cfgs, [[] for _ in drawings]
        batch_size = self.prompts.batch_size or _BATCH_SIZE
        # Not through a compiled UNet: each number and size of pictures would be compiled on its own.
        with tqdm(total=len(drawings) * len(cfgs), desc="samples", unit="img", leave=False,
                  disable=not self.prompts.show_progress_bars) as progress, \
                torch.compiler.set_stance("force_eager"), autocast():  # fmt: skip
            for i, _, image in render_drawings(unet, self.vae, self.sampler, drawings, cfgs, self._num_steps(),
                                               self.index.masked, batch_size):  # fmt: skip
                rows[i].append(image)
                progress.update()
        return rows

    def _num_steps(self):
        return self.prompts.num_inference_steps or self.num_inference_steps

    def _write(self, drawings, rows, directory, metrics, step):
        cfgs, frames = self.prompts.cfgs or self.cfgs, {}
        for slot, (drawing, images) in enumerate(zip(drawings, rows, strict=True)):
            for cfg, image in zip(cfgs, images, strict=True):
                save_png(
                    image, directory / sample_name(slot, drawing.name, cfg), prompt=drawing.prompt,
                    negative_prompt=drawing.negative_prompt, seed=drawing.seed, cfg=f"{cfg:g}", step=step,
                    num_inference_steps=self._num_steps(),
                    scheduler=self.prompts.scheduler or default_sampler(self.scheduler),
                )  # fmt: skip
            tag = f"12_Generated_Samples/{slot:02d} {drawing.name[:60]}"
            words = "" if drawing.name == drawing.prompt else f": {drawing.prompt}"
            metrics.image(tag, grid(images, [f"cfg {cfg:g}{words}" for cfg in cfgs], len(cfgs)), step)
            frame = _frame(images, cfgs, step)
            frames[tag] = self._frames.get(tag) or deque(maxlen=_FRAMES)
            if frames[tag] and frames[tag][-1].size != frame.size:  # an animation has one size
                frames[tag].clear()
            frames[tag].append(frame)
        self._frames = frames


def _frame(images, cfgs, step):
    """A small strip for the animation: 50 of them per prompt stay in memory."""
    small = [image.copy() for image in images]
    for image in small:
        image.thumbnail((_FRAME_SIDE, _FRAME_SIDE))
    return grid(small, [f"cfg {cfg:g}, step {step}" for cfg in cfgs], len(cfgs), min_side=1)


def text_info(index, text_scale):
    """How captions were encoded, as a checkpoint must remember it, so that prompts are encoded alike later."""
    kind = "txt_t5cache" if index.masked else "txt_clipl"
    return {"kind": kind, "settings": index.text_settings, "scaling_factor": text_scale}
