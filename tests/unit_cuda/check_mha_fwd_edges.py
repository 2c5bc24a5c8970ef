# SPDX-License-Identifier: MIT
"""What random cases of check_mha_fwd.py do not reach: calls without keys or queries, graph capture
with other lengths at replay, streams and threads side by side, tensors beyond 2^31 elements, many
and long sequences, and what is not built.     python tests/unit_cuda/check_mha_fwd_edges.py"""
import math
import sys
import threading

import torch

from attn_abi import AttnError, Call

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
    a = outputs({"q": randn(2, 5, 4, 64), "k": randn(2, 3, 2, 64), "v": randn(2, 3, 2, 64),
                 "seqused_k": used})
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
    a = outputs({"q": randn(1000, 4, 128), "k": randn(1000, 4, 128), "v": randn(1000, 4, 128),
                 "cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 1000, "max_seqlen_k": 1000,
                 "causal": 1})
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
        assert (a["out"][lengths[-1]:] == 7).all()


def streams_and_threads():
    problems = []
    for n in range(4):
        a = outputs({"q": randn(2, 1500, 8, 128), "k": randn(2, 1500, 8, 128),
                     "v": randn(2, 1500, 8, 128), "causal": n % 2})
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
    assert q.numel() > 2 ** 31
    Call(**a).run()
    last = slice(s - 300, s)
    keys = slice(s - 500, s)
    i = torch.arange(300, device="cuda")[:, None] + 200
    j = torch.arange(500, device="cuda")[None]
    scores = (q[-1, last, -1].float() @ k[-1, keys, -1].float().T) * 128 ** -0.5
    p = torch.softmax(scores.masked_fill((j > i) | (j < i - 200), -math.inf), -1)
    close(a["out"][-1, last, -1], p @ v[-1, keys, -1].float())


def many_sequences():
    torch.manual_seed(3)
    lengths = torch.randint(0, 90, (1000,)).tolist()
    cu = [0]
    for n in lengths:
        cu.append(cu[-1] + n)
    t = cu[-1]
    a = outputs({"q": randn(t, 2, 64), "k": randn(t, 2, 64), "v": randn(t, 2, 64),
                 "cu_seqlens_q": ints(cu), "cu_seqlens_k": ints(cu), "max_seqlen_q": 90,
                 "max_seqlen_k": 90, "causal": 1})
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


def not_built():
    q = randn(1, 8, 2, 64)
    for wish, more in (("qv", {"qv": randn(1, 8, 2, 512), "v": randn(1, 8, 2, 512)}),
                       ("k_new", {"k_new": q, "v_new": q, "seqused_k": ints([0])}),
                       ("512", {"v": randn(1, 8, 2, 512)})):
        try:
            Call(**outputs({"q": q, "k": q, "v": q, **more}))
        except AttnError as e:
            assert e.status == "NOT_BUILT" and wish in str(e), str(e)
        else:
            raise AssertionError(f"{wish}: expected NOT_BUILT")


def main():
    failures = 0
    for check in (no_keys, no_queries, one_key_row, expanded, graph, streams_and_threads, large,
                  many_sequences, long_keys, not_built):
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
