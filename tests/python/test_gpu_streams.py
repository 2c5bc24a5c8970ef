# SPDX-License-Identifier: MIT
"""Calls of four threads at once, each on a stream of its own, give the bits that each gives alone."""

import threading

import flash_attn_interface as fa
import flash_kda
import flash_mla
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]
THREADS, CALLS = 4, 40


def randn(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda", dtype=dtype)


def ints(*values):
    return torch.tensor(values, device="cuda", dtype=torch.int32)


def prefill():
    q, k, v = (randn(1000, 4, 128) for _ in range(3))
    cu = ints(0, 300, 300, 1000)
    return lambda: fa.flash_attn_varlen_func(q, k, v, cu, cu, 700, 700, causal=True)


def decode():
    q, k, v = randn(3, 1, 16, 128), randn(200, 16, 2, 128), randn(200, 16, 2, 128)
    table, lengths = torch.randperm(200)[:180].view(3, 60).int().cuda(), ints(900, 0, 333)
    return lambda: fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, page_table=table)


def splits():
    q, k, v = randn(2, 20, 8, 64), randn(2, 3000, 2, 64), randn(2, 3000, 2, 64)
    return lambda: fa.flash_attn_func(q, k, v, causal=True, num_splits=7)


def latent():
    q, cache = randn(3, 2, 16, 576), randn(40, 64, 1, 576)
    table, lengths = torch.randperm(40)[:36].view(3, 12).int().cuda(), ints(700, 0, 65)
    meta, _ = flash_mla.get_mla_metadata()
    return lambda: flash_mla.flash_mla_with_kvcache(q, cache, table, lengths, 512, meta)[0]


def kda_inputs(b, t, h):
    a = {name: randn(b, t, h, 128) for name in "qkvg"}
    return a | {
        "beta": randn(b, t, h),
        "scale": 128**-0.5,
        "A_log": torch.rand(h, device="cuda"),
        "dt_bias": torch.rand(h, 128, device="cuda"),
        "lower_bound": -5.0,
    }


def kda():
    """Enough pairs of sequence and head to be dealt out in order."""
    a, cu = kda_inputs(1, 900, 40), ints(0, 300, 310, 700, 900)

    def call():
        out, final = torch.empty_like(a["v"]), randn(4, 40, 128, 128, dtype=torch.float32)
        flash_kda.fwd(out=out, final_state=final, cu_seqlens=cu, **a)
        return torch.cat([out.flatten().float(), final.flatten()])

    return call


def step():
    a, state = kda_inputs(5, 3, 4), randn(5, 4, 128, 128, dtype=torch.float32)

    def call():
        out, now = torch.empty_like(a["v"]), state.clone()
        flash_kda.step(out=out, state=now, **a)
        return torch.cat([out.flatten().float(), now.flatten()])

    return call


@pytest.mark.parametrize("make", [prefill, decode, splits, latent, kda, step], ids=lambda f: f.__name__)
def test_streams_and_threads(make):
    calls = [make() for _ in range(THREADS)]
    alone = [call() for call in calls]
    torch.cuda.synchronize()
    different = torch.zeros(THREADS, device="cuda", dtype=torch.int64)
    raised = []

    def work(i):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(CALLS):
                    different[i] += (calls[i]() != alone[i]).sum()
        except Exception as error:
            raised.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    torch.cuda.synchronize()
    assert not raised and different.tolist() == [0] * THREADS
