# SPDX-License-Identifier: MIT
"""torch.ops.flash_attn_3 and torch.compile: schemas hold, fakes agree, graphs do not break."""

import shutil

import flash_attn_interface as fa
import pytest
import torch
import torch._dynamo.testing
from cases import DTYPES

ops = torch.ops.flash_attn_3
BACKENDS = ["eager", "aot_eager"] + (["inductor"] if shutil.which("gcc") or shutil.which("clang") else [])


def int32(*x):
    return torch.tensor(x, dtype=torch.int32)


def dense(dtype="bf16", b=2, s_q=9, s_k=13, h_q=4, h_k=2, d=32):
    shapes = ((b, s_q, h_q, d), (b, s_k, h_k, d), (b, s_k, h_k, d))
    return [torch.randn(*shape).to(DTYPES[dtype]) for shape in shapes]


def packed():
    return [torch.randn(t, h, 32).bfloat16() for t, h in ((12, 4), (20, 2), (20, 2))]


CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
# The fake runs without data; the autograd check would ask for a backward.
FORWARD = ("test_schema", "test_faketensor")


def fwd_cases():
    q, k, v = dense()
    yield "dense", (q, k, v), {"num_splits": 1}
    yield "causal", (q, k, v), {"num_splits": 1, "is_causal": True, "window_size_left": 4}
    yield "fp8", dense("fp8"), {"num_splits": 1}
    yield "splits", dense(s_k=600), {"num_splits": 3}
    cu_q, cu_k = int32(0, 5, 12), int32(0, 8, 20)
    lengths = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 7, "max_seqlen_k": 12}
    yield "packed", packed(), {**lengths, "num_splits": 1}
    yield "used", (q, k, v), {"seqused_k": int32(3, 13), "seqused_q": int32(9, 9), "num_splits": 1}
    pages = [torch.randn(5, 8, 2, 32).bfloat16() for _ in range(2)]
    yield (
        "paged",
        (q, *pages),
        {"page_table": int32([0, 1], [2, 4]), "seqused_k": int32(9, 16), "num_splits": 1},
    )
    yield "out", (q, k, v), {"out": torch.empty_like(q), "num_splits": 1}
    yield "wide_v", (q, k, torch.randn(2, 13, 2, 64).bfloat16()), {"num_splits": 1}


@pytest.mark.parametrize("name", [name for name, _, _ in fwd_cases()])
def test_opcheck_fwd(name):
    args, kwargs = next((a, k) for n, a, k in fwd_cases() if n == name)
    # Of fp8 and of a given `out` torch's checker, or tracing itself, can do one half only.
    utils = {"fp8": FORWARD[1:], "out": FORWARD[:1]}.get(name, FORWARD)
    torch.library.opcheck(ops.fwd.default, tuple(args), kwargs, test_utils=utils)


@pytest.mark.parametrize("name", ["dense", "causal", "fp8", "packed", "paged", "wide_v"])
def test_opcheck_custom_op(name):
    args, kwargs = next((a, k) for n, a, k in fwd_cases() if n == name)
    rename = {"is_causal": "causal"}
    kwargs = {rename.get(n, n): x for n, x in kwargs.items()}
    utils = CHECKS[1:] if name == "fp8" else CHECKS
    torch.library.opcheck(ops._flash_attn_forward.default, tuple(args), kwargs, test_utils=utils)


def test_opcheck_helpers():
    out, lse = torch.randn(3, 2, 5, 4, 32), torch.randn(3, 2, 4, 5).transpose(2, 3)
    # Its schema returns an alias, which functionalisation refuses: the graphs below go another way.
    torch.library.opcheck(ops.fwd_combine.default, (out, lse), test_utils=FORWARD)
    torch.library.opcheck(ops.fwd_combine.default, (out, lse, None, torch.bfloat16), test_utils=FORWARD)
    torch.library.opcheck(
        ops.get_scheduler_metadata.default,
        (2, 4, 100, 4, 2, 64, 64, torch.bfloat16, int32(5, 9)),
        {"is_causal": True},
        test_utils=CHECKS,
    )


@pytest.mark.parametrize("name", [name for name, _, _ in fwd_cases() if name not in ("splits", "out")])
def test_fake_agrees(name):
    """Shapes, dtypes and strides without data are those with it."""
    args, kwargs = next((a, k) for n, a, k in fwd_cases() if n == name)
    real = ops.fwd(*args, **kwargs)
    mode = torch._subclasses.FakeTensorMode()
    with mode:

        def lift(x):
            return mode.from_tensor(x) if isinstance(x, torch.Tensor) else x

        fake = ops.fwd(*map(lift, args), **{n: lift(x) for n, x in kwargs.items()})
    for x, y in zip(fake[:2], real[:2], strict=True):
        assert (x.shape, x.dtype, x.stride(), x.device) == (y.shape, y.dtype, y.stride(), y.device)


def test_fake_rejections():
    """Section 3.3: what tracing cannot say it refuses by type."""
    q, k, v = dense()
    mode = torch._subclasses.FakeTensorMode()
    with mode:
        q, k, v = map(mode.from_tensor, (q, k, v))
        with pytest.raises(ValueError):
            fa._flash_attn_forward(q, k, v, num_splits=0)
        with pytest.raises(TypeError):
            fa._flash_attn_forward(q, k, v, out_=torch.empty_like(q))
        with pytest.raises(ValueError):
            fa._flash_attn_forward(q.flatten(0, 1), k, v, cu_seqlens_q=mode.from_tensor(int32(0, 9, 18)))


GRAPHS = {
    "func": lambda q, k, v: fa.flash_attn_func(q * 2, k, v, causal=True) + 1,
    "func_lse": lambda q, k, v: fa.flash_attn_func(q, k, v, return_attn_probs=True),
    "window": lambda q, k, v: fa.flash_attn_func(q, k, v, window_size=(4, 2), softcap=9.0, softmax_scale=0.2),
    "sinks": lambda q, k, v: fa.flash_attn_func(q, k, v, sinks=q[0, 0, :, 0].contiguous()),
    "varlen": lambda q, k, v: fa.flash_attn_varlen_func(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        int32(0, 9, 18),
        int32(0, 13, 26),
        9,
        13,
        causal=True,
    ),
    "qkvpacked": lambda q, k, v: fa.flash_attn_qkvpacked_func(
        torch.cat([q, k[:, :9], v[:, :9]], 2), num_heads_q=4
    ),
    "kvcache": lambda q, k, v: fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=int32(5, 13), num_splits=1),
    "combine": lambda q, k, v: fa.flash_attn_combine(
        torch.stack([q.float(), q.float() * 2]), torch.stack([q[..., 0].float()] * 2)
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("graph", GRAPHS)
def test_fullgraph_compile(graph, backend):
    torch._dynamo.reset()
    tensors = dense()
    want = GRAPHS[graph](*tensors)
    got = torch.compile(GRAPHS[graph], fullgraph=True, backend=backend)(*tensors)
    for x, y in zip(
        got if isinstance(got, tuple) else [got], want if isinstance(want, tuple) else [want], strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-2)


def test_dynamic_shapes_compile_once():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(GRAPHS["func"], fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for s in (9, 17, 33):
        tensors = dense(s_q=s, s_k=s + 3)
        torch.testing.assert_close(compiled(*tensors), GRAPHS["func"](*tensors))
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1], f"compiled again for another length: {frames}"


def test_lengths_compile_once():
    """max_seqlen_q and max_seqlen_k stay numbers that a graph takes, no constants of it."""

    def varlen(q, k, v, cu, longest):
        return fa.flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(varlen, fullgraph=True, backend=counter, dynamic=True)
    q, k, v = (torch.randn(45, 2, 32) for _ in range(3))
    cu, frames = int32(0, 20, 45), []
    for longest in range(25, 37):
        torch.testing.assert_close(compiled(q, k, v, cu, longest), varlen(q, k, v, cu, longest))
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1], f"compiled again for another length: {frames}"


def test_append_inside_a_graph_is_seen():
    """The op mutates its caches; a compiled step must do so too."""
    torch._dynamo.reset()

    def step(q, k_cache, v_cache, k, v, lens):
        return fa.flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=lens, causal=True, num_splits=1
        )

    q, k, v = dense(s_q=1, s_k=20)
    new = dense(s_q=1, s_k=1)[1:]
    ours, theirs = [k.clone(), v.clone()], [k.clone(), v.clone()]
    want = step(q, *ours, *new, int32(4, 9))
    try:
        got = torch.compile(step, backend="aot_eager")(q, *theirs, *new, int32(4, 9))
    except NotImplementedError as error:
        pytest.skip(f"says that it cannot be traced: {error}")
    torch.testing.assert_close(got, want)
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


def test_raw_ops_equal_functions():
    q, k, v = dense("fp32")
    want = fa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    for got in (
        ops.fwd(q, k, v, is_causal=True, num_splits=1),
        ops._flash_attn_forward(q, k, v, causal=True),
        fa._flash_attn_forward(q, k, v, causal=True),
    ):
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_under_modes():
    """Inference mode, autocast, deterministic algorithms, a default dtype: none of them matters."""
    q, k, v = dense()
    want = fa.flash_attn_func(q, k, v)
    with torch.inference_mode():
        assert torch.equal(fa.flash_attn_func(q, k, v), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fa.flash_attn_func(q, k, v), want)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(fa.flash_attn_func(q, k, v), want)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(fa.flash_attn_func(q, k, v), want)
    finally:
        torch.set_default_dtype(torch.float32)


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return fa.flash_attn_func(q, k, v, causal=True)

    tensors = dense()
    program = torch.export.export(Layer(), tuple(tensors))
    torch.testing.assert_close(program.module()(*tensors), Layer()(*tensors))
