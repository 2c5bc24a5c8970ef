# SPDX-License-Identifier: MIT
"""flash_kda on a GPU, long and short sequences, states in and out, L2 flushed before every call.

    python bench/gpu_kda.py [--calls 9] [--only T8192]

A row: shape, kernel, median microseconds with the least and the most, useful GB/s (1282 bytes a token
and head, and the states), share of a copy's rate in the same run, and the ask.
"""

import argparse
import functools
import time

import flash_kda
import libattn
import torch

FLUSH_BYTES = 256 << 20
SIX = [1300, 547, 2048, 963, 271, 3063]
SHAPES = [  # name, lengths of the sequences, heads, ask in microseconds
    ("T8192 H96", [8192], 96, 690),
    ("six sequences H96", SIX, 96, 685),
    ("8 x 1024 H96", [1024] * 8, 96, 590),
    ("T8192 H64", [8192], 64, 500),
    ("8 x 1024 H64", [1024] * 8, 64, 405),
    ("T32768 H32", [32768], 32, 1500),
    ("16 x 4096 H32", [4096] * 16, 32, 1510),
    ("T8192 H12", [8192], 12, None),
    ("T131072 H1", [131072], 1, None),
    ("1000 x 17 H32", [17] * 1000, 32, None),
    ("T37 H96", [37], 96, None),
]


def median(call, calls, flush):
    times = []
    for i in range(calls + 2):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if i >= 2:
            times.append(begin.elapsed_time(end) * 1e3)
    times.sort()
    return times[len(times) // 2], times[0], times[-1]


def ceilings(args, flush):
    """What this run's matmul and copy reach."""
    x, y = draw(8192, 8192), draw(8192, 8192)
    took = median(functools.partial(torch.matmul, x, y), args.calls, flush)[0]
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copied = median(functools.partial(target.copy_, source), args.calls, flush)[0]
    return 2 * 8192**3 / took / 1e6, 2 * source.numel() / copied / 1e6


def draw(*shape):
    return torch.randn(*shape, device="cuda").bfloat16()


def inputs(tokens, heads, d, sequences):
    q, k, v, g = (draw(1, tokens, heads, d) for _ in range(4))
    return {
        "q": q,
        "k": k,
        "v": v,
        "g": g,
        "beta": draw(1, tokens, heads),
        "scale": d**-0.5,
        "out": torch.empty_like(v),
        "A_log": torch.rand(heads, device="cuda"),
        "dt_bias": torch.rand(heads, d, device="cuda"),
        "lower_bound": -5.0,
        "initial_state": torch.randn(sequences, heads, d, d, device="cuda"),
        "final_state": torch.empty(sequences, heads, d, d, device="cuda"),
    }


def forward(args, flush, copy):
    for name, lengths, heads, ask in SHAPES:
        if args.only and args.only not in name:
            continue
        tokens, n, d = sum(lengths), len(lengths), args.d
        call = inputs(tokens, heads, d, n)
        if n > 1:
            ends = torch.tensor([0, *lengths]).cumsum(0)
            call["cu_seqlens"] = ends.to("cuda")
        took, least, most = median(functools.partial(flash_kda.fwd, **call), args.calls, flush)
        moved = tokens * heads * (10 * d + 2) + 8 * n * heads * d * d
        print(
            f"{name:20} {took:8.1f} us ({least:.1f} .. {most:.1f})  {moved / took / 1e3:6.0f} GB/s"
            f"  {moved / took / 1e6 / copy:5.2f} of a copy  ask {ask or '-'}",
            flush=True,
        )


def step(args, flush, copy):
    for n, heads, tokens, ask in ((128, 32, 1, 160), (128, 32, 4, None), (1, 32, 1, None)):
        q, k, v, g = (draw(n, tokens, heads, args.d) for _ in range(4))
        call = functools.partial(
            flash_kda.step,
            q,
            k,
            v,
            g,
            draw(n, tokens, heads),
            args.d**-0.5,
            torch.empty_like(v),
            torch.rand(heads, device="cuda"),
            torch.rand(heads, args.d, device="cuda"),
            -5.0,
            torch.randn(n, heads, args.d, args.d, device="cuda"),
        )
        took, least, most = median(call, args.calls, flush)
        moved = n * heads * (8 * args.d**2 + tokens * (10 * args.d + 2))
        print(
            f"step b {n} H {heads} s {tokens:2} {took:8.1f} us ({least:.1f} .. {most:.1f})"
            f"  {moved / took / 1e3:6.0f} GB/s  {moved / took / 1e6 / copy:5.2f} of a copy  ask {ask or '-'}",
            flush=True,
        )


def host():
    call = inputs(16, 1, 128, 1)
    for _ in range(100):
        flash_kda.fwd(**call)
    torch.cuda.synchronize()
    best = []
    for _ in range(20):
        begin = time.perf_counter()
        for _ in range(50):
            flash_kda.fwd(**call)
        best.append((time.perf_counter() - begin) / 50 * 1e6)
        torch.cuda.synchronize()
    print(f"host time of fwd: {min(best):.1f} us, ask 10")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=9)
    parser.add_argument("--only")
    parser.add_argument("--d", type=int, default=128, choices=(64, 128))
    args = parser.parse_args()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    flops, copy = ceilings(args, flush)
    print(
        f"{torch.cuda.get_device_name()}, libattn {libattn.__version__}, d {args.d}:"
        f" matmul {flops:.0f} TFLOP/s, copy {copy:.2f} TB/s"
    )
    torch.manual_seed(0)
    forward(args, flush, copy)
    if not args.only:
        step(args, flush, copy)
        host()


if __name__ == "__main__":
    main()
