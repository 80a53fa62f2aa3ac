#!/usr/bin/env bash
# Runs emu3-jax commands as jobs on a cluster of Google Kubernetes Engine that the Cluster Toolkit made.
#
#     export CLUSTER=emu3 PROJECT=my-project LOCATION=us-central1 TYPE=tpu7x:2x2x2
#     export FILES=filestore://10.0.0.2/vol1 BUCKET=my-bucket GCLUSTER_IMAGE_REPO=emu3
#     bash scripts/tpu/gcluster.sh [--dry-run] run train-1 train configs/sft_t2i_8b.py
#     bash scripts/tpu/gcluster.sh list
#     bash scripts/tpu/gcluster.sh logs train-1
#     bash scripts/tpu/gcluster.sh stop train-1
#
# FILES is the volume that becomes `out` in every pod: filestore://ADDRESS/SHARE or the name of a
# PersistentVolumeClaim. BUCKET, if it is set, is mounted at /mnt/bucket. gcluster adds this checkout's last commit to a
# Python image, and pushes the image to the repository GCLUSTER_IMAGE_REPO of the Artifact Registry. IMAGE=NAME uses
# your own image instead, see Dockerfile. convert, prepare, export, doctor, score and pairs run in the first pod only.
# GRACE is the number of seconds that a pod gets to write a checkpoint (600). Preempted pods start again, up to 50 times.
# Bad input (exit code 2) ends the job.
#
# The flags follow the Cluster Toolkit's source of June 2026. This script was not run against Google Cloud.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$(dirname "${BASH_SOURCE[0]}")/pods.sh"
options "$@"
for name in CLUSTER PROJECT LOCATION; do
    [[ -n ${!name:-} ]] || die "set CLUSTER, PROJECT and LOCATION (a region or a zone): $name is not set"
done
at=(--cluster="$CLUSTER" --project="$PROJECT" --location="$LOCATION")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

case ${rest[0]:-} in
    run)
        name=${rest[1]:-}
        ((${#rest[@]} > 2)) || die "usage: $script [--dry-run] run NAME {prepare,train,generate,...} ARGUMENTS"
        [[ $name =~ ^[a-z][a-z0-9-]{0,27}$ ]] || die "'$name' must be a name of at most 28 letters, digits and '-'"
        [[ -n ${TYPE:-} && -n ${FILES:-} ]] ||
            die "set TYPE to the slice, like v5e:4x4, and FILES to the volume for out"
        read_type "$TYPE"
        [[ -n $topology ]] || die "write the topology, as in v5e:4x4"
        # Unlike the Cloud TPU API, gcluster counts chips for v5p. For TPU7x the topology gives the number of chips.
        case $generation in
            v4) die "gcluster.sh knows v5e, v5p, v6e and tpu7x" ;;
            v5p) compute_type=v5p-$chips ;;
            tpu7x) compute_type=tpu7x ;;
            *) compute_type=$queued_type ;;
        esac
        pod_command "${rest[@]:2}"
        mounts=(--mount="$FILES:$shared:rw")
        if [[ -n ${BUCKET:-} ]]; then mounts+=(--mount="gs://$BUCKET:${BUCKET_MOUNT:-/mnt/bucket}:rw"); fi
        if [[ -n ${IMAGE:-} ]]; then
            image=(--image="$IMAGE")
        else
            [[ -n ${GCLUSTER_IMAGE_REPO:-} ]] || die "set GCLUSTER_IMAGE_REPO to a repository for the image, or IMAGE"
            export_sources
            image=(--base-image=python:3.12 --build-context="$sources")
        fi
        run gcluster job submit "${at[@]}" --name="$name" --compute-type="$compute_type" --topology="$topology" \
            --num-slices="${SLICES:-1}" "${mounts[@]}" "${image[@]}" --restarts=50 \
            --restart-on-exit-codes=134,137,139,143 --grace-period="${grace}s" --command="$command"
        ;;
    list) run gcluster job list "${at[@]}" ;;
    logs | stop)
        [[ -n ${rest[1]:-} ]] || die "usage: $script [--dry-run] ${rest[0]} NAME"
        verb=logs
        if [[ ${rest[0]} == stop ]]; then verb=cancel; fi
        run gcluster job "$verb" "${rest[1]}" "${at[@]}"
        ;;
    *) die "usage: $script [--dry-run] {run NAME ... | list | logs NAME | stop NAME}" ;;
esac
