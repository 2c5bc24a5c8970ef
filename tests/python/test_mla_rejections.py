# SPDX-License-Identifier: MIT
"""Every refusal of flash_mla's decode and sparse prefill: the type that upstream raises, and a message
that names the argument.  The metadata's are in test_mla_metadata.py, dense attention's in test_mla_mha.py.
"""

import flash_mla
import mla_cases as cases
import pytest
import torch
from flash_mla import cache as fp8_cache

A, R, T, V = AssertionError, RuntimeError, TypeError, ValueError


def dense():
    q, k_cache, table, lens = cases.dense(cases.generator(1), [100, 30], 2, 4)
    return {
        "q": q,
        "k_cache": k_cache,
        "block_table": table,
        "cache_seqlens": lens,
        "head_dim_v": 512,
        "tile_scheduler_metadata": flash_mla.FlashMLASchedMeta(),
        "causal": True,
    }


def sparse(d=576):
    gen = cases.generator(2, d)
    return {
        "q": cases.noise(gen, 2, 3, 4, d),
        "k_cache": fp8_cache.quantize_k_cache(cases.noise(gen, 4, 64, d)),
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": 512,
        "tile_scheduler_metadata": flash_mla.FlashMLASchedMeta(),
        "is_fp8_kvcache": True,
        "indices": cases.indices(gen, 2, 3, 64, limit=256),
    }


def with_extra(d=576):
    more = sparse(d)
    names = {"extra_k_cache": more["k_cache"], "extra_indices_in_kvcache": more["indices"]}
    return more | names


def prefill():
    gen = cases.generator(3)
    return {
        "q": cases.noise(gen, 5, 4, 576),
        "kv": cases.noise(gen, 90, 1, 576),
        "indices": cases.indices(gen, 5, 1, 64, limit=90),
        "sm_scale": 0.1,
    }


def strided(x):
    return x.repeat_interleave(2, -1)[..., ::2]


def int32(*shape):
    return torch.zeros(*shape, dtype=torch.int32)


D, S, P = dense(), sparse(), prefill()
ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"attn_sink": torch.zeros(4)}, A, "attn_sink.*expected None without indices"),
        ({"extra_k_cache": S["k_cache"]}, A, "extra_k_cache"),
        ({"extra_indices_in_kvcache": S["indices"]}, A, "extra_indices_in_kvcache"),
        ({"topk_length": int32(2)}, A, "topk_length"),
        ({"extra_topk_length": int32(2)}, A, "extra_topk_length"),
        ({"block_table": None}, A, "block_table, cache_seqlens: expected tensors"),
        ({"cache_seqlens": None}, A, "block_table, cache_seqlens: expected tensors"),
        ({"head_dim_v": 576}, R, "head_dim_v: expected 512, got 576"),
        ({"head_dim_v": 256}, V, "head_dim_v: expected 512"),
        ({"head_dim_v": "x"}, T, "head_dim_v"),
        ({"q": None}, T, "q: expected a tensor, got NoneType"),
        ({"q": 3.0}, T, "q: expected a tensor, got float"),
        ({"q": D["q"][0]}, R, "q: expected 4 dimensions"),
        ({"q": D["q"].double()}, R, "q: expected dtype"),
        ({"q": D["q"].half()}, R, "k_cache: expected q's dtype fp16, got bf16"),
        ({"q": D["q"][..., :500]}, V, "q: expected"),
        ({"q": strided(D["q"])}, R, "q: expected last stride 1"),
        ({"q": D["q"][:0]}, R, "q: expected .* b > 0"),
        ({"q": D["q"].to("meta")}, R, "q: expected a tensor on a CPU, CUDA or MUSA device, got meta"),
        ({"k_cache": D["k_cache"].half()}, T, "k_cache: expected q's dtype"),
        ({"k_cache": D["k_cache"].view(torch.uint8)[..., :576]}, R, "k_cache: expected"),
        ({"k_cache": D["k_cache"].to(cases.FP8), "is_fp8_kvcache": True}, R, "k_cache: expected q's dtype"),
        ({"k_cache": D["k_cache"][..., :512]}, R, r"k_cache: expected \[num_pages, page, h_k, d_qk\]"),
        ({"k_cache": strided(D["k_cache"])}, R, "k_cache: expected last stride 1"),
        ({"k_cache": D["k_cache"].repeat(1, 1, 3, 1)}, R, "q: expected h_q a multiple of k_cache's 3"),
        ({"k_cache": D["k_cache"][:, :0]}, R, "k_cache: expected pages of at least 1 token"),
        ({"k_cache": D["k_cache"][:, :, 0]}, R, "k_cache: expected 4 dimensions"),
        ({"k_cache": "cache"}, T, "k_cache: expected a tensor, got str"),
        ({"k_cache": D["k_cache"].to("meta")}, V, "k_cache: expected on q's device cpu, got meta"),
        ({"block_table": D["block_table"].long()}, T, "block_table: expected dtype int32"),
        ({"block_table": D["block_table"][0]}, V, "block_table"),
        ({"block_table": D["block_table"][:1]}, R, "block_table"),
        ({"block_table": strided(D["block_table"])}, R, "block_table: expected last stride 1"),
        ({"block_table": 5}, T, "block_table"),
        ({"block_table": D["block_table"][:, :1]}, R, "cache_seqlens"),
        ({"block_table": torch.full_like(D["block_table"], 99)}, R, "block_table"),
        ({"block_table": torch.full_like(D["block_table"], -1)}, V, "block_table"),
        ({"cache_seqlens": D["cache_seqlens"].long()}, T, "cache_seqlens: expected dtype int32"),
        ({"cache_seqlens": D["cache_seqlens"][:1]}, R, "cache_seqlens"),
        ({"cache_seqlens": D["cache_seqlens"][None]}, V, "cache_seqlens"),
        ({"cache_seqlens": torch.tensor([-1, 3]).int()}, R, "cache_seqlens"),
        ({"cache_seqlens": torch.tensor([2**31 - 1, 3]).int()}, R, "cache_seqlens"),
        ({"cache_seqlens": [100, 30]}, T, "cache_seqlens"),
        ({"softmax_scale": "x"}, T, "softmax_scale"),
        ({"softmax_scale": float("nan")}, R, "softmax_scale"),
        ({"descale_q": ONE}, R, "descale_q: expected none with bf16"),
        ({"descale_k": ONE}, V, "descale_k: expected none with bf16"),
        ({"out": torch.zeros(2, 2, 4, 512)}, R, "out: expected"),
        ({"out": torch.zeros(2, 2, 4, 256).bfloat16()}, R, "out: expected"),
        ({"out": [1]}, T, "out"),
        (
            {"is_fp8_kvcache": ONE, "indices": ONE, "topk_length": int32(2)},
            T,
            "is_fp8_kvcache: expected a bool",
        ),
        ({"is_fp8_kvcache": None, "attn_sink": torch.zeros(4)}, T, "is_fp8_kvcache: expected a bool"),
    ],
)
def test_dense_decode(change, error, words):
    with pytest.raises(error, match=words):
        flash_mla.flash_mla_with_kvcache(**dense() | change)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"descale_q": None}, R, "descale_q, descale_k: expected fp32 tensors"),
        ({"descale_k": None}, V, "descale_q, descale_k: expected fp32 tensors"),
        ({"descale_q": torch.ones(2)}, R, r"descale_q: expected \[1\]"),
        ({"descale_k": torch.ones(())}, R, "descale_k: expected"),
        ({"descale_k": ONE.half()}, T, "descale_k: expected dtype fp32"),
        ({"q": D["q"]}, T, "q: expected dtype torch.float8_e4m3fn"),
        ({"k_cache": D["k_cache"]}, R, "k_cache: expected q's dtype"),
        ({"tile_scheduler_metadata": None}, A, "tile_scheduler_metadata: expected a FlashMLASchedMeta, or"),
        ({"num_splits": None}, A, "tile_scheduler_metadata: expected"),
    ],
)
def test_fp8_decode(change, error, words):
    a = dense()
    a["q"], a["k_cache"] = a["q"].to(cases.FP8), a["k_cache"].to(cases.FP8)
    pair = flash_mla.get_mla_metadata_dense_fp8(a["cache_seqlens"], 8, 1)
    a |= {"descale_q": ONE, "descale_k": ONE, "tile_scheduler_metadata": pair[0], "num_splits": pair[1]}
    flash_mla.flash_mla_with_kvcache_fp8(**a)
    with pytest.raises(error, match=words):
        flash_mla.flash_mla_with_kvcache_fp8(**a | change)


@pytest.mark.parametrize("missing", ["descale_q", "descale_k"])
def test_one_descale_alone(missing):
    a = dense()
    a["q"], a["k_cache"] = a["q"].to(cases.FP8), a["k_cache"].to(cases.FP8)
    both = {"descale_q": ONE, "descale_k": ONE, missing: None}
    with pytest.raises(R, match=f"{missing}: expected a tensor with fp8"):
        flash_mla.flash_mla_with_kvcache(**a, **both)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"causal": True}, A, "causal: expected False with indices"),
        ({"is_fp8_kvcache": False}, A, "is_fp8_kvcache: expected True with indices"),
        ({"head_dim_v": 576}, R, "head_dim_v: expected 512"),
        ({"q": S["q"].half()}, T, "q: expected dtype"),
        ({"q": S["q"].float()}, R, "q: expected dtype"),
        ({"q": S["q"][..., :512]}, R, "k_cache: expected .*584"),
        ({"q": S["q"][..., :100]}, V, "q: expected"),
        ({"q": strided(S["q"])}, R, "q: expected last stride 1"),
        ({"q": S["q"][:0]}, R, "q"),
        ({"q": S["q"][:, :0], "indices": S["indices"][:, :0]}, R, "q"),
        ({"q": S["q"][:, :, :0]}, R, "q"),
        ({"k_cache": S["k_cache"].view(torch.uint8)[..., :600]}, R, "k_cache: expected"),
        ({"k_cache": torch.zeros(4, 64, 1, 656)}, R, "k_cache: expected dtype"),
        ({"k_cache": torch.zeros(4, 64, 1, 656).to(torch.float8_e5m2)}, T, "k_cache: expected dtype"),
        ({"k_cache": S["k_cache"].expand(4, 64, 2, 656)}, R, "k_cache: expected"),
        ({"k_cache": torch.zeros(4, 64, 1, 700, dtype=torch.uint8)[..., :656]}, R, "k_cache: expected"),
        ({"k_cache": torch.zeros(4, 64, 1, 1312, dtype=torch.uint8)[..., ::2]}, R, "k_cache: expected"),
        ({"k_cache": torch.zeros(4, 128, 1, 656, dtype=torch.uint8)[:, ::2]}, R, "k_cache: expected"),
        ({"indices": S["indices"].long()}, T, "indices: expected dtype int32"),
        ({"indices": S["indices"][..., :0]}, R, "indices: expected"),
        ({"indices": S["indices"][:1]}, R, "indices: expected"),
        ({"indices": S["indices"][:, 0]}, V, "indices: expected"),
        ({"indices": strided(S["indices"])}, R, "indices: expected last stride 1"),
        ({"indices": [1]}, T, "indices: expected a tensor, got list"),
        ({"topk_length": int32(3)}, R, "topk_length: expected"),
        ({"topk_length": int32(2).long()}, T, "topk_length: expected dtype int32"),
        ({"topk_length": int32(2, 3)}, R, "topk_length: expected"),
        ({"topk_length": 64}, T, "topk_length"),
        ({"extra_topk_length": int32(2)}, R, "extra_topk_length|extra_k_cache"),
        ({"attn_sink": torch.zeros(5)}, R, "attn_sink: expected"),
        ({"attn_sink": torch.zeros(4).bfloat16()}, T, "attn_sink: expected dtype fp32"),
        ({"attn_sink": 0.0}, T, "attn_sink"),
        ({"extra_k_cache": S["k_cache"]}, R, "extra_indices_in_kvcache|extra_k_cache"),
        ({"extra_indices_in_kvcache": S["indices"]}, R, "extra_k_cache|extra_indices_in_kvcache"),
        ({"indices": torch.tensor(3).int()}, V, "indices: expected 3 dimensions"),
        (with_extra() | {"extra_k_cache": "cache"}, T, "extra_k_cache: expected a tensor, got str"),
        (with_extra() | {"extra_k_cache": S["k_cache"][0]}, R, "extra_k_cache: expected 4 dimensions"),
        (with_extra() | {"extra_indices_in_kvcache": S["indices"][:1]}, R, "extra_indices_in_kvcache"),
        (with_extra() | {"extra_indices_in_kvcache": S["indices"].long()}, T, "extra_indices_in_kvcache"),
        (with_extra() | {"extra_k_cache": sparse(512)["k_cache"]}, R, "extra_k_cache"),
        (with_extra() | {"extra_topk_length": int32(3)}, R, "extra_topk_length"),
        ({"descale_q": ONE, "descale_k": ONE}, R, "descale_q, descale_k: expected None with indices"),
        ({"out": torch.zeros(2, 3, 4, 512)}, R, "out: expected"),
        ({"softmax_scale": float("nan")}, R, "softmax_scale"),
    ],
)
def test_sparse_decode(change, error, words):
    a = sparse() | change
    a["tile_scheduler_metadata"] = flash_mla.FlashMLASchedMeta()
    with pytest.raises(error, match=words):
        flash_mla.flash_mla_with_kvcache(**a)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": P["q"].double()}, T, "q: expected dtype"),
        ({"q": P["q"][None]}, R, "q: expected"),
        ({"q": P["q"][..., :500]}, R, "q: expected"),
        ({"q": strided(P["q"])}, R, "q: expected last stride 1"),
        ({"q": P["q"][:, :0]}, R, "q"),
        ({"q": None}, T, "q: expected a tensor, got NoneType"),
        ({"q": P["q"][:0], "kv": P["kv"][..., :512]}, R, r"kv: expected \[s_kv, 1, d_qk\] with extent 576"),
        ({"kv": P["kv"][..., :512]}, R, "kv: expected"),
        ({"kv": P["kv"].half()}, T, "kv: expected"),
        ({"kv": P["kv"].expand(90, 2, 576)}, R, "kv: expected"),
        ({"kv": P["kv"][:, 0]}, R, "kv: expected"),
        ({"kv": strided(P["kv"])}, R, "kv: expected last stride 1"),
        ({"kv": "x"}, T, "kv"),
        ({"q": P["q"].to("meta")}, V, "q: expected a tensor on a CPU, CUDA or MUSA device, got meta"),
        ({"kv": P["kv"].to("meta")}, R, "kv: expected on q's device cpu, got meta"),
        ({"indices": P["indices"].long()}, T, "indices: expected dtype int32"),
        ({"indices": P["indices"][:4]}, R, "indices: expected"),
        ({"indices": P["indices"][:, 0]}, R, "indices: expected"),
        ({"indices": P["indices"][..., :0]}, R, "indices: expected"),
        ({"indices": strided(P["indices"])}, V, "indices: expected last stride 1"),
        ({"indices": None}, T, "indices"),
        ({"sm_scale": None}, T, "^sm_scale: expected a float"),
        ({"sm_scale": float("nan")}, R, "^sm_scale: expected a finite"),
        ({"d_v": 128}, R, "^d_v: expected 512"),
        ({"attn_sink": torch.zeros(5)}, R, "attn_sink: expected"),
        ({"attn_sink": torch.zeros(4).half()}, T, "attn_sink: expected dtype fp32"),
        ({"topk_length": int32(4)}, R, "topk_length: expected"),
        ({"topk_length": int32(5).long()}, T, "topk_length: expected dtype int32"),
        ({"out": torch.zeros(5, 4, 512)}, R, "out: expected"),
        ({"out": torch.zeros(5, 4, 500).bfloat16()}, R, "out: expected"),
    ],
)
def test_sparse_prefill(change, error, words):
    with pytest.raises(error, match=words):
        flash_mla.flash_mla_sparse_fwd(**prefill() | change)


def test_the_scale_of_sparse_prefill_has_no_default():
    with pytest.raises(T, match="sm_scale"):
        flash_mla.flash_mla_sparse_fwd(P["q"], P["kv"], P["indices"])


def test_outputs_may_not_overlap_what_is_read():
    """A result inside the lengths of its own call."""
    a = dense()
    memory = torch.zeros(2 * 2 * 4 * 512 + 64, dtype=torch.bfloat16)
    a["out"] = memory[: 2 * 2 * 4 * 512].view(2, 2, 4, 512)
    a["cache_seqlens"] = memory[:4].view(torch.int32)
    a["cache_seqlens"].copy_(torch.tensor([100, 30]))
    with pytest.raises(R, match="out|cache_seqlens"):
        flash_mla.flash_mla_with_kvcache(**a)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensors_of_two_devices():
    a = dense()
    a["q"] = a["q"].cuda()
    with pytest.raises(R, match="device"):
        flash_mla.flash_mla_with_kvcache(**a)
