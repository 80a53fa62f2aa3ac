#!/usr/bin/env bash
# Runs emu3-jax commands on Google Kubernetes Engine through xpk (pip install xpk).
#
#     export CLUSTER=emu3 PROJECT=my-project ZONE=us-west4-a TYPE=v5e:8x8
#     bash scripts/tpu/xpk.sh [--dry-run] cluster --spot    # or --on-demand, --flex, --reservation=NAME
#     bash scripts/tpu/xpk.sh storage 2560          # a Filestore volume of 2,560 GB: /mnt/emu3 in every pod
#     bash scripts/tpu/xpk.sh bucket my-bucket      # a bucket: /mnt/bucket in every pod
#     bash scripts/tpu/xpk.sh run convert-1 convert BAAI/Emu3-Gen BAAI/Emu3-VisionTokenizer -o out/emu3-gen
#     bash scripts/tpu/xpk.sh run prepare-1 prepare /mnt/bucket/photos/manifest.jsonl --model out/emu3-gen -o out/data
#     bash scripts/tpu/xpk.sh run train-1 train configs/sft_t2i_8b.py
#     bash scripts/tpu/xpk.sh run export-1 export out/sft_t2i/model -o /mnt/bucket/checkpoint --layout transformers
#     bash scripts/tpu/xpk.sh list
#     bash scripts/tpu/xpk.sh stop train-1
#     bash scripts/tpu/xpk.sh delete
#
# JAX finds the other pods by the variables that GKE sets. convert, prepare, export, doctor, score and pairs run in
# the first pod only (WORKER=all: in all of them). `out` is the Filestore volume. xpk adds this checkout's last commit to
# a Python image. IMAGE=NAME uses your own image instead, see Dockerfile. Preempted pods start again, up to 50 times, and the
# training continues from its last checkpoint. Bad input (exit code 2) ends the workload. GRACE is the number of seconds
# that a pod gets to write a checkpoint before it ends (600). A Spot machine gives only 30 seconds.
#
# The flags follow xpk 1.16.0. This script was not run against Google Cloud.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$(dirname "${BASH_SOURCE[0]}")/pods.sh"
options "$@"
for name in CLUSTER PROJECT ZONE TYPE; do
    [[ -n ${!name:-} ]] || die "set CLUSTER, PROJECT, ZONE and TYPE (of the slice, like v5e:4x4): $name is not set"
done
read_type "$TYPE"
# xpk counts TensorCores for TPU7x too. Each chip has two.
tpu_type=${queued_type:-$generation-$((2 * chips))}
at=(--cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE")
volume=emu3-files bucket=emu3-bucket
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

case ${rest[0]:-} in
    cluster)
        run xpk cluster create "${at[@]}" --tpu-type="$tpu_type" --num-slices="${SLICES:-1}" \
            --enable-gcpfilestore-csi-driver --enable-gcsfuse-csi-driver --enable-workload-identity "${rest[@]:1}"
        ;;
    storage)
        [[ ${rest[1]:-} =~ ^[1-9][0-9]{1,5}$ ]] || die "usage: $script [--dry-run] storage GB"
        run xpk storage create "$volume" "${at[@]}" --type=gcpfilestore --size="${rest[1]}" --tier=BASIC_SSD \
            --access-mode=ReadWriteMany --vol=default --mount-point="$shared" --readonly=false --auto-mount=true
        ;;
    bucket)
        [[ ${rest[1]:-} =~ ^[a-z0-9._-]+$ ]] || die "usage: $script [--dry-run] bucket NAME (without gs://)"
        run xpk storage attach "$bucket" "${at[@]}" --type=gcsfuse --bucket="${rest[1]}" --size=1 \
            --mount-point="${BUCKET_MOUNT:-/mnt/bucket}" --readonly=false --auto-mount=true
        ;;
    run)
        name=${rest[1]:-}
        ((${#rest[@]} > 2)) || die "usage: $script [--dry-run] run NAME {prepare,train,generate,...} ARGUMENTS"
        [[ $name =~ ^[a-z][a-z0-9-]{0,38}$ ]] || die "'$name' must be a name of letters, digits and '-'"
        pod_command "${rest[@]:2}"
        if [[ -n ${IMAGE:-} ]]; then
            image=(--docker-image="$IMAGE")
        else
            export_sources
            image=(--base-docker-image=python:3.12 --script-dir="$sources")
        fi
        run xpk workload create "${at[@]}" --workload="$name" --tpu-type="$tpu_type" --num-slices="${SLICES:-1}" \
            "${image[@]}" --max-restarts=50 --termination-grace-period-seconds="$grace" --command="$command"
        ;;
    list) run xpk workload list "${at[@]}" ;;
    stop)
        [[ -n ${rest[1]:-} ]] || die "usage: $script [--dry-run] stop NAME"
        run xpk workload delete "${at[@]}" --workload="${rest[1]}"
        ;;
    delete) run xpk cluster delete "${at[@]}" ;;
    *)
        die "usage: $script [--dry-run] {cluster | storage GB | bucket NAME | run NAME ... | list | stop NAME | delete}"
        ;;
esac
