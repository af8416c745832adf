#!/usr/bin/env bash
# Make .gpu/: what a GPU machine without a network needs beside its own torch to run scripts/gpu_check.sh.
# scripts/gpu_kit.sh --help says more. It needs the environment of `make setup`; PYTHON=/path/to/python3 names another.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null 2>&1 || { echo "gpu_kit.sh: $python is not there; run make setup first, or set PYTHON=/path/to/python3" >&2; exit 2; }
exec "$python" -m benchmarks.gpu_machine.kit "$@"
