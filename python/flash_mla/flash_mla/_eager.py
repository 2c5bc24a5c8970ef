# SPDX-License-Identifier: MIT
"""Between the names and libattn: which way a call takes, the metadata object's habits, and the calls.

Shapes, dtypes and values are checked by libattn; here only what it does not see.
"""

import re

import libattn
import torch
from libattn import DeviceError, DtypeError, NotBuiltError, ShapeError, mla, musa
from torch.autograd.graph import increment_version

from . import _schedule

LIBATTN = "0.1.0"

if libattn.__version__ != LIBATTN:
    raise ImportError(
        f"flash_mla needs libattn {LIBATTN}, found {libattn.__version__}: install the two from one build"
    )

_Tensor = torch.Tensor


def direct(q):
    """Whether q is a plain tensor on a device that libattn itself serves."""
    return type(q) is _Tensor and (q.is_cpu or q.is_cuda)


def on_musa(q, name="q"):
    """Whether q lies on MUSA; TypeError when it is no tensor, DeviceError when nothing here serves it."""
    try:
        device = q.device.type
    except AttributeError:
        raise DtypeError(f"{name}: expected a tensor, got {type(q).__name__}") from None
    if device not in ("cpu", "cuda", "musa"):
        raise DeviceError(f"{name}: expected a tensor on a CPU, CUDA or MUSA device, got {device}")
    return device == "musa"


def check_rank(name, x, rank, device=None, whose="q"):
    """A tensor of that many dimensions, and on q's (or another argument's) device where that is given."""
    if not isinstance(x, _Tensor):
        raise DtypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dim() != rank:
        raise ShapeError(f"{name}: expected {rank} dimensions, got shape {tuple(x.shape)}")
    if device is not None and x.device != device:
        raise DeviceError(f"{name}: expected on {whose}'s device {device}, got {x.device}")


def three_axes(name, indices):
    """Indices (b, s_q, topk), also given as MATE's (b, s_q, 1, topk)."""
    if isinstance(indices, _Tensor) and indices.dim() == 4 and indices.shape[2] == 1:
        indices = indices.squeeze(2)
    check_rank(name, indices, 3)
    return indices


def default_scale(q):
    d = q.shape[-1]
    return d**-0.5 if d else 1.0


def plain(x):
    """x with its sign written out and without its gradient; what is no tensor is left for libattn."""
    if x is not None and isinstance(x, _Tensor):
        if x.requires_grad:
            x = x.detach()
        if x.is_neg():
            x = x.resolve_neg()
    return x


PREFILL_NAMES = {"softmax_scale": "sm_scale", "head_dim_v": "d_v"}  # of what libattn calls otherwise


def renamed(error, names):
    """An error of libattn with the caller's names in place of libattn's."""
    pattern = rf"\b({'|'.join(names)})\b"
    return type(error)(re.sub(pattern, lambda name: names[name[0]], str(error)))


def written(out):
    """Tells autograd that a given result was changed in place."""
    if out is not None and not out.is_inference():
        increment_version(out)


# ---- the metadata object -----------------------------------------------------------------------------


def remember(meta, q, k_cache, causal, is_fp8_kvcache, indices, extra_k_cache, extra_indices):
    """Records what the first call is like, or asserts that a later one is like it."""
    b, s_q, h_q, _ = q.shape
    _, page, h_k, _ = k_cache.shape
    config = (
        b,
        s_q,
        h_q,
        page,
        h_k,
        causal,
        is_fp8_kvcache,
        None if indices is None else indices.shape[-1],
        None if extra_k_cache is None else extra_k_cache.shape[1],
        None if extra_indices is None else extra_indices.shape[-1],
    )
    if not meta.have_initialized:
        meta.have_initialized = True
        meta.config = _schedule.FlashMLASchedMeta.Config(*config)
        return
    assert meta.config is not None, "tile_scheduler_metadata: initialised, but has no config"
    first_config = vars(meta.config)
    if tuple(first_config.values()) == config:
        return
    for (name, first), value in zip(first_config.items(), config):
        assert first == value, (
            f"tile_scheduler_metadata: first used with {name} {first}, now with {value}: make a new one "
            "with get_mla_metadata() for calls of another kind"
        )


def fill(meta, q, k_cache, cache_seqlens, indices, topk_length, extra_topk_length):
    """Gives an object its tensors, after a call that found none."""
    b, s_q, h_q, _ = q.shape
    h_k, lengths = k_cache.shape[2], None
    if indices is None:
        parts = _schedule.dense_parts(q.device, s_q * h_q // h_k, h_k)
        lengths = _schedule.dense_lengths(cache_seqlens)
    else:
        parts = _schedule.sparse_parts(q.device, s_q, h_q)
        if q.is_cpu:
            extra_topk = meta.config.extra_topk
            lengths = _schedule.sparse_lengths(
                b, meta.config.topk, topk_length, extra_topk, extra_topk_length
            )
    meta.made = _schedule.tensors(lengths, b, parts, q.device)
    meta.tile_scheduler_metadata, meta.num_splits = meta.made


# ---- libattn -----------------------------------------------------------------------------------------


def dense_decode(
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
):
    result = mla.mla_decode(
        plain(q),
        plain(k_cache),
        block_table,
        cache_seqlens,
        softmax_scale=softmax_scale,
        causal=causal,
        head_dim_v=head_dim_v,
        descale_q=plain(descale_q),
        descale_k=plain(descale_k),
        out=out,
    )
    written(out)
    return result


def sparse_decode(
    q,
    k_cache,
    indices,
    topk_length,
    attn_sink,
    extra_k_cache,
    extra_indices,
    extra_topk_length,
    softmax_scale,
    head_dim_v,
    out,
):
    result = mla.mla_sparse_decode(
        plain(q),
        k_cache,
        indices,
        topk_length=topk_length,
        attn_sink=plain(attn_sink),
        extra_k_cache=extra_k_cache,
        extra_indices_in_kvcache=extra_indices,
        extra_topk_length=extra_topk_length,
        softmax_scale=softmax_scale,
        head_dim_v=head_dim_v,
        out=out,
    )
    written(out)
    return result


def sparse_fwd(q, kv, indices, sm_scale, d_v, attn_sink, topk_length, out):
    try:
        result = mla.mla_sparse_fwd(
            plain(q),
            plain(kv),
            indices,
            sm_scale,
            d_v=d_v,
            attn_sink=plain(attn_sink),
            topk_length=topk_length,
            out=out,
        )
    except (RuntimeError, TypeError) as error:
        raise renamed(error, PREFILL_NAMES) from None
    written(out)
    return result


# ---- MATE --------------------------------------------------------------------------------------------


def by_mate(
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
    extra_indices,
    topk_length,
    extra_topk_length,
    out,
    descaled,
):
    """flash_mla_with_kvcache by MATE: (out, lse) with upstream's layout of the dense lse."""
    if descaled:
        raise NotBuiltError("descale_q, descale_k: MATE's flashmla has no dense FP8 decode on MUSA")
    tables = meta, num_splits
    if isinstance(meta, _schedule.FlashMLASchedMeta):
        remember(meta, q, k_cache, causal, is_fp8_kvcache, indices, extra_k_cache, extra_indices)
        if meta.tile_scheduler_metadata is None or meta.num_splits is None:
            meta.tile_scheduler_metadata, meta.num_splits = musa.get_mla_metadata(
                cache_seqlens=cache_seqlens,
                num_q_tokens_per_head_k=q.shape[1] * q.shape[2] // k_cache.shape[2],
                num_heads_k=k_cache.shape[2],
                num_heads_q=q.shape[2],
                is_fp8_kvcache=is_fp8_kvcache,
                topk=meta.config.topk,
                extra_topk=meta.config.extra_topk,
                q=q,
                topk_length=topk_length,
                extra_topk_length=extra_topk_length,
            )
        tables = meta.tile_scheduler_metadata, meta.num_splits
    result, lse = musa.flash_mla_with_kvcache(
        q=q,
        k_cache=k_cache,
        block_table=block_table,
        cache_seqlens=cache_seqlens,
        head_dim_v=head_dim_v,
        tile_scheduler_metadata=tables[0],
        num_splits=tables[1],
        softmax_scale=default_scale(q) if softmax_scale is None else softmax_scale,
        causal=causal,
        is_fp8_kvcache=is_fp8_kvcache,
        indices=indices,
        attn_sink=attn_sink,
        extra_k_cache=extra_k_cache,
        extra_indices_in_kvcache=extra_indices,
        topk_length=topk_length,
        extra_topk_length=extra_topk_length,
    )
    if indices is None:
        lse = lse.transpose(1, 2)  # MATE's is (b, s_q, h_q)
    return result if out is None else out.copy_(result), lse


def prefill_by_mate(q, kv, indices, sm_scale, d_v, attn_sink, topk_length, out):
    result, *statistics = musa.flash_mla_sparse_fwd(
        q=q,
        kv=kv,
        indices=indices,
        sm_scale=sm_scale,
        d_v=d_v,
        attn_sink=attn_sink,
        topk_length=topk_length,
    )
    return (result if out is None else out.copy_(result), *statistics)
