#!/usr/bin/env bash
# Makes a TPU slice and waits for it, deletes it, or prints its state.
#
#     export TPU=emu3 ZONE=us-west4-a
#     bash scripts/tpu/slice.sh [--dry-run] create v5e:8x8       # v5litepod-64 is another name of the same
#     SPOT=1 bash scripts/tpu/slice.sh create v5e:8x8            # cheaper; can be preempted at any time
#     bash scripts/tpu/slice.sh wait                             # after an interrupted `create`, waits for the slice
#     bash scripts/tpu/slice.sh state
#     bash scripts/tpu/slice.sh delete
#
# With VIA=queued, the default, the slice is a queued resource of the Cloud TPU API: v4, v5e, v5p, v6e. RUNTIME chooses
# another software version. With VIA=compute it is a managed instance group of Compute Engine: v5p, v6e, TPU7x.
# `state` prints ACTIVE, ABSENT, or the state that gcloud prints. POLL is the number of seconds between checks (30).
#
# The flags follow gcloud's reference of 2026. This script was not run against Google Cloud.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "$@"
need_slice
what=${rest[0]:-} type=${rest[1]:-}

queued_state() {
    local state
    if state=$(run gcloud compute tpus queued-resources describe "$TPU" "${where[@]}" \
        --format='value(state.state)' 2>&1); then
        echo "$state"
    elif [[ $state == *NOT_FOUND* ]]; then
        echo ABSENT
    else
        echo "$state" >&2
        return 1
    fi
}

create_queued() {
    local runtime how=()
    [[ -n $queued_type ]] || die "$type is not offered as a queued resource: export VIA=compute"
    case $generation in
        v4) runtime=tpu-ubuntu2204-base ;;
        v5e) runtime=v2-alpha-tpuv5-lite ;;
        v5p) runtime=v2-alpha-tpuv5 ;;
        v6e) runtime=v2-alpha-tpuv6e ;;
    esac
    if [[ -n ${SPOT:-} ]]; then how=(--spot); fi
    echo "$TPU: $chips chips of $generation${topology:+, topology $topology}, also called $queued_type"
    run gcloud compute tpus queued-resources create "$TPU" "${where[@]}" --node-id="$TPU" \
        --accelerator-type="$queued_type" --runtime-version="${RUNTIME:-$runtime}" "${how[@]}"
}

# A group is ACTIVE when all of its instances run.
compute_state() {
    local states
    if ! states=$(run gcloud compute instance-groups managed list-instances "$TPU" "${where[@]}" \
        --format='value(instanceStatus)' 2>&1); then
        [[ $states == *"not found"* || $states == *NOT_FOUND* ]] && echo ABSENT && return
        echo "$states" >&2
        return 1
    fi
    states=$(sort -u <<< "$states")
    case $states in
        gcloud*) echo "$states" ;; # by --dry-run
        RUNNING) echo ACTIVE ;;
        *STOP* | *TERMINATED* | *SUSPEND*) echo SUSPENDED ;;
        *) echo "${states:-PROVISIONING}" | paste -sd, ;;
    esac
}

create_compute() {
    local machine image how=() policy=() region=${ZONE%-*} project=${PROJECT:-} size each=4
    [[ -n $topology ]] || die "write the topology of $type, as in v6e:4x4: Compute Engine wants it"
    if ((chips < each)); then each=$chips; fi # chips of a machine
    case $generation in
        v5p) machine=ct5p-hightpu-${each}t ;;
        v6e) machine=ct6e-standard-${each}t ;;
        tpu7x) machine=tpu7x-standard-${each}t ;;
        *) die "$type is not offered by Compute Engine's instance groups: unset VIA" ;;
    esac
    image=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e
    if [[ $generation == tpu7x ]]; then image=ubuntu-accel-2404-amd64-tpu-tpu7x; fi
    size=$((chips / each))
    if [[ -n ${SPOT:-} ]]; then how=(--provisioning-model=SPOT --instance-termination-action=STOP); fi
    echo "$TPU: $chips chips of $generation, topology $topology, on $size machines"
    if ((size > 1)); then
        if [[ -z $project && -n $dry_run ]]; then project=PROJECT; fi
        if [[ -z $project ]]; then project=$(gcloud config get-value project 2> /dev/null); fi
        [[ -n $project ]] || die "set PROJECT to the Google Cloud project"
        run gcloud compute resource-policies create workload-policy "$TPU" --region="$region" --project="$project" \
            --type=HIGH_THROUGHPUT --accelerator-topology="$topology" --accelerator-topology-mode=AUTO_CONNECT
        # gcloud accepts only the full name of the policy.
        policy=(--workload-policy="projects/$project/regions/$region/resourcePolicies/$TPU"
            --target-size-policy-mode=bulk --default-action-on-vm-failure=do-nothing)
    fi
    run gcloud compute instance-templates create "$TPU" ${project:+--project="$project"} --machine-type="$machine" \
        --image-project=ubuntu-os-accelerator-images --image-family="$image" --boot-disk-size=200GB \
        --maintenance-policy=TERMINATE --scopes=cloud-platform "${how[@]}"
    run gcloud compute instance-groups managed create "$TPU" "${where[@]}" --template="$TPU" \
        --size="$size" "${policy[@]}"
}

delete_compute() {
    local region=${ZONE%-*} project=()
    if [[ -n ${PROJECT:-} ]]; then project=(--project="$PROJECT"); fi
    run gcloud compute instance-groups managed delete "$TPU" "${where[@]}" --quiet
    run gcloud compute instance-templates delete "$TPU" "${project[@]}" --quiet
    if [[ -n $dry_run ]] ||
        gcloud compute resource-policies describe "$TPU" --region="$region" "${project[@]}" > /dev/null 2>&1; then
        run gcloud compute resource-policies delete "$TPU" --region="$region" "${project[@]}" --quiet
    fi
}

wait_until_active() {
    local state last=
    while true; do
        state=$("${via}_state") || state=UNREACHABLE # one lost connection is no reason to stop
        if [[ $state != "$last" ]]; then echo "$(date +%T) $TPU: $state"; fi
        last=$state
        case $state in
            ACTIVE) return ;;
            ABSENT | FAILED | SUSPENDING | SUSPENDED)
                die "$TPU is $state; '$script delete' removes it, and then '$script create TYPE' asks again"
                ;;
        esac
        sleep "${POLL:-30}"
    done
}

case $what in
    create)
        [[ -n $type ]] || die "name the slice, as in: $script create v5e:4x4"
        read_type "$type"
        "create_$via"
        if [[ -z $dry_run ]]; then wait_until_active; fi
        ;;
    delete)
        if [[ $via == queued ]]; then
            run gcloud compute tpus queued-resources delete "$TPU" "${where[@]}" --force --quiet
        else
            delete_compute
        fi
        ;;
    wait) if [[ -z $dry_run ]]; then wait_until_active; else "${via}_state"; fi ;;
    state) "${via}_state" ;;
    *) die "usage: $script [--dry-run] {create TYPE | wait | state | delete}" ;;
esac
