# SPDX-License-Identifier: MIT
"""The surface of flash_attn_3: names, signatures and schemas as data, returned shapes, conversions,
gradients, tracing, ownership of the import names, and what an import costs."""

import importlib.metadata
import importlib.util
import inspect
import os
import subprocess
import sys

import flash_attn_config
import flash_attn_interface as fa
import libattn
import pytest
import torch

ops = torch.ops.flash_attn_3

EXTENSIONS = "sinks=None, s_aux=None, cp_world_size=1, cp_rank=0, cp_tot_seqused_k=None"
SIGNATURES = {
    "flash_attn_func": (
        "q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, "
        "v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, "
        "pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False, *, "
        f"{EXTENSIONS}, return_softmax_lse=False"
    ),
    "flash_attn_varlen_func": (
        "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, "
        "seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, "
        "v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, "
        "pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False, *, "
        f"{EXTENSIONS}, return_softmax_lse=False, page_table=None, block_table=None, "
        "scheduler_metadata=None, out=None"
    ),
    "flash_attn_qkvpacked_func": (
        "qkv, softmax_scale=None, causal=False, q_descale=None, k_descale=None, v_descale=None, "
        "window_size=(-1, -1), attention_chunk=0, softcap=0.0, deterministic=False, "
        "num_heads_q=None, sm_margin=0, return_attn_probs=False"
    ),
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, "
        "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None, "
        "cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None, "
        "q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True, "
        "scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, "
        f"return_softmax_lse=False, *, {EXTENSIONS}"
    ),
    "flash_attn_combine": "out_partial, lse_partial, out=None, out_dtype=None",
    "get_scheduler_metadata": (
        "batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens, "
        "qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, cu_seqlens_k_new=None, "
        "cache_leftpad=None, page_size=None, max_seqlen_k_new=0, causal=False, "
        "window_size=(-1, -1), attention_chunk=0, has_softcap=False, num_splits=0, pack_gqa=None, "
        "sm_margin=0"
    ),
    "_flash_attn_forward": (
        "q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None, "
        "cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, "
        "max_seqlen_k=None, page_table=None, kv_batch_idx=None, leftpad_k=None, rotary_cos=None, "
        "rotary_sin=None, seqlens_rotary=None, q_descale=None, k_descale=None, v_descale=None, "
        "softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, "
        "attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, "
        "num_splits=1, pack_gqa=None, sm_margin=0"
    ),
    "_flash_attn_backward": (
        "dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, "
        "sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, "
        "softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1, "
        "softcap=0.0, deterministic=False, sm_margin=0"
    ),
}
SCHEMAS = {
    "fwd": (
        "(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, "
        "Tensor? q_v=None, Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, "
        "Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, "
        "Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
        "Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, "
        "Tensor? rotary_cos=None, Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, "
        "Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None, "
        "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
        "int window_size_right=-1, int attention_chunk=0, float softcap=0., "
        "bool is_rotary_interleaved=False, Tensor? scheduler_metadata=None, int num_splits=0, "
        "bool? pack_gqa=None, int sm_margin=0) -> (Tensor(out!), Tensor, Tensor, Tensor)"
    ),
    "bwd": (
        "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
        "Tensor(dq!)? dq=None, Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, "
        "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? seqused_q=None, "
        "Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
        "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
        "int window_size_right=-1, float softcap=0., bool deterministic=False, int sm_margin=0) -> "
        "(Tensor(dq!), Tensor(dk!), Tensor(dv!), Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "fwd_combine": (
        "(Tensor out_partial, Tensor lse_partial, Tensor(out!)? out=None, "
        "ScalarType? out_dtype=None) -> (Tensor(out!), Tensor)"
    ),
    "get_scheduler_metadata": (
        "(int batch_size, int max_seqlen_q, int max_seqlen_k, int num_heads, int num_heads_k, "
        "int headdim, int headdim_v, ScalarType qkv_dtype, Tensor seqused_k, "
        "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
        "Tensor? seqused_q=None, Tensor? leftpad_k=None, int? page_size=None, "
        "int max_seqlen_k_new=0, bool is_causal=False, int window_size_left=-1, "
        "int window_size_right=-1, int attention_chunk=0, bool has_softcap=False, "
        "int num_splits=0, bool? pack_gqa=None, int sm_margin=0) -> Tensor"
    ),
}
FLAGS = (
    "DISABLE_BACKWARD DISABLE_SPLIT DISABLE_PAGEDKV DISABLE_APPENDKV DISABLE_LOCAL DISABLE_SOFTCAP "
    "DISABLE_PACKGQA DISABLE_FP16 DISABLE_FP8 DISABLE_VARLEN DISABLE_CLUSTER DISABLE_HDIM64 "
    "DISABLE_HDIM96 DISABLE_HDIM128 DISABLE_HDIM192 DISABLE_HDIM256 DISABLE_SM8x ENABLE_VCOLMAJOR"
)
B, S_Q, S_K, H, H_K, D = 2, 5, 9, 4, 2, 16


def dense(dtype=torch.bfloat16, d_v=D, **kwargs):
    return (
        torch.randn(B, S_Q, H, D, **kwargs).to(dtype),
        torch.randn(B, S_K, H_K, D, **kwargs).to(dtype),
        torch.randn(B, S_K, H_K, d_v, **kwargs).to(dtype),
    )


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


# ---- names and signatures ------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    function = getattr(fa, name)
    assert inspect.isfunction(function)
    assert str(inspect.signature(function)) == f"({SIGNATURES[name]})"


@pytest.mark.parametrize("name", SIGNATURES)
def test_functions_are_documented(name):
    assert len(getattr(fa, name).__doc__) > 40


def test_no_function_takes_dropout():
    assert not any("dropout_p" in inspect.signature(getattr(fa, name)).parameters for name in SIGNATURES)


def test_submodule_has_the_same_objects():
    from flash_attn_3 import flash_attn_config as sub_config
    from flash_attn_3 import flash_attn_interface as sub

    names = [*SIGNATURES, "FlashAttnFunc", "FlashAttnVarlenFunc", "FlashAttnQKVPackedFunc"]
    assert all(getattr(sub, name) is getattr(fa, name) for name in names)
    assert sub_config.CONFIG is flash_attn_config.CONFIG


def test_star_import_gives_the_public_functions():
    names = {}
    exec("from flash_attn_interface import *", names)
    assert {name for name in SIGNATURES if name[0] != "_"} <= names.keys()


@pytest.mark.parametrize("name", ["FlashAttnFunc", "FlashAttnVarlenFunc", "FlashAttnQKVPackedFunc"])
def test_autograd_classes(name):
    assert issubclass(getattr(fa, name), torch.autograd.Function)


def test_build_flags():
    flags = flash_attn_config.CONFIG["build_flags"]
    names = [f"FLASHATTENTION_{flag}" for flag in FLAGS.split()]
    names += ["FLASH_ATTENTION_DISABLE_HDIMDIFF64", "FLASH_ATTENTION_DISABLE_HDIMDIFF192"]
    assert sorted(flags) == sorted(names)
    assert all(type(value) is bool for value in flags.values())


def test_show(capsys):
    flash_attn_config.show()
    assert "FLASHATTENTION_DISABLE_VARLEN" in capsys.readouterr().out


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name):
    assert str(getattr(ops, name).default._schema) == f"flash_attn_3::{name}{SCHEMAS[name]}"


@pytest.mark.parametrize("name", ["_flash_attn_forward", "_flash_attn_backward"])
def test_custom_operators_take_the_functions_arguments(name):
    schema = getattr(ops, name).default._schema
    parameters = inspect.signature(getattr(fa, name)).parameters.values()
    assert [a.name for a in schema.arguments] == [p.name for p in parameters]
    for argument, parameter in zip(schema.arguments, parameters, strict=True):
        if parameter.default is not parameter.empty:
            assert argument.default_value == parameter.default


@pytest.mark.parametrize("name", [*SCHEMAS, "_flash_attn_forward", "_flash_attn_backward"])
@pytest.mark.parametrize("key", ["CPU", "CUDA", "Meta"])
def test_operators_have_kernels(name, key):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"flash_attn_3::{name}", key)


def test_distribution_owns_the_modules():
    owners = importlib.metadata.packages_distributions()
    for module in ("flash_attn_interface", "flash_attn_config", "flash_attn_3"):
        names = [name.replace("_", "-") for name in owners.get(module, [])]
        assert names == ["flash-attn-3"]
    import flash_attn_3

    assert flash_attn_3.__version__ == importlib.metadata.version("flash_attn_3")
    assert flash_attn_3.__version__.startswith("3.")


def test_no_flash_attn():
    found = importlib.metadata.packages_distributions().get("flash_attn", [])
    assert not any("attn-3" in name.replace("_", "-") for name in found)
    assert found or importlib.util.find_spec("flash_attn") is None


# ---- returned tuples ---------------------------------------------------------------------------------


def shapes(result):
    return [tuple(x.shape) for x in result]


@pytest.mark.parametrize("flag", ["return_attn_probs", "return_softmax_lse"])
@pytest.mark.parametrize("d_v", [16, 32])
def test_dense_returns(flag, d_v):
    q, k, v = dense(d_v=d_v)
    out = fa.flash_attn_func(q, k, v)
    assert isinstance(out, torch.Tensor) and out.is_contiguous() and out.dtype == q.dtype
    out2, lse = fa.flash_attn_func(q, k, v, **{flag: True})
    assert shapes((out2, lse)) == [(B, S_Q, H, d_v), (B, H, S_Q)]
    assert lse.dtype == torch.float32 and lse.is_contiguous()
    assert torch.equal(out, out2)


@pytest.mark.parametrize("flag", ["return_attn_probs", "return_softmax_lse"])
def test_packed_returns(flag):
    q, k, v = (x.flatten(0, 1) for x in dense(d_v=32))
    cu_q, cu_k = int32(0, 3, 10), int32(0, 9, 18)
    out = fa.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 7, 9)
    out2, lse = fa.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 7, 9, **{flag: True})
    assert shapes((out, out2, lse)) == [(B * S_Q, H, 32), (B * S_Q, H, 32), (H, B * S_Q)]
    assert lse.is_contiguous()


def test_fp8_gives_bf16():
    q, k, v = dense(torch.float8_e4m3fn)
    assert fa.flash_attn_func(q, k, v).dtype == torch.bfloat16


@pytest.mark.parametrize("splits", [1, 3])
def test_kvcache_returns(splits):
    q, k, v = dense(d_v=32)
    out = fa.flash_attn_with_kvcache(q, k, v, num_splits=splits)
    assert isinstance(out, torch.Tensor) and tuple(out.shape) == (B, S_Q, H, 32)
    result = fa.flash_attn_with_kvcache(q, k, v, num_splits=splits, return_softmax_lse=True)
    assert type(result) is tuple
    accum = [(0,), (0,)] if splits == 1 else [(3, B, H, S_Q, 32), (3, B, H, S_Q)]
    assert shapes(result) == [(B, S_Q, H, 32), (B, H, S_Q), *accum]


def test_forward_returns_four_packed():
    q, k, v = (x.flatten(0, 1) for x in dense())
    lengths = {"cu_seqlens_q": int32(0, 3, 10), "cu_seqlens_k": int32(0, 9, 18)}
    result = fa._flash_attn_forward(q, k, v, **lengths, max_seqlen_q=7, max_seqlen_k=9, num_splits=2)
    t_q = B * S_Q
    assert shapes(result) == [(t_q, H, D), (H, t_q), (2, H, t_q, D), (2, H, t_q)]


def test_combine_returns():
    out, lse = fa.flash_attn_combine(torch.randn(3, B, S_Q, H, D), torch.randn(3, B, S_Q, H))
    assert shapes((out, lse)) == [(B, S_Q, H, D), (B, S_Q, H)]
    assert out.dtype == torch.float32 and lse.transpose(1, 2).is_contiguous()


def test_combine_output_must_be_of_out_dtype():
    partial = torch.randn(3, B, S_Q, H, D), torch.randn(3, B, S_Q, H)
    given = torch.empty(B, S_Q, H, D, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="out: expected dtype torch.float32"):
        fa.flash_attn_combine(*partial, given)
    assert fa.flash_attn_combine(*partial, given, torch.bfloat16)[0] is given


@pytest.mark.parametrize("b", [1, 4, 5, 8])
@pytest.mark.parametrize(
    ("mask", "blocks"),
    [({}, 3), ({"causal": True}, 4), ({"window_size": (3, 0)}, 3), ({"attention_chunk": 4}, 3)],
)
def test_metadata_length(b, mask, blocks):
    metadata = fa.get_scheduler_metadata(b, 8, 64, H, H_K, 64, int32(*[60] * b), **mask)
    assert metadata.dtype == torch.int32
    assert tuple(metadata.shape) == ((b + 3) // 4 * 4 * blocks + 1,)
    by_op = ops.get_scheduler_metadata(
        *(b, 8, 64, H, H_K, 64, 64, torch.bfloat16, int32(*[60] * b)),
        is_causal=mask.get("causal", False),
        window_size_left=mask.get("window_size", (-1, -1))[0],
        window_size_right=mask.get("window_size", (-1, -1))[1],
        attention_chunk=mask.get("attention_chunk", 0),
    )
    assert by_op.shape == metadata.shape


def test_metadata_without_cache_seqlens():
    assert fa.get_scheduler_metadata(2, 8, 64, H, H_K, 64, None).shape == (13,)


# ---- conversions that Python makes ---------------------------------------------------------------------


def test_other_last_strides_are_copied():
    q, k, v = dense()
    want = fa.flash_attn_func(q, k, v)
    odd = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)]
    assert all(x.stride(-1) != 1 for x in odd)
    assert torch.equal(want, fa.flash_attn_func(*odd))


def test_column_major_v_is_refused():
    q, k, v = dense()
    v = v.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert v.stride(-3) == 1 and v.stride(-1) != 1
    with pytest.raises(RuntimeError, match="v: expected last stride 1"):
        fa.flash_attn_func(q, k, v)


def test_index_tensors_with_other_strides_are_copied():
    q, k, v = (x.flatten(0, 1) for x in dense())
    cu = int32(0, 9, 3, 9, 10, 9)[::2]
    out = fa.flash_attn_varlen_func(q, k, v, cu, int32(0, 9, 18), 7, 9)
    assert torch.equal(out, fa.flash_attn_varlen_func(q, k, v, cu.contiguous(), int32(0, 9, 18), 7, 9))


@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_caches_are_never_copied(name):
    q, k, v = dense()
    given = {"k_cache": k, "v_cache": v}
    given[name] = given[name].transpose(-1, -2).contiguous().transpose(-1, -2)
    with pytest.raises(AssertionError, match=name):
        fa.flash_attn_with_kvcache(q, **given)


@pytest.mark.parametrize("kind", [int, torch.tensor, lambda n: torch.tensor(n, dtype=torch.int32)])
def test_max_seqlen_may_be_a_tensor(kind):
    q, k, v = (x.flatten(0, 1) for x in dense())
    cu_q, cu_k = int32(0, 3, 10), int32(0, 9, 18)
    want = fa.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 7, 9)
    assert torch.equal(want, fa.flash_attn_varlen_func(q, k, v, cu_q, cu_k, kind(7), kind(9)))


@pytest.mark.parametrize(
    ("window", "same_as"),
    [
        ([2, 1], (2, 1)),
        (torch.tensor([2, 1]), (2, 1)),
        ((None, 1), (-1, 1)),
        ((2, None), (2, -1)),
        (None, (-1, -1)),
        ((None, None), (-1, -1)),
    ],
)
def test_window_forms(window, same_as):
    q, k, v = dense()
    want = fa.flash_attn_func(q, k, v, window_size=same_as)
    assert torch.equal(want, fa.flash_attn_func(q, k, v, window_size=window))
    want = fa.flash_attn_with_kvcache(q, k, v, window_size=same_as)
    assert torch.equal(want, fa.flash_attn_with_kvcache(q, k, v, window_size=window))


def test_attention_chunk_none_is_off():
    q, k, v = dense()
    assert torch.equal(fa.flash_attn_func(q, k, v), fa.flash_attn_func(q, k, v, attention_chunk=None))


def test_cache_seqlens_int_is_expanded_to_the_batch():
    q, k, v = dense()
    want = fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=int32(7, 7))
    assert torch.equal(want, fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=7))
    packed = {"cu_seqlens_q": int32(0, 5, 10), "max_seqlen_q": 5}
    out = fa.flash_attn_with_kvcache(q.flatten(0, 1), k, v, cache_seqlens=7, **packed)
    assert torch.equal(want, out.view_as(want))


def test_sinks_win_over_s_aux():
    q, k, v = dense()
    a, b = torch.randn(H), torch.randn(H)
    assert torch.equal(fa.flash_attn_func(q, k, v, sinks=a), fa.flash_attn_func(q, k, v, s_aux=a))
    assert torch.equal(fa.flash_attn_func(q, k, v, sinks=a), fa.flash_attn_func(q, k, v, sinks=a, s_aux=b))


def test_block_table_is_page_table():
    q, k, v = dense()
    pages = [x.reshape(-1, 3, H_K, D) for x in (k, v)]
    table = torch.arange(6, dtype=torch.int32).view(2, 3)
    common = (q.flatten(0, 1), *pages, int32(0, 5, 10), None, 5, 9)
    given = {"seqused_k": int32(9, 9)}
    one = fa.flash_attn_varlen_func(*common, page_table=table, **given)
    two = fa.flash_attn_varlen_func(*common, block_table=table, **given)
    assert torch.equal(one, two)
    torch.testing.assert_close(one.view(B, S_Q, H, D), fa.flash_attn_func(q, k, v), atol=1e-2, rtol=1e-2)


def test_varlen_writes_out():
    q, k, v = (x.flatten(0, 1) for x in dense())
    lengths = (int32(0, 3, 10), int32(0, 9, 18), 7, 9)
    given = torch.empty(H, B * S_Q, D, dtype=q.dtype).transpose(0, 1)
    out = fa.flash_attn_varlen_func(q, k, v, *lengths, out=given)
    assert out is given
    assert torch.equal(out, fa.flash_attn_varlen_func(q, k, v, *lengths))


def test_scale_with_qv():
    q, k, v = dense(d_v=32)
    qv = torch.randn(B, S_Q, H, 32).to(q.dtype)
    want = fa.flash_attn_func(q, k, v, qv=qv, softmax_scale=(D + 32) ** -0.5)
    assert torch.equal(want, fa.flash_attn_func(q, k, v, qv=qv))
    raw = fa._flash_attn_forward(q, k, v, qv=qv)[0]
    assert torch.equal(raw, fa.flash_attn_func(q, k, v, qv=qv, softmax_scale=D**-0.5))


def test_qkvpacked():
    qkv = torch.randn(B, 7, 3, H, D).bfloat16()
    want = fa.flash_attn_func(*qkv.unbind(2), causal=True)
    assert torch.equal(want, fa.flash_attn_qkvpacked_func(qkv, causal=True))
    flat = torch.randn(B, 7, H + 2 * H_K, D).bfloat16()
    q, k, v = flat.split([H, H_K, H_K], 2)
    out, lse = fa.flash_attn_qkvpacked_func(flat, num_heads_q=H, return_attn_probs=True)
    assert torch.equal(out, fa.flash_attn_func(q, k, v)) and lse.shape == (B, H, 7)
    with pytest.raises(AssertionError):
        fa.flash_attn_qkvpacked_func(flat)


def test_every_way_gives_the_same_bits():
    q, k, v = dense()
    want = fa.flash_attn_func(q, k, v, 0.3, True)
    assert torch.equal(want, ops.fwd(q, k, v, softmax_scale=0.3, is_causal=True, num_splits=1)[0])
    assert torch.equal(want, ops._flash_attn_forward(q, k, v, softmax_scale=0.3, causal=True)[0])
    assert torch.equal(want, fa._flash_attn_forward(q, k, v, softmax_scale=0.3, causal=True)[0])
    assert torch.equal(want, fa.FlashAttnFunc.apply(q, k, v, 0.3, True))
    assert torch.equal(want, fa.flash_attn_func(torch.nn.Parameter(q), k, v, 0.3, True))
    given = torch.empty_like(want)
    positional = (None,) * 3 + (given,) + (None,) * 16
    result = ops.fwd(q, k, v, *positional, 0.3, True, -1, -1, 0, 0.0, False, None, 1, None, 0)
    assert result[0] is given and torch.equal(want, given)


# ---- gradients ---------------------------------------------------------------------------------------


def gradient_calls():
    q, k, v = dense()
    cu = int32(0, 5, 10), int32(0, 9, 18)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    return {
        "dense": lambda i: fa.flash_attn_func(*with_grad(q, k, v, i)),
        "packed": lambda i: fa.flash_attn_varlen_func(*with_grad(*flat, i), *cu, 5, 9),
        "kvcache": lambda i: fa.flash_attn_with_kvcache(*with_grad(q, k, v, i)),
        "forward": lambda i: fa._flash_attn_forward(*with_grad(q, k, v, i))[0],
        "fwd": lambda i: ops.fwd(*with_grad(q, k, v, i), num_splits=1)[0],
        "custom": lambda i: ops._flash_attn_forward(*with_grad(q, k, v, i))[0],
    }


def with_grad(q, k, v, i):
    tensors = [q, k, v]
    tensors[i] = tensors[i].clone().requires_grad_()
    return tensors


@pytest.mark.parametrize("i", [0, 1, 2])
@pytest.mark.parametrize("name", ["dense", "packed", "kvcache", "forward", "fwd", "custom"])
def test_a_missing_gradient_is_loud(name, i):
    call = gradient_calls()[name]
    out = call(i)
    assert out.requires_grad
    with torch.no_grad():
        assert torch.equal(out, call(i))
    with pytest.raises(NotImplementedError, match="backward"):
        out.float().sum().backward()


def test_a_missing_gradient_is_loud_elsewhere():
    qkv = torch.randn(B, 7, 3, H, D, dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(NotImplementedError):
        fa.flash_attn_qkvpacked_func(qkv).sum().backward()
    partial = torch.randn(3, B, S_Q, H, D, requires_grad=True)
    with pytest.raises(NotImplementedError):
        fa.flash_attn_combine(partial, torch.randn(3, B, S_Q, H))[0].sum().backward()
    q, k, v = dense()
    sinks = torch.zeros(H, requires_grad=True)
    with pytest.raises(NotImplementedError, match="sinks"):
        fa.flash_attn_func(q, k, v, sinks=sinks).sum().backward()
    with pytest.raises(NotImplementedError):
        ops.bwd(q, q, k, v, q, q)
    with pytest.raises(NotImplementedError):
        fa._flash_attn_backward(q, q, k, v, q, q)


def test_backward_with_a_chunk_is_an_assertion():
    q, k, v = with_grad(*dense(), 0)
    with pytest.raises(AssertionError, match="attention_chunk"):
        fa.flash_attn_func(q, k, v, attention_chunk=4).sum().backward()


# ---- tracing -----------------------------------------------------------------------------------------


def operator_cases():
    q, k, v = dense()
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    packed = {
        "cu_seqlens_q": int32(0, 3, 10),
        "cu_seqlens_k": int32(0, 9, 18),
        "max_seqlen_q": 7,
        "max_seqlen_k": 9,
    }
    partial = torch.randn(3, B, S_Q, H, D), torch.randn(3, B, S_Q, H)
    return {
        "forward": (ops._flash_attn_forward, (q, k, v), {"causal": True}),
        "splits": (ops._flash_attn_forward, (q, k, v), {"num_splits": 3}),
        "packed": (ops._flash_attn_forward, flat, packed),
        "fp8": (ops._flash_attn_forward, dense(torch.float8_e4m3fn), {}),
        "sinks": (ops._flash_attn_forward_ext, (q, k, v), {"sinks": torch.randn(H)}),
        "combine": (ops._flash_attn_combine, partial, {"out_dtype": torch.bfloat16}),
        "metadata": (
            ops.get_scheduler_metadata,
            (B, 1, 77, H, H_K, 64, 64, torch.bfloat16, int32(70, 3)),
            {},
        ),
    }


@pytest.mark.parametrize("name", ["forward", "splits", "packed", "fp8", "sinks", "combine", "metadata"])
def test_opcheck(name):
    operator, args, kwargs = operator_cases()[name]
    # opcheck's other tests multiply, which torch cannot do in fp8.
    tests = {"test_utils": ("test_faketensor",)} if name == "fp8" else {}
    torch.library.opcheck(operator.default, tuple(args), kwargs, **tests)


def test_opcheck_of_what_torch_compile_cannot_functionalise():
    q, k, v = dense()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.fwd.default, (q, k, v), {"num_splits": 1}, test_utils=tests[::2])
    partial = torch.randn(3, B, S_Q, H, D), torch.randn(3, B, S_Q, H)
    torch.library.opcheck(ops.fwd_combine.default, partial, test_utils=tests[::2])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_dense(dynamic):
    def call(q, k, v):
        return fa.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic)
    for args in (dense(), tuple(x[:, 1:] for x in dense())):
        assert all(map(torch.equal, compiled(*args), call(*args)))


def test_compile_packed_with_sinks():
    cu_q, cu_k, sinks = int32(0, 3, 10), int32(0, 9, 18), torch.randn(H)

    def call(q, k, v):
        return fa.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 7, 9, softcap=3.0, s_aux=sinks)

    args = [x.flatten(0, 1) for x in dense()]
    assert torch.equal(torch.compile(call, fullgraph=True)(*args), call(*args))


def test_compile_append():
    def call(q, k, v, k_new, v_new):
        out = fa.flash_attn_with_kvcache(q, k, v, k_new, v_new, cache_seqlens=3, causal=True, num_splits=1)
        return out, k.sum()

    q, k, v = dense()
    k_new, v_new = torch.randn(2, B, 2, H_K, D).bfloat16()
    ours, theirs = (k.clone(), v.clone()), (k.clone(), v.clone())
    want = call(q, *ours, k_new, v_new)
    got = torch.compile(call, fullgraph=True)(q, *theirs, k_new, v_new)
    assert torch.equal(want[0], got[0]) and all(map(torch.equal, ours, theirs))
    torch.testing.assert_close(want[1], got[1], atol=0.1, rtol=0.1)
    assert not torch.equal(ours[0], k)


def test_compile_with_gradient():
    q, k, v = with_grad(*dense(), 0)
    out = torch.compile(fa.flash_attn_func, fullgraph=True)(q, k, v)
    assert torch.equal(out, fa.flash_attn_func(q, k, v))
    with pytest.raises(NotImplementedError):
        out.sum().backward()


def test_export():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return fa.flash_attn_func(q, k, v)

    program = torch.export.export(Model(), dense())
    assert "flash_attn_3._flash_attn_forward" in str(program.graph)


def test_traced_calls_refuse_what_has_no_shape_yet():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k, v = dense()
        cu = torch.empty(3, dtype=torch.int32)
        assert fa.flash_attn_func(q, k, v).shape == (B, S_Q, H, D)
        with pytest.raises(ValueError, match="num_splits"):
            fa.flash_attn_with_kvcache(q, k, v)
        with pytest.raises(ValueError, match="max_seqlen_q"):
            ops._flash_attn_forward(q[0], k, v, cu_seqlens_q=cu)
        with pytest.raises(TypeError, match="output"):
            ops._flash_attn_forward(q, k, v, out_=torch.empty_like(q))


def test_meta_tensors():
    q, k, v = (x.to("meta") for x in dense(d_v=32))
    assert fa.flash_attn_func(q, k, v).shape == (B, S_Q, H, 32)


# ---- what an import costs ------------------------------------------------------------------------------

IMPORT_SHARE = 0.06  # of the CPU time of `import torch`, about 1 s


def test_import_is_light():
    """CPU time beside that of `import torch` in the same process, which a busy machine slows as well; one
    of five runs has to be light."""
    code = (
        "import time; now = time.process_time; a = now(); import torch; b = now(); "
        "import flash_attn_interface; print((now() - b) / (b - a))"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    shares = []
    while not shares or min(shares) >= IMPORT_SHARE and len(shares) < 5:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=env)
        shares.append(float(done.stdout))
    assert min(shares) < IMPORT_SHARE, shares


def test_import_needs_no_gpu_and_says_nothing():
    code = "import flash_attn_interface, flash_attn_3._C, flash_attn_config"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_another_libattn_is_refused():
    code = "import libattn; libattn.__version__ = '0.0.9'; import flash_attn_interface"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: flash_attn_3 3" in done.stderr and "needs libattn 0.1.0, found 0.0.9" in done.stderr


def test_versions_match():
    assert libattn.__version__ == importlib.metadata.version("libattn")
