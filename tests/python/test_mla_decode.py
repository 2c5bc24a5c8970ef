# SPDX-License-Identifier: MIT
"""Dense decode over a paged latent cache against the definition in fp64, at upstream's tolerances."""

import flash_mla
import mla_cases as cases
import mla_reference as reference
import pytest
import torch
from mla_cases import dense, generator

LATENT = 512


def check(device, arguments, causal=False, scale=None, tolerance=reference.DENSE_OUT, **options):
    """One call, compared with the definition; returns what it gave."""
    q, k_cache, table, lens = arguments
    call = [cases.moved(x, device) for x in arguments]
    options = {name: cases.moved(x, device) for name, x in options.items()}
    scale_given = reference.scale_for(q) if scale is None else scale
    out, lse = cases.maybe_on_cuda(
        device,
        lambda: flash_mla.flash_mla_with_kvcache(
            *call, LATENT, flash_mla.FlashMLASchedMeta(), softmax_scale=scale, causal=causal, **options
        ),
    )
    options.pop("out", None)
    want, want_lse = reference.dense_decode(
        q, k_cache, table, lens, LATENT, scale_given, causal, **{n: x.cpu() for n, x in options.items()}
    )
    assert out.dtype == (torch.bfloat16 if q.dtype == cases.FP8 else q.dtype) and out.is_contiguous()
    assert lse.dtype == torch.float32 and lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    reference.assert_close(out, want, tolerance, "out")
    fp8 = q.dtype == cases.FP8
    reference.assert_close(lse, want_lse, reference.FP8_LSE if fp8 else reference.DECODE_LSE, "lse")
    return out, lse


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("s_q", [1, 2, 4])
@pytest.mark.parametrize("h_q", [1, 3, 9, 63, 64, 126, 128])
def test_heads_and_queries(device, h_q, s_q, causal, dtype):
    gen = generator(h_q, s_q, causal, dtype == torch.float16)
    b = cases.pick(gen, [1, 2, 3])
    lengths = [int(torch.randint(0, 200, (), generator=gen)) for _ in range(b - 1)] + [140]
    check(device, dense(gen, lengths, s_q, h_q, dtype=dtype), causal)


@pytest.mark.parametrize(("h_q", "h_k"), [(2, 2), (6, 3), (64, 2), (126, 2), (128, 8), (9, 3)])
@pytest.mark.parametrize("s_q", [1, 2])
def test_kv_heads(device, h_q, h_k, s_q):
    check(device, dense(generator(h_q, h_k, s_q), [20, 77], s_q, h_q, h_k), causal=True)


@pytest.mark.parametrize("lengths", [[20], [140] * 6, [4096], [1025, 0, 1, 64, 65, 63, 300]], ids=str)
@pytest.mark.parametrize("h_q", [16, 128])
def test_lengths(device, lengths, h_q):
    check(device, dense(generator(*lengths, h_q), lengths, 1, h_q))


@pytest.mark.parametrize(("b", "h_q", "length"), [(64, 4, 300), (3, 128, 9000), (1, 16, 32768)])
def test_larger_problems(device, b, h_q, length):
    """Lengths spread around a mean, as upstream draws them."""
    gen = generator(b, length)
    lengths = (torch.randn(b, generator=gen) * length / 2 + length).clamp(1, 2 * length).int().tolist()
    check(device, dense(gen, lengths, cases.pick(gen, [1, 2]), h_q), causal=True)


def test_many_sequences_half_of_them_empty(device):
    gen = generator(128)
    lengths = [0 if i % 2 else int(torch.randint(1, 150, (), generator=gen)) for i in range(128)]
    out, lse = check(device, dense(gen, lengths, 2, 4), causal=True)
    assert (out[1::2] == 0).all() and torch.isposinf(lse[1::2]).all()


@pytest.mark.parametrize("s_q", [2, 4])
def test_causal_rows_before_the_first_key_are_empty(device, s_q):
    lengths = list(range(s_q + 1))
    out, lse = check(device, dense(generator(s_q), lengths, s_q, 5), causal=True)
    for i, n in enumerate(lengths):
        assert (out[i, : s_q - n] == 0).all() and torch.isposinf(lse[i, :, : s_q - n]).all()
        assert torch.isfinite(lse[i, :, s_q - n :]).all()


def test_causal_means_nothing_for_one_query(device):
    arguments = dense(generator(1), [100, 64], 1, 16)
    a, b = check(device, arguments, causal=True), check(device, arguments, causal=False)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("page", [1, 2, 16, 53, 64, 128, 256])
@pytest.mark.parametrize("d", [576, 512])
def test_pages_of_any_size_and_both_widths(device, page, d):
    check(device, dense(generator(page, d), [130, 0, 257], 2, 8, page=page, d=d), causal=True)


@pytest.mark.parametrize("round", cases.rounds(6))
def test_random(device, round):
    gen = generator(99, round)
    h_k = cases.pick(gen, [1, 1, 1, 2])
    h_q = h_k * cases.pick(gen, [1, 3, 16, 32])
    b = cases.pick(gen, [1, 2, 5])
    lengths = [int(torch.randint(0, 400, (), generator=gen)) for _ in range(b)]
    dtype = cases.pick(gen, [torch.bfloat16, torch.float16])
    s_q, causal = cases.pick(gen, [1, 2, 3]), cases.pick(gen, [False, True])
    scale = cases.pick(gen, [None, cases.SCALE_V3, 0.2])
    check(device, dense(gen, lengths, s_q, h_q, h_k, dtype=dtype), causal, scale)


@pytest.mark.parametrize("scale", [-0.1, 1e-5, 0.0])
def test_scales_that_upstream_gets_wrong(device, scale):
    check(device, dense(generator(3), [100, 3], 1, 4), scale=scale)


def test_views_of_larger_tensors(device):
    """Strides of q and of the cache are free but for the last."""
    q, k, table, lens = dense(generator(5), [100, 70], 2, 6, 2)
    want = check(device, (q, k, table, lens), True)
    wide_q = torch.full((2, 6, 2, 640), float("nan")).bfloat16()
    wide_q[..., :576] = q.transpose(1, 2)
    wide_k = torch.full((len(k) * 2, 64, 3, 584), float("nan")).bfloat16()
    wide_k[::2, :, :2, 8:] = k
    wide_table = torch.full((2, 9), -1, dtype=torch.int32)
    wide_table[:, : table.shape[1]] = table
    views = wide_q.to(device)[..., :576].transpose(1, 2), wide_k.to(device)[::2, :, :2, 8:]
    got = cases.maybe_on_cuda(
        device,
        lambda: flash_mla.flash_mla_with_kvcache(
            *views,
            wide_table.to(device)[:, : table.shape[1]],
            lens.to(device),
            LATENT,
            flash_mla.FlashMLASchedMeta(),
            causal=True,
        ),
    )
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("h_q", [3, 64])
def test_fp8(device, h_q):
    gen = generator(8, h_q)
    q, k, table, lens = dense(gen, [130, 0, 65], 2, h_q, dtype=torch.float32)
    arguments = (q * 2).to(cases.FP8), (k * 2).to(cases.FP8), table, lens
    descale = {"descale_q": torch.tensor([0.6]), "descale_k": torch.tensor([0.45])}
    check(device, arguments, True, cases.SCALE_V3, reference.FP8_OUT, **descale)


def test_given_result(device):
    q, k, table, lens = dense(generator(6), [100, 0], 2, 16)
    want, _ = check(device, (q, k, table, lens), True)
    guarded = torch.full((4, 2, 16, LATENT), 7.0).bfloat16().to(device)
    given = guarded[1:3]
    meta = flash_mla.FlashMLASchedMeta()
    call = [x.to(device) for x in (q, k, table, lens)]
    version = guarded._version
    out, _ = flash_mla.flash_mla_with_kvcache(*call, LATENT, meta, causal=True, out=given)
    assert out is given and torch.equal(given, want) and given._version > version
    assert (guarded[0] == 7).all() and (guarded[3] == 7).all()


def test_nothing_is_changed(device):
    arguments = [x.to(device) for x in dense(generator(7), [100, 30], 2, 4)]
    before = [x.clone() for x in arguments]
    cases.maybe_on_cuda(
        device,
        lambda: flash_mla.flash_mla_with_kvcache(
            *arguments, LATENT, flash_mla.FlashMLASchedMeta(), causal=True
        ),
    )
    assert all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(arguments, before))


def test_gradients_are_left_out_as_upstream_does(device):
    q, *rest = (x.to(device) for x in dense(generator(9), [70], 1, 4))
    out, lse = cases.maybe_on_cuda(
        device,
        lambda: flash_mla.flash_mla_with_kvcache(
            q.requires_grad_(), *rest, LATENT, flash_mla.FlashMLASchedMeta()
        ),
    )
    assert not out.requires_grad and not lse.requires_grad


def test_one_head_does_not_leak_into_another(device):
    """Padding heads come uninitialised."""
    q, k, table, lens = (x.to(device) for x in dense(generator(10), [100, 64], 2, 8))
    call = (k, table, lens, LATENT)
    want = cases.maybe_on_cuda(
        device, lambda: flash_mla.flash_mla_with_kvcache(q, *call, flash_mla.FlashMLASchedMeta())
    )
    bad = q.clone()
    bad[:, :, 5:] = float("nan")
    got = flash_mla.flash_mla_with_kvcache(bad, *call, flash_mla.FlashMLASchedMeta())
    assert torch.equal(got[0][:, :, :5], want[0][:, :, :5]) and torch.equal(got[1][:, :5], want[1][:, :5])


def test_signless_views():
    q, k, table, lens = dense(generator(11), [70], 1, 4)
    want = flash_mla.flash_mla_with_kvcache(-q, k, table, lens, LATENT, flash_mla.FlashMLASchedMeta())
    got = flash_mla.flash_mla_with_kvcache(
        torch._neg_view(q), k, table, lens, LATENT, flash_mla.FlashMLASchedMeta()
    )
    assert torch.equal(got[0], want[0])
