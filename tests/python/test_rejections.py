# SPDX-License-Identifier: MIT
"""Every rejected combination of arguments: the type, and a message that names it.

Rows about head dims and dtypes that a CPU takes are for CUDA only; the CPU's own bounds stand beside.
"""

import re

import flash_attn_interface as fa
import pytest
import torch
from cases import FP8

fwd = torch.ops.flash_attn_3.fwd
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="the CPU takes these")


def int32(*x, device="cpu"):
    return torch.tensor(x, dtype=torch.int32, device=device)


class Args:
    """Fresh, legal tensors for one test: a case changes what it is about."""

    def __init__(self, device):
        self.device = device
        self.dtype = torch.bfloat16

    def t(self, *shape, dtype=None):
        return torch.randn(*shape, device=self.device).to(dtype or self.dtype)

    def i(self, *x):
        return int32(*x, device=self.device)

    def make(self, *given):
        return [x if isinstance(x, torch.Tensor) else self.t(*x) for x in given]

    def func(self, q=(2, 5, 4, 64), k=(2, 9, 2, 64), v=None, **kw):
        return fa.flash_attn_func(*self.make(q, k, k if v is None else v), **kw)

    def op(self, q=(2, 5, 4, 64), k=(2, 9, 2, 64), v=None, **kw):
        return fwd(*self.make(q, k, k if v is None else v), **kw)

    def varlen(self, q=(12, 4, 64), k=(12, 2, 64), cu_q=(0, 5, 12), cu_k=(0, 5, 12), m_q=7, m_k=7, **kw):
        cu = [x if isinstance(x, torch.Tensor) else self.i(*x) for x in (cu_q, cu_k)]
        return fa.flash_attn_varlen_func(*self.make(q, k, k), *cu, m_q, m_k, **kw)

    def cache(self, q=(2, 3, 4, 64), k_cache=(2, 20, 2, 64), v_cache=None, **kw):
        made = self.make(q, k_cache, k_cache if v_cache is None else v_cache)
        return fa.flash_attn_with_kvcache(*made, **kw)

    def append(self, **kw):
        new = self.make((2, 2, 2, 64), (2, 2, 2, 64))
        return self.cache(**{"k": new[0], "v": new[1], "cache_seqlens": self.i(3, 9), **kw})

    def rotary(self, rows=30, r=32, **kw):
        table = self.t(rows, r // 2)
        return self.append(**{"rotary_cos": table, "rotary_sin": table, **kw})

    def paged(self, call="cache", **kw):
        kw = {"page_table": self.i([0, 1], [2, 3]), "cache_seqlens": self.i(5, 9), **kw}
        return getattr(self, call)(k_cache=(4, 16, 2, 64), **kw)


# name: (call, what the message must match)
REJECTED = {
    # dtypes
    "k dtype": (
        lambda a: a.func(k=a.t(2, 9, 2, 64, dtype=torch.float16), v=a.t(2, 9, 2, 64)),
        r"\bk\b.*dtype",
    ),
    "v dtype": (lambda a: a.func(v=a.t(2, 9, 2, 64, dtype=torch.float16)), r"\bv\b.*dtype"),
    "q float64": (lambda a: a.func(*[a.t(2, 5, 2, 64, dtype=torch.float64)] * 3), r"\bq\b"),
    "q int8": (lambda a: a.func(*[torch.ones(2, 5, 2, 64, dtype=torch.int8, device=a.device)] * 3), r"\bq\b"),
    "q e5m2": (lambda a: a.func(*[a.t(2, 5, 2, 64, dtype=torch.float8_e5m2)] * 3), r"\bq\b"),
    # shapes
    "heads": (lambda a: a.func(q=(2, 5, 3, 64)), "multiple|head"),
    "no kv heads": (lambda a: a.func(k=(2, 9, 0, 64)), "head"),
    "k head dim": (lambda a: a.func(k=(2, 9, 2, 32)), r"\bk\b"),
    "k and v length": (lambda a: a.func(v=(2, 8, 2, 64)), r"\bv\b"),
    "k and v heads": (lambda a: a.func(v=(2, 9, 1, 64)), r"\bv\b"),
    "q rank": (lambda a: a.func(q=(5, 4, 64)), r"\bq\b"),
    "k rank": (lambda a: a.func(k=(9, 2, 64)), r"\bk\b"),
    "v rank": (lambda a: a.func(v=(9, 2, 64)), r"\bv\b"),
    "packed rank": (lambda a: a.varlen(q=(1, 12, 4, 64)), r"\bq\b"),
    "D 59": (lambda a: a.func(q=(2, 5, 4, 59), k=(2, 9, 2, 59)), "multiple of 8"),
    "D 111": (lambda a: a.func(q=(2, 5, 4, 111), k=(2, 9, 2, 111)), "multiple of 8"),
    "Dv 60": (lambda a: a.func(v=(2, 9, 2, 60)), "multiple of 8"),
    "fp8 D 24": (lambda a: a.func(*[a.t(2, 5, 2, 24, dtype=FP8)] * 3), "multiple of 16"),
    "fp8 Dv 40": (
        lambda a: a.func(*[a.t(2, 5, 2, 64, dtype=FP8)] * 2, a.t(2, 5, 2, 40, dtype=FP8)),
        "multiple of 16",
    ),
    "D 520": (lambda a: a.func(q=(2, 5, 4, 520), k=(2, 9, 2, 520)), "512|256"),
    "Dv 520": (lambda a: a.func(v=(2, 9, 2, 520)), "512|256"),
    "D 0": (lambda a: a.func(q=(2, 5, 4, 0), k=(2, 9, 2, 0)), "head dim|multiple"),
    "batch of cache": (lambda a: a.cache(k_cache=(3, 20, 2, 64), cache_seqlens=a.i(5, 9)), "batch|rows"),
    "batch of k": (lambda a: a.func(k=(3, 9, 2, 64)), "batch|rows"),
    "rows of page_table": (lambda a: a.paged(page_table=a.i([0, 1])), "page_table"),
    "v column-major": (lambda a: a.func(v=a.t(2, 2, 64, 9).permute(0, 3, 1, 2)), r"\bv\b.*stride"),
    # index tensors
    "cu_seqlens_q int64": (lambda a: a.varlen(cu_q=a.i(0, 5, 12).long()), "cu_seqlens_q.*int32"),
    "cu_seqlens_k int64": (lambda a: a.varlen(cu_k=a.i(0, 5, 12).long()), "cu_seqlens_k.*int32"),
    "cu_seqlens_q rank": (lambda a: a.varlen(cu_q=a.i(0, 5, 12)[None]), "cu_seqlens_q"),
    "cu_seqlens_q empty": (lambda a: a.varlen(cu_q=a.i()), "cu_seqlens_q"),
    "cu_seqlens_k shape": (lambda a: a.varlen(cu_k=a.i(0, 12)), "cu_seqlens_k"),
    "seqused_q shape": (lambda a: a.varlen(seqused_q=a.i(5)), "seqused_q"),
    "seqused_k shape": (lambda a: a.varlen(seqused_k=a.i(5, 5, 5)), "seqused_k"),
    "seqused_k int64": (lambda a: a.varlen(seqused_k=a.i(5, 5).long()), "seqused_k.*int32"),
    "cache_seqlens int64": (lambda a: a.cache(cache_seqlens=a.i(5, 9).long()), "seq.*int32"),
    "cache_seqlens shape": (lambda a: a.cache(cache_seqlens=a.i(5)), "seq"),
    "page_table int64": (lambda a: a.paged(page_table=a.i([0, 1], [2, 3]).long()), "page_table.*int32"),
    "page_table rank": (lambda a: a.paged(page_table=a.i(0, 1)), "page_table"),
    "cache_batch_idx int64": (
        lambda a: a.cache(cache_seqlens=a.i(5, 9), cache_batch_idx=a.i(0, 1).long()),
        "batch_idx.*int32",
    ),
    "cache_batch_idx shape": (
        lambda a: a.cache(cache_seqlens=a.i(5, 9), cache_batch_idx=a.i(0)),
        "batch_idx",
    ),
    "cache_leftpad int64": (
        lambda a: a.cache(cache_seqlens=a.i(5, 9), cache_leftpad=a.i(0, 1).long()),
        "leftpad.*int32",
    ),
    "cache_leftpad shape": (
        lambda a: a.cache(cache_seqlens=a.i(5, 9), cache_leftpad=a.i(0, 1, 2)),
        "leftpad",
    ),
    "no max_seqlen_q": (lambda a: a.varlen(m_q=None), "max_seqlen_q"),
    "no max_seqlen_k": (lambda a: a.varlen(m_k=None), "max_seqlen_k"),
    "no max_seqlen_q in kvcache": (
        lambda a: a.cache(q=(6, 4, 64), cu_seqlens_q=a.i(0, 3, 6), cache_seqlens=a.i(5, 9)),
        "max_seqlen_q",
    ),
    "cu_seqlens_k with page_table": (
        lambda a: a.op(
            k=(4, 16, 2, 64), cu_seqlens_k=a.i(0, 5, 9), max_seqlen_k=9, page_table=a.i([0, 1], [2, 3])
        ),
        "cu_seqlens_k",
    ),
    "cu_seqlens_k with kv_batch_idx": (
        lambda a: a.op(k=(9, 2, 64), cu_seqlens_k=a.i(0, 5, 9), max_seqlen_k=9, kv_batch_idx=a.i(0, 1)),
        "cu_seqlens_k|kv_batch_idx",
    ),
    # append
    "k without v": (lambda a: a.append(v=None), r"\bv|k_new|v_new"),
    "v without k": (lambda a: a.append(k=None), r"\bk|k_new|v_new"),
    "append without cache_seqlens": (lambda a: a.append(cache_seqlens=None), "seq"),
    "more queries than capacity": (lambda a: a.append(q=(2, 21, 4, 64)), r"\bq\b|capacity"),
    "k_new dtype": (lambda a: a.append(k=a.t(2, 2, 2, 64, dtype=torch.float16)), "k_new|k:"),
    "k_new heads": (lambda a: a.append(k=a.t(2, 2, 1, 64)), "k_new|k:"),
    "v_new length": (lambda a: a.append(v=a.t(2, 3, 2, 64)), "v_new|v:"),
    "k_new batch": (lambda a: a.append(k=a.t(1, 2, 2, 64), v=a.t(1, 2, 2, 64)), "k_new|k:"),
    "cu_seqlens_k_new shape": (
        lambda a: a.append(k=a.t(4, 2, 64), v=a.t(4, 2, 64), cu_seqlens_k_new=a.i(0, 4)),
        "cu_seqlens_k_new",
    ),
    "k_new with cu_seqlens_k": (
        lambda a: a.op(
            k=(9, 2, 64),
            cu_seqlens_k=a.i(0, 5, 9),
            max_seqlen_k=9,
            k_new=a.t(2, 1, 2, 64),
            v_new=a.t(2, 1, 2, 64),
            seqused_k=a.i(2, 2),
        ),
        "cu_seqlens_k|k_new",
    ),
    # rotary
    "rotary without k": (lambda a: a.rotary(k=None, v=None), "rotary"),
    "cos without sin": (lambda a: a.rotary(rotary_sin=None), "rotary_sin"),
    "sin without cos": (lambda a: a.rotary(rotary_cos=None), "rotary_cos"),
    "rotary dtype": (lambda a: a.rotary(rotary_cos=a.t(30, 16, dtype=torch.float16)), "rotary_cos"),
    "rotary sin dtype": (lambda a: a.rotary(rotary_sin=a.t(30, 16, dtype=torch.float16)), "rotary_sin"),
    "rotary above D": (lambda a: a.rotary(r=80), "rotary"),
    "rotary not of 16": (lambda a: a.rotary(r=24), "rotary.*16"),
    "rotary shapes": (lambda a: a.rotary(rotary_sin=a.t(29, 16)), "rotary_sin"),
    "rotary table too short when paged": (lambda a: a.paged("rotary", rows=31), "rotary_cos"),
    "rotary_seqlens shape": (lambda a: a.rotary(rotary_seqlens=a.i(1)), "rotary|seqlens_rotary"),
    "rotary_seqlens int64": (lambda a: a.rotary(rotary_seqlens=a.i(1, 1).long()), "rotary.*int32"),
    # the rest
    "num_splits 257": (lambda a: a.func(num_splits=257), "num_splits"),
    "qv with fp8": (
        lambda a: a.func(*[a.t(2, 5, 2, 64, dtype=FP8)] * 3, qv=a.t(2, 5, 2, 64, dtype=FP8)),
        "qv",
    ),
    "qv dtype": (lambda a: a.func(v=(2, 9, 2, 256), qv=a.t(2, 5, 4, 256, dtype=torch.float16)), "qv"),
    "qv shape": (lambda a: a.func(v=(2, 9, 2, 256), qv=a.t(2, 5, 4, 128)), "qv"),
    "out dtype": (lambda a: a.op(out=a.t(2, 5, 4, 64, dtype=torch.float16)), "out"),
    "out shape": (lambda a: a.op(out=a.t(2, 5, 4, 32)), "out"),
    "out rank": (lambda a: a.op(out=a.t(10, 4, 64)), "out"),
    "out stride": (lambda a: a.op(out=a.t(2, 5, 64, 4).transpose(-1, -2)), "out.*stride"),
    "out expanded": (lambda a: a.op(out=a.t(1, 1, 1, 64).expand(2, 5, 4, 64)), "out.*stride"),
    "out in windows that overlap": (
        lambda a: a.op(out=a.t(1000).as_strided((2, 5, 4, 64), (320, 128, 32, 1))),
        "out.*share no memory",
    ),
    "sinks shape": (lambda a: a.func(sinks=a.t(3)), "sinks|s_aux"),
    "sinks rank": (lambda a: a.func(sinks=a.t(4, 1)), "sinks|s_aux"),
    "sinks dtype": (lambda a: a.func(sinks=torch.ones(4, dtype=torch.int32, device=a.device)), "sinks|s_aux"),
    "q_descale shape": (
        lambda a: a.func(*[a.t(2, 5, 2, 64, dtype=FP8)] * 3, q_descale=torch.ones(2, 3)),
        "q_descale",
    ),
    "v_descale dtype": (
        lambda a: a.func(*[a.t(2, 5, 2, 64, dtype=FP8)] * 3, v_descale=torch.ones(2, 2).bfloat16()),
        "v_descale",
    ),
    "cp without lengths": (lambda a: a.cache(cp_world_size=2, cp_rank=0), "cp_tot_seqused_k"),
    "cp rank": (lambda a: a.cache(cp_world_size=2, cp_rank=2, cp_tot_seqused_k=a.i(4, 4)), "cp_rank"),
    "cp with window": (
        lambda a: a.cache(cp_world_size=2, cp_rank=0, cp_tot_seqused_k=a.i(4, 4), window_size=(3, 0)),
        "cp|window",
    ),
    "cp with chunk": (
        lambda a: a.cache(cp_world_size=2, cp_rank=0, cp_tot_seqused_k=a.i(4, 4), attention_chunk=4),
        "cp|chunk",
    ),
    "scale nan": (lambda a: a.func(softmax_scale=float("nan")), "softmax_scale"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejected(name, device):
    call, message = REJECTED[name]
    with pytest.raises(RuntimeError) as caught:
        call(Args(device))
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "internal" not in str(caught.value).lower()


ASSERTED = {
    "qkvpacked without num_heads_q": lambda a: fa.flash_attn_qkvpacked_func(a.t(2, 5, 6, 64)),
    "k_cache last stride": lambda a: a.cache(
        k_cache=a.t(2, 20, 64, 2).transpose(-1, -2), v_cache=(2, 20, 2, 64)
    ),
    "v_cache last stride": lambda a: a.cache(v_cache=a.t(2, 20, 64, 2).transpose(-1, -2)),
}


@pytest.mark.parametrize("name", ASSERTED)
def test_asserted(name, device):
    with pytest.raises(AssertionError):
        ASSERTED[name](Args(device))


CUDA_ONLY = {
    "D 264": (lambda a: a.func(q=(2, 5, 4, 264), k=(2, 9, 2, 264)), "256"),
    "D and Dv": (lambda a: a.func(q=(2, 5, 4, 128), k=(2, 9, 2, 128), v=(2, 9, 2, 64)), r"\bv\b"),
    "qv with D 128": (
        lambda a: a.func(q=(2, 5, 4, 128), k=(2, 9, 2, 128), qv=a.t(2, 5, 4, 128)),
        "qv",
    ),
    "qv with Dv 128": (lambda a: a.func(v=(2, 9, 2, 128), qv=a.t(2, 5, 4, 128)), "qv"),
    "fp32": (lambda a: a.func(*[a.t(2, 5, 2, 64, dtype=torch.float32)] * 3), r"\bq\b"),
}


@cuda
@pytest.mark.gpu
@pytest.mark.parametrize("name", CUDA_ONLY)
def test_rejected_on_cuda(name):
    call, message = CUDA_ONLY[name]
    with pytest.raises(RuntimeError, match=message):
        call(Args("cuda"))


@cuda
@pytest.mark.gpu
def test_mixed_devices_on_cuda():
    a = Args("cuda")
    with pytest.raises(RuntimeError):
        a.func(k=torch.randn(2, 9, 2, 64).bfloat16())


def test_class_of_a_shape_error_is_both():
    """Code that catches the official RuntimeError and code that catches the natural type both work."""
    a = Args("cpu")
    with pytest.raises(ValueError):
        a.func(q=(2, 5, 3, 64))
    with pytest.raises(TypeError):
        a.func(v=a.t(2, 9, 2, 64, dtype=torch.float16))
    with pytest.raises(ValueError):
        a.func(num_splits=257)


def test_meta_and_non_tensors():
    a = Args("cpu")
    for bad in (None, 3, "q", [1.0], object()):
        with pytest.raises((TypeError, RuntimeError, AttributeError, NotImplementedError)):
            fa.flash_attn_func(bad, a.t(2, 9, 2, 64), a.t(2, 9, 2, 64))
        if bad is not None:
            with pytest.raises((TypeError, RuntimeError, AttributeError, NotImplementedError)):
                fa.flash_attn_varlen_func(*[a.t(5, 2, 64)] * 3, bad, bad, 5, 5)


def test_backward_rejections():
    """Where a backward exists these rows hold; until then it says that it is missing."""
    q = torch.randn(1, 5, 2, 64).bfloat16().requires_grad_()
    with pytest.raises((AssertionError, NotImplementedError)):
        fa.flash_attn_func(q, q, q, attention_chunk=4).sum().backward()
    lse, d = torch.zeros(1, 2, 5), q.detach()
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.ops.flash_attn_3.bwd(d, d, d, d, d, lse)


def test_ignored_not_rejected():
    """The last lines of table 4.2."""
    a = Args("cpu")
    a.func(softcap=-1.0)
    a.func(q_descale=torch.ones(9))
    a.op(max_seqlen_q=99, max_seqlen_k=1)  # without cu_seqlens
    a.cache(rotary_seqlens=a.i(1, 2))
    a.cache(cu_seqlens_k_new=a.i(0, 1, 2))


@pytest.mark.parametrize(
    "name, call",
    {
        "k_cache": lambda a: a.cache(k_cache=(2, 20, 3, 64)),
        "v_cache": lambda a: a.cache(v_cache=(2, 21, 2, 64)),
        "k": lambda a: a.append(k=a.t(2, 2, 1, 64)),
        "v": lambda a: a.append(v=a.t(2, 3, 2, 64)),
        "cache_seqlens": lambda a: a.cache(cache_seqlens=a.i(5, 5, 5)),
        "cache_batch_idx": lambda a: a.cache(cache_batch_idx=a.i(0, 1).long()),
        "cache_leftpad": lambda a: a.cache(cache_leftpad=a.i(0, 0, 0), cache_seqlens=a.i(5, 5)),
        "rotary_seqlens": lambda a: a.rotary(rotary_seqlens=a.i(1)),
    }.items(),
)
def test_errors_have_the_names_that_the_cache_function_has(name, call, device):
    with pytest.raises(RuntimeError, match=rf"\b{name}\b(?!_)") as caught:
        call(Args(device))
    for other in ("seqused_k", "k_new", "v_new", "kv_batch_idx", "leftpad_k", "seqlens_rotary"):
        assert other not in str(caught.value).replace("cu_seqlens_k_new", "")


def test_the_plain_cache_call_has_its_names_too(device):
    """What goes straight to libattn, with an error that is not about a shape."""
    a = Args(device)
    with pytest.raises(RuntimeError, match="^cache_seqlens: expected dtype int32"):
        a.cache(cache_seqlens=a.i(5, 5).long())
    with pytest.raises(RuntimeError, match="^k_cache: expected dtype"):
        a.cache(cache_seqlens=a.i(5, 5), k_cache=a.t(2, 20, 2, 64).double())


@pytest.mark.parametrize("window", [5, (1, 2, 3), "ab", (), (1.5, 0), (0, float("nan")), ("1", 2)])
def test_a_window_that_is_no_pair_of_integers(window, device):
    with pytest.raises(RuntimeError, match="^window_size"):
        Args(device).func(window_size=window)


def test_what_is_no_tensor_is_named(device):
    with pytest.raises(TypeError, match="cache_seqlens: expected a tensor or None, got str"):
        Args(device).cache(cache_seqlens="five")
    with pytest.raises(TypeError, match="cache_seqlens: expected a tensor, got str"):
        fa.get_scheduler_metadata(1, 1, 1, 1, 1, 64, "five")
    with pytest.raises(TypeError, match="v: expected a tensor, got None"):
        fa.flash_attn_func(*Args(device).make((2, 5, 4, 64), (2, 9, 2, 64)), None)
    with pytest.raises(TypeError, match="qkv: expected a tensor, got NoneType"):
        fa.flash_attn_qkvpacked_func(None)
    partial, lse = torch.ones(3, 2, 5, 4, 32, device=device), torch.ones(3, 2, 5, 4, device=device)
    with pytest.raises(TypeError, match="lse_partial: expected a tensor, got list"):
        fa.flash_attn_combine(partial, [lse])
    with pytest.raises(TypeError, match="out: expected a tensor, got int"):
        fa.flash_attn_combine(partial, lse, 3)


@pytest.mark.parametrize("longest", [float("inf"), float("nan"), "five", [5], "7", 7.5])
def test_a_longest_length_that_is_no_integer_is_named(longest, device):
    a = Args(device)
    cu = {"cu_seqlens_q": a.i(0, 5, 12), "cu_seqlens_k": a.i(0, 5, 12), "max_seqlen_k": 7}
    q, k = a.make((12, 4, 64), (12, 2, 64))
    for call in (
        lambda: a.varlen(m_q=longest),
        lambda: a.varlen(q=q.clone().requires_grad_(), m_q=longest),
        lambda: fa._flash_attn_forward(q, k, k, **cu, max_seqlen_q=longest),
    ):
        with pytest.raises(TypeError, match="max_seqlen_q: expected an integer, got"):
            call()


@pytest.mark.parametrize("positions", [-1, 2**31, 2**70])
def test_a_cache_length_beyond_32_bits_is_named(positions, device):
    with pytest.raises(ValueError, match="^cache_seqlens: expected in"):
        Args(device).cache(cache_seqlens=positions)


@pytest.mark.parametrize("out_dtype", [torch.float64, torch.int32, 0, "float"])
def test_an_out_dtype_that_combine_cannot_write_is_named(out_dtype):
    with pytest.raises(TypeError, match="^out_dtype: expected fp32, fp16, bf16 or None, got"):
        fa.flash_attn_combine(torch.ones(3, 2, 5, 4, 32), torch.ones(3, 2, 5, 4), out_dtype=out_dtype)
