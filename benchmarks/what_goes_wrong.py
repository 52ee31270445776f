#!/usr/bin/env -S python3 -P
"""Trains one healthy and three broken runs, and makes the pictures in docs/logging.md from their reports.

    ./quickstart.sh && ./benchmarks/what_goes_wrong.py --work /tmp/wrong

Uses data, caches and model of the finished quickstart. Each broken run differs from the healthy run in one setting.
Finished runs are skipped when the script is started again. A run takes two minutes on one CPU core. Needs the test
extra, and Chromium for taking screenshots of the pages that report.py writes.
"""

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

from cachetrain import cli

REPO = Path(__file__).resolve().parent.parent
QUICKSTART = REPO / "quickstart"
MODEL = QUICKSTART / "model_t5"
STEPS, WIDTH = 1000, 980
DEAD_LAYER = "up_blocks.1.attentions.0.transformer_blocks.0.attn2"

# Run -> (settings of train_t5.sh, flags) that differ from those of the healthy run.
RUNS = {
    "healthy": ({}, []),
    "lr_too_high": ({"LR": 5e-2}, []),
    "dead_qk": ({"MODEL": "model_dead_qk"}, []),  # see make_dead_model
    "wrong_vae_scale": ({}, ["--vae_scaling_factor", 0.13025]),  # SDXL's; the tiny VAE's is 0.82702
}
# Picture -> (run to compare with the healthy one, or None; titles of the charts; number of prompts to show).
PICTURES = {
    "healthy": (None, ["Loss", "Validation loss", "Gradient norm, before clipping",
                       "Query and key gradients, each attention layer"], 2),
    "lr_too_high": ("lr_too_high", ["Loss", "Gradient norm, before clipping", "Validation loss",
                                    "Query and key gradients, each attention layer"], 2),
    "dead_qk": ("dead_qk", ["Query and key gradients, each attention layer",
                            "Query and key over value gradients, each attention layer"], 0),
    "wrong_vae_scale": ("wrong_vae_scale", ["Latents: standard deviation by channel", "Validation loss"], 2),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--work", required=True, type=Path, help="directory for the runs; not deleted")
    parser.add_argument("--out", type=Path, help="directory for the pictures; default: docs in this repository")
    args = parser.parse_args(argv)
    args.out = args.out or REPO / "docs"
    return args


def make_dead_model(directory):
    """Copies the model and zeroes query and key weights of DEAD_LAYER, so that neither gets a gradient."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(MODEL, directory, dirs_exist_ok=True)
    path = directory / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    for name in (f"{DEAD_LAYER}.to_q.weight", f"{DEAD_LAYER}.to_k.weight"):
        weights[name].zero_()
    save_file(weights, path, {"format": "pt"})


def train(work, name):
    """Trains one run, unless done."""
    changes, flags = RUNS[name]
    out = work / name
    if (out / f"checkpoint-{STEPS:06d}").exists():
        return
    shutil.rmtree(out, ignore_errors=True)
    settings = {
        "MODEL": MODEL, "DATADIR": QUICKSTART / "shapes", "OUTPUT": out, "LOGDIR": work / "tensorboard",
        "IMGCACHE": ".img_tiny", "TXTCACHE": ".txt_tiny_t5", "BATCH": 16, "STEPS": STEPS, "OPTIMIZER": "adamw",
        "LR": 2e-3, "SCHED": "cosine", "GAMMA": 0, "DROPOUT": 0.1, "EMA": 0.99, "PRECISION": "fp32",
        "SAMPLE_PROMPTS": QUICKSTART / "sample_prompts_t5.txt", "SAMPLE_STEPS": 250, "SAVE_STEPS": STEPS,
        "VAL_SPLIT": 0.02, "OMP_NUM_THREADS": 1,
    }  # fmt: skip
    settings |= {key: work / value if key == "MODEL" else value for key, value in changes.items()}
    common = ["--betas", 0.9, 0.99, "--warmup_steps", 100, "--lr_decay_steps", STEPS, "--sample_cfgs", 1, 3, 7]
    common += ["--cache_in_ram", "--val_steps", 100, "--log_step", 10, "--diagnostic_steps", 100]
    flags = [*common, *flags]
    environment = os.environ | {key: str(value) for key, value in settings.items()}
    subprocess.run([REPO / "train_t5.sh", *map(str, flags)], check=True, env=environment)


def draw(browser, page_path, titles, num_prompts, picture):
    """Saves a screenshot of some charts and of the samples at the last step, from a page of report.py."""
    page = browser.new_page(viewport={"width": WIDTH, "height": 800}, color_scheme="light")
    page.goto(page_path.as_uri())
    page.evaluate(
        """([titles, prompts]) => {
            const all = [...document.querySelectorAll("figure.chart")];
            const charts = titles.map((title) => all.find((node) => node.querySelector("h3").textContent === title));
            const grid = document.createElement("div");
            grid.className = "charts";
            grid.id = "picture";
            grid.style.padding = "16px";
            grid.append(...charts, ...[...document.querySelectorAll(".prompt")].slice(0, prompts));
            document.body.replaceChildren(grid);
            dispatchEvent(new Event("resize"));
        }""",
        [titles, num_prompts],
    )
    page.wait_for_timeout(200)
    data = page.locator("#picture").screenshot()
    page.close()
    Image.open(io.BytesIO(data), formats=["PNG"]).quantize(256).save(
        picture, optimize=True
    )  # a palette: a third of the size


def main(argv=None):
    args = parse_args(argv)
    if not (QUICKSTART / "samples_t5.png").exists():
        raise ValueError(f"{QUICKSTART}: no finished quickstart found; run ./quickstart.sh first")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise ValueError("no chromium, chromium-browser or google-chrome in PATH; install Chromium")
    args.work.mkdir(parents=True, exist_ok=True)
    make_dead_model(args.work / "model_dead_qk")
    for name in RUNS:
        train(args.work, name)

    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for name, (other, titles, num_prompts) in PICTURES.items():
            runs = [args.work / run for run in ("healthy", other) if run]
            page, picture = args.work / f"{name}.html", args.out / f"logging_{name}.png"
            subprocess.run([sys.executable, REPO / "report.py", *runs, "--out", page], check=True)
            draw(browser, page, titles, num_prompts, picture)
            print(picture)
        browser.close()
    return 0


if __name__ == "__main__":
    cli.run(main)
