# SPDX-License-Identifier: MIT
"""flash_attn_with_kvcache: caches, pages, appends, rotary, left padding, batch index; each alone."""

import flash_attn_interface as fa
import pytest
import reference
import torch
from cases import DTYPES, FP8, SENTINEL, Case, build, entries, refused, run, verify

ALL = list(DTYPES)
fwd = torch.ops.flash_attn_3.fwd
kvcache = fa.flash_attn_with_kvcache

BASE = Case(b=3, s_q=3, s_k=150, h_k=2, group=4, d=64, d_v=64, k_kind="cache", k_used=True)
OPTIONS = {
    "cache": {},
    "whole_capacity": {"k_used": False},
    "one_query": {"s_q": 1},
    "one_query_mqa": {"s_q": 1, "h_k": 1, "group": 8},
    "one_query_mha": {"s_q": 1, "h_k": 8, "group": 1},
    "many_queries": {"s_q": 70},
    "packed_q": {"q_kind": "packed"},
    "causal": {"causal": True},
    "window": {"window": (30, 0)},
    "chunk": {"chunk": 32, "causal": True},
    "softcap": {"softcap": 20.0},
    "splits": {"splits": 5},
    "splits_auto": {"splits": 0, "s_q": 1, "s_k": 1500, "b": 1},
    "batch_idx": {"batch_idx": True},
    "leftpad": {"leftpad": True},
    "leftpad_causal": {"leftpad": True, "causal": True},
    "leftpad_chunk": {"leftpad": True, "chunk": 16},
    "leftpad_whole": {"leftpad": True, "k_used": False},
    "leftpad_append": {"leftpad": True, "new": 2, "rotary": 32, "causal": True},
    "paged_1": {"k_kind": "paged", "page": 1},
    "paged_7": {"k_kind": "paged", "page": 7},
    "paged_16": {"k_kind": "paged", "page": 16},
    "paged_64": {"k_kind": "paged", "page": 64},
    "paged_256": {"k_kind": "paged", "page": 256},
    "paged_whole": {"k_kind": "paged", "page": 16, "k_used": False},
    "paged_batch_idx": {"k_kind": "paged", "batch_idx": True},
    "paged_leftpad": {"k_kind": "paged", "leftpad": True},
    "paged_packed_q": {"k_kind": "paged", "q_kind": "packed", "causal": True},
    "paged_splits": {"k_kind": "paged", "splits": 4},
    "paged_one_query_causal": {"k_kind": "paged", "s_q": 1, "causal": True, "d": 128, "d_v": 128},
    "append_1": {"new": 1, "s_q": 1},
    "append": {"new": 5, "causal": True},
    "append_more_than_queries": {"new": 40, "s_q": 1, "causal": True},
    "append_unseen": {"new": 40, "s_q": 2, "window": (3, 0)},
    "append_packed": {"new": 6, "new_packed": True},
    "append_paged": {"new": 5, "k_kind": "paged", "page": 3},
    "append_paged_packed": {"new": 6, "new_packed": True, "k_kind": "paged", "q_kind": "packed"},
    "append_batch_idx": {"new": 2, "batch_idx": True},
    "append_splits": {"new": 2, "splits": 3},
    "append_strides": {"new": 2, "strides": "heads_first"},
    "rotary": {"new": 3, "rotary": 64, "causal": True},
    "rotary_halves": {"new": 3, "rotary": 64, "causal": True, "interleaved": False},
    "rotary_partial": {"new": 3, "rotary": 16, "causal": True},
    "rotary_partial_halves": {"new": 3, "rotary": 32, "causal": True, "interleaved": False},
    "rotary_same_position": {"new": 3, "rotary": 64},  # no mask: every query rotates at r_b
    "rotary_local": {"new": 3, "rotary": 64, "window": (40, 1)},
    "rotary_chunk": {"new": 3, "rotary": 64, "chunk": 64},
    "rotary_seqlens": {"new": 3, "rotary": 64, "rotary_at": True, "causal": True},
    "rotary_paged": {"new": 3, "rotary": 64, "k_kind": "paged", "causal": True},
    "rotary_one_query": {"new": 1, "rotary": 64, "s_q": 1, "causal": True},
    "rotary_packed": {"new": 4, "new_packed": True, "rotary": 64, "q_kind": "packed", "causal": True},
    "rotary_batch_idx_leftpad": {"new": 4, "rotary": 64, "batch_idx": True, "leftpad": True, "causal": True},
    "sinks": {"sinks": "bf16"},
    "sinks_paged_splits": {"sinks": "fp32", "k_kind": "paged", "splits": 3},
    "cp": {"cp": 3},
    "cp_causal": {"cp": 3, "causal": True, "s_q": 40},
    "cp_paged": {"cp": 2, "causal": True, "k_kind": "paged", "q_kind": "packed"},
    "used_q": {"q_used": True},
    "used_q_append": {"q_used": True, "new": 4},
}


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("option", OPTIONS)
def test_option_alone(option, dtype, device):
    case = Case(**{**BASE.__dict__, "dtype": dtype, **OPTIONS[option]})
    for entry in entries(case):
        verify(case, entry, device)


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("kind", ["cache", "paged"])
def test_long_decode(kind, dtype):
    verify(Case(dtype=dtype, b=1, s_q=1, s_k=5000, h_k=2, group=4, d=128, d_v=128, k_kind=kind, k_used=True,
                splits=0, seed=3))  # fmt: skip


def caches(b=2, s=20, h=2, d=32, dtype=torch.float32):
    return [torch.randn(b, s, h, d).to(dtype) for _ in range(2)]


def int32(*x):
    return torch.tensor(x, dtype=torch.int32)


# ---- returns, forms of arguments -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL)
def test_returns(dtype, device):
    k, v = (x.to(device) for x in caches(dtype=DTYPES[dtype]))
    q = torch.randn(2, 3, 4, 32).to(DTYPES[dtype]).to(device)
    if dtype == "fp8" and device == "cuda":
        refused("fp8", lambda: kvcache(q, k, v))
        return
    out = kvcache(q, k, v)
    assert isinstance(out, torch.Tensor) and out.shape == q.shape
    assert out.dtype == (torch.bfloat16 if DTYPES[dtype] == FP8 else q.dtype)
    got = kvcache(q, k, v, return_softmax_lse=True)
    assert isinstance(got, tuple) and len(got) == 4
    assert got[1].shape == (2, 4, 3) and got[1].dtype == torch.float32
    assert got[2].dtype == got[3].dtype == torch.float32
    assert torch.equal(got[0], out)
    one = kvcache(q, k, v, num_splits=1, return_softmax_lse=True)
    assert one[2].shape == (0,) and one[3].shape == (0,)
    many = kvcache(q, k, v, num_splits=3, return_softmax_lse=True)
    if many[2].numel():
        assert many[2].shape[1:] == (2, 4, 3, 32) and many[3].shape[1:] == (2, 4, 3)


def test_returns_packed():
    k, v = caches()
    got = kvcache(
        torch.randn(5, 4, 32),
        k,
        v,
        cache_seqlens=int32(7, 9),
        cu_seqlens_q=int32(0, 2, 5),
        max_seqlen_q=3,
        return_softmax_lse=True,
    )
    assert got[0].shape == (5, 4, 32) and got[1].shape == (4, 5)


def test_cache_seqlens_as_int():
    k, v = caches()
    q = torch.randn(2, 3, 4, 32)
    want = kvcache(q, k, v, cache_seqlens=int32(9, 9), causal=True)
    assert torch.equal(kvcache(q, k, v, cache_seqlens=9, causal=True), want)
    packed = kvcache(
        q.flatten(0, 1), k, v, cache_seqlens=9, causal=True, cu_seqlens_q=int32(0, 3, 6), max_seqlen_q=3
    )
    torch.testing.assert_close(packed.view_as(want), want)


def test_cache_seqlens_none_is_the_whole_capacity():
    k, v = caches()
    q = torch.randn(2, 3, 4, 32)
    assert torch.equal(kvcache(q, k, v), kvcache(q, k, v, cache_seqlens=20))


def test_lengths_are_not_updated():
    k, v = caches()
    lens = int32(4, 9)
    kvcache(torch.randn(2, 1, 4, 32), k, v, *caches(s=2), cache_seqlens=lens)
    assert lens.tolist() == [4, 9]


def test_positional_as_transformers_calls():
    k, v = (torch.randn(6, 16, 2, 32) for _ in range(2))
    table, lens = int32([0, 1], [4, 3]), int32(7, 20)
    q, k_new, v_new = torch.randn(2, 1, 4, 32), torch.randn(2, 1, 2, 32), torch.randn(2, 1, 2, 32)
    ours = [x.clone() for x in (k, v)]
    want = kvcache(q, *ours, k=k_new, v=v_new, page_table=table, cache_seqlens=lens, causal=True)
    kw = {"cache_seqlens": lens, "causal": True, "max_seqlen_q": 1}
    got = kvcache(q, k, v, k_new, v_new, page_table=table, **kw)
    assert torch.equal(got, want) and torch.equal(k, ours[0]) and torch.equal(v, ours[1])


def test_ignored_arguments():
    """What upstream ignores we ignore."""
    k, v = caches()
    q = torch.randn(2, 3, 4, 32)
    want = kvcache(q, k, v, cache_seqlens=int32(7, 9))
    cu = int32(0, 3, 6)
    assert torch.equal(kvcache(q, k, v, cache_seqlens=int32(7, 9), cu_seqlens_k_new=cu), want)
    assert torch.equal(kvcache(q, k, v, cache_seqlens=int32(7, 9), rotary_seqlens=int32(7, 9)), want)
    assert torch.equal(kvcache(q, k, v, cache_seqlens=int32(7, 9), max_seqlen_q=3), want)
    assert torch.equal(kvcache(q, k, v, cache_seqlens=int32(7, 9), rotary_interleaved=False), want)
    odd = torch.ones(5)
    assert torch.equal(
        kvcache(q, k, v, cache_seqlens=int32(7, 9), q_descale=odd, k_descale=odd, v_descale=odd), want
    )


# ---- append ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL)
def test_append_is_exact_and_writes_nothing_else(dtype):
    """V bit for bit, K too without rotary; every other byte of the caches keeps its value."""
    kind = DTYPES[dtype]
    k, v = [x.to(kind) for x in (torch.randn(3, 20, 2, 32), torch.randn(3, 20, 2, 48))]
    k_new, v_new = torch.randn(2, 3, 2, 32).to(kind), torch.randn(2, 3, 2, 48).to(kind)
    want_k, want_v = k.clone(), v.clone()
    lens, rows = int32(5, 17), int32(2, 0)
    for i in range(2):
        at = slice(int(lens[i]), int(lens[i]) + 3)
        want_k[rows[i], at], want_v[rows[i], at] = k_new[i], v_new[i]
    kvcache(torch.randn(2, 1, 2, 32).to(kind), k, v, k_new, v_new, cache_seqlens=lens, cache_batch_idx=rows)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[kind.itemsize]
    assert torch.equal(k.view(bits), want_k.view(bits))
    assert torch.equal(v.view(bits), want_v.view(bits))


def test_append_through_the_op_mutates_the_cache():
    k, v = caches()
    k_new, v_new = caches(s=2)
    fwd(torch.randn(2, 1, 2, 32), k, v, k_new, v_new, seqused_k=int32(3, 8))
    assert torch.equal(k[0, 3:5], k_new[0]) and torch.equal(v[1, 8:10], v_new[1])


def test_append_stores_what_no_query_sees():
    """A window that hides the new tokens, and sequences without queries."""
    k, v = caches(s=60)
    k_new, v_new = caches(s=30)
    kvcache(torch.randn(2, 1, 2, 32), k, v, k_new, v_new, cache_seqlens=int32(5, 20), window_size=(2, 0))
    assert torch.equal(k[0, 5:35], k_new[0]) and torch.equal(v[1, 20:50], v_new[1])
    k, v = caches(s=60)
    got = kvcache(
        torch.randn(1, 2, 32),
        k,
        v,
        k_new,
        v_new,
        cache_seqlens=int32(5, 20),
        cu_seqlens_q=int32(0, 0, 1),
        max_seqlen_q=1,
    )
    assert got.shape == (1, 2, 32)
    assert torch.equal(k[0, 5:35], k_new[0]) and torch.equal(v[0, 5:35], v_new[0])


def test_append_to_an_empty_cache():
    k, v = caches()
    k_new, v_new = caches(s=4)
    q = torch.randn(2, 4, 2, 32)
    got = kvcache(q, k, v, k_new, v_new, cache_seqlens=int32(0, 0), causal=True)
    torch.testing.assert_close(got, fa.flash_attn_func(q, k_new, v_new, causal=True), rtol=1e-6, atol=1e-6)


def test_append_of_nothing():
    k, v = caches()
    q = torch.randn(2, 1, 2, 32)
    want = kvcache(q, k, v, cache_seqlens=int32(4, 9))
    got = kvcache(q, k, v, torch.empty(2, 0, 2, 32), torch.empty(2, 0, 2, 32), cache_seqlens=int32(4, 9))
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    new = torch.randn(2, 2, 32)  # packed: the first sequence gets none
    kvcache(q, k, v, new, new, cache_seqlens=int32(4, 9), cu_seqlens_k_new=int32(0, 0, 2))
    assert torch.equal(k[1, 9:11], new)


def test_duplicate_rows_any_writer_wins():
    k, v = caches()
    k_new, v_new = caches(s=1)
    kvcache(
        torch.randn(2, 1, 2, 32), k, v, k_new, v_new, cache_seqlens=int32(4, 4), cache_batch_idx=int32(1, 1)
    )
    assert torch.equal(k[1, 4], k_new[0, 0]) or torch.equal(k[1, 4], k_new[1, 0])


def test_query_is_not_rotated_in_place():
    k, v = caches()
    k_new, v_new = caches(s=3)
    q = torch.randn(2, 3, 2, 32)
    kept = q.clone(), k_new.clone()
    angle = torch.rand(40, 16)
    kvcache(
        q,
        k,
        v,
        k_new,
        v_new,
        rotary_cos=angle.cos(),
        rotary_sin=angle.sin(),
        cache_seqlens=int32(4, 9),
        causal=True,
    )
    assert torch.equal(q, kept[0]) and torch.equal(k_new, kept[1])


def test_rotary_flag_defaults():
    """True in Python, False in the raw op."""
    angle = torch.rand(40, 16)
    q, (k, v), (k_new, v_new) = torch.randn(2, 3, 2, 32), caches(), caches(s=3)
    kw = {"rotary_cos": angle.cos(), "rotary_sin": angle.sin(), "causal": True}

    def python(**more):
        return kvcache(q, k.clone(), v.clone(), k_new, v_new, cache_seqlens=int32(4, 9), **kw, **more)

    assert torch.equal(python(), python(rotary_interleaved=True))
    raw = fwd(q, k.clone(), v.clone(), k_new, v_new, seqused_k=int32(4, 9), rotary_cos=kw["rotary_cos"],
              rotary_sin=kw["rotary_sin"], is_causal=True)[0]  # fmt: skip
    torch.testing.assert_close(raw, python(rotary_interleaved=False), rtol=1e-6, atol=1e-6)
    assert not torch.equal(python(), python(rotary_interleaved=False))


def test_rotary_with_an_over_estimate():
    """Whether queries rotate one by one follows from max_seqlen_q as given."""
    q, (k, v), (k_new, v_new) = torch.randn(2, 2, 32), caches(b=1), caches(b=1, s=1)
    angle = torch.rand(40, 16)
    args = {
        "cu_seqlens_q": int32(0, 2),
        "max_seqlen_q": 9,
        "rotary_cos": angle.cos(),
        "rotary_sin": angle.sin(),
    }
    for window in ((-1, 2), (-1, -1), (3, 5)):
        exact = reference.forward(
            q, k, v, k_new=k_new, v_new=v_new, seqused_k=int32(9), window=window, **args
        )
        got = kvcache(
            q, k.clone(), v.clone(), k_new, v_new, cache_seqlens=int32(9), window_size=window, **args
        )
        torch.testing.assert_close(got.double(), exact.out, rtol=1e-5, atol=1e-5)


def test_decode_loop_equals_prefill():
    """Token by token through a paged cache, left-padded row beside a full one: the same as at once."""
    torch.manual_seed(3)
    n, h_q, h_k, d, page = 37, 4, 2, 32, 5
    q, k, v = (torch.randn(2, n, h, d) for h in (h_q, h_k, h_k))
    want = fa.flash_attn_func(q, k, v, causal=True)
    columns = -(-n // page)
    table = torch.randperm(2 * columns).view(2, columns).int()
    k_pool, v_pool = (torch.full((2 * columns, page, h_k, d), float("nan")) for _ in range(2))
    for t in range(n):
        at = slice(t, t + 1)
        got = kvcache(
            q[:, at], k_pool, v_pool, k[:, at], v[:, at], page_table=table, cache_seqlens=t, causal=True
        )
        torch.testing.assert_close(got, want[:, at], rtol=1e-5, atol=1e-5)


# ---- what must not be read ------------------------------------------------------------------------


def test_shared_pages():
    """A page may stand in several rows of the table: a common prefix."""
    k, v = (torch.randn(5, 8, 2, 32) for _ in range(2))
    table, lens = int32([0, 1, 2], [0, 1, 3]), int32(20, 24)
    q = torch.randn(2, 1, 2, 32)
    got = kvcache(q, k, v, page_table=table, cache_seqlens=lens)
    for i in range(2):
        flat = [x[table[i].long()].flatten(0, 1)[None, : lens[i]] for x in (k, v)]
        torch.testing.assert_close(
            got[i : i + 1], fa.flash_attn_func(q[i : i + 1], *flat), rtol=1e-5, atol=1e-5
        )


def test_page_table_row_stride():
    k, v = (torch.randn(6, 8, 2, 32) for _ in range(2))
    wide = torch.full((2, 9), 10**6, dtype=torch.int32)
    wide[:, :3] = int32([0, 1, 2], [5, 4, 3])
    q = torch.randn(2, 1, 2, 32)
    want = kvcache(q, k, v, page_table=wide[:, :3].clone(), cache_seqlens=int32(20, 9))
    assert torch.equal(kvcache(q, k, v, page_table=wide[:, :3], cache_seqlens=int32(20, 9)), want)


BAD_INDEX = {
    "cache_seqlens above capacity": {"cache_seqlens": int32(5, 21)},
    "cache_seqlens negative": {"cache_seqlens": int32(5, -1)},
    "append past capacity": {"cache_seqlens": int32(5, 19), "new": 2},
    "cache_batch_idx": {"cache_seqlens": int32(5, 6), "cache_batch_idx": int32(0, 2)},
    "cache_batch_idx negative": {"cache_seqlens": int32(5, 6), "cache_batch_idx": int32(-1, 1)},
    "page_table": {"cache_seqlens": int32(5, 6), "page_table": int32([0, 1], [4, 0])},
    "page_table negative": {"cache_seqlens": int32(5, 6), "page_table": int32([0, 1], [-2, 0])},
    "leftpad above length": {"cache_seqlens": int32(5, 6), "cache_leftpad": int32(0, 7)},
    "leftpad negative": {"cache_seqlens": int32(5, 6), "cache_leftpad": int32(0, -1)},
    "cu_seqlens_q falls": {"cache_seqlens": int32(5, 6), "cu_seqlens_q": int32(0, 3, 1), "max_seqlen_q": 3},
    "cu_seqlens_q past the end": {
        "cache_seqlens": int32(5, 6),
        "cu_seqlens_q": int32(0, 2, 9),
        "max_seqlen_q": 8,
    },
    "rotary past the table": {"cache_seqlens": int32(5, 9), "new": 2, "rotary": 8},
}


@pytest.mark.parametrize("name", BAD_INDEX)
def test_live_entry_out_of_range_is_a_value_error(name):
    """On the CPU; and nothing is written before it is found."""
    args = dict(BAD_INDEX[name])
    k, v = caches()
    if "page_table" in args:
        k, v = caches(b=4, s=10)
    if n := args.pop("new", 0):
        args["k"], args["v"] = caches(s=n)
    if n := args.pop("rotary", 0):
        args["rotary_cos"] = args["rotary_sin"] = torch.ones(n, 16)
    q = torch.randn(4, 2, 32) if "cu_seqlens_q" in args else torch.randn(2, 2, 2, 32)
    kept = k.clone(), v.clone()
    with pytest.raises(
        ValueError,
        match=name.split(" ")[0]
        .replace("cache_", "")
        .replace("append", "seq|new|cache")
        .replace("seqlens", "seqlens|seqused_k"),
    ):
        kvcache(q, k, v, **args)
    assert torch.equal(k, kept[0]) and torch.equal(v, kept[1])


@pytest.mark.parametrize("name", ["cu_seqlens_k", "seqused_k", "seqused_q"])
def test_live_entry_out_of_range_varlen(name):
    q = torch.randn(8, 2, 32)
    cu = int32(0, 4, 8)
    args = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 4, "max_seqlen_k": 4}
    args[name] = int32(0, 4, 9) if name.startswith("cu") else int32(4, 5)
    with pytest.raises(ValueError, match=name):
        fa.flash_attn_varlen_func(q, q, q, **args)


def test_dead_entries_are_never_looked_at():
    """Wild numbers in every entry past the live length; NaN in every page past it."""
    for seed in range(12):
        case = Case(
            b=3,
            s_q=2,
            s_k=70,
            k_kind="paged",
            page=(1, 3, 16)[seed % 3],
            k_used=True,
            batch_idx=seed % 2 == 0,
            seed=seed,
        )
        out, lse = run(build(case), "kvcache")
        assert torch.isfinite(out.float()).all(), case
        assert not torch.isnan(lse).any(), case
    q, k = torch.randn(2, 1, 2, 32), torch.full((2, 40, 2, 32), SENTINEL)
    out, lse = kvcache(q, k, k, cache_seqlens=0, return_softmax_lse=True)[:2]
    assert (out == 0).all() and (lse == -float("inf")).all()
