#!/usr/bin/env bash
# The published evaluations of LLaDA-8B with lm-evaluation-harness, one benchmark at a time; see docs/decoding.md.
#   bash eval_llada.sh                                            lists benchmarks and settings
#   bash eval_llada.sh instruct gsm8k_cot                         runs one; needs NUM_GPUS GPUs (8) and the hub
#   bash eval_llada.sh instruct gsm8k_cot pretrained=FOLDER ...   with other or more model_args
#   bash eval_llada.sh instruct gsm8k_cot --dry-run               only prints the command
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# steps are gen_length. Likelihoods have mc_num, the number of masked copies; the rest are answers.
END=126081,126348 # <|endoftext|> and <|eot_id|>
TABLE="model     task                            few-shot  batch  model_args
instruct  gsm8k_cot                       5         8      gen_length=512,block_length=512,begin_suppress_tokens=[$END]
instruct  minerva_math                    4         8      gen_length=512,block_length=512,begin_suppress_tokens=[$END]
instruct  gpqa_diamond_generative_n_shot  5         8      gen_length=64,block_length=64,begin_suppress_tokens=[$END]
instruct  mbpp_instruct                   3         8      gen_length=256,block_length=256,begin_suppress_tokens=[$END]
instruct  humaneval_instruct              0         8      gen_length=512,block_length=512,suppress_tokens=[126081]
instruct  mmlu_generative                 0         8      gen_length=3,block_length=3
instruct  mmlu_pro                        0         8      gen_length=256,block_length=256
instruct  arc_challenge_chat              0         8      gen_length=512,block_length=512
base      gsm8k                           5         8      gen_length=256,block_length=256
base      bbh                             3         8      gen_length=256,block_length=256
base      minerva_math                    4         8      gen_length=1024,block_length=1024
base      humaneval                       0         8      gen_length=1024,block_length=1024
base      mbpp                            3         8      gen_length=1024,block_length=1024
base      gpqa_main_n_shot                5         32     mc_num=32,cfg_scale=0.5
base      truthfulqa_mc2                  0         32     mc_num=32,cfg_scale=2.0
base      arc_challenge                   0         32     mc_num=32,cfg_scale=0.5
base      hellaswag                       0         32     mc_num=32,cfg_scale=0.5
base      winogrande                      5         32     mc_num=32,cfg_scale=0.0
base      piqa                            0         32     mc_num=32,cfg_scale=0.5
base      mmlu                            5         1      mc_num=1,cfg_scale=0.0
base      cmmlu                           5         32     mc_num=32,cfg_scale=0.0
base      ceval-valid                     5         32     mc_num=32,cfg_scale=0.0"

dry_run=false arguments=()
for argument in "$@"; do
  if [ "$argument" = --dry-run ]; then dry_run=true; else arguments+=("$argument"); fi
done
set -- "${arguments[@]}"
if [ $# = 0 ]; then
  echo "$TABLE"
  exit
fi
model=$1 task=${2:-} more=("${@:3}")
line=$(awk -v model="$model" -v task="$task" 'NR > 1 && $1 == model && $2 == task' <<<"$TABLE")
if [ -z "$line" ]; then
  echo "error: '$model $task' is no row of the table; bash eval_llada.sh prints it." >&2
  exit 1
fi
read -r _ _ shots batch settings <<<"$line"

declare -A names=([instruct]=Instruct [base]=Base)
command=(deepspeed --num_gpus "${NUM_GPUS:-8}" --module adapters.lm_eval_llada run --model llada --tasks "$task")
command+=(--num_fewshot "$shots" --batch_size "$batch" --output_path results/lm_eval --log_samples)
if [ "$model" = instruct ]; then command+=(--apply_chat_template); fi
if [[ $settings =~ gen_length=([0-9]+) ]]; then settings+=",steps=${BASH_REMATCH[1]}"; fi
case $task in humaneval* | mbpp*) command+=(--confirm_run_unsafe_code) ;; esac
command+=(--model_args "pretrained=GSAI-ML/LLaDA-8B-${names[$model]},$settings" "${more[@]}")

if $dry_run; then
  printf '%q ' "${command[@]}"
  echo
elif [[ $task =~ ^(humaneval|mbpp) && ${HF_ALLOW_CODE_EVAL:-0} != 1 ]]; then
  echo "error: $task runs code that the model writes; where that may happen, set HF_ALLOW_CODE_EVAL=1." >&2
  exit 1
else
  exec "${command[@]}"
fi
