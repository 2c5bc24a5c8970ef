#!/bin/sh
# SPDX-License-Identifier: MIT
#
# lint.sh: formatting of C and Python, ruff, white space, SPDX lines, and clang's warnings where there
# is a clang.  Looks at tracked files only; runs them all and fails at the end.
set -u

status=0
check() {
    name=$1; shift
    if output=$("$@" 2>&1); then
        echo "lint: $name: clean"
    else
        printf '%s\nlint: %s: see above\n' "$(printf '%s' "$output" | head -60)" "$name"
        status=1
    fi
}

c_format() { git ls-files '*.c' '*.h' | xargs clang-format --dry-run -Werror; }

white_space() { git diff --check "$(git hash-object -t tree /dev/null)" -- . ':!*.txt'; }

spdx_lines() {
    missing=$(git ls-files '*.c' '*.h' '*.cu' '*.cuh' '*.def' '*.py' '*.sh' '*.toml' '*.cmake' Makefile '*CMakeLists.txt' |
        xargs grep -L 'SPDX-License-Identifier: MIT')
    printf '%s' "$missing"
    [ -z "$missing" ]
}

check "C formatting (make fmt)" c_format
check "Python (make fmt)" ruff check .
check "Python formatting (make fmt)" ruff format --check -q .
check "white space" white_space
check "SPDX lines" spdx_lines
if command -v clang >/dev/null; then
    check "clang's warnings" tools/build.sh clang attn_objects attn_ffi attn_check
else
    echo "lint: no clang here; gcc's warnings alone"
fi
exit $status
