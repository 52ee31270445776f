#!/usr/bin/env -S python3 -P
"""Merges adapters (LoRA, DoRA) into their base model, as a pipeline directory or one .safetensors file.

    ./models/merge_lora.py --lora output/lora1/checkpoint-001000 --out models/merged
    ./models/merge_lora.py --lora output/lora1/checkpoint-001000:0.8 style.safetensors:0.5 --out merged.safetensors

An adapter is a checkpoint of a run with --lora_rank, a directory with pytorch_lora_weights.safetensors, or the file
of a web UI. EMA weights are used if a checkpoint has them. A checkpoint records its base model, and is merged into no
other.
"""

import argparse
import math
import sys
from pathlib import Path

try:
    from cachetrain import cli, outputs
    from cachetrain.log import counted, info
except ImportError as error:
    print(f"{error}: run `pip install -e .`, or ./quickstart.sh and `source .venv/bin/activate`", file=sys.stderr)
    sys.exit(2)


def adapter_and_weight(text: str) -> tuple[Path, float]:
    """(PATH, 0.8) of "PATH:0.8"; a path that really has such a name is a path.

    Raises:
        argparse.ArgumentTypeError: the weight is out of range.
    """
    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        value = float(weight)
    except ValueError:
        return Path(text), 1.0
    if not (math.isfinite(value) and -10 <= value <= 10):
        raise argparse.ArgumentTypeError(f"expected a weight from -10 to 10, got {weight}")
    return Path(path), value


def output(text: str) -> Path:
    """A directory, or a file that outputs.single_file may write.

    Raises:
        argparse.ArgumentTypeError: it is a file of another kind.
    """
    return outputs.single_file(text) if text.endswith(".safetensors") else Path(text)


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--lora",
        nargs="+",
        required=True,
        type=adapter_and_weight,
        metavar="PATH[:WEIGHT]",
        help="adapters: checkpoints, directories or files; WEIGHT, from -10 to 10, multiplies what an adapter "
        "changes, less than 1 is weaker; default: 1",
    )
    parser.add_argument(
        "--model", help="base model: directory or Hugging Face model id; default: the one that a checkpoint records"
    )
    parser.add_argument(
        "--out",
        required=True,
        type=output,
        metavar="DIR|FILE",
        help="pipeline directory to write, or a file that ends in .safetensors, for web UIs",
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="dtype of the merged weights; default: as in the base model"
    )
    parser.add_argument(
        "--raw_weights", action="store_true", help="use the trained weights instead of the EMA weights"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)

    from cachetrain.checkpoints.merge import Weighted, find_base, write_merged
    from cachetrain.modeling import load

    adapters = [Weighted(*adapter) for adapter in args.lora]
    base = find_base(adapters, args.model)
    dtype = args.dtype and load.pick_dtype(args.dtype, "cpu")
    notes = write_merged(base, adapters, args.out, dtype, raw_weights=args.raw_weights, overwrite=args.overwrite)
    merged = f"{base} with {counted(len(adapters), 'adapter')}"
    info("\n".join([f"wrote {args.out}: {merged}", *(f"note: {note}" for note in notes)]))
    return 0


if __name__ == "__main__":
    cli.run(main)
