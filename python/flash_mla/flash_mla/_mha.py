# SPDX-License-Identifier: MIT
"""Dense multi-head attention of packed sequences, widths 192/128 and 128/128 in bf16: MLA's prefill."""

import torch
from libattn import DtypeError, NotBuiltError, ShapeError, mha

from . import _eager
from ._schedule import at_least, whole

WIDTHS = (192, 128), (128, 128)
OWN_NAMES = {  # of what libattn calls otherwise
    "cu_seqlens_q": "cu_seqlens_qo",
    "cu_seqlens_k": "cu_seqlens_kv",
    "max_seqlen_q": "max_seqlen_qo",
    "max_seqlen_k": "max_seqlen_kv",
}


def evenly(cu_seqlens, total, name):
    """Offsets of b sequences of the same length, for is_varlen=False: only the length of cu_seqlens
    counts."""
    b = cu_seqlens.shape[0] - 1
    if b < 1 or total % b:
        raise ShapeError(f"{name}: expected a batch that divides {total} tokens, got {b}")
    return torch.arange(0, total + 1, total // b, dtype=torch.int32, device=cu_seqlens.device)[: b + 1]


def forward(q, k, v, cu_qo, cu_kv, max_qo, max_kv, softmax_scale, causal, is_varlen):
    """(out (t_q, h, d_v), lse (t_q, h) stored head-major)."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        _eager.check_rank(name, x, 3)
        if x.dtype != torch.bfloat16:
            raise DtypeError(f"{name}: expected dtype torch.bfloat16, got {x.dtype}")
    widths = q.shape[-1], v.shape[-1]
    if widths not in WIDTHS:
        raise ShapeError(
            f"q, v: expected widths 192 and 128, or 128 and 128, got {widths[0]} and {widths[1]}"
        )
    for name, x in (("cu_seqlens_qo", cu_qo), ("cu_seqlens_kv", cu_kv)):
        _eager.check_rank(name, x, 1)
    if not is_varlen:
        cu_qo, cu_kv = evenly(cu_qo, len(q), "cu_seqlens_qo"), evenly(cu_kv, len(k), "cu_seqlens_kv")
        batch = cu_qo.shape[0] - 1
        max_qo, max_kv = len(q) // batch, len(k) // (cu_kv.shape[0] - 1)
    lengths = cu_qo, cu_kv, whole("max_seqlen_qo", max_qo), whole("max_seqlen_kv", max_kv)
    tensors = (_eager.plain(x) for x in (q, k, v))
    try:
        out, lse, _, _ = mha.attend(
            *tensors, softmax_scale, causal, -1, -1, 0.0, 0, 1, None, True, features=lengths
        )
    except (RuntimeError, TypeError) as error:
        raise _eager.renamed(error, OWN_NAMES) from None
    if k.shape[0] == 0:  # FlashAttention-3's +inf of a call without keys; here it is as any empty row
        lse.fill_(-torch.inf)
    return out, lse.T


class FlashAttnVarlenFunc(torch.autograd.Function):
    """flash_attn_varlen_func where a gradient is asked for: there is none."""

    @staticmethod
    def forward(ctx, q, k, v, *lengths_and_options):
        ctx.heads = q.shape[1], k.shape[1]
        return forward(q, k, v, *lengths_and_options)

    @staticmethod
    def backward(ctx, dout, dlse):
        h, h_k = ctx.heads
        if h != h_k:
            raise ValueError(f"backward: expected as many KV heads as query heads {h}, got {h_k}")
        raise NotBuiltError(
            "flash_mla backward: gradients of attention (mha_bwd) are not in this version of libattn; only "
            "the forward is"
        )


def attend(q, k, v, cu_qo, cu_kv, max_qo, max_kv, dropout_p, softmax_scale, causal, deterministic, is_varlen):
    assert dropout_p == 0.0, f"dropout_p: expected 0, got {dropout_p}"
    assert not deterministic, "deterministic: expected False"
    if not _eager.direct(q) and _eager.on_musa(q):
        raise NotBuiltError(
            "flash_attn_varlen_func: MATE's flashmla has no dense attention on MUSA; flash_attn_interface of "
            "flash_attn_3 has"
        )
    arguments = (q, k, v, cu_qo, cu_kv, max_qo, max_kv, softmax_scale, causal, is_varlen)
    if torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in (q, k, v)):
        return FlashAttnVarlenFunc.apply(*arguments)
    return forward(*arguments)


def unpack(name, x, times, head_dim_qk):
    """Views of the last axis: `times` of width head_dim_qk, then v, which is what is left."""
    _eager.check_rank(name, x, 3)
    d = at_least(1, "head_dim_qk", head_dim_qk)
    d_v = x.shape[-1] - times * d
    if (d, d_v) not in WIDTHS:
        raise ShapeError(
            f"{name}, head_dim_qk: expected widths 192 and 128, or 128 and 128, of q or k and v, got {d} and "
            f"{d_v} in {x.shape[-1]} values"
        )
    if x.dtype != torch.bfloat16:
        raise DtypeError(f"{name}: expected dtype torch.bfloat16, got {x.dtype}")
    return x.split([*(d,) * times, d_v], dim=-1)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_qo,
    cu_seqlens_kv,
    max_seqlen_qo,
    max_seqlen_kv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    deterministic=False,
    is_varlen=True,
):
    """Attention of packed sequences.

    q (t_q, h, d), k (t_k, h_k, d), v (t_k, h_k, d_v) bf16, h a multiple of h_k, d and d_v 192 and 128 or 128
    and 128.  cu_seqlens_qo, cu_seqlens_kv int32 (b + 1,); with is_varlen False each sequence has the same
    number of tokens.  `causal` is aligned bottom-right.  softmax_scale None is d^-1/2.

    Returns (out (t_q, h, d_v), lse fp32 (t_q, h) with strides (1, t_q)); a row without keys has 0 and -inf.
    The gradient raises NotImplementedError.
    """
    return attend(
        q,
        k,
        v,
        cu_seqlens_qo,
        cu_seqlens_kv,
        max_seqlen_qo,
        max_seqlen_kv,
        dropout_p,
        softmax_scale,
        causal,
        deterministic,
        is_varlen,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv,
    cu_seqlens,
    max_seqlen,
    head_dim_qk,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    deterministic=False,
    is_varlen=True,
):
    """flash_attn_varlen_func of qkv (t, h, d + d + d_v), whose last axis is q, k, v; d is head_dim_qk."""
    q, k, v = unpack("qkv", qkv, 2, head_dim_qk)
    return attend(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        deterministic,
        is_varlen,
    )


def flash_attn_varlen_kvpacked_func(
    q,
    kv,
    cu_seqlens_qo,
    cu_seqlens_kv,
    max_seqlen_qo,
    max_seqlen_kv,
    head_dim_qk,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    deterministic=False,
    is_varlen=True,
):
    """flash_attn_varlen_func of kv (t_k, h_k, d + d_v), whose last axis is k, v; d is head_dim_qk."""
    k, v = unpack("kv", kv, 1, head_dim_qk)
    return attend(
        q,
        k,
        v,
        cu_seqlens_qo,
        cu_seqlens_kv,
        max_seqlen_qo,
        max_seqlen_kv,
        dropout_p,
        softmax_scale,
        causal,
        deterministic,
        is_varlen,
    )
