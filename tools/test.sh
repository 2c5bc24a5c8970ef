#!/bin/sh
# SPDX-License-Identifier: MIT
#
# test.sh: everything `make test` runs, in the order in which a fault is cheapest to find.  A stage that
# fails ends the run.  Sanitizer builds check fewer cases by themselves.  FROM=<stage> starts later, e.g. FROM=python.
set -eu

export WERROR=ON

stage() {
    name=$1; shift
    if [ -n "${FROM:-}" ] && [ "$FROM" != "$name" ]; then return; fi
    FROM=
    printf '\n==== %s\n' "$name"
    began=$(date +%s)
    "$@" || { printf '==== %s: FAILED after %d s\n' "$name" $(($(date +%s) - began)); exit 1; }
    times="${times:-} $name $(($(date +%s) - began)) s,"
}

build() { tools/build.sh release all attn_check; }
abi() { python tools/abi.py build/release && python tools/isa.py build/release; }
check() { build/release/attn_check; }
asan() { tools/build.sh asan attn_check && build/asan/attn_check; }
emu() { tools/build.sh emu attn_check && build/emu/attn_check --isa amx --quick; }
tsan() { tools/build.sh tsan attn_check && OMP_NUM_THREADS=1 OMP_THREAD_LIMIT=1 build/tsan/attn_check; }
demo() { python demo/search.py && python demo/mla.py; }
python_tests() { python -m pytest tests; }

stage build build
stage abi abi
stage check check
stage asan asan
stage emu emu
stage tsan tsan
stage lint tools/lint.sh
stage install tools/dev.sh
stage demo demo
stage python python_tests
printf '\nstages:%s\n' "${times%,}"
