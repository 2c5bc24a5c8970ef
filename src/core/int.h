/* SPDX-License-Identifier: MIT
 *
 * Small integer functions.  Divisors and multiples are positive.
 */
#ifndef ATTN_CORE_INT_H
#define ATTN_CORE_INT_H

#include <stdint.h>

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

/* `x`, brought into [low, high]. */
static inline int64_t clamp64(int64_t x, int64_t low, int64_t high)
{
    return x < low ? low : x > high ? high : x;
}

/* a / b, rounded up; a >= 0. */
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* The next multiple of b from a >= 0 on. */
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

#endif
