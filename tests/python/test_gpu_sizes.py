# SPDX-License-Identifier: MIT
"""Sizes that only a GPU is asked for: caches beyond 2^31 elements, up to a million keys, up to a thousand
sequences.  NaN lies in whatever no sequence holds; the truth is fp64 on the same GPU."""

import math

import flash_attn_interface as fa
import flash_mla
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def give_back():
    """Tests beside this one need their gigabytes too."""
    yield
    torch.cuda.empty_cache()


def randn(*shape):
    return torch.randn(*shape, device="cuda", dtype=BF16)


def ints(values):
    return torch.tensor(values, device="cuda", dtype=torch.int32)


def empty_cache(*shape):
    return torch.full(shape, math.nan, device="cuda", dtype=BF16)


def attend(q, k, v, causal=True, low=None, scale=None):
    """fp64 out [s_q, h, d_v] and lse [h, s_q]; q [s_q, h, d], k [n, h_k, d], v [n, h_k, d_v].  `low`:
    the type to which scores and probabilities are rounded."""
    q, k, v = q.double().unflatten(1, (k.shape[1], -1)), k.double(), v.double()
    s = torch.einsum("ikgd,jkd->kgij", q, k)
    if low:
        s = s.to(low).double()
    s *= q.shape[-1] ** -0.5 if scale is None else scale
    if causal and q.shape[0] > 1:
        i, j = (torch.arange(x.shape[0], device="cuda") for x in (q, k))
        s.masked_fill_(j > i[:, None] + k.shape[0] - q.shape[0], -math.inf)
    lse = torch.logsumexp(s, -1)
    p = torch.exp(s - lse.nan_to_num(neginf=0.0)[..., None])
    if low:
        p = p.to(low).double()
    return torch.einsum("kgij,jkd->ikgd", p, v).flatten(1, 2), lse.flatten(0, 1)


def check(out, lse, q, k, v, empty=-math.inf, **more):
    """`out` errs at most twice as much as the formula in q's type does."""
    assert out.isfinite().all()
    want, want_lse = attend(q, k, v, **more)
    low = attend(q, k, v, low=q.dtype, **more)[0].to(q.dtype)
    error, limit = ((x.double() - want).norm() / want.norm().clamp(min=1e-30) for x in (out, low))
    assert error <= 2 * limit + 1e-5
    want_lse = torch.where(want_lse == -math.inf, empty, want_lse)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-4, atol=1e-4)


def rows_of(table, n):
    """(page, row) of the first n keys of a sequence whose pages `table` names, given the page's size."""

    def at(page):
        j = torch.arange(n, device="cuda")
        return table[j // page].long(), j % page

    return at


# ---- beyond 2^31 elements ------------------------------------------------------------------------


def far_table(pool, columns, sequences):
    """Pages of each sequence: most of them the pool's last, some its first."""
    pages = torch.cat([torch.arange(columns), torch.arange(pool - columns * sequences, pool)])
    return pages[torch.randperm(len(pages))[: columns * sequences]].view(sequences, columns).int().cuda()


@pytest.mark.parametrize("s_q", [1, 5, 200])
@pytest.mark.parametrize("page", [1, 16, 64, 256])
def test_page_pool(page, s_q):
    h_k, d, lengths = 8, 128, [300, 0, 513]
    pool = 2**31 // (page * h_k * d) + 2000 // page
    k, v = (empty_cache(pool, page, h_k, d) for _ in range(2))
    assert k.numel() > 2**31
    table, q = far_table(pool, -(-600 // page), 3), randn(3, s_q, 16, d)
    for i, n in enumerate(lengths):
        at = rows_of(table[i], n)(page)
        k[at], v[at] = randn(n, h_k, d), randn(n, h_k, d)
    out, lse, *_ = fa.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=ints(lengths), page_table=table, causal=True, return_softmax_lse=True
    )
    for i, n in enumerate(lengths):
        at = rows_of(table[i], n)(page)
        check(out[i], lse[i], q[i], k[at], v[at])


@pytest.mark.parametrize("s_q", [1, 5, 200])
def test_contiguous_cache(s_q):
    b, s_k, h_k, d = 33, 65600, 8, 128
    k, v = (empty_cache(b, s_k, h_k, d) for _ in range(2))
    assert k.numel() > 2**31
    lengths = [0] * (b - 2) + [40, s_k]
    for i in (b - 2, b - 1):
        n = lengths[i]
        k[i, :n], v[i, :n] = randn(n, h_k, d), randn(n, h_k, d)
    q = randn(b, s_q, 16, d)
    out, lse, *_ = fa.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=ints(lengths), causal=True, return_softmax_lse=True
    )
    assert (out[:-2] == 0).all() and (lse[:-2] == -math.inf).all()
    for i in (b - 2, b - 1):
        n = lengths[i]
        check(out[i], lse[i], q[i], k[i, :n], v[i, :n])


@pytest.mark.parametrize("page", [0, 16])
def test_append(page):
    """New keys go where the cache's last elements lie."""
    h_k, d, cached, new = 8, 128, 90, 6
    if page:
        pool = 2**31 // (page * h_k * d) + 100
        shape, columns = (pool, page, h_k, d), -(-(cached + new) // page)
        table = torch.arange(pool - columns, pool, device="cuda", dtype=torch.int32)[None]
    else:
        shape, table = (2**31 // (128 * h_k * d) + 1, 128, h_k, d), None
    k, v = (empty_cache(*shape) for _ in range(2))
    assert k.numel() > 2**31

    def rows(n):
        return rows_of(table[0], n)(page) if page else (-1, slice(n))

    k[rows(cached)], v[rows(cached)] = randn(cached, h_k, d), randn(cached, h_k, d)
    q, k_new, v_new = randn(1, new, 16, d), randn(1, new, h_k, d), randn(1, new, h_k, d)
    out, lse, *_ = fa.flash_attn_with_kvcache(
        q,
        k,
        v,
        k_new,
        v_new,
        cache_seqlens=ints([cached]),
        cache_batch_idx=None if page else ints([shape[0] - 1]),
        page_table=table,
        causal=True,
        return_softmax_lse=True,
    )
    whole = rows(cached + new)
    assert torch.equal(k[whole][cached:], k_new[0]) and torch.equal(v[whole][cached:], v_new[0])
    check(out[0], lse[0], q[0], k[whole], v[whole])


def latent(q, cache, table, lengths, **more):
    meta, _ = flash_mla.get_mla_metadata()
    return flash_mla.flash_mla_with_kvcache(q, cache, table, ints(lengths), 512, meta, causal=True, **more)


def check_latent(out, lse, q, rows):
    """rows [n, 1, 576]."""
    check(out, lse, q, rows, rows[..., :512], empty=math.inf)


@pytest.mark.parametrize("h", [16, 128])
@pytest.mark.parametrize("page", [1, 64])
def test_latent_cache(page, h):
    pool = 2**31 // (page * 576) + 2000 // page
    cache = empty_cache(pool, page, 1, 576)
    assert cache.numel() > 2**31
    lengths, q = [300, 0, 513], randn(3, 2, h, 576)
    table = far_table(pool, -(-600 // page), 3)
    for i, n in enumerate(lengths):
        cache[rows_of(table[i], n)(page)] = randn(n, 1, 576)
    out, lse = latent(q, cache, table, lengths)
    for i, n in enumerate(lengths):
        check_latent(out[i], lse[i], q[i], cache[rows_of(table[i], n)(page)])


def with_qv(q, qv, k, v, lengths, **more):
    """out, lse of k of 64 and v of 512 columns, and what they are to the oracle: q and k of 576."""
    out, lse, *_ = fa.flash_attn_with_kvcache(
        q, k, v, qv=qv, cache_seqlens=ints(lengths), causal=True, return_softmax_lse=True, **more
    )
    return out, lse, torch.cat([q, qv], -1)


@pytest.mark.parametrize("page", [0, 1, 64])
def test_qv_cache(page):
    rows = 2**31 // 512 + 2000
    shape = (rows // page, page, 1) if page else (3, rows // 3, 1)
    k, v = empty_cache(*shape, 64), empty_cache(*shape, 512)
    assert v.numel() > 2**31
    lengths, q, qv = [300, 0, 513], randn(3, 2, 16, 64), randn(3, 2, 16, 512)
    table = far_table(shape[0], -(-600 // page), 3) if page else None
    where = [rows_of(table[i], n)(page) if page else (i, slice(n)) for i, n in enumerate(lengths)]
    for at, n in zip(where, lengths):
        k[at], v[at] = randn(n, 1, 64), randn(n, 1, 512)
    out, lse, both = with_qv(q, qv, k, v, lengths, page_table=table)
    for i, at in enumerate(where):
        check(out[i], lse[i], both[i], torch.cat([k[at], v[at]], -1), v[at])


# ---- long and many -------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [131072, 2**20])
def test_one_long_sequence_with_qv(n):
    k, v, q, qv = randn(n, 1, 64), randn(n, 1, 512), randn(1, 1, 16, 64), randn(1, 1, 16, 512)
    out, lse, both = with_qv(q, qv, k[None], v[None], [n])
    check(out[0], lse[0], both[0], torch.cat([k, v], -1), v)


@pytest.mark.parametrize("n", [131072, 2**20])
@pytest.mark.parametrize("page", [0, 16, 64])
def test_one_long_sequence(page, n):
    h_k, d = 2, 128
    k, v, q = randn(n, h_k, d), randn(n, h_k, d), randn(1, 1, 8, d)
    more = {}
    caches = k[None], v[None]
    if page:
        table = torch.randperm(n // page, device="cuda", dtype=torch.int32)
        caches = [torch.empty_like(x).view(-1, page, h_k, d) for x in (k, v)]
        for to, x in zip(caches, (k, v)):
            to[table.long()] = x.view(-1, page, h_k, d)
        more["page_table"] = table[None]
    out, lse, *_ = fa.flash_attn_with_kvcache(
        q, *caches, cache_seqlens=ints([n]), causal=True, return_softmax_lse=True, **more
    )
    check(out[0], lse[0], q[0], k, v)


@pytest.mark.parametrize("n", [131072, 2**20])
@pytest.mark.parametrize("h", [16, 128])
def test_one_long_latent_sequence(h, n):
    cache, q = randn(n // 64, 64, 1, 576), randn(1, 1, h, 576)
    table = torch.randperm(n // 64, device="cuda", dtype=torch.int32)[None]
    out, lse = latent(q, cache, table, [n])
    check_latent(out[0], lse[0], q[0], cache[table[0].long()].view(n, 1, 576))


BATCHES = [1, 2, 3, 7, 16, 33, 64, 100, 131, 132, 133, 255, 256, 257, 511, 512, 777, 1000]


def half_empty(b, most):
    """Every second length 0, the others 1 to `most`."""
    lengths = torch.randint(1, most + 1, (b,))
    lengths[torch.randperm(b)[: b // 2]] = 0
    return lengths


def check_all(out, lse, q, k, v, lengths, empty):
    """All sequences at once: q [b, s_q, h, d], k [b, most, d] and v [b, most, d_v] of the one KV head;
    every query sees every key."""
    dead = (torch.arange(k.shape[1]) >= lengths[:, None]).cuda()
    s = torch.einsum("bihd,bjd->bhij", q.double(), k.double()) * q.shape[-1] ** -0.5
    s = s.masked_fill(dead[:, None, None], -math.inf)
    want_lse = torch.logsumexp(s, -1)
    p = torch.exp(s - want_lse.nan_to_num(neginf=0.0)[..., None])
    want = torch.einsum("bhij,bjd->bihd", p, v.double().masked_fill(dead[..., None], 0))
    torch.testing.assert_close(out.double(), want, rtol=2e-2, atol=2e-2)
    want_lse = torch.where(want_lse == -math.inf, empty, want_lse)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("page", [0, 1, 64])
def test_batches_half_empty(page):
    most, d = 192, 64
    for b in BATCHES:
        lengths, q = half_empty(b, most), randn(b, 1, 4, d)
        k, v = randn(b, most, 1, d), randn(b, most, 1, d)
        k[(torch.arange(most) >= lengths[:, None]).cuda()] = math.nan
        caches, more = (k, v), {}
        if page:
            table = torch.randperm(b * most // page, device="cuda", dtype=torch.int32).view(b, -1)
            caches = [torch.empty_like(x).view(-1, page, 1, d) for x in (k, v)]
            for to, x in zip(caches, (k, v)):
                to[table.flatten().long()] = x.view(-1, page, 1, d)
            more["page_table"] = table
        out, lse, *_ = fa.flash_attn_with_kvcache(
            q, *caches, cache_seqlens=lengths.int().cuda(), return_softmax_lse=True, **more
        )
        check_all(out, lse, q, k[:, :, 0], v[:, :, 0], lengths, -math.inf)


def test_batches_half_empty_with_qv():
    most = 192
    for b in BATCHES:
        lengths, q, qv = half_empty(b, most), randn(b, 1, 16, 64), randn(b, 1, 16, 512)
        k, v = randn(b, most, 1, 64), randn(b, most, 1, 512)
        k[(torch.arange(most) >= lengths[:, None]).cuda()] = math.nan
        out, lse, both = with_qv(q, qv, k, v, lengths.tolist())
        check_all(out, lse, both, torch.cat([k, v], -1)[:, :, 0], v[:, :, 0], lengths, -math.inf)


@pytest.mark.parametrize("h", [16, 128])
def test_latent_batches_half_empty(h):
    most = 192
    for b in BATCHES:
        lengths, q, rows = half_empty(b, most), randn(b, 1, h, 576), randn(b, most, 1, 576)
        rows[(torch.arange(most) >= lengths[:, None]).cuda()] = math.nan
        table = torch.randperm(b * 3, device="cuda", dtype=torch.int32).view(b, 3)
        cache = torch.empty_like(rows).view(-1, 64, 1, 576)
        cache[table.flatten().long()] = rows.view(-1, 64, 1, 576)
        out, lse = latent(q, cache, table, lengths.tolist())
        check_all(out, lse, q, rows[:, :, 0], rows[:, :, 0, :512], lengths, math.inf)


@pytest.mark.parametrize("s_q", [1, 70])
def test_no_sequences(s_q):
    q, none = randn(0, s_q, 4, 64), ints([])
    k, v = randn(6, 64, 2, 64), randn(6, 64, 2, 64)
    out = fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=none, page_table=none.view(0, 2))
    torch.cuda.synchronize()
    assert out.shape == q.shape
