#!/usr/bin/env bash
# Measures training, decoding and saving on one GPU, with random weights made there: nothing comes from a hub.
# bash benchmarks/gpu.sh [--part NAME] [--toy] [--results FILE]; see benchmarks/gpu.py.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -e .venv/bin/activate ]; then source .venv/bin/activate; fi
nvidia-smi -L > /dev/null 2>&1 || export DS_ACCELERATOR=cpu
# Each row is measured by a fork of one process, which therefore must not start CUDA; so it asks the driver's library.
export PYTORCH_NVML_BASED_CUDA_CHECK=1
exec python3 -m benchmarks.gpu "$@"
