# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # the scripts that source this file read its variables, and set those of common.sh
# Sourced by xpk.sh and gcluster.sh after common.sh: makes the command of a pod of Google Kubernetes Engine.
grace=${GRACE:-600}

# Sets `command` to the shell command of every pod, for the arguments of emu3-jax. IMAGE is an image in which emu3-jax
# is installed; without it the pod's directory is this checkout, and the pod installs it first.
pod_command() {
    # Machines start one after another. The first pods wait for the last one.
    local variables=(JAX_COMPILATION_CACHE_DIR="$shared/.compiled" EMU3_START_TIMEOUT=1800) program
    choose_worker "$1"
    command=
    if [[ $worker != all ]]; then
        keep_to_one_worker "$1"
        variables+=("${one_worker[@]}")
        # All pods of a slice get the same command. The other pods exit at once.
        command="if [ \"\${MEGASCALE_SLICE_ID:-0}.\${TPU_WORKER_ID:-0}\" != 0.$worker ]; then exit 0; fi && "
    fi
    if [[ -z ${IMAGE:-} ]]; then command+="pip install --quiet '.[train,convert,data,heic,gcs,tpu]' && "; fi
    # `exec` lets the program receive SIGTERM at the end of the pod. The program then writes a checkpoint.
    printf -v program ' %q' env "${variables[@]}" emu3-jax "${@}"
    command+="ln -sfn $shared out && exec$program"
}

# Sets `sources` to a directory with this checkout's last commit.
export_sources() {
    sources=LAST_COMMIT
    if [[ -z $dry_run ]]; then
        sources=$(mktemp -d)
        trap 'rm -rf "$sources"' EXIT
        git archive HEAD | tar -x -C "$sources"
    fi
}
