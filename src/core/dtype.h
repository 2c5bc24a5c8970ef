/* SPDX-License-Identifier: MIT
 *
 * Element types and their exact scalar conversions.  Vector code lives with the kernels; what is
 * here is the definition they are tested against.  All roundings are to nearest, ties to even.
 */
#ifndef ATTN_CORE_DTYPE_H
#define ATTN_CORE_DTYPE_H

#include <math.h>
#include <stdint.h>
#include <string.h>

enum attn_dtype { ATTN_F32, ATTN_BF16, ATTN_F16, ATTN_F8, ATTN_DTYPES }; /* F8 is e4m3fn */

static inline int64_t attn_dtype_bytes(enum attn_dtype t)
{
    static const int8_t bytes[ATTN_DTYPES] = {4, 2, 2, 1};
    return bytes[t];
}

static inline const char *attn_dtype_name(enum attn_dtype t)
{
    static const char *const names[ATTN_DTYPES] = {"fp32", "bf16", "fp16", "fp8"};
    return names[t];
}

/* What attention on inputs of dtype t returns. */
static inline enum attn_dtype attn_dtype_out(enum attn_dtype t)
{
    return t == ATTN_F8 ? ATTN_BF16 : t;
}

static inline float attn_bits_float(uint32_t u)
{
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

static inline uint32_t attn_float_bits(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static inline float attn_bf16_to_float(uint16_t h) { return attn_bits_float((uint32_t)h << 16); }

static inline uint16_t attn_float_to_bf16(float f)
{
    uint32_t u = attn_float_bits(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40u); /* NaN stays NaN */
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

static inline float attn_f16_to_float(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, e = (h >> 10) & 31u, m = h & 0x3ffu;
    if (e == 31) return attn_bits_float(sign | 0x7f800000u | (m << 13));
    if (e == 0) { /* m * 2^-24 is exact in fp32 */
        float f = (float)m * 0x1p-24f;
        return sign ? -f : f;
    }
    return attn_bits_float(sign | ((e + 112u) << 23) | (m << 13));
}

static inline uint16_t attn_float_to_f16(float f)
{
    uint32_t u = attn_float_bits(f), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (a >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520 and up round to infinity */
    if (a < 0x38800000u) { /* below 2^-14: subnormal, one fp32 addition does the rounding */
        float r = attn_bits_float(a) + 0.5f; /* ulp of 0.5 is 2^-24, the subnormal's step */
        return (uint16_t)(sign | (attn_float_bits(r) - 0x3f000000u));
    }
    uint32_t r = a + 0xfffu + ((a >> 13) & 1u);
    return (uint16_t)(sign | ((r - 0x38000000u) >> 13));
}

/* e4m3fn: 1 sign, 4 exponent (bias 7), 3 mantissa bits; no infinities, 0x7f is NaN, 448 the
 * largest. */
static inline float attn_f8_to_float(uint8_t h)
{
    uint32_t sign = (uint32_t)(h & 0x80u) << 24, e = (h >> 3) & 15u, m = h & 7u;
    if ((h & 0x7fu) == 0x7fu) return attn_bits_float(sign | 0x7fc00000u);
    if (e == 0) {
        float f = (float)m * 0x1p-9f;
        return sign ? -f : f;
    }
    return attn_bits_float(sign | ((e + 120u) << 23) | (m << 20));
}

/* Rounds to nearest even; past 464 (half way to the next step) gives NaN, as torch does. */
static inline uint8_t attn_float_to_f8(float f)
{
    uint32_t u = attn_float_bits(f), sign = (u >> 24) & 0x80u, a = u & 0x7fffffffu;
    if (a > 0x43e80000u) return (uint8_t)(sign | 0x7fu);
    if (a < 0x3c800000u) { /* below 2^-6: steps of 2^-9; ulp of 2^14 is 2^-9 */
        float r = attn_bits_float(a) + 16384.0f;
        return (uint8_t)(sign | (attn_float_bits(r) - 0x46800000u));
    }
    uint32_t r = a + 0x7ffffu + ((a >> 20) & 1u);
    return (uint8_t)(sign | ((r - 0x3c000000u) >> 20));
}

static inline float attn_load(enum attn_dtype t, const void *base, int64_t i)
{
    switch (t) {
    case ATTN_F32: return ((const float *)base)[i];
    case ATTN_BF16: return attn_bf16_to_float(((const uint16_t *)base)[i]);
    case ATTN_F16: return attn_f16_to_float(((const uint16_t *)base)[i]);
    default: return attn_f8_to_float(((const uint8_t *)base)[i]);
    }
}

static inline void attn_store(enum attn_dtype t, void *base, int64_t i, float x)
{
    switch (t) {
    case ATTN_F32: ((float *)base)[i] = x; break;
    case ATTN_BF16: ((uint16_t *)base)[i] = attn_float_to_bf16(x); break;
    case ATTN_F16: ((uint16_t *)base)[i] = attn_float_to_f16(x); break;
    default: ((uint8_t *)base)[i] = attn_float_to_f8(x); break;
    }
}

#endif
