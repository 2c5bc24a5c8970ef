# SPDX-License-Identifier: MIT
"""Thousands of hostile calls of flash_mla: an exception each time, no crash, no byte written.

Each call is a legal one with one to three arguments spoiled as in test_hostile.py, or with live page
numbers and lengths out of range.  The calls run in a subprocess, so that a crash is a failed test with
the last call named, not the end of the session.
"""

import random
import sys

import pytest
from cases import ROUNDS, SEED
from test_hostile import in_a_subprocess

CALLS = int(3000 * max(1.0, ROUNDS))
PARTS = 2


@pytest.mark.parametrize("part", range(PARTS))
def test_thousands_of_calls(part):
    in_a_subprocess(__file__, SEED * PARTS + part, CALLS // PARTS)


# ---- the subprocess ----------------------------------------------------------------------------------


def legal(torch):
    """{form: (function, tensors by name, what else)}; every call works as it stands."""
    import flash_mla
    from flash_mla import cache

    i32, f8 = torch.int32, torch.float8_e4m3fn
    ones = torch.ones
    table = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:9].view(3, 3).to(i32)
    lens = torch.tensor([150, 64, 5], dtype=i32)
    where = torch.arange(3 * 2 * 8, dtype=i32).view(3, 2, 8)
    pair = flash_mla.get_mla_metadata(lens, 8, 1)
    dense = {
        "q": ones(3, 2, 4, 576).bfloat16(),
        "k_cache": ones(20, 64, 1, 576).bfloat16(),
        "block_table": table,
        "cache_seqlens": lens,
        "tile_scheduler_metadata": pair[0],
        "num_splits": pair[1],
        "out": ones(3, 2, 4, 512).bfloat16(),
    }
    fp8 = {name: x.to(f8) if name in ("q", "k_cache") else x for name, x in dense.items()}
    fp8 |= {"descale_q": ones(1), "descale_k": ones(1)}
    sparse = {
        "q": ones(3, 2, 4, 512).bfloat16(),
        "k_cache": cache.empty_k_cache(4, 64, 512),
        "indices": where,
        "tile_scheduler_metadata": pair[0],
        "num_splits": pair[1],
        "attn_sink": ones(4),
        "topk_length": torch.tensor([8, 0, 3], dtype=i32),
        "extra_k_cache": cache.empty_k_cache(30, 2, 512),
        "extra_indices_in_kvcache": where.clone(),
        "extra_topk_length": torch.tensor([0, 8, 3], dtype=i32),
        "out": ones(3, 2, 4, 512).bfloat16(),
    }
    prefill = {
        "q": ones(5, 4, 576).bfloat16(),
        "kv": ones(40, 1, 576).bfloat16(),
        "indices": torch.arange(40, dtype=i32).view(5, 1, 8),
        "attn_sink": ones(4),
        "topk_length": torch.tensor([8, 0, 3, 1, 2], dtype=i32),
        "out": ones(5, 4, 512).bfloat16(),
    }
    cu = torch.tensor([0, 3, 5], dtype=i32)
    mha = {
        "q": ones(5, 4, 192).bfloat16(),
        "k": ones(5, 2, 192).bfloat16(),
        "v": ones(5, 2, 128).bfloat16(),
        "cu_seqlens_qo": cu,
        "cu_seqlens_kv": cu.clone(),
    }
    quantize = {
        "kv": ones(5, 576).bfloat16(),
        "cache": cache.empty_k_cache(3, 64, 576),
        "slots": torch.arange(5),
    }
    decode = {"head_dim_v": 512, "softmax_scale": 0.1}
    none = {"block_table": None, "cache_seqlens": None, "is_fp8_kvcache": True}
    return {
        "dense": (flash_mla.flash_mla_with_kvcache, dense, decode | {"causal": True}),
        "fp8": (flash_mla.flash_mla_with_kvcache, fp8, decode | {"causal": True}),
        "sparse": (flash_mla.flash_mla_with_kvcache, sparse, decode | none),
        "prefill": (flash_mla.flash_mla_sparse_fwd, prefill, {"sm_scale": 0.1, "d_v": 512}),
        "mha": (
            flash_mla.flash_attn_varlen_func,
            mha,
            {"max_seqlen_qo": 3, "max_seqlen_kv": 3, "softmax_scale": 0.1},
        ),
        "quantize": (cache.write_k_cache, quantize, {}),
    }


LENGTHS = ("cache_seqlens", "cu_seqlens_qo", "cu_seqlens_kv")
HUGE = [2**31 - 1, 2**31, 2**32 + 8, 2**40, 2**62]


def spoil(torch, rng, name, x):
    """A tensor (or not) that no legal call has in place of x; None where this way does not apply."""
    way = rng.randrange(10)
    if way == 0:
        return None if name in ("indices", "extra_indices_in_kvcache") else x[None]
    if way == 1:
        return x.flatten() if x.dim() > 1 else x[None, None]
    if way == 2:
        kind = rng.choice([torch.float64, torch.bool, torch.complex64, torch.float8_e5m2, torch.int16])
        return x.to(kind)
    if way == 3:  # an extent without memory: stride 0
        d, n = rng.randrange(x.dim()), rng.choice(HUGE)
        if n > 2**62 // max(1, x.numel()):
            n = 2**31
        pages = name in ("k_cache", "extra_k_cache", "cache", "kv") and d == 0
        if pages or (name == "block_table" and d == 1) or (name == "tile_scheduler_metadata" and d == 0):
            return None  # more pages or more columns may be legal
        return x.narrow(d, 0, 1).expand(*[n if i == d else s for i, s in enumerate(x.shape)])
    if way == 4:  # one row more or fewer, where that cannot be legal
        d = {"block_table": 0, "indices": 0, "extra_indices_in_kvcache": 0, "slots": 0}.get(name, x.dim() - 1)
        if name in ("kv", "cache") and d == 0:
            return None
        return torch.cat([x, x.narrow(d, 0, 1)], d) if rng.random() < 0.5 else x.narrow(d, 0, x.shape[d] - 1)
    if way == 5:
        return x.to("meta")
    if way == 6:
        return rng.choice(["tensor", 2.5, [1, 2], object(), {"a": x}])
    if way == 7:
        return torch.empty(0, dtype=x.dtype)
    if way == 8:
        return x.to_sparse() if x.dtype in (torch.float32, torch.int32) else None
    if name in LENGTHS or name == "block_table":
        bad = x.clone()
        bad.view(-1)[rng.choice([0, 1, 2])] = rng.choice([-1, -(2**31), 2**31 - 1, 10**6])
        return bad
    return None


def main(seed, calls):
    import warnings

    import torch

    warnings.simplefilter("ignore")
    rng, made = random.Random(seed), legal(torch)
    for function, tensors, rest in made.values():
        function(**{name: x.clone() for name, x in tensors.items()}, **rest)  # legal it is
    raised, accepted, done = {}, [], 0
    while done < calls:
        form = rng.choice(list(made))
        function, tensors, rest = made[form]
        args, changed = {**tensors, **rest}, []
        for name in rng.sample(list(tensors), min(len(tensors), rng.choice([1, 1, 1, 2, 3]))):
            if any(isinstance(x, torch.Tensor) and x.numel() > 2**30 for x in args.values()):
                break  # two huge tensors that agree would be a legal call of years
            bad = spoil(torch, rng, name, tensors[name])
            if bad is not None:
                args[name], _ = bad, changed.append(name)
        if rest and rng.random() < 0.15:
            name = rng.choice(["head_dim_v", "softmax_scale", "sm_scale", "d_v", "max_seqlen_qo"])
            if name in rest:
                args[name] = rng.choice(["x", [1], object(), 2**70, float("nan"), {}])
                changed.append(name)
        if not changed:
            continue
        done += 1
        label = f"{done} {form} " + ", ".join(f"{n}={describe(torch, args[n])}" for n in changed)
        print(label, file=sys.stderr, flush=True)
        kept = {name: bytes_of(torch, x) for name, x in tensors.items()}
        try:
            function(**args)
        except Exception as error:  # noqa: BLE001
            raised[type(error).__name__] = raised.get(type(error).__name__, 0) + 1
            assert str(error).strip(), f"{label}: {type(error).__name__} without a message"
            assert "INTERNAL ASSERT" not in str(error), f"{label}: {error}"
            for name, x in tensors.items():
                assert torch.equal(kept[name], bytes_of(torch, x)), f"{label}: {name} was written"
        else:
            accepted.append(label)
    print(f"{calls} calls, seed {seed}: {raised}, accepted {len(accepted)}")
    assert not accepted, "\n".join(accepted[:20])


def bytes_of(torch, x):
    return x.contiguous().view(torch.uint8).clone()


def describe(torch, x):
    if isinstance(x, torch.Tensor):
        return f"{tuple(x.shape)} {x.dtype} {x.device} {x.layout}"
    return repr(x)[:40]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
