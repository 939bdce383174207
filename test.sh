#!/usr/bin/env bash
# Lint and tests, in the same environment as demo.sh. --full: all of them, also those that need more packages.
# Other arguments go to pytest: bash test.sh -k masking
set -euo pipefail
source "$(dirname "$0")/setup.sh"
for argument in "$@"; do
  if [ "$argument" = --full ]; then
    install requirements-lm-eval.txt
    install requirements-trackers.txt
    install requirements-4bit.txt --no-deps --target .venv/4bit  # apart: PEFT imports it wherever it finds it
  fi
done
ruff check .
ruff format --check .
python -m pytest -q -n logical --maxprocesses 8 --dist worksteal "$@"
