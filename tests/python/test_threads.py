# SPDX-License-Identifier: MIT
"""The same bits for any number of threads; many Python threads at once; after fork."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time

import flash_attn_interface as fa
import pytest
import torch
from cases import Case, build, entries, run

SHAPES = {
    "prefill": {"b": 2, "s_q": 300, "s_k": 300, "h_k": 2, "group": 2, "causal": True},
    "prefill_long": {"b": 1, "s_q": 700, "s_k": 700, "h_k": 1, "group": 1, "d": 128, "d_v": 128},
    "ragged": {
        "b": 4,
        "s_q": 200,
        "s_k": 250,
        "h_k": 2,
        "group": 2,
        "q_kind": "packed",
        "k_kind": "packed",
        "causal": True,
    },
    "decode": {
        "b": 1,
        "s_q": 1,
        "s_k": 4000,
        "h_k": 2,
        "group": 4,
        "k_kind": "cache",
        "k_used": True,
        "splits": 0,
    },
    "decode_paged": {
        "b": 3,
        "s_q": 1,
        "s_k": 1500,
        "h_k": 2,
        "group": 4,
        "k_kind": "paged",
        "k_used": True,
        "splits": 0,
    },
    "append": {
        "b": 3,
        "s_q": 4,
        "s_k": 500,
        "h_k": 2,
        "group": 4,
        "k_kind": "paged",
        "k_used": True,
        "new": 4,
        "rotary": 32,
        "causal": True,
    },
    "split": {"b": 1, "s_q": 200, "s_k": 900, "h_k": 2, "splits": 5},
}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_same_bits_for_any_number_of_threads(shape, dtype, threads):
    case = Case(dtype=dtype, **SHAPES[shape])
    results = []
    for n in (1, 2, 3, 7):
        threads(n)
        problem = build(case)
        out, lse = run(problem, entries(case)[-1])
        results.append((out.clone(), lse.clone(), problem.args["k"].clone()))
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            view = torch.int8
            assert torch.equal(x.contiguous().view(view), y.contiguous().view(view))


def test_set_num_threads_is_honoured(threads):
    """One thread asked for: process time does not run ahead of the clock."""
    q, k, v = (torch.randn(1, 1500, 8, 64) for _ in range(3))
    threads(1)
    fa.flash_attn_func(q, k, v)
    wall, cpu = time.perf_counter(), time.process_time()
    fa.flash_attn_func(q, k, v)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert cpu < 1.3 * wall + 0.02


def test_many_python_threads_at_once():
    """Each thread has its own problem and gets the bits that it gets alone."""
    cases = [
        Case(dtype=dtype, seed=seed, **SHAPES[shape])
        for seed, (shape, dtype) in enumerate(
            [
                ("prefill", "bf16"),
                ("ragged", "fp16"),
                ("decode", "bf16"),
                ("append", "fp32"),
                ("split", "fp8"),
            ]
        )
    ]
    alone = [run(build(case), entries(case)[-1]) for case in cases]
    failures = []

    def work(i):
        try:
            for _ in range(6):
                got = run(build(cases[i]), entries(cases[i])[-1])
                if not all(torch.equal(x, y) for x, y in zip(got, alone[i], strict=True)):
                    failures.append(f"other bits: {cases[i]}")
        except Exception as error:  # noqa: BLE001
            failures.append(repr(error))

    team = [threading.Thread(target=work, args=(i % len(cases),)) for i in range(10)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join(120)
    assert not any(thread.is_alive() for thread in team), "a thread hangs"
    assert not failures, failures[:3]


def test_errors_do_not_cross_threads():
    """The message of a failed call belongs to the thread that made it."""
    q, wrong = torch.randn(1, 5, 2, 32), [torch.randn(1, 5, 2, 40), torch.randn(1, 5, 3, 32)]
    failures = []

    def work(i):
        wish = ("40", "3 heads|multiple")[i]
        for _ in range(300):
            try:
                fa.flash_attn_func(q, wrong[i], wrong[i])
                failures.append("accepted")
            except RuntimeError as error:
                if not any(word in str(error) for word in wish.split("|")):
                    failures.append(str(error))

    team = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    assert not failures, failures[:3]


def forked(pipe, q, k, v):
    # Nothing here is large enough for torch to wake its own pool, which a child does not have.
    out, lse = fa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    pipe.send((out.numpy().tobytes(), lse.numpy().tobytes()))


def test_after_fork():
    """A child of a process whose pool has run gets the same bits, and does not hang."""
    q, k, v = (torch.randn(2, 300, 4, 64) for _ in range(3))
    out, lse = fa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    want = out.numpy().tobytes(), lse.numpy().tobytes()
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        ours, theirs = context.Pipe()
        child = context.Process(target=forked, args=(theirs, q, k, v))
        child.start()
        try:
            assert ours.poll(60), "the child hangs"
            assert ours.recv() == want
            child.join(30)
            assert child.exitcode == 0
        finally:
            child.kill()
    assert torch.equal(fa.flash_attn_func(q, k, v, causal=True), out)  # and the parent goes on


@pytest.mark.parametrize("threads_env", ["1", "2", "5"])
def test_omp_num_threads(threads_env):
    code = (
        "import torch, flash_attn_interface as fa\n"
        "g = torch.Generator().manual_seed(0)\n"
        "q, k, v = (torch.randn(1, 300, 4, 64, generator=g).bfloat16() for _ in range(3))\n"
        "print(fa.flash_attn_func(q, k, v, causal=True).view(torch.int16).long().mul(31).sum().item())"
    )
    env = {**os.environ, "OMP_NUM_THREADS": threads_env}
    got = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert got.returncode == 0, got.stderr
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 300, 4, 64, generator=g).bfloat16() for _ in range(3))
    want = fa.flash_attn_func(q, k, v, causal=True).view(torch.int16).long().mul(31).sum().item()
    assert int(got.stdout.split()[-1]) == want
