# SPDX-License-Identifier: MIT
"""The Hopper forward kernels against fp64 arithmetic, on a GPU.

    python tests/unit_cuda/check_mha_fwd.py [--seed S] [--cases N] [--only SUBSTRING] [--small]

Random cases from a printed seed, biased to edges: lengths 0, 1, tile +- 1; odd head counts; every
way to store keys; every mask.  What must not be read holds NaN, what must not be written is
compared afterwards.  A case passes when its error against fp64 is at most twice that of the same
math with scores and probabilities rounded to the inputs' type, plus 1e-5; infinities must match.
"""

import argparse
import math
import random
import sys

import torch
from attn_abi import Call

WIDTHS = [
    (64, 64),
    (96, 96),
    (128, 128),
    (192, 128),
    (192, 192),
    (64, 256),
    (256, 256),
    (40, 40),
    (80, 80),
    (160, 160),
    (8, 8),
    (248, 248),
    (160, 104),
    (40, 200),
    (24, 80),
]
EDGES = [0, 1, 2, 63, 64, 65, 79, 80, 81, 127, 128, 129, 191, 192, 193, 255, 383, 384, 385, 500]
GUARD = 12345.0


def visible(case, i, s_q, s_k, total):
    """bool [s_q, s_k], by the predicates that define the masks."""
    p = torch.arange(s_q, device="cuda")[:, None] + s_k - s_q
    j = torch.arange(s_k, device="cuda")[None, :]
    seen = torch.ones(s_q, s_k, dtype=torch.bool, device="cuda")
    if case["cp_world_size"] > 1:
        world = j * case["cp_world_size"] + case["cp_rank"]
        seen &= world < total
        if case["causal"]:
            seen &= world <= torch.arange(s_q, device="cuda")[:, None] + total - s_q
        return seen
    if case["causal"]:
        seen &= j <= p
    elif case["window_right"] >= 0:
        seen &= j <= p + case["window_right"]
    if case["window_left"] >= 0:
        seen &= j >= p - case["window_left"]
    if case["attention_chunk"] > 0:
        c = case["attention_chunk"]
        start = torch.div(p, c, rounding_mode="floor") * c
        seen &= (j >= start) & (j < start + c)
    return seen


def attend(q, k, v, seen, scale, softcap, sinks, low, qv=None):
    """out [s_q, h, d_v] and lse [h, s_q] in fp64; `low`: the type to round scores and P to."""

    def rounded(x):
        return x.to(low).double() if low else x

    def grouped(x):
        return x.unflatten(1, (k.shape[1], x.shape[1] // k.shape[1]))

    s = torch.einsum("ikgd,jkd->kgij", grouped(q), k)
    if qv is not None:
        s = s + torch.einsum("ikgd,jkd->kgij", grouped(qv), v)
    s = rounded(s.flatten(0, 1)) * scale
    if softcap > 0:
        s = rounded(softcap * torch.tanh(rounded(s) / softcap))
    s = s.masked_fill(~seen[None], -math.inf)
    top = s.amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:2], 1), -math.inf)
    if sinks is not None:
        top = torch.maximum(top, sinks[:, None, None])
    top = top.masked_fill(top == -math.inf, 0.0)
    e = torch.exp(s - top)
    total = e.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks[:, None, None] - top)
    p = rounded(e).unflatten(0, (k.shape[1], -1))
    out = torch.einsum("kgij,jkd->ikgd", p, v).flatten(1, 2)
    out = out / total.masked_fill(total == 0, 1.0).permute(1, 0, 2)
    return out, (top + torch.log(total)).squeeze(-1)


def length(rng, most=900):
    return rng.choice(EDGES) if rng.random() < 0.5 else rng.randrange(1, most)


def spread(rng, shape, dtype, fill):
    """A tensor of that shape with the last stride 1 and, at times, other strides than dense."""
    kind = rng.randrange(3) if len(shape) == 4 else rng.randrange(2)
    if kind == 0:
        return torch.full(shape, fill, dtype=dtype, device="cuda")
    if kind == 1:  # rows with a gap after them
        return torch.full((*shape[:-1], shape[-1] + 8), fill, dtype=dtype, device="cuda")[..., : shape[-1]]
    b, s, h, d = shape  # heads outside rows
    return torch.full((b, h, s, d), fill, dtype=dtype, device="cuda").transpose(1, 2)


def make_case(rng, small):
    dtype = rng.choice([torch.bfloat16, torch.bfloat16, torch.float16])
    d, dv = rng.choice(WIDTHS[:7] if rng.random() < 0.7 else WIDTHS)
    h_k, group = rng.choice([1, 1, 2, 3]), rng.choice([1, 1, 2, 3, 4, 7, 16])
    b = rng.choice([1, 1, 2, 3, 5, 40 if not small else 2])
    most = 300 if small or b > 5 else 1500
    case = {
        "b": b,
        "h_k": h_k,
        "h": h_k * group,
        "d": d,
        "dv": dv,
        "dtype": dtype,
        "causal": 0,
        "window_left": -1,
        "window_right": -1,
        "attention_chunk": 0,
        "softcap": 0.0,
        "cp_world_size": 1,
        "cp_rank": 0,
        "scale": rng.choice([d**-0.5, d**-0.5, 0.3, 1e-3, 0.0, -0.1]),
    }
    mask = rng.randrange(7)
    if mask in (1, 2):
        case["causal"] = 1
    if mask in (2, 3):
        case["window_left"] = rng.choice([-1, 0, 5, 64, 100, 300])
        case["window_right"] = rng.choice([-1, 0, 3, 70, 400])
    if mask == 4:
        case["attention_chunk"] = rng.choice([1, 7, 64, 100, 256])
        case["causal"] = rng.randrange(2)
    if mask == 5:
        case["cp_world_size"] = rng.choice([2, 3, 4])
        case["cp_rank"] = rng.randrange(case["cp_world_size"])
        case["causal"] = rng.randrange(2)
    if rng.random() < 0.2:
        case["softcap"] = rng.choice([5.0, 30.0])
    case["q_kind"] = rng.choice(["dense", "used", "packed", "packed_used"])
    case["k_kind"] = rng.choice(["dense", "used", "packed", "packed_used", "paged", "paged"])
    if case["k_kind"] == "paged":
        case["page"] = rng.choice([1, 3, 8, 16, 32, 48, 64, 80, 128, 256, 20])
    case["batch_idx"] = case["k_kind"] in ("used", "paged") and rng.random() < 0.4
    case["leftpad"] = case["k_kind"] != "dense" and rng.random() < 0.2
    case["pack_gqa"] = rng.choice([-1, -1, 0, 1])
    case["sinks"] = rng.choice([None, None, None, torch.float32, torch.bfloat16, torch.float16])
    s_q, s_k = length(rng, most), length(rng, most)
    case["s_q"], case["s_k"] = max(s_q, 1), max(s_k, 1)
    same = "used" not in case["q_kind"] and case["q_kind"] != "packed"
    case["len_q"] = [case["s_q"] if same else min(length(rng, most), case["s_q"]) for _ in range(b)]
    case["len_k"] = [
        case["s_k"] if case["k_kind"] == "dense" else min(length(rng, most), case["s_k"]) for _ in range(b)
    ]
    case["pad"] = [rng.randrange(0, n + 1) if case["leftpad"] else 0 for n in case["len_k"]]
    return case


def build(case, seed):
    """Tensors of a case: the call's arguments, and (q, k, v), with qv (q, k, v, qv), of each sequence."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    nan, dtype, b, h, h_k = math.nan, case["dtype"], case["b"], case["h"], case["h_k"]
    d, dv, s_q, s_k = case["d"], case["dv"], case["s_q"], case["s_k"]
    gain = rng.choice([1.0, 1.0, 4.0])

    def normal(n, heads, width):
        return (torch.randn(n, heads, width, device="cuda") * gain).to(dtype)

    def ints(values):
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    seqs = [
        (normal(n, h, d), normal(m - l, h_k, d), normal(m - l, h_k, dv) / gain)
        for n, m, l in zip(case["len_q"], case["len_k"], case["pad"])
    ]
    a = {"softmax_scale": case["scale"]}
    for name in (
        "causal",
        "window_left",
        "window_right",
        "attention_chunk",
        "softcap",
        "cp_world_size",
        "cp_rank",
        "pack_gqa",
    ):
        a[name] = case[name]

    def offsets(lengths, gaps):
        at, found = 0, [0]
        for n in lengths:
            at += n + (rng.randrange(3) if gaps else 0)
            found.append(at)
        return found

    where_q = []
    if case["q_kind"].startswith("packed"):
        used = case["q_kind"] == "packed_used"
        cu = offsets(case["len_q"], used)
        a["q"] = spread(rng, (cu[-1], h, d), dtype, nan)
        a["out"] = spread(rng, (cu[-1], h, dv), dtype, GUARD)
        a["lse"] = torch.full((h, cu[-1]), GUARD, device="cuda")
        a["cu_seqlens_q"], a["max_seqlen_q"] = ints(cu), s_q
        if used:
            a["seqused_q"] = ints(case["len_q"])
        where_q = [lambda t, i=i: t[cu[i] : cu[i] + case["len_q"][i]] for i in range(b)]
        where_l = [lambda t, i=i: t[:, cu[i] : cu[i] + case["len_q"][i]] for i in range(b)]
    else:
        a["q"] = spread(rng, (b, s_q, h, d), dtype, nan)
        a["out"] = spread(rng, (b, s_q, h, dv), dtype, GUARD)
        a["lse"] = torch.full((b, h, s_q), GUARD, device="cuda")
        if case["q_kind"] == "used":
            a["seqused_q"] = ints(case["len_q"])
        where_q = [lambda t, i=i: t[i, : case["len_q"][i]] for i in range(b)]
        where_l = [lambda t, i=i: t[i, :, : case["len_q"][i]] for i in range(b)]
    for i in range(b):
        where_q[i](a["q"]).copy_(seqs[i][0])
    if case.get("qv"):
        seqs = [(*s, normal(n, h, dv) / gain) for s, n in zip(seqs, case["len_q"])]
        a["qv"] = spread(rng, (*a["q"].shape[:-1], dv), dtype, nan)
        for i in range(b):
            where_q[i](a["qv"]).copy_(seqs[i][3])

    rows = b + 2 if case["batch_idx"] else b
    row_of = rng.sample(range(rows), b) if case["batch_idx"] else list(range(b))
    if case["batch_idx"]:
        a["kv_batch_idx"] = ints(row_of)
    if case["leftpad"]:
        a["leftpad_k"] = ints(case["pad"])
    kind = case["k_kind"]
    if kind.startswith("packed"):
        cu_k = offsets(case["len_k"], kind == "packed_used")
        a["k"] = spread(rng, (cu_k[-1], h_k, d), dtype, nan)
        a["v"] = spread(rng, (cu_k[-1], h_k, dv), dtype, nan)
        a["cu_seqlens_k"], a["max_seqlen_k"] = ints(cu_k), s_k
        if kind == "packed_used":
            a["seqused_k"] = ints(case["len_k"])
    elif kind == "paged":
        page = case["page"]
        most = -(-s_k // page)
        count = rows * most + 3
        order = rng.sample(range(count), rows * most)
        table = torch.tensor(order, dtype=torch.int32).view(rows, most)
        for i in range(b):  # entries past the live length are never read
            table[row_of[i], -(-case["len_k"][i] // page) :] = 2**30
        a["page_table"] = table.cuda()
        a["k"] = spread(rng, (count, page, h_k, d), dtype, nan)
        a["v"] = spread(rng, (count, page, h_k, dv), dtype, nan)
        a["seqused_k"] = ints(case["len_k"])
    else:
        a["k"] = spread(rng, (rows, s_k, h_k, d), dtype, nan)
        a["v"] = spread(rng, (rows, s_k, h_k, dv), dtype, nan)
        if kind == "used":
            a["seqused_k"] = ints(case["len_k"])
    for i in range(b):
        for name, values in (("k", seqs[i][1]), ("v", seqs[i][2])):
            pad, n = case["pad"][i], case["len_k"][i]
            if kind == "paged":
                at = torch.arange(pad, n)
                pages = table[row_of[i], at // page].long().cuda()
                a[name][pages, (at % page).cuda()] = values
            elif kind.startswith("packed"):
                a[name][cu_k[i] + pad : cu_k[i] + n] = values
            else:
                a[name][row_of[i], pad:n] = values
    totals = [0] * b
    if case["cp_world_size"] > 1:
        totals = [
            max(0, (m - l) * case["cp_world_size"] - rng.randrange(case["cp_world_size"]))
            for m, l in zip(case["len_k"], case["pad"])
        ]
        a["cp_tot_seqused_k"] = ints(totals)
    sinks = None
    if case["sinks"]:
        a["sinks"] = (torch.randn(h, device="cuda") * 3).to(case["sinks"])
        sinks = a["sinks"].double()
    a["num_splits"] = splits = case.get("num_splits", 1)
    if splits > 1:
        shape = (splits, b, h, s_q) if a["q"].dim() == 4 else (splits, h, a["q"].shape[0])
        a["lse_accum"] = torch.full(shape, nan, device="cuda")
        a["out_accum"] = torch.full((*shape, dv), nan, device="cuda")
    return a, seqs, totals, sinks, where_q, where_l


def error(x, y):
    return (x - y).norm().item()


def check(case, seed):
    a, seqs, totals, sinks, where_q, where_l = build(case, seed)
    call = Call(**a)
    call.run()
    torch.cuda.synchronize()
    bad, live = [], torch.ones_like(a["lse"], dtype=torch.bool)
    num = low = den = lse_worst = 0.0
    first_out, first_lse = a["out"].clone(), a["lse"].clone()
    for i, (q, k, v, *qv) in enumerate(seqs):
        seen = visible(case, i, q.shape[0], k.shape[0], totals[i])
        args = (q.double(), k.double(), v.double(), seen, case["scale"], case["softcap"], sinks)
        more = [x.double() for x in qv]
        want, want_lse = attend(*args, None, *more)
        if a["k"].numel() == 0 and "k_new" not in a:  # no key storage at all: +inf, sinks or not
            want_lse.fill_(math.inf)
        rough, _ = attend(*args, case["dtype"], *more)
        got, got_lse = where_q[i](a["out"]).double(), where_l[i](a["lse"]).double()
        num += error(got, want) ** 2
        low += error(rough.to(case["dtype"]).double(), want) ** 2
        den += want.norm().item() ** 2
        where_l[i](live)[...] = False
        if got_lse.numel():
            same = torch.isinf(want_lse) == torch.isinf(got_lse)
            if not same.all():
                bad.append(f"lse of sequence {i}: infinities differ")
            finite = torch.isfinite(want_lse)
            gap = ((got_lse - want_lse).abs() / (1 + want_lse.abs()))[finite]
            if gap.numel():
                lse_worst = max(lse_worst, gap.max().item())
    if live.any() and not (a["lse"][live] == GUARD).all():
        bad.append("lse written outside live rows")
    out_rows = a["out"].transpose(0, 1) if "cu_seqlens_q" in a else a["out"].transpose(1, 2)
    if live.any() and not (out_rows[live] == torch.tensor(GUARD, dtype=case["dtype"], device="cuda")).all():
        bad.append("out written outside live rows")
    den = max(den, 1e-30) ** 0.5
    num, low = num**0.5 / den, low**0.5 / den
    if not num <= 2 * low + 1e-5:
        bad.append(f"out: error {num:.2e}, plain low precision {low:.2e}")
    limit = 4e-3 if case["softcap"] else 1e-4
    if not lse_worst <= limit:
        bad.append(f"lse: error {lse_worst:.2e}")
    a["out"].fill_(GUARD)
    a["lse"].fill_(GUARD)
    call.run()
    torch.cuda.synchronize()
    if not (
        torch.equal(first_out.view(torch.int16), a["out"].view(torch.int16))
        and torch.equal(first_lse.view(torch.int32), a["lse"].view(torch.int32))
    ):
        bad.append("a second call gave other bits")
    return call, num, low, lse_worst, bad


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--only", default="")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    failures, ran, worst = 0, {}, 0.0
    for n in range(args.cases):
        seed = args.seed * 100003 + n
        case = make_case(random.Random(seed), args.small)
        if args.only and args.only not in str(case):
            continue
        if args.verbose:
            print(n, case, flush=True)
        call, num, low, lse, bad = check(case, seed)
        ran[call.kernel] = ran.get(call.kernel, 0) + 1
        worst = max(worst, num / (2 * low + 1e-5))
        if bad:
            failures += 1
            print(
                f"FAIL {n} {call.kernel} cluster {call.plan.tile[1]} gather {call.plan.tile[2]} "
                f"{case}\n    " + "\n    ".join(bad),
                flush=True,
            )
            if failures >= 12:
                break
    for kernel, count in sorted(ran.items()):
        print(f"{count:5} {kernel}")
    print(f"{failures} failures, worst error {worst:.2f} of what is allowed")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
