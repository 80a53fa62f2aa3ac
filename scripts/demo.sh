#!/usr/bin/env bash
# One command on a machine with Python 3.11 or newer: makes .venv, installs the package there and runs demo.py.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh

install() {
    pip_install --editable .
}

in_venv demo install
echo "# To type these commands yourself: source $VENV/bin/activate"
exec "$VENV/bin/python" scripts/demo.py "$@"
