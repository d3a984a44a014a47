#!/usr/bin/env bash
# Runs every fuzz target for SECONDS each, two at a time, over a copy of its seed corpus; a finding stays in build/fuzz/findings.
set -eu
seconds=${1:-600}
mkdir -p build/fuzz/findings
run() {
    local target=$1 name=${1##*/fuzz_}
    mkdir -p "build/fuzz/grown/$name"
    "$target" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -max_len=65536 -print_final_stats=1 \
        -artifact_prefix="build/fuzz/findings/$name-" "build/fuzz/grown/$name" "tests/fuzz/corpus/$name" > "build/fuzz/$name.log" 2>&1 \
        && echo "fuzz $name: $(grep -o 'stat::number_of_executed_units: [0-9]*' "build/fuzz/$name.log" | grep -o '[0-9]*') executions in $seconds s, no finding" \
        || { echo "fuzz $name: FINDING, see build/fuzz/$name.log"; return 1; }
}
export -f run
export seconds
ls build/fuzz/fuzz_* | grep -v '\.' | xargs -P 2 -I{} bash -c 'run {}'
