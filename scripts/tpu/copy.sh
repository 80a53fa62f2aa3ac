#!/usr/bin/env bash
# Copies files and directories to and from the directory that the hosts of a slice share.
#
#     export TPU=emu3 ZONE=us-west4-a
#     bash scripts/tpu/copy.sh [--dry-run] up photos out/photos           # photos becomes out/photos on the slice
#     bash scripts/tpu/copy.sh [--dry-run] down out/checkpoint checkpoint
#
# The target must not exist. It gets its final name after everything was copied.
#
# The flags follow gcloud's reference of 2026. This script was not run against Google Cloud.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "$@"
need_slice
((${#rest[@]} == 3)) || die "usage: $script [--dry-run] {up LOCAL out/NAME | down out/NAME LOCAL}"
case ${rest[0]} in
    up) local=${rest[1]} remote=${rest[2]} ;;
    down) local=${rest[2]} remote=${rest[1]} ;;
    *) die "usage: $script [--dry-run] {up LOCAL out/NAME | down out/NAME LOCAL}" ;;
esac
remote=${remote%/} local=${local%/}
[[ $remote == out/?* && $remote != *..* && $remote != *[!A-Za-z0-9._/-]* ]] ||
    die "'$remote' on the slice must be out/NAME, of letters, digits, '.', '_', '-' and '/'"
[[ $local != *:* ]] || die "'$local' has a colon, which scp takes for another machine: rename it"

if [[ ${rest[0]} == up ]]; then
    [[ -e $local ]] || die "$local does not exist"
    on 0 "cd ~/emu3-jax && [ ! -e $remote ] || { echo '$remote exists on the slice: choose another name' >&2; exit 2; }
mkdir -p $(dirname "$remote") && rm -rf $remote.part"
    copy 0 "$local" ":emu3-jax/$remote.part"
    on 0 "cd ~/emu3-jax && mv $remote.part $remote"
else
    [[ ! -e $local ]] || die "$local exists: choose another name"
    run mkdir -p "$(dirname "$local")"
    run rm -rf "$local.part"
    copy 0 ":emu3-jax/$remote" "$local.part"
    run mv "$local.part" "$local"
fi
