#!/bin/sh
# SPDX-License-Identifier: MIT
#
# dev.sh: builds what changed in build/release and installs every package of python/ into .venv,
# editable: a change to a Python file counts at once, one to a C file after `make dev`.
set -eu

tools/build.sh release
install() { python -m pip install -qq --disable-pip-version-check --no-build-isolation --no-deps "$@"; }
install --config-settings=build-dir="$PWD/build/release" -e ./python/libattn
set --
for project in python/*/pyproject.toml; do
    [ "$project" = python/libattn/pyproject.toml ] || set -- "$@" -e "./$(dirname "$project")"
done
[ $# = 0 ] || install "$@"
