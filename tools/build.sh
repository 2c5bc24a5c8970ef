#!/bin/sh
# SPDX-License-Identifier: MIT
#
# build.sh release|asan|tsan|clang [target...]: configures build/<kind> and builds it.  asan has AMX tiles in
# plain C: the address sanitizer sees their loads and stores, and any machine with AVX-512-BF16 runs them.
#   CUDA    AUTO, ON or OFF: GPU kernels (release only), or pip: with the compiler out of its Python
#           packages instead of nvcc; kept from the last time when not set
#   WERROR  ON: warnings are errors; likewise
#   JOBS    how many compilers at once
set -eu

kind=$1; shift
set -- "${@:-all}"
case $kind in
release) options= ;;
asan) options="-DCMAKE_BUILD_TYPE=Sanitize -DATTN_SANITIZE=address,undefined -DATTN_AMX_EMU=ON -DATTN_CUDA=OFF -DATTN_FFI=OFF" ;;
tsan) options="-DCMAKE_BUILD_TYPE=Sanitize -DATTN_SANITIZE=thread -DATTN_CUDA=OFF -DATTN_FFI=OFF" ;;
clang) options="-DCMAKE_BUILD_TYPE=Debug -DCMAKE_C_COMPILER=clang -DATTN_CUDA=OFF" WERROR=ON ;;
*) echo "build.sh: no kind named $kind" >&2; exit 2 ;;
esac

compiler=
if [ "${CUDA:-}" ] && [ "$kind" = release ]; then
    compiler=-DATTN_NVCC=
    if [ "$CUDA" = pip ]; then
        tools/venv.sh cuda
        compiler=-DATTN_NVCC=$PWD/tools/pip_nvcc.py CUDA=ON
    fi
fi

dir=build/$kind
log=$dir/configure.log
mkdir -p "$dir"
# shellcheck disable=SC2086
cmake -S . -B "$dir" -G Ninja -DPython_EXECUTABLE="$PWD/.venv/bin/python" \
    -DPython3_EXECUTABLE="$PWD/.venv/bin/python" $compiler \
    ${WERROR:+-DATTN_WERROR=$WERROR} ${CUDA:+-DATTN_CUDA=$CUDA} $options >"$log" 2>&1 ||
    { cat "$log" >&2; exit 1; }
grep '^-- libattn:' "$log" | sed 's/^-- //' || true
cmake --build "$dir" --parallel "${JOBS:-2}" --target "$@"
