#!/usr/bin/env bash
# A run on a Cloud TPU slice, with gcloud, from nothing: every host of the slice runs the same.
#
#   experiments/pods/tpu_vm.sh [--dry-run] ACTION...      --dry-run prints the commands only
#
# ACTION: create, setup, start, watch, status, stop, delete. After `stop`, a crash or a preemption,
# `start` goes on from the last checkpoint. Settings are environment variables:
set -euo pipefail

NAME=${NAME:-spark}                            # of the slice
ZONE=${ZONE:-us-east5-a}
ACCELERATOR=${ACCELERATOR:-v5p-128}            # v5p-128 is 4x4x4: it counts cores, two a chip
VERSION=${VERSION:-v2-alpha-tpuv5}             # v5e: v2-alpha-tpuv5-lite, v6e: v2-alpha-tpuv6e
SPOT=${SPOT:-}                                 # 1: cheaper, and taken away at any time
BUCKET=${BUCKET:-}                             # a Cloud Storage bucket, mounted at ~/bucket
EXPERIMENT=${EXPERIMENT:-pipeline}
CONFIG=${CONFIG:-configs/spark_qwen25_math_7b.py}
RUN_DIR=${RUN_DIR:-bucket/runs/$NAME}          # a folder that all hosts see; from ~, or absolute
ARGS=${ARGS:-}                                 # more arguments; quotes hold one together

DRY_RUN=
if [[ ${1:-} == --dry-run ]]; then DRY_RUN=1; shift; fi
if [[ $# == 0 ]]; then sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; fi

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
read_arguments -m "spark_jax.experiments.$EXPERIMENT" "--config=$CONFIG"
FOLDER=$(quoted "$RUN_DIR")
if [[ $RUN_DIR != /* ]]; then FOLDER="\$HOME/$FOLDER"; fi

tpu() { run gcloud compute tpus tpu-vm "$1" "$NAME" --zone="$ZONE" "${@:2}"; }
on() { tpu ssh --worker="$1" --command="$2"; }

shared() { # refuses a RUN_DIR of which every host would have its own
  if [[ -z $BUCKET && $RUN_DIR == bucket/* && ${ACCELERATOR##*-} -gt 8 ]]; then
    echo "error: $ACCELERATOR is several hosts, which must all see RUN_DIR=$RUN_DIR, and BUCKET is not set; set BUCKET, or RUN_DIR to a folder that they share" >&2
    exit 2
  fi
}

create() {
  shared
  tpu create --accelerator-type="$ACCELERATOR" --version="$VERSION" ${SPOT:+--spot}
}

setup() { # the committed tree, Python and libraries on every host; the bucket at ~/bucket
  shared
  run git archive --format=tar.gz --output=/tmp/spark-jax.tar.gz HEAD
  run gcloud compute tpus tpu-vm scp /tmp/spark-jax.tar.gz "$NAME": --zone="$ZONE" --worker=all
  on all "mkdir -p spark-jax logs && tar xzf spark-jax.tar.gz -C spark-jax"
  on all "curl -LsSf https://astral.sh/uv/install.sh | sh && ~/.local/bin/uv venv --clear --python 3.11 venv && ~/.local/bin/uv pip install --python venv -c spark-jax/constraints.txt -e 'spark-jax[tpu]'"
  if [[ -n $BUCKET ]]; then
    on all "command -v gcsfuse > /dev/null || { $GCSFUSE; }"
    on all "mkdir -p bucket && (mountpoint -q bucket || gcsfuse --implicit-dirs --rename-dir-limit=1000000 $BUCKET bucket)"
  fi
}

# As Google says to install it; some images have it.
GCSFUSE='curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc > /dev/null &&
echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -c -s) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null &&
sudo apt-get -o DPkg::Lock::Timeout=600 update && sudo apt-get -o DPkg::Lock::Timeout=600 install --yes gcsfuse'
MOUNTED=
if [[ -n $BUCKET ]]; then
  MOUNTED="{ mountpoint -q bucket || { echo 'error: ~/bucket is not mounted; run setup' >&2; exit 1; }; } && "
fi

start() { # in the background, each host's output in ~/logs/$NAME.log
  shared
  on all "${MOUNTED}cd spark-jax && (setsid nohup ~/venv/bin/python $(quoted "${arguments[@]}") --config.run_dir=$FOLDER >> ~/logs/$NAME.log 2>&1 < /dev/null & echo \$! > ~/$NAME.pid)"
}

watch() { on 0 "tail -n 50 -F logs/$NAME.log"; }

status() { on all "kill -0 \$(cat $NAME.pid) 2>/dev/null && echo running || tail -n 3 logs/$NAME.log"; }

stop() { # saves, and ends with status 0
  on all "kill -TERM \$(cat $NAME.pid)"
}

delete() { tpu delete --quiet; }

for action in "$@"; do
  case $action in
    create | setup | start | watch | status | stop | delete) "$action" ;;
    *) echo "unknown action '$action'; choose among create setup start watch status stop delete" >&2; exit 2 ;;
  esac
done
