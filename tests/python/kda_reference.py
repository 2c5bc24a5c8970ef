# SPDX-License-Identifier: MIT
"""Kimi Delta Attention as its definition says it, token by token in fp64, and once more in plain
low-precision torch, whose error is the yardstick.

Shapes: q, k, g [B, T, H, K]; v, out [B, T, H, V]; beta [B, T, H]; A_log [H]; dt_bias [H, K]; a state
[N, H, V, K].  With cu_seqlens B is 1 and sequence n is tokens cu[n] to cu[n + 1]; without, each batch
row is a sequence.
"""

import torch

EPS = 1e-6
CHUNK = 16


def spans(q, cu_seqlens=None):
    """(first, past the last) of each sequence in the tokens of q.flatten(0, 1)."""
    b, t = q.shape[:2]
    if cu_seqlens is None:
        return [(i * t, (i + 1) * t) for i in range(b)]
    cu = cu_seqlens.tolist()
    return list(zip(cu[:-1], cu[1:]))


def unit(x):
    """x of length 1 along its last axis, the sum of squares guarded by EPS."""
    return x / (x.square().sum(-1, keepdim=True) + EPS).sqrt()


def log_decay(g, A_log, dt_bias, lower_bound):
    """gamma: lower_bound * sigmoid(exp(A_log) (g + dt_bias)), in [lower_bound, 0]."""
    slope = 1.0 if A_log is None else A_log.double().exp()[:, None]
    bias = 0.0 if dt_bias is None else dt_bias.double()
    return lower_bound * (slope * (g.double() + bias)).sigmoid()


def forward(
    q, k, v, g, beta, scale, A_log=None, dt_bias=None, lower_bound=-5.0, state=None, cu_seqlens=None, every=0
):
    """(out, states, checkpoints), all fp64 on the CPU: out as v with NaN in the tokens of no sequence,
    states after the last token of each sequence, checkpoints after every `every` tokens of each."""
    sequences = spans(q, cu_seqlens)
    q, k, v, g, beta, A_log, dt_bias, state = (
        None if x is None else x.detach().cpu() for x in (q, k, v, g, beta, A_log, dt_bias, state)
    )
    shape, (h, d_k), d_v = v.shape, q.shape[2:], v.shape[-1]
    out = torch.full((shape[0] * shape[1], h, d_v), torch.nan, dtype=torch.float64)
    s = torch.zeros(len(sequences), h, d_v, d_k, dtype=torch.float64)
    if state is not None:
        s.copy_(state)
    kept = [[] for _ in sequences]
    q, k, v, g, beta = (x.flatten(0, 1) for x in (q, k, v, g, beta))
    for t in range(max((end - begin for begin, end in sequences), default=0)):
        live = [n for n, (begin, end) in enumerate(sequences) if begin + t < end]
        at = [sequences[n][0] + t for n in live]
        a = log_decay(g[at], A_log, dt_bias, lower_bound).exp()  # [n, H, K]
        b = beta[at].double().sigmoid()  # [n, H]
        key, query = unit(k[at].double()), scale * unit(q[at].double())
        now = s[live] * a[:, :, None]
        u = b[..., None] * (v[at].double() - (now @ key[..., None])[..., 0])  # [n, H, V]
        now += u[..., None] * key[:, :, None]
        out[at] = (now @ query[..., None])[..., 0]
        s[live] = now
        if every and (t + 1) % every == 0:
            for n in live:
                kept[n].append(s[n].clone())
    rows = [x for per in kept for x in per]
    checkpoints = torch.stack(rows) if rows else s.new_empty(0, *s.shape[1:])
    return out.view(shape), s, checkpoints


def rounded(q, k, v, g, beta, scale, A_log=None, dt_bias=None, lower_bound=-5.0, state=None, cu_seqlens=None):
    """(out, states) as a chunked kernel on bf16 matrix units has them, 16 tokens at a time: products
    of bf16 with fp32 sums, rounded to bf16 wherever a result is an operand again, the state too."""
    r = lambda x: x.bfloat16().float()  # noqa: E731
    sequences, shape = spans(q, cu_seqlens), v.shape
    q, k, v, g, beta = (x.detach().cpu().flatten(0, 1).transpose(0, 1).float() for x in (q, k, v, g, beta))
    h, d_v, d_k = q.shape[0], v.shape[-1], q.shape[-1]
    A_log, dt_bias = (None if x is None else x.detach().cpu() for x in (A_log, dt_bias))
    gamma = log_decay(g.transpose(0, 1), A_log, dt_bias, lower_bound).transpose(0, 1).float()
    q, k, b = r(unit(q)), r(unit(k)), beta.sigmoid()
    out = torch.full(v.shape, torch.nan)
    states = torch.zeros(len(sequences), h, d_v, d_k)
    eye = torch.eye(CHUNK)
    for n, (begin, end) in enumerate(sequences):
        s = states[n]
        if state is not None:
            s = r(state[n].detach().cpu().float())
        for i in range(begin, end, CHUNK):
            rows = slice(i, min(i + CHUNK, end))
            total = gamma[:, rows].cumsum(1)  # G, [H, c, K]
            last = total[:, -1:].exp()
            up, down = r(total.exp()), r((-total).exp())
            kd, ki = r(k[:, rows] * up), r(k[:, rows] * down)
            kr = r(ki * r(last))
            qd = r(r(q[:, rows] * up) * r(torch.tensor(scale)))
            c = kd.shape[1]
            lower = (kd @ ki.mT).half().float().tril(-1) * b[:, rows, None].half().float()
            solve = r(torch.linalg.inv(eye[:c, :c] + lower.half().float()))
            inner = r((qd @ ki.mT).tril())
            rest = r(r(v[:, rows] - r(kd @ s.mT)) * r(b[:, rows, None]))
            u = r(solve @ rest)
            out[:, rows] = r(r(qd @ s.mT) + r(inner @ u))
            s = r(s * last + u.mT @ kr)
        states[n] = s
    return out.transpose(0, 1).reshape(shape), states
