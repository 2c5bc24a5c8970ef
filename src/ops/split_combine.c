/* SPDX-License-Identifier: MIT
 *
 * split_combine: checks, and the way to the back end.
 */
#include "ops/split_combine.h"

#include "core/tensor.h"
#include "ops/backend.h"
#include "ops/call.h"

static attn_status check_part(const DLTensor *t, const char *name, const char *wish, int32_t ndim,
                              const int64_t *want, DLDevice device, bool fp32)
{
    char text[128];
    ATTN_CHECK(t, ATTN_E_VALUE, "%s: expected a tensor, got none", name);
    ATTN_TRY(attn_tensor_check(t, name, ndim, wish));
    ATTN_TRY(attn_device_check(t, name, device));
    ATTN_CHECK(!fp32 || (t->dtype.code == kDLFloat && t->dtype.bits == 32), ATTN_E_DTYPE,
               "%s: expected dtype fp32, got %s", name, attn_tensor_dtype_text(t, text));
    for (int32_t i = 0; i < ndim; ++i)
        ATTN_CHECK(t->shape[i] == want[i], ATTN_E_SHAPE,
                   "%s: expected %s with extent %lld in dimension %d, got %s", name, wish,
                   (long long)want[i], (int)i, attn_tensor_shape_text(t, text));
    return ATTN_OK;
}

attn_status attn_split_combine_check(const struct attn_split_combine_args *a,
                                     struct attn_split_combine_problem *p)
{
    char text[128];
    ATTN_TRY(attn_struct_check("args", a, sizeof *a));
    const DLTensor *x = a->out_partial;
    ATTN_CHECK(x, ATTN_E_VALUE, "out_partial: expected a tensor, got none");
    ATTN_CHECK(x->ndim == 5, ATTN_E_SHAPE,
               "out_partial: expected [splits, b, s, h, d_v], got %d dimensions", (int)x->ndim);
    const int64_t *s = x->shape;
    ATTN_TRY(check_part(x, "out_partial", "[splits, b, s, h, d_v]", 5, s, x->device, true));
    ATTN_CHECK(s[0] >= 1 && s[0] <= 256, ATTN_E_SHAPE,
               "out_partial: expected 1 to 256 splits, got %lld", (long long)s[0]);
    ATTN_CHECK(s[4] <= 1 || attn_tensor_empty(x) || attn_tensor_stride(x, 4) == 1, ATTN_E_SHAPE,
               "out_partial: expected last stride 1, got %lld",
               (long long)attn_tensor_stride(x, 4));
    ATTN_TRY(check_part(a->lse_partial, "lse_partial", "[splits, b, s, h]", 4, s, x->device, true));
    ATTN_TRY(check_part(a->out, "out", "[b, s, h, d_v]", 4, s + 1, x->device, false));
    ATTN_TRY(check_part(a->lse, "lse", "[b, s, h]", 3, s + 1, x->device, true));
    ATTN_TRY(attn_distinct_check(a->out, "out"));
    ATTN_TRY(attn_distinct_check(a->lse, "lse"));
    *p = (struct attn_split_combine_problem){
        .device = x->device,
        .threads = a->threads,
        .splits = s[0],
        .b = s[1],
        .s = s[2],
        .h = s[3],
        .d_v = s[4],
        .out_partial = (const float *)attn_tensor_data(x),
        .lse_partial = (const float *)attn_tensor_data(a->lse_partial),
        .out = attn_tensor_data(a->out),
        .lse = (float *)attn_tensor_data(a->lse),
    };
    ATTN_TRY(attn_tensor_dtype(a->out, "out", "fp32, fp16 or bf16", &p->out_dtype));
    ATTN_CHECK(p->out_dtype != ATTN_F8, ATTN_E_DTYPE,
               "out: expected dtype fp32, fp16 or bf16, got fp8");
    ATTN_CHECK(s[4] <= 1 || attn_tensor_empty(a->out) || attn_tensor_stride(a->out, 3) == 1,
               ATTN_E_SHAPE, "out: expected last stride 1, got %s",
               attn_tensor_shape_text(a->out, text));
    for (int32_t i = 0; i < 4; ++i) {
        p->out_partial_stride[i] = attn_tensor_stride(x, i);
        p->lse_partial_stride[i] = attn_tensor_stride(a->lse_partial, i);
        if (i == 3) break;
        p->out_stride[i] = attn_tensor_stride(a->out, i);
        p->lse_stride[i] = attn_tensor_stride(a->lse, i);
    }
    return ATTN_OK;
}

attn_status attn_split_combine_run(const struct attn_split_combine_args *args, void *stream)
{
    struct attn_split_combine_problem p;
    ATTN_TRY(attn_split_combine_check(args, &p));
    const struct attn_backend *backend = attn_backend_for(p.device.device_type);
    ATTN_CHECK(backend, ATTN_E_DEVICE,
               "out_partial: expected on a CPU or CUDA device, got DLPack device type %d",
               (int)p.device.device_type);
    return backend->split_combine_run(&p, stream);
}
