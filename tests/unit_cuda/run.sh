#!/bin/sh
# SPDX-License-Identifier: MIT
#
# Everything here.  Needs a library (ATTN_LIB or build*/libattn.so), dlpack.h (DLPACK_INCLUDE), nvcc, and
# torch on a Hopper GPU; without a GPU only plans.sh runs.  The random cases are shared out to several
# processes, each from a seed of its own, since their time is that of small steps of the reference.
#     DLPACK_INCLUDE=... tests/unit_cuda/run.sh [BUILD_DIR]
#   JOBS  processes at once
set -e
cd "$(dirname "$0")/../.."
out=${1:-build}
nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
cuda=${CUDA_HOME:-$(dirname "$(dirname "$(readlink -f "$nvcc")")")}

tests/unit_cuda/plans.sh "$out"
python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || exit 0

helpers="$cuda/bin/nvcc -gencode arch=compute_90a,code=sm_90a -std=c++17 -Isrc/cuda/kernels
    tests/unit_cuda/test_helpers.cu -o $out/test_helpers && $out/test_helpers"
check="python3 tests/unit_cuda/check"
logs=$out/unit_cuda
rm -rf "$logs"
mkdir -p "$logs"
export logs
{
    echo $helpers
    echo ${check}_workspace.py
    echo ${check}_mha_fwd_edges.py
    for part in 1 2 3; do
        echo ${check}_mha_fwd.py --cases 100
        echo ${check}_mha_decode.py --cases 100 --graphs 2
        echo ${check}_mla_decode.py --cases 50 --graphs 2
    done
} | awk '{ printf "%02d %s\n", NR, $0 }' | xargs -P "${JOBS:-6}" -d '\n' -n 1 sh -c '
    number=${0%% *} command=${0#* } start=$(date +%s)
    { echo "-- $command"; eval "$command" && result=passed || result=FAILED
      echo "-- $result after $(($(date +%s) - start)) s"; } >"$logs/$number" 2>&1
    cat "$logs/$number"'
! grep -l "^-- FAILED" "$logs"/*
