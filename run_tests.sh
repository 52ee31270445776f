#!/usr/bin/env bash
# Command 2: the tests. Makes .venv if it is missing, installs the test extras, lints, runs pytest ("$@" goes to it).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
.venv/bin/ruff check .
.venv/bin/ruff format --check .

default=(-m "not slow and not gpu")
# Up to four files at a time, in their order; the tests themselves run on one thread. -n 0: one after the other, for --pdb.
parallel=(-n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder)
for argument in "$@"; do [ "$argument" != -m ] || default=(); done
exec .venv/bin/python -m pytest "${parallel[@]}" "${default[@]}" "$@"
