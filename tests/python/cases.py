# SPDX-License-Identifier: MIT
"""Random problems: plain settings drawn by hypothesis, tensors made from them, one call, one check.

A `Case` holds only numbers and flags, so a failing one prints as a line that can be pasted back.
`build` makes its tensors, with NaN in everything that a call must not look at: rows past the live
length, unused pages, the padding between packed sequences, table entries past the end.
"""

import os
from dataclasses import dataclass, field, fields, replace

import hypothesis
import hypothesis.strategies as st
import pytest
import reference
import torch

SEED = int(os.environ.get("ATTN_SEED", "0"))
ROUNDS = float(os.environ.get("ATTN_ROUNDS", "1"))  # multiplies the number of random cases

FP8 = torch.float8_e4m3fn
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": FP8}
WILD = [-(2**31), -1, 2**31 - 1, 10**6]  # what stands in dead entries of index tensors
SENTINEL = -7.0  # what stands in `out` before the call


@dataclass(frozen=True)
class Case:
    dtype: str = "bf16"
    b: int = 2
    s_q: int = 17  # the longest; ragged sequences are drawn below it
    s_k: int = 33
    h_k: int = 2
    group: int = 1
    d: int = 64
    d_v: int = 64
    q_kind: str = "dense"  # dense | packed
    q_used: bool = False  # seqused_q
    k_kind: str = "dense"  # dense | packed | cache | paged
    k_used: bool = False  # seqused_k
    page: int = 16
    batch_idx: bool = False
    leftpad: bool = False
    new: int = 0  # longest append, 0: none
    new_packed: bool = False
    rotary: int = 0  # rotated dims
    interleaved: bool = True
    rotary_at: bool = False  # rotary_seqlens given
    causal: bool = False
    window: tuple = (-1, -1)
    chunk: int = 0
    softcap: float = 0.0
    scale: float | None = None
    qv: bool = False
    sinks: str = ""  # dtype of the sinks, "": none
    descale: bool = False
    cp: int = 1
    splits: int = 1
    pack_gqa: bool | None = None
    strides: str = "plain"  # plain | heads_first | wide
    sharp: float = 1.0  # how far apart the scores lie
    seed: int = 0

    def __str__(self):
        plain = Case()
        set_ = [f for f in fields(self) if getattr(self, f.name) != getattr(plain, f.name)]
        return "Case(" + ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in set_) + ")"

    __repr__ = __str__

    @property
    def ragged(self):
        return self.q_kind == "packed"


@dataclass
class Problem:
    case: Case
    args: dict  # by the names of reference.forward
    tuning: dict = field(default_factory=dict)


def rounds(n):
    """Decorator: run a hypothesis test n times (times ATTN_ROUNDS) from the session's seed."""

    def wrap(test):
        test = hypothesis.settings(max_examples=max(1, int(n * ROUNDS)))(test)
        return hypothesis.seed(SEED)(test)

    return wrap


WIDTHS = [8, 16, 24, 32, 40, 64, 64, 64, 72, 80, 96, 112, 128, 128, 128, 136, 192, 256]


@st.composite
def cases(draw, **fixed):
    """Any legal combination; `fixed` settings are taken as given."""

    def pick(name, strategy):
        return fixed[name] if name in fixed else draw(strategy)

    def often(name):
        return pick(name, st.sampled_from([False, False, True]))

    dtype = pick("dtype", st.sampled_from(["bf16", "fp16", "fp32", "bf16", "fp8"]))
    step = 16 if dtype == "fp8" else 8
    widths = [x for x in WIDTHS if x % step == 0]
    d = pick("d", st.sampled_from(widths))
    d_v = pick("d_v", st.sampled_from([d, d, d, *widths]))
    k_kind = pick("k_kind", st.sampled_from(["dense", "packed", "cache", "paged", "paged"]))
    cache = k_kind in ("cache", "paged")
    length = st.one_of(
        st.integers(0, 20), st.integers(1, 150), st.sampled_from([1, 16, 64, 65, 127, 128, 129, 257, 300])
    )
    s_k = max(1, pick("s_k", length))
    s_q = (
        max(1, pick("s_q", st.one_of(length, st.just(1), st.integers(1, 8))))
        if cache
        else max(1, pick("s_q", length))
    )
    new = pick("new", st.sampled_from([0, 1, 3, 20])) if cache else 0
    if new and s_q > s_k:
        s_q = s_k  # an append needs s_q <= capacity
    causal = pick("causal", st.booleans())
    window = pick(
        "window",
        st.one_of(st.just((-1, -1)), st.just((-1, -1)), st.tuples(st.integers(-1, 40), st.integers(-1, 40))),
    )
    chunk = pick("chunk", st.sampled_from([0, 0, 0, 1, 7, 32, 64]))
    cp = pick("cp", st.sampled_from([1, 1, 1, 1, 1, 1, 3])) if cache and not new else 1
    if cp > 1:
        window, chunk = (-1, -1), 0
    rotary = (
        pick("rotary", st.sampled_from([0, *[r for r in (16, 32, 64, 128) if r <= d]]))
        if new and d >= 16
        else 0
    )
    group = pick("group", st.sampled_from([1, 1, 2, 3, 4, 8]))
    case = Case(
        dtype=dtype, b=pick("b", st.integers(1, 4)), s_q=s_q, s_k=s_k,
        h_k=pick("h_k", st.sampled_from([1, 2, 3])), group=group, d=d, d_v=d_v,
        q_kind=pick("q_kind", st.sampled_from(["dense", "packed"])), q_used=often("q_used"),
        k_kind=k_kind, k_used=bool(new) or cp > 1 or pick("k_used", st.booleans()),
        page=pick("page", st.sampled_from([1, 3, 16, 64, 256])),
        batch_idx=often("batch_idx") if cache else False,
        leftpad=often("leftpad") if cache and cp == 1 else False,
        new=new, new_packed=bool(new) and often("new_packed"),
        rotary=rotary, interleaved=pick("interleaved", st.booleans()),
        rotary_at=bool(rotary) and often("rotary_at"),
        causal=causal, window=window, chunk=chunk,
        softcap=pick("softcap", st.sampled_from([0.0, 0.0, 0.0, 1.0, 15.0, 50.0, -1.0])),
        scale=pick("scale", st.sampled_from([None, None, 0.05, 0.3])),
        qv=dtype != "fp8" and pick("qv", st.sampled_from([False] * 7 + [True])),
        sinks=pick("sinks", st.sampled_from(["", "", "", "bf16", "fp16", "fp32"])),
        descale=dtype == "fp8" and pick("descale", st.booleans()), cp=cp,
        splits=pick("splits", st.sampled_from([1, 0, 2, 3, 7])),
        pack_gqa=pick("pack_gqa", st.sampled_from([None, None, True, False])),
        strides=pick("strides", st.sampled_from(["plain", "plain", "heads_first", "wide"])),
        sharp=pick("sharp", st.sampled_from([1.0, 1.0, 4.0])),
        seed=pick("seed", st.integers(0, 2**20)),
    )  # fmt: skip
    return case if entries(case) else replace(case, sinks="", qv=False, cp=1)


def build(case, device="cpu"):
    gen = torch.Generator().manual_seed(case.seed)
    dtype = DTYPES[case.dtype]
    h_q = case.h_k * case.group

    def upto(low, high, n):
        return [int(x) for x in torch.randint(low, max(low, high) + 1, (n,), generator=gen)]

    def noise(*shape, gain=1.0):
        return (torch.randn(*shape, generator=gen) * gain).to(dtype)

    def poison(shape):
        return torch.full(shape, float("nan")).to(dtype)

    def int32(x):
        return torch.tensor(x, dtype=torch.int32)

    def wild(shape):
        at = torch.randint(0, len(WILD), shape, generator=gen)
        return torch.tensor(WILD, dtype=torch.int64)[at].to(torch.int32)

    a = {}
    b = case.b
    # Queries: lengths, then rows.  With seqused_q the storage is longer than what is live.
    q_len = upto(0 if case.q_used or case.ragged else case.s_q, case.s_q, b)
    if case.ragged:
        slack = upto(0, 3, b) if case.q_used and not case.new else [0] * b
        room = [x + y for x, y in zip(q_len, slack, strict=True)]
        a["cu_seqlens_q"] = int32([0, *torch.tensor(room).cumsum(0).tolist()])
        a["max_seqlen_q"] = max([*room, 1]) + (0 if case.new else upto(0, 2, 1)[0])
        starts = a["cu_seqlens_q"].tolist()
        q_spots = [(slice(starts[i], starts[i] + q_len[i]),) for i in range(b)]
        q_store = (sum(room),)
    else:
        q_spots = [(i, slice(0, q_len[i])) for i in range(b)]
        q_store = (b, case.s_q)
    if case.q_used:
        a["seqused_q"] = int32(q_len)

    def scatter(store, spots, lens, heads, width, gain=1.0):
        x = poison((*store, heads, width)).view(torch.uint8 if dtype == FP8 else dtype)
        for spot, n in zip(spots, lens, strict=True):
            x[spot] = noise(n, heads, width, gain=gain).view(x.dtype)
        return x.view(dtype)

    a["q"] = scatter(q_store, q_spots, q_len, h_q, case.d, case.sharp)

    # Keys: n live before the append, then the new ones.
    new_len = upto(0, case.new, b) if case.new_packed else [case.new] * b
    capacity = case.s_k
    if case.k_kind == "paged":
        capacity = -(-(case.s_k + case.new) // case.page) * case.page
    elif case.k_kind == "cache":
        capacity = case.s_k + case.new
    k_len = upto(0, case.s_k, b) if case.k_used or case.k_kind == "packed" else [capacity] * b
    if case.k_kind == "packed":
        slack = upto(0, 3, b) if case.k_used else [0] * b
        room = [x + y for x, y in zip(k_len, slack, strict=True)]
        a["cu_seqlens_k"] = int32([0, *torch.tensor(room).cumsum(0).tolist()])
        a["max_seqlen_k"] = max([*room, 1]) + upto(0, 2, 1)[0]
        starts = a["cu_seqlens_k"].tolist()
        k_spots, k_store = [(slice(starts[i], starts[i] + k_len[i]),) for i in range(b)], (sum(room),)
    else:
        rows = list(range(b))
        n_rows = b
        if case.batch_idx:
            n_rows = b + 2
            rows = torch.randperm(n_rows, generator=gen)[:b].tolist()
            a["kv_batch_idx"] = int32(rows)
        if case.k_kind == "paged":
            columns = capacity // case.page
            pool = n_rows * columns + 3
            table = torch.randperm(pool, generator=gen)[: n_rows * columns].view(n_rows, columns).int()
            live = wild((n_rows, columns))
            spots = []
            for i, row in enumerate(rows):
                pages = -(-(k_len[i] + new_len[i]) // case.page)
                live[row, :pages] = table[row, :pages]
                x = torch.arange(k_len[i])
                spots.append((live[row].long()[x // case.page], x % case.page))
            a["page_table"], k_spots, k_store = live, spots, (pool, case.page)
        else:
            k_spots, k_store = [(rows[i], slice(0, k_len[i])) for i in range(b)], (n_rows, capacity)
    if case.k_used:
        a["seqused_k"] = int32(k_len)
    a["k"] = scatter(k_store, k_spots, k_len, case.h_k, case.d)
    a["v"] = scatter(k_store, k_spots, k_len, case.h_k, case.d_v)
    if case.leftpad:
        a["leftpad_k"] = int32([upto(0, n, 1)[0] for n in k_len])
    if case.new:
        if case.new_packed:
            a["cu_seqlens_k_new"] = int32([0, *torch.tensor(new_len).cumsum(0).tolist()])
            store = (sum(new_len),)
        else:
            store = (b, case.new)
        a["k_new"], a["v_new"] = noise(*store, case.h_k, case.d), noise(*store, case.h_k, case.d_v)
    if case.rotary:
        turns = upto(0, 9, b) if case.rotary_at else k_len
        if case.rotary_at:
            a["seqlens_rotary"] = int32(turns)
        table_rows = max(capacity, max(turns) + max(case.s_q, case.new)) + 1
        angle = torch.rand(table_rows, case.rotary // 2, generator=gen) * 6.28
        a["rotary_cos"], a["rotary_sin"] = angle.cos().to(dtype), angle.sin().to(dtype)
        a["rotary_interleaved"] = case.interleaved
    if case.qv:
        a["qv"] = scatter(q_store, q_spots, q_len, h_q, case.d_v, case.sharp)
    if case.sinks:
        a["sinks"] = torch.randn(h_q, generator=gen).mul(2).to(DTYPES[case.sinks])
    if case.descale:
        for name in ("q_descale", "k_descale", "v_descale"):
            a[name] = torch.rand(b, case.h_k, generator=gen) + 0.5
    if case.cp > 1:
        rank = case.seed % case.cp
        total = [max(0, n * case.cp - upto(0, case.cp, 1)[0]) for n in k_len]
        a.update(cp_world_size=case.cp, cp_rank=rank, cp_tot_seqused_k=int32(total))
    a.update(causal=case.causal, window=case.window, attention_chunk=case.chunk, softcap=case.softcap)
    if case.scale is not None:
        a["softmax_scale"] = case.scale
    for name in ("q", "k", "v", "qv"):
        if name in a:
            a[name] = restride(a[name], case.strides)
    a = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in a.items()}
    return Problem(case, a, {"num_splits": case.splits, "pack_gqa": case.pack_gqa})


def restride(x, how):
    """The same values in other strides; the last one stays 1."""
    if how == "heads_first":
        return x.transpose(-2, -3).contiguous().transpose(-2, -3)
    if how == "wide":
        wide = x.new_empty(*x.shape[:-1], x.shape[-1] + 16)
        wide[..., : x.shape[-1]] = x
        return wide[..., : x.shape[-1]]
    return x


# ---- calls ------------------------------------------------------------------------------------


def entries(case):
    """The ways in that can say this case."""
    ways = []
    if not case.sinks and case.cp == 1:
        ways.append("op")
    if case.qv and case.scale is None:
        ways = []  # the op's default scale is another one
    cache = case.k_kind in ("cache", "paged")
    if not case.ragged and case.k_kind == "dense" and not (case.q_used or case.k_used):
        ways.append("func")
    plain_cache = not (case.batch_idx or case.leftpad or case.new)
    if case.ragged and (case.k_kind == "packed" or (case.k_kind == "paged" and case.k_used and plain_cache)):
        ways.append("varlen")
    if cache and not case.q_used:
        ways.append("kvcache")
    return ways


def run(problem, entry):
    """One call -> (out, lse).  The op gets an `out` full of SENTINEL."""
    import flash_attn_interface as fa

    a, case = dict(problem.args), problem.case
    window = a.pop("window")
    if entry == "op":
        a["is_causal"] = a.pop("causal")
        a["window_size_left"], a["window_size_right"] = window
        a["is_rotary_interleaved"] = a.pop("rotary_interleaved", False)
        a["q_v"] = a.pop("qv", None)
        q, v = a["q"], a["v"]
        kind = torch.bfloat16 if q.dtype == FP8 else q.dtype
        out = torch.full((*q.shape[:-1], v.shape[-1]), SENTINEL, dtype=kind, device=q.device)
        got = torch.ops.flash_attn_3.fwd(out=out, **a, **problem.tuning)
        assert got[0].data_ptr() == out.data_ptr() or out.numel() == 0, "out was not the tensor given"
        return out, got[1]
    a["window_size"] = window
    if entry == "func":
        return fa.flash_attn_func(**a, **problem.tuning, return_attn_probs=True)
    if entry == "varlen":
        if "cu_seqlens_k" not in a:
            a["cu_seqlens_k"] = None
            a["max_seqlen_k"] = a["page_table"].shape[1] * case.page
        return fa.flash_attn_varlen_func(**a, **problem.tuning, return_attn_probs=True)
    rename = {
        "k": "k_cache", "v": "v_cache", "k_new": "k", "v_new": "v", "kv_batch_idx": "cache_batch_idx",
        "leftpad_k": "cache_leftpad", "seqused_k": "cache_seqlens", "seqlens_rotary": "rotary_seqlens",
    }  # fmt: skip
    a = {rename.get(name, name): x for name, x in a.items()}
    return fa.flash_attn_with_kvcache(**a, **problem.tuning, return_softmax_lse=True)[:2]


def takes(case, device):
    """Whether the interface lets a device run the case; the CPU runs them all."""
    if device == "cpu":
        return True
    d, d_v = case.d, case.d_v
    small, deep = d <= 64 and d_v <= 512, 128 < d <= 192 and 96 < d_v <= 128
    if case.dtype == "fp32" or d > 256 or not (d == d_v or small or deep):
        return False
    if case.dtype == "fp8" and not (d == d_v or d_v <= 64):
        return False
    return not case.qv or (d <= 64 and d_v >= 256)


def missing(case, device):
    """What the case asks of a device and no kernel of it has; empty: all is there."""
    if device == "cpu":
        return ""
    return "fp8" if case.dtype == "fp8" else ""


def refused(what, call):
    """The call raises NotImplementedError that names `what`."""
    with pytest.raises(NotImplementedError, match=what):
        call()


def verify(case, entry=None, device="cpu"):
    """Builds, calls, compares everything that is said of the call."""
    if not takes(case, device):
        return None
    problem = build(case, device)
    entry = entry or entries(case)[0]
    if missing(case, device):
        return refused(missing(case, device), lambda: run(problem, entry))
    a = problem.args
    dtype = DTYPES[case.dtype]
    # The oracle sees copies, made before the call: an append writes the caches.
    before = {name: x.cpu().clone() if isinstance(x, torch.Tensor) else x for name, x in a.items()}
    exact = reference.forward(**before)
    low = reference.forward(**before, math=dtype)
    out, lse = run(problem, entry)
    out, lse = out.cpu(), lse.cpu()
    label = f"{case} by {entry}"
    kind = torch.bfloat16 if dtype == FP8 else dtype
    assert out.dtype == kind, f"{label}: out is {out.dtype}"
    assert out.shape == exact.out.shape, f"{label}: out is {tuple(out.shape)}, not {tuple(exact.out.shape)}"
    assert lse.is_contiguous(), f"{label}: lse is not contiguous"
    live = exact.live
    reference.assert_close(out[live], exact.out[live], low.out[live], what=f"{label}: out")
    head_live = live[None] if case.ragged else live[:, None]
    shown = lse.masked_fill(~head_live, 0.0)
    reference.assert_lse_close(shown, exact.lse.masked_fill(~head_live, 0.0), dtype, what=f"{label}: lse")
    if entry == "op":
        dead = out[~live]
        assert (dead == SENTINEL).all(), f"{label}: dead rows of out were written"
    # Nothing but the appended rows of the caches may change.
    for name, was in before.items():
        if not isinstance(was, torch.Tensor):
            continue
        now = a[name].cpu()
        want = {"k": exact.k, "v": exact.v}.get(name, was) if case.new else was
        assert same_bits(now, want, near=name == "k" and case.rotary > 0), f"{label}: {name} changed"
    return out, lse


def same_bits(x, y, near=False):
    if x.dtype == FP8:
        x, y = x.float(), y.float()
    if near:  # a rotated key may round the other way
        return torch.allclose(
            x.float(),
            y.float(),
            rtol=torch.finfo(torch.bfloat16).eps
            if x.dtype == torch.float32
            else 2 * torch.finfo(x.dtype).eps,
            atol=1e-6,
            equal_nan=True,
        )
    return bool(((x == y) | ((x != x) & (y != y))).all())
