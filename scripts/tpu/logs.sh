#!/usr/bin/env bash
# Shows the end of the logs of a slice's hosts.
#
#     export TPU=emu3 ZONE=us-west4-a
#     bash scripts/tpu/logs.sh [--dry-run] [LINES]      # LINES lines of every host (20)
#     FOLLOW=1 bash scripts/tpu/logs.sh                 # keeps printing until Ctrl-C
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
options "$@"
need_slice
lines=${rest[0]:-20}
[[ $lines =~ ^[0-9]{1,6}$ ]] || die "LINES is '$lines': it must be a whole number"
on 0 "tail${FOLLOW:+ -F} -n $lines $shared/logs/*.log"
