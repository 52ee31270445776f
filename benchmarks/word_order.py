#!/usr/bin/env -S python3 -P
"""Trains the quickstart's model on captions in one order of words and in four, and scores prompts in all orders.

    ./benchmarks/word_order.py --work /tmp/word_order

A caption has three groups of words: shape, place and background. One run sees them in this order only. Another one
draws at each visit one of four variants, which are cached with `--captions files lines`: three more orders are in a
second caption file of each image. The remaining two orders are trained by neither. Data, steps and settings are those
of prompt_following.py, and equal for both. Finished runs are skipped when the script is started again. Each takes six
minutes on one CPU core.
"""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

from PIL import Image

from cachetrain import cli
from cachetrain.log import counted

REPO = Path(__file__).resolve().parent.parent
sys.path += [str(REPO / "benchmarks"), str(REPO / "dataset_scripts")]

from draw_shapes import evaluation_prompts, parse_caption  # noqa: E402
from prompt_following import TINY, script, train  # noqa: E402
from score_shapes import judge, percent  # noqa: E402

# Places in (shape, place, background). In the trained ones, each group stands in each place.
TRAINED_ORDERS = ((0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1))
OTHER_ORDERS = ((1, 0, 2), (2, 1, 0))
ORDERS = (*TRAINED_ORDERS, *OTHER_ORDERS)
KINDS = {"the trained order": ORDERS[:1], "3 more orders": ORDERS[1:4], "2 orders never trained": OTHER_ORDERS}
# Number of variants -> flags of the trainer; each of the four orders is drawn equally often.
VARIANTS = {1: (), 4: ("--caption_weights", ".orders.txt:3")}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--work", required=True, type=Path, help="directory for data, models and runs; not deleted")
    parser.add_argument("--steps", type=cli.positive_int, default=3200, help="optimizer steps of each run")
    parser.add_argument("--num_images", type=cli.positive_int, default=6000, help="training images")
    parser.add_argument("--num_prompts", type=cli.positive_int, default=120, help="prompts, each in all six orders")
    parser.add_argument("--seeds", type=cli.seed, nargs="+", default=[0], help="seeds of training")
    return parser.parse_args(argv)


def reordered(caption, order):
    """A caption of draw_shapes.py with its three groups of words in another order."""
    scene = parse_caption(caption)
    groups = (f"a {scene.size} {scene.color} {scene.shape}", scene.place, f"on a {scene.background} background")
    return " ".join(groups[place] for place in order)


def prepare(args):
    """Draws the data, writes the captions in other orders and the prompts, and caches, unless done."""
    if (args.work / "prepared").exists():
        return
    data, model = args.work / "data", args.work / "model_t5"
    script("dataset_scripts/draw_shapes.py", "--out", data, "--num_images", args.num_images)
    for path in list(data.glob("[0-9]*.txt")):
        lines = [f"{reordered(path.read_text(), order)}\n" for order in TRAINED_ORDERS[1:]]
        path.with_suffix(".orders.txt").write_text("".join(lines))
    texts = [reordered(prompt, order) for order in ORDERS for prompt in evaluation_prompts(args.num_prompts, 0)]
    (args.work / "prompts.txt").write_text("".join(f"{text}\n" for text in texts))
    parts = ["--unet", TINY / "unet", "--vae", TINY / "vae", "--t5", TINY / "t5"]
    script("models/compose_t5_sd.py", *parts, "--out", model, "--overwrite", "--objective", "flow")
    script("cache/create_img_sdxl.py", "--data_root", data, "--model", model, "--resolution", 64)
    for number, options in ((1, ()), (4, ("--captions", "files", "lines"))):
        shared = ["--data_root", data, "--model", model, "--batch_size", 64, "--cache_suffix", f".txt_{number}"]
        script("cache/create_t5cache_768.py", *shared, *options)
    (args.work / "prepared").touch()


def score(args, variants, seed):
    """Trains, samples and scores one run, unless done; returns {kind of order: percent of pictures all right}."""
    out = args.work / f"{variants}-seed{seed}-s{args.steps}"
    result = out / "score.json"
    if result.exists():
        return json.loads(result.read_text())
    subprocess.run(["rm", "-rf", out], check=True)
    settings = {"OBJECTIVE": "flow", "GAMMA": 0, "PRECISION": "fp32", "TXTCACHE": f".txt_{variants}"}
    train(args, "t5", out, *VARIANTS[variants], "--seed", seed, **settings)
    sampling = ["--model", out / f"checkpoint-{args.steps:06d}", "--prompts", args.work / "prompts.txt"]
    script("sample.py", *sampling, "--out", out / "drawn", "--cfgs", 3, "--batch_size", 60)
    captions = evaluation_prompts(args.num_prompts, 0)
    originals = {reordered(caption, order): (order, caption) for order in ORDERS for caption in captions}
    right = {order: [] for order in ORDERS}
    for path in sorted((out / "drawn").rglob("*.png")):
        with Image.open(path, formats=["PNG"]) as image:
            order, caption = originals[image.info["prompt"]]
            right[order].append(judge(path, image, caption).followed)
    scores = {kind: percent([flag for order in orders for flag in right[order]]) for kind, orders in KINDS.items()}
    result.write_text(json.dumps(scores))
    return scores


def main(argv=None):
    args = parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    prepare(args)
    print(f"pictures with all five attributes right, after {counted(args.steps, 'step')}\n")
    print(f"| captions | seed | {' | '.join(KINDS)} |\n|---|---|{'---|' * len(KINDS)}")
    for seed, variants in product(args.seeds, VARIANTS):
        scores = score(args, variants, seed)
        cells = " | ".join(f"{scores[kind]:.0f}%" for kind in KINDS)
        print(f"| {counted(variants, 'order')} | {seed} | {cells} |", flush=True)
    return 0


if __name__ == "__main__":
    cli.run(main)
