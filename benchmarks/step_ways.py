#!/usr/bin/env -S python3 -P
"""Measures steps of the training loop with SDXL's UNet at 1024x1024, with gradient release, and with adapters.

    ./benchmarks/step_ways.py --work /tmp/step_ways

Each way is a run of train_from_cached.py with random weights, on caches of random numbers, in a separate process. The
first way of a UNet is what the others are compared with. Peak memory, which is counted on a GPU only, is compared
with the estimate that the run prints at its start. Checkpoints are not written. Needs a GPU with 48 GB and 10 GB of
disk. --tiny measures the embedded UNets at 64x64 instead, on any device.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from cachetrain import cli

REPO = Path(__file__).resolve().parent.parent
sys.path.append(str(REPO / "benchmarks"))

from real_size import SDXL_UNET  # noqa: E402
from train_throughput import whole_loop, write  # noqa: E402

TINY = REPO / "models" / "tiny"
LION = "--precision bf16_pure --optimizer lion --gradient_checkpointing"
LORA = "--precision bf16 --lora_rank 16 --lr 1e-4"


class Unet(NamedTuple):
    """A UNet to train.

    Attributes:
        config: of diffusers; what is left out has the value of SD1.5's.
        tiny: folder in models/tiny of the UNet that --tiny trains in its place.
        side: of its images, in pixels.
        batch_size: of all its ways.
        ways: {what a row says: flags of the trainer}.
    """

    config: dict
    tiny: str
    side: int
    batch_size: int
    ways: dict[str, str]


UNETS = {
    "sdxl": Unet(SDXL_UNET, "sdxl_unet", 1024, 2, {
        "bf16_pure, lion": f"{LION} --gradient_clip 0",
        "bf16_pure, lion, release": f"{LION} --gradient_release",
        "LoRA, attention": f"{LORA} --gradient_checkpointing",
        "LoRA, all": f"{LORA} --gradient_checkpointing --lora_targets all",
    }),
    "sd15": Unet({"sample_size": 64, "cross_attention_dim": 768}, "unet", 512, 8, {
        "bf16, adamw": "--precision bf16",
        "LoRA, attention": LORA,
        "DoRA, attention": f"{LORA} --dora",
        "LoRA, all": f"{LORA} --lora_targets all",
    }),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--work", required=True, type=Path, help="directory for models, caches and runs; not deleted")
    parser.add_argument("--unets", nargs="+", choices=UNETS, default=list(UNETS), help="UNets to train")
    parser.add_argument("--tiny", action="store_true", help="train the embedded UNets instead, batch 2")
    parser.add_argument("--device", help="torch device; default: cuda if there is one, else cpu")
    parser.add_argument("--windows", type=cli.positive_int, default=2, help="number of timed windows of a way")
    parser.add_argument("--window_steps", type=cli.positive_int, default=5, help="steps of a window")
    # The script calls itself with this flag, to measure one way in a separate process.
    parser.add_argument(
        "--way", choices={way for unet in UNETS.values() for way in unet.ways}, help=argparse.SUPPRESS
    )
    return parser.parse_args(argv)


def make_inputs(work, config, side):
    """Writes a UNet of random bfloat16 weights and 32 pairs of caches of random numbers, unless they exist.

    Returns:
        (model directory, data directory, trainer flags with the cache suffixes).
    """
    import torch
    from diffusers import UNet2DConditionModel

    from cachetrain.modeling import load

    model, data, done = work / "model", work / "data", work / "complete"
    pooled = load.pooled_width(config)
    kind, latents = "txt_sdxl" if pooled else "txt_clipl", side // 8
    flags = ["--imgcache_suffix", ".img_sdxl", "--txtcache_suffix", f".{kind}"]
    if done.exists():
        return model, data, flags
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        UNet2DConditionModel.from_config(config).bfloat16().save_pretrained(model / "unet")
    data.mkdir(parents=True, exist_ok=True)
    numbers = {"scaling_factor": "0.13025", "shift_factor": "0.0", "width": str(side), "height": str(side)}
    numbers |= {"original_width": str(side), "original_height": str(side), "crop_box": f"0,0,{side},{side}"}
    for name in (*(f"{number:02}" for number in range(32)), "_null_caption"):
        texts = {"emb": torch.randn(77, load.text_width(config)).bfloat16()}
        texts |= {"pooled": torch.randn(pooled).bfloat16()} if pooled else {}
        write(data / f"{name}.{kind}", texts, kind)
        if name[0] != "_":
            latent = {"latent": torch.randn(4, latents, latents).half()}
            write(data / f"{name}.img_sdxl", latent, "img_sdxl", **numbers)
    done.touch()
    return model, data, flags


def measure(args, name):
    """Runs a way in this process; whole_loop prints its measurements."""
    from diffusers import UNet2DConditionModel

    unet, work = UNETS[name], args.work / (f"tiny_{name}" if args.tiny else name)
    config = UNet2DConditionModel.load_config(TINY / unet.tiny) if args.tiny else unet.config
    model, data, flags = make_inputs(work, config, 64 if args.tiny else unet.side)
    settings = SimpleNamespace(
        batch_size=2 if args.tiny else unet.batch_size, windows=args.windows, window_steps=args.window_steps,
        device=args.device, precisions=["bf16"], modes=["eager"], tiny=False,
    )  # fmt: skip
    whole_loop(settings, work, model, data, [*flags, *unet.ways[args.way].split()])


def run_way(args, name, way):
    """Measures a way in a separate process; returns (its measurements, estimate of memory or "", None), or (None,
    "", why there are none)."""
    command = [__file__, "--work", args.work, "--unets", name, "--windows", args.windows, "--way", way]
    command += ["--window_steps", args.window_steps, *(["--tiny"] if args.tiny else [])]
    command += ["--device", args.device] if args.device else []
    done = subprocess.run([sys.executable, "-P", *map(str, command)], text=True, capture_output=True)
    if done.returncode:
        return None, "", "out of memory" if "out of memory" in done.stderr else done.stderr.strip()[-300:]
    estimate = re.search(r"^memory: about ([\d.]+ [GM]iB)", done.stdout, re.MULTILINE)
    return json.loads(done.stdout.splitlines()[-1]), estimate[1] if estimate else "", None


def rows(args, name):
    """Yields the rows of a UNet: (what, figure, against, ratio or "")."""
    first, unet = None, UNETS[name]
    batch_size, side = (2, 64) if args.tiny else (unet.batch_size, unet.side)
    for way in unet.ways:
        label = f"{'tiny ' * args.tiny}{name} at {side}, batch {batch_size}, {way}"
        measured, estimate, error = run_way(args, name, way)
        if error:
            yield label, f"failed: {' '.join(error.split())}", "", ""
            continue
        step_s = statistics.median(measured["wall"])
        against, ratio = (f"{1e3 * first:.1f} ms", f"{step_s / first:.3f}") if first else ("", "")
        first = first or (step_s if way == next(iter(unet.ways)) else None)
        yield label, f"{1e3 * step_s:.1f} ms per step, {batch_size / step_s:.2f} images/s", against, ratio
        if measured["gib"]:
            number, unit = estimate.split() if estimate else ("0", "GiB")
            gib = float(number) / (1024 if unit == "MiB" else 1)
            ratio = f"{measured['gib'] / gib:.3f}" if gib else ""
            yield f"{label}: peak memory", f"{measured['gib']:.2f} GiB", f"estimate {estimate}", ratio


def main(argv=None):
    args = parse_args(argv)
    if args.way:
        measure(args, args.unets[0])
        return 0
    args.work.mkdir(parents=True, exist_ok=True)
    print("| what | figure | against | ratio | wanted |\n|---|---|---|---|---|", flush=True)
    for name in args.unets:
        for what, figure, against, ratio in rows(args, name):
            print(f"| {what} | {figure} | {against} | {ratio} | |", flush=True)
    return 0


if __name__ == "__main__":
    cli.run(main)
