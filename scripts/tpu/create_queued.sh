#!/usr/bin/env bash
# Asks for a TPU slice through queued resources and waits until it is there.
#
#     TPU=emu3 ZONE=us-east5-a bash scripts/tpu/create_queued.sh v5p-128 v2-alpha-tpuv5
#     SPOT=1 TPU=emu3 ZONE=us-west4-a bash scripts/tpu/create_queued.sh v5litepod-64 v2-alpha-tpuv5-lite
#
# The type counts TensorCores on v4 and v5p (v5p-128 is 4x4x4 = 64 chips), chips on v5e (v5litepod-64 is 8x8) and v6e.
# What fits which slice: emu3-jax plan. SPOT=1 is cheaper, and may be taken away: runs go on where they were (run.sh).
# PROJECT is gcloud's own by default. Deleting it again:
#
#     gcloud compute tpus queued-resources delete $TPU --zone=$ZONE --force
#
# Flags as in the reference of gcloud, 2025; this script was not run against Google Cloud.
set -euo pipefail
: "${TPU:?the name of the slice}" "${ZONE:?its zone}"
type=${1:?its type, like v5p-128} runtime=${2:?its software, like v2-alpha-tpuv5}

where=(--zone="$ZONE")
[[ -n ${PROJECT:-} ]] && where+=(--project="$PROJECT")
how=()
[[ -n ${SPOT:-} ]] && how+=(--spot)

gcloud compute tpus queued-resources create "$TPU" "${where[@]}" --node-id="$TPU" \
    --accelerator-type="$type" --runtime-version="$runtime" "${how[@]}"

while true; do
    state=$(gcloud compute tpus queued-resources describe "$TPU" "${where[@]}" --format='value(state.state)')
    echo "$(date +%T) $TPU: $state"
    case $state in
        ACTIVE) exit 0 ;;
        FAILED | SUSPENDING | SUSPENDED)
            echo "$0: $TPU is $state: 'queued-resources describe $TPU' says why; delete it, then ask again" >&2
            exit 1
            ;;
    esac
    sleep 30
done
