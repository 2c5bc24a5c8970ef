# SPDX-License-Identifier: MIT
"""flash_mla's surface and its scheduler metadata: signatures as data, the object's life, upstream's
tensors, and that no result depends on what is in them."""

import dataclasses
import importlib
import importlib.metadata
import inspect
import random

import flash_mla
import libattn
import mla_cases as cases
import mla_reference as reference
import pytest
import torch
from flash_mla import _schedule, flash_mla_interface
from flash_mla import cache as fp8_cache

Meta = flash_mla.FlashMLASchedMeta

DECODE = (
    "q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits=None, "
    "softmax_scale=None, causal=False, is_fp8_kvcache=False, indices=None, attn_sink=None, "
    "extra_k_cache=None, extra_indices_in_kvcache=None, topk_length=None, extra_topk_length=None"
)
SIGNATURES = {
    "get_mla_metadata": "*args, **kwargs",
    "flash_mla_with_kvcache": f"{DECODE}, out=None, *, descale_q=None, descale_k=None",
    "flash_mla_sparse_fwd": "q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None, out=None",
    "flash_attn_varlen_func": (
        "q, k, v, cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, max_seqlen_kv, dropout_p=0.0, "
        "softmax_scale=None, causal=False, deterministic=False, is_varlen=True"
    ),
    "flash_attn_varlen_qkvpacked_func": (
        "qkv, cu_seqlens, max_seqlen, head_dim_qk, dropout_p=0.0, softmax_scale=None, causal=False, "
        "deterministic=False, is_varlen=True"
    ),
    "flash_attn_varlen_kvpacked_func": (
        "q, kv, cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, max_seqlen_kv, head_dim_qk, dropout_p=0.0, "
        "softmax_scale=None, causal=False, deterministic=False, is_varlen=True"
    ),
    "flash_mla_with_kvcache_fp8": (
        "q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits, "
        "softmax_scale=None, causal=False, descale_q=None, descale_k=None"
    ),
    "get_mla_metadata_dense_fp8": "cache_seqlens, num_q_tokens_per_head_k, num_heads_k",
}
CONFIG = ["b", "s_q", "h_q", "page_block_size", "h_k", "causal", "is_fp8_kvcache", "topk"]
CONFIG += ["extra_page_block_size", "extra_topk"]


# ---- names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    function = getattr(flash_mla, name)
    assert inspect.isfunction(function) and str(inspect.signature(function)) == f"({SIGNATURES[name]})"
    assert getattr(flash_mla_interface, name) is function
    assert len(function.__doc__) > 40


def test_the_object_is_in_both_places():
    assert flash_mla_interface.FlashMLASchedMeta is Meta


@pytest.mark.parametrize("module", ["flash_mla", "flash_mla.flash_mla_interface"])
def test_star_import(module):
    names = {}
    exec(f"from {module} import *", names)
    assert {*SIGNATURES, "FlashMLASchedMeta"} <= names.keys()


def test_distribution():
    owners = importlib.metadata.packages_distributions()["flash_mla"]
    assert {name.replace("_", "-") for name in owners} == {"flash-mla"}
    assert flash_mla.__version__ == importlib.metadata.version("flash_mla") == "1.0.0"


def test_another_libattn_is_refused(monkeypatch):
    from flash_mla import _eager

    monkeypatch.setattr(libattn, "__version__", "9.9")
    with pytest.raises(ImportError, match="flash_mla needs libattn 0.1.0, found 9.9"):
        importlib.reload(_eager)


def test_the_object():
    assert dataclasses.is_dataclass(Meta) and dataclasses.is_dataclass(Meta.Config)
    assert [f.name for f in dataclasses.fields(Meta.Config)] == CONFIG
    assert dataclasses.asdict(Meta()) == {
        "have_initialized": False,
        "config": None,
        "tile_scheduler_metadata": None,
        "num_splits": None,
    }


# ---- get_mla_metadata --------------------------------------------------------------------------------


LENS = torch.tensor([100, 0, 4096], dtype=torch.int32)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((LENS, 16, 1), {}),
        ((LENS, 16), {"num_heads_k": 1}),
        ((LENS,), {"num_q_tokens_per_head_k": 16, "num_heads_k": 1}),
        ((LENS,), {"num_heads_per_head_k": 16, "num_heads_k": 1}),
        ((), {"cache_seqlens": LENS, "num_heads_k": 1, "num_q_tokens_per_head_k": 16}),
        ((LENS, torch.tensor(16), 1), {}),
    ],
)
def test_the_first_releases_three_arguments(args, kwargs):
    table, num_splits = flash_mla.get_mla_metadata(*args, **kwargs)
    assert table.dtype == num_splits.dtype == torch.int32
    assert table.dim() == 2 and table.shape[1] == 8 and num_splits.shape == (4,)
    assert table.is_contiguous() and num_splits.is_contiguous()


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((LENS, 16, 1, 128), {}),
        ((LENS, 16, 1), {"is_fp8_kvcache": False}),
        ((LENS, 16, 1), {"num_heads_q": 128, "topk": 128, "is_fp8_kvcache": True}),
        ((LENS, 16), {}),
        ((None, 16, 1), {}),
        ((), {"topk": 2048}),
        ((LENS, 16, "1"), {}),
        ((), {"any": 1, "other": object(), "thing": None}),
    ],
)
def test_every_other_call_gives_an_empty_object(args, kwargs):
    meta, second = flash_mla.get_mla_metadata(*args, **kwargs)
    assert second is None and meta == Meta()


@pytest.mark.parametrize(
    ("lens", "error", "words"),
    [
        (LENS.long(), TypeError, "cache_seqlens: expected dtype torch.int32"),
        (LENS[None], ValueError, "cache_seqlens: expected a contiguous"),
        (LENS.repeat(2)[::2], ValueError, "cache_seqlens: expected a contiguous"),
    ],
)
@pytest.mark.parametrize("name", ["get_mla_metadata", "get_mla_metadata_dense_fp8"])
def test_lengths_are_checked(name, lens, error, words):
    with pytest.raises(error, match=words) as caught:
        getattr(flash_mla, name)(lens, 16, 1)
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        ((LENS, 16, 0), ValueError, "num_heads_k: expected 1 or more, got 0"),
        ((LENS, -1, 1), RuntimeError, "num_q_tokens_per_head_k: expected 1 or more, got -1"),
        ((LENS, "16", 1), TypeError, "num_q_tokens_per_head_k: expected an int, got str"),
        (([100], 16, 1), TypeError, "cache_seqlens: expected a tensor, got list"),
    ],
)
def test_arguments_of_the_tensors_are_checked(args, error, words):
    with pytest.raises(error, match=words):
        flash_mla.get_mla_metadata_dense_fp8(*args)


def test_the_first_releases_tensors_count_tokens():
    table, num_splits = flash_mla.get_mla_metadata_dense_fp8(LENS, 16, 1)
    rows, splits, _ = _schedule.split(LENS.tolist(), len(table))
    assert num_splits.tolist() == splits
    for got, (r0, r1, x0, x1, piece, *_) in zip(table.tolist(), rows):
        assert got[:3] == [r0, 64 * x0, r1] and got[4] == piece
        assert got[3] == min(64 * x1, int(LENS[r1])) and got[5:] == [0, 0, 0]


@pytest.mark.parametrize(
    ("lengths", "parts", "budget", "rows", "splits"),
    [
        (
            [4096, 100, 0],
            4,
            26,
            [
                (0, 0, 0, 21, 0, 1, 1),
                (0, 0, 21, 42, 1, 1, 1),
                (0, 0, 42, 63, 2, 1, 1),
                (0, 2, 63, 0, 3, 1, 0),
            ],
            [0, 4, 5, 6],
        ),
        ([256], 3, 8, [(0, 0, 0, 3, 0, 1, 1), (0, 0, 3, 4, 1, 1, 1), (1, 0, 0, 4, 0, 0, 0)], [0, 2]),
        ([1000, 1000], 2, 26, [(0, 0, 0, 16, 0, 0, 0), (1, 1, 0, 16, 0, 0, 0)], [0, 1, 2]),
    ],
)
def test_split_vectors(lengths, parts, budget, rows, splits):
    table, num_splits, got = _schedule.split(lengths, parts)
    assert got == budget and num_splits == splits
    assert table == [(*row, 0) for row in rows]


def test_split_invariants():
    """Every request is finished, its pieces are contiguous and cover it, few slots suffice."""
    rng = random.Random(cases.SEED)
    for _ in range(300):
        lengths = [rng.choice([0, 1, 63, 64, 65, rng.randrange(9000)]) for _ in range(rng.randrange(1, 20))]
        parts = rng.randrange(1, 140)
        table, num_splits, _ = _schedule.split(lengths, parts)
        b = len(lengths)
        assert len(table) == parts and len(num_splits) == b + 1 and num_splits[b] <= b + parts - 1
        blocks = [max(n - 1, 0) // 64 + 1 for n in lengths]
        covered = {i: [] for i in range(b)}
        for r0, r1, x0, x1, piece, *_ in table:
            for r in range(r0, r1 + 1):
                first = x0 if r == r0 else 0
                last = (x1 or blocks[r]) if r == r1 else blocks[r]
                assert piece == len(covered[r]) or r != r0
                covered[r].append((first, last))
        for r, pieces in covered.items():
            assert len(pieces) == num_splits[r + 1] - num_splits[r]
            assert pieces[0][0] == 0 and pieces[-1][1] == blocks[r]
            assert all(a[1] == b[0] for a, b in zip(pieces, pieces[1:]))


# ---- the object's life -------------------------------------------------------------------------------


def dense_call(gen_number=0, lengths=(100, 30), s_q=2, h_q=16, **options):
    arguments = cases.dense(cases.generator(gen_number), list(lengths), s_q, h_q, **options)
    return arguments, reference.dense_decode(*arguments, 512, 576**-0.5, True)


def run(arguments, meta, num_splits=None, **options):
    options = {"causal": True} | options
    return flash_mla.flash_mla_with_kvcache(*arguments, 512, meta, num_splits, **options)


def on(device, arguments):
    return tuple(x.to(device) for x in arguments)


def agrees(result, want):
    reference.assert_close(result[0], want[0], reference.DENSE_OUT, "out")
    reference.assert_close(result[1], want[1], reference.DECODE_LSE, "lse")


def test_the_first_call_fills_the_object_and_later_ones_keep_it():
    arguments, want = dense_call()
    meta = Meta()
    agrees(run(arguments, meta), want)
    assert meta.have_initialized
    assert dataclasses.astuple(meta.config) == (2, 2, 16, 64, 1, True, False, None, None, None)
    table, num_splits = meta.tile_scheduler_metadata, meta.num_splits
    assert table.dtype == num_splits.dtype == torch.int32 and table.is_contiguous()
    assert table.shape[1] == 8 and num_splits.shape == (3,) and int(num_splits[0]) == 0
    agrees(run(arguments, meta), want)
    assert meta.tile_scheduler_metadata is table and meta.num_splits is num_splits


def test_a_sparse_call_fills_the_object():
    meta = Meta()
    sparse_run(meta)
    assert dataclasses.astuple(meta.config) == (2, 3, 4, 61, 1, False, True, 70, 2, 64)
    assert meta.tile_scheduler_metadata.shape[1] == 8 and meta.num_splits.shape == (3,)
    table = meta.tile_scheduler_metadata
    sparse_run(meta)
    assert meta.tile_scheduler_metadata is table


def sparse_run(meta, num_splits=None, **change):
    gen = cases.generator(1)
    arguments = {
        "q": cases.queries(gen, 2, 3, 4, 576),
        "k_cache": fp8_cache.quantize_k_cache(cases.keys(gen, 3, 61, 576)),
        "indices": cases.indices(gen, 2, 3, 70, limit=183),
        "extra_k_cache": fp8_cache.quantize_k_cache(cases.keys(gen, 30, 2, 576)),
        "extra_indices_in_kvcache": cases.indices(gen, 2, 3, 64, limit=60),
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": 512,
        "is_fp8_kvcache": True,
    }
    return flash_mla.flash_mla_with_kvcache(
        **{**arguments, **change}, tile_scheduler_metadata=meta, num_splits=num_splits
    )


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"lengths": (100, 30, 3)}, "b"),
        ({"s_q": 1}, "s_q"),
        ({"h_q": 8}, "h_q"),
        ({"page": 32}, "page_block_size"),
        ({"h_k": 2}, "h_k"),
    ],
)
def test_a_call_of_another_shape_is_refused(change, field):
    meta = Meta()
    run(dense_call()[0], meta)
    with pytest.raises(AssertionError, match=rf"first used with {field} "):
        run(dense_call(**change)[0], meta)


@pytest.mark.parametrize("s_q", [1, 2])
@pytest.mark.parametrize(
    ("change", "field"), [({"causal": False}, "causal"), ({"is_fp8_kvcache": True}, "is_fp8_kvcache")]
)
def test_a_call_with_other_flags_is_refused(change, field, s_q):
    """Also `causal` as passed, where one query makes it mean nothing."""
    meta = Meta()
    arguments, _ = dense_call(s_q=s_q)
    run(arguments, meta)
    with pytest.raises(AssertionError, match=rf"first used with {field} "):
        run(arguments, meta, **change)


@pytest.mark.parametrize("field", ["topk", "extra_page_block_size", "extra_topk"])
def test_a_sparse_call_of_another_kind_is_refused(field):
    meta, gen = Meta(), cases.generator(2)
    sparse_run(meta)
    change = {
        "topk": {"indices": cases.indices(gen, 2, 3, 71, limit=183)},
        "extra_page_block_size": {
            "extra_k_cache": fp8_cache.quantize_k_cache(cases.keys(gen, 20, 3, 576)),
        },
        "extra_topk": {"extra_indices_in_kvcache": cases.indices(gen, 2, 3, 65, limit=60)},
    }[field]
    with pytest.raises(AssertionError, match=rf"first used with {field} "):
        sparse_run(meta, **change)


def test_a_sparse_call_on_a_dense_object_is_refused():
    meta = Meta()
    run(dense_call(lengths=(9, 9), s_q=3, h_q=4, page=61)[0], meta, causal=False)
    with pytest.raises(AssertionError, match="first used with"):
        sparse_run(meta)


def test_what_is_not_compared():
    """d, the number of pages, and the values of lengths."""
    meta = Meta()
    run(dense_call()[0], meta)
    arguments, want = dense_call(3, lengths=(700, 90))
    agrees(run(arguments, meta), want)
    arguments, _ = dense_call(4, d=512)
    agrees(run(arguments, meta), reference.dense_decode(*arguments, 512, 512**-0.5, True))


def test_a_failing_first_call_leaves_the_configuration():
    """As upstream, which records it before it checks the tensors; a proper call of that kind goes on."""
    arguments, want = dense_call()
    meta = Meta()
    with pytest.raises(RuntimeError):
        run((arguments[0], arguments[1].float(), *arguments[2:]), meta)
    assert meta.have_initialized and meta.config is not None and meta.num_splits is None
    agrees(run(arguments, meta), want)
    assert meta.num_splits is not None


# ---- what the tensors hold means nothing ---------------------------------------------------------------


def stale(parts=3, fill=None, b=2):
    table = torch.full((parts, 8), 2**31 - 1 if fill is None else fill, dtype=torch.int32)
    return table, torch.full((b + 1,), -5 if fill is None else fill, dtype=torch.int32)


@pytest.mark.parametrize("parts", [1, 3, 200])
@pytest.mark.parametrize("fill", [None, 0])
@pytest.mark.parametrize("preset", [False, True])
def test_any_content_gives_the_same_result(parts, fill, preset, device):
    arguments, want = dense_call()
    arguments, (table, num_splits) = on(device, arguments), on(device, stale(parts, fill))
    if preset:
        meta = Meta(tile_scheduler_metadata=table, num_splits=num_splits)
        agrees(run(arguments, meta), want)
        assert meta.tile_scheduler_metadata is table and meta.have_initialized
    else:
        agrees(run(arguments, table, num_splits), want)
    assert torch.equal(table.cpu(), stale(parts, fill)[0])


def test_any_content_gives_the_same_sparse_result():
    want = sparse_run(Meta())
    got = sparse_run(*stale())
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_a_sequence_that_outgrew_its_schedule_loses_no_key(device):
    short, _ = dense_call(lengths=(3, 1))
    meta = Meta()
    run(on(device, short), meta)
    arguments, want = dense_call(5, lengths=(5000, 64))
    agrees(run(on(device, arguments), meta), want)


def test_the_first_releases_way(device):
    arguments, want = dense_call()
    arguments = on(device, arguments)
    table, num_splits = flash_mla.get_mla_metadata(arguments[3], 2 * 16 // 1, 1)
    agrees(run(arguments, table, num_splits), want)


def test_the_older_column_order():
    arguments, want = dense_call()
    table, num_splits = flash_mla.get_mla_metadata(arguments[3], 32, 1)
    table[:, [1, 2]] = table[:, [2, 1]].clone()
    agrees(run(arguments, table, num_splits), want)


@pytest.mark.parametrize(
    ("table", "num_splits"),
    [
        (None, None),
        (stale()[0], None),
        (None, stale()[1]),
        (Meta(), stale()[1]),
        (Meta(), 4),
        (stale()[0], 4),
        ([0] * 8, stale()[1]),
        ("meta", None),
    ],
)
def test_mixtures_are_refused(table, num_splits):
    with pytest.raises(AssertionError, match=r"tile_scheduler_metadata|num_splits"):
        run(dense_call()[0], table, num_splits)


@pytest.mark.parametrize("preset", [False, True])
@pytest.mark.parametrize(
    ("table", "num_splits", "words"),
    [
        (stale()[0].long(), stale()[1], "tile_scheduler_metadata: expected dtype torch.int32"),
        (stale()[0][:, :7], stale()[1], r"tile_scheduler_metadata: expected a contiguous \(parts, 8\)"),
        (stale()[0][0], stale()[1], "tile_scheduler_metadata: expected"),
        (stale()[0].repeat(2, 1)[::2], stale()[1], "tile_scheduler_metadata: expected a contiguous"),
        (stale()[0], stale()[1].long(), "num_splits: expected dtype torch.int32"),
        (stale()[0], stale(b=3)[1], r"num_splits: expected a contiguous \(3,\), got \(4,\)"),
        (stale()[0], stale()[1].repeat(2)[::2], "num_splits: expected a contiguous"),
    ],
)
def test_tensors_of_other_shapes_are_refused(table, num_splits, words, preset):
    if preset:
        table, num_splits = Meta(tile_scheduler_metadata=table, num_splits=num_splits), None
    with pytest.raises(RuntimeError, match=words):
        run(dense_call()[0], table, num_splits)


def test_half_a_preset_is_refused():
    with pytest.raises(RuntimeError, match="num_splits: expected a tensor"):
        run(dense_call()[0], Meta(tile_scheduler_metadata=stale()[0]))


def test_repeats_are_bitwise_equal(device):
    arguments = on(device, dense_call(6, lengths=(2000, 64), h_q=8)[0])
    results = [run(arguments, Meta()) for _ in range(3)]
    assert all(torch.equal(x, y) for r in results[1:] for x, y in zip(r, results[0]))
