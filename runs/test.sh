#!/usr/bin/env bash
# The linter, then all tests, on CPU and without downloads beyond requirements.txt:
#     bash runs/test.sh [arguments of pytest]
set -euo pipefail
source "$(dirname "$0")/setup.sh"
ruff check .
exec pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"       # two files at a time, in order
