# SPDX-License-Identifier: MIT
"""A tensor that has no memory to compute on (meta, sparse, inside a torch.func transform) is named."""

import flash_attn_interface as fa
import flash_kda
import flash_mla
import mla_cases
import pytest
import torch
from flash_mla import cache as fp8

WITHOUT = {
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.float().to_sparse() if x.is_floating_point() else x.to_sparse(),
}


def int32(*x):
    return torch.tensor(x, dtype=torch.int32)


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


CALLS = combine, dense_decode, sparse_prefill, write_cache, kda_fwd, kda_step
PLACES = [(call, name) for call in CALLS for name, x in call()[1].items() if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("kind", WITHOUT)
@pytest.mark.parametrize(("call", "name"), PLACES, ids=lambda x: getattr(x, "__name__", x))
def test_it_is_named(call, name, kind):
    function, arguments = call()
    function(**arguments)
    x = arguments[name]
    if x.dtype == torch.float8_e4m3fn and kind == "sparse":
        pytest.skip("torch has no such tensor")
    function, arguments = call()
    with pytest.raises((RuntimeError, NotImplementedError), match=rf"\b{name}: expected"):
        function(**arguments | {name: WITHOUT[kind](x)})


def test_it_is_named_inside_vmap():
    function, arguments = sparse_prefill()
    q = arguments.pop("q")
    with pytest.raises(
        RuntimeError, match="q: expected a tensor with memory of its own, got one inside a torch"
    ):
        torch.vmap(lambda x: function(q=x, **arguments))(q[None])
