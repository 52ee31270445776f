#!/usr/bin/env -S python3 -P
"""Runs cachetrain/caching/commands/pack_shards.py; `cache/pack_shards.py --help` explains it."""

import sys

try:
    from cachetrain import cli
    from cachetrain.caching.commands.pack_shards import main
except ImportError as error:
    print(f"{error}: run `pip install -e .`, or ./quickstart.sh and `source .venv/bin/activate`", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    cli.run(main)
