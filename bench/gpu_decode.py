# SPDX-License-Identifier: MIT
"""Decode on a GPU: bytes of k and v a second, beside the read bandwidth of the same run.

    python bench/gpu_decode.py [--rows SUBSTRING]

A row is the median of triton's do_bench (L2 flushed between calls) and its share of the fastest of a
few torch reductions over 2 GiB; short ones are graph replays, first kernel's start to last one's end.
`GB/s` count k and v once; MLA rows give useful FLOP/s, and their share of a matrix product, too.
The last rows, where the packages are installed, are the host's time of eager calls.
"""

import argparse
import pathlib
import random
import sys
import time

import torch
from triton.testing import do_bench

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests/unit_cuda"))
from attn_abi import Call, MlaCall  # noqa: E402


def median_ms(fn, ms=60):
    return do_bench(fn, warmup=15, rep=ms, return_mode="median")


def read_bandwidth():
    """Bytes a second of the best reader at hand."""
    x = torch.randn(1 << 29, device="cuda")
    best = 0.0
    for fn in (lambda: torch.sum(x), lambda: torch.amax(x), lambda: torch.sum(x.view(4096, -1), 1)):
        best = max(best, x.numel() * 4 / (median_ms(fn) * 1e-3))
    return best


def graph_us(fn, flush, n=12):
    """GPU time of a call in a graph: the first kernel's start to the last one's end, L2 flushed."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        fn()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(n):
            if flush is not None:
                flush.zero_()
            graph.replay()
            torch.cuda.synchronize()
    events = sorted((e for e in profile.events() if "attn_" in e.name), key=lambda e: e.time_range.start)
    kernels = len(events) // n  # of a replay
    if not kernels:
        return float("nan")
    found = [
        max(e.time_range.end for e in events[i : i + kernels]) - events[i].time_range.start
        for i in range(0, kernels * n, kernels)
    ]
    return sorted(found)[n // 2]


def cache(b, h, h_k, d, keys, page, s_q=1, dtype=torch.bfloat16):
    """Arguments of a decode call: a paged cache (page > 0) in random order, or a contiguous one."""
    a = {
        "q": torch.randn(b, s_q, h, d, device="cuda", dtype=dtype),
        "out": torch.empty(b, s_q, h, d, device="cuda", dtype=dtype),
        "lse": torch.empty(b, h, s_q, device="cuda"),
        "seqused_k": torch.full((b,), keys, device="cuda", dtype=torch.int32),
        "num_splits": 0,
        "causal": 1,
    }
    shape = (b, keys, h_k, d)
    if page:
        pages = b * -(-keys // page)
        a["page_table"] = torch.randperm(pages, device="cuda").to(torch.int32).view(b, -1)
        shape = (pages, page, h_k, d)
    a["k"] = torch.randn(shape, device="cuda", dtype=dtype)
    a["v"] = torch.randn(shape, device="cuda", dtype=dtype)
    return a


def appended(a, rotary):
    """The same call with a new token a sequence, turned with rotary."""
    b, d, device = a["q"].shape[0], a["k"].shape[-1], a["q"].device
    for name, cache in (("k_new", a["k"]), ("v_new", a["v"])):
        a[name] = torch.randn(b, 1, *cache.shape[2:], device=device, dtype=cache.dtype)
    a["seqused_k"] -= 1
    if rotary:
        room = a["page_table"].shape[1] * a["k"].shape[1] if "page_table" in a else a["k"].shape[1]
        a["rotary_cos"], a["rotary_sin"] = torch.randn(2, room, d // 2, device=device, dtype=a["q"].dtype)
    return a


def with_qv(b, h, keys, page):
    """MLA as mha_fwd has it: k of 64 and v of 512 columns in two caches."""
    a = cache(b, h, 1, 64, keys, page)
    a["v"] = torch.randn(*a["k"].shape[:-1], 512, device="cuda", dtype=a["q"].dtype)
    a["qv"] = torch.randn(b, 1, h, 512, device="cuda", dtype=a["q"].dtype)
    a["out"] = torch.empty_like(a["qv"])
    return a


def rows():
    for page in (64, 0, 16, 1):
        yield f"b64 32/8 d128 8192 page {page}", lambda p=page: cache(64, 32, 8, 128, 8192, p), False
    yield "b1 32/8 d128 131072 page 64", lambda: cache(1, 32, 8, 128, 131072, 64), False
    yield "b1 32/8 d128 4096 page 64", lambda: cache(1, 32, 8, 128, 4096, 64), True
    yield "b1 32/8 d128 4096 contiguous", lambda: cache(1, 32, 8, 128, 4096, 0), True
    for b in (1, 16):
        name = f"b{b} 32/8 d128 2048 page 64"
        yield name, lambda b=b: cache(b, 32, 8, 128, 2048, 64), True
        yield f"{name} append", lambda b=b: appended(cache(b, 32, 8, 128, 2048, 64), False), True
        yield f"{name} append rotary", lambda b=b: appended(cache(b, 32, 8, 128, 2048, 64), True), True
    for h in (16, 128):
        yield f"b128 {h}/1 qv d64x512 8192 page 64", lambda h=h: with_qv(128, h, 8192, 64), False
    for d, h, h_k in ((64, 32, 8), (192, 16, 4), (256, 16, 4), (128, 64, 1), (128, 32, 32)):
        yield f"b64 {h}/{h_k} d{d} 4096 page 64", lambda x=(64, h, h_k, d): cache(*x, 4096, 64), False
    yield "b64 32/8 d128 4096 page 64 s_q 4", lambda: cache(64, 32, 8, 128, 4096, 64, 4), False


def latent(b, h, keys, s_q=1, page=64, dtype=torch.bfloat16):
    """Arguments of an mla_decode call."""
    pages = b * -(-keys // page)
    return {
        "q": torch.randn(b, s_q, h, 576, device="cuda", dtype=dtype),
        "k_cache": torch.randn(pages, page, 1, 576, device="cuda", dtype=dtype),
        "block_table": torch.randperm(pages, device="cuda").to(torch.int32).view(b, -1),
        "cache_seqlens": torch.full((b,), keys, device="cuda", dtype=torch.int32),
        "out": torch.empty(b, s_q, h, 512, device="cuda", dtype=dtype),
        "lse": torch.empty(b, h, s_q, device="cuda"),
        "causal": 1,
    }


MLA_ROWS = [
    (128, 128, 8192, 1),
    (128, 128, 8192, 2),
    (128, 16, 8192, 1),
    (128, 16, 32768, 1),
    (128, 64, 8192, 1),
    (1, 128, 8192, 1),
    (1, 128, 65536, 1),
    (1, 128, 131072, 1),
]


def gemm():
    """FLOP/s of an 8192-cubed bf16 product."""
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2.0 * 8192**3 / (median_ms(lambda: x @ x) * 1e-3)


def mla_rows(peak, flush, only):
    flops = gemm()
    print(f"8192-cubed bf16 product: {flops / 1e12:.0f} TFLOP/s", flush=True)
    for b, h, keys, s_q in MLA_ROWS:
        name = f"mla b{b} h{h} {keys} s_q {s_q}"
        if only not in name:
            continue
        a = latent(b, h, keys, s_q)
        call = MlaCall(**a)
        us = graph_us(call.run, flush) if b == 1 else median_ms(call.run) * 1e3
        rate, work = b * keys * 1152 / (us * 1e-6), 2.0 * b * h * s_q * keys * 1088 / (us * 1e-6)
        print(
            f"{name:36} {us:8.1f} us {rate / 1e9:6.0f} GB/s {rate / peak:5.2f} "
            f"{work / 1e12:5.0f} TFLOP/s {work / flops:5.2f}",
            flush=True,
        )
        del a, call
        torch.cuda.empty_cache()


def eager_rows(only):
    """What a call costs the host: small calls in a row, nothing waited for; beside torch's own."""
    try:
        import flash_attn_interface as fa
        import flash_mla
    except ImportError:
        return
    a, latents = cache(1, 32, 8, 128, 128, 64), latent(1, 128, 64)
    table, lens, meta = a["page_table"], a["seqused_k"].fill_(64), flash_mla.get_mla_metadata()[0]
    new, x = torch.randn(1, 1, 8, 128, device="cuda").bfloat16(), torch.zeros(8, device="cuda")
    kwargs = {"page_table": table, "cache_seqlens": lens, "causal": True}
    mla = [latents[name] for name in ("q", "k_cache", "block_table", "cache_seqlens")]
    for name, call in (
        ("flash_attn_with_kvcache", lambda: fa.flash_attn_with_kvcache(a["q"], a["k"], a["v"], **kwargs)),
        ("with an append", lambda: fa.flash_attn_with_kvcache(a["q"], a["k"], a["v"], new, new, **kwargs)),
        ("flash_mla_with_kvcache", lambda: flash_mla.flash_mla_with_kvcache(*mla, 512, meta, causal=True)),
        ("torch.Tensor.add_", lambda: x.add_(1)),
        ("torch.empty", lambda: torch.empty((1, 1, 32, 128), dtype=torch.bfloat16, device="cuda")),
    ):
        if only not in f"eager {name}":
            continue
        found = []
        for _ in range(12):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(200):
                call()
            found.append((time.perf_counter() - start) / 200 * 1e6)
        print(f"eager {name:30} {sorted(found)[len(found) // 2]:8.1f} us of the host's time", flush=True)


def uneven():
    a = cache(64, 32, 8, 128, 8192, 64)
    rng = random.Random(1)
    a["seqused_k"].copy_(torch.tensor([rng.randrange(1, 8193) for _ in range(64)], dtype=torch.int32))
    return a


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", default="")
    args = parser.parse_args()
    peak = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}: read bandwidth {peak / 1e12:.2f} TB/s", flush=True)
    flush = torch.empty(256 << 20, device="cuda", dtype=torch.uint8)
    found = [*rows(), ("b64 32/8 d128 1..8192 page 64", uneven, False)]
    for name, make, graph in found:
        if args.rows not in name:
            continue
        a = make()
        call = Call(**a)
        d, dv, h_k = a["k"].shape[-1], a["v"].shape[-1], a["k"].shape[-2]
        moved = 2.0 * (d + dv) * h_k * a["seqused_k"].sum().item()
        us = graph_us(call.run, flush) if graph else median_ms(call.run) * 1e3
        rate = moved / (us * 1e-6)
        print(
            f"{name:36} {call.kernel:44} {us:8.1f} us {rate / 1e9:6.0f} GB/s {rate / peak:5.2f}", flush=True
        )
        del a, call
        torch.cuda.empty_cache()
    mla_rows(peak, flush, args.rows)
    eager_rows(args.rows)


if __name__ == "__main__":
    main()
