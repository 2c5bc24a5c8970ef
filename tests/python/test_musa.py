# SPDX-License-Identifier: MIT
"""Tensors on MUSA go to MATE, argument by argument: against a stand-in module and stand-in tensors,
as there is no such hardware here."""

import sys
import types

import flash_attn_interface as fa
import pytest
import torch

# mate.mha_interface of MATE 0.2.2: the parameters of its three functions.
VARLEN = [
    "q",
    "k",
    "v",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "max_seqlen_q",
    "max_seqlen_k",
    "seqused_q",
    "seqused_k",
    "page_table",
    "softmax_scale",
    "causal",
    "qv",
    "q_descale",
    "k_descale",
    "v_descale",
    "window_size",
    "learnable_sink",
    "attention_chunk",
    "softcap",
    "scheduler_metadata",
    "num_splits",
    "pack_gqa",
    "deterministic",
    "sm_margin",
    "return_softmax_lse",
    "backend",
    "cp_world_size",
    "cp_rank",
    "cp_tot_seqused_k",
    "out",
]
KVCACHE = [
    "q",
    "k_cache",
    "v_cache",
    "k",
    "v",
    "qv",
    "rotary_cos",
    "rotary_sin",
    "cache_seqlens",
    "cache_batch_idx",
    "cache_leftpad",
    "page_table",
    "cu_seqlens_q",
    "cu_seqlens_k_new",
    "max_seqlen_q",
    "rotary_seqlens",
    "q_descale",
    "k_descale",
    "v_descale",
    "softmax_scale",
    "causal",
    "window_size",
    "learnable_sink",
    "attention_chunk",
    "softcap",
    "rotary_interleaved",
    "scheduler_metadata",
    "num_splits",
    "pack_gqa",
    "sm_margin",
    "return_softmax_lse",
    "cp_world_size",
    "cp_rank",
    "cp_tot_seqused_k",
]
METADATA = [
    "batch_size",
    "max_seqlen_q",
    "max_seqlen_k",
    "num_heads_q",
    "num_heads_kv",
    "headdim",
    "seqused_q",
    "seqused_k",
    "qkv_dtype",
    "headdim_v",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "cu_seqlens_k_new",
    "cache_leftpad",
    "page_size",
    "max_seqlen_k_new",
    "causal",
    "window_size",
    "attention_chunk",
    "has_softcap",
    "num_splits",
    "pack_gqa",
    "mp_margin",
]


class Tensor:
    """What the wrapper may ask of a tensor before it hands it over."""

    def __init__(self, name):
        self.name = name
        self.device = types.SimpleNamespace(type="musa")
        self.requires_grad = False

    def is_contiguous(self):
        return True

    def stride(self, dim):
        return 1

    def dim(self):
        return 5

    @property
    def shape(self):
        return (2, 7, 3, 4, 64)

    def unbind(self, dim):
        return Tensor("q"), Tensor("k"), Tensor("v")

    def __repr__(self):
        return self.name


@pytest.fixture
def mate(monkeypatch):
    """Calls that reached the stand-in: (function, keywords)."""
    calls = []
    module = types.ModuleType("mate.mha_interface")

    def stand_in(name, parameters):
        def function(**keywords):
            assert keywords.keys() <= set(parameters), keywords.keys() - set(parameters)
            calls.append((name, keywords))
            return f"result of {name}"

        setattr(module, name, function)

    stand_in("flash_attn_varlen_func", VARLEN)
    stand_in("flash_attn_with_kvcache", KVCACHE)
    stand_in("get_scheduler_metadata", METADATA)
    monkeypatch.setitem(sys.modules, "mate", types.ModuleType("mate"))
    monkeypatch.setitem(sys.modules, "mate.mha_interface", module)
    return calls


def arguments(names):
    """A different stand-in for each argument, so that none can be mistaken for another."""
    return {name: Tensor(name) for name in names}


SHARED = [
    "softmax_scale",
    "causal",
    "qv",
    "q_descale",
    "k_descale",
    "v_descale",
    "window_size",
    "attention_chunk",
    "softcap",
    "num_splits",
    "pack_gqa",
    "sm_margin",
    "cp_world_size",
    "cp_rank",
    "cp_tot_seqused_k",
]


def test_dense(mate):
    given = arguments(["q", "k", "v", *SHARED, "deterministic", "sinks"])
    assert fa.flash_attn_func(**given, return_attn_probs=True) == "result of flash_attn_varlen_func"
    ((name, got),) = mate
    assert got.pop("learnable_sink") is given.pop("sinks")
    assert got.pop("return_softmax_lse") is True
    for absent in VARLEN[3:10] + ["scheduler_metadata", "out"]:
        assert got.pop(absent) is None
    assert got == given


def test_packed(mate):
    names = [
        "q",
        "k",
        "v",
        "cu_seqlens_q",
        "cu_seqlens_k",
        "max_seqlen_q",
        "max_seqlen_k",
        "seqused_q",
        "seqused_k",
    ]
    given = arguments([*names, *SHARED, "deterministic", "block_table", "scheduler_metadata", "out", "s_aux"])
    assert fa.flash_attn_varlen_func(**given) == "result of flash_attn_varlen_func"
    ((name, got),) = mate
    assert got.pop("learnable_sink") is given.pop("s_aux")
    assert got.pop("page_table") is given.pop("block_table")
    assert got.pop("return_softmax_lse") is False
    assert got == given


def test_qkvpacked(mate):
    assert fa.flash_attn_qkvpacked_func(Tensor("qkv"), causal=True) == "result of flash_attn_varlen_func"
    ((name, got),) = mate
    assert [got[x].name for x in "qkv"] == ["q", "k", "v"] and got["causal"] is True


def test_kvcache(mate):
    mate_names = {"learnable_sink": "sinks"}
    names = [mate_names.get(name, name) for name in KVCACHE if name != "return_softmax_lse"]
    given = arguments(names)
    result = fa.flash_attn_with_kvcache(**given, return_softmax_lse=True)
    assert result == "result of flash_attn_with_kvcache"
    ((name, got),) = mate
    assert got.pop("learnable_sink") is given.pop("sinks")
    assert got.pop("return_softmax_lse") is True
    assert got == given


def test_metadata(mate):
    ours = {"seqused_k": "cache_seqlens", "mp_margin": "sm_margin"}
    absent = ("seqused_q", "cu_seqlens_k")
    given = arguments([ours.get(name, name) for name in METADATA if name not in absent])
    assert fa.get_scheduler_metadata(**given) == "result of get_scheduler_metadata"
    ((name, got),) = mate
    assert got.pop("seqused_k") is given.pop("cache_seqlens")
    assert got.pop("mp_margin") is given.pop("sm_margin")
    assert all(got.pop(name) is None for name in absent)
    assert got == given


def test_defaults(mate):
    q = Tensor("q")
    fa.flash_attn_func(q, q, q)
    fa.flash_attn_with_kvcache(q, q, q)
    (_, dense), (_, cache) = mate
    assert dense["num_splits"] == 1 and dense["window_size"] == (-1, -1) and dense["softmax_scale"] is None
    assert cache["num_splits"] == 0 and cache["rotary_interleaved"] is True
    assert dense["learnable_sink"] is None and "backend" not in dense


CALLS = [
    lambda q: fa.flash_attn_func(q, q, q),
    lambda q: fa.flash_attn_varlen_func(q, q, q, None, None, 1, 1),
    lambda q: fa.flash_attn_with_kvcache(q, q, q),
    lambda q: fa.get_scheduler_metadata(1, 1, 1, 1, 1, 64, q),
]


@pytest.mark.parametrize("call", CALLS)
def test_without_mate(monkeypatch, call):
    monkeypatch.setitem(sys.modules, "mate", None)
    monkeypatch.setitem(sys.modules, "mate.mha_interface", None)
    with pytest.raises(
        ImportError, match="tensors on MUSA are computed by MATE.*github.com/MooreThreads/mate"
    ):
        call(Tensor("q"))


@pytest.mark.parametrize("call", CALLS)
def test_with_an_older_mate(monkeypatch, call):
    monkeypatch.setitem(sys.modules, "mate", types.ModuleType("mate"))
    monkeypatch.setitem(sys.modules, "mate.mha_interface", types.ModuleType("mate.mha_interface"))
    with pytest.raises(ImportError, match="0.2.2"):
        call(Tensor("q"))


def test_what_mate_does_not_have(mate):
    q = Tensor("q")
    with pytest.raises(NotImplementedError, match="MATE"):
        fa._flash_attn_forward(q, q, q)
    with pytest.raises(NotImplementedError, match="MATE"):
        fa.flash_attn_combine(q, q)


def test_cpu_tensors_never_ask_for_mate(mate):
    q = torch.randn(1, 3, 2, 16).bfloat16()
    fa.flash_attn_func(q, q, q)
    assert not mate
