# SPDX-License-Identifier: MIT
"""With AVX2 or better no call of the interface runs a plain-C kernel.

One subprocess a rung (ATTN_CPU is read once) makes a call for every feature and dtype with
ATTN_LOG=1; the log names the kernels.  The calls are also compared with the oracle, so that each
rung this machine has is tested whole, not only the one that it would choose.
"""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

RUNGS = ["c", "avx2", "avx512", "avx512bf16", "amx"]


ASK = """
import ctypes, libattn._native as native
rung = native.core.attn_cpu_rung
rung.restype = ctypes.c_char_p
print(rung().decode())
"""


@functools.cache
def rung_with(cap):
    """What attn_cpu_rung() says under ATTN_CPU=cap."""
    got = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, env=environment(cap))
    assert got.returncode == 0, got.stderr
    return got.stdout.split()[-1]


def environment(rung, log=False):
    env = {name: x for name, x in os.environ.items() if name not in ("ATTN_CPU", "ATTN_LOG")}
    if rung:
        env["ATTN_CPU"] = rung
    if log:
        env["ATTN_LOG"] = "1"
    return env


def features():
    """(name, Case settings, way in): every option alone, prefill and decode, of the two test files."""
    from test_attention import BASE as DENSE
    from test_attention import OPTIONS as DENSE_OPTIONS
    from test_kvcache import BASE as CACHE
    from test_kvcache import OPTIONS as CACHE_OPTIONS

    for base, options in ((DENSE, DENSE_OPTIONS), (CACHE, CACHE_OPTIONS)):
        for name, changes in options.items():
            yield name, {**base.__dict__, **changes}
    for d, d_v in ((8, 8), (40, 40), (192, 128), (256, 256), (512, 512), (64, 512)):
        yield f"d{d}x{d_v}", {**DENSE.__dict__, "d": d, "d_v": d_v, "causal": True}
        yield f"decode_d{d}x{d_v}", {**CACHE.__dict__, "d": d, "d_v": d_v, "s_q": 1}
    yield "qv", {**DENSE.__dict__, "d_v": 256, "qv": True}
    yield "qv_decode", {**CACHE.__dict__, "d_v": 256, "qv": True, "s_q": 1}


def main():
    from cases import DTYPES, Case, entries, verify

    for name, settings in features():
        for dtype in DTYPES:
            step = 16 if dtype == "fp8" else 8
            if settings["d"] % step or settings["d_v"] % step or (dtype == "fp8" and settings.get("qv")):
                continue
            case = Case(**{**settings, "dtype": dtype})
            print(f"call {name} {dtype}", file=sys.stderr, flush=True)
            verify(case, entries(case)[0])
    import flash_attn_interface as fa
    import torch

    print("call combine fp32", file=sys.stderr, flush=True)
    fa.flash_attn_combine(torch.randn(3, 2, 5, 4, 32), torch.randn(3, 2, 5, 4))


@pytest.fixture(scope="module")
def best():
    return rung_with(None)


@pytest.mark.parametrize("rung", RUNGS)
def test_no_plain_c_kernel(rung, best):
    if RUNGS.index(rung) > RUNGS.index(best):
        pytest.skip(f"this machine goes up to {best}")
    if rung_with(rung) != rung:
        assert rung == "avx512bf16", f"ATTN_CPU={rung} gives {rung_with(rung)}"
        pytest.skip("this build has no such rung")
    run = subprocess.run(
        [sys.executable, __file__],
        capture_output=True,
        text=True,
        env=environment(rung, log=True),
        cwd=Path(__file__).parent,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    names, call = {}, None  # of each call
    for line in run.stderr.splitlines():
        if line.startswith("call "):
            call = line
            names[call] = set()
        elif match := re.search(r"attn_\w+", line):
            names[call].add(match[0])
    kernels = set().union(*names.values())
    unnamed = [call for call, seen in names.items() if not seen]
    allowed = RUNGS[1 : RUNGS.index(rung) + 1]
    plain = [
        f"{call}: {name}"
        for call, seen in names.items()
        for name in seen
        if rung != "c" and name.rsplit("_", 1)[-1] not in allowed
    ]
    assert len(names) > 350, len(names)
    assert not unnamed, f"no kernel in the log of {unnamed[:5]}"
    assert not plain, plain[:20]
    for dtype in ("bf16", "fp16", "fp32", "fp8"):
        assert any(f"_{dtype}_" in name for name in kernels), (dtype, kernels)
    print(rung, len(names), *sorted(kernels))


def test_cap_is_a_cap(best):
    """ATTN_CPU never raises the rung, and a name that is none is not the end."""
    for cap in ("avx2", "amx", "nonsense"):
        rung = rung_with(cap)
        assert RUNGS.index(rung) <= RUNGS.index(best)
        if cap == "avx2":
            assert RUNGS.index(rung) <= RUNGS.index("avx2")


if __name__ == "__main__":
    main()
