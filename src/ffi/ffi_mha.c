/* SPDX-License-Identifier: MIT
 *
 * mha_fwd and split_combine for Python.
 *
 * The three mha_fwd functions take the same arguments, in the order of `read_mha_fwd`: first what
 * every call has, then features in groups, the rarer the later.  A call ends after the last feature
 * it uses, as each argument costs time; a tensor that is off is None.  libattn/mha.py is the caller.
 */
#include "ffi.h"

#include <stdio.h>
#include <string.h>

#define SCRATCH_PART 256 /* alignment of each part of the scratch block */

/* Returns want_accum, which is no argument of attn_mha_fwd_args. */
static int read_mha_fwd(struct attn_mha_fwd_args *a, ffi_args *in)
{
    memset(a, 0, sizeof *a);
    a->size = sizeof *a;
    a->q = ffi_tensor(in, "q");
    a->k = ffi_tensor(in, "k");
    a->v = ffi_tensor(in, "v");
    a->out = ffi_tensor_or_null(in, "out");
    a->lse = ffi_tensor_or_null(in, "lse");
    a->softmax_scale = ffi_double(in, "softmax_scale");
    a->causal = ffi_bool(in, "causal");
    a->window_left = ffi_int64(in, "window_left", -1);
    a->window_right = ffi_int64(in, "window_right", -1);
    a->softcap = ffi_double(in, "softcap");
    a->attention_chunk = ffi_int64(in, "attention_chunk", 0);
    a->num_splits = ffi_int32(in, "num_splits", 1);
    a->threads = ffi_int32(in, "threads", 0);
    const int want_accum = ffi_bool(in, "want_accum");
    ffi_optional(in);
    a->cu_seqlens_q = ffi_tensor_or_null(in, "cu_seqlens_q");
    a->cu_seqlens_k = ffi_tensor_or_null(in, "cu_seqlens_k");
    a->max_seqlen_q = ffi_int64(in, "max_seqlen_q", -1);
    a->max_seqlen_k = ffi_int64(in, "max_seqlen_k", -1);
    a->seqused_q = ffi_tensor_or_null(in, "seqused_q");
    a->seqused_k = ffi_tensor_or_null(in, "seqused_k");
    a->page_table = ffi_tensor_or_null(in, "page_table");
    a->kv_batch_idx = ffi_tensor_or_null(in, "kv_batch_idx");
    a->leftpad_k = ffi_tensor_or_null(in, "leftpad_k");
    a->k_new = ffi_tensor_or_null(in, "k_new");
    a->v_new = ffi_tensor_or_null(in, "v_new");
    a->cu_seqlens_k_new = ffi_tensor_or_null(in, "cu_seqlens_k_new");
    a->rotary_cos = ffi_tensor_or_null(in, "rotary_cos");
    a->rotary_sin = ffi_tensor_or_null(in, "rotary_sin");
    a->seqlens_rotary = ffi_tensor_or_null(in, "seqlens_rotary");
    a->rotary_interleaved = ffi_bool(in, "rotary_interleaved");
    a->qv = ffi_tensor_or_null(in, "qv");
    a->q_descale = ffi_tensor_or_null(in, "q_descale");
    a->k_descale = ffi_tensor_or_null(in, "k_descale");
    a->v_descale = ffi_tensor_or_null(in, "v_descale");
    a->sinks = ffi_tensor_or_null(in, "sinks");
    a->cp_world_size = ffi_int32(in, "cp_world_size", 1);
    a->cp_rank = ffi_int32(in, "cp_rank", 0);
    a->cp_tot_seqused_k = ffi_tensor_or_null(in, "cp_tot_seqused_k");
    a->scheduler_metadata = ffi_tensor_or_null(in, "scheduler_metadata");
    a->pack_gqa = ffi_int32(in, "pack_gqa", -1);
    a->sm_margin = ffi_int32(in, "sm_margin", 0);
    a->out_accum = ffi_tensor_or_null(in, "out_accum");
    a->lse_accum = ffi_tensor_or_null(in, "lse_accum");
    return want_accum;
}

/* ---- outputs in scratch ---------------------------------------------------------------------- */

/* A contiguous fp32 tensor that the caller does not want to see. */
typedef struct hidden_tensor {
    DLTensor tensor;
    int64_t shape[5], strides[5];
    int64_t bytes; /* rounded up to SCRATCH_PART; 0: not there */
} hidden_tensor;

/* Shape [splits (0: none), (b,) h_q, s_q or t_q, width (0: none)] from q; -1 past 2^62 bytes. */
static int lay_out(hidden_tensor *h, const struct attn_mha_fwd_args *a, int64_t splits,
                   int64_t width)
{
    const int packed = a->cu_seqlens_q != NULL;
    const DLTensor *q = a->q;
    int32_t ndim = 0;
    if (splits) h->shape[ndim++] = splits;
    if (!packed) h->shape[ndim++] = q->shape[0];
    h->shape[ndim++] = q->shape[packed ? 1 : 2];
    h->shape[ndim++] = q->shape[packed ? 0 : 1];
    if (width) h->shape[ndim++] = width;
    h->tensor = (DLTensor){.device = q->device,
                           .ndim = ndim,
                           .dtype = {.code = kDLFloat, .bits = 32, .lanes = 1},
                           .shape = h->shape,
                           .strides = h->strides};
    int64_t n = 1;
    for (int32_t i = ndim - 1; i >= 0; i--) {
        h->strides[i] = n;
        if (__builtin_mul_overflow(n, h->shape[i], &n) || n > ((int64_t)1 << 58))
            return ffi_raise("MemoryError", "partial results too large");
    }
    h->bytes = (n * 4 + SCRATCH_PART - 1) / SCRATCH_PART * SCRATCH_PART;
    return 0;
}

/* Runs with the workspace in scratch, and there too the outputs that the caller left out: on a CPU
 * the lse, and the partial results of a split call. */
static int run_in_scratch(struct attn_mha_fwd_args *a, const struct attn_mha_fwd_plan *plan)
{
    hidden_tensor lse, out_accum, lse_accum;
    const int hide_lse = !a->lse && a->q->device.device_type == kDLCPU;
    const int hide_accum = plan->splits > 1 && !a->out_accum && !a->lse_accum;
    lse.bytes = out_accum.bytes = lse_accum.bytes = 0;
    if (hide_lse && lay_out(&lse, a, 0, 0)) return -1;
    if (hide_accum) {
        if (lay_out(&out_accum, a, plan->splits, a->v->shape[a->v->ndim - 1])) return -1;
        if (lay_out(&lse_accum, a, plan->splits, 0)) return -1;
    }

    const int64_t part = SCRATCH_PART, own = (plan->workspace_bytes + part - 1) / part * part;
    int64_t bytes = lse.bytes + out_accum.bytes + lse_accum.bytes;
    if (__builtin_add_overflow(bytes, own, &bytes))
        return ffi_raise("MemoryError", "workspace too large");
    ffi_scratch scratch;
    if (ffi_scratch_take(&scratch, a->q, bytes)) return -1;
    char *at = scratch.memory;
    void *const workspace = own ? at : NULL;
    at += own;
    if (hide_lse) {
        lse.tensor.data = at;
        a->lse = &lse.tensor;
        at += lse.bytes;
    }
    if (hide_accum) {
        out_accum.tensor.data = at;
        lse_accum.tensor.data = at + out_accum.bytes;
        a->out_accum = &out_accum.tensor;
        a->lse_accum = &lse_accum.tensor;
    }
    const attn_status status = attn_mha_fwd_run(a, plan, workspace, plan->workspace_bytes,
                                                ffi_stream(a->q));
    ffi_scratch_give(&scratch);
    return ffi_status(status);
}

/* ---- the last plan ------------------------------------------------------------------------------- */

/* On a GPU a plan comes of types, extents, strides and numbers alone, and the layers of a model make the
 * same call one after the other: each thread keeps its last plan and the arguments it was made for,
 * without addresses.  Whatever else may be wrong with a call, run checks everything again. */
#define KEY_MAX 256
static _Thread_local struct {
    int64_t key[KEY_MAX];
    int32_t words; /* of key; 0: no plan is kept */
    struct attn_mha_fwd_plan plan;
} last;

/* Words that two calls share if and only if one plan is right for both; 0 when there are too many. */
static int32_t describe(const TVMFFIAny *args, int32_t count, int64_t key[KEY_MAX])
{
    int32_t n = 0;
    for (int32_t i = 0; i < count; i++) {
        const DLTensor *t = ffi_tensor_of(&args[i]);
        const int32_t ndim = t ? t->ndim : 0;
        if (ndim < 0 || ndim > KEY_MAX / 2 || n + 3 + 2 * ndim > KEY_MAX || (t && !t->strides))
            return 0;
        key[n++] = args[i].type_index;
        if (!t) {
            key[n++] = args[i].v_int64;
            continue;
        }
        key[n++] = (int64_t)t->device.device_type << 32 | t->device.device_id;
        key[n++] = (int64_t)ndim << 32 | (int64_t)t->dtype.code << 24 | t->dtype.bits << 16 |
                   t->dtype.lanes;
        memcpy(key + n, t->shape, (size_t)ndim * sizeof *key);
        memcpy(key + n + ndim, t->strides, (size_t)ndim * sizeof *key);
        n += 2 * ndim;
    }
    return n;
}

static int find_plan(const struct attn_mha_fwd_args *a, const TVMFFIAny *args, int32_t count,
                     struct attn_mha_fwd_plan *plan)
{
    int64_t key[KEY_MAX];
    const int cpu = a->q->device.device_type == kDLCPU;
    const int32_t words = cpu ? 0 : describe(args, count, key);
    const size_t bytes = (size_t)words * sizeof *key;
    if (words == 0 || words != last.words || memcmp(key, last.key, bytes) != 0) {
        plan->size = sizeof *plan;
        if (ffi_status(attn_mha_fwd_plan(a, plan))) return -1;
        if (words == 0) return 0;
        memcpy(last.key, key, bytes);
        last.words = words;
        last.plan = *plan;
    }
    *plan = last.plan;
    return 0;
}

/* ---- functions ----------------------------------------------------------------------------------- */

/* mha_fwd(...) -> int.  0: done.  n > 1: nothing ran, as the caller wants the partial
 * results of what will be n splits; call again with out_accum and lse_accum. */
FFI_FUNCTION(mha_fwd)
{
    (void)self;
    struct attn_mha_fwd_args a;
    struct attn_mha_fwd_plan plan;
    ffi_args in = ffi_begin("mha_fwd", args, count);
    const int want_accum = read_mha_fwd(&a, &in);
    if (ffi_end(&in)) return -1;

    if (find_plan(&a, args, count, &plan)) return -1;
    if (plan.splits > 1 && want_accum && !a.out_accum && !a.lse_accum) {
        ffi_return_int(result, plan.splits);
        return 0;
    }
    if (run_in_scratch(&a, &plan)) return -1;
    ffi_return_int(result, 0);
    return 0;
}

/* mha_fwd_plan(...) -> "kernel splits workspace_bytes piece".  Out and lse may be None. */
FFI_FUNCTION(mha_fwd_plan)
{
    (void)self;
    struct attn_mha_fwd_args a;
    struct attn_mha_fwd_plan plan;
    ffi_args in = ffi_begin("mha_fwd_plan", args, count);
    read_mha_fwd(&a, &in);
    if (ffi_end(&in)) return -1;
    plan.size = sizeof plan;
    if (ffi_status(attn_mha_fwd_plan(&a, &plan))) return -1;
    char text[sizeof plan.kernel + 96];
    snprintf(text, sizeof text, "%.*s %d %lld %lld", (int)sizeof plan.kernel, plan.kernel,
             (int)plan.splits, (long long)plan.workspace_bytes, (long long)plan.piece);
    return ffi_return_text(result, text);
}

/* mha_fwd_ref(...) -> 0: the scalar oracle, CPU tensors only; it never splits. */
FFI_FUNCTION(mha_fwd_ref)
{
    (void)self;
    struct attn_mha_fwd_args a;
    ffi_args in = ffi_begin("mha_fwd_ref", args, count);
    read_mha_fwd(&a, &in);
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
    a.threads = ffi_int32(&in, "threads", 0);
    if (ffi_end(&in)) return -1;
    return ffi_status(attn_split_combine_run(&a, ffi_stream(a.out)));
}

/* mha_metadata_length(b, s_q, s_k, d_qk, paged, causal, window_left, window_right, chunk) -> int */
FFI_FUNCTION(mha_metadata_length)
{
    (void)self;
    ffi_args in = ffi_begin("mha_metadata_length", args, count);
    const int64_t b = ffi_int64(&in, "batch_size", 0);
    const int64_t s_q = ffi_int64(&in, "max_seqlen_q", 0);
    const int64_t s_k = ffi_int64(&in, "max_seqlen_k", 0);
    const int64_t d_qk = ffi_int64(&in, "headdim", 0);
    const int32_t paged = ffi_bool(&in, "page_size"), causal = ffi_bool(&in, "causal");
    const int64_t left = ffi_int64(&in, "window_left", -1);
    const int64_t right = ffi_int64(&in, "window_right", -1);
    const int64_t chunk = ffi_int64(&in, "attention_chunk", 0);
    if (ffi_end(&in)) return -1;
    if (b < 0 || b > INT32_MAX) {
        char message[96];
        snprintf(message, sizeof message, "batch_size: expected in [0, 2^31), got %lld",
                 (long long)b);
        return ffi_raise("libattn.ArgumentError", message);
    }
    ffi_return_int(result,
                   attn_mha_metadata_length(b, s_q, s_k, d_qk, paged, causal, left, right, chunk));
    return 0;
}
