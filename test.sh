#!/usr/bin/env bash
# Lint and tests, in the same environment as demo.sh. --full: all of them, also those of lm-evaluation-harness and of
# the trackers.
# Other arguments go to pytest: bash test.sh -k masking
set -euo pipefail
source "$(dirname "$0")/setup.sh"
for argument in "$@"; do
  if [ "$argument" = --full ]; then install requirements-lm-eval.txt && install requirements-trackers.txt; fi
done
ruff check .
ruff format --check .
python -m pytest -q -n logical --maxprocesses 8 --dist worksteal "$@"
