# SPDX-License-Identifier: MIT
"""The steps of flash_mla.layer one by one; tests/clients/test_deepseek.py has whole models."""

import math
import re
from pathlib import Path

import mla_cases as cases
import pytest
import torch
from flash_mla import layer
from libattn import ArgumentError, ShapeError
from mla_cases import generator

H, D_NOPE, D_V, R = 3, 16, 24, 512


def weights(gen, dtype=torch.float64):
    w = torch.randn(H * (D_NOPE + D_V), R, generator=gen, dtype=torch.float64) / 20
    return layer.split_kv_b_proj(w.to(dtype), H, D_NOPE, D_V)


def test_absorption_is_exact():
    """q_n . (W_UK c) = ((W_UK)^T q_n) . c, and W_UV commutes with the weighted sum."""
    gen = generator(1)
    w_uk, w_uv = weights(gen)
    assert w_uk.shape == (H, D_NOPE, R) and w_uv.shape == (H, D_V, R)
    q = torch.randn(5, H, D_NOPE, generator=gen, dtype=torch.float64)
    rows = torch.randn(9, R + 64, generator=gen, dtype=torch.float64)
    k, v = layer.expand_latents(rows, w_uk, w_uv)
    assert k.shape == (9, H, D_NOPE + 64) and torch.equal(k[:, 1, D_NOPE:], rows[:, R:])
    plain = torch.einsum("shn,thn->hst", q, k[..., :D_NOPE])
    absorbed = torch.einsum("shr,tr->hst", layer.absorb_query(q, w_uk), rows[:, :R])
    torch.testing.assert_close(plain, absorbed)
    p = torch.softmax(plain, -1)
    u = torch.einsum("hst,tr->shr", p, rows[:, :R])
    torch.testing.assert_close(layer.expand_output(u, w_uv), torch.einsum("hst,thv->shv", p, v))


def test_the_rows_of_a_head_stand_together():
    w = torch.arange(H * (D_NOPE + D_V) * 2.0).view(-1, 2)
    w_uk, w_uv = layer.split_kv_b_proj(w, H, D_NOPE, D_V)
    assert torch.equal(w_uk[1], w[D_NOPE + D_V :][:D_NOPE])
    assert torch.equal(w_uv[1], w[D_NOPE + D_V :][D_NOPE : D_NOPE + D_V])
    with pytest.raises(ShapeError, match="weight: expected"):
        layer.split_kv_b_proj(w[1:], H, D_NOPE, D_V)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("counts", [[1, 1, 1], [2, 2, 2], [4, 4, 4]])
def test_both_ways_give_the_same(device, counts, dtype):
    gen = generator(len(counts), counts[0])
    d_nope, d_v = 128, 128  # what a GPU has prefill for
    w = torch.randn(H * (d_nope + d_v), R, generator=gen, dtype=torch.float64) / 20
    w_uk, w_uv = layer.split_kv_b_proj(w.to(dtype).to(device), H, d_nope, d_v)
    store = layer.PagedLatentCache(1, 30, 16, R + 64, dtype, device)
    first = store.step(dict(enumerate([40, 7, 3])))
    flat = store[0].view(-1, R + 64)
    flat[first.slots] = (cases.noise(gen, 50, R + 64, dtype=torch.float32) / 2).to(dtype).to(device)
    step = store.step(dict(enumerate(counts)))
    t = sum(counts)
    flat[step.slots] = (cases.noise(gen, t, R + 64, dtype=torch.float32) / 2).to(dtype).to(device)
    q_nope = cases.noise(gen, t, H, d_nope, dtype=torch.float32).to(dtype).to(device)
    q_rope = cases.noise(gen, t, H, 64, dtype=torch.float32).to(dtype).to(device)
    scale = layer.softmax_scale(d_nope, 64)
    one = cases.maybe_on_cuda(
        device, lambda: layer.attend_absorbed(q_nope, q_rope, store[0], w_uk, w_uv, step, scale)
    )
    rows = layer.cached_rows(store[0], step)
    two = cases.maybe_on_cuda(
        device, lambda: layer.attend_expanded(q_nope, q_rope, rows, w_uk, w_uv, step, scale)
    )
    assert one.shape == two.shape == (t, H, d_v) and one.dtype == two.dtype == dtype
    near = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(one, two, rtol=near, atol=near)


def test_rope_turns_neighbours():
    x = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    angles = torch.tensor([[math.pi / 2, math.pi]])
    got = layer.apply_rope(x, angles.cos(), angles.sin())
    torch.testing.assert_close(got, torch.tensor([[0.0, 1.0, 0.0, -1.0]]), atol=1e-6, rtol=0)


def test_rope_keeps_relative_positions():
    gen = generator(2)
    q, k = torch.randn(2, 1, 64, generator=gen)
    frequencies, gain = layer.rope_frequencies(64)
    assert gain == 1.0

    def score(i, j):
        turned = [
            layer.apply_rope(x, *layer.rope_tables(torch.tensor([at]), frequencies))
            for x, at in ((q, i), (k, j))
        ]
        return float((turned[0] * turned[1]).sum())

    assert abs(score(9, 4) - score(105, 100)) < 1e-4 and abs(score(9, 4) - score(9, 5)) > 1e-3


def test_scales():
    assert layer.softmax_scale(128, 64) == 192**-0.5
    scaling = {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0}
    m = 0.1 * math.log(40) + 1
    assert math.isclose(layer.softmax_scale(128, 64, scaling), 192**-0.5 * m * m)
    assert layer.yarn_mscale(1.0) == layer.yarn_mscale(0.5) == 1.0
    assert layer.rope_frequencies(64, rope_scaling=scaling)[1] == 1.0
    assert math.isclose(layer.rope_frequencies(64, rope_scaling={"type": "yarn", "factor": 40})[1], m)
    with pytest.raises(ArgumentError, match="rope_scaling: expected type yarn"):
        layer.rope_frequencies(64, rope_scaling={"type": "linear", "factor": 2})


def test_yarn_keeps_fast_pairs_and_slows_the_others():
    plain, _ = layer.rope_frequencies(64)
    yarn, _ = layer.rope_frequencies(64, rope_scaling={"type": "yarn", "factor": 40.0})
    assert torch.equal(yarn[:8], plain[:8])
    torch.testing.assert_close(yarn[-8:], plain[-8:] / 40)
    ratio = plain / yarn
    assert (ratio[1:] >= ratio[:-1] * 0.999).all()


@pytest.mark.parametrize("new", [9, 1])
def test_the_gradient_is_refused_and_not_lost(new):
    attention = layer.LatentAttention(64, 2, None, d_nope=16, d_v=16)
    store = layer.PagedLatentCache(1, 4, dtype=torch.float32)
    step = store.step({0: new})
    x = torch.randn(new, 64)
    tables = layer.rope_tables(step.positions, *layer.rope_frequencies(64))
    out = x + attention(x, *tables, store[0], step)
    with pytest.raises(NotImplementedError, match="gradients of attention"):
        out.sum().backward()


# ---- pages -------------------------------------------------------------------------------------------


def test_pages_are_given_as_needed_and_come_back():
    store = layer.PagedLatentCache(2, 6, 4, 8)
    step = store.step({"a": 5, "b": 4})
    assert step.new == step.total == [5, 4] and step.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert step.block_table.shape == (2, 2) and step.cache_seqlens.tolist() == [5, 4]
    assert step.last.tolist() == [4, 8] and step.offsets(step.new).tolist() == [0, 5, 9]
    assert len(set(step.slots.tolist())) == 9 and len(store.free) == 3
    step = store.step({"b": 1, "a": 3})
    assert step.total == [5, 8] and step.positions.tolist() == [4, 5, 6, 7] and len(store.free) == 2
    table = step.block_table.tolist()
    assert step.slots.tolist()[0] == table[0][1] * 4
    store.drop("a")
    assert len(store.free) == 4 and "a" not in store.lengths
    assert store.bytes_per_token == 2 * 8 * 2


@pytest.mark.parametrize("tokens", [{"a": 25}, {"a": 13, "b": 13}, {"a": 0}, {"a": -1}, {}])
def test_a_step_that_does_not_fit_changes_nothing(tokens):
    store = layer.PagedLatentCache(1, 6, 4, 8)
    with pytest.raises(ArgumentError, match="tokens: expected"):
        store.step(tokens)
    assert not store.pages and not store.lengths and len(store.free) == 6


def test_the_readme_runs():
    text = (Path(__file__).resolve().parents[2] / "python" / "flash_mla" / "README.md").read_text()
    names = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    assert names["out"].shape == (2, 1, 16, 512) and names["out"].isfinite().all()
    assert names["y"].shape == (2, 256) and names["y"].isfinite().all()
    assert names["rows"].shape == (1, 576) and names["rows"].any()
