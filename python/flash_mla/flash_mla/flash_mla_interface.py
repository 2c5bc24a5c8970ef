# SPDX-License-Identifier: MIT
"""FlashMLA's Python interface on libattn: the current release's functions, and callers of the first
releases, of the 2025-09 release and of vLLM's and SGLang's forks served by the same names.

Shapes: b sequences of s_q queries, h_q and h_k heads; pages of `page` tokens; rows of d values, 576 (512
latent, 64 rope) or 512, the first 512 of which are V.  Tensors on MUSA go to MATE.  Decode and sparse
prefill have no gradient, as upstream; their results do not require one.
"""

import torch
from libattn import ArgumentError, DtypeError, musa

from . import _eager, _schedule
from ._mha import (
    FlashAttnVarlenFunc,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from ._schedule import FlashMLASchedMeta

__all__ = [
    "FlashAttnVarlenFunc",
    "FlashMLASchedMeta",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "flash_mla_with_kvcache_fp8",
    "get_mla_metadata",
    "get_mla_metadata_dense_fp8",
]

_Tensor = torch.Tensor


def get_mla_metadata(*args, **kwargs):
    """What decode calls of one step share.

    Exactly the first releases' (cache_seqlens, num_heads_per_head_k, num_heads_k), the second also named
    num_q_tokens_per_head_k, give their tensors: (tile_scheduler_metadata int32 (parts, 8), num_splits
    int32 (b + 1,)).  Anything else, nothing included, gives (FlashMLASchedMeta(), None) unread.
    flash_mla_with_kvcache takes either.
    """
    three = _schedule.first_release(args, kwargs)
    if three is None:
        return FlashMLASchedMeta(), None
    cache_seqlens, rows, heads = three
    if cache_seqlens.device.type == "musa":
        return musa.get_mla_metadata(
            cache_seqlens=cache_seqlens, num_q_tokens_per_head_k=rows, num_heads_k=heads
        )
    return get_mla_metadata_dense_fp8(cache_seqlens, rows, heads)


def get_mla_metadata_dense_fp8(cache_seqlens, num_q_tokens_per_head_k, num_heads_k):
    """The first releases' scheduler tensors for flash_mla_with_kvcache_fp8: int32 (parts, 8), (b + 1,)."""
    _schedule.check_lengths(cache_seqlens)
    rows = _schedule.at_least(1, "num_q_tokens_per_head_k", num_q_tokens_per_head_k)
    heads = _schedule.at_least(1, "num_heads_k", num_heads_k)
    device = cache_seqlens.device
    parts = _schedule.dense_parts(device, rows, heads)
    lengths = _schedule.dense_lengths(cache_seqlens)
    return _schedule.tensors(lengths, len(cache_seqlens), parts, device, tokens=True)


def flash_mla_with_kvcache(
    q,
    k_cache,
    block_table,
    cache_seqlens,
    head_dim_v,
    tile_scheduler_metadata,
    num_splits=None,
    softmax_scale=None,
    causal=False,
    is_fp8_kvcache=False,
    indices=None,
    attn_sink=None,
    extra_k_cache=None,
    extra_indices_in_kvcache=None,
    topk_length=None,
    extra_topk_length=None,
    out=None,
    *,
    descale_q=None,
    descale_k=None,
):
    """Decode over a paged latent cache: dense without `indices`, sparse with them.

    Dense: q (b, s_q, h_q, d) bf16 or fp16, k_cache (pages, page, h_k, d) of q's dtype, block_table int32
    (b, max_pages), cache_seqlens int32 (b,).  `causal` is aligned bottom-right.  With descale_q and
    descale_k, fp32 (1,), q and k_cache are float8_e4m3fn and out is bf16.
    Sparse: q (b, s_q, h_q, d) bf16, k_cache (pages, page, 1, 656 for d 576 or 584 for d 512) bytes,
    indices int32 (b, s_q, topk): page number * page + offset, others than those of the cache are skipped;
    is_fp8_kvcache must be True, causal False.  topk_length int32 (b,): how many of them count.
    attn_sink fp32 (h_q,).  extra_k_cache, extra_indices_in_kvcache, extra_topk_length: keys of a second
    cache, in the same softmax.

    tile_scheduler_metadata: a FlashMLASchedMeta, with num_splits None, or both as int32 tensors.
    softmax_scale None is d^-1/2, which is not a DeepSeek model's scale.  out: a given result.  The
    arguments of older vLLM and sgl_kernel, which have descale_q, descale_k after causal, are also taken
    by position.

    Returns (out (b, s_q, h_q, 512), lse fp32 (b, h_q, s_q)), the lse in natural units, +inf in a row
    without keys (its out is 0), and without the sink.
    """
    if is_fp8_kvcache is not True and is_fp8_kvcache is not False:
        if is_fp8_kvcache is None or isinstance(is_fp8_kvcache, _Tensor):
            descale_q, descale_k, is_fp8_kvcache, indices = _older_positions(
                (is_fp8_kvcache, indices, attn_sink, extra_k_cache),
                (extra_indices_in_kvcache, topk_length, extra_topk_length, descale_q, descale_k),
            )
            attn_sink = extra_k_cache = None
        else:
            is_fp8_kvcache = bool(is_fp8_kvcache)
    meta = tile_scheduler_metadata
    if isinstance(meta, FlashMLASchedMeta):
        assert num_splits is None, "num_splits: expected None with a FlashMLASchedMeta"
    else:
        pair = isinstance(meta, _Tensor) and isinstance(num_splits, _Tensor)
        assert pair or _eager.on_musa(q), (
            "tile_scheduler_metadata: expected a FlashMLASchedMeta, or a tensor with num_splits a tensor, "
            f"got {type(meta).__name__} with {type(num_splits).__name__}"
        )
    sparse = indices is not None
    if sparse:
        assert not causal, "causal: expected False with indices"
        assert is_fp8_kvcache, "is_fp8_kvcache: expected True with indices"
    else:
        assert (
            attn_sink is None
            and extra_k_cache is None
            and extra_indices_in_kvcache is None
            and topk_length is None
            and extra_topk_length is None
        ), (
            "attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length, extra_topk_length: expected "
            "None without indices"
        )
        assert block_table is not None and cache_seqlens is not None, (
            "block_table, cache_seqlens: expected tensors without indices"
        )

    direct = _eager.direct(q)
    if not direct and _eager.on_musa(q):
        return _eager.by_mate(
            q,
            k_cache,
            block_table,
            cache_seqlens,
            head_dim_v,
            meta,
            num_splits,
            softmax_scale,
            causal,
            is_fp8_kvcache,
            indices,
            attn_sink,
            extra_k_cache,
            extra_indices_in_kvcache,
            topk_length,
            extra_topk_length,
            out,
            descale_q is not None or descale_k is not None,
        )
    _eager.check_rank("q", q, 4)
    _eager.check_rank("k_cache", k_cache, 4, q.device)
    if sparse:
        indices = _eager.three_axes("indices", indices)
        if extra_k_cache is not None:
            _eager.check_rank("extra_k_cache", extra_k_cache, 4, q.device)
        if extra_indices_in_kvcache is not None:
            extra_indices_in_kvcache = _eager.three_axes("extra_indices_in_kvcache", extra_indices_in_kvcache)
    given, made = (meta, num_splits), FlashMLASchedMeta.made
    if isinstance(meta, FlashMLASchedMeta):
        _eager.remember(
            meta,
            q,
            k_cache,
            causal,
            is_fp8_kvcache,
            indices,
            extra_k_cache,
            extra_indices_in_kvcache,
        )
        given, made = (meta.tile_scheduler_metadata, meta.num_splits), meta.made
    if given[0] is not made[0] or given[1] is not made[1]:
        _schedule.check_tensors(*given, q.shape[0], q.device)
    if sparse:
        if descale_q is not None or descale_k is not None:
            raise ArgumentError("descale_q, descale_k: expected None with indices, whose caches have scales")
        result = _eager.sparse_decode(
            q,
            k_cache,
            indices,
            topk_length,
            attn_sink,
            extra_k_cache,
            extra_indices_in_kvcache,
            extra_topk_length,
            softmax_scale,
            head_dim_v,
            out,
        )
    else:
        result = _eager.dense_decode(
            q,
            k_cache,
            block_table,
            cache_seqlens,
            softmax_scale,
            causal,
            head_dim_v,
            descale_q,
            descale_k,
            out,
        )
    if given[0] is None:
        _eager.fill(
            meta,
            q,
            k_cache,
            cache_seqlens,
            indices,
            topk_length,
            extra_topk_length,
        )
    return result


def _older_positions(moved, rest):
    """(descale_q, descale_k, is_fp8_kvcache, indices) from the four arguments behind `causal` of a caller
    of older vLLM or sgl_kernel, who gave them in that order."""
    descale_q, descale_k, is_fp8_kvcache, indices = moved
    flag = is_fp8_kvcache is None or isinstance(is_fp8_kvcache, bool)
    if not flag or any(x is not None for x in rest):
        raise TypeError(
            "is_fp8_kvcache: expected a bool, or the older argument list (..., causal, descale_q, descale_k, "
            f"is_fp8_kvcache, indices) and nothing behind it, got {type(descale_q).__name__}"
        )
    return descale_q, descale_k, bool(is_fp8_kvcache), indices


def flash_mla_with_kvcache_fp8(
    q,
    k_cache,
    block_table,
    cache_seqlens,
    head_dim_v,
    tile_scheduler_metadata,
    num_splits,
    softmax_scale=None,
    causal=False,
    descale_q=None,
    descale_k=None,
):
    """Dense decode of float8_e4m3fn q and k_cache, as vLLM's fork has it: flash_mla_with_kvcache's shapes,
    scheduler tensors, descale_q and descale_k fp32 (1,).  Returns (out bf16, lse)."""
    if descale_q is None or descale_k is None:
        raise ArgumentError("descale_q, descale_k: expected fp32 tensors of shape (1,), got None")
    if isinstance(q, _Tensor) and q.dtype != torch.float8_e4m3fn:
        raise DtypeError(f"q: expected dtype torch.float8_e4m3fn, got {q.dtype}")
    return flash_mla_with_kvcache(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        head_dim_v,
        tile_scheduler_metadata,
        num_splits,
        softmax_scale,
        causal,
        descale_q=descale_q,
        descale_k=descale_k,
    )


def flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None, out=None):
    """Prefill in which each query token sees the keys that its indices name.

    q (s_q, h_q, d) bf16, kv (s_kv, 1, d), indices int32 (s_q, 1, topk): rows of kv, others are skipped and
    duplicates count twice.  topk_length int32 (s_q,): how many of them count.  attn_sink fp32 (h_q,).
    out: a given result.  Sequences of a batch come one behind the other, their indices offset.

    Returns (out (s_q, h_q, 512), max_logits fp32 (s_q, h_q), lse fp32 (s_q, h_q)) in natural units,
    without the sink; in a row without keys 0, -inf, +inf.
    """
    if not _eager.direct(q) and _eager.on_musa(q):
        return _eager.prefill_by_mate(q, kv, indices, sm_scale, d_v, attn_sink, topk_length, out)
    _eager.check_rank("q", q, 3)
    _eager.check_rank("kv", kv, 3, q.device)
    return _eager.sparse_fwd(q, kv, indices, sm_scale, d_v, attn_sink, topk_length, out)
