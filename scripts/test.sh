#!/usr/bin/env bash
# One command on a machine with Python 3.11 or newer: makes .venv, installs the test extra there, runs ruff, mypy and the
# whole test suite. With --quick it runs the quick tier, which needs a smaller extra, without PyTorch. Further arguments go
# to pytest: bash scripts/test.sh --quick -k decoder
# PYTHON and VENV choose the interpreter and the virtual environment (see venv.sh).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh

extra='test'
if [ "${1:-}" = --quick ]; then
    shift
    extra=test-quick
    set -- -m "not slow and not multiprocess and not libtpu and not oracle" "$@"
fi

install() {
    pip_install --editable ".[$extra]"
}

in_venv "$extra" install
"$VENV/bin/python" -m ruff check
"$VENV/bin/python" -m ruff format --check
"$VENV/bin/python" -m mypy
# A second run finds its programs compiled. Only a cache of limited size is locked, as two workers need it to be. What a
# killed run left half-written is compiled again: that costs time, and is no error.
JAX_COMPILATION_CACHE_DIR=$(realpath "$VENV")/compiled
export JAX_COMPILATION_CACHE_DIR JAX_COMPILATION_CACHE_MAX_SIZE=2000000000
exec "$VENV/bin/python" -m pytest -n 2 --dist loadfile \
    --durations=20 -W "default:Error reading persistent compilation cache" -W "default:Error writing persistent compilation cache" "$@"
