#!/usr/bin/env bash
# GPU speed and memory of training steps of a 7B shape: NF4 double-quantised, LoRA r=16 on all projections, AdamW.
# Usage: gpu.sh [FOLDER]   FOLDER is new or empty; default target/bench-gpu/DATE-TIME. It gets one JSON line per measurement in
#                          sft.jsonl, long.jsonl and grpo.jsonl, the console in console.txt, the machine in machine.txt, and the
#                          table in table.md. Some ten minutes after the build; 1x65536 takes 40 GB of host memory.
# TRAINER=PATH takes that program instead of building one with --features cuda,nccl; STEPS=N measures N steps (default 10).
set -euo pipefail
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:-$PWD/target/bench-gpu/$(date +%Y%m%d-%H%M%S)}
[[ $out == /* ]] || out=$here/$out
if [[ -n $(ls -A "$out" 2>/dev/null) ]]; then
  echo "gpu.sh: $out is not empty; results are appended, so name a new folder" >&2
  exit 2
fi
mkdir -p "$out"
if [[ -n ${TRAINER:-} ]]; then
  trainer=$(cd "$here" && realpath "$TRAINER")
else
  cargo build --release --features cuda,nccl
  trainer=${CARGO_TARGET_DIR:-target}/release/trainer
fi

{
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv
  "$trainer" --version
} >"$out/machine.txt"
cat "$out/machine.txt"

# measure NAME ARGUMENTS...: a process of its own, so that its peak is its own
measure() {
  local name=$1
  shift
  "$trainer" bench configs/bench/qwen2-7b --device cuda:0 --steps "${STEPS:-10}" --json "$out/$name.jsonl" "$@" |
    tee -a "$out/console.txt"
}
measure sft --work 1x2048 --work 4x2048 --work 1x8192 --activations recompute --activations offload
measure sft --work 1x2048 --work 4x2048 --work 1x8192 --activations keep
measure long --work 1x32768 --work 1x65536 --activations offload
measure grpo --work 4x4x128+256 --activations recompute --activations offload --activations keep

cat "$out"/{sft,long,grpo}.jsonl | awk '
  function value(name) {
    if (!match($0, "\"" name "\":\"?[^,\"}]*")) return ""
    text = substr($0, RSTART, RLENGTH); sub(/^"[^"]*":"?/, "", text); return text
  }
  function tokens(work,   part, lengths) {
    if (split(work, part, "x") == 2) return part[1] * part[2]
    split(part[3], lengths, "+"); return part[1] * part[2] * (lengths[1] + lengths[2])
  }
  BEGIN {
    print "| work | activations | step, s | tokens/s | peak, GiB | of the floor |"
    print "| --- | --- | --- | --- | --- | --- |"
  }
  { secs = tokens(value("work")) / value("tokens_per_second")
    printf "| %s | %s | %.4f | %.0f | %.2f | %.0f%% |\n", value("work"), value("activations"), secs,
           value("tokens_per_second"), value("peak_bytes") / 1073741824, 100 * value("floor_secs") / secs }
' | tee "$out/table.md"
