#!/usr/bin/env bash
# The whole recipe on a tiny LLaDA, from nothing, on any machine: data, base model, both trainers, curves, checkpoint.
# Needs bash and Python 3.11 or newer. What it makes lies in demo_run/, which it empties first; beside that, only the
# environment .venv/ and ds_zero2.json, which every training writes.
set -euo pipefail
source "$(dirname "$0")/setup.sh"

# Two ranks; on a machine with GPUs, on those, and in bf16.
if [ "$GPUS" = 0 ]; then RANKS=2 BF16=False; else RANKS=$((GPUS < 2 ? GPUS : 2)) BF16=True; fi
KNOBS=(--MODEL=demo_run/base --PT_FILE=demo_run/train.pt --MASK_ID=4 --MAX_LEN=160 --BF16=$BF16
  --LORA_R=16 --LORA_ALPHA=32 --LR=2e-3 --MICRO_BSIZE=8)
BLOCK_SIZE=16

PORT=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')  # a free one
LAUNCH="deepspeed --num_gpus $RANKS --master_port $PORT"

step() { printf '\n== %s\n' "$*"; }
rm -rf demo_run

step "1/5 a tiny base model in LLaDA's format, pre-trained for a moment"
python -m demo.make_data --output demo_run/pretrain --rows 4000 --seed 0
python -m demo.make_base --data demo_run/pretrain --output demo_run/base --steps 120

step "2/5 a dataset of arithmetic problems, as token ids"
python -m demo.make_data --output demo_run/data --rows 800 --seed 1
python -m demo.make_data --output demo_run/heldout --rows 64 --seed 2
python pt.py --output demo_run/train.pt --model demo_run/base --dataset demo_run/data --max_len 160

step "3/5 Blockwise SFT on $RANKS ranks"
$LAUNCH train_blockwise.py "${KNOBS[@]}" --BLOCK_SIZE=$BLOCK_SIZE --CKPT_DIR=demo_run/blockwise

step "4/5 full-sequence SFT, the baseline, on $RANKS ranks"
$LAUNCH train_fullseq.py "${KNOBS[@]}" --CKPT_DIR=demo_run/fullseq

step "5/5 curves, and the checkpoints loaded back"
python plot_loss.py demo_run/blockwise_logs/train_loss.csv demo_run/fullseq_logs/train_loss.csv --output demo_run/loss.png
python -m demo.summary demo_run $BLOCK_SIZE
