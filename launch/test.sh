#!/usr/bin/env bash
# Makes or reuses .venv and runs every test, two files at a time.
#   bash launch/test.sh [PYTEST-OPTIONS]      e.g. bash launch/test.sh -k resume
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh test
OMP_NUM_THREADS=1 exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
