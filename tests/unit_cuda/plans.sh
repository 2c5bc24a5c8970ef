#!/bin/sh
# SPDX-License-Identifier: MIT
#
# What needs no GPU: the numbers of src/cuda/driver.h beside the toolkit's, where there is one; that
# the tests of the kernels' helpers compile, where there is nvcc; drivers that are not as they should
# be; plans of GPU calls by the thousand.  dlpack.h is in DLPACK_INCLUDE, or where BUILD_DIR was
# configured to find it.
#     tests/unit_cuda/plans.sh [BUILD_DIR]
set -eu
cd "$(dirname "$0")/../.."
out=${1:-build/release}
cuda=${CUDA_HOME:-/usr/local/cuda}
dlpack=${DLPACK_INCLUDE:-$(sed -n 's/^-- libattn: dlpack.h from //p' "$out/configure.log")}
flags="-std=c11 -D_GNU_SOURCE -Isrc -Iinclude -I$dlpack"

if [ -e "$cuda/include/cuda.h" ]; then
    cc -fsyntax-only $flags -I"$cuda/include" tests/unit_cuda/test_driver_abi.c
fi
if [ -x "$cuda/bin/nvcc" ]; then
    "$cuda/bin/nvcc" -gencode arch=compute_90a,code=sm_90a -std=c++17 -Isrc/cuda/kernels \
        tests/unit_cuda/test_helpers.cu -c -o "$out/test_helpers.o" >"$out/test_helpers.log" 2>&1 ||
        { cat "$out/test_helpers.log"; exit 1; }
fi
cc -O1 $flags -Wall -Wextra tests/unit_cuda/test_driver.c \
    src/cuda/driver.c src/core/status.c -pthread -o "$out/test_driver"
"$out/test_driver"
cc -O1 $flags tests/unit_cuda/test_plan.c \
    src/cuda/mha_fwd_plan.c src/cuda/mha_decode_plan.c src/core/status.c -o "$out/test_plan"
"$out/test_plan"
cc -O1 $flags tests/unit_cuda/test_kda_plan.c \
    src/cuda/kda_plan.c src/core/status.c -o "$out/test_kda_plan"
"$out/test_kda_plan"
