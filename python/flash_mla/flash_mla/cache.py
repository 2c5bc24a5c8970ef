# SPDX-License-Identifier: MIT
"""Writers and readers of the FP8 latent caches that sparse decode reads.

V32: rows of 576 values, 656 bytes a token.  MODEL1: rows of 512 values, 584 bytes a token, all rows of a
page before all its scales.  A cache is float8_e4m3fn (pages, page, 1, 656 or 584), the pages of MODEL1
padded to a multiple of 576 bytes.  A slot is page number * page + offset in the page.
"""

import torch
from libattn import ArgumentError, ShapeError, mla

from . import _eager
from ._schedule import at_least, whole

BYTES = {576: 656, 512: 584}


def empty_k_cache(num_pages, page, d, device=None):
    """A zeroed FP8 cache for rows of d values, 576 (V32) or 512 (MODEL1)."""
    d = whole("d", d)
    if d not in BYTES:
        raise ArgumentError(f"d: expected 576 or 512, got {d}")
    num_pages, page = at_least(0, "num_pages", num_pages), at_least(0, "page", page)
    row = BYTES[d]
    stride = page * row if d == 576 else -(-page * row // 576) * 576
    if num_pages * stride >= 2**63:
        raise ArgumentError(
            f"num_pages, page: expected below 2^63 bytes, got {num_pages} pages of {page} tokens"
        )
    memory = torch.zeros(num_pages * stride, dtype=torch.uint8, device=device)
    return memory.as_strided((num_pages, page, 1, row), (stride, row, row, 1)).view(torch.float8_e4m3fn)


def quantize_k_cache(k_cache):
    """k_cache (pages, page, 1, d) or (pages, page, d) bf16, fp16 or fp32 -> a new FP8 cache."""
    if isinstance(k_cache, torch.Tensor) and k_cache.dim() == 3:
        k_cache = k_cache.unsqueeze(2)
    _eager.check_rank("k_cache", k_cache, 4)
    pages, page, one, d = k_cache.shape
    if one != 1:
        raise ShapeError(f"k_cache: expected one KV head, got {one}")
    if d not in BYTES:
        raise ShapeError(f"k_cache: expected rows of 576 or 512 values, got {d}")
    cache = empty_k_cache(pages, page, d, k_cache.device)
    try:
        return write_k_cache(k_cache.reshape(pages * page, d), cache)
    except (RuntimeError, TypeError) as error:
        raise _eager.renamed(error, {"kv": "k_cache"}) from None


def dequantize_k_cache(cache):
    """An FP8 cache -> (pages, page, 1, d) bf16, the values that sparse decode computes with."""
    _eager.check_rank("cache", cache, 4)
    pages, page = cache.shape[:2]
    rows = read_k_cache(cache)
    return rows.view(pages, page, 1, rows.shape[-1])


def write_k_cache(kv, cache, slots=None):
    """Writes row i of kv (t, d) as token slots[i] of an FP8 cache; returns the cache.

    slots int32 or int64 (t,), of which those outside the cache are skipped; None: row i is slot i, for
    all of the cache.
    """
    mla.mla_cache_quantize(_eager.plain(kv), cache, slots)
    _eager.written(cache)
    return cache


def read_k_cache(cache, slots=None):
    """Rows (t, d) bf16 of an FP8 cache: token slots[i], zeros outside the cache; None: all of it."""
    _eager.check_rank("cache", cache, 4)
    if slots is not None:
        _eager.check_rank("slots", slots, 1, cache.device, "cache")
    return mla.mla_cache_dequantize(cache, slots)
