# SPDX-License-Identifier: MIT
"""Random arguments of flash_mla's functions: NaN in every cache slot that no call may read, wild numbers
in every index that none may follow, and one place that knows what a GPU does not compute yet."""

import mla_reference as reference
import pytest
import torch
from cases import ROUNDS, SEED
from libattn import DtypeError, ShapeError

WILD = torch.tensor([2147480000, -1, -(2**31), 2**31 - 1, 10**6], dtype=torch.int64)
FP8 = torch.float8_e4m3fn
SCALE_V3 = 192**-0.5


def generator(*numbers):
    """Draws the same for the same seed and numbers."""
    gen = torch.Generator()
    seed = SEED
    for n in numbers:
        seed = (seed * 1000003 + int(n)) % 2**40
    return gen.manual_seed(seed)


def rounds(n):
    return range(max(1, int(n * ROUNDS)))


def noise(gen, *shape, dtype=torch.bfloat16, gain=1.0):
    return (torch.randn(*shape, generator=gen) * gain).to(dtype)


def queries(gen, *shape, dtype=torch.bfloat16):
    """With keys() a spread of scores of about one under a model's scale."""
    return noise(gen, *shape, dtype=torch.float32, gain=4.0).to(dtype)


def keys(gen, *shape, dtype=torch.bfloat16):
    """Rows of a cache, in upstream's size: it goes with its absolute tolerances."""
    return noise(gen, *shape, dtype=torch.float32, gain=0.1).to(dtype)


def pick(gen, options):
    return options[int(torch.randint(len(options), (), generator=gen))]


def wild(gen, *shape):
    return WILD[torch.randint(len(WILD), shape, generator=gen)].int()


def dense(gen, lengths, s_q=1, h_q=16, h_k=1, page=64, d=576, dtype=torch.bfloat16, room=1):
    """q, k_cache, block_table, cache_seqlens for sequences of these lengths, `room` spare table columns."""
    b, lens = len(lengths), torch.tensor(lengths, dtype=torch.int32)
    pages = [-(-n // page) for n in lengths]
    pool = sum(pages) + 3
    order = torch.randperm(pool, generator=gen).int()
    table = wild(gen, b, max(pages) + room)
    raw = torch.full((pool, page, h_k, d), float("nan"))
    at = 0
    for i, (n, count) in enumerate(zip(lengths, pages)):
        table[i, :count] = order[at : at + count]
        at += count
        t = torch.arange(n)
        raw[table[i].long()[t // page], t % page] = keys(gen, n, h_k, d, dtype=torch.float32)
    q = queries(gen, b, s_q, h_q, d, dtype=torch.float32)
    return q.to(dtype), raw.to(dtype), table, lens


def indices(gen, *shape, limit, share_wild=0.1, wild_values=WILD):
    """Indices into `limit` rows, some of them naming none."""
    x = torch.randint(0, max(limit, 1), shape, generator=gen)
    bad = torch.rand(shape, generator=gen) < (share_wild if limit else 2.0)
    at = torch.randint(len(wild_values), shape, generator=gen)
    return torch.where(bad, wild_values[at], x).int()


def used(where, length):
    """The entries of indices [b, s, n] that count."""
    if length is None:
        return where
    counts = torch.arange(where.shape[-1]) < length.long().view(-1, *[1] * (where.dim() - 1))
    return where[counts.expand(where.shape)]


def fp8_cache(gen, pages, page, d, *index_tensors, **options):
    """An FP8 cache of random rows, NaN codes and scales where no index points."""
    rows = keys(gen, pages, page, d, dtype=torch.float32)
    cache = reference.pack(rows, **options)
    flat = torch.zeros(pages * page, dtype=torch.bool)
    for x in index_tensors:
        x = x.flatten().long()
        flat[x[(x >= 0) & (x < pages * page)]] = True
    dead = ~flat.view(pages, page)
    if d == 576:
        cache.view(torch.uint8)[dead] = 0x7F
    else:
        raw = cache.view(torch.uint8).as_strided((pages, 584 * page), (cache.stride(0), 1))
        raw[:, : 576 * page].unflatten(1, (page, 576))[dead] = 0x7F
        raw[:, 576 * page :].unflatten(1, (page, 8))[dead] = 0xFF
    return cache


def moved(x, device):
    """x on a device with the strides it has."""
    if x is None or device == "cpu":
        return x
    span = sum((n - 1) * s for n, s in zip(x.shape, x.stride())) + 1
    flat = x.view(torch.uint8).as_strided((span * x.element_size(),), (1,)) if x.element_size() == 1 else None
    if flat is None:
        return x.to(device)
    return flat.to(device).view(x.dtype).as_strided(x.shape, x.stride())


def not_on_cuda(device, call):
    """call(), or the end of the test after seeing that a GPU refuses what it has no kernel for."""
    if device == "cpu":
        return call()
    with pytest.raises(NotImplementedError):
        call()
    pytest.skip("a GPU has no kernel for this yet, and says so")


def maybe_on_cuda(device, call):
    """call(); on a GPU without a kernel for it, its NotImplementedError ends the test."""
    if device == "cpu":
        return call()
    try:
        return call()
    except (NotImplementedError, ShapeError, DtypeError) as error:
        if not isinstance(error, NotImplementedError) and "on a GPU" not in str(error):
            raise
        pytest.skip(f"not on a GPU: {error}")
