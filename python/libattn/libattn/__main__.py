# SPDX-License-Identifier: MIT
"""python -m libattn: what is installed, what this machine offers, and what stands in the way.

Exit status 1 when the native library does not load, or when another distribution owns one of the
names that ours provide.
"""

import ctypes
import importlib
import importlib.util
import json
import os
import sys
from importlib import metadata
from urllib.parse import urlsplit
from urllib.request import url2pathname

import libattn

# Import names that our distributions own, and the distribution of each.
NAMES = {
    "flash_attn_interface": "flash_attn_3",
    "flash_attn_config": "flash_attn_3",
    "flash_attn_3": "flash_attn_3",
    "flash_mla": "flash_mla",
    "flash_kda": "flash_kda",
    "flash_kda_C": "flash_kda",
}
RUNGS = "c", "avx2", "avx512", "avx512bf16", "amx"  # what ATTN_CPU may say


def line(title: str, text: str) -> None:
    print(f"{title:22}{text}")


def libattn_pin(distribution: metadata.Distribution) -> str | None:
    """The version of libattn that a distribution asks for; the official ones ask for none."""
    for need in distribution.requires or ():
        name, pin, version = need.split(";")[0].replace(" ", "").partition("==")
        if pin and name == "libattn":
            return version
    return None


def is_ours(distribution: metadata.Distribution) -> bool:
    """Whether a distribution rests on this libattn: the official ones have the same names, not that,
    and one of ours of another version rests on another libattn."""
    return libattn_pin(distribution) == libattn.__version__


def brought(distribution: metadata.Distribution, place: str) -> bool:
    """Whether a module's file is one of a distribution's, or in its folder when that is editable or
    a source tree."""
    place = os.path.realpath(place)
    url = json.loads(distribution.read_text("direct_url.json") or "{}")
    if url.get("dir_info", {}).get("editable"):
        folder = url2pathname(urlsplit(url["url"]).path)
    elif distribution.read_text("RECORD") is None:
        folder = str(distribution.locate_file(""))
    else:
        files = distribution.files or ()
        return any(os.path.realpath(str(distribution.locate_file(f))) == place for f in files)
    return place.startswith(os.path.join(os.path.realpath(folder), ""))


def owner(name: str, owners: dict[str, list[str]]) -> tuple[str, bool]:
    """Who provides an import name, as text, and whether that is as it should be."""
    distributions = [metadata.distribution(d) for d in dict.fromkeys(owners.get(name, ()))]
    foreign = [d for d in distributions if not is_ours(d)]
    if foreign:
        found = ", ".join(f"{d.metadata['Name']} {d.version}" for d in foreign)
        remove = " ".join(d.metadata["Name"] for d in foreign)
        again = f" && pip install --force-reinstall --no-deps {NAMES[name]}"
        shadowed = any(is_ours(d) for d in distributions) or NAMES[name] in remove.split()
        advice = f"pip uninstall -y {remove}" + (again if shadowed else "")
        pins = [pin for d in foreign if (pin := libattn_pin(d))]
        if pins:
            return f"{found} needs libattn {pins[0]}, here is {libattn.__version__}: {advice}", False
        return f"{found} is not libattn's and shadows it; remove it: {advice}", False
    spec = importlib.util.find_spec(name)
    if spec is None:
        return "not installed", True
    where = spec.origin or ", ".join(spec.submodule_search_locations or [])
    if not distributions:
        return f"{where}, of no installed distribution", True
    found = f"{distributions[0].metadata['Name']} {distributions[0].version}"
    if spec.origin is None or not brought(distributions[0], spec.origin):
        return f"{where} shadows {found}: remove or rename it, or take its folder off the path", False
    return f"{found} ({where})", True


def load_core() -> ctypes.CDLL | None:
    """libattn.so, or None after saying why not."""
    try:
        native = importlib.import_module("libattn._native")
    except ImportError as error:
        line("not usable", str(error))
        return None
    line("libattn.so", f"{native.core.attn_version().decode()} ({native.core._name})")
    line("tvm_ffi", native.tvm_ffi.__version__)
    line("OpenMP", " and ".join(native.openmp_runtimes()) or "none mapped")
    return native.core


def report_machine(core: ctypes.CDLL) -> None:
    for name in ("attn_cpu_rung", "attn_cpu_features", "attn_kernel_name"):
        getattr(core, name).restype = ctypes.c_char_p
    cap = os.environ.get("ATTN_CPU")
    if cap and cap not in RUNGS:
        cap += f" is none of {', '.join(RUNGS)}, and has no effect"
    line("CPU", core.attn_cpu_features().decode())
    line("CPU rung", core.attn_cpu_rung().decode() + (f" (ATTN_CPU={cap})" if cap else ""))
    text = ctypes.create_string_buffer(256)
    count = core.attn_gpu_count(text, ctypes.c_size_t(len(text)))
    line("GPUs", f"{count}, {text.value.decode()}" if text.value else str(count))
    index = 0
    while name := core.attn_kernel_name(index):
        line("kernels" if index == 0 else "", name.decode())
        index += 1


def report_torch() -> None:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        line("torch", f"cannot be imported: {error}")
    else:
        line("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")


def report_mate() -> None:
    try:
        mate = importlib.import_module("mate.mha_interface")
    except ImportError as error:
        line("MATE", f"cannot be imported ({error}); tensors on MUSA need it")
    else:
        line("MATE", f"importable ({mate.__file__})")


def main() -> int:
    line("libattn", f"{libattn.__version__} ({os.path.dirname(libattn.__file__)})")
    line("Python", f"{sys.version.split()[0]} ({sys.executable})")
    report_torch()
    core = load_core()
    if core is not None:
        report_machine(core)
    report_mate()
    owners = metadata.packages_distributions()
    reports = {name: owner(name, owners) for name in NAMES}
    for name, (text, _) in reports.items():
        line(name, text)
    return 0 if core is not None and all(right for _, right in reports.values()) else 1


def run() -> int:
    """main(), quiet where the reader of its output has seen enough (`python -m libattn | head`)."""
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        status = 1
    return status


if __name__ == "__main__":
    sys.exit(run())
