#!/usr/bin/env bash
# One command on a machine with Python 3.11 or newer: makes .venv, installs the test extra there, runs ruff and pytest.
# Arguments go to pytest: bash scripts/test.sh -k decoder
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh

install() {
    pip_install --editable '.[test]'
}

in_venv test install
.venv/bin/python -m ruff check
.venv/bin/python -m ruff format --check
# The second run finds its programs compiled.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/.venv/compiled}"
exec .venv/bin/python -m pytest "$@"
