#!/usr/bin/env bash
# Check this checkout on a GPU machine without a network, with the folder .gpu/ that scripts/gpu_kit.sh made.
# scripts/gpu_check.sh --help says more. PYTHON=python3 is the one that has torch; nothing is installed beside it.
set -euo pipefail
cd "$(dirname "$0")/.."
fail() { echo "gpu_check.sh: $*" >&2; exit 2; }

python=${PYTHON:-python3}
kit=${KIT:-.gpu}
command -v "$python" >/dev/null 2>&1 || fail "$python is not there; set PYTHON=/path/to/the/python3/that/has/torch"
for word in "$@"; do
    case "$word" in -h|--help) exec "$python" -m benchmarks.gpu_machine.check --help ;; esac
done
[ -f "$kit/kit.json" ] || fail "no kit in $kit; make one with scripts/gpu_kit.sh where there is a network, and copy it here"

site=$(mktemp -d "${TMPDIR:-/tmp}/gpu_check_site.XXXXXX")
decoder=data/decoding/_native_decode.abi3.so
placed=
trap 'rm -rf "$site"; [ -z "$placed" ] || rm -f "$placed"' EXIT

if ! "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
    --root-user-action ignore --target "$site" "$kit"/wheels/*.whl; then
    fail "the kit's wheels do not fit $("$python" --version); make a kit with scripts/gpu_kit.sh --python X.Y"
fi
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}"
# Python finds an extension in its package's folder; git ignores it there, and it goes at the end. One that was built
# for this very Python has another name, and goes first.
if [ ! -e "$decoder" ]; then
    placed=$decoder
    cp "$kit/native/_native_decode.abi3.so" "$decoder"
fi
# The decoder needs libjpeg.so.62, which Ubuntu does not have.
export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$(cd "$kit/native" && pwd)"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1

status=0
"$python" -m benchmarks.gpu_machine.check --kit "$kit" "$@" || status=$?
exit "$status"
