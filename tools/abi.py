# SPDX-License-Identifier: MIT
"""Checks what the built objects show the world against tools/abi.txt.

    abi.py BUILD        names exported, libraries needed, SONAME; exit status 1 where they differ
    abi.py BUILD --write   writes tools/abi.txt instead

attn.h is the other half: every ATTN_API function of it is exported by libattn.so, and nothing else.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tools" / "abi.txt"
HEADER = ROOT / "include" / "attn" / "attn.h"
OBJECTS = ("libattn.so", "libattn_ffi.so")
HEAD = """\
# SPDX-License-Identifier: MIT
#
# What each shared object exports, one name a line; written by `tools/abi.py BUILD --write`.
# A line that goes away or changes is a break of the ABI: say so in CHANGELOG.md.
"""


def run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def exported(path: Path) -> list[str]:
    lines = run("nm", "-D", "--defined-only", "--format=posix", path).splitlines()
    return sorted(line.split()[0].split("@")[0] for line in lines)


def undefined(path: Path) -> list[str]:
    lines = run("nm", "-D", "--undefined-only", "--format=posix", path).splitlines()
    return sorted(line.split()[0].split("@")[0] for line in lines)


def dynamic(path: Path, field: str) -> list[str]:
    return re.findall(rf"^\s*{field}\s+(\S+)", run("objdump", "-p", path), re.MULTILINE)


def declared() -> list[str]:
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    return sorted(re.findall(r"ATTN_API\b[^;(]*?\b(attn_\w+)\(", text))


def current(build: Path) -> str:
    parts = [HEAD]
    for name in OBJECTS:
        if (build / name).exists():
            parts.append("\n".join([f"\n[{name}]", *exported(build / name), ""]))
    return "".join(parts)


def faults(build: Path) -> list[str]:
    """One line for each thing that is not as promised."""
    found = []
    library = build / "libattn.so"
    if exported(library) != declared():
        odd = set(exported(library)) ^ set(declared())
        found.append(f"libattn.so and attn.h differ: {', '.join(sorted(odd))}")
    if dynamic(library, "SONAME") != ["libattn.so.0"]:
        found.append(f"SONAME: expected libattn.so.0, got {dynamic(library, 'SONAME')}")
    for name in OBJECTS:
        if not (build / name).exists():
            found.append(f"{name} was not built")
            continue
        needed = set(dynamic(build / name, "NEEDED"))
        allowed = {"libc.so.6", "libm.so.6", "libgomp.so.1", "ld-linux-x86-64.so.2"}
        if name == "libattn_ffi.so":
            allowed.add("libattn.so.0")
            stray = [x for x in exported(build / name) if not x.startswith("__tvm_ffi_")]
            if stray:
                found.append(f"{name} exports {', '.join(stray)}")
        if needed - allowed:
            found.append(f"{name} needs {', '.join(sorted(needed - allowed))}")
        for field in ("RPATH", "RUNPATH"):
            if dynamic(build / name, field):
                found.append(f"{name} has a {field}")
    if current(build) != LIST.read_text():
        old, new = set(LIST.read_text().splitlines()), set(current(build).splitlines())
        gone, come = sorted(old - new), sorted(new - old)
        found.append(f"tools/abi.txt: gone {gone}, new {come}; after a look: tools/abi.py BUILD --write")
    return found


def main() -> int:
    build = Path(sys.argv[1])
    if "--write" in sys.argv:
        LIST.write_text(current(build))
        return 0
    found = faults(build)
    print("\n".join(f"abi: {line}" for line in found) or "abi: as listed")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
