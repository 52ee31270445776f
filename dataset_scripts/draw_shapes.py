#!/usr/bin/env -S python3 -P
"""Draws a data set of captioned shapes; score_shapes.py checks whether a model's pictures follow such captions.

    ./dataset_scripts/draw_shapes.py --out shapes --num_images 3000 --prompts shapes_prompts.txt

Writes 00000.png and 00000.txt ("a small red circle on the left on a blue background"), and so on. Six shapes, eight
colors, five places and two sizes give 3,360 captions. Six pairs of shape and color are held out and never drawn: a
model that draws them has learned to combine words, not only to memorize pictures.

Image i depends only on i and the seed. A larger data set therefore starts with the same images as a smaller one, and
a second run draws only missing images.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

try:
    import numpy as np
    from PIL import Image, ImageDraw

    from cachetrain import cli
    from cachetrain.atomic import atomic_write
    from cachetrain.log import counted
    from cachetrain.reading import read_bytes, read_json
except ImportError as error:
    print(f"{error}: run `pip install -e .`, or ./quickstart.sh and `source .venv/bin/activate`", file=sys.stderr)
    sys.exit(2)

IMAGE_SIZE = 64
SUPERSAMPLE = 4  # antialiasing, which Pillow lacks: draw larger, then average

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 75, 220),
    "yellow": (245, 215, 50),
    "cyan": (60, 210, 225),
    "pink": (240, 105, 190),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
PLACES = {  # center as (x, y), a fraction of the image
    "on the left": (0.3, 0.5),
    "on the right": (0.7, 0.5),
    "at the top": (0.5, 0.3),
    "at the bottom": (0.5, 0.7),
    "in the middle": (0.5, 0.5),
}
SIZES = {"small": 0.17, "large": 0.26}  # radius, a fraction of the image
PLACE_JITTER = 0.02
SIZE_JITTER = 0.05  # relative to the radius

HELD_OUT = frozenset(
    {
        ("circle", "green"),
        ("square", "pink"),
        ("triangle", "blue"),
        ("star", "red"),
        ("cross", "yellow"),
        ("ring", "cyan"),
    }
)
CAPTION = re.compile(
    rf"a (?P<size>{'|'.join(SIZES)}) (?P<color>{'|'.join(COLORS)}) (?P<shape>{'|'.join(SHAPES)}) "
    rf"(?P<place>{'|'.join(PLACES)}) on a (?P<background>{'|'.join(COLORS)}) background"
)


@dataclass(frozen=True)
class Scene:
    """One shape on a plain background; the fields are keys of SIZES, COLORS, SHAPES, PLACES and COLORS."""

    size: str
    color: str
    shape: str
    place: str
    background: str

    @property
    def held_out(self) -> bool:
        """Whether this scene's (shape, color) pair is held out of the data set."""
        return (self.shape, self.color) in HELD_OUT

    @property
    def caption(self) -> str:
        """The scene's caption; `parse_caption` is the inverse."""
        return f"a {self.size} {self.color} {self.shape} {self.place} on a {self.background} background"


def parse_caption(caption: str) -> Scene:
    """Returns the Scene that a caption describes.

    Raises:
        ValueError: the text is not one of the 3,360 captions.
    """
    match = CAPTION.fullmatch(caption.strip())
    if not match or match["color"] == match["background"]:
        raise ValueError(
            f"{caption!r} is not a caption of this data set; expected a caption like "
            '"a small red circle on the left on a blue background", with two different colors'
        )
    return Scene(**match.groupdict())


def all_scenes() -> list[Scene]:
    """Returns all 3,360 scenes, including the held-out ones, in a fixed order."""
    fields = itertools.product(SIZES, COLORS, SHAPES, PLACES, COLORS)
    return [Scene(*values) for values in fields if values[1] != values[4]]


TRAINED_SCENES = tuple(scene for scene in all_scenes() if not scene.held_out)
HELD_OUT_SCENES = tuple(scene for scene in all_scenes() if scene.held_out)


def regular_polygon(radii: Sequence[float], num_points: int) -> list[tuple[float, float]]:
    """Returns num_points points (x, y) at equal angles around 0, the first straight up, at alternating `radii`."""
    angles = [2 * math.pi * i / num_points for i in range(num_points)]
    return [(r * math.sin(a), -r * math.cos(a)) for a, r in zip(angles, itertools.cycle(radii), strict=False)]


OUTLINES = {  # in units of the radius, centered on 0
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": [(0, -0.95), (1, 0.8), (-1, 0.8)],
    "star": regular_polygon((1.05, 0.45), 10),
    "cross": [(x * s, y * t) for x, y, s, t in (
        (0.3, 0.95, 1, -1), (0.3, 0.3, 1, -1), (0.95, 0.3, 1, -1),
        (0.95, 0.3, 1, 1), (0.3, 0.3, 1, 1), (0.3, 0.95, 1, 1),
        (0.3, 0.95, -1, 1), (0.3, 0.3, -1, 1), (0.95, 0.3, -1, 1),
        (0.95, 0.3, -1, -1), (0.3, 0.3, -1, -1), (0.3, 0.95, -1, -1),
    )],
}  # fmt: skip


def shape_mask(shape: str, center: tuple[float, float], radius: float, image_size: int = IMAGE_SIZE) -> Image.Image:
    """Renders the mask of a shape.

    Args:
        shape: one of SHAPES.
        center: (x, y), as fractions of the image.
        radius: as a fraction of the image.
        image_size: width and height in pixels.

    Returns:
        mode L, 255 inside, 0 outside, antialiased at the edge.
    """
    scale = image_size * SUPERSAMPLE
    x, y, radius = center[0] * scale, center[1] * scale, radius * scale
    mask = Image.new("L", (scale, scale))
    draw = ImageDraw.Draw(mask)
    if shape in OUTLINES:
        draw.polygon([(x + radius * u, y + radius * v) for u, v in OUTLINES[shape]], fill=255)
    else:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    if shape == "ring":
        hole = 0.55 * radius
        draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
    return mask.resize((image_size, image_size), Image.Resampling.BOX)


def draw(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draws a scene as a 64x64 RGB image; `rng` jitters place and size slightly."""
    center = np.array(PLACES[scene.place]) + rng.uniform(-PLACE_JITTER, PLACE_JITTER, size=2)
    radius = SIZES[scene.size] * (1 + rng.uniform(-SIZE_JITTER, SIZE_JITTER))
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), COLORS[scene.background])
    image.paste(COLORS[scene.color], mask=shape_mask(scene.shape, center, radius))
    return image


def nth_image(seed: int, index: int) -> tuple[Scene, Image.Image]:
    """Returns scene and RGB image number `index` of the data set with this seed, a pure function of both."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0, index)))
    scene = TRAINED_SCENES[rng.integers(len(TRAINED_SCENES))]
    return scene, draw(scene, rng)


def evaluation_prompts(num_prompts: int, seed: int) -> list[str]:
    """Returns distinct captions to evaluate a model with, alternating between trained and held-out pairs."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))
    half = (num_prompts + 1) // 2
    trained = rng.choice(len(TRAINED_SCENES), half, replace=False)
    held_out = rng.choice(len(HELD_OUT_SCENES), half, replace=False)
    pairs = zip(trained, held_out, strict=True)
    scenes = [scene for i, j in pairs for scene in (TRAINED_SCENES[i], HELD_OUT_SCENES[j])]
    return [scene.caption for scene in scenes[:num_prompts]]


def world_id() -> str:
    """Returns a short hash of all constants that affect the pictures."""
    world = (SHAPES, COLORS, PLACES, SIZES, PLACE_JITTER, SIZE_JITTER, sorted(HELD_OUT))
    return hashlib.sha256(repr(world).encode()).hexdigest()[:12]


def check_settings(out: Path, settings: dict) -> None:
    """Writes the settings to `out`/shapes.json, or compares them with the ones already there.

    Raises:
        ValueError: `out` contains a data set drawn with other settings, or other numbered files.
    """
    path = out / "shapes.json"
    if not path.exists() and (other := next(out.glob("[0-9][0-9][0-9][0-9][0-9]*.*"), None)):
        raise ValueError(f"{other}: was not drawn by this script, and could be replaced; choose another --out")
    if path.exists() and (found := read_json(path)) != settings:
        raise ValueError(
            f"{path}: the images here were drawn with {found}, not {settings}; choose another --out, or delete the "
            "directory"
        )
    path.write_text(json.dumps(settings) + "\n")


def check_prompts(path: Path) -> None:
    """Checks that a list of prompts replaces nothing but an earlier one.

    Raises:
        ValueError: it would.
    """
    captions = {scene.caption.encode() for scene in TRAINED_SCENES + HELD_OUT_SCENES}
    if path.exists() and not captions.issuperset(read_bytes(path).splitlines()):
        raise ValueError(f"--prompts {path}: exists, and is no list of such prompts; choose another name")


def draw_dataset(out: Path, num_images: int, seed: int) -> int:
    """Writes the images and captions that are missing in `out`; returns how many were drawn."""
    from tqdm import tqdm

    out.mkdir(parents=True, exist_ok=True)
    check_settings(out, {"seed": seed, "world": world_id()})
    present = {path.stem for path in out.glob("*.txt")}
    missing = [index for index in range(num_images) if f"{index:05d}" not in present]
    for index in tqdm(missing, desc="draw", unit="image", disable=None):
        scene, image = nth_image(seed, index)
        image.save(out / f"{index:05d}.png")
        # Written last, so that an image with a caption is complete.
        (out / f"{index:05d}.txt").write_text(scene.caption + "\n")
    return len(missing)


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for the images and captions")
    parser.add_argument(
        "--num_images", type=cli.Number(int, 0, 1_000_000), default=3000, help="number of images in the data set"
    )
    parser.add_argument("--seed", type=cli.seed, default=0, help="random seed; each seed gives another data set")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="also write prompts to evaluate a model with, one per line"
    )
    parser.add_argument(
        "--num_prompts",
        type=cli.Number(int, 1, 2 * len(HELD_OUT_SCENES)),
        default=120,
        help="number of prompts; half of them ask for held-out pairs of shape and color",
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.prompts:
        check_prompts(args.prompts)
    num_drawn = draw_dataset(args.out, args.num_images, args.seed)
    print(f"{args.out}: {counted(num_drawn, 'image')} drawn, {args.num_images - num_drawn} existed already")
    if args.prompts:
        args.prompts.parent.mkdir(parents=True, exist_ok=True)
        prompts = evaluation_prompts(args.num_prompts, args.seed)
        atomic_write(args.prompts, "".join(f"{prompt}\n" for prompt in prompts).encode())
        print(f"{args.prompts}: {counted(args.num_prompts, 'prompt')}")
    return 0


if __name__ == "__main__":
    cli.run(main)
