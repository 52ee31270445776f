#!/usr/bin/env -S python3 -P
"""Trains the quickstart's model with every objective, text encoder and precision, and scores prompt following.

    ./benchmarks/prompt_following.py --work /tmp/prompt_following

All runs have the same data, steps and settings: those of the quickstart, except that epsilon uses Min-SNR. A picture
counts as right if background, color, shape, place and size are all right. Half of the prompts ask for a pair of
shape and color that was held out of training. Finished runs are skipped when the script is started again. There are
18 runs; each takes six minutes on one CPU core. The CPU time of training is printed, to compare --optimizer.
"""

import json
import os
import resource
import subprocess
import sys
from itertools import product
from pathlib import Path

from cachetrain import cli

REPO = Path(__file__).resolve().parent.parent
TINY = REPO / "models" / "tiny"
FLAVOURS, PRECISIONS = ("t5", "sd"), ("fp32", "bf16", "bf16_pure")
# Gamma of Min-SNR; 0: off. Epsilon's plain loss gives little weight to high noise, which determines the background.
OBJECTIVES = {"epsilon": 5, "v_prediction": 0, "flow": 0}
BETAS = {"adamw": (0.9, 0.99), "muon": (0.95, 0.99)}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--work", required=True, type=Path, help="directory for data, models and runs; not deleted")
    parser.add_argument("--steps", type=cli.positive_int, default=3200, help="optimizer steps of each run")
    parser.add_argument("--num_images", type=cli.positive_int, default=6000, help="training images")
    for name, choices in (("flavours", FLAVOURS), ("objectives", OBJECTIVES), ("precisions", PRECISIONS)):
        parser.add_argument(f"--{name}", nargs="+", choices=choices, default=list(choices), help="run only these")
    parser.add_argument("--optimizer", choices=BETAS, default="adamw", help="of all runs")
    parser.add_argument("--seed", type=cli.seed, default=0, help="of the trainings")
    return parser.parse_args(argv)


def script(name, *argv, **environment):
    """Runs a script of this repository on one thread, which is fastest for the tiny model."""
    command = [sys.executable, REPO / name, *argv] if name.endswith(".py") else [REPO / name, *argv]
    settings = {key: str(value) for key, value in environment.items()} | {"OMP_NUM_THREADS": "1"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "VIRTUAL_ENV": sys.prefix} | settings
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    if done.returncode:
        raise ValueError(f"{name} failed with exit code {done.returncode}: {done.stderr[-2000:]}")


def prepare(args):
    """Draws the data, composes the models and caches with both text encoders, unless done."""
    data = args.work / "data"
    if (args.work / "prepared").exists():
        return
    drawn = ["--out", data, "--num_images", args.num_images]
    script("dataset_scripts/draw_shapes.py", *drawn, "--prompts", args.work / "prompts.txt", "--num_prompts", 120)
    for flavour, cache, encoder in (("t5", "create_t5cache_768.py", "t5"), ("sd", "create_clipl.py", "clip")):
        model = args.work / f"model_{flavour}"
        compose = "models/compose_t5_sd.py" if flavour == "t5" else "models/compose_sd.py"
        parts = ["--unet", TINY / "unet", "--vae", TINY / "vae", f"--{encoder}", TINY / encoder]
        script(compose, *parts, "--out", model, "--overwrite")
        script(f"cache/{cache}", "--data_root", data, "--model", model, "--batch_size", 64)
    script("cache/create_img_sdxl.py", "--data_root", data, "--model", model, "--resolution", 64)
    (args.work / "prepared").touch()


def train(args, flavour, out, *flags, **environment):
    """Trains with the settings of the quickstart; `environment` are variables of the shell script."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    settings = {
        "MODEL": args.work / f"model_{flavour}",
        "DATADIR": args.work / "data",
        "OUTPUT": out,
        "LOGDIR": args.work / "logs",
        "IMGCACHE": ".img_sdxl",
        "BATCH": 16,
        "STEPS": args.steps,
        "OPTIMIZER": "adamw",
        "LR": 2e-3,
        "SCHED": "cosine",
        "DROPOUT": 0.1,
        "EMA": 0.99,
    }
    fixed = ["--betas", 0.9, 0.99, "--warmup_steps", 100, "--lr_decay_steps", args.steps]
    script(f"train_{flavour}.sh", *fixed, *flags, **settings | environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"trained in {after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime:.0f} CPU-s", flush=True)


def score(args, flavour, objective, precision):
    """Trains, samples and scores one combination, unless done; returns the JSON of score_shapes.py."""
    gamma = OBJECTIVES[objective]
    out = args.work / f"{flavour}-{objective}-{precision}-g{gamma}-s{args.steps}-{args.optimizer}-{args.seed}"
    result = out / "score.json"
    if result.exists():
        return json.loads(result.read_text())
    subprocess.run(["rm", "-rf", out], check=True)
    settings = {"OBJECTIVE": objective, "GAMMA": gamma, "PRECISION": precision, "OPTIMIZER": args.optimizer}
    train(args, flavour, out, "--betas", *BETAS[args.optimizer], "--seed", args.seed, **settings)
    sampling = ["--model", out / f"checkpoint-{args.steps:06d}", "--prompts", args.work / "prompts.txt"]
    sampling += ["--out", out / "drawn", "--cfgs", 3, "--batch_size", 60]
    script("sample.py", *sampling)
    script("dataset_scripts/score_shapes.py", out / "drawn", "--json", result)
    return json.loads(result.read_text())


def main(argv=None):
    args = parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    prepare(args)
    rows = []
    for precision, flavour, objective in product(args.precisions, args.flavours, args.objectives):
        pairs = score(args, flavour, objective, precision)
        rows.append((flavour, objective, precision, *(pairs[half]["all"] for half in ("trained", "held_out"))))
        print("{:4}{:14}{:11}{:5.0f}%{:5.0f}%".format(*rows[-1]), flush=True)
    print(
        f"\n{args.steps} steps: trained pairs / held-out pairs, all five attributes right\n\n| | "
        + " | ".join(f"{f} {o}" for f, o in product(args.flavours, args.objectives))
        + " |\n|---|"
        + "---|" * len(args.flavours) * len(args.objectives)
    )
    for precision in args.precisions:
        cells = [f"{trained:.0f} / {held:.0f}" for *_, p, trained, held in rows if p == precision]
        print(f"| {precision} | " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    cli.run(main)
