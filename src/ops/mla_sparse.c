/* SPDX-License-Identifier: MIT
 *
 * mla_sparse_decode and mla_sparse_fwd: the checks.  Indices and lengths are values of the call,
 * never errors: what is out of range is skipped, a length is held to [0, topk].
 */
#include "core/tensor.h"
#include "ops/call.h"
#include "ops/mla.h"

typedef struct attn_mla_problem problem_t;

/* indices of shape want[3], whose last extent is topk, and the lengths that go with them. */
static attn_status check_list(const DLTensor *t, const char *name, const char *wish,
                              const int64_t want[3], const DLTensor *length,
                              const char *length_name, const problem_t *p,
                              struct attn_mla_list *list)
{
    char text[128];
    ATTN_TRY(attn_mla_shape_check(t, name, wish, 3, want, p->device));
    ATTN_CHECK(t->dtype.code == kDLInt && t->dtype.bits == 32, ATTN_E_DTYPE,
               "%s: expected dtype int32, got %s", name, attn_tensor_dtype_text(t, text));
    ATTN_TRY(attn_mla_last_stride_check(t, name));
    ATTN_CHECK(t->shape[2] > 0, ATTN_E_SHAPE, "%s: expected %s with topk > 0, got %s", name, wish,
               attn_tensor_shape_text(t, text));
    *list = (struct attn_mla_list){
        .indices = (const int32_t *)(void *)attn_tensor_data(t),
        .batch = attn_tensor_stride(t, 0),
        .row = attn_tensor_stride(t, 1),
        .topk = t->shape[2],
    };
    if (!length) return ATTN_OK;
    ATTN_TRY(attn_index_check(length, length_name, p->b, p->device));
    list->length = (const int32_t *)(void *)attn_tensor_data(length);
    return ATTN_OK;
}

/* ---- mla_sparse_decode ----------------------------------------------------------------------- */

static attn_status check_extra(const struct attn_mla_sparse_decode_args *a, problem_t *p)
{
    ATTN_CHECK(!a->extra_k_cache == !a->extra_indices_in_kvcache, ATTN_E_VALUE,
               "%s: expected both extra_k_cache and extra_indices_in_kvcache or neither, got one",
               a->extra_k_cache ? "extra_indices_in_kvcache" : "extra_k_cache");
    ATTN_CHECK(a->extra_k_cache || !a->extra_topk_length, ATTN_E_VALUE,
               "extra_topk_length: expected none without extra_k_cache, got a tensor");
    if (!a->extra_k_cache) return ATTN_OK;
    ATTN_TRY(
        attn_mla_pages_check(a->extra_k_cache, "extra_k_cache", p->d_qk, p->device, &p->cache[1]));
    return check_list(a->extra_indices_in_kvcache, "extra_indices_in_kvcache",
                      "[b, s_q, extra_topk]", (int64_t[]){p->b, p->s_q, -1}, a->extra_topk_length,
                      "extra_topk_length", p, &p->list[1]);
}

static attn_status check_decode_outputs(const struct attn_mla_sparse_decode_args *a, problem_t *p)
{
    const DLTensor *read[] = {a->indices, a->topk_length, a->extra_indices_in_kvcache,
                              a->extra_topk_length};
    const char *const names[] = {"indices", "topk_length", "extra_indices_in_kvcache",
                                 "extra_topk_length"};
    const DLTensor *written[] = {a->out, a->lse};
    ATTN_TRY(attn_mla_results_check(a->out, a->lse, p));
    return attn_mla_apart_check(read, names, 4, written, 2);
}

attn_status attn_mla_sparse_decode_check(const struct attn_mla_sparse_decode_args *a, problem_t *p,
                                         bool outputs)
{
    char text[128];
    ATTN_TRY(attn_struct_check("args", a, sizeof *a));
    *p = (problem_t){.op = ATTN_MLA_SPARSE_DECODE, .threads = a->threads, .h_k = 1};
    ATTN_TRY(attn_mla_query_check(a->q, 4, "[b, s_q, h_q, d_qk]", "bf16", 1u << ATTN_BF16, p));
    p->b = a->q->shape[0];
    p->s_q = a->q->shape[1];
    ATTN_CHECK(p->b > 0 && p->s_q > 0, ATTN_E_SHAPE,
               "q: expected [b, s_q, h_q, d_qk] with b, s_q > 0, got %s",
               attn_tensor_shape_text(a->q, text));
    p->q.batch = attn_tensor_stride(a->q, 0);
    p->q.row = attn_tensor_stride(a->q, 1);
    p->format = p->d_qk == ATTN_MLA_LATENT ? ATTN_MLA_MODEL1 : ATTN_MLA_V32;
    ATTN_TRY(attn_mla_numbers_check(a->softmax_scale, a->head_dim_v, p));
    ATTN_TRY(attn_mla_pages_check(a->k_cache, "k_cache", p->d_qk, p->device, &p->cache[0]));
    ATTN_TRY(check_list(a->indices, "indices", "[b, s_q, topk]", (int64_t[]){p->b, p->s_q, -1},
                        a->topk_length, "topk_length", p, &p->list[0]));
    ATTN_TRY(check_extra(a, p));
    ATTN_TRY(attn_mla_sink_check(a->attn_sink, p));
    return outputs ? check_decode_outputs(a, p) : ATTN_OK;
}

attn_status attn_mla_sparse_decode_plan(const struct attn_mla_sparse_decode_args *args,
                                        struct attn_mla_plan *plan)
{
    problem_t p;
    ATTN_TRY(attn_mla_sparse_decode_check(args, &p, false));
    return attn_mla_plan_problem(&p, plan);
}

attn_status attn_mla_sparse_decode_run(const struct attn_mla_sparse_decode_args *args,
                                       const struct attn_mla_plan *plan, void *workspace,
                                       int64_t workspace_bytes, void *stream)
{
    problem_t p;
    ATTN_TRY(attn_mla_sparse_decode_check(args, &p, true));
    return attn_mla_run_problem(&p, plan, workspace, workspace_bytes, stream);
}

/* ---- mla_sparse_fwd: every query token is a batch entry of one token ------------------------- */

static attn_status check_fwd_outputs(const struct attn_mla_sparse_fwd_args *a, problem_t *p)
{
    const DLTensor *read[] = {a->indices, a->topk_length};
    const char *const names[] = {"indices", "topk_length"};
    const DLTensor *written[] = {a->out, a->max_logits, a->lse};
    const int64_t want[2] = {p->b, p->h_q};
    ATTN_TRY(
        attn_mla_out_check(a->out, "[s_q, h_q, d_v]", 3, (int64_t[]){p->b, p->h_q, p->d_v}, p));
    p->out = (struct attn_rows){attn_tensor_data(a->out), attn_tensor_stride(a->out, 0), 0,
                                attn_tensor_stride(a->out, 1)};
    ATTN_TRY(attn_mla_float_check(a->max_logits, "max_logits", "[s_q, h_q]", 2, want, p->device,
                                  &p->max_logits));
    p->max_batch = attn_tensor_stride(a->max_logits, 0);
    p->max_head = attn_tensor_stride(a->max_logits, 1);
    ATTN_TRY(attn_mla_float_check(a->lse, "lse", "[s_q, h_q]", 2, want, p->device, &p->lse));
    p->lse_batch = attn_tensor_stride(a->lse, 0);
    p->lse_head = attn_tensor_stride(a->lse, 1);
    return attn_mla_apart_check(read, names, 2, written, 3);
}

attn_status attn_mla_sparse_fwd_check(const struct attn_mla_sparse_fwd_args *a, problem_t *p,
                                      bool outputs)
{
    enum attn_dtype got = ATTN_F32;
    ATTN_TRY(attn_struct_check("args", a, sizeof *a));
    *p = (problem_t){.op = ATTN_MLA_SPARSE_FWD, .threads = a->threads, .h_k = 1, .s_q = 1};
    ATTN_TRY(attn_mla_query_check(a->q, 3, "[s_q, h_q, d_qk]", "bf16, fp16 or (CPU) fp32",
                                  1u << ATTN_BF16 | 1u << ATTN_F16 | 1u << ATTN_F32, p));
    p->b = a->q->shape[0];
    p->q.batch = attn_tensor_stride(a->q, 0);
    p->format = (enum attn_mla_format)p->dtype;
    ATTN_TRY(attn_mla_numbers_check(a->softmax_scale, a->head_dim_v, p));

    const DLTensor *kv = a->kv;
    ATTN_TRY(attn_mla_shape_check(kv, "kv", "[s_kv, 1, d_qk]", 3, (int64_t[]){-1, 1, p->d_qk},
                                  p->device));
    ATTN_TRY(attn_tensor_dtype(kv, "kv", attn_dtype_name(p->dtype), &got));
    ATTN_CHECK(got == p->dtype, ATTN_E_DTYPE, "kv: expected q's dtype %s, got %s",
               attn_dtype_name(p->dtype), attn_dtype_name(got));
    ATTN_TRY(attn_mla_last_stride_check(kv, "kv"));
    p->cache[0] = (struct attn_mla_cache){
        .data = attn_tensor_data(kv),
        .num_pages = kv->shape[0] > 0,
        .page = kv->shape[0] > 0 ? kv->shape[0] : 1,
        .row_stride = attn_dtype_bytes(p->dtype) * attn_tensor_stride(kv, 0),
    };
    ATTN_TRY(check_list(a->indices, "indices", "[s_q, 1, topk]", (int64_t[]){p->b, 1, -1},
                        a->topk_length, "topk_length", p, &p->list[0]));
    ATTN_TRY(attn_mla_sink_check(a->attn_sink, p));
    return outputs ? check_fwd_outputs(a, p) : ATTN_OK;
}

attn_status attn_mla_sparse_fwd_plan(const struct attn_mla_sparse_fwd_args *args,
                                     struct attn_mla_plan *plan)
{
    problem_t p;
    ATTN_TRY(attn_mla_sparse_fwd_check(args, &p, false));
    return attn_mla_plan_problem(&p, plan);
}

attn_status attn_mla_sparse_fwd_run(const struct attn_mla_sparse_fwd_args *args,
                                    const struct attn_mla_plan *plan, void *workspace,
                                    int64_t workspace_bytes, void *stream)
{
    problem_t p;
    ATTN_TRY(attn_mla_sparse_fwd_check(args, &p, true));
    return attn_mla_run_problem(&p, plan, workspace, workspace_bytes, stream);
}
