# SPDX-License-Identifier: MIT
"""PyTorch's own FlashAttention-3 hook, torch.nn.attention._fa3: the calls it makes of our ops.

Its registry puts kernels under the CUDA key only, so SDPA itself is tested where there is a CUDA
device; on the CPU the functions behind the registry are called directly.
"""

import pytest
import torch
import torch.nn.functional as F

fa3 = pytest.importorskip("torch.nn.attention._fa3", reason="this torch has no FA3 hook")


@pytest.fixture(autouse=True)
def imported():
    fa3._fa3_import_module("flash_attn_interface")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_dense(dtype, causal):
    q, k, v = (torch.randn(2, h, 30, 64).to(dtype) for h in (4, 4, 4))
    out = torch.empty_like(q)
    got, lse = fa3._fa3_run_forward(
        *(x.transpose(1, 2) for x in (q, k, v)), None, None, 30, 30, None, causal, None, None, None,
        out=out.transpose(1, 2),
    )  # fmt: skip
    assert got.data_ptr() == out.data_ptr() and lse.shape == (2, 4, 30)
    torch.testing.assert_close(
        out, F.scaled_dot_product_attention(q, k, v, is_causal=causal), rtol=2e-2, atol=2e-2
    )


def test_ragged_and_paged():
    q, k, v = (torch.randn(30, h, 64).bfloat16() for h in (4, 2, 2))
    cu = torch.tensor([0, 12, 30], dtype=torch.int32)
    got, lse = fa3._fa3_run_forward(q, k, v, cu, cu, 18, 18, 0.1, True, -1, 0, None)
    assert got.shape == q.shape and lse.shape == (4, 30)
    for a, b in ((0, 12), (12, 30)):
        x, y, z = (t[a:b].transpose(0, 1)[None] for t in (q, k, v))
        want = F.scaled_dot_product_attention(x, y, z, is_causal=True, scale=0.1, enable_gqa=True)[
            0
        ].transpose(0, 1)
        torch.testing.assert_close(got[a:b], want, rtol=2e-2, atol=2e-2)
    table = torch.tensor([[1, 0, 3], [2, 4, 5]], dtype=torch.int32)
    pages = [torch.randn(6, 8, 2, 64).bfloat16() for _ in range(2)]
    used = torch.tensor([17, 24], dtype=torch.int32)
    got, _ = fa3._fa3_run_forward(
        q, *pages, cu, None, 18, 24, 0.1, False, -1, -1, used, block_table=table, num_splits=1
    )
    for i, (a, b) in enumerate(((0, 12), (12, 30))):
        x = q[a:b].transpose(0, 1)[None]
        y, z = (t[table[i].long()].flatten(0, 1)[: used[i]].transpose(0, 1)[None] for t in pages)
        want = F.scaled_dot_product_attention(x, y, z, scale=0.1, enable_gqa=True)[0].transpose(0, 1)
        torch.testing.assert_close(got[a:b], want, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the registry's kernels are for CUDA only")
def test_sdpa_through_the_registry():
    q, k, v = (torch.randn(2, 4, 30, 64, device="cuda").bfloat16() for _ in range(3))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    handle = fa3.register_flash_attention_fa3()
    try:
        torch.testing.assert_close(
            F.scaled_dot_product_attention(q, k, v, is_causal=True), want, rtol=2e-2, atol=2e-2
        )
    finally:
        handle.remove()
