#!/bin/sh
# SPDX-License-Identifier: MIT
#
# Everything here, in order of cost.  Needs a library (ATTN_LIB or build*/libattn.so), dlpack.h
# (DLPACK_INCLUDE), nvcc, and torch on a Hopper GPU; without a GPU only plans.sh runs.
#     DLPACK_INCLUDE=... tests/unit_cuda/run.sh [BUILD_DIR]
set -e
cd "$(dirname "$0")/../.."
out=${1:-build}
nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
cuda=${CUDA_HOME:-$(dirname "$(dirname "$(readlink -f "$nvcc")")")}

tests/unit_cuda/plans.sh "$out"
python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || exit 0
"$cuda/bin/nvcc" -gencode arch=compute_90a,code=sm_90a -std=c++17 -Isrc/cuda/kernels \
    tests/unit_cuda/test_helpers.cu -o "$out/test_helpers"
"$out/test_helpers"
python3 tests/unit_cuda/check_workspace.py
python3 tests/unit_cuda/check_mha_fwd_edges.py
python3 tests/unit_cuda/check_mha_fwd.py --cases 300
python3 tests/unit_cuda/check_mha_decode.py --cases 300
python3 tests/unit_cuda/check_mla_decode.py --cases 150
