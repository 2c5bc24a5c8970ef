/* SPDX-License-Identifier: MIT
 *
 * rotary: one row, rotated by the angles whose cosines and sines are given.  Compiled once a rung
 * over vec_ and row_ names; fp32 arithmetic, one rounding to the dtype.
 *
 *   x' = x cos - y sin       y' = x sin + y cos        for r / 2 pairs (x, y), r a multiple of 16
 *
 *   halves       x0 x1 x2 ... | y0 y1 y2 ... | rest    x, y, cos and sin are vectors as they lie
 *   interleaved  x0 y0 x1 y1 ...             | rest    z cos2 -+ swap(z) sin2, with cos and sin
 *                                                      twice in a row: lanes x take -, lanes y +
 */
#ifndef ATTN_CPU_X86_ROTARY_VEC_H
#define ATTN_CPU_X86_ROTARY_VEC_H

#include <string.h>

#include "cpu/kernels.h"

/* n <= VEC_LANES elements. */
VEC_INLINE vec load_some(enum attn_dtype t, const char *p, int n)
{
    return n == VEC_LANES ? vec_load_elem(t, p) : vec_load_part_elem(t, p, n);
}

VEC_INLINE void store_some(enum attn_dtype t, char *p, vec x, int n)
{
    if (n == VEC_LANES)
        vec_store_elem(t, p, x);
    else
        vec_store_part_elem(t, p, x, n);
}

VEC_INLINE void rotate_halves(enum attn_dtype t, const char *from, char *to, const char *cos,
                              const char *sin, int32_t pairs)
{
    const int64_t size = attn_dtype_bytes(t);
    for (int32_t i = 0; i < pairs; i += VEC_LANES) {
        int n = pairs - i < VEC_LANES ? pairs - i : VEC_LANES;
        int64_t at_x = i * size, at_y = (pairs + i) * size;
        vec x = load_some(t, from + at_x, n), y = load_some(t, from + at_y, n);
        vec c = load_some(t, cos + at_x, n), s = load_some(t, sin + at_x, n);
        store_some(t, to + at_x, vec_sub(vec_mul(x, c), vec_mul(y, s)), n);
        store_some(t, to + at_y, vec_fma(x, s, vec_mul(y, c)), n);
    }
}

VEC_INLINE void rotate_interleaved(enum attn_dtype t, const char *from, char *to, const char *cos,
                                   const char *sin, int32_t pairs)
{
    const int64_t size = attn_dtype_bytes(t);
    for (int32_t i = 0; i < 2 * pairs; i += VEC_LANES) {
        vec z = vec_load_elem(t, from + i * size);
        vec c = vec_twice(vec_load_part_elem(t, cos + i / 2 * size, VEC_LANES / 2));
        vec s = vec_twice(vec_load_part_elem(t, sin + i / 2 * size, VEC_LANES / 2));
        vec_store_elem(t, to + i * size, vec_fma_alternate(z, c, vec_mul(vec_swap(z, 1), s)));
    }
}

VEC_INLINE void rotate(enum attn_dtype t, const void *x, void *y, const void *cos, const void *sin,
                       int32_t d, int32_t r, bool interleaved)
{
    const int64_t size = attn_dtype_bytes(t);
    if (interleaved)
        rotate_interleaved(t, x, y, cos, sin, r / 2);
    else
        rotate_halves(t, x, y, cos, sin, r / 2);
    if (x != y) memcpy((char *)y + r * size, (const char *)x + r * size, (size_t)((d - r) * size));
}

static void rotate_fp32(const void *x, void *y, const void *cos, const void *sin, int32_t d,
                        int32_t r, bool interleaved)
{
    rotate(ATTN_F32, x, y, cos, sin, d, r, interleaved);
}

static void rotate_bf16(const void *x, void *y, const void *cos, const void *sin, int32_t d,
                        int32_t r, bool interleaved)
{
    rotate(ATTN_BF16, x, y, cos, sin, d, r, interleaved);
}

static void rotate_fp16(const void *x, void *y, const void *cos, const void *sin, int32_t d,
                        int32_t r, bool interleaved)
{
    rotate(ATTN_F16, x, y, cos, sin, d, r, interleaved);
}

static void rotate_fp8(const void *x, void *y, const void *cos, const void *sin, int32_t d,
                       int32_t r, bool interleaved)
{
    rotate(ATTN_F8, x, y, cos, sin, d, r, interleaved);
}

#endif
