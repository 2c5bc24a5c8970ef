# SPDX-License-Identifier: MIT
"""kda_fwd and kda_step on the CPU: shares of this machine's ceilings, measured in the same run.

    python bench/cpu_kda.py                     T 8192, 64 sequences of a step
    python bench/cpu_kda.py --tokens 2048       shorter, for machines of few cores
    python bench/cpu_kda.py --quick             a few calls of small rows: a smoke test

kda_fwd: bf16, K = V = 128, 118 kFLOP a token and head (chunk 16), against the best of the rates that
bench/ceiling.c gives for bf16, and against the chunked form in torch (`torch_chunks`: chunk 32, fp32,
all chunks' products batched, so that only the recurrence over chunks is a Python loop).  The few-heads
row is tokens x heads a second over those of 32 heads.
kda_step: a token for each sequence, 32 heads, fp32 states in place, going round as many as make
ROTATE_BYTES; against multiplying the same bytes in place by torch, and by ceiling.c's read rate.
Times are the best and the median; shares are of the medians, and of the best in brackets.
"""

import argparse
import itertools
import statistics

import cpu_mha_fwd as common
import libattn
import torch
from cpu_mha_fwd import alternate, ceilings

FLOP = 118e3  # a token and head
D = 128


def inputs(b, t, h):
    torch.manual_seed(b + t + h)
    q, k, v, g = (torch.randn(b, t, h, D).bfloat16() for _ in range(4))
    return (
        q,
        k,
        v,
        g,
        torch.randn(b, t, h).bfloat16(),
        D**-0.5,
        -5.0,
        torch.rand(h),
        torch.rand(h, D),
    )


def torch_chunks(q, k, v, g, beta, scale, bound, A_log, dt_bias, chunk=32):
    """The same function for one sequence from a zero state, T a multiple of the chunk."""
    b, t, h, d = q.shape

    def cut(x):  # [h, chunks, chunk, width]
        return x[0].float().unflatten(0, (-1, chunk)).permute(2, 0, 1, 3)

    def unit(x):
        return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()

    q, k, v, g, beta = unit(cut(q)) * scale, unit(cut(k)), cut(v), cut(g), cut(beta[..., None]).sigmoid()
    gamma = bound * torch.sigmoid(A_log.exp()[:, None, None, None] * (g + dt_bias[:, None, None]))
    total = gamma.cumsum(2)
    middle = total[:, :, chunk // 2 - 1 : chunk // 2]
    end = total[:, :, -1:]
    ki = k * (middle - total).exp()
    n = torch.tril((k * (total - middle).exp()) @ ki.mT, -1) * beta
    m = torch.tril((q * (total - middle).exp()) @ ki.mT)
    eye = torch.eye(chunk).expand_as(n)
    solve = torch.linalg.solve_triangular(eye + n, eye, upper=False, unitriangular=True) * beta.mT
    decay = total.exp()
    kd, qd, kr = k * decay, q * decay, k * (end - total).exp()
    out = torch.empty_like(v)
    state = torch.zeros(h, d, d)  # [h, K, V]
    for i in range(t // chunk):
        u = solve[:, i] @ (v[:, i] - kd[:, i] @ state)
        out[:, i] = qd[:, i] @ state + m[:, i] @ u
        state = state * end[:, i].exp().mT + kr[:, i].mT @ u
    return out.permute(1, 2, 0, 3).reshape(1, t, h, d).bfloat16()


def row(name, times, work, unit, ceiling):
    median, best = statistics.median(times), min(times)
    share = f"{work / median / ceiling:5.2f} ({work / best / ceiling:.2f})" if ceiling else "      -"
    print(f"{name:34} {best * 1e3:9.3f} {median * 1e3:9.3f} ms {work / median / 1e9:9.1f} {unit:6} {share}")
    return median


def bench_fwd(tokens, heads, ceiling, peer):
    x = inputs(1, tokens, heads)
    out = torch.empty_like(x[2])
    calls = [lambda: libattn.kda_fwd(*x, out=out)]
    if peer:
        calls.append(lambda: torch_chunks(*x))
        mine = libattn.kda_fwd(*x, out=out).float()
        error = (torch_chunks(*x).float() - mine).square().mean().sqrt()
        assert error < 0.01 * mine.square().mean().sqrt().clamp(min=1e-3) + 0.01, error
    times = alternate(*calls)
    work = FLOP * tokens * heads
    name = libattn.kda_fwd_plan(*x).kernel
    median = row(f"{name.removeprefix('attn_')} T {tokens} H {heads}", times[0], work, "GF/s", ceiling)
    if peer:
        other = row(f"torch, chunk 32, T {tokens} H {heads}", times[1], work, "GF/s", ceiling)
        print(f"{'':34} {other / median:.1f} x torch")
    return work / median


def bench_step(sequences, heads, read):
    x = inputs(sequences, 1, heads)
    elements = sequences * heads * D * D
    rounds = max(2, int(common.ROTATE_BYTES / (4 * elements)))
    states = torch.full((rounds * sequences, heads, D, D), 0.01)
    slots = [torch.arange(i * sequences, (i + 1) * sequences, dtype=torch.int32) for i in range(rounds)]
    parts = states.view(rounds, -1)
    out = torch.empty_like(x[2])
    mine, other = itertools.cycle(slots), itertools.cycle(range(rounds))
    times = alternate(
        lambda: libattn.kda_step(*x[:7], states, *x[7:], out=out, state_indices=next(mine)),
        lambda: parts[next(other)].mul_(0.999),
    )
    bytes_moved = 8 * elements
    in_place = bytes_moved / statistics.median(times[1])
    row(f"kda_step b {sequences} H {heads}", times[0], bytes_moved, "GB/s", in_place)
    row("torch mul_ in place", times[1], bytes_moved, "GB/s", read)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        common.be_quick()
        args.tokens, args.sequences = 64, 2
    torch.set_grad_enabled(False)
    rates = ceilings()
    bf16 = max((rates.get(name, 0) for name in ("amx_bf16", "dp_bf16", "fma_fp32")), default=0)
    print(f"{torch.get_num_threads()} threads,", *(f"{n} {r / 1e9:.0f} G/s" for n, r in rates.items()))
    print(f"{'':34} {'best':>9} {'median':>9}    {'rate':>9}        share of the ceiling")
    many = bench_fwd(args.tokens, 32, bf16, True)
    few = bench_fwd(args.tokens, 2, bf16, False)
    print(f"{'':34} few heads: {few / many:.2f} of 32 heads' tokens x heads a second")
    bench_step(args.sequences, 32, rates.get("read", 0))


if __name__ == "__main__":
    main()
