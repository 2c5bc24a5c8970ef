# SPDX-License-Identifier: MIT
"""mha_fwd and split_combine on torch tensors: outputs are allocated here, checked and filled below.

Shapes are those of attn.h: b batch, s_q s_k lengths, t_q t_k packed totals, h_q h_k heads, d_qk d_v
widths.  Every argument is checked by the C library, which raises the classes of libattn.errors.
One call is one trip through the FFI, except when the caller asks for partial results that a plan
turns out to have.
"""

from typing import NamedTuple

import torch

from . import _native

_threads = torch.get_num_threads
_float32 = torch.float32
_float8 = torch.float8_e4m3fn
_bfloat16 = torch.bfloat16

try:  # a third of torch.empty's price; what torch's own compiled code allocates with
    from torch._C._dynamo.guards import _empty_strided_cpu
except ImportError:  # pragma: no cover

    def _empty_strided_cpu(shape, strides, dtype):
        return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")


def _outputs(q, v):
    """out and lse for q [b, s_q, h_q, d_qk] or [t_q, h_q, d_qk] and v [..., d_v].

    out has q's shape with d_v last, q's dtype or bf16 for fp8; lse is fp32 [b, h_q, s_q] or
    [h_q, t_q]; both contiguous.  None twice when q or v is not such a tensor.
    """
    try:
        shape = q.shape
        d_v = v.shape[-1]
        dtype = q.dtype
        if dtype is _float8:
            dtype = _bfloat16
        if len(shape) == 4:
            b, s_q, h_q, _ = shape
            row = h_q * d_v
            head = (b, h_q, s_q)
            if q.is_cpu:
                return (
                    _empty_strided_cpu((b, s_q, h_q, d_v), (s_q * row, row, d_v, 1), dtype),
                    _empty_strided_cpu(head, (h_q * s_q, s_q, 1), _float32),
                )
        else:
            t_q, h_q, _ = shape
            head = (h_q, t_q)
            if q.is_cpu:
                return (
                    _empty_strided_cpu((t_q, h_q, d_v), (h_q * d_v, d_v, 1), dtype),
                    _empty_strided_cpu(head, (t_q, 1), _float32),
                )
        device = q.device
        return (
            torch.empty((*shape[:-1], d_v), dtype=dtype, device=device),
            torch.empty(head, dtype=_float32, device=device),
        )
    except (AttributeError, IndexError, ValueError):
        return None, None


def mha_fwd(
    q,
    k,
    v,
    softmax_scale,
    causal=False,
    window_left=-1,
    window_right=-1,
    softcap=0.0,
    attention_chunk=0,
    num_splits=1,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=-1,
    max_seqlen_k=-1,
    seqused_q=None,
    seqused_k=None,
    page_table=None,
    kv_batch_idx=None,
    leftpad_k=None,
    k_new=None,
    v_new=None,
    cu_seqlens_k_new=None,
    rotary_cos=None,
    rotary_sin=None,
    seqlens_rotary=None,
    rotary_interleaved=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    sinks=None,
    cp_world_size=1,
    cp_rank=0,
    cp_tot_seqused_k=None,
    scheduler_metadata=None,
    pack_gqa=-1,
    sm_margin=0,
    out=None,
    want_accum=False,
    use=_native.mha_fwd,
):
    """Attention forward; arguments, shapes and semantics are attn_mha_fwd_args's in attn.h.

    A negative window side is unlimited, softcap <= 0 and attention_chunk <= 0 are off, num_splits
    <= 0 lets the library choose, pack_gqa is -1, 0 or 1.  `out` may be given, with any strides but
    a last one of 1.  `use` is the native function that gets the arguments.

    Returns (out, lse), and with want_accum (out, lse, out_accum, lse_accum), where the last two
    are the fp32 partial results [splits, b, h_q, s_q(, d_v)] or [splits, h_q, t_q(, d_v)], or None
    when the call was not split.

    Raises ShapeError, DtypeError, ArgumentError or DeviceError for arguments that do not fit,
    NotBuiltError for what this build has no kernel for, TypeError for a value of the wrong type.
    """
    new_out, lse = _outputs(q, v)
    if out is None:
        out = new_out
    args = (
        q,
        k,
        v,
        k_new,
        v_new,
        qv,
        out,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        cu_seqlens_k_new,
        seqused_q,
        seqused_k,
        page_table,
        kv_batch_idx,
        leftpad_k,
        rotary_cos,
        rotary_sin,
        seqlens_rotary,
        q_descale,
        k_descale,
        v_descale,
        sinks,
        cp_tot_seqused_k,
        scheduler_metadata,
        softmax_scale,
        softcap,
        max_seqlen_q,
        max_seqlen_k,
        window_left,
        window_right,
        attention_chunk,
        causal,
        rotary_interleaved,
        num_splits,
        pack_gqa,
        sm_margin,
        cp_world_size,
        cp_rank,
        _threads(),
        None,
        None,
        want_accum,
    )
    splits = use(*args)
    if not want_accum:
        return out, lse
    if not splits:
        return out, lse, None, None
    lse_accum = lse.new_empty((splits, *lse.shape))
    out_accum = lse.new_empty((*lse_accum.shape, v.shape[-1]))
    use(*args[:-3], out_accum, lse_accum, False)
    return out, lse, out_accum, lse_accum


def mha_fwd_ref(*args, **kwargs):
    """mha_fwd by the scalar oracle with fp64 sums, CPU tensors only: slow, for tests."""
    return mha_fwd(*args, **kwargs, use=_native.mha_fwd_ref)


class MhaFwdPlan(NamedTuple):
    """What mha_fwd would do: the kernel's name, the number of key ranges computed apart, bytes of
    workspace, keys of one range."""

    kernel: str
    splits: int
    workspace_bytes: int
    piece: int


def mha_fwd_plan(*args, **kwargs):
    """The MhaFwdPlan for mha_fwd's arguments; checks them, computes nothing."""
    text = ""

    def plan(*native_args):
        nonlocal text
        text = _native.mha_fwd_plan(*native_args)

    mha_fwd(*args, **kwargs, use=plan)
    kernel, *numbers = text.split(" ")
    return MhaFwdPlan(kernel, *map(int, numbers))


def split_combine(out_partial, lse_partial, out, lse):
    """Merges partial results by their LSE into out and lse; returns both.

    out_partial fp32 [splits, b, s, h, d_v] with a last stride of 1, lse_partial fp32
    [splits, b, s, h], out fp32, fp16 or bf16 [b, s, h, d_v], lse fp32 [b, s, h]; strides are free
    but for those named.  A row whose partials are all -inf gives out 0 and lse -inf.
    """
    _native.split_combine(out_partial, lse_partial, out, lse, _threads())
    return out, lse


def mha_metadata_length(
    b, s_q, s_k, d_qk, paged=False, causal=False, window_left=-1, window_right=-1, attention_chunk=0
):
    """Entries of upstream's scheduler metadata for these static sizes and this mask."""
    return _native.mha_metadata_length(
        b, s_q, s_k, d_qk, paged, causal, window_left, window_right, attention_chunk
    )
