# SPDX-License-Identifier: MIT
"""Kimi Delta Attention on torch tensors; every argument is checked by the C library, and no gradient is
recorded.

Shapes are those of attn.h: q, k, v, g, out [b, t, h, d], beta [b, t, h], states [n, h, d, d] with the
value index first, or [slots, h, d, d] with state_indices [n]; with cu_seqlens [n + 1] b is 1.
"""

from typing import NamedTuple

import torch

from . import _native
from ._plain import named, refuse_negated

_threads = torch.get_num_threads


def kda_fwd(
    q,
    k,
    v,
    g,
    beta,
    scale,
    lower_bound,
    A_log=None,
    dt_bias=None,
    *,
    out=None,
    initial_state=None,
    final_state=None,
    cu_seqlens=None,
    state_indices=None,
    checkpoint_states=None,
    checkpoint_every=0,
    gate_activated=False,
    beta_activated=False,
    use=_native.kda_fwd,
):
    """The delta rule over whole sequences; arguments and semantics are attn_kda_fwd_args's.

    `out`, final_state and checkpoint_states are written in place; out is made when it is None, and
    returned.  Raises ShapeError, DtypeError, ArgumentError or DeviceError for arguments that do not
    fit, NotBuiltError for what this build has no kernel for, TypeError for a value of the wrong
    type.
    """
    refuse_negated(q=q, k=k, v=v, g=g, beta=beta, A_log=A_log, dt_bias=dt_bias, out=out)
    refuse_negated(initial_state=initial_state, final_state=final_state, checkpoint_states=checkpoint_states)
    if out is None and isinstance(v, torch.Tensor):
        out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    try:
        use(
            q,
            k,
            v,
            g,
            beta,
            out,
            scale,
            lower_bound,
            _threads(),
            A_log,
            dt_bias,
            initial_state,
            final_state,
            cu_seqlens,
            state_indices,
            checkpoint_states,
            checkpoint_every,
            gate_activated,
            beta_activated,
        )
    except RuntimeError as error:
        raise named(error, locals()) from None
    return out


def kda_fwd_ref(*args, **kwargs):
    """kda_fwd token by token in fp64, CPU tensors only: slow, for tests."""
    return kda_fwd(*args, **kwargs, use=_native.kda_fwd_ref)


class KdaFwdPlan(NamedTuple):
    """What kda_fwd would do: the kernel's name and bytes of workspace."""

    kernel: str
    workspace_bytes: int


def kda_fwd_plan(*args, **kwargs):
    """The KdaFwdPlan for kda_fwd's arguments; checks them, computes nothing."""
    text = ""

    def plan(*native_args):
        nonlocal text
        text = _native.kda_fwd_plan(*native_args)

    kda_fwd(*args, **kwargs, use=plan)
    kernel, workspace_bytes = text.split(" ")
    return KdaFwdPlan(kernel, int(workspace_bytes))


def kda_step(
    q,
    k,
    v,
    g,
    beta,
    scale,
    lower_bound,
    state,
    A_log=None,
    dt_bias=None,
    *,
    out=None,
    state_indices=None,
    cu_seqlens=None,
    gate_activated=False,
    beta_activated=False,
):
    """kda_fwd of 1 to 16 tokens a sequence that changes `state` in place; returns out.

    A sequence whose state index is -1 is padding: its out rows become 0.
    """
    refuse_negated(q=q, k=k, v=v, g=g, beta=beta, state=state, A_log=A_log, dt_bias=dt_bias, out=out)
    if out is None and isinstance(v, torch.Tensor):
        out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    try:
        _native.kda_step(
            q,
            k,
            v,
            g,
            beta,
            out,
            state,
            scale,
            lower_bound,
            _threads(),
            A_log,
            dt_bias,
            state_indices,
            cu_seqlens,
            gate_activated,
            beta_activated,
        )
    except RuntimeError as error:
        raise named(error, locals()) from None
    return out
