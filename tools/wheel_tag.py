# SPDX-License-Identifier: MIT
"""Gives a wheel the manylinux tag that its shared objects call for.

The tag is the newest GLIBC_x.y that one of them names as a symbol version (2.17 at least, the oldest
that installers still know).  libgomp stays outside, against manylinux habit: a second OpenMP pool in
a process that also runs torch makes both slower, so the loader shall find the one that is there.
"""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

OLDEST = (2, 17)
ALLOWED = re.compile(r"lib(c|m|gomp|attn)\.so\.\d+$|ld-linux-x86-64\.so\.2$")


def needs(path: Path) -> tuple[set[str], set[tuple[int, int]]]:
    """The libraries a shared object names, and the versions of glibc's symbols."""
    private = subprocess.run(["objdump", "-p", path], check=True, capture_output=True, text=True).stdout
    libraries = set(re.findall(r"NEEDED\s+(\S+)", private))
    versions = {(int(a), int(b)) for a, b in re.findall(r"\bGLIBC_(\d+)\.(\d+)", private)}
    if "RPATH" in private or "RUNPATH" in private:
        sys.exit(f"{path.name}: has a run path; libraries are the loader's to find")
    return libraries, versions


def platform_tag(wheel: Path) -> str:
    newest = OLDEST
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        objects = [name for name in archive.namelist() if name.endswith(".so")]
        if not objects:
            sys.exit(f"{wheel.name}: holds no shared object")
        for name in objects:
            libraries, versions = needs(Path(archive.extract(name, folder)))
            if foreign := {x for x in libraries if not ALLOWED.match(x)}:
                sys.exit(f"{wheel.name}: {name} needs {', '.join(sorted(foreign))}")
            newest = max(newest, *versions)
    return f"manylinux_{newest[0]}_{newest[1]}_x86_64"


def main() -> None:
    for wheel in map(Path, sys.argv[1:]):
        tag = platform_tag(wheel)
        subprocess.run(
            [sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag", tag, wheel],
            check=True,
            stdout=subprocess.DEVNULL,
        )


if __name__ == "__main__":
    main()
