#!/usr/bin/env bash
# CPU speed on a real model beside transformers, in one run: SFT tokens/s with LoRA and recomputation, prefill and decode tokens/s.
# `llama_cpu.mjs` has llama.cpp's.
# Usage: cpu.sh MODEL.gguf [PYTHON]   PYTHON has torch, transformers, peft and gguf; without it only trainer is measured.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
model=${1:?usage: cpu.sh MODEL.gguf [PYTHON]}
trainer=target/release/trainer
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

echo "== trainer"
lscpu | grep 'Model name'
for prompts in 1 8; do
  for ((i = 0; i < prompts; i++)); do echo "Write a Python function that reverses a string."; done >"$out/prompts"
  TRAINER_LOG=info "$trainer" generate --model "$model" --prompts-file "$out/prompts" --max-new-tokens 64 2>&1 >/dev/null |
    sed "s/^/batch $prompts: /"
done
printf 'Write a Python function that reverses a string. %.0s' {1..89} >"$out/prompts"
TRAINER_LOG=info "$trainer" generate --model "$model" --prompts-file "$out/prompts" --max-new-tokens 4 2>&1 >/dev/null |
  sed "s/^/long prompt: /"
"$trainer" sft configs/qwen05b/sft.yaml --set model_name_or_path="$model" --set output_dir="$out/sft" --set max_steps=4 \
  --set completion_only_loss=false --set save_strategy=no >"$out/log"
awk -F'[:,]' '{ for (i = 1; i < NF; i++) { if ($i ~ /"step_time"/) t = $(i + 1); if ($i ~ /"num_tokens"/) n = $(i + 1) }
                if (NR > 1) { seconds += t; tokens += n - before } before = n }
              END { printf "sft: %.1f tokens/s\n", tokens / seconds }' "$out/sft/metrics.jsonl"
grep 'process peak' "$out/log"

if [[ -n ${2:-} ]]; then
  for dtype in float32 bfloat16; do
    echo "== transformers, $dtype"
    "$2" scripts/bench/transformers_cpu.py "$model" data/word-problems/train.jsonl "$dtype" 2>/dev/null
  done
fi
