# SPDX-License-Identifier: MIT
"""Compiles the lines of a kernel list (src/cuda/kernels/*.def) to cubins and reads ptxas's report.

    variants.py list DEF                          the kernels' names
    variants.py build DEF NAME --out DIR          one kernel: DIR/NAME.cubin and DIR/NAME.ptxas
    variants.py build DEF all --out DIR           all of them
    variants.py report DEF --out DIR              registers, spills and bytes of what was built

A spill, a stack frame or a serialised wgmma fails a kernel: each of them costs far more than the
feature that caused it, and nothing else would show it.  A line of the list may allow a few bytes and say why:
"/* spills 8 bytes: .. */" behind it.
"""

import argparse
import pathlib
import re
import subprocess
import sys

PLAIN = re.compile(r"^ATTN_PLAIN_KERNEL\((\w+), (\w+)\)")
LINE = re.compile(r"^ATTN_KERNEL\((\w+), (\w+), (\w+), (\d+), (\d+), (\d+), (\d+)\)")
ALLOWED = re.compile(r"/\* spills (\d+) bytes: ")  # behind a line, with the reason
FIELDS = ("OP", "DTYPE", "DQK", "DV", "ROWS", "KEYS")
# C7504-C7508: setmaxnreg ignored; C7509-C7515, C7520: wgmma serialised; C7602: too many registers.
FATAL = re.compile(r"\(C75(0[4-9]|1[0-5]|20)\)|\(C7602\)|Potential Performance Loss")
SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def variants(path):
    """{kernel name: {"source": .., "OP": .., "DTYPE": ..}} in the list's order."""
    found = {}
    for line in path.read_text().splitlines():
        match = LINE.match(line)
        if match:
            op, arch, dtype, dqk, dv, rows, keys = match.groups()
            name = f"attn_{op}_{arch}_{dtype}_d{dqk}x{dv}_m{rows}n{keys}"
            fields = (op, dtype, dqk, dv, rows, keys)
            found[name] = {"source": path.with_suffix(".cu"), **dict(zip(FIELDS, fields))}
            if allowed := ALLOWED.search(line):
                found[name]["spills"] = int(allowed[1])
        elif match := PLAIN.match(line):
            op, arch = match.groups()
            found[f"attn_{op}_{arch}"] = {"source": path.with_name(op + ".cu")}
        elif re.match("ATTN_.*KERNEL", line):
            sys.exit(f"{path}: not understood: {line}")
    return found


def faults(report, spills=0):
    """What in ptxas's report makes a kernel unfit; so many bytes may be spilled."""
    bad = [line for line in report.splitlines() if FATAL.search(line)]
    for frame, stores, loads in SPILL.findall(report):
        if max(int(frame), int(stores), int(loads)) > spills:
            bad.append(f"{frame} bytes stack frame, {stores} spilled, {loads} reloaded")
    if not SPILL.search(report):
        bad.append("no ptxas report")
    return bad


def build(nvcc, name, fields, out):
    out.mkdir(parents=True, exist_ok=True)
    command = [
        *([sys.executable] if nvcc.endswith(".py") else []),
        nvcc,
        "-gencode",
        "arch=compute_90a,code=sm_90a",
        "-cubin",
        "-O3",
        "-std=c++17",
        "-Xptxas",
        "-v",
        "-o",
        str(out / f"{name}.cubin"),
        str(fields["source"]),
    ]
    command += [f"-DVARIANT_{field}={fields[field]}" for field in FIELDS if field in fields]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    (out / f"{name}.ptxas").write_text(done.stdout)
    if done.returncode:
        sys.exit(f"{name}: {' '.join(command)}\n{done.stdout}")
    bad = faults(done.stdout, fields.get("spills", 0))
    if bad:
        (out / f"{name}.cubin").unlink()
        sys.exit(f"{name}: " + "\n    ".join(bad))


def report(deflist, out):
    for name in variants(deflist):
        text = (out / f"{name}.ptxas").read_text()
        registers = re.search(r"Used (\d+) registers", text).group(1)
        size = (out / f"{name}.cubin").stat().st_size
        print(f"{name:48} {registers:>4} registers at entry  {size:>7} bytes")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=("list", "build", "report"))
    parser.add_argument("deflist", type=pathlib.Path)
    parser.add_argument("name", nargs="?", default="all")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("cubins"))
    parser.add_argument("--nvcc", default="nvcc")
    args = parser.parse_args()
    known = variants(args.deflist)
    if args.verb == "list":
        print("\n".join(known))
    elif args.verb == "report":
        report(args.deflist, args.out)
    else:
        for name in known if args.name == "all" else [args.name]:
            build(args.nvcc, name, known[name], args.out)


if __name__ == "__main__":
    main()
