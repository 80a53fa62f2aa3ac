#!/usr/bin/env bash
# The same on Google Kubernetes Engine, by xpk (pip install xpk; github.com/AI-Hypercomputer/xpk).
#
#     export CLUSTER=emu3 PROJECT=my-project ZONE=us-east5-a TYPE=v5p-128
#     bash scripts/tpu/xpk.sh cluster --spot                 # or --on-demand, --flex, --reservation=NAME
#     bash scripts/tpu/xpk.sh storage 2560                   # a Filestore volume of 2,560 GB, at /mnt/emu3 in every pod
#     at=/mnt/emu3
#     bash scripts/tpu/xpk.sh run prepare-1 prepare $at/photos/manifest.jsonl --model $at/bundle -o $at/data
#     bash scripts/tpu/xpk.sh run tune-1 train configs/sft_t2i_8b.py --set directory=$at/runs/photos
#     bash scripts/tpu/xpk.sh run draw-1 generate "a cat" --model $at/bundle --mesh fsdp=-1,tensor=4 -o $at/out
#     xpk workload list --cluster $CLUSTER; xpk workload delete --cluster $CLUSTER --workload tune-1
#     xpk cluster delete --cluster $CLUSTER
#
# JAX finds the other pods by the variables that GKE sets. xpk lays this checkout's last commit over a Python image,
# by Docker on this machine; IMAGE=NAME takes an image of yours instead, in which emu3-jax is installed. Pods that are
# taken away start again, up to 50 times, and the run goes on from its last checkpoint.
#
# Flags are those of xpk's documentation of 2026; this script was not run against Google Cloud.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${CLUSTER:?its name}" "${PROJECT:?the project}" "${ZONE:?its zone}" "${TYPE:?of the slice, like v5p-128}"
at=(--cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE")
volume=emu3-files shared=/mnt/emu3

case ${1:-} in
    cluster)
        xpk cluster create "${at[@]}" --tpu-type="$TYPE" --num-slices="${SLICES:-1}" "${@:2}"
        ;;
    storage)
        xpk storage create "$volume" "${at[@]}" --type=gcpfilestore --size="${2:?gigabytes}" --tier=BASIC_SSD \
            --access-mode=ReadWriteMany --vol=default --mount-point=$shared --readonly=false --auto-mount=false
        ;;
    run)
        name=${2:?a name for the workload}
        (($# > 2)) || { echo "usage: $0 run NAME {prepare,train,generate,...} ARGUMENTS" >&2; exit 2; }
        printf -v arguments ' %q' "${@:3}"
        # `exec` hands the signal that announces the end to the program, which then writes a checkpoint.
        command="export JAX_COMPILATION_CACHE_DIR=$shared/.compiled && exec emu3-jax$arguments"
        if [[ -n ${IMAGE:-} ]]; then
            image=(--docker-image="$IMAGE")
        else
            sources=$(mktemp -d)
            trap 'rm -rf "$sources"' EXIT
            git archive HEAD | tar -x -C "$sources"
            image=(--base-docker-image=python:3.12 --script-dir="$sources")
            command="pip install --quiet '.[train,tpu]' && $command"
        fi
        xpk workload create "${at[@]}" --workload="$name" --tpu-type="$TYPE" --num-slices="${SLICES:-1}" \
            "${image[@]}" --storage="$volume" --max-restarts=50 --command="$command"
        ;;
    *)
        echo "usage: $0 {cluster,storage,run} ..." >&2
        exit 2
        ;;
esac
