#!/bin/sh
# SPDX-License-Identifier: MIT
#
# dev.sh: builds what changed and installs every package of python/ into .venv, editable.
set -eu

set --
for project in python/*/pyproject.toml; do
    set -- "$@" -e "./$(dirname "$project")"
done
python -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps "$@"
