# SPDX-License-Identifier: MIT
"""FlashKDA's Python interface: upstream's names, order and defaults, and a decode step beside them.

Shapes: q, k, g (B, T, H, K); v, out (B, T, H, V); beta (B, T, H); A_log (H); dt_bias (H, K); a state
(N, H, V, K), row = value index; K = V = 128 or 64.  N sequences: the B rows, or those of cu_seqlens.
For every sequence and head, token by token:

    k^ = k / sqrt(sum k^2 + 1e-6), q^ likewise
    S <- S diag(exp(lower_bound * sigmoid(exp(A_log) * (g + dt_bias))))
    S <- S + sigmoid(beta) * (v - S k^) k^T
    out = S (scale * q^)

docs/compatibility/flash_kda.md says what runs where.
"""

import libattn
import torch
from libattn import ArgumentError, NotBuiltError, _native, musa
from libattn._plain import named
from torch.autograd.graph import increment_version

LIBATTN = "0.1.0"

if libattn.__version__ != LIBATTN:
    raise ImportError(
        f"flash_kda needs libattn {LIBATTN}, found {libattn.__version__}: install the two from one build"
    )

_Tensor = torch.Tensor
_bf16 = torch.bfloat16
_threads = torch.get_num_threads
_NO_DISPATCH = _Tensor.__torch_dispatch__


def _number(name, value):
    """value as a float; TypeError when it is none, None and text among them."""
    try:
        if not isinstance(value, str | bytes):
            return float(value)
    except (TypeError, ValueError, RuntimeError):
        pass  # said below
    except OverflowError:
        raise ArgumentError(f"{name}: expected a number of fp64, got one beyond its range") from None
    raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def _direct(rows, more):
    """Whether rows, of which q is the first, are plain tensors on a CPU or a CUDA device, and the others
    plain ones or None."""
    for x in rows:
        if type(x) is not _Tensor:
            return False
    for x in more:
        if x is not None and (type(x) is not _Tensor or x.is_neg()):
            return False
    q = rows[0]
    if q.dtype is not _bf16:  # no complex number has parts of bf16: such a tensor is no negated view
        for x in rows:
            if x.is_neg():
                return False
    return q.is_cuda or q.is_cpu


def _input(name, x):
    """x as libattn can read it: a tensor with memory, its sign written out; None stays None."""
    if x is None:
        return None
    if not isinstance(x, _Tensor) or type(x).__torch_dispatch__ is not _NO_DISPATCH:
        raise TypeError(f"{name}: expected a tensor with memory of its own, got {type(x).__name__}")
    return x.resolve_neg()


def _inputs(**tensors):
    """The tensors in order, each through _input."""
    return [_input(name, x) for name, x in tensors.items()]


def _check_outputs(**tensors):
    """Refuses what cannot be written in place."""
    for name, x in tensors.items():
        if _input(name, x) is not x:
            raise ArgumentError(f"{name}: expected a plain tensor, got a negated view")


def _written_each(tensors):
    """Tells autograd that tensors were changed in place."""
    for x in tensors:
        if not x.is_inference():
            increment_version(x)


try:
    increment_version(())
    _written = increment_version  # since torch 2.7 of any number, those of inference mode among them
except (TypeError, RuntimeError):
    _written = _written_each


def fwd(
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
    initial_state=None,
    final_state=None,
    cu_seqlens=None,
    *,
    checkpoint_states=None,
    checkpoint_every=0,
    state_indices=None,
):
    """Kimi Delta Attention over whole sequences; writes out, final_state and checkpoint_states.

    q, k, v, g, out: bf16, fp16 or on a CPU fp32, all alike; beta of that dtype holds logits.  scale
    multiplies q.  A_log, dt_bias: fp32, None for zeros.  lower_bound: the least log-decay of a
    token, in [-5, 0].  cu_seqlens: int64 or int32 (N + 1), for B = 1; tokens of no sequence are neither
    read nor written.

    initial_state: (N, H, V, K), fp32 or bf16, read only; None starts from zero.  final_state: the same
    dtype, written after the last token, or None; it may be initial_state itself.  A sequence without
    tokens hands its state on.

    state_indices: int32 (N); both states are then pools (slots, H, V, K), and sequence n reads and
    writes row state_indices[n]; -1 stands for no state in and none out.  checkpoint_states: fp32 or
    bf16 (C, H, V, K); gets the states after every checkpoint_every tokens of a sequence, a multiple of
    16, one sequence after another: C is the sum of T_n // checkpoint_every.

    Returns None.  Raises classes of libattn.errors, which are RuntimeErrors, and TypeError for a
    required argument that is not there.
    """
    if not _direct(
        (q, k, v, g, beta, out),
        (A_log, dt_bias, initial_state, final_state, cu_seqlens, state_indices, checkpoint_states),
    ):
        if musa.is_on_musa(q):
            if checkpoint_states is not None or checkpoint_every or state_indices is not None:
                raise NotBuiltError(
                    "flash_kda.fwd: MATE has no checkpoints and no state pools for tensors on MUSA"
                )
            musa.chunk_kda(
                *(q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound),
                *(initial_state, final_state, cu_seqlens),
            )
            return
        _check_outputs(out=out, final_state=final_state, checkpoint_states=checkpoint_states)
        q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, state_indices = _inputs(
            q=q,
            k=k,
            v=v,
            g=g,
            beta=beta,
            A_log=A_log,
            dt_bias=dt_bias,
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
            state_indices=state_indices,
        )
    if out is None:
        raise TypeError("out: expected a tensor, got None")
    try:
        _native.kda_fwd(  # libattn.kda_fwd, without half a microsecond of keywords
            q,
            k,
            v,
            g,
            beta,
            out,
            scale if type(scale) is float else _number("scale", scale),
            lower_bound if type(lower_bound) is float else _number("lower_bound", lower_bound),
            _threads(),
            A_log,
            dt_bias,
            initial_state,
            final_state,
            cu_seqlens,
            state_indices,
            checkpoint_states,
            checkpoint_every,
        )
    except RuntimeError as error:
        raise named(error, locals()) from None
    _written((out,) if final_state is None else (out, final_state))
    if checkpoint_states is not None:
        _written((checkpoint_states,))


def step(
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
    state,
    state_indices=None,
    cu_seqlens=None,
):
    """Kimi Delta Attention of the next 1 to 16 tokens of each sequence; writes out and state.

    The tensors are fwd's with T = S, 1 to 16 tokens: q (N, S, H, K) and so on, or with cu_seqlens
    (1, T, H, K) with 0 to 16 tokens a sequence.  state (N, H, V, K), fp32 or bf16, is read, and written
    after each sequence's last token.  With state_indices, int32 (N), it is a pool (slots, H, V, K):
    sequence n owns row state_indices[n], other rows are not touched, and -1 is padding, whose rows of
    out become 0.

    Returns None; raises as fwd does.
    """
    if not _direct((q, k, v, g, beta, out), (A_log, dt_bias, state_indices, cu_seqlens, state)):
        if musa.is_on_musa(q):
            raise NotBuiltError("flash_kda.step: MATE has no such function for tensors on MUSA")
        _check_outputs(out=out, state=state)
        q, k, v, g, beta, A_log, dt_bias, cu_seqlens, state_indices = _inputs(
            q=q,
            k=k,
            v=v,
            g=g,
            beta=beta,
            A_log=A_log,
            dt_bias=dt_bias,
            cu_seqlens=cu_seqlens,
            state_indices=state_indices,
        )
    if out is None:
        raise TypeError("out: expected a tensor, got None")
    try:
        _native.kda_step(
            q,
            k,
            v,
            g,
            beta,
            out,
            state,
            scale if type(scale) is float else _number("scale", scale),
            lower_bound if type(lower_bound) is float else _number("lower_bound", lower_bound),
            _threads(),
            A_log,
            dt_bias,
            state_indices,
            cu_seqlens,
        )
    except RuntimeError as error:
        raise named(error, locals()) from None
    _written((out, state))


def get_workspace_size(T_total, H, N=1):
    """Bytes of workspace that flash_kda_C.fwd wants from its caller: 0, as the library has its own."""
    for name, size in (("T_total", T_total), ("H", H), ("N", N)):
        if not hasattr(size, "__index__"):
            raise TypeError(f"{name}: expected an integer, got {type(size).__name__}")
    return 0
