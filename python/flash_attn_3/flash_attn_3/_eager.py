# SPDX-License-Identifier: MIT
"""The forward as upstream's Python layer calls it, on real tensors: conversions, then libattn.

The operators of _C and the functions of flash_attn_interface both rest on this file.  Shapes are
checked by libattn.
"""

import inspect
import operator
import re

import libattn
import torch
from libattn import ArgumentError, DtypeError, NotBuiltError, ShapeError, mha
from libattn.mha import fresh
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from . import __version__

LIBATTN = "0.1.0"
SPLITS_MAX = 256
QKV_DTYPES = torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float32

is_traced = torch.compiler.is_dynamo_compiling
modes = torch._C._len_torch_dispatch_stack
grad_on = torch.is_grad_enabled
_Tensor = torch.Tensor
_bfloat16 = torch.bfloat16
_float32 = torch.float32

if libattn.__version__ != LIBATTN:
    raise ImportError(
        f"flash_attn_3 {__version__} needs libattn {LIBATTN}, found {libattn.__version__}: "
        "install the two from one build"
    )


def direct(q, k, v, more=()):
    """Whether a call may go straight to libattn; `more` are its other floating-point tensors.

    A negated view may not: torch's dispatcher writes it out, DLPack loses the sign.  Of bf16 there is
    none, as no complex number has such parts.
    """
    if (
        is_traced()
        or type(q) is not _Tensor
        or type(k) is not _Tensor
        or type(v) is not _Tensor
        or not (q.is_cuda or q.is_cpu)
        or modes()
        or forward_ad._current_level >= 0
        or (q.dtype is not _bfloat16 and (q.is_neg() or k.is_neg() or v.is_neg()))
    ):
        return False
    grad = grad_on()
    if grad and (q.requires_grad or k.requires_grad or v.requires_grad):
        return False
    for x in more:  # noqa: SIM110 (a generator takes longer)
        if x is not None and isinstance(x, _Tensor) and ((grad and x.requires_grad) or x.is_neg()):
            return False
    return True


def unit_stride(x):
    """x, copied when its last stride is not 1 or its sign is only noted; None stays None, and so does
    what is no tensor, which libattn names."""
    if x is None:
        return None
    try:
        negated = x.is_neg()
    except AttributeError:
        return x
    if negated:
        x = x.resolve_neg()
    return x if x.is_contiguous() or x.stride(-1) == 1 else x.contiguous()


def unit_stride_value(v):
    """v, copied unless its width or its row dimension has stride 1 (the second is rejected below,
    as upstream's column-major V); what is no tensor stays, and libattn names it."""
    if not isinstance(v, torch.Tensor):
        return v
    if v.is_contiguous() or v.stride(-1) == 1 or (v.dim() >= 3 and v.stride(-3) == 1):
        return v
    return v.contiguous()


def score_scale(softmax_scale, q, qv):
    """softmax_scale, or for None with qv (d_qk + d_v)^-1/2; None without qv stays None, which is
    d_qk^-1/2 in the operators."""
    if softmax_scale is not None or qv is None:
        return softmax_scale
    try:
        return (q.shape[-1] + qv.shape[-1]) ** -0.5
    except (AttributeError, IndexError, ZeroDivisionError):
        return 1.0  # no such tensors; the call says so


def refuse_tangents(*tensors):
    """NotImplementedError when one of them is a dual tensor, whose tangent would be lost."""
    for x in tensors:
        if isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotBuiltError("flash_attn_3: no forward-mode derivative (torch.autograd.forward_ad)")


def written(*tensors):
    """Tells autograd that tensors were changed in place."""
    for x in tensors:
        if not x.is_inference():
            increment_version(x)


def whole(name, value):
    """value as an int: an int, or an integer tensor of one element; no fraction, no text."""
    if type(value) is int:
        return value  # Dynamo's, too, of which operator.index would make a constant
    try:
        return operator.index(value)
    except TypeError:
        raise DtypeError(f"{name}: expected an integer, got {value!r}") from None


def length(name, value):
    """max_seqlen as an int, -1 for None."""
    return -1 if value is None else whole(name, value)


def window_sides(window_size):
    """(left, right) from a pair, list or 1-D tensor of two, or None; None sides are unlimited."""
    if window_size is None:
        return -1, -1
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise ArgumentError(f"window_size: expected (left, right) or None, got {window_size!r}") from None
    if type(left) is not int:
        left = -1 if left is None else whole("window_size[0]", left)
    if type(right) is not int:
        right = -1 if right is None else whole("window_size[1]", right)
    return left, right


CACHE_NAMES = {
    "k": "k_cache",
    "v": "v_cache",
    "k_new": "k",
    "v_new": "v",
    "seqused_k": "cache_seqlens",
    "kv_batch_idx": "cache_batch_idx",
    "leftpad_k": "cache_leftpad",
    "seqlens_rotary": "rotary_seqlens",
}
CACHE_NAME = re.compile(rf"\b({'|'.join(CACHE_NAMES)})\b")


def in_cache_names(error):
    """An error of libattn in the words of flash_attn_with_kvcache, where k and v are the new tokens."""
    return type(error)(CACHE_NAME.sub(lambda name: CACHE_NAMES[name[0]], str(error)))


def raw_forward(
    q,
    k,
    v,
    k_new=None,
    v_new=None,
    qv=None,
    out=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    cu_seqlens_k_new=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    page_table=None,
    kv_batch_idx=None,
    leftpad_k=None,
    rotary_cos=None,
    rotary_sin=None,
    seqlens_rotary=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    softmax_scale=None,
    is_causal=False,
    window_size_left=-1,
    window_size_right=-1,
    attention_chunk=0,
    softcap=0.0,
    is_rotary_interleaved=False,
    scheduler_metadata=None,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
    sinks=None,
    cp_world_size=1,
    cp_rank=0,
    cp_tot_seqused_k=None,
):
    """flash_attn_3::fwd: (out, lse, out_accum, lse_accum); the pair is empty without splits."""
    given = out
    if forward_ad._current_level >= 0:
        refuse_tangents(
            *(q, k, v, k_new, v_new, qv, rotary_cos, rotary_sin, q_descale, k_descale, v_descale, sinks)
        )
    features = ()
    if (
        kv_batch_idx is not None
        or leftpad_k is not None
        or k_new is not None
        or v_new is not None
        or cu_seqlens_k_new is not None
        or rotary_cos is not None
        or rotary_sin is not None
        or seqlens_rotary is not None
        or qv is not None
        or q_descale is not None
        or k_descale is not None
        or v_descale is not None
        or sinks is not None
        or cp_world_size != 1
        or cp_tot_seqused_k is not None
        or scheduler_metadata is not None
        or pack_gqa is not None
        or sm_margin
    ):
        features = (
            kv_batch_idx,
            leftpad_k,
            k_new,
            v_new,
            cu_seqlens_k_new,
            rotary_cos,
            rotary_sin,
            seqlens_rotary,
            is_rotary_interleaved,
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
    if (
        features
        or cu_seqlens_q is not None
        or cu_seqlens_k is not None
        or seqused_q is not None
        or seqused_k is not None
        or page_table is not None
    ):
        features = (
            cu_seqlens_q,
            cu_seqlens_k,
            length("max_seqlen_q", max_seqlen_q),
            length("max_seqlen_k", max_seqlen_k),
            seqused_q,
            seqused_k,
            page_table,
            *features,
        )
    out, lse, out_accum, lse_accum = mha.attend(
        q,
        k,
        v,
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        softcap,
        attention_chunk or 0,
        num_splits,
        out,
        True,
        True,
        features,
    )
    if k_new is not None:
        written(k, v)
    if given is not None:
        written(given)
    if out_accum is None:
        out_accum = fresh(q, (0,), (1,), _float32)
        lse_accum = fresh(q, (0,), (1,), _float32)
    return out, lse, out_accum, lse_accum


def forward(
    q,
    k,
    v,
    k_new=None,
    v_new=None,
    qv=None,
    out_=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    cu_seqlens_k_new=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    page_table=None,
    kv_batch_idx=None,
    leftpad_k=None,
    rotary_cos=None,
    rotary_sin=None,
    seqlens_rotary=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    softmax_scale=None,
    causal=False,
    window_size_left=-1,
    window_size_right=-1,
    attention_chunk=0,
    softcap=0.0,
    rotary_interleaved=True,
    scheduler_metadata=None,
    num_splits=1,
    pack_gqa=None,
    sm_margin=0,
    sinks=None,
    cp_world_size=1,
    cp_rank=0,
    cp_tot_seqused_k=None,
):
    """_flash_attn_forward: raw_forward after the copies that upstream's Python layer makes."""
    return raw_forward(
        unit_stride(q),
        unit_stride(k) if k_new is None else k,  # a cache is changed in place, never copied
        unit_stride_value(v) if k_new is None else v,
        unit_stride(k_new),
        unit_stride(v_new),
        qv,
        out_,
        unit_stride(cu_seqlens_q),
        unit_stride(cu_seqlens_k),
        unit_stride(cu_seqlens_k_new),
        unit_stride(seqused_q),
        unit_stride(seqused_k),
        max_seqlen_q,
        max_seqlen_k,
        unit_stride(page_table),
        unit_stride(kv_batch_idx),
        unit_stride(leftpad_k),
        unit_stride(rotary_cos),
        unit_stride(rotary_sin),
        unit_stride(seqlens_rotary),
        q_descale,
        k_descale,
        v_descale,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        attention_chunk,
        softcap,
        rotary_interleaved,
        scheduler_metadata,
        num_splits,
        pack_gqa,
        sm_margin,
        sinks,
        cp_world_size,
        cp_rank,
        cp_tot_seqused_k,
    )


# What _flash_attn_forward's operators take, in the order of their schemas; the last four are ours.
ARGUMENTS = tuple(inspect.signature(forward).parameters)


def raw_backward(dout, q, k, v, out, softmax_lse, dq=None, dk=None, dv=None, *options):
    """flash_attn_3::bwd: dq, dk, dv, softmax_d and four private tensors."""
    raise NotBuiltError(
        "flash_attn_3 backward: gradients of attention (mha_bwd) are not in this version of "
        "libattn; only the forward is"
    )


def gradients(backward, dout, saved, without, options):
    """(dq, dk, dv) by calling `backward`, which is _flash_attn_backward or its operator.

    saved: q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k.
    without: {feature: whether the forward used it} for what has no gradient at all.
    options: max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_left, window_right, softcap,
    deterministic, sm_margin.
    """
    used = [name for name, is_used in without.items() if is_used]
    if used:
        raise NotImplementedError(f"flash_attn_3 backward: no gradient with {', '.join(used)}")
    q, k, v, out, lse, *lengths = saved
    max_seqlen_q, max_seqlen_k, *rest = options
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    backward(dout, q, k, v, out, lse, *lengths, max_seqlen_q, max_seqlen_k, *grads, *rest)
    return grads


def check_out_dtype(out_dtype):
    """Refuses what flash_attn_combine cannot write."""
    if out_dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise DtypeError(f"out_dtype: expected fp32, fp16, bf16 or None, got {out_dtype!r}")


def check_given(out, out_dtype):
    """Refuses an output for flash_attn_combine that is not of out_dtype, by default fp32."""
    if not isinstance(out, torch.Tensor):
        raise DtypeError(f"out: expected a tensor, got {type(out).__name__}")
    if out.dtype != (out_dtype or torch.float32):
        raise DtypeError(f"out: expected dtype {out_dtype or torch.float32} (out_dtype), got {out.dtype}")
    if out.is_neg():
        raise ArgumentError("out: expected a plain tensor, got a negated view")


def combine(out_partial, lse_partial, out=None, out_dtype=None):
    """flash_attn_3::fwd_combine: out [b, s, h, d_v] and lse [b, s, h], a view of [b, h, s]."""
    check_out_dtype(out_dtype)
    if forward_ad._current_level >= 0:
        refuse_tangents(out_partial, lse_partial)
    if out_partial.dim() != 5:
        raise ShapeError(f"out_partial: expected [splits, b, s, h, d_v], got {out_partial.dim()} dimensions")
    _, b, s, h, d_v = out_partial.shape
    lse = torch.empty((b, h, s), dtype=torch.float32, device=out_partial.device).transpose(1, 2)
    partial = out_partial.resolve_neg(), lse_partial.resolve_neg()
    if out is None:
        out = torch.empty((b, s, h, d_v), dtype=out_dtype or torch.float32, device=out_partial.device)
        return mha.split_combine(*partial, out, lse)
    check_given(out, out_dtype)
    mha.split_combine(*partial, out, lse)
    written(out)
    return out, lse


def check_scheduled(batch_size, heads, qkv_dtype, sizes, index):
    """What get_scheduler_metadata is told of later calls, and its result does not depend on.

    heads: {name: h_q, name: h_k}.  sizes: {name: an int or None}.  index: {name: (tensor or None, its
    entries beyond batch_size)}.
    """
    sizes = {name: value for name, value in sizes.items() if value is not None}
    for name, value in ({"batch_size": batch_size} | heads | sizes).items():
        whole(name, value)
    (name, h_q), (name_k, h_k) = heads.items()
    if h_k < 1 or h_q % h_k:
        raise ArgumentError(f"{name}: expected a multiple of {name_k} {h_k}, got {h_q}")
    if qkv_dtype not in QKV_DTYPES:
        raise DtypeError(f"qkv_dtype: expected bf16, fp16, fp8 e4m3fn or fp32, got {qkv_dtype!r}")
    for name, (x, more) in index.items():
        if x is None:
            continue
        if not isinstance(x, torch.Tensor) or x.dtype != torch.int32:
            raise DtypeError(
                f"{name}: expected a tensor of int32, got {getattr(x, 'dtype', type(x).__name__)}"
            )
        if x.shape != (batch_size + more,):
            raise ShapeError(
                f"{name}: expected ({batch_size + more},) for the batch_size, got {tuple(x.shape)}"
            )


def scheduler_metadata(
    batch_size,
    max_seqlen_q,
    max_seqlen_k,
    headdim,
    page_size,
    causal,
    window_left,
    window_right,
    attention_chunk,
    device,
    num_splits=0,
):
    """int32 tensor of upstream's length; its contents are private and mean nothing to libattn."""
    if whole("num_splits", num_splits) > SPLITS_MAX:
        raise ArgumentError(f"num_splits: expected at most {SPLITS_MAX}, got {num_splits}")
    n = mha.mha_metadata_length(
        batch_size,
        max_seqlen_q,
        max_seqlen_k,
        headdim,
        page_size is not None,
        causal,
        window_left,
        window_right,
        attention_chunk or 0,
    )
    return torch.zeros(n, dtype=torch.int32, device=device)
