# Sourced by demo.sh and test.sh: `in_venv NAME FUNCTION` makes .venv where there is none and runs FUNCTION, which
# installs into it. Neither happens again before pyproject.toml changes.

find_python() {
    local python
    # Debian's python3 without its venv package cannot make one, and a python3 built without ssl cannot download.
    for python in python3 python3.13 python3.12 python3.11; do
        if "$python" -c 'import ensurepip, ssl, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    echo "$0: no Python 3.11 or newer with ensurepip and ssl (python3 is: $(python3 --version 2>&1 | head -n 1)):" \
        "install one, on Debian and Ubuntu together with its python3-venv package" >&2
    return 1
}

pip_install() {
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"
}

in_venv() {
    local stamp=.venv/installed-$1.toml python
    if cmp -s pyproject.toml "$stamp"; then
        return
    fi
    if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
        python=$(find_python)
        "$python" -m venv .venv
    fi
    echo "installing into .venv, which takes a few minutes the first time"
    "$2"
    cp pyproject.toml "$stamp"
}
