# SPDX-License-Identifier: MIT
"""The Hopper kernel of MLA decode against fp64 arithmetic, on a GPU.

    python tests/unit_cuda/check_mla_decode.py [--seed S] [--cases N] [--graphs N]

Random shapes from a printed seed: head counts, queries, page sizes, lengths of 0; NaN in every slot
of the cache that is not live and wild numbers in the table behind the last live page.
"""

import argparse
import math
import random
import sys

import torch
from attn_abi import MlaCall

GUARD = 12345.0


def reference(q, k, causal, scale, low):
    """out [s_q, h, 512] and lse [h, s_q] of one sequence: q [s_q, h, 576], k [n, h_k, 576], fp64."""
    q = q.unflatten(1, (k.shape[1], -1))

    def rounded(x):
        return x.to(low).double() if low else x

    s = rounded(torch.einsum("ihgd,jhd->hgij", q, k)).flatten(0, 1) * scale
    if causal:
        i, j = torch.arange(q.shape[0], device="cuda"), torch.arange(k.shape[0], device="cuda")
        s = s.masked_fill(j[None, :] > i[:, None] + k.shape[0] - q.shape[0], -math.inf)
    lse = torch.logsumexp(s, -1) if k.shape[0] else s.new_full(s.shape[:2], -math.inf)
    p = torch.exp(s - torch.where(lse == -math.inf, 0.0, lse)[..., None])
    p = rounded(p).unflatten(0, (k.shape[1], -1))
    out = torch.einsum("hgij,jhd->ihgd", p, k[..., :512]).flatten(1, 2)
    return out, torch.where(lse == -math.inf, math.inf, lse)


def make(rng, b=None, most=None, h_k=None, group=None, s_q=None):
    b = b or rng.choice([1, 1, 2, 5, 32, 40])
    page = rng.choice([64, 64, 64, 1, 16, 32, 48, 128, 7])
    h_k = h_k or rng.choice([1, 1, 1, 2])
    group = group or rng.choice([1, 3, 8, 16, 32, 64, 100, 128])
    s_q = s_q or rng.choice([1, 1, 1, 2, 3, 8, 11])
    most = most or rng.choice([70, 700, 3000])
    dtype = rng.choice([torch.bfloat16, torch.bfloat16, torch.float16])
    lens = [rng.choice([0, 1, 63, 64, 65, rng.randrange(0, most), most]) for _ in range(b)]
    lens = [min(n, most) for n in lens]
    columns = -(-most // page)
    pool = b * columns + 3
    a = {
        "q": torch.randn(b, s_q, h_k * group, 576, device="cuda").to(dtype),
        "k_cache": torch.full((pool, page, h_k, 576), math.nan, device="cuda", dtype=dtype),
        "cache_seqlens": torch.tensor(lens, device="cuda", dtype=torch.int32),
        "out": torch.full((b, s_q, h_k * group, 512), GUARD, device="cuda", dtype=dtype),
        "lse": torch.full((b, h_k * group, s_q), GUARD, device="cuda"),
        "causal": rng.randrange(2),
        "softmax_scale": rng.choice([576**-0.5, 576**-0.5, 0.2, -0.05]),
    }
    table = torch.randperm(pool)[: b * columns].view(b, columns)
    keys = []
    for i, n in enumerate(lens):
        k = torch.randn(n, h_k, 576, device="cuda").to(dtype)
        at = torch.arange(n)
        a["k_cache"][table[i][at // page].cuda(), (at % page).cuda()] = k
        keys.append(k)
        table[i, -(-n // page) :] = rng.choice([-1, 2147480000])
    a["block_table"] = table.to(torch.int32).cuda()
    return a, keys


def check(a, keys):
    call = MlaCall(**a)
    call.run()
    torch.cuda.synchronize()
    bad, num, low, den, gap = [], 0.0, 0.0, 1e-30, 0.0
    causal, scale = a["causal"] and a["q"].shape[1] > 1, a["softmax_scale"]
    for i, k in enumerate(keys):
        q = a["q"][i].double()
        full = k.double()
        want, want_lse = reference(q, full, causal, scale, None)
        rough, _ = reference(q, full, causal, scale, a["q"].dtype)
        got, got_lse = a["out"][i].double(), a["lse"][i].double()
        num += (got - want).norm().item() ** 2
        low += (rough.to(a["q"].dtype).double() - want).norm().item() ** 2
        den += want.norm().item() ** 2
        if not torch.equal(torch.isinf(got_lse), torch.isinf(want_lse)):
            bad.append(f"lse of sequence {i}: infinities differ")
        finite = torch.isfinite(want_lse)
        if finite.any():
            gap = max(gap, ((got_lse - want_lse).abs() / (1 + want_lse.abs()))[finite].max().item())
    num, low = (num / den) ** 0.5, (low / den) ** 0.5
    if not num <= 2 * low + 1e-5:
        bad.append(f"out: error {num:.2e}, plain low precision {low:.2e}")
    if not gap <= 1e-4:
        bad.append(f"lse: error {gap:.2e}")
    first, first_lse = a["out"].clone(), a["lse"].clone()
    call.workspace.fill_(255)
    call.run()
    torch.cuda.synchronize()
    if not (
        torch.equal(first.view(torch.int16), a["out"].view(torch.int16)) and torch.equal(first_lse, a["lse"])
    ):
        bad.append("a second call gave other bits")
    return call, num / (2 * low + 1e-5), bad


def check_graph(seed, replays):
    """A captured call replayed with other lengths and tables, against fp64."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    most = rng.choice([300, 2000])
    a, _ = make(rng, rng.choice([1, 3, 17]), most)
    a["k_cache"].normal_()
    pool, page, h_k, _ = a["k_cache"].shape
    b, columns = a["block_table"].shape
    call = MlaCall(**a)
    call.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.run()
    bad = []
    for turn in range(replays):
        lens = [rng.choice([0, 1, rng.randrange(0, most + 1), most]) for _ in range(b)]
        a["cache_seqlens"].copy_(torch.tensor(lens, dtype=torch.int32))
        a["block_table"].copy_(torch.randperm(pool, dtype=torch.int32)[: b * columns].view(b, columns))
        a["q"].normal_()
        graph.replay()
        torch.cuda.synchronize()
        i = rng.randrange(b)
        at = torch.arange(lens[i], device="cuda")
        k = a["k_cache"][a["block_table"][i].long()[at // page], at % page].double()
        q = a["q"][i].double()
        want, lse = reference(q, k, a["causal"] and q.shape[0] > 1, a["softmax_scale"], None)
        if not torch.allclose(a["out"][i].double(), want, rtol=3e-2, atol=3e-2):
            bad.append(f"replay {turn}: sequence {i} of {lens[i]} keys is wrong")
        if not torch.allclose(a["lse"][i].double(), lse, rtol=1e-3, atol=1e-3):
            bad.append(f"replay {turn}: lse of sequence {i} of {lens[i]} keys is wrong")
    return bad


def check_streams(seed):
    """Calls of three streams at once, large grids and small: all end, with the bits of a call alone."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    calls = [
        make(rng, b, most)[0] for b, most in ((1, 300), (2, 700), (1, 9000), (8, 2000), (17, 500), (1, 90000))
    ]
    calls = [(MlaCall(**a), a) for a in calls]
    alone = []
    for call, a in calls:
        call.run()
        torch.cuda.synchronize()
        alone.append(a["out"].clone())
        a["out"].zero_()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    for _ in range(40):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                calls[i][0].run()
                calls[i + 3][0].run()
    torch.cuda.synchronize()
    return [
        f"call {i} gave other bits"
        for i, ((_, a), want) in enumerate(zip(calls, alone))
        if not torch.equal(a["out"].view(torch.int16), want.view(torch.int16))
    ]


def check_scattered():
    """Rows of out in pages of their own, slow to store, while the scores of the next piece are ready: all
    calls end, with the bits of dense rows."""
    far, bad = 1 << 20, []
    room = torch.empty(40 * 128 * far, device="cuda", dtype=torch.bfloat16)
    for b, h_k, most in ((40, 1, 300), (40, 1, 700), (17, 2, 400), (33, 1, 200)):
        a, _ = make(random.Random(b), b, most, h_k=h_k, group=128 // h_k, s_q=1)
        a["cache_seqlens"].random_(most // 2, most + 1)
        a["k_cache"].normal_()
        a["block_table"].random_(0, a["k_cache"].shape[0])
        MlaCall(**a).run()
        dense, lse = a["out"], a["lse"]
        out = room.view(dense.dtype).as_strided(dense.shape, (128 * far, far, far, 1))
        a.update(out=out, lse=torch.empty_like(lse))
        call = MlaCall(**a)
        for _ in range(10):
            out.zero_()
            call.run()
            torch.cuda.synchronize()
            if not torch.equal(out.view(torch.int16), dense.view(torch.int16)):
                bad.append(f"{b} sequences, {h_k} heads: other bits")
                break
    return bad


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--graphs", type=int, default=4)
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    failures, worst = 0, 0.0
    for n in range(args.cases):
        rng = random.Random(args.seed * 100003 + n)
        torch.manual_seed(n)
        a, keys = make(rng)
        name = (
            f"{n} {a['q'].dtype} q {tuple(a['q'].shape)} cache {tuple(a['k_cache'].shape)} "
            f"causal {a['causal']} scale {a['softmax_scale']:.3f} lens {a['cache_seqlens'].tolist()}"
        )
        if args.verbose:
            print(name, flush=True)
        call, share, bad = check(a, keys)
        worst = max(worst, share)
        if bad:
            failures += 1
            print(f"FAIL {list(call.plan.tile)[:4]} {name}\n    " + "\n    ".join(bad[:4]), flush=True)
            if failures >= 8:
                break
    for n in range(args.graphs):
        bad = check_graph(args.seed + n, 50)
        failures += bool(bad)
        for line in bad[:3]:
            print(f"FAIL graph {n}: {line}")
    bad = [f"streams: {line}" for line in check_streams(args.seed)]
    bad += [f"scattered: {line}" for line in check_scattered()]
    failures += bool(bad)
    for line in bad:
        print(f"FAIL {line}")
    print(f"{failures} failures, worst error {worst:.2f} of what is allowed")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
