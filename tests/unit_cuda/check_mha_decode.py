# SPDX-License-Identifier: MIT
"""The Hopper decode kernels against fp64 arithmetic, on a GPU.

    python tests/unit_cuda/check_mha_decode.py [--seed S] [--cases N] [--only SUBSTRING] [--graphs N]

The cases of check_mha_fwd.py with few queries, long caches, many empty sequences and every number of
splits, with qv and wide values too; then graphs that are captured once and replayed with other
lengths, pages and contents.
"""

import argparse
import random
import sys

import check_mha_fwd as base
import torch
from attn_abi import Call

SPLITS = [0, 0, 0, 0, 1, 2, 3, 5, 16, 256]
LATENT = [(64, 512), (64, 512), (64, 256), (48, 320), (8, 264), (64, 504), (40, 448)]  # with qv or wide v


def make_case(rng):
    case = base.make_case(rng, False)
    b = rng.choice([1, 1, 2, 3, 7, 40])
    case["b"] = b
    h_k, group = rng.choice([1, 2, 8]), rng.choice([1, 2, 4, 7, 8, 16])
    if b == 40:
        h_k = min(h_k, 2)
    case["h_k"], case["h"] = h_k, h_k * group
    case["num_splits"] = rng.choice(SPLITS)
    most = rng.choice([200, 1500, 6000]) if b < 40 else 700
    s_q = rng.choice([1, 1, 1, 2, 3, 5, 8, 16, 17 if case["num_splits"] > 1 else 4])
    if case["num_splits"] > 1 and rng.random() < 0.2:
        s_q = rng.choice([100, 300])
    case["s_q"] = s_q
    ragged_q = "used" in case["q_kind"] or case["q_kind"] == "packed"
    case["len_q"] = [rng.randrange(0, s_q + 1) if ragged_q else s_q for _ in range(b)]
    case["s_k"] = s_k = max(base.length(rng, most), 1)
    fixed = case["k_kind"] == "dense"
    case["len_k"] = [s_k if fixed else rng.choice([0, rng.randrange(0, s_k + 1), s_k]) for _ in range(b)]
    case["pad"] = [rng.randrange(0, n + 1) if case["leftpad"] else 0 for n in case["len_k"]]
    if rng.random() < 0.3:
        case["d"], case["dv"] = d, dv = rng.choice(LATENT)
        case["qv"] = rng.random() < 0.8 or dv == 256
        case["scale"] = rng.choice([(d + dv) ** -0.5, (d + dv) ** -0.5, 0.1, -0.05])
        if rng.random() < 0.1:  # the same kernel also takes many queries
            case["s_q"] = most = s_q + 200
            case["len_q"] = [rng.randrange(0, most + 1) if ragged_q else most for _ in range(b)]
    # What split results take, and the reference's scores: at most 1/4 and 1/2 GiB.
    rows = case["h"] * case["s_q"]
    case["num_splits"] = min(case["num_splits"], max(2**26 // (b * rows * case["dv"]), 1))
    s_k = max(2**26 // rows, 1)
    if s_k < case["s_k"]:
        case["s_k"], case["len_k"] = s_k, [min(n, s_k) for n in case["len_k"]]
        case["pad"] = [min(pad, n) for pad, n in zip(case["pad"], case["len_k"])]
    return case


def merged(out, lse):
    """What a pair of partial results [n, ..] amounts to, in fp64."""
    lse = lse.double()
    top = lse.amax(0).clamp(min=-1e300)
    w = torch.exp(lse - top)
    total = w.sum(0)
    out = (torch.where(w[..., None] > 0, out.double(), 0.0) * w[..., None]).sum(0)
    return out / total.clamp(min=1e-300)[..., None], top + torch.log(total)


def check_accum(case, seed):
    """Every split of a call is there, and their merging is the result."""
    a, seqs, totals, sinks, where_q, where_l = base.build(case, seed)
    if a["k"].numel() == 0:  # the lse of such a call is +inf, which no merging gives
        return []
    Call(**a).run()
    torch.cuda.synchronize()
    out, lse = merged(a["out_accum"], a["lse_accum"])
    out = out.transpose(-3, -2)
    bad = []
    for i in range(case["b"]):
        got, want = where_q[i](a["out"]).double(), where_q[i](out)
        if not torch.allclose(got, want, rtol=2e-2, atol=2e-2):
            bad.append(f"accum of sequence {i}: {(got - want).abs().max().item()}")
        got, want = where_l[i](a["lse"]).double(), where_l[i](lse)
        if not torch.allclose(got, want, rtol=1e-3, atol=1e-3):
            bad.append(f"lse_accum of sequence {i}")
    return bad


def check_graph(seed, replays):
    """One captured call, replayed with other lengths, pages and values; compared with eager calls
    bit for bit and, now and then, with fp64."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    b, h_k, group, d = (
        rng.choice([1, 1, 4, 33]),
        rng.choice([1, 4, 8]),
        rng.choice([1, 4, 8]),
        rng.choice([64, 128]),
    )
    page, s_q, capacity = rng.choice([1, 16, 64, 128]), rng.choice([1, 1, 3]), rng.choice([257, 4096])
    h, most, dtype = h_k * group, -(-capacity // page), torch.bfloat16
    pool = b * most + 5
    a = {
        "q": torch.empty(b, s_q, h, d, device="cuda", dtype=dtype),
        "k": torch.randn(pool, page, h_k, d, device="cuda", dtype=dtype),
        "v": torch.randn(pool, page, h_k, d, device="cuda", dtype=dtype),
        "out": torch.empty(b, s_q, h, d, device="cuda", dtype=dtype),
        "lse": torch.empty(b, h, s_q, device="cuda"),
        "seqused_k": torch.zeros(b, device="cuda", dtype=torch.int32),
        "page_table": torch.zeros(b, most, device="cuda", dtype=torch.int32),
        "causal": 1,
        "num_splits": 0,
    }
    call = Call(**a)
    call.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.run()
    bad = []
    for turn in range(replays):
        a["q"].normal_()
        few = rng.random() < 0.3
        lens = [rng.choice([0, 1, rng.randrange(0, 70 if few else capacity + 1)]) for _ in range(b)]
        if rng.random() < 0.2:
            lens = [capacity] * b
        a["seqused_k"].copy_(torch.tensor(lens, dtype=torch.int32))
        a["page_table"].copy_(torch.randperm(pool, dtype=torch.int32)[: b * most].view(b, most))
        a["out"].fill_(7.0)
        a["lse"].fill_(7.0)
        graph.replay()
        torch.cuda.synchronize()
        out, lse = a["out"].clone(), a["lse"].clone()
        call.workspace.fill_(255)
        call.run()
        torch.cuda.synchronize()
        if not (
            torch.equal(out.view(torch.int16), a["out"].view(torch.int16)) and torch.equal(lse, a["lse"])
        ):
            bad.append(f"replay {turn} differs from an eager call, lengths {lens}")
        if turn % 8:
            continue
        i = rng.randrange(b)
        n = lens[i]
        at = torch.arange(n, device="cuda")
        pages = a["page_table"][i].long()[at // page]
        k, v = (a[x][pages, at % page].double() for x in "kv")
        case = {"cp_world_size": 1, "causal": 1, "window_left": -1, "window_right": -1, "attention_chunk": 0}
        seen = base.visible(case, i, s_q, n, 0)
        want, want_lse = base.attend(a["q"][i].double(), k, v, seen, d**-0.5, 0.0, None, None)
        if not torch.allclose(a["out"][i].double(), want, rtol=2e-2, atol=2e-2):
            bad.append(f"replay {turn}: sequence {i} of {n} keys is wrong")
        if not torch.allclose(a["lse"][i].double(), want_lse, rtol=1e-3, atol=1e-3):
            bad.append(f"replay {turn}: lse of sequence {i} of {n} keys is wrong")
    return bad


def check_streams(seed):
    """Calls of two streams at once, a graph among them, give the bits that each gives alone, with and
    without the lse."""
    torch.manual_seed(seed)
    calls = []
    for h_k, keys in ((8, 4096), (4, 3000), (8, 900), (2, 5000)):
        shape = (1, keys, h_k, 128)
        k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        q = torch.randn(1, 1, 4 * h_k, 128, device="cuda", dtype=torch.bfloat16)
        out = torch.empty_like(q)
        lse = torch.empty(1, 4 * h_k, 1, device="cuda")
        calls.append((Call(q=q, k=k, v=v, out=out, lse=lse if h_k == 8 else None, num_splits=0), out))
    want = []
    for call, out in calls:
        call.run()
        torch.cuda.synchronize()
        want.append(out.clone())
    graph, streams = torch.cuda.CUDAGraph(), [torch.cuda.Stream() for _ in range(2)]
    with torch.cuda.graph(graph):
        calls[0][0].run()
        calls[1][0].run()
    bad = []
    for turn in range(20):
        for _, out in calls:
            out.fill_(7.0)
        torch.cuda.synchronize()
        with torch.cuda.stream(streams[0]):
            graph.replay()
        with torch.cuda.stream(streams[1]):
            calls[2][0].run()
            calls[3][0].run()
        torch.cuda.synchronize()
        for i, (_, out) in enumerate(calls):
            if not torch.equal(out, want[i]):
                bad.append(f"turn {turn}: call {i} differs beside another stream's")
    return bad


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--graphs", type=int, default=6)
    parser.add_argument("--only", default="")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    failures, ran, worst = 0, {}, 0.0
    for n in range(args.cases):
        seed = args.seed * 100003 + n
        case = make_case(random.Random(seed))
        if args.only and args.only not in str(case):
            continue
        if args.verbose:
            print(n, case, flush=True)
        call, num, low, lse, bad = base.check(case, seed)
        if case["num_splits"] > 1 and n % 3 == 0:
            bad += check_accum(case, seed)
        ran[call.kernel] = ran.get(call.kernel, 0) + 1
        worst = max(worst, num / (2 * low + 1e-5))
        if bad:
            failures += 1
            print(
                f"FAIL {n} {call.kernel} {list(call.plan.tile)[:4]} {case}\n    " + "\n    ".join(bad[:6]),
                flush=True,
            )
            if failures >= 8:
                break
    for n in range(args.graphs):
        bad = check_graph(args.seed + n, 60)
        failures += bool(bad)
        for line in bad[:3]:
            print(f"FAIL graph {n}: {line}")
    for line in check_streams(args.seed)[:3] if args.graphs else []:
        failures += 1
        print(f"FAIL streams: {line}")
    for kernel, count in sorted(ran.items()):
        print(f"{count:5} {kernel}")
    print(f"{failures} failures, worst error {worst:.2f} of what is allowed")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
