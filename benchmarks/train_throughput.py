#!/usr/bin/env -S python3 -P
"""Measures the training loop against a bare loop: the same step on one resident batch, without loader and logging.

    ./benchmarks/train_throughput.py --work /tmp/train_throughput
    ./benchmarks/train_throughput.py --work /tmp/train_throughput --unet sd15 --memory_gib 24

The whole loop is train_from_cached.py with default logging, on caches of random numbers. The bare loop has the same
model, optimizer, precision, clipping and EMA. The loops run alternately, each in a separate process, and are timed in
windows from one log step to the next. Ratios compare medians of wall time and of the process's CPU time (all threads,
without the loader's workers). CPU time is more reliable on a shared machine; on a GPU only wall time is compared. The
last column is the project's target. Rows are printed as they are measured.

--unet tiny: the quickstart's model with T5 and the quickstart's settings for a CPU (batch 16, float32, one thread,
EMA). Takes about twenty minutes on two cores.

--unet sd15: SD1.5's UNet with random weights, CLIP embeddings, 512x512, the trainer's defaults. Needs a GPU with
141 GB at batch 64, or with 80 GB at --batch_size 48, and 5 GB of disk.

On a GPU, waits of the host for the device outside log steps are counted (torch.cuda.set_sync_debug_mode), and
--memory_gib finds the largest batch that fits on a card of that size.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

from cachetrain import cli

REPO = Path(__file__).resolve().parent.parent
MLPERF_H200 = 128.3  # images/s per GPU of SD2's UNet on eight GPUs, MLPerf training v4.0
# As set by quickstart.sh for the tiny model on a CPU.
CPU_ENV = {"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
SPEED_TAGS = ("data_wait_fraction", "mfu")
QUICKSTART = "--lr 2e-3 --scheduler cosine --betas 0.9 0.99 --cond_dropout 0.1 --cache_in_ram".split()


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--work", required=True, help="directory for models, caches and runs; not deleted")
    parser.add_argument("--unet", choices=("tiny", "sd15"), default="tiny", help="model to train, see above")
    parser.add_argument("--device", help="torch device; default: cuda if there is one, else cpu")
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=("fp32", "bf16", "bf16_pure"),
        help="precisions to measure; default: all for tiny, bf16 and bf16_pure for sd15",
    )
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=("eager", "compiled"),
        default=("eager", "compiled"),
        help="measure with and without torch.compile",
    )
    parser.add_argument(
        "--batch_size", type=cli.batch_size, help="samples per step; default: 16 for tiny, 64 for sd15"
    )
    parser.add_argument("--windows", type=cli.positive_int, default=4, help="number of timed windows per turn")
    parser.add_argument(
        "--window_steps", type=cli.positive_int, default=25, help="steps from one log step to the next; a window"
    )
    parser.add_argument("--turns", type=cli.positive_int, default=3, help="how often each loop runs")
    parser.add_argument(
        "--plain",
        action="store_true",
        help="also compare with a loop set up like the training scripts of diffusers: float32 weights, bfloat16 "
        "autocast, torch's default AdamW, NCHW, eager",
    )
    parser.add_argument(
        "--memory_gib",
        type=cli.positive_float,
        help="also find the largest batch size that fits into this much GPU memory, in GiB",
    )
    # The script calls itself with this flag, to measure one loop in a separate process.
    parser.add_argument("--loop", choices=("whole", "bare", "plain"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.tiny = args.unet == "tiny"
    args.precisions = args.precisions or (["fp32", "bf16", "bf16_pure"] if args.tiny else ["bf16", "bf16_pure"])
    args.batch_size = args.batch_size or (16 if args.tiny else 64)
    return args


# Models and caches


def make_inputs(work, tiny):
    """Writes a UNet and caches of random numbers, unless they exist; all captions have the same padded length.

    Returns:
        (model directory, data directory, trainer flags with the cache suffixes).
    """
    model, data, done = work / "unet", work / "data", work / "complete"
    kind, tokens, width, side = ("txt_t5cache", 16, 64, 8) if tiny else ("txt_clipl", 77, 768, 64)
    flags = ["--imgcache_suffix", ".img_sdvae", "--txtcache_suffix", f".{kind}"]
    if done.exists():
        return model, data, flags

    import torch
    from diffusers import UNet2DConditionModel

    from cachetrain.modeling import load

    config = UNet2DConditionModel.load_config(REPO / "models" / "tiny" / "unet") if tiny else {}
    config |= {} if tiny else {"sample_size": 64, "cross_attention_dim": 768}
    load.fresh_unet(config, seed=0).save_pretrained(model / "unet")
    data.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for number in range(1024):
        latent = torch.randn(4, side, side, generator=generator).half() / 0.18215
        write(
            data / f"{number:04}.img_sdvae",
            {"latent": latent},
            "img_sdvae",
            scaling_factor="0.18215",
            shift_factor="0.0",
        )
        length = tokens - number % 8 if tiny else tokens
        write(data / f"{number:04}.{kind}", {"emb": torch.randn(length, width, generator=generator).bfloat16()}, kind)
    write(data / f"_null_caption.{kind}", {"emb": torch.randn(length, width, generator=generator).bfloat16()}, kind)
    done.touch()
    return model, data, flags


def write(path, tensors, kind, **more):
    from cachetrain.data.sidecar import write_sidecar

    write_sidecar(path, tensors, {"kind": kind, "encoder": "0" * 64, "settings": "{}", **more})


# The loops. Each prints its measurements as JSON.


class Clock:
    """Records wall time and CPU time at the end of each window, after waiting for the device."""

    def __init__(self, device, window_steps):
        self.device = device
        self.window_steps = window_steps
        self.marks = []

    def mark(self):
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.marks.append((time.perf_counter(), time.process_time()))

    def result(self, **more):
        """Prints the seconds per step of each window, without the first steps, which include start-up and
        compilation, and the peak of GPU memory in GiB (0 on the CPU)."""
        import torch

        pairs = list(zip(self.marks[1:], self.marks[2:], strict=False))
        wall, cpu = ([(b[i] - a[i]) / self.window_steps for a, b in pairs] for i in (0, 1))
        gib = torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else 0.0
        print(json.dumps({"wall": wall, "cpu": cpu, "gib": gib, **more}))


def trainer_flags(args, work, model, data, steps):
    flags = ["--model", model, "--train_data_dir", data, "--output_dir", work / f"run-{time.time_ns()}"]
    flags += ["--logdir", work / "tensorboard", "--batch_size", args.batch_size, "--max_steps", steps]
    flags += ["--log_step", args.window_steps]
    flags += ["--precision", args.precisions[0], "--objective", "flow"]
    flags += [*QUICKSTART, "--ema_decay", 0.99] if args.tiny else []
    flags += ["--device", args.device] if args.device else []
    return [*map(str, flags), *(["--compile"] if args.modes[0] == "compiled" else [])]


def whole_loop(args, work, model, data, flags):
    """Runs train_from_cached.py in this process, with a mark after each log step."""
    import importlib.util

    import torch

    from cachetrain.checkpoints.save import Saving
    from cachetrain.modeling import load
    from cachetrain.training.logs.run_logs import Logs

    spec = importlib.util.spec_from_file_location("train_from_cached", REPO / "train_from_cached.py")
    trainer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(trainer)
    clock, waits, logged = Clock(load.pick_device(args.device), args.window_steps), Waits(), []
    write_logs = Logs.write

    def write_and_mark(self, step, *rest):
        with waits.allowed():
            tags = write_logs(self, step, *rest)
            clock.mark()
        if step > args.window_steps:
            logged.append(tags)
        return tags

    Logs.write = write_and_mark
    Saving.save = lambda *_: None  # the one after the last step, of 10 GB; save_stall.py measures saves
    steps = args.window_steps * (args.windows + 1)
    with waits.counted(clock.device):
        trainer.main([*trainer_flags(args, work, model, data, steps), *flags])
    cuda = clock.device.type == "cuda"
    mean = {tag: statistics.mean(tags.get(f"05_Performance/{tag}", 0) for tags in logged) for tag in SPEED_TAGS}
    clock.result(
        **mean,
        waits=waits.count if cuda else None,
        device=torch.cuda.get_device_name(clock.device) if cuda else "cpu",
    )


class Waits:
    """Counts how often the host waits for a CUDA device, from the first log step, without log steps."""

    def __init__(self):
        self.count = 0
        self._counting = False

    @contextmanager
    def counted(self, device):
        import torch

        def show(message, *_, **__):
            self.count += "called a synchronizing" in str(message)

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            self._counting, warnings.showwarning = device.type == "cuda", show
            yield
            if self._counting:
                torch.cuda.set_sync_debug_mode("default")

    @contextmanager
    def allowed(self):
        """Context of a log step, where waits are not counted; counting starts after the first one."""
        import torch

        if self._counting:
            torch.cuda.set_sync_debug_mode("default")
        yield
        if self._counting:
            torch.cuda.set_sync_debug_mode("warn")


def bare_loop(args, work, model, data, flags):
    """Runs the same step on one resident batch; --loop plain: set up like the training scripts of diffusers."""
    import torch

    from cachetrain.modeling import load
    from cachetrain.modeling.conditioning import predict
    from cachetrain.modeling.precision import autocast_for
    from cachetrain.training.optim import make_optimizer

    plain = args.loop == "plain"
    precision = "bf16" if plain else args.precisions[0]
    device = load.pick_device(args.device)
    unet = load.load_unet(model / "unet", torch.bfloat16 if precision == "bf16_pure" else torch.float32)
    if plain or device.type == "cpu":
        unet.to(device)
    else:
        unet.to(device, memory_format=torch.channels_last)
    if args.modes[0] == "compiled" and not plain:
        unet.compile(fullgraph=True, dynamic=False)
    parameters = list(unet.parameters())
    if plain:
        optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    else:
        optimizer = make_optimizer("adamw", parameters, 1e-5, (0.9, 0.99), 0.01)
    averages = [p.detach().float().clone() for p in parameters] if args.tiny and not plain else []
    autocast, batch = autocast_for(device, precision), resident_batch(args, data, flags, device)
    latents, noise, hidden, mask, timesteps = batch
    # The trainer's call, so that the loops share compiled graphs.
    texts = {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}
    clock = Clock(device, args.window_steps)
    for step in range(args.window_steps * (args.windows + 1)):
        sigma = (timesteps / 1000)[:, None, None, None]
        noisy = (1 - sigma) * latents + sigma * noise
        with autocast():
            output = predict(unet, noisy.to(unet.dtype), timesteps, texts)
        (output.float() - (noise - latents)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            if averages and parameters[0].dtype == torch.float32:
                torch._foreach_lerp_(averages, parameters, 0.01)
            elif averages:
                for average, parameter in zip(averages, parameters, strict=True):
                    average.lerp_(parameter.float(), 0.01)
        if step == 0 or (step + 1) % args.window_steps == 0:
            clock.mark()
    clock.result()


def resident_batch(args, data, flags, device):
    """Returns a batch: latents, noise, encoder_hidden_states, encoder_attention_mask (or None), timesteps."""
    import torch

    from cachetrain.data.sidecar import read_sidecar
    from cachetrain.modeling.t5_pipeline import pad_embeddings

    stems = [data / f"{number % 1024:04}" for number in range(args.batch_size)]
    latents = torch.stack([read_sidecar(s.with_suffix(".img_sdvae"))[0]["latent"].float() * 0.18215 for s in stems])
    embeddings = [read_sidecar(stem.with_suffix(flags[-1]))[0]["emb"] for stem in stems]
    hidden, mask = pad_embeddings(embeddings) if args.tiny else (torch.stack(embeddings), None)
    timesteps = torch.arange(args.batch_size) * (1000 / args.batch_size)
    hidden = hidden if args.precisions[0].startswith("bf16") else hidden.float()
    batch = (latents, torch.randn_like(latents), hidden, mask, timesteps)
    return [part if part is None else part.to(device) for part in batch]


# Measuring


def run_loop(args, loop, precision, mode, batch_size, windows=None, memory_gib=None):
    """Runs one loop in a separate process; returns its measurements, or None if memory ran out."""
    command = [__file__, "--work", args.work, "--unet", args.unet, "--loop", loop, "--precisions", precision]
    command += ["--modes", mode, "--batch_size", batch_size, "--windows", windows or args.windows]
    command += ["--window_steps", args.window_steps]
    command += ["--device", args.device] if args.device else []
    command += ["--memory_gib", memory_gib] if memory_gib else []
    env = os.environ | (CPU_ENV if args.tiny else {})
    done = subprocess.run([sys.executable, *map(str, command)], env=env, text=True, capture_output=True)
    if done.returncode:
        if "out of memory" in done.stderr:
            return None
        raise ValueError(f"--loop {loop} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def in_turns(args, loops, precision, mode, batch_size):
    """Runs the loops alternately; returns {loop: measurements of all turns}."""
    results = {}
    for _ in range(args.turns):
        for loop in loops:
            measured = run_loop(args, loop, precision, mode, batch_size)
            if measured is None:
                raise ValueError(
                    f"--loop {loop} ran out of memory with --batch_size {batch_size}; pass a smaller --batch_size"
                )
            combined = results.setdefault(loop, measured | {"wall": [], "cpu": []})
            for key in ("wall", "cpu"):
                combined[key] += measured[key]
            print(
                f"{precision} {mode} {loop}: " + " ".join(f"{1e3 * s:.1f}" for s in measured["wall"]) + " ms",
                file=sys.stderr,
            )
    return results


def compare(args, precision, mode, batch_size):
    """Yields the rows for one precision, mode and batch size: (what, figure, against, ratio or None, wanted)."""
    label = f"{args.unet} training, {precision}, {mode}, batch {batch_size}"
    results = in_turns(args, ["whole", "bare", *(["plain"] if args.plain else [])], precision, mode, batch_size)
    whole, bare = results["whole"], results["bare"]
    on_gpu = whole["device"] != "cpu"
    for key in ("wall",) if on_gpu else ("wall", "cpu"):
        whole_s, bare_s = (statistics.median(measured[key]) for measured in (whole, bare))
        figure = f"{1e3 * whole_s:.1f} ms per step, {key} time"
        yield label, figure, f"bare loop {1e3 * bare_s:.1f} ms", whole_s / bare_s, "<= 1.03"
    yield f"{label}: fraction of time waiting for data", f"{whole['data_wait_fraction']:.4f}", "", None, ""
    step_s = statistics.median(whole["wall"])
    images_per_s = batch_size / step_s
    speed = f"{images_per_s:.1f} images/s" + (f", MFU {whole['mfu']:.3f}" if on_gpu else "")
    if args.plain:
        plain_s = statistics.median(results["plain"]["wall"])
        yield label, speed, f"plain loop {batch_size / plain_s:.1f}", plain_s / step_s, ">= 1.5"
    if "H200" in whole["device"] and not args.tiny:
        yield label, speed, f"MLPerf {MLPERF_H200}", images_per_s / MLPERF_H200, ">= 1"
    else:
        yield label, speed, "", None, ""
    if on_gpu:
        figure, against = (f"{measured['gib']:.1f} GiB" for measured in (whole, bare))
        yield f"{label}: peak memory", figure, f"bare loop {against}", whole["gib"] / bare["gib"], ""
        yield f"{label}: waits of the host for the device outside log steps", whole["waits"], "", None, "0"


def largest_batch(args, precision, mode):
    """Returns the largest even batch size with which the whole loop fits into --memory_gib; 0: none fits."""
    fits, too_large = 0, None
    while too_large is None or too_large - fits > 2:
        batch_size = (fits * 2 or 2) if too_large is None else (fits + too_large) // 4 * 2
        if run_loop(args, "whole", precision, mode, batch_size, windows=1, memory_gib=args.memory_gib):
            fits = batch_size
        else:
            too_large = batch_size
    return fits


def limit_memory(gib):
    """Limits the GPU memory of this process, in GiB."""
    import torch

    if not torch.cuda.is_available():
        raise ValueError("--memory_gib limits GPU memory, but this machine has no GPU; omit the flag")
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))


def measure(args):
    """Yields all rows."""
    for precision in args.precisions:
        for mode in args.modes:
            yield from compare(args, precision, mode, args.batch_size)
    for precision in args.precisions if args.memory_gib else ():
        batch_size = largest_batch(args, precision, args.modes[0])
        yield f"{precision}, {args.modes[0]}: batch in {args.memory_gib:g} GiB", batch_size, "", None, ""
        yield from compare(args, precision, args.modes[0], batch_size) if batch_size else ()


def main(argv=None):
    args = parse_args(argv)
    work = Path(args.work) / args.unet
    inputs = make_inputs(work, args.tiny)
    if args.loop:
        if args.memory_gib:
            limit_memory(args.memory_gib)
        (whole_loop if args.loop == "whole" else bare_loop)(args, work, *inputs)
        return 0
    print("| what | figure | against | ratio | wanted |\n|---|---|---|---|---|", flush=True)
    for what, figure, against, ratio, wanted in measure(args):
        print(f"| {what} | {figure} | {against} | {'' if ratio is None else f'{ratio:.3f}'} | {wanted} |", flush=True)
    return 0


if __name__ == "__main__":
    cli.run(main)
