#!/usr/bin/env -S python3 -P
"""Writes a checkpoint as one .safetensors file in the original Stable Diffusion key layout, for web UIs.

    ./models/export_single_file.py --model output/run1/checkpoint-010000 --out run1-010000.safetensors --dtype fp16

EMA weights are used if the checkpoint has them. Keep the .yaml file that is written beside the .safetensors file: UIs
read from it what the keys cannot express. Further notes for users of the file are printed and stored in its metadata.
Of a checkpoint with an adapter the file is one for the LoRA folder of web UIs.
"""

import sys

try:
    from cachetrain import cli, outputs
    from cachetrain.log import info
except ImportError as error:
    print(f"{error}: run `pip install -e .`, or ./quickstart.sh and `source .venv/bin/activate`", file=sys.stderr)
    sys.exit(2)


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--model", required=True, help="checkpoint, pipeline directory or Hugging Face model id")
    parser.add_argument(
        "--base", help="base model of an adapter, if it is no longer where the run found it: directory or model id"
    )
    parser.add_argument(
        "--out",
        required=True,
        type=outputs.single_file,
        metavar="FILE",
        help=".safetensors file to write; an earlier one is replaced, with its .yaml",
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="dtype of all weights in the file; default: as stored"
    )
    parser.add_argument(
        "--raw_weights", action="store_true", help="use the trained weights instead of the EMA weights"
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)

    from cachetrain.checkpoints.adapters import base_of, is_adapter
    from cachetrain.checkpoints.export import export_single_file
    from cachetrain.checkpoints.export_adapter import export_adapter
    from cachetrain.modeling import load

    if (config := args.out.with_suffix(".yaml")).exists() and not args.out.exists():
        raise ValueError(f"{config}: exists, and is not of an earlier {args.out.name}; choose another --out")
    dtype = args.dtype and load.pick_dtype(args.dtype, "cpu")
    model_dir = load.resolve_model(args.model)
    if args.base and not is_adapter(model_dir):
        raise ValueError(f"--base is for adapters, and {model_dir} is a model; omit it")
    if is_adapter(model_dir):
        notes = export_adapter(model_dir, base_of(model_dir, args.base), args.out, dtype, args.raw_weights)
    else:
        notes = export_single_file(model_dir, args.out, dtype, args.raw_weights)
    info("\n".join([f"wrote {args.out}", *(f"note: {note}" for note in notes)]))
    return 0


if __name__ == "__main__":
    cli.run(main)
