# SPDX-License-Identifier: MIT
"""What the tests of the build share: test_abi.py, test_install.py and test_wheels.py.

The builds are the Makefile's own (build/release, build/wheel), so only what changed is compiled.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*command, env: dict | None = None, cwd: Path = ROOT) -> str:
    """Standard output of a command, run with this environment's tools first on the path; one that
    fails is shown with all it said."""
    bin_first = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": bin_first, **(env or {})}
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, cwd=cwd, env=env)
    assert done.returncode == 0, f"{' '.join(map(str, command))}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@functools.cache
def release() -> Path:
    """build/release, up to date."""
    run("tools/build.sh", "release")
    return ROOT / "build" / "release"
