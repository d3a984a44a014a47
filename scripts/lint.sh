#!/usr/bin/env bash
# Formatters and static analysis over everything; usage: lint.sh VENV
set -eu
venv=$1
c_files=$(git ls-files '*.c' '*.h')
clang-format --dry-run --Werror $c_files
"$venv/bin/ruff" check --quiet .
"$venv/bin/ruff" format --check --quiet .
if [ -d python/arrow_quant_v2 ]; then "$venv/bin/mypy" --no-error-summary python/arrow_quant_v2; fi
cppcheck --quiet --error-exitcode=1 --std=c11 --enable=warning,portability --inline-suppr --suppress=missingIncludeSystem \
    --suppress=normalCheckLevelMaxBranches -Iinclude -Isrc -D_GNU_SOURCE src cli
[ -f build/release/compile_commands.json ] || cmake --preset release > /dev/null
clang-tidy --quiet --extra-arg=-Wno-unknown-warning-option --extra-arg=-Wno-unused-value -p build/release $(git ls-files 'src/*.c' 'cli/*.c' | grep -v 'kernels/\(avx\|neon\)')
echo "lint: clean"
