# SPDX-License-Identifier: MIT
"""The mla ops on torch tensors: outputs are allocated here, checked and filled below.

Shapes, key sets and what an empty row gives are those of attn.h and docs/ops/mla.md: b batch, s_q
query tokens, h_q h_k heads, d_qk 576 or 512, d_v 512.  All statistics are in natural units and never
hold the sink.  Every argument is checked by the C library, which raises the classes of
libattn.errors, and no gradient is recorded.  An `out` of the caller's is written in place and
returned as the same object.
"""

import torch

from . import _native
from ._plain import named, refuse_negated
from .mha import fresh

_threads = torch.get_num_threads
_float32 = torch.float32
LATENT = 512


def _new_out(q, *shape):
    """Uninitialised, of the dtype of results; None where q is no tensor or the shape none, which the
    native function then says."""
    try:
        s_q, h_q, d_v = shape[-3:]
        row = h_q * d_v
        return fresh(q, shape, (s_q * row, row, d_v, 1)[-len(shape) :], q.dtype)
    except (AttributeError, RuntimeError, TypeError):
        return None


def mla_decode(
    q,
    k_cache,
    block_table,
    cache_seqlens,
    softmax_scale=None,
    causal=False,
    descale_q=None,
    descale_k=None,
    head_dim_v=LATENT,
    out=None,
    use=_native.mla_decode,
):
    """Dense decode over a paged latent cache: returns (out, lse).

    q [b, s_q, h_q, d_qk] and k_cache [num_pages, page, h_k, d_qk] bf16, fp16, fp8 e4m3fn or (CPU)
    fp32; block_table int32 [b, max_pages], cache_seqlens int32 [b]; descales fp32 [1], with fp8
    only.  softmax_scale None is d_qk^-1/2.  causal aligns the s_q rows to the sequence's end.
    out [b, s_q, h_q, head_dim_v] in q's dtype, bf16 for fp8; lse fp32 [b, h_q, s_q].
    """
    refuse_negated(q=q, k_cache=k_cache, descale_q=descale_q, descale_k=descale_k, out=out)
    lse = None
    try:
        b, s_q, h_q, d_qk = q.shape
        if softmax_scale is None:
            softmax_scale = d_qk**-0.5 if d_qk else 1.0
        if out is None:
            out = _new_out(q, b, s_q, h_q, head_dim_v)
        lse = fresh(q, (b, h_q, s_q), (h_q * s_q, s_q, 1), _float32)
    except (AttributeError, ValueError):
        softmax_scale = 1.0  # q is no such tensor; the native function says so
    args = (
        q,
        k_cache,
        block_table,
        cache_seqlens,
        out,
        lse,
        softmax_scale,
        head_dim_v,
        causal,
        _threads(),
    )
    try:
        use(*args) if descale_q is None and descale_k is None else use(*args, descale_q, descale_k)
    except RuntimeError as error:
        raise named(error, locals()) from None
    return out, lse


def mla_sparse_decode(
    q,
    k_cache,
    indices,
    softmax_scale=None,
    topk_length=None,
    attn_sink=None,
    extra_k_cache=None,
    extra_indices_in_kvcache=None,
    extra_topk_length=None,
    head_dim_v=LATENT,
    out=None,
    use=_native.mla_sparse_decode,
):
    """Decode over chosen rows of a quantised cache: returns (out, lse).

    q [b, s_q, h_q, d_qk] bf16; k_cache [num_pages, page, 1, 656] for d_qk 576 (V32) or [.., 584] for
    512 (MODEL1), uint8, int8 or fp8 e4m3fn; indices int32 [b, s_q, topk], one out of range is
    skipped; topk_length int32 [b]; attn_sink fp32 [h_q]; a second cache with lists of its own.
    out bf16 [b, s_q, h_q, head_dim_v]; lse fp32 [b, h_q, s_q], a transposed view.
    """
    refuse_negated(q=q, attn_sink=attn_sink, out=out)
    lse = None
    try:
        b, s_q, h_q, d_qk = q.shape
        if softmax_scale is None:
            softmax_scale = d_qk**-0.5 if d_qk else 1.0
        if out is None:
            out = _new_out(q, b, s_q, h_q, head_dim_v)
        lse = q.new_empty((b, s_q, h_q), dtype=_float32).transpose(1, 2)
    except (AttributeError, ValueError):
        softmax_scale = 1.0
    try:
        use(
            q,
            k_cache,
            indices,
            out,
            lse,
            softmax_scale,
            head_dim_v,
            _threads(),
            topk_length,
            attn_sink,
            extra_k_cache,
            extra_indices_in_kvcache,
            extra_topk_length,
        )
    except RuntimeError as error:
        raise named(error, locals()) from None
    return out, lse


def mla_sparse_fwd(
    q,
    kv,
    indices,
    sm_scale,
    d_v=LATENT,
    attn_sink=None,
    topk_length=None,
    out=None,
    use=_native.mla_sparse_fwd,
):
    """Prefill over chosen rows of kv: returns (out, max_logits, lse).

    q [s_q, h_q, d_qk] and kv [s_kv, 1, d_qk] bf16, fp16 or (CPU) fp32; indices int32
    [s_q, 1, topk], one outside [0, s_kv) is skipped; topk_length int32 [s_q]; attn_sink fp32 [h_q].
    out [s_q, h_q, d_v] in q's dtype; max_logits and lse fp32 [s_q, h_q].
    """
    refuse_negated(q=q, kv=kv, attn_sink=attn_sink, out=out)
    max_logits = lse = None
    try:
        s_q, h_q, _ = q.shape
        if out is None:
            out = _new_out(q, s_q, h_q, d_v)
        max_logits = torch.empty((s_q, h_q), dtype=torch.float32, device=q.device)
        lse = torch.empty_like(max_logits)
    except (AttributeError, ValueError):
        pass
    try:
        use(q, kv, indices, out, max_logits, lse, sm_scale, d_v, _threads(), topk_length, attn_sink)
    except RuntimeError as error:
        raise named(error, locals()) from None
    return out, max_logits, lse


def mla_decode_ref(*args, **kwargs):
    """mla_decode by the scalar oracle with fp64 sums, CPU tensors only: slow, for tests."""
    return mla_decode(*args, **kwargs, use=_native.mla_decode_ref)


def mla_sparse_decode_ref(*args, **kwargs):
    """mla_sparse_decode by the scalar oracle."""
    return mla_sparse_decode(*args, **kwargs, use=_native.mla_sparse_decode_ref)


def mla_sparse_fwd_ref(*args, **kwargs):
    """mla_sparse_fwd by the scalar oracle."""
    return mla_sparse_fwd(*args, **kwargs, use=_native.mla_sparse_fwd_ref)


def mla_plan(op, *args, **kwargs):
    """(kernel, workspace_bytes) for a call of op, one of the three functions above; runs nothing."""
    text = ""
    native = getattr(_native, op.__name__ + "_plan")

    def plan(*native_args):
        nonlocal text
        text = native(*native_args)

    op(*args, **kwargs, use=plan)
    kernel, workspace_bytes = text.split(" ")
    return kernel, int(workspace_bytes)


def mla_cache_quantize(kv, cache, slots=None):
    """Writes rows of kv into a quantised cache, in place; returns the cache.

    kv [t, 576] for a cache [num_pages, page, 1, 656] (V32), [t, 512] for [.., 584] (MODEL1), bf16,
    fp16 or fp32.  slots int32 or int64 [t]: row i becomes token slots[i] = page number * page +
    offset, one out of range is not written; None writes all tokens in order.
    """
    refuse_negated(kv=kv)
    try:
        _native.mla_cache_quantize(kv, cache, slots, _threads())
    except RuntimeError as error:
        raise named(error, locals()) from None
    return cache


def mla_cache_dequantize(cache, slots=None, dtype=torch.bfloat16, out=None):
    """Rows of a quantised cache as [t, 576] (V32) or [t, 512] (MODEL1); `slots` as for
    mla_cache_quantize, a row out of range is zeros.  `out` may be given instead of a dtype."""
    if out is None:
        try:
            num_pages, page, _, row_bytes = cache.shape
            rows = num_pages * page if slots is None else slots.shape[0]
            width = 576 if row_bytes == 656 else LATENT
            out = torch.empty((rows, width), dtype=dtype, device=cache.device)
        except (AttributeError, IndexError, ValueError):
            pass  # no such tensors; the native function says so
    refuse_negated(out=out)
    try:
        _native.mla_cache_dequantize(out, cache, slots, _threads())
    except RuntimeError as error:
        raise named(error, locals()) from None
    return out
