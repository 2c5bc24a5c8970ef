/* SPDX-License-Identifier: MIT
 *
 * What the mla ops share: checks of tensors that all have, and the way to the back end.
 */
#include "ops/mla.h"

#include "core/env.h"
#include "core/tensor.h"
#include "ops/backend.h"
#include "ops/call.h"

#define SCALE_MAX 1e30 /* beyond it a float of the kernels overflows */

const char *attn_mla_op_name(enum attn_mla_op op)
{
    static const char *const names[] = {"mla_decode", "mla_sparse_decode", "mla_sparse_fwd"};
    return names[op];
}

attn_status attn_mla_shape_check(const DLTensor *t, const char *name, const char *wish,
                                 int32_t ndim, const int64_t *want, DLDevice device)
{
    char text[128];
    ATTN_CHECK(t, ATTN_E_VALUE, "%s: expected a tensor, got none", name);
    ATTN_TRY(attn_tensor_check(t, name, ndim, wish));
    ATTN_TRY(attn_device_check(t, name, device));
    for (int32_t i = 0; i < ndim; ++i)
        ATTN_CHECK(want[i] < 0 || t->shape[i] == want[i], ATTN_E_SHAPE,
                   "%s: expected %s with extent %lld in dimension %d, got %s", name, wish,
                   (long long)want[i], (int)i, attn_tensor_shape_text(t, text));
    return ATTN_OK;
}

attn_status attn_mla_last_stride_check(const DLTensor *t, const char *name)
{
    int32_t last = t->ndim - 1;
    ATTN_CHECK(t->shape[last] <= 1 || attn_tensor_empty(t) || attn_tensor_stride(t, last) == 1,
               ATTN_E_SHAPE, "%s: expected last stride 1, got %lld", name,
               (long long)attn_tensor_stride(t, last));
    return ATTN_OK;
}

attn_status attn_mla_query_check(const DLTensor *q, int32_t ndim, const char *shape,
                                 const char *dtypes, unsigned allowed, struct attn_mla_problem *p)
{
    char text[128];
    ATTN_CHECK(q, ATTN_E_VALUE, "q: expected a tensor, got none");
    p->device = q->device;
    ATTN_CHECK(p->device.device_type == kDLCPU || p->device.device_type == kDLCUDA, ATTN_E_DEVICE,
               "q: expected on a CPU or CUDA device, got DLPack device type %d",
               (int)p->device.device_type);
    ATTN_TRY(attn_tensor_dtype(q, "q", dtypes, &p->dtype));
    ATTN_CHECK(allowed >> p->dtype & 1, ATTN_E_DTYPE, "q: expected dtype %s, got %s", dtypes,
               attn_dtype_name(p->dtype));
    ATTN_CHECK(p->dtype != ATTN_F32 || p->device.device_type == kDLCPU, ATTN_E_DTYPE,
               "q: expected dtype %s on a GPU, got fp32",
               allowed >> ATTN_F8 & 1 ? "bf16, fp16 or fp8 e4m3fn" : "bf16 or fp16");
    p->out_dtype = attn_dtype_out(p->dtype);
    ATTN_TRY(attn_tensor_check(q, "q", ndim, shape));
    ATTN_TRY(attn_mla_last_stride_check(q, "q"));
    p->h_q = q->shape[ndim - 2];
    p->d_qk = q->shape[ndim - 1];
    ATTN_CHECK(p->h_q > 0, ATTN_E_SHAPE, "q: expected %s with h_q > 0, got %s", shape,
               attn_tensor_shape_text(q, text));
    ATTN_CHECK(p->d_qk == ATTN_MLA_LATENT + ATTN_MLA_ROPE || p->d_qk == ATTN_MLA_LATENT,
               ATTN_E_SHAPE, "q: expected %s with d_qk 576 or 512, got %s", shape,
               attn_tensor_shape_text(q, text));
    p->q.data = attn_tensor_data(q);
    p->q.head = attn_tensor_stride(q, ndim - 2);
    return ATTN_OK;
}

attn_status attn_mla_numbers_check(double softmax_scale, int64_t head_dim_v,
                                   struct attn_mla_problem *p)
{
    ATTN_CHECK(fabs(softmax_scale) <= SCALE_MAX, ATTN_E_VALUE,
               "softmax_scale: expected a finite number of at most %g, got %g", SCALE_MAX,
               softmax_scale);
    ATTN_CHECK(head_dim_v == ATTN_MLA_LATENT, ATTN_E_SHAPE, "head_dim_v: expected %d, got %lld",
               ATTN_MLA_LATENT, (long long)head_dim_v);
    p->scale = softmax_scale;
    p->d_v = head_dim_v;
    return ATTN_OK;
}

attn_status attn_mla_pages_check(const DLTensor *t, const char *name, int64_t d_qk, DLDevice device,
                                 struct attn_mla_cache *cache)
{
    char text[128];
    bool v32 = d_qk == ATTN_MLA_LATENT + ATTN_MLA_ROPE;
    int64_t bytes = v32 ? ATTN_V32_BYTES : ATTN_MODEL1_BYTES;
    const char *wish = v32 ? "[num_pages, page, 1, 656] for d_qk 576"
                           : "[num_pages, page, 1, 584] for d_qk 512";
    ATTN_TRY(attn_mla_shape_check(t, name, wish, 4, (int64_t[]){-1, -1, 1, bytes}, device));
    ATTN_CHECK(t->dtype.bits == 8 && (t->dtype.code == kDLUInt || t->dtype.code == kDLInt ||
                                      t->dtype.code == kDLFloat8_e4m3fn),
               ATTN_E_DTYPE, "%s: expected dtype uint8, int8 or fp8 e4m3fn, got %s", name,
               attn_tensor_dtype_text(t, text));
    ATTN_CHECK(t->shape[1] > 0, ATTN_E_SHAPE, "%s: expected pages of at least 1 token, got %s",
               name, attn_tensor_shape_text(t, text));
    ATTN_TRY(attn_mla_last_stride_check(t, name));
    ATTN_CHECK(t->shape[1] <= 1 || attn_tensor_empty(t) || attn_tensor_stride(t, 1) == bytes,
               ATTN_E_SHAPE, "%s: expected stride %lld in dimension 1, got %lld", name,
               (long long)bytes, (long long)attn_tensor_stride(t, 1));
    *cache = (struct attn_mla_cache){
        .data = attn_tensor_data(t),
        .num_pages = t->shape[0],
        .page = t->shape[1],
        .page_stride = attn_tensor_stride(t, 0),
        .row_stride = v32 ? ATTN_V32_BYTES : ATTN_MODEL1_ROW_BYTES,
    };
    return ATTN_OK;
}

attn_status attn_mla_sink_check(const DLTensor *sink, struct attn_mla_problem *p)
{
    char text[32];
    if (!sink) return ATTN_OK;
    ATTN_TRY(attn_mla_shape_check(sink, "attn_sink", "[h_q]", 1, &p->h_q, p->device));
    ATTN_CHECK(sink->dtype.code == kDLFloat && sink->dtype.bits == 32, ATTN_E_DTYPE,
               "attn_sink: expected dtype fp32, got %s", attn_tensor_dtype_text(sink, text));
    p->sink = (const float *)(void *)attn_tensor_data(sink);
    p->sink_stride = attn_tensor_stride(sink, 0);
    return ATTN_OK;
}

attn_status attn_mla_float_check(const DLTensor *t, const char *name, const char *wish,
                                 int32_t ndim, const int64_t *want, DLDevice device, float **data)
{
    char text[32];
    ATTN_TRY(attn_mla_shape_check(t, name, wish, ndim, want, device));
    ATTN_CHECK(t->dtype.code == kDLFloat && t->dtype.bits == 32, ATTN_E_DTYPE,
               "%s: expected dtype fp32, got %s", name, attn_tensor_dtype_text(t, text));
    *data = (float *)(void *)attn_tensor_data(t);
    return attn_distinct_check(t, name);
}

attn_status attn_mla_out_check(const DLTensor *t, const char *wish, int32_t ndim,
                               const int64_t *want, const struct attn_mla_problem *p)
{
    enum attn_dtype got = ATTN_F32;
    ATTN_TRY(attn_mla_shape_check(t, "out", wish, ndim, want, p->device));
    ATTN_TRY(attn_tensor_dtype(t, "out", attn_dtype_name(p->out_dtype), &got));
    ATTN_CHECK(got == p->out_dtype, ATTN_E_DTYPE, "out: expected dtype %s, got %s",
               attn_dtype_name(p->out_dtype), attn_dtype_name(got));
    ATTN_TRY(attn_mla_last_stride_check(t, "out"));
    return attn_distinct_check(t, "out");
}

attn_status attn_mla_results_check(const DLTensor *out, const DLTensor *lse,
                                   struct attn_mla_problem *p)
{
    ATTN_TRY(attn_mla_out_check(out, "[b, s_q, h_q, head_dim_v]", 4,
                                (int64_t[]){p->b, p->s_q, p->h_q, p->d_v}, p));
    p->out = (struct attn_rows){attn_tensor_data(out), attn_tensor_stride(out, 0),
                                attn_tensor_stride(out, 1), attn_tensor_stride(out, 2)};
    ATTN_TRY(attn_mla_float_check(lse, "lse", "[b, h_q, s_q]", 3, (int64_t[]){p->b, p->h_q, p->s_q},
                                  p->device, &p->lse));
    p->lse_batch = attn_tensor_stride(lse, 0);
    p->lse_head = attn_tensor_stride(lse, 1);
    p->lse_row = attn_tensor_stride(lse, 2);
    return ATTN_OK;
}

attn_status attn_mla_apart_check(const DLTensor *const *read, const char *const *names, int reads,
                                 const DLTensor *const *written, int writes)
{
    for (int i = 0; i < reads; ++i) ATTN_TRY(attn_apart_check(read[i], names[i], written, writes));
    return ATTN_OK;
}

/* ---- to the back end ------------------------------------------------------------------------- */

static void shape_of(const struct attn_mla_problem *p, int64_t shape[16])
{
    int64_t kind = (int64_t)p->op | (int64_t)p->dtype << 4 | (int64_t)p->format << 8 |
                   (int64_t)p->causal << 12 | (int64_t)p->device.device_type << 16;
    const int64_t now[16] = {kind,
                             p->b,
                             p->s_q,
                             p->h_q,
                             p->h_k,
                             p->d_qk,
                             p->d_v,
                             p->cache[0].page,
                             p->cache[1].page,
                             p->max_pages,
                             p->list[0].topk,
                             p->list[1].topk};
    memcpy(shape, now, sizeof now);
}

attn_status attn_mla_plan_problem(const struct attn_mla_problem *p, struct attn_mla_plan *plan)
{
    const struct attn_backend *backend = attn_backend_for(p->device.device_type);
    ATTN_TRY(attn_struct_check("plan", plan, sizeof *plan));
    memset(plan, 0, sizeof *plan);
    plan->size = sizeof *plan;
    shape_of(p, plan->shape);
    return backend->mla_plan(p, plan);
}

attn_status attn_mla_run_problem(const struct attn_mla_problem *p, const struct attn_mla_plan *plan,
                                 void *workspace, int64_t workspace_bytes, void *stream)
{
    int64_t shape[16];
    const struct attn_backend *backend = attn_backend_for(p->device.device_type);
    ATTN_TRY(attn_plan_check(attn_mla_op_name(p->op), plan, sizeof *plan));
    shape_of(p, shape);
    ATTN_CHECK(memcmp(shape, plan->shape, sizeof shape) == 0, ATTN_E_VALUE,
               "plan: expected one made for these shapes, got another's");
    ATTN_TRY(attn_workspace_check(workspace, workspace_bytes, plan->workspace_bytes));
    if (attn_log_on())
        attn_log("%s for %s b %lld s_q %lld h %lld/%lld d %lld/%lld page %lld keys %lld "
                 "workspace %lld",
                 plan->kernel, attn_mla_op_name(p->op), (long long)p->b, (long long)p->s_q,
                 (long long)p->h_q, (long long)p->h_k, (long long)p->d_qk, (long long)p->d_v,
                 (long long)p->cache[0].page,
                 (long long)(p->block_table ? p->max_pages * p->cache[0].page
                                            : p->list[0].topk + p->list[1].topk),
                 (long long)plan->workspace_bytes);
    return backend->mla_run(p, plan, workspace, workspace_bytes, stream);
}
