# SPDX-License-Identifier: MIT
"""flash_attn_combine: merging the partial results of splits."""

import flash_attn_interface as fa
import pytest
import reference
import torch

INF = float("inf")
combine = fa.flash_attn_combine


def partials(n=4, b=2, s=5, h=3, d=32):
    return torch.randn(n, b, s, h, d), torch.randn(n, b, h, s).mul(3).transpose(2, 3)


@pytest.mark.parametrize("d", [1, 3, 4, 7, 8, 32, 64, 128, 200, 256, 512])
@pytest.mark.parametrize("n", [1, 2, 3, 17, 256])
def test_matches_definition(n, d):
    out_partial, lse_partial = partials(n=n, d=d)
    out, lse = combine(out_partial, lse_partial)
    want, want_lse = reference.combine(out_partial, lse_partial)
    assert out.dtype == torch.float32 and out.shape == (2, 5, 3, d)
    assert lse.shape == (2, 5, 3) and lse.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_out_dtype(dtype):
    out_partial, lse_partial = partials()
    out, _ = combine(out_partial, lse_partial, out_dtype=dtype)
    want, _ = combine(out_partial, lse_partial)
    assert out.dtype == dtype
    torch.testing.assert_close(out, want.to(dtype))
    given = torch.empty(2, 5, 3, 32, dtype=dtype)
    got, _ = combine(out_partial, lse_partial, out=given, out_dtype=dtype)
    assert got.data_ptr() == given.data_ptr()
    assert torch.equal(given, out)


def test_out_with_odd_width_is_written():
    """[R]: upstream returns a new tensor and leaves `out` alone."""
    out_partial, lse_partial = partials(d=7)
    given = torch.full((2, 5, 3, 7), 9.0)
    combine(out_partial, lse_partial, given)
    assert torch.equal(given, combine(out_partial, lse_partial)[0])


def test_out_may_be_strided():
    out_partial, lse_partial = partials()
    wide = torch.full((2, 3, 5, 40), 9.0)
    combine(out_partial, lse_partial, wide.transpose(1, 2)[..., 4:36])
    assert torch.equal(wide.transpose(1, 2)[..., 4:36], combine(out_partial, lse_partial)[0])
    assert (wide[..., :4] == 9).all() and (wide[..., 36:] == 9).all()


def test_dead_rows_and_dead_partials_are_not_read():
    out_partial, lse_partial = partials(n=3)
    lse_partial[:, 0, 0, 0] = -INF  # all dead: out 0, lse -inf
    out_partial[:, 0, 0, 0] = float("nan")
    lse_partial[1, 1, 2, 1] = -INF  # one dead: the others decide
    out_partial[1, 1, 2, 1] = float("nan")
    out, lse = combine(out_partial, lse_partial)
    assert (out[0, 0, 0] == 0).all() and lse[0, 0, 0] == -INF
    want, want_lse = reference.combine(out_partial, lse_partial)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


def test_huge_lse():
    out_partial, lse_partial = partials(n=2)
    out, lse = combine(out_partial, lse_partial + 1e4)
    want, _ = combine(out_partial, lse_partial)
    assert torch.isfinite(out).all() and torch.isfinite(lse).all()
    torch.testing.assert_close(out, want, rtol=1e-2, atol=1e-2)


def test_any_strides_of_partials():
    out_partial, lse_partial = partials()
    want = combine(out_partial, lse_partial)
    mixed = out_partial.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4)
    got = combine(mixed, lse_partial)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("shape", [(2, 0, 5, 3, 8), (2, 2, 0, 3, 8), (2, 2, 5, 0, 8)])
def test_empty(shape):
    out, lse = combine(
        torch.randn(shape), torch.randn(shape[0], shape[1], shape[3], shape[2]).transpose(2, 3)
    )
    assert out.shape == shape[1:] and lse.shape == shape[1:4]


def test_same_as_the_op():
    out_partial, lse_partial = partials()
    want = combine(out_partial, lse_partial, out_dtype=torch.bfloat16)
    got = torch.ops.flash_attn_3.fwd_combine(out_partial, lse_partial, None, torch.bfloat16)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_context_parallel_parts_merge():
    """Ranks hold every third key; their results merge to the attention over all keys."""
    torch.manual_seed(1)
    world, n, s_q = 3, 50, 20
    q, k, v = torch.randn(2, s_q, 4, 32), torch.randn(2, n, 2, 32), torch.randn(2, n, 2, 32)
    total = torch.tensor([n, n - 7], dtype=torch.int32)
    parts = []
    for rank in range(world):
        mine = [x[:, rank::world] for x in (k, v)]
        used = torch.tensor([len(range(rank, int(t), world)) for t in total], dtype=torch.int32)
        parts.append(fa.flash_attn_with_kvcache(
            q, *(x.contiguous() for x in mine), cache_seqlens=used, causal=True, return_softmax_lse=True,
            cp_world_size=world, cp_rank=rank, cp_tot_seqused_k=total,
        )[:2])  # fmt: skip
    out, _ = combine(torch.stack([o for o, _ in parts]), torch.stack([e for _, e in parts]).transpose(2, 3))
    want = fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=total, causal=True)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


BAD = {
    "out_partial rank": lambda o, s: combine(o[0], s),
    "lse_partial rank": lambda o, s: combine(o, s[0]),
    "lse_partial shape": lambda o, s: combine(o, s[:, :, :, :2]),
    "out_partial dtype": lambda o, s: combine(o.bfloat16(), s),
    "lse_partial dtype": lambda o, s: combine(o, s.double()),
    "out_partial stride": lambda o, s: combine(o.transpose(-1, -2).contiguous().transpose(-1, -2), s),
    "out_partial splits": lambda o, s: combine(torch.randn(257, 1, 1, 1, 8), torch.randn(257, 1, 1, 1)),
    "out shape": lambda o, s: combine(o, s, torch.empty(2, 5, 3, 16)),
    "out dtype": lambda o, s: combine(o, s, torch.empty(2, 5, 3, 32).bfloat16()),
    "out dtype 2": lambda o, s: combine(o, s, torch.empty(2, 5, 3, 32), torch.bfloat16),
    "out_dtype fp64": lambda o, s: combine(o, s, None, torch.float64),
    "out stride": lambda o, s: combine(o, s, torch.empty(2, 5, 32, 3).transpose(-1, -2)),
}


@pytest.mark.parametrize("name", BAD)
def test_rejected(name):
    with pytest.raises(RuntimeError, match=name.split()[0].replace("out_dtype", "out|dtype")):
        BAD[name](*partials())
