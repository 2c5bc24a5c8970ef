#!/bin/sh
# SPDX-License-Identifier: MIT
#
# test_gpu.sh: what needs a Hopper GPU, with the library of build/release: the C program's cases on the
# kernels; each device helper alone and the GPU checks over the C ABI; the Python tests and the clients.
# The three run side by side, since most of their time is the references' on the CPU; each one's output
# comes when it is over, and stays in build/release/test-gpu.
#   JOBS  how many Python tests at once, where pytest-xdist is there
# tests/unit_cuda/sanitize.sh runs every kernel under compute-sanitizer's tools.
set -eu

python -c 'import sys, torch; ok = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
sys.exit(None if ok else "libattn: no Hopper GPU that torch sees here")'
ATTN_LIB=${ATTN_LIB:-$PWD/build/release/libattn.so}
DLPACK_INCLUDE=${DLPACK_INCLUDE:-$(sed -n 's/^-- libattn: dlpack.h from //p' build/release/configure.log)}
export ATTN_LIB DLPACK_INCLUDE OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} OMP_WAIT_POLICY=passive

logs=build/release/test-gpu
rm -rf $logs
mkdir -p $logs

c_program() {
    for op in mha_fwd mla kda; do
        build/release/attn_check --op $op --isa sm90 || return 1
    done
}
kernels() { JOBS=6 tests/unit_cuda/run.sh build/release; }
python_tests() {
    jobs=
    python -c 'import xdist' 2>/dev/null && jobs="-n ${JOBS:-8}"
    # shellcheck disable=SC2086
    python -m pytest tests/python tests/clients -m gpu $jobs
}

for part in c_program kernels python_tests; do
    (
        start=$(date +%s)
        $part >$logs/$part.log 2>&1 && result=passed || result=FAILED
        cat $logs/$part.log
        echo "== $part: $result after $(($(date +%s) - start)) s" | tee $logs/$part.result
    ) &
done
wait
cat $logs/*.result
! grep -q FAILED $logs/*.result
