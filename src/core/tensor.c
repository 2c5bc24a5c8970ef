/* SPDX-License-Identifier: MIT
 *
 * Checks and texts of tensor arguments.
 */
#include "core/tensor.h"

#include <stdio.h>

const char *attn_tensor_dtype_text(const DLTensor *t, char text[32])
{
    static const char *const names[] = {
        [kDLInt] = "int",
        [kDLUInt] = "uint",
        [kDLFloat] = "fp",
        [kDLBfloat] = "bf",
    };
    unsigned code = t->dtype.code, bits = t->dtype.bits, lanes = t->dtype.lanes;
    if (code == kDLFloat8_e4m3fn)
        snprintf(text, 32, "fp8 e4m3fn");
    else if (code < sizeof names / sizeof *names && names[code])
        snprintf(text, 32, "%s%u", names[code], bits);
    else
        snprintf(text, 32, "dlpack type %u of %u bits", code, bits);
    if (lanes != 1) {
        size_t n = strlen(text);
        snprintf(text + n, 32 - n, " x %u", lanes);
    }
    return text;
}

const char *attn_tensor_shape_text(const DLTensor *t, char text[128])
{
    size_t n = (size_t)snprintf(text, 128, "[");
    for (int32_t i = 0; i < t->ndim && n < 100; ++i)
        n += (size_t)snprintf(text + n, 128 - n, i ? ", %lld" : "%lld", (long long)t->shape[i]);
    snprintf(text + (n < 126 ? n : 126), 128 - (n < 126 ? n : 126), "]");
    return text;
}

attn_status attn_tensor_dtype(const DLTensor *t, const char *name, const char *wish,
                              enum attn_dtype *dtype)
{
    char text[32];
    DLDataType d = t->dtype;
    if (d.lanes == 1) {
        if (d.code == kDLBfloat && d.bits == 16) return *dtype = ATTN_BF16, ATTN_OK;
        if (d.code == kDLFloat && d.bits == 16) return *dtype = ATTN_F16, ATTN_OK;
        if (d.code == kDLFloat && d.bits == 32) return *dtype = ATTN_F32, ATTN_OK;
        if (d.code == kDLFloat8_e4m3fn && d.bits == 8) return *dtype = ATTN_F8, ATTN_OK;
    }
    return attn_fail(ATTN_E_DTYPE, "%s: expected dtype %s, got %s", name, wish,
                     attn_tensor_dtype_text(t, text));
}

attn_status attn_device_check(const DLTensor *t, const char *name, DLDevice device)
{
    ATTN_CHECK(t->device.device_type == device.device_type &&
                   t->device.device_id == device.device_id,
               ATTN_E_DEVICE, "%s: expected on q's device (type %d, id %d), got (type %d, id %d)",
               name, (int)device.device_type, (int)device.device_id, (int)t->device.device_type,
               (int)t->device.device_id);
    return ATTN_OK;
}

attn_status attn_tensor_check(const DLTensor *t, const char *name, int32_t ndim, const char *wish)
{
    char text[128];
    ATTN_CHECK(t->ndim == ndim, ATTN_E_SHAPE, "%s: expected %s, got %d dimensions", name, wish,
               (int)t->ndim);
    ATTN_CHECK(t->dtype.lanes == 1 && t->dtype.bits >= 8 && t->dtype.bits <= 64 &&
                   (t->dtype.bits & (t->dtype.bits - 1)) == 0,
               ATTN_E_DTYPE, "%s: expected one lane of 8 to 64 bits, got %u lanes of %u", name,
               (unsigned)t->dtype.lanes, (unsigned)t->dtype.bits);

    int64_t bytes = t->dtype.bits / 8, span = 0, count = 1; /* count: an extent of 0 as 1 */
    bool fits = true;
    for (int32_t i = 0; i < ndim; ++i) {
        ATTN_CHECK(t->shape[i] >= 0 && t->shape[i] <= ATTN_EXTENT_MAX, ATTN_E_SHAPE,
                   "%s: expected %s with extents in [0, 2^31), got %s", name, wish,
                   attn_tensor_shape_text(t, text));
        fits = fits && !__builtin_mul_overflow(count, t->shape[i] ? t->shape[i] : 1, &count);
    }
    ATTN_CHECK(fits && count <= INT64_MAX / 16, ATTN_E_SHAPE,
               "%s: expected %s whose bytes fit 63 bits, got %s", name, wish,
               attn_tensor_shape_text(t, text));
    if (attn_tensor_empty(t)) return ATTN_OK;

    for (int32_t i = 0; i < ndim; ++i) {
        int64_t stride = attn_tensor_stride(t, i), part = 0;
        ATTN_CHECK(stride >= 0, ATTN_E_SHAPE, "%s: expected strides >= 0, got %lld in dimension %d",
                   name, (long long)stride, (int)i);
        fits = !__builtin_mul_overflow(stride, t->shape[i] - 1, &part) &&
               !__builtin_mul_overflow(part, bytes, &part) &&
               !__builtin_add_overflow(span, part, &span);
        ATTN_CHECK(fits && span <= INT64_MAX / 4, ATTN_E_SHAPE,
                   "%s: expected a span that fits 61 bits, got stride %lld in dimension %d", name,
                   (long long)stride, (int)i);
    }
    ATTN_CHECK(t->data, ATTN_E_VALUE, "%s: expected data, got a null pointer", name);
    ATTN_CHECK(((uintptr_t)attn_tensor_data(t) & (uintptr_t)(bytes - 1)) == 0, ATTN_E_VALUE,
               "%s: expected data aligned to its %d-byte elements, got %p", name, (int)bytes,
               (void *)attn_tensor_data(t));
    return ATTN_OK;
}

attn_status attn_index_check(const DLTensor *t, const char *name, int64_t n, DLDevice device)
{
    char text[128];
    ATTN_TRY(attn_tensor_check(t, name, 1, "one dimension"));
    ATTN_CHECK(t->dtype.code == kDLInt && t->dtype.bits == 32, ATTN_E_DTYPE,
               "%s: expected dtype int32, got %s", name, attn_tensor_dtype_text(t, text));
    ATTN_CHECK(t->shape[0] == n, ATTN_E_SHAPE, "%s: expected [%lld], got %s", name, (long long)n,
               attn_tensor_shape_text(t, text));
    ATTN_CHECK(n <= 1 || attn_tensor_stride(t, 0) == 1, ATTN_E_SHAPE,
               "%s: expected contiguous, got stride %lld", name,
               (long long)attn_tensor_stride(t, 0));
    return attn_device_check(t, name, device);
}

attn_status attn_distinct_check(const DLTensor *t, const char *name)
{
    if (attn_tensor_empty(t)) return ATTN_OK;
    int64_t elements = 1, places = 1;
    for (int32_t i = 0; i < t->ndim; ++i) {
        int64_t stride = attn_tensor_stride(t, i);
        ATTN_CHECK(t->shape[i] == 1 || stride > 0, ATTN_E_SHAPE,
                   "%s: expected strides > 0, got 0 in dimension %d", name, (int)i);
        elements *= t->shape[i];
        places += (t->shape[i] - 1) * stride;
    }
    ATTN_CHECK(elements <= places, ATTN_E_SHAPE,
               "%s: expected elements that share no memory, got %lld of them in %lld places", name,
               (long long)elements, (long long)places);
    return ATTN_OK;
}

/* Bytes [from, to) that a tensor's elements lie in; empty for an absent or empty one. */
struct span {
    uintptr_t from, to;
};

static struct span tensor_span(const DLTensor *t)
{
    if (!t || attn_tensor_empty(t)) return (struct span){0, 0};
    struct span s = {(uintptr_t)attn_tensor_data(t), 0};
    int64_t last = 0;
    for (int32_t i = 0; i < t->ndim; ++i) last += (t->shape[i] - 1) * attn_tensor_stride(t, i);
    s.to = s.from + (uintptr_t)((last + 1) * (t->dtype.bits / 8));
    return s;
}

attn_status attn_apart_check(const DLTensor *read, const char *name, const DLTensor *const *written,
                             int count)
{
    struct span r = tensor_span(read);
    for (int i = 0; r.to && i < count; ++i) {
        struct span w = tensor_span(written[i]);
        ATTN_CHECK(r.from >= w.to || w.from >= r.to, ATTN_E_VALUE,
                   "%s: expected apart from what the call writes, got memory shared with it", name);
    }
    return ATTN_OK;
}
