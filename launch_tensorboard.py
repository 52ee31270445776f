#!/usr/bin/env python3
"""Shows the logs of all runs in a browser, on this machine only.

    ./launch_tensorboard.py --logdir tensorboard

Prints the address. To see a remote machine's logs: ssh -L 6006:localhost:6006 user@machine
"""

import importlib.util
import os
import sys
from pathlib import Path

try:
    from cachetrain import cli
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: run ./quickstart.sh once, then `source .venv/bin/activate`") from None


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--logdir", default="tensorboard", help="directory that holds the runs, as given to training")
    parser.add_argument(
        "--port",
        type=cli.port,
        help="port to listen on; 0: any free one; default: the first free one from 6006",
    )
    return parser.parse_args(argv)


def command(args):
    """The command line of TensorBoard itself."""
    # Of 10 images per tag, its default, the slider would skip most. 0, said to mean all, shows none in 2.21.
    words = [sys.executable, "-m", "tensorboard.main", "--logdir", args.logdir, "--host", "127.0.0.1"]
    words += ["--samples_per_plugin", "images=1000"]
    return words + ([] if args.port is None else ["--port", str(args.port)])


def main(argv=None):
    args = parse_args(argv)
    if not Path(args.logdir).is_dir():
        print(f"{sys.argv[0]}: {args.logdir}: no such directory; pass the --logdir of training", file=sys.stderr)
        return 2
    if importlib.util.find_spec("tensorboard") is None:
        print("no tensorboard here: run ./quickstart.sh once, then `source .venv/bin/activate`", file=sys.stderr)
        return 2
    words = command(args)
    os.execv(words[0], words)


if __name__ == "__main__":
    sys.exit(main())
