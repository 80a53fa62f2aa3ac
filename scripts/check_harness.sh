#!/usr/bin/env bash
# Installs lmms-eval (about 50 dependencies, 7 GB on disk) and this package in a virtual environment of their own, and runs two
# small tasks through the adapter with the embedded model. The tasks and their pictures are made here, so nothing is
# downloaded but the packages. Takes about 5 minutes the first time.
#
# Environment variables:
#   VENV    directory of the virtual environment (default: .venv-harness)
#   PYTHON  interpreter that makes it, see venv.sh
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv-harness}
source scripts/venv.sh

install() {
    pip_install lmms-eval==0.7.3 "filelock<4" --editable . # lmms-eval 0.7.3 needs an inner module of filelock 3
}

in_venv harness install
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$VENV/bin/python" scripts/check_harness.py make "$work"
HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HOME=$work/hub "$VENV/bin/python" -m lmms_eval --model emu3_jax \
    --tasks emu3_jax_answers,emu3_jax_choices --include_path "$work/tasks" --batch_size 3 --output_path "$work/results"
"$VENV/bin/python" scripts/check_harness.py compare "$work"
