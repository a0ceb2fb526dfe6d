# Sourced by the other scripts: makes .venv if it is not there and installs the package with the extras it is
# given, once per change of pyproject.toml. Afterwards $python and $diffussm are the environment's.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "error: $*" >&2
    exit 1
}

use_environment() {
    local extras=$1 found
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        [ -z "${PYTHON:-}" ] || command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON is no program"
        found=""
        for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.10; do
            if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; then
                found=$candidate
                break
            fi
        done
        [ -n "$found" ] || fail "Python 3.10 to 3.13 is needed and was not found: install it, or set PYTHON=/path/to/python"
        echo "== making .venv with $("$found" --version)"
        "$found" -m venv --clear .venv || fail "could not make .venv: on Debian and Ubuntu, apt-get install python3-venv"
    fi
    python=$PWD/.venv/bin/python
    diffussm=$PWD/.venv/bin/diffussm
    local stamp=.venv/.installed-$extras
    if ! cmp -s pyproject.toml "$stamp"; then
        echo "== installing diffussm[$extras] and what it needs into .venv (PyTorch is large: some minutes)"
        "$python" -m pip install --quiet --disable-pip-version-check --editable ".[$extras]" \
            || fail "installation failed: is the network up, and are 8 GB free?"
        cp pyproject.toml "$stamp"
    fi
}
