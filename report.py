#!/usr/bin/env python3
"""Runs cachetrain/report/command.py; `./report.py --help` explains it."""

try:
    from cachetrain import cli
    from cachetrain.report.command import main
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: run ./quickstart.sh once, then `source .venv/bin/activate`") from None

if __name__ == "__main__":
    cli.run(main)
