# SPDX-License-Identifier: MIT
"""flash_mla on MUSA goes to mate.flashmla, argument by argument: against a stand-in module and stand-in
tensors, as there is no such hardware here."""

import sys
import types

import flash_mla
import pytest
import torch

# mate.flashmla of MATE 0.2.2: the parameters of its three functions.
METADATA = [
    "cache_seqlens",
    "num_q_tokens_per_head_k",
    "num_heads_k",
    "num_heads_q",
    "is_fp8_kvcache",
    "topk",
    "extra_topk",
    "q",
    "bs",
    "topk_length",
    "extra_topk_length",
]
DECODE = [
    "q",
    "k_cache",
    "block_table",
    "cache_seqlens",
    "head_dim_v",
    "tile_scheduler_metadata",
    "num_splits",
    "softmax_scale",
    "causal",
    "is_fp8_kvcache",
    "indices",
    "attn_sink",
    "extra_k_cache",
    "extra_indices_in_kvcache",
    "topk_length",
    "extra_topk_length",
]
PREFILL = ["q", "kv", "indices", "sm_scale", "d_v", "attn_sink", "topk_length"]


class Tensor:
    """What the package may ask of a tensor before it hands it over."""

    def __init__(self, name, *shape):
        self.name, self.shape = name, shape
        self.device = types.SimpleNamespace(type="musa")

    def copy_(self, other):
        self.copied = other
        return self

    def __repr__(self):
        return self.name


@pytest.fixture
def mate(monkeypatch):
    """Calls that reached the stand-in: (function, keywords)."""
    calls = []
    module = types.ModuleType("mate.flashmla")

    def stand_in(name, parameters, result):
        def function(**keywords):
            assert keywords.keys() <= set(parameters), keywords.keys() - set(parameters)
            calls.append((name, keywords))
            return result(keywords)

        setattr(module, name, function)

    stand_in("get_mla_metadata", METADATA, lambda k: ("table", "splits"))
    dense, sparse = torch.arange(24.0).view(2, 3, 4), torch.arange(24.0).view(2, 4, 3)
    stand_in("flash_mla_with_kvcache", DECODE, lambda k: ("out", sparse if k["indices"] else dense))
    stand_in("flash_mla_sparse_fwd", PREFILL, lambda k: ("out", "max", "lse"))
    monkeypatch.setitem(sys.modules, "mate", types.ModuleType("mate"))
    monkeypatch.setitem(sys.modules, "mate.flashmla", module)
    return calls


def dense_call(**change):
    arguments = {
        "q": Tensor("q", 2, 3, 4, 576),
        "k_cache": Tensor("k_cache", 9, 64, 1, 576),
        "block_table": Tensor("block_table", 2, 5),
        "cache_seqlens": Tensor("cache_seqlens", 2),
        "head_dim_v": 512,
    }
    return arguments | change


def test_dense_decode_fills_the_object_and_turns_the_lse(mate):
    a, meta = dense_call(softmax_scale=0.3, causal=True), flash_mla.FlashMLASchedMeta()
    out, lse = flash_mla.flash_mla_with_kvcache(**a, tile_scheduler_metadata=meta)
    (made, metadata), (name, got) = mate
    assert made == "get_mla_metadata" and name == "flash_mla_with_kvcache"
    assert metadata["cache_seqlens"] is a["cache_seqlens"] and metadata["q"] is a["q"]
    assert metadata["num_q_tokens_per_head_k"] == 12 and metadata["num_heads_k"] == 1
    assert metadata["num_heads_q"] == 4 and metadata["topk"] is None and metadata["extra_topk"] is None
    assert (got.pop("tile_scheduler_metadata"), got.pop("num_splits")) == ("table", "splits")
    assert got.pop("is_fp8_kvcache") is False and got.pop("indices") is None
    assert got == a
    assert (meta.tile_scheduler_metadata, meta.num_splits) == ("table", "splits") and meta.have_initialized
    assert out == "out" and lse.shape == (2, 4, 3)
    assert torch.equal(lse, torch.arange(24.0).view(2, 3, 4).transpose(1, 2))
    flash_mla.flash_mla_with_kvcache(**a, tile_scheduler_metadata=meta)
    assert [name for name, _ in mate].count("get_mla_metadata") == 1


def test_presets_and_pairs_are_used_as_they_are(mate):
    table, splits = torch.zeros(1, 8).int(), torch.zeros(3).int()
    meta = flash_mla.FlashMLASchedMeta(tile_scheduler_metadata=table, num_splits=splits)
    flash_mla.flash_mla_with_kvcache(**dense_call(), tile_scheduler_metadata=meta)
    flash_mla.flash_mla_with_kvcache(**dense_call(), tile_scheduler_metadata=table, num_splits=splits)
    for name, got in mate:
        assert name == "flash_mla_with_kvcache" and got["tile_scheduler_metadata"] is table
        assert got["num_splits"] is splits and got["softmax_scale"] == 576**-0.5


def test_sparse_decode(mate):
    a = {
        "q": Tensor("q", 2, 3, 4, 512),
        "k_cache": Tensor("k_cache", 9, 64, 1, 584),
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": 512,
        "is_fp8_kvcache": True,
        "indices": Tensor("indices", 2, 3, 128),
        "attn_sink": Tensor("attn_sink", 4),
        "extra_k_cache": Tensor("extra_k_cache", 5, 2, 1, 584),
        "extra_indices_in_kvcache": Tensor("extra", 2, 3, 64),
        "topk_length": Tensor("topk_length", 2),
        "extra_topk_length": Tensor("extra_topk_length", 2),
    }
    given = Tensor("given")
    meta = flash_mla.FlashMLASchedMeta()
    out, lse = flash_mla.flash_mla_with_kvcache(**a, tile_scheduler_metadata=meta, out=given)
    (_, metadata), (_, got) = mate
    assert metadata["topk"] == 128 and metadata["extra_topk"] == 64 and metadata["is_fp8_kvcache"] is True
    assert metadata["topk_length"] is a["topk_length"]
    assert metadata["extra_topk_length"] is a["extra_topk_length"]
    assert all(got[name] is value for name, value in a.items())
    assert out is given and given.copied == "out"
    assert torch.equal(lse, torch.arange(24.0).view(2, 4, 3))


def test_sparse_arguments_that_are_not_given_are_not_sent(mate):
    a = {
        "q": Tensor("q", 2, 3, 4, 576),
        "k_cache": Tensor("k_cache", 9, 64, 1, 656),
        "indices": Tensor("i", 2, 3, 64),
    }
    meta = flash_mla.FlashMLASchedMeta()
    flash_mla.flash_mla_with_kvcache(
        **a,
        block_table=None,
        cache_seqlens=None,
        head_dim_v=512,
        tile_scheduler_metadata=meta,
        is_fp8_kvcache=True,
    )
    assert mate[1][1].keys() == set(DECODE[:11])


def test_prefill(mate):
    given = {name: Tensor(name) for name in PREFILL}
    assert flash_mla.flash_mla_sparse_fwd(**given) == ("out", "max", "lse")
    ((_, got),) = mate
    assert got == given
    out = Tensor("out")
    assert flash_mla.flash_mla_sparse_fwd(**given, out=out)[0] is out and out.copied == "out"


def test_metadata(mate):
    lens = torch.ones(2).int()

    class OnMusa(torch.Tensor):
        device = types.SimpleNamespace(type="musa")

    lens = lens.as_subclass(OnMusa)
    assert flash_mla.get_mla_metadata(lens, 16, 1) == ("table", "splits")
    ((_, got),) = mate
    assert got["cache_seqlens"] is lens and got["num_q_tokens_per_head_k"] == 16 and got["num_heads_k"] == 1


def test_the_object_is_checked_as_on_other_devices(mate):
    meta = flash_mla.FlashMLASchedMeta()
    flash_mla.flash_mla_with_kvcache(**dense_call(), tile_scheduler_metadata=meta)
    with pytest.raises(AssertionError, match="first used with causal"):
        flash_mla.flash_mla_with_kvcache(**dense_call(causal=True), tile_scheduler_metadata=meta)


CALLS = [
    lambda: flash_mla.flash_mla_with_kvcache(
        **dense_call(), tile_scheduler_metadata=flash_mla.FlashMLASchedMeta()
    ),
    lambda: flash_mla.flash_mla_sparse_fwd(*[Tensor("x")] * 4),
]


@pytest.mark.parametrize("call", CALLS)
def test_without_mate(monkeypatch, call):
    monkeypatch.setitem(sys.modules, "mate", None)
    monkeypatch.setitem(sys.modules, "mate.flashmla", None)
    with pytest.raises(ImportError, match="on MUSA are computed by MATE.*github.com/MooreThreads/mate"):
        call()


@pytest.mark.parametrize("call", CALLS)
def test_with_an_older_mate(monkeypatch, call):
    monkeypatch.setitem(sys.modules, "mate", types.ModuleType("mate"))
    monkeypatch.setitem(sys.modules, "mate.flashmla", types.ModuleType("mate.flashmla"))
    with pytest.raises(ImportError, match="0.2.2"):
        call()


def test_what_mate_does_not_have(mate):
    q = Tensor("q", 2, 3, 4, 576)
    meta = flash_mla.FlashMLASchedMeta()
    with pytest.raises(NotImplementedError, match="MATE"):
        flash_mla.flash_mla_with_kvcache(
            **dense_call(), tile_scheduler_metadata=meta, descale_q=q, descale_k=q
        )
    with pytest.raises(NotImplementedError, match="MATE"):
        flash_mla.flash_attn_varlen_func(q, q, q, q, q, 1, 1)


def test_cpu_tensors_never_ask_for_mate(mate):
    q, k = torch.zeros(1, 1, 4, 576).bfloat16(), torch.zeros(1, 64, 1, 576).bfloat16()
    zero = torch.zeros(1).int()
    flash_mla.flash_mla_with_kvcache(q, k, zero[None], zero, 512, flash_mla.FlashMLASchedMeta())
    assert not mate
