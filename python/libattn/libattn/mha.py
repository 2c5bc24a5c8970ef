# SPDX-License-Identifier: MIT
"""mha_fwd and split_combine on torch tensors: outputs are allocated here, checked and filled below.

Shapes are those of attn.h: b batch, s_q s_k lengths, t_q t_k packed totals, h_q h_k heads, d_qk d_v
widths.  Every argument is checked by the C library, which raises the classes of libattn.errors;
no function here records a gradient.  One call is one trip through the FFI, except when the caller
asks for partial results that a plan turns out to have.
"""

from typing import NamedTuple

import torch

from . import _native
from ._plain import named, refuse_negated

_threads = torch.get_num_threads
_mha_fwd = _native.mha_fwd
_float32 = torch.float32
_float8 = torch.float8_e4m3fn
_bfloat16 = torch.bfloat16

try:  # a third of torch.empty's price; what torch's own compiled code allocates with
    from torch._C._dynamo.guards import _empty_strided_cpu, _empty_strided_cuda
except ImportError:  # pragma: no cover

    def _empty_strided_cpu(shape, strides, dtype):
        return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")

    def _empty_strided_cuda(shape, strides, dtype):
        return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")


_current_device = getattr(torch._C, "_cuda_getDevice", lambda: -2)  # of CUDA; an index

LARGE = 2 << 20  # elements of a fresh out, of one sequence where they lie apart

FEATURES = {
    "cu_seqlens_q": None,
    "cu_seqlens_k": None,
    "max_seqlen_q": -1,
    "max_seqlen_k": -1,
    "seqused_q": None,
    "seqused_k": None,
    "page_table": None,
    "kv_batch_idx": None,
    "leftpad_k": None,
    "k_new": None,
    "v_new": None,
    "cu_seqlens_k_new": None,
    "rotary_cos": None,
    "rotary_sin": None,
    "seqlens_rotary": None,
    "rotary_interleaved": False,
    "qv": None,
    "q_descale": None,
    "k_descale": None,
    "v_descale": None,
    "sinks": None,
    "cp_world_size": 1,
    "cp_rank": 0,
    "cp_tot_seqused_k": None,
    "scheduler_metadata": None,
    "pack_gqa": -1,
    "sm_margin": 0,
}


_one_gpu = None  # whether CUDA has a single device; known once a tensor on it was seen


def on_current_gpu(q):
    """Whether q, on CUDA, lies on the current device."""
    global _one_gpu
    if _one_gpu is None:
        _one_gpu = torch.cuda.device_count() == 1
    return _one_gpu or q.get_device() == _current_device()


def fresh(q, shape, strides, dtype):
    """A contiguous result of that shape beside q; of q's dtype fp8 it is bf16."""
    if dtype is _float8:
        dtype = _bfloat16
    if q.is_cuda:
        if _one_gpu or on_current_gpu(q):
            return _empty_strided_cuda(shape, strides, dtype)
    elif q.is_cpu:
        return _empty_strided_cpu(shape, strides, dtype)
    return q.new_empty(shape, dtype=dtype)


def fresh_out(q, shape, v):
    """The out of q, which has that shape, and v.  ValueError for a shape that q cannot have."""
    d_v = v.shape[-1]
    if len(shape) == 4:
        b, s_q, h_q, _ = shape
        row = h_q * d_v
        out = fresh(q, (b, s_q, h_q, d_v), (s_q * row, row, d_v, 1), q.dtype)
    else:
        s_q, h_q, _ = shape
        row = h_q * d_v
        out = fresh(q, (s_q, h_q, d_v), (row, d_v, 1), q.dtype)
    if s_q * row > LARGE and out.is_cpu:
        _native.ask_huge_pages(out.data_ptr(), out.nbytes)
    return out


def by_name(args, features):
    """The tensors of a call of the native function, {name: tensor or None}."""
    return dict(zip(("q", "k", "v", "out", "lse"), args)) | dict(zip(FEATURES, features))


def attend(
    q,
    k,
    v,
    softmax_scale,
    causal,
    window_left,
    window_right,
    softcap,
    attention_chunk,
    num_splits,
    out,
    want_lse,
    want_accum=False,
    features=(),
    use=_native.mha_fwd,
):
    """mha_fwd for callers in a hurry: all by position, back come (out, lse, out_accum, lse_accum).

    `features` are values in the order of FEATURES, up to the last one in use.  The lse is None
    unless wanted, the partial results also when the call was not split.  `use` is the native
    function that gets the arguments.
    """
    lse = None
    try:
        shape = q.shape
        if len(shape) == 4:
            b, s_q, h_q, d_qk = shape
            heads, steps = (b, h_q, s_q), (h_q * s_q, s_q, 1)
        else:
            s_q, h_q, d_qk = shape
            heads, steps = (h_q, s_q), (s_q, 1)
        if softmax_scale is None:
            softmax_scale = d_qk**-0.5 if d_qk else 1.0
        if out is None:
            out = fresh_out(q, shape, v)
        if want_lse:
            lse = fresh(q, heads, steps, _float32)
    except (AttributeError, IndexError, ValueError):
        softmax_scale = 1.0  # q or v is no such tensor; the native function says so

    args = (
        q,
        k,
        v,
        out,
        lse,
        softmax_scale,
        causal,
        window_left,
        window_right,
        softcap,
        attention_chunk,
        num_splits,
        _threads(),
        want_accum,
    )
    try:
        splits = use(*args, *features) if features else use(*args)
    except RuntimeError as error:
        raise named(error, by_name(args, features)) from None
    if not splits:
        return out, lse, None, None
    absent = tuple(FEATURES.values())[len(features) :]
    lse_accum = lse.new_empty((splits, *heads))
    out_accum = lse.new_empty((splits, *heads, v.shape[-1]))
    use(*args[:-1], False, *features, *absent, out_accum, lse_accum)
    return out, lse, out_accum, lse_accum


def plain(
    q,
    k,
    v,
    softmax_scale,
    causal,
    window_left,
    window_right,
    softcap,
    attention_chunk,
    num_splits,
    features=(),
):
    """attend's out and nothing else, for what is called once a token and layer."""
    out = None
    try:
        shape = q.shape
        out = fresh_out(q, shape, v)
        if softmax_scale is None:
            softmax_scale = shape[-1] ** -0.5
    except (ArithmeticError, IndexError, ValueError):
        softmax_scale = 1.0  # no width, or the native function says what is wrong
    args = (
        q,
        k,
        v,
        out,
        None,
        softmax_scale,
        causal,
        window_left,
        window_right,
        softcap,
        attention_chunk,
        num_splits,
        _threads(),
        False,
    )
    try:
        _mha_fwd(*args, *features) if features else _mha_fwd(*args)
    except RuntimeError as error:
        raise named(error, by_name(args, features)) from None
    return out


def mha_fwd(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    window_left=-1,
    window_right=-1,
    softcap=0.0,
    attention_chunk=0,
    num_splits=1,
    out=None,
    want_accum=False,
    use=_native.mha_fwd,
    **features,
):
    """Attention forward; arguments, shapes and semantics are attn_mha_fwd_args's in attn.h.

    A negative window side is unlimited, softcap <= 0 and attention_chunk <= 0 are off, num_splits
    <= 0 lets the library choose, softmax_scale None is d_qk^-1/2.  `features` are those of FEATURES
    by name, with their defaults there; pack_gqa is -1, 0 or 1.  `out` may be given; its last stride
    is 1, the others are free.

    Returns (out, lse), and with want_accum (out, lse, out_accum, lse_accum), where the last two
    are the fp32 partial results [splits, b, h_q, s_q(, d_v)] or [splits, h_q, t_q(, d_v)], or None
    when the call was not split.  out has q's shape with d_v last and q's dtype, or bf16 for fp8; lse
    is fp32 [b, h_q, s_q] or [h_q, t_q].

    Raises ShapeError, DtypeError, ArgumentError or DeviceError for arguments that do not fit,
    NotBuiltError for what this build has no kernel for, TypeError for a value of the wrong type.
    """
    refuse_negated(q=q, k=k, v=v, out=out, **features)
    values = []
    if features:
        unknown = features.keys() - FEATURES.keys()
        if unknown:
            raise TypeError(f"mha_fwd() got an unexpected argument {min(unknown)!r}")
        values = [features.get(name, absent) for name, absent in FEATURES.items()]
    result = attend(
        q,
        k,
        v,
        softmax_scale,
        causal,
        window_left,
        window_right,
        softcap,
        attention_chunk,
        num_splits,
        out,
        True,
        want_accum,
        values,
        use,
    )
    return result if want_accum else result[:2]


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
    refuse_negated(out_partial=out_partial, lse_partial=lse_partial, out=out, lse=lse)
    try:
        _native.split_combine(out_partial, lse_partial, out, lse, _threads())
    except RuntimeError as error:
        raise named(error, locals()) from None
    return out, lse


def mha_metadata_length(
    b, s_q, s_k, d_qk, paged=False, causal=False, window_left=-1, window_right=-1, attention_chunk=0
):
    """Entries of upstream's scheduler metadata for these static sizes and this mask."""
    return _native.mha_metadata_length(
        b, s_q, s_k, d_qk, paged, causal, window_left, window_right, attention_chunk
    )
