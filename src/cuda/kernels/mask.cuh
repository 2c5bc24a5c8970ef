/* SPDX-License-Identifier: MIT
 *
 * Every mask of this library is, for one query row, one interval of visible keys [lo, hi).  Both
 * ends never fall from one row to the next, so the keys that a run of rows can see lie between the
 * first row's lo and the last row's hi, and keys from the last row's lo to the first row's hi are
 * visible to all of them and need no mask.
 */
#pragma once
#include "mha_fwd_params.h"
#include "ptx.cuh"

struct key_interval {
    int lo, hi; /* empty when lo >= hi; both in [0, s_k] */
};

/* x / d, for x in [0, 2^30). */
ATTN_DEVICE int divide(attn_division d, int x)
{
    return (int)(__umulhi(2 * (uint32_t)x, d.magic) >> d.shift);
}

ATTN_DEVICE int floor_div(int a, int b)
{
    int q = a / b;
    return q - (a % b < 0);
}

/* Keys that query row `i` sees.  With p = i + s_k - s_q:
 *     window, causal     p - left <= j <= p + right
 *     chunk c            floor(p / c) c <= j < floor(p / c) c + c       (none for p < 0)
 *     context parallel   j world + rank < cp_tot, and <= i + cp_tot - s_q when causal */
ATTN_DEVICE key_interval visible_keys(const attn_mha_fwd_params &p, int i, int s_q, int s_k,
                                      int cp_tot)
{
    int position = i + s_k - s_q;
    int lo = position - p.window_left, hi = position + p.window_right + 1;
    if (p.chunk > 0) {
        int start = position < 0 ? -p.chunk : divide(p.chunk_division, position) * p.chunk;
        lo = max(lo, start);
        hi = min(hi, start + p.chunk);
    }
    if (p.cp_world > 1) {
        int last = p.cp_causal ? min(cp_tot - 1, i + cp_tot - s_q) : cp_tot - 1;
        hi = min(hi, floor_div(last - p.cp_rank, p.cp_world) + 1);
    }
    return {min(max(lo, 0), s_k), max(min(hi, s_k), 0)};
}

/* Sets to -inf, of the scores from column FIRST to LAST, those of keys at or past the hi of their
 * row; of all, those before its lo. */
template <int FIRST, int LAST, int COUNT>
ATTN_DEVICE void mask_after(float (&s)[COUNT], int key, int hi0, int hi1)
{
    int left0 = hi0 - key, left1 = hi1 - key;
#pragma unroll
    for (int i = FIRST / 2; i < LAST / 2; i += 4) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            if (left0 <= 2 * i + e) s[i + e] = -INFINITY;
            if (left1 <= 2 * i + e) s[i + 2 + e] = -INFINITY;
        }
    }
}

template <int COUNT> ATTN_DEVICE void mask_before(float (&s)[COUNT], int key, int lo0, int lo1)
{
    int left0 = lo0 - key, left1 = lo1 - key;
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            if (left0 > 2 * i + e) s[i + e] = -INFINITY;
            if (left1 > 2 * i + e) s[i + 2 + e] = -INFINITY;
        }
    }
}

/* Sets to -inf the scores of the two rows of a thread that lie outside their intervals.  `key` is
 * the key of s[0]; the columns are those of the accumulator (wgmma.cuh). */
template <int N>
ATTN_DEVICE void mask_scores(float (&s)[N / 2], int key, key_interval row0, key_interval row1)
{
    int first0 = key - row0.lo, first1 = key - row1.lo;
    uint32_t span0 = (uint32_t)max(row0.hi - row0.lo, 0);
    uint32_t span1 = (uint32_t)max(row1.hi - row1.lo, 0);
#pragma unroll
    for (int i = 0; i < N / 2; i += 4) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
            if ((uint32_t)(first0 + 2 * i + e) >= span0) s[i + e] = -INFINITY;
            if ((uint32_t)(first1 + 2 * i + e) >= span1) s[i + 2 + e] = -INFINITY;
        }
    }
}
