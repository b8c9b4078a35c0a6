#!/usr/bin/env bash
# Runs an experiment, and ends with status 0 only when the run is complete.
#
#   experiments/pods/complete.sh COMMAND ARGUMENT...
#   experiments/pods/complete.sh python -m spark_jax.experiments.train_rl --config=configs/demo.py
#
# A run that is told to stop, by SIGTERM, which is passed on, saves and ends with status 0. What is
# to start it again wants to see another one: 75, "try again". Other statuses are passed on.
set -euo pipefail

if [[ $# == 0 ]]; then sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; fi
folder=$(mktemp -d)
export SPARK_JAX_COMPLETED=$folder/completed

child= told=
trap 'told=1; if [[ -n $child ]]; then kill -TERM "$child" 2>/dev/null || true; fi' INT TERM
"$@" &
child=$!
if [[ -n $told ]]; then kill -TERM "$child" || true; fi
code=0
while wait "$child" || code=$?; kill -0 "$child" 2>/dev/null; do code=0; done

if [[ -e $SPARK_JAX_COMPLETED ]]; then
  code=0
elif [[ -n $told ]] || ((code == 0)); then  # a signal may make bash lose what the child ended with
  code=75
fi
rm -r "$folder"
exit "$code"
