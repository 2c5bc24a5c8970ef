# SPDX-License-Identifier: MIT
"""Multi-head latent attention in fp64 PyTorch, straight from the definitions, and the byte tables of the
two FP8 caches: what the tests of flash_mla compare with.

Symbols: b sequences of s_q queries; h_q, h_k heads; rows of d values, the first d_v of which are V; caches
of `pages` pages of `page` tokens.  A query row sees a list of key rows; its result is

    s_j = scale q.k_j,   lse = ln sum exp(s_j),   out = sum exp(s_j - lse) v_j  [* 1 / (1 + exp(sink - lse))]

An empty row has out 0 and, in decode and sparse prefill, lse +inf.
"""

import math

import torch

INF = float("inf")
FP8 = torch.float8_e4m3fn

# Tolerances: (absolute, relative, cosine).
DENSE_OUT = (8e-4, 2.01 / 128, 5e-6)
SPARSE_OUT = (1e-3, 2.01 / 128, 5e-6)
DECODE_LSE = (1e-6, 8.01 / 65536, 1e-7)
PREFILL_OUT = (8e-4, 3.01 / 128, 7e-6)
PREFILL_LSE = (1e-6, 2.01 / 65536, 1e-7)
MHA_OUT = (1e-3, 8.01 / 128, 7e-6)
MHA_LSE = (1e-6, 2.01 / 65536, 1e-7)
FP8_OUT = (2e-2, 8.01 / 128, 1e-4)
FP8_LSE = (1e-6, 8.01 / 65536, 1e-5)


def attend(q, k, v, scale, visible=None):
    """q [s_q, h, d], k [n, d], v [n, d_v], visible [s_q, n] -> out [s_q, h, d_v], lse, top [s_q, h]."""
    s_q, h, _ = q.shape
    n = k.shape[0]
    if n == 0:
        out = torch.zeros(s_q, h, v.shape[1], dtype=torch.float64)
        return out, torch.full((s_q, h), INF).double(), torch.full((s_q, h), -INF).double()
    score = torch.einsum("shd,nd->shn", q.double(), k.double()) * scale
    if visible is not None:
        score = score.masked_fill(~visible[:, None], -INF)
    top = score.amax(-1)
    empty = top == -INF
    lse = torch.logsumexp(score, -1).masked_fill(empty, INF)
    out = torch.einsum("shn,nd->shd", torch.exp(score - lse[..., None]), v.double())
    return out.masked_fill(empty[..., None], 0.0), lse, top


def with_sink(out, lse, sink):
    """The sink of each head, applied once: out [..., h, d_v], lse [..., h], sink [h]."""
    if sink is None:
        return out
    share = torch.exp(lse - torch.logaddexp(lse, sink.double()))
    share = share.masked_fill(sink.double() == INF, 0.0).masked_fill(lse == INF, 0.0)
    return out * share[..., None]


def dense_decode(
    q, k_cache, block_table, cache_seqlens, d_v, scale, causal=False, descale_q=None, descale_k=None
):
    """q [b, s_q, h_q, d], k_cache [pages, page, h_k, d] -> out [b, s_q, h_q, d_v], lse [b, h_q, s_q]."""
    q, k_cache, block_table, lens = (x.cpu() for x in (q, k_cache, block_table, cache_seqlens))
    b, s_q, h_q, _ = q.shape
    page, h_k = k_cache.shape[1:3]
    group = h_q // h_k
    v_scale = 1.0 if descale_k is None else float(descale_k)
    scale = scale * v_scale * (1.0 if descale_q is None else float(descale_q))
    out = torch.zeros(b, s_q, h_q, d_v, dtype=torch.float64)
    lse = torch.zeros(b, s_q, h_q, dtype=torch.float64)
    for i, n in enumerate(lens.tolist()):
        at = torch.arange(n)
        rows = k_cache[block_table[i, : -(-n // page)].long()[at // page], at % page].double()
        seen = at[None] <= (n - s_q + torch.arange(s_q))[:, None] if causal and s_q > 1 else None
        for g in range(h_k):
            heads = slice(g * group, (g + 1) * group)
            k = rows[:, g]
            out[i, :, heads], lse[i, :, heads], _ = attend(q[i, :, heads], k, k[:, :d_v], scale, seen)
    return out * v_scale, lse.transpose(1, 2)


def chosen(indices, limit, length=None):
    """The usable entries of one row of indices, in order; duplicates stay."""
    indices = indices.cpu().long()
    if length is not None:
        indices = indices[: int(length)]
    return indices[(indices >= 0) & (indices < limit)]


def sparse_decode(q, k_cache, indices, scale, sink=None, topk_length=None, extra=None, d_v=512):
    """q [b, s_q, h_q, d]; extra is (cache, indices [b, s_q, n], length [b] or None) -> out, lse [b, h, s]."""
    q, sink = q.cpu(), None if sink is None else sink.cpu()
    b, s_q, h_q, d = q.shape
    parts = [(unpack(k_cache.cpu(), d).flatten(0, 1), indices, topk_length)]
    if extra is not None:
        parts.append((unpack(extra[0].cpu(), d).flatten(0, 1), *extra[1:]))
    out = torch.zeros(b, s_q, h_q, d_v, dtype=torch.float64)
    lse = torch.zeros(b, s_q, h_q, dtype=torch.float64)
    for i in range(b):
        for s in range(s_q):
            k = torch.cat(
                [
                    rows[chosen(where[i, s], len(rows), None if length is None else length[i])]
                    for rows, where, length in parts
                ]
            )
            o, e, _ = attend(q[i, s : s + 1], k, k[:, :d_v], scale)
            out[i, s], lse[i, s] = with_sink(o, e, sink)[0], e[0]
    return out, lse.transpose(1, 2)


def sparse_prefill(q, kv, indices, scale, sink=None, topk_length=None, d_v=512):
    """q [s_q, h_q, d], kv [s_kv, 1, d], indices [s_q, 1, topk] -> out, max_logits, lse [s_q, h_q]."""
    q, kv, sink = q.cpu(), kv.cpu()[:, 0], None if sink is None else sink.cpu()
    s_q, h_q, _ = q.shape
    out = torch.zeros(s_q, h_q, d_v, dtype=torch.float64)
    top, lse = torch.zeros(2, s_q, h_q, dtype=torch.float64)
    for s in range(s_q):
        k = kv[chosen(indices[s, 0], len(kv), None if topk_length is None else topk_length[s])]
        o, e, t = attend(q[s : s + 1], k, k[:, :d_v], scale)
        out[s], lse[s], top[s] = with_sink(o, e, sink)[0], e[0], t[0]
    return out, top, lse


def mha(q, k, v, cu_q, cu_k, scale, causal=False):
    """Packed attention: out [t_q, h, d_v], lse [t_q, h]; a row that sees no key has 0 and -inf."""
    q, k, v, cu_q, cu_k = (x.cpu() for x in (q, k, v, cu_q, cu_k))
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=torch.float64)
    lse = torch.zeros(q.shape[:2], dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for i in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        s_q, s_k = int(cu_q[i + 1] - cu_q[i]), int(cu_k[i + 1] - cu_k[i])
        seen = None
        if causal:
            seen = torch.arange(s_k)[None] <= (torch.arange(s_q) + s_k - s_q)[:, None]
        for h in range(q.shape[1]):
            g = h // group
            o, e, _ = attend(q[rows, h : h + 1], k[keys, g], v[keys, g], scale, seen)
            out[rows, h], lse[rows, h] = o[:, 0], e[:, 0]
    return out, lse.masked_fill(lse == INF, -INF)


# ---- the byte tables -----------------------------------------------------------------------------


def page_bytes(page):
    """Bytes between pages of a MODEL1 cache as its reference writer lays them out."""
    return -(-584 * page // 576) * 576


def scale_of(x):
    """The power of two by which a tile's values are divided: x [..., tile] -> [..., 1], float64."""
    a = x.double().abs().amax(-1, keepdim=True)
    return torch.exp2(torch.ceil(torch.log2(torch.clamp(a / 448, min=1e-4))))


def pack(k, scales=None, fill=None):
    """k [pages, page, d] -> the FP8 cache of its layout family (d 576: V32, 512: MODEL1), byte by byte.

    `scales` [pages, page, tiles] replaces the rule's scales; `fill` is the byte of what is padding.
    """
    pages, page, d = k.shape
    tile = 128 if d == 576 else 64
    latent, rope = k[..., : d - 64].double(), k[..., d - 64 :].bfloat16()
    tiles = latent.unflatten(-1, (-1, tile))
    s = scale_of(tiles) if scales is None else scales.double()[..., None]
    codes = (tiles / s).float().to(FP8).view(torch.uint8).flatten(-2)
    rope = rope.contiguous().view(torch.uint8)
    if d == 576:
        numbers = s[..., 0].float().contiguous().view(torch.uint8)
        return torch.cat([codes, numbers, rope], -1).view(FP8)[:, :, None]
    exponents = (torch.log2(s[..., 0]) + 127).to(torch.uint8)
    memory = torch.full((pages, page_bytes(page)), 0x7F if fill is None else fill, dtype=torch.uint8)
    rows = memory[:, : 576 * page].view(pages, page, 576)
    rows[..., :448], rows[..., 448:] = codes, rope
    memory[:, 576 * page : 584 * page].view(pages, page, 8)[..., :7] = exponents
    return memory.view(FP8).as_strided((pages, page, 1, 584), (page_bytes(page), 584, 584, 1))


def unpack(cache, d):
    """An FP8 cache -> [pages, page, d] bf16, byte by byte."""
    pages, page = cache.shape[:2]
    if d == 576:
        raw = cache[:, :, 0].view(torch.uint8).contiguous()
        latent = raw[..., :512].contiguous().view(FP8).float().unflatten(-1, (4, 128))
        s = raw[..., 512:528].contiguous().view(torch.float32)
        rope = raw[..., 528:].contiguous().view(torch.bfloat16)
    else:
        stride = cache.stride(0) if pages > 1 else 584 * page
        raw = cache.view(torch.uint8).as_strided((pages, 584 * page), (stride, 1))
        rows = raw[:, : 576 * page].reshape(pages, page, 576)
        latent = rows[..., :448].contiguous().view(FP8).float().unflatten(-1, (7, 64))
        s = torch.exp2(raw[:, 576 * page :].reshape(pages, page, 8)[..., :7].float() - 127)
        rope = rows[..., 448:].contiguous().view(torch.bfloat16)
    return torch.cat([(latent * s[..., None]).flatten(-2).bfloat16(), rope], -1)


# ---- the comparison ------------------------------------------------------------------------------


def assert_close(got, want, tolerance, what):
    """Section 4.3: infinities and NaN in the same places; each element near in absolute or relative
    terms; the two tensors near in direction."""
    absolute, relative, cosine = tolerance
    got = got.cpu().double()
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    finite = torch.isfinite(want)
    same = torch.where(finite, torch.isfinite(got), (got == want) | (want.isnan() & got.isnan()))
    assert same.all(), f"{what}: {int((~same).sum())} elements are not finite where they should be"
    got, want = got[finite], want[finite]
    if not want.numel():
        return
    error = (got - want).abs()
    near = (error < absolute) | (error / (want.abs() + 1e-6) < relative)
    assert near.all(), f"{what}: error {float(error[~near].max()):.3g} at {int((~near).sum())} elements"
    squares = float((got**2 + want**2).sum())
    if float((want**2).sum()) >= 1e-12:
        angle = abs(1 - 2 * float((got * want).sum()) / squares)
        assert angle <= cosine, f"{what}: direction is off by {angle:.3g}"


def scale_for(q):
    return 1 / math.sqrt(q.shape[-1])
