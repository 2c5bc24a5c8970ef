# SPDX-License-Identifier: MIT
"""docs/compatibility/flash_kda.md holds: each row's word in our columns, by running the feature, and its
example.

A probe returns what was computed, all of it finite, when the word is yes, and raises when it is no.
"""

import re

import flash_kda
import flash_kda_C
import kda_cases
import pytest
import torch
from compatibility import Page

NAN = float("nan")


def draw(device, shape=(1, 40, 2), d=64, **more):
    return kda_cases.draw(shape, d, device=device, **more)


def both(device, **more):
    """out and final_state of a plain call on drawn tensors."""
    out, state = draw(device, **more).run()
    return torch.cat([out.flatten().float(), state.flatten()])


PAGE = Page("flash_kda", str)
probe = PAGE.probe


# ---- probes ------------------------------------------------------------------------------------------

probe("`flash_kda.fwd`")(lambda device: both(device))
probe("bf16")(lambda device: both(device))
probe("fp16")(lambda device: both(device, dtype="fp16"))
probe("fp32")(lambda device: both(device, dtype="fp32"))
probe("K = V = 128")(lambda device: both(device, d=128))
probe("K = V = 64")(lambda device: both(device))
probe("fp32 states")(lambda device: both(device, state="fp32"))
probe("bf16 states")(lambda device: draw(device, state="bf16").run(final="bf16")[1])
probe("fp16 states")(lambda device: draw(device).run(final="fp16")[1])
probe("states of two dtypes")(lambda device: draw(device, state="bf16").run(final="fp32")[1])
probe("`cu_seqlens` int64")(lambda device: both(device, lengths=(15, 25)))
probe("`cu_seqlens` int32")(lambda device: both(device, lengths=(15, 25), index=torch.int32))
probe("sequences without tokens")(lambda device: both(device, lengths=(0, 40, 0)))
probe("T = 0")(lambda device: both(device, shape=(2, 0, 2)))


@probe("`flash_kda.get_workspace_size`")
def workspace_size(device):
    return torch.tensor(flash_kda.get_workspace_size(100, 4, N=2))


@probe("`flash_kda_C`")
def native(device):
    p = draw(device)
    out = torch.full_like(p.v, NAN)
    flash_kda_C.fwd(**p.inputs(), out=out, workspace=torch.empty(0, dtype=torch.uint8, device=device))
    return out


@probe("`flash_kda.step`, a decode step")
def step(device):
    p = draw(device, (3, 2, 2), state="fp32")
    out = torch.full_like(p.v, NAN)
    flash_kda.step(**p.inputs(), out=out, state=p.initial_state)
    return out


@probe("more value heads than key heads")
def grouped(device):
    p, more = draw(device), draw(device, (1, 40, 4))
    p.v, p.g, p.beta, p.A_log, p.dt_bias = more.v, more.g, more.beta, more.A_log, more.dt_bias
    return p.run(final=None)[0]


@probe("state in fp32 from chunk to chunk")
def precise(device):
    """Two chunks of nothing but a slight decay change an fp32 state by what bf16 would not hold."""
    p = draw(device, (1, 128, 1), state="fp32")
    p.v.zero_(), p.beta.fill_(-300), p.g.fill_(-9)
    _, state = p.run()
    _, want, _ = p.want()
    torch.testing.assert_close(state.double().cpu(), want, rtol=1e-4, atol=1e-5)
    return state


@probe("`final_state` is `initial_state`")
def in_place(device):
    p = draw(device, state="fp32")
    _, want = p.run()
    _, state = p.run(final=p.initial_state)
    assert torch.equal(state, want)
    return state


@probe("packed inputs without a batch axis")
def three_axes(device):
    p = draw(device, lengths=(15, 25))
    p.q, p.k, p.v, p.g, p.beta = (x[0] for x in (p.q, p.k, p.v, p.g, p.beta))
    out = torch.empty_like(p.v)
    flash_kda.fwd(**p.inputs(), out=out, cu_seqlens=p.cu_seqlens)
    return out


@probe("NaN in the next sequence stays there")
def apart(device):
    p = draw(device, lengths=(15, 25))
    p.q[:, 15:] = p.k[:, 15:] = p.v[:, 15:] = p.g[:, 15:] = p.beta[:, 15:] = NAN
    out, states = p.run()
    return torch.cat([out[:, :15].flatten().float(), states[0].flatten()])


@probe("strided q, k, v, g, beta and out")
def strided(device):
    p = draw(device)
    for name in ("q", "k", "v", "g"):
        setattr(p, name, torch.stack([getattr(p, name)] * 2, 2)[:, :, 0])
    p.beta = torch.stack([p.beta] * 2, -1)[..., 0]
    return p.run(out=torch.full((1, 40, 4, 64), NAN, device=device).bfloat16()[:, :, ::2])[0]


@probe("strided states")
def strided_states(device):
    p = draw(device, (2, 40, 2), state="fp32")
    p.initial_state = torch.stack([p.initial_state] * 2, 1)[:, 0]
    return p.run(final=torch.full((4, 5, 64, 64), NAN, device=device)[::2, 1:3])[1]


@probe("`A_log=None`, `dt_bias=None`")
def absent(device):
    p = draw(device)
    p.A_log = p.dt_bias = None
    return p.run()[1]


@probe("`scale=None`")
def no_scale(device):
    p = draw(device)
    p.scale = None
    return p.run()[0]


@probe("`lower_bound` below -5")
def lower(device):
    p = draw(device)
    p.lower_bound = -6.0
    return p.run()[0]


@probe("`state_indices`, a pool of states")
def pool(device):
    p = draw(device)
    p.initial_state = torch.zeros(3, 2, 64, 64, device=device)
    p.run(final=p.initial_state, state_indices=torch.tensor([1], dtype=torch.int32, device=device))
    assert p.initial_state[1].any() and not p.initial_state[::2].any()
    return p.initial_state


@probe("`checkpoint_states`")
def checkpoints(device):
    states = torch.full((2, 2, 64, 64), NAN, device=device)
    draw(device).run(checkpoint_states=states, checkpoint_every=16)
    return states


@probe("wrong values in `cu_seqlens`")
def wrong_lengths(device):
    if device == "cuda":
        raise NotImplementedError("lengths are read on the device only")
    p = draw(device, lengths=(15, 25))
    p.cu_seqlens[1] = 99
    with pytest.raises(ValueError, match="cu_seqlens"):
        p.run(final=None)
    return p.q


@probe("`torch.compile`")
def compiled(device):
    p = draw(device)

    def layer(v):
        out = torch.empty_like(v)
        flash_kda.fwd(**{**p.inputs(), "v": v}, out=out)
        return out + 1

    torch._dynamo.reset()
    return torch.compile(layer, backend="eager")(p.v)


@probe("gradients")
def gradients(device):
    p = draw(device)
    p.v.requires_grad_()
    out, _ = p.run(out=torch.empty_like(p.v.detach()))
    out.float().sum().backward()  # out has no history: a RuntimeError
    return p.v.grad


# ---- the page ----------------------------------------------------------------------------------------


def test_a_probe_for_each_row_and_a_row_for_each_probe():
    assert PAGE.rows().keys() == PAGE.probes.keys()


@pytest.mark.parametrize("feature", PAGE.probes)
def test_our_column(feature, device):
    PAGE.check(feature, device)


def test_the_example_runs():
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE.text, re.MULTILINE | re.DOTALL)
    names = {}
    exec(compile(block, "flash_kda.md", "exec"), names)
    used = names["pool"].flatten(1).any(1).tolist()
    assert [slot for slot, any_ in enumerate(used) if any_] == [0, 2, 5]
    assert not names["out"][1].any() and all(names["out"][i].any() for i in (0, 2, 3))
