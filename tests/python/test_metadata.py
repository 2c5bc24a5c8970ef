# SPDX-License-Identifier: MIT
"""get_scheduler_metadata: its length, and that it changes no result."""

import flash_attn_interface as fa
import pytest
import reference
import torch

metadata = fa.get_scheduler_metadata


def int32(*x):
    return torch.tensor(x, dtype=torch.int32)


def blocks(s_q, s_k, d, paged, causal, window, chunk):
    """n of `b4 * n + 1`, from the flags of the mask's normal form."""
    left, right = window
    if left >= s_k - 1:
        left = -1
    if right >= s_q - 1:
        right = -1
    if s_q == 1 and left < 0 and right < 0 and chunk <= 0 and not (paged and 64 < d <= 128):
        causal = False
    if causal:
        right = 0
    is_causal = left < 0 and right == 0 and chunk <= 0
    is_local = (left >= 0 or right >= 0 or chunk >= 1) and not is_causal
    return 2 + (not is_local) + (is_causal or is_local)


@pytest.mark.parametrize("b", [1, 3, 4, 5, 64])
@pytest.mark.parametrize(
    ("causal", "window", "chunk", "want"),
    [
        (False, (-1, -1), 0, 3),
        (True, (-1, -1), 0, 4),
        (False, (5, 0), 0, 3),
        (False, (-1, -1), 8, 3),
        (True, (5, -1), 0, 3),
    ],
    ids=["full", "causal", "local", "chunk", "causal_window"],
)
def test_length(b, causal, window, chunk, want):
    got = metadata(
        b,
        16,
        128,
        8,
        2,
        64,
        torch.full((b,), 100, dtype=torch.int32),
        causal=causal,
        window_size=window,
        attention_chunk=chunk,
    )
    assert got.dtype == torch.int32 and got.dim() == 1 and got.is_contiguous()
    assert got.numel() == -(-b // 4) * 4 * want + 1


@pytest.mark.parametrize("s_q", [1, 2, 7])
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("d", [64, 128, 192])
@pytest.mark.parametrize("window", [(-1, -1), (200, 300), (3, 1), (-1, 0)])
@pytest.mark.parametrize("causal", [False, True])
def test_length_and_use(s_q, page_size, d, window, causal, device):
    """The forward op takes what this returns, for the same arguments."""
    b, s_k = 3, 160
    lens = int32(100, 160, 0).to(device)
    got = metadata(b, s_q, s_k, 4, 2, d, lens, page_size=page_size, causal=causal, window_size=window)
    assert got.numel() == 4 * blocks(s_q, s_k, d, page_size is not None, causal, window, 0) + 1
    q = torch.randn(b, s_q, 4, d).bfloat16().to(device)
    args = {"cache_seqlens": lens, "causal": causal, "window_size": window}
    if page_size:
        k = torch.randn(b * s_k // page_size, page_size, 2, d).bfloat16().to(device)
        args["page_table"] = torch.arange(len(k), dtype=torch.int32).view(b, -1).to(device)
    else:
        k = torch.randn(b, s_k, 2, d).bfloat16().to(device)
    want = fa.flash_attn_with_kvcache(q, k, k, **args)
    before = got.clone()
    for _ in range(2):  # reused across layers
        assert torch.equal(fa.flash_attn_with_kvcache(q, k, k, scheduler_metadata=got, **args), want)
    assert torch.equal(got, before)
    copied = torch.full((got.numel() + 9,), 77, dtype=torch.int32, device=device)
    copied[: got.numel()] = got  # as SGLang keeps it
    assert torch.equal(
        fa.flash_attn_with_kvcache(q, k, k, scheduler_metadata=copied[: got.numel()], **args), want
    )
    junk = torch.full_like(got, -1)  # contents are private: any tensor of the right shape
    assert torch.equal(fa.flash_attn_with_kvcache(q, k, k, scheduler_metadata=junk, **args), want)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (-1, 2), (5, 2)])
@pytest.mark.parametrize("lengths", [(0, 1), (0, 1, 2)])
def test_packed_query_with_an_over_estimate(lengths, window, causal):
    """max_seqlen_q may be above every length, and above the number of tokens too."""
    cu, b = int32(*lengths), len(lengths) - 1
    q, k, used = torch.randn(b, 4, 64), torch.randn(b, 40, 2, 64), int32(30, 40)[:b]
    mask = {"causal": causal, "window_size": window}
    got = metadata(b, 9, 40, 4, 2, 64, used, qkv_dtype=torch.float32, cu_seqlens_q=cu, **mask)
    args = {"cache_seqlens": used, "cu_seqlens_q": cu, "max_seqlen_q": 9, **mask}
    want = fa.flash_attn_with_kvcache(q, k, k, **args)
    assert torch.equal(fa.flash_attn_with_kvcache(q, k, k, scheduler_metadata=got, **args), want)


def test_packed_keys_with_an_over_estimate():
    q, k = torch.randn(12, 2, 64), torch.randn(20, 2, 64)
    cu_q, cu_k = int32(0, 5, 12), int32(0, 8, 20)
    for window in ((30, 0), (30, 3), (-1, -1)):
        got = metadata(2, 7, 1000, 2, 2, 64, int32(8, 12), qkv_dtype=torch.float32, window_size=window)
        want = fa.flash_attn_varlen_func(q, k, k, cu_q, cu_k, 7, 1000, window_size=window)
        same = fa.flash_attn_varlen_func(
            q, k, k, cu_q, cu_k, 7, 1000, window_size=window, scheduler_metadata=got
        )
        assert torch.equal(same, want)


def test_varlen_takes_it():
    q, k = torch.randn(12, 2, 64), torch.randn(20, 2, 64)
    cu_q, cu_k = int32(0, 5, 12), int32(0, 8, 20)
    meta = metadata(2, 7, 12, 2, 2, 64, int32(8, 12), qkv_dtype=torch.float32, cu_seqlens_q=cu_q, causal=True)
    want = fa.flash_attn_varlen_func(q, k, k, cu_q, cu_k, 7, 12, causal=True)
    assert torch.equal(
        fa.flash_attn_varlen_func(q, k, k, cu_q, cu_k, 7, 12, causal=True, scheduler_metadata=meta), want
    )


def test_cache_seqlens_none():
    """MATE's callers pass none; then max_seqlen_k stands."""
    got = metadata(2, 1, 100, 4, 2, 64, None)
    assert got.numel() == 4 * 3 + 1


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": "2"},
        {"batch_size": -1},
        {"num_heads_q": 3},
        {"num_heads_kv": None},
        {"num_heads_q": "4"},
        {"num_heads_kv": 0},
        {"num_splits": 1.5},
        {"num_splits": None},
        {"headdim_v": 64.0},
        {"page_size": "16"},
        {"max_seqlen_k_new": 0.5},
        {"sm_margin": [1]},
        {"qkv_dtype": torch.float64},
        {"qkv_dtype": "bf16"},
        {"cache_seqlens": int32(5, 9).long()},
        {"cache_seqlens": int32(5, 9, 3)},
        {"cu_seqlens_q": int32(0, 5)},
        {"cu_seqlens_k_new": [0, 5, 9]},
        {"cache_leftpad": int32(0, 5).float()},
    ],
    ids=str,
)
def test_what_later_calls_would_refuse_is_refused(change):
    call = {
        "batch_size": 2,
        "max_seqlen_q": 4,
        "max_seqlen_k": 100,
        "num_heads_q": 4,
        "num_heads_kv": 2,
        "headdim": 64,
        "cache_seqlens": int32(5, 9),
    }
    metadata(**call)
    with pytest.raises(
        RuntimeError, match=rf"\b{next(iter(change))}\b.*expected|expected.*{next(iter(change))}"
    ):
        metadata(**call | change)


def test_the_op():
    got = torch.ops.flash_attn_3.get_scheduler_metadata(
        2, 4, 100, 4, 2, 64, 64, torch.bfloat16, int32(5, 9), is_causal=True
    )
    assert got.dtype == torch.int32 and got.numel() == 4 * 4 + 1


@pytest.mark.parametrize("bad", ["short", "long", "dtype", "rank", "stride"])
def test_wrong_metadata_is_rejected(bad):
    q, k, lens = torch.randn(2, 3, 2, 32), torch.randn(2, 20, 2, 32), int32(9, 20)
    good = metadata(2, 3, 20, 2, 2, 32, lens, qkv_dtype=torch.float32)
    meta = {
        "short": good[:-1], "long": torch.cat([good, good[:1]]), "dtype": good.long(), "rank": good[None],
        "stride": good.repeat_interleave(2)[::2],
    }[bad]  # fmt: skip
    with pytest.raises(RuntimeError, match="scheduler_metadata"):
        fa.flash_attn_with_kvcache(q, k, k, cache_seqlens=lens, scheduler_metadata=meta)


def test_reference_agrees_on_flags():
    """The oracle's rotary rule and this file's length rule normalise alike."""
    for s_q in (1, 3):
        for window in ((-1, -1), (99, 99), (2, 0)):
            for causal in (False, True):
                n = blocks(s_q, 50, 64, False, causal, window, 0)
                each = reference.rotates_each_query(s_q, 50, 64, False, causal, window, 0)
                assert each == (n == 4 or (n == 3 and window == (2, 0)))


@pytest.mark.parametrize("window", [(-1, -1), (30, 0)])
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("s_q", [1, 3])
def test_contents_do_not_matter(s_q, page_size, window, device):
    """Upstream's length on the lengths' device, and whatever it holds, the same bits."""
    b, s_k, d = 5, 160, 128
    lens = int32(100, 160, 0, 1, 77).to(device)
    args = {"causal": True, "window_size": window}
    got = metadata(b, s_q, s_k, 4, 2, d, lens, page_size=page_size, **args)
    assert got.device == lens.device and got.dtype == torch.int32
    assert got.numel() == 8 * blocks(s_q, s_k, d, page_size is not None, True, window, 0) + 1
    q = torch.randn(b, s_q, 4, d, device=device).bfloat16()
    shape = (b * s_k // page_size, page_size) if page_size else (b, s_k)
    k, v = (torch.randn(*shape, 2, d, device=device).bfloat16() for _ in range(2))
    if page_size:
        args["page_table"] = torch.randperm(shape[0], device=device).int().view(b, -1)
    want = fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=lens, **args)
    for value in (got, torch.full_like(got, -1), torch.full_like(got, 2**31 - 1)):
        out = fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=lens, scheduler_metadata=value, **args)
        assert torch.equal(out, want)
    with pytest.raises(RuntimeError, match="scheduler_metadata"):
        fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=lens, scheduler_metadata=got[:-1], **args)
