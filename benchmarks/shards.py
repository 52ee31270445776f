#!/usr/bin/env -S python3 -P
"""Measures reading and opening shard sets beside folders of sidecars, in CPU seconds of one core.

    ./benchmarks/shards.py --work /tmp/shards
    ./benchmarks/shards.py --work /tmp/shards --parts start --num_pairs 1000000
    ./benchmarks/shards.py --work /tmp/shards --parts freeze --num_frozen 100000000

reads   random reads of pairs, verified, as training makes them: latents [4, 64, 64] float16, captions of 13 to 130
        tokens, [T, 768] bfloat16; from files, from shards, and the floor: the same bytes by one read and one SHA-256
start   what a training run does before it reads the first pair: it lists the pairs. Shards without their tensors
        stand for large ones, since a start reads indexes only.
freeze  the same from a freeze file, to the first batch of --shuffle_window 4, and to batch 40,000 of 2,048, where a
        run is resumed; all shards are links to one
pack    a folder into shards, against reading, hashing and writing its bytes
"""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from cachetrain import cli

PARTS = ("reads", "start", "freeze", "pack")
SUFFIXES = (".img_sdxl", ".txt_t5cache")
_ROWS = 2048


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--work", required=True, type=Path, help="directory for what is read; kept for the next call")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure; default: all")
    parser.add_argument("--num_reads", type=cli.positive_int, default=2000, help="pairs read, each time")
    parser.add_argument(
        "--num_pairs", type=cli.positive_int, default=1_000_000, help="pairs of the set that is opened"
    )
    parser.add_argument(
        "--num_frozen", type=cli.positive_int, default=100_000_000, help="pairs that the freeze file lists"
    )
    parser.add_argument("--runs", type=cli.positive_int, default=5, help="runs, one after the other of each kind")
    return parser.parse_args(argv)


def make_folder(root, count):
    """Writes pairs of sidecars of the sizes that training on 512x512 images has."""
    import torch

    from cachetrain.data.sidecar import write_sidecar

    root.mkdir(parents=True)
    draw = random.Random(0)
    image = {"kind": "img_sdxl", "encoder": "x" * 64, "settings": '{"width": 512}', "scaling_factor": "0.13025"}
    image |= {"width": "512", "height": "512", "source_sha256": "0" * 64, "crop_box": "0,0,512,512"}
    image |= {"original_width": "512", "original_height": "512"}
    text = {"kind": "txt_t5cache", "encoder": "y" * 64, "settings": '{"max_length": 512}', "source_sha256": "0" * 64}
    for i in range(count):
        write_sidecar(root / f"{i:07}{SUFFIXES[0]}", {"latent": torch.randn(4, 64, 64).half()}, image)
        emb = torch.randn(draw.randint(13, 130), 768).bfloat16()
        write_sidecar(root / f"{i:07}{SUFFIXES[1]}", {"emb": emb}, text | {"num_tokens": str(len(emb))})


def make_set(root, count):
    """Writes a set of shards of which all rows but the first have no bytes on disk."""
    import torch

    from cachetrain.data.shard_set import folder_name, shard_name
    from cachetrain.data.shards import Row, build_shard
    from cachetrain.data.sidecar import header_of, sidecar_bytes

    image = sidecar_bytes({"latent": torch.zeros(4, 8, 8).half()}, {"kind": "img_sdxl", "scaling_factor": "1.0"})
    text = sidecar_bytes({"emb": torch.zeros(5, 64).bfloat16()}, {"kind": "txt_t5cache"})
    halves = ((image, ((4, 8, 8), ()), {}), (text, ((), (5,)), {"emb": 64}))
    for (data, sizes, widths), suffix in zip(halves, SUFFIXES, strict=True):
        header = header_of(data)
        folder = root / folder_name(suffix, header.run_identity)
        folder.mkdir(parents=True)
        for number, first in enumerate(range(0, count, _ROWS)):
            names = (f"{i // 10_000:05}/{i:09}" for i in range(first, min(first + _ROWS, count)))
            shard = build_shard([Row(name, data, header, *sizes) for name in names], suffix, widths)
            path = folder / shard_name(number, [str(number)])
            # The index, and the first row.
            path.write_bytes(shard[: 512 + -(-int(shard[124:135], 8) // 512) * 512 + 512 + len(data)])
            os.truncate(path, len(shard))


def measure_reads(args):
    from cachetrain.caching.commands import pack_shards
    from cachetrain.data.dataset import Sidecars
    from cachetrain.data.index import PairIndex

    folder, packed = args.work / "folder", args.work / "set"
    if not folder.exists():
        make_folder(folder, 3 * _ROWS)
    pack_shards.main(["--data_root", str(folder), "--out", str(packed)])
    indexes = [PairIndex([str(root)], *SUFFIXES) for root in (folder, packed)]
    numbers = [random.Random(1).randrange(len(indexes[0])) for _ in range(args.num_reads)]

    def read(index):
        sidecars = Sidecars(index)
        for i in numbers:
            sidecars.image(i)
            sidecars.text(i)

    def floor():
        for suffix in SUFFIXES:
            for i in numbers:
                descriptor = os.open(folder / f"{i:07}{suffix}", os.O_RDONLY)
                hashlib.sha256(os.pread(descriptor, 2**20, 0)).digest()
                os.close(descriptor)

    read(indexes[0]), read(indexes[1])  # fills the page cache
    times_s = {"files": [], "shards": [], "floor": []}
    for _ in range(args.runs):
        for name, function in (
            ("files", lambda: read(indexes[0])),
            ("shards", lambda: read(indexes[1])),
            ("floor", floor),
        ):
            start_s = time.process_time()
            function()
            times_s[name].append(time.process_time() - start_s)
    rates = {name: args.num_reads / sorted(values)[len(values) // 2] for name, values in times_s.items()}
    ratio = rates["shards"] / rates["files"]
    yield (
        "verified reads, pairs per CPU-s",
        f"{rates['shards']:,.0f} from shards",
        f"{rates['files']:,.0f} from files",
        ratio,
    )
    yield (
        "the same",
        f"{rates['shards']:,.0f} from shards",
        f"floor {rates['floor']:,.0f}",
        rates["shards"] / rates["floor"],
    )


def _run(script, *argv):
    """The last line that a script prints."""
    result = subprocess.run([sys.executable, "-c", script, *argv], check=True, capture_output=True, text=True)
    return result.stdout.splitlines()[-1]


_FROZEN = """
import json, os, resource, sys, time
from cachetrain.data.batching import BatchSampler
from cachetrain.data.split import open_index
from cachetrain.distributed import World
from cachetrain.training.options import parse_args
import safetensors.numpy, safetensors.torch
memory = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
before, start_s = memory(), time.process_time()
path = sys.argv[1]
index, *_ = open_index(parse_args("", ["--train_data_dir", path, "--model", "x", "--output_dir", "x"]), World())
opened_s = time.process_time() - start_s
batch = next(iter(BatchSampler(index, 2048, 0, 1, window=4)))
first_s, kept = time.process_time() - start_s, memory() - before
start_s = time.process_time()
batch = next(iter(BatchSampler(index, 2048, 0, 40_001, first=40_000, window=4)))
resumed_s = time.process_time() - start_s
print(json.dumps([opened_s, first_s, resumed_s, kept, len(index), os.path.getsize(path)]))
"""


def measure_freeze(args):
    from cachetrain.data.freeze import freeze_bytes, freeze_of
    from cachetrain.data.shard_set import ShardSet

    root, numbers = args.work / f"frozen_{args.num_frozen}", -(-args.num_frozen // _ROWS)
    if not root.exists():
        make_set(args.work / "unfinished", _ROWS)
        for first in list((args.work / "unfinished").glob("*/*.tar")):
            for number in range(1, numbers):
                os.link(first, first.with_name(first.name.replace("00000-", f"{number:05}-", 1)))
        (args.work / "unfinished").rename(root)
    files = list(root.glob("freeze-*"))
    if not files:
        start_s = time.process_time()
        freeze = freeze_of(ShardSet(str(root), SUFFIXES))
        files = [root / freeze.file_name]
        files[0].write_bytes(freeze_bytes(freeze))
        elapsed_s = time.process_time() - start_s
        yield (
            f"{numbers * _ROWS:,} pairs frozen, CPU-s",
            f"{elapsed_s:.1f}",
            "per million",
            elapsed_s / numbers / _ROWS * 1e6,
        )
    found = [json.loads(_run(_FROZEN, files[0])) for _ in range(args.runs)]
    opened_s, first_s, resumed_s, num_bytes, count, file_bytes = sorted(found)[len(found) // 2]
    yield f"{count:,} pairs opened from a freeze file, CPU-s", f"{opened_s:.2f}", "bound 5", opened_s / 5
    yield "to the first batch of a window", f"{first_s:.2f}", "bound 5", first_s / 5
    yield "opened already, to batch 40,000", f"{resumed_s:.2f}", "bound 5", resumed_s / 5
    yield (
        "memory they keep, MB",
        f"{num_bytes / 1e6:.0f}",
        f"freeze file {file_bytes / 1e6:.1f}",
        num_bytes / file_bytes,
    )


_START = """
import json, resource, sys, time
from cachetrain.data.index import PairIndex
import safetensors.numpy, safetensors.torch
memory = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
before, start_s = memory(), time.process_time()
index = PairIndex([sys.argv[1]], ".img_sdxl", ".txt_t5cache")
print(json.dumps([time.process_time() - start_s, memory() - before, len(index)]))
"""


def measure_start(args):
    root = args.work / f"start_{args.num_pairs}"
    if not root.exists():
        make_set(args.work / "unfinished", args.num_pairs)
        (args.work / "unfinished").rename(root)
    found = [json.loads(_run(_START, root)) for _ in range(args.runs)]
    elapsed_s, num_bytes, count = sorted(found)[len(found) // 2]
    bound_s, bound = 5 * count / 1e6, 100e6 * count / 1e6
    yield f"{count:,} packed pairs listed, CPU-s", f"{elapsed_s:.2f}", f"bound {bound_s:g}", elapsed_s / bound_s
    yield "memory they keep, MB", f"{num_bytes / 1e6:.0f}", f"bound {bound / 1e6:.0f}", num_bytes / bound


def measure_pack(args):
    from cachetrain.caching.commands import pack_shards

    folder, packed = args.work / "folder", args.work / "unfinished"
    if not folder.exists():
        make_folder(folder, 3 * _ROWS)
    times_s = {"packed": [], "floor": []}
    for _ in range(args.runs):
        start_s = time.process_time()
        pack_shards.main(["--data_root", str(folder), "--out", str(packed)])
        times_s["packed"].append(time.process_time() - start_s)
        shutil.rmtree(packed)
        start_s = time.process_time()
        with open(args.work / "unfinished", "wb") as file:
            for path in sorted(folder.iterdir()):
                data = path.read_bytes()
                hashlib.sha256(data).digest()
                file.write(data)
        times_s["floor"].append(time.process_time() - start_s)
        (args.work / "unfinished").unlink()
    rates = {name: 3 * _ROWS / sorted(values)[len(values) // 2] for name, values in times_s.items()}
    floor = f"floor {rates['floor']:,.0f}"
    yield "pairs packed per CPU-s", f"{rates['packed']:,.0f}", floor, rates["packed"] / rates["floor"]


def main(argv=None):
    args = parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(args.work / "unfinished", ignore_errors=True)
    print("| what | figure | against | ratio |\n|---|---|---|---|", flush=True)
    for part, measure in zip(PARTS, (measure_reads, measure_start, measure_freeze, measure_pack), strict=True):
        if part in args.parts:
            for what, figure, against, ratio in measure(args):
                print(f"| {what} | {figure} | {against} | {ratio:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    cli.run(main)
