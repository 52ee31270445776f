#!/usr/bin/env python3
"""Runs cachetrain/caching/commands/calculate_vae_scaling.py; `cache/calculate_vae_scaling.py --help` explains it."""

try:
    from cachetrain import cli
    from cachetrain.caching.commands.calculate_vae_scaling import main
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: run ./quickstart.sh once, then `source .venv/bin/activate`") from None

if __name__ == "__main__":
    cli.run(main)
