"""The sizes images are encoded at, and how well they fit the images."""

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from cachetrain.atomic import atomic_write, temporary_path
from cachetrain.log import list_entry
from cachetrain.reading import read_bytes

STEP = 64


def bucket_sizes(resolution: int, aspect_limit: float) -> list[tuple[int, int]]:
    """Sizes of about resolution² pixels with sides in multiples of 64.

    For each possible side, the other side is the one that comes nearest to resolution² pixels; in both orientations.

    Args:
        resolution: side of the square bucket; a multiple of 64.
        aspect_limit: largest allowed ratio of the longer side to the shorter one, at least 1.

    Returns:
        sorted list of (width, height); the square is always among them.
    """
    cells = (resolution // STEP) ** 2
    sizes = {(resolution, resolution)}
    for a in range(1, cells + 1):
        b = max(1, round(cells / a))
        if max(a, b) <= aspect_limit * min(a, b):
            sizes |= {(a * STEP, b * STEP), (b * STEP, a * STEP)}
    return sorted(sizes)


def nearest_size(original_size: tuple[int, int], sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The (width, height) of `sizes` whose aspect ratio is nearest to the original's, on a logarithmic scale."""
    aspect = original_size[0] / original_size[1]
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1] / aspect)))


class Coverage:
    """Counts, from sidecar headers, how many images have each size and how much of them is cropped away.

    Attributes:
        images: Counter of images by size ("512x512").
        kept: by size, the sum over its images of the fraction that is not cropped away.
    """

    def __init__(self):
        self.images = Counter()
        self.kept = Counter()

    def add(self, metadata: dict[str, str]) -> None:
        """Counts one image sidecar by its header."""
        size = f"{metadata['width']}x{metadata['height']}"
        left, top, right, bottom = map(float, metadata["crop_box"].split(","))
        area = int(metadata["original_width"]) * int(metadata["original_height"])
        self.images[size] += 1
        self.kept[size] += (right - left) * (bottom - top) / area

    def table(self) -> Iterator[str]:
        """Lines of a table, fullest size first: size, images, share of all, how much is cropped away on average."""
        total = self.images.total()
        yield f"{'bucket':>11}{'images':>11}{'share':>9}{'cropped away':>15}"
        for size, images in sorted(self.images.items(), key=lambda item: (-item[1], item[0])):
            yield f"{size:>11}{images:>11,}{images / total:>9.1%}{1 - self.kept[size] / images:>15.1%}"
        if len(self.images) > 1:
            yield f"{'all':>11}{total:>11,}{1:>9.1%}{1 - self.kept.total() / total:>15.1%}"


def is_upscaled(metadata: dict[str, str]) -> bool:
    """Whether the image of this header had to be enlarged to cover its size."""
    sides = (("original_width", "width"), ("original_height", "height"))
    return any(int(metadata[original]) < int(metadata[side]) for original, side in sides)


def upscaling(metadata: dict[str, str]) -> str:
    """`200x100 -> 512x512`, of this header."""
    return "{original_width}x{original_height} -> {width}x{height}".format_map(metadata)


class UpscaledList:
    """A text file with a line for each enlarged image among all images of a run, fresh ones too.

    The lines stay in memory until the run ends; they take little beside the list of its images.
    """

    def __init__(self, target: str | os.PathLike):
        self.target = Path(target)
        self.lines = bytearray()

    def add(self, path: str, metadata: dict[str, str]) -> None:
        self.lines += list_entry(path) + f"\t{upscaling(metadata)}\n".encode()

    def write_part(self) -> str | None:
        """Leaves the lines in a temporary file for rank 0 to publish; returns its path, None without any lines."""
        if not self.lines:
            return None
        part = temporary_path(self.target)
        atomic_write(part, self.lines)
        return str(part)

    def publish(self, parts: list[str]) -> None:
        """Writes the file from these lines and the parts of other ranks; without any lines, removes an old one.

        If nothing has changed, nothing is written: the folder may be read-only.
        """
        try:
            lines = b"".join([self.lines, *(Path(part).read_bytes() for part in parts)])
            size = self.target.stat().st_size if self.target.is_file() else 0
            if lines and (size != len(lines) or read_bytes(self.target, size) != lines):
                atomic_write(self.target, lines)
            elif size and not lines:
                self.target.unlink()
        finally:
            for part in parts:
                os.unlink(part)
