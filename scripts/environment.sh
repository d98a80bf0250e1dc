# Sourced by scripts/check, scripts/test and scripts/demo: a virtual environment in .venv with the pinned releases.
#
#   prepare_environment [arguments of pip install, for example --group test]
#
# It is made once and again only when Python, pyproject.toml, constraints.txt or the folder's place have changed.
# pip's own settings (an index, a proxy, certificates) hold as everywhere.

PIP_RELEASE=26.3

# Print the first interpreter that is new enough.
find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            command -v "$candidate"
            return 0
        fi
    done
    echo "error: Python 3.11, 3.12 or 3.13 is needed and none was found (python3 is: $(python3 --version 2>/dev/null || echo missing))." >&2
    echo "hint: install one, for example the packages python3 and python3-venv of your system, and start again." >&2
    return 2
}

# Build or refresh .venv; stop the script with a message when that fails.
prepare_environment() {
    local root python stamp wanted
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || return 2
    cd "$root" || return 2
    python=$(find_python) || return 2
    stamp=.venv/.stamp-$(printf '%s' "$*" | tr -c 'a-z0-9' '-')
    wanted=$({ cat pyproject.toml constraints.txt; "$python" --version; echo "$root $PIP_RELEASE"; } |
        "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())') || return 2
    if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return 0
    fi

    echo "Setting up .venv with $("$python" --version); the first time takes a few minutes." >&2
    if ! "$python" -m venv .venv >&2; then
        echo "error: $python cannot make a virtual environment." >&2
        echo "hint: install its venv module (package python3-venv on Debian and Ubuntu) and start again." >&2
        return 2
    fi
    if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check "pip==$PIP_RELEASE" >&2 ||
        ! .venv/bin/python -m pip install --quiet --constraint constraints.txt --build-constraint constraints.txt \
            --editable . "$@" >&2; then
        echo "error: pip could not install the pinned dependencies; its messages stand above." >&2
        echo "hint: check the network, and pip's settings for an index or proxy, and start again." >&2
        return 2
    fi
    printf '%s\n' "$wanted" >"$stamp"
}
