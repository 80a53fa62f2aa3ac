#!/usr/bin/env bash
# Makes .venv, installs the package in it and runs demo.py. Needs only Python 3.11 or newer.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh

install() {
    pip_install --editable .
}

in_venv demo install
echo "# To type these commands yourself: source $VENV/bin/activate"
exec "$VENV/bin/python" scripts/demo.py "$@"
