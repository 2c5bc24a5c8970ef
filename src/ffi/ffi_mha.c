/* SPDX-License-Identifier: MIT
 *
 * mha_fwd and split_combine for Python.
 *
 * The three mha_fwd functions take the same arguments, in the order of `read_mha_fwd`: tensors,
 * scalars, and last the pair that only a second call has.  A tensor that is off is None.
 * libattn/mha.py is the only caller.
 */
#include "ffi.h"

#include <stdio.h>
#include <string.h>

#define SCRATCH_PART 256 /* alignment of each part of the scratch block */

static void read_mha_fwd(struct attn_mha_fwd_args *a, ffi_args *in)
{
    memset(a, 0, sizeof *a);
    a->size = sizeof *a;
    a->q = ffi_tensor(in, "q");
    a->k = ffi_tensor(in, "k");
    a->v = ffi_tensor(in, "v");
    a->k_new = ffi_tensor_or_null(in, "k_new");
    a->v_new = ffi_tensor_or_null(in, "v_new");
    a->qv = ffi_tensor_or_null(in, "qv");
    a->out = ffi_tensor_or_null(in, "out");
    a->lse = ffi_tensor_or_null(in, "lse");
    a->cu_seqlens_q = ffi_tensor_or_null(in, "cu_seqlens_q");
    a->cu_seqlens_k = ffi_tensor_or_null(in, "cu_seqlens_k");
    a->cu_seqlens_k_new = ffi_tensor_or_null(in, "cu_seqlens_k_new");
    a->seqused_q = ffi_tensor_or_null(in, "seqused_q");
    a->seqused_k = ffi_tensor_or_null(in, "seqused_k");
    a->page_table = ffi_tensor_or_null(in, "page_table");
    a->kv_batch_idx = ffi_tensor_or_null(in, "kv_batch_idx");
    a->leftpad_k = ffi_tensor_or_null(in, "leftpad_k");
    a->rotary_cos = ffi_tensor_or_null(in, "rotary_cos");
    a->rotary_sin = ffi_tensor_or_null(in, "rotary_sin");
    a->seqlens_rotary = ffi_tensor_or_null(in, "seqlens_rotary");
    a->q_descale = ffi_tensor_or_null(in, "q_descale");
    a->k_descale = ffi_tensor_or_null(in, "k_descale");
    a->v_descale = ffi_tensor_or_null(in, "v_descale");
    a->sinks = ffi_tensor_or_null(in, "sinks");
    a->cp_tot_seqused_k = ffi_tensor_or_null(in, "cp_tot_seqused_k");
    a->scheduler_metadata = ffi_tensor_or_null(in, "scheduler_metadata");
    a->softmax_scale = ffi_double(in, "softmax_scale");
    a->softcap = ffi_double(in, "softcap");
    a->max_seqlen_q = ffi_int64(in, "max_seqlen_q");
    a->max_seqlen_k = ffi_int64(in, "max_seqlen_k");
    a->window_left = ffi_int64(in, "window_left");
    a->window_right = ffi_int64(in, "window_right");
    a->attention_chunk = ffi_int64(in, "attention_chunk");
    a->causal = ffi_bool(in, "causal");
    a->rotary_interleaved = ffi_bool(in, "rotary_interleaved");
    a->num_splits = ffi_int32(in, "num_splits");
    a->pack_gqa = ffi_int32(in, "pack_gqa");
    a->sm_margin = ffi_int32(in, "sm_margin");
    a->cp_world_size = ffi_int32(in, "cp_world_size");
    a->cp_rank = ffi_int32(in, "cp_rank");
    a->threads = ffi_int32(in, "threads");
    a->out_accum = ffi_tensor_or_null(in, "out_accum");
    a->lse_accum = ffi_tensor_or_null(in, "lse_accum");
}

/* ---- partial results in scratch ------------------------------------------------------------------ */

/* The fp32 tensors of split partial results when the caller does not want to see them. */
typedef struct accum_parts {
    DLTensor out, lse;
    int64_t out_shape[5], out_strides[5], lse_shape[4], lse_strides[4];
    int64_t out_bytes, lse_bytes;
} accum_parts;

/* Contiguous fp32 tensor on q's device; its bytes, or -1 past 2^62. */
static int64_t shape_accum(DLTensor *t, int64_t *shape, int64_t *strides, int32_t ndim,
                           DLDevice device)
{
    *t = (DLTensor){.device = device,
                    .ndim = ndim,
                    .dtype = {.code = kDLFloat, .bits = 32, .lanes = 1},
                    .shape = shape,
                    .strides = strides};
    int64_t n = 1;
    for (int32_t i = ndim - 1; i >= 0; i--) {
        strides[i] = n;
        if (__builtin_mul_overflow(n, shape[i], &n) || n > ((int64_t)1 << 60)) return -1;
    }
    return (n * 4 + SCRATCH_PART - 1) / SCRATCH_PART * SCRATCH_PART;
}

/* Shapes from q, v and the plan: [splits, b, h_q, s_q, d_v], packed q: [splits, h_q, t_q, d_v]. */
static int lay_out_accum(accum_parts *parts, const struct attn_mha_fwd_args *a, int64_t splits)
{
    const int packed = a->cu_seqlens_q != NULL;
    const DLTensor *q = a->q;
    int64_t *s = parts->out_shape;
    int32_t n = 0;
    s[n++] = splits;
    if (!packed) s[n++] = q->shape[0];
    s[n++] = q->shape[packed ? 1 : 2];
    s[n++] = q->shape[packed ? 0 : 1];
    memcpy(parts->lse_shape, s, (size_t)n * sizeof *s);
    s[n] = a->v->shape[a->v->ndim - 1];
    parts->lse_bytes = shape_accum(&parts->lse, parts->lse_shape, parts->lse_strides, n, q->device);
    parts->out_bytes =
        shape_accum(&parts->out, parts->out_shape, parts->out_strides, n + 1, q->device);
    if (parts->lse_bytes < 0 || parts->out_bytes < 0)
        return ffi_raise("MemoryError", "num_splits: partial results too large");
    return 0;
}

/* Runs with the workspace, and with the partial results when the caller gave none, in scratch. */
static int run_in_scratch(struct attn_mha_fwd_args *a, const struct attn_mha_fwd_plan *plan)
{
    accum_parts parts = {.out_bytes = 0, .lse_bytes = 0};
    const int own_accum = plan->splits > 1 && !a->out_accum && !a->lse_accum;
    if (own_accum && lay_out_accum(&parts, a, plan->splits)) return -1;

    const int64_t part = SCRATCH_PART;
    int64_t workspace = (plan->workspace_bytes + part - 1) / part * part, bytes;
    if (__builtin_add_overflow(parts.out_bytes + parts.lse_bytes, workspace, &bytes))
        return ffi_raise("MemoryError", "workspace too large");
    ffi_scratch scratch;
    if (ffi_scratch_take(&scratch, a->q, bytes)) return -1;
    char *at = scratch.memory;
    if (own_accum) {
        parts.out.data = at + workspace;
        parts.lse.data = at + workspace + parts.out_bytes;
        a->out_accum = &parts.out;
        a->lse_accum = &parts.lse;
    }
    const attn_status status = attn_mha_fwd_run(a, plan, workspace ? at : NULL,
                                                plan->workspace_bytes, ffi_stream(a->q));
    ffi_scratch_give(&scratch);
    return ffi_status(status);
}

/* ---- functions ----------------------------------------------------------------------------------- */

#define FFI_FUNCTION(name)                                                                         \
    FFI_EXPORT int __tvm_ffi_##name(void *self, const TVMFFIAny *args, int32_t count,              \
                                    TVMFFIAny *result);                                            \
    int __tvm_ffi_##name(void *self, const TVMFFIAny *args, int32_t count, TVMFFIAny *result)

/* mha_fwd(..., want_accum) -> int.  0: done.  n > 1: nothing ran, as the caller wants the partial
 * results of what will be n splits; call again with out_accum and lse_accum. */
FFI_FUNCTION(mha_fwd)
{
    (void)self;
    struct attn_mha_fwd_args a;
    struct attn_mha_fwd_plan plan;
    ffi_args in = ffi_begin("mha_fwd", args, count);
    read_mha_fwd(&a, &in);
    const int want_accum = ffi_bool(&in, "want_accum");
    if (ffi_end(&in)) return -1;

    plan.size = sizeof plan;
    if (ffi_status(attn_mha_fwd_plan(&a, &plan))) return -1;
    if (plan.splits > 1 && want_accum && !a.out_accum && !a.lse_accum) {
        ffi_return_int(result, plan.splits);
        return 0;
    }
    if (run_in_scratch(&a, &plan)) return -1;
    ffi_return_int(result, 0);
    return 0;
}

/* mha_fwd_plan(..., want_accum) -> "kernel splits workspace_bytes piece".  Out and lse may be None. */
FFI_FUNCTION(mha_fwd_plan)
{
    (void)self;
    struct attn_mha_fwd_args a;
    struct attn_mha_fwd_plan plan;
    ffi_args in = ffi_begin("mha_fwd_plan", args, count);
    read_mha_fwd(&a, &in);
    ffi_bool(&in, "want_accum");
    if (ffi_end(&in)) return -1;
    plan.size = sizeof plan;
    if (ffi_status(attn_mha_fwd_plan(&a, &plan))) return -1;
    char text[sizeof plan.kernel + 96];
    snprintf(text, sizeof text, "%.*s %d %lld %lld", (int)sizeof plan.kernel, plan.kernel,
             (int)plan.splits, (long long)plan.workspace_bytes, (long long)plan.piece);
    return ffi_return_text(result, text);
}

/* mha_fwd_ref(..., want_accum) -> 0: the scalar oracle, CPU tensors only; it never splits. */
FFI_FUNCTION(mha_fwd_ref)
{
    (void)self;
    struct attn_mha_fwd_args a;
    ffi_args in = ffi_begin("mha_fwd_ref", args, count);
    read_mha_fwd(&a, &in);
    ffi_bool(&in, "want_accum");
    if (ffi_end(&in)) return -1;
    ffi_return_int(result, 0);
    return ffi_status(attn_mha_fwd_ref(&a));
}

/* split_combine(out_partial, lse_partial, out, lse, threads) */
FFI_FUNCTION(split_combine)
{
    (void)self, (void)result;
    struct attn_split_combine_args a = {.size = sizeof a};
    ffi_args in = ffi_begin("split_combine", args, count);
    a.out_partial = ffi_tensor(&in, "out_partial");
    a.lse_partial = ffi_tensor(&in, "lse_partial");
    a.out = ffi_tensor(&in, "out");
    a.lse = ffi_tensor(&in, "lse");
    a.threads = ffi_int32(&in, "threads");
    if (ffi_end(&in)) return -1;
    return ffi_status(attn_split_combine_run(&a, ffi_stream(a.out)));
}

/* mha_metadata_length(b, s_q, s_k, d_qk, paged, causal, window_left, window_right, chunk) -> int */
FFI_FUNCTION(mha_metadata_length)
{
    (void)self;
    ffi_args in = ffi_begin("mha_metadata_length", args, count);
    const int64_t b = ffi_int64(&in, "batch_size"), s_q = ffi_int64(&in, "max_seqlen_q");
    const int64_t s_k = ffi_int64(&in, "max_seqlen_k"), d_qk = ffi_int64(&in, "headdim");
    const int32_t paged = ffi_bool(&in, "page_size"), causal = ffi_bool(&in, "causal");
    const int64_t left = ffi_int64(&in, "window_left"), right = ffi_int64(&in, "window_right");
    const int64_t chunk = ffi_int64(&in, "attention_chunk");
    if (ffi_end(&in)) return -1;
    if (b < 0 || b > INT32_MAX) {
        return ffi_raise("libattn.ArgumentError", "batch_size: expected in [0, 2^31)");
    }
    ffi_return_int(result, attn_mha_metadata_length(b, s_q, s_k, d_qk, paged, causal, left, right,
                                                    chunk));
    return 0;
}
