#!/usr/bin/env bash
# Installs the Debian packages that are missing; without the right to, prints the one line to run.
# Packages after "optional" only widen the tests (NEON under emulation, lint, fuzzing): their absence is no failure.
set -eu
needed=(build-essential cmake ninja-build pkg-config python3 python3-dev python3-pip python3-venv
        libjansson-dev libyaml-dev libxxhash-dev libssl-dev libzstd-dev liblz4-dev zlib1g-dev libcmocka-dev)
optional=(gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user
          clang clang-format clang-tidy cppcheck libclang-rt-14-dev)

command -v dpkg-query > /dev/null || exit 0 # no Debian: CMake says what it misses
is_missing() { ! dpkg-query -W -f='${Status}' "$1" 2> /dev/null | grep -q 'ok installed'; }

missing=() missing_optional=()
for p in "${needed[@]}"; do if is_missing "$p"; then missing+=("$p"); fi; done
for p in "${optional[@]}"; do if is_missing "$p"; then missing_optional+=("$p"); fi; done
# A cmake, ninja or Python that did not come as a Debian package serves as well.
keep=()
for p in "${missing[@]}"; do
    case $p in
        cmake) command -v cmake > /dev/null && continue ;;
        ninja-build) command -v ninja > /dev/null && continue ;;
        python3*) python3 -c 'import ensurepip, pip, sysconfig, os; assert os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2> /dev/null && continue ;;
    esac
    keep+=("$p")
done
missing=("${keep[@]}")
[ ${#missing[@]} -gt 0 ] || [ ${#missing_optional[@]} -gt 0 ] || exit 0

if [ "$(id -u)" = 0 ]; then sudo=""; elif command -v sudo > /dev/null && sudo -n true 2> /dev/null; then sudo="sudo"; else sudo="none"; fi
if [ "$sudo" = none ]; then
    [ ${#missing[@]} -eq 0 ] && exit 0
    echo "These Debian packages are missing and you may not install them. Run:" >&2
    echo "  sudo apt-get install ${missing[*]}" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
$sudo apt-get update -qq > /dev/null || true
if [ ${#missing[@]} -gt 0 ]; then
    echo "installing Debian packages: ${missing[*]}"
    $sudo apt-get install -y -qq "${missing[@]}" > /dev/null
fi
for p in "${missing_optional[@]}"; do
    $sudo apt-get install -y -qq "$p" > /dev/null 2>&1 || echo "note: Debian package $p is not to be had; what needs it is skipped"
done
