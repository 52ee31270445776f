#!/usr/bin/env -S python3 -P
"""Starts TensorBoard on the logs of all runs, reachable from this machine only.

    ./launch_tensorboard.py --logdir tensorboard

TensorBoard prints the address. To view the logs of a remote machine: ssh -L 6006:localhost:6006 user@machine

TensorBoard answers requests for any host name and has no flag to change that: while it runs, a web page that you
visit could read the logs by DNS rebinding.
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

try:
    from cachetrain import cli
except ImportError as error:
    print(f"{error}: run `pip install -e .`, or ./quickstart.sh and `source .venv/bin/activate`", file=sys.stderr)
    sys.exit(2)


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--logdir", default="tensorboard", help="the --logdir of training")
    parser.add_argument(
        "--port",
        type=cli.port,
        help="port to listen on; 0: any free port; default: the first free port from 6006",
    )
    return parser.parse_args(argv)


def command(args: argparse.Namespace) -> list[str]:
    """Returns the command that starts TensorBoard."""
    argv = [sys.executable, "-P", "-m", "tensorboard.main", "--logdir", args.logdir, "--host", "127.0.0.1"]
    # By default the slider shows 10 images per tag. 0 is documented as all, but shows none in TensorBoard 2.21.
    argv += ["--samples_per_plugin", "images=1000"]
    return argv + ([] if args.port is None else ["--port", str(args.port)])


def main(argv=None):
    args = parse_args(argv)
    if not Path(args.logdir).is_dir():
        print(f"{sys.argv[0]}: {args.logdir}: no such directory; pass the --logdir of training", file=sys.stderr)
        return 2
    if getattr(importlib.util.find_spec("tensorboard"), "origin", None) is None:  # a folder of logs has none
        print(
            f"{sys.argv[0]}: tensorboard is not installed: run `pip install -e .`, or "
            "./quickstart.sh and `source .venv/bin/activate`",
            file=sys.stderr,
        )
        return 2
    argv = command(args)
    os.execv(argv[0], argv)


if __name__ == "__main__":
    sys.exit(main())
