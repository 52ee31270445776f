"""Generated images as files: rendering prompts, PNGs with their settings inside, labelled strips and grids."""

import re

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from cachetrain.modeling.t5_pipeline import decode_latents, denoise, pad_embeddings


@torch.no_grad()
def render(
    unet, vae, scheduler, embeddings, null, cfg, seeds, latent_size, num_inference_steps, masked, batch_size=16
):
    """Draws one image per embedding.

    Args:
        embeddings: list of N tensors [T_i, D]; null: [T, D], the negative prompt.
        seeds: N ints; the same seed gives the same noise on every device.
        latent_size: (h, w).
        masked: hide padding from cross-attention (T5), or not (CLIP).

    Returns:
        list of N PIL images.
    """
    device, images = next(unet.parameters()).device, []
    for start in range(0, len(embeddings), batch_size):
        part = embeddings[start : start + batch_size]
        hidden, mask = pad_embeddings([null] * len(part) + list(part))
        if not masked:
            hidden, mask = torch.stack([null] * len(part) + list(part)), None
        uncond, cond = hidden.to(device).chunk(2)
        latents = torch.stack([_noise(unet, seed, latent_size) for seed in seeds[start : start + batch_size]])
        latents = denoise(
            unet, scheduler, latents.to(device), cond, uncond, cfg, num_inference_steps,
            None if mask is None else mask.to(device), torch.Generator().manual_seed(seeds[start]),
        )  # fmt: skip
        pixels = decode_latents(vae, latents.to(vae.device)).mul(127.5).add(127.5).round().to(torch.uint8)
        images += [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in pixels]
    return images


def _noise(unet, seed, latent_size):
    return torch.randn(unet.config.in_channels, *latent_size, generator=torch.Generator().manual_seed(seed))


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
    font = ImageFont.load_default(size=11)
    lines = [_wrap(label, font, width - 8) for label in labels]
    band = 6 + 14 * max(map(len, lines))
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
