"""Opens image files of any supported kind, and converts what Pillow makes of them to sRGB on white."""

import functools
import io

import numpy as np
from PIL import Image, ImageCms

# The decoders of walk.IMAGE_SUFFIXES. Pillow picks one by content, and its decoder of EPS runs Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA")

# By EXIF orientation, what makes the image upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_ORIENTATION, _BITS_PER_SAMPLE, _PHOTOMETRIC, _PLANES = 0x0112, 258, 262, 284  # EXIF and TIFF tags
_LAB = 8  # a value of _PHOTOMETRIC
_TGA_DESCRIPTOR = 17  # offset of the byte whose low 4 bits are the number of alpha bits
_PNG_DEPTH = 24  # offset of the byte in the IHDR chunk

# More is an error to Pillow. A worker needs about 4 bytes for each, so 0.7 GiB at most.
_MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS

# Profiles that move no color by more than this many of 255 levels are sRGB, rounded in one way or another.
_SAME_LEVELS = 2


def open_image(data: bytes) -> Image.Image:
    """Opens an image file's bytes like PIL.Image.open, but only as one of FORMATS.

    Raises:
        OSError, ValueError and whatever Pillow raises on malformed input.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise ValueError(f"has more than {_MAX_PIXELS:,} pixels, which take too much memory; scale it down") from None
    tags = getattr(image, "tag_v2", {})
    if tags.get(_PLANES) == 2 and (max(tags.get(_BITS_PER_SAMPLE, (1,))) > 8 or tags.get(_PHOTOMETRIC) == _LAB):
        raise ValueError("is a TIFF with a plane per channel, which Pillow decodes wrongly here; save it interleaved")
    if image.format == "TGA" and image.mode == "RGBA" and not data[_TGA_DESCRIPTOR] & 15:
        image = image.convert("RGB")  # its fourth byte is no alpha
    key = image.info.get("transparency")
    if image.format == "PNG" and key is not None and image.mode != "P":
        # The transparent color is in the file's bits, Pillow's pixels are in 8. 16-bit gray keeps its 16.
        most = 2 ** data[_PNG_DEPTH] - 1
        if image.mode == "L":
            image.info["transparency"] = key * 255 // most
        elif image.mode == "RGB" and most > 255:
            image.info["transparency"] = tuple(value >> 8 for value in key)
    return image


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if there is none that can be read. Above 4, width and height are swapped."""
    try:
        value = image.getexif().get(_ORIENTATION)
    except Exception:  # Pillow raises almost anything on malformed EXIF data and XMP
        return 1
    return value if value in _UPRIGHT else 1


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """Undoes an EXIF orientation."""
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def stored_rows(size: tuple[int, int], orientation: int, first: int, last: int) -> tuple[int, int, int, int]:
    """The box (left, top, right, bottom) of a stored image that `upright` turns into rows `first` to below `last`.

    Args:
        size: (width, height) of the stored image.
    """
    width, height = size
    if orientation in (3, 4, 7, 8):  # counted from the other end
        end = width if orientation > 4 else height
        first, last = end - last, end - first
    return (first, 0, last, height) if orientation > 4 else (0, first, width, last)


def to_rgb(image: Image.Image, file: Image.Image) -> Image.Image:
    """Converts any Pillow image to sRGB in mode RGB: transparency becomes white, up to 16 bits are scaled to 8.

    Args:
        image: an opened image, or a crop of it.
        file: the opened image, which knows its format and tags.

    Raises:
        ValueError: pixels of 32 bits, whose range the file does not give.
    """
    profile = image.info.get("icc_profile")
    if image.mode[0] in "IF":
        image = _gray_of_8_bits(image, file)
    if profile:
        image = _to_srgb(image, profile)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba)
    return image.convert("RGB")


def to_alpha(image: Image.Image, file: Image.Image) -> Image.Image:
    """The opacity of any Pillow image as gray levels, mode L; white where it has no transparency. Like `to_rgb`."""
    if image.mode[0] in "IF":
        image = _gray_of_8_bits(image, file)
    if not image.has_transparency_data:
        return Image.new("L", image.size, "white")
    return image.convert("RGBA").getchannel("A")


def to_gray(image: Image.Image, file: Image.Image) -> Image.Image:
    """The gray levels of a mask, mode L, as they are in the file: no profile is applied. Like `to_rgb`.

    Raises:
        ValueError: it has transparent pixels, or those of 32 bits.
    """
    if to_alpha(image, file).getextrema()[0] < 255:
        raise ValueError("has transparent pixels, which are neither black nor white; save it without transparency")
    if image.mode[0] in "IF":
        image = _gray_of_8_bits(image, file)
    return image.convert("L")


def _gray_of_8_bits(image, file):
    """Scales gray of 9 to 16 bits to 8, which Pillow's own conversion clips at 255."""
    if image.mode == "F" or (image.mode == "I" and file.format != "PPM"):
        raise ValueError("has pixels of 32 bits, whose range the file does not give; convert it to 8 or 16 bits")
    tags = getattr(file, "tag_v2", {})
    most = 2 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1
    wide = np.asarray(image).astype(np.int32).clip(0, most)
    levels = (510 * wide + most) // (2 * most)  # rounded
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero
        levels = 255 - levels
    gray = Image.fromarray(levels.astype(np.uint8))
    if (key := image.info.get("transparency")) is not None:
        gray.putalpha(Image.fromarray(np.where(wide == key, 0, 255).astype(np.uint8)))
    return gray


def _to_srgb(image, profile):
    """Converts the colors of an image from its ICC profile to sRGB; an unusable profile changes nothing."""
    mode, transform = _transform_to_srgb(profile)
    is_gray = image.mode in ("1", "L", "LA")
    if transform is None or (mode == "L" and not is_gray) or (mode == "CMYK") != (image.mode == "CMYK"):
        return image
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    image = ImageCms.applyTransform(image.convert("RGBA").convert(mode) if alpha else image.convert(mode), transform)
    if alpha:
        image.putalpha(alpha)
    return image


@functools.lru_cache(maxsize=8)
def _transform_to_srgb(profile):
    """Returns (mode of the pixels that an ICC profile describes, its ImageCmsTransform to sRGB in mode RGB).

    The transform is None if the profile is sRGB, cannot be used, or is of a mode that images do not have here.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(source.profile.xcolor_space)
        if mode is None:
            return None, None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (OSError, ImageCms.PyCMSError):
        return None, None
    if mode == "CMYK":
        return mode, transform
    colors = _sample_colors(mode)
    moved = np.asarray(ImageCms.applyTransform(colors, transform), int) - np.asarray(colors.convert("RGB"), int)
    return mode, transform if np.abs(moved).max() > _SAME_LEVELS else None


def _sample_colors(mode):
    """An image with all grays and, in mode RGB, colors from the whole cube."""
    grays = np.arange(256, dtype=np.uint8)
    if mode == "L":
        return Image.fromarray(grays[None])
    cube = np.stack(np.meshgrid(*[grays[::15]] * 3), axis=-1).reshape(-1, 3)
    return Image.fromarray(np.concatenate([cube, np.stack([grays] * 3, axis=-1)])[None])
