"""Pictures of what the model draws, while it trains."""

from contextlib import nullcontext

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from cachetrain.atomic import staged_directory
from cachetrain.data.sidecar import read_sidecar
from cachetrain.diffusion.noise_schedulers import default_sampler, sampler_for
from cachetrain.log import warn
from cachetrain.modeling import load
from cachetrain.modeling.conditioning import Conditioning
from cachetrain.modeling.text_encoders import encode_like_cache
from cachetrain.modeling.vae import vae_reduction
from cachetrain.sampling.prompts import PromptFile, Prompts, Sample, caption_of, prompts_of, sample_seed, sample_size
from cachetrain.sampling.render import Drawing, Renderer, grid, native_latent_size, sample_name, save_png

# What may go wrong while pictures are drawn in the middle of a run: files, disks, memory (CUDA's is a RuntimeError).
FAILURES = (ValueError, OSError, RuntimeError, MemoryError)

_BATCH_SIZE, _CAPTIONS_OF_BATCH = 8, 4
_FRAMES, _FRAME_SIDE = 50, 128


class SampleImages:
    """Draws the same prompts from the same noise again and again, and what a file of prompts asks for by now.

    Prompts are encoded once, here, and the text encoder is dropped before training starts; only prompts that are new
    in the file are encoded later, on the CPU, so that the encoder never needs a place beside the UNet. Noise comes
    from generators of its own, so drawing never changes training.

    Args:
        model_dir: pipeline directory with text encoder and VAE.
        source: path of a file of prompts, or a list of prompts.
        defaults: Prompts, the choices of the flags; those of a .json override them.
        noise_scheduler: of the model.
        info: dict with "text" and "latent_size", as `checkpoint_info` has it.
        device: to draw on; dtype: of the text encoder, by default bf16 on CUDA and fp32 elsewhere.
        open_index: function that returns the PairIndex trained on, for captions of the data; None: there is none.
        negative_prompt: of samples without one.
        first_seed: seed of the first sample; each next sample has the next seed.

    Raises:
        ValueError, OSError: prompts, text encoder or VAE cannot be read or used.
    """

    def __init__(
        self,
        model_dir,
        source,
        defaults,
        noise_scheduler,
        info,
        *,
        device,
        dtype=None,
        open_index=None,
        negative_prompt="",
        first_seed=0,
    ):
        self.file = None if isinstance(source, list | tuple) else PromptFile(source)
        self.model_dir = model_dir
        self.defaults = defaults
        self.noise_scheduler = noise_scheduler
        self.text = info["text"]
        self.latent_size = info["latent_size"]
        self.device = device
        self.open_index = open_index
        self.negative_prompt = negative_prompt
        self.first_seed = first_seed
        self.conditioning = Conditioning(self.text["kind"], self.text["scaling_factor"])
        self._conditions = {}
        self._shown = {}
        self.vae = load.load_vae(load.component_dir(model_dir, "vae"))
        self._use(self.file.prompts if self.file else prompts_of(source), device, dtype)

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
            last_samples: positions in the index of the last batch's pairs, whose captions are drawn where no prompts
                are given.
        """
        training = unet.training
        unet.eval()
        try:
            self._read_again()
            unet.to(self.device)
            self.vae.to(self.device)
            drawings = self.drawings(unet, step, [int(i) for i in last_samples])
            rows = [[] for _ in drawings]
            for i, _, image in self.images(unet, drawings, autocast, self.prompts.show_progress_bars):
                rows[i].append(image)
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
        earlier = [(drawn_at, folders[drawn_at]) for drawn_at in sorted(folders) if drawn_at <= step]
        for tag, names in self._shown.items():
            complete = [
                (drawn_at, path)
                for drawn_at, path in earlier
                if all((path / name).exists() for name in names.values())
            ]
            if len(complete) > 1:
                metrics.animation(f"{tag} (progress)", _frames(dict(complete[-_FRAMES:]), names), step)

    def _read_again(self):
        prompts = self.file.changed() if self.file else None
        if prompts is None:
            return
        try:
            self._use(prompts, "cpu", None)
        except FAILURES as error:
            warn(f"{self.file.path}: {error}; the prompts read before stay in use")

    def _use(self, prompts, device, dtype):
        """Makes `prompts` those that are drawn, or raises and changes nothing."""
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
        self.prompts, self.sampler, self._conditions = prompts, sampler, conditions

    def drawings(self, unet, step, last_samples=()):
        """Resolves captions, seeds and sizes.

        Args:
            step: decides random captions, and seeds of -1.
            last_samples: as for `draw`.

        Returns:
            list of Drawing.

        Raises:
            ValueError: a caption of the data is asked for where there is no data.
        """
        drawings = []
        for slot, sample in enumerate(self.prompts.samples):
            if sample.prompt is None:
                captioned = self._caption_of_data(sample, slot, step, last_samples)
                if captioned is None:
                    break
                name, prompt, condition = captioned
            else:
                name = prompt = sample.prompt
                condition = self._conditions[prompt]
            drawings.append(
                Drawing(
                    name,
                    prompt,
                    sample.negative_prompt,
                    seed=sample_seed(sample, self.prompts, slot, step, self.first_seed),
                    latent_size=latent_size_of(sample, unet, self.vae) or self.latent_size,
                    condition=condition,
                    negative_condition=self._conditions[sample.negative_prompt],
                )
            )
        return drawings

    def _caption_of_data(self, sample, slot, step, last_samples):
        """(name, caption, its condition) of a pair of the data; None: the last batch had too few pairs."""
        if self.open_index is None:
            raise ValueError("random_caption takes captions of the training data; there is none here")
        index = self.open_index()
        # Before the first batch there is none to take a caption from.
        if sample.random_caption or not last_samples:
            name, pair = "random caption", int(np.random.default_rng([step, slot, 1]).integers(len(index)))
        elif slot < len(last_samples):
            name, pair = "caption of the last batch", last_samples[slot]
        else:
            return None
        tensors, _ = read_sidecar(index.text_path(pair))
        return name, caption_of(index.stem(pair)), self.conditioning.of_caption(tensors)

    def images(self, unet, drawings, autocast=nullcontext, progress_bar=False):
        """Yields (position in `drawings`, cfg, PIL image); the VAE draws where it is."""
        cfgs, batch_size = self.prompts.cfgs, self.prompts.batch_size or _BATCH_SIZE
        renderer = Renderer(
            unet, self.vae, self.sampler, self.conditioning, self.prompts.num_inference_steps, batch_size
        )
        # Not through a compiled UNet: each number and size of pictures would be compiled on its own.
        with torch.compiler.set_stance("force_eager"), autocast():
            yield from tqdm(
                renderer.draw(drawings, cfgs),
                desc="samples",
                total=len(drawings) * len(cfgs),
                unit="img",
                leave=False,
                disable=None if progress_bar else True,
            )

    def save(self, image, directory, slot, drawing, cfg, **more):
        """Writes one PNG with its settings inside. `more`: further settings to keep with it."""
        save_png(
            image,
            directory / sample_name(slot, drawing.name, cfg),
            prompt=drawing.prompt,
            negative_prompt=drawing.negative_prompt,
            seed=drawing.seed,
            cfg=f"{cfg:g}",
            num_inference_steps=self.prompts.num_inference_steps,
            scheduler=self.prompts.scheduler or default_sampler(self.noise_scheduler),
            **more,
        )

    def _write(self, drawings, rows, directory, step):
        with staged_directory(directory, overwrite=True) as stage:  # a resumed run draws a step again
            for slot, (drawing, images) in enumerate(zip(drawings, rows, strict=True)):
                for cfg, image in zip(self.prompts.cfgs, images, strict=True):
                    self.save(image, stage, slot, drawing, cfg, step=step)

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
    factor = vae_reduction(vae)
    height, width = native_latent_size(unet) if sample.size is None else (0, 0)
    size = sample_size(sample, (width * factor, height * factor))
    return size and (size[1] // factor, size[0] // factor)


def default_latent_size(args, info, unet, vae):
    """(h, w) of the latents of samples that ask for no size: --height and --width, else what was trained, else the
    UNet's own."""
    factor, own = vae_reduction(vae), info["latent_size"] or native_latent_size(unet)
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
