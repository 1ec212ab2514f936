#!/usr/bin/env bash
# All tests, on CPU, without downloads other than requirements.txt: `bash runs/test.sh [arguments of pytest]`.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
exec pytest -n 2 --dist loadfile "$@"       # two files at a time
