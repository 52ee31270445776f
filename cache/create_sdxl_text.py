#!/usr/bin/env -S python3 -P
"""Runs cachetrain/caching/commands/create_sdxl_text.py; `cache/create_sdxl_text.py --help` explains it."""

import sys

try:
    from cachetrain import cli
    from cachetrain.caching.commands.create_sdxl_text import main
except ImportError as error:
    print(f"{error}: run `pip install -e .`, or ./quickstart.sh and `source .venv/bin/activate`", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    cli.run(main)
