# SPDX-License-Identifier: MIT
"""flash_kda on a Hopper GPU beyond what the device fixture covers: sizes that fill the machine, the same
bits twice, replayed graphs, wild values in what only the device reads."""

import flash_kda
import libattn
import pytest
import torch
from kda_cases import draw, rms_ratio

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]
SIX = [1300, 547, 2048, 963, 271, 3063]
SHAPES = {  # lengths, heads
    "T8192 H96": ([8192], 96),
    "six H96": (SIX, 96),
    "8 x 1024 H96": ([1024] * 8, 96),
    "T8192 H64": ([8192], 64),
    "8 x 1024 H64": ([1024] * 8, 64),
    "T32768 H32": ([32768], 32),
    "16 x 4096 H32": ([4096] * 16, 32),
    "1000 x 17 H4": ([17] * 1000, 4),
    "T131072 H1": ([131072], 1),
    "over 2^31 elements": ([175000, 100], 96),
}


def large(lengths, heads):
    """Arguments of fwd, drawn on the GPU."""
    tokens, n = sum(lengths), len(lengths)
    generator = torch.Generator("cuda").manual_seed(tokens + heads)

    def randn(*size):
        return torch.randn(*size, device="cuda", generator=generator)

    q, k, v, g = (randn(1, tokens, heads, 128).bfloat16() for _ in range(4))
    return {
        "q": q,
        "k": k,
        "v": v,
        "g": g,
        "beta": randn(1, tokens, heads).bfloat16(),
        "scale": 128**-0.5,
        "A_log": torch.rand(heads, device="cuda", generator=generator),
        "dt_bias": torch.rand(heads, 128, device="cuda", generator=generator),
        "lower_bound": -5.0,
        "initial_state": randn(n, heads, 128, 128),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).cuda() if n > 1 else None,
    }


def run(call):
    out = torch.full_like(call["v"], torch.nan)
    final = torch.full_like(call["initial_state"], torch.nan)
    flash_kda.fwd(out=out, final_state=final, **call)
    return out, final


def recurrence(call, head, begin, end, sequence):
    """out [t, V] and the state [V, K] of one head of one sequence, in fp64."""
    q, k, v, g = (call[name][0, begin:end, head].double().cpu() for name in "qkvg")
    slope, bias = call["A_log"][head].double().exp().cpu(), call["dt_bias"][head].double().cpu()
    q = call["scale"] * q / (q.square().sum(-1, True) + 1e-6).sqrt()
    k = k / (k.square().sum(-1, True) + 1e-6).sqrt()
    decay = (call["lower_bound"] * torch.sigmoid(slope * (g + bias))).exp()
    b = torch.sigmoid(call["beta"][0, begin:end, head].double().cpu())
    state = call["initial_state"][sequence, head].double().cpu()
    out = torch.empty_like(v)
    for t in range(end - begin):
        state = state * decay[t]
        state = state + torch.outer(b[t] * (v[t] - state @ k[t]), k[t])
        out[t] = state @ q[t]
    return out, state


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_that_fill_the_machine(name):
    """The last sequence's last head against fp64 (its first 2048 tokens), and all bits twice."""
    lengths, heads = SHAPES[name]
    call = large(lengths, heads)
    out, final = run(call)
    again, final_again = run(call)
    assert torch.equal(out, again) and torch.equal(final, final_again)
    assert out.isfinite().all() and final.isfinite().all()
    begin = sum(lengths[:-1])
    end = min(begin + 2048, begin + lengths[-1])
    want, state = recurrence(call, heads - 1, begin, end, len(lengths) - 1)
    assert rms_ratio(out[0, begin:end, heads - 1], want) <= 0.006
    if end == begin + lengths[-1]:
        assert rms_ratio(final[-1, heads - 1], state) <= 0.006


def test_heads_are_apart():
    """A head alone gives the bits it gives among others, whichever kernel runs it."""
    call = large([300, 45, 700], 64)
    out, final = run(call)
    own = {name: call[name][:, :, 5:6].contiguous() for name in ("q", "k", "v", "g", "beta")}
    own["initial_state"] = call["initial_state"][:, 5:6].contiguous()
    own |= {name: call[name][5:6].contiguous() for name in ("A_log", "dt_bias")}
    alone, state = run({**call, **own})
    assert torch.equal(alone, out[:, :, 5:6]) and torch.equal(state, final[:, 5:6])


@pytest.mark.parametrize("heads", [2, 40])
def test_graph_replays_with_other_lengths(heads):
    call = large([300, 45, 700, 55], heads)
    out, final = torch.empty_like(call["v"]), torch.empty_like(call["initial_state"])
    flash_kda.fwd(out=out, final_state=final, **call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        flash_kda.fwd(out=out, final_state=final, **call)
    few = [0, 1, 6, 21, 1100], [0, 500, 1085, 1098, 1100]  # sequences below a chunk
    for ends in ([0, 300, 345, 1045, 1100], [0, 0, 17, 1000, 1100], [0, 1100, 1100, 1100, 1100], *few):
        call["cu_seqlens"].copy_(torch.tensor(ends))
        want, want_state = run(call)
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, want) and torch.equal(final, want_state)


def test_a_pool_beyond_2_31_elements():
    """The pool's last slot gives and takes the bits of a state of its own."""
    call = large([64, 1, 0, 100], 96)
    states = call["initial_state"]
    pool = torch.full((2**31 // states[0].numel() + 1, *states.shape[1:]), torch.nan, device="cuda")
    slots = torch.tensor([len(pool) - 1, 3, 0, len(pool) - 2], dtype=torch.int32, device="cuda")
    pool[slots.long()] = states
    want, want_states = run(call)
    out = torch.empty_like(want)
    flash_kda.fwd(out=out, final_state=pool, state_indices=slots, **{**call, "initial_state": pool})
    assert torch.equal(out, want) and torch.equal(pool[slots.long()], want_states)
    assert pool[1:3].isnan().all() and pool[4].isnan().all()


def test_wild_values_stay_inside():
    """Lengths past the tensor, falling ones and slots that are not there touch nothing outside."""
    call = large([64, 64, 64], 2)
    for ends in ([0, 64, 10**12, 192], [-(10**12), 64, 32, 192], [192, 128, 64, 0]):
        run({**call, "cu_seqlens": torch.tensor(ends, device="cuda")})
    slots = torch.tensor([7, -5, 1], dtype=torch.int32, device="cuda")
    _, final = run({**call, "state_indices": slots})
    assert final[0].isnan().all() and final[1].isfinite().all() and final[2].isnan().all()
    torch.cuda.synchronize()


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("d", [64, 128])
def test_activated_gates(d, ragged):
    """Log-decays without a bound, beta as it is: libattn.kda_fwd against its fp64 oracle on the CPU."""
    lengths, heads, every, slots = ([70, 0, 33, 160] if ragged else [90] * 3), 3, 32, 6
    n, tokens = len(lengths), sum(lengths)
    shape = (1, tokens, heads, d) if ragged else (n, 90, heads, d)
    generator = torch.Generator().manual_seed(d + ragged)
    q, k, v, g = (torch.randn(shape, generator=generator) for _ in range(4))
    g = -(g.abs() * torch.tensor([0.01, 3.0, 60.0])[:, None])  # by head: slow, fast, nothing stays
    g[:, 20] = -torch.inf
    inputs = [x.bfloat16() for x in (q, k, v, g, torch.rand(shape[:3], generator=generator))]
    more = {
        "initial_state": torch.randn(slots, heads, d, d, generator=generator),
        "final_state": torch.full((slots, heads, d, d), torch.nan),
        "state_indices": torch.tensor([4, 0, -1, 2][:n], dtype=torch.int32),
        "checkpoint_states": torch.full((sum(x // every for x in lengths), heads, d, d), torch.nan),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0) if ragged else None,
    }
    features = {"checkpoint_every": every, "gate_activated": True, "beta_activated": True}
    want = libattn.kda_fwd_ref(*inputs, d**-0.5, 0.0, **more, **features).double()
    there = {name: None if x is None else x.cuda() for name, x in more.items()}
    for name in ("final_state", "checkpoint_states"):
        there[name] = torch.full_like(there[name], torch.nan)
    out = libattn.kda_fwd(*(x.cuda() for x in inputs), d**-0.5, 0.0, **there, **features)
    assert rms_ratio(out, want) <= 0.003
    for name in ("final_state", "checkpoint_states"):
        got, state = there[name].cpu(), more[name]
        assert torch.equal(got.isnan(), state.isnan())
        assert rms_ratio(got.nan_to_num(), state.nan_to_num().double()) <= 1e-4


def test_a_step_of_each_width():
    for d in (64, 128):
        problem = draw((3, 5, 2), d, state="fp32", device="cuda")
        out, final = problem.run()
        state = problem.initial_state.clone()
        stepped = torch.empty_like(problem.v)
        flash_kda.step(out=stepped, state=state, **problem.inputs())
        assert rms_ratio(stepped, out.double().cpu()) <= 0.01
        assert rms_ratio(state, final.double().cpu()) <= 0.01
