# SPDX-License-Identifier: MIT
"""The functions of the Triton package of the same name, on libattn: attention in which one row of a latent
is K and V of all heads.  ops and kernels give them that package's module names.

B sequences of N tokens, H heads, latents of D values, rope parts of R.
"""

import libattn
import torch
from libattn import ArgumentError, ShapeError

from . import _eager
from ._schedule import whole
from .flash_mla_interface import FlashMLASchedMeta, flash_mla_with_kvcache

GPU_WIDTH = 256  # of the widest keys that mha_fwd has on a GPU


def attend(q_abs, kv_latent, sm_scale, **options):
    """mha_fwd of q_abs (B, S, H, D) on kv_latent (B, N, D), which is K and V.  On a GPU wide latents are the
    second term of the scores, qv . v; the first is a product of zeros."""
    q_abs, kv = _eager.plain(q_abs), _eager.plain(kv_latent).unsqueeze(2)
    if q_abs.is_cuda and q_abs.shape[-1] > GPU_WIDTH:
        q, k = (x.new_zeros(*x.shape[:3], 8) for x in (q_abs, kv))
        return libattn.mha_fwd(q, k, kv, softmax_scale=sm_scale, qv=q_abs, **options)[0]
    return libattn.mha_fwd(q_abs, kv, kv, softmax_scale=sm_scale, **options)[0]


def prefill(q_abs, kv_latent, sm_scale):
    """Causal attention of q_abs (B, N, H, D) on kv_latent (B, N, D): (B, N, H, D)."""
    _eager.check_rank("q_abs", q_abs, 4)
    _eager.check_rank("kv_latent", kv_latent, 3)
    return attend(q_abs, kv_latent, sm_scale, causal=True)


def decode(q_abs, kv_cache, sm_scale):
    """Attention of q_abs (B, H, D) on all of kv_cache (B, N, D): (B, H, D)."""
    _eager.check_rank("q_abs", q_abs, 3)
    _eager.check_rank("kv_cache", kv_cache, 3)
    return attend(q_abs.unsqueeze(1), kv_cache, sm_scale, num_splits=0).squeeze(1)


def rotate(x, cos, sin):
    """x (..., R) turned pair by pair (interleaved) by tables of the same width, in fp32."""
    pairs = x.float().unflatten(-1, (-1, 2))
    turned = torch.stack((-pairs[..., 1], pairs[..., 0]), -1).flatten(-2)
    return (x.float() * cos.float() + turned * sin.float()).to(x.dtype)


def fused(q_abs, kv, q_rope, k_rope, cos, sin, sm_scale, causal):
    """Scores are the latent's plus the rope part's; cos and sin already lie along q_rope."""
    q_abs, kv, q_rope, k_rope = (_eager.plain(x) for x in (q_abs, kv, q_rope, k_rope))
    return libattn.mha_fwd(
        rotate(q_rope, cos, sin),
        k_rope.unsqueeze(2),
        kv.unsqueeze(2),
        softmax_scale=sm_scale,
        causal=causal,
        qv=q_abs,
    )[0]


def prefill_fused(q_abs, kv_latent, q_rope, k_rope, cos, sin, sm_scale):
    """prefill with a rope part: q_rope (B, N, H, R) is rotated here by the tables cos, sin (N, R), k_rope
    (B, N, R) comes rotated."""
    for name, x, rank in (("q_abs", q_abs, 4), ("kv_latent", kv_latent, 3), ("q_rope", q_rope, 4)):
        _eager.check_rank(name, x, rank)
    for name, x, rank in (("k_rope", k_rope, 3), ("cos", cos, 2), ("sin", sin, 2)):
        _eager.check_rank(name, x, rank)
    tables = (t[: q_rope.shape[1], None] for t in (cos, sin))
    return fused(q_abs, kv_latent, q_rope, k_rope, *tables, sm_scale, True)


def decode_fused(q_abs, kv_cache, q_rope, k_rope, cos, sin, cur_pos, sm_scale):
    """decode with a rope part: q_rope (B, H, R) is rotated here for position cur_pos of the tables."""
    for name, x in (("q_abs", q_abs), ("kv_cache", kv_cache), ("q_rope", q_rope), ("k_rope", k_rope)):
        _eager.check_rank(name, x, 3)
    for name, x in (("cos", cos), ("sin", sin)):
        _eager.check_rank(name, x, 2)
    row = whole("cur_pos", cur_pos)
    rows = min(len(cos), len(sin))
    if not 0 <= row < rows:
        raise ArgumentError(f"cur_pos: expected a row of the {rows} in cos and sin, got {row}")
    q = q_abs.unsqueeze(1), kv_cache, q_rope.unsqueeze(1), k_rope
    return fused(*q, cos[row], sin[row], sm_scale, False).squeeze(1)


def paged_decode(
    q,
    k_cache,
    v_cache,
    block_table,
    seq_lens,
    sm_scale,
    num_splits=4,
    return_lse=False,
    k_scale_tensor=None,
    v_scale_tensor=None,
):
    """Paged decode: q (B, H, 576), k_cache (pages, page, 576), v_cache its first 512 values as a view,
    block_table (B, max_pages), seq_lens (B,).  fp16 or bf16, or an int8 cache with one scale a tensor.

    Returns (out (B, H, 512), lse fp32 (B, H) in natural units, or None).  num_splits is a hint, unused.
    """
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        _eager.check_rank(name, x, 3)
    _eager.check_rank("block_table", block_table, 2)
    _eager.check_rank("seq_lens", seq_lens, 1)
    d_v = v_cache.shape[-1]
    inside = v_cache.data_ptr() == k_cache.data_ptr() and v_cache.stride() == k_cache.stride()
    if not inside or v_cache.shape[:2] != k_cache.shape[:2] or d_v > k_cache.shape[-1]:
        raise ShapeError("v_cache: expected k_cache[..., :512], a view of the same rows")
    v_scale = None
    if k_cache.dtype == torch.int8:
        if k_scale_tensor is None or v_scale_tensor is None:
            raise ArgumentError(
                "k_scale_tensor, v_scale_tensor: expected tensors with an int8 cache, got None"
            )
        sm_scale, v_scale = sm_scale * float(k_scale_tensor), float(v_scale_tensor)
        k_cache, block_table = live_pages(k_cache, block_table, seq_lens, q.dtype)
    elif k_scale_tensor is not None or v_scale_tensor is not None:
        raise ArgumentError(f"k_scale_tensor, v_scale_tensor: expected None with a {k_cache.dtype} cache")
    out, lse = flash_mla_with_kvcache(
        q.unsqueeze(1),
        k_cache.unsqueeze(2),
        block_table.int(),
        seq_lens.int(),
        d_v,
        FlashMLASchedMeta(),
        softmax_scale=sm_scale,
    )
    out = out.squeeze(1)
    if v_scale is not None:
        out = (out.float() * v_scale).to(q.dtype)
    return out, lse.squeeze(2) if return_lse else None


def live_pages(k_cache, block_table, seq_lens, dtype):
    """The pages in use, converted (int8 values are exact in 16 bits), and the table that names them."""
    page = k_cache.shape[1]
    column = torch.arange(block_table.shape[1], device=block_table.device)
    used = column < (seq_lens[:, None] + page - 1) // page
    pages, place = torch.unique(block_table[used], return_inverse=True)
    if pages.numel() and not 0 <= int(pages[0]) <= int(pages[-1]) < len(k_cache):
        raise ArgumentError(f"block_table: expected pages of the {len(k_cache)} in k_cache")
    table = torch.zeros_like(block_table)
    table[used] = place.to(table.dtype)
    if not pages.numel():
        return k_cache[:1].to(dtype), table
    return k_cache[pages.long()].to(dtype), table
