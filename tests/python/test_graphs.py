# SPDX-License-Identifier: MIT
"""Decode on a GPU: captured once and replayed with other lengths, pages and values, and splits.

What a replay must give is computed by the same package on the CPU."""

import random

import flash_attn_interface as fa
import flash_mla
import pytest
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
