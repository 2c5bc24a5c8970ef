# SPDX-License-Identifier: MIT
"""Scheduler metadata: upstream's object, upstream's tensors, and the split that fills them.

The tensors have upstream's shapes and dtype and keep their address.  On a CPU they hold upstream's split
for as many processors as there are threads; on a GPU, whose lengths the host does not read, zeros.
libattn plans each call by itself and reads neither: a schedule that is stale, empty or in the column
order of another release gives the same results.
"""

import operator
from dataclasses import dataclass

import torch
from libattn import ArgumentError, DeviceError, DtypeError, ShapeError

BLOCK = 64  # tokens
FIXED = 5  # what one piece costs beside its blocks, in blocks
COLUMNS = 8


@dataclass
class FlashMLASchedMeta:
    """What decode calls of one step share: made by get_mla_metadata(), filled by the first of them.

    config: what the first call was like; later calls must be like it, or AssertionError.
    tile_scheduler_metadata: int32 (parts, 8).  num_splits: int32 (b + 1,).
    """

    @dataclass
    class Config:
        b: int
        s_q: int
        h_q: int
        page_block_size: int
        h_k: int
        causal: bool
        is_fp8_kvcache: bool
        topk: int | None
        extra_page_block_size: int | None
        extra_topk: int | None

    have_initialized: bool = False
    config: Config | None = None
    tile_scheduler_metadata: torch.Tensor | None = None
    num_splits: torch.Tensor | None = None
    made = None, None  # the two as this package filled them in; no field


def split(lengths, parts, fixed=FIXED):
    """Shares the blocks of all requests among `parts`: (rows, num_splits, budget).

    lengths: tokens of each request.  A row is (begin request, end request inclusive, begin block, end
    block exclusive, index of the first piece, whether the begin and the end request are cut, 0).
    num_splits[i] counts the pieces of the requests before i.
    """
    b = len(lengths)
    blocks = [max(n - 1, 0) // BLOCK + 1 for n in lengths]
    budget = -(-(sum(blocks) + fixed * b) // parts) + fixed
    rows, num_splits = [], [0]
    request = block = piece = 0
    for _ in range(parts):
        begin = request, block, piece
        left = budget
        while request < b:
            rest = blocks[request] - block + fixed
            if left >= rest:
                num_splits.append(num_splits[-1] + piece + 1)
                left -= rest
                request, block, piece = request + 1, 0, 0
            else:
                if left > fixed:
                    block, piece = block + left - fixed, piece + 1
                break
        if block:
            end = request, block
        else:
            end = request - 1, blocks[request - 1] if lengths[request - 1] else 0
        rows.append((begin, end))
    pieces = [after - before for before, after in zip(num_splits, num_splits[1:])]
    table = []
    for (r0, x0, piece), (r1, x1) in rows:
        cut = (int(pieces[r0] > 1), int(pieces[r1] > 1)) if r0 < b else (0, 0)
        table.append((r0, r1, x0, x1, piece, *cut, 0))
    return table, num_splits, budget


def in_tokens(table, lengths):
    """The rows in the first releases' columns: tokens, the end request after the begin token."""
    return [
        (r0, BLOCK * x0, r1, min(BLOCK * x1, lengths[r1]), piece, 0, 0, 0)
        for r0, r1, x0, x1, piece, *_ in table
    ]


def processors(device):
    """What the parts are shared among."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return torch.get_num_threads()


def dense_parts(device, rows, h_k):
    """Parts for `rows` = s_q h_q / h_k query rows of each KV head."""
    return max(1, processors(device) // h_k // max(1, -(-rows // 64)))


def sparse_parts(device, s_q, h_q):
    return max(1, processors(device) // max(1, s_q) // max(1, h_q // 64))


def tensors(lengths, b, parts, device, tokens=False):
    """(tile_scheduler_metadata, num_splits) for b requests; lengths is None where the host knows none."""
    if lengths is None or b == 0:
        table = torch.zeros(parts, COLUMNS, dtype=torch.int32, device=device)
        return table, torch.zeros(b + 1, dtype=torch.int32, device=device)
    table, num_splits, _ = split(lengths, parts)
    if tokens:
        table = in_tokens(table, lengths)
    return torch.tensor(table, dtype=torch.int32), torch.tensor(num_splits, dtype=torch.int32)


def dense_lengths(cache_seqlens):
    """Tokens of each request; None on a GPU, which the host does not wait for."""
    return [max(n, 0) for n in cache_seqlens.tolist()] if cache_seqlens.is_cpu else None


def sparse_lengths(b, topk, topk_length, extra_topk, extra_topk_length):
    """Tokens of each request of a sparse call on a CPU: its keys, rounded up where others follow."""
    lengths = [topk] * b if topk_length is None else topk_length.tolist()
    lengths = [min(max(n, 1), topk) for n in lengths]
    if extra_topk is None:
        return lengths
    extra = [extra_topk] * b if extra_topk_length is None else extra_topk_length.tolist()
    return [-(-n // BLOCK) * BLOCK + min(max(more, 0), extra_topk) for n, more in zip(lengths, extra)]


def first_release(args, kwargs):
    """(cache_seqlens, rows, heads) when these are exactly the first releases' three arguments, else
    None.  They came under two names each."""
    names = ("cache_seqlens",), ("num_heads_per_head_k", "num_q_tokens_per_head_k"), ("num_heads_k",)
    if len(args) + len(kwargs) != 3:
        return None
    values, given = list(args), dict(kwargs)
    for aliases in names[len(args) :]:
        name = next((alias for alias in aliases if alias in given), None)
        if name is None:
            return None
        values.append(given.pop(name))
    if not isinstance(values[0], torch.Tensor):
        return None
    try:
        return values[0], operator.index(values[1]), operator.index(values[2])
    except TypeError:
        return None


def whole(name, n):
    """n as an int: an int, or an integer tensor of one element."""
    if type(n) is int:
        return n  # Dynamo's, too, of which operator.index would make a constant
    try:
        return operator.index(n)
    except TypeError:
        raise DtypeError(f"{name}: expected an int, got {type(n).__name__}") from None


def at_least(least, name, n):
    """n as an int of `least` or more."""
    n = whole(name, n)
    if n < least:
        raise ArgumentError(f"{name}: expected {least} or more, got {n}")
    return n


def check_lengths(cache_seqlens):
    """A scheduler's lengths: int32 (b,) contiguous."""
    if not isinstance(cache_seqlens, torch.Tensor):
        raise DtypeError(f"cache_seqlens: expected a tensor, got {type(cache_seqlens).__name__}")
    if cache_seqlens.dtype != torch.int32:
        raise DtypeError(f"cache_seqlens: expected dtype torch.int32, got {cache_seqlens.dtype}")
    if cache_seqlens.dim() != 1 or not cache_seqlens.is_contiguous():
        raise ShapeError(
            f"cache_seqlens: expected a contiguous (b,), got {tuple(cache_seqlens.shape)} "
            f"with strides {cache_seqlens.stride()}"
        )


def check_tensors(tile_scheduler_metadata, num_splits, b, device):
    """Given scheduler tensors: int32, (parts, 8) and (b + 1,), contiguous, on the call's device."""
    table, counts = tile_scheduler_metadata, num_splits
    if (
        type(table) is type(counts) is torch.Tensor
        and table.dtype is counts.dtype is torch.int32
        and table.dim() == 2
        and table.shape[1] == COLUMNS
        and counts.shape == (b + 1,)
        and table.is_contiguous()
        and counts.is_contiguous()
        and table.device == counts.device == device
    ):
        return
    for name, x, wish, rank, extent in (
        ("tile_scheduler_metadata", tile_scheduler_metadata, "(parts, 8)", 2, COLUMNS),
        ("num_splits", num_splits, f"({b + 1},)", 1, b + 1),
    ):
        if not isinstance(x, torch.Tensor):
            raise DtypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.dtype is not torch.int32:
            raise DtypeError(f"{name}: expected dtype torch.int32, got {x.dtype}")
        if x.dim() != rank or x.shape[-1] != extent or not x.is_contiguous():
            raise ShapeError(
                f"{name}: expected a contiguous {wish}, got {tuple(x.shape)} with strides {x.stride()}"
            )
        if x.device != device:
            raise DeviceError(f"{name}: expected on q's device {device}, got {x.device}")
