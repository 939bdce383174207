#!/usr/bin/env bash
# The whole recipe on a tiny LLaDA, on any machine: data, both trainers, curves, Pass@1, an answer block by block.
# Needs bash and Python 3.11 or newer. What it makes lies in demo_run/, which it empties first; besides that, only the
# environment .venv/ and ds_zero2.json, which every training writes.
set -euo pipefail
source "$(dirname "$0")/setup.sh"

# Two ranks; on a machine with GPUs, on those, and in bf16.
if [ "$GPUS" = 0 ]; then RANKS=2 BF16=False; else RANKS=$((GPUS < 2 ? GPUS : 2)) BF16=True; fi
KNOBS=(--MODEL_NAME=demo/base --DATA_PT=demo_run/train.pt --MASK_ID=4 --MAX_LEN=64 --BF16=$BF16
  --LORA_RANK=16 --LR=2e-3 --MICRO_BSIZE=$((64 / RANKS)))
BLOCK_SIZE=4
DECODING=(--gen_length 16 --block_length $BLOCK_SIZE --steps 16 --batch_size 50)

LAUNCH="deepspeed --quiet --num_gpus $RANKS"

step() { printf '\n== %s\n' "$*"; }
rm -rf demo_run

step "1/6 long additions as token ids, for a base that half knows them (demo/README.md)"
python -m experiments.make_data --output demo_run/data --rows 6400 --seed 1
python -m experiments.make_data --output demo_run/heldout --rows 200 --seed 2
python pt.py --output demo_run/train.pt --model demo/base --dataset demo_run/data --max_len 64

step "2/6 Blockwise SFT on $RANKS ranks"
$LAUNCH train_blockwise.py "${KNOBS[@]}" --BLOCK_SIZE=$BLOCK_SIZE --CKPT_DIR=demo_run/blockwise

step "3/6 full-sequence SFT, the baseline, on $RANKS ranks"
$LAUNCH train_fullseq.py "${KNOBS[@]}" --CKPT_DIR=demo_run/fullseq

step "4/6 Blockwise SFT until as many tokens are supervised as in the baseline: all 5 blocks of each answer"
$LAUNCH train_blockwise.py "${KNOBS[@]}" --BLOCK_SIZE=$BLOCK_SIZE --EPOCHS=5 --CKPT_DIR=demo_run/blockwise_equal_tokens

step "5/6 Pass@1 on problems that were not trained on"
for name in fullseq blockwise blockwise_equal_tokens; do
  python eval.py --compare demo/base demo_run/${name}_step* --data demo_run/heldout/train.jsonl \
    --output demo_run/results "${DECODING[@]}"
done

step "6/6 curves, a table, and an answer block by block"
python plot_loss.py demo_run/{blockwise,fullseq,blockwise_equal_tokens}_logs/train_loss.csv --output demo_run/loss.png
python -m demo.summary demo_run $BLOCK_SIZE
