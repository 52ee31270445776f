#!/usr/bin/env -S python3 -P
"""Measures in one call what only a GPU can show, ends by itself within --minutes, and prints one table.

    benchmarks/on_gpu.sh --minutes 9 --out on_gpu.md
    PYTHON=python3 benchmarks/on_gpu.sh --parts training_eager saving
    .venv/bin/python benchmarks/on_gpu.py --rehearse

tests:             the tests marked `gpu` (tests/test_gpu.py); SD1.5's UNet is compiled beside them
training_compiled: the whole training loop against a bare loop, SD1.5's UNet at 512x512, bf16, with torch.compile
caching_images:    SD's VAE at 512x512 in bf16, the script against the bare model
caching_text:      T5 of XXL's size in bf16, the script against the bare model
sdxl:              steps of SDXL's UNet at 1024x1024: all weights, with gradient release, adapters; peak memory
adapters:          the same for adapters of SD1.5's UNet at 512x512, beside all weights
training_eager:    as training_compiled, without torch.compile
saving:            how long a save holds training up

Models have random weights. Each part has a limit of time; a part for which too little is left is listed as not run.
Rows are written to --out as they are measured, and all output of the parts beside it, to a file that ends in .log.
Needs 30 GB of disk at --work. --rehearse runs the same parts on the CPU with tiny models, without compilation.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from cachetrain import cli

REPO = Path(__file__).resolve().parent.parent
HEAD = ("| what | figure | against | ratio | wanted |", "|---|---|---|---|---|")
BESIDE_S = 300  # most seconds for what runs beside a part
OUTCOMES = ("PASSED", "FAILED", "ERROR", "SKIPPED")


class Part(NamedTuple):
    """A part of the measurements.

    Attributes:
        name: for --parts.
        limit_s: it is ended after this many seconds.
        least_s: it is not started with fewer seconds left.
        command: words after the Python interpreter.
        beside: command that runs beside it, or None. If it fails, the next part runs last.
    """

    name: str
    limit_s: float
    least_s: float
    command: list
    beside: list | None = None


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--minutes", type=cli.positive_float, default=9.0, help="time limit of all parts together")
    parser.add_argument(
        "--parts", nargs="+", choices=NAMES, default=NAMES, metavar="PART", help="which parts to run; default: all"
    )
    parser.add_argument("--out", type=Path, default=Path("on_gpu.md"), help="file for the table; replaced")
    parser.add_argument(
        "--work", type=Path, default=Path("/tmp/cachetrain_on_gpu"), help="directory for models and runs; not deleted"
    )
    parser.add_argument("--rehearse", action="store_true", help="run on the CPU with tiny models")
    return parser.parse_args(argv)


def all_parts(work: Path, batch_size: int) -> list[Part]:
    """Returns the parts for a GPU, the most useful first."""
    tests = ["-m", "pytest", "tests/test_gpu.py", "-m", "gpu", "-v", "-p", "no:cacheprovider", "--tb=short"]
    train = ["benchmarks/train_throughput.py", "--work", work / "train", "--unet", "sd15", "--precisions", "bf16"]
    train += ["--batch_size", batch_size, "--turns", 1]
    compiled, cache = [*train, "--modes", "compiled"], ["benchmarks/cache_throughput.py", "--work", work / "cache"]
    images = [*cache, "--parts", "images", "--vaes", "sd", "--side", 512, "--num_images", 4096]
    text = [*cache, "--parts", "text", "--t5", "xxl", "--num_captions", 6000]
    saving = ["benchmarks/save_stall.py", "--work", work / "saving", "--saves", 1]
    ways = ["benchmarks/step_ways.py", "--work", work / "ways"]
    # Two steps of the whole loop, which leave the compiled kernels in inductor's cache.
    compile_ahead = [*compiled, "--loop", "whole", "--windows", 1, "--window_steps", 1]
    return [
        Part("tests", 180, 30, tests, compile_ahead),
        Part("training_compiled", 300, 90, [*compiled, "--windows", 2]),
        Part("caching_images", 90, 30, images),
        Part("caching_text", 150, 60, text),
        Part("sdxl", 240, 90, [*ways, "--unets", "sdxl"]),
        Part("adapters", 150, 60, [*ways, "--unets", "sd15"]),
        Part("training_eager", 180, 75, [*train, "--modes", "eager", "--windows", 1]),
        Part("saving", 90, 30, saving),
    ]


NAMES = [part.name for part in all_parts(Path(), 1)]


def tiny_parts(work: Path) -> list[Part]:
    """Returns the same parts for a rehearsal on a CPU."""
    tests = ["-m", "pytest", "tests/test_gpu.py", "-m", "gpu", "-v", "-p", "no:cacheprovider", "-n", 0]
    train = ["benchmarks/train_throughput.py", "--work", work / "train", "--precisions", "bf16", "--batch_size", 2]
    train += ["--turns", 1, "--windows", 1, "--window_steps", 2, "--device", "cpu", "--modes", "eager"]
    cache = ["benchmarks/cache_throughput.py", "--work", work / "cache", "--device", "cpu"]
    images = [*cache, "--parts", "images", "--vaes", "tiny", "--side", 64, "--num_images", 1]
    text = [*cache, "--parts", "text", "--t5", "tiny", "--num_captions", 12]
    saving = ["benchmarks/save_stall.py", "--work", work / "saving", "--saves", 1, "--unet", "tiny"]
    ways = ["benchmarks/step_ways.py", "--work", work / "ways", "--tiny", "--device", "cpu"]
    ways += ["--windows", 1, "--window_steps", 2, "--unets"]
    # The tests of one part: all of them, which the suite deselects, take a minute.
    commands = [[*tests, "-k", "fused or copied"], train, images, text, [*ways, "sdxl"], [*ways, "sd15"], train]
    commands += [[*saving, "--device", "cpu"]]
    return [Part(name, 300, 1, command) for name, command in zip(NAMES, commands, strict=True)]


class Table:
    """The rows, written to a file as they come."""

    def __init__(self, path: Path):
        self.path = path
        self.log = open(f"{path}.log", "w", encoding="utf-8")
        path.write_text("\n".join(HEAD) + "\n", encoding="utf-8")

    def add(self, *cells: object) -> None:
        """Adds a row: what, figure, against, ratio, wanted; those left out are empty."""
        cells = [str(cell).replace("|", "/").strip() for cell in cells]
        self.write("| " + " | ".join(cells + [""] * (5 - len(cells))) + " |")

    def write(self, row: str) -> None:
        """Adds a row of Markdown."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(row + "\n")

    def say(self, line: str) -> None:
        """Writes a line of a part's output to the log and to stderr."""
        print(line, end="", file=self.log, flush=True)
        print(line, end="", file=sys.stderr, flush=True)


def start(command: list, rehearse: bool) -> subprocess.Popen:
    """Starts Python in a process group of its own, with stdout and stderr in one pipe."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])}
    env |= {"PYTHONUNBUFFERED": "1", "COLUMNS": "200"} | ({"CACHETRAIN_REHEARSE": "1"} if rehearse else {})
    return subprocess.Popen(
        [sys.executable, "-P", *map(str, command)],
        env=env,
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        process_group=0,
    )


def end(process: subprocess.Popen) -> None:
    """Kills a process with its group, if it still runs."""
    if process.poll() is None:
        with suppress(ProcessLookupError):  # another thread ended it meanwhile
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_part(part: Part, limit_s: float, table: Table, rehearse: bool) -> None:
    """Runs a part for at most `limit_s` seconds and adds its rows, or why it has none."""
    started, num_rows, tests, last = time.monotonic(), 0, {}, ""
    process, late = start(part.command, rehearse), threading.Event()
    timer = threading.Timer(limit_s, lambda: (late.set(), end(process)))
    timer.start()
    try:
        for line in process.stdout:
            table.say(line)
            last = line.strip() or last
            if line.startswith("| ") and last not in HEAD:
                table.write(last)
                num_rows += 1
            elif test := re.match(rf"\S+::(.+?) ({'|'.join(OUTCOMES)})(?: \((.+)\))?", line):
                tests[test[1]] = test[2], test[3] or ""
            elif failed := re.match(r"(FAILED|ERROR) \S+?::(\S+) - (.*)", line):  # of the summary at the end
                tests[failed[2]] = failed[1], failed[3]
    finally:
        timer.cancel()
        end(process)
    add_tests(tests, table)
    if late.is_set():
        table.add(part.name, f"not finished: ended after {limit_s:.0f} s; last output: {last[:200]}")
    elif process.returncode and not tests:
        table.add(part.name, f"failed with exit code {process.returncode}: {last[:300]}")
    elif not num_rows and not tests:
        table.add(part.name, "no figures; see the log")
    table.say(f"{part.name}: {time.monotonic() - started:.0f} s\n")


def add_tests(tests: dict, table: Table) -> None:
    """Adds a row for each test that has not passed, and one that counts all. tests: {name: (outcome, reason)}."""
    outcomes = [outcome for outcome, _ in tests.values()]
    for name, (outcome, reason) in tests.items():
        if outcome != "PASSED":
            table.add(name, f"{outcome.lower()}: {reason[:300]}", "", "", "passed")
    if tests:
        counts = (f"{outcomes.count(outcome)} {outcome.lower()}" for outcome in OUTCOMES)
        table.add("gpu tests", ", ".join(counts), f"{len(tests)} tests", "", "0 failed, 0 skipped")


def run_beside(part: Part, left_s: float, table: Table, rehearse: bool) -> bool:
    """Runs a part and the command beside it, which may take longer; returns whether the command has succeeded.

    Args:
        left_s: seconds left for all parts; the command is ended after these, or after BESIDE_S.
    """
    started, process, output = time.monotonic(), start(part.beside, rehearse), []
    reader = threading.Thread(target=lambda: output.extend(process.stdout), daemon=True)
    reader.start()
    try:
        run_part(part, min(part.limit_s, left_s), table, rehearse)
        reader.join(max(0.0, started + min(BESIDE_S, left_s) - time.monotonic()))
    finally:
        end(process)
    reader.join()
    table.say("".join(output[-30:]))
    table.say(f"beside {part.name}: exit code {process.returncode} after {time.monotonic() - started:.0f} s\n")
    if process.returncode:
        last = output[-1].strip() if output else ""
        table.add(f"beside {part.name}", f"exit code {process.returncode}: {last[:300]}")
    return process.returncode == 0


def describe_device(rehearse: bool) -> tuple[str, int]:
    """Returns (name of the device and versions, batch size for training SD1.5's UNet).

    Raises:
        ValueError: there is no GPU.
    """
    import torch

    versions = f"torch {torch.__version__}, Python {sys.version.split()[0]}"
    if rehearse:
        return f"CPU (rehearsal), {versions}", 2
    if not torch.cuda.is_available():
        raise ValueError("torch finds no CUDA device; --rehearse runs the parts on the CPU with tiny models")
    gpu = torch.cuda.get_device_properties(0)
    gib = gpu.total_memory / 2**30
    return f"{gpu.name}, {gib:.0f} GiB, {versions}", 64 if gib > 120 else 48


def main(argv=None):
    args = parse_args(argv)
    deadline = time.monotonic() + 60 * args.minutes
    device, batch_size = describe_device(args.rehearse)
    table = Table(args.out)
    table.add("device", device)
    parts = tiny_parts(args.work) if args.rehearse else all_parts(args.work, batch_size)
    parts = [part for part in parts if part.name in args.parts]
    if "training_compiled" not in args.parts:
        parts = [part._replace(beside=None) for part in parts]  # which compiles ahead
    while parts:
        part, left_s = parts.pop(0), deadline - time.monotonic()
        if left_s < part.least_s:
            table.add(part.name, f"not run: no time left ({max(0, left_s):.0f} s, needs {part.least_s:.0f} s)")
        elif part.beside is None:
            run_part(part, min(part.limit_s, left_s), table, args.rehearse)
        elif not run_beside(part, left_s, table, args.rehearse):
            parts = parts[1:] + parts[:1]
    print(args.out.read_text(encoding="utf-8"), end="")
    return 0


if __name__ == "__main__":
    cli.run(main)
