# SPDX-License-Identifier: MIT
"""Calls as vLLM, SGLang and MATE's wrapper make them: a test for each way a client is known to call."""

import flash_mla
import mla_cases as cases
import mla_reference as reference
import torch
from flash_mla import cache as fp8_cache
from flash_mla import flash_mla_interface
from mla_cases import SCALE_V3, dense, generator

LATENT = 512


def agrees(result, want, out=reference.DENSE_OUT, lse=reference.DECODE_LSE):
    reference.assert_close(result[0], want[0], out, "out")
    reference.assert_close(result[1], want[1], lse, "lse")


def dense_case(device, number=0, s_q=1, dtype=torch.bfloat16, h_q=16):
    arguments = dense(generator(number), [300, 64, 1, 129], s_q, h_q, dtype=dtype)
    want = reference.dense_decode(*arguments, LATENT, SCALE_V3, True)
    return [x.to(device) for x in arguments], want


def sparse_case(d, number=1, n=4, h_q=16, topk=64, page=64, s_q=1):
    gen = generator(number, d)
    return {
        "q": cases.queries(gen, n, s_q, h_q, d),
        "k_cache": fp8_cache.quantize_k_cache(cases.keys(gen, 5, page, d)),
        "indices": cases.indices(gen, n, s_q, topk, limit=5 * page, wild_values=torch.tensor([-1])),
    }


def on(device, x):
    return {name: cases.moved(value, device) for name, value in x.items()}


# ---- vLLM ----------------------------------------------------------------------------------------------


def test_vllm_dense_decode(device):
    (q, cache, table, lens), want = dense_case(device)
    cache = cache.squeeze(2)  # (blocks, 64, 576) as vLLM stores it
    scheduler_metadata, _ = flash_mla.get_mla_metadata(lens, 1 * 16 // 1, 1, is_fp8_kvcache=False)
    q = q.reshape(4, -1, 16, 576)
    result = cases.maybe_on_cuda(
        device,
        lambda: flash_mla.flash_mla_with_kvcache(
            q=q,
            k_cache=cache.unsqueeze(-2),
            block_table=table,
            cache_seqlens=lens,
            head_dim_v=LATENT,
            tile_scheduler_metadata=scheduler_metadata,
            softmax_scale=SCALE_V3,
            causal=True,
            is_fp8_kvcache=False,
        ),
    )
    agrees(result, want)


def test_vllm_dense_decode_of_speculated_tokens(device):
    (q, cache, table, lens), want = dense_case(device, 2, s_q=3)
    meta, _ = flash_mla.get_mla_metadata(lens, 3 * 16 // 1, 1, is_fp8_kvcache=False)
    for _ in range(3):  # the layers of a step share the object
        result = cases.maybe_on_cuda(
            device,
            lambda: flash_mla.flash_mla_with_kvcache(
                q=q,
                k_cache=cache,
                block_table=table,
                cache_seqlens=lens,
                head_dim_v=LATENT,
                tile_scheduler_metadata=meta,
                softmax_scale=SCALE_V3,
                causal=True,
            ),
        )
        agrees(result, want)


def test_vllm_dense_fp8(device):
    q, cache, table, lens = dense(generator(3), [300, 64, 1], 1, 16, dtype=torch.float32)
    q, cache = (q * 2).to(cases.FP8), (cache * 2).to(cases.FP8)
    x, y = torch.tensor(0.7), torch.tensor(0.4)
    want = reference.dense_decode(q, cache, table, lens, LATENT, SCALE_V3, True, x, y)
    call = [t.to(device) for t in (q, cache, table, lens)]
    meta, _ = flash_mla.get_mla_metadata()
    meta.tile_scheduler_metadata, meta.num_splits = flash_mla.get_mla_metadata_dense_fp8(call[3], 16, 1)
    result = cases.maybe_on_cuda(
        device,
        lambda: flash_mla.flash_mla_with_kvcache_fp8(
            q=call[0],
            k_cache=call[1],
            block_table=call[2],
            cache_seqlens=call[3],
            head_dim_v=LATENT,
            tile_scheduler_metadata=meta.tile_scheduler_metadata,
            num_splits=meta.num_splits,
            softmax_scale=SCALE_V3,
            causal=True,
            descale_q=x.to(device).reshape(1),
            descale_k=y.to(device).reshape(1),
        ),
    )
    assert result[0].dtype == torch.bfloat16
    agrees(result, want, reference.FP8_OUT, reference.FP8_LSE)


def test_vllm_sparse_decode(device):
    """V3.2: a uint8 cache, dummies for what sparse mode does not read, heads padded by the caller."""
    a = sparse_case(576, h_q=64)
    a["q"][:, :, 16:] = 0
    want = reference.sparse_decode(a["q"], a["k_cache"], a["indices"], SCALE_V3)
    c = on(device, a)
    meta, _ = flash_mla.get_mla_metadata()
    dummy = torch.empty(1, dtype=torch.int32, device=device)
    result = cases.not_on_cuda(
        device,
        lambda: flash_mla.flash_mla_with_kvcache(
            q=c["q"],
            k_cache=c["k_cache"].view(torch.uint8).squeeze(2).unsqueeze(-2),
            block_table=dummy,
            head_dim_v=512,
            cache_seqlens=dummy,
            tile_scheduler_metadata=meta,
            is_fp8_kvcache=True,
            indices=c["indices"],
            softmax_scale=SCALE_V3,
        ),
    )
    agrees(result, want, reference.SPARSE_OUT)


def test_vllm_sparse_decode_as_one_entry_of_all_tokens(device):
    a = sparse_case(576, 4, n=1, s_q=7)
    a["indices"][0, 3] = -1  # a row without keys, which the caller replaces
    want = reference.sparse_decode(a["q"], a["k_cache"], a["indices"], SCALE_V3)
    c = on(device, a)
    result = cases.not_on_cuda(
        device,
        lambda: flash_mla.flash_mla_with_kvcache(
            **c,
            block_table=None,
            cache_seqlens=None,
            head_dim_v=512,
            tile_scheduler_metadata=flash_mla.FlashMLASchedMeta(),
            is_fp8_kvcache=True,
            softmax_scale=SCALE_V3,
        ),
    )
    agrees(result, want, reference.SPARSE_OUT)
    assert torch.isposinf(result[1][0, :, 3]).all() and (result[0][0, 3] == 0).all()


def test_vllm_sparse_prefill(device):
    """Padding heads come uninitialised and may hold NaN."""
    gen = generator(5)
    q, kv = cases.queries(gen, 9, 64, 576), cases.keys(gen, 200, 576)
    where = cases.indices(gen, 9, 128, limit=200, wild_values=torch.tensor([-1]))
    lengths = torch.randint(1, 129, (9,), generator=gen).int()
    q[:, 16:] = float("nan")
    call = [x.to(device) for x in (q, kv.view(-1, 1, 576), where.unsqueeze(1))]
    out, _, lse = cases.not_on_cuda(
        device,
        lambda: flash_mla.flash_mla_sparse_fwd(*call, SCALE_V3, topk_length=lengths.to(device)),
    )
    want, _, want_lse = reference.sparse_prefill(
        q[:, :16], kv.unsqueeze(1), where.unsqueeze(1), SCALE_V3, None, lengths
    )
    reference.assert_close(out[:, :16], want, reference.PREFILL_OUT, "out")
    reference.assert_close(lse[:, :16], want_lse, reference.PREFILL_LSE, "lse")


def v4_decode(device, a, meta, extra, out=None):
    return flash_mla.flash_mla_with_kvcache(
        q=a["q"],
        k_cache=a["k_cache"],
        block_table=None,
        head_dim_v=512,
        tile_scheduler_metadata=meta,
        cache_seqlens=None,
        is_fp8_kvcache=True,
        indices=a["indices"],
        topk_length=a["topk_length"],
        softmax_scale=512**-0.5,
        attn_sink=a["attn_sink"],
        extra_k_cache=extra["k_cache"] if extra else None,
        extra_indices_in_kvcache=extra["indices"] if extra else None,
        extra_topk_length=extra["topk_length"] if extra else None,
        out=out,
    )


def test_vllm_v4_decode(device):
    """A window of 128 keys on pages of 256 and a compressed cache on pages of 2, into a given result."""
    a = sparse_case(512, 6, topk=128, page=256)
    extra = sparse_case(512, 7, topk=512, page=2)
    a |= {"topk_length": torch.tensor([128, 5, 0, 77]).int(), "attn_sink": torch.randn(16)}
    extra["topk_length"] = torch.tensor([512, 0, 0, 9]).int()
    want = reference.sparse_decode(
        a["q"],
        a["k_cache"],
        a["indices"],
        512**-0.5,
        a["attn_sink"],
        a["topk_length"],
        (extra["k_cache"], extra["indices"], extra["topk_length"]),
    )
    own, more = on(device, a), on(device, extra)
    out = torch.empty(4, 1, 16, 512, dtype=torch.bfloat16, device=device)
    meta = flash_mla.FlashMLASchedMeta()
    for _ in range(2):  # one object for the layers of one kind
        result = cases.not_on_cuda(device, lambda: v4_decode(device, own, meta, more, out))
        assert result[0] is out
        agrees(result, want, reference.SPARSE_OUT)


def test_vllm_v4_prefill(device):
    gen = generator(8)
    q, kv = cases.queries(gen, 9, 16, 512), cases.keys(gen, 100, 1, 512)
    where = cases.indices(gen, 9, 1, 128, limit=100)
    a = on(
        device,
        {
            "q": q,
            "kv": kv,
            "indices": where,
            "attn_sink": torch.zeros(16),
            "topk_length": torch.full((9,), 100).int(),
            "out": torch.empty(9, 16, 512).bfloat16(),
        },
    )
    out = cases.not_on_cuda(device, lambda: flash_mla.flash_mla_sparse_fwd(**a, sm_scale=512**-0.5))[0]
    want = reference.sparse_prefill(q, kv, where, 512**-0.5, torch.zeros(16), a["topk_length"].cpu())
    assert out is a["out"]
    reference.assert_close(out, want[0], reference.PREFILL_OUT, "out")


def test_vllm_batch_invariant_dense(device):
    (q, cache, table, lens), want = dense_case(device, 9)
    meta, _ = flash_mla.get_mla_metadata(lens, 16, 1, is_fp8_kvcache=False)
    row = [0, 0, len(lens) - 1, table.shape[1], 0, 0, 0, 0]
    meta.tile_scheduler_metadata = torch.tensor([row], dtype=torch.int32, device=device)
    meta.num_splits = torch.zeros(len(lens) + 1, dtype=torch.int32, device=device)
    result = cases.maybe_on_cuda(
        device,
        lambda: flash_mla.flash_mla_with_kvcache(
            q, cache, table, lens, LATENT, meta, softmax_scale=SCALE_V3, causal=True
        ),
    )
    agrees(result, want)


def test_vllm_metadata_test():
    lens = torch.tensor([100, 20], dtype=torch.int32)
    meta, second = flash_mla.get_mla_metadata(lens, 4, 1, num_heads_q=128, topk=128, is_fp8_kvcache=True)
    assert second is None and meta.tile_scheduler_metadata is None and meta.num_splits is None


def test_vllm_imports_the_submodule():
    assert flash_mla_interface.flash_mla_with_kvcache is flash_mla.flash_mla_with_kvcache
    assert isinstance(flash_mla.get_mla_metadata()[0], flash_mla_interface.FlashMLASchedMeta)


# ---- older vLLM and sgl_kernel: descale_q and descale_k between causal and is_fp8_kvcache ---------------


def test_older_positions(device):
    (q, cache, table, lens), want = dense_case(device, 10)
    pair = flash_mla.get_mla_metadata(lens, 16, 1)
    head = (q, cache, table, lens, LATENT, *pair, SCALE_V3, True)
    for tail in ((None, None), (None, None, False), (None, None, False, None)):
        result = cases.maybe_on_cuda(device, lambda tail=tail: flash_mla.flash_mla_with_kvcache(*head, *tail))
        agrees(result, want)


def test_older_positions_fp8(device):
    q, cache, table, lens = dense(generator(11), [100, 64], 1, 16, dtype=torch.float32)
    q, cache = q.to(cases.FP8), cache.to(cases.FP8)
    x, y = torch.tensor([0.7]), torch.tensor([1.3])
    want = reference.dense_decode(q, cache, table, lens, LATENT, SCALE_V3, True, x, y)
    q, cache, table, lens, x, y = (t.to(device) for t in (q, cache, table, lens, x, y))
    pair = flash_mla.get_mla_metadata(lens, 16, 1)
    for tail in ((x, y), (x, y, True), (x, y, True, None)):
        result = cases.maybe_on_cuda(
            device,
            lambda tail=tail: flash_mla.flash_mla_with_kvcache(
                q, cache, table, lens, LATENT, *pair, SCALE_V3, True, *tail
            ),
        )
        agrees(result, want, reference.FP8_OUT, reference.FP8_LSE)


def test_older_positions_sparse(device):
    a = sparse_case(576, 12)
    want = reference.sparse_decode(a["q"], a["k_cache"], a["indices"], SCALE_V3)
    c = on(device, a)
    lens = torch.full((4,), 320, dtype=torch.int32, device=device)
    pair = flash_mla.get_mla_metadata(lens, 16, 1)
    result = cases.not_on_cuda(
        device,
        lambda: flash_mla.flash_mla_with_kvcache(
            c["q"],
            c["k_cache"],
            torch.empty((4, 0), dtype=torch.int32, device=device),
            lens,
            LATENT,
            *pair,
            SCALE_V3,
            False,
            None,
            None,
            True,
            c["indices"],
        ),
    )
    agrees(result, want, reference.SPARSE_OUT)


# ---- SGLang --------------------------------------------------------------------------------------------


def test_sglang_dense_with_graph_buffers(device):
    """Buffers for the largest batch, filled in place and sliced; also with causal False."""
    lens64 = torch.tensor([300, 64, 1, 129])
    meta, num_splits = flash_mla.get_mla_metadata(torch.ones(9, dtype=torch.int32, device=device), 16, 1)
    (q, cache, table, lens), want = dense_case(device, 13)
    new = flash_mla.get_mla_metadata(lens64.to(torch.int32).to(device), 1 * 16, 1)
    meta.copy_(new[0])
    num_splits[:5].copy_(new[1])
    for causal in (True, False):
        result = cases.maybe_on_cuda(
            device,
            lambda causal=causal: flash_mla.flash_mla_with_kvcache(
                q=q,
                k_cache=cache.view(-1, 64, 1, 576),
                block_table=table[:4],
                cache_seqlens=lens,
                head_dim_v=LATENT,
                tile_scheduler_metadata=meta,
                num_splits=num_splits[:5],
                softmax_scale=SCALE_V3,
                causal=causal,
            ),
        )
        agrees(result, want)


def test_sglang_dense_fp8(device):
    q, cache, table, lens = dense(generator(14), [100, 64], 1, 16, dtype=torch.float32)
    q, cache = q.bfloat16().to(cases.FP8), cache.to(cases.FP8)
    want = reference.dense_decode(q, cache, table, lens, LATENT, SCALE_V3, True)
    q, cache, table, lens = (t.to(device) for t in (q, cache, table, lens))
    pair = flash_mla.get_mla_metadata(lens, 16, 1)
    ones = torch.ones(1, dtype=torch.float32, device=device)
    result = cases.maybe_on_cuda(
        device,
        lambda: flash_mla.flash_mla_with_kvcache(
            q=q,
            k_cache=cache,
            block_table=table,
            cache_seqlens=lens,
            head_dim_v=LATENT,
            tile_scheduler_metadata=pair[0],
            num_splits=pair[1],
            softmax_scale=SCALE_V3,
            causal=True,
            descale_q=ones,
            descale_k=ones,
        ),
    )
    agrees(result, want, reference.FP8_OUT, reference.FP8_LSE)


def test_sglang_v32(device):
    a = sparse_case(576, 15, topk=2048, h_q=64)
    want = reference.sparse_decode(a["q"], a["k_cache"], a["indices"], SCALE_V3)
    c = on(device, a)
    lens = torch.full((4,), 320, dtype=torch.int32, device=device)
    meta, num_splits = flash_mla.get_mla_metadata(
        cache_seqlens=lens,
        num_q_tokens_per_head_k=64,
        num_heads_k=1,
        num_heads_q=64,
        is_fp8_kvcache=True,
        topk=2048,
    )
    result = cases.not_on_cuda(
        device,
        lambda: flash_mla.flash_mla_with_kvcache(
            q=c["q"],
            k_cache=c["k_cache"],
            cache_seqlens=lens,
            head_dim_v=LATENT,
            tile_scheduler_metadata=meta,
            num_splits=num_splits,
            softmax_scale=SCALE_V3,
            indices=c["indices"].view(4, -1, 2048),
            block_table=torch.empty((4, 0), dtype=torch.int32, device=device),
            is_fp8_kvcache=True,
        ),
    )
    agrees(result, want, reference.SPARSE_OUT)


def test_sglang_v32_prefill(device):
    gen = generator(16)
    q, kv = cases.queries(gen, 9, 64, 576), cases.keys(gen, 300, 1, 576)
    where = cases.indices(gen, 9, 256, limit=300, wild_values=torch.tensor([-1]))
    call = {"q": q, "kv": kv, "indices": where.unsqueeze(1)}
    out, _, _ = cases.not_on_cuda(
        device, lambda: flash_mla.flash_mla_sparse_fwd(**on(device, call), sm_scale=SCALE_V3, d_v=LATENT)
    )
    want = reference.sparse_prefill(**call, scale=SCALE_V3)[0]
    reference.assert_close(out, want, reference.PREFILL_OUT, "out")


def test_sglang_v4(device):
    a = sparse_case(512, 17, topk=128)
    a |= {"topk_length": torch.tensor([128, 5, 0, 77]).int(), "attn_sink": torch.randn(16)}
    want = reference.sparse_decode(
        a["q"], a["k_cache"], a["indices"], 512**-0.5, a["attn_sink"], a["topk_length"]
    )
    own = on(device, a)
    result = cases.not_on_cuda(device, lambda: v4_decode(device, own, flash_mla.get_mla_metadata()[0], None))
    reference.assert_close(result[0], want[0], reference.SPARSE_OUT, "out")


# ---- MATE's wrapper ------------------------------------------------------------------------------------


def test_mate_sparse_decode_of_v32_with_a_sink_and_lengths(device):
    a = sparse_case(576, 18)
    a |= {"topk_length": torch.tensor([64, 5, 0, 33]).int(), "attn_sink": torch.randn(16)}
    want = reference.sparse_decode(
        a["q"], a["k_cache"], a["indices"], SCALE_V3, a["attn_sink"], a["topk_length"]
    )
    c = on(device, a | {"indices": a["indices"].unsqueeze(2)})
    result = cases.not_on_cuda(
        device,
        lambda: flash_mla.flash_mla_with_kvcache(
            **c,
            block_table=None,
            cache_seqlens=None,
            head_dim_v=LATENT,
            tile_scheduler_metadata=flash_mla.FlashMLASchedMeta(),
            softmax_scale=SCALE_V3,
            is_fp8_kvcache=True,
        ),
    )
    agrees(result, want, reference.SPARSE_OUT)
