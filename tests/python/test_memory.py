# SPDX-License-Identifier: MIT
"""A tensor that has no memory to compute on (meta, sparse, inside a torch.func transform) is named."""

import flash_attn_interface as fa
import flash_kda
import flash_mla
import mla_cases
import pytest
import torch
from flash_mla import cache as fp8


def int32(*x):
    return torch.tensor(x, dtype=torch.int32)


def attention():
    q, k = torch.ones(2, 5, 4, 64), torch.ones(2, 9, 2, 64)
    return fa.flash_attn_func, {"q": q, "k": k, "v": k.clone(), "sinks": torch.ones(4)}


def packed():
    q, k = torch.ones(12, 4, 64), torch.ones(12, 2, 64)
    lengths = {"cu_seqlens_q": int32(0, 5, 12), "cu_seqlens_k": int32(0, 5, 12), "seqused_k": int32(5, 6)}
    return fa.flash_attn_varlen_func, {
        "q": q, "k": k, "v": k.clone(), "out": q.clone(), "max_seqlen_q": 7, "max_seqlen_k": 7
    } | lengths  # fmt: skip


def cache():
    tensors = {"q": torch.ones(2, 1, 4, 64), "k_cache": torch.ones(8, 4, 2, 64)}
    tensors |= {"v_cache": torch.ones(8, 4, 2, 64), "cache_seqlens": int32(3, 9)}
    return fa.flash_attn_with_kvcache, tensors | {"page_table": torch.arange(8).int().view(2, 4)}


def append():
    function, arguments = cache()
    del arguments["page_table"]
    new = {"k": torch.ones(2, 1, 2, 64), "v": torch.ones(2, 1, 2, 64), "cache_leftpad": int32(0, 1)}
    caches = {"k_cache": torch.ones(2, 16, 2, 64), "v_cache": torch.ones(2, 16, 2, 64)}
    tables = {"rotary_cos": torch.ones(16, 16), "rotary_sin": torch.ones(16, 16)}
    return function, arguments | caches | new | tables


def combine():
    return fa.flash_attn_combine, {
        "out_partial": torch.ones(3, 2, 5, 4, 32),
        "lse_partial": torch.ones(3, 2, 5, 4),
        "out": torch.ones(2, 5, 4, 32),
    }


def dense_decode():
    q, k_cache, table, lens = mla_cases.dense(mla_cases.generator(1), [100, 30], 2, 4)
    meta = flash_mla.FlashMLASchedMeta()
    tensors = {"q": q, "k_cache": k_cache, "block_table": table, "cache_seqlens": lens}
    return flash_mla.flash_mla_with_kvcache, tensors | {"head_dim_v": 512, "tile_scheduler_metadata": meta}


def sparse_prefill():
    return flash_mla.flash_mla_sparse_fwd, {
        "q": torch.ones(3, 4, 576).bfloat16(),
        "kv": torch.ones(9, 1, 576).bfloat16(),
        "indices": torch.zeros(3, 1, 64, dtype=torch.int32),
        "attn_sink": torch.ones(4),
        "topk_length": int32(1, 2, 3),
        "sm_scale": 0.1,
    }


def write_cache():
    cache = fp8.empty_k_cache(2, 64, 576)
    return fp8.write_k_cache, {"kv": torch.ones(2, 576), "cache": cache, "slots": int32(3, 4)}


def rows(*shape):
    return torch.ones(shape).bfloat16()


def kda_fwd():
    call = {name: rows(1, 20, 2, 128) for name in ("q", "k", "v", "g", "out")}
    states = {name: torch.zeros(2, 2, 128, 128) for name in ("initial_state", "final_state")}
    gates = {"beta": rows(1, 20, 2), "A_log": torch.zeros(2), "dt_bias": torch.zeros(2, 128)}
    return flash_kda.fwd, call | states | gates | {
        "cu_seqlens": int32(0, 7, 20), "scale": 0.1, "lower_bound": -5.0
    }  # fmt: skip


def kda_step():
    call = {name: rows(2, 1, 2, 128) for name in ("q", "k", "v", "g", "out")}
    gates = {"beta": rows(2, 1, 2), "A_log": torch.zeros(2), "dt_bias": torch.zeros(2, 128)}
    state = {"state": torch.zeros(5, 2, 128, 128), "state_indices": int32(3, 1)}
    return flash_kda.step, call | gates | state | {"scale": 0.1, "lower_bound": -5.0}


TRACED = attention, packed, cache, append  # of a q on meta they give shapes; torch itself refuses sparse ones
CALLS = combine, dense_decode, sparse_prefill, write_cache, kda_fwd, kda_step


def tensors(calls, besides=None):
    return [
        (call, name)
        for call in calls
        for name, x in call()[1].items()
        if isinstance(x, torch.Tensor) and name != besides
    ]


def name_of(x):
    return getattr(x, "__name__", x)


def check(call, name, change):
    function, arguments = call()
    function(**arguments)
    function, arguments = call()
    with pytest.raises(RuntimeError, match=rf"\b{name}: expected"):
        function(**arguments | {name: change(arguments[name])})


@pytest.mark.parametrize(("call", "name"), tensors(CALLS) + tensors(TRACED, "q"), ids=name_of)
def test_a_tensor_on_meta(call, name):
    check(call, name, lambda x: x.to("meta"))


@pytest.mark.parametrize(("call", "name"), tensors(CALLS), ids=name_of)
def test_a_sparse_tensor(call, name):
    if name == "cache":
        pytest.skip("torch has no sparse fp8")
    check(call, name, lambda x: x.float().to_sparse() if x.is_floating_point() else x.to_sparse())


def test_a_tensor_inside_vmap():
    function, arguments = sparse_prefill()
    q = arguments.pop("q")
    with pytest.raises(
        RuntimeError, match="q: expected a tensor with memory of its own, got one inside a torch"
    ):
        torch.vmap(lambda x: function(q=x, **arguments))(q[None])
