# SPDX-License-Identifier: MIT
"""flash_kda.step: 1 to 16 tokens a sequence, the state changed in place, against the recurrence in fp64
and against flash_kda.fwd."""

import flash_kda
import pytest
import torch
from kda_cases import DTYPES, SENTINEL, check, draw
from test_kda import EXTREMES, NAN, takes


def step(problem, state=None, state_indices=None):
    """(out, state): state is the problem's own, copied, unless given."""
    out = torch.full_like(problem.v, SENTINEL)
    state = problem.initial_state.clone() if state is None else state
    given = {"state_indices": state_indices, "cu_seqlens": problem.cu_seqlens}
    assert flash_kda.step(**problem.inputs(), out=out, state=state, **given) is None
    return out, state


@pytest.mark.parametrize("s", range(1, 17))
def test_tokens(s, device):
    for d, state in ((128, "fp32"), (64, "bf16")):
        problem = draw((3, s, 2), d, state=state, device=device)
        check(problem, *step(problem))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("state", ["fp32", "bf16"])
def test_dtypes(dtype, d, state, device):
    problem = draw((2, 3, 5), d, dtype=dtype, state=state, device=device)
    if takes(device, dtype):
        check(problem, *step(problem))
    else:
        with pytest.raises(NotImplementedError):
            step(problem)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("lengths", [(1, 1, 1), (16, 0, 3, 1), (0, 0), (5,)], ids=str)
def test_packed(lengths, index, device):
    """Sequences of different lengths; one without tokens keeps its state."""
    problem = draw((1, sum(lengths) + 4, 2), 64, lengths=lengths, state="fp32", index=index, device=device)
    check(problem, *step(problem))


@pytest.mark.parametrize("b", [0, 1, 37])
def test_batches(b, device):
    problem = draw((b, 1, 3), 64, state="fp32", device=device)
    check(problem, *step(problem))


@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(name, device):
    problem = draw((2, 16, 2), 64, state="fp32", device=device)
    EXTREMES[name](problem)
    check(problem, *step(problem))


@pytest.mark.parametrize("s", [1, 5, 16])
def test_steps_follow_the_whole(s, device):
    """Token by token, or several at a time, the result is fwd's of all tokens within its limits."""
    problem = draw((2, 80, 2), 128, state="fp32", device=device)
    state, outs = problem.initial_state.clone(), []
    for i in range(0, 80, s):
        part = draw((2, 1, 2), 128, device=device)
        for name in ("q", "k", "v", "g", "beta"):
            setattr(part, name, getattr(problem, name)[:, i : i + s])
        part.A_log, part.dt_bias = problem.A_log, problem.dt_bias
        outs.append(step(part, state)[0])
    check(problem, torch.cat(outs, 1), state)


@pytest.mark.parametrize("state", ["fp32", "bf16"])
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_pool(packed, state, device):
    """Each sequence changes its own row of a pool with free outer strides, and nothing else; a
    sequence of index -1 is padding whose tokens may be NaN: its rows of out become 0."""
    lengths = {"lengths": (2, 2, 2, 2)} if packed else {}
    problem = draw((1, 8, 3) if packed else (4, 2, 3), 64, state=state, device=device, **lengths)
    want, want_states = step(problem)
    slots = [5, 0, -1, 3]
    pool = torch.full((7, 4, 64, 64), NAN, dtype=DTYPES[state], device=device)[:, 1:]
    for slot, x in zip(slots, problem.initial_state):
        if slot >= 0:
            pool[slot] = x
    padding = (slice(None), slice(4, 6)) if packed else (2,)
    for x in (problem.q, problem.k, problem.v, problem.g, problem.beta):
        x[padding] = NAN
    indices = torch.tensor(slots, dtype=torch.int32, device=device)
    out, _ = step(problem, pool, indices)
    want[padding] = 0
    assert torch.equal(out, want)
    for slot in range(7):
        if slot in slots:
            assert torch.equal(pool[slot], want_states[slots.index(slot)])
        else:
            assert pool[slot].isnan().all()


def test_prefill_then_decode(device):
    """fwd leaves a state in a pool, step goes on from it, and the whole is one recurrence."""
    problem = draw((1, 70, 2), 64, lengths=(40, 30), device=device)
    whole, _ = problem.run()
    pool = torch.full((4, 2, 64, 64), NAN, device=device)
    indices = torch.tensor([2, 0], dtype=torch.int32, device=device)
    outs = torch.full_like(whole, SENTINEL)
    prefill = draw((1, 1, 2), 64, device=device)
    keep = [*range(39), *range(40, 69)]
    for name in ("q", "k", "v", "g", "beta"):
        setattr(prefill, name, getattr(problem, name)[:, keep])
    prefill.A_log, prefill.dt_bias = problem.A_log, problem.dt_bias
    pool[[2, 0]] = 0
    prefill.cu_seqlens = torch.tensor([0, 39, 68], device=device)
    prefill.initial_state = pool
    outs[:, keep] = prefill.run(final=pool, state_indices=indices)[0]
    decode = draw((2, 1, 2), 64, device=device)
    for name in ("q", "k", "v", "g", "beta"):
        setattr(decode, name, getattr(problem, name)[0, [39, 69]][:, None].contiguous())
    decode.A_log, decode.dt_bias = problem.A_log, problem.dt_bias
    outs[0, [39, 69]] = step(decode, pool, indices)[0][:, 0]
    check(problem, outs, pool[[2, 0]])


def test_strided_inputs(device):
    problem = draw((2, 3, 2), 64, state="fp32", device=device)
    want, want_state = step(problem)
    for name in ("q", "k", "v", "g"):
        wide = torch.full((2, 3, 5, 80), NAN, dtype=torch.bfloat16, device=device)
        wide[:, :, 1:3, 8:72] = getattr(problem, name)
        setattr(problem, name, wide[:, :, 1:3, 8:72])
    problem.beta = problem.beta.transpose(1, 2).contiguous().transpose(1, 2)
    out, state = step(problem)
    assert torch.equal(out, want) and torch.equal(state, want_state)


def test_no_sequence_hurts_another(device):
    clean = draw((3, 4, 2), 64, state="fp32", device=device)
    want, want_state = step(clean)
    for x in (clean.q, clean.k, clean.v, clean.g, clean.beta):
        x[1] = NAN
    out, state = step(clean)
    assert torch.equal(out[[0, 2]], want[[0, 2]]) and torch.equal(state[[0, 2]], want_state[[0, 2]])


def test_a_nan_of_the_gate_gets_through(device):
    """NaN in A_log or dt_bias makes its head NaN, in fwd and in step, and no other."""
    for name in ("A_log", "dt_bias"):
        p = draw((2, 5, 3), state="fp32", device=device)
        getattr(p, name)[1] = torch.nan
        out, final = p.run()
        state, stepped = p.initial_state.clone(), torch.empty_like(p.v)
        flash_kda.step(out=stepped, state=state, **p.inputs())
        for x, axis in ((out, 2), (stepped, 2), (final, 1), (state, 1)):
            assert x.select(axis, 1).isnan().all()
            assert x.select(axis, 0).isfinite().all() and x.select(axis, 2).isfinite().all()
