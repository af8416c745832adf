#!/usr/bin/env bash
# Build a virtual environment with this project and everything that `make demo` and `make test` need.
# PYTHON=/path/to/python3 chooses the interpreter; EXTRAS=train,composer chooses what is installed (default: dev);
# VENV and CONSTRAINTS, the folder and the pins, are set by the Makefile's STACK.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
constraints=${CONSTRAINTS:-constraints/newest.txt}
newest_python=14 # Python 3.14: pyproject.toml's requires-python
# torch 2.6 and 2.7 have wheels up to Python 3.13; what else these stacks pin ends at 3.12.
case "$constraints" in *newest*) ;; *) newest_python=12 ;; esac

say() { printf '\033[1m[setup]\033[0m %s\n' "$*"; }
fail() { printf '[setup] %s\n' "$*" >&2; exit 2; }

supported() { "$1" -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, $newest_python))" >/dev/null 2>&1; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        supported "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.10 to 3.$newest_python; choose another, or leave it out"
        echo "$PYTHON"
        return
    fi
    # The system's own first: Debian 12 has 3.11, Ubuntu 24.04 3.12, Debian 13 3.13.
    for candidate in python3 python3.13 python3.12 python3.11 python3.14 python3.10; do
        if command -v "$candidate" >/dev/null 2>&1 && supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.10 to 3.$newest_python was found; install one (Debian: apt-get install python3 python3-venv) or set PYTHON=/path/to/python3"
}

# The native decoder and FFCV are compiled from source, and antlr and friends may be; a fresh Debian has none of these.
install_system_packages() {
    local wanted=(libjpeg-dev libopencv-dev libturbojpeg0-dev pkg-config)
    command -v g++ >/dev/null 2>&1 || wanted+=(build-essential)
    case "$1" in  # Debian splits ensurepip and the headers off its own interpreter only
        /usr/bin/*) wanted+=("$2-venv" "$2-dev") ;;
    esac
    if ! command -v apt-get >/dev/null 2>&1; then
        say "this is not Debian or Ubuntu: install OpenCV, libjpeg-turbo and pkg-config with their headers first (macOS: brew install opencv jpeg-turbo pkg-config)"
        return
    fi
    local missing=() name
    for name in "${wanted[@]}"; do
        dpkg-query -W -f='${Status}' "$name" 2>/dev/null | grep -q 'ok installed' || missing+=("$name")
    done
    [ ${#missing[@]} -eq 0 ] && return
    local sudo=""
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null 2>&1 || fail "building FFCV needs: ${missing[*]}. Ask an administrator for: apt-get install ${missing[*]}"
        sudo="sudo"
    fi
    say "installing system packages: ${missing[*]}"
    $sudo apt-get update -qq
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

python=$(find_python)
executable=$("$python" -c 'import sys; print(sys.executable)')
version=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
install_system_packages "$executable" "$version"

say "creating $venv with $version and the versions of $constraints"
"$python" -m venv "$venv" || fail "$version could not make a virtual environment; on Debian: apt-get install $version-venv"
say "installing the project (about 6 GB of packages the first time; torch brings CUDA's libraries with it)"
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$venv/bin/python" -m pip install --quiet --constraint "$constraints" uv "setuptools>=77"
"$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --constraint "$constraints" --editable ".[${EXTRAS:-dev}]"
if ! "$venv/bin/python" -c "from data.decoding.native_decode import NativeDecoder; NativeDecoder()" 2>/dev/null; then
    say "the native decoder was not built; another one stands in, at twice the CPU time. It needs g++ and libjpeg-turbo's headers; to see why: $venv/bin/uv pip install --python $venv/bin/python --no-deps --verbose --editable ."
fi
say "ready: $venv/bin/python run.py --help"
