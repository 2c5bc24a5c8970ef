# SPDX-License-Identifier: MIT
"""Problems for flash_kda, drawn and judged: tensors of one call, the call, and its acceptance.

A result passes when its RMS error, as a share of the RMS of the fp64 recurrence, is within the limit of
its dtype or 1.1 times that of plain low-precision torch; in every window of up to 64 tokens within twice
that, or twice what plain torch has in the window, where outputs of few tokens cancel.  The windows are
there because a large state that decays early would hide what comes after it.
"""

from dataclasses import dataclass

import flash_kda
import kda_reference as reference
import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LIMIT = {torch.bfloat16: 6e-3, torch.float16: 6e-3, torch.float32: 2e-5}
WINDOW = 64
SENTINEL = -7.0  # what stands in `out` and in the states before a call


@dataclass
class Problem:
    """One call's tensors by the names of flash_kda.fwd."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor
    A_log: torch.Tensor | None
    dt_bias: torch.Tensor | None
    scale: float
    lower_bound: float = -5.0
    cu_seqlens: torch.Tensor | None = None
    initial_state: torch.Tensor | None = None

    @property
    def sequences(self):
        return reference.spans(self.q, self.cu_seqlens)

    @property
    def state_shape(self):
        return len(self.sequences), self.q.shape[2], self.v.shape[-1], self.q.shape[-1]

    def inputs(self):
        """By name what fwd and step share, without states and lengths."""
        names = ("q", "k", "v", "g", "beta", "scale", "A_log", "dt_bias", "lower_bound")
        return {name: getattr(self, name) for name in names}

    def want(self, every=0):
        lengths = {"cu_seqlens": self.cu_seqlens, "every": every}
        return reference.forward(**self.inputs(), state=self.initial_state, **lengths)

    def low(self):
        return reference.rounded(**self.inputs(), state=self.initial_state, cu_seqlens=self.cu_seqlens)

    def run(self, final="fp32", out=None, **more):
        """(out, final_state) of flash_kda.fwd; `final` is a dtype, a tensor to write, or None."""
        out = torch.full_like(self.v, SENTINEL) if out is None else out
        if isinstance(final, str):
            like = {"dtype": DTYPES[final], "device": self.q.device}
            final = torch.full(self.state_shape, SENTINEL, **like)
        more = {"initial_state": self.initial_state, "cu_seqlens": self.cu_seqlens, **more}
        assert flash_kda.fwd(**self.inputs(), out=out, final_state=final, **more) is None
        return out, final


def draw(
    shape=(1, 100, 2),
    d_k=128,
    d_v=None,
    dtype="bf16",
    lengths=None,
    state=None,
    index=torch.int64,
    device="cpu",
    spread=1.0,
    seed=0,
):
    """A Problem of normal numbers.  `lengths` packs sequences into one row, with NaN tokens of no
    sequence before and behind them when they leave room in T; `state` is the dtype of an initial state."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=generator)

    b, t, h = shape
    d_v = d_v or d_k
    cu = None
    if lengths is not None:
        room = (t - sum(lengths)) // 2
        cu = torch.tensor([room, *lengths]).cumsum(0)
    tensors = [randn(b, t, h, d) for d in (d_k, d_k, d_v, d_k)] + [randn(b, t, h)]
    if cu is not None:
        for x in tensors:
            x[:, : cu[0]] = torch.nan
            x[:, cu[-1] :] = torch.nan
    tensors[3] *= spread
    q, k, v, g, beta = (x.to(DTYPES[dtype]).to(device) for x in tensors)
    n = b if lengths is None else len(lengths)
    return Problem(
        q=q,
        k=k,
        v=v,
        g=g,
        beta=beta,
        A_log=torch.rand(h, generator=generator).to(device),
        dt_bias=torch.rand(h, d_k, generator=generator).to(device),
        scale=d_k**-0.5,
        cu_seqlens=None if cu is None else cu.to(index).to(device),
        initial_state=None if state is None else randn(n, h, d_v, d_k).to(DTYPES[state]).to(device),
    )


def rms_ratio(got, want):
    """RMS of got - want over the RMS of want, below which the least normal number of got's dtype
    counts; 0 for two that are equal, inf for a NaN."""
    error = (got.double().cpu() - want).square().mean().sqrt().item() if want.numel() else 0.0
    if error == 0.0:
        return 0.0
    if error != error:
        return float("inf")
    return error / (want.square().mean().sqrt().item() + torch.finfo(got.dtype).tiny)


def limit(dtype, low, want):
    """What a result of `dtype` may be off, given what plain torch makes of it."""
    return max(LIMIT[dtype], 1.1 * rms_ratio(low, want)) if dtype != torch.float32 else LIMIT[dtype]


def check(problem, out, states=None, low=None):
    """Judges out, and the states after each sequence, against the recurrence."""
    want, want_states, _ = problem.want()
    low, low_states = low or problem.low()
    dtype = problem.q.dtype
    got, want, low = out.cpu().flatten(0, 1), want.flatten(0, 1), low.flatten(0, 1)
    inside = torch.zeros(len(got), dtype=torch.bool)
    for begin, end in problem.sequences:
        inside[begin:end] = True
    bound = limit(dtype, low[inside], want[inside])
    found = rms_ratio(got[inside], want[inside])
    assert found <= bound, f"out: RMS ratio {found:.2e}, limit {bound:.2e}"
    for n, (begin, end) in enumerate(problem.sequences):
        for i in range(begin, end, WINDOW):
            window = slice(i, min(i + WINDOW, end))
            most = 2 * max(bound, limit(dtype, low[window], want[window]))
            found = rms_ratio(got[window], want[window])
            assert found <= most, (
                f"out of sequence {n}, tokens {i - begin} on: RMS ratio {found:.2e}, limit {most:.2e}"
            )
    assert (got[~inside] == SENTINEL).all(), "out: tokens of no sequence were written"
    if states is not None:
        floor = 2.0**-8 if states.dtype == torch.bfloat16 else 0.0
        bound = max(limit(dtype, low_states, want_states), floor)
        found = rms_ratio(states, want_states)
        assert found <= bound, f"states: RMS ratio {found:.2e}, limit {bound:.2e}"
