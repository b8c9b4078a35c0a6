#!/usr/bin/env bash
# A run on TPU slices of Google Kubernetes Engine: through XPK, or as a JobSet of one's own.
#
#   experiments/pods/gke.sh [--dry-run] ACTION...         --dry-run prints the commands only
#
# ACTION: image, cluster, start, watch, stop (with XPK); manifest, which prints the JobSet, and apply,
# which hands it to kubectl. A pod that is told to stop before the run is complete saves and fails,
# and the JobSet starts all of them again; so it does with a slice that is taken away. Settings are
# environment variables:
set -euo pipefail

NAME=${NAME:-spark}                            # of the workload
PROJECT=${PROJECT:-my-project}
ZONE=${ZONE:-us-east5-a}
CLUSTER=${CLUSTER:-spark-cluster}
ACCELERATOR=${ACCELERATOR:-v5p-128}            # one slice, as XPK calls it
SLICES=${SLICES:-1}
NODES=${NODES:-tpu-v5p-slice}                  # node label; v5e: tpu-v5-lite-podslice, v6e: tpu-v6e-slice
TOPOLOGY=${TOPOLOGY:-4x4x4}
HOSTS=${HOSTS:-16}                             # of a slice, with 4 chips each
SPOT=${SPOT:-}                                 # 1: cheaper, and taken away at any time
IMAGE=${IMAGE:-us-docker.pkg.dev/$PROJECT/spark/spark-jax:latest}
BUCKET=${BUCKET:-my-bucket}                    # mounted at /bucket by the Cloud Storage FUSE driver
SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-default}    # of Kubernetes, with access to the bucket
EXPERIMENT=${EXPERIMENT:-pipeline}
CONFIG=${CONFIG:-configs/spark_qwen25_math_7b.py}
RUN_DIR=${RUN_DIR:-/bucket/runs/$NAME}
ARGS=${ARGS:-}                                 # more arguments; quotes hold one together
GRACE=${GRACE:-120}                            # seconds from SIGTERM to SIGKILL

DRY_RUN=
if [[ ${1:-} == --dry-run ]]; then DRY_RUN=1; shift; fi
if [[ $# == 0 ]]; then sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; fi

PODS=$(dirname "${BASH_SOURCE[0]}")
source "$PODS/common.sh"
read_arguments bash experiments/pods/complete.sh python -m "spark_jax.experiments.$EXPERIMENT" \
  "--config=$CONFIG" "--config.run_dir=$RUN_DIR"
SECONDS_TO_SAVE=$((GRACE - 20))

on_cluster() { run xpk "$@" --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER"; }

image() {
  run docker build --file "$PODS/Dockerfile" --tag "$IMAGE" "$PODS/../.."
  run docker push "$IMAGE"
}

cluster() {
  on_cluster cluster create --tpu-type="$ACCELERATOR" --num-slices="$SLICES" --enable-gcsfuse-csi-driver \
    $([[ -n $SPOT ]] && echo --spot || echo --on-demand)
  on_cluster storage attach "$BUCKET" --type=gcsfuse --mount-point=/bucket --readonly=false --size=1000 \
    --bucket="$BUCKET" --auto-mount=true --mount-options=implicit-dirs,rename-dir-limit=1000000
}

start() {
  on_cluster workload create --workload="$NAME" --tpu-type="$ACCELERATOR" --num-slices="$SLICES" \
    --docker-image="$IMAGE" --max-restarts=100 --termination-grace-period-seconds="$GRACE" \
    --command="exec env SPARK_JAX_GRACE_SECONDS=$SECONDS_TO_SAVE $(quoted "${arguments[@]}")"
}

watch() {
  on_cluster workload list
  run kubectl logs --follow --tail=50 --selector="jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0"
}

stop() { on_cluster workload delete --workload="$NAME"; }

manifest() {
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: 100
  replicatedJobs:
  - name: slice
    replicas: $SLICES
    template:
      spec:
        parallelism: $HOSTS
        completions: $HOSTS
        backoffLimit: 0
        template:
          metadata:
            annotations:
              gke-gcsfuse/volumes: "true"
          spec:
            restartPolicy: Never
            serviceAccountName: $SERVICE_ACCOUNT
            terminationGracePeriodSeconds: $GRACE
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $NODES
              cloud.google.com/gke-tpu-topology: $TOPOLOGY
            containers:
            - name: spark
              image: $IMAGE
              command: $(json "${arguments[@]}")
              env:
              - name: SPARK_JAX_GRACE_SECONDS
                value: "$SECONDS_TO_SAVE"
              ports:
              - containerPort: 8471
              resources:
                limits:
                  google.com/tpu: 4
              volumeMounts:
              - name: bucket
                mountPath: /bucket
            volumes:
            - name: bucket
              csi:
                driver: gcsfuse.csi.storage.gke.io
                volumeAttributes:
                  bucketName: $BUCKET
                  mountOptions: implicit-dirs,rename-dir-limit=1000000
YAML
}

apply() {
  echo "kubectl apply --filename=- <<'MANIFEST'"
  manifest
  echo MANIFEST
  if [[ -z $DRY_RUN ]]; then manifest | kubectl apply --filename=-; fi
}

for action in "$@"; do
  case $action in
    image | cluster | start | watch | stop | manifest | apply) "$action" ;;
    *) echo "unknown action '$action'; choose among image cluster start watch stop manifest apply" >&2; exit 2 ;;
  esac
done
