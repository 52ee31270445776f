#!/usr/bin/env python3
"""Reads generated pictures of shapes and tells how many do what their prompts say.

    ./dataset_scripts/score_shapes.py output/samples/step-002800

Each PNG brings its prompt in its text chunk `prompt`, else in a .txt beside it. Five attributes are read from the
pixels and compared with the prompt: background, color, shape, place, size. A picture counts when all five are
right. Pictures without a prompt of this world (a grid, say) are left out and counted.

On pictures that draw_shapes.py drew this ruler reads 100%, with the captions shuffled 0%.
"""

import json
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

try:
    import numpy as np

    # One world for drawing and for judging. A script's own folder is first in sys.path, so this finds its neighbour.
    from draw_shapes import COLORS, IMAGE_SIZE, PLACES, SHAPES, SIZES, Scene, parse_caption, shape_mask
    from PIL import Image

    from cachetrain import cli
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: run ./quickstart.sh once, then `source .venv/bin/activate`") from None

ATTRIBUTES = ("background", "color", "shape", "place", "size")
BORDER = 2  # pixels along the edge that count as background
MIN_CONTRAST = 60  # RGB distance below which nothing stands out from the background
MIN_IOU = 0.6  # a mask that overlaps no template this well has no shape
TEMPLATE_SIZE = 32


@dataclass(frozen=True)
class Judgement:
    """One picture: its prompt, whether its pair was held out, and which attributes are right."""

    path: str
    prompt: str
    held_out: bool
    right: dict

    @property
    def followed(self):
        """Whether all five attributes are right."""
        return all(self.right.values())


def nearest_colors(pixels):
    """Returns, for RGB [N, 3], the number of the nearest palette color of each, int [N]."""
    palette = np.array(list(COLORS.values()), dtype=np.float64)
    return np.linalg.norm(pixels[:, None] - palette, axis=-1).argmin(axis=1)


def color_name(rgb):
    """Returns the name of the palette color nearest to one RGB triple."""
    return list(COLORS)[nearest_colors(rgb[None])[0]]


def split_foreground(pixels):
    """Separates a shape from its plain background.

    Args:
        pixels: float [H, W, 3] in 0 to 255.

    Returns:
        (background RGB, foreground RGB, coverage): coverage is float [H, W] in [0, 1]. Foreground and coverage are
        None where nothing stands out.
    """
    inner = np.zeros(pixels.shape[:2], bool)
    inner[BORDER:-BORDER, BORDER:-BORDER] = True
    # A large shape may touch an edge; the most frequent palette color of the border is still the background's.
    border = pixels[~inner]
    colors = nearest_colors(border)
    background = np.median(border[colors == np.bincount(colors).argmax()], axis=0)
    distance = np.linalg.norm(pixels - background, axis=-1)
    contrast = np.percentile(distance, 99)  # the smallest shape covers 2.5% of the picture
    if contrast < MIN_CONTRAST:
        return background, None, None
    foreground = np.median(pixels[distance > 0.7 * contrast], axis=0)  # without the blended edge
    direction = foreground - background
    coverage = (pixels - background) @ direction / (direction @ direction)
    return background, foreground, coverage.clip(0, 1)


def crop_to_box(coverage):
    """Returns (crop scaled to [32, 32], box) of what is covered; box is (left, top, right, bottom) in pixels."""
    rows, columns = np.nonzero(coverage > 0.5)
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    image = Image.fromarray(coverage.astype(np.float32))
    crop = image.resize((TEMPLATE_SIZE, TEMPLATE_SIZE), Image.Resampling.BILINEAR, box=tuple(map(float, box)))
    return np.asarray(crop), box


@cache
def template(shape):
    """Returns (coverage [32, 32], area, offset of the box's center (x, y)), for a radius of 1."""
    radius, image_size = 0.4, 4 * IMAGE_SIZE
    mask = np.asarray(shape_mask(shape, (0.5, 0.5), radius, image_size)) / 255.0
    crop, (left, top, right, bottom) = crop_to_box(mask)
    scale = radius * image_size
    center = ((left + right) / 2, (top + bottom) / 2)
    return crop, (mask > 0.5).sum() / scale**2, [(c - image_size / 2) / scale for c in center]


def soft_iou(a, b):
    """Intersection over union of two coverages in [0, 1]."""
    return np.minimum(a, b).sum() / np.maximum(a, b).sum()


def read_scene(image):
    """Returns the five attributes a picture shows, as a dict; None where it shows none that can be named."""
    image = image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    background, foreground, coverage = split_foreground(np.asarray(image, dtype=np.float64))
    seen = dict.fromkeys(ATTRIBUTES) | {"background": color_name(background)}
    if coverage is None:
        return seen
    crop, (left, top, right, bottom) = crop_to_box(coverage)
    overlap = {shape: soft_iou(crop, template(shape)[0]) for shape in SHAPES}
    shape = max(overlap, key=overlap.get)
    _, area, offset = template(shape)
    # From the area and not the box: a star whose points are blurred away is no smaller for it.
    radius = ((coverage > 0.5).sum() / area) ** 0.5
    center = [((left + right) / 2 - offset[0] * radius), ((top + bottom) / 2 - offset[1] * radius)]
    center, radius = np.divide(center, IMAGE_SIZE), radius / IMAGE_SIZE
    seen["color"] = color_name(foreground)
    seen["shape"] = shape if overlap[shape] > MIN_IOU else None
    seen["place"] = min(PLACES, key=lambda place: np.linalg.norm(center - PLACES[place]))
    seen["size"] = min(SIZES, key=lambda size: abs(radius - SIZES[size]))
    return seen


def judge(path, image, prompt):
    """Compares a picture with its prompt; raises ValueError if that is no caption of this world."""
    wanted: Scene = parse_caption(prompt)
    seen = read_scene(image)
    right = {attribute: seen[attribute] == getattr(wanted, attribute) for attribute in ATTRIBUTES}
    return Judgement(str(path), prompt, wanted.held_out, right)


def judge_folder(folder):
    """Judges the PNGs under `folder`; returns (judgements, paths left out for want of a prompt of this world)."""
    judgements, left_out = [], []
    for path in sorted(folder.rglob("*.png")):
        caption = path.with_suffix(".txt")
        with Image.open(path) as image:
            prompt = image.info.get("prompt") or (caption.read_text() if caption.exists() else "")
            try:
                judgements.append(judge(path, image, prompt.strip()))
            except ValueError:
                left_out.append(path)
    return judgements, left_out


def percent(flags):
    """Returns the share of true flags in percent, or None of no flags."""
    return 100 * sum(flags) / len(flags) if flags else None


def summarize(judgements):
    """Returns {"trained": {...}, "held_out": {...}}: num_images, and percent per attribute and of `all` five."""
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


def format_percent(value):
    """`97%`, or `n/a` without pictures."""
    return "n/a" if value is None else f"{value:.0f}%"


def print_report(summary):
    """Prints one row per attribute; the last line is the result."""
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
    """Parses the command line."""
    parser = cli.parser(__doc__)
    parser.add_argument("folder", type=Path, help="directory of pictures, subdirectories included")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result and every judgement here")
    percent = cli.Number(float, 0, 100)
    parser.add_argument(
        "--min_trained",
        type=percent,
        default=0,
        metavar="PERCENT",
        help="make the exit code 1 if fewer pictures are right, of shapes in colours that were trained",
    )
    parser.add_argument(
        "--min_held_out",
        type=percent,
        default=0,
        metavar="PERCENT",
        help="the same, of shapes in colours that were held out",
    )
    return parser.parse_args(argv)


def main(argv=None):
    """Scores a folder; returns 0, 1 where a bound was missed, or 2 where there was nothing to score."""
    args = parse_args(argv)
    judgements, left_out = judge_folder(args.folder)
    if left_out:
        print(f"left out {len(left_out)} pictures without a prompt of this world, as {left_out[0]}", file=sys.stderr)
    if not judgements:
        print(
            f"error: {args.folder}: found no PNG with a prompt of this world; expected a text chunk `prompt` or a "
            ".txt beside it, as sample.py and draw_shapes.py write them",
            file=sys.stderr,
        )
        return 2
    summary = summarize(judgements)
    if args.json:
        details = [asdict(judgement) for judgement in judgements]
        args.json.write_text(json.dumps({**summary, "images": details}, indent=1) + "\n")
    print_report(summary)
    bounds = (("trained", args.min_trained), ("held_out", args.min_held_out))
    return int(any((summary[name]["all"] or 0) < bound for name, bound in bounds))


if __name__ == "__main__":
    sys.exit(main())
