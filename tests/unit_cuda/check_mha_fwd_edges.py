# SPDX-License-Identifier: MIT
"""What random cases of check_mha_fwd.py do not reach: calls without keys or queries, graph capture
with other lengths at replay, streams and threads side by side, tensors beyond 2^31 elements, many
and long sequences, and what is not built.     python tests/unit_cuda/check_mha_fwd_edges.py"""

import math
import sys
import threading

import torch
from attn_abi import AttnError, Call, split_combine

BF16 = torch.bfloat16


def randn(*shape):
    return torch.randn(*shape, device="cuda", dtype=BF16)


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def outputs(a):
    q = a["q"]
    a["out"] = torch.full((*q.shape[:-1], a["v"].shape[-1]), 7.0, device="cuda", dtype=q.dtype)
    shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    a["lse"] = torch.full(shape, 7.0, device="cuda")
    return a


def reference(q, k, v, causal):
    """fp32 on the GPU; [s, h, d]."""
    s = torch.einsum("ihd,jhd->hij", q.float(), k.float()) * q.shape[-1] ** -0.5
    if causal:
        i = torch.arange(q.shape[0], device="cuda")[:, None] + k.shape[0] - q.shape[0]
        s = s.masked_fill(torch.arange(k.shape[0], device="cuda")[None] > i, -math.inf)
    return torch.einsum("hij,jhd->ihd", torch.softmax(s, -1), v.float())


def close(got, want, limit=5e-3):
    error = ((got.float() - want).norm() / want.norm()).item()
    assert error < limit, f"error {error:.2e}"


def no_keys():
    a = outputs({"q": randn(2, 5, 4, 64), "k": randn(2, 0, 2, 64), "v": randn(2, 0, 2, 64)})
    Call(**a).run()
    assert (a["out"] == 0).all() and (a["lse"] == math.inf).all()
    used = ints([0, 3])
    a = outputs(
        {"q": randn(2, 5, 4, 64), "k": randn(2, 3, 2, 64), "v": randn(2, 3, 2, 64), "seqused_k": used}
    )
    Call(**a).run()
    assert (a["out"][0] == 0).all() and (a["lse"][0] == -math.inf).all()
    assert torch.isfinite(a["lse"][1]).all()


def no_queries():
    for shape in ((0, 4, 2, 64), (2, 0, 2, 64)):
        b = shape[0]
        Call(**outputs({"q": randn(*shape), "k": randn(b, 4, 2, 64), "v": randn(b, 4, 2, 64)})).run()
    torch.cuda.synchronize()


def one_key_row():
    """A row stride that is never used may be anything."""
    k = torch.randn(2, 1, 3, 64, device="cuda", dtype=BF16).as_strided((2, 1, 3, 64), (192, 7, 64, 1))
    a = outputs({"q": randn(2, 9, 3, 64), "k": k, "v": k})
    Call(**a).run()
    close(a["out"], k.float().expand(2, 9, 3, 64))


def expanded():
    """Keys shared by all sequences: a batch stride of 0 cannot be a box."""
    k, v = randn(1, 300, 2, 128).expand(3, -1, -1, -1), randn(1, 300, 2, 128).expand(3, -1, -1, -1)
    a = outputs({"q": randn(3, 200, 4, 128), "k": k, "v": v, "causal": 1})
    Call(**a).run()
    for i in range(3):
        close(a["out"][i], reference(a["q"][i], *(t[i].repeat_interleave(2, 1) for t in (k, v)), True))


def graph():
    cu = ints([0, 300, 700, 1000])
    a = outputs(
        {
            "q": randn(1000, 4, 128),
            "k": randn(1000, 4, 128),
            "v": randn(1000, 4, 128),
            "cu_seqlens_q": cu,
            "cu_seqlens_k": cu,
            "max_seqlen_q": 1000,
            "max_seqlen_k": 1000,
            "causal": 1,
        }
    )
    call = Call(**a)
    call.run()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        call.run()
    for lengths in ([0, 300, 700, 1000], [0, 1, 1, 1000], [0, 1000, 1000, 1000], [0, 0, 500, 900]):
        cu.copy_(ints(lengths))
        a["out"].fill_(7.0)
        captured.replay()
        for i, j in zip(lengths, lengths[1:]):
            if j > i:
                close(a["out"][i:j], reference(*(a[n][i:j] for n in "qkv"), True))
        assert (a["out"][lengths[-1] :] == 7).all()


def streams_and_threads():
    problems = []
    for n in range(4):
        a = outputs(
            {
                "q": randn(2, 1500, 8, 128),
                "k": randn(2, 1500, 8, 128),
                "v": randn(2, 1500, 8, 128),
                "causal": n % 2,
            }
        )
        problems.append((a, Call(**a), torch.cuda.Stream()))
    torch.cuda.synchronize()

    def work(call, stream):
        with torch.cuda.stream(stream):
            for _ in range(50):
                call.run()

    threads = [threading.Thread(target=work, args=(c, s)) for _, c, s in problems]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    torch.cuda.synchronize()
    for a, _, _ in problems:
        close(a["out"][1], reference(a["q"][1], a["k"][1], a["v"][1], a["causal"]))


def large():
    """Beyond 2^31 elements in q, k, v and out: 9 sequences of 65536 x 32 heads x 128."""
    b, s, h = 9, 65536, 32
    q, k, v = (torch.empty(b, s, h, 128, device="cuda", dtype=BF16) for _ in range(3))
    for t in (q, k, v):
        t[-1, :, -1].normal_()
    a = outputs({"q": q, "k": k, "v": v, "causal": 1, "window_left": 200})
    assert q.numel() > 2**31
    Call(**a).run()
    last = slice(s - 300, s)
    keys = slice(s - 500, s)
    i = torch.arange(300, device="cuda")[:, None] + 200
    j = torch.arange(500, device="cuda")[None]
    scores = (q[-1, last, -1].float() @ k[-1, keys, -1].float().T) * 128**-0.5
    p = torch.softmax(scores.masked_fill((j > i) | (j < i - 200), -math.inf), -1)
    close(a["out"][-1, last, -1], p @ v[-1, keys, -1].float())


def many_sequences():
    torch.manual_seed(3)
    lengths = torch.randint(0, 90, (1000,)).tolist()
    cu = [0]
    for n in lengths:
        cu.append(cu[-1] + n)
    t = cu[-1]
    a = outputs(
        {
            "q": randn(t, 2, 64),
            "k": randn(t, 2, 64),
            "v": randn(t, 2, 64),
            "cu_seqlens_q": ints(cu),
            "cu_seqlens_k": ints(cu),
            "max_seqlen_q": 90,
            "max_seqlen_k": 90,
            "causal": 1,
        }
    )
    Call(**a).run()
    for i in range(0, 1000, 37):
        at = slice(cu[i], cu[i + 1])
        if lengths[i]:
            close(a["out"][at], reference(a["q"][at], a["k"][at], a["v"][at], True), 8e-3)


def long_keys():
    n = 200_000
    a = outputs({"q": randn(1, 100, 2, 128), "k": randn(1, n, 2, 128), "v": randn(1, n, 2, 128)})
    Call(**a).run()
    close(a["out"][0], reference(a["q"][0], a["k"][0], a["v"][0], False), 1e-2)


def segment_start():
    """Keys that begin where mapped memory begins: nothing before them may be touched."""
    parts = [torch.empty(64 << 20, device="cuda", dtype=torch.uint8) for _ in range(6)]
    parts.sort(key=lambda t: t.data_ptr())
    k, v, q = (parts[i].view(BF16).view(4, 4096, 8, 256).normal_() for i in (1, 3, 5))
    del parts
    torch.cuda.empty_cache()
    for n in (4096, 81, 80, 79, 41, 40, 39, 16, 1):
        a = outputs({"q": q, "k": k[:, :n], "v": v[:, :n]})
        Call(**a).run()
        torch.cuda.synchronize()


def softcap_saturated():
    """Every score at the cap, or every one at its negative: no maximum is kept, and none is missed."""
    for cap in (1.0, 30.0, 50.0, 60.0, 1000.0):
        for sign in (1, -1):
            q, k, v = (
                torch.ones(1, 70, 2, 128),
                torch.full((1, 500, 2, 128), 8.0 * sign),
                randn(1, 500, 2, 128),
            )
            a = outputs({"q": q.cuda().to(BF16), "k": k.cuda().to(BF16), "v": v, "softcap": cap})
            Call(**a).run()
            close(a["out"][0], v[0].float().mean(0).expand(70, 2, 128), 1e-2)
            score = cap * math.tanh(sign * 8 * 128**0.5 / cap)
            assert (a["lse"] - score - math.log(500)).abs().max() < 1e-2 + 1e-3 * abs(score)


def rotate(x, cos, sin, positions, interleaved):
    """x [s, h, d] in fp32, rounded to x's type."""
    r = 2 * cos.shape[1]
    c, s = cos[positions].float()[:, None], sin[positions].float()[:, None]
    y = x.float().clone()
    one, two = (slice(0, r, 2), slice(1, r, 2)) if interleaved else (slice(0, r // 2), slice(r // 2, r))
    y[..., one] = x[..., one].float() * c - x[..., two].float() * s
    y[..., two] = x[..., one].float() * s + x[..., two].float() * c
    return y.to(x.dtype)


def append():
    torch.manual_seed(5)
    b, h, h_k, d, page = 3, 6, 2, 128, 32
    cached, new = [5, 0, 130], [3, 70, 1]
    cos, sin = randn(512, 32).clamp(-1, 1), randn(512, 32).clamp(-1, 1)
    for paged in (False, True):
        for packed in (False, True):
            for rotary in (None, False, True):
                for causal in (0, 1):
                    counts = new if packed else [4] * b
                    k_rows = [randn(n + m, h_k, d) for n, m in zip(cached, counts)]
                    v_rows = [randn(n + m, h_k, d) for n, m in zip(cached, counts)]
                    q = randn(b, 4, h, d)
                    a = {"q": q, "causal": causal, "seqused_k": ints(cached)}
                    if paged:
                        table = torch.randperm(30)[:24].int().view(b, 8)
                        a["page_table"] = table.cuda()
                        k, v = (
                            torch.full((30, page, h_k, d), math.nan, device="cuda", dtype=BF16)
                            for _ in range(2)
                        )
                    else:
                        table = None
                        k, v = (
                            torch.full((b, 256, h_k, d), math.nan, device="cuda", dtype=BF16)
                            for _ in range(2)
                        )

                    def rows(cache, i, n, paged=paged, table=table):
                        at = torch.arange(n)
                        if not paged:
                            return i, at.cuda()
                        return table[i, at // page].long().cuda(), (at % page).cuda()

                    for i in range(b):
                        k[rows(k, i, cached[i])] = k_rows[i][: cached[i]]
                        v[rows(v, i, cached[i])] = v_rows[i][: cached[i]]
                    k_new = [r[n:] for r, n in zip(k_rows, cached)]
                    v_new = [r[n:] for r, n in zip(v_rows, cached)]
                    join = torch.cat if packed else torch.stack
                    a.update(k=k, v=v, k_new=join(k_new), v_new=join(v_new))
                    if packed:
                        a["cu_seqlens_k_new"] = ints([0, 3, 73, 74])
                    if rotary is not None:
                        a.update(rotary_cos=cos, rotary_sin=sin, rotary_interleaved=int(rotary))
                    Call(**outputs(a)).run()
                    for i in range(b):
                        want, qi, n = k_rows[i].clone(), q[i], cached[i]
                        if rotary is not None:
                            at = torch.arange(n, n + counts[i], device="cuda")
                            want[n:] = rotate(want[n:], cos, sin, at, rotary)
                            first = torch.full((4,), n, device="cuda")
                            turn = first + torch.arange(4, device="cuda") * causal
                            qi = rotate(qi, cos, sin, turn, rotary)
                        total = n + counts[i]
                        got = k[rows(k, i, total)]
                        assert (got.float() - want.float()).abs().max() <= 0.04, "cached keys"
                        assert torch.equal(v[rows(v, i, total)], v_rows[i]), "cached values"
                        group = h // h_k
                        full = reference(
                            qi, *(t.repeat_interleave(group, 1) for t in (want, v_rows[i])), causal
                        )
                        close(a["out"][i], torch.nan_to_num(full), 8e-3)


def combine():
    for splits, dtype in ((1, torch.float32), (3, BF16), (200, torch.float16)):
        out = torch.randn(splits, 2, 33, 3, 72, device="cuda")
        lse = torch.randn(splits, 2, 3, 33, device="cuda").transpose(2, 3) * 4
        lse[:, 1, 5] = -math.inf
        lse[0, 0, 7] = -math.inf
        out[:, 1, 5] = math.nan
        got = torch.full((2, 33, 3, 72), 7.0, device="cuda", dtype=dtype)
        got_lse = torch.full((2, 3, 33), 7.0, device="cuda").transpose(1, 2)
        split_combine(out_partial=out, lse_partial=lse, out=got, lse=got_lse)
        want_lse = torch.logsumexp(lse.double(), 0)
        w = torch.nan_to_num(torch.exp(lse.double() - want_lse))[..., None]
        want = (w * torch.nan_to_num(out.double())).sum(0)
        assert (got[1, 5] == 0).all() and (got_lse[1, 5] == -math.inf).all()
        close(got, want.float(), 3e-3)
        live = torch.isfinite(want_lse)
        assert (got_lse[live] - want_lse[live]).abs().max() < 1e-4


def main():
    failures = 0
    for check in (
        no_keys,
        no_queries,
        one_key_row,
        expanded,
        graph,
        streams_and_threads,
        large,
        many_sequences,
        long_keys,
        segment_start,
        softcap_saturated,
        append,
        combine,
    ):
        try:
            check()
            torch.cuda.synchronize()
            print(f"{check.__name__:24} ok", flush=True)
        except (AssertionError, AttnError, RuntimeError) as e:
            failures += 1
            print(f"{check.__name__:24} FAILED: {e}", flush=True)
        torch.cuda.empty_cache()
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
