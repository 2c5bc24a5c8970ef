# SPDX-License-Identifier: MIT
"""Attention in fp64 PyTorch, straight from the definitions: what every other test compares with.

`forward` takes the tensors of `torch.ops.flash_attn_3.fwd` (by the same names, plus sinks and the
context-parallel arguments), cuts them into single sequences and calls `attend` on each.  With
`math=torch.bfloat16` (or any other dtype) the same formulas run in plain low precision: that is the
yardstick of `assert_close`, whose rule is

    max |got - exact|  <=  2 max |low - exact| + floor

over the whole tensor, and, so that a small row cannot hide behind a large one, with a floor of its own
over each row.

Symbols as in attn.h: b sequences of s_q queries and s_k keys, h_q and h_k heads, widths d and d_v.
"""

from dataclasses import dataclass

import torch

INF = float("inf")

# The stated floor, in units of eps(output dtype) * max |exact|: one rounding of the result more than
# the plain computation has, and for fp32 a few, since there the plain computation is itself exact.
FLOOR = {torch.bfloat16: 1.0, torch.float16: 1.0, torch.float32: 16.0}
ROW_FLOOR = {torch.bfloat16: 4.0, torch.float16: 4.0, torch.float32: 512.0}
# The LSE is fp32 whatever the inputs are; 16-bit kernels may use an exp of 1e-4 relative error.
LSE_FLOOR = {torch.float32: 1e-5, torch.bfloat16: 3e-4, torch.float16: 3e-4, torch.float8_e4m3fn: 3e-4}


@dataclass
class Result:
    out: torch.Tensor  # q's shape with d_v last, in the dtype of the math; 0 in rows that are not live
    lse: torch.Tensor  # [b, h_q, s_q] or packed [h_q, t_q], fp64
    live: torch.Tensor  # bool, [b, s_q] or packed [t_q]: the rows that a call must write
    k: torch.Tensor  # the caches after the append (the arguments themselves without one)
    v: torch.Tensor


def visible(s_q, s_k, causal=False, window=(-1, -1), chunk=0, cp=None):
    """The mask [s_q, s_k]; cp is (world, rank, total keys of the sequence)."""
    i = torch.arange(s_q)[:, None]
    j = torch.arange(s_k)[None, :]
    if cp is not None:
        world, rank, total = cp
        j = j * world + rank
        p = i + total - s_q
        mask = (j < total).expand(s_q, s_k)
    else:
        p = i + s_k - s_q
        mask = torch.ones(s_q, s_k, dtype=torch.bool)
    left, right = window
    if causal:
        right = 0
    if left is not None and left >= 0:
        mask = mask & (j >= p - left)
    if right is not None and right >= 0:
        mask = mask & (j <= p + right)
    if chunk > 0:
        first = torch.div(p, chunk, rounding_mode="floor") * chunk
        mask = mask & (j >= first) & (j < first + chunk)
    return mask


def attend(q, k, v, mask, scale, softcap=0.0, qv=None, descale=None, sinks=None, math=torch.float64):
    """One sequence: q [s_q, h_q, d], k [s_k, h_k, d], v [s_k, h_k, d_v] -> out, lse [h_q, s_q].

    `descale` is (q, k, v), each [h_k].  fp8 in low precision is bf16 arithmetic on decoded values.
    """
    low = torch.bfloat16 if math == torch.float8_e4m3fn else math
    group = q.shape[1] // max(k.shape[1], 1)
    q, k, v = (
        x.to(torch.float32).to(low).transpose(0, 1) if low != torch.float64 else x.double().transpose(0, 1)
        for x in (q, k, v)
    )
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    score = q @ k.transpose(1, 2)
    if qv is not None:
        score = score + qv.to(low).transpose(0, 1) @ v.transpose(1, 2)
    v_scale = 1.0
    if descale is not None:
        qd, kd, vd = (x.double().repeat_interleave(group)[:, None, None] for x in descale)
        score, v_scale = (score * (qd * kd)).to(low), vd
    score = score * scale
    if softcap > 0:
        score = softcap * torch.tanh(score / softcap)
    score = score.masked_fill(~mask, -INF)
    wide = score.double()
    lse = torch.logsumexp(wide, -1) if wide.shape[-1] else torch.full(wide.shape[:-1], -INF).double()
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.double()[:, None].expand_as(lse))
    p = torch.exp(wide - lse[..., None]).masked_fill(~mask, 0.0)
    out = (p.to(low) @ v) * v_scale
    return out.to(low).transpose(0, 1), lse


def rotate(x, cos, sin, positions, interleaved):
    """x [s, h, d] at the given table rows; fp32, rounded to x's dtype."""
    half = cos.shape[1]
    c, s = (t[positions].float()[:, None, :] for t in (cos, sin))
    y = x.float().clone()
    if interleaved:
        a, b = y[..., 0 : 2 * half : 2].clone(), y[..., 1 : 2 * half : 2].clone()
        y[..., 0 : 2 * half : 2], y[..., 1 : 2 * half : 2] = a * c - b * s, a * s + b * c
    else:
        a, b = y[..., :half].clone(), y[..., half : 2 * half].clone()
        y[..., :half], y[..., half : 2 * half] = a * c - b * s, a * s + b * c
    return y.to(x.dtype)


def rotates_each_query(SQ, SK, d, paged, causal, window, chunk):
    """Section 2.1's order of normalisation: are rotary positions of q r_b + i, or r_b for all?"""
    left, right = (-1 if x is None else x for x in window)
    if left >= SK - 1:
        left = -1
    if right >= SQ - 1:
        right = -1
    if SQ == 1 and left < 0 and right < 0 and chunk <= 0 and not (paged and 64 < d <= 128):
        causal = False
    if causal:
        right = 0
    return left >= 0 or right >= 0 or chunk >= 1


def forward(
    q, k, v, k_new=None, v_new=None, qv=None, cu_seqlens_q=None, cu_seqlens_k=None,
    cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None,
    page_table=None, kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None,
    seqlens_rotary=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None,
    causal=False, window=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
    sinks=None, cp_world_size=1, cp_rank=0, cp_tot_seqused_k=None, math=torch.float64,
):  # fmt: skip
    def ints(x):
        return None if x is None else [int(y) for y in x]

    cu_q, cu_k, cu_new = ints(cu_seqlens_q), ints(cu_seqlens_k), ints(cu_seqlens_k_new)
    used_q, used_k = ints(seqused_q), ints(seqused_k)
    rows, pads, turns = ints(kv_batch_idx), ints(leftpad_k), ints(seqlens_rotary)
    b = len(cu_q) - 1 if cu_q is not None else q.shape[0]
    h_q, d, h_k, d_v = q.shape[-2], q.shape[-1], k.shape[-2], v.shape[-1]
    page = k.shape[1] if page_table is not None else 0
    if cu_k is not None:
        capacity = max_seqlen_k
    else:
        capacity = page_table.shape[1] * page if page else k.shape[1]
    SQ = max_seqlen_q if cu_q is not None else q.shape[1]
    chunk = attention_chunk or 0
    scale = (d + (d_v if qv is not None else 0)) ** -0.5 if softmax_scale is None else softmax_scale
    each = rotates_each_query(SQ, capacity, d, page > 0, causal, window, chunk)
    k_after, v_after = (k.clone(), v.clone()) if k_new is not None else (k, v)

    def slots(i, first, last):
        """Flat (row or page, slot) indices of cache positions first..last-1 of sequence i."""
        row, x = (rows[i] if rows is not None else i), torch.arange(first, last)
        if page:
            return page_table.cpu()[row].long()[x // page], x % page
        return torch.full_like(x, row), x

    kind = (
        torch.float64 if math == torch.float64 else (torch.bfloat16 if math == torch.float8_e4m3fn else math)
    )
    out = torch.zeros(*q.shape[:-1], d_v, dtype=kind)
    lse = torch.zeros((h_q, q.shape[0]) if cu_q is not None else (b, h_q, q.shape[1]), dtype=torch.float64)
    live = torch.zeros(q.shape[:-2], dtype=torch.bool)
    one = torch.ones(h_k)
    for i in range(b):
        begin_q = cu_q[i] if cu_q is not None else 0
        s_q = used_q[i] if used_q is not None else (cu_q[i + 1] - begin_q if cu_q is not None else SQ)
        at = slice(begin_q, begin_q + s_q)
        q_i, qv_i = (q[at] if cu_q is not None else q[i, at]), None
        if qv is not None:
            qv_i = qv[at] if cu_q is not None else qv[i, at]
        if used_k is not None:
            n = used_k[i]
        else:
            n = cu_k[i + 1] - cu_k[i] if cu_k is not None else capacity
        pad = pads[i] if pads is not None else 0
        s_new = 0
        if k_new is not None:
            if cu_new is not None:
                new = slice(cu_new[i], cu_new[i + 1])
                kn, vn = k_new[new], v_new[new]
            else:
                kn, vn = k_new[i], v_new[i]
            s_new = kn.shape[0]
            if rotary_cos is not None:
                base = turns[i] if turns is not None else n
                kn = rotate(kn, rotary_cos, rotary_sin, base + torch.arange(s_new), rotary_interleaved)
                spot = base + torch.arange(s_q) if each else torch.full((s_q,), base)
                q_i = rotate(q_i, rotary_cos, rotary_sin, spot, rotary_interleaved)
            where = slots(i, n, n + s_new)
            k_after[where], v_after[where] = kn, vn
        s_k = n - pad + s_new
        if cu_k is not None:
            keys = slice(cu_k[i] + pad, cu_k[i] + pad + s_k)
            k_i, v_i = k[keys], v[keys]
        else:
            where = slots(i, pad, pad + max(s_k, 0))
            k_i, v_i = k_after[where], v_after[where]
        cp = (cp_world_size, cp_rank, int(cp_tot_seqused_k[i])) if cp_world_size > 1 else None
        mask = visible(s_q, k_i.shape[0], causal, window, chunk, cp)
        descale = None
        if q.dtype == torch.float8_e4m3fn:
            descale = [one if x is None else x[i] for x in (q_descale, k_descale, v_descale)]
        o, e = attend(q_i, k_i, v_i, mask, scale, softcap, qv_i, descale, sinks, math)
        if cu_q is not None:
            out[at], lse[:, at], live[at] = o, e, True
        else:
            out[i, at], lse[i, :, at], live[i, at] = o, e, True
    no_storage = k.shape[0] * k.shape[1] == 0 if cu_k is None else k.shape[0] == 0
    if no_storage and (k_new is None or k_new.numel() == 0):
        lse[:] = INF
    return Result(out, lse, live, k_after, v_after)


def combine(out_partial, lse_partial):
    """[n, b, s, h, d], [n, b, s, h] -> out, lse, in fp64; all-minus-infinity rows give 0, -inf."""
    lse = torch.logsumexp(lse_partial.double(), 0)
    dead = lse == -INF
    weight = torch.exp(lse_partial.double() - lse.masked_fill(dead, 0.0)).masked_fill(dead, 0.0)
    part = out_partial.double().masked_fill((weight == 0)[..., None], 0.0)
    return (weight[..., None] * part).sum(0), lse


def assert_close(got, exact, low, floor=None, what="out"):
    """The rule above, on whole tensors; also NaN-free."""
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    if got.numel() == 0:
        return
    assert torch.isfinite(got.float()).all(), f"{what}: not finite"
    error, plain = (got.double() - exact).abs(), (low.double() - exact).abs()
    eps = torch.finfo(got.dtype).eps
    if floor is None:
        floor = FLOOR[got.dtype] * eps * float(exact.abs().max())
    limit = 2 * float(plain.max()) + floor
    worst = float(error.max())
    assert worst <= limit, (
        f"{what}: error {worst:.3g} above {limit:.3g} (plain {got.dtype} {float(plain.max()):.3g}, "
        f"floor {floor:.3g}) at {_where(error)}"
    )
    tiny = torch.finfo(got.dtype).smallest_normal
    row_limit = 2 * plain.amax(-1) + ROW_FLOOR[got.dtype] * eps * exact.abs().amax(-1) + tiny
    over = error.amax(-1) - row_limit
    assert float(over.max()) <= 0, (
        f"{what}: a row's error is {float(over.max()):.3g} too large, at {_where(over)}"
    )


def assert_lse_close(got, exact, dtype, scale=1.0, what="lse"):
    """Infinities of the same sign in the same places; else within the floor of the input dtype."""
    assert got.dtype == torch.float32, f"{what}: {got.dtype}"
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(exact.shape)}"
    if got.numel() == 0:
        return
    finite = torch.isfinite(exact)
    same = (got.double() == exact) | finite
    assert same.all(), f"{what}: infinities differ: got {got[~same][:8]}, not {exact[~same][:8]}"
    error = (got.double() - exact).masked_fill(~finite, 0.0).abs()
    assert not torch.isnan(error).any(), f"{what}: NaN"
    size = float(exact[finite].abs().max()) if finite.any() else 0.0
    limit = scale * (LSE_FLOOR[dtype] + 2e-6 * size)
    worst = float(error.max())
    assert worst <= limit, f"{what}: error {worst:.3g} above {limit:.3g} at {_where(error)}"


def _where(error):
    return [int(x) for x in torch.unravel_index(error.argmax(), error.shape)]
