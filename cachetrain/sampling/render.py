"""Renders prompts, writes PNGs with the settings in their text chunks, and lays out labelled grids."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from cachetrain import cli
from cachetrain.modeling.conditioning import Conditioning, moved, predict, rows
from cachetrain.modeling.normalisation import LatentScaling
from cachetrain.modeling.t5_pipeline import decode_latents, decode_raw, denoise


class Drawing(NamedTuple):
    """One picture to draw; all guidance scales start from the same noise.

    Attributes:
        name: used in file names and tags; differs from `prompt` for captions of the data.
        seed: seed of the noise.
        latent_size: (h, w).
        condition, negative_condition: prompt and negative prompt, encoded by Conditioning.of_caption.
    """

    name: str
    prompt: str
    negative_prompt: str
    seed: int
    latent_size: tuple[int, int]
    condition: dict[str, torch.Tensor]
    negative_condition: dict[str, torch.Tensor]


class Renderer(NamedTuple):
    """The models and settings used for drawing.

    Attributes:
        sampler: a diffusers scheduler.
        scaling: of the latents that the UNet was trained on; None: that of the VAE.
    """

    unet: torch.nn.Module
    vae: torch.nn.Module
    sampler: object
    conditioning: Conditioning
    num_inference_steps: int
    batch_size: int
    scaling: LatentScaling | None = None

    def draw(self, drawings: Sequence[Drawing], cfgs: Sequence[float]) -> Iterator[tuple[int, float, Image.Image]]:
        """Draws pictures of any sizes; a batch holds up to `batch_size` pictures of the same size.

        Args:
            cfgs: guidance scales.

        Yields:
            (index of the drawing, cfg, image).
        """
        by_size = {}
        for i, drawing in enumerate(drawings):
            by_size.setdefault(drawing.latent_size, []).append(i)
        for indices in by_size.values():
            for start in range(0, len(indices), self.batch_size):
                batch = indices[start : start + self.batch_size]
                for cfg in cfgs:
                    images = self._draw_batch([drawings[i] for i in batch], cfg)
                    yield from ((i, cfg, image) for i, image in zip(batch, images, strict=True))

    @torch.no_grad()
    def _draw_batch(self, drawings, cfg):
        """Draws pictures of the same size.

        A seed gives the same noise on every device and in every batch; this includes the noise of ancestral samplers.
        """
        device, dtype = next(self.unet.parameters()).device, self.unet.dtype
        conditions = [drawing.negative_condition for drawing in drawings] + [
            drawing.condition for drawing in drawings
        ]
        text = moved(self.conditioning.collate(conditions), device, dtype)
        if cfg == 1:
            text = rows(text, slice(len(drawings), None))
        generators = [torch.Generator().manual_seed(drawing.seed) for drawing in drawings]
        shape = (self.unet.config.in_channels, *drawings[0].latent_size)
        latents = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
        latents = denoise(
            lambda noisy, timestep: predict(self.unet, noisy.to(dtype), timestep, text),
            self.sampler,
            latents,
            cfg,
            self.num_inference_steps,
            generators,
        )
        # One at a time, because decoding takes much memory.
        return [decode_image(self.vae, latent, self.scaling) for latent in latents.to(self.vae.device).split(1)]


def decode_image(vae: torch.nn.Module, latents: torch.Tensor, scaling: LatentScaling | None = None) -> Image.Image:
    """Decodes latents [1, C, h, w], as the UNet sees them, to a picture; `scaling`: as in `Renderer`."""
    # Without the caller's autocast, because the SDXL VAE overflows in float16.
    with torch.autocast(latents.device.type, enabled=False):
        images = decode_raw(vae, scaling.inverse(latents)) if scaling else decode_latents(vae, latents)
        pixels = images[0].mul(127.5).add(127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def native_latent_size(unet: torch.nn.Module) -> tuple[int, int] | None:
    """Returns the latent size (h, w) in the UNet's config; None if the config has none."""
    size = unet.config.sample_size
    sides = [size, size] if type(size) is int else size
    if size is None:
        return None
    if not (isinstance(sides, list | tuple) and len(sides) == 2 and all(_is_side(side) for side in sides)):
        raise ValueError(f"the UNet's config.json has sample_size {size!r:.40}; expected a number or [height, width]")
    return tuple(sides)


def _is_side(value):
    return type(value) is int and 0 < value <= cli.pixels.most


def sample_name(index: int, prompt: str, cfg: float) -> str:
    """Returns the file name of a sample, which is the same in every run, so that runs can be compared."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].rstrip("-")
    return f"{index:02d}-{slug or 'empty'}_cfg{cfg:g}.png"


def save_png(image: Image.Image, path: Path, **settings) -> None:
    """Writes a PNG with `settings` as text chunks: prompt, negative_prompt, seed, cfg, step, ..."""
    info = PngInfo()
    for key, value in settings.items():
        info.add_itxt(key, str(value))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, pnginfo=info)


def grid(images: Sequence[Image.Image], labels: Sequence[str], columns: int, min_side: int = 128) -> Image.Image:
    """Lays out images in a grid, row by row, with a label above each image.

    Args:
        images: a cell is as wide and as high as the largest image; if a side of the cell is smaller than `min_side`
            pixels, all images are enlarged by the same whole factor, without smoothing.
        labels: one for each image.
    """
    cell = tuple(max(sides) for sides in zip(*(image.size for image in images), strict=True))
    scale = max(1, -(-min_side // min(cell)))
    width, height = (side * scale for side in cell)
    size = max(11, width // 16)  # font size; readable even if the grid is shown scaled down
    font = ImageFont.load_default(size)
    lines = [_wrap(label, font, width - 8) for label in labels]
    band = 6 + (size + 3) * max(map(len, lines))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + 6) + 6, rows * (height + band + 6) + 6), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(zip(images, lines, strict=True)):
        x, y = 6 + i % columns * (width + 6), 6 + i // columns * (height + band + 6)
        draw.multiline_text((x + 2, y), "\n".join(text), fill="black", font=font, spacing=2)
        sheet.paste(ImageOps.scale(image, scale, Image.Resampling.NEAREST), (x, y + band))
    return sheet


def _wrap(text, font, width):
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
        while font.getlength(lines[-1]) > width and len(lines[-1]) > 1:  # a path, or a language without spaces
            line = lines.pop()
            cut = next((n for n in range(len(line) - 1, 1, -1) if font.getlength(line[:n]) <= width), 1)
            lines += [line[:cut], line[cut:]]
    return lines
