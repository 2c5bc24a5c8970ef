/* SPDX-License-Identifier: MIT
 *
 * mla_decode: the checks.  Values inside cache_seqlens and block_table are not looked at here: the
 * CPU back end checks the live ones before it writes anything, a GPU clamps or skips.
 */
#include "core/tensor.h"
#include "ops/call.h"
#include "ops/mla.h"

#define KEYS_MAX (ATTN_EXTENT_MAX - 1023) /* key indices, and a block beyond, fit an int32 */

typedef struct attn_mla_decode_args args_t;
typedef struct attn_mla_problem problem_t;

static attn_status check_cache(const args_t *a, problem_t *p)
{
    char text[128];
    const char *wish = "[num_pages, page, h_k, d_qk]";
    enum attn_dtype got = ATTN_F32;
    const DLTensor *k = a->k_cache;
    ATTN_TRY(
        attn_mla_shape_check(k, "k_cache", wish, 4, (int64_t[]){-1, -1, -1, p->d_qk}, p->device));
    ATTN_TRY(attn_tensor_dtype(k, "k_cache", attn_dtype_name(p->dtype), &got));
    ATTN_CHECK(got == p->dtype, ATTN_E_DTYPE, "k_cache: expected q's dtype %s, got %s",
               attn_dtype_name(p->dtype), attn_dtype_name(got));
    ATTN_TRY(attn_mla_last_stride_check(k, "k_cache"));
    p->h_k = k->shape[2];
    ATTN_CHECK(p->h_k > 0 && p->h_q % p->h_k == 0, ATTN_E_SHAPE,
               "q: expected h_q a multiple of k_cache's %lld heads, got %lld", (long long)p->h_k,
               (long long)p->h_q);
    ATTN_CHECK(k->shape[1] > 0, ATTN_E_SHAPE, "k_cache: expected pages of at least 1 token, got %s",
               attn_tensor_shape_text(k, text));
    int64_t bytes = attn_dtype_bytes(p->dtype);
    p->format = (enum attn_mla_format)p->dtype;
    p->cache[0] = (struct attn_mla_cache){
        .data = attn_tensor_data(k),
        .num_pages = k->shape[0],
        .page = k->shape[1],
        .page_stride = bytes * attn_tensor_stride(k, 0),
        .row_stride = bytes * attn_tensor_stride(k, 1),
        .head_stride = bytes * attn_tensor_stride(k, 2),
    };

    const DLTensor *t = a->block_table;
    ATTN_TRY(attn_mla_shape_check(t, "block_table", "[b, max_pages]", 2, (int64_t[]){p->b, -1},
                                  p->device));
    ATTN_CHECK(t->dtype.code == kDLInt && t->dtype.bits == 32, ATTN_E_DTYPE,
               "block_table: expected dtype int32, got %s", attn_tensor_dtype_text(t, text));
    ATTN_TRY(attn_mla_last_stride_check(t, "block_table"));
    p->block_table = (const int32_t *)(void *)attn_tensor_data(t);
    p->block_table_row = attn_tensor_stride(t, 0);
    p->max_pages = t->shape[1];
    ATTN_CHECK(p->max_pages <= KEYS_MAX / p->cache[0].page, ATTN_E_SHAPE,
               "block_table: expected room for at most %lld keys a sequence, got %lld pages of "
               "%lld",
               (long long)KEYS_MAX, (long long)p->max_pages, (long long)p->cache[0].page);

    ATTN_CHECK(a->cache_seqlens, ATTN_E_VALUE, "cache_seqlens: expected a tensor, got none");
    ATTN_TRY(attn_index_check(a->cache_seqlens, "cache_seqlens", p->b, p->device));
    p->cache_seqlens = (const int32_t *)(void *)attn_tensor_data(a->cache_seqlens);
    return ATTN_OK;
}

static attn_status check_descale(const DLTensor *t, const char *name, const problem_t *p,
                                 const float **data)
{
    char text[32];
    bool fp8 = p->dtype == ATTN_F8;
    ATTN_CHECK(!fp8 || t, ATTN_E_VALUE, "%s: expected a tensor with fp8, got none", name);
    ATTN_CHECK(fp8 || !t, ATTN_E_VALUE, "%s: expected none with %s, got a tensor", name,
               attn_dtype_name(p->dtype));
    if (!t) return ATTN_OK;
    ATTN_TRY(attn_mla_shape_check(t, name, "[1]", 1, (int64_t[]){1}, p->device));
    ATTN_CHECK(t->dtype.code == kDLFloat && t->dtype.bits == 32, ATTN_E_DTYPE,
               "%s: expected dtype fp32, got %s", name, attn_tensor_dtype_text(t, text));
    *data = (const float *)(void *)attn_tensor_data(t);
    return ATTN_OK;
}

static attn_status check_outputs(const args_t *a, problem_t *p)
{
    const DLTensor *read[] = {a->block_table, a->cache_seqlens};
    const char *const names[] = {"block_table", "cache_seqlens"};
    const DLTensor *written[] = {a->out, a->lse};
    ATTN_TRY(attn_mla_results_check(a->out, a->lse, p));
    return attn_mla_apart_check(read, names, 2, written, 2);
}

attn_status attn_mla_decode_check(const args_t *a, problem_t *p, bool outputs)
{
    ATTN_TRY(attn_struct_check("args", a, sizeof *a));
    *p = (problem_t){.op = ATTN_MLA_DECODE, .threads = a->threads};
    ATTN_TRY(attn_mla_query_check(a->q, 4, "[b, s_q, h_q, d_qk]",
                                  "bf16, fp16, fp8 e4m3fn or (CPU) fp32", 0xf, p));
    p->b = a->q->shape[0];
    p->s_q = a->q->shape[1];
    ATTN_CHECK(p->b > 0, ATTN_E_SHAPE, "q: expected [b, s_q, h_q, d_qk] with b > 0, got b 0");
    p->q.batch = attn_tensor_stride(a->q, 0);
    p->q.row = attn_tensor_stride(a->q, 1);
    p->causal = a->causal != 0 && p->s_q > 1;
    ATTN_TRY(attn_mla_numbers_check(a->softmax_scale, a->head_dim_v, p));
    ATTN_TRY(check_cache(a, p));
    ATTN_TRY(check_descale(a->descale_q, "descale_q", p, &p->descale_q));
    ATTN_TRY(check_descale(a->descale_k, "descale_k", p, &p->descale_k));
    return outputs ? check_outputs(a, p) : ATTN_OK;
}

attn_status attn_mla_decode_plan(const args_t *args, struct attn_mla_plan *plan)
{
    problem_t p;
    ATTN_TRY(attn_mla_decode_check(args, &p, false));
    return attn_mla_plan_problem(&p, plan);
}

attn_status attn_mla_decode_run(const args_t *args, const struct attn_mla_plan *plan,
                                void *workspace, int64_t workspace_bytes, void *stream)
{
    problem_t p;
    ATTN_TRY(attn_mla_decode_check(args, &p, true));
    return attn_mla_run_problem(&p, plan, workspace, workspace_bytes, stream);
}
