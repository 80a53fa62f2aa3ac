# shellcheck shell=bash
# Sourced by demo.sh and test.sh: `in_venv NAME FUNCTION` makes the virtual environment $VENV where there is none and
# runs FUNCTION, which installs into it. Neither happens again before pyproject.toml changes.
#
# Two environment variables choose another one than .venv with the first suitable Python on the PATH:
#   VENV    the directory of the virtual environment
#   PYTHON  the interpreter that makes it, as in: PYTHON=python3.13 VENV=.venv313 bash scripts/test.sh --quick
VENV=${VENV:-.venv}

find_python() {
    local python choices=(python3 python3.13 python3.12 python3.11)
    if [ -n "${PYTHON:-}" ]; then
        choices=("$PYTHON")
    fi
    # Debian's python3 without its venv package cannot make one, and a python3 built without ssl cannot download.
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
        echo "$0: $VENV holds $held, and PYTHON=$PYTHON is $wanted: name another directory with VENV, or delete $VENV" >&2
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
    echo "installing into $VENV, which takes a few minutes the first time"
    "$2"
    cp pyproject.toml "$stamp"
}
