#!/usr/bin/env bash
# Trains to the last step. If the slice is preempted, makes it again, installs the package, and continues.
#
#     export TPU=emu3 ZONE=us-west4-a NFS=10.0.0.2:/vol1
#     SPOT=1 bash scripts/tpu/keep_training.sh [--dry-run] v5e:8x8 configs/sft_t2i_8b.py --set checkpoint_every=100
#
# Run it on a machine that stays on, in `tmux` or `screen`. It makes the slice if there is none (slice.sh, setup.sh),
# starts the training detached (run.sh), and looks every POLL seconds (60). It ends when the training ended well, when
# the training found bad input (exit code 2), or after RETRIES (5) failures in a row.
# Google announces the end of a Spot slice 30 seconds before. That is too short to write a checkpoint of a full 8 B run,
# so a preemption loses all steps since the last checkpoint. `checkpoint_every` limits their number.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "$@"
need_slice
((${#rest[@]} > 1)) || die "usage: $script [--dry-run] TYPE CONFIG.py [--set FIELD=VALUE ...]"
type=${rest[0]}
read_type "$type"
here=$(dirname "${BASH_SOURCE[0]}")
tries=0 retries=${RETRIES:-5} poll=${POLL:-60} told=

say() { echo "$(date '+%F %T') $script: $*"; }

if [[ -n $dry_run ]]; then
    bash "$here/slice.sh" --dry-run create "$type"
    bash "$here/setup.sh" --dry-run
    DETACH=1 bash "$here/run.sh" --dry-run train "${rest[@]:1}"
    exit
fi

# Sets `code` to the state of the training on the first host: running, gone, unreachable, or its exit code. Prints the
# last line of its log if that line is new.
look() {
    local said
    said=$(on 0 "log=$shared/logs/\$(hostname); tail -n 1 \$log.log 2> /dev/null
if [ -s \$log.exit ]; then cat \$log.exit
elif kill -0 \$(cat \$log.pid 2> /dev/null) 2> /dev/null; then echo running
else echo gone; fi") || said=unreachable
    code=${said##*$'\n'}
    said=${said%"$code"}
    if [[ -n ${said//[[:space:]]/} && $said != "$told" ]]; then
        told=$said
        echo "$(date '+%T') ${said%$'\n'}"
    fi
}

slice_state() { bash "$here/slice.sh" state || echo UNREACHABLE; }

# Counts a failure. Ends the script after RETRIES failures in a row.
failed() {
    tries=$((tries + 1))
    ((tries < retries)) || die "$tries failures in a row, the last one: $1"
    say "$1; trying again"
    sleep "$poll"
}

# Makes the slice if there is none, and makes it again if it was preempted.
make_slice() {
    local state
    state=$(slice_state)
    case $state in
        ACTIVE) return ;;
        UNREACHABLE) return 1 ;;
        ABSENT) ;;
        FAILED | SUSPENDING | SUSPENDED)
            say "the slice is $state: deleting it"
            bash "$here/slice.sh" delete || return 1
            ;;
        *) # requested, but not ready yet
            bash "$here/slice.sh" wait
            return
            ;;
    esac
    say "making $TPU"
    bash "$here/slice.sh" create "$type"
}

while true; do
    if ! make_slice; then
        failed "the slice could not be made"
        continue
    fi
    # If this script was restarted, the training may run already. Otherwise always run setup.sh, because a repaired
    # host is empty.
    look
    if [[ $code != running ]]; then
        code=failed
        if bash "$here/setup.sh" && DETACH=1 bash "$here/run.sh" train "${rest[@]:1}"; then code=running; fi
    fi
    began=$SECONDS
    while [[ $code == running || ($code == unreachable && $(slice_state) =~ ^(ACTIVE|UNREACHABLE)$) ]]; do
        sleep "$poll"
        look
    done
    case $code in
        0)
            say "the training is complete"
            exit 0
            ;;
        2) die "the training found bad input: 'bash $here/logs.sh' shows it" ;;
    esac
    if ((SECONDS - began > 1800)); then tries=0; fi
    state=$(slice_state)
    if [[ $state == ACTIVE ]]; then
        failed "the training ended with $code, the slice is there: 'bash $here/logs.sh' shows why"
    else
        say "the slice is $state, and the training continues on a new one"
        tries=0
    fi
done
