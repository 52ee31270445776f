"""Decodes latents to pictures and compares them with their sources, for the tools that show caches and VAEs.

Imports no torch until a `Decoder` is made, so that `--help` answers at once.
"""

import hashlib
import os
from argparse import Namespace
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from cachetrain.caching import images
from cachetrain.caching.inspect import rows
from cachetrain.caching.messages import failure_line, print_line
from cachetrain.data import sidecar
from cachetrain.data.walk import MAX_IMAGE, walk_folders
from cachetrain.log import counted
from cachetrain.modeling import load
from cachetrain.modeling.files import component_files
from cachetrain.modeling.vae import latent_channels
from cachetrain.reading import read_bytes

if TYPE_CHECKING:
    import torch

_IMAGE_CACHE_SUFFIXES = tuple(suffix for kind, suffix in sidecar.SUFFIXES.items() if kind.startswith("img_"))

# The differences that a good VAE leaves are too dark to see.
_DIFFERENCE_GAIN = 4
_LEAST_SIDE = 64  # of an image that a VAE is shown


def image_cache_suffixes(paths: Iterable[str], suffix: str | None) -> list[str]:
    """Returns the suffixes of image sidecars to look for: the one asked for, else all .img_* in and below folders,
    and in shard sets.

    Args:
        paths: folders and sets; other paths are passed over.
    """
    if suffix:
        return [suffix]
    of_shards = {rows.shard_suffix(shard) for path in paths for shard in rows.shards_under(path)}
    folders, visited = filter(os.path.isdir, paths), set()
    names = (
        name for root in folders for folder in walk_folders(root, visited, _is_image_cache) for name in folder.names
    )
    found = {os.path.splitext(name)[1] for name in names} | set(filter(_is_image_cache, of_shards))
    return sorted(found) or list(_IMAGE_CACHE_SUFFIXES)


def _is_image_cache(name):
    return os.path.splitext(name)[1].startswith(".img_")


class Latent(NamedTuple):
    """One latent [C, h, w] (scaling_factor not applied), and the header of its sidecar, if it has one."""

    path: str
    tensor: "torch.Tensor"
    header: sidecar.Header | None = None


class Comparison(NamedTuple):
    """A source and what its latent decodes to, both uint8 [height, width, 3]; psnr in dB."""

    name: str
    source: np.ndarray
    decoded: np.ndarray
    psnr: float


class Failures:
    """Called as fail(path, reason): names a file on stderr and counts it; the run goes on."""

    def __init__(self):
        self.count = 0

    def __call__(self, path: str, reason: str | Exception) -> None:
        self.count += 1
        print_line(failure_line(path, reason))


class Decoder:
    """A VAE that turns sidecars back into pictures; files that it cannot decode are passed to `fail`."""

    def __init__(self, args: Namespace, fail: Failures):
        """Loads the VAE that the arguments of `arguments.add_vae_arguments` name."""
        from cachetrain.caching.encoders import check_vae

        model_dir = load.resolve_model(args.model, args.revision, () if args.vae else ("vae",))
        vae_dir = model_dir if args.vae else load.component_dir(model_dir, "vae")
        device = load.pick_device(args.device)
        self.dtype = load.pick_dtype(args.dtype, device)
        self.vae = load.load_vae(vae_dir, self.dtype).to(device)
        check_vae(self.vae, [])
        self.model = args.model
        self.fingerprint = load.fingerprint(component_files(vae_dir, "vae"))
        self.batch_size = args.batch_size
        self.fail = fail
        self.warned = False

    def read(self, paths: Iterable[str], name: str = "latent") -> Iterator[Latent]:
        """Yields the tensor `name` of each sidecar as a Latent; warns once if another VAE made one."""
        for path in paths:
            try:
                tensors, header = rows.read_sidecar(path)
                self._check(tensors, name)
            except (OSError, ValueError) as error:
                self.fail(path, error)
                continue
            self._warn_of_another_vae(path, header)
            yield Latent(path, tensors[name], header)

    def _check(self, tensors, name):
        if name not in tensors:
            hint = "; run the image cache script with --flip" if name == "latent_flip" and "latent" in tensors else ""
            raise ValueError(f"has no {name}, only {', '.join(tensors) or 'nothing'}{hint}")
        shape, channels = tuple(tensors[name].shape), latent_channels(self.vae)
        if len(shape) != 3 or shape[0] != channels or 0 in shape or not tensors[name].is_floating_point():
            raise ValueError(
                f"its {name} is {list(shape)}, {tensors[name].dtype}, "
                f"the VAE of {self.model} wants [{channels}, h, w]; pass the VAE that made it as --model"
            )

    def _warn_of_another_vae(self, path, header):
        if header.foreign or self.warned:
            return
        metadata = header.metadata
        # With --custom the fingerprint also covers the repository's code, which is not read here.
        custom = sidecar.settings_of(path, header).get("custom")
        encoder = metadata.get("encoder", "")
        if encoder != self.fingerprint and not custom:
            self.warned = True
            print_line(
                f"warning: {path} was made by another VAE ({metadata.get('model')}, fingerprint {encoder[:12]}) than "
                f"that of {self.model} ({self.fingerprint[:12]}); its pictures may be wrong"
            )

    def encode(self, pixels: list[np.ndarray]) -> "torch.Tensor":
        """list of uint8 [H, W, 3] of one size -> latent means [B, C, h, w]."""
        import torch

        from cachetrain.caching.encoders import encode_images, to_model_range

        batch = torch.from_numpy(np.stack(pixels)).to(self.vae.device)
        return encode_images(self.vae, to_model_range(batch, self.dtype))

    def pictures(self, latents: Iterable[Latent]) -> Iterator[tuple[Latent, np.ndarray]]:
        """Yields (Latent, uint8 [height, width, 3]), decoded in batches of one size and so not quite in order."""
        waiting = {}  # by shape, the Latents of a batch that is not full yet
        for latent in latents:
            group = waiting.setdefault(tuple(latent.tensor.shape), [])
            group.append(latent)
            if len(group) == self.batch_size:
                yield from self._decode(group)
                group.clear()
        for group in waiting.values():
            yield from self._decode(group)

    def _decode(self, group):
        import torch

        from cachetrain.modeling.t5_pipeline import decode_raw

        if not group:
            return
        batch = torch.stack([latent.tensor.float() for latent in group])
        try:
            with torch.no_grad():
                sample = decode_raw(self.vae, batch.to(self.vae.device))
        except torch.OutOfMemoryError as error:
            raise OSError(f"out of device memory; run again with a smaller --batch_size ({error})") from error
        finite = sample.isfinite().flatten(1).all(1).tolist()
        pixels = sample.mul(127.5).add(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        for latent, picture, is_finite in zip(group, pixels, finite, strict=True):
            if is_finite:
                yield latent, picture
            else:
                self.fail(latent.path, "the VAE gave values that are not finite; try --dtype fp32 or bf16")


def source_pixels(path: str, width: int, height: int, sha256: str | None = None) -> np.ndarray | None:
    """Decodes an image file as the cache scripts do, to uint8 [height, width, 3].

    Args:
        sha256: of the expected content, if known.

    Returns:
        None if the file has another SHA-256.

    Raises:
        OSError, ValueError: the file cannot be read, or is no image.
    """
    data = read_bytes(path, MAX_IMAGE)
    if sha256 and hashlib.sha256(data).hexdigest() != sha256:
        return None
    return _decode(path, data, (width, height))[0]


def square_pixels(path: str, side: int, enlarge: bool) -> np.ndarray:
    """Decodes the center square of an image file, to uint8 [side, side, 3].

    Args:
        enlarge: whether a smaller image is enlarged; else its side is the largest multiple of 64 that it has.

    Raises:
        OSError, ValueError: the file cannot be read, is no image, or is below 64 pixels and not to be enlarged.
    """
    data = read_bytes(path, MAX_IMAGE)
    pixels, original_size, _ = _decode(path, data, (side, side))
    if enlarge or min(original_size) >= side:
        return pixels
    if min(original_size) < _LEAST_SIDE:
        width, height = original_size
        raise ValueError(f"{path}: is {width}x{height}; to enlarge it, pass --resolution")
    smaller = min(original_size) // _LEAST_SIDE * _LEAST_SIDE
    return _decode(path, data, (smaller, smaller))[0]


def _decode(path, data, size):
    try:
        return images.decode(data, [size])
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: {images.NOT_AN_IMAGE}") from error
    # Pillow's plugins raise almost anything on malformed input.
    except Exception as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error


def compare(name: str, source: np.ndarray, decoded: np.ndarray) -> Comparison:
    return Comparison(name, source, decoded, psnr(source, decoded))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 images: 10 log10(255^2 / mean squared error)."""
    mse = np.mean((a.astype(np.float32) - b.astype(np.float32)) ** 2)
    return float("inf") if mse == 0 else float(10 * np.log10(255**2 / mse))


def psnr_summary(values: list[float]) -> str:
    """`mean 30.12 dB, median 30.45, min 24.01 over 12 images`, of PSNRs in dB."""
    if not values:
        return "no image compared"
    mean, median = np.mean(values), np.median(values)
    return f"mean {mean:.2f} dB, median {median:.2f}, min {min(values):.2f} over {counted(len(values), 'image')}"


def comparison_sheet(comparisons: Iterable[Comparison], max_side: int) -> Image.Image:
    """One picture with a row per Comparison: source, decoded, absolute difference (brightened)."""
    cells, labels = [], []
    for name, source, decoded, value in comparisons:
        difference = np.abs(source.astype(int) - decoded) * _DIFFERENCE_GAIN
        cells += [source, decoded, difference.clip(0, 255).astype(np.uint8)]
        labels += [name, f"decoded, {value:.2f} dB", f"difference x {_DIFFERENCE_GAIN}"]
    return contact_sheet(cells, labels, columns=3, max_side=max_side)


def contact_sheet(pictures: Iterable[np.ndarray], labels: list[str], columns: int, max_side: int) -> Image.Image:
    """One picture of uint8 arrays [height, width, 3] of any sizes, each reduced to `max_side` if it is larger."""
    from cachetrain.sampling.render import grid

    thumbnails = [Image.fromarray(picture) for picture in pictures]
    for thumbnail in thumbnails:
        thumbnail.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return grid(thumbnails, labels, columns)
