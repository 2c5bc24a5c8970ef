# SPDX-License-Identifier: MIT
"""flash_kda.fwd against the recurrence in fp64: lengths, packing, dtypes, extreme values, states that are
passed on, checkpoints, pools, and what must be neither read nor written."""

import multiprocessing
import random
import threading

import flash_kda
import kda_reference as reference
import libattn
import pytest
import torch
from cases import ROUNDS, SEED
from kda_cases import DTYPES, SENTINEL, check, draw, limit, rms_ratio

NAN = float("nan")


def takes(device, dtype):
    """Whether the device computes this dtype; where it does not, the test wants NotImplementedError."""
    return device == "cpu" or dtype == "bf16"


def run_and_check(problem, **more):
    out, states = problem.run(**more)
    check(problem, out, states)
    return out, states


# ---- lengths and packing ---------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0, 1, 2, 3, 15, 16, 17, 31, 33, 37, 63, 64, 65, 97, 128, 131])
def test_lengths(t, device):
    run_and_check(draw((1, t, 3), device=device))
    run_and_check(draw((3, t, 1), 64, state="fp32", device=device, seed=1))


PACKED = {
    "one": [16],
    "two": [16, 16],
    "below a chunk": [4, 8, 12],
    "growing": [64, 128, 7],
    "official's ragged": [20, 50, 100],
    "off by one": [17, 33, 65],
    "single tokens": [1] * 9,
    "empty ones": [0, 17, 0, 0, 40, 0],
    "all empty": [0, 0, 0],
}


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("room", [0, 21], ids=["full", "room"])
@pytest.mark.parametrize("lengths", PACKED.values(), ids=PACKED)
def test_packed(lengths, room, index, device):
    """With room there are tokens of no sequence before and behind, full of NaN, whose rows of out stay."""
    shape = (1, sum(lengths) + room, 2)
    run_and_check(draw(shape, 64 if room else 128, lengths=lengths, state="fp32", index=index, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("state", ["fp32", "bf16"])
def test_dtypes(dtype, d, state, device):
    problem = draw((2, 83, 2), d, dtype=dtype, state=state, device=device)
    if takes(device, dtype):
        run_and_check(problem, final=state)
    else:
        with pytest.raises(NotImplementedError):
            problem.run(final=state)


@pytest.mark.parametrize("final", [None, "fp32", "bf16"])
@pytest.mark.parametrize("initial", [None, "fp32", "bf16"])
def test_states_in_and_out(initial, final, device):
    problem = draw((2, 40, 2), 64, state=initial, device=device)
    if initial and final and initial != final:
        with pytest.raises(RuntimeError, match="final_state"):
            problem.run(final=final)
        return
    run_and_check(problem, final=final)


def test_many_short_sequences(device):
    lengths = [n % 5 for n in range(150)]
    run_and_check(draw((1, sum(lengths), 1), 64, lengths=lengths, state="fp32", device=device))


@pytest.mark.parametrize("case", range(int(40 * ROUNDS)))
def test_random(case, device):
    rng = random.Random(SEED * 10_000 + case)
    h, d = rng.choice([1, 2, 3, 5]), rng.choice([64, 128])
    lengths, shape = None, (rng.choice([1, 2, 3]), rng.choice([1, 5, 16, 48, 77, 150]), h)
    if rng.random() < 0.6:
        lengths = [rng.choice([0, 1, 3, 15, 16, 17, 31, 40, 64, 90]) for _ in range(rng.randint(1, 5))]
        shape = (1, sum(lengths) + rng.choice([0, 0, 4, 30]), h)
    problem = draw(
        shape,
        d,
        dtype="bf16" if device == "cuda" else rng.choice(["bf16", "bf16", "fp16", "fp32"]),
        lengths=lengths,
        state=rng.choice([None, "fp32", "bf16"]),
        index=rng.choice([torch.int32, torch.int64]),
        device=device,
        spread=rng.choice([0.1, 1.0, 4.0, 20.0]),
        seed=rng.randrange(2**31),
    )
    problem.lower_bound = rng.choice([-5.0, -5.0, -2.5, -0.01, 0.0])
    problem.scale = rng.choice([problem.scale, 1.0, -0.3])
    problem.beta.add_(rng.choice([0.0, 0.0, 8.0, -8.0]))
    problem.A_log = rng.choice([problem.A_log, None, problem.A_log - 6, problem.A_log * 3])
    problem.dt_bias = rng.choice([problem.dt_bias, None, problem.dt_bias * 8, problem.dt_bias - 8])
    final = "fp32" if problem.initial_state is None else problem.initial_state.dtype
    run_and_check(problem, final="bf16" if final == torch.bfloat16 else "fp32")


# ---- extreme values --------------------------------------------------------------------------------


def set_(name, value):
    """A change of a problem: fill a tensor, or set a number."""

    def change(p):
        x = getattr(p, name)
        x.fill_(value) if isinstance(x, torch.Tensor) else setattr(p, name, value)

    return change


def alternate(p):
    """Decay 1 and e^-5 by turns, within each chunk and between channels."""
    sign = 1 - 2 * (torch.arange(p.g.shape[1])[:, None, None] // 3 % 2)
    p.g.copy_((60.0 * sign).expand(p.g.shape))
    p.g[..., ::2] *= -1


def large_states(p):
    p.initial_state.copy_(torch.arange(p.initial_state.numel()).view(p.initial_state.shape) * 1e6 / 65536)


def zero_keys(p):
    p.k[:, ::3] = 0
    p.q[:, 1::3] = 0


def same_keys(p):
    """Every key the same: the triangular solve at its worst."""
    p.k.copy_(p.k[:1, :1].expand(p.k.shape))
    p.beta.fill_(30)


EXTREMES = {
    "slow decay": set_("g", -9.0),
    "decay 1": set_("g", -300.0),
    "fastest decay": set_("g", 300.0),
    "decay by turns": alternate,
    "no decay": set_("lower_bound", 0.0),
    "beta 30": set_("beta", 30.0),
    "beta -30": set_("beta", -30.0),
    "A_log 10": set_("A_log", 10.0),
    "A_log -40": set_("A_log", -40.0),
    "A_log 100": set_("A_log", 100.0),
    "dt_bias 1e4": set_("dt_bias", 1e4),
    "dt_bias -1e4": set_("dt_bias", -1e4),
    "large states": large_states,
    "zero keys": zero_keys,
    "same keys": same_keys,
    "tiny keys": lambda p: p.k.mul_(1e-4),
    "large q and k": lambda p: (p.q.mul_(3e3), p.k.mul_(3e3)),
    "large values": lambda p: p.v.mul_(1e4),
    "scale 0": set_("scale", 0.0),
    "steep and at 0": lambda p: (p.A_log.fill_(100), p.g.zero_(), p.dt_bias.zero_()),
}


@pytest.mark.parametrize("state", ["fp32", "bf16"])
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(name, state, device):
    problem = draw((1, 150, 2), 64, state=state, device=device)
    EXTREMES[name](problem)
    run_and_check(problem, final=state)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_of_other_dtypes(name, dtype):
    if name == "large values" and dtype == "fp16":
        pytest.skip("beyond fp16")
    problem = draw((1, 100, 1), 128, dtype=dtype, state="fp32")
    EXTREMES[name](problem)
    run_and_check(problem)


@pytest.mark.parametrize("gate", ["fastest decay", "decay by turns"])
@pytest.mark.parametrize("scale", [1e20, -1e8, 1e-20])
def test_scales(scale, gate, device):
    """The scale does not meet the range of a chunk's decays."""
    problem = draw((1, 70, 2), 64, state="fp32", device=device)
    EXTREMES[gate](problem)
    problem.scale = scale
    run_and_check(problem)


@pytest.mark.parametrize("at", [1, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_knows_nothing_of_the_next_decay(dtype, at):
    """Log-decays of -78 to -82, about what a chunk's products bear: what came before stays as exact.
    bf16: two roundings of a few sums whose terms cancel."""
    torch.manual_seed(at)
    q, k, v = (torch.randn(1, at + 1, 2, 128).to(DTYPES[dtype]) for _ in range(3))
    g = torch.full_like(q, -0.01)
    g[:, at] = -torch.linspace(78, 82, 128)
    beta, more = torch.rand(1, at + 1, 2).to(q), {"gate_activated": True, "beta_activated": True}
    out = libattn.kda_fwd(q, k, v, g, beta, 0.09, 0.0, **more)
    alone = libattn.kda_fwd(*(x[:, :at] for x in (q, k, v, g, beta)), 0.09, 0.0, **more)
    assert rms_ratio(out[:, :at], alone.double()) <= (0.02 if dtype == "bf16" else 2e-4)


def test_a_scale_below_the_least_float():
    out, _ = draw((1, 70, 2), 64, dtype="fp32").run()
    problem = draw((1, 70, 2), 64, dtype="fp32")
    problem.scale = 1e-41
    tiny, _ = problem.run()
    assert out.any() and tiny.isfinite().all() and tiny.abs().max() < 1e-38


def test_long(device):
    """Errors do not pile up where the state forgets slowly."""
    problem = draw((1, 2000, 1), 64, device=device)
    problem.g.fill_(-8)
    run_and_check(problem)


# ---- what must not be read or written --------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, float("inf")], ids=str)
@pytest.mark.parametrize("hurt", [0, 1, 2])
def test_no_sequence_hurts_another(hurt, bad, device):
    """NaN and Inf in every tensor of one sequence stay there."""
    lengths = (21, 5, 18)
    clean = draw((1, 44, 2), 64, lengths=lengths, state="fp32", device=device)
    problem = draw((1, 44, 2), 64, lengths=lengths, state="fp32", device=device)
    begin, end = problem.sequences[hurt]
    for x in (problem.q, problem.k, problem.v, problem.g, problem.beta):
        x[:, begin:end] = bad
    problem.initial_state[hurt] = bad
    want, want_states = clean.run()
    out, states = problem.run()
    for n, (begin, end) in enumerate(problem.sequences):
        if n != hurt:
            assert torch.equal(out[:, begin:end], want[:, begin:end])
            assert torch.equal(states[n], want_states[n])


def test_outputs_keep_their_surroundings(device):
    """Rows beside out and states, through strides."""
    problem = draw((1, 30, 2), 64, lengths=(13, 7), state="fp32", device=device)
    want, want_states = problem.run()
    wide = torch.full((1, 32, 4, 96), SENTINEL, dtype=torch.bfloat16, device=device)
    states = torch.full((5, 3, 64, 64), SENTINEL, device=device)
    out, final = wide[:, 1:31, 1:3, 8:72], states[1:5:2, :2]
    problem.run(out=out, final=final)
    assert torch.equal(out, want) and torch.equal(final, want_states)
    out.fill_(SENTINEL), final.fill_(SENTINEL)
    assert (wide == SENTINEL).all() and (states == SENTINEL).all()


def test_inputs_are_not_written(device):
    problem = draw((1, 40, 2), 64, lengths=(13, 27), state="bf16", device=device)
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "cu_seqlens", "initial_state")
    kept = {name: getattr(problem, name).clone() for name in names}
    problem.run(final="bf16")
    assert all(torch.equal(getattr(problem, name), x) for name, x in kept.items())


# ---- one and the same result -----------------------------------------------------------------------


def test_packed_equals_separate(device):
    """Bit for bit, packed or in batch rows."""
    lengths = (33, 0, 64, 5, 80, 1, 15, 16)
    packed = draw((1, sum(lengths), 2), 128, lengths=lengths, state="fp32", device=device)
    out, states = packed.run()
    for n, (begin, end) in enumerate(packed.sequences):
        alone = draw((1, end - begin, 2), 128, state="fp32", device=device)
        for name in ("q", "k", "v", "g", "beta"):
            setattr(alone, name, getattr(packed, name)[:, begin:end].contiguous())
        alone.A_log, alone.dt_bias = packed.A_log, packed.dt_bias
        alone.initial_state = packed.initial_state[n : n + 1]
        want, want_state = alone.run()
        assert torch.equal(out[:, begin:end], want) and torch.equal(states[n], want_state[0])


@pytest.mark.parametrize("state", ["fp32", "bf16"])
@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
def test_final_state_may_be_the_initial_one(packed, state, device):
    kwargs = {"lengths": (17, 0, 33)} if packed else {}
    problem = draw((1, 50, 2) if packed else (3, 50, 2), 64, state=state, device=device, **kwargs)
    want, want_states = problem.run(final=state)
    out, states = problem.run(final=problem.initial_state)
    assert torch.equal(out, want) and torch.equal(states, want_states)


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 50, 64, 100, 128, 144, 149])
def test_cut_and_resumed(cut, device):
    """A run cut anywhere and resumed from its fp32 state equals the whole; bit for bit where the cut
    lies between chunks, however few tokens are left."""
    whole = draw((2, 150, 2), 128, state="fp32", device=device)
    want, want_states = whole.run()
    first, second = (draw((2, 1, 2), 128, device=device) for _ in range(2))
    for part, rows in ((first, slice(0, cut)), (second, slice(cut, None))):
        for name in ("q", "k", "v", "g", "beta"):
            setattr(part, name, getattr(whole, name)[:, rows])
        part.A_log, part.dt_bias = whole.A_log, whole.dt_bias
    first.initial_state = whole.initial_state
    begun, second.initial_state = first.run()
    rest, states = second.run()
    out = torch.cat([begun, rest], 1)
    check(whole, out, states)
    if cut % (64 if device == "cpu" else 16) == 0:
        assert torch.equal(out, want) and torch.equal(states, want_states)


def test_strided_inputs(device):
    """Slices of one fused projection, beta among them, give what contiguous tensors give."""
    problem = draw((2, 40, 2), 64, state="fp32", device=device)
    want, want_states = problem.run()
    parts = (problem.q, problem.k, problem.v, problem.g)
    fused = torch.cat([x.flatten(2) for x in parts] + [problem.beta], -1)
    split = fused.split([128] * 4 + [2], -1)
    problem.q, problem.k, problem.v, problem.g = (x.unflatten(-1, (2, 64)) for x in split[:4])
    problem.beta = split[4]
    pool = torch.full((4, 3, 64, 64), NAN, device=device)
    pool[::2, 1:] = problem.initial_state
    problem.initial_state = pool[::2, 1:]
    out, states = problem.run()
    assert torch.equal(out, want) and torch.equal(states, want_states)


def test_absent_gate_parameters(device):
    """A_log None is slope 1, dt_bias None is 0."""
    problem = draw((1, 40, 2), 64, device=device)
    problem.A_log.zero_(), problem.dt_bias.zero_()
    want, want_states = problem.run()
    problem.A_log = problem.dt_bias = None
    out, states = problem.run()
    assert torch.equal(out, want) and torch.equal(states, want_states)


def test_the_number_of_threads_does_not_matter():
    problem = draw((1, 300, 3), 128, lengths=(190, 0, 110), state="fp32")
    threads = torch.get_num_threads()
    want, want_states = problem.run()
    try:
        torch.set_num_threads(1)
        out, states = problem.run()
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(out, want) and torch.equal(states, want_states)


def test_many_python_threads_at_once():
    problems = [draw((2, 70 + n, 2), 64, state="fp32", seed=n) for n in range(4)]
    wants, same = [p.run() for p in problems], []

    def work(p, want):
        for _ in range(10):
            same.append(all(torch.equal(x, y) for x, y in zip(p.run(), want)))

    team = [threading.Thread(target=work, args=pair) for pair in zip(problems, wants)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    assert len(same) == 40 and all(same)


def forked(pipe, arguments):
    flash_kda.fwd(**arguments)
    pipe.send([arguments[name].float().numpy().tobytes() for name in ("out", "final_state")])


def test_after_fork():
    """A child of a process whose pool has run gets the same bits, and does not hang."""
    problem = draw((2, 70, 2), 64, state="fp32")
    want = [x.float().numpy().tobytes() for x in problem.run()]
    made = {"out": torch.empty_like(problem.v), "final_state": torch.empty_like(problem.initial_state)}
    arguments = {**problem.inputs(), **made, "initial_state": problem.initial_state}
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=forked, args=(theirs, arguments))
    child.start()
    try:
        assert ours.poll(60), "the child hangs"
        assert ours.recv() == want
        child.join(30)
        assert child.exitcode == 0
    finally:
        child.kill()


# ---- checkpoints and pools -------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["fp32", "bf16"])
@pytest.mark.parametrize("every", [16, 48, 64])
def test_checkpoints(every, kept, device):
    """The states inside the sequences, in order; what the call computes else does not change."""
    lengths = (100, 15, 0, 64, 129)
    problem = draw((1, 320, 2), 64, lengths=lengths, state="fp32", device=device)
    rows = sum(n // every for n in lengths)
    states = torch.full((rows, 2, 64, 64), SENTINEL, dtype=DTYPES[kept], device=device)
    out, final = problem.run(checkpoint_states=states, checkpoint_every=every)
    check(problem, out, final)
    _, _, want = problem.want(every)
    assert want.shape == states.shape
    for got, wanted in zip(states, want):
        assert rms_ratio(got, wanted) <= limit(torch.bfloat16, wanted, wanted)


def test_a_checkpoint_resumes(device):
    """A run from a checkpoint is the rest of the run that left it."""
    problem = draw((1, 192, 2), 128, state="fp32", device=device)
    states = torch.empty(1, 2, 128, 128, device=device)
    want, want_states = problem.run(checkpoint_states=states, checkpoint_every=128)
    rest = draw((1, 1, 2), 128, device=device)
    for name in ("q", "k", "v", "g", "beta"):
        setattr(rest, name, getattr(problem, name)[:, 128:])
    rest.A_log, rest.dt_bias, rest.initial_state = problem.A_log, problem.dt_bias, states
    out, final = rest.run()
    assert torch.equal(out, want[:, 128:]) and torch.equal(final, want_states)


def test_spare_checkpoint_rows_stay(device):
    problem = draw((1, 40, 1), 64, device=device)
    states = torch.full((4, 1, 64, 64), SENTINEL, device=device)
    problem.run(checkpoint_states=states, checkpoint_every=16)
    assert (states[2:] == SENTINEL).all() and (states[:2] != SENTINEL).any()


@pytest.mark.parametrize("state", ["fp32", "bf16"])
@pytest.mark.parametrize("where", ["in place", "apart"])
def test_pools(where, state, device):
    """Rows of a pool by index, other rows full of NaN; -1 starts from zero and leaves nothing."""
    lengths = (33, 20, 0, 17)
    problem = draw((1, 70, 2), 64, lengths=lengths, state=state, device=device)
    slots, initial = [6, -1, 2, 0], problem.initial_state.clone()
    problem.initial_state[1] = 0
    want, want_states = problem.run(final=state)

    pool = torch.full((7, 3, 64, 64), NAN, dtype=DTYPES[state], device=device)[:, :2]
    for slot, x in zip(slots, initial):
        if slot >= 0:
            pool[slot] = x
    final = pool if where == "in place" else torch.full_like(pool, SENTINEL)
    before = final.clone()
    problem.initial_state = pool
    indices = torch.tensor(slots, dtype=torch.int32, device=device)
    out, _ = problem.run(final=final, state_indices=indices)
    assert torch.equal(out, want)
    for slot in range(7):
        if slot in slots:
            assert torch.equal(final[slot], want_states[slots.index(slot)])
        else:
            assert (
                torch.equal(final[slot], before[slot]) or (final[slot].isnan() & before[slot].isnan()).all()
            )


def test_a_pool_for_one_of_the_states(device):
    problem = draw((2, 20, 1), 64, device=device)
    want, want_states = problem.run()
    pool = torch.full((5, 1, 64, 64), SENTINEL, device=device)
    indices = torch.tensor([3, 1], dtype=torch.int32, device=device)
    out, _ = problem.run(final=pool, state_indices=indices)
    assert torch.equal(out, want) and torch.equal(pool[[3, 1]], want_states)
    assert (pool[[0, 2, 4]] == SENTINEL).all()
    problem.initial_state = pool
    again, none = problem.run(final=None, state_indices=indices)
    assert none is None
    problem.initial_state = want_states
    assert torch.equal(again, problem.run(final=None)[0])


# ---- the oracle ------------------------------------------------------------------------------------


def test_the_oracle_by_hand():
    """One head, K = V = 2 in fp64, two tokens worked out on paper: no decay, unit keys, b = 1/2."""
    one = torch.tensor
    k = one([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)[None, :, None]
    v = one([[2.0, 4.0], [6.0, 8.0]], dtype=torch.float64)[None, :, None]
    beta = torch.zeros(1, 2, 1, dtype=torch.float64)
    out, states, kept = reference.forward(k, k, v, torch.zeros_like(k), beta, 1.0, lower_bound=0.0, every=1)
    torch.testing.assert_close(out[0, :, 0], one([[1.0, 2.0], [3.0, 4.0]]).double(), rtol=2e-6, atol=0)
    torch.testing.assert_close(states[0, 0], one([[1.0, 3.0], [2.0, 4.0]]).double(), rtol=2e-6, atol=0)
    torch.testing.assert_close(kept[0, 0], one([[1.0, 0.0], [2.0, 0.0]]).double(), rtol=2e-6, atol=0)


def test_get_workspace_size():
    assert flash_kda.get_workspace_size(8192, 96) == flash_kda.get_workspace_size(1, 1, N=3) == 0
