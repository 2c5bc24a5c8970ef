# SPDX-License-Identifier: MIT
"""flash_attn_interface on the CPU beside torch SDPA, in one run: a table, one row a shape.

    make bench                          every line of bench/shapes/cpu_mha_fwd.txt
    make bench ARGS="--rows decode"     lines that hold a text
    make bench ARGS=--write             also writes bench/results/<machine>.json and its roofline, .svg
    make bench ARGS=--asked             lines with an ask, and below each what came of it
    make bench ARGS="--seconds 0.5"     for each of the two, a row
    make bench ARGS=--quick             a few calls of one small row a kind: does it run?

Ours and the peer take turns, so that a machine that slows down slows both; times are the best, the
median and the half distance of the quartiles, and rates and ratios are those of the medians.  FLOPs
count visible scores only, bytes count q, k, v and out once.  Rows with a window, softcap or fp8, which
SDPA does not have, stand beside our own causal bf16 row of the same sizes, and paged decode beside our own
contiguous one.  Decode goes round as many caches as make ROTATE_BYTES, more than a last-level cache holds.

The ceiling is measured in the same run by bench/ceiling.c: of all threads together the multiply-adds
in registers that the dtype could use (bf16: the best of tiles, bf16 dot products and fp32; fp16 and
fp32: fp32, or a third and a sixth of the tiles' rate, as they are exact in two and in three planes of
bf16), and for decode the rate of reading memory.  Shares are of the larger of that rate right before and
right after the row, as neighbours change what a shared machine gives.  Without a C compiler torch's matmul
and sum stand in, and the row says so.  A row with isa=avx2 runs in a process of its own, whose switches
hold us and torch's three libraries to AVX2; they are printed, and it has no share, since the ceiling is
not held.
The `call` row also says what Python and binding add: its time less that of the same problem run by
bench/smallest.c.
"""

import argparse
import functools
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import libattn
import torch
import torch.nn.functional as F
from flash_attn_interface import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from roofline import plot

HERE = Path(__file__).resolve().parent
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": torch.float8_e4m3fn,
}
SECONDS = 1.5  # for each of the two, a row
ROTATE_BYTES = 1.1e9
LEAST_CALLS = 5
SDPA = F.scaled_dot_product_attention
SWITCHES = {  # ours, then torch's own kernels, MKL and oneDNN
    "avx2": {
        "ATTN_CPU": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
}


def be_quick():
    """A few calls of each row, for a smoke test."""
    global SECONDS, ROTATE_BYTES
    SECONDS, ROTATE_BYTES = 0.01, 1e6


def alternate(*functions) -> list[list[float]]:
    """Seconds of each call of each function, taking turns, after two calls that do not count."""
    times = [[] for _ in functions]
    for function in functions:
        function()
        function()
    until = time.perf_counter() + SECONDS * len(functions)
    while time.perf_counter() < until or len(times[0]) < LEAST_CALLS:
        for function, mine in zip(functions, times):
            start = time.perf_counter()
            function()
            mine.append(time.perf_counter() - start)
    return times


def spread(times: list[float]) -> float:
    low, _, high = statistics.quantiles(times, n=4)
    return (high - low) / 2


@functools.cache
def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a 2048 x 2048 x 2048 product."""
    a, b = torch.randn(2, 2048, 2048).to(dtype)
    (times,) = alternate(lambda: a @ b)
    return 2 * 2048**3 / statistics.median(times)


@functools.cache
def read_rate() -> float:
    """Bytes a second of summing 512 MiB of fp32."""
    x = torch.ones(2**27)
    (times,) = alternate(lambda: x.sum())
    return 4 * 2**27 / statistics.median(times)


@functools.cache
def program(name: str, *flags: str) -> str | None:
    """Path of bench/<name>.c, built; None without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        return None
    path = Path(tempfile.mkdtemp(prefix="attn-bench-")) / name
    built = subprocess.run(
        [compiler, "-O3", *flags, HERE / f"{name}.c", "-o", path, "-ldl"], capture_output=True
    )
    return str(path) if built.returncode == 0 else None


def measure_ceilings(*only: str) -> dict[str, float]:
    """Rates of bench/ceiling.c, or one of them; empty where it cannot be built."""
    path = program("ceiling", "-fopenmp")
    if not path:
        return {}
    command = [path, str(torch.get_num_threads()), "1024", *only]
    got = subprocess.run(command, capture_output=True, text=True)
    return {name: float(rate) for name, rate in (line.split() for line in got.stdout.splitlines())}


@functools.cache
def ceilings() -> dict[str, float]:
    return measure_ceilings()


def ceiling_now(bound: str | None) -> float:
    """The rate of ceiling() once more; 0 where torch stands in."""
    name, _, parts = (bound or "").partition(" / ")
    if name not in ceilings():
        return 0.0
    return measure_ceilings(name).get(name, 0.0) / int(parts or 1)


def ceiling(dtype: torch.dtype, memory: bool) -> tuple[str, float]:
    """What bounds a row, and its rate."""
    rates = ceilings()
    if memory:
        return ("read", rates["read"]) if "read" in rates else ("torch sum", read_rate())
    if "fma_fp32" not in rates:
        return "torch matmul", matmul_rate(dtype)
    usable = {"fma_fp32": rates["fma_fp32"]}
    if dtype in (torch.bfloat16, torch.float8_e4m3fn):
        usable |= {name: rates[name] for name in ("dp_bf16", "amx_bf16") if name in rates}
    products = {torch.float16: 3, torch.float32: 6}.get(dtype)
    if products and "amx_bf16" in rates:
        usable[f"amx_bf16 / {products}"] = rates["amx_bf16"] / products
    return max(usable.items(), key=lambda item: item[1])


def smallest_run(d: int) -> float | None:
    """Seconds of attn_mha_fwd_run alone at the shape of a `call` row."""
    import tvm_ffi
    from libattn import _native

    include = Path(tvm_ffi.__file__).parent / "include"
    folders = (HERE.parent / "include", include, include / "dlpack")
    path = program("smallest", *(f"-I{folder}" for folder in folders))
    if not path:
        return None
    got = subprocess.run([path, _native.find("libattn.so"), str(d)], capture_output=True, text=True)
    return float(got.stdout) if got.returncode == 0 else None


def random_tensors(dtype, *shapes):
    return [torch.randn(*shape).to(dtype) for shape in shapes]


def visible(s_q: int, s_k: int, causal: bool, window: int = 0) -> int:
    """Scores that the mask leaves of one head and sequence, s_q <= s_k."""
    hidden = max(s_q - window - 1, 0) if window else 0  # rows that see `window` keys before their own
    return s_q * s_k - (s_q * (s_q - 1) // 2 if causal else 0) - hidden * (hidden + 1) // 2


def dense(b, s_q, s_k, h_q, h_k, d, dtype, causal, window=0, softcap=0):
    q, k, v = random_tensors(dtype, (b, s_q, h_q, d), (b, s_k, h_k, d), (b, s_k, h_k, d))
    plan = libattn.mha_fwd_plan(q, k, v, d**-0.5, causal=bool(causal))
    options = {"causal": bool(causal), "window_size": (window, 0) if window else (-1, -1), "softcap": softcap}
    row = {
        "kernel": plan.kernel,
        "ours": lambda: flash_attn_func(q, k, v, **options),
        "flops": 4 * b * h_q * d * visible(s_q, s_k, causal, window),
        "bytes": q.element_size() * d * b * 2 * (s_q * h_q + s_k * h_k),
    }
    if window or softcap or dtype == DTYPES["fp8"]:
        plain = [x.to(torch.bfloat16) for x in (q, k, v)]
        return {**row, "peer": lambda: flash_attn_func(*plain, causal=True), "peer_name": "causal bf16"}
    qt, kt, vt = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    return {**row, "peer": lambda: SDPA(qt, kt, vt, is_causal=bool(causal), enable_gqa=h_q != h_k)}


def decode(b, s_k, h_q, h_k, d, dtype, page=0):
    q, k, v = random_tensors(dtype, (b, 1, h_q, d), (b, s_k, h_k, d), (b, s_k, h_k, d))
    lengths = torch.full((b,), s_k, dtype=torch.int32)
    qt = q.transpose(1, 2).contiguous()
    copies = math.ceil(ROTATE_BYTES / (2 * k.nbytes))
    table = None
    if page:
        pages = b * s_k // page
        table = torch.randperm(pages, generator=torch.Generator().manual_seed(0)).int().view(b, -1)
        k, v = k.view(pages, page, h_k, d), v.view(pages, page, h_k, d)

    def rounds(k, v):
        return itertools.cycle([(k, v)] + [(k.clone(), v.clone()) for _ in range(copies - 1)])

    caches = rounds(k, v)
    if page:
        whole = rounds(k.view(b, s_k, h_k, d), v.view(b, s_k, h_k, d))
        peer = lambda: flash_attn_with_kvcache(q, *next(whole), cache_seqlens=lengths)  # noqa: E731
    else:
        peers = rounds(*(x.transpose(1, 2).contiguous() for x in (k, v)))
        peer = lambda: SDPA(qt, *next(peers), enable_gqa=True)  # noqa: E731
    plan = libattn.mha_fwd_plan(q, k, v, d**-0.5, num_splits=0, seqused_k=lengths, page_table=table)
    return {
        "kernel": plan.kernel,
        "ours": lambda: flash_attn_with_kvcache(q, *next(caches), cache_seqlens=lengths, page_table=table),
        "peer": peer,
        "peer_name": "contiguous" if page else "torch SDPA",
        "flops": 4 * b * h_q * d * s_k,
        "bytes": q.element_size() * d * b * 2 * (h_q + s_k * h_k),
        "memory": True,
    }


def ragged(b, s, h_q, h_k, d, dtype, causal):
    lengths = torch.randint(1, s + 1, (b,), generator=torch.Generator().manual_seed(0))
    cu = F.pad(lengths.cumsum(0), (1, 0)).int()
    total, longest = int(cu[-1]), int(lengths.max())
    q, k, v = random_tensors(dtype, (total, h_q, d), (total, h_k, d), (total, h_k, d))
    plan = libattn.mha_fwd_plan(
        q, k, v, d**-0.5, causal=bool(causal), cu_seqlens_q=cu, cu_seqlens_k=cu,
        max_seqlen_q=longest, max_seqlen_k=longest,
    )  # fmt: skip
    live = torch.arange(longest)[None] < lengths[:, None]
    padded = []
    for x in (q, k, v):
        y = x.new_zeros(b, longest, *x.shape[1:])
        y[live] = x
        padded.append(y.transpose(1, 2).contiguous())
    # Padding lies behind each sequence, so the causal mask alone hides it from live rows.
    mask = None if causal else live[:, None, None]
    return {
        "kernel": plan.kernel,
        "ours": lambda: flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=bool(causal)),
        "peer": lambda: SDPA(*padded, attn_mask=mask, is_causal=bool(causal), enable_gqa=h_q != h_k),
        "flops": 4 * h_q * d * sum(visible(n, n, causal) for n in lengths.tolist()),
        "bytes": q.element_size() * d * total * 2 * (h_q + h_k),
    }


def call(h_q, d, dtype):
    q, k, v = random_tensors(dtype, *[(1, 1, h_q, d)] * 3)
    plan = libattn.mha_fwd_plan(q, k, v, d**-0.5)
    return {
        "kernel": plan.kernel,
        "ours": lambda: flash_attn_func(q, k, v),
        "peer": lambda: SDPA(q, k, v),
        "flops": 4 * h_q * d,
        "bytes": q.element_size() * d * 4 * h_q,
        "many": 1000,
    }


KINDS = {"dense": dense, "decode": decode, "ragged": ragged, "call": call}


def measure_held(kind: str, sizes: dict) -> dict:
    """The row `sizes` in a process that is held to sizes["isa"]: libraries read switches once."""
    plain = {key: value for key, value in sizes.items() if key != "isa"}
    command = [sys.executable, __file__, "--one", json.dumps([kind, plain, SECONDS])]
    switches = SWITCHES[sizes["isa"]]
    got = subprocess.run(command, env={**os.environ, **switches}, check=True, stdout=subprocess.PIPE)
    row = json.loads(got.stdout)
    return {**row, "shape": {**row["shape"], "isa": sizes["isa"]}, "switches": switches}


def measure(kind: str, sizes: dict) -> dict:
    if "ask" in sizes:
        asks = dict(pair.split(":") for pair in sizes["ask"].split(","))
        row = measure(kind, {key: value for key, value in sizes.items() if key != "ask"})
        return {**row, "asks": {name: float(value) for name, value in asks.items()}}
    if "isa" in sizes:
        return measure_held(kind, sizes)
    dtype = sizes["dtype"]
    row = KINDS[kind](**{**sizes, "dtype": DTYPES[dtype]})
    many = row.get("many", 1)

    def repeated(function):
        return function if many == 1 else lambda: [function() for _ in range(many)]

    bound, rate, before = None, None, 0.0
    if kind != "call" and "ATTN_CPU" not in os.environ:
        bound, rate = ceiling(DTYPES[dtype], row.get("memory", False))
        before = ceiling_now(bound)
    ours, peer = ([t / many for t in ts] for ts in alternate(repeated(row["ours"]), repeated(row["peer"])))
    mine, theirs = statistics.median(ours), statistics.median(peer)
    share, best_share, kernel_seconds = None, None, None
    if kind == "call":
        kernel_seconds = smallest_run(sizes["d"])
    elif bound:
        rate = max(before, ceiling_now(bound)) or rate
        share = row["bytes" if row.get("memory") else "flops"] / mine / rate
        best_share = share * mine / min(ours)
    return {
        "op": "mha_fwd",
        "kind": kind,
        "shape": {key: value for key, value in sizes.items() if key != "dtype"},
        "dtype": dtype,
        "kernel": row["kernel"],
        "seconds": mine,
        "best": min(ours),
        "spread": spread(ours),
        "flops_per_second": row["flops"] / mine,
        "bytes_per_second": row["bytes"] / mine,
        "ceiling": bound,
        "ceiling_rate": rate,
        "share": share,
        "best_share": best_share,
        "overhead_seconds": kernel_seconds and min(ours) - kernel_seconds,
        "peer": row.get("peer_name", "torch SDPA"),
        "peer_seconds": theirs,
        "peer_best": min(peer),
        "peer_spread": spread(peer),
        "ratio": theirs / mine,
        "best_ratio": min(peer) / min(ours),
    }


def in_units(seconds: float) -> str:
    scale, unit = (1e3, "ms") if seconds >= 1e-4 else (1e6, "µs")
    return f"{seconds * scale:8.2f} {unit}"


def as_line(row: dict) -> str:
    shape = " ".join(f"{key}{value}" for key, value in row["shape"].items())
    share = "     " if row["share"] is None else f"{row['share']:5.0%}"
    extra = ""
    if row["overhead_seconds"]:
        extra = f"\n{'':7} of these {in_units(row['overhead_seconds']).strip()} are Python and binding"
    if "switches" in row:
        extra += f"\n{'':7} with {' '.join(f'{name}={value}' for name, value in row['switches'].items())}"
    for name, ask in row.get("asks", {}).items():
        if row[name] is not None:
            missed = "" if row[name] >= ask else ", missed"
            best = f"of the best {row[f'best_{name}']:.2f}"
            extra += f"\n{'':7} asked {name} {ask:g}: {row[name]:.2f}, {best}{missed}"
    return (
        f"{row['kind']:<7} {shape:<44} {row['dtype']:<5} {row['kernel']:<32} {in_units(row['best'])}"
        f" {in_units(row['seconds'])}"
        f" ±{row['spread'] / row['seconds']:4.0%} {row['flops_per_second'] / 1e9:8.1f}"
        f" {row['bytes_per_second'] / 1e9:7.2f} {share} {in_units(row['peer_seconds'])} {row['ratio']:6.2f}"
        f"{'' if row['peer'] == 'torch SDPA' else ' of ' + row['peer']}"
        f"{extra}"
    )


def machine() -> str:
    text = Path("/proc/cpuinfo").read_text()
    names = [line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else "unknown"


def shapes(wanted: str, asked: bool):
    for line in (HERE / "shapes" / "cpu_mha_fwd.txt").read_text().splitlines():
        if line and not line.startswith("#") and wanted in line and (" ask=" in line or not asked):
            kind, *pairs = line.split()
            sizes = dict(pair.split("=") for pair in pairs)
            yield (
                kind,
                {
                    key: value if key in ("dtype", "isa", "ask") else int(value)
                    for key, value in sizes.items()
                },
            )


def quick_shapes():
    """One row of each kind and dtype, small."""
    sizes = {"b": 1, "s_q": 128, "s_k": 128, "h_q": 4, "h_k": 2, "d": 64, "causal": 1}
    for dtype in DTYPES:
        yield "dense", {**sizes, "dtype": dtype}
    yield "dense", {**sizes, "dtype": "bf16", "window": 20}
    yield "dense", {**sizes, "dtype": "bf16", "softcap": 15}
    yield "decode", {"b": 1, "s_k": 1024, "h_q": 4, "h_k": 2, "d": 64, "dtype": "bf16"}
    yield "decode", {"b": 1, "s_k": 1024, "h_q": 4, "h_k": 2, "d": 64, "dtype": "bf16", "page": 16}
    yield "ragged", {"b": 3, "s": 100, "h_q": 4, "h_k": 2, "d": 64, "dtype": "bf16", "causal": 1}
    yield "dense", {**sizes, "dtype": "fp32", "isa": "avx2"}
    yield "call", {"h_q": 1, "d": 8, "dtype": "bf16"}


def main():
    global SECONDS
    parser = argparse.ArgumentParser(description="flash_attn_interface on the CPU beside torch SDPA")
    parser.add_argument("--rows", default="", help="only lines of the shape file that hold this text")
    parser.add_argument("--asked", action="store_true", help="only lines with an ask")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each of the two, a row")
    parser.add_argument("--write", action="store_true", help="write bench/results/<machine>.json")
    parser.add_argument("--quick", action="store_true", help="a few calls of small rows: a smoke test")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # JSON [kind, sizes, SECONDS]: prints its row
    args = parser.parse_args()
    SECONDS = args.seconds
    if args.one:
        kind, sizes, SECONDS = json.loads(args.one)
        print(json.dumps(measure(kind, sizes)))
        return
    if args.quick:
        be_quick()

    print(f"{machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"libattn {libattn.__version__}, {time.strftime('%Y-%m-%d')}")  # fmt: skip
    print(f"{'':<7} {'shape':<44} {'dtype':<5} {'kernel':<32} {'best':>11} {'median':>11} {'':6}"
          f"{'GFLOP/s':>8} {'GB/s':>7} {'share':>5} {'peer':>11} {'ratio':>6}")  # fmt: skip
    rows = []
    for kind, sizes in quick_shapes() if args.quick else shapes(args.rows, args.asked):
        rows.append(measure(kind, sizes))
        print(as_line(rows[-1]), flush=True)
    worst = min(
        (row["ratio"] for row in rows if row["kind"] != "call" and row["peer"] == "torch SDPA"),
        default=math.nan,
    )
    asks = [(row[name], ask) for row in rows for name, ask in row.get("asks", {}).items() if row[name]]
    if asks:
        print(f"{sum(value >= ask for value, ask in asks)} of {len(asks)} asks met")
    print(f"least ratio {worst:.2f}; share is of", end=" ")
    print(*(f"{name} {rate / 1e9:.0f} G/s" for name, rate in ceilings().items()), sep=", ")
    if args.write:
        name = "".join(c if c.isalnum() else "-" for c in f"{machine()}-{os.cpu_count()}").strip("-").lower()
        path = HERE / "results" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        head = {
            "machine": machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "libattn": libattn.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "ceilings": ceilings(),
        }
        path.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
        picture = path.with_suffix(".svg")
        picture.write_text(plot(f"mha_fwd, {machine()}, {torch.get_num_threads()} threads", ceilings(), rows))
        print(f"written: {path.relative_to(HERE.parent)}, {picture.name}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
