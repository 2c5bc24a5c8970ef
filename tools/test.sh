#!/bin/sh
# SPDX-License-Identifier: MIT
#
# test.sh: everything `make test` runs.  After the build two lanes go side by side, each in the order in
# which a fault is cheapest to find; a stage says what it has to say when it ends, and after one that
# failed no other begins.  Sanitizer builds check fewer cases by themselves.
#   STAGES  those to run, as in make test STAGES="lint python"; the others are left out
set -eu

export WERROR=ON
export OMP_WAIT_POLICY=passive # a team that waits leaves its core to the other lane

logs=build/test
rm -rf "$logs"
mkdir -p "$logs"

build() { tools/build.sh release all attn_check; }
plans() { tests/unit_cuda/plans.sh build/release; }
abi() { python tools/abi.py build/release && python tools/isa.py build/release; }
check() { build/release/attn_check; }
asan() { tools/build.sh asan attn_check && build/asan/attn_check; }
tsan() { tools/build.sh tsan attn_check && OMP_NUM_THREADS=1 OMP_THREAD_LIMIT=1 build/tsan/attn_check; }
lint() { tools/lint.sh; }
install() { tools/dev.sh; }
demo() { python demo/search.py --limit 400 && python demo/mla.py; }
python_tests() { python -m pytest tests; }

run() {
    name=$1
    case " ${STAGES:-$name} " in *" $name "*) ;; *) return ;; esac
    began=$(date +%s)
    status=0
    "${2:-$name}" >"$logs/$name" 2>&1 || status=$?
    seconds=$(($(date +%s) - began))
    {
        printf '\n==== %s\n' "$name"
        cat "$logs/$name"
        [ $status = 0 ] || printf '==== %s: FAILED after %d s\n' "$name" $seconds
    } >"$logs/$name.shown"
    cat "$logs/$name.shown"
    if [ $status = 0 ]; then echo "$name $seconds s" >>"$logs/times"; else : >"$logs/failed"; fi
}
lane() { for stage; do [ -e "$logs/failed" ] || run "$stage"; done; }

trap 'trap - INT TERM; kill 0' INT TERM # lanes in the background do not hear of Ctrl-C
lane build
lane check asan tsan lint &
lane plans abi install demo
[ -e "$logs/failed" ] || run python python_tests
wait
[ ! -e "$logs/failed" ]
printf '\nstages: %s\n' "$(paste -sd, "$logs/times" 2>/dev/null | sed 's/,/, /g')"
