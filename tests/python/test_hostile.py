# SPDX-License-Identifier: MIT
"""Ten thousand hostile calls from Python: an exception each time, no crash, no byte written.

Each call is a legal one with one to three arguments made hostile: wrong ranks, dtypes, strides and
devices, extents near 2^31 and 2^63 by as_strided and expand (no memory behind them), meta tensors,
objects that are no tensors, live index entries out of range.  The calls run in a subprocess, so that
a crash is a failed test with the last call named, not the end of the session.
"""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from cases import ROUNDS, SEED

CALLS = int(10_000 * max(1.0, ROUNDS))
PARTS = 4


def in_a_subprocess(file, seed, calls):
    """Runs a file of hostile calls, main(seed, calls); a crash there is a failure here."""
    run = subprocess.run(
        [sys.executable, file, str(seed), str(calls)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=Path(file).parent,
    )
    assert run.returncode == 0, f"exit {run.returncode}\n{run.stdout[-3000:]}\n{run.stderr[-3000:]}"
    print(run.stdout)


@pytest.mark.parametrize("part", range(PARTS))
def test_ten_thousand_calls(part):
    in_a_subprocess(__file__, SEED * PARTS + part, CALLS // PARTS)


# ---- the subprocess -----------------------------------------------------------------------------


def legal(torch, form):
    """Tensors of one legal call, by name; every one 3 of batch, so that extents can be told apart."""
    i32 = torch.int32
    t = {
        "q": torch.ones(3, 5, 4, 32),
        "k": torch.ones(3, 24, 2, 32),
        "v": torch.ones(3, 24, 2, 32),
    }
    scalars = {"softmax_scale": 0.1, "causal": True, "window_size": (7, 0), "softcap": 0.0, "num_splits": 1}
    if form == "varlen":
        t = {name: x.flatten(0, 1) for name, x in t.items()}
        t["cu_seqlens_q"] = torch.tensor([0, 5, 10, 15], dtype=i32)
        t["cu_seqlens_k"] = torch.tensor([0, 24, 48, 72], dtype=i32)
        t["seqused_q"] = torch.tensor([5, 2, 0], dtype=i32)
        t["seqused_k"] = torch.tensor([24, 7, 0], dtype=i32)
        scalars |= {"max_seqlen_q": 5, "max_seqlen_k": 24}
    if form in ("cache", "paged"):
        t = {"q": t["q"], "k_cache": t["k"], "v_cache": t["v"]}
        t["cache_seqlens"] = torch.tensor([3, 20, 0], dtype=i32)
        t["cache_batch_idx"] = torch.tensor([2, 0, 1], dtype=i32)
        t["cache_leftpad"] = torch.tensor([1, 0, 0], dtype=i32)
        t["k"], t["v"] = torch.ones(3, 2, 2, 32), torch.ones(3, 2, 2, 32)
        t["rotary_cos"], t["rotary_sin"] = torch.ones(48, 16), torch.ones(48, 16)
        t["rotary_seqlens"] = torch.tensor([0, 1, 2], dtype=i32)
    if form == "paged":
        t["k_cache"], t["v_cache"] = torch.ones(20, 8, 2, 32), torch.ones(20, 8, 2, 32)
        t["page_table"] = (
            torch.randperm(20, generator=torch.Generator().manual_seed(0))[:9].view(3, 3).to(i32)
        )
    if form == "op":
        t["out"] = torch.ones(3, 5, 4, 32)
        scalars = {"softmax_scale": 0.1, "is_causal": True, "num_splits": 1}
    t["sinks"] = torch.ones(4)
    if form == "op":
        del t["sinks"]
    if form == "combine":
        t = {"out_partial": torch.ones(3, 2, 5, 4, 32), "lse_partial": torch.ones(3, 2, 4, 5).transpose(2, 3)}
        t["out"] = torch.ones(2, 5, 4, 32)
        scalars = {}
    return t, scalars


HUGE = [2**31 - 1, 2**31, 2**32 + 8, 2**40, 2**62]
INDEX = (
    "cu_seqlens",
    "seqused",
    "cache_seqlens",
    "cache_batch",
    "cache_left",
    "page_table",
    "rotary_seqlens",
)


def spoil_tensor(torch, rng, name, x):
    """A tensor (or not) that no legal call has in place of x; None where this way does not apply."""
    way = rng.randrange(12)
    if way == 0:
        return x[None]
    if way == 1:
        return x.flatten() if x.dim() > 1 else x[None, None]
    if way == 2:
        kinds = [
            torch.float64,
            torch.int8,
            torch.int64,
            torch.bool,
            torch.complex64,
            torch.uint8,
            torch.float8_e5m2,
        ]
        kind = rng.choice(kinds)
        return None if kind == x.dtype else x.to(kind)
    if way == 3:  # an extent without memory: stride 0
        d, n = rng.randrange(x.dim()), rng.choice(HUGE)
        if d == x.dim() - 1:  # Python copies such a tensor: let it be too large for any machine
            n = 2**50
        if n > 2**62 // max(1, x.numel()):
            n = 2**31
            if d == x.dim() - 1:
                return None
        shape = list(x.shape)
        shape[d] = 1
        return x.narrow(d, 0, 1).expand(*[n if i == d else s for i, s in enumerate(x.shape)])
    if way == 4:  # one more, or one fewer, row somewhere
        if name in ("page_table", "lse_partial"):
            return None  # more or fewer rows may be legal
        d = x.dim() - 1 - rng.randrange(2 if name == "q" else x.dim())
        return torch.cat([x, x.narrow(d, 0, 1)], d) if rng.random() < 0.5 else x.narrow(d, 0, x.shape[d] - 1)
    if way == 5:
        return x.to("meta")
    if way == 6:
        return rng.choice(["tensor", 2.5, [1, 2], object(), {"a": x}, x.tolist()])
    if way == 7:
        return torch.empty(0, dtype=x.dtype)
    if way == 8:
        return x.to_sparse()
    if way == 9 and any(name.startswith(s) for s in INDEX):
        bad = x.clone()
        at = rng.choice([0, 1, 2, 3, 6]) if name == "page_table" else rng.randrange(bad.numel())  # a live one
        bad.view(-1)[at] = rng.choice([-1, -(2**31), 2**31 - 1, 10**6, 99])
        return bad
    if way == 10:
        d = x.dim() - 1
        if x.shape[d] > 1 and name in ("out", "out_partial"):
            return x.repeat_interleave(2, d)[..., ::2]
        return None
    if way == 11 and name != "page_table":
        return torch.ones(*[s + 1 for s in x.shape]).to(x.dtype)
    return None


def spoil_scalar(torch, rng, name):
    wrong = ["x", [1], object(), 2**63, -(2**63) - 1, 2**70, float("nan"), float("inf"), torch.ones(2), {}]
    value = rng.choice(wrong)
    if isinstance(value, torch.Tensor):
        return value if name in ("softmax_scale", "softcap", "num_splits") else None
    if name == "causal" or (name == "is_causal" and not isinstance(value, (str, list))):
        return None  # anything has a truth value
    if name == "softcap" and value in (2**63, 2**70, -(2**63) - 1):
        return None  # large numbers are numbers
    if name == "softmax_scale" and isinstance(value, int):
        return None
    if name.startswith("max_seqlen") and isinstance(value, float) and value != value:
        return value
    return value


def main(seed, calls):
    import time
    import warnings

    import flash_attn_interface as fa
    import torch

    warnings.simplefilter("ignore")

    rng = random.Random(seed)
    forms = {
        "func": fa.flash_attn_func,
        "varlen": fa.flash_attn_varlen_func,
        "cache": fa.flash_attn_with_kvcache,
        "paged": fa.flash_attn_with_kvcache,
        "op": torch.ops.flash_attn_3.fwd,
        "combine": fa.flash_attn_combine,
    }
    made = {}
    for form, call in forms.items():
        made[form] = legal(torch, form)
        call(**{n: x.clone() for n, x in made[form][0].items()}, **made[form][1])  # legal it is
    raised, accepted = {}, []
    done = 0
    while done < calls:
        form = rng.choice(list(forms))
        tensors, scalars = made[form]
        names = rng.sample(list(tensors), min(len(tensors), rng.choice([1, 1, 1, 2, 3])))
        args, changed = {**tensors, **scalars}, []
        for name in names:
            if any(isinstance(x, torch.Tensor) and x.numel() > 2**30 for x in args.values()):
                break  # two huge tensors that agree would be a legal call of years
            if (bad := spoil_tensor(torch, rng, name, tensors[name])) is not None:
                args[name], _ = bad, changed.append(name)
        if scalars and rng.random() < 0.15:
            name = rng.choice(list(scalars))
            if (bad := spoil_scalar(torch, rng, name)) is not None:
                args[name], _ = bad, changed.append(name)
        if not changed:
            continue
        done += 1
        label = f"{done} {form} " + ", ".join(f"{n}={describe(torch, args[n])}" for n in changed)
        print(label, file=sys.stderr) if "-v" in sys.argv else None
        began = time.perf_counter()
        kept = {n: x.clone() for n, x in tensors.items()}
        try:
            forms[form](**args)
        except Exception as error:  # noqa: BLE001
            raised[type(error).__name__] = raised.get(type(error).__name__, 0) + 1
            assert str(error).strip(), f"{label}: {type(error).__name__} without a message"
            assert "INTERNAL ASSERT" not in str(error), f"{label}: {error}"
            for n, x in tensors.items():
                assert torch.equal(x, kept[n]), f"{label}: {n} was written"
        else:
            accepted.append(label)
            for n, x in tensors.items():  # undo what an append wrote
                x.copy_(kept[n])
        if (took := time.perf_counter() - began) > 30:
            sys.exit(f"{label}: {took:.0f} s")
    print(f"{calls} calls, {sum(raised.values())} raised: {raised}; accepted {len(accepted)}")
    for label in accepted[:40]:
        print("accepted:", label)
    sys.exit(1 if accepted else 0)


def describe(torch, x):
    if isinstance(x, torch.Tensor):
        return f"{x.dtype}{list(x.shape)}/{x.device}/{x.layout}"
    return repr(x)[:60]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
