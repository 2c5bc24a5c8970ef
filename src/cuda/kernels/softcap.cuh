/* SPDX-License-Identifier: MIT
 *
 * The softmax of capped scores, in prefill.  The exponent of a score is x = limit tanh(S scale / cap),
 * limit = cap log2 e; maxima are kept in units of x.
 *
 * Of a small score, |S scale / cap| <= 0.4, tanh y is y (a + b y^2 + d y^4) to 6.5e-6, with limit and scale
 * in the coefficients; of a large one 1 - 2 / (e^2y + 1) to 3e-7.  (The instruction for tanh errs by up to
 * 8e-6, which with a cap of 30 made an lse 2.6e-4 wrong.)  Where all scores of a warp's step are small and
 * no maximum moves, one pass makes P of S; else S, which is still there, goes the long way, small scores to
 * the same bits: no row depends on its neighbours.
 *
 * Most steps need no look at the scores for that.  X = limit tanh 0.4 is the largest small exponent.
 *   upwards    The polynomial rises everywhere: while m <= X - 8, sums of p of at most 2^8 say that no score
 *              was large.
 *   downwards  In a deep row, m >= 16 - X, scores below -0.4 count as small: their p are below 2^-16, and the
 *              polynomial, which turns away from tanh slowly, errs there by at most 4e-4 2^-16 a key.
 */
#pragma once
#include "softmax.cuh"

/* x / S of a small score and of a middle one, z = S^2 - t. */
ATTN_DEVICE float small_factor(const attn_softcap &c, float z)
{
    return fmaf(fmaf(c.d, z, c.b), z, c.a);
}

ATTN_DEVICE float middle_factor(const attn_softcap &c, float z)
{
    return fmaf(fmaf(fmaf(fmaf(c.e[4], z, c.e[3]), z, c.e[2]), z, c.e[1]), z, c.e[0]);
}

/* x - m of a score that is not large.  Those less than `below` count as small; of -inf it is then -inf. */
ATTN_DEVICE float middle_exponent(const attn_softcap &c, float s, float m, float below)
{
    float z = fmaf(s, s, -c.t);
    return fmaf(s, select((z < 0.0f) | (s < below), small_factor(c, z), middle_factor(c, z)), -m);
}

/* x - m of any score; -inf of -inf, which is no score but a masked one (softcap_open). */
ATTN_DEVICE float cap_exponent(const attn_softcap &c, float s, float m, float below)
{
    float other = middle_exponent(c, s, m, below);
    float large = fmaf(-2.0f * c.limit, rcp_approx(ex2_approx(s * c.rate) + 1.0f), c.limit) - m;
    bool is_large = (fabsf(s) > c.middle) & (s >= below);
    return select(s == -INFINITY, s, select(is_large, large, other));
}

enum { SCORES_SMALL, SCORES_MIDDLE, SCORES_LARGE };

/* What the largest score of a warp is. */
template <int N> ATTN_DEVICE int softcap_look(const float (&s)[N / 2], const attn_softcap &c)
{
    float top = fabsf(s[0]);
#pragma unroll
    for (int i = 1; i < N / 2; i++)
        top = fmaxf(top, fabsf(s[i]));
    if (__all_sync(0xffffffff, top <= c.small)) return SCORES_SMALL;
    return __all_sync(0xffffffff, top <= c.middle) ? SCORES_MIDDLE : SCORES_LARGE;
}

/* The maxima of a row tile's first step, of small scores. */
template <int N>
ATTN_DEVICE void softcap_start(softmax_rows &r, const float (&s)[N / 2], bool upper,
                               const attn_softcap &c)
{
    softmax_start<N>(r, s, upper);
#pragma unroll
    for (int h = 0; h < 2; h++)
        r.max[h] = r.max[h] == ATTN_MAX_NONE ? ATTN_MAX_NONE : cap_exponent(c, r.max[h], 0.0f, -INFINITY);
}

/* True where no score of a warp needs to be looked at, for all its m. */
ATTN_DEVICE bool softcap_deep(const softmax_rows &r, const attn_softcap &c)
{
    return __all_sync(0xffffffff, fminf(r.max[0], r.max[1]) >= c.deep &&
                                      fmaxf(r.max[0], r.max[1]) <= c.shallow);
}

/* softmax_keep_max of capped scores that are known to be small, or where softcap_deep is true: then false
 * also where one is large. */
template <int FP16, int N, int MIDDLE = 0, int CHECKED = 1>
ATTN_DEVICE bool softcap_keep_max(softmax_rows &r, uint32_t (&packed)[N / 4],
                                  const float (&s)[N / 2], bool upper, bool small,
                                  const attn_softcap &c)
{
    float sum[2] = {0.0f, 0.0f}, below[2];
#pragma unroll
    for (int h = 0; h < 2; h++)
        below[h] = r.max[h] >= c.deep ? 0.0f : -c.middle;
    upper = upper && c.limit != 0.0f; /* it is not: a branch, or ptxas begins with all polynomials */
#pragma unroll
    for (int from = 0; from < N / 2; from += N / 4) {
        if (from && !upper) {
#pragma unroll
            for (int i = from; i < from + N / 4; i += 2)
                packed[i / 2] = 0;
            continue;
        }
#pragma unroll
        for (int i = from; i < from + N / 4; i += 2) {
            int h = i / 2 % 2;
            float p[2];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float x = s[i + e];
                p[e] = ex2_approx(MIDDLE ? middle_exponent(c, x, r.max[h], below[h])
                                         : fmaf(x, small_factor(c, fmaf(x, x, -c.t)), -r.max[h]));
            }
            sum[h] += p[0] + p[1];
            packed[i / 2] = pack_16x2<FP16>(p[0], p[1]);
        }
    }
    float most = (float)(1 << (small ? ATTN_PREFILL_SLACK : ATTN_SOFTCAP_SLACK));
    if (CHECKED && !__all_sync(0xffffffff, sum[0] <= most && sum[1] <= most)) return false;
    r.sum[0] += sum[0];
    r.sum[1] += sum[1];
    return true;
}

/* The long way.  First scores before they are masked: growing with x, and none is -inf, which is then the
 * mark of a masked one. */
template <int N> ATTN_DEVICE void softcap_open(float (&s)[N / 2], const attn_softcap &c)
{
    if (c.sign < 0.0f) {
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            s[i] = -s[i];
    }
#pragma unroll
    for (int i = 0; i < N / 2; i++)
        if (s[i] == -INFINITY) s[i] = -3e38f;
}

/* Then S becomes P with maxima moved, and P is added to the sums. */
template <int N>
ATTN_DEVICE void softcap_exponentiate(softmax_rows &r, float (&s)[N / 2], const attn_softcap &c)
{
    float top[2] = {s[0], s[2]}, sum[2] = {0.0f, 0.0f}, below[2];
#pragma unroll
    for (int i = 0; i < N / 2; i += 4) {
        top[0] = fmaxf(top[0], fmaxf(s[i], s[i + 1]));
        top[1] = fmaxf(top[1], fmaxf(s[i + 2], s[i + 3]));
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        top[h] = quad_max(top[h]);
        float x = cap_exponent(c, top[h], 0.0f, -INFINITY);
        float grown = x - r.max[h] <= (float)ATTN_PREFILL_SLACK ? r.max[h] : x;
        r.shrink[h] = ex2_approx(r.max[h] - grown);
        r.max[h] = grown;
        below[h] = grown >= c.deep ? 0.0f : -INFINITY;
    }
#pragma unroll
    for (int i = 0; i < N / 2; i += 2) {
        int h = i / 2 % 2;
        if (i && i % (N / 8) == 0 && c.limit == -(float)i) break; /* never: in parts, as above */
        s[i] = ex2_approx(cap_exponent(c, s[i], r.max[h], below[h]));
        s[i + 1] = ex2_approx(cap_exponent(c, s[i + 1], r.max[h], below[h]));
        sum[h] += s[i] + s[i + 1];
    }
#pragma unroll
    for (int h = 0; h < 2; h++)
        r.sum[h] = fmaf(r.sum[h], r.shrink[h], sum[h]);
}
