# SPDX-License-Identifier: MIT
"""The attention layer of DeepSeek-V2 and V3 over a paged latent cache.

A token leaves one row in the cache, whatever the number of heads: its latent c (r values, RMS-normed) and
a rope part k_r (d_rope), shared by all heads.  Keys and values are linear in it,

    k^h = [W_UK^h c; k_r],    v^h = W_UV^h c,

and W_UK^h, W_UV^h are rows of the checkpoint's kv_b_proj.  Attention can be computed in two ways:

    prefill, not absorbed:  expand k^h and v^h for every key, attend with widths d_nope + d_rope and d_v
    decode, absorbed:       q~^h = (W_UK^h)^T q_n^h, attend with [q~^h; q_r^h] on the rows of the cache as
                            they are (K = row, V = its latent), then o^h = W_UV^h u^h

They are equal since q_n . (W_UK c) = ((W_UK)^T q_n) . c; both have the scale (d_nope + d_rope)^-1/2, times
m^2 for YaRN, not that of the width 576.

The functions are the steps; PagedLatentCache and Step say where tokens lie; LatentAttention is the layer,
with the parameter names of the checkpoints.
"""

import math
from dataclasses import dataclass, field

import torch
from libattn import ArgumentError, NotBuiltError, ShapeError, mha
from torch import nn

from .flash_mla_interface import FlashMLASchedMeta, flash_mla_with_kvcache

# ---- absorption --------------------------------------------------------------------------------------


def split_kv_b_proj(weight, num_heads, d_nope, d_v):
    """kv_b_proj's weight (h (d_nope + d_v), r) as views: W_UK (h, d_nope, r) and W_UV (h, d_v, r)."""
    if weight.dim() != 2 or weight.shape[0] != num_heads * (d_nope + d_v):
        raise ShapeError(
            f"weight: expected ({num_heads * (d_nope + d_v)}, r), {num_heads} heads of {d_nope} + {d_v}, "
            f"got {tuple(weight.shape)}"
        )
    return weight.view(num_heads, d_nope + d_v, -1).split([d_nope, d_v], dim=1)


def absorb_query(q_nope, w_uk):
    """q_nope (..., h, d_nope), W_UK (h, d_nope, r) -> (..., h, r)."""
    return torch.einsum("...hn,hnr->...hr", q_nope, w_uk)


def expand_output(u, w_uv):
    """What attention on latents gave, u (..., h, r), with W_UV (h, d_v, r) -> (..., h, d_v)."""
    return torch.einsum("...hr,hvr->...hv", u, w_uv)


def expand_latents(rows, w_uk, w_uv):
    """Rows of the cache (t, r + d_rope) -> k (t, h, d_nope + d_rope), v (t, h, d_v)."""
    h, d_nope, r = w_uk.shape
    latent, rope = rows[:, :r], rows[:, r:]
    k = rows.new_empty(len(rows), h, d_nope + rope.shape[1])
    k[..., :d_nope] = torch.einsum("tr,hnr->thn", latent, w_uk)
    k[..., d_nope:] = rope[:, None]
    return k, torch.einsum("tr,hvr->thv", latent, w_uv)


# ---- rope --------------------------------------------------------------------------------------------


def yarn_mscale(factor, mscale=1.0):
    """0.1 mscale ln(factor) + 1, and 1 without an extension."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(d_nope, d_rope, rope_scaling=None):
    """(d_nope + d_rope)^-1/2, times m^2 where rope_scaling has a factor and mscale_all_dim."""
    scale = (d_nope + d_rope) ** -0.5
    if rope_scaling and rope_scaling.get("mscale_all_dim"):
        scale *= yarn_mscale(rope_scaling.get("factor", 1.0), rope_scaling["mscale_all_dim"]) ** 2
    return scale


def rope_frequencies(d_rope, theta=10000.0, rope_scaling=None, max_positions=4096):
    """(d_rope / 2 angles a position, fp32, and the gain of cos and sin).

    rope_scaling: a checkpoint's; None or without YaRN's keys is plain rope.  YaRN divides the angles by
    `factor` where a period exceeds the original context, keeps those that turn more than beta_fast times
    in it, and goes linearly from beta_fast to beta_slow turns.
    """
    if d_rope < 2 or d_rope % 2:
        raise ArgumentError(f"d_rope: expected a positive even number, got {d_rope}")
    exponent = torch.arange(0, d_rope, 2, dtype=torch.float32) / d_rope
    plain = theta**-exponent
    scaling = rope_scaling or {}
    if scaling.get("rope_type", scaling.get("type", "default")) in ("default", None):
        return plain, 1.0
    if scaling.get("rope_type", scaling.get("type")) != "yarn":
        raise ArgumentError(f"rope_scaling: expected type yarn or none, got {scaling}")
    factor = scaling["factor"]
    context = scaling.get("original_max_position_embeddings") or max_positions

    def pair_that_turns(times):
        """Index of the pair whose period is context / times."""
        return d_rope * math.log(context / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(scaling.get("beta_fast") or 32)), 0)
    high = min(math.ceil(pair_that_turns(scaling.get("beta_slow") or 1)), d_rope - 1)
    slow = ((torch.arange(d_rope // 2) - low) / max(high - low, 1e-3)).clamp(0, 1)
    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and all_dim:
        gain = yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
    else:
        gain = yarn_mscale(factor)
    return plain / factor * slow + plain * (1 - slow), gain


def rope_tables(positions, frequencies, gain=1.0):
    """cos, sin (t, d_rope / 2) of positions (t,), fp32."""
    angles = positions.float()[:, None] * frequencies.to(positions.device)
    return angles.cos() * gain, angles.sin() * gain


def apply_rope(x, cos, sin):
    """x (t, ..., d_rope) turned pair by pair: values 2 i and 2 i + 1 by angle i, in fp32."""
    cos, sin = (t.view(len(t), *[1] * (x.dim() - 2), -1) for t in (cos, sin))
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


# ---- where tokens lie --------------------------------------------------------------------------------


@dataclass
class Step:
    """The new tokens of some sequences in one pass through the model, for all layers: t tokens, packed.

    positions (t,) int64, slots (t,) int64: where each new token is in its sequence and in the cache.
    new, total: tokens of each sequence, new ones and all.  block_table int32 (b, max_pages),
    cache_seqlens int32 (b,) after the step.  meta: scheduler metadata.
    """

    positions: torch.Tensor
    slots: torch.Tensor
    new: list[int]
    total: list[int]
    block_table: torch.Tensor
    cache_seqlens: torch.Tensor
    meta: FlashMLASchedMeta = field(default_factory=FlashMLASchedMeta)

    @property
    def last(self):
        """Index of each sequence's last token among the t."""
        return torch.tensor(self.new).cumsum(0) - 1

    def offsets(self, lengths):
        """cu_seqlens int32 (b + 1,)."""
        sums = [0]
        for n in lengths:
            sums.append(sums[-1] + n)
        return torch.tensor(sums, dtype=torch.int32, device=self.slots.device)


class PagedLatentCache:
    """Latent rows of all layers in pages shared by all sequences.

    data (layers, pages, page, 1, d): a sequence has the same pages in every layer.  A row is written once
    and read by all heads: d values a token and layer.
    """

    def __init__(self, layers, pages, page=64, d=576, dtype=torch.bfloat16, device=None):
        for name, value in (("layers", layers), ("pages", pages), ("page", page), ("d", d)):
            if value < 1:
                raise ArgumentError(f"{name}: expected at least 1, got {value}")
        self.data = torch.zeros(layers, pages, page, 1, d, dtype=dtype, device=device)
        self.page = page
        self.free = list(range(pages - 1, -1, -1))
        self.pages = {}  # of each sequence, in order
        self.lengths = {}  # its tokens

    def __getitem__(self, layer):
        """One layer's pages, as flash_mla_with_kvcache takes them."""
        return self.data[layer]

    @property
    def bytes_per_token(self):
        return self.data.shape[0] * self.data.shape[-1] * self.data.element_size()

    def step(self, tokens):
        """Makes room for tokens {sequence: number of new tokens} and says where they go: a Step."""
        if not tokens or any(n < 1 for n in tokens.values()):
            raise ArgumentError(f"tokens: expected one or more of each sequence, got {tokens}")
        want = {
            s: -(-(self.lengths.get(s, 0) + n) // self.page) - len(self.pages.get(s, []))
            for s, n in tokens.items()
        }
        if sum(want.values()) > len(self.free):
            raise ArgumentError(
                f"tokens: expected to need at most {len(self.free)} free pages, got {sum(want.values())}"
            )
        positions, slots, total = [], [], []
        for s, n in tokens.items():
            pages = self.pages.setdefault(s, [])
            pages += [self.free.pop() for _ in range(want[s])]
            start = self.lengths.get(s, 0)
            self.lengths[s] = start + n
            total.append(start + n)
            at = torch.arange(start, start + n)
            positions.append(at)
            slots.append(torch.tensor(pages)[at // self.page] * self.page + at % self.page)
        longest = max(len(self.pages[s]) for s in tokens)
        table = [self.pages[s] + [0] * (longest - len(self.pages[s])) for s in tokens]
        device = self.data.device
        return Step(
            positions=torch.cat(positions).to(device),
            slots=torch.cat(slots).to(device),
            new=list(tokens.values()),
            total=total,
            block_table=torch.tensor(table, dtype=torch.int32, device=device),
            cache_seqlens=torch.tensor(total, dtype=torch.int32, device=device),
        )

    def drop(self, sequence):
        """Gives a sequence's pages back."""
        self.free += self.pages.pop(sequence)
        del self.lengths[sequence]


def cached_rows(k_cache, step):
    """All rows of the step's sequences, packed: (t_k, d)."""
    page = k_cache.shape[1]
    rows = []
    for pages, n in zip(step.block_table, step.total):
        rows.append(k_cache[pages[: -(-n // page)].long()].flatten(0, 2)[:n])
    return torch.cat(rows)


# ---- the layer ---------------------------------------------------------------------------------------


def attend_absorbed(q_nope, q_rope, k_cache, w_uk, w_uv, step, scale):
    """Decode: q_nope (t, h, d_nope), q_rope (t, h, d_rope), as many new tokens of each sequence, on the
    pages k_cache -> (t, h, d_v)."""
    b = len(step.new)
    q = torch.cat((absorb_query(q_nope, w_uk), q_rope), -1).unflatten(0, (b, -1))
    u, _ = flash_mla_with_kvcache(
        q,
        k_cache,
        step.block_table,
        step.cache_seqlens,
        w_uk.shape[2],
        step.meta,
        softmax_scale=scale,
        causal=True,
    )
    return expand_output(u.flatten(0, 1), w_uv)


def attend_expanded(q_nope, q_rope, rows, w_uk, w_uv, step, scale):
    """Prefill: q_nope (t, h, d_nope), q_rope (t, h, d_rope) on the packed rows (t_k, r + d_rope) of all the
    step's tokens, old and new -> (t, h, d_v)."""
    k, v = expand_latents(rows, w_uk, w_uv)
    lengths = step.offsets(step.new), step.offsets(step.total), max(step.new), max(step.total)
    out, _, _, _ = mha.attend(
        torch.cat((q_nope, q_rope), -1), k, v, scale, True, -1, -1, 0.0, 0, 1, None, False, False, lengths
    )
    return out


class WithoutGradient(torch.autograd.Function):
    """Passes the attention's result on, and refuses the gradient that it would lose."""

    @staticmethod
    def forward(ctx, out, q):
        return out.view_as(out)

    @staticmethod
    def backward(ctx, dout):
        raise NotBuiltError("flash_mla.layer: gradients of attention are not in this version of libattn")


class LatentAttention(nn.Module):
    """Multi-head latent attention; parameters are named as in DeepSeek's checkpoints.

    q_lora_rank None: one q_proj in place of q_a_proj, q_a_layernorm and q_b_proj (V2-Lite).  scale: see
    softmax_scale.  Up to `absorb` new tokens of each sequence, as many of each, are decoded (absorbed);
    else the step is a prefill.
    """

    def __init__(
        self,
        hidden_size,
        num_heads,
        q_lora_rank=1536,
        kv_lora_rank=512,
        d_nope=128,
        d_rope=64,
        d_v=128,
        scale=None,
        eps=1e-6,
        bias=False,
        absorb=4,
    ):
        super().__init__()
        if num_heads < 1:
            raise ArgumentError(f"num_heads: expected at least 1, got {num_heads}")
        self.num_heads, self.d_nope, self.d_rope, self.d_v = num_heads, d_nope, d_rope, d_v
        self.kv_lora_rank, self.absorb = kv_lora_rank, absorb
        self.scale = softmax_scale(d_nope, d_rope) if scale is None else scale
        d_qk = d_nope + d_rope
        if q_lora_rank is None:
            self.q_proj = nn.Linear(hidden_size, num_heads * d_qk, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden_size, q_lora_rank, bias=bias)
            self.q_a_layernorm = nn.RMSNorm(q_lora_rank, eps=eps)
            self.q_b_proj = nn.Linear(q_lora_rank, num_heads * d_qk, bias=False)
        self.q_lora_rank = q_lora_rank
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, kv_lora_rank + d_rope, bias=bias)
        self.kv_a_layernorm = nn.RMSNorm(kv_lora_rank, eps=eps)
        self.kv_b_proj = nn.Linear(kv_lora_rank, num_heads * (d_nope + d_v), bias=False)
        self.o_proj = nn.Linear(num_heads * d_v, hidden_size, bias=bias)

    @classmethod
    def from_config(cls, config):
        """The layer of a DeepseekV2Config or DeepseekV3Config of transformers."""
        return cls(
            config.hidden_size,
            config.num_attention_heads,
            config.q_lora_rank,
            config.kv_lora_rank,
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
            scale=softmax_scale(
                config.qk_nope_head_dim, config.qk_rope_head_dim, getattr(config, "rope_parameters", None)
            ),
            bias=config.attention_bias,
        )

    def query(self, x, cos, sin):
        """x (t, hidden) -> q_nope (t, h, d_nope), q_rope (t, h, d_rope)."""
        if self.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_nope, q_rope = q.view(len(x), self.num_heads, -1).split([self.d_nope, self.d_rope], -1)
        return q_nope, apply_rope(q_rope, cos, sin)

    def cache_row(self, x, cos, sin):
        """x (t, hidden) -> what the tokens leave in the cache, (t, r + d_rope)."""
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.kv_lora_rank, self.d_rope], -1)
        return torch.cat((self.kv_a_layernorm(latent), apply_rope(k_rope, cos, sin)), -1)

    def forward(self, x, cos, sin, k_cache, step):
        """x (t, hidden), the step's packed tokens; cos, sin (t, d_rope / 2) of step.positions; k_cache one
        layer's pages, to which the new rows are written -> (t, hidden)."""
        q = self.query(x, cos, sin)
        rows = self.cache_row(x, cos, sin)
        k_cache.view(-1, k_cache.shape[-1])[step.slots] = rows.detach().to(k_cache.dtype)
        w = split_kv_b_proj(self.kv_b_proj.weight, self.num_heads, self.d_nope, self.d_v)
        if len(set(step.new)) == 1 and step.new[0] <= self.absorb:
            out = attend_absorbed(*q, k_cache, *w, step, self.scale)
        else:
            if step.new != step.total:
                rows = cached_rows(k_cache, step)
            out = attend_expanded(*q, rows, *w, step, self.scale)
        if torch.is_grad_enabled() and q[0].requires_grad:
            out = WithoutGradient.apply(out, q[0])
        return self.o_proj(out.flatten(1))
