#!/usr/bin/env -S python3 -P
"""Takes a folder of real images through all tools, caches and a short training, and measures variants and masks.

    npm pack emoji-datasource-twitter@16.0.0 emojilib@4.0.3
    for name in *.tgz; do mkdir "${name%-*}" && tar xzf "$name" -C "${name%-*}"; done
    ./benchmarks/real_folder.py --work /tmp/real_folder --emoji emoji-datasource-twitter --keywords emojilib

The folder holds drawings with transparency, whose tags are in a metadata.jsonl or in kohya's meta_cap.json, with a
second caption of each in a .long.txt, and the photographs of scikit-image, with a .json beside each. The model is the
embedded one with CLIP. The first table has the last line of each tool, the second one has figures as ratios.
The pages of the tools are in --work. Nothing is downloaded. Takes four minutes on one core.
"""

import contextlib
import importlib.util
import io
import json
import os
import shutil
import statistics
import time
from itertools import pairwise
from pathlib import Path

from cachetrain import cli
from cachetrain.reading import read_json

REPO = Path(__file__).resolve().parent.parent
TINY = REPO / "models" / "tiny"
BATCH, WINDOW = 16, 10  # images of a step, steps over which a figure is taken
FOUR = ("--shuffle_tags", 4, "--keep_tags", 1)
# Name -> flags of the trainer; the first is what the others are compared with.
RUNS = {
    "one caption": ("--txtcache_suffix", ".one", "--imgcache_suffix", ".whole"),
    "4 variants": ("--txtcache_suffix", ".four", "--imgcache_suffix", ".whole"),
    "masks": ("--txtcache_suffix", ".one", "--imgcache_suffix", ".masked", "--unmasked_weight", 0.1),
}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--work", required=True, type=Path, help="directory for the folder, caches and runs")
    parser.add_argument("--emoji", required=True, type=Path, help="the unpacked emoji-datasource-twitter")
    parser.add_argument("--keywords", required=True, type=Path, help="the unpacked emojilib")
    parser.add_argument("--num_images", type=cli.positive_int, default=600, help="emoji to use")
    parser.add_argument(
        "--steps", type=cli.Number(int, 4 * WINDOW, 100_000), default=120, help="optimizer steps of each training"
    )
    parser.add_argument("--turns", type=cli.positive_int, default=3, help="how often each figure is measured")
    return parser.parse_args(argv)


def run(name, *argv):
    """Runs a script of this repository in this process; returns (exit code, what it printed, CPU seconds)."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, REPO / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    printed = io.StringIO()
    start = time.process_time()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        code = module.main(list(map(str, argv)))
    return code, printed.getvalue(), time.process_time() - start


def make_folder(args, data):
    """Copies the images, and writes the lists of their captions."""
    package = args.emoji / "package"
    keywords = read_json(args.keywords / "package" / "dist" / "emoji-en-US.json")
    emoji = json.loads((package / "emoji.json").read_text())
    emoji = sorted((entry for entry in emoji if entry["has_img_twitter"]), key=lambda entry: entry["sort_order"])
    emoji = emoji[:: max(1, len(emoji) // args.num_images)][: args.num_images]
    rows, kohya = [], {}
    for place, entry in enumerate(emoji):
        folder = data / ("emoji" if place % 2 else "kohya")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(package / "img" / "twitter" / "64" / entry["image"], folder)
        name, stem = (entry["name"] or entry["short_name"]).lower(), Path(entry["image"]).stem
        characters = "".join(chr(int(code, 16)) for code in entry["unified"].split("-"))
        tags = [entry["category"], *keywords.get(characters, entry["short_names"])]
        (folder / f"{stem}.long.txt").write_text(f"a drawing of {name}\n")
        rows += [{"file_name": entry["image"], "text": ", ".join([name, *tags])}] if place % 2 else []
        kohya |= {} if place % 2 else {stem: {"caption": name, "tags": ", ".join(tags)}}
    (data / "emoji" / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (data / "kohya" / "meta_cap.json").write_text(json.dumps(kohya))
    photographs = Path(importlib.util.find_spec("skimage").submodule_search_locations[0]) / "data"
    (data / "photographs").mkdir()
    for path in [*photographs.glob("*.png"), *photographs.glob("*.jpg")]:
        shutil.copy(path, data / "photographs")
        caption = f"photograph, {path.stem.replace('_', ' ')}"
        (data / "photographs" / f"{path.stem}.json").write_text(json.dumps({"caption": caption}))


def use_tools(args, data, model):
    """Yields (tool, last line that it prints)."""
    root = ("--data_root", data)
    for name, *argv in (
        ("import_captions", data),
        ("check_images", *root, "--html", args.work / "images.html", "--min_side", 64),
        ("check_captions", *root, "--captions", "files", "--tokenizer", model, "--html", args.work / "captions.html"),
        ("count_tags", *root, "--html", args.work / "tags.html"),
        ("edit_tags", *root, "--regex", "--remove", r"[^\w]+.{0,2}", "--rename", "flags?", "flag", "--dedup"),
        ("count_tags", *root, "--words", "--captions", "files"),
    ):
        code, printed, _ = run(f"dataset_scripts/{name}.py", *argv)
        flags = " ".join(str(flag) for flag in argv if str(flag) in ("--words", "--captions", "files"))
        yield f"`{name}.py`{flags and f' `{flags}`'}", f"{printed.splitlines()[-1]} (exit code {code})"


def encode(folder, model, suffix, *options):
    """CPU seconds for caching a folder anew, images or captions."""
    images = suffix in (".whole", ".masked")
    script = "cache/create_img_sdxl.py" if images else "cache/create_clipl.py"
    size = ("--resolution", 64, "--num_workers", 0) if images else ()
    argv = ("--data_root", folder, "--model", model, "--cache_suffix", suffix, "--batch_size", 64, "--overwrite")
    code, printed, seconds = run(script, *argv, *size, *options)
    if code:
        raise ValueError(f"{script} {suffix} failed: {printed[-2000:]}")
    return seconds


def measure_caching(args, data, model):
    """Yields (what, figure, against, ratio); the start of a script, measured on 8 images, is taken off."""
    few = args.work / "few"
    few.mkdir()
    for path in sorted((data / "emoji").glob("*.png"))[:8]:
        for source in (path, path.with_suffix(".txt"), path.with_suffix(".long.txt")):
            shutil.copy(source, few)
    kinds = {".one": (), ".four": FOUR, ".whole": (), ".masked": ("--mask", "alpha")}
    best = dict.fromkeys(kinds, (float("inf"), float("inf")))
    for _ in range(args.turns):
        for suffix, options in kinds.items():
            measured = (encode(folder, model, suffix, *options) for folder in (data, few))
            best[suffix] = tuple(map(min, best[suffix], measured))
    seconds = {suffix: whole - start for suffix, (whole, start) in best.items()}
    size = {suffix: sum(path.stat().st_size for path in data.rglob(f"*{suffix}")) for suffix in kinds}
    for what, new, old in (("4 variants", ".four", ".one"), ("masks", ".masked", ".whole")):
        against = "one caption" if old == ".one" else "without"
        ratio = seconds[new] / seconds[old]
        yield f"caching: {what}", f"{seconds[new]:.1f} s of CPU", f"{against} {seconds[old]:.1f} s", ratio
        yield (
            f"size: {what}",
            f"{size[new] / 1e6:.1f} MB",
            f"{against} {size[old] / 1e6:.1f} MB",
            size[new] / size[old],
        )


def train(args, data, model, name):
    """Trains; returns (CPU ms per visit of an image, sidecars read per visit, last metrics)."""
    from cachetrain.data import dataset, index

    reads, visits = [], []
    read, visit = index.read_verified, dataset.CachedPairs.__getitem__
    index.read_verified = lambda *argv, **options: reads.append(1) or read(*argv, **options)
    dataset.CachedPairs.__getitem__ = lambda self, key: visits.append(time.process_time()) or visit(self, key)
    out = args.work / "run"
    shutil.rmtree(out, ignore_errors=True)
    argv = ["--train_data_dir", data, "--model", model, "--output_dir", out, "--logdir", args.work / "tb"]
    argv += ["--batch_size", BATCH, "--max_steps", args.steps, "--log_step", WINDOW, "--lr", 1e-3]
    try:
        run("train_from_cached.py", *argv, "--num_workers", 0, "--precision", "fp32", "--device", "cpu", *RUNS[name])
    finally:
        index.read_verified, dataset.CachedPairs.__getitem__ = read, visit
    windows = visits[:: BATCH * WINDOW][1:]  # the first one starts with the setup
    cpu_s = statistics.median(end - start for start, end in pairwise(windows)) / (BATCH * WINDOW)
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    return 1000 * cpu_s, len(reads) / len(visits), last


def measure_training(args, data, model):
    """Yields (what, figure, against, ratio)."""
    best, reads, last = dict.fromkeys(RUNS, float("inf")), {}, {}
    for _ in range(args.turns):
        for name in RUNS:
            cpu_ms, reads[name], last[name] = train(args, data, model, name)
            best[name] = min(best[name], cpu_ms)
    first, *others = RUNS
    for name in others:
        against = f"{first} {best[first]:.2f} ms"
        yield f"training: {name}", f"{best[name]:.2f} ms of CPU per image", against, best[name] / best[first]
    against = f"{first} {reads[first]:.2f}"
    yield (
        "files read per visit: 4 variants",
        f"{reads['4 variants']:.2f}",
        against,
        reads["4 variants"] / reads[first],
    )
    loss, raw = (last["masks"][f"01_Training/{tag}"] for tag in ("loss", "loss_raw"))
    share = last["masks"]["01_Training/mask_share"]
    yield f"loss with masks, which leave {share:.0%} white", f"{loss:.3f}", f"without {raw:.3f}", loss / raw


def main(argv=None):
    args = parse_args(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # fastest for the tiny model
    if args.work.exists() and any(args.work.iterdir()):
        raise ValueError(f"--work {args.work}: is not empty; choose another directory")
    data, model = args.work / "data", args.work / "model"
    make_folder(args, data)
    parts = ("--unet", TINY / "unet", "--vae", TINY / "vae", "--clip", TINY / "clip")
    run("models/compose_sd.py", *parts, "--objective", "flow", "--out", model)
    print("| tool | last line |\n|---|---|")
    for tool, line in use_tools(args, data, model):
        print(f"| {tool} | {line} |", flush=True)
    print("\n| what | figure | against | ratio |\n|---|---|---|---|")
    for measure in (measure_caching, measure_training):
        for *cells, ratio in measure(args, data, model):
            print(f"| {' | '.join(cells)} | {ratio:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    cli.run(main)
