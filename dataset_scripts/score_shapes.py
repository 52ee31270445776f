#!/usr/bin/env -S python3 -P
"""Scores generated pictures of shapes: how many follow their prompts.

    ./dataset_scripts/score_shapes.py output/samples/step-002800

A PNG's prompt is read from its text chunk `prompt`, else from a .txt file beside it. Five attributes are read from
the pixels and compared with the prompt: background, color, shape, place and size. A picture counts as right if all
five are right. PNGs without a caption of draw_shapes.py as prompt (a grid, for example) are left out; their number is
printed.

The score of pictures drawn by draw_shapes.py is 100%, and 0% with shuffled captions.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))  # where draw_shapes.py is

try:
    import numpy as np
    from draw_shapes import COLORS, IMAGE_SIZE, PLACES, SHAPES, SIZES, Scene, parse_caption, shape_mask
    from PIL import Image

    from cachetrain import cli, outputs
    from cachetrain.atomic import atomic_write
    from cachetrain.log import counted, printable
    from cachetrain.reading import read_bytes, read_text
except ImportError as error:
    print(f"{error}: run `pip install -e .`, or ./quickstart.sh and `source .venv/bin/activate`", file=sys.stderr)
    sys.exit(2)

ATTRIBUTES = ("background", "color", "shape", "place", "size")
BORDER = 2  # pixels along the edge that count as background
MIN_CONTRAST = 60  # minimum RGB distance between shape and background
MIN_IOU = 0.6  # minimum overlap of a mask with a shape's template
TEMPLATE_SIZE = 32


@dataclass(frozen=True)
class Judgement:
    """Score of one picture: prompt, whether the prompt's pair was held out, and which attributes are right."""

    path: str
    prompt: str
    held_out: bool
    right: dict[str, bool]

    @property
    def followed(self) -> bool:
        """Whether all five attributes are right."""
        return all(self.right.values())


def nearest_colors(pixels: np.ndarray) -> np.ndarray:
    """Returns, for RGB [N, 3], the index of the nearest color in COLORS for each pixel, int [N]."""
    palette = np.array(list(COLORS.values()), dtype=np.float64)
    return np.linalg.norm(pixels[:, None] - palette, axis=-1).argmin(axis=1)


def color_name(rgb: np.ndarray) -> str:
    """Returns the name of the color in COLORS that is nearest to an RGB triple."""
    return list(COLORS)[nearest_colors(rgb[None])[0]]


def split_foreground(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Separates a shape from its plain background.

    Args:
        pixels: float [H, W, 3], from 0 to 255.

    Returns:
        (background RGB, foreground RGB, coverage float [H, W] in [0, 1]). Foreground and coverage are None if nothing
        stands out from the background.
    """
    inner = np.zeros(pixels.shape[:2], bool)
    inner[BORDER:-BORDER, BORDER:-BORDER] = True
    # A large shape may touch an edge, but the most frequent color of the border is still the background's.
    border = pixels[~inner]
    colors = nearest_colors(border)
    background = np.median(border[colors == np.bincount(colors).argmax()], axis=0)
    distance = np.linalg.norm(pixels - background, axis=-1)
    contrast = np.percentile(distance, 99)  # the smallest shape covers 2.5% of the picture
    if contrast < MIN_CONTRAST:
        return background, None, None
    foreground = np.median(pixels[distance > 0.7 * contrast], axis=0)  # without the antialiased edge
    direction = foreground - background
    coverage = (pixels - background) @ direction / (direction @ direction)
    return background, foreground, coverage.clip(0, 1)


def crop_to_box(coverage: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Crops to the shape's bounding box.

    Returns:
        (crop scaled to [32, 32], (left, top, right, bottom) in pixels).
    """
    rows, columns = np.nonzero(coverage > 0.5)
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    image = Image.fromarray(coverage.astype(np.float32))
    crop = image.resize((TEMPLATE_SIZE, TEMPLATE_SIZE), Image.Resampling.BILINEAR, box=tuple(map(float, box)))
    return np.asarray(crop), box


@cache
def template(shape: str) -> tuple[np.ndarray, float, list[float]]:
    """Returns (coverage [32, 32], area, offset (x, y) of the bounding box's center) of a shape with radius 1."""
    radius, image_size = 0.4, 4 * IMAGE_SIZE
    mask = np.asarray(shape_mask(shape, (0.5, 0.5), radius, image_size)) / 255.0
    crop, (left, top, right, bottom) = crop_to_box(mask)
    scale = radius * image_size
    center = ((left + right) / 2, (top + bottom) / 2)
    return crop, (mask > 0.5).sum() / scale**2, [(c - image_size / 2) / scale for c in center]


def soft_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two coverages in [0, 1]."""
    return np.minimum(a, b).sum() / np.maximum(a, b).sum()


def read_scene(image: Image.Image) -> dict[str, str | None]:
    """Returns the five attributes read from a picture; None for attributes that cannot be recognised."""
    image = image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    background, foreground, coverage = split_foreground(np.asarray(image, dtype=np.float64))
    attributes = dict.fromkeys(ATTRIBUTES) | {"background": color_name(background)}
    if coverage is None:
        return attributes
    crop, (left, top, right, bottom) = crop_to_box(coverage)
    overlap = {shape: soft_iou(crop, template(shape)[0]) for shape in SHAPES}
    shape = max(overlap, key=overlap.get)
    _, area, offset = template(shape)
    # From the area, not the bounding box, because the points of a star may be blurred away.
    radius = ((coverage > 0.5).sum() / area) ** 0.5
    center = [((left + right) / 2 - offset[0] * radius), ((top + bottom) / 2 - offset[1] * radius)]
    center, radius = np.divide(center, IMAGE_SIZE), radius / IMAGE_SIZE
    attributes["color"] = color_name(foreground)
    attributes["shape"] = shape if overlap[shape] > MIN_IOU else None
    attributes["place"] = min(PLACES, key=lambda place: np.linalg.norm(center - PLACES[place]))
    attributes["size"] = min(SIZES, key=lambda size: abs(radius - SIZES[size]))
    return attributes


def judge(path: Path, image: Image.Image, prompt: str) -> Judgement:
    """Compares a picture with its prompt.

    Raises:
        ValueError: the prompt is not a caption of draw_shapes.py.
    """
    expected: Scene = parse_caption(prompt)
    found = read_scene(image)
    right = {attribute: found[attribute] == getattr(expected, attribute) for attribute in ATTRIBUTES}
    return Judgement(str(path), prompt, expected.held_out, right)


def judge_folder(folder: Path) -> tuple[list[Judgement], list[Path]]:
    """Judges the PNGs under `folder`; returns (judgements, paths without a caption of draw_shapes.py as prompt)."""
    judgements, left_out = [], []
    for path in sorted(folder.rglob("*.png")):
        caption = path.with_suffix(".txt")
        try:
            with Image.open(io.BytesIO(read_bytes(path)), formats=["PNG"]) as image:
                prompt = image.info.get("prompt") or (read_text(caption) if caption.exists() else "")
                judgements.append(judge(path, image, prompt.strip()))
        except (OSError, ValueError):  # no PNG, or a prompt of another kind
            left_out.append(path)
    return judgements, left_out


def percent(flags: Sequence[bool]) -> float | None:
    """Returns the percentage of true flags; None if there are no flags."""
    return 100 * sum(flags) / len(flags) if flags else None


def summarize(judgements: Iterable[Judgement]) -> dict[str, dict]:
    """Returns {"trained": {...}, "held_out": {...}}: num_images, and percent right per attribute and for `all`."""
    groups = {"trained": [], "held_out": []}
    for judgement in judgements:
        groups["held_out" if judgement.held_out else "trained"].append(judgement)
    return {
        name: {
            "num_images": len(group),
            **{attribute: percent([j.right[attribute] for j in group]) for attribute in ATTRIBUTES},
            "all": percent([j.followed for j in group]),
        }
        for name, group in groups.items()
    }


def format_percent(value: float | None) -> str:
    """Formats a percentage as `97%`, None as `n/a`."""
    return "n/a" if value is None else f"{value:.0f}%"


def print_report(summary: dict[str, dict]) -> None:
    """Prints a row per attribute, and the result in the last line."""
    trained, held_out = summary["trained"], summary["held_out"]
    print(f"{'':<12}{'trained':>10}{'held out':>10}")
    print(f"{'images':<12}{trained['num_images']:>10}{held_out['num_images']:>10}")
    for name in ATTRIBUTES:
        print(f"{name:<12}{format_percent(trained[name]):>10}{format_percent(held_out[name]):>10}")
    print(
        f"prompt-following: {format_percent(trained['all'])} trained pairs, "
        f"{format_percent(held_out['all'])} held-out pairs"
    )


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("folder", type=Path, help="directory of pictures, subdirectories included")
    parser.add_argument(
        "--json", type=outputs.scores, metavar="FILE", help="also write the scores of all pictures to this file"
    )
    percent = cli.Number(float, 0, 100)
    parser.add_argument(
        "--min_trained",
        type=percent,
        default=0,
        metavar="PERCENT",
        help="exit with code 1 if fewer pictures of trained pairs of shape and color are right",
    )
    parser.add_argument(
        "--min_held_out",
        type=percent,
        default=0,
        metavar="PERCENT",
        help="exit with code 1 if fewer pictures of held-out pairs of shape and color are right",
    )
    return parser.parse_args(argv)


def main(argv=None):
    """Scores a folder; returns 0, 1 if the score is below a minimum, or 2 if there was nothing to score."""
    args = parse_args(argv)
    judgements, left_out = judge_folder(args.folder)
    if left_out:
        print(
            f"left out {counted(len(left_out), 'picture')} that cannot be read or whose prompt is not a caption of "
            f"draw_shapes.py, such as {printable(left_out[0])}",
            file=sys.stderr,
        )
    if not judgements:
        print(
            f"error: {args.folder}: found no PNG with a caption of draw_shapes.py as prompt; expected the prompt in "
            "a text chunk `prompt`, as written by sample.py, or in a .txt file beside the PNG",
            file=sys.stderr,
        )
        return 2
    summary = summarize(judgements)
    if args.json:
        details = [asdict(judgement) for judgement in judgements]
        atomic_write(args.json, (json.dumps({**summary, "images": details}, indent=1) + "\n").encode())
    print_report(summary)
    minimums = (("trained", args.min_trained), ("held_out", args.min_held_out))
    return int(any((summary[name]["all"] or 0) < minimum for name, minimum in minimums))


if __name__ == "__main__":
    cli.run(main)
