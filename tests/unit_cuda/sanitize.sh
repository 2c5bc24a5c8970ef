#!/bin/sh
# SPDX-License-Identifier: MIT
#
# Every Hopper kernel under compute-sanitizer's four tools, at sizes that take seconds (sanitize.c), a
# process each, and a look whether any kernel of the library was left out.
#     DLPACK_INCLUDE=... tests/unit_cuda/sanitize.sh [BUILD_DIR]
#   TOOLS  those to run
#   JOBS   processes at once
# None of them should have anything to report.  Two things they want of a kernel, which PTX does not:
# - racecheck takes an arrival on an mbarrier to be after what its own thread did, not after what __syncwarp
#   put before it: all lanes arrive, unless only the tensor cores or the copy engine, which it does not see,
#   used the memory.  It costs nothing.
# - synccheck wants roles that meet to do so at one instruction, or at an mbarrier, and every phase of an
#   mbarrier waited for by somebody.
set -eu
cd "$(dirname "$0")/../.."
out=${1:-build/release}
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
logs=$out/sanitize.logs
rm -rf "$logs"
mkdir -p "$logs"

cc -std=c11 -D_GNU_SOURCE -O1 -Wall -Wextra -Iinclude -I"$DLPACK_INCLUDE" tests/unit_cuda/sanitize.c \
    "$out/libattn.so" -Wl,-rpath,"$(realpath "$out")" -ldl -o "$out/sanitize"

# The API's own errors are not reported: that no context is current yet is found out by asking.
export sanitizer logs out
for tool in ${TOOLS:-memcheck synccheck initcheck racecheck}; do
    for group in $("$out/sanitize"); do echo "$tool" "$group"; done
done | xargs -P "${JOBS:-8}" -L 1 sh -c '
    log=$logs/$0.$1
    "$sanitizer" --tool "$0" --report-api-errors no --error-exitcode 9 "$out/sanitize" "$1" >"$log" 2>&1 && exit
    status=$?
    echo "$0 $1: exit $status"
    grep -m 12 -E "^=========|sanitize:" "$log"
    touch "$logs/failed"'

cat "$logs"/*.* | sed -n 's/^\(attn_[a-z_]*_sm90[a-z0-9_]*\)$/\1/p' | sort -u >"$logs/ran"
python3 - "$out/libattn.so" <<'END' | sort -u >"$logs/built"
import ctypes, itertools, sys
name = ctypes.CDLL(sys.argv[1]).attn_kernel_name
name.restype = ctypes.c_char_p
names = itertools.takewhile(bool, map(name, itertools.count()))
print(*(x.decode() for x in names if b"_sm90" in x), sep="\n")
END
comm -13 "$logs/ran" "$logs/built" >"$logs/left_out"
sed 's/^/not run: /' "$logs/left_out"
echo "$(wc -l <"$logs/ran") kernels, $(ls "$logs" | grep -c '\.') runs"
[ ! -e "$logs/failed" ] && [ ! -s "$logs/left_out" ]
