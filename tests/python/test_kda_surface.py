# SPDX-License-Identifier: MIT
"""The surface of flash_kda: names and signatures as data, calls by position and by name, modes of torch,
every rejection with its type and message, and the hand-over of MUSA tensors to MATE."""

import importlib.metadata
import inspect
import sys
import types

import flash_kda
import flash_kda_C
import libattn
import pytest
import torch
from kda_cases import SENTINEL, draw
from libattn.__main__ import NAMES, is_ours
from test_musa import Tensor

HEAD = "q, k, v, g, beta, scale, out, "
TAIL = "A_log, dt_bias, lower_bound, initial_state=None, final_state=None, cu_seqlens=None"
OURS = ", *, checkpoint_states=None, checkpoint_every=0, state_indices=None"
SIGNATURES = {
    (flash_kda, "fwd"): HEAD + TAIL + OURS,
    (flash_kda, "get_workspace_size"): "T_total, H, N=1",
    (flash_kda_C, "fwd"): HEAD + "workspace, " + TAIL,
    (flash_kda_C, "get_workspace_size"): "T_total, H, N=1",
    (flash_kda, "step"): (HEAD + "A_log, dt_bias, lower_bound, state, state_indices=None, cu_seqlens=None"),
}


@pytest.mark.parametrize("module, name", SIGNATURES, ids=lambda x: getattr(x, "__name__", x))
def test_signatures(module, name):
    assert str(inspect.signature(getattr(module, name))) == f"({SIGNATURES[module, name]})"
    assert name in module.__all__


def test_the_distribution():
    distribution = importlib.metadata.distribution("flash_kda")
    assert distribution.version == flash_kda.__version__ and is_ours(distribution)
    assert f"libattn=={libattn.__version__}" in distribution.requires
    assert NAMES["flash_kda"] == NAMES["flash_kda_C"] == "flash_kda"
    assert not hasattr(torch.ops.flash_kda, "fwd")  # upstream has no operators


@pytest.mark.parametrize("args", [(8192, 96), (1, 1, 1), (0, 0, 0)])
def test_get_workspace_size(args):
    assert flash_kda.get_workspace_size(*args) == flash_kda_C.get_workspace_size(*args) == 0


def test_get_workspace_size_wants_integers():
    for bad, name in (((None, 1), "T_total"), ((1, 1.5), "H"), ((1, 1, "2"), "N")):
        with pytest.raises(TypeError, match=f"^{name}: expected an integer, got"):
            flash_kda.get_workspace_size(*bad)


# ---- ways to call ----------------------------------------------------------------------------------


def test_by_position_and_by_name(device):
    p = draw((1, 30, 2), 64, lengths=(13, 17), state="fp32", device=device)
    want, want_state = p.run()
    out, state = torch.empty_like(p.v), torch.empty_like(p.initial_state)
    head = (p.q, p.k, p.v, p.g, p.beta, p.scale, out)
    tail = (p.A_log, p.dt_bias, -5, p.initial_state, state, p.cu_seqlens)
    assert flash_kda.fwd(*head, *tail) is None
    assert torch.equal(out, want) and torch.equal(state, want_state)
    out.zero_(), state.zero_()
    size = flash_kda_C.get_workspace_size(30, 2, N=2)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    assert flash_kda_C.fwd(*head, workspace, *tail) is None
    assert torch.equal(out, want) and torch.equal(state, want_state)


def test_numbers(device):
    """scale is float(scale); lower_bound may be any number too."""
    p = draw((1, 20, 1), 64, device=device)
    want, _ = p.run()
    p.scale, p.lower_bound = torch.tensor(64**-0.5, dtype=torch.float64), torch.tensor(-5)
    assert torch.equal(p.run()[0], want)
    p.scale, p.lower_bound = 1, -5
    p.run()


def test_under_modes_of_torch(device):
    p = draw((2, 20, 2), 64, state="fp32", device=device)
    want, want_state = p.run()
    torch.use_deterministic_algorithms(True)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast(device, dtype=torch.bfloat16):
            out, state = p.run()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(torch.float32)
    assert torch.equal(out, want) and torch.equal(state, want_state)


def test_tensors_that_require_grad(device):
    """The gradient mode is ignored, as upstream; autograd learns of what was written."""
    p = draw((2, 20, 2), 64, state="fp32", device=device)
    want, want_state = p.run()
    names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias")
    for name in names:
        setattr(p, name, torch.nn.Parameter(getattr(p, name)))
    out, final = torch.empty_like(want), torch.empty_like(want_state)
    versions = out._version, final._version
    assert p.run(out=out, final=final)[0] is out and not out.requires_grad
    assert torch.equal(out, want) and torch.equal(final, want_state)
    assert out._version > versions[0] and final._version > versions[1]


def test_step_tells_autograd_what_it_wrote(device):
    p = draw((2, 2, 2), 64, state="fp32", device=device)
    out = torch.empty_like(p.v)
    versions = out._version, p.initial_state._version
    flash_kda.step(**p.inputs(), out=out, state=p.initial_state)
    assert out._version > versions[0] and p.initial_state._version > versions[1]


def test_subclasses_and_negated_views():
    p = draw((1, 20, 1), 64, dtype="fp32", state="fp32")
    want, _ = p.run()

    class Mine(torch.Tensor):
        pass

    p.q, p.A_log = p.q.as_subclass(Mine), p.A_log.as_subclass(Mine)
    p.v, p.initial_state = torch._neg_view(-p.v), torch._neg_view(-p.initial_state)
    assert torch.equal(p.run(out=torch.empty_like(want))[0], want)
    for name in ("out", "final"):
        given = {"final": p.initial_state, "out": torch._neg_view(torch.empty_like(want))}
        with pytest.raises(RuntimeError, match="negated"):
            p.run(**{"out": torch.empty_like(want), "final": None, name: given[name]})


def test_compiled():
    """A compiled function breaks its graph at the call, and computes the same."""
    p = draw((1, 20, 1), 64)
    want, _ = p.run()

    def layer(v):
        out = torch.empty_like(v)
        given = {**p.inputs(), "v": v * 1}
        flash_kda.fwd(**given, out=out)
        return out + 0

    torch._dynamo.reset()
    assert torch.equal(torch.compile(layer, backend="eager")(p.v), want)


def test_tensors_without_memory():
    from torch._subclasses import FakeTensorMode

    p = draw((1, 20, 1), 64)
    p.q = FakeTensorMode().from_tensor(p.q)
    with pytest.raises(TypeError, match="q: .*FakeTensor"):
        p.run(out=torch.empty_like(p.v))
    p.q = p.k.to("meta")
    with pytest.raises(RuntimeError, match="meta"):
        p.run()


# ---- rejections ------------------------------------------------------------------------------------


class Call:
    """A legal call of fwd or step, from which a case changes what it is about."""

    def __init__(self, device, packed=False):
        n = {"lengths": (4, 6)} if packed else {}
        p = draw((1, 10, 2) if packed else (2, 10, 2), 64, state="fp32", device=device, **n)
        self.device = device
        self.args = {
            **p.inputs(),
            "out": torch.empty_like(p.v),
            "initial_state": p.initial_state,
            "final_state": torch.empty_like(p.initial_state),
            "cu_seqlens": p.cu_seqlens,
        }

    def __getattr__(self, name):
        return self.args[name]

    def fwd(self, **changed):
        flash_kda.fwd(**{**self.args, **changed})

    def step(self, **changed):
        args = {**self.args, **changed}
        args.setdefault("state", args.pop("initial_state"))
        args.pop("final_state")
        flash_kda.step(**args)

    def longer(self, times, rows=None):
        """The tensors of the tokens, repeated along T."""
        names = ("q", "k", "v", "g", "beta", "out")
        return {x: torch.cat([self.args[x]] * times, 1)[:, :rows] for x in names}

    def i(self, *x):
        return torch.tensor(x, dtype=torch.int32, device=self.device)

    def ones(self, *shape, dtype=torch.float32):
        return torch.ones(shape, dtype=dtype, device=self.device)


SHAPE, DTYPE, VALUE = libattn.ShapeError, libattn.DtypeError, libattn.ArgumentError
REJECTED = {
    # wrong kinds of argument
    "q None": (lambda c: c.fwd(q=None), TypeError, r"\bq\b.*None"),
    "beta None": (lambda c: c.fwd(beta=None), TypeError, r"beta.*None"),
    "out None": (lambda c: c.fwd(out=None), TypeError, r"out.*None"),
    "scale None": (lambda c: c.fwd(scale=None), TypeError, "scale.*None"),
    "scale text": (lambda c: c.fwd(scale="1"), TypeError, "scale.*str"),
    "scale of two": (lambda c: c.fwd(scale=torch.ones(2)), TypeError, "^scale: .*, got Tensor"),
    "scale beyond fp64": (lambda c: c.fwd(scale=10**5000), VALUE, "^scale: expected a number of fp64"),
    "lower_bound None": (lambda c: c.fwd(lower_bound=None), TypeError, "lower_bound.*None"),
    "list": (lambda c: c.fwd(k=[1.0]), TypeError, r"\bk\b.*list"),
    "array": (lambda c: c.fwd(v=torch.ones(2).numpy()), TypeError, r"\bv\b.*ndarray"),
    "states a number": (lambda c: c.fwd(initial_state=1.0), TypeError, "initial_state.*float"),
    "checkpoint_every a float": (
        lambda c: c.fwd(checkpoint_states=c.initial_state, checkpoint_every=16.0),
        TypeError,
        "checkpoint_every.*float",
    ),
    # dtypes
    "q float64": (lambda c: c.fwd(q=c.q.double()), DTYPE, r"\bq\b"),
    "q int8": (lambda c: c.fwd(q=c.q.char()), DTYPE, r"\bq\b"),
    "k dtype": (lambda c: c.fwd(k=c.k.half()), DTYPE, r"\bk\b"),
    "v dtype": (lambda c: c.fwd(v=c.v.float()), DTYPE, r"\bv\b"),
    "g dtype": (lambda c: c.fwd(g=c.g.float()), DTYPE, r"\bg\b"),
    "beta dtype": (lambda c: c.fwd(beta=c.beta.float()), DTYPE, "beta"),
    "out dtype": (lambda c: c.fwd(out=c.out.float()), DTYPE, "out"),
    "A_log dtype": (lambda c: c.fwd(A_log=c.A_log.double()), DTYPE, "A_log"),
    "dt_bias dtype": (lambda c: c.fwd(dt_bias=c.dt_bias.bfloat16()), DTYPE, "dt_bias"),
    "initial_state dtype": (lambda c: c.fwd(initial_state=c.initial_state.half()), DTYPE, "initial_state"),
    "final_state dtype": (lambda c: c.fwd(final_state=c.final_state.double()), DTYPE, "final_state"),
    "two state dtypes": (lambda c: c.fwd(final_state=c.final_state.bfloat16()), DTYPE, "final_state"),
    "state_indices dtype": (lambda c: c.fwd(state_indices=c.i(0, 1).long()), DTYPE, "state_indices"),
    # shapes
    "q rank": (lambda c: c.fwd(q=c.q[0]), SHAPE, r"\bq\b"),
    "q flat": (lambda c: c.fwd(q=c.q.flatten()), SHAPE, r"\bq\b"),
    "k rank": (lambda c: c.fwd(k=c.k[0]), SHAPE, r"\bk\b"),
    "k rows": (lambda c: c.fwd(k=c.k[:, :9]), SHAPE, r"\bk\b"),
    "k heads": (lambda c: c.fwd(k=c.k[:, :, :1]), SHAPE, r"\bk\b"),
    "v width": (lambda c: c.fwd(v=c.ones(2, 10, 2, 128, dtype=torch.bfloat16)), SHAPE, r"\bv\b"),
    "g batch": (lambda c: c.fwd(g=c.g[:1]), SHAPE, r"\bg\b"),
    "beta rank": (lambda c: c.fwd(beta=c.beta[..., None]), SHAPE, "beta"),
    "beta heads": (lambda c: c.fwd(beta=c.beta[:, :, :1]), SHAPE, "beta"),
    "out rows": (lambda c: c.fwd(out=c.out[:, 1:]), SHAPE, "out"),
    "width 96": (
        lambda c: c.fwd(**{x: c.ones(2, 10, 2, 96, dtype=torch.bfloat16) for x in ("q", "k", "v", "g")}),
        SHAPE,
        "64 or 128",
    ),
    "A_log shape": (lambda c: c.fwd(A_log=c.A_log[:1]), SHAPE, "A_log"),
    "A_log rank": (lambda c: c.fwd(A_log=c.A_log[None]), SHAPE, "A_log"),
    "dt_bias flat": (lambda c: c.fwd(dt_bias=c.dt_bias.flatten()), SHAPE, "dt_bias"),
    "dt_bias shape": (lambda c: c.fwd(dt_bias=c.dt_bias[:, :32]), SHAPE, "dt_bias"),
    "initial_state rank": (lambda c: c.fwd(initial_state=c.initial_state[0]), SHAPE, "initial_state"),
    "initial_state sequences": (lambda c: c.fwd(initial_state=c.initial_state[:1]), SHAPE, "initial_state"),
    "final_state width": (lambda c: c.fwd(final_state=c.final_state[..., :32]), SHAPE, "final_state"),
    "pools of two sizes": (
        lambda c: c.fwd(initial_state=c.ones(5, 2, 64, 64), state_indices=c.i(0, 1)),
        SHAPE,
        "final_state",
    ),
    "state_indices shape": (lambda c: c.fwd(state_indices=c.i(0)), SHAPE, "state_indices"),
    "last stride of q": (lambda c: c.fwd(q=c.q.transpose(2, 3).contiguous().mT), SHAPE, r"\bq\b.*stride"),
    "strides inside a state": (
        lambda c: c.fwd(initial_state=c.initial_state.mT.contiguous().mT),
        SHAPE,
        "initial_state.*stride",
    ),
    "out expanded": (lambda c: c.fwd(out=c.out[:, :1].expand(-1, 10, -1, -1)), SHAPE, "out.*stride"),
    "final_state expanded": (
        lambda c: c.fwd(final_state=c.final_state[:1].expand(2, -1, -1, -1)),
        SHAPE,
        "final_state.*stride",
    ),
    # values
    "lower_bound -5.1": (lambda c: c.fwd(lower_bound=-5.1), VALUE, "lower_bound.*-5.1"),
    "lower_bound 1": (lambda c: c.fwd(lower_bound=1), VALUE, "lower_bound"),
    "lower_bound NaN": (lambda c: c.fwd(lower_bound=float("nan")), VALUE, "lower_bound"),
    "scale inf": (lambda c: c.fwd(scale=float("inf")), VALUE, "scale"),
    "indices without states": (
        lambda c: c.fwd(initial_state=None, final_state=None, state_indices=c.i(0, 1)),
        VALUE,
        "state_indices",
    ),
    "checkpoint_every 0": (lambda c: c.fwd(checkpoint_states=c.final_state), VALUE, "checkpoint_every"),
    "checkpoint_every 8": (
        lambda c: c.fwd(checkpoint_states=c.final_state, checkpoint_every=8),
        VALUE,
        "checkpoint_every.*16.*8",
    ),
    "checkpoint_every -16": (
        lambda c: c.fwd(checkpoint_states=c.final_state, checkpoint_every=-16),
        VALUE,
        "checkpoint_every",
    ),
    "checkpoint_every alone": (lambda c: c.fwd(checkpoint_every=16), VALUE, "checkpoint_every"),
    "checkpoint_states dtype": (
        lambda c: c.fwd(checkpoint_states=c.final_state.half(), checkpoint_every=16),
        DTYPE,
        "checkpoint_states",
    ),
    "checkpoint_states width": (
        lambda c: c.fwd(checkpoint_states=c.ones(9, 2, 64, 32), checkpoint_every=16),
        SHAPE,
        "checkpoint_states",
    ),
    # step
    "step of 17": (
        lambda c: c.step(**c.longer(2, 17)),
        SHAPE,
        r"\bq\b.*16.*17",
    ),
    "step of 0": (
        lambda c: c.step(**c.longer(1, 0)),
        SHAPE,
        r"\bq\b.*16.*0",
    ),
    "step state None": (lambda c: c.step(state=None), TypeError, "state.*None"),
    "step out None": (lambda c: c.step(out=None), TypeError, "out.*None"),
    "step scale None": (lambda c: c.step(scale=None), TypeError, "scale"),
    "step state dtype": (lambda c: c.step(state=c.initial_state.half()), DTYPE, "state"),
    "step state shape": (lambda c: c.step(state=c.initial_state[:1]), SHAPE, "state"),
    "step state expanded": (
        lambda c: c.step(state=c.initial_state[:1].expand(2, -1, -1, -1)),
        SHAPE,
        "state.*stride",
    ),
}  # fmt: skip
PACKED = {
    "batch with cu_seqlens": (
        lambda c: c.fwd(**{x: torch.cat([c.args[x]] * 2) for x in ("q", "k", "v", "g", "beta", "out")}),
        SHAPE,
        "b = 1",
    ),
    "cu_seqlens int16": (lambda c: c.fwd(cu_seqlens=c.cu_seqlens.short()), DTYPE, "cu_seqlens"),
    "cu_seqlens float": (lambda c: c.fwd(cu_seqlens=c.cu_seqlens.double()), DTYPE, "cu_seqlens"),
    "cu_seqlens rank": (lambda c: c.fwd(cu_seqlens=c.cu_seqlens[None]), SHAPE, "cu_seqlens"),
    "cu_seqlens empty": (lambda c: c.fwd(cu_seqlens=c.i()), SHAPE, "cu_seqlens"),
    "cu_seqlens strided": (
        lambda c: c.fwd(cu_seqlens=c.cu_seqlens.repeat_interleave(2)[::2]),
        SHAPE,
        "cu_seqlens.*stride",
    ),
}
VALUES = {  # known on the device only, so an error on a CPU alone
    "cu_seqlens falls": (lambda c: c.fwd(cu_seqlens=c.i(0, 7, 4)), VALUE, "cu_seqlens"),
    "cu_seqlens beyond T": (lambda c: c.fwd(cu_seqlens=c.i(0, 4, 11)), VALUE, "cu_seqlens"),
    "cu_seqlens below 0": (lambda c: c.fwd(cu_seqlens=c.i(-1, 4, 10)), VALUE, "cu_seqlens"),
    "cu_seqlens huge": (
        lambda c: c.fwd(cu_seqlens=torch.tensor([0, 2**62, 10])),
        VALUE,
        "cu_seqlens",
    ),
    "state_indices beyond": (lambda c: c.fwd(state_indices=c.i(0, 2)), VALUE, "state_indices"),
    "state_indices -2": (lambda c: c.fwd(state_indices=c.i(0, -2)), VALUE, "state_indices"),
    "state_indices twice": (lambda c: c.fwd(state_indices=c.i(1, 1)), VALUE, "state_indices"),
    "too few checkpoints": (
        lambda c: c.fwd(
            cu_seqlens=None,
            initial_state=None,
            final_state=None,
            **c.longer(4),
            checkpoint_states=c.ones(1, 2, 64, 64),
            checkpoint_every=16,
        ),
        SHAPE,
        "checkpoint_states",
    ),
    "too few checkpoints, packed": (
        lambda c: c.fwd(
            cu_seqlens=c.i(0, 20, 40),
            **c.longer(4),
            checkpoint_states=c.ones(1, 2, 64, 64),
            checkpoint_every=16,
        ),
        SHAPE,
        "checkpoint_states",
    ),
    "step of 17, packed": (
        lambda c: c.step(
            cu_seqlens=c.i(0, 3, 20),
            **c.longer(2),
        ),
        None,
        "cu_seqlens|tokens",
    ),
}  # fmt: skip


def rejected(call, c, error, message):
    """The error is of its class and of RuntimeError, except for what is no tensor or number at all; the
    outputs stay as they were."""
    for name in ("out", "final_state"):
        c.args[name].fill_(SENTINEL)
    state = c.initial_state.clone()
    with pytest.raises(error or RuntimeError, match=message) as caught:
        call(c)
    assert error is TypeError or isinstance(caught.value, RuntimeError)
    assert (c.out == SENTINEL).all() and (c.final_state == SENTINEL).all()
    assert torch.equal(c.initial_state, state)


@pytest.mark.parametrize("name", REJECTED)
def test_rejected(name, device):
    call, error, message = REJECTED[name]
    rejected(call, Call(device), error, message)


@pytest.mark.parametrize("name", PACKED)
def test_rejected_packed(name, device):
    call, error, message = PACKED[name]
    rejected(call, Call(device, packed=True), error, message)


@pytest.mark.parametrize("name", VALUES)
def test_rejected_values(name):
    call, error, message = VALUES[name]
    rejected(call, Call("cpu", packed=True), error, message)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs two devices")
@pytest.mark.parametrize("name", ["k", "beta", "out", "A_log", "initial_state", "final_state", "cu_seqlens"])
def test_rejected_devices(name):
    c = Call("cuda", packed=True)
    with pytest.raises(libattn.DeviceError, match=name):
        c.fwd(**{name: c.args[name].cpu()})


WRONG = {
    "beyond T": [0, 99, 20],
    "huge": [0, 2**62, 2**63 - 1],
    "negative": [-5, -(2**62), 20],
    "falling": [20, 5, 0],
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU raises")
@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("slots", [[0, 1], [99, -7], [-(2**31), 2**31 - 1]], ids=str)
@pytest.mark.parametrize("call", ["fwd", "step"])
def test_wrong_values_on_a_gpu(call, slots, name):
    """Nobody can raise there: nothing outside the tensors is written, and the next call is right."""
    p = draw((1, 20, 2), 64, lengths=(7, 13), state="fp32", device="cuda")
    want, want_states = p.run()
    right = p.cu_seqlens
    p.cu_seqlens = torch.tensor(WRONG[name], device="cuda")
    indices = torch.tensor(slots, dtype=torch.int32, device="cuda")
    wide = torch.full((3, 20, 2, 64), SENTINEL, dtype=torch.bfloat16, device="cuda")
    pool = torch.full((6, 2, 64, 64), SENTINEL, device="cuda")
    kept = torch.full((9, 2, 64, 64), SENTINEL, device="cuda")
    given = {"out": wide[1:2], "cu_seqlens": p.cu_seqlens, "state_indices": indices}
    if call == "fwd":
        p.initial_state = pool[2:4]
        p.run(final=pool[2:4], checkpoint_states=kept[4:5], checkpoint_every=16, **given)
    else:
        flash_kda.step(**p.inputs(), **given, state=pool[2:4])
    torch.cuda.synchronize()
    for x, rows in ((wide, [0, 2]), (pool, [0, 1, 4, 5]), (kept, [0, 1, 2, 3, 5, 6, 7, 8])):
        assert (x[rows] == SENTINEL).all()
    again = draw((1, 20, 2), 64, lengths=(7, 13), state="fp32", device="cuda")
    again.cu_seqlens = right
    out, states = again.run()
    assert torch.equal(out, want) and torch.equal(states, want_states)


def test_rejected_workspace():
    c = Call("cpu")
    for workspace, error in ((None, TypeError), (torch.empty(0, device="meta"), libattn.DeviceError),
                             (torch.empty(8, 8).mT, SHAPE)):  # fmt: skip
        with pytest.raises(error, match="workspace"):
            flash_kda_C.fwd(**c.args, workspace=workspace)


# ---- MUSA ------------------------------------------------------------------------------------------

MATE = [
    *("q", "k", "v", "g", "beta", "scale", "initial_state", "output_final_state", "cu_seqlens", "A_log"),
    *("dt_bias", "lower_bound", "use_qk_l2norm_in_kernel", "output", "final_state"),
]


@pytest.fixture
def mate(monkeypatch):
    """Keywords of the calls that reached a stand-in for mate.kda.chunk_kda."""
    calls = []
    module = types.ModuleType("mate.kda")

    def chunk_kda(**keywords):
        assert keywords.keys() <= set(MATE), keywords.keys() - set(MATE)
        calls.append(keywords)
        return keywords["output"]

    module.chunk_kda = chunk_kda
    monkeypatch.setitem(sys.modules, "mate", types.ModuleType("mate"))
    monkeypatch.setitem(sys.modules, "mate.kda", module)
    return calls


NAMED = ("q", "k", "v", "g", "beta", "scale", "out", "A_log", "dt_bias", "lower_bound", "initial_state",
         "final_state", "cu_seqlens")  # fmt: skip


def test_musa(mate):
    given = {name: Tensor(name) for name in NAMED}
    assert flash_kda.fwd(**given) is None
    (got,) = mate
    assert got.pop("output") is given.pop("out")
    assert got.pop("use_qk_l2norm_in_kernel") is True and got.pop("output_final_state") is True
    assert got == given


def test_musa_by_the_native_module(mate):
    given = {name: Tensor(name) for name in NAMED}
    workspace = torch.empty(flash_kda_C.get_workspace_size(10, 2), dtype=torch.uint8)
    assert flash_kda_C.fwd(**given, workspace=workspace) is None
    assert mate[0]["output"] is given["out"]


def test_musa_defaults(mate):
    """No states wanted; absent gate parameters are zeros, as without them MATE reads g another way."""
    given = {name: Tensor(name) for name in NAMED[:10]}
    for x in given.values():
        x.device = torch.device("cpu")
    given["q"].device = types.SimpleNamespace(type="musa")
    given |= {"A_log": None, "dt_bias": None, "scale": None}
    made, zeros = [], torch.zeros

    def keep(*shape, dtype, device):
        made.append((shape, dtype, device))
        return zeros(*shape, dtype=dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "zeros", keep)
        flash_kda.fwd(**given)
    (got,) = mate
    assert got["A_log"].shape == (4,) and got["dt_bias"].shape == (4, 64)
    assert all(dtype == torch.float32 and device is given["q"].device for _, dtype, device in made)
    assert got["output_final_state"] is False and got["scale"] is None
    assert all(got[x] is None for x in ("initial_state", "final_state", "cu_seqlens"))


def test_musa_without_mate(monkeypatch):
    monkeypatch.setitem(sys.modules, "mate", None)
    monkeypatch.setitem(sys.modules, "mate.kda", None)
    with pytest.raises(ImportError, match="computed by MATE.*github.com/MooreThreads/mate"):
        flash_kda.fwd(**{name: Tensor(name) for name in NAMED})
    monkeypatch.setitem(sys.modules, "mate", types.ModuleType("mate"))
    monkeypatch.setitem(sys.modules, "mate.kda", types.ModuleType("mate.kda"))
    with pytest.raises(ImportError, match=r"kda\.chunk_kda.*0\.2\.4"):
        flash_kda.fwd(**{name: Tensor(name) for name in NAMED})


@pytest.mark.parametrize("name", ["checkpoint_states", "checkpoint_every", "state_indices"])
def test_musa_has_no_such_thing(mate, name):
    with pytest.raises(NotImplementedError, match="MATE"):
        flash_kda.fwd(**{x: Tensor(x) for x in NAMED}, **{name: 16})


def test_musa_has_no_step(mate):
    given = {x: Tensor(x) for x in NAMED[:10]}
    with pytest.raises(NotImplementedError, match="MATE"):
        flash_kda.step(**given, state=Tensor("state"))


def test_cpu_tensors_never_ask_for_mate(mate):
    draw((1, 3, 1), 64).run()
    assert not mate
