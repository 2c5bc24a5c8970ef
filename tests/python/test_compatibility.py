# SPDX-License-Identifier: MIT
"""docs/compatibility/flash_attn_3.md holds: each row's word in our columns, by running the feature.

A probe computes something finite when the word is yes, and raises when it is no.
"""

import flash_attn_interface as fa
import pytest
import torch
from compatibility import Page


class Make:
    """Tensors of one device and dtype."""

    def __init__(self, device):
        self.device = device

    def ints(self, *values):
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def randn(self, *shape, dtype=torch.bfloat16):
        return torch.randn(shape, device=self.device).to(dtype)

    def qkv(self, d=64, d_v=None, h_q=4, h_k=2, dtype=torch.bfloat16):
        return (
            self.randn(2, 5, h_q, d, dtype=dtype),
            self.randn(2, 24, h_k, d, dtype=dtype),
            self.randn(2, 24, h_k, d_v or d, dtype=dtype),
        )

    def flat(self):
        return [x.flatten(0, 1) for x in self.qkv()]

    def lengths(self):
        return self.ints(0, 3, 10), self.ints(0, 24, 48), 7, 24

    def pages(self, size=3):
        k, v = self.randn(2, 2 * 24 // size, size, 2, 64)
        return k, v, torch.arange(2 * 24 // size, device=self.device, dtype=torch.int32).view(2, -1)


PAGE = Page("flash_attn_3", Make)
probe = PAGE.probe


# ---- probes ------------------------------------------------------------------------------------------

probe("`flash_attn_func`")(lambda m: fa.flash_attn_func(*m.qkv()))
probe("`flash_attn_varlen_func`")(lambda m: fa.flash_attn_varlen_func(*m.flat(), *m.lengths()))
probe("`flash_attn_qkvpacked_func`")(lambda m: fa.flash_attn_qkvpacked_func(m.randn(2, 5, 3, 4, 64)))
probe("`flash_attn_with_kvcache`")(
    lambda m: fa.flash_attn_with_kvcache(*m.qkv(), cache_seqlens=m.ints(9, 24))
)
probe("`_flash_attn_forward`")(lambda m: fa._flash_attn_forward(*m.qkv())[0])
probe("`torch.ops.flash_attn_3.fwd`")(lambda m: torch.ops.flash_attn_3.fwd(*m.qkv())[0])
probe("bf16")(lambda m: fa.flash_attn_func(*m.qkv(dtype=torch.bfloat16)))
probe("fp16")(lambda m: fa.flash_attn_func(*m.qkv(dtype=torch.float16)))
probe("fp32")(lambda m: fa.flash_attn_func(*m.qkv(dtype=torch.float32)))
probe("fp8 e4m3fn")(lambda m: fa.flash_attn_func(*m.qkv(dtype=torch.float8_e4m3fn)))
probe("`causal`")(lambda m: fa.flash_attn_func(*m.qkv(), causal=True))
probe("`window_size`")(lambda m: fa.flash_attn_func(*m.qkv(), window_size=(3, 2)))
probe("`attention_chunk`")(lambda m: fa.flash_attn_func(*m.qkv(), attention_chunk=8))
probe("`softcap`")(lambda m: fa.flash_attn_func(*m.qkv(), softcap=5.0))
probe("`sinks`, `s_aux`")(lambda m: fa.flash_attn_func(*m.qkv(), sinks=m.randn(4)))
probe("`seqused_q`, `seqused_k`")(
    lambda m: fa.flash_attn_varlen_func(*m.flat(), *m.lengths(), m.ints(3, 7), m.ints(20, 1))
)
probe("`cache_batch_idx`")(
    lambda m: fa.flash_attn_with_kvcache(*m.qkv(), cache_batch_idx=m.ints(1, 0), cache_seqlens=9)
)
probe("`cache_leftpad`")(
    lambda m: fa.flash_attn_with_kvcache(*m.qkv(), cache_leftpad=m.ints(1, 3), cache_seqlens=9)
)
probe("`num_splits` above 1")(lambda m: fa.flash_attn_func(*m.qkv(), num_splits=3))


@probe("`flash_attn_combine`")
def combine(m):
    partial = m.randn(3, 2, 5, 4, 64, dtype=torch.float32), m.randn(3, 2, 5, 4, dtype=torch.float32)
    return fa.flash_attn_combine(*partial)[0]


@probe("`get_scheduler_metadata`")
def metadata(m):
    seqlens = m.ints(9, 24)
    made = fa.get_scheduler_metadata(2, 5, 24, 4, 2, 64, seqlens, causal=True)
    assert made.shape == (17,) and made.device.type == m.device
    return fa.flash_attn_with_kvcache(*m.qkv(), cache_seqlens=seqlens, causal=True, scheduler_metadata=made)


@probe("d = d_v up to 256")
def widths(m):
    return sum(fa.flash_attn_func(*m.qkv(d)).float().mean() for d in (8, 40, 64, 80, 128, 192, 256))


@probe("d = d_v above 256")
def wide(m):
    return fa.flash_attn_func(*m.qkv(264)).float().mean() + fa.flash_attn_func(*m.qkv(512)).float().mean()


@probe("d_v other than d")
def unequal(m):
    pairs = [(192, 128), (64, 256), (24, 512)] + ([(512, 8)] if m.device == "cpu" else [])
    return sum(fa.flash_attn_func(*m.qkv(d, d_v)).float().mean() for d, d_v in pairs)


@probe("grouped and single KV heads")
def grouped(m):
    return sum(fa.flash_attn_func(*m.qkv(h_q=6, h_k=h_k)).float().mean() for h_k in (6, 3, 2, 1))


@probe("`qv`")
def qv(m):
    total = 0
    for d, d_v in ((64, 256), (64, 512), (24, 320)):
        q, k, v = m.qkv(d, d_v)
        total = total + fa.flash_attn_func(q, k, v, qv=m.randn(2, 5, 4, d_v)).float().mean()
    return total


@probe("`cp_world_size`, `cp_rank`")
def context_parallel(m):
    tot = {"cp_tot_seqused_k": m.ints(48, 48)}
    return fa.flash_attn_func(*m.qkv(), causal=True, cp_world_size=2, cp_rank=1, **tot)


@probe("packed q over a cache")
def packed_over_cache(m):
    q, k, v = m.qkv()
    packed = {"cu_seqlens_q": m.ints(0, 3, 10), "max_seqlen_q": 7}
    return fa.flash_attn_with_kvcache(q.flatten(0, 1), k, v, cache_seqlens=9, **packed)


@probe("pages of any size")
def any_page(m):
    q = m.qkv()[0]
    outs = []
    for size in (1, 3, 8, 24):
        k, v, table = m.pages(size)
        outs.append(fa.flash_attn_with_kvcache(q, k, v, page_table=table, cache_seqlens=m.ints(9, 24)))
    return torch.stack(outs)


def paged_packed(m, **kwargs):
    k, v, table = m.pages()
    lengths = (m.ints(0, 3, 10), None, 7, 24)
    given = {"seqused_k": m.ints(9, 24), "page_table": table}
    return fa.flash_attn_varlen_func(m.flat()[0], k, v, *lengths, **given, **kwargs)


probe("pages in `flash_attn_varlen_func`")(paged_packed)


@probe("`out` in `flash_attn_varlen_func`")
def given_out(m):
    out = m.randn(10, 4, 64)
    assert paged_packed(m, out=out) is out
    return out


def append(m, packed=False, rotary=False, call=fa.flash_attn_with_kvcache, **options):
    q, k, v = m.qkv()
    before = k.clone()
    new = m.randn(2, 4, 2, 64)
    if packed:
        options["cu_seqlens_k_new"] = m.ints(0, 1, 4)
    else:
        new = new.view(2, 2, 2, 2, 64)
    if rotary:
        options |= {"rotary_cos": m.randn(24, 16), "rotary_sin": m.randn(24, 16)}
    out = call(q, k, v, *new, cache_seqlens=m.ints(3, 9), causal=True, **options)
    assert not torch.equal(k, before)
    return out


probe("append of new keys")(append)
probe("append, packed")(lambda m: append(m, packed=True))
probe("rotary")(lambda m: append(m, rotary=True))
probe("traced append")(
    lambda m: append(m, call=torch.compile(fa.flash_attn_with_kvcache, fullgraph=True), num_splits=1)
)


@probe("partial results returned")
def partial_results(m):
    out, _, out_accum, lse_accum = fa._flash_attn_forward(*m.qkv(), num_splits=3)
    if not out_accum.numel():
        raise NotImplementedError("computed in one pass")
    assert out_accum.shape == (3, 2, 4, 5, 64) and lse_accum.shape == (3, 2, 4, 5)
    return out


@probe("index values out of range")
def wild_indices(m):
    q, (k, v, table) = m.qkv()[0], m.pages()
    last = len(k) - 1

    def call(page):
        table[1, 2] = page
        return fa.flash_attn_with_kvcache(q, k, v, page_table=table, cache_seqlens=24)

    if m.device == "cpu":
        with pytest.raises(ValueError, match="page_table"):
            call(1 << 30)
        return k
    assert torch.equal(call(1 << 30), call(last))
    return call(-(1 << 31))


@probe("`torch.compile(fullgraph=True)`")
def compiled(m):
    return torch.compile(fa.flash_attn_func, fullgraph=True)(*m.qkv(), causal=True)


@probe("gradients")
def gradients(m):
    q, k, v = m.qkv()
    out = fa.flash_attn_func(q.requires_grad_(), k, v)
    assert out.requires_grad
    out.float().sum().backward()
    return q.grad


# ---- the page ----------------------------------------------------------------------------------------


def test_a_probe_for_each_row_and_a_row_for_each_probe():
    assert PAGE.rows().keys() == PAGE.probes.keys()


@pytest.mark.parametrize("feature", PAGE.probes)
def test_our_column(feature, device):
    PAGE.check(feature, device)
