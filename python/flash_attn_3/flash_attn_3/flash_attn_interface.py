# SPDX-License-Identifier: MIT
"""FlashAttention-3's Python interface: upstream's names, order, defaults and return values.

Shapes, dense and packed: q (b, s_q, h_q, d_qk) or (t_q, h_q, d_qk); k, v (b, s_k, h_k, d) or
(t_k, h_k, d); out as q with d_v last; lse fp32 (b, h_q, s_q) or (h_q, t_q), the natural logarithm of
the sum of exp(score).  docs/compatibility/flash_attn_3.md says what runs where.
"""

import functools

import torch
from libattn import ArgumentError, NotBuiltError, ShapeError, mha, musa

from . import _C, _eager  # _C registers torch.ops.flash_attn_3
from ._autograd import FlashAttnFunc, FlashAttnQKVPackedFunc, FlashAttnVarlenFunc, unpack_qkv
from ._eager import (
    in_cache_names,
    length,
    score_scale,
    unit_stride,
    unit_stride_value,
    whole,
    window_sides,
    written,
)
from ._private import _flash_attn_backward, _flash_attn_forward
from ._ways import by_class, direct, forward, grad_on, is_traced, modes, on_musa

__all__ = [
    "FlashAttnFunc",
    "FlashAttnQKVPackedFunc",
    "FlashAttnVarlenFunc",
    "_flash_attn_backward",
    "_flash_attn_forward",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]

_attend = mha.attend
_plain = mha.plain
_Tensor = torch.Tensor
_ABSENT = list(mha.FEATURES.values())
_NAMES = list(mha.FEATURES)
_NO_LENGTHS = _ABSENT[: _NAMES.index("qv")]
_NO_APPEND = _ABSENT[_NAMES.index("kv_batch_idx") : _NAMES.index("qv")]
_WHOLE = (-1, -1)  # the default window
_FLOATS = slice(5)  # the floating-point tensors of what _tail returns


def _tail(
    qv,
    q_descale,
    k_descale,
    v_descale,
    sinks,
    cp_world_size,
    cp_rank,
    cp_tot_seqused_k,
    scheduler_metadata,
    pack_gqa,
    sm_margin,
):
    """mha.FEATURES from qv on; empty when none is in use."""
    if (
        qv is None
        and q_descale is None
        and k_descale is None
        and v_descale is None
        and sinks is None
        and cp_world_size == 1
        and cp_tot_seqused_k is None
        and scheduler_metadata is None
        and pack_gqa is None
        and sm_margin == 0
    ):
        return ()
    return (
        qv,
        q_descale,
        k_descale,
        v_descale,
        sinks,
        cp_world_size,
        cp_rank,
        cp_tot_seqused_k,
        scheduler_metadata,
        -1 if pack_gqa is None else pack_gqa,
        sm_margin,
    )


def flash_attn_func(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
    *,
    sinks=None,
    s_aux=None,
    cp_world_size=1,
    cp_rank=0,
    cp_tot_seqused_k=None,
    return_softmax_lse=False,
):
    """Attention over a dense batch.

    q (b, s_q, h_q, d_qk), k (b, s_k, h_k, d_qk), v (b, s_k, h_k, d_v), of one dtype: bf16, fp16, fp8
    e4m3fn, on a CPU also fp32.  h_q is a multiple of h_k; query head h uses KV head h // (h_q / h_k).

    softmax_scale: None means (d_qk + d_v if qv)^-1/2.  causal: bottom-right aligned.  qv
    (b, s_q, h_q, d_v): a second score term qv . v.  q_descale, k_descale, v_descale: fp32 (b, h_k),
    for fp8.  window_size: keys to the left and right of the diagonal, -1 or None for no limit.
    attention_chunk: keys of the query's own chunk only; 0 or None is off.  softcap: softcap *
    tanh(score / softcap); 0 is off.  sinks, or s_aux: (h_q), one more logit a head.  cp_*: local key
    j is global key j * cp_world_size + cp_rank, of cp_tot_seqused_k int32 (b).
    num_splits, pack_gqa, deterministic, sm_margin are for tuning.

    Returns out (b, s_q, h_q, d_v), bf16 for fp8; with return_attn_probs or return_softmax_lse
    (out, lse), lse fp32 (b, h_q, s_q).  Raises classes of libattn.errors, which are RuntimeErrors.
    """
    if sinks is None:
        sinks = s_aux
    tail = _tail(
        qv,
        q_descale,
        k_descale,
        v_descale,
        sinks,
        cp_world_size,
        cp_rank,
        cp_tot_seqused_k,
        None,
        pack_gqa,
        sm_margin,
    )
    if direct(q, k, v, tail[_FLOATS]):
        left, right = window_size if window_size is _WHOLE else window_sides(window_size)
        with_lse = return_attn_probs or return_softmax_lse
        if not (tail or with_lse):
            try:
                return _plain(
                    q,
                    k,
                    v,
                    softmax_scale,
                    causal,
                    left,
                    right,
                    softcap,
                    attention_chunk or 0,
                    num_splits,
                )
            except ShapeError:
                pass  # strides that are copied below, or what is wrong all the same
        out, lse, _, _ = _attend(
            q if q.is_contiguous() else unit_stride(q),
            k if k.is_contiguous() else unit_stride(k),
            v if v.is_contiguous() else unit_stride_value(v),
            softmax_scale if qv is None else score_scale(softmax_scale, q, qv),
            causal,
            left,
            right,
            softcap,
            attention_chunk or 0,
            num_splits,
            None,
            with_lse,
            False,
            (*_NO_LENGTHS, *tail) if tail else (),
        )
    elif on_musa(q):
        return musa.flash_attn_varlen_func(
            q=q,
            k=k,
            v=v,
            softmax_scale=softmax_scale,
            causal=causal,
            qv=qv,
            q_descale=q_descale,
            k_descale=k_descale,
            v_descale=v_descale,
            window_size=window_size,
            sinks=sinks,
            attention_chunk=attention_chunk,
            softcap=softcap,
            num_splits=num_splits,
            pack_gqa=pack_gqa,
            deterministic=deterministic,
            sm_margin=sm_margin,
            return_softmax_lse=return_attn_probs or return_softmax_lse,
            cp_world_size=cp_world_size,
            cp_rank=cp_rank,
            cp_tot_seqused_k=cp_tot_seqused_k,
        )
    elif by_class(q, k, v, tail[_FLOATS]):
        out, lse = FlashAttnFunc.apply(
            *(q, k, v, softmax_scale, causal, qv, q_descale, k_descale, v_descale, window_size),
            *(attention_chunk, softcap, num_splits, pack_gqa, deterministic, sm_margin, True),
            *(sinks, cp_world_size, cp_rank, cp_tot_seqused_k),
        )
    else:
        left, right = window_sides(window_size)
        out, lse, _, _ = forward(
            q=q,
            k=k,
            v=v,
            qv=qv,
            q_descale=q_descale,
            k_descale=k_descale,
            v_descale=v_descale,
            softmax_scale=score_scale(softmax_scale, q, qv),
            causal=causal,
            window_size_left=left,
            window_size_right=right,
            attention_chunk=attention_chunk or 0,
            softcap=softcap,
            num_splits=num_splits,
            pack_gqa=pack_gqa,
            sm_margin=sm_margin,
            sinks=sinks,
            cp_world_size=cp_world_size,
            cp_rank=cp_rank,
            cp_tot_seqused_k=cp_tot_seqused_k,
        )
    return (out, lse) if return_attn_probs or return_softmax_lse else out


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
    *,
    sinks=None,
    s_aux=None,
    cp_world_size=1,
    cp_rank=0,
    cp_tot_seqused_k=None,
    return_softmax_lse=False,
    page_table=None,
    block_table=None,
    scheduler_metadata=None,
    out=None,
):
    """Attention over sequences of different lengths, packed without padding.

    q (t_q, h_q, d_qk) with cu_seqlens_q int32 (b + 1) and max_seqlen_q; k, v (t_k, h_k, d) with
    cu_seqlens_k and max_seqlen_k.  Either side may instead be dense with None for its cu_seqlens,
    and k, v may be pages (num_pages, page, h_k, d) with page_table, or block_table, int32
    (b, max_pages).  max_seqlen_* is an int or a 0-dim tensor, and may be too large.  seqused_q,
    seqused_k: int32 (b), live rows of each sequence.  out: given to be written.  The rest is
    flash_attn_func's.

    Returns out (t_q, h_q, d_v); with return_attn_probs or return_softmax_lse (out, lse), lse fp32
    (h_q, t_q).
    """
    if sinks is None:
        sinks = s_aux
    if page_table is None:
        page_table = block_table
    tail = _tail(
        qv,
        q_descale,
        k_descale,
        v_descale,
        sinks,
        cp_world_size,
        cp_rank,
        cp_tot_seqused_k,
        scheduler_metadata,
        pack_gqa,
        sm_margin,
    )
    floats = tail[_FLOATS]
    if out is not None:
        floats = (out, *floats)
        if isinstance(out, torch.Tensor) and not is_traced() and out.is_neg():
            raise ArgumentError("out: expected a plain tensor, got a negated view")
    if direct(q, k, v, floats):
        left, right = window_size if window_size is _WHOLE else window_sides(window_size)
        if type(max_seqlen_q) is not int:
            max_seqlen_q = length("max_seqlen_q", max_seqlen_q)
        if type(max_seqlen_k) is not int:
            max_seqlen_k = length("max_seqlen_k", max_seqlen_k)
        with_lse = return_attn_probs or return_softmax_lse
        if not (tail or with_lse) and out is None:
            try:
                return _plain(
                    q,
                    k,
                    v,
                    softmax_scale,
                    causal,
                    left,
                    right,
                    softcap,
                    attention_chunk or 0,
                    num_splits,
                    (
                        cu_seqlens_q,
                        cu_seqlens_k,
                        max_seqlen_q,
                        max_seqlen_k,
                        seqused_q,
                        seqused_k,
                        page_table,
                    ),
                )
            except ShapeError:
                pass  # strides that are copied below, or what is wrong all the same
        features = (
            unit_stride(cu_seqlens_q),
            unit_stride(cu_seqlens_k),
            max_seqlen_q,
            max_seqlen_k,
        )
        if tail or seqused_q is not None or seqused_k is not None or page_table is not None:
            features = (
                *features,
                unit_stride(seqused_q),
                unit_stride(seqused_k),
                unit_stride(page_table),
            )
            if tail:
                features = (*features, *_NO_APPEND, *tail)
        out, lse, _, _ = _attend(
            q if q.is_contiguous() else unit_stride(q),
            k if k.is_contiguous() else unit_stride(k),
            v if v.is_contiguous() else unit_stride_value(v),
            softmax_scale if qv is None else score_scale(softmax_scale, q, qv),
            causal,
            left,
            right,
            softcap,
            attention_chunk or 0,
            num_splits,
            out,
            with_lse,
            False,
            features,
        )
        if floats and floats[0] is out:
            written(out)
    elif on_musa(q):
        return musa.flash_attn_varlen_func(
            q=q,
            k=k,
            v=v,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            seqused_q=seqused_q,
            seqused_k=seqused_k,
            page_table=page_table,
            softmax_scale=softmax_scale,
            causal=causal,
            qv=qv,
            q_descale=q_descale,
            k_descale=k_descale,
            v_descale=v_descale,
            window_size=window_size,
            sinks=sinks,
            attention_chunk=attention_chunk,
            softcap=softcap,
            scheduler_metadata=scheduler_metadata,
            num_splits=num_splits,
            pack_gqa=pack_gqa,
            deterministic=deterministic,
            sm_margin=sm_margin,
            return_softmax_lse=return_attn_probs or return_softmax_lse,
            cp_world_size=cp_world_size,
            cp_rank=cp_rank,
            cp_tot_seqused_k=cp_tot_seqused_k,
            out=out,
        )
    else:
        max_seqlen_q = None if max_seqlen_q is None else whole("max_seqlen_q", max_seqlen_q)
        max_seqlen_k = None if max_seqlen_k is None else whole("max_seqlen_k", max_seqlen_k)
        if by_class(q, k, v, floats):
            out, lse = FlashAttnVarlenFunc.apply(
                *(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q),
                *(max_seqlen_k, softmax_scale, causal, qv, q_descale, k_descale, v_descale),
                *(window_size, attention_chunk, softcap, num_splits, pack_gqa, deterministic),
                *(sm_margin, True, sinks, cp_world_size, cp_rank, cp_tot_seqused_k, page_table),
                *(scheduler_metadata, out),
            )
        else:
            left, right = window_sides(window_size)
            out, lse, _, _ = forward(
                q=q,
                k=k,
                v=v,
                qv=qv,
                out_=out,
                cu_seqlens_q=cu_seqlens_q,
                cu_seqlens_k=cu_seqlens_k,
                seqused_q=seqused_q,
                seqused_k=seqused_k,
                max_seqlen_q=max_seqlen_q,
                max_seqlen_k=max_seqlen_k,
                page_table=page_table,
                q_descale=q_descale,
                k_descale=k_descale,
                v_descale=v_descale,
                softmax_scale=score_scale(softmax_scale, q, qv),
                causal=causal,
                window_size_left=left,
                window_size_right=right,
                attention_chunk=attention_chunk or 0,
                softcap=softcap,
                scheduler_metadata=scheduler_metadata,
                num_splits=num_splits,
                pack_gqa=pack_gqa,
                sm_margin=sm_margin,
                sinks=sinks,
                cp_world_size=cp_world_size,
                cp_rank=cp_rank,
                cp_tot_seqused_k=cp_tot_seqused_k,
            )
    return (out, lse) if return_attn_probs or return_softmax_lse else out


def flash_attn_qkvpacked_func(
    qkv,
    softmax_scale=None,
    causal=False,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    deterministic=False,
    num_heads_q=None,
    sm_margin=0,
    return_attn_probs=False,
):
    """flash_attn_func on one tensor: (b, s, 3, h, d), or (b, s, h_q + 2 h_k, d) with num_heads_q.

    Returns out (b, s, h_q, d); with return_attn_probs (out, lse).  Raises AssertionError when qkv
    does not split.
    """
    if by_class(qkv, qkv, qkv) and qkv.device.type != "musa":
        out, lse = FlashAttnQKVPackedFunc.apply(
            *(qkv, softmax_scale, causal, q_descale, k_descale, v_descale, window_size),
            *(attention_chunk, softcap, deterministic, num_heads_q, sm_margin, True),
        )
        return (out, lse) if return_attn_probs else out
    q, k, v = unpack_qkv(qkv, num_heads_q)
    return flash_attn_func(
        q,
        k,
        v,
        softmax_scale,
        causal,
        None,
        q_descale,
        k_descale,
        v_descale,
        window_size,
        attention_chunk,
        softcap,
        deterministic=deterministic,
        sm_margin=sm_margin,
        return_attn_probs=return_attn_probs,
    )


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    qv=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    page_table=None,
    cu_seqlens_q=None,
    cu_seqlens_k_new=None,
    max_seqlen_q=None,
    rotary_seqlens=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    softmax_scale=None,
    causal=False,
    window_size=_WHOLE,
    attention_chunk=0,
    softcap=0.0,
    rotary_interleaved=True,
    scheduler_metadata=None,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
    return_softmax_lse=False,
    *,
    sinks=None,
    s_aux=None,
    cp_world_size=1,
    cp_rank=0,
    cp_tot_seqused_k=None,
):
    """Attention over a KV cache, after appending new keys and values to it.

    q (b, s_q, h_q, d_qk), or packed with cu_seqlens_q and max_seqlen_q.  k_cache, v_cache
    (rows, s_k, h_k, d), or pages (num_pages, page, h_k, d) with page_table int32 (rows, max_pages);
    changed in place when k and v are given.  k, v (b, s_new, h_k, d), or packed with
    cu_seqlens_k_new: the new tokens.  cache_seqlens int or int32 (b): positions in use before them;
    None is the whole cache.  cache_batch_idx int32 (b): the row of each sequence.  cache_leftpad
    int32 (b): positions to skip.  rotary_cos, rotary_sin (>= positions, r / 2): turn the new keys
    and q, from rotary_seqlens, by default cache_seqlens, on.  The rest is flash_attn_func's.

    Returns out as q with d_v last; with return_softmax_lse (out, lse, out_accum, lse_accum), the
    last two empty unless the call was split.  Raises AssertionError when a cache's last stride is
    not 1.  There is no gradient.
    """
    if (
        k is None
        and v is None
        and qv is None
        and rotary_cos is None
        and rotary_sin is None
        and type(cache_seqlens) is _Tensor
        and cache_batch_idx is None
        and cache_leftpad is None
        and cu_seqlens_q is None
        and max_seqlen_q is None
        and q_descale is None
        and k_descale is None
        and v_descale is None
        and window_size is _WHOLE
        and scheduler_metadata is None
        and pack_gqa is None
        and not sm_margin
        and not return_softmax_lse
        and sinks is None
        and s_aux is None
        and cp_world_size == 1
        and cp_tot_seqused_k is None
        and direct(q, k_cache, v_cache)
    ):  # what serving calls once a token and layer, without a look at strides
        try:
            return _plain(
                q,
                k_cache,
                v_cache,
                softmax_scale,
                causal,
                -1,
                -1,
                softcap,
                attention_chunk or 0,
                num_splits,
                (None, None, -1, -1, None, cache_seqlens, page_table),
            )
        except ShapeError:
            pass  # strides that are copied below, or what is said better there
        except (RuntimeError, TypeError) as error:
            raise in_cache_names(error) from None
    try:
        assert k_cache.is_contiguous() or k_cache.stride(-1) == 1, "k_cache: expected last stride 1"
        assert v_cache.is_contiguous() or v_cache.stride(-1) == 1, "v_cache: expected last stride 1"
    except AttributeError:
        raise TypeError("k_cache, v_cache: expected tensors") from None
    if sinks is None:
        sinks = s_aux
    tail = _tail(
        qv,
        q_descale,
        k_descale,
        v_descale,
        sinks,
        cp_world_size,
        cp_rank,
        cp_tot_seqused_k,
        scheduler_metadata,
        pack_gqa,
        sm_margin,
    )
    floats = tail[_FLOATS]
    appends = (
        k is not None
        or v is not None
        or cache_batch_idx is not None
        or cache_leftpad is not None
        or rotary_cos is not None
        or rotary_sin is not None
    )
    if appends:
        floats = (k, v, rotary_cos, rotary_sin, *floats)
    straight = direct(q, k_cache, v_cache, floats)
    if not straight and on_musa(q):
        return musa.flash_attn_with_kvcache(
            q=q,
            k_cache=k_cache,
            v_cache=v_cache,
            k=k,
            v=v,
            qv=qv,
            rotary_cos=rotary_cos,
            rotary_sin=rotary_sin,
            cache_seqlens=cache_seqlens,
            cache_batch_idx=cache_batch_idx,
            cache_leftpad=cache_leftpad,
            page_table=page_table,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k_new=cu_seqlens_k_new,
            max_seqlen_q=max_seqlen_q,
            rotary_seqlens=rotary_seqlens,
            q_descale=q_descale,
            k_descale=k_descale,
            v_descale=v_descale,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            sinks=sinks,
            attention_chunk=attention_chunk,
            softcap=softcap,
            rotary_interleaved=rotary_interleaved,
            scheduler_metadata=scheduler_metadata,
            num_splits=num_splits,
            pack_gqa=pack_gqa,
            sm_margin=sm_margin,
            return_softmax_lse=return_softmax_lse,
            cp_world_size=cp_world_size,
            cp_rank=cp_rank,
            cp_tot_seqused_k=cp_tot_seqused_k,
        )
    left, right = window_size if window_size is _WHOLE else window_sides(window_size)
    if qv is not None:
        softmax_scale = score_scale(softmax_scale, q, qv)
    if isinstance(cache_seqlens, int):
        if not 0 <= cache_seqlens < 2**31:
            raise ArgumentError(f"cache_seqlens: expected in [0, 2^31), got {cache_seqlens}")
        batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        cache_seqlens = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=k_cache.device)
    if straight:
        features = (
            None if cu_seqlens_q is None else unit_stride(cu_seqlens_q),
            None,
            length("max_seqlen_q", max_seqlen_q),
            -1,
            None,
            None if cache_seqlens is None else unit_stride(cache_seqlens),
            None if page_table is None else unit_stride(page_table),
        )
        if appends:
            features = (
                *features,
                unit_stride(cache_batch_idx),
                unit_stride(cache_leftpad),
                unit_stride(k),
                unit_stride(v),
                unit_stride(cu_seqlens_k_new),
                unit_stride(rotary_cos),
                unit_stride(rotary_sin),
                unit_stride(rotary_seqlens),
                rotary_interleaved,
                *tail,
            )
        elif tail:
            features = (*features, *_NO_APPEND, *tail)
        try:
            result = _attend(
                q if q.is_contiguous() else unit_stride(q),
                k_cache,
                v_cache,
                softmax_scale,
                causal,
                left,
                right,
                softcap,
                attention_chunk or 0,
                num_splits,
                None,
                bool(return_softmax_lse),
                bool(return_softmax_lse),
                features,
            )
        except (RuntimeError, TypeError) as error:
            raise in_cache_names(error) from None
        if k is not None:
            written(k_cache, v_cache)
        if not return_softmax_lse:
            return result[0]
        out, lse, out_accum, lse_accum = result
        if out_accum is None:
            out_accum, lse_accum = lse.new_empty(0), lse.new_empty(0)
        return out, lse, out_accum, lse_accum

    run = functools.partial(
        forward,
        q=q,
        k=k_cache,
        v=v_cache,
        k_new=k,
        v_new=v,
        qv=qv,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k_new=cu_seqlens_k_new,
        seqused_k=cache_seqlens,
        max_seqlen_q=None if max_seqlen_q is None else whole("max_seqlen_q", max_seqlen_q),
        page_table=page_table,
        kv_batch_idx=cache_batch_idx,
        leftpad_k=cache_leftpad,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        seqlens_rotary=rotary_seqlens,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size_left=left,
        window_size_right=right,
        attention_chunk=attention_chunk or 0,
        softcap=softcap,
        rotary_interleaved=rotary_interleaved,
        scheduler_metadata=scheduler_metadata,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        sm_margin=sm_margin,
        sinks=sinks,
        cp_world_size=cp_world_size,
        cp_rank=cp_rank,
        cp_tot_seqused_k=cp_tot_seqused_k,
    )

    if by_class(q, k_cache, v_cache, floats):
        result = _C.ForwardOnly.apply("flash_attn_with_kvcache", run, q, k_cache, v_cache, *floats)
    else:
        result = run()
    return result if return_softmax_lse else result[0]


def flash_attn_combine(out_partial, lse_partial, out=None, out_dtype=None):
    """Merges partial attention results by their LSE.

    out_partial fp32 (splits, b, s, h, d_v), splits <= 256; lse_partial fp32 (splits, b, s, h).
    out (b, s, h, d_v) may be given; its dtype must be out_dtype: fp32, fp16 or bf16, None for fp32.

    Returns (out, lse), lse fp32 (b, s, h), a transposed view.  There is no gradient.
    """
    if on_musa(out_partial, "out_partial") or on_musa(lse_partial, "lse_partial"):
        raise NotBuiltError("flash_attn_combine: MATE has no such function for tensors on MUSA")
    if is_traced() or type(out_partial) is not torch.Tensor or modes():
        if out is not None:
            _eager.check_given(out, out_dtype)
        merged, lse = torch.ops.flash_attn_3._flash_attn_combine(out_partial, lse_partial, out_dtype)
        if out is None:
            return merged, lse
        if out.shape != merged.shape:
            raise ShapeError(f"out: expected shape {tuple(merged.shape)}, got {tuple(out.shape)}")
        return out.copy_(merged), lse
    if grad_on() and (out_partial.requires_grad or lse_partial.requires_grad):
        return _C.ForwardOnly.apply(
            "flash_attn_combine",
            lambda: _eager.combine(out_partial, lse_partial, out, out_dtype),
            out_partial,
            lse_partial,
        )
    return _eager.combine(out_partial, lse_partial, out, out_dtype)


def get_scheduler_metadata(
    batch_size,
    max_seqlen_q,
    max_seqlen_k,
    num_heads_q,
    num_heads_kv,
    headdim,
    cache_seqlens,
    qkv_dtype=torch.bfloat16,
    headdim_v=None,
    cu_seqlens_q=None,
    cu_seqlens_k_new=None,
    cache_leftpad=None,
    page_size=None,
    max_seqlen_k_new=0,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    has_softcap=False,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
):
    """A tensor that later calls of the same shapes accept as scheduler_metadata.

    int32, of upstream's length, on cache_seqlens's device (None: the current device).  libattn
    checks its length and never reads it: plans are made in each call.
    """
    if cache_seqlens is None:
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if cuda else "cpu"
    elif on_musa(cache_seqlens, "cache_seqlens"):
        return musa.get_scheduler_metadata(
            batch_size=batch_size,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            num_heads_q=num_heads_q,
            num_heads_kv=num_heads_kv,
            headdim=headdim,
            cache_seqlens=cache_seqlens,
            qkv_dtype=qkv_dtype,
            headdim_v=headdim_v,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k_new=cu_seqlens_k_new,
            cache_leftpad=cache_leftpad,
            page_size=page_size,
            max_seqlen_k_new=max_seqlen_k_new,
            causal=causal,
            window_size=window_size,
            attention_chunk=attention_chunk,
            has_softcap=has_softcap,
            num_splits=num_splits,
            pack_gqa=pack_gqa,
            sm_margin=sm_margin,
        )
    else:
        device = cache_seqlens.device
    left, right = window_sides(window_size)
    if is_traced() and cache_seqlens is not None:
        return torch.ops.flash_attn_3.get_scheduler_metadata(
            *(batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim),
            *(headdim_v or headdim, qkv_dtype, cache_seqlens, cu_seqlens_q, None),
            *(cu_seqlens_k_new, None, cache_leftpad, page_size, max_seqlen_k_new, causal),
            *(left, right, attention_chunk or 0, has_softcap, num_splits, pack_gqa, sm_margin),
        )
    _eager.check_scheduled(
        batch_size,
        {"num_heads_q": num_heads_q, "num_heads_kv": num_heads_kv},
        qkv_dtype,
        {
            "headdim_v": headdim_v,
            "page_size": page_size,
            "max_seqlen_k_new": max_seqlen_k_new,
            "sm_margin": sm_margin,
        },
        {
            "cache_seqlens": (cache_seqlens, 0),
            "cu_seqlens_q": (cu_seqlens_q, 1),
            "cu_seqlens_k_new": (cu_seqlens_k_new, 1),
            "cache_leftpad": (cache_leftpad, 0),
        },
    )
    return _eager.scheduler_metadata(
        batch_size,
        length("max_seqlen_q", max_seqlen_q),
        length("max_seqlen_k", max_seqlen_k),
        headdim,
        page_size,
        causal,
        left,
        right,
        attention_chunk,
        device,
        num_splits,
    )
