#!/usr/bin/env bash
# Command 2: the tests. Makes .venv if it is missing, installs the test extras, lints, runs pytest ("$@" goes to it).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
.venv/bin/ruff check .
.venv/bin/ruff format --check .

default=(-m "not slow and not gpu")
for argument in "$@"; do [ "$argument" != -m ] || default=(); done
exec .venv/bin/python -m pytest "${default[@]}" "$@"
