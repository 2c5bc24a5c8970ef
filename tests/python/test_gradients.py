# SPDX-License-Identifier: MIT
"""No gradient is ever lost in silence: a call with a floating-point argument that asks for one gives
an output whose backward raises, and a dual tensor is refused before the call runs."""

import flash_attn_interface as fa
import pytest
import torch
from torch.autograd import forward_ad

B, S, T, H, D = 2, 4, 9, 2, 32
OPS = torch.ops.flash_attn_3
FP8 = torch.float8_e4m3fn


def tensors(dtype=torch.float32):
    q, k, v = (torch.randn(B, n, H, D).to(dtype) for n in (S, T, T))
    return {"q": q, "k": k, "v": v}


def scales():
    return {name: torch.ones(B, H) for name in ("q_descale", "k_descale", "v_descale")}


def appended():
    angles = torch.rand(T, D // 2)
    return {
        "k_new": torch.randn(B, 1, H, D),
        "v_new": torch.randn(B, 1, H, D),
        "rotary_cos": angles.cos(),
        "rotary_sin": angles.sin(),
    }


def packed(q, k, v, **rest):
    cu_q, cu_k = (torch.arange(0, (B + 1) * n, n, dtype=torch.int32) for n in (S, T))
    rest = {name: x.flatten(0, 1) if name == "qv" else x for name, x in rest.items()}
    return fa.flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), cu_q, cu_k, S, T, **rest)


def kvcache(q, k, v, k_new=None, v_new=None, **rest):
    if k_new is not None:
        rest["cache_seqlens"] = 3
    return fa.flash_attn_with_kvcache(q, k, v, k_new, v_new, **rest)


def private(q, k, v, k_new=None, v_new=None, **rest):
    if k_new is not None:
        rest["seqused_k"] = torch.full((B,), 3, dtype=torch.int32)
    return fa._flash_attn_forward(q, k, v, k_new, v_new, **rest)[0]


def qv():
    return {**tensors(), "qv": torch.randn(B, S, H, D)}


def sinks():
    return {**tensors(), "sinks": torch.randn(H)}


def descales():
    return {**tensors(FP8), **scales()}


def append():
    return {**tensors(), **appended()}


CALLS = {"dense": fa.flash_attn_func, "packed": packed, "kvcache": kvcache, "forward": private}
ASKS = [
    (call, make, name)
    for call in CALLS
    for make, names in (
        (tensors, ("q", "k", "v")),
        (qv, ("qv",)),
        (sinks, ("sinks",)),
        (descales, ("q_descale", "k_descale", "v_descale")),
        (append, ("k_new", "v_new", "rotary_cos", "rotary_sin")),
    )
    for name in names
    if not (make is append and call in ("dense", "packed")) and not (make is sinks and call == "forward")
]
each = pytest.mark.parametrize(("call", "make", "name"), ASKS, ids=[f"{c}-{n}" for c, _, n in ASKS])


@each
def test_a_gradient_asked_for_is_not_lost(call, make, name):
    given = make()
    given[name].requires_grad_()
    with torch.no_grad():
        want = CALLS[call](**make_again(given))
        assert not want.requires_grad
    out = CALLS[call](**given)
    assert out.requires_grad and torch.equal(out, want)
    with pytest.raises(NotImplementedError):
        out.float().sum().backward()


def make_again(given):
    return {name: x.detach().clone() for name, x in given.items()}


@each
def test_a_tangent_is_not_lost(call, make, name):
    given = make()
    with forward_ad.dual_level():
        assert CALLS[call](**make_again(given)) is not None  # an open level alone refuses nothing
        given[name] = forward_ad.make_dual(given[name], torch.ones_like(given[name]))
        with pytest.raises(NotImplementedError):
            CALLS[call](**given)
        if given[name].dtype == torch.float32:
            given[name] = given[name].detach().requires_grad_()
            given[name] = forward_ad.make_dual(given[name], torch.ones_like(given[name]))
            with pytest.raises((NotImplementedError, RuntimeError), match="forward"):
                CALLS[call](**given)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_operators_refuse_a_tangent(name):
    given = tensors()
    with forward_ad.dual_level():
        given[name] = forward_ad.make_dual(given[name], torch.ones_like(given[name]))
        for operator in (OPS._flash_attn_forward, OPS._flash_attn_forward_ext, OPS.fwd):
            with pytest.raises(NotImplementedError, match="forward-mode"):
                operator(**given)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            fa.flash_attn_combine(forward_ad.make_dual(*torch.ones(2, 3, B, S, H, D)), torch.ones(3, B, S, H))


def test_functional_jvp_is_refused():
    given = tensors()
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(
            lambda q: fa.flash_attn_func(q, given["k"], given["v"]), (given["q"],), (torch.ones(B, S, H, D),)
        )


def test_qkvpacked():
    for shape, heads in (((B, S, 3, H, D), None), ((B, S, 3 * H, D), H)):
        qkv = torch.randn(shape, requires_grad=True)
        assert fa.flash_attn_qkvpacked_func(qkv, num_heads_q=heads).requires_grad
        with forward_ad.dual_level(), pytest.raises(NotImplementedError):
            dual = forward_ad.make_dual(qkv.detach(), torch.ones_like(qkv))
            fa.flash_attn_qkvpacked_func(dual, num_heads_q=heads)


def test_a_given_output_that_is_a_leaf_is_refused():
    cu = torch.tensor([0, S], dtype=torch.int32)
    q = torch.randn(S, H, D)
    with pytest.raises(RuntimeError, match="in-place"):
        fa.flash_attn_varlen_func(q, q, q, cu, cu, S, S, out=torch.zeros(S, H, D, requires_grad=True))


# ---- what autograd must know of tensors changed in place, and of views with a sign ---------------------


@pytest.mark.parametrize("call", ["kvcache", "forward", "_flash_attn_append", "class"])
def test_an_append_bumps_the_caches_versions(call):
    given = append()
    if call == "class":
        given["q"].requires_grad_()
    before = given["k"]._version, given["v"]._version
    if call == "_flash_attn_append":
        OPS._flash_attn_append(**given, seqused_k=torch.full((B,), 3, dtype=torch.int32))
    else:
        CALLS["kvcache" if call == "class" else call](**given)
    assert given["k"]._version > before[0] and given["v"]._version > before[1]


def test_a_given_output_is_bumped():
    q = torch.randn(S, H, D)
    cu = torch.tensor([0, S], dtype=torch.int32)
    out = torch.empty_like(q)
    fa.flash_attn_varlen_func(q, q, q, cu, cu, S, S, out=out)
    assert out._version == 1
    OPS.fwd(q[None], q[None], q[None], out=out[None], num_splits=1)
    assert out._version > 1
    merged = torch.empty(B, S, H, D)
    fa.flash_attn_combine(torch.ones(3, B, S, H, D), torch.ones(3, B, S, H), out=merged)
    assert merged._version > 0


def test_a_changed_cache_is_noticed():
    """Without the bump this backward would use the keys after the append."""
    given = append()
    w = torch.ones(B, T, H, D, requires_grad=True)
    product = (w * given["k"]).sum()
    kvcache(**given)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_inference_tensors_can_be_appended_to():
    with torch.inference_mode():
        kvcache(**append())
        q = torch.randn(S, H, D)
        cu = torch.tensor([0, S], dtype=torch.int32)
        fa.flash_attn_varlen_func(q, q, q, cu, cu, S, S, out=torch.empty_like(q))


@pytest.mark.parametrize(
    ("call", "make", "name"), [x for x in ASKS if x[1] is not descales or x[2] == "q_descale"]
)
def test_negated_views(call, make, name):
    given = make()
    given = {n: -x if n == name else x for n, x in given.items()}
    want = CALLS[call](**make_again(given))
    given[name] = torch._neg_view(-given[name])
    assert given[name].is_neg()
    got = CALLS[call](**given)
    assert torch.equal(got, want)


def test_an_append_to_a_negated_cache_is_refused():
    given = append()
    given["k"] = torch._neg_view(given["k"])
    for call in (kvcache, private):
        with pytest.raises(ValueError, match="negated"):
            call(**given)


def test_a_negated_output_is_refused():
    q = torch.randn(S, H, D)
    cu = torch.tensor([0, S], dtype=torch.int32)
    with pytest.raises(ValueError, match="negated"):
        fa.flash_attn_varlen_func(q, q, q, cu, cu, S, S, out=torch._neg_view(torch.empty_like(q)))


def test_negated_partials():
    partial, lse = torch.randn(3, B, S, H, D), torch.randn(3, B, S, H)
    want = fa.flash_attn_combine(partial, lse)[0]
    got = fa.flash_attn_combine(torch._neg_view(-partial), torch._neg_view(-lse))[0]
    assert torch.equal(got, want)


# ---- refusals that only some ways made -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["k", "v"])
def test_an_append_to_a_strided_cache_is_refused(name):
    given = append()
    given[name] = torch.zeros(B, T, H, 2 * D)[..., ::2]
    for call in (private, kvcache):
        with pytest.raises((ValueError, AssertionError), match="stride"):
            call(**given)
    used = torch.full((B,), 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="stride"):
        OPS.fwd(**given, seqused_k=used, num_splits=1)
    assert not given[name].any()


def test_combine_into_another_dtype_is_refused_when_compiled_too():
    partial, lse = torch.randn(3, B, S, H, D), torch.randn(3, B, S, H)
    for call in (fa.flash_attn_combine, torch.compile(fa.flash_attn_combine, backend="eager")):
        with pytest.raises(TypeError, match="out_dtype"):
            call(partial, lse, torch.empty(B, S, H, D, dtype=torch.bfloat16))
        out = torch.empty(B, S, H, D, dtype=torch.bfloat16)
        assert call(partial, lse, out, torch.bfloat16)[0] is out


def test_metadata_of_too_many_splits_is_refused():
    used = torch.full((B,), 3, dtype=torch.int32)
    fa.get_scheduler_metadata(B, S, T, H, H, D, used, num_splits=256)
    with pytest.raises(ValueError, match="num_splits: expected at most 256, got 257"):
        fa.get_scheduler_metadata(B, S, T, H, H, D, used, num_splits=257)
    with pytest.raises(ValueError, match="num_splits"):
        OPS.get_scheduler_metadata(B, S, T, H, H, D, D, torch.bfloat16, used, num_splits=257)


def meta(*shape, dtype=torch.float32):
    return torch.ones(*shape, device="meta", dtype=dtype)


@pytest.mark.parametrize(
    "wrong",
    [
        {"k": torch.ones(B, T, H, D)},
        {"sinks": torch.ones(H)},
        {"q_descale": torch.ones(B, H)},
        {"k": meta(B, T, H, D + 1)},
        {"k": meta(B + 1, T, H, D), "v": meta(B + 1, T, H, D)},
        {"k": meta(B, T, 3, D), "v": meta(B, T, 3, D)},
        {"v": meta(D)},
        {"v": meta(B, T + 1, H, D)},
        {"qv": meta(B, S, H, D + 8)},
        {"sinks": meta(H + 1)},
    ],
)
def test_meta_tensors_that_do_not_fit_are_refused(wrong):
    given = {"q": meta(B, S, H, D), "k": meta(B, T, H, D), "v": meta(B, T, H, D)}
    assert fa.flash_attn_func(**given).shape == (B, S, H, D)
    with pytest.raises(RuntimeError, match="expected"):
        fa.flash_attn_func(**{**given, **wrong})
