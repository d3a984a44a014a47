#!/bin/sh
# NEON against scalar: cross-compiles parity.c for AArch64, runs it under QEMU user emulation and compares what it prints with NATIVE, the same
# program built for this machine. Exit status 77 (skipped) where the cross-compiler or the emulator is missing.
#     run.sh NATIVE SOURCE_DIR
set -eu
native=$1
root=$2
cc=aarch64-linux-gnu-gcc
for emulator in qemu-aarch64 qemu-aarch64-static; do
    command -v $emulator >/dev/null && break
    emulator=
done
if ! command -v $cc >/dev/null || [ -z "$emulator" ]; then
    echo "neon: skipped, this needs $cc and qemu-aarch64 (Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user)"
    exit 77
fi
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$root"
$cc -std=c17 -O2 -static -ffp-contract=off -D_GNU_SOURCE -Iinclude -Isrc -o "$dir/parity" tests/neon/parity.c src/kernels/scalar.c src/kernels/neon.c \
    src/kernels/gemm.c src/kernels/dispatch.c src/quant/*.c src/base/cpu.c src/base/error.c src/base/mem.c src/base/pages.c src/base/threads.c -lm -lpthread
ARROWQUANT_ISA=scalar "$native" >"$dir/scalar"
"$native" >"$dir/best"
ARROWQUANT_ISA=neon $emulator "$dir/parity" >"$dir/neon"
ARROWQUANT_ISA=scalar $emulator "$dir/parity" >"$dir/arm-scalar"
for other in best neon arm-scalar; do
    diff "$dir/scalar" "$dir/$other" || {
        echo "neon: $other differs from scalar"
        exit 1
    }
done
echo "neon: $(wc -l <"$dir/neon") digests agree"
