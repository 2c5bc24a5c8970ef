/* SPDX-License-Identifier: MIT
 *
 * mla_cache_quantize and mla_cache_dequantize: the checks.
 */
#include "core/tensor.h"
#include "ops/backend.h"
#include "ops/call.h"
#include "ops/mla.h"

attn_status attn_mla_cache_check(const struct attn_mla_cache_args *a, bool write,
                                 struct attn_mla_cache_problem *p)
{
    char text[128];
    ATTN_TRY(attn_struct_check("args", a, sizeof *a));
    ATTN_CHECK(a->kv, ATTN_E_VALUE, "kv: expected a tensor, got none");
    *p = (struct attn_mla_cache_problem){.device = a->kv->device, .threads = a->threads};
    ATTN_TRY(attn_tensor_dtype(a->kv, "kv", "bf16, fp16 or fp32", &p->dtype));
    ATTN_CHECK(p->dtype != ATTN_F8, ATTN_E_DTYPE, "kv: expected dtype bf16, fp16 or fp32, got fp8");
    ATTN_TRY(attn_tensor_check(a->kv, "kv", 2, "[t, d_qk]"));
    ATTN_TRY(attn_mla_last_stride_check(a->kv, "kv"));
    p->t = a->kv->shape[0];
    p->d = a->kv->shape[1];
    ATTN_CHECK(p->d == ATTN_MLA_LATENT + ATTN_MLA_ROPE || p->d == ATTN_MLA_LATENT, ATTN_E_SHAPE,
               "kv: expected [t, d_qk] with d_qk 576 or 512, got %s",
               attn_tensor_shape_text(a->kv, text));
    p->format = p->d == ATTN_MLA_LATENT ? ATTN_MLA_MODEL1 : ATTN_MLA_V32;
    p->kv = attn_tensor_data(a->kv);
    p->kv_row = attn_tensor_stride(a->kv, 0);
    ATTN_TRY(attn_mla_pages_check(a->cache, "cache", p->d, p->device, &p->cache));
    int64_t page_bytes = p->cache.page *
                         (p->format == ATTN_MLA_V32 ? ATTN_V32_BYTES : ATTN_MODEL1_BYTES);
    ATTN_CHECK(!write || p->cache.num_pages <= 1 || p->cache.page_stride >= page_bytes,
               ATTN_E_SHAPE, "cache: expected pages at least %lld bytes apart, got stride %lld",
               (long long)page_bytes, (long long)p->cache.page_stride);
    ATTN_CHECK(write || p->t <= 1 || p->kv_row > 0, ATTN_E_SHAPE,
               "kv: expected strides > 0, got 0 in dimension 0");
    if (!a->slots) {
        ATTN_CHECK(p->t == p->cache.num_pages * p->cache.page, ATTN_E_SHAPE,
                   "kv: expected all %lld tokens of the cache without slots, got %lld",
                   (long long)(p->cache.num_pages * p->cache.page), (long long)p->t);
        return ATTN_OK;
    }
    ATTN_TRY(attn_mla_shape_check(a->slots, "slots", "[t]", 1, &p->t, p->device));
    ATTN_CHECK(a->slots->dtype.code == kDLInt &&
                   (a->slots->dtype.bits == 32 || a->slots->dtype.bits == 64),
               ATTN_E_DTYPE, "slots: expected dtype int32 or int64, got %s",
               attn_tensor_dtype_text(a->slots, text));
    p->slots = attn_tensor_data(a->slots);
    p->slots_stride = attn_tensor_stride(a->slots, 0);
    p->wide_slots = a->slots->dtype.bits == 64;
    const DLTensor *read[] = {a->slots}, *written[] = {write ? a->cache : a->kv};
    return attn_mla_apart_check(read, (const char *const[]){"slots"}, 1, written, 1);
}

attn_status attn_mla_cache_quantize_run(const struct attn_mla_cache_args *args, void *stream)
{
    struct attn_mla_cache_problem p;
    ATTN_TRY(attn_mla_cache_check(args, true, &p));
    const struct attn_backend *backend = attn_backend_for(p.device.device_type);
    ATTN_CHECK(backend && backend->mla_cache_quantize_run, ATTN_E_NOT_BUILT,
               "mla_cache_quantize: not built for this device, only for CPUs");
    return backend->mla_cache_quantize_run(&p, stream);
}

attn_status attn_mla_cache_dequantize_run(const struct attn_mla_cache_args *args, void *stream)
{
    struct attn_mla_cache_problem p;
    ATTN_TRY(attn_mla_cache_check(args, false, &p));
    const struct attn_backend *backend = attn_backend_for(p.device.device_type);
    ATTN_CHECK(backend && backend->mla_cache_dequantize_run, ATTN_E_NOT_BUILT,
               "mla_cache_dequantize: not built for this device, only for CPUs");
    return backend->mla_cache_dequantize_run(&p, stream);
}
