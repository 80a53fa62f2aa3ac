#!/usr/bin/env bash
# Makes .venv, installs the extra `test` in it, and runs ruff, mypy and the whole test suite. Needs Python 3.11 or
# newer. With --quick it runs only the quick tier, which needs the smaller extra `test-quick` without PyTorch. Further
# arguments go to pytest: bash scripts/test.sh --quick -k decoder
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
# The compilation cache makes a second run faster. JAX locks the cache only if its size is limited, and two workers need
# the lock. A cache entry that a killed run left unfinished only gives a warning, and the program is compiled again.
JAX_COMPILATION_CACHE_DIR=$(realpath "$VENV")/compiled
export JAX_COMPILATION_CACHE_DIR JAX_COMPILATION_CACHE_MAX_SIZE=2000000000
# A worker that crashes ends the run and names its test. With a new worker in its place, pytest-xdist would wait for ever.
exec "$VENV/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 \
    --durations=20 -W "default:Error reading persistent compilation cache" -W "default:Error writing persistent compilation cache" "$@"
