# SPDX-License-Identifier: MIT
"""Whole calls of flash_kda drawn at random: every argument, any strides, pools, checkpoints, numbers of
threads.

Each tensor lies somewhere inside a larger one.  What a call must not read is NaN, or a wild index: what
surrounds inputs, tokens of no sequence, free slots, tokens of padding.  What it must not write is checked
to be as it was.
"""

import random

import flash_kda
import pytest
import torch
from cases import ROUNDS, SEED, WILD
from kda_cases import DTYPES, SENTINEL, check, draw, limit, rms_ratio

CASES = int(60 * ROUNDS)
NAN = float("nan")
TOKENS = ("q", "k", "v", "g", "beta")


def embed(rng, x, dims, fill):
    """(view, larger): a view equal to x inside a larger tensor of `fill`, with room before and behind in
    `dims`."""
    room = [(rng.randint(0, 2), rng.randint(0, 2)) if d in dims else (0, 0) for d in range(x.dim())]
    larger = torch.full(
        [n + before + behind for n, (before, behind) in zip(x.shape, room)],
        fill,
        dtype=x.dtype,
        device=x.device,
    )
    view = larger[tuple(slice(before, before + n) for n, (before, _) in zip(x.shape, room))]
    view.copy_(x)
    return view, larger


class Call:
    """One drawn call: a problem for the oracle, and the arguments that are passed."""

    def __init__(self, seed, step, device):
        self.rng = rng = random.Random(seed)
        self.step, self.device = step, device
        h, self.d = rng.choice([1, 2, 3, 5]), rng.choice([64, 128])
        longest = 16 if step else 100
        sizes = [0, 1, 2, 5, 15, 16] if step else [0, 1, 15, 16, 17, 31, 32, 33, 48, 64, 90]
        lengths, shape = None, (rng.randint(1, 4), rng.randint(1, longest), h)
        if rng.random() < 0.6:
            lengths = [rng.choice(sizes) for _ in range(rng.randint(1, 5))]
            shape = (1, sum(lengths) + rng.choice([0, 0, 2, 9]), h)
        self.problem = draw(
            shape,
            self.d,
            dtype="bf16" if device == "cuda" else rng.choice(list(DTYPES)),
            lengths=lengths,
            state="fp32",
            index=rng.choice([torch.int32, torch.int64]),
            device=device,
            spread=rng.choice([0.3, 1.0, 5.0, 30.0]),
            seed=rng.randrange(2**31),
        )
        self.state_dtype = DTYPES[rng.choice(["fp32", "bf16"])]
        self.problem.initial_state = self.problem.initial_state.to(self.state_dtype).float()
        self.problem.beta.add_(rng.choice([0.0, 0.0, 6.0, -6.0]))
        self.problem.lower_bound = rng.choice([-5.0, -5.0, -1.3, 0.0])
        self.problem.scale = rng.choice([self.problem.scale, 1.0, -0.2, 40.0])
        self.problem.A_log = rng.choice([self.problem.A_log, None, self.problem.A_log * 3 - 1])
        self.problem.dt_bias = rng.choice([self.problem.dt_bias, None, self.problem.dt_bias * 9 - 4])
        self.n = len(self.problem.sequences)
        self.kept = []  # (view, larger): written through the view alone

    def input(self, x, dims):
        return None if x is None else embed(self.rng, x, dims, NAN)[0]

    def index(self, x):
        return None if x is None else embed(self.rng, x, (0,), self.rng.choice(WILD))[0]

    def output(self, x, dims):
        view, larger = embed(self.rng, x, dims, SENTINEL)
        self.kept.append((view, larger))
        return view

    def arguments(self):
        """What fwd and step share, each tensor in a larger one."""
        p = self.problem
        args = {name: self.input(getattr(p, name), (0, 1, 2, 3)) for name in TOKENS}
        args["beta"] = args["beta"].transpose(1, 2).contiguous().transpose(1, 2)
        args["A_log"] = self.input(p.A_log, (0,))
        args["dt_bias"] = self.input(p.dt_bias, (0, 1))
        args["out"] = self.output(torch.full_like(p.v, SENTINEL), (0, 1, 2, 3))
        args["cu_seqlens"] = self.index(p.cu_seqlens)
        return {**args, "scale": p.scale, "lower_bound": p.lower_bound}

    def pool(self, fill):
        """(states, slots): the problem's initial states, one a sequence, or rows of a larger pool."""
        states = self.problem.initial_state.to(self.state_dtype)
        if not self.pooled:
            return states
        pool = torch.full((self.slots, *states.shape[1:]), fill, dtype=self.state_dtype, device=self.device)
        for n, slot in enumerate(self.seats):
            if slot >= 0:
                pool[slot] = states[n]
        return pool

    def draw_seats(self):
        rng = self.rng
        self.pooled, self.slots = rng.random() < 0.6, self.n + rng.randint(0, 3)
        self.seats = rng.sample(range(self.slots), self.n) if self.pooled else list(range(self.n))
        if self.pooled:
            self.seats = [-1 if rng.random() < 0.2 else slot for slot in self.seats]
        self.live = [n for n in range(self.n) if self.seats[n] >= 0]
        seats = torch.tensor(self.seats, dtype=torch.int32, device=self.device)
        return self.index(seats) if self.pooled else None

    def judge(self, out, states):
        """out and the states by slot, or None; other slots must be as they were."""
        p = self.problem
        merged = None
        if states is not None:
            merged = p.want()[1].to(states.dtype)  # those of -1 are not there: the oracle's pass
            for n in self.live:
                merged[n] = states[self.seats[n]].cpu()
        check(p, out, merged)
        for view, larger in self.kept:
            view.fill_(SENTINEL)
            assert (larger == SENTINEL).all(), "written outside the tensor"


@pytest.mark.parametrize("case", range(CASES))
def test_fwd(case, device):
    call = Call(SEED * 10_000 + case, False, device)
    rng, p = call.rng, call.problem
    indices, args = call.draw_seats(), call.arguments()
    for n in range(call.n):
        if n not in call.live:
            p.initial_state[n] = 0
    how = rng.choice(["both", "in place", "in", "out", "none" if indices is None else "both"])
    if how in ("out", "none"):
        p.initial_state.zero_()
    initial = call.pool(NAN)
    if how == "in place":
        final = call.output(initial, (0, 1))
        initial = final
    else:
        initial = call.input(initial, (0, 1)) if how in ("both", "in") else None
        blank = torch.full((call.slots if call.pooled else call.n, *p.state_shape[1:]), SENTINEL)
        blank = blank.to(call.state_dtype).to(device)
        final = call.output(blank, (0, 1)) if how in ("both", "out") else None
    before = None if final is None else final.clone()
    every, checkpoints = 0, None
    if rng.random() < 0.4:
        every = rng.choice([16, 32, 48, 64])
        rows = sum((end - begin) // every for begin, end in p.sequences)
        blank = torch.full((rows + rng.randint(0, 2), *p.state_shape[1:]), SENTINEL, device=device)
        checkpoints = call.output(blank.to(DTYPES[rng.choice(["fp32", "bf16"])]), (0, 1))
    flash_kda.fwd(
        **args,
        initial_state=initial,
        final_state=final,
        state_indices=indices,
        checkpoint_states=checkpoints,
        checkpoint_every=every,
    )
    if final is not None:
        for slot in set(range(len(final))) - set(call.seats):
            assert torch.equal(final[slot].nan_to_num(7.0), before[slot].nan_to_num(7.0))
    if every:
        want = p.want(every)[2]
        for got, wanted in zip(checkpoints, want):
            assert rms_ratio(got, wanted) <= 2 * limit(torch.bfloat16, wanted, wanted)
        assert (checkpoints[len(want) :] == SENTINEL).all()
    call.judge(args["out"].clone(), None if final is None else final.clone())


@pytest.mark.parametrize("case", range(CASES))
def test_step(case, device):
    call = Call(SEED * 10_000 + case + 5_000, True, device)
    p, indices = call.problem, call.draw_seats()
    args = call.arguments()
    padding = [n for n in range(call.n) if call.seats[n] < 0]
    rows = [slice(*p.sequences[n]) for n in padding]
    if p.cu_seqlens is None:
        rows, flat = padding, lambda x: x
    else:
        flat = lambda x: x[0]  # noqa: E731
    for name in TOKENS:
        for row in rows:
            flat(args[name])[row] = NAN
    state = call.output(call.pool(NAN), (0, 1))
    before = state.clone()
    threads = torch.get_num_threads()
    torch.set_num_threads(call.rng.choice([1, threads]))
    try:
        flash_kda.step(**args, state=state, state_indices=indices)
    finally:
        torch.set_num_threads(threads)
    for slot in set(range(len(state))) - set(call.seats):
        assert torch.equal(state[slot].nan_to_num(7.0), before[slot].nan_to_num(7.0))
    out, want = args["out"].clone(), p.want()[0].to(p.v.dtype).to(device)
    for row in rows:
        assert not flat(out)[row].any()  # zeros
        flat(out)[row] = flat(want)[row]
    call.judge(out, state.clone())
