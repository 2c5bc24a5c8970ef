# SPDX-License-Identifier: MIT
"""The module under upstream's package: fwd with a workspace, which libattn does not need."""

import flash_kda
import torch
from flash_kda import get_workspace_size
from libattn import DeviceError, ShapeError

__all__ = ["fwd", "get_workspace_size"]


def fwd(
    q,
    k,
    v,
    g,
    beta,
    scale,
    out,
    workspace,
    A_log,
    dt_bias,
    lower_bound,
    initial_state=None,
    final_state=None,
    cu_seqlens=None,
):
    """flash_kda.fwd with upstream's workspace: a contiguous tensor on q's device, of any size.  It is
    neither read nor written, as get_workspace_size asks for 0 bytes."""
    if not isinstance(workspace, torch.Tensor):
        raise TypeError(f"workspace: expected a tensor, got {type(workspace).__name__}")
    if isinstance(q, torch.Tensor) and workspace.device != q.device:
        raise DeviceError(f"workspace: expected on q's device {q.device}, got {workspace.device}")
    if not workspace.is_contiguous():
        raise ShapeError(f"workspace: expected a contiguous tensor, got strides {workspace.stride()}")
    flash_kda.fwd(
        q,
        k,
        v,
        g,
        beta,
        scale,
        out,
        A_log,
        dt_bias,
        lower_bound,
        initial_state,
        final_state,
        cu_seqlens,
    )
