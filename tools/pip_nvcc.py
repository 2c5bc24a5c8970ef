#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The CUDA compiler out of its Python packages, for the part of nvcc's command line that cubins need:

    pip_nvcc.py -gencode arch=compute_90a,code=sm_90a -cubin -O3 -std=c++17 -Xptxas -v -DX=1 -o OUT SRC
    pip_nvcc.py --version

NVRTC (nvidia-cuda-nvrtc-cu12) makes PTX, ptxas (nvidia-cuda-nvcc-cu12) makes the cubin and the report.
Both are of CUDA 12.9: the oldest ptxas that serialises no wgmma of ours (12.8 does), and cubins that every
driver of CUDA 12 loads.  cooperative_groups.h is nvidia-cuda-runtime-cu12's; no host compiler and no other
CUDA headers are needed.
"""

import ctypes
import pathlib
import re
import subprocess
import sys

import nvidia

# What device code takes from the standard headers.
HEADERS = {
    b"stdint.h": b"""#pragma once
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long long int64_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef unsigned long long uintptr_t;
#define INT32_MAX 2147483647
#define UINT32_MAX 4294967295u
#define INT64_MAX 9223372036854775807ll
""",
    # For cooperative_groups.h, which asks only for what sm_90 has; code may stand in parentheses.
    b"nv/target": b"""#pragma once
#define NV_IF_TARGET(target, code, ...) NV_JOIN(NV_CODE code)
#define NV_IF_ELSE_TARGET(target, code, other) NV_JOIN(NV_CODE code)
#define NV_CODE(...) NV_CODE __VA_ARGS__
#define NV_JOIN(...) NV_JOINED(__VA_ARGS__)
#define NV_JOINED(...) NO_##__VA_ARGS__
#define NO_NV_CODE
""",
}
MACROS = (
    "INFINITY=__int_as_float(0x7f800000)",
    "NAN=__int_as_float(0x7fffffff)",
    "_CG_LIMIT_INCLUDED_DEPENDENCIES",  # cooperative_groups.h without libcu++
)


def packaged(pattern):
    for folder in nvidia.__path__:
        for found in sorted(pathlib.Path(folder).glob(pattern)):
            return found
    sys.exit(f"pip_nvcc.py: no {pattern}: pip install -r requirements/cuda.txt")


def call(function, *args):
    status = function(*args)
    if status:
        function = function.__name__
        sys.exit(f"pip_nvcc.py: {function}: error {status}")


def text(nvrtc, program, what):
    size = ctypes.c_size_t()
    call(getattr(nvrtc, f"nvrtcGet{what}Size"), program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    call(getattr(nvrtc, f"nvrtcGet{what}"), program, buffer)
    return buffer.value


def to_ptx(source, options):
    nvrtc = ctypes.CDLL(str(packaged("cuda_nvrtc/lib/libnvrtc.so.*")))
    program, n = ctypes.c_void_p(), len(HEADERS)
    strings = ctypes.c_char_p * n
    call(
        nvrtc.nvrtcCreateProgram,
        ctypes.byref(program),
        source.read_bytes(),
        str(source).encode(),
        n,
        strings(*HEADERS.values()),
        strings(*HEADERS),
    )
    folders = [source.parent, packaged("cuda_runtime/include"), packaged("cuda_nvcc/include")]
    # Functions of the headers that the host shares say nothing of where they run.
    options = ["-default-device", *(f"-I{folder}" for folder in folders), *options]
    options += [f"-D{macro}" for macro in MACROS]
    options = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = nvrtc.nvrtcCompileProgram(program, len(options), options)
    print(text(nvrtc, program, "ProgramLog").decode(), end="")
    if status:
        sys.exit(status)
    return text(nvrtc, program, "PTX")


def version():
    ptxas = subprocess.run([packaged("cuda_nvcc/bin/ptxas"), "--version"], capture_output=True, text=True)
    return re.search(r"release [\d.]+", ptxas.stdout)[0]


def main():
    if sys.argv[1:] == ["--version"]:
        print(f"pip_nvcc.py, {version()}")
        return
    options, rest = [], iter(sys.argv[1:])
    arch = output = source = None
    for argument in rest:
        if argument == "-gencode":
            arch = re.fullmatch(r"arch=compute_(\w+),code=sm_\1", next(rest))[1]
        elif argument == "-o":
            output = pathlib.Path(next(rest))
        elif argument == "-Xptxas":
            next(rest)
        elif argument.startswith(("-D", "-I", "-std=")):
            options.append(argument)
        elif argument not in ("-cubin", "-O3"):
            source = pathlib.Path(argument)
    ptx = output.with_suffix(".ptx")
    ptx.write_bytes(to_ptx(source, [f"-arch=compute_{arch}", *options]))
    ptxas = [packaged("cuda_nvcc/bin/ptxas"), f"-arch=sm_{arch}", "-O3", "-v", "-o", output, ptx]
    sys.exit(subprocess.run(ptxas).returncode)


if __name__ == "__main__":
    main()
