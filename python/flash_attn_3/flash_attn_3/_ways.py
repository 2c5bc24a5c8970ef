# SPDX-License-Identifier: MIT
"""Which way a call takes: straight to libattn (plain CPU and CUDA tensors, no gradient wanted), through
an autograd class, through torch.ops when it is traced or a mode looks on, or to MATE on MUSA."""

import torch
from libattn import ArgumentError, NotBuiltError
from torch.autograd import forward_ad

from . import _C, _eager
from ._eager import direct, grad_on, is_traced, modes

_Tensor = torch.Tensor
_Parameter = torch.nn.Parameter


def on_musa(x, name="q"):
    """Whether x lies on MUSA; TypeError when it lies nowhere."""
    try:
        return not is_traced() and x.device.type == "musa"
    except AttributeError:
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}") from None


def by_class(q, k, v, more=()):
    """Whether a call that is not direct goes through an autograd class; else through torch.ops."""
    return (
        not is_traced()
        and type(q) in (_Tensor, _Parameter)
        and not modes()
        and grad_on()
        and any(getattr(x, "requires_grad", False) for x in (q, k, v, *more))
    )


def forward(
    *,
    q,
    k,
    v,
    k_new=None,
    v_new=None,
    qv=None,
    out_=None,
    rotary_cos=None,
    rotary_sin=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    sinks=None,
    cp_world_size=1,
    cp_rank=0,
    cp_tot_seqused_k=None,
    **rest,
):
    """(out, lse, out_accum, lse_accum) for the arguments of _eager.forward, by the first way that is
    open."""
    floats = (k_new, v_new, qv, out_, rotary_cos, rotary_sin, q_descale, k_descale, v_descale, sinks)
    rest.update(
        q=q,
        k=k,
        v=v,
        k_new=k_new,
        v_new=v_new,
        qv=qv,
        out_=out_,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
    )
    ours = {
        "sinks": sinks,
        "cp_world_size": cp_world_size,
        "cp_rank": cp_rank,
        "cp_tot_seqused_k": cp_tot_seqused_k,
    }
    if direct(q, k, v, floats):
        return _eager.forward(**rest, **ours)
    if not is_traced() and forward_ad._current_level >= 0:
        _eager.refuse_tangents(q, k, v, *floats)
    if on_musa(q):
        raise NotBuiltError("_flash_attn_forward: MATE has no such function for tensors on MUSA")
    ops = torch.ops.flash_attn_3
    if k_new is not None:
        if not is_traced() and any(isinstance(x, _Tensor) and x.is_neg() for x in (k, v)):
            raise ArgumentError("k, v: expected plain tensors to append to, got a negated view")
        return ops._flash_attn_append(**rest, **ours)
    if sinks is not None or cp_world_size > 1:
        return ops._flash_attn_forward_ext(**rest, **ours)
    return ops._flash_attn_forward(**rest)


def backward(*args):
    """softmax_d for the arguments of _flash_attn_backward, which go to its operator when traced."""
    if is_traced() or modes():
        return torch.ops.flash_attn_3._flash_attn_backward(*args)
    return _C._backward(*args)
