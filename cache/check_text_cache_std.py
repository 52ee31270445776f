#!/usr/bin/env python3
"""Runs cachetrain/caching/commands/check_text_cache_std.py; `cache/check_text_cache_std.py --help` explains it."""

try:
    from cachetrain import cli
    from cachetrain.caching.commands.check_text_cache_std import main
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: run ./quickstart.sh once, then `source .venv/bin/activate`") from None

if __name__ == "__main__":
    cli.run(main)
