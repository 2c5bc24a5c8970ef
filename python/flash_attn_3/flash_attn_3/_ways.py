# SPDX-License-Identifier: MIT
"""Which way a call takes: straight to libattn (plain CPU and CUDA tensors, no gradient wanted), through
an autograd class, through torch.ops when it is traced or a mode looks on, or to MATE on MUSA."""

import torch
from libattn import NotBuiltError

from . import _C, _eager

is_traced = torch.compiler.is_dynamo_compiling
modes = torch._C._len_torch_dispatch_stack
grad_on = torch.is_grad_enabled
_Tensor = torch.Tensor
_Parameter = torch.nn.Parameter


def wants_grad(q, k, v, qv=None, sinks=None):
    return grad_on() and any(getattr(x, "requires_grad", False) for x in (q, k, v, qv, sinks))


def direct(q, k, v, qv=None, sinks=None):
    """Whether a call may go straight to libattn."""
    return (
        not is_traced()
        and type(q) is _Tensor
        and type(k) is _Tensor
        and type(v) is _Tensor
        and (q.is_cpu or q.is_cuda)
        and not modes()
        and not (
            grad_on()
            and (
                q.requires_grad
                or k.requires_grad
                or v.requires_grad
                or (qv is not None and getattr(qv, "requires_grad", False))
                or (sinks is not None and getattr(sinks, "requires_grad", False))
            )
        )
    )


def on_musa(x, name="q"):
    """Whether x lies on MUSA; TypeError when it lies nowhere."""
    try:
        return not is_traced() and x.device.type == "musa"
    except AttributeError:
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}") from None


def by_class(q, k, v, qv, sinks):
    """Whether a call that is not direct goes through an autograd class; else through torch.ops."""
    return (
        not is_traced()
        and type(q) in (_Tensor, _Parameter)
        and not modes()
        and wants_grad(q, k, v, qv, sinks)
    )


def forward(*args):
    """(out, lse, out_accum, lse_accum) for the arguments of _eager.forward, up to num_splits at
    least, by the first way that is open."""
    if direct(*args[:3]):
        return _eager.forward(*args)
    if on_musa(args[0]):
        raise NotBuiltError("_flash_attn_forward: MATE has no such function for tensors on MUSA")
    if args[3] is not None:
        return torch.ops.flash_attn_3._flash_attn_append(*args)
    if len(args) > 34 and (args[34] is not None or args[35] > 1):
        return torch.ops.flash_attn_3._flash_attn_forward_ext(*args)
    return torch.ops.flash_attn_3._flash_attn_forward(*args[:34])


def backward(*args):
    """softmax_d for the arguments of _flash_attn_backward, which go to its operator when traced."""
    if is_traced() or modes():
        return torch.ops.flash_attn_3._flash_attn_backward(*args)
    return _C._backward(*args)
