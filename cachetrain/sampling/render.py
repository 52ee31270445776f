"""Generated images as files: rendering prompts, PNGs with their settings inside, labelled strips and grids."""

import re
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from cachetrain.modeling.t5_pipeline import decode_latents, denoise, pad_embeddings


class Drawing(NamedTuple):
    """One picture to draw, at each guidance scale from the same noise: latent_size is (h, w); embeddings [T, D]."""

    name: str
    prompt: str
    negative_prompt: str
    seed: int
    latent_size: tuple[int, int]
    embedding: torch.Tensor
    negative_embedding: torch.Tensor


def render_drawings(unet, vae, scheduler, drawings, cfgs, num_inference_steps, masked, batch_size):
    """Draws pictures of any sizes, `batch_size` of one size at a time; yields (index of the drawing, cfg, image)."""
    by_size = {}
    for i, drawing in enumerate(drawings):
        by_size.setdefault(drawing.latent_size, []).append(i)
    for latent_size, members in by_size.items():
        for start in range(0, len(members), batch_size):
            part = members[start : start + batch_size]
            embeddings = [drawings[i].embedding for i in part]
            negatives = [drawings[i].negative_embedding for i in part]
            seeds = [drawings[i].seed for i in part]
            for cfg in cfgs:
                images = render(unet, vae, scheduler, embeddings, negatives, cfg, seeds, latent_size,
                                num_inference_steps, masked, batch_size)  # fmt: skip
                yield from ((i, cfg, image) for i, image in zip(part, images, strict=True))


@torch.no_grad()
def render(
    unet, vae, scheduler, embeddings, null, cfg, seeds, latent_size, num_inference_steps, masked, batch_size=16
):
    """Draws one image per embedding.

    Args:
        embeddings: list of N tensors [T_i, D].
        null: [T, D], the negative prompt of all, or a list of N.
        seeds: N ints; the same seed gives the same noise on every device and in every batch, the noise of
            ancestral samplers included.
        latent_size: (h, w).
        masked: hide padding from cross-attention (T5), or not (CLIP).

    Returns:
        list of N PIL images.
    """
    device, images = next(unet.parameters()).device, []
    negatives = [null] * len(embeddings) if isinstance(null, torch.Tensor) else null
    for start in range(0, len(embeddings), batch_size):
        part = slice(start, start + batch_size)
        texts = [*negatives[part], *embeddings[part]]
        hidden, mask = pad_embeddings(texts) if masked else (torch.stack(texts), None)
        uncond, cond = hidden.to(device).chunk(2)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        shape = (unet.config.in_channels, *latent_size)
        latents = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        latents = denoise(
            unet, scheduler, latents.to(device), cond, uncond, cfg, num_inference_steps,
            None if mask is None else mask.to(device), generators,
        )  # fmt: skip
        images += [_decode(vae, one) for one in latents.to(vae.device).split(1)]  # a VAE needs much memory per image
    return images


def _decode(vae, latents):
    # Not under the caller's autocast: the SDXL VAE overflows in float16.
    with torch.autocast(latents.device.type, enabled=False):
        pixels = decode_latents(vae, latents)[0].mul(127.5).add(127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def native_latent_size(unet):
    """(h, w) of the latents that the UNet was configured for."""
    size = unet.config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)


def vae_factor(vae):
    """Pixels to a side of one latent pixel."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def sample_name(index, prompt, cfg):
    """File name of a sample: the same in every run, so that runs can be compared."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].rstrip("-")
    return f"{index:02d}-{slug or 'empty'}_cfg{cfg:g}.png"


def save_png(image, path, **settings):
    """Writes a PNG with `settings` as text chunks: prompt, negative_prompt, seed, cfg, step, ..."""
    info = PngInfo()
    for key, value in settings.items():
        info.add_itxt(key, str(value))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, pnginfo=info)


def grid(images, labels, columns, min_side=128):
    """One picture of all images, row by row, each under its label.

    Args:
        images: PIL images. Each cell is as wide and high as the largest; if that is less than `min_side`, all are
            enlarged by one factor, without smoothing.
        labels: str for each.
    """
    cell = tuple(max(sides) for sides in zip(*(image.size for image in images), strict=True))
    scale = max(1, -(-min_side // min(cell)))
    width, height = (side * scale for side in cell)
    size = max(11, width // 16)  # to be read where the sheet is shown at a fraction of its size
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
        while font.getlength(lines[-1]) > width and len(lines[-1]) > 1:  # a path, or a script without spaces
            line = lines.pop()
            cut = next((n for n in range(len(line) - 1, 1, -1) if font.getlength(line[:n]) <= width), 1)
            lines += [line[:cut], line[cut:]]
    return lines
