#!/usr/bin/env bash
# Runs an emu3-jax command on every host of a slice at once; see setup.sh.
#
#     export TPU=emu3 ZONE=us-east5-a
#     at=/mnt/emu3                                                                           # what all hosts share
#     bash scripts/tpu/run.sh prepare $at/photos/manifest.jsonl --model $at/bundle -o $at/data
#     DETACH=1 bash scripts/tpu/run.sh train configs/sft_t2i_8b.py --set directory=$at/runs/photos
#     bash scripts/tpu/run.sh generate "a cat" --model $at/runs/photos/model --mesh fsdp=-1,tensor=4 -o $at/out
#
# JAX finds the other hosts by the slice's metadata. The command runs in the checkout, so configs/ is at hand; all else
# is to be under /mnt/emu3 (SHARED). DETACH=1 returns at once, and what a host says goes to logs/HOST.log there: a
# connection that breaks then ends nothing. `prepare` and `train` go on where they were when they are run again, also on
# a slice that was made anew after the old one was taken away.
#
# Flags as in the reference of gcloud, 2025; this script was not run against Google Cloud.
set -euo pipefail
: "${TPU:?the name of the slice}" "${ZONE:?its zone}"
(($#)) || { echo "usage: $0 {prepare,train,generate,...} ARGUMENTS" >&2; exit 2; }
shared=${SHARED:-/mnt/emu3}
where=(--zone="$ZONE" --worker=all)
[[ -n ${PROJECT:-} ]] && where+=(--project="$PROJECT")

# Compiled programs in the shared directory: the first host writes them, and a slice made anew finds them.
command="cd emu3-jax && export JAX_COMPILATION_CACHE_DIR=$shared/.compiled &&"
printf -v arguments ' %q' "$@"
if [[ -n ${DETACH:-} ]]; then
    command+=" mkdir -p $shared/logs && (setsid nohup .venv/bin/emu3-jax$arguments"
    command+=" > $shared/logs/\$(hostname).log 2>&1 < /dev/null &)"
else
    command+=" .venv/bin/emu3-jax$arguments"
fi
gcloud compute tpus tpu-vm ssh "$TPU" "${where[@]}" --command="$command"
