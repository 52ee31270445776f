#!/usr/bin/env python3
"""Runs cachetrain/caching/commands/show_vae_latent.py; `cache/show_vae_latent.py --help` explains it."""

try:
    from cachetrain import cli
    from cachetrain.caching.commands.show_vae_latent import main
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: run ./quickstart.sh once, then `source .venv/bin/activate`") from None

if __name__ == "__main__":
    cli.run(main)
