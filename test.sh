#!/usr/bin/env bash
# Lint and tests, in the same environment as demo.sh. Arguments go to pytest: bash test.sh -k masking
set -euo pipefail
source "$(dirname "$0")/setup.sh"
install requirements-lm-eval.txt
ruff check .
ruff format --check .
python -m pytest -q -n logical --maxprocesses 8 --dist worksteal "$@"
