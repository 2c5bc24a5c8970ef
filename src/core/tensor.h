/* SPDX-License-Identifier: MIT
 *
 * DLTensor, read safely: element type, extents, strides and the address of element 0.  The checks
 * here are those every tensor argument goes through; an op adds its own on top.
 */
#ifndef ATTN_CORE_TENSOR_H
#define ATTN_CORE_TENSOR_H

#include <stdbool.h>

#include "core/dtype.h"
#include "core/status.h"

#define ATTN_EXTENT_MAX ((int64_t)INT32_MAX) /* an extent that is a length, a count or a width */

/* ATTN_OK and *dtype, or ATTN_E_DTYPE with a message that names `name` and `wish`. */
attn_status attn_tensor_dtype(const DLTensor *t, const char *name, const char *wish,
                              enum attn_dtype *dtype);

/* "int32", "bf16", "float8_e5m2", "uint17": what a message calls the tensor's type. */
const char *attn_tensor_dtype_text(const DLTensor *t, char text[32]);

/* "[2, 128, 8, 64]". */
const char *attn_tensor_shape_text(const DLTensor *t, char text[128]);

static inline int64_t attn_tensor_stride(const DLTensor *t, int32_t dim)
{
    if (t->strides) return t->strides[dim];
    uint64_t stride = 1; /* wraps for empty tensors of huge extents, where nothing reads it */
    for (int32_t i = t->ndim - 1; i > dim; --i) stride *= (uint64_t)t->shape[i];
    return (int64_t)stride;
}

static inline char *attn_tensor_data(const DLTensor *t) { return (char *)t->data + t->byte_offset; }

static inline bool attn_tensor_empty(const DLTensor *t)
{
    for (int32_t i = 0; i < t->ndim; ++i)
        if (t->shape[i] == 0) return true;
    return false;
}

/* Rank (against `wish`, the shape in words), extents in [0, ATTN_EXTENT_MAX] whose product without
 * zeros fits, strides >= 0, byte span within int64, a pointer aligned to the element and not NULL
 * unless the tensor is empty. */
attn_status attn_tensor_check(const DLTensor *t, const char *name, int32_t ndim, const char *wish);

/* attn_tensor_check and int32 elements on `device`; one dimension of extent n, contiguous. */
attn_status attn_index_check(const DLTensor *t, const char *name, int64_t n, DLDevice device);

/* An output's elements share no memory, as far as counting tells: no stride of 0, and from the
 * first element to the last at least as many places as elements. */
attn_status attn_distinct_check(const DLTensor *t, const char *name);

/* `read`, which a call reads more than once, shares no memory with what it writes; any may be
 * NULL. */
attn_status attn_apart_check(const DLTensor *read, const char *name, const DLTensor *const *written,
                             int count);

/* The same device as q's. */
attn_status attn_device_check(const DLTensor *t, const char *name, DLDevice device);

#endif
