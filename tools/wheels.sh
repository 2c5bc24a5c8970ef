#!/bin/sh
# SPDX-License-Identifier: MIT
#
# wheels.sh FOLDER: builds the wheel of each folder of python/ into FOLDER, with the tools of .venv and
# the objects of build/release, and gives the native one the manylinux tag that its symbols call for.
set -eu

out=${1:-dist}
mkdir -p "$out"
rm -f "$out"/*.whl
for project in python/*/pyproject.toml; do
    folder=$(dirname "$project")
    rm -rf "$folder/build" # what setuptools kept from files that are gone
    shared=
    if [ "$folder" = python/libattn ]; then shared="--config-setting=build-dir=$PWD/build/release"; fi
    python -m build --wheel --no-isolation $shared --outdir "$out" "$folder" >"$out/build.log" 2>&1 ||
        { cat "$out/build.log" >&2; exit 1; }
done
rm -f "$out/build.log"
python tools/wheel_tag.py "$out"/libattn-*.whl
du -ch "$out"/*.whl | sed 's/^/  /'
