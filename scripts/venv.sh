# shellcheck shell=bash
# Sourced by demo.sh and test.sh. `in_venv NAME FUNCTION` makes the virtual environment $VENV if it does not exist, and
# calls FUNCTION, which installs packages in it. A later call does nothing until pyproject.toml changes.
#
# Environment variables:
#   VENV    directory of the virtual environment (default: .venv)
#   PYTHON  interpreter that makes it (default: the first suitable one on the PATH), for example
#           PYTHON=python3.13 VENV=.venv313 bash scripts/test.sh --quick
VENV=${VENV:-.venv}

find_python() {
    local python choices=(python3 python3.13 python3.12 python3.11)
    if [ -n "${PYTHON:-}" ]; then
        choices=("$PYTHON")
    fi
    # Debian's python3 cannot make a virtual environment without the package python3-venv. A Python without ssl cannot
    # download.
    for python in "${choices[@]}"; do
        if "$python" -c 'import ensurepip, ssl, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    python=${choices[0]}
    echo "$0: no Python 3.11 or newer with ensurepip and ssl ($python is: $("$python" --version 2>&1 | head -n 1)):" \
        "install one, on Debian and Ubuntu together with its python3-venv package" >&2
    return 1
}

pip_install() {
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

check_version() {
    local held wanted
    held=$("$VENV/bin/python" --version 2>&1) wanted=$("$PYTHON" --version 2>&1 | head -n 1) || true
    if [ "$held" != "$wanted" ]; then
        echo "$0: $VENV has $held, but PYTHON=$PYTHON is $wanted: set VENV to another directory, or delete $VENV" >&2
        return 1
    fi
}

in_venv() {
    local stamp=$VENV/installed-$1.toml python
    if [ -n "${PYTHON:-}" ] && [ -x "$VENV/bin/python" ]; then
        check_version
    fi
    if cmp -s pyproject.toml "$stamp"; then
        return
    fi
    if ! "$VENV/bin/python" -c 'import pip' 2>/dev/null; then
        python=$(find_python)
        "$python" -m venv "$VENV"
    fi
    echo "installing packages in $VENV; this takes a few minutes the first time"
    "$2"
    cp pyproject.toml "$stamp"
}
