# SPDX-License-Identifier: MIT
"""Importing this module registers torch.ops.flash_attn_3.*, as upstream's extension module does.

Each operator has its kernel for CPU and CUDA, and a fake for tracing.  fwd and bwd have upstream's
schemas (bwd the one with 8 returns); _flash_attn_forward and _flash_attn_backward are upstream's
custom operators.  Three are ours, for traced calls that those do not cover: _flash_attn_forward_ext
adds sinks and context parallelism, _flash_attn_append says that it changes the cache, and
_flash_attn_combine returns no argument, which fwd_combine's schema promises and torch.compile
refuses.
"""

import torch
from libattn import DeviceError, DtypeError, ShapeError

from . import _eager

_QKV_OPTIONS = (
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, {int}? max_seqlen_q=None, "
    "{int}? max_seqlen_k=None, Tensor? page_table=None, Tensor? kv_batch_idx=None, "
    "Tensor? leftpad_k=None, Tensor? rotary_cos=None, Tensor? rotary_sin=None, "
    "Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, "
    "Tensor? v_descale=None, float? softmax_scale=None, bool {causal}=False, "
    "{int} window_size_left=-1, {int} window_size_right=-1, {int} attention_chunk=0, "
    "float softcap=0.0, bool {interleaved}, Tensor? scheduler_metadata=None, "
    "{int} num_splits={splits}, bool? pack_gqa=None, {int} sm_margin=0"
)
_CUSTOM = "(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? v_new=None, " + (
    "Tensor? qv=None, Tensor? out_=None, "
    + _QKV_OPTIONS.format(int="SymInt", causal="causal", interleaved="rotary_interleaved=True", splits="1")
)
_EXTENSION = (
    ", Tensor? sinks=None, SymInt cp_world_size=1, SymInt cp_rank=0, "
    "Tensor? cp_tot_seqused_k=None) -> (Tensor, Tensor, Tensor, Tensor)"
)
SCHEMAS = {
    "fwd": "(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, "
    "Tensor? q_v=None, Tensor(out!)? out=None, "
    + _QKV_OPTIONS.format(
        int="int", causal="is_causal", interleaved="is_rotary_interleaved=False", splits="0"
    )
    + ") -> (Tensor(out!), Tensor, Tensor, Tensor)",
    "bwd": "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor(dq!)? dq=None, Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, "
    "Tensor? cu_seqlens_k=None, Tensor? seqused_q=None, Tensor? seqused_k=None, "
    "int? max_seqlen_q=None, int? max_seqlen_k=None, float? softmax_scale=None, "
    "bool is_causal=False, int window_size_left=-1, int window_size_right=-1, float softcap=0.0, "
    "bool deterministic=False, int sm_margin=0) "
    "-> (Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, Tensor, Tensor, Tensor)",
    "fwd_combine": "(Tensor out_partial, Tensor lse_partial, Tensor(out!)? out=None, "
    "ScalarType? out_dtype=None) -> (Tensor(out!), Tensor)",
    "get_scheduler_metadata": "(int batch_size, int max_seqlen_q, int max_seqlen_k, int num_heads, "
    "int num_heads_k, int headdim, int headdim_v, ScalarType qkv_dtype, Tensor seqused_k, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
    "Tensor? seqused_q=None, Tensor? leftpad_k=None, int? page_size=None, "
    "int max_seqlen_k_new=0, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, bool has_softcap=False, int num_splits=0, "
    "bool? pack_gqa=None, int sm_margin=0) -> Tensor",
    "_flash_attn_forward": _CUSTOM + ") -> (Tensor, Tensor, Tensor, Tensor)",
    "_flash_attn_forward_ext": _CUSTOM + _EXTENSION,
    "_flash_attn_append": _CUSTOM.replace("Tensor k, Tensor v", "Tensor(k!) k, Tensor(v!) v") + _EXTENSION,
    "_flash_attn_combine": "(Tensor out_partial, Tensor lse_partial, ScalarType? out_dtype=None) "
    "-> (Tensor, Tensor)",
    "_flash_attn_backward": "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor softmax_lse, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? sequed_q=None, Tensor? sequed_k=None, SymInt? max_seqlen_q=None, "
    "SymInt? max_seqlen_k=None, Tensor(dq!)? dq=None, Tensor(dk!)? dk=None, "
    "Tensor(dv!)? dv=None, float? softmax_scale=None, bool is_causal=False, "
    "SymInt window_size_left=-1, SymInt window_size_right=-1, float softcap=0.0, "
    "bool deterministic=False, SymInt sm_margin=0) -> Tensor",
}


# ---- kernels -------------------------------------------------------------------------------------


def _backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    sequed_q=None,
    sequed_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    dq=None,
    dk=None,
    dv=None,
    softmax_scale=None,
    is_causal=False,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    deterministic=False,
    sm_margin=0,
):
    """_flash_attn_backward: gradients into dq, dk, dv; returns softmax_d."""
    unit_stride = _eager.unit_stride
    _, _, _, softmax_d, *_ = _eager.raw_backward(
        unit_stride(dout),
        unit_stride(q),
        unit_stride(k),
        unit_stride(v),
        unit_stride(out),
        softmax_lse,
        dq,
        dk,
        dv,
        cu_seqlens_q,
        cu_seqlens_k,
        sequed_q,
        sequed_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        softcap,
        deterministic,
        sm_margin,
    )
    return softmax_d


def _scheduler_metadata(
    batch_size,
    max_seqlen_q,
    max_seqlen_k,
    num_heads,
    num_heads_k,
    headdim,
    headdim_v,
    qkv_dtype,
    seqused_k,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    cu_seqlens_k_new=None,
    seqused_q=None,
    leftpad_k=None,
    page_size=None,
    max_seqlen_k_new=0,
    is_causal=False,
    window_size_left=-1,
    window_size_right=-1,
    attention_chunk=0,
    has_softcap=False,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
):
    """get_scheduler_metadata, and its own fake."""
    _eager.check_scheduled(
        batch_size,
        {"num_heads": num_heads, "num_heads_k": num_heads_k},
        qkv_dtype,
        {"headdim_v": headdim_v, "max_seqlen_k_new": max_seqlen_k_new, "sm_margin": sm_margin},
        {
            "seqused_k": (seqused_k, 0),
            "cu_seqlens_q": (cu_seqlens_q, 1),
            "cu_seqlens_k": (cu_seqlens_k, 1),
            "cu_seqlens_k_new": (cu_seqlens_k_new, 1),
            "seqused_q": (seqused_q, 0),
            "leftpad_k": (leftpad_k, 0),
        },
    )
    return _eager.scheduler_metadata(
        batch_size,
        max_seqlen_q,
        max_seqlen_k,
        headdim,
        page_size,
        is_causal,
        window_size_left,
        window_size_right,
        attention_chunk,
        seqused_k.device,
        num_splits,
    )


def _combine(out_partial, lse_partial, out_dtype=None):
    """_flash_attn_combine: fwd_combine without a given output."""
    return _eager.combine(out_partial, lse_partial, None, out_dtype)


# ---- fakes: shapes only --------------------------------------------------------------------------


def _expect_rank(name, x, rank):
    if x.dim() != rank:
        raise ShapeError(f"{name}: expected {rank} dimensions, got {x.dim()}")


def _expect(name, x, shape):
    """ShapeError when a size that is known while tracing is not as it should be."""
    _expect_rank(name, x, len(shape))
    for size, wanted in zip(x.shape, shape):
        if type(size) is int and type(wanted) is int and size != wanted:
            raise ShapeError(f"{name}: expected shape {tuple(shape)}, got {tuple(x.shape)}")


def _fake_forward(
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
    """Outputs' shapes; refuses what has none before the call runs, as upstream's does."""
    if num_splits <= 0:
        raise ValueError(f"tracing (torch.compile, torch.export) needs num_splits > 0, got {num_splits}")
    if out is not None:
        raise TypeError("tracing (torch.compile, torch.export) with a given output is not supported")
    if cu_seqlens_q is not None and max_seqlen_q is None:
        raise ValueError("max_seqlen_q is needed with cu_seqlens_q")
    index = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "cu_seqlens_k_new": cu_seqlens_k_new,
        "seqused_q": seqused_q,
        "seqused_k": seqused_k,
        "page_table": page_table,
        "kv_batch_idx": kv_batch_idx,
        "leftpad_k": leftpad_k,
        "seqlens_rotary": seqlens_rotary,
        "cp_tot_seqused_k": cp_tot_seqused_k,
    }
    floats = {
        "k": k,
        "v": v,
        "k_new": k_new,
        "v_new": v_new,
        "qv": qv,
        "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin,
        "q_descale": q_descale,
        "k_descale": k_descale,
        "v_descale": v_descale,
        "sinks": sinks,
    }
    for name, x in (floats | index).items():
        if x is not None and x.device != q.device:
            raise DeviceError(f"{name}: expected on q's device {q.device}, got {x.device}")
    for name, x in index.items():
        if x is not None and x.dtype != torch.int32:
            raise DtypeError(f"{name}: expected dtype torch.int32, got {x.dtype}")
    _expect_rank("q", q, 4 if cu_seqlens_q is None else 3)
    _expect_rank("k", k, 4 if cu_seqlens_k is None else 3)
    _expect_rank("v", v, k.dim())
    _expect("k", k, (*k.shape[:-1], q.shape[-1]))
    _expect("v", v, (*k.shape[:-1], v.shape[-1]))
    heads = q.shape[-2], k.shape[-2]
    if type(heads[0]) is int and type(heads[1]) is int and (heads[1] == 0 or heads[0] % heads[1]):
        raise ShapeError(f"k: expected a number of heads that divides q's {heads[0]}, got {heads[1]}")
    if k.dim() == 4 and q.dim() == 4 and page_table is None and kv_batch_idx is None:
        _expect("k", k, (q.shape[0], *k.shape[1:]))
    if qv is not None:
        _expect("qv", qv, (*q.shape[:-1], v.shape[-1]))
    if sinks is not None:
        _expect("sinks", sinks, (heads[0],))
    dtype = torch.bfloat16 if q.dtype == torch.float8_e4m3fn else q.dtype
    if cu_seqlens_q is None:
        b, s_q, h_q, _ = q.shape
        heads = (b, h_q, s_q)
    else:
        t_q, h_q, _ = q.shape
        heads = (h_q, t_q)
    d_v = v.shape[-1]
    split = num_splits > 1
    new = q.new_empty
    return (
        new((*q.shape[:-1], d_v), dtype=dtype),
        new(heads, dtype=torch.float32),
        new((num_splits, *heads, d_v) if split else (0,), dtype=torch.float32),
        new((num_splits, *heads) if split else (0,), dtype=torch.float32),
    )


def _fake_raw_backward(
    dout, q, k, v, out, softmax_lse, dq=None, dk=None, dv=None, cu_seqlens_q=None, *options
):
    if cu_seqlens_q is None:
        b, s_q, h_q, _ = q.shape
        rows = (b, h_q, (s_q + 127) // 128 * 128)
    else:
        t_q, h_q, _ = q.shape
        rows = (h_q, (t_q + 128 * (cu_seqlens_q.shape[0] - 1) + 127) // 128 * 128)
    empty = q.new_empty((0,), dtype=torch.float32)
    return (
        torch.empty_like(q) if dq is None else dq,
        torch.empty_like(k) if dk is None else dk,
        torch.empty_like(v) if dv is None else dv,
        q.new_empty(rows, dtype=torch.float32),
        q.new_empty(rows, dtype=torch.float32),
        empty,
        empty.clone(),
        empty.clone(),
    )


def _fake_backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, *options):
    return _fake_raw_backward(dout, q, k, v, out, softmax_lse, None, None, None, cu_seqlens_q)[3]


def _fake_combine(out_partial, lse_partial, out=None, out_dtype=None):
    _, b, s, h, d_v = out_partial.shape
    if out is None:
        out = out_partial.new_empty((b, s, h, d_v), dtype=out_dtype or torch.float32)
    return out, out_partial.new_empty((b, h, s), dtype=torch.float32).transpose(1, 2)


def _fake_own_combine(out_partial, lse_partial, out_dtype=None):
    return _fake_combine(out_partial, lse_partial, None, out_dtype)


# ---- autograd of the custom forward ----------------------------------------------------------------


def _keep(ctx, inputs, output):
    """setup_context of both custom forwards."""
    x = dict(zip(_eager.ARGUMENTS, inputs, strict=False))
    ctx.without = {
        "an appended cache": x["k_new"] is not None,
        "qv": x["qv"] is not None,
        "pages": x["page_table"] is not None,
        "kv_batch_idx": x["kv_batch_idx"] is not None,
        "leftpad_k": x["leftpad_k"] is not None,
        "attention_chunk": x["attention_chunk"] != 0,
        "sinks": x.get("sinks") is not None,
        "context parallelism": x.get("cp_world_size", 1) > 1,
        "descales or rotary tables that require grad": any(
            x[name] is not None and x[name].requires_grad
            for name in ("q_descale", "k_descale", "v_descale", "rotary_cos", "rotary_sin")
        ),
    }
    ctx.count = len(inputs)
    ctx.options = (
        x["max_seqlen_q"],
        x["max_seqlen_k"],
        x["softmax_scale"],
        x["causal"],
        x["window_size_left"],
        x["window_size_right"],
        x["softcap"],
        False,
        x["sm_margin"],
    )
    out, lse = output[:2]
    lengths = (x["cu_seqlens_q"], x["cu_seqlens_k"], x["seqused_q"], x["seqused_k"])
    ctx.save_for_backward(x["q"], x["k"], x["v"], out, lse, *lengths)


def _gradients(ctx, dout, *unused):
    """dq, dk, dv through the operator _flash_attn_backward, so that they can be traced too."""
    grads = _eager.gradients(
        torch.ops.flash_attn_3._flash_attn_backward, dout, ctx.saved_tensors, ctx.without, ctx.options
    )
    return (*grads, *(None,) * (ctx.count - 3))


class ForwardOnly(torch.autograd.Function):
    """A call that has no gradient, upstream neither: its backward says so."""

    @staticmethod
    def forward(ctx, name, run, *tensors):
        ctx.name = name
        return run()

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(f"{ctx.name} has no backward: call it under torch.no_grad()")


def _loud(name):
    """Autograd kernel for an operator without a gradient: a backward through it raises."""

    def kernel(*args):
        def run():
            with torch._C._AutoDispatchBelowAutograd():
                return getattr(torch.ops.flash_attn_3, name)(*args)

        tensors = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
        if tensors and torch.is_grad_enabled():
            return ForwardOnly.apply(f"torch.ops.flash_attn_3.{name}", run, *tensors)
        return run()

    return kernel


_loud_forward = _loud("fwd")
_in_functorch = torch._C._functorch.peek_interpreter_stack


def _straight_forward(*args):
    """Autograd kernel of fwd: plain tensors that want no gradient go to libattn from here, as a second
    trip through the dispatcher would take as long as the call itself."""
    floats = args[3:7] + args[17:19] + args[20:23]  # k_new to out, rotary tables, descales
    if _eager.direct(args[0], args[1], args[2], floats) and _in_functorch() is None:
        return _eager.raw_forward(*args)
    return _loud_forward(*args)


# ---- registration ----------------------------------------------------------------------------------


def _register() -> torch.library.Library:
    library = torch.library.Library("flash_attn_3", "FRAGMENT")
    kernels = {
        "fwd": (_eager.raw_forward, _fake_forward),
        "bwd": (_eager.raw_backward, _fake_raw_backward),
        "fwd_combine": (_eager.combine, _fake_combine),
        "get_scheduler_metadata": (_scheduler_metadata, _scheduler_metadata),
        "_flash_attn_forward": (_eager.forward, _fake_forward),
        "_flash_attn_forward_ext": (_eager.forward, _fake_forward),
        "_flash_attn_append": (_eager.forward, _fake_forward),
        "_flash_attn_combine": (_combine, _fake_own_combine),
        "_flash_attn_backward": (_backward, _fake_backward),
    }
    for name, (kernel, fake) in kernels.items():
        library.define(name + SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, kernel, "CPU")
        library.impl(name, kernel, "CUDA")
        library.impl(name, fake, "Meta")
    for name in ("_flash_attn_forward", "_flash_attn_forward_ext"):
        torch.library.register_autograd(f"flash_attn_3::{name}", _gradients, setup_context=_keep, lib=library)
    library.impl("fwd", _straight_forward, "Autograd")
    for name in ("fwd_combine", "_flash_attn_append", "_flash_attn_combine"):
        library.impl(name, _loud(name), "Autograd")
    return library


if hasattr(torch.ops.flash_attn_3, "fwd"):
    raise ImportError(
        "torch.ops.flash_attn_3 is registered already, by another FlashAttention-3 in this process; "
        "`python -m libattn` says which distribution it is"
    )
_library = _register()
