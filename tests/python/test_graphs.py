# SPDX-License-Identifier: MIT
"""Decode on a GPU: captured once and replayed with other lengths, pages and values, and splits.

What a replay must give is computed by the same package on the CPU."""

import random

import flash_attn_interface as fa
import flash_mla
import pytest
import reference
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
REPLAYS = 40


def close(got, want, low=2e-2):
    torch.testing.assert_close(got.cpu().float(), want.float(), rtol=low, atol=low)


def capture(call):
    """The captured call and its results."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def random_lengths(rng, b, most):
    return torch.tensor(
        [rng.choice([0, 1, rng.randrange(most + 1), most]) for _ in range(b)], dtype=torch.int32
    )


@pytest.mark.parametrize("page", [0, 1, 16, 64])
@pytest.mark.parametrize("metadata", [None, "outside", "inside"])
def test_kvcache_replays(page, metadata):
    rng = random.Random(page)
    b, h, h_k, d, most = 5, 8, 2, 128, 500
    columns = -(-most // page) if page else 0
    shape = (b * columns + 2, page, h_k, d) if page else (b, most, h_k, d)
    q = torch.zeros(b, 1, h, d, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    lengths = torch.zeros(b, device="cuda", dtype=torch.int32)
    table = torch.zeros(b, columns, device="cuda", dtype=torch.int32) if page else None

    def plan():
        return fa.get_scheduler_metadata(
            b, 1, columns * page or most, h, h_k, d, lengths, page_size=page or None, causal=True
        )

    made = plan() if metadata == "outside" else None

    def call():
        return fa.flash_attn_with_kvcache(
            q,
            k,
            v,
            cache_seqlens=lengths,
            page_table=table,
            causal=True,
            scheduler_metadata=plan() if metadata == "inside" else made,
        )

    graph, out = capture(call)
    k_host, v_host = k.cpu(), v.cpu()
    for _ in range(REPLAYS):
        q.normal_()
        lengths.copy_(random_lengths(rng, b, most))
        if page:
            table.copy_(torch.randperm(shape[0], dtype=torch.int32)[: table.numel()].view(table.shape))
        graph.replay()
        want = fa.flash_attn_with_kvcache(
            q.cpu(),
            k_host,
            v_host,
            cache_seqlens=lengths.cpu(),
            page_table=table.cpu() if page else None,
            causal=True,
        )
        close(out, want)


@pytest.mark.parametrize("metadata", ["new inside", "new outside", "first inside", "first outside"])
def test_mla_replays(metadata):
    """`new`: a FlashMLASchedMeta; `first`: the first releases' two tensors."""
    rng = random.Random(metadata)
    b, s_q, h, page, most = 3, 2, 16, 64, 400
    columns = -(-most // page)
    q = torch.zeros(b, s_q, h, 576, device="cuda", dtype=torch.bfloat16)
    cache = torch.randn(b * columns, page, 1, 576, device="cuda", dtype=torch.bfloat16)
    lengths = torch.ones(b, device="cuda", dtype=torch.int32)
    table = torch.zeros(b, columns, device="cuda", dtype=torch.int32)

    def plan(lengths):
        return flash_mla.get_mla_metadata(*((lengths, s_q * h, 1) if "first" in metadata else ()))

    made = plan(lengths) if "outside" in metadata else None

    def decode(q, cache, table, lengths, made=None):
        made = made or plan(lengths)
        return flash_mla.flash_mla_with_kvcache(q, cache, table, lengths, 512, *made, causal=True)

    graph, (out, lse) = capture(lambda: decode(q, cache, table, lengths, made))
    host = cache.cpu()
    for _ in range(REPLAYS):
        q.normal_()
        lengths.copy_(random_lengths(rng, b, most))
        table.copy_(torch.randperm(len(cache), dtype=torch.int32).view(table.shape))
        graph.replay()
        want, want_lse = decode(q.cpu(), host, table.cpu(), lengths.cpu())
        close(out, want)
        close(lse, want_lse, 1e-3)


@pytest.mark.parametrize("causal", [False, True])
def test_ragged_replays(causal):
    """A packed prefill captured once, its sequences cut anew before every replay, some of them empty."""
    rng = random.Random(causal)
    b, t = 9, 700
    q = torch.zeros(t, 4, 64, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(t, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    cu_q, cu_k = (torch.zeros(b + 1, device="cuda", dtype=torch.int32) for _ in range(2))

    def attend(q, k, v, cu_q, cu_k):
        return fa.flash_attn_varlen_func(q, k, v, cu_q, cu_k, t, t, causal=causal)

    graph, out = capture(lambda: attend(q, k, v, cu_q, cu_k))
    for _ in range(REPLAYS):
        q.normal_()
        for cu in (cu_q, cu_k):
            cuts = sorted(rng.choice([0, t, rng.randrange(t + 1)]) for _ in range(b - 1))
            cu.copy_(torch.tensor([0, *cuts, t], dtype=torch.int32))
        graph.replay()
        close(out, attend(*(x.cpu() for x in (q, k, v, cu_q, cu_k))))


CACHES = {
    "contiguous": {},
    "batch_idx": {"batch_idx": True},
    "leftpad": {"leftpad": True},
    "page_64": {"page": 64},
    "page_7": {"page": 7},
    "page_64_leftpad_batch_idx": {"page": 64, "leftpad": True, "batch_idx": True},
}


@pytest.mark.parametrize("turn", [None, "interleaved", "halves"])
@pytest.mark.parametrize("widths", [(128, 128), (64, 512)], ids=["d128", "qv"])
@pytest.mark.parametrize("cache", CACHES)
def test_appends_replay_while_sequences_grow(cache, widths, turn):
    """Append, rotation and attention in one graph, against the definition in fp64."""
    rng = random.Random(f"{cache} {turn}")
    (d, d_v), b, s_q, h, h_k, capacity = widths, 3, 2, 8, 1 if widths[1] == 512 else 2, 280
    page, rows = CACHES[cache].get("page"), b + 2 if CACHES[cache].get("batch_idx") else b
    columns = -(-capacity // page) if page else 0
    shape = (rows * columns + 1, page) if page else (rows, capacity)

    def normal(*shape):
        return torch.randn(shape, device="cuda").bfloat16()

    def ints(values):
        return torch.tensor(values, device="cuda", dtype=torch.int32)

    a = {
        "q": normal(b, s_q, h, d),
        "k": normal(*shape, h_k, d),
        "v": normal(*shape, h_k, d_v),
        "k_new": normal(b, s_q, h_k, d),
        "v_new": normal(b, s_q, h_k, d_v),
        "seqused_k": ints([5] * b),
        "causal": True,
    }
    if d_v == 512:
        a["qv"] = normal(b, s_q, h, d_v)
    if page:
        a["page_table"] = torch.randperm(rows * columns, device="cuda").int().view(rows, columns)
    if rows > b:
        a["kv_batch_idx"] = ints(rng.sample(range(rows), b))
    if CACHES[cache].get("leftpad"):
        a["leftpad_k"] = ints([0, 5, 3])
    if turn:
        angle = torch.rand(max(capacity, columns * (page or 0)), 16, device="cuda") * 6
        a |= {"rotary_cos": angle.cos().bfloat16(), "rotary_sin": angle.sin().bfloat16()}
        a["rotary_interleaved"] = turn == "interleaved"
    names = {"k": "k_cache", "v": "v_cache", "k_new": "k", "v_new": "v", "seqused_k": "cache_seqlens",
             "kv_batch_idx": "cache_batch_idx", "leftpad_k": "cache_leftpad"}  # fmt: skip
    call = {names.get(name, name): x for name, x in a.items()}
    graph, (out, lse, *_) = capture(lambda: fa.flash_attn_with_kvcache(**call, return_softmax_lse=True))
    for step in range(16):
        if step % 5 == 0:
            grown = [rng.choice([5, rng.randrange(5, 260), 270]) for _ in range(b)]
        else:
            grown = [min(n + s_q, capacity - s_q) for n in grown]
        a["seqused_k"].copy_(ints(grown))
        for name in ("q", "k_new", "v_new", *(["qv"] if "qv" in a else [])):
            a[name].normal_()
        before = {name: x.cpu().clone() if isinstance(x, torch.Tensor) else x for name, x in a.items()}
        graph.replay()
        exact = reference.forward(**before)
        low = reference.forward(**before, math=torch.bfloat16)
        reference.assert_close(out.cpu(), exact.out, low.out, what=f"step {step}: out")
        reference.assert_lse_close(lse.cpu(), exact.lse, torch.bfloat16, what=f"step {step}: lse")
        assert torch.equal(a["v"].cpu(), exact.v), f"step {step}: cached values"
        torch.testing.assert_close(a["k"].cpu(), exact.k, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("s_q", [1, 40])
def test_every_number_of_splits(s_q):
    q = torch.randn(2, s_q, 8, 64, device="cuda", dtype=torch.float16)
    k, v = (torch.randn(2, 700, 2, 64, device="cuda", dtype=torch.float16) for _ in range(2))
    whole = fa.flash_attn_func(q, k, v, causal=True).cpu()
    for splits in range(2, 257):
        out, lse, out_accum, lse_accum = fa._flash_attn_forward(q, k, v, causal=True, num_splits=splits)
        close(out, whole, 4e-3)
        assert out_accum.shape == (splits, 2, 8, s_q, 64) and lse_accum.shape == (splits, 2, 8, s_q)
        torch.testing.assert_close(torch.logsumexp(lse_accum, 0), lse, rtol=1e-4, atol=1e-4)
        merged = (torch.softmax(lse_accum, 0)[..., None] * out_accum).sum(0).transpose(1, 2)
        close(merged, whole, 4e-3)
