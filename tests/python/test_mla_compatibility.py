# SPDX-License-Identifier: MIT
"""docs/compatibility/flash_mla.md holds: each row's word in our columns, by running the feature.

A probe computes something finite when the word is yes, and raises when it is no.
"""

import flash_mla
import mla_reference as reference
import pytest
import torch
from compatibility import Page
from flash_mla import cache, flash_mla_interface, layer
from flash_mla.kernels import triton_flash_mla
from flash_mla.ops import interface


class Make:
    """Calls of one device."""

    def __init__(self, device):
        self.device = device

    def ints(self, *values):
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def randn(self, *shape, dtype=torch.bfloat16):
        return (torch.randn(shape) / 4).to(dtype).to(self.device)

    def dense(self, dtype=torch.bfloat16, page=64, d=576, h_k=1, s_q=2, **options):
        pages = -(-130 // page)
        arguments = {
            "q": self.randn(2, s_q, 4, d, dtype=dtype),
            "k_cache": self.randn(2 * pages, page, h_k, d, dtype=dtype),
            "block_table": torch.arange(2 * pages, dtype=torch.int32, device=self.device).view(2, -1),
            "cache_seqlens": self.ints(130, 3),
            "head_dim_v": 512,
            "tile_scheduler_metadata": flash_mla.FlashMLASchedMeta(),
            "causal": True,
        }
        return flash_mla.flash_mla_with_kvcache(**arguments | options)

    def fp8(self):
        one = torch.ones(1, device=self.device)
        return {"dtype": torch.float8_e4m3fn, "descale_q": one, "descale_k": one}

    def cache(self, d, pages=2, page=64):
        return reference.pack(torch.randn(pages, page, d) / 4).view(torch.uint8).to(self.device)

    def sparse(self, d=576, h_q=64, topk=64, extra=False, **options):
        arguments = {
            "q": self.randn(2, 1, h_q, d),
            "k_cache": self.cache(d),
            "indices": torch.randint(0, 128, (2, 1, topk), dtype=torch.int32).to(self.device),
            "block_table": None,
            "cache_seqlens": None,
            "head_dim_v": 512,
            "tile_scheduler_metadata": flash_mla.FlashMLASchedMeta(),
            "is_fp8_kvcache": True,
        }
        if extra:
            arguments["extra_k_cache"] = self.cache(d)
            arguments["extra_indices_in_kvcache"] = arguments["indices"]
        return flash_mla.flash_mla_with_kvcache(**arguments | options)[0]

    def prefill(self, d=576, dtype=torch.bfloat16, indices=None, **options):
        if indices is None:
            indices = torch.randint(0, 90, (3, 1, 128), dtype=torch.int32).to(self.device)
        q, kv = self.randn(3, 64, d, dtype=dtype), self.randn(90, 1, d, dtype=dtype)
        return flash_mla.flash_mla_sparse_fwd(q, kv, indices, 0.1, **options)

    def mha(self, d=192):
        q, k, v = self.randn(9, 4, d), self.randn(9, 4, d), self.randn(9, 4, 128)
        return q, k, v, self.ints(0, 4, 9)


PAGE = Page("flash_mla", Make)
probe = PAGE.probe


# ---- probes ------------------------------------------------------------------------------------------

probe("dense decode, bf16")(lambda m: m.dense()[0])
probe("dense decode, fp16")(lambda m: m.dense(torch.float16)[0])
probe("dense decode, fp32")(lambda m: m.dense(torch.float32)[0])
probe("dense decode, e4m3 with `descale_q`, `descale_k`")(lambda m: m.dense(**m.fp8())[0])
probe("dense decode, d 512")(lambda m: m.dense(d=512)[0])
probe("dense decode, `h_k` above 1")(lambda m: m.dense(h_k=2)[0])
probe("`causal` with several queries")(lambda m: m.dense(s_q=2)[0])
probe("`s_q` above 2")(lambda m: m.dense(s_q=4, cache_seqlens=m.ints(130, 9))[0])
probe("sparse decode, V32")(lambda m: m.sparse(576))
probe("sparse decode, MODEL1")(lambda m: m.sparse(512))
probe("`extra_k_cache` with MODEL1")(lambda m: m.sparse(512, extra=True))
probe("`extra_k_cache` with V32")(lambda m: m.sparse(576, extra=True))
probe("`flash_mla_sparse_fwd`, d 576")(lambda m: m.prefill(576)[0])
probe("`flash_mla_sparse_fwd`, d 512")(lambda m: m.prefill(512)[0])


@probe("dense decode, pages other than 64")
def pages(m):
    return sum(m.dense(page=page)[0].float().mean() for page in (1, 16, 53, 128))


@probe("`flash_mla_with_kvcache_fp8`")
def vllm_fp8(m):
    lens = m.ints(130, 3)
    q, k_cache = m.randn(2, 1, 4, 576), m.randn(6, 64, 1, 576)
    table, one = (
        torch.arange(6, dtype=torch.int32, device=m.device).view(2, 3),
        torch.ones(1, device=m.device),
    )
    f8 = torch.float8_e4m3fn
    pair = flash_mla.get_mla_metadata_dense_fp8(lens, 4, 1)
    return flash_mla.flash_mla_with_kvcache_fp8(
        q.to(f8), k_cache.to(f8), table, lens, 512, *pair, descale_q=one, descale_k=one
    )[0]


@probe("`topk_length`, `attn_sink` with V32")
def v32_lengths(m):
    return m.sparse(topk_length=m.ints(3, 64), attn_sink=torch.zeros(64, device=m.device))


@probe("sparse calls, `h_q` other than 64 and 128")
def heads(m):
    return sum(m.sparse(h_q=h).float().mean() for h in (1, 16, 96))


@probe("sparse calls, any `topk`")
def any_topk(m):
    return sum(m.sparse(topk=n).float().mean() for n in (1, 7, 65))


@probe("`indices` (b, s_q, 1, topk)")
def four_axes(m):
    return m.sparse(indices=torch.zeros(2, 1, 1, 64, dtype=torch.int32, device=m.device))


@probe("decode indices out of range are skipped")
def wild(m):
    where = m.ints(-1, 5, 2**31 - 1, -(2**31), 128, 127).view(1, 1, -1).expand(2, 1, 6)
    got = m.sparse(indices=where.contiguous())
    assert got.any()
    return got


@probe("`flash_mla_sparse_fwd`, fp16 and fp32")
def prefill_dtypes(m):
    return sum(m.prefill(dtype=dtype)[0].float().mean() for dtype in (torch.float16, torch.float32))


@probe("`out` in dense decode")
def given(m):
    out = torch.empty(2, 2, 4, 512, dtype=torch.bfloat16, device=m.device)
    assert m.dense(out=out)[0] is out
    return out


@probe("`out` in sparse decode and prefill")
def given_sparse(m):
    outs = [
        torch.empty(n, *shape, dtype=torch.bfloat16, device=m.device)
        for n, *shape in ((2, 1, 64, 512), (3, 64, 512))
    ]
    assert m.sparse(out=outs[0]) is outs[0] and m.prefill(out=outs[1])[0] is outs[1]
    return outs[0].float().mean() + outs[1].float().mean()


@probe("`flash_attn_varlen_func`, 192/128 and 128/128")
def varlen(m):
    total = 0
    for d in (192, 128):
        q, k, v, cu = m.mha(d)
        total = total + flash_mla.flash_attn_varlen_func(q, k, v, cu, cu, 5, 5, causal=True)[0].float().mean()
    return total


@probe("packed forms of `flash_attn_varlen_func`")
def packed(m):
    q, k, v, cu = m.mha()
    kv, qkv = torch.cat((k, v), -1), torch.cat((q, k, v), -1)
    by_kv = flash_mla.flash_attn_varlen_kvpacked_func(q, kv, cu, cu, 5, 5, 192)[0]
    return by_kv + flash_mla.flash_attn_varlen_qkvpacked_func(qkv, cu, 5, 192)[0]


@probe("gradients of `flash_attn_varlen_func`")
def gradients(m):
    q, k, v, cu = m.mha()
    out, _ = flash_mla.flash_attn_varlen_func(q.requires_grad_(), k, v, cu, cu, 5, 5)
    out.float().sum().backward()
    return q.grad


@probe("`FlashMLASchedMeta` in both modules")
def both(m):
    assert flash_mla.FlashMLASchedMeta is flash_mla_interface.FlashMLASchedMeta
    return torch.ones(1)


@probe("the first releases' metadata tensors")
def tensors(m):
    table, num_splits = flash_mla.get_mla_metadata(m.ints(130, 3), 8, 1)
    assert table.shape[1] == 8 and num_splits.shape == (3,) and table.device.type == m.device
    return table + num_splits.sum()


@probe("decode with a pair of tensors")
def pair(m):
    table, num_splits = flash_mla.get_mla_metadata(m.ints(130, 3), 8, 1)
    return m.dense(tile_scheduler_metadata=table, num_splits=num_splits)[0]


@probe("`descale_q`, `descale_k` by older positions")
def older(m):
    q, k, table, lens = m.randn(1, 1, 4, 576), m.randn(2, 64, 1, 576), m.ints(0, 1)[None], m.ints(100)
    pair = flash_mla.get_mla_metadata(lens, 4, 1)
    return flash_mla.flash_mla_with_kvcache(
        q, k, table, lens, 512, *pair, 0.1, True, None, None, False, None
    )[0]


@probe("results independent of the metadata's content")
def content(m):
    torch.manual_seed(1)
    want = m.dense()[0]
    torch.manual_seed(1)
    table = torch.full((3, 8), 2**31 - 1, dtype=torch.int32, device=m.device)
    got = m.dense(tile_scheduler_metadata=table, num_splits=table[0, :3].contiguous())[0]
    assert torch.equal(got, want)
    return got


@probe("empty row of sparse prefill: lse +inf")
def empty_row(m):
    _, top, lse = m.prefill(indices=torch.full((3, 1, 64), -1, dtype=torch.int32, device=m.device))
    assert torch.isposinf(lse).all() and torch.isneginf(top).all()
    return torch.ones(1)


@probe("dense lse (b, h_q, s_q)")
def lse_layout(m):
    lse = m.dense()[1]
    assert lse.shape == (2, 4, 2)
    return lse


@probe("writers and readers of FP8 caches")
def formats(m):
    return sum(
        cache.dequantize_k_cache(cache.quantize_k_cache(m.randn(2, 64, 1, d))).float().mean()
        for d in (576, 512)
    )


@probe("DeepSeek's attention layer")
def deepseek(m):
    attention = layer.LatentAttention(64, 2, None).bfloat16().to(m.device)
    store = layer.PagedLatentCache(1, 4, device=m.device)
    with torch.no_grad():
        for new in (9, 1):
            step = store.step({"a": new})
            tables = layer.rope_tables(step.positions, *layer.rope_frequencies(64))
            out = attention(m.randn(new, 64), *tables, store[0], step)
    return out


@probe("`torch.compile`")
def compiled(m):
    options = {"q": m.randn(2, 2, 4, 576), "k_cache": m.randn(6, 64, 1, 576)}
    torch._dynamo.reset()
    step = torch.compile(lambda: m.dense(**options)[0] + 1, backend="eager")
    assert torch.equal(step(), m.dense(**options)[0] + 1)
    return step()


@probe("the Triton package's functions")
def triton(m):
    q, kv = m.randn(2, 9, 4, 512), m.randn(2, 9, 512)
    out = interface.flash_mla_prefill(q, kv, 0.1)[:, 0] + interface.flash_mla_decode(q[:, 0], kv, 0.1)
    k, table = m.randn(4, 64, 576), m.ints(0, 1, 2, 3).view(2, 2)
    paged = m.randn(2, 4, 576), k, k[..., :512], table, m.ints(70, 3)
    return out + triton_flash_mla.flash_mla_decode(*paged, 0.1)[0]


# ---- the page ----------------------------------------------------------------------------------------


def test_a_probe_for_each_row_and_a_row_for_each_probe():
    assert PAGE.rows().keys() == PAGE.probes.keys()


@pytest.mark.parametrize("feature", PAGE.probes)
def test_our_column(feature, device):
    PAGE.check(feature, device)
