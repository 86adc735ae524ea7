#!/usr/bin/env bash
# The sbatch files in a real Slurm: a private cluster on this machine, of two nodes with two GPUs each that are no GPUs, and
# the tiny model on the CPU. Prints a table of cases.
# Usage: TRAINER=PATH run.sh [--skip-if-missing] [CASE...]   CASE is a part of a case's name; all cases without
# RANKS=1 runs one rank a job instead of two. KEEP=1 keeps the temporary folder; a failure keeps it, too.
# Needs slurmctld, slurmd, srun, sbatch and munged (Debian: slurm-wlm, munge), and jq. Six minutes.
set -uo pipefail
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

wanted=()
skip_status=1
for argument in "$@"; do
  if [[ $argument == --skip-if-missing ]]; then skip_status=0; else wanted+=("$argument"); fi
done
PATH=$PATH:/usr/sbin:/sbin
for program in slurmctld slurmd srun sbatch munged jq; do
  command -v "$program" >/dev/null && continue
  echo "tests/slurm: skipped, $program is not installed (Debian: apt-get install slurm-wlm munge jq)"
  exit "$skip_status"
done
TRAINER=$(cd "$([[ -n ${TRAINER:-} ]] && echo "$here" || echo .)" && realpath -e "${TRAINER:-target/release/trainer}") || exit 2
export TRAINER
ranks=${RANKS:-2}

# The cluster ------------------------------------------------------------------------------------------------------------

# Nothing of a cluster that this script may run in.
while IFS= read -r name; do unset "$name"; done < <(compgen -e | grep -E '^(SLURM|SBATCH|SRUN)_')
dir=$(mktemp -d /tmp/trainer-slurm.XXXXXX)
chmod 755 "$dir"
export SLURM_CONF=$dir/slurm.conf
failed=0

stop() {
  if [[ -s $dir/slurmctld.pid ]] && kill -0 "$(<"$dir/slurmctld.pid")" 2>/dev/null; then
    timeout 10 scancel --user="$(id -un)" 2>/dev/null
    for ((i = 0; i < 40; i++)); do
      [[ -n $(timeout 10 squeue --noheader --states=running,completing 2>/dev/null) ]] || break
      sleep 0.25
    done
  fi
  local file pid pids=()
  for file in "$dir"/slurmd-*.pid "$dir/slurmctld.pid" "$dir/munged.pid"; do
    [[ -s $file ]] || continue
    pid=$(<"$file")
    kill "$pid" 2>/dev/null && pids+=("$pid")
  done
  for ((i = 0; i < 40; i++)); do
    kill -0 "${pids[@]}" 2>/dev/null || break
    sleep 0.25
  done
  kill -KILL "${pids[@]}" 2>/dev/null
  if ((failed)) || [[ -n ${KEEP:-} ]]; then
    echo "logs and results are kept in $dir"
  else
    rm -rf "$dir"
  fi
}
trap stop EXIT
trap 'failed=1; exit 130' INT TERM HUP

free_port() {
  local port
  while port=$((20000 + RANDOM % 10000)); (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
  echo "$port"
}

start() {
  local host second
  host=$(hostname -s)
  # Sorted behind the first, at whose name the ranks of both meet.
  second=$host-second
  # Where the machine does not know its own name.
  getent hosts "$host" >/dev/null || export MASTER_ADDR=127.0.0.1
  sed -e "s|@DIR@|$dir|g; s|@HOST@|$host|g; s|@USER@|$(id -un)|g; s|@NODE1@|$host|g; s|@NODE2@|$second|g" \
    -e "s|@PORT0@|$(free_port)|g; s|@PORT1@|$(free_port)|g; s|@PORT2@|$(free_port)|g" \
    tests/slurm/slurm.conf.in >"$dir/slurm.conf"
  # Slurm wants devices and opens none.
  ln -s /dev/null "$dir/gpu0"
  ln -s /dev/null "$dir/gpu1"
  echo "Name=gpu File=$dir/gpu[0-1]" >"$dir/gres.conf"
  mkdir "$dir/state" "$dir/jobs" "$dir/out"
  (umask 077 && head -c 1024 /dev/urandom >"$dir/munge.key")
  munged --socket="$dir/munge.socket" --key-file="$dir/munge.key" --pid-file="$dir/munged.pid" \
    --log-file="$dir/munged.log" --seed-file="$dir/munge.seed" || return 1
  slurmctld -c || return 1
  slurmd -N "$host" && slurmd -N "$second" || return 1
  for ((i = 0; i < 120; i++)); do
    [[ $(sinfo --noheader --Node --partition=both --format=%T 2>/dev/null | sort | uniq -c) == *"2 idle" ]] && return
    sleep 0.25
  done
  sinfo --Node --long
  tail -n 20 "$dir"/slurm*.log
  return 1
}

# What cases are made of -------------------------------------------------------------------------------------------------

fail() {
  echo "$*"
  exit 1
}

pending() {
  echo "$*"
  exit 77
}

# batch TASK OUTPUT [SBATCH OPTION...] [STEPS]: submits the sbatch file of the task; prints the job's number
batch() {
  local task=$1 output=$2 options=() arguments=()
  shift 2
  for argument in "$@"; do
    case $argument in
      -*) options+=("$argument") ;;
      *) arguments+=(--set "max_steps=$argument") ;;
    esac
  done
  CONFIG=tests/slurm/$task.yaml OUTPUT_DIR=$output LAUNCH_CONFIG=$(launch_config "$task") \
    sbatch --parsable --output="$dir/jobs/%x-%j.out" --ntasks-per-node="$ranks" "${options[@]}" \
    "scripts/submit_${task}_deepseek.slurm" "${arguments[@]}"
}

# accelerate's file for two ranks, if the program takes one
launch_config() {
  ((ranks == 2)) && "$TRAINER" sft --help | grep -q -- '--config-file' || return 0
  if [[ $1 == grpo ]]; then echo tests/slurm/zero3.yaml; else echo tests/slurm/zero2.yaml; fi
}

job() { scontrol --oneliner show job "$1" | grep -o "\b$2=[^ ]*" | head -n 1 | cut -d= -f2; }

# await SECONDS WHAT COMMAND...: waits until the command says yes
await() {
  local limit=$((SECONDS + $1)) what=$2
  shift 2
  while ! "$@"; do
    ((SECONDS < limit)) || fail "waited in vain for $what"
    sleep 0.2
  done
}
is_in() { [[ " $2 " == *" $(job "$1" JobState) "* ]]; }
has_rows() { [[ -e $1/metrics.jsonl ]] && (($(wc -l <"$1/metrics.jsonl") >= $2)); }
has_restarted() { (($(job "$1" Restarts) >= 1)); }

# ends JOB STATE [SECONDS]: waits for the end, which must be this one
ends() {
  await "${3:-120}" "the end of job $1" is_in "$1" "COMPLETED FAILED CANCELLED TIMEOUT NODE_FAIL PREEMPTED OUT_OF_MEMORY"
  is_in "$1" "$2" && return
  echo "job $1 ended as $(job "$1" JobState), not $2; exit code $(job "$1" ExitCode)"
  tail -n 20 "$dir"/jobs/*-"$1".out
  exit 1
}

newest() { ls -d "$1"/checkpoint-* 2>/dev/null | sed 's/.*-//' | sort -n | tail -n 1; }

# A signal ended the run after the step of the newest checkpoint.
saved_by_signal() {
  local step
  step=$(newest "$1")
  [[ -n $step ]] || fail "no checkpoint in $1"
  grep -qs "interrupted after step $step of " "$dir"/jobs/*.out || fail "no signal made checkpoint-$step"
  echo "saved checkpoint-$step"
}

# same TASK OUTPUT: the run made what the undisturbed one made, to the bit, and each row once
same() {
  cmp "$dir/out/$1/adapter_model.safetensors" "$2/adapter_model.safetensors" || exit 1
  each_step_once "$2"
}

each_step_once() {
  local is_so
  is_so=$(jq -s 'map(select(has("loss")) | .step) | length == (unique | length)' "$1/metrics.jsonl")
  [[ $is_so == true ]] || fail "metrics.jsonl has a step twice"
}

# However two ranks were started and whatever they share, they make the same.
like_the_sbatch_file() {
  ((ranks != 2)) || cmp "$dir/out/sft/adapter_model.safetensors" "$1/adapter_model.safetensors"
}

# undisturbed TASK: the run that others are compared with, which is the first case unless that was left out
undisturbed() {
  [[ -e $dir/out/$1/adapter_model.safetensors ]] || ends "$(batch "$1" "$dir/out/$1")" COMPLETED
}

# Cases ------------------------------------------------------------------------------------------------------------------

sft_file() {
  local job
  job=$(batch sft "$dir/out/sft")
  ends "$job" COMPLETED
}

grpo_file() {
  local job
  job=$(batch grpo "$dir/out/grpo")
  ends "$job" COMPLETED
}

preprocessing_file() {
  "$TRAINER" preprocess --help >/dev/null 2>&1 || pending "there is no trainer preprocess"
  local job
  job=$(CONFIG=tests/slurm/sft.yaml sbatch --parsable --output="$dir/jobs/%x-%j.out" \
    scripts/submit_preprocessing_deepseek.slurm --set output_dir="$dir/out/preprocessing")
  ends "$job" COMPLETED
}

# together OUTPUT SRUN OPTION...: SFT on the ranks that srun starts
together() {
  local out=$1 status=0
  shift
  srun "$@" "$TRAINER" sft tests/slurm/sft.yaml --set output_dir="$out" >"$out.log" 2>&1 || status=$?
  cat "$out.log"
  if grep -q 'a run is one process' "$out.log"; then pending "it takes no part among ranks"; fi
  ((status == 0)) || fail "exit code $status"
}

two_ranks_one_folder() {
  local out=$dir/out/two-ranks
  undisturbed sft
  together "$out" --ntasks=2 --gres=gpu:2
  [[ -s $out/adapter_model.safetensors ]] || fail "no adapter"
  [[ -e $out/logs/rank-1.log && ! -e $out/logs/rank-0.log ]] || fail "no log of rank 1: $(ls "$out" "$out/logs")"
  like_the_sbatch_file "$out"
}

two_nodes() {
  local out=$dir/out/two-nodes
  undisturbed sft
  together "$out" --partition=both --nodes=2 --ntasks-per-node=1 --gres=gpu:1
  [[ -s $out/adapter_model.safetensors && -e $out/logs/rank-1.log ]] || fail "no adapter or no log of rank 1"
  like_the_sbatch_file "$out"
}

# In an allocation without srun the program starts its ranks itself.
own_ranks() {
  local out=$dir/out/own-ranks job log
  undisturbed sft
  job=$(sbatch --parsable --output="$dir/jobs/%x-%j.out" --job-name=own-ranks --ntasks=1 --gres=gpu:2 \
    --wrap "exec $TRAINER sft tests/slurm/sft.yaml --set num_processes=2 --set output_dir=$out")
  log=$dir/jobs/own-ranks-$job.out
  await 60 "the end of job $job" is_in "$job" "COMPLETED FAILED"
  if grep -q 'and this run has' "$log"; then pending "it starts no ranks"; fi
  ends "$job" COMPLETED
  [[ -s $out/adapter_model.safetensors && -e $out/logs/rank-1.log ]] || fail "no adapter or no log of rank 1"
  like_the_sbatch_file "$out"
}

# signal TASK SIGNAL [SBATCH OPTION...]: a signal to the ranks saves, the job comes back by itself and ends the same
signal() {
  local out=$dir/out/$1-$2${3:-} job from
  undisturbed "$1"
  job=$(batch "$1" "$out" "${@:3}")
  await 60 "rows" has_rows "$out" 3
  scancel --signal="$2" "$job"
  from=$SECONDS
  await 20 "the requeue" has_restarted "$job"
  echo "out of the way in $((SECONDS - from)) s"
  saved_by_signal "$out"
  ends "$job" COMPLETED
  same "$1" "$out"
}

# A single task starts the ranks itself; the signal comes to all of them.
one_task() {
  [[ -n $(launch_config sft) ]] || pending "it needs two ranks and their launch file"
  signal sft USR1 --ntasks-per-node=1
}

# A cancelled job saves, too, and does not come back.
cancelled() {
  local out=$dir/out/cancelled job
  job=$(batch grpo "$out")
  await 60 "rows" has_rows "$out" 3
  scancel "$job"
  ends "$job" CANCELLED 20
  await 20 "the end of its ranks" no_rank "$out"
  saved_by_signal "$out"
  sleep 2
  is_in "$job" CANCELLED || fail "it came back"
}
no_rank() { [[ ! -e $1/run.lock ]]; }

requeued() {
  local out=$dir/out/requeued job
  undisturbed grpo
  job=$(batch grpo "$out")
  await 60 "rows" has_rows "$out" 3
  scontrol requeue "$job"
  await 40 "the requeue" is_in "$job" PENDING
  saved_by_signal "$out"
  ends "$job" COMPLETED
  same grpo "$out"
}

# A signal while nothing is there to save: the next start is a first one.
early() {
  local out=$dir/out/early job
  undisturbed grpo
  job=$(batch grpo "$out")
  await 30 "the start" is_in "$job" RUNNING
  scontrol requeue "$job"
  ends "$job" COMPLETED
  same grpo "$out"
}

# preempted PARTITION SECONDS: a job of `high` gets the GPUs within this time, the other goes on after it
preempted() {
  local out=$dir/out/preempted-$1 job high
  undisturbed grpo
  job=$(batch grpo "$out" --partition="$1")
  await 60 "rows" has_rows "$out" 3
  high=$(sbatch --parsable --output="$dir/jobs/%x-%j.out" --job-name=high --partition=high --gres=gpu:2 --wrap 'sleep 3')
  ends "$high" COMPLETED "$2"
  saved_by_signal "$out"
  ends "$job" COMPLETED
  (($(job "$job" Restarts) == 1)) || fail "it restarted $(job "$job" Restarts) times"
  same grpo "$out"
}

# Slurm looks at time limits every 30 seconds: the signal comes 5 to 35 seconds after the start.
time_limit() {
  local out=$dir/out/time-limit job
  job=$(batch grpo "$out" --time=1 --signal=USR1@55 80)
  await 60 "the requeue" has_restarted "$job"
  saved_by_signal "$out"
  scontrol update jobid="$job" timelimit=10
  ends "$job" COMPLETED
  [[ $(newest "$out") == 80 ]] || fail "the last checkpoint is $(newest "$out")"
  each_step_once "$out"
}

# Without srun: the shell becomes the program, so the signal is for the batch shell (`B:`), and nobody requeues.
time_limit_without_srun() {
  local out=$dir/out/without-srun settings job
  settings="--set num_processes=$ranks --set max_steps=80 --set output_dir=$out"
  job=$(sbatch --parsable --output="$dir/jobs/%x-%j.out" --job-name=without-srun --ntasks=1 --gres=gpu:2 --time=1 \
    --signal=B:USR1@55 --wrap "exec $TRAINER grpo tests/slurm/grpo.yaml $settings")
  ends "$job" FAILED 60
  if grep -q 'and this run has' "$dir/jobs/without-srun-$job.out"; then pending "it starts no ranks"; fi
  [[ $(job "$job" ExitCode) == 130:0 ]] || fail "exit code $(job "$job" ExitCode)"
  saved_by_signal "$out"
}

# A rank that dies takes the job with it, at once and for good.
killed_rank() {
  ((ranks == 2)) || pending "it needs two ranks"
  local out=$dir/out/killed-rank job rank
  job=$(batch grpo "$out")
  await 60 "rows" has_rows "$out" 3
  rank=$(sed -n 's/^rank 1, process \([0-9]*\).*/\1/p' "$out/logs/rank-1.log")
  kill -KILL "$rank"
  ends "$job" FAILED 30
  grep -h 'lost rank 1' "$dir"/jobs/*-"$job".out || fail "nothing names rank 1"
  await 10 "the end of rank 0" no_rank "$out"
}

# A node without power: what it had of the run since the newest checkpoint is done again.
lost_node() {
  local out=$dir/out/lost-node job node process
  undisturbed grpo
  job=$(batch grpo "$out")
  await 60 "a checkpoint" test -e "$out/checkpoint-9"
  # All of the nodes of this cluster; the controller is elsewhere.
  for process in $(pgrep "slurmd|slurmstepd|slurm_script|srun|$(basename "$TRAINER" | head -c 15)"); do
    if tr '\0' '\n' 2>/dev/null <"/proc/$process/environ" | grep -qx "SLURM_CONF=$SLURM_CONF"; then
      kill -KILL "$process"
    fi
  done
  node=$(job "$job" NodeList)
  scontrol update nodename="$node" state=down reason=test
  await 30 "the requeue" has_restarted "$job"
  for node in $(sinfo --noheader --Node --partition=both --format=%N); do slurmd -N "$node"; done
  ends "$job" COMPLETED
  (($(grep -c '^step  *1/' "$dir"/jobs/*-"$job".out) == 1)) || fail "it began anew"
  same grpo "$out"
}

# ------------------------------------------------------------------------------------------------------------------------

table=
run_case() {
  local name=$1 from=$SECONDS status result log
  shift
  if ((${#wanted[@]})); then
    local part is_wanted=
    for part in "${wanted[@]}"; do [[ $name != *"$part"* ]] || is_wanted=1; done
    [[ -n $is_wanted ]] || return
  fi
  log="$dir/case-${name// /-}.log"
  (
    set -e
    "$@"
  ) >"$log" 2>&1
  status=$?
  case $status in
    0) result=passed ;;
    77) result="pending: $(tail -n 1 "$log")" ;;
    *)
      result=FAILED
      failed=1
      echo "== $name"
      tail -n 30 "$log"
      ;;
  esac
  table+=$(printf '%-34s %4d s  %s' "$name" $((SECONDS - from)) "$result")$'\n'
  # What a failed case left would stand in the way of the next.
  scancel --user="$(id -un)" 2>/dev/null
  for ((i = 0; i < 160; i++)); do
    [[ -n $(squeue --noheader 2>/dev/null) ]] || break
    sleep 0.25
  done
}

start || {
  failed=1
  echo "tests/slurm: the cluster does not start"
  exit 1
}
echo "$(sinfo --version), $(slurmd -V), $("$TRAINER" --version), $ranks rank(s) a job"
run_case "submit_sft runs to its end" sft_file
run_case "submit_grpo runs to its end" grpo_file
run_case "submit_preprocessing" preprocessing_file
run_case "srun -n 2: two ranks, one folder" two_ranks_one_folder
run_case "srun over two nodes" two_nodes
run_case "ranks without srun" own_ranks
run_case "scancel --signal=USR1, sft" signal sft USR1
run_case "scancel --signal=USR1, one task" one_task
run_case "scancel --signal=TERM, grpo" signal grpo TERM
run_case "scancel" cancelled
run_case "scontrol requeue" requeued
run_case "requeue before the first step" early
run_case "preemption with 30 s of grace" preempted low 30
run_case "preemption without grace" preempted hasty 40
run_case "time limit" time_limit
run_case "time limit without srun" time_limit_without_srun
run_case "a killed rank" killed_rank
run_case "a lost node" lost_node
printf '\n%s' "$table"
exit "$failed"
