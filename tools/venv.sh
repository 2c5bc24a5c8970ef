#!/bin/sh
# SPDX-License-Identifier: MIT
#
# venv.sh build|demo|test|cuda: brings .venv to what a part of the Makefile needs, adding only what is
# missing.  `build` holds the build tools (cmake, ninja, the tvm-ffi headers), `demo` adds torch and
# what the demo reads its model with, `test` adds the test and lint tools, `cuda` the CUDA compiler
# that CUDA=pip builds with.
#   PYTHON         the interpreter to make it from (python3)
#   VENV=system    install nothing: .venv is a view of the packages PYTHON has, which must do.  For a
#                  machine without a network, such as one with a GPU often is
#   TORCH_VERSION  the torch to install when that interpreter has none (2.13.0)
set -eu

part=$1
python=${PYTHON:-python3}
torch_version=${TORCH_VERSION:-2.13.0}
venv=.venv
bin=$venv/bin

fail() { printf 'libattn: %s\n' "$*" >&2; exit 1; }

if [ ! -x $bin/python ]; then
    command -v "$python" >/dev/null || fail "no $python here; name one with PYTHON=/path/to/python3"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "needs Python 3.10 or later; $python is $("$python" -V 2>&1).  Name another with PYTHON=..."
    needs=venv,ensurepip
    [ "${VENV:-}" != system ] || needs=venv
    "$python" -c "import $needs" 2>/dev/null ||
        fail "$python has no venv module (Debian: apt-get install python3-venv)"
    # A torch that this Python has serves here too.  A path file names its folder, because the shared
    # site-packages of a virtual environment are not those of the environment it was made from.
    shared=$("$python" -c 'import importlib.util as u; s = u.find_spec("torch"); print(s.submodule_search_locations[0] if s else "")')
    [ "$shared" ] || [ "${VENV:-}" != system ] || fail "$python has no torch, and VENV=system installs none"
    pip=
    [ "${VENV:-}" != system ] || pip=--without-pip
    "$python" -m venv ${shared:+--system-site-packages} $pip $venv
    if [ -n "$shared" ]; then
        echo "libattn: using the torch that $python has"
        dirname "$shared" >"$($bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
    fi
fi

if [ "${VENV:-}" = system ]; then
    for tool in cmake ninja; do # they may lie beside the packages
        command -v $tool >/dev/null || ln -sf "$(cat $venv/lib/python3*/site-packages/shared.pth)/../../../bin/$tool" $bin/
        command -v $tool >/dev/null || fail "VENV=system installs nothing, and there is no $tool here"
    done
    needed="pip scikit_build_core setuptools wheel tvm_ffi"
    [ "$part" != test ] || needed="$needed pytest hypothesis"
    # shellcheck disable=SC2086
    missing=$($bin/python -c 'import importlib.util as u, sys
print(*[name for name in sys.argv[1:] if not u.find_spec(name)])' $needed)
    [ -z "$missing" ] || fail "VENV=system installs nothing, and $($bin/python -V) lacks $missing"
    exit 0
fi

# Python compiles what is imported, and much of what is installed never is.
fetch() { $bin/python -m pip install -qq --disable-pip-version-check --no-compile "$@"; }

# install STAMP FILE...: once, and again when one of the requirement files changes.
install() {
    stamp=$venv/$1; shift
    for file in "$@"; do
        [ "$stamp" -nt "$file" ] && continue
        echo "libattn: installing $* into $venv"
        for each in "$@"; do
            case $each in
            *model.txt) fetch --no-deps -r "$each" ;;
            *) fetch -r "$each" ;;
            esac
        done
        touch "$stamp"
        return
    done
}

install_torch() {
    $bin/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' && return
    echo "libattn: installing torch $torch_version into $venv"
    fetch "torch==$torch_version"
}

install stamp-build requirements/build.txt
case $part in
build) ;;
demo) install_torch; install stamp-demo requirements/demo.txt requirements/model.txt ;;
test) install_torch; install stamp-demo requirements/demo.txt requirements/model.txt
      install stamp-test requirements/test.txt ;;
cuda) install stamp-cuda requirements/cuda.txt ;;
*) fail "venv.sh: no part named $part" ;;
esac
