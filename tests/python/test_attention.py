# SPDX-License-Identifier: MIT
"""Each option of the dense and packed functions alone; what they return; rows that see nothing."""

import math

import flash_attn_interface as fa
import pytest
import reference
import torch
from cases import DTYPES, FP8, SENTINEL, Case, entries, refused, verify

INF = float("inf")
ALL = list(DTYPES)
fwd = torch.ops.flash_attn_3.fwd

# One line an option: nothing else differs from the plain case.
BASE = Case(b=2, s_q=70, s_k=90, h_k=2, group=2, d=64, d_v=64)
OPTIONS = {
    "plain": {},
    "mqa": {"h_k": 1, "group": 8},
    "odd_groups": {"h_k": 3, "group": 5},
    "heads_1": {"h_k": 1, "group": 1},
    "causal": {"causal": True},
    "causal_more_queries": {"causal": True, "s_q": 90, "s_k": 70},
    "window": {"window": (20, 5)},
    "window_left": {"window": (20, -1)},
    "window_right": {"window": (-1, 3)},
    "window_0_0": {"window": (0, 0)},
    "window_causal": {"window": (9, 30), "causal": True},
    "window_wide": {"window": (1000, 1000)},
    "chunk": {"chunk": 16},
    "chunk_causal": {"chunk": 33, "causal": True},
    "chunk_window": {"chunk": 32, "window": (7, 7)},
    "chunk_1": {"chunk": 1},
    "chunk_negative_p": {"chunk": 16, "s_q": 90, "s_k": 40},
    "softcap": {"softcap": 15.0},
    "softcap_tight": {"softcap": 0.5, "sharp": 4.0},
    "softcap_negative": {"softcap": -3.0},
    "scale": {"scale": 0.25},
    "scale_0": {"scale": 0.0},
    "scale_negative": {"scale": -0.1},
    "splits": {"splits": 3},
    "splits_auto": {"splits": 0, "s_k": 700},
    "splits_most": {"splits": 256, "s_k": 300},
    "splits_causal": {"splits": 4, "causal": True},
    "pack_gqa": {"pack_gqa": True},
    "pack_gqa_off": {"pack_gqa": False},
    "heads_first": {"strides": "heads_first"},
    "wide_rows": {"strides": "wide"},
    "one_query": {"s_q": 1},
    "one_key": {"s_k": 1},
    "sharp": {"sharp": 8.0},
    "packed": {"q_kind": "packed", "k_kind": "packed"},
    "packed_causal": {"q_kind": "packed", "k_kind": "packed", "causal": True},
    "packed_window": {"q_kind": "packed", "k_kind": "packed", "window": (11, 2)},
    "packed_used": {"q_kind": "packed", "k_kind": "packed", "q_used": True, "k_used": True},
    "packed_q_dense_k": {"q_kind": "packed"},
    "dense_q_packed_k": {"k_kind": "packed", "b": 3},
    "used_q": {"q_used": True},
    "used_k": {"k_used": True, "causal": True},
    "sinks_bf16": {"sinks": "bf16"},
    "sinks_fp16": {"sinks": "fp16"},
    "sinks_fp32": {"sinks": "fp32", "causal": True, "window": (8, 0)},
    "sinks_splits": {"sinks": "fp32", "splits": 3},
    "sinks_packed": {"sinks": "bf16", "q_kind": "packed", "k_kind": "packed"},
}


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("option", OPTIONS)
def test_option_alone(option, dtype, device):
    case = Case(**{**BASE.__dict__, "dtype": dtype, **OPTIONS[option]})
    for entry in entries(case):
        verify(case, entry, device)


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("d", [8, 16, 24, 32, 40, 48, 64, 72, 80, 96, 104, 128, 160, 192, 224, 256, 320, 512])
def test_head_dim(d, dtype):
    if dtype == "fp8" and d % 16:
        pytest.skip("fp8 head dims are multiples of 16")
    verify(Case(dtype=dtype, d=d, d_v=d, s_q=37, s_k=65, group=2, causal=True))
    verify(Case(dtype=dtype, d=d, d_v=d, s_q=1, s_k=165, group=4, k_kind="cache", k_used=True))


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize(
    ("d", "d_v"), [(192, 128), (64, 256), (64, 512), (128, 64), (16, 96), (512, 16), (576 - 64, 512)]
)
def test_head_dims_differ(d, d_v, dtype, device):
    paged = Case(dtype=dtype, d=d, d_v=d_v, s_q=2, s_k=170, h_k=1, group=16, k_kind="paged", k_used=True)
    verify(Case(dtype=dtype, d=d, d_v=d_v, s_q=33, s_k=70, group=2, causal=True), device=device)
    verify(paged, device=device)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("d", "d_v"), [(64, 512), (64, 256), (32, 384), (128, 64), (8, 8)])
def test_qv(d, d_v, dtype, device):
    shape = {"dtype": dtype, "d": d, "d_v": d_v, "qv": True, "h_k": 1}
    verify(Case(**shape, s_q=20, s_k=70, group=4, causal=True), "func", device)
    verify(Case(**shape, scale=0.1, softcap=20.0, s_q=20, s_k=70, group=4), "op", device)
    cache = {"s_q": 3, "s_k": 170, "group": 8, "k_used": True, "q_kind": "packed"}
    verify(Case(**shape, **cache, causal=True, k_kind="paged"), "kvcache", device)
    verify(Case(**shape, **cache, window=(40, 0), sinks="bf16", splits=3), "kvcache", device)
    verify(Case(**shape, **cache, new=2, rotary=16 if d >= 16 else 0, leftpad=True), "kvcache", device)


def test_qv_scale_of_the_raw_op_counts_d_only():
    q, k, v, qv = (torch.randn(1, 5, 2, n) for n in (64, 64, 256, 256))
    raw = fwd(q, k, v, q_v=qv)[0]
    named = fa.flash_attn_func(q, k, v, qv=qv, softmax_scale=64**-0.5)
    torch.testing.assert_close(raw, named, rtol=0, atol=0)
    public = fa.flash_attn_func(q, k, v, qv=qv)
    torch.testing.assert_close(
        public, fa.flash_attn_func(q, k, v, qv=qv, softmax_scale=320**-0.5), rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("causal", [False, True])
def test_larger_problem(dtype, causal):
    verify(Case(dtype=dtype, b=1, s_q=600, s_k=700, h_k=2, group=4, d=128, d_v=128, causal=causal, sharp=2.0))


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("chunk", [20, 30, 50])
def test_softcap_in_narrow_heads_over_few_keys(dtype, chunk, device):
    """Rows whose keys are one step, of which the scores are one product: nothing hides the softmax."""
    for d in (16, 32):
        shape = {"b": 1, "s_q": 64, "s_k": 200, "h_k": 1, "group": 8, "d": d, "d_v": d}
        verify(Case(dtype=dtype, **shape, chunk=chunk, softcap=5.0), device=device)


# ---- what comes back ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL)
def test_returns_dense(dtype, device):
    kind = DTYPES[dtype]
    q, k, v = (
        torch.randn(2, s, h, d).to(kind).to(device) for s, h, d in ((5, 4, 64), (9, 2, 64), (9, 2, 64))
    )
    if dtype == "fp8" and device == "cuda":
        refused("fp8", lambda: fa.flash_attn_func(q, k, v))
        return
    out = fa.flash_attn_func(q, k, v)
    assert isinstance(out, torch.Tensor)
    assert out.shape == (2, 5, 4, 64)
    assert out.dtype == (torch.bfloat16 if kind == FP8 else kind)
    pair = fa.flash_attn_func(q, k, v, return_attn_probs=True)
    assert isinstance(pair, tuple) and len(pair) == 2
    assert pair[1].shape == (2, 4, 5) and pair[1].dtype == torch.float32 and pair[1].is_contiguous()
    torch.testing.assert_close(pair[0], out, rtol=0, atol=0)
    again = fa.flash_attn_func(q, k, v, return_softmax_lse=True)
    assert len(again) == 2
    torch.testing.assert_close(again[1], pair[1], rtol=0, atol=0)


def test_returns_packed(device):
    q, k, v = (torch.randn(t, h, 64, device=device).bfloat16() for t, h in ((12, 4), (20, 2), (20, 2)))
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 5, 12], [0, 8, 20]))
    out = fa.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 7, 12)
    assert isinstance(out, torch.Tensor) and out.shape == (12, 4, 64)
    out, lse = fa.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 7, 12, return_attn_probs=True)
    assert lse.shape == (4, 12) and lse.dtype == torch.float32 and lse.is_contiguous()
    out, lse = fa.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 7, 12, return_softmax_lse=True)
    assert lse.shape == (4, 12)


def test_forward_returns_four_and_empty_partials():
    q, k, v = (torch.randn(2, s, 2, 64) for s in (5, 9, 9))
    for got in (fwd(q, k, v, num_splits=1), fa._flash_attn_forward(q, k, v)):
        assert len(got) == 4
        assert got[2].numel() == 0 and got[2].dim() == 1
        assert got[3].numel() == 0 and got[3].dim() == 1


@pytest.mark.parametrize("splits", [2, 5])
def test_partials_combine_to_the_result(splits):
    """A fixed-length call uses exactly num_splits; its partials are those of flash_attn_combine."""
    q, k, v = (torch.randn(2, s, 2, 64) for s in (5, 900, 900))
    out, lse, out_accum, lse_accum = fwd(q, k, v, num_splits=splits)
    assert out_accum.shape == (splits, 2, 2, 5, 64) and out_accum.dtype == torch.float32
    assert lse_accum.shape == (splits, 2, 2, 5) and lse_accum.dtype == torch.float32
    merged, merged_lse = fa.flash_attn_combine(out_accum.permute(0, 1, 3, 2, 4), lse_accum.transpose(2, 3))
    torch.testing.assert_close(merged, out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged_lse.transpose(1, 2), lse, rtol=1e-5, atol=1e-5)
    cu = torch.tensor([0, 5], dtype=torch.int32)
    got = fwd(q[0], k[:1], v[:1], cu_seqlens_q=cu, max_seqlen_q=5, num_splits=splits)
    if got[2].numel():  # ragged: an upper bound
        assert got[2].shape[1:] == (2, 5, 64) and got[2].shape[0] <= splits
        assert got[3].shape == got[2].shape[:-1]


@pytest.mark.parametrize("splits", [1, 7, 100])
def test_nan_of_one_split_reaches_the_result(device, splits):
    """One key of one head is NaN: whichever split has it, so are that head's out and lse, and no other's."""
    q, k, v = (torch.randn(1, s, 2, 64, device=device).bfloat16() for s in (1, 295, 295))
    k[0, 65, 1, 0] = float("nan")
    out, lse = fa.flash_attn_func(q, k, v, num_splits=splits, return_attn_probs=True)
    assert torch.isnan(out[0, 0, 1]).all() and torch.isnan(lse[0, 1]).all()
    assert torch.isfinite(out[0, 0, 0]).all() and torch.isfinite(lse[0, 0]).all()


def test_out_is_written_and_returned():
    q, k, v = (torch.randn(2, s, 2, 64).bfloat16() for s in (5, 9, 9))
    want = fa.flash_attn_func(q, k, v)
    out = torch.empty(2, 5, 2, 64).bfloat16()
    got = fwd(q, k, v, out=out)[0]
    assert got.data_ptr() == out.data_ptr()
    torch.testing.assert_close(out, want, rtol=0, atol=0)
    view = torch.full((2, 2, 5, 64), SENTINEL).bfloat16().transpose(1, 2)  # as PyTorch's SDPA gives it
    fwd(q, k, v, out=view)
    torch.testing.assert_close(view, want, rtol=0, atol=0)
    wide = torch.full((2, 5, 2, 96), SENTINEL).bfloat16()
    fwd(q, k, v, out=wide[..., 16:80])
    torch.testing.assert_close(wide[..., 16:80], want, rtol=0, atol=0)
    assert (wide[..., :16] == SENTINEL).all() and (wide[..., 80:] == SENTINEL).all()


def test_out_of_varlen_func():
    q, k, v = (torch.randn(12, 2, 64).bfloat16() for _ in range(3))
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    out = torch.empty_like(q)
    got = fa.flash_attn_varlen_func(q, k, v, cu, cu, 7, 7, out=out)
    assert got.data_ptr() == out.data_ptr()
    torch.testing.assert_close(out, fa.flash_attn_varlen_func(q, k, v, cu, cu, 7, 7), rtol=0, atol=0)


def test_positional_order():
    """Clients call positionally: the order of the arguments is binding."""
    q, k, v = (torch.randn(1, 40, 2, 32) for _ in range(3))
    got = fa.flash_attn_func(
        q, k, v, 0.3, True, None, None, None, None, (7, 0), 0, 5.0, 1, None, False, 0, True
    )
    want = fa.flash_attn_func(
        q, k, v, softmax_scale=0.3, causal=True, window_size=(7, 0), softcap=5.0, return_attn_probs=True
    )
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=0)
    p, cu = (x.reshape(40, 2, 32) for x in (q, k, v)), torch.tensor([0, 40], dtype=torch.int32)
    got = fa.flash_attn_varlen_func(
        *p,
        cu,
        cu,
        40,
        40,
        None,
        None,
        0.3,
        True,
        None,
        None,
        None,
        None,
        (7, 0),
        0,
        5.0,
        1,
        None,
        False,
        0,
        True,
    )
    torch.testing.assert_close(got[0], want[0][0], rtol=1e-5, atol=1e-5)


# ---- forms of an argument -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "window",
    [None, (None, None), [-1, -1], torch.tensor([-1, -1]), (-1, None), (-5, -9)],
    ids=["None", "Nones", "list", "tensor", "mixed", "negative"],
)
def test_window_unlimited(window):
    q, k, v = (torch.randn(1, 20, 2, 32) for _ in range(3))
    want = fa.flash_attn_func(q, k, v)
    torch.testing.assert_close(fa.flash_attn_func(q, k, v, window_size=window), want, rtol=0, atol=0)


def test_window_forms():
    q, k, v = (torch.randn(1, 20, 2, 32) for _ in range(3))
    want = fa.flash_attn_func(q, k, v, window_size=(3, 2))
    for window in ([3, 2], torch.tensor([3, 2]), torch.tensor([3, 2], dtype=torch.int32)):
        torch.testing.assert_close(fa.flash_attn_func(q, k, v, window_size=window), want, rtol=0, atol=0)
    want = fa.flash_attn_func(q, k, v, window_size=(3, -1))
    torch.testing.assert_close(fa.flash_attn_func(q, k, v, window_size=(3, None)), want, rtol=0, atol=0)


def test_attention_chunk_none_is_off():
    q, k, v = (torch.randn(1, 20, 2, 32) for _ in range(3))
    want = fa.flash_attn_func(q, k, v)
    torch.testing.assert_close(fa.flash_attn_func(q, k, v, attention_chunk=None), want, rtol=0, atol=0)


def test_max_seqlen_as_tensor_or_over_estimate():
    q, k, v = (torch.randn(12, 2, 32) for _ in range(3))
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    want = fa.flash_attn_varlen_func(q, k, v, cu, cu, 7, 7, causal=True)
    for most in (torch.tensor(7), torch.tensor(7, dtype=torch.int32), 8, 100, 10**9):
        got = fa.flash_attn_varlen_func(q, k, v, cu, cu, most, most, causal=True)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_window_is_inclusive_of_itself():
    """Row i of a window (w - 1, 0) sees exactly w keys."""
    q, k = torch.zeros(1, 30, 1, 16), torch.zeros(1, 30, 1, 16)
    _, lse = fa.flash_attn_func(q, k, k, window_size=(4, 0), return_attn_probs=True)
    want = torch.tensor([math.log(min(i + 1, 5)) for i in range(30)])
    torch.testing.assert_close(lse[0, 0], want, rtol=1e-5, atol=1e-5)


def test_descales_of_16_bit_input_are_not_looked_at():
    q, k, v = (torch.randn(2, 5, 2, 64).bfloat16() for _ in range(3))
    odd = torch.full((7,), 99.0)
    got = fa.flash_attn_func(q, k, v, q_descale=odd, k_descale=odd, v_descale=odd)
    torch.testing.assert_close(got, fa.flash_attn_func(q, k, v), rtol=0, atol=0)


def test_descale_strides():
    """[b, h_k] with any strides, 0 included: one number expanded is what most callers give."""
    q, k, v = (torch.randn(2, 9, 2, 64).to(FP8) for _ in range(3))
    plain = [torch.full((2, 2), x) for x in (0.5, 0.25, 3.0)]
    zero = [torch.tensor(x).expand(2, 2) for x in (0.5, 0.25, 3.0)]
    wide = [torch.full((2, 2, 5), x)[..., 3] for x in (0.5, 0.25, 3.0)]
    want = fa.flash_attn_func(q, k, v, q_descale=plain[0], k_descale=plain[1], v_descale=plain[2])
    for x in (zero, wide):
        got = fa.flash_attn_func(q, k, v, q_descale=x[0], k_descale=x[1], v_descale=x[2])
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    bare = fa.flash_attn_func(q, k, v)
    ones = fa.flash_attn_func(q, k, v, q_descale=torch.ones(2, 2))
    torch.testing.assert_close(bare, ones, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["descale", "softcap"])
def test_fp8_descales(kind):
    softcap = 10.0 if kind == "softcap" else 0.0
    verify(Case(dtype="fp8", descale=True, softcap=softcap, s_q=30, s_k=66, h_k=3, group=2))
    verify(
        Case(
            dtype="fp8",
            descale=True,
            softcap=softcap,
            s_q=1,
            s_k=500,
            h_k=3,
            group=2,
            k_kind="paged",
            k_used=True,
        )
    )


def test_last_stride_not_one_is_copied():
    q, k, v = (torch.randn(2, 9, 32, 2).transpose(-1, -2) for _ in range(3))
    assert q.stride(-1) != 1
    want = fa.flash_attn_func(q.contiguous(), k.contiguous(), v.contiguous())
    torch.testing.assert_close(fa.flash_attn_func(q, k, v), want, rtol=0, atol=0)
    cu = torch.tensor([0, 99, 9, 99], dtype=torch.int32)[::2]
    cu_plain = torch.tensor([0, 9], dtype=torch.int32)
    want = fa.flash_attn_varlen_func(*(x[0].contiguous() for x in (q, k, v)), cu_plain, cu_plain, 9, 9)
    got = fa.flash_attn_varlen_func(q[0], k[0], v[0], cu, cu, 9, 9)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_column_major_v_is_rejected():
    """Its stride 1 lies on the rows, so Python makes no copy and the op says no."""
    q, v = torch.randn(2, 9, 2, 32), torch.randn(2, 2, 32, 9).permute(0, 3, 1, 2)
    assert v.shape == q.shape and v.stride(-3) == 1
    with pytest.raises(RuntimeError, match="v: .*stride"):
        fa.flash_attn_func(q, q, v)


def test_expanded_keys():
    """Stride 0 over the batch or the heads of k and v is a stride like any other."""
    q, k, v = torch.randn(3, 9, 4, 32), torch.randn(1, 20, 1, 32), torch.randn(1, 20, 1, 32)
    want = fa.flash_attn_func(q, k.repeat(3, 1, 2, 1), v.repeat(3, 1, 2, 1), causal=True)
    got = fa.flash_attn_func(q, k.expand(3, -1, 2, -1), v.expand(3, -1, 2, -1), causal=True)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_unaligned_storage():
    """A view that begins one element into its storage."""
    flat = torch.randn(3, 2 * 9 * 2 * 64 + 1).bfloat16()
    q, k, v = (flat[i, 1:].view(2, 9, 2, 64) for i in range(3))
    want = fa.flash_attn_func(q.clone(), k.clone(), v.clone())
    torch.testing.assert_close(fa.flash_attn_func(q, k, v), want, rtol=0, atol=0)


# ---- packed qkv ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL)
def test_qkvpacked(dtype):
    qkv = torch.randn(2, 30, 3, 4, 32).to(DTYPES[dtype])
    q, k, v = qkv.unbind(2)
    want = fa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    got = fa.flash_attn_qkvpacked_func(qkv, causal=True, return_attn_probs=True)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    out = fa.flash_attn_qkvpacked_func(qkv, causal=True, num_heads_q=99)  # ignored for 5 dimensions
    torch.testing.assert_close(out, want[0], rtol=0, atol=0)


def test_qkvpacked_gqa():
    qkv = torch.randn(2, 30, 6 + 2 * 2, 32)
    q, k, v = qkv[:, :, :6], qkv[:, :, 6:8], qkv[:, :, 8:]
    got = fa.flash_attn_qkvpacked_func(qkv, num_heads_q=6, window_size=(5, 5), softcap=9.0)
    torch.testing.assert_close(
        got, fa.flash_attn_func(q, k, v, window_size=(5, 5), softcap=9.0), rtol=0, atol=0
    )
    with pytest.raises(AssertionError):
        fa.flash_attn_qkvpacked_func(qkv)


# ---- rows that see nothing ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ALL)
def test_rows_without_a_visible_key(dtype, device):
    """Causal with more queries than keys: the first rows see nothing: out 0, lse -inf."""
    kind = DTYPES[dtype]
    q, k = torch.randn(2, 9, 2, 32).to(kind).to(device), torch.randn(2, 4, 2, 32).to(kind).to(device)
    if dtype == "fp8" and device == "cuda":
        refused("fp8", lambda: fa.flash_attn_func(q, k, k))
        return
    out, lse = fa.flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    assert (out[:, :5] == 0).all() and (lse[:, :, :5] == -INF).all()
    assert torch.isfinite(lse[:, :, 5:]).all() and (out[:, 5:].float().abs().sum(-1) > 0).all()


@pytest.mark.parametrize("splits", [1, 3])
def test_empty_sequence_in_a_batch(splits, device):
    """Keys of length 0 beside others: -inf, not +inf."""
    q, k = (torch.randn(t, 2, 32, device=device).bfloat16() for t in (12, 8))
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 5, 5, 12], [0, 0, 3, 8]))
    out, lse = fa.flash_attn_varlen_func(q, k, k, cu_q, cu_k, 7, 5, num_splits=splits, return_attn_probs=True)
    assert (out[:5] == 0).all() and (lse[:, :5] == -INF).all()
    assert torch.isfinite(lse[:, 5:]).all()


@pytest.mark.parametrize("dtype", ALL)
def test_no_key_storage_at_all(dtype, device):
    kind = DTYPES[dtype]
    q, k = torch.randn(2, 5, 2, 32).to(kind).to(device), torch.randn(2, 0, 2, 32).to(kind).to(device)
    if dtype == "fp8" and device == "cuda":
        refused("fp8", lambda: fa.flash_attn_func(q, k, k))
        return
    out, lse = fa.flash_attn_func(q, k, k, return_attn_probs=True)
    assert (out == 0).all() and (lse == INF).all()
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 5, 10], [0, 0, 0]))
    out, lse = fa.flash_attn_varlen_func(
        q.reshape(10, 2, 32),
        k.reshape(0, 2, 32),
        k.reshape(0, 2, 32),
        cu_q,
        cu_k,
        5,
        0,
        return_attn_probs=True,
    )
    assert (out == 0).all() and (lse == INF).all()


def test_no_queries(device):
    k = torch.randn(2, 5, 2, 32, device=device).bfloat16()
    out, lse = fa.flash_attn_func(k[:, :0], k, k, return_attn_probs=True)
    assert out.shape == (2, 0, 2, 32) and lse.shape == (2, 2, 0)
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 0], [0, 5]))
    out, lse = fa.flash_attn_varlen_func(k[0, :0], k[0], k[0], cu_q, cu_k, 0, 5, return_attn_probs=True)
    assert out.shape == (0, 2, 32) and lse.shape == (2, 0)


def test_no_sequences(device):
    q = torch.randn(0, 5, 2, 32, device=device).bfloat16()
    out, lse = fa.flash_attn_func(q, q, q, return_attn_probs=True)
    assert out.shape == (0, 5, 2, 32) and lse.shape == (0, 2, 5)
    cu = torch.tensor([0], dtype=torch.int32, device=device)
    out, lse = fa.flash_attn_varlen_func(q[:, 0], q[:, 0], q[:, 0], cu, cu, 0, 0, return_attn_probs=True)
    assert out.shape == (0, 2, 32) and lse.shape == (2, 0)


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_dead_rows_are_not_written(kind, device):
    case = Case(q_kind=kind, q_used=True, b=4, s_q=40, s_k=40, seed=5)
    verify(case, "op", device)  # compares dead rows of `out` with the sentinel
    verify(Case(q_kind=kind, q_used=True, b=4, s_q=40, s_k=700, splits=4, seed=6), "op", device)


def test_rows_outside_all_segments_are_not_written():
    q, k = torch.randn(20, 2, 32), torch.randn(20, 2, 32)
    cu = torch.tensor([0, 6, 12], dtype=torch.int32)  # rows 12.. belong to nobody
    out = torch.full((20, 2, 32), SENTINEL)
    fwd(q, k, k, out=out, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=6, max_seqlen_k=6)
    assert (out[12:] == SENTINEL).all() and (out[:12] != SENTINEL).all()


def test_sink_alone_gives_zero_and_its_value():
    q, k = torch.randn(1, 6, 2, 32), torch.randn(1, 2, 2, 32)
    sinks = torch.tensor([1.5, -2.0])
    out, lse = fa.flash_attn_func(q, k, k, causal=True, sinks=sinks, return_attn_probs=True)
    assert (out[:, :4] == 0).all()
    torch.testing.assert_close(lse[0, :, :4], sinks[:, None].expand(2, 4), rtol=1e-6, atol=1e-6)


def test_sinks_and_s_aux_are_the_same_and_sinks_wins():
    q, k, v = (torch.randn(1, 6, 2, 32).bfloat16() for _ in range(3))
    one, two = torch.tensor([1.0, 0.0]).bfloat16(), torch.tensor([-3.0, 5.0]).bfloat16()
    want = fa.flash_attn_func(q, k, v, sinks=one)
    torch.testing.assert_close(fa.flash_attn_func(q, k, v, s_aux=one), want, rtol=0, atol=0)
    torch.testing.assert_close(fa.flash_attn_func(q, k, v, sinks=one, s_aux=two), want, rtol=0, atol=0)
    assert not torch.equal(fa.flash_attn_func(q, k, v, sinks=two), want)


def test_minus_infinity_sink_is_none():
    q, k, v = (torch.randn(1, 6, 2, 32) for _ in range(3))
    want = fa.flash_attn_func(q, k, v, return_attn_probs=True)
    got = fa.flash_attn_func(q, k, v, sinks=torch.full((2,), -INF), return_attn_probs=True)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


# ---- numerics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_huge_scores(dtype):
    """Scores of +-1e4: no overflow, and the winner takes all."""
    kind = DTYPES[dtype]
    k = torch.eye(64).mul(100).to(kind)[None, :, None]
    v = torch.randn(1, 64, 1, 64).to(kind)
    for sign in (1.0, -1.0):
        out, lse = fa.flash_attn_func(k * sign, k, v, softmax_scale=1.0, return_attn_probs=True)
        assert torch.isfinite(out.float()).all() and torch.isfinite(lse).all()
        if sign > 0:
            torch.testing.assert_close(out, v, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(lse, torch.full_like(lse, 1e4), rtol=1e-5, atol=0)


def test_rising_scores():
    """Each key beats all before it by far: every rescale of the online softmax is taken."""
    n = 700
    q = torch.ones(1, 3, 1, 16)
    k = (torch.arange(n).float() * 3)[None, :, None, None].expand(1, n, 1, 16) / 16
    v = torch.randn(1, n, 1, 16)
    out, lse = fa.flash_attn_func(q, k.contiguous(), v, softmax_scale=1.0, return_attn_probs=True)
    exact, exact_lse = reference.attend(q[0], k[0], v[0], torch.ones(3, n, dtype=torch.bool), 1.0)
    torch.testing.assert_close(out[0].double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[0].double(), exact_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_bad_row_spoils_no_other(dtype):
    """NaN in one query row, one head, one sequence stays there."""
    kind = DTYPES[dtype]
    q, k, v = (torch.randn(2, 40, 4, 64).to(kind) for _ in range(3))
    want = fa.flash_attn_func(q, k, v, causal=True)
    bad = q.clone()
    bad[1, 17, 2] = float("nan")
    got = fa.flash_attn_func(bad, k, v, causal=True)
    mask = torch.ones(2, 40, 4, dtype=torch.bool)
    mask[1, 17, 2] = False
    torch.testing.assert_close(got[mask], want[mask], rtol=0, atol=0)
    assert torch.isnan(got[1, 17, 2].float()).all()
    bad = v.clone()
    bad[1, 30, 2] = float("nan")
    got = fa.flash_attn_func(q, k, bad, causal=True)
    mask = torch.ones(2, 40, 4, dtype=torch.bool)
    mask[1, :, 2] = False
    torch.testing.assert_close(got[mask], want[mask], rtol=0, atol=0)


def test_same_bits_on_every_run():
    for dtype in ALL:
        q, k, v = (torch.randn(2, s, h, 64).to(DTYPES[dtype]) for s, h in ((9, 8), (800, 2), (800, 2)))
        for splits in (0, 1, 4):
            first = fa.flash_attn_func(q, k, v, num_splits=splits, return_attn_probs=True)
            for _ in range(3):
                again = fa.flash_attn_func(q, k, v, num_splits=splits, return_attn_probs=True)
                assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_tuning_arguments_change_nothing_but_rounding():
    q, k, v = (torch.randn(2, s, h, 64) for s, h in ((9, 8), (300, 2), (300, 2)))
    want = fa.flash_attn_func(q, k, v)
    for tuning in (
        {"pack_gqa": True},
        {"sm_margin": 7},
        {"deterministic": True},
        {"num_splits": -1},
        {"num_splits": 9},
    ):
        torch.testing.assert_close(fa.flash_attn_func(q, k, v, **tuning), want, rtol=1e-5, atol=1e-5)


# ---- gradients ----------------------------------------------------------------------------------


def test_backward_is_named_as_missing_not_silently_absent():
    q, k, v = (torch.randn(1, 9, 2, 32).bfloat16().requires_grad_() for _ in range(3))
    cu = torch.tensor([0, 9], dtype=torch.int32)
    plain = fa.flash_attn_func(q.detach(), k.detach(), v.detach(), causal=True)
    outs = [
        fa.flash_attn_func(q, k, v, causal=True),
        fa.flash_attn_varlen_func(q[0], k[0], v[0], cu, cu, 9, 9, causal=True)[None],
        fa.flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), causal=True),
    ]
    for out in outs:
        assert out.requires_grad
        torch.testing.assert_close(out, plain, rtol=0, atol=0)
        with pytest.raises(NotImplementedError, match="(?i)backward|bwd|gradient"):
            out.sum().backward()


def test_no_grad_costs_no_graph():
    q, k, v = (torch.randn(1, 9, 2, 32).requires_grad_() for _ in range(3))
    with torch.no_grad():
        assert not fa.flash_attn_func(q, k, v).requires_grad
    with torch.inference_mode():
        assert not fa.flash_attn_func(q, k, v).requires_grad


# ---- the calls of quick starts, as they stand ----------------------------------------------------


def test_quick_start_calls(device):
    """The forms in which clients call: nothing is imported beyond the public names."""
    q = torch.randn(2, 16, 4, 64, dtype=torch.bfloat16, device=device)
    k = torch.randn(2, 16, 2, 64, dtype=torch.bfloat16, device=device)
    v = torch.randn(2, 16, 2, 64, dtype=torch.bfloat16, device=device)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    cu = torch.tensor([0, 16, 32], dtype=torch.int32, device=device)
    want = fa.flash_attn_func(q, k, v, causal=True)
    # video models
    x = fa.flash_attn_varlen_func(
        q=flat[0], k=flat[1], v=flat[2], cu_seqlens_q=cu, cu_seqlens_k=cu, seqused_q=None, seqused_k=None,
        max_seqlen_q=16, max_seqlen_k=16, softmax_scale=None, causal=True, deterministic=False,
    )  # fmt: skip
    torch.testing.assert_close(x.view_as(want), want)
    # diffusers
    out, lse, *_ = fa.flash_attn_func(
        q=q,
        k=k,
        v=v,
        softmax_scale=None,
        causal=True,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_attn_probs=True,
    )
    assert lse.permute(0, 2, 1).shape == (2, 16, 4)
    torch.testing.assert_close(out, want, rtol=0, atol=0)
    # TransformerEngine: seven positional, then keywords
    x = fa.flash_attn_varlen_func(
        *flat,
        cu,
        cu,
        16,
        16,
        softmax_scale=0.125,
        causal=True,
        window_size=(-1, 0),
        num_splits=1,
        deterministic=False,
    )
    torch.testing.assert_close(x.view_as(want), want)
    # TransformerEngine, context parallel: 23 positional
    x = fa._flash_attn_forward(
        *flat, None, None, None, None, cu, cu, None, None, None, 16, 16, *[None] * 9,
        causal=True, softmax_scale=0.125, window_size_left=-1, window_size_right=0,
    )  # fmt: skip
    torch.testing.assert_close(x[0].view_as(want), want)
    # PyTorch: 34 positional arguments of the op, out a transposed view
    out = torch.empty(2, 4, 16, 64, dtype=torch.bfloat16, device=device).transpose(1, 2)
    x = fwd(
        q,
        k,
        v,
        None,
        None,
        None,
        out,
        None,
        None,
        None,
        None,
        None,
        16,
        16,
        None,
        None,
        None,
        None,
        None,
        None,
        None,
        None,
        None,
        None,
        True,
        -1,
        -1,
        0,
        0.0,
        True,
        None,
        0,
        None,
        0,
    )
    torch.testing.assert_close(x[0], want)
    # SGLang: kvcache with cu_seqlens_k_new but no k, attention_chunk None
    pages = torch.stack([k, k], 0).view(-1, 8, 2, 64)
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32, device=device)
    used = torch.tensor([16, 16], dtype=torch.int32, device=device)
    o, lse, *rest = fa.flash_attn_with_kvcache(
        q=flat[0],
        k_cache=pages,
        v_cache=pages,
        page_table=table,
        cache_seqlens=used,
        cu_seqlens_q=cu,
        cu_seqlens_k_new=cu,
        max_seqlen_q=16,
        softmax_scale=0.125,
        causal=True,
        window_size=(-1, -1),
        attention_chunk=None,
        softcap=0.0,
        k_descale=None,
        v_descale=None,
        return_softmax_lse=True,
        num_splits=0,
    )
    assert lse.T.shape == (32, 4) and len(rest) == 2
    # Megatron-LM finds lse as the 2-D tensor whose dimension 0 is the head count
    got = fa._flash_attn_forward(
        flat[0],
        pages,
        pages,
        cu_seqlens_q=cu,
        seqused_k=used,
        max_seqlen_q=16,
        max_seqlen_k=16,
        page_table=table,
        causal=True,
        num_splits=0,
    )
    assert [x for x in got if x.dim() == 2 and x.shape[0] == 4][0].shape == (4, 32)
