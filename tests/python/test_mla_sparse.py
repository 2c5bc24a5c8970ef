# SPDX-License-Identifier: MIT
"""Sparse decode over FP8 caches and sparse prefill, against the definition in fp64."""

import functools
import math

import flash_mla
import mla_cases as cases
import mla_reference as reference
import pytest
import torch
from mla_cases import generator

INF = float("inf")


def decode_case(gen, d, h_q, b, s_q, part, extra=None, lengths=(), sink=False, share_wild=0.1):
    """Keyword arguments of a sparse decode; part and extra are (s_kv, topk, page), lengths names those
    of "own", "extra" that get a topk_length."""
    a = {"q": cases.queries(gen, b, s_q, h_q, d)}
    for name, which in (("own", part), ("extra", extra)):
        if which is None:
            continue
        s_kv, topk, page = which
        pages = -(-s_kv // page)
        where = cases.indices(gen, b, s_q, topk, limit=pages * page, share_wild=share_wild)
        length = None
        if name in lengths:
            length = torch.randint(0, topk + 1, (b,), generator=gen).int()
            length[0], length[-1] = 0, topk
        cache = cases.fp8_cache(gen, pages, page, d, cases.used(where, length))
        if name == "own":
            a |= {"k_cache": cache, "indices": where, "topk_length": length}
        else:
            a |= {
                "extra_k_cache": cache,
                "extra_indices_in_kvcache": where,
                "extra_topk_length": length,
            }
    if sink:
        a["attn_sink"] = torch.randn(h_q, generator=gen)
        a["attn_sink"][::3], a["attn_sink"][1::3] = INF, -INF
    return a


def decode(device, a, scale=None):
    """One call, compared with the definition."""
    call = {name: cases.moved(x, device) for name, x in a.items()}
    out, lse = cases.not_on_cuda(
        device,
        lambda: flash_mla.flash_mla_with_kvcache(
            **call,
            block_table=None,
            cache_seqlens=None,
            head_dim_v=512,
            tile_scheduler_metadata=flash_mla.FlashMLASchedMeta(),
            softmax_scale=scale,
            is_fp8_kvcache=True,
        ),
    )
    extra = None
    if "extra_k_cache" in a:
        extra = a["extra_k_cache"], a["extra_indices_in_kvcache"], a.get("extra_topk_length")
    want, want_lse = reference.sparse_decode(
        a["q"],
        a["k_cache"],
        a["indices"],
        reference.scale_for(a["q"]) if scale is None else scale,
        a.get("attn_sink"),
        a.get("topk_length"),
        extra,
    )
    assert out.dtype == torch.bfloat16 and out.is_contiguous()
    assert lse.dtype == torch.float32 and lse.transpose(1, 2).is_contiguous()
    reference.assert_close(out, want, reference.SPARSE_OUT, "out")
    reference.assert_close(lse, want_lse, reference.DECODE_LSE, "lse")
    return out, lse


SHAPES = [(512, 64, 2), (512, 64, 64), (512, 64, 69), (1024, 576, 2), (1024, 576, 61), (2046, 2048, 64)]
EVERY_LENGTH = [(), ("own",), ("extra",), ("own", "extra")]


@pytest.mark.parametrize("part", SHAPES, ids=str)
@pytest.mark.parametrize("h_q", [64, 128])
@pytest.mark.parametrize("d", [576, 512])
def test_decode_shapes(device, d, h_q, part):
    gen = generator(d, h_q, *part)
    b, s_q = cases.pick(gen, [(2, 1), (1, 3), (2, 2)])
    decode(device, decode_case(gen, d, h_q, b, s_q, part), d**-0.55)


@pytest.mark.parametrize(
    ("b", "s_q", "h_q", "part"),
    [(74, 1, 4, (512, 64, 69)), (321, 1, 2, (2046, 64, 576)), (9, 2, 5, (1024, 16384, 64))],
    ids=str,
)
@pytest.mark.parametrize("d", [576, 512])
def test_decode_of_many_sequences_and_many_keys(device, d, b, s_q, h_q, part):
    decode(device, decode_case(generator(d, b), d, h_q, b, s_q, part, None, ("own",), sink=True))


@pytest.mark.parametrize("lengths", EVERY_LENGTH, ids=str)
@pytest.mark.parametrize("extra", [(512, 64, 2), (576, 192, 64)], ids=str)
@pytest.mark.parametrize("d", [576, 512])
def test_decode_with_an_extra_cache(device, d, extra, lengths):
    gen = generator(d, *extra, len(lengths))
    decode(device, decode_case(gen, d, 16, 4, 2, (512, 128, 53), extra, lengths, sink=True))


@pytest.mark.parametrize("d", [576, 512])
@pytest.mark.parametrize("h_q", [1, 5, 16, 63, 126])
@pytest.mark.parametrize("topk", [1, 7, 65])
def test_decode_wider_than_upstream(device, d, h_q, topk):
    """Any number of heads and of indices, lengths with V32 too."""
    gen = generator(d, h_q, topk)
    decode(device, decode_case(gen, d, h_q, 3, 1, (300, topk, 61), None, ("own",), sink=True))


@pytest.mark.parametrize("d", [576, 512])
@pytest.mark.parametrize("page", [53, 61])
def test_decode_without_any_key(device, d, page):
    a = decode_case(
        generator(d, page), d, 8, 3, 2, (200, 64, page), (200, 64, page), share_wild=2.0, sink=True
    )
    out, lse = decode(device, a)
    assert (out == 0).all() and torch.isposinf(lse).all()


@pytest.mark.parametrize("d", [576, 512])
def test_decode_of_zero_lengths(device, d):
    a = decode_case(generator(d), d, 8, 3, 1, (200, 64, 64), (200, 64, 64), ("own", "extra"))
    a["topk_length"] = torch.tensor([0, 0, 64]).int()
    a["extra_topk_length"] = torch.tensor([0, 3, 0]).int()
    rows = cases.keys(generator(1), 4, 64, d)
    a["k_cache"] = a["extra_k_cache"] = reference.pack(rows)
    out, lse = decode(device, a)
    assert (out[0] == 0).all() and torch.isposinf(lse[0]).all() and torch.isfinite(lse[1:]).all()


@pytest.mark.parametrize("d", [576, 512])
def test_lengths_beyond_topk_count_as_topk(device, d):
    a = decode_case(generator(d), d, 4, 2, 1, (200, 64, 64), share_wild=0.0)
    want = decode(device, a)
    a["topk_length"] = torch.tensor([65, 2**31 - 1]).int()
    call = {name: cases.moved(x, device) for name, x in a.items()}
    got = flash_mla.flash_mla_with_kvcache(
        **call,
        block_table=None,
        cache_seqlens=None,
        head_dim_v=512,
        tile_scheduler_metadata=flash_mla.FlashMLASchedMeta(),
        is_fp8_kvcache=True,
    )
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("d", [576, 512])
def test_duplicates_count_twice(device, d):
    gen = generator(d)
    a = decode_case(gen, d, 4, 1, 1, (64, 64, 64), share_wild=0.0)
    a["indices"][:] = torch.tensor([5] * 60 + [9] * 4).int()
    a["k_cache"] = reference.pack(cases.keys(gen, 1, 64, d))
    decode(device, a)


@pytest.mark.parametrize("d", [576, 512])
def test_one_key_and_no_query_give_the_stored_value_bit_for_bit(device, d):
    gen = generator(d)
    cache = reference.pack(cases.noise(gen, 3, 61, d))
    where = torch.full((1, 1, 64), -1, dtype=torch.int32)
    where[0, 0, 17] = 2 * 61 + 33
    out, _ = decode(device, {"q": torch.zeros(1, 1, 64, d).bfloat16(), "k_cache": cache, "indices": where})
    want = reference.unpack(cache, d)[2, 33, :512]
    assert torch.equal(out.cpu()[0, 0], want.expand(64, 512))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, cases.FP8], ids=str)
@pytest.mark.parametrize("d", [576, 512])
def test_bytes_are_bytes(device, d, dtype):
    a = decode_case(generator(d), d, 4, 2, 1, (200, 64, 64), (200, 64, 2))
    a["k_cache"], a["extra_k_cache"] = a["k_cache"].view(dtype), a["extra_k_cache"].view(dtype)
    decode(device, a)


@pytest.mark.parametrize("d", [576, 512])
def test_page_strides_of_the_caller(device, d):
    """Pages inside a larger buffer, as of one cache for all layers."""
    a = decode_case(generator(d), d, 4, 2, 1, (200, 64, 64))
    want = decode(device, a)
    cache = a["k_cache"].view(torch.uint8)
    row = cache.shape[3]
    stride = cache.stride(0) * 2
    memory = torch.full((4 * stride,), 0x7F, dtype=torch.uint8)
    pages = memory.as_strided((len(cache), 64 * row), (stride, 1))
    pages.copy_(cache.as_strided((len(cache), 64 * row), (cache.stride(0), 1)))
    a["k_cache"] = memory.as_strided((len(cache), 64, 1, row), (stride, row, row, 1))
    got = decode(device, a)
    assert torch.equal(got[0], want[0])


def test_v32_takes_any_positive_scale(device):
    """An older writer's scales are a / 448, no powers of two."""
    gen = generator(1)
    rows = cases.keys(gen, 4, 64, 576)
    scales = rows[..., :512].unflatten(-1, (4, 128)).double().abs().amax(-1) / 448
    a = {
        "q": cases.queries(gen, 2, 1, 8, 576),
        "k_cache": reference.pack(rows, scales),
        "indices": cases.indices(gen, 2, 1, 64, limit=256),
    }
    decode(device, a)


@pytest.mark.parametrize("d", [576, 512])
def test_every_tensor_in_strides_of_its_own(device, d):
    a = decode_case(generator(d), d, 8, 3, 2, (300, 64, 61), (300, 64, 64), ("own",), sink=True)
    want = decode(device, a)
    wide = torch.zeros(3, 8, 2, d + 24).bfloat16()
    wide[..., :d] = a["q"].transpose(1, 2)
    a["q"] = wide[..., :d].transpose(1, 2)
    for name in ("indices", "extra_indices_in_kvcache"):
        more = torch.full((3, 4, 100), 7, dtype=torch.int32)
        more[:, ::2, :64] = a[name]
        a[name] = more[:, ::2, :64]
    got = decode(device, a)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_indices_with_the_kv_head_as_mate_has_them(device):
    a = decode_case(generator(4), 576, 4, 2, 3, (200, 64, 64))
    want = decode(device, a)
    a["indices"] = a["indices"].unsqueeze(2)
    call = {"block_table": None, "cache_seqlens": None, "head_dim_v": 512, "is_fp8_kvcache": True}
    meta = flash_mla.FlashMLASchedMeta()
    got = flash_mla.flash_mla_with_kvcache(**a, **call, tile_scheduler_metadata=meta)
    assert torch.equal(got[0], want[0])


def test_decode_into_a_given_result(device):
    a = decode_case(generator(6), 512, 16, 2, 1, (200, 64, 64), sink=True)
    want, _ = decode(device, a)
    given = torch.full_like(want, 3.0)
    call = {"block_table": None, "cache_seqlens": None, "head_dim_v": 512, "is_fp8_kvcache": True}
    meta = flash_mla.FlashMLASchedMeta()
    out, _ = flash_mla.flash_mla_with_kvcache(**a, **call, tile_scheduler_metadata=meta, out=given)
    assert out is given and torch.equal(given, want)


@pytest.mark.parametrize("round", cases.rounds(6))
def test_decode_random(device, round):
    gen = generator(7, round)
    d = cases.pick(gen, [576, 512])
    part = cases.pick(gen, SHAPES[:5])
    extra = cases.pick(gen, [None, (300, 64, 61), (256, 33, 2)])
    lengths = cases.pick(gen, EVERY_LENGTH if extra else EVERY_LENGTH[:2])
    h_q, b, s_q = cases.pick(gen, [(64, 2, 1), (7, 4, 3), (20, 1, 5), (128, 1, 1)])
    a = decode_case(gen, d, h_q, b, s_q, part, extra, lengths, cases.pick(gen, [False, True]))
    decode(device, a, cases.pick(gen, [None, 0.3, cases.SCALE_V3]))


# ---- prefill -----------------------------------------------------------------------------------------


def prefill_case(gen, d, h_q, s_q, s_kv, topk, lengths=False, sink=False, share_wild=0.1):
    where = cases.indices(gen, s_q, 1, topk, limit=s_kv, share_wild=share_wild)
    kv = cases.keys(gen, s_kv, 1, d)
    a = {"q": cases.queries(gen, s_q, h_q, d), "indices": where}
    live = where
    if lengths:
        a["topk_length"] = torch.randint(0, topk + 1, (s_q,), generator=gen).int()
        a["topk_length"][0] = 0
        live = cases.used(where[:, 0], a["topk_length"])
    keep = torch.zeros(s_kv, dtype=torch.bool)
    live = live.flatten().long()
    keep[live[(live >= 0) & (live < s_kv)]] = True
    kv[~keep] = float("nan")
    if sink:
        a["attn_sink"] = torch.randn(h_q, generator=gen)
        a["attn_sink"][::3], a["attn_sink"][1::3] = INF, -INF
    return a | {"kv": kv}


def prefill(device, a, scale=0.5, **options):
    call = {name: cases.moved(x, device) for name, x in a.items()}
    result = cases.not_on_cuda(
        device, lambda: flash_mla.flash_mla_sparse_fwd(**call, sm_scale=scale, **options)
    )
    out, top, lse = result
    want, want_top, want_lse = reference.sparse_prefill(
        a["q"], a["kv"], a["indices"], scale, a.get("attn_sink"), a.get("topk_length")
    )
    assert out.dtype == a["q"].dtype and top.dtype == lse.dtype == torch.float32
    reference.assert_close(out, want, reference.PREFILL_OUT, "out")
    reference.assert_close(top, want_top, reference.PREFILL_LSE, "max_logits")
    reference.assert_close(lse, want_lse, reference.PREFILL_LSE, "lse")
    return out, top, lse


KEYS = [
    (128, 128),
    (256, 256),
    (592, 128),
    (1840, 256),
    (1592, 384),
    (1521, 512),
    (95, 128),
    (153, 256),
    (114, 384),
]


@pytest.mark.parametrize(("s_kv", "topk"), KEYS)
@pytest.mark.parametrize("d", [576, 512])
def test_prefill_shapes(device, d, s_kv, topk):
    gen = generator(d, s_kv, topk)
    h_q, s_q = cases.pick(gen, [(64, 1), (128, 5), (64, 31)])
    lengths, sink = cases.pick(gen, [(False, False), (True, True), (True, False), (False, True)])
    prefill(device, prefill_case(gen, d, h_q, s_q, s_kv, topk, lengths, sink))


@pytest.mark.parametrize("topk", [1, 37, 130])
@pytest.mark.parametrize("h_q", [1, 6, 16, 126])
def test_prefill_wider_than_upstream(device, h_q, topk):
    gen = generator(h_q, topk)
    d = cases.pick(gen, [576, 512])
    prefill(device, prefill_case(gen, d, h_q, 9, 200, topk, True, True))


@pytest.mark.parametrize(("s_kv", "topk"), [(32, 2048), (64, 8192)])
def test_prefill_with_more_indices_than_keys(device, s_kv, topk):
    prefill(device, prefill_case(generator(s_kv), 576, 16, 3, s_kv, topk, True))


def test_prefill_rows_without_keys(device):
    out, top, lse = prefill(device, prefill_case(generator(2), 576, 8, 6, 100, 64, share_wild=2.0, sink=True))
    assert (out == 0).all() and torch.isneginf(top).all() and torch.isposinf(lse).all()


def test_prefill_statistics_are_natural_and_leave_the_sink_out(device):
    a = prefill_case(generator(3), 512, 4, 2, 40, 64, sink=False)
    _, top, lse = prefill(device, a)
    _, top2, lse2 = prefill(device, a | {"attn_sink": torch.tensor([0.0, 3.0, INF, -INF])})
    assert torch.equal(top, top2) and torch.equal(lse, lse2)


def test_prefill_of_no_query(device):
    a = prefill_case(generator(5), 576, 8, 2, 40, 64)
    a = {name: cases.moved(x[:0] if name in ("q", "indices") else x, device) for name, x in a.items()}
    call = functools.partial(flash_mla.flash_mla_sparse_fwd, **a)
    shapes = [tuple(x.shape) for x in cases.not_on_cuda(device, lambda: call(sm_scale=1.0))]
    assert shapes == [(0, 8, 512), (0, 8), (0, 8)]
    for wrong, name in (
        ({"topk_length": torch.zeros(1, dtype=torch.int32, device=device)}, "topk_length"),
        ({"attn_sink": torch.zeros(3, device=device)}, "attn_sink"),
        ({"d_v": 128}, "d_v"),
        ({"sm_scale": math.inf}, "sm_scale"),
        ({"out": torch.empty(1, 8, 512, dtype=torch.bfloat16, device=device)}, "out"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: "):
            call(**{"sm_scale": 1.0, **wrong})


def test_prefill_into_a_given_result_from_rows_of_a_wider_buffer(device):
    a = prefill_case(generator(6), 576, 8, 4, 60, 64)
    want, _, _ = prefill(device, a)
    wide = torch.full((120, 2, 600), float("nan")).bfloat16()
    wide[::2, :1, :576] = a["kv"]
    a["kv"] = wide[::2, :1, :576]
    given = torch.full_like(want, 2.0)
    out, _, _ = flash_mla.flash_mla_sparse_fwd(**a, sm_scale=0.5, out=given)
    assert out is given and torch.equal(given, want)


def test_prefill_heads_do_not_leak(device):
    a = prefill_case(generator(8), 576, 8, 4, 60, 64)
    want = prefill(device, a)
    a["q"][:, 5:] = float("nan")
    got = flash_mla.flash_mla_sparse_fwd(**a, sm_scale=0.5)
    assert all(torch.equal(x[:, :5], y[:, :5]) for x, y in zip(got, want))


def test_long_prefill(device):
    """More query tokens than 65,535, a few keys each."""
    gen = generator(70000)
    s_q = 70000
    a = {
        "q": cases.queries(gen, 50, 1, 512).repeat(s_q // 50, 1, 1),
        "kv": cases.keys(gen, 64, 1, 512),
        "indices": torch.arange(s_q).remainder(64).int().view(-1, 1, 1),
    }
    call = {name: x.to(device) for name, x in a.items()}
    out, _, lse = cases.not_on_cuda(device, lambda: flash_mla.flash_mla_sparse_fwd(**call, sm_scale=0.1))
    rows = a["kv"][a["indices"].flatten().long(), 0]
    assert torch.equal(out[:, 0], rows)
    score = (a["q"][:, 0].double() * rows.double()).sum(-1) * 0.1
    assert float((lse[:, 0].double() - score).abs().max()) < 1e-4
