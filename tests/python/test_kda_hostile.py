# SPDX-License-Identifier: MIT
"""Hostile calls of flash_kda: an exception each time, no crash, no byte written.

Each call is a legal one with one to three arguments made hostile: wrong ranks, dtypes, strides and
devices, extents near 2^31 and 2^62 by expand (no memory behind them), overlapping outputs, objects that
are no tensors, entries of index tensors out of range.  The calls run in a subprocess, so that a crash is
a failed test with the last call named, not the end of the session.
"""

import random
import sys

import pytest
from cases import ROUNDS, SEED
from test_hostile import HUGE, describe, in_a_subprocess

CALLS = int(4_000 * max(1.0, ROUNDS))
PARTS = 2
INDEX = ("cu_seqlens", "state_indices")
FREE = ("pool", "checkpoint_states")  # any number of rows will do
NO_TENSORS = ["tensor", 2.5, [1, 2], (), object(), {"a": 1}, b"x", True]
NO_NUMBERS = ["x", [1], object(), {}, float("nan"), float("inf"), -float("inf"), 1e31, 2**1030, 1j]
NO_INTERVALS = ["x", [1], 16.0, -16, 8, 17, 2**31, 2**63 - 16, 2**70, float("nan"), None]


@pytest.mark.parametrize("part", range(PARTS))
def test_thousands_of_calls(part):
    in_a_subprocess(__file__, SEED * PARTS + part, CALLS // PARTS)


# ---- the subprocess -----------------------------------------------------------------------------


def legal(torch, form):
    """Arguments of one legal call; the pool of a call stands under `pool` and is its states."""
    i32, bf16 = torch.int32, torch.bfloat16
    b, t = {"fwd": (2, 20), "step": (3, 5)}.get(form, (1, 38 if form == "pool" else 20))
    a = {name: torch.ones(b, t, 2, 64, dtype=bf16) for name in ("q", "k", "v", "g", "out")}
    a["beta"] = torch.ones(b, t, 2, dtype=bf16)
    a |= {"A_log": torch.zeros(2), "dt_bias": torch.zeros(2, 64), "scale": 0.125, "lower_bound": -5.0}
    if form == "fwd":
        a |= {"initial_state": torch.zeros(2, 2, 64, 64), "final_state": torch.zeros(2, 2, 64, 64)}
    elif form == "native":
        a |= {"workspace": torch.zeros(16, dtype=torch.uint8), "final_state": torch.zeros(1, 2, 64, 64)}
    elif form == "packed":
        a |= {"initial_state": torch.zeros(3, 2, 64, 64), "final_state": torch.zeros(3, 2, 64, 64)}
        a |= {"cu_seqlens": torch.tensor([0, 7, 7, 20])}
    elif form == "pool":
        a |= {"pool": torch.zeros(6, 2, 64, 64), "state_indices": torch.tensor([4, -1, 1], dtype=i32)}
        a |= {"cu_seqlens": torch.tensor([0, 2, 4, 38], dtype=i32)}
        a |= {"checkpoint_states": torch.zeros(2, 2, 64, 64), "checkpoint_every": 16}
    elif form == "step":
        a |= {"state": torch.zeros(3, 2, 64, 64)}
    else:
        a |= {"pool": torch.zeros(6, 2, 64, 64), "state_indices": torch.tensor([4, -1, 1], dtype=i32)}
        a |= {"cu_seqlens": torch.tensor([0, 4, 4, 20])}
    return a


def calls():
    import flash_kda
    import flash_kda_C

    def pooled(pool, **rest):
        flash_kda.fwd(initial_state=pool, final_state=pool, **rest)

    return {
        "fwd": flash_kda.fwd,
        "native": flash_kda_C.fwd,
        "packed": flash_kda.fwd,
        "pool": pooled,
        "step": flash_kda.step,
        "step pool": lambda pool, **rest: flash_kda.step(state=pool, **rest),
    }


def written(name):
    return name in ("out", "final_state", "state", "pool", "checkpoint_states")


def spoil_tensor(torch, rng, name, x):
    """A tensor (or not) that no legal call has in place of x; None where this way does not apply."""
    way, d = rng.randrange(14), rng.randrange(x.dim())
    if name == "workspace":
        return [None, x[::2], x.to("meta"), "x", 3][way % 5]  # its size and dtype are free
    if way == 0:
        return x[None]
    if way == 1:
        return x.flatten() if x.dim() > 1 else x[None, None]
    if way == 2:
        kinds = [torch.float64, torch.int8, torch.int16, torch.bool, torch.complex64, torch.uint8]
        return x.to(rng.choice(kinds))
    if way == 3:  # an extent without memory: stride 0
        n = rng.choice([size for size in HUGE if size <= 2**62 // max(1, x.numel())])
        if d == 0 and name in FREE and n < 2**31 and not written(name):
            return None
        return x.narrow(d, 0, 1).expand(*[n if i == d else s for i, s in enumerate(x.shape)])
    if way == 4:  # one more, or one fewer, row somewhere
        if name == "cu_seqlens" or (d == 0 and name in FREE):
            return None
        return torch.cat([x, x.narrow(d, 0, 1)], d) if rng.random() < 0.5 else x.narrow(d, 0, x.shape[d] - 1)
    if way == 5:
        return x.to("meta")
    if way == 6:
        return rng.choice([*NO_TENSORS, x.tolist(), x.float().numpy()])
    if way == 7:
        return torch.empty(0, dtype=x.dtype)
    if way == 8:
        return x.to_sparse()
    if way == 9 and name in INDEX:
        bad = x.clone()
        i = rng.randrange(bad.numel())
        bad[i] = rng.choice([-2, -(2**31), 2**31 - 1, 99, 6 if name == "state_indices" else 39])
        return bad
    if way == 10 and name == "cu_seqlens" and x.dtype == torch.int64:
        bad = x.clone()
        bad[rng.randrange(bad.numel())] = rng.choice([2**62, -(2**62), 2**63 - 1, -(2**63), 2**32 + 3])
        return bad
    if way == 11 and x.dim() > 1 and name != "beta":  # the last axis apart
        return x.repeat_interleave(2, -1)[..., ::2]
    if way == 12 and written(name) and x.shape[d] > 1:  # rows that share memory
        return x.narrow(d, 0, 1).expand(x.shape)
    if way == 13 and x.dim() == 4 and x.shape[-1] == x.shape[-2]:
        return x.mT
    return None


def main(seed, count):
    import time
    import warnings

    import torch

    warnings.simplefilter("ignore")
    rng, forms = random.Random(seed), calls()
    made = {form: legal(torch, form) for form in forms}
    for form, args in made.items():  # legal it is
        forms[form](**{n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in args.items()})
    raised, accepted, done = {}, [], 0
    while done < count:
        form = rng.choice(list(forms))
        args, changed = dict(made[form]), {}
        kept = {n: x.clone() for n, x in args.items() if isinstance(x, torch.Tensor)}
        for name in rng.sample(list(args), rng.choice([1, 1, 1, 2, 3])):
            if name in ("scale", "lower_bound"):
                changed[name] = rng.choice(NO_NUMBERS + ([-5.5, 0.1] if name == "lower_bound" else [None]))
            elif name == "checkpoint_every":
                changed[name] = rng.choice(NO_INTERVALS)
            elif (bad := spoil_tensor(torch, rng, name, args[name])) is not None:
                changed[name] = bad
        required = [n for n in ("q", "k", "v", "g", "beta", "out", "state") if n in args]
        if rng.random() < 0.03:
            changed[rng.choice(required)] = None
        if not changed:
            continue
        done += 1
        label = f"{done} {form} " + ", ".join(f"{n}={describe(torch, x)}" for n, x in changed.items())
        print(label, file=sys.stderr) if "-v" in sys.argv else None
        began = time.perf_counter()
        try:
            forms[form](**{**args, **changed})
        except Exception as error:  # noqa: BLE001
            raised[type(error).__name__] = raised.get(type(error).__name__, 0) + 1
            assert str(error).strip(), f"{label}: {type(error).__name__} without a message"
            assert "INTERNAL ASSERT" not in str(error), f"{label}: {error}"
        else:
            accepted.append(label)
        for n, x in kept.items():
            assert torch.equal(args[n], x) or accepted, f"{label}: {n} was written"
        if (took := time.perf_counter() - began) > 10:
            sys.exit(f"{label}: {took:.0f} s")
    print(f"{count} calls, {sum(raised.values())} raised: {raised}; accepted {len(accepted)}")
    for label in accepted[:40]:
        print("accepted:", label)
    sys.exit(1 if accepted else 0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
