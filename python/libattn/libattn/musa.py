# SPDX-License-Identifier: MIT
"""Tensors on a Moore Threads GPU (device type "musa") are handed to MATE, by keyword.

The mapping is that of MATE 0.2.2's mate.mha_interface and mate.flashmla, and for mate.kda of the 0.2.4
line.  It is tested against stand-in modules only: none of it has run on the hardware.
"""

import importlib

import torch


def is_on_musa(x) -> bool:
    """Whether x is a tensor on MUSA."""
    return getattr(getattr(x, "device", None), "type", None) == "musa"


def mate_function(name: str, module: str = "mha_interface", since: str = "0.2.2"):
    """mate.<module>.<name>, which MATE has since that version; ImportError that says how to get it."""
    try:
        found = importlib.import_module(f"mate.{module}")
    except ImportError as error:
        raise ImportError(
            "tensors on MUSA are computed by MATE, which cannot be imported here "
            f"({error}); install it from https://github.com/MooreThreads/mate"
        ) from error
    try:
        return getattr(found, name)
    except AttributeError:
        raise ImportError(
            f"this MATE has no {module}.{name}; version {since} or newer is needed, from "
            "https://github.com/MooreThreads/mate"
        ) from None


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    sinks=None,
    attention_chunk=0,
    softcap=0.0,
    scheduler_metadata=None,
    num_splits=0,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_softmax_lse=False,
    cp_world_size=1,
    cp_rank=0,
    cp_tot_seqused_k=None,
    out=None,
):
    """Dense (no cu_seqlens) or packed attention by MATE; out, or (out, lse)."""
    return mate_function("flash_attn_varlen_func")(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        page_table=page_table,
        softmax_scale=softmax_scale,
        causal=causal,
        qv=qv,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        window_size=window_size,
        learnable_sink=sinks,
        attention_chunk=attention_chunk,
        softcap=softcap,
        scheduler_metadata=scheduler_metadata,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        deterministic=deterministic,
        sm_margin=sm_margin,
        return_softmax_lse=return_softmax_lse,
        cp_world_size=cp_world_size,
        cp_rank=cp_rank,
        cp_tot_seqused_k=cp_tot_seqused_k,
        out=out,
    )


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    qv=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    page_table=None,
    cu_seqlens_q=None,
    cu_seqlens_k_new=None,
    max_seqlen_q=None,
    rotary_seqlens=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    sinks=None,
    attention_chunk=0,
    softcap=0.0,
    rotary_interleaved=True,
    scheduler_metadata=None,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
    return_softmax_lse=False,
    cp_world_size=1,
    cp_rank=0,
    cp_tot_seqused_k=None,
):
    """Attention over a cache, with append and rotary, by MATE; out, or its tuple with the lse."""
    return mate_function("flash_attn_with_kvcache")(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        k=k,
        v=v,
        qv=qv,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        page_table=page_table,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k_new=cu_seqlens_k_new,
        max_seqlen_q=max_seqlen_q,
        rotary_seqlens=rotary_seqlens,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        learnable_sink=sinks,
        attention_chunk=attention_chunk,
        softcap=softcap,
        rotary_interleaved=rotary_interleaved,
        scheduler_metadata=scheduler_metadata,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        sm_margin=sm_margin,
        return_softmax_lse=return_softmax_lse,
        cp_world_size=cp_world_size,
        cp_rank=cp_rank,
        cp_tot_seqused_k=cp_tot_seqused_k,
    )


def get_scheduler_metadata(
    batch_size,
    max_seqlen_q,
    max_seqlen_k,
    num_heads_q,
    num_heads_kv,
    headdim,
    cache_seqlens,
    qkv_dtype,
    headdim_v=None,
    cu_seqlens_q=None,
    cu_seqlens_k_new=None,
    cache_leftpad=None,
    page_size=None,
    max_seqlen_k_new=0,
    causal=False,
    window_size=(-1, -1),
    attention_chunk=0,
    has_softcap=False,
    num_splits=0,
    pack_gqa=None,
    sm_margin=0,
):
    """MATE's scheduler metadata, which only MATE's functions can use."""
    return mate_function("get_scheduler_metadata")(
        batch_size=batch_size,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        num_heads_q=num_heads_q,
        num_heads_kv=num_heads_kv,
        headdim=headdim,
        seqused_q=None,
        seqused_k=cache_seqlens,
        qkv_dtype=qkv_dtype,
        headdim_v=headdim_v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=None,
        cu_seqlens_k_new=cu_seqlens_k_new,
        cache_leftpad=cache_leftpad,
        page_size=page_size,
        max_seqlen_k_new=max_seqlen_k_new,
        causal=causal,
        window_size=window_size,
        attention_chunk=attention_chunk,
        has_softcap=has_softcap,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        mp_margin=sm_margin,
    )


def chunk_kda(
    q,
    k,
    v,
    g,
    beta,
    scale,
    out,
    A_log,
    dt_bias,
    lower_bound,
    initial_state=None,
    final_state=None,
    cu_seqlens=None,
):
    """Kimi Delta Attention by MATE into out and final_state.  An absent A_log or dt_bias becomes zeros:
    without both, MATE takes g for the log-decay itself."""
    if A_log is None:
        A_log = torch.zeros(v.shape[-2], dtype=torch.float32, device=q.device)
    if dt_bias is None:
        dt_bias = torch.zeros(v.shape[-2], q.shape[-1], dtype=torch.float32, device=q.device)
    mate_function("chunk_kda", "kda", "0.2.4")(
        q=q,
        k=k,
        v=v,
        g=g,
        beta=beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=final_state is not None,
        cu_seqlens=cu_seqlens,
        A_log=A_log,
        dt_bias=dt_bias,
        lower_bound=lower_bound,
        use_qk_l2norm_in_kernel=True,
        output=out,
        final_state=final_state,
    )


# ---- mate.flashmla -----------------------------------------------------------------------------------


def get_mla_metadata(**arguments):
    """MATE's scheduler tensors (tile_scheduler_metadata, num_splits) for these arguments of its own."""
    return mate_function("get_mla_metadata", "flashmla")(**arguments)


def flash_mla_with_kvcache(
    q,
    k_cache,
    block_table,
    cache_seqlens,
    head_dim_v,
    tile_scheduler_metadata,
    num_splits,
    softmax_scale,
    causal,
    is_fp8_kvcache,
    indices,
    **sparse_only,
):
    """MLA decode by MATE: (out, lse), a dense lse as MATE lays it out, (b, s_q, h_q).

    Of attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length and extra_topk_length those that
    are given are handed on.
    """
    return mate_function("flash_mla_with_kvcache", "flashmla")(
        q=q,
        k_cache=k_cache,
        block_table=block_table,
        cache_seqlens=cache_seqlens,
        head_dim_v=head_dim_v,
        tile_scheduler_metadata=tile_scheduler_metadata,
        num_splits=num_splits,
        softmax_scale=softmax_scale,
        causal=causal,
        is_fp8_kvcache=is_fp8_kvcache,
        indices=indices,
        **{name: value for name, value in sparse_only.items() if value is not None},
    )


def flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v, attn_sink, topk_length):
    """Sparse prefill by MATE: (out, max_logits, lse)."""
    return mate_function("flash_mla_sparse_fwd", "flashmla")(
        q=q,
        kv=kv,
        indices=indices,
        sm_scale=sm_scale,
        d_v=d_v,
        attn_sink=attn_sink,
        topk_length=topk_length,
    )
