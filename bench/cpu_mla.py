# SPDX-License-Identifier: MIT
"""The mla ops on the CPU: shares of the machine's ceilings, torch beside dense decode, sparse beside dense.

    python bench/cpu_mla.py             every row
    python bench/cpu_mla.py dense       rows that hold a text
    python bench/cpu_mla.py --quick     a few calls of small rows: a smoke test

As in cpu_mha_fwd.py: those that are compared take turns, ceilings are of the same run, times are the
best and the median of a row, rates and ratios those of the medians, and caches go round until they
make ROTATE_BYTES.  torch is absorbed attention written well: pages gathered, two batched products and
a softmax in fp32.
"""

import itertools
import statistics
import sys

import cpu_mha_fwd as common
import libattn
import torch
import torch.nn.functional as F
from cpu_mha_fwd import alternate, ceilings

PAGE = 64
SCALE = 192**-0.5
QUICK = "--quick" in sys.argv
LENGTH = 256 if QUICK else 4096


def rounds(copies):
    """The next of the copies, for ever."""
    return itertools.cycle(copies).__next__


def paged(b, s, make):
    """Caches of b sequences of s tokens from make(pages), so many that no call finds its own again,
    and their block table [b, s / PAGE]."""
    pages = b * s // PAGE
    first = make(pages)
    count = max(2, int(common.ROTATE_BYTES / (first.numel() * first.element_size())) + 1)
    copies = [first] + [first.clone() for _ in range(count - 1)]
    return rounds(copies), torch.randperm(pages).view(b, -1).int()


def latent(pages):
    return torch.randn(pages, PAGE, 1, 576).bfloat16()


def quantised(pages, d):
    cache = torch.empty(pages, PAGE, 1, 656 if d == 576 else 584, dtype=torch.uint8)
    return libattn.mla_cache_quantize(torch.randn(pages * PAGE, d).bfloat16(), cache)


def dense(b, s, h_q):
    cache, table = paged(b, s, latent)
    q, lens = torch.randn(b, 1, h_q, 576).bfloat16(), torch.full((b,), s, dtype=torch.int32)
    wide = table.flatten().long()

    def ours():
        return libattn.mla_decode(q, cache(), table, lens, SCALE)

    def peer():
        k = cache().index_select(0, wide).view(b, s, 576)
        weights = torch.bmm(q[:, 0], k.transpose(1, 2)).float().mul_(SCALE).softmax(-1)
        return torch.bmm(weights.bfloat16(), k[..., :512])

    return ours, peer


def sparse(b, h_q, d, topk, extra=0):
    cache, table = paged(b, LENGTH, lambda pages: quantised(pages, d))
    q, tokens = torch.randn(b, 1, h_q, d).bfloat16(), table.numel() * PAGE
    indices = torch.stack([torch.randperm(tokens)[:topk] for _ in range(b)]).view(b, 1, -1).int()
    more = (None, None)
    if extra:
        other = quantised(b * 64, d)
        picks = [torch.randperm(b * 64 * PAGE)[:extra] for _ in range(b)]
        more = (other, torch.stack(picks).view(b, 1, -1).int())
    return lambda: libattn.mla_sparse_decode(q, cache(), indices, SCALE, None, None, *more)


def prefill(h):
    """192/128 causal: mha_fwd beside SDPA, whose V has to be padded to 192."""
    q, k = torch.randn(2, 1, LENGTH, h, 192).bfloat16()
    v = torch.randn(1, LENGTH, h, 128).bfloat16()
    a, b, c = (x.transpose(1, 2) for x in (q, k, F.pad(v, (0, 64))))
    ours = lambda: libattn.mha_fwd(q, k, v, causal=True)  # noqa: E731
    return ours, lambda: F.scaled_dot_product_attention(a, b, c, is_causal=True)


def best_dot():
    rates = ceilings()
    return max(rates.get(name, 0) for name in ("amx_bf16", "dp_bf16", "fma_fp32"))


def show(name, times, note):
    best, median = min(times) * 1e3, statistics.median(times) * 1e3
    print(f"{name:36} {best:8.3f} {median:8.3f} ms  {note}", flush=True)


def dense_row(b, s, h_q):
    ours, peer = dense(b, s, h_q)
    mine, theirs = alternate(ours, peer)
    t, flops, read = statistics.median(mine), 2 * b * h_q * s * 1088, b * s * 1152
    show(
        f"dense b {b} s_k {s} h_q {h_q}",
        mine,
        f"{read / t / 1e9:6.1f} GB/s {read / t / ceilings()['read']:.2f} of read, "
        f"{flops / t / 1e12:6.2f} TF/s {flops / t / best_dot():.2f} of dots, "
        f"torch {statistics.median(theirs) / t:.2f} x",
    )


def v32_row():
    topk = LENGTH // 2
    ours, _ = dense(8, topk, 128)
    mine, other = alternate(sparse(8, 128, 576, topk), ours)
    ratio = statistics.median(other) / statistics.median(mine)
    show(f"sparse v32 b 8 h_q 128 topk {topk}", mine, f"dense at s_k {topk} takes {ratio:.2f} of it")


def model1_row():
    mine, other = alternate(sparse(8, 64, 512, 128, extra=512), sparse(8, 64, 576, 640))
    ratio = statistics.median(other) / statistics.median(mine)
    show("sparse model1 b 8 h_q 64 128 + 512", mine, f"{ratio:.2f} of v32's rows a second")


def prefill_row(h):
    mine, theirs = alternate(*prefill(h))
    rate = 2 * h * LENGTH * (LENGTH + 1) / 2 * 320 / statistics.median(mine)
    ratio = statistics.median(theirs) / statistics.median(mine)
    show(
        f"prefill 192/128 causal {LENGTH} h {h}",
        mine,
        f"{rate / 1e12:6.2f} TF/s {rate / best_dot():.2f} of dots, torch {ratio:.2f} x",
    )


def main():
    if QUICK:
        common.be_quick()
    rows = {
        "dense h_q 16": lambda: dense_row(8, LENGTH, 16),
        "dense h_q 64": lambda: dense_row(8, LENGTH, 64),
        "dense h_q 128": lambda: dense_row(8, LENGTH, 128),
        "dense b 1 h_q 16": lambda: dense_row(1, LENGTH, 16),
        "dense b 1 h_q 128": lambda: dense_row(1, LENGTH, 128),
        "sparse v32": v32_row,
        "sparse model1": model1_row,
        "prefill 16": lambda: prefill_row(16),
        "prefill 128": lambda: prefill_row(128),
    }
    print(*(f"{name} {rate / 1e9:.0f} G/s" for name, rate in ceilings().items()), sep=", ")
    for name, row in rows.items():
        if all(text in name for text in sys.argv[1:] if text != "--quick"):
            row()


if __name__ == "__main__":
    main()
