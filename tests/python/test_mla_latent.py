# SPDX-License-Identifier: MIT
"""The functions of the Triton package of the same name, on its shapes and at its tolerances or tighter."""

import importlib

import mla_cases as cases
import mla_reference as reference
import pytest
import torch
from flash_mla.kernels import decode_kernel, prefill_kernel, triton_flash_mla
from flash_mla.ops import interface, interface_core, interface_fused
from mla_cases import generator

CLOSE = (1e-3, 1e-2, 1e-5)
BF16 = (3e-3, 1e-2, 7e-6)


def latents(gen, *shape, dtype=torch.float16):
    return (cases.noise(gen, *shape, dtype=torch.float32) / 2).to(dtype)


def heads_of(q_nope, kv, q_rope, k_rope, scale, causal=False):
    """(B, S, H, D) on (B, N, D), rope parts (B, S, H, R), (B, N, R) or None, by the definition."""
    rows = []
    for i in range(len(q_nope)):
        q, k, s = q_nope[i], kv[i], q_nope.shape[1]
        if q_rope is not None:
            q, k = torch.cat((q, q_rope[i]), -1), torch.cat((k, k_rope[i]), -1)
        seen = torch.ones(s, len(k), dtype=torch.bool).tril() if causal else None
        rows.append(reference.attend(q, k, kv[i], scale, seen)[0])
    return torch.stack(rows)


def turned(x, cos, sin):
    """Interleaved pairs as complex numbers; cos, sin (.., R) lie along x."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    factor = torch.complex(cos.double()[..., ::2], sin.double()[..., ::2])
    return torch.view_as_real(pairs * factor).flatten(-2).to(x.dtype)


def tables(n, r):
    angle = torch.outer(torch.arange(n).float(), 10000.0 ** -(torch.arange(0, r, 2) / r)).repeat_interleave(
        2, 1
    )
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("b", "n", "h", "d"), [(2, 256, 2, 128), (1, 65, 3, 512)])
@pytest.mark.parametrize(
    "function", [interface.flash_mla_prefill, interface_core.flash_mla_prefill_core], ids=["first", "later"]
)
def test_prefill(device, function, b, n, h, d, dtype):
    gen = generator(b, n, h, d)
    q, kv = latents(gen, b, n, h, d, dtype=dtype), latents(gen, b, n, d, dtype=dtype)
    out = cases.maybe_on_cuda(device, lambda: function(q.to(device), kv.to(device), d**-0.5))
    assert out.dtype == dtype
    want = heads_of(q, kv, None, None, d**-0.5, True)
    reference.assert_close(out, want, BF16 if dtype == torch.bfloat16 else CLOSE, "out")


@pytest.mark.parametrize(("b", "n", "h", "d"), [(4, 4096, 16, 512), (2, 100, 3, 128), (1, 1, 1, 512)])
@pytest.mark.parametrize(
    "function", [interface.flash_mla_decode, interface_core.flash_mla_decode_core], ids=["first", "later"]
)
def test_decode(device, function, b, n, h, d):
    gen = generator(b, n, h, d)
    q, kv = latents(gen, b, h, d), latents(gen, b, n, d)
    out = cases.maybe_on_cuda(device, lambda: function(q.to(device), kv.to(device), d**-0.5))
    assert out.shape == q.shape
    reference.assert_close(out, heads_of(q[:, None], kv, None, None, d**-0.5)[:, 0], CLOSE, "out")


def test_prefill_fused(device):
    gen, n = generator(1), 130
    q, kv = latents(gen, 2, n, 4, 512), latents(gen, 2, n, 512)
    q_rope, k_rope = latents(gen, 2, n, 4, 64), latents(gen, 2, n, 64)
    cos, sin = tables(n, 64)
    call = [x.to(device) for x in (q, kv, q_rope, k_rope, cos, sin)]
    scale = cases.SCALE_V3
    out = cases.maybe_on_cuda(device, lambda: interface_fused.flash_mla_prefill_fused(*call, scale))
    want = heads_of(q, kv, turned(q_rope, cos[:, None], sin[:, None]), k_rope, scale, True)
    reference.assert_close(out, want, CLOSE, "out")


def test_negated_views_and_tensors_with_a_gradient():
    """A sign that torch only notes is written out; the result has no gradient."""
    gen, n, r = generator(4), 9, 64
    q, kv = latents(gen, 2, n, 4, 128), latents(gen, 2, n, 128)
    q_rope, k_rope = latents(gen, 2, n, 4, r), latents(gen, 2, n, r)
    want = interface.flash_mla_prefill(q, kv, 0.1)
    fused = interface_fused.flash_mla_prefill_fused(q, kv, q_rope, k_rope, *tables(n, r), 0.1)
    q, kv, q_rope, k_rope = (torch._neg_view(-x).requires_grad_() for x in (q, kv, q_rope, k_rope))
    got = interface.flash_mla_prefill(q, kv, 0.1)
    assert torch.equal(got, want) and not got.requires_grad
    got = interface_fused.flash_mla_prefill_fused(q, kv, q_rope, k_rope, *tables(n, r), 0.1)
    assert torch.equal(got, fused) and not got.requires_grad


@pytest.mark.parametrize("as_tensor", [False, True])
def test_decode_fused(device, as_tensor):
    gen, n, at = generator(2), 300, 77
    q, kv = latents(gen, 2, 4, 512), latents(gen, 2, n, 512)
    q_rope, k_rope = latents(gen, 2, 4, 64), latents(gen, 2, n, 64)
    cos, sin = tables(n, 64)
    call = [x.to(device) for x in (q, kv, q_rope, k_rope, cos, sin)]
    at_given = torch.tensor(at) if as_tensor else at
    out = cases.maybe_on_cuda(
        device, lambda: interface_fused.flash_mla_decode_fused(*call, at_given, cases.SCALE_V3)
    )
    want = heads_of(q[:, None], kv, turned(q_rope, cos[at], sin[at])[:, None], k_rope, cases.SCALE_V3)[:, 0]
    reference.assert_close(out, want, CLOSE, "out")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("page", [16, 64])
def test_paged_decode(device, page, dtype):
    q, k, table, lens = cases.dense(generator(page), [100, 0, 65], 1, 16, page=page, dtype=dtype)
    q, k = q[:, 0].to(device), k[:, :, 0].to(device)
    call = (q, k, k[..., :512], table.to(device), lens.to(device), cases.SCALE_V3)
    out, none = cases.maybe_on_cuda(device, lambda: triton_flash_mla.flash_mla_decode(*call))
    assert none is None
    again, lse = triton_flash_mla.flash_mla_decode(*call, num_splits=7, return_lse=True)
    want, want_lse = reference.dense_decode(q[:, None], k[:, :, None], table, lens, 512, cases.SCALE_V3)
    assert torch.equal(out, again) and out.dtype == dtype
    reference.assert_close(out, want[:, 0], reference.DENSE_OUT, "out")
    reference.assert_close(lse, want_lse[..., 0], reference.DECODE_LSE, "lse")


@pytest.mark.parametrize("scales", [(0.01, 0.01), (0.02, 0.05)])
def test_paged_decode_of_an_int8_cache(device, scales):
    gen = generator(3)
    q, _, table, lens = cases.dense(gen, [100, 0, 65], 1, 16, dtype=torch.float16)
    pages = 2 + 0 + 2 + 3
    k8 = torch.randint(-127, 128, (pages, 64, 576), generator=gen).to(torch.int8)
    k_scale, v_scale = (torch.tensor(x) for x in scales)
    call = [x.to(device) for x in (q[:, 0], k8)]
    out, lse = cases.maybe_on_cuda(
        device,
        lambda: triton_flash_mla.flash_mla_decode(
            *call,
            call[1][..., :512],
            table.to(device),
            lens.to(device),
            0.3,
            return_lse=True,
            k_scale_tensor=k_scale.to(device),
            v_scale_tensor=v_scale.to(device),
        ),
    )
    want, want_lse = reference.dense_decode(q, k8.float()[:, :, None], table, lens, 512, 0.3 * float(k_scale))
    reference.assert_close(out, want[:, 0] * float(v_scale), reference.DENSE_OUT, "out")
    reference.assert_close(lse, want_lse[..., 0], reference.DECODE_LSE, "lse")


def test_module_names():
    assert decode_kernel.flash_mla_decode is interface.flash_mla_decode
    assert prefill_kernel.flash_mla_prefill is interface.flash_mla_prefill
    assert interface_core.flash_mla_prefill_core is interface.flash_mla_prefill
    for name in ("ops.interface", "ops.interface_core", "ops.interface_fused", "kernels.triton_flash_mla"):
        module = importlib.import_module(f"flash_mla.{name}")
        assert module.__all__ and all(callable(getattr(module, x)) for x in module.__all__)


X = torch.zeros(2, 5, 3, 128).bfloat16()


def paged(**change):
    q, k, table, lens = cases.dense(generator(3), [100, 3], 1, 4)
    arguments = {"q": q[:, 0], "k_cache": k[:, :, 0], "block_table": table, "seq_lens": lens, "sm_scale": 0.1}
    arguments["v_cache"] = arguments["k_cache"][..., :512]
    return triton_flash_mla.flash_mla_decode(**arguments | change)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: interface.flash_mla_prefill(X[0], X[:, :, 0], 0.1), "q_abs: expected 4 dimensions"),
        (lambda: interface.flash_mla_prefill(X, X, 0.1), "kv_latent: expected 3 dimensions"),
        (lambda: interface.flash_mla_prefill(X, X[..., :64][:, :, 0], 0.1), "expected"),
        (lambda: interface.flash_mla_decode(X, X[:, :, 0], 0.1), "q_abs: expected 3 dimensions"),
        (lambda: interface.flash_mla_decode(None, X[:, :, 0], 0.1), "q_abs: expected a tensor"),
        (lambda: paged(v_cache=torch.zeros(5, 64, 512).bfloat16()), "v_cache: expected k_cache"),
        (lambda: paged(q=torch.zeros(2, 1, 4, 576)), "q: expected 3 dimensions"),
        (
            lambda: paged(k_cache=(c := torch.zeros(6, 64, 576).to(torch.int8)), v_cache=c[..., :512]),
            "k_scale_tensor, v_scale_tensor: expected tensors with an int8 cache",
        ),
        (lambda: paged(k_scale_tensor=torch.ones(1)), "k_scale_tensor, v_scale_tensor: expected None"),
        (
            lambda: interface_fused.flash_mla_decode_fused(
                X[:, 0], X[:, :, 0], X[:, 0], X[:, :, 0], torch.ones(9, 128), torch.ones(9, 128), 9, 0.1
            ),
            "cur_pos: expected a row of the 9",
        ),
        (
            lambda: interface_fused.flash_mla_decode_fused(
                X[:, 0], X[:, :, 0], X[:, 0], X[:, :, 0], torch.ones(9, 128), torch.ones(2, 128), 8, 0.1
            ),
            "cur_pos: expected a row of the 2",
        ),
        (
            lambda: interface_fused.flash_mla_decode_fused(
                X[:, 0],
                X[:, :, 0],
                X[:, 0],
                X[:, :, 0],
                torch.ones(9, 128),
                torch.ones(9, 128),
                float("inf"),
                0.1,
            ),
            "cur_pos: expected an int, got float",
        ),
        (
            lambda: interface_fused.flash_mla_prefill_fused(
                X, X[:, :, 0], X, X[:, :, 0], torch.ones(9, 128), [1.0], 0.1
            ),
            "sin: expected a tensor, got list",
        ),
        (lambda: paged(block_table=[[0, 1], [2, 3]]), "block_table: expected a tensor, got list"),
        (lambda: paged(seq_lens=None), "seq_lens: expected a tensor, got NoneType"),
    ],
)
def test_rejections(call, words):
    with pytest.raises(RuntimeError, match=words):
        call()
