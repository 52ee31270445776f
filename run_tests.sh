#!/usr/bin/env bash
# Runs the linter and the tests. Creates .venv and installs the test dependencies first. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

.ci/make_venv test
.venv/bin/ruff check .
.venv/bin/ruff format --check .

default=(-m "not slow and not gpu")
# Runs up to four test files in parallel, in order. Each test uses one thread; one file more than there are cores,
# because tests of several processes wait for a part of their time. For --pdb, pass -n 0.
workers=$(.venv/bin/python -c 'import os; print(min(4, os.cpu_count() + 1))')
parallel=(-n "$workers" --dist loadfile --no-loadscope-reorder)
for argument in "$@"; do [ "$argument" != -m ] || default=(); done
exec .venv/bin/python -m pytest "${parallel[@]}" "${default[@]}" "$@"
