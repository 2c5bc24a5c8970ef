/* SPDX-License-Identifier: MIT
 *
 * The mla ops for Python: each takes its tensors, then numbers, then what is rare.  A tensor that
 * is off is None.  libattn/mla.py is the caller.
 */
#include "ffi.h"

#include <stdio.h>

static int return_plan(TVMFFIAny *result, const struct attn_mla_plan *plan)
{
    char text[sizeof plan->kernel + 32];
    snprintf(text, sizeof text, "%.*s %lld", (int)sizeof plan->kernel, plan->kernel,
             (long long)plan->workspace_bytes);
    return ffi_return_text(result, text);
}

/* op(...) plans and runs, op_plan(...) returns "kernel workspace_bytes" (out and what follows it
 * may be None), op_ref(...) is the scalar oracle on CPU tensors. */
#define MLA_FUNCTIONS(op)                                                                          \
    FFI_FUNCTION(op)                                                                               \
    {                                                                                              \
        (void)self, (void)result;                                                                  \
        struct attn_##op##_args a;                                                                 \
        struct attn_mla_plan plan = {.size = sizeof plan};                                         \
        ffi_args in = ffi_begin(#op, args, count);                                                 \
        read_##op(&a, &in);                                                                        \
        if (ffi_end(&in) || ffi_status(attn_##op##_plan(&a, &plan))) return -1;                    \
        ffi_scratch scratch;                                                                       \
        if (ffi_scratch_take(&scratch, a.q, plan.workspace_bytes)) return -1;                      \
        const attn_status status = attn_##op##_run(&a, &plan, scratch.memory,                      \
                                                   plan.workspace_bytes, ffi_stream(a.q));         \
        ffi_scratch_give(&scratch);                                                                \
        return ffi_status(status);                                                                 \
    }                                                                                              \
    FFI_FUNCTION(op##_plan)                                                                        \
    {                                                                                              \
        (void)self;                                                                                \
        struct attn_##op##_args a;                                                                 \
        struct attn_mla_plan plan = {.size = sizeof plan};                                         \
        ffi_args in = ffi_begin(#op "_plan", args, count);                                         \
        read_##op(&a, &in);                                                                        \
        if (ffi_end(&in) || ffi_status(attn_##op##_plan(&a, &plan))) return -1;                    \
        return return_plan(result, &plan);                                                         \
    }                                                                                              \
    FFI_FUNCTION(op##_ref)                                                                         \
    {                                                                                              \
        (void)self, (void)result;                                                                  \
        struct attn_##op##_args a;                                                                 \
        ffi_args in = ffi_begin(#op "_ref", args, count);                                          \
        read_##op(&a, &in);                                                                        \
        if (ffi_end(&in)) return -1;                                                               \
        return ffi_status(attn_##op##_ref(&a));                                                    \
    }

static void read_mla_decode(struct attn_mla_decode_args *a, ffi_args *in)
{
    *a = (struct attn_mla_decode_args){.size = sizeof *a};
    a->q = ffi_tensor(in, "q");
    a->k_cache = ffi_tensor(in, "k_cache");
    a->block_table = ffi_tensor(in, "block_table");
    a->cache_seqlens = ffi_tensor(in, "cache_seqlens");
    a->out = ffi_tensor_or_null(in, "out");
    a->lse = ffi_tensor_or_null(in, "lse");
    a->softmax_scale = ffi_double(in, "softmax_scale");
    a->head_dim_v = ffi_int64(in, "head_dim_v", 0);
    a->causal = ffi_bool(in, "causal");
    a->threads = ffi_int32(in, "threads", 0);
    ffi_optional(in);
    a->descale_q = ffi_tensor_or_null(in, "descale_q");
    a->descale_k = ffi_tensor_or_null(in, "descale_k");
}

static void read_mla_sparse_decode(struct attn_mla_sparse_decode_args *a, ffi_args *in)
{
    *a = (struct attn_mla_sparse_decode_args){.size = sizeof *a};
    a->q = ffi_tensor(in, "q");
    a->k_cache = ffi_tensor(in, "k_cache");
    a->indices = ffi_tensor(in, "indices");
    a->out = ffi_tensor_or_null(in, "out");
    a->lse = ffi_tensor_or_null(in, "lse");
    a->softmax_scale = ffi_double(in, "softmax_scale");
    a->head_dim_v = ffi_int64(in, "head_dim_v", 0);
    a->threads = ffi_int32(in, "threads", 0);
    ffi_optional(in);
    a->topk_length = ffi_tensor_or_null(in, "topk_length");
    a->attn_sink = ffi_tensor_or_null(in, "attn_sink");
    a->extra_k_cache = ffi_tensor_or_null(in, "extra_k_cache");
    a->extra_indices_in_kvcache = ffi_tensor_or_null(in, "extra_indices_in_kvcache");
    a->extra_topk_length = ffi_tensor_or_null(in, "extra_topk_length");
}

static void read_mla_sparse_fwd(struct attn_mla_sparse_fwd_args *a, ffi_args *in)
{
    *a = (struct attn_mla_sparse_fwd_args){.size = sizeof *a};
    a->q = ffi_tensor(in, "q");
    a->kv = ffi_tensor(in, "kv");
    a->indices = ffi_tensor(in, "indices");
    a->out = ffi_tensor_or_null(in, "out");
    a->max_logits = ffi_tensor_or_null(in, "max_logits");
    a->lse = ffi_tensor_or_null(in, "lse");
    a->softmax_scale = ffi_double(in, "sm_scale");
    a->head_dim_v = ffi_int64(in, "d_v", 0);
    a->threads = ffi_int32(in, "threads", 0);
    ffi_optional(in);
    a->topk_length = ffi_tensor_or_null(in, "topk_length");
    a->attn_sink = ffi_tensor_or_null(in, "attn_sink");
}

MLA_FUNCTIONS(mla_decode)
MLA_FUNCTIONS(mla_sparse_decode)
MLA_FUNCTIONS(mla_sparse_fwd)

static void read_mla_cache(struct attn_mla_cache_args *a, ffi_args *in)
{
    *a = (struct attn_mla_cache_args){.size = sizeof *a};
    a->kv = ffi_tensor(in, "kv");
    a->cache = ffi_tensor(in, "cache");
    a->slots = ffi_tensor_or_null(in, "slots");
    a->threads = ffi_int32(in, "threads", 0);
}

/* mla_cache_quantize(kv, cache, slots, threads): writes the cache */
FFI_FUNCTION(mla_cache_quantize)
{
    (void)self, (void)result;
    struct attn_mla_cache_args a;
    ffi_args in = ffi_begin("mla_cache_quantize", args, count);
    read_mla_cache(&a, &in);
    if (ffi_end(&in)) return -1;
    return ffi_status(attn_mla_cache_quantize_run(&a, ffi_stream(a.kv)));
}

/* mla_cache_dequantize(kv, cache, slots, threads): writes kv */
FFI_FUNCTION(mla_cache_dequantize)
{
    (void)self, (void)result;
    struct attn_mla_cache_args a;
    ffi_args in = ffi_begin("mla_cache_dequantize", args, count);
    read_mla_cache(&a, &in);
    if (ffi_end(&in)) return -1;
    return ffi_status(attn_mla_cache_dequantize_run(&a, ffi_stream(a.kv)));
}
