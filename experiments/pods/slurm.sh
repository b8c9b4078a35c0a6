#!/usr/bin/env bash
# A run on GPU nodes under SLURM: one process a GPU.
#
#   experiments/pods/slurm.sh [--dry-run] ACTION...       --dry-run prints the commands only
#
# ACTION: setup, start, watch, status, stop. SLURM sends SIGTERM some time before it takes the nodes
# away; the run saves, the job is put into the queue again and goes on from there, until the run is
# complete. Settings are environment variables:
set -euo pipefail

NAME=${NAME:-spark}                            # of the job
NODES=${NODES:-1}
GPUS=${GPUS:-8}                                # of a node
CPUS=${CPUS:-12}                               # of a process
TIME=${TIME:-24:00:00}
PARTITION=${PARTITION:-}
EXPERIMENT=${EXPERIMENT:-pipeline}
CONFIG=${CONFIG:-configs/spark_qwen25_1_5b.py}
RUN_DIR=${RUN_DIR:-$HOME/runs/$NAME}           # a folder that all nodes see
ARGS=${ARGS:-}                                 # more arguments; quotes hold one together
GRACE=${GRACE:-180}                            # seconds from SIGTERM to the end

DRY_RUN=
if [[ ${1:-} == --dry-run ]]; then DRY_RUN=1; shift; fi
if [[ $# == 0 ]]; then sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; fi

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
source "$ROOT/experiments/pods/common.sh"
read_arguments .venv/bin/python -m "spark_jax.experiments.$EXPERIMENT" "--config=$CONFIG" \
  "--config.run_dir=$RUN_DIR"

setup() { # once, on a node that sees the internet
  run python3.11 -m venv "$ROOT/.venv"
  run "$ROOT/.venv/bin/pip" install -c "$ROOT/constraints.txt" -e "$ROOT[gpu]"
}

job() {
  cat <<JOB
#!/usr/bin/env bash
#SBATCH --job-name=$NAME
#SBATCH --nodes=$NODES
#SBATCH --ntasks-per-node=$GPUS
#SBATCH --gpus-per-node=$GPUS
#SBATCH --cpus-per-task=$CPUS
#SBATCH --time=$TIME
#SBATCH --signal=B:TERM@$GRACE
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=$RUN_DIR/slurm.log
${PARTITION:+#SBATCH --partition=$PARTITION
}export SPARK_JAX_GRACE_SECONDS=$((GRACE - 20))
export SPARK_JAX_COMPLETED=$(quoted "$RUN_DIR")/completed_\$SLURM_JOB_ID
cd $(quoted "$ROOT")
# SIGTERM comes here alone: it is passed on, and after it the job is to go on later.
told=
trap 'told=1; scancel --signal=TERM "\$SLURM_JOB_ID"' TERM
srun --kill-on-bad-exit=1 $(quoted "${arguments[@]}") &
code=0
while wait \$! || code=\$?; kill -0 \$! 2>/dev/null; do code=0; done
if [[ -e \$SPARK_JAX_COMPLETED ]]; then
  rm "\$SPARK_JAX_COMPLETED"
elif [[ -n \$told ]]; then
  scontrol requeue "\$SLURM_JOB_ID"
else
  exit "\$code"
fi
JOB
}

start() {
  run mkdir -p "$RUN_DIR"
  echo "sbatch <<'JOB'"
  job
  echo JOB
  if [[ -z $DRY_RUN ]]; then job | sbatch; fi
}

watch() { run tail -n 50 -F "$RUN_DIR/slurm.log"; }

status() { run squeue --name="$NAME"; }

stop() { # saves, and does not go on: the job's script, which would see to that, hears nothing
  run scancel --name="$NAME" --state=PENDING
  run scancel --name="$NAME" --signal=TERM
}

for action in "$@"; do
  case $action in
    setup | start | watch | status | stop) "$action" ;;
    *) echo "unknown action '$action'; choose among setup start watch status stop" >&2; exit 2 ;;
  esac
done
