#!/usr/bin/env bash
# Measures in one call what only a GPU can show, within a time limit; benchmarks/on_gpu.py does the work and takes the
# options. Runs the code of this checkout with $PYTHON (python3), which needs the packages of pyproject.toml and pytest.
set -euo pipefail
repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -P "$repo/benchmarks/on_gpu.py" "$@"
