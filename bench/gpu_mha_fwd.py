# SPDX-License-Identifier: MIT
"""mha_fwd on a GPU beside an 8192^3 bf16 torch.matmul and torch's cuDNN attention, in one run.

    python bench/gpu_mha_fwd.py [--asked] [--rows SUBSTRING,..] [--no-cudnn] [--peer NAME=PATH]..

A peer is a package with a `flash_attn_interface` that lies in the folder PATH, the official one for
example.  It is timed in a process of its own, row by row in turn with ours.

A row is the median of triton's do_bench (L2 flushed between calls), the GEMM and ours in three
turns 0.05 s apart, the middle one taken; then `sustained`: 0.2 s of calls back to back.  TFLOP/s
count visible work only: 2 (d_qk + d_v) a visible score and head.  `share` and `asked` are of the GEMM,
of feature rows of the plain one (its median, and sustained beside sustained).  --asked: only rows with
a share to reach.
"""

import argparse
import os
import pathlib
import random
import subprocess
import sys
import time

import torch
from triton.testing import do_bench

TOKENS = 16384

# The share asked of a row: of the GEMM (full, causal), of the plain feature row.
ASKED = {
    "d64x64 s16384": (0.66, 0.64),
    "d64x64 s4096": (0.60, 0.52),
    "d128x128 s16384": (0.86, 0.82),
    "d128x128 s4096": (0.80, 0.72),
    "d128x128 s1024": (0.72, 0.54),
    "d256x256 s16384": (0.90, 0.88),
    "d192x128 s16384": (0.88, 0.85),
}
ASKED = {f"{row} {mask}": x for row, pair in ASKED.items() for mask, x in zip(("full", "causal"), pair)}
ASKED |= {"feature plain": None}
for row in ("fp16", "gqa 16/4", "softcap", "sinks", "leftpad", "chunk 1024", "ragged"):
    ASKED["feature " + row] = 0.85
ASKED |= {"feature window 1024": 0.75, "feature page 256": 0.9, "feature page 64": 0.9}
ASKED |= {"feature page 16": 0.7, "feature page 1": 0.7}


MS = 40  # of calls for a median: with three turns, all rows of `make bench-gpu` take some 4 minutes


def median_ms(fn, ms=MS):
    time.sleep(0.05)  # the clock recovers from what ran before
    return do_bench(fn, warmup=25, rep=ms, return_mode="median")


def sustained_ms(fn, seconds=0.2):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    ms = do_bench(fn, warmup=5, rep=20, return_mode="median")
    n = max(4, int(seconds * 1e3 / ms))
    for _ in range(n // 2):
        fn()
    start.record()
    for _ in range(n):
        fn()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / n


def pairs(s_q, s_k, causal, left=-1, chunk=0):
    """Visible scores of one head and sequence."""
    if not causal:
        return s_q * s_k
    i = torch.arange(s_q, dtype=torch.float64) + s_k - s_q
    low = torch.zeros_like(i)
    if left >= 0:
        low = torch.clamp(i - left, min=0)
    if chunk:
        low = torch.maximum(low, torch.floor(i / chunk) * chunk)
    return int((i - low + 1).clamp(min=0).sum())


def tensors(b, s, h, h_k, d, dv, dtype=torch.bfloat16):
    q = torch.randn(b, s, h, d, device="cuda", dtype=dtype)
    k = torch.randn(b, s, h_k, d, device="cuda", dtype=dtype)
    v = torch.randn(b, s, h_k, dv, device="cuda", dtype=dtype)
    return q, k, v


def outputs(a):
    q, v = a["q"], a["v"]
    a["out"] = torch.empty(*q.shape[:-1], v.shape[-1], device="cuda", dtype=q.dtype)
    shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    a["lse"] = torch.empty(shape, device="cuda")
    return a


def dense_rows():
    for d, dv, h in (
        (64, 64, 32),
        (96, 96, 21),
        (128, 128, 16),
        (192, 128, 16),
        (192, 192, 10),
        (64, 256, 16),
        (256, 256, 8),
    ):
        for s in (1024, 4096, 16384):
            for causal in (0, 1):
                b = TOKENS // s
                q, k, v = tensors(b, s, h, h, d, dv)
                a = outputs({"q": q, "k": k, "v": v, "causal": causal})
                yield (
                    f"d{d}x{dv} s{s} {'causal' if causal else 'full'}",
                    a,
                    2.0 * b * h * (d + dv) * pairs(s, s, causal),
                    (q, k, v, causal) if d == dv or (d, dv) == (192, 128) else None,
                )


def feature_rows():
    """Around d128, causal, 4096 tokens, 16 heads."""
    b, s, h, d = 4, 4096, 16, 128

    def flop(heads, n):
        return 4.0 * heads * d * n

    full = b * pairs(s, s, True)
    for name, h_k, dtype, more in (
        ("plain", 16, torch.bfloat16, {}),
        ("fp16", 16, torch.float16, {}),
        ("gqa 16/4", 4, torch.bfloat16, {}),
        ("gqa 16/1", 1, torch.bfloat16, {}),
        ("softcap", 16, torch.bfloat16, {"softcap": 30.0}),
        ("sinks", 16, torch.bfloat16, {"sinks": torch.randn(16, device="cuda")}),
        ("window 1024", 16, torch.bfloat16, {"window_left": 1023}),
        ("chunk 1024", 16, torch.bfloat16, {"attention_chunk": 1024}),
    ):
        q, k, v = tensors(b, s, h, h_k, d, d, dtype)
        a = outputs({"q": q, "k": k, "v": v, "causal": 1, **more})
        n = b * pairs(s, s, True, more.get("window_left", -1), more.get("attention_chunk", 0))
        yield f"feature {name}", a, flop(h, n), None
    q, k, v = tensors(b, s, h, h, d, d)
    pad = torch.tensor([0, 100, 17, 1000], device="cuda", dtype=torch.int32)
    n = sum(pairs(s - p, s - p, True) for p in pad.tolist())
    used = torch.full((b,), s, device="cuda", dtype=torch.int32)
    a = outputs(
        {"q": q, "k": k, "v": v, "causal": 1, "leftpad_k": pad, "seqused_k": used, "seqused_q": used - pad}
    )
    yield "feature leftpad", a, flop(h, n), None
    for page in (256, 64, 16, 1):
        count = b * s // page
        table = torch.randperm(count, device="cuda").int().view(b, s // page)
        a = outputs(
            {
                "q": q,
                "k": k.view(count, page, h, d),
                "v": v.view(count, page, h, d),
                "page_table": table,
                "seqused_k": used,
                "causal": 1,
            }
        )
        yield f"feature page {page}", a, flop(h, full), None
    lengths = [256 + i * (8192 - 256) // 15 for i in range(16)]
    random.Random(0).shuffle(lengths)
    total = sum(lengths)
    cu = torch.tensor([0] + lengths, device="cuda").cumsum(0).int()
    q, k, v = (t[0] for t in tensors(1, total, h, h, d, d))
    a = outputs(
        {
            "q": q,
            "k": k,
            "v": v,
            "causal": 1,
            "cu_seqlens_q": cu,
            "cu_seqlens_k": cu,
            "max_seqlen_q": 8192,
            "max_seqlen_k": 8192,
        }
    )
    yield "feature ragged", a, flop(h, sum(pairs(n, n, True) for n in lengths)), None
    for s_q in (32, 64):  # query heads of a KV head in one tile, and not
        for pack in (1, 0):
            b, s_k = 32, 4096
            q = torch.randn(b, s_q, 32, d, device="cuda", dtype=torch.bfloat16)
            k, v = (torch.randn(b, s_k, 4, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
            a = outputs({"q": q, "k": k, "v": v, "causal": 1, "pack_gqa": pack})
            name = f"{s_q} queries 32/4, {'' if pack else 'not '}packed"
            yield f"feature {name}", a, flop(32, b * pairs(s_q, s_k, True)), None


def cudnn(q, k, v, causal):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (t.transpose(1, 2) for t in (q, k, v))

    def call():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=bool(causal))

    try:
        call()
    except RuntimeError:
        return None
    return call


class Peer:
    """A process that times the rows it is asked for with the flash_attn_interface of a folder."""

    def __init__(self, name, folder, ms):
        self.name = name
        path = os.pathsep.join([str(pathlib.Path(folder).resolve()), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", "--ms", str(ms)],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def median_ms(self, row):
        """None where the package does not take the row."""
        print(row, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline().strip()
        return float(answer) if answer not in ("", "none") else None


def interface_call(a):
    """A row's arguments as a call of flash_attn_interface; raises where it has no such argument."""
    import flash_attn_interface as fa

    more = {"causal": bool(a["causal"])}
    for name in ("softcap", "attention_chunk", "sinks"):
        if name in a:
            more[name] = a[name]
    if "pack_gqa" in a:
        more["pack_gqa"] = bool(a["pack_gqa"])
    if "window_left" in a:
        more["window_size"] = (a["window_left"], 0)
    q, k, v = a["q"], a["k"], a["v"]
    if "seqused_q" in a:
        raise TypeError("seqused_q: only rows of packed tensors have it")
    if "cu_seqlens_q" in a:
        ragged = [a[n] for n in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")]
        return lambda: fa.flash_attn_varlen_func(q, k, v, *ragged, **more)
    if "page_table" in a:
        more.update(page_table=a["page_table"], cache_seqlens=a["seqused_k"])
        return lambda: fa.flash_attn_with_kvcache(q, k, v, **more)
    return lambda: fa.flash_attn_func(q, k, v, **more)


def serve(ms):
    """A peer's process: the name of a row comes in, its median goes out."""
    torch.manual_seed(0)
    rows = (row for group in (dense_rows, feature_rows) for row in group())
    for line in sys.stdin:
        name, a, _, _ = next(row for row in rows if row[0] == line.strip())
        try:
            call = interface_call(a)
            call()
            answer = median_ms(call, ms)
        except (RuntimeError, TypeError, ValueError, AssertionError):
            answer = "none"
        print(answer, flush=True)


def host_us(call, n=200):
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(n):
        call.run()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return taken / n * 1e6


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", default="")
    parser.add_argument("--asked", action="store_true")
    parser.add_argument("--no-cudnn", action="store_true")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--ms", type=int, default=MS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.ms)
        return
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests/unit_cuda"))
    from attn_abi import Call

    peers = [Peer(*peer.split("=", 1), args.ms) for peer in args.peer]
    torch.manual_seed(0)
    x, y = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def gemm():
        return torch.matmul(x, y)

    gemm_flop = 2.0 * 8192**3 / 1e9
    median_ms(gemm)
    long = gemm_flop / sustained_ms(gemm)
    print(
        f"{torch.cuda.get_device_name()}; 8192^3 bf16 matmul {gemm_flop / median_ms(gemm):.0f} "
        f"TFLOP/s, sustained {long:.0f}; `GEMM` is timed again beside each row"
    )
    names = "".join(f" {peer.name:>7}" for peer in peers)
    print(
        f"{'row':32} {'TFLOP/s':>8} {'GEMM':>5} {'share':>6} {'asked':>6} {'sustained':>10} {'cuDNN':>7}"
        f"{names}  kernel"
        f"\n(cuDNN{names}: our rate over theirs)"
    )
    plain = None
    for rows in (dense_rows, feature_rows):
        for name, a, flop, peer in rows():
            if not any(part in name for part in args.rows.split(",")):
                continue
            if args.asked and name not in ASKED:
                continue
            call = Call(**a)
            call.run()
            turns = [(median_ms(gemm, args.ms), median_ms(call.run, args.ms)) for _ in range(3)]
            gemm_ms, our_ms = (sorted(column)[1] for column in zip(*turns))
            burst, ours = gemm_flop / gemm_ms, flop / our_ms / 1e9
            steady = flop / sustained_ms(call.run) / 1e9
            other = cudnn(*peer) if peer and not args.no_cudnn else None
            theirs = [median_ms(other, args.ms) if other else None]
            theirs += [p.median_ms(name) for p in peers]
            ratio = " ".join(f"{ms / our_ms:7.2f}" if ms else f"{'':7}" for ms in theirs)
            if name == "feature plain":
                plain = ours, steady
            whole = plain if plain and "feature" in name and name != "feature plain" else (burst, long)
            asked = f"{ASKED[name]:6.2f}" if ASKED.get(name) else f"{'':6}"
            print(
                f"{name:32} {ours:8.0f} {burst:5.0f} {ours / whole[0]:6.3f} {asked} "
                f"{steady:5.0f} {steady / whole[1]:.2f} "
                f"{ratio}  {call.kernel} c{call.plan.tile[1]} g{call.plan.tile[2]}",
                flush=True,
            )
    for peer in peers:
        peer.process.stdin.close()
        peer.process.wait()
    q, k, v = tensors(1, 64, 1, 1, 128, 128)
    print(
        f"host: {host_us(Call(**outputs({'q': q, 'k': k, 'v': v}))):.1f} us a call of the C ABI "
        "through ctypes"
    )


if __name__ == "__main__":
    main()
