# SPDX-License-Identifier: MIT
"""flash-linear-attention (fla) as a client of flash_kda: chunk_kda by way of its dispatcher, its FlashKDA
back end with its own checks, and its naive reference beside our oracle, on CPU tensors but for one test.

fla does not import without Triton: a stub stands in for Triton while fla is imported.
"""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import flash_kda
import pytest
import torch
import triton_stub

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))

import kda_reference as reference  # noqa: E402
from kda_cases import check, draw  # noqa: E402

pytest.importorskip("fla", reason="fla-core is not installed (requirements/test.txt)")

FLAGS = {
    "use_gate_in_kernel": True,
    "use_qk_l2norm_in_kernel": True,
    "use_beta_sigmoid_in_kernel": True,
    "safe_gate": True,
    "state_v_first": True,
}


class Fla(NamedTuple):
    chunk_kda: Callable
    backend: object  # a FlashKDABackend
    naive: Callable


@pytest.fixture(scope="module")
def fla():
    import torch._dynamo  # before the stub: torch looks for Triton once
    import torch.utils._triton

    torch.utils._triton.has_triton_package()
    with triton_stub.installed(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is no GPU
        from fla.ops.kda import chunk_kda
        from fla.ops.kda.backends.flash_kda import FlashKDABackend
        from fla.ops.kda.naive import naive_recurrent_kda
    return Fla(chunk_kda, FlashKDABackend(), naive_recurrent_kda)


def arguments(problem, **more):
    """Those of chunk_kda."""
    return {
        **problem.inputs(),
        "initial_state": problem.initial_state,
        "cu_seqlens": problem.cu_seqlens,
        "output_final_state": True,
        **FLAGS,
        **more,
    }


def call(backend, problem, **more):
    """chunk_kda by the back end, once its verifier has taken the call."""
    given = arguments(problem, **more)
    taken, why = backend.chunk_kda_verifier(**given)
    assert taken, why
    return backend.chunk_kda(**given)


@pytest.mark.parametrize("state", [None, "fp32"])
@pytest.mark.parametrize("lengths", [None, (17, 0, 64, 19)], ids=["batch", "packed"])
@torch.inference_mode()
def test_back_end(fla, state, lengths):
    problem = draw((2, 40, 2) if lengths is None else (1, 100, 2), lengths=lengths, state=state)
    out, states = call(fla.backend, problem)
    assert states.dtype == torch.float32 and states.shape == problem.state_shape
    check(problem, out, states)


@torch.inference_mode()
def test_its_public_function_comes_here(fla, monkeypatch):
    """chunk_kda's dispatcher finds the package by name and takes it."""
    calls, fwd = [], flash_kda.fwd
    monkeypatch.setattr(flash_kda, "fwd", lambda *args, **kwargs: (calls.append(1), fwd(*args, **kwargs)))
    problem = draw((1, 100, 2), lengths=(17, 0, 64, 19), state="fp32")
    out, states = fla.chunk_kda(**arguments(problem))
    assert len(calls) == 1
    check(problem, out, states)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU",
)
@pytest.mark.parametrize("state", [None, "fp32"])
@pytest.mark.parametrize("lengths", [None, (17, 0, 64, 19)], ids=["batch", "packed"])
@torch.inference_mode()
def test_its_public_function_on_a_gpu(fla, monkeypatch, state, lengths):
    calls, fwd = [], flash_kda.fwd
    monkeypatch.setattr(flash_kda, "fwd", lambda *args, **kwargs: (calls.append(1), fwd(*args, **kwargs)))
    shape = (2, 40, 2) if lengths is None else (1, 100, 2)
    problem = draw(shape, lengths=lengths, state=state, device="cuda")
    out, states = fla.chunk_kda(**arguments(problem))
    assert len(calls) == 1 and out.is_cuda
    check(problem, out, states)


@torch.inference_mode()
def test_what_fla_fills_in(fla):
    """scale None, a flat dt_bias, int32 lengths, no state wanted: the same numbers."""
    problem = draw((1, 70, 2), lengths=(33, 37), index=torch.int32)
    want, _ = call(fla.backend, problem)
    out, states = call(
        fla.backend, problem, scale=None, dt_bias=problem.dt_bias.flatten(), output_final_state=False
    )
    assert torch.equal(out, want) and states is None


@torch.inference_mode()
def test_a_bf16_initial_state(fla):
    """fla asks for an fp32 final state whatever it starts from; upstream and we want one dtype."""
    with pytest.raises(RuntimeError, match="final_state"):
        call(fla.backend, draw((1, 20, 1), state="bf16"))


def test_what_its_checks_refuse(fla):
    backend, problem = fla.backend, draw((1, 20, 1))
    given = {**problem.inputs(), **FLAGS}
    assert backend.chunk_kda_verifier(**given)[0] is False  # gradients are on
    with torch.no_grad():
        assert backend.chunk_kda_verifier(**given)[0] is True
        for flag in FLAGS:
            assert backend.chunk_kda_verifier(**{**given, flag: False})[0] is False


@pytest.mark.parametrize("state", [None, "fp32"])
def test_its_naive_recurrence_agrees_with_our_oracle(fla, state):
    """In fp32, on activated inputs, with the state transposed: [K, V] there."""
    p = draw((2, 50, 3), dtype="fp32", state=state)
    want, want_states, _ = p.want()
    out, states = fla.naive(
        reference.unit(p.q),
        reference.unit(p.k),
        p.v,
        reference.log_decay(p.g, p.A_log, p.dt_bias, p.lower_bound).float(),
        p.beta.sigmoid(),
        p.scale,
        None if state is None else p.initial_state.mT,
        True,
    )
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states.mT.double(), want_states, rtol=1e-4, atol=1e-5)
