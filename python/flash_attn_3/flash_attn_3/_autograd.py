# SPDX-License-Identifier: MIT
"""The autograd classes that upstream exports: the forward, and a backward that calls bwd."""

import torch
from libattn import DtypeError

from . import _eager, _ways
from ._eager import score_scale, window_sides


def unpack_qkv(qkv, num_heads_q):
    """q, k, v as views of (b, s, 3, h, d) or of (b, s, h_q + 2 h_k, d)."""
    if not hasattr(qkv, "dim"):
        raise DtypeError(f"qkv: expected a tensor, got {type(qkv).__name__}")
    if qkv.dim() == 5:
        assert qkv.shape[2] == 3, f"qkv: expected (b, s, 3, h, d), got {tuple(qkv.shape)}"
        return qkv.unbind(2)
    assert qkv.dim() == 4, f"qkv: expected 4 or 5 dimensions, got {qkv.dim()}"
    assert num_heads_q is not None, "num_heads_q: needed with a qkv of 4 dimensions"
    num_heads_k, odd = divmod(qkv.shape[2] - num_heads_q, 2)
    assert num_heads_k > 0 and odd == 0, f"qkv: expected {num_heads_q} + 2 h_k heads, got {qkv.shape[2]}"
    return qkv.split([num_heads_q, num_heads_k, num_heads_k], dim=2)


def _keep(ctx, q, k, v, out, lse, lengths, without, options):
    ctx.without, ctx.options = without, options
    ctx.save_for_backward(q, k, v, out, lse, *lengths)


def _gradients(ctx, dout):
    return _eager.gradients(_ways.backward, dout, ctx.saved_tensors, ctx.without, ctx.options)


def _without(qv, attention_chunk, sinks, cp_world_size, descales, page_table=None):
    return {
        "qv": qv is not None,
        "descales that require grad": any(getattr(x, "requires_grad", False) for x in descales),
        "attention_chunk": bool(attention_chunk),
        "sinks": sinks is not None,
        "context parallelism": cp_world_size > 1,
        "pages": page_table is not None,
    }


class FlashAttnFunc(torch.autograd.Function):
    """flash_attn_func with gradients; apply()'s arguments are upstream's, then ours."""

    @staticmethod
    def forward(
        ctx,
        q,
        k,
        v,
        softmax_scale,
        causal,
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
        return_softmax=False,
        sinks=None,
        cp_world_size=1,
        cp_rank=0,
        cp_tot_seqused_k=None,
    ):
        left, right = window_sides(window_size)
        scale = score_scale(softmax_scale, q, qv)
        out, lse, *_ = _ways.forward(
            q=q,
            k=k,
            v=v,
            qv=qv,
            q_descale=q_descale,
            k_descale=k_descale,
            v_descale=v_descale,
            softmax_scale=scale,
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
        descales = (q_descale, k_descale, v_descale)
        without = _without(qv, attention_chunk, sinks, cp_world_size, descales)
        options = (None, None, scale, causal, left, right, softcap, deterministic, sm_margin)
        _keep(ctx, q, k, v, out, lse, (None,) * 4, without, options)
        return (out, lse) if return_softmax else out

    @staticmethod
    def backward(ctx, dout, *unused):
        assert not ctx.without["attention_chunk"], "backward: attention_chunk is not supported"
        return (*_gradients(ctx, dout), *(None,) * 18)


class FlashAttnVarlenFunc(torch.autograd.Function):
    """flash_attn_varlen_func with gradients; apply()'s arguments are upstream's, then ours."""

    @staticmethod
    def forward(
        ctx,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_q,
        seqused_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        causal,
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
        return_softmax=False,
        sinks=None,
        cp_world_size=1,
        cp_rank=0,
        cp_tot_seqused_k=None,
        page_table=None,
        scheduler_metadata=None,
        out=None,
    ):
        left, right = window_sides(window_size)
        scale = score_scale(softmax_scale, q, qv)
        if out is not None:
            ctx.mark_dirty(out)
        out, lse, *_ = _ways.forward(
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
            softmax_scale=scale,
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
        descales = (q_descale, k_descale, v_descale)
        without = _without(qv, attention_chunk, sinks, cp_world_size, descales, page_table)
        lengths = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
        options = (max_seqlen_q, max_seqlen_k, scale, causal, left, right, softcap)
        _keep(ctx, q, k, v, out, lse, lengths, without, (*options, deterministic, sm_margin))
        return (out, lse) if return_softmax else out

    @staticmethod
    def backward(ctx, dout, *unused):
        assert not ctx.without["attention_chunk"], "backward: attention_chunk is not supported"
        return (*_gradients(ctx, dout), *(None,) * 27)


class FlashAttnQKVPackedFunc(torch.autograd.Function):
    """flash_attn_qkvpacked_func with gradients; apply()'s arguments are upstream's."""

    @staticmethod
    def forward(
        ctx,
        qkv,
        softmax_scale,
        causal,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        deterministic=False,
        num_heads_q=None,
        sm_margin=0,
        return_softmax=False,
    ):
        q, k, v = unpack_qkv(qkv, num_heads_q)
        left, right = window_sides(window_size)
        scale = softmax_scale
        out, lse, *_ = _ways.forward(
            q=q,
            k=k,
            v=v,
            q_descale=q_descale,
            k_descale=k_descale,
            v_descale=v_descale,
            softmax_scale=scale,
            causal=causal,
            window_size_left=left,
            window_size_right=right,
            attention_chunk=attention_chunk or 0,
            softcap=softcap,
            sm_margin=sm_margin,
        )
        ctx.packed_dims = qkv.dim()
        descales = (q_descale, k_descale, v_descale)
        without = _without(None, attention_chunk, None, 1, descales)
        options = (None, None, scale, causal, left, right, softcap, deterministic, sm_margin)
        _keep(ctx, q, k, v, out, lse, (None,) * 4, without, options)
        return (out, lse) if return_softmax else out

    @staticmethod
    def backward(ctx, dout, *unused):
        assert not ctx.without["attention_chunk"], "backward: attention_chunk is not supported"
        grads = _gradients(ctx, dout)
        join = torch.stack if ctx.packed_dims == 5 else torch.cat
        return (join(grads, dim=2), *(None,) * 12)
