#!/usr/bin/env bash
# A run of several processes on one machine, on CPU: what a slice of so many hosts does, in small.
#
#   experiments/pods/local.sh [--dry-run] PROCESSES EXPERIMENT ARGUMENT...
#   experiments/pods/local.sh 2 train_rl --config=configs/demo.py --config.mesh.data=-1 \
#       --config.run_dir=runs/two
#
# Prints the processes' ids. Each writes to $LOGS/process_<i>.log. Ctrl-C and SIGTERM are passed on.
set -euo pipefail

PORT=${PORT:-29500}
LOGS=${LOGS:-runs/logs}
PYTHON=${PYTHON:-.venv/bin/python}

DRY_RUN=
if [[ ${1:-} == --dry-run ]]; then DRY_RUN=1; shift; fi
if [[ $# -lt 2 ]]; then sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; fi
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
PROCESSES=$1 EXPERIMENT=$2
shift 2

pids=() told=
trap 'told=1; kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM
for ((i = 0; i < PROCESSES; i++)); do
  if [[ -n $told ]]; then break; fi
  variables=(JAX_PLATFORMS=cpu "SPARK_JAX_COORDINATOR=localhost:$PORT"
    "SPARK_JAX_NUM_PROCESSES=$PROCESSES" "SPARK_JAX_PROCESS_ID=$i")
  command=(env "${variables[@]}" "$PYTHON" -m "spark_jax.experiments.$EXPERIMENT" "$@")
  if [[ -n $DRY_RUN ]]; then
    echo "$(quoted "${command[@]}") >> $LOGS/process_$i.log 2>&1 &"
    continue
  fi
  mkdir -p "$LOGS"
  "${command[@]}" >> "$LOGS/process_$i.log" 2>&1 &
  pids+=($!)
  echo "process $i: $!, output in $LOGS/process_$i.log"
done
if [[ -n $DRY_RUN ]]; then exit; fi

status=0
for i in "${!pids[@]}"; do
  code=0
  while wait "${pids[i]}" || code=$?; kill -0 "${pids[i]}" 2>/dev/null; do code=0; done
  # Told to end, it does so with 0 or 143; a signal may make bash lose which.
  if [[ -n $told ]] && ((code == 143 || code == 255)); then code=0; fi
  echo "process $i ended with status $code"
  if ((code > status)); then status=$code; fi
done
exit "$status"
