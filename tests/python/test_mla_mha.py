# SPDX-License-Identifier: MIT
"""flash_mla's dense multi-head attention of packed sequences, 192/128 and 128/128, against fp64."""

import flash_mla
import mla_cases as cases
import mla_reference as reference
import pytest
import torch
from mla_cases import generator

WIDTHS = [(192, 128), (128, 128)]


def offsets(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def case(gen, lens_q, lens_k, h, h_k, d, d_v):
    draw = [(sum(lens_q), h, d), (sum(lens_k), h_k, d), (sum(lens_k), h_k, d_v)]
    q, k, v = ((cases.noise(gen, *shape, dtype=torch.float32) / 2).clamp(-1, 1).bfloat16() for shape in draw)
    return q, k, v / 4, offsets(lens_q), offsets(lens_k)


def check(device, arguments, longest, causal, scale=None):
    q, k, v, cu_q, cu_k = arguments
    call = [x.to(device) for x in arguments]
    out, lse = flash_mla.flash_attn_varlen_func(*call, *longest, softmax_scale=scale, causal=causal)
    want, want_lse = reference.mha(q, k, v, cu_q, cu_k, scale or q.shape[-1] ** -0.5, causal)
    assert out.dtype == torch.bfloat16 and out.is_contiguous()
    assert lse.dtype == torch.float32 and lse.stride() == (1, len(q))
    reference.assert_close(out, want, reference.MHA_OUT, "out")
    reference.assert_close(lse, want_lse, reference.MHA_LSE, "lse")
    return out, lse


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("h", "h_k"), [(4, 4), (8, 1), (6, 2)])
@pytest.mark.parametrize(("d", "d_v"), WIDTHS)
def test_varying_lengths(device, d, d_v, h, h_k, causal):
    gen = generator(d, h, h_k, causal)
    lens_q, lens_k = [5, 1, 130, 64], [70, 1, 200, 64]
    check(
        device,
        case(gen, lens_q, lens_k, h, h_k, d, d_v),
        (130, 200),
        causal,
        cases.pick(gen, [None, (d + 100) ** -0.5]),
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("h", "h_k"), [(4, 4), (8, 1)])
@pytest.mark.parametrize(("d", "d_v"), WIDTHS)
def test_longer_sequences(device, d, d_v, h, h_k, causal):
    """Upstream's kind of values; the first rows of a causal sequence see few keys."""
    q, k, v, *cu = case(generator(d, h), [600, 333], [600, 470], h, h_k, d, d_v)
    check(device, (q / 5, k / 5, v, *cu), (600, 600), causal, (d + 100) ** -0.5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("d", "d_v"), WIDTHS)
def test_empty_sequences_and_rows_without_keys(device, d, d_v, causal):
    """More queries than keys: rows before the first key give 0 and -inf, where upstream divides 0 by 0."""
    lens_q, lens_k = [7, 3, 0, 5], [3, 0, 4, 5]
    out, lse = check(device, case(generator(d), lens_q, lens_k, 4, 4, d, d_v), (7, 5), causal)
    assert (out[7:10] == 0).all() and torch.isneginf(lse[7:10]).all()
    assert torch.isneginf(lse[:4]).all() == causal


def test_no_key_at_all(device):
    out, lse = check(device, case(generator(1), [3, 2], [0, 0], 4, 2, 192, 128), (3, 0), True)
    assert (out == 0).all() and torch.isneginf(lse).all()


def test_no_key_at_all_is_checked_like_any_call():
    q, k, v, cu_q, cu_k = case(generator(1), [3, 2], [0, 0], 4, 2, 192, 128)
    with pytest.raises(RuntimeError, match="v: expected"):
        flash_mla.flash_attn_varlen_func(q, k, v.new_ones(7, 2, 128), cu_q, cu_k, 3, 0)
    with pytest.raises(RuntimeError, match="cu_seqlens_kv: expected"):
        flash_mla.flash_attn_varlen_func(q, k, v, cu_q, cu_q, 3, 3)


def test_the_lse_is_fp32_whatever_the_default():
    torch.set_default_dtype(torch.float64)
    try:
        for lens_k in ([0, 0], [4, 4]):
            q, k, v, *cu = (
                x.bfloat16() if x.is_floating_point() else x
                for x in case(generator(1), [3, 2], lens_k, 4, 2, 192, 128)
            )
            assert flash_mla.flash_attn_varlen_func(q, k, v, *cu, 3, 4)[1].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("d", "d_v"), WIDTHS)
def test_packed_forms_are_views_of_the_same(device, d, d_v):
    gen = generator(d)
    lens = [40, 3, 17]
    q, k, v, cu, _ = (x.to(device) for x in case(gen, lens, lens, 4, 4, d, d_v))
    want = flash_mla.flash_attn_varlen_func(q, k, v, cu, cu, 40, 40, causal=True)
    kv, qkv = torch.cat((k, v), -1), torch.cat((q, k, v), -1)
    by_kv = flash_mla.flash_attn_varlen_kvpacked_func(q, kv, cu, cu, 40, 40, d, causal=True)
    by_qkv = flash_mla.flash_attn_varlen_qkvpacked_func(qkv, cu, 40, d, causal=True)
    for got in (by_kv, by_qkv):
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_packed_forms_have_the_same_options():
    gen = generator(5)
    q, k, v, cu, _ = case(gen, [20], [20], 2, 2, 128, 128)
    options = {"softmax_scale": 0.02, "causal": False, "is_varlen": False}
    want = flash_mla.flash_attn_varlen_func(q, k, v, cu, cu, 20, 20, **options)
    kv, qkv = torch.cat((k, v), -1), torch.cat((q, k, v), -1)
    assert torch.equal(
        flash_mla.flash_attn_varlen_kvpacked_func(q, kv, cu, cu, 20, 20, 128, **options)[0], want[0]
    )
    assert torch.equal(flash_mla.flash_attn_varlen_qkvpacked_func(qkv, cu, 20, 128, **options)[0], want[0])


@pytest.mark.parametrize("causal", [False, True])
def test_even_lengths_use_only_the_length_of_the_offsets(device, causal):
    arguments = case(generator(3), [12] * 3, [20] * 3, 4, 2, 192, 128)
    want = check(device, arguments, (12, 20), causal)
    call = [x.to(device) for x in arguments]
    call[3:] = [torch.full((4,), -7, dtype=torch.int32, device=device)] * 2
    got = flash_mla.flash_attn_varlen_func(*call, 1, 1, causal=causal, is_varlen=False)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_strides_are_free_but_the_last(device):
    arguments = case(generator(4), [9, 30], [30, 9], 4, 2, 192, 128)
    want = check(device, arguments, (30, 30), True)
    wide = []
    for x in arguments[:3]:
        y = torch.full((x.shape[1], x.shape[0] * 2, x.shape[2] + 8), float("nan")).bfloat16()
        y[:, ::2, : x.shape[2]] = x.transpose(0, 1)
        wide.append(y.to(device)[:, ::2, : x.shape[2]].transpose(0, 1))
    got = flash_mla.flash_attn_varlen_func(*wide, *(x.to(device) for x in arguments[3:]), 30, 30, causal=True)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_longer_maxima_and_tensor_maxima():
    arguments = case(generator(6), [9, 30], [30, 9], 2, 2, 128, 128)
    want = check("cpu", arguments, (30, 30), True)
    got = flash_mla.flash_attn_varlen_func(*arguments, torch.tensor(64), torch.tensor(64), causal=True)
    assert torch.equal(got[0], want[0])


def test_repeats_are_bitwise_equal(device):
    arguments = [x.to(device) for x in case(generator(7), [130, 1], [300, 70], 8, 2, 192, 128)]
    first, *others = [flash_mla.flash_attn_varlen_func(*arguments, 130, 300, causal=True) for _ in range(3)]
    assert all(torch.equal(x, y) for r in others for x, y in zip(r, first))


# ---- gradients ---------------------------------------------------------------------------------------


def test_backward_is_not_built(device):
    q, k, v, cu, _ = (x.to(device) for x in case(generator(8), [5, 4], [5, 4], 2, 2, 128, 128))
    want = flash_mla.flash_attn_varlen_func(q, k, v, cu, cu, 5, 5)
    out, lse = flash_mla.flash_attn_varlen_func(q.requires_grad_(), k, v, cu, cu, 5, 5)
    assert torch.equal(out, want[0]) and out.requires_grad
    with pytest.raises(NotImplementedError, match="mha_bwd"):
        out.float().sum().backward()
    with torch.no_grad():
        assert not flash_mla.flash_attn_varlen_func(q, k, v, cu, cu, 5, 5)[0].requires_grad


def test_backward_of_grouped_heads_is_a_value_error():
    q, k, v, cu, _ = case(generator(9), [5], [5], 4, 2, 128, 128)
    out, _ = flash_mla.flash_attn_varlen_func(q, k.requires_grad_(), v, cu, cu, 5, 5)
    with pytest.raises(ValueError, match="as many KV heads as query heads 4, got 2"):
        out.float().sum().backward()


def test_the_autograd_class():
    from flash_mla import flash_mla_interface

    assert issubclass(flash_mla_interface.FlashAttnVarlenFunc, torch.autograd.Function)


# ---- rejections --------------------------------------------------------------------------------------


def make(d=128, d_v=128, h=4, h_k=4, dtype=torch.bfloat16):
    q, k, v, cu_q, cu_k = case(generator(2), [6, 6], [8, 8], h, h_k, d, d_v)
    return {
        "q": q.to(dtype),
        "k": k.to(dtype),
        "v": v.to(dtype),
        "cu_seqlens_qo": cu_q,
        "cu_seqlens_kv": cu_k,
        "max_seqlen_qo": 6,
        "max_seqlen_kv": 8,
    }


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"dropout_p": 0.1}, AssertionError, "dropout_p: expected 0, got 0.1"),
        ({"deterministic": True}, AssertionError, "deterministic: expected False"),
        (make(64, 64), RuntimeError, "widths 192 and 128, or 128 and 128, got 64 and 64"),
        (make(192, 192), RuntimeError, "got 192 and 192"),
        (make(dtype=torch.float16), RuntimeError, "q: expected dtype torch.bfloat16, got torch.float16"),
        (make(dtype=torch.float32), TypeError, "q: expected dtype torch.bfloat16"),
        ({"v": make(dtype=torch.float16)["v"]}, RuntimeError, "v: expected dtype torch.bfloat16"),
        (make(h=4, h_k=3), RuntimeError, "heads"),
        ({"q": make()["q"][None]}, RuntimeError, "q: expected 3 dimensions"),
        ({"k": [1]}, TypeError, "k: expected a tensor, got list"),
        ({"q": None}, TypeError, "q: expected a tensor, got NoneType"),
        ({"q": make()["q"].repeat(1, 1, 2)[..., ::2]}, RuntimeError, "q: expected last stride 1"),
        ({"cu_seqlens_qo": make()["cu_seqlens_qo"].long()}, RuntimeError, "cu_seqlens_q"),
        ({"cu_seqlens_kv": make()["cu_seqlens_kv"][:2]}, RuntimeError, "cu_seqlens_k"),
        ({"max_seqlen_qo": None}, TypeError, "max_seqlen_qo: expected an int, got NoneType"),
        ({"max_seqlen_kv": "x"}, RuntimeError, "max_seqlen_kv: expected an int, got str"),
        ({"cu_seqlens_kv": None}, TypeError, "cu_seqlens_kv: expected a tensor"),
        ({"cu_seqlens_qo": torch.tensor([0, 99, 12]).int()}, RuntimeError, "cu_seqlens_q"),
        (
            {"is_varlen": False, "cu_seqlens_qo": torch.zeros(6).int()},
            RuntimeError,
            "cu_seqlens_qo: expected a batch that divides 12 tokens, got 5",
        ),
    ],
)
def test_rejections(change, error, words):
    with pytest.raises(error, match=words):
        flash_mla.flash_attn_varlen_func(**make() | change)


@pytest.mark.parametrize("name", ["kv", "qkv"])
@pytest.mark.parametrize("d", [0, -1, 500, 64, 128.0, None, "128"])
def test_a_width_that_does_not_fit_the_packed_axis(name, d):
    x, cu = torch.zeros(8, 4, 384 if name == "qkv" else 256).bfloat16(), offsets([8])
    with pytest.raises(RuntimeError, match="head_dim_qk"):
        if name == "kv":
            flash_mla.flash_attn_varlen_kvpacked_func(x[..., :128], x, cu, cu, 8, 8, d)
        else:
            flash_mla.flash_attn_varlen_qkvpacked_func(x, cu, 8, d)


def test_what_is_no_packed_tensor_is_named():
    cu = offsets([3, 2])
    with pytest.raises(TypeError, match="qkv: expected a tensor, got NoneType"):
        flash_mla.flash_attn_varlen_qkvpacked_func(None, cu, 3, 192)
    with pytest.raises(RuntimeError, match="kv: expected 3 dimensions"):
        flash_mla.flash_attn_varlen_kvpacked_func(torch.ones(5, 4, 192), torch.ones(()), cu, cu, 3, 3, 192)
    with pytest.raises(TypeError, match="qkv: expected dtype torch.bfloat16, got torch.float32"):
        flash_mla.flash_attn_varlen_qkvpacked_func(torch.ones(5, 4, 512), cu, 3, 192)


def test_errors_have_the_names_of_this_function():
    cu = offsets([3, 5])
    with pytest.raises(ValueError, match="^cu_seqlens_qo: expected entry"):
        flash_mla.flash_attn_varlen_func(**make() | {"cu_seqlens_qo": cu + 9})
    with pytest.raises(TypeError, match="^cu_seqlens_kv: expected dtype int32"):
        flash_mla.flash_attn_varlen_func(**make() | {"cu_seqlens_kv": cu.long()})
