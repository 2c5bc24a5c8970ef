# SPDX-License-Identifier: MIT
"""Disassembles every object of a build: no instruction may stand outside the rung its file is named for.

    isa.py BUILD

A file named *_avx2.c may use AVX2, FMA and F16C; *_avx512.c adds AVX-512 F, BW, VL and DQ;
*_avx512bf16.c adds BF16; *_amx.c adds the tiles; every other file is baseline x86-64.  One leaked
instruction kills the process on an older machine.  Names shared between objects are looked at too: a
function that two rungs define under one name could be linked from the wrong one.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

RUNGS = ("baseline", "avx2", "avx512", "avx512bf16", "amx")
RUNG_OF_FILE = re.compile(r"_(avx2|avx512|avx512bf16|amx)\.c\.o$")
# What lifts an instruction to a rung, by its text; the highest that matches counts.
SIGNS = (
    ("amx", re.compile(r"^(tdp\w+|tile\w+|ldtilecfg|sttilecfg)\b|%tmm")),
    ("avx512bf16", re.compile(r"^(vdpbf16ps|vcvtne2?ps2?2bf16\w?)\b")),
    ("avx512", re.compile(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])\b|%k[0-7]\b")),
    ("avx2", re.compile(r"^v[a-z]|%ymm")),
)
# Extensions that no rung has: a compiler flag went astray.
FOREIGN = re.compile(
    r"^(vpdpbusds?|vpdpwssds?|vpermi2b|vpermt2b|vpermb|vpmultishiftqb|vpmadd52\w+|vpopcnt\w+|vpcompress[bw]|"
    r"vpexpand[bw]|vpsh[lr]d\w+|vgf2p8\w+|v\w+ph|v\w+sh|tdpb[su][su]d|tdpfp16ps)\b"
)
FP16_LOOKALIKES = {"vcvtps2ph", "vcvtph2ps"}
INSTRUCTION = re.compile(r"^\s+[0-9a-f]+:\t(?:(?:lock|rep|repz|repnz|notrack|bnd|data16|cs|ds|es) )*(\w.*)$")


def objects(build: Path) -> list[Path]:
    """Every object that goes into libattn.so."""
    found = sorted((build / "CMakeFiles/attn_objects.dir").rglob("*.o"))
    if not found:
        sys.exit(f"isa: no objects in {build}")
    return found


def rung_of(path: Path) -> int:
    match = RUNG_OF_FILE.search(path.name)
    return RUNGS.index(match[1]) if match else 0


def instructions(path: Path) -> Iterator[tuple[str, str]]:
    """(function, instruction text) of every instruction in an object."""
    output = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", path], check=True, capture_output=True, text=True
    ).stdout
    function = "?"
    for line in output.splitlines():
        if line.endswith(">:"):
            function = line.split("<")[1][:-2]
        elif match := INSTRUCTION.match(line):
            yield function, match[1]


def leaks(path: Path) -> list[str]:
    allowed, found = rung_of(path), {}
    for function, text in instructions(path):
        name = text.split()[0]
        if FOREIGN.match(text) and name not in FP16_LOOKALIKES:
            found.setdefault(function, f"{text.strip()} is of no rung here")
        for rung, sign in SIGNS:
            if sign.search(text):
                if RUNGS.index(rung) > allowed:
                    found.setdefault(function, f"{text.strip()} is {rung}, the file is {RUNGS[allowed]}")
                break
    return [f"{path.name}: {function}: {what}" for function, what in found.items()]


def shared_names(paths: list[Path]) -> list[str]:
    """Names that reach over files and should not: inline code left as weak, names without our prefix."""
    found = []
    for path in paths:
        lines = subprocess.run(
            ["nm", "--defined-only", "--format=posix", path], check=True, capture_output=True, text=True
        ).stdout.splitlines()
        for name, kind, *_ in map(str.split, lines):
            if kind in "Ww" or kind.isupper() and not name.startswith(("attn_", "cubin_")):
                found.append(f"{path.name}: {name} is visible to other files")
    return found


def main() -> int:
    paths = objects(Path(sys.argv[1]))
    found = [line for path in paths for line in leaks(path)] + shared_names(paths)
    by_rung = [sum(rung_of(path) == i for path in paths) for i in range(len(RUNGS))]
    for line in found:
        print(f"isa: {line}")
    print(
        "isa: "
        + ", ".join(f"{n} {rung}" for n, rung in zip(by_rung, RUNGS, strict=True) if n)
        + (" objects, each within its rung" if not found else f" objects, {len(found)} faults")
    )
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
