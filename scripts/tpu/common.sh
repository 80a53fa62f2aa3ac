# shellcheck shell=bash
# shellcheck disable=SC2034 # the scripts that source this file read its variables
# Sourced by the scripts beside it: options, error lines, and how to reach the hosts of a slice. docs/tpu.md explains.
#
# Environment:
#   TPU      the name of the slice
#   ZONE     its zone
#   PROJECT  the Google Cloud project (default: gcloud's own)
#   VIA      queued: the slice is a queued resource of the Cloud TPU API (v4, v5e, v5p, v6e)
#            compute: it is a managed instance group of Compute Engine (v5p, v6e, TPU7x)
#   SHARED   the directory that all hosts mount (default: /mnt/emu3); `out` in the checkout of each host is a link to it
script=${0##*/}
dry_run=
shared=${SHARED:-/mnt/emu3}
via=${VIA:-queued}

die() {
    echo "$script: error: $*" >&2
    exit 2
}

# Prints the comment at the head of the script, which is its help.
help() {
    sed -n '2,/^[^#]/{/^#/!q;s/^# \{0,1\}//p}' "$0"
    exit 0
}

# Sets `rest` to the arguments after --dry-run and --help.
options() {
    while [[ ${1:-} == -* ]]; do
        case $1 in
            --dry-run) dry_run=1 ;;
            -h | --help) help ;;
            *) die "unknown option $1: the options are --dry-run and --help" ;;
        esac
        shift
    done
    rest=("$@")
}

# Runs a command, or with --dry-run prints it as a shell reads it.
run() {
    if [[ -n $dry_run ]]; then
        local line
        printf -v line ' %q' "$@"
        echo "${line:1}"
    else
        "$@"
    fi
}

# Sets `where` to the flags that name the zone and the project.
need_slice() {
    [[ -n ${TPU:-} && -n ${ZONE:-} ]] || die "set TPU to the name of the slice and ZONE to its zone"
    [[ $via == queued || $via == compute ]] || die "VIA is '$via': it must be queued or compute"
    [[ $shared == /* && $shared != / && $shared != *[!A-Za-z0-9._/-]* ]] ||
        die "SHARED is '$shared': it must be an absolute path of letters, digits, '.', '_' and '-'"
    where=(--zone="$ZONE")
    if [[ -n ${PROJECT:-} ]]; then where+=(--project="$PROJECT"); fi
}

# Sets `generation`, `chips`, `topology` and `queued_type` from the name of a slice. A name has the form of `emu3-jax
# plan`, such as v5e:4x4, or of the Cloud TPU API, such as v5litepod-16. With the second form, `topology` is empty.
read_type() {
    local side='[1-9][0-9]{0,2}' count
    topology='' queued_type='' chips=1
    if [[ $1 =~ ^(v5e|v6e):${side}x${side}$ || $1 =~ ^(v4|v5p|tpu7x):${side}x${side}x${side}$ ]]; then
        generation=${1%%:*} topology=${1#*:}
        for count in ${topology//x/ }; do chips=$((chips * count)); done
    elif [[ $1 =~ ^(v5litepod|v6e|v4|v5p)-[1-9][0-9]{0,4}$ ]]; then
        generation=${1%-*} chips=${1##*-}
        case $generation in
            v5litepod) generation=v5e ;;
            v4 | v5p) chips=$((chips / 2)) ;;
        esac
    else
        die "'$1' is no slice: write v5e:4x4, v5p:2x2x2, v6e:4x4, tpu7x:2x2x2, or v5litepod-16, v5p-16, v6e-16"
    fi
    # The names of v4 and v5p count TensorCores. Each chip has two.
    case $generation in
        v5e) queued_type=v5litepod-$chips ;;
        v6e) queued_type=v6e-$chips ;;
        v4 | v5p) queued_type=$generation-$((2 * chips)) ;;
    esac
}

# Prints the names of the instances of a Compute Engine slice, one per line.
instances() {
    gcloud compute instance-groups managed list-instances "$TPU" "${where[@]}" --format='value(instance.basename())'
}

# on WORKER COMMAND: runs a shell command on one host, or on all hosts at once if WORKER is `all`.
on() {
    local worker=$1 command=$2
    if [[ $via == queued ]]; then
        run gcloud compute tpus tpu-vm ssh "$TPU" "${where[@]}" --worker="$worker" --command="$command"
        return
    fi
    local name names host code=0 hosts=() processes=()
    find_hosts "$worker"
    for host in "${hosts[@]}"; do
        run gcloud compute ssh "$host" "${where[@]}" --command="$command" &
        processes+=($!)
    done
    for name in "${processes[@]}"; do
        wait "$name" || code=$?
    done
    return "$code"
}

# Sets `hosts` to the instances that WORKER names.
find_hosts() {
    local names
    if [[ -n $dry_run ]]; then
        hosts=("$TPU-HOST")
        return
    fi
    names=$(instances) || die "cannot list the instances of $TPU"
    mapfile -t hosts <<< "$names"
    [[ -n ${hosts[0]} ]] || die "the group $TPU has no instances"
    if [[ $1 != all ]]; then
        (($1 < ${#hosts[@]})) || die "$TPU has ${#hosts[@]} hosts: there is no worker $1"
        hosts=("${hosts[$1]}")
    fi
}

# copy WORKER SOURCE ... TARGET: copies files and directories. A path on the host begins with `:`.
copy() {
    local worker=$1 host word hosts=() words
    if [[ $via == queued ]]; then
        words=()
        for word in "${@:2}"; do words+=("${word/#:/$TPU:}"); done
        run gcloud compute tpus tpu-vm scp --recurse "${words[@]}" "${where[@]}" --worker="$worker"
        return
    fi
    find_hosts "$worker"
    for host in "${hosts[@]}"; do
        words=()
        for word in "${@:2}"; do words+=("${word/#:/$host:}"); done
        run gcloud compute scp --recurse "${words[@]}" "${where[@]}"
    done
}

# Sets `one_worker` to the variables with which an emu3-jax command runs on a single host of a slice. Without them JAX
# waits for the other hosts. convert, export and doctor only read and write files, so they run on the CPU. Other
# commands get one chip.
keep_to_one_worker() {
    one_worker=(JAX_NUM_PROCESSES=1)
    case $1 in
        convert | export | doctor | pairs) one_worker+=(JAX_PLATFORMS=cpu) ;;
        *) one_worker+=("TPU_PROCESS_BOUNDS=1,1,1" "TPU_CHIPS_PER_PROCESS_BOUNDS=1,1,1" "TPU_VISIBLE_DEVICES=0") ;;
    esac
}

# Sets `worker` to the host of an emu3-jax command: 0 for convert, prepare, export, doctor, score and pairs, all for
# other commands.
choose_worker() {
    local usual=all
    case $1 in
        convert | prepare | export | doctor | score | pairs) usual=0 ;;
    esac
    worker=${WORKER:-$usual}
    [[ $worker == all || $worker =~ ^[0-9]{1,4}$ ]] || die "WORKER is '$worker': it must be a host's number, or all"
    if [[ $worker == all && ($1 == convert || $1 == export || $1 == pairs) ]]; then
        die "$1 writes one directory, and must not run on all hosts at once: leave WORKER unset, or set it to 0"
    fi
}
