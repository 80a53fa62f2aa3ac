#!/usr/bin/env bash
# Runs an emu3-jax command on a slice that setup.sh prepared.
#
#     export TPU=emu3 ZONE=us-west4-a
#     bash scripts/tpu/run.sh [--dry-run] convert BAAI/Emu3-Gen BAAI/Emu3-VisionTokenizer -o out/emu3-gen
#     bash scripts/tpu/run.sh prepare out/photos/manifest.jsonl --model out/emu3-gen -o out/data
#     DETACH=1 bash scripts/tpu/run.sh train configs/sft_t2i_8b.py
#     bash scripts/tpu/run.sh generate "a cat" --model out/sft_t2i/model --mesh fsdp=-1,tensor=4 -o out/pictures
#
# convert, prepare, export, doctor, score and pairs run on the first host; all other commands run on every host at once,
# and JAX finds the others by the slice's metadata. WORKER=0 or WORKER=all chooses otherwise: prepare on all hosts shares
# the work, and so does score.
# The command runs in the checkout. `out` is the directory that all hosts share (setup.sh).
#
# The output of a host is appended to out/logs/HOST.log; logs.sh shows the logs. DETACH=1 returns at once, so that a
# broken connection does not end the command. If you run prepare or train again, they continue.
#
# The flags follow gcloud's reference of 2026. This script was not run against Google Cloud.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "$@"
need_slice
((${#rest[@]})) || die "usage: $script [--dry-run] {convert,prepare,train,generate,export,...} ARGUMENTS"
choose_worker "${rest[0]}"

variables=(JAX_COMPILATION_CACHE_DIR="$shared/.compiled") # a new slice finds the compiled programs
if [[ $worker != all ]]; then
    keep_to_one_worker "${rest[0]}"
    variables+=("${one_worker[@]}")
fi
printf -v program ' %q' env "${variables[@]}" .venv/bin/emu3-jax "${rest[@]}"

# HOST.exit holds the exit code of the last command, HOST.pid its process: keep_training.sh reads them.
printf -v heading '%q' "$(printf '%q ' emu3-jax "${rest[@]}")"
command="cd ~/emu3-jax && [ -x .venv/bin/emu3-jax ] || { echo 'run scripts/tpu/setup.sh first' >&2; exit 2; }
mkdir -p $shared/logs
log=$shared/logs/\$(hostname)
rm -f \$log.exit
printf '\\n%s %s\\n' \"\$(date '+%F %T')\" $heading >> \$log.log
"
if [[ -n ${DETACH:-} ]]; then
    # shellcheck disable=SC2016 # the host expands this
    printf -v supervised '%q' "$program"'; echo $? > "$0.exit"'
    command+="setsid nohup bash -c $supervised \$log >> \$log.log 2>&1 < /dev/null &
echo \$! > \$log.pid
echo \"\$(hostname): started, see \$log.log\""
else
    command+="set -o pipefail;$program 2>&1 < /dev/null | tee -a \$log.log"
fi
on "$worker" "$command"
