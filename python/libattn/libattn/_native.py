# SPDX-License-Identifier: MIT
"""Loads libattn.so and its binding libattn_ffi.so, and checks that the three parts belong together.

Importing this module either succeeds or raises ImportError with one sentence of advice.  torch goes
first where it is installed: its wheels carry libgomp.so.1, and loading that copy first leaves the
process with one OpenMP pool instead of two.

ATTN_LIB_DIR names a folder to take both objects from (a build tree, a sanitizer build).
"""

import contextlib
import ctypes
import os
import re

with contextlib.suppress(ImportError):
    import torch  # noqa: F401  (its OpenMP run time must be there before ours)

import tvm_ffi

from . import __path__ as package_path
from . import __version__, errors


def find(name: str) -> str:
    """Path of a shared object of this package; ImportError when it is not installed."""
    folders = [os.environ["ATTN_LIB_DIR"]] if os.environ.get("ATTN_LIB_DIR") else package_path
    for folder in folders:
        path = os.path.join(folder, name)
        if os.path.exists(path):
            return path
    raise ImportError(
        f"libattn: {name} is not in {os.pathsep.join(folders)}; the package was installed without "
        "its compiled part, so build it again with `pip install .` in python/libattn"
    )


def load_core() -> ctypes.CDLL:
    """libattn.so, with the loader's usual complaints turned into advice."""
    path = find("libattn.so")
    try:
        return ctypes.CDLL(path)
    except OSError as error:
        text = str(error)
    if "libgomp.so" in text:
        advice = (
            "the OpenMP run time libgomp.so.1 is missing: install it (Debian and Ubuntu: "
            "apt install libgomp1; Fedora: dnf install libgomp; Alpine: apk add libgomp)"
        )
    elif "static TLS" in text:
        advice = "import torch before every other native library, or start Python afresh"
    else:
        advice = "this build does not suit this system"
    raise ImportError(f"libattn: cannot load {path}: {advice} ({text})")


def check_versions(core: str, binding: str, package: str) -> None:
    """ImportError that names the odd part out when libattn.so, libattn_ffi.so and these Python
    files are not of one version."""
    if not core == binding == package:
        raise ImportError(
            f"libattn: parts of different versions: libattn.so is {core}, libattn_ffi.so is "
            f"{binding}, the Python package libattn is {package}; reinstall libattn"
        )


def load_binding(core: ctypes.CDLL) -> tvm_ffi.Module:
    """libattn_ffi.so on top of a loaded libattn.so, both of this package's version."""
    core.attn_version.restype = ctypes.c_char_p
    core_version = core.attn_version().decode()
    try:
        binding = tvm_ffi.load_module(find("libattn_ffi.so"))
        binding_version = binding.get_function("version")()
    except errors.VersionError as error:
        raise ImportError(f"libattn: {error}; reinstall libattn") from None
    except (AttributeError, OSError, RuntimeError) as error:
        check_versions(core_version, "unknown", __version__)
        raise ImportError(
            f"libattn: cannot load libattn_ffi.so with tvm_ffi {tvm_ffi.__version__}: {error}"
        ) from None
    check_versions(core_version, binding_version, __version__)
    return binding


def openmp_runtimes() -> list[str]:
    """Paths of the libgomp copies mapped into this process; two of them mean two thread pools."""
    with open("/proc/self/maps") as maps:
        return sorted(set(re.findall(r"/\S*libgomp[^/\s]*\.so\S*", maps.read())))


MADV_HUGEPAGE, PAGE = 14, 4096  # of Linux on x86-64
madvise = getattr(ctypes.CDLL(None), "madvise", None)


def ask_huge_pages(address: int, size: int):
    """Wants few large pages under fresh memory: the faults of 4 KB pages would cost a tenth of the work
    that fills it.  Where the system does not give them nothing changes."""
    first, end = -(-address // PAGE) * PAGE, (address + size) // PAGE * PAGE
    if madvise and first < end:
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), MADV_HUGEPAGE)


for error_class in errors.ALL:
    tvm_ffi.register_error(f"libattn.{error_class.__name__}", error_class)

core = load_core()
binding = load_binding(core)
kda_fwd = binding.get_function("kda_fwd")
kda_fwd_plan = binding.get_function("kda_fwd_plan")
kda_fwd_ref = binding.get_function("kda_fwd_ref")
kda_step = binding.get_function("kda_step")
mha_fwd = binding.get_function("mha_fwd")
mha_fwd_plan = binding.get_function("mha_fwd_plan")
mha_fwd_ref = binding.get_function("mha_fwd_ref")
mha_metadata_length = binding.get_function("mha_metadata_length")
mla_cache_dequantize = binding.get_function("mla_cache_dequantize")
mla_cache_quantize = binding.get_function("mla_cache_quantize")
mla_decode = binding.get_function("mla_decode")
mla_decode_plan = binding.get_function("mla_decode_plan")
mla_decode_ref = binding.get_function("mla_decode_ref")
mla_sparse_decode = binding.get_function("mla_sparse_decode")
mla_sparse_decode_plan = binding.get_function("mla_sparse_decode_plan")
mla_sparse_decode_ref = binding.get_function("mla_sparse_decode_ref")
mla_sparse_fwd = binding.get_function("mla_sparse_fwd")
mla_sparse_fwd_plan = binding.get_function("mla_sparse_fwd_plan")
mla_sparse_fwd_ref = binding.get_function("mla_sparse_fwd_ref")
split_combine = binding.get_function("split_combine")

if os.environ.get("ATTN_LOG", "0") not in ("", "0") and len(openmp_runtimes()) > 1:
    import sys

    print("libattn: two OpenMP pools:", *openmp_runtimes(), file=sys.stderr)
