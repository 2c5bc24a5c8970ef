# SPDX-License-Identifier: MIT
"""The writers and readers of the FP8 caches against the byte tables of both formats."""

import mla_cases as cases
import mla_reference as reference
import pytest
import torch
from flash_mla import cache as kv
from mla_cases import generator

WIDTHS = [576, 512]


def raw(cache):
    """The bytes of a cache that mean something: all but MODEL1's padding."""
    pages, page, _, row = cache.shape
    if row == 656:
        return cache.view(torch.uint8).reshape(pages, -1)
    flat = cache.view(torch.uint8).as_strided((pages, 584 * page), (cache.stride(0), 1)).clone()
    flat[:, 576 * page :].unflatten(1, (page, 8))[..., 7] = 0
    return flat


def rows(gen, pages, page, d, gain=1.0):
    x = cases.noise(gen, pages, page, d, dtype=torch.float32, gain=gain)
    x[0, 0] = 0  # a row of zeros: the least scale
    x[-1, -1, :64] *= 1000
    return x.bfloat16()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("page", [1, 2, 61, 64])
@pytest.mark.parametrize("d", WIDTHS)
def test_written_bytes(d, page, dtype):
    x = rows(generator(d, page), 3, page, d).to(dtype)
    got = kv.quantize_k_cache(x.unsqueeze(2))
    assert got.dtype == cases.FP8 and got.shape == (3, page, 1, 656 if d == 576 else 584)
    assert torch.equal(raw(got), raw(reference.pack(x)))
    assert torch.equal(raw(kv.quantize_k_cache(x)), raw(got))


@pytest.mark.parametrize("gain", [1e-6, 0.01, 1.0, 300.0])
@pytest.mark.parametrize("d", WIDTHS)
def test_round_trip(d, gain):
    x = rows(generator(d), 2, 64, d, gain)
    cache = kv.quantize_k_cache(x)
    back = kv.dequantize_k_cache(cache)
    assert back.shape == (2, 64, 1, d) and back.dtype == torch.bfloat16
    assert torch.equal(back[:, :, 0], reference.unpack(cache, d))
    latent = x[..., : d - 64].float()
    tile = 128 if d == 576 else 64
    step = reference.scale_of(latent.unflatten(-1, (-1, tile))).float()
    error = (back[:, :, 0, : d - 64].float() - latent).abs().unflatten(-1, (-1, tile))
    size = latent.abs().unflatten(-1, (-1, tile))
    assert (error <= torch.maximum(size / 16, step * 2**-10) * 1.01).all()
    assert torch.equal(back[:, :, 0, d - 64 :], x[..., d - 64 :])
    again = kv.quantize_k_cache(back)
    assert torch.equal(reference.unpack(again, d), back[:, :, 0])


@pytest.mark.parametrize(("page", "size"), [(2, 1728), (64, 37440), (256, 149760), (576, 336384)])
def test_page_sizes_of_model1(page, size):
    cache = kv.empty_k_cache(3, page, 512)
    assert cache.stride() == (size, 584, 584, 1) and cache.untyped_storage().nbytes() == 3 * size


def test_pages_of_v32_have_no_padding():
    assert kv.empty_k_cache(3, 64, 576).is_contiguous()


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("d", WIDTHS)
def test_tokens_go_to_their_slots_and_nowhere_else(d, index):
    gen = generator(d)
    cache = reference.pack(cases.noise(gen, 4, 61, d))
    before = reference.unpack(cache, d).flatten(0, 1).clone()
    slots = torch.randperm(4 * 61, generator=gen)[:50].to(index)
    slots[7], slots[20], slots[30] = -1, 4 * 61, 2**31 - 1
    x = cases.noise(gen, 50, d)
    padding = raw_padding(cache)
    assert kv.write_k_cache(x, cache, slots) is cache
    after = reference.unpack(cache, d).flatten(0, 1)
    want, want_rows = before.clone(), reference.unpack(reference.pack(x[None]), d)[0]
    kept = (slots >= 0) & (slots < 4 * 61)
    want[slots[kept].long()] = want_rows[kept]
    assert torch.equal(after, want)
    assert torch.equal(raw_padding(cache), padding)
    read = kv.read_k_cache(cache, slots)
    assert torch.equal(read[kept], want_rows[kept]) and (read[~kept] == 0).all()


def raw_padding(cache):
    """What lies behind the scales of a MODEL1 page."""
    size = cache.stride(0)
    flat = cache.view(torch.uint8).as_strided((len(cache), size), (size, 1))
    return flat[:, cache.shape[1] * cache.shape[3] :].clone()


@pytest.mark.parametrize("d", WIDTHS)
def test_what_is_written_is_what_decode_reads(device, d):
    import flash_mla

    gen = generator(d)
    x = cases.noise(gen, 100, d) / 2
    cache = kv.empty_k_cache(3, 64, d)
    slots = torch.randperm(192, generator=gen)[:100]
    kv.write_k_cache(x, cache, slots)
    q = cases.noise(gen, 1, 1, 4, d) / 2
    call = [cases.moved(t, device) for t in (q, cache)]
    where = slots.int().view(1, 1, -1).to(device)
    out, _ = cases.not_on_cuda(
        device,
        lambda: flash_mla.flash_mla_with_kvcache(
            *call, None, None, 512, flash_mla.FlashMLASchedMeta(), is_fp8_kvcache=True, indices=where
        ),
    )
    want, _, _ = reference.attend(
        q[0], kv.read_k_cache(cache, slots), kv.read_k_cache(cache, slots)[:, :512], d**-0.5
    )
    reference.assert_close(out[0], want, reference.SPARSE_OUT, "out")


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda c: kv.empty_k_cache(2, 64, 500), ValueError, "d: expected 576 or 512, got 500"),
        (lambda c: kv.empty_k_cache(-1, 64, 576), ValueError, "num_pages: expected 0 or more, got -1"),
        (lambda c: kv.empty_k_cache(2, 1.5, 576), TypeError, "page: expected an int, got float"),
        (lambda c: kv.quantize_k_cache(torch.zeros(2, 64, 2, 576)), RuntimeError, "one KV head"),
        (lambda c: kv.quantize_k_cache(torch.zeros(2, 576)), RuntimeError, "k_cache: expected 4"),
        (lambda c: kv.quantize_k_cache([1]), TypeError, "k_cache"),
        (lambda c: kv.write_k_cache(torch.zeros(3, 512), c, torch.zeros(3).int()), RuntimeError, "cache"),
        (lambda c: kv.write_k_cache(torch.zeros(3, 576), c, torch.zeros(2).int()), RuntimeError, "slots"),
        (lambda c: kv.write_k_cache(torch.zeros(3, 576), c, torch.zeros(3)), TypeError, "slots"),
        (lambda c: kv.write_k_cache(torch.zeros(3, 576).double(), c, torch.zeros(3).int()), TypeError, "kv"),
        (lambda c: kv.read_k_cache(c[..., :600], torch.zeros(2).int()), RuntimeError, "cache"),
        (lambda c: kv.read_k_cache(torch.zeros(2, 64, 1, 656), None), RuntimeError, "cache"),
        (lambda c: kv.dequantize_k_cache(c[0]), RuntimeError, "cache: expected 4"),
        (lambda c: kv.empty_k_cache(2, 64, [576]), TypeError, "d: expected an int, got list"),
        (lambda c: kv.empty_k_cache(2**62, 64, 576), ValueError, "num_pages, page: expected below 2"),
        (lambda c: kv.quantize_k_cache(torch.zeros(2, 64, 1, 500)), ValueError, "^k_cache: expected rows"),
        (
            lambda c: kv.quantize_k_cache(torch.zeros(2, 64, 1, 576).int()),
            TypeError,
            "^k_cache: expected d",
        ),
        (lambda c: kv.read_k_cache(None), TypeError, "^cache: expected a tensor, got NoneType"),
        (lambda c: kv.read_k_cache(c, 3), TypeError, "^slots: expected a tensor, got int"),
        (
            lambda c: kv.read_k_cache(c, torch.zeros(2, device="meta")),
            ValueError,
            "slots: expected on c",
        ),
    ],
)
def test_rejections(call, error, words):
    with pytest.raises(error, match=words):
        call(kv.empty_k_cache(2, 64, 576))


@pytest.mark.parametrize("d", [576, 512])
def test_a_cache_without_pages(d):
    assert kv.dequantize_k_cache(kv.empty_k_cache(0, 64, d)).shape == (0, 64, 1, d)
    assert kv.quantize_k_cache(torch.zeros(0, 64, 1, d)).shape == kv.empty_k_cache(0, 64, d).shape
