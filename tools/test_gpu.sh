#!/bin/sh
# SPDX-License-Identifier: MIT
#
# test_gpu.sh: what needs a Hopper GPU, with the library of build/release: the C program's cases on the
# kernels, each device helper alone, the GPU checks over the C ABI, the Python tests and the clients.
# tests/unit_cuda/sanitize.sh runs every kernel under compute-sanitizer's tools.
set -eu

python -c 'import sys, torch; ok = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
sys.exit(None if ok else "libattn: no Hopper GPU that torch sees here")'
ATTN_LIB=${ATTN_LIB:-$PWD/build/release/libattn.so}
DLPACK_INCLUDE=${DLPACK_INCLUDE:-$(sed -n 's/^-- libattn: dlpack.h from //p' build/release/configure.log)}
export ATTN_LIB DLPACK_INCLUDE

for op in mha_fwd mla kda; do
    build/release/attn_check --op $op --isa sm90
done
tests/unit_cuda/run.sh build/release
python -m pytest tests/python tests/clients -m gpu
