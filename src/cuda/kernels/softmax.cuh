/* SPDX-License-Identifier: MIT
 *
 * The online softmax of a thread's two rows, scores in the accumulator layout of wgmma.cuh.
 *
 *     m' = max(m, row max of S)      p = 2^(S k - m' k)      l = l 2^((m - m') k) + row sum of p
 *
 * with k = exp_scale.  The rescale is lazy: while m' - m is at most `slack` in units of the exponent, 8
 * in decode and 12 in prefill, the old m stays, so that p <= 2^slack (exact after normalising, in range
 * for bf16 and fp16) and O keeps its scale.  Most steps of prefill need not even look for the maximum
 * (softmax_keep_max): the sums of p show that none grew beyond 2^12.  With 8, a row whose first step
 * showed it one small score would fail that test in every later step: a sum of 32 p passes 2^8 though
 * no p does.  m starts at a large negative finite number, not at -inf, so that a row with no
 * visible key yet needs no special case: its scores are -inf and its p are 0.
 */
#pragma once
#include "ptx.cuh"

struct softmax_rows {
    float max[2], sum[2]; /* `sum` holds this thread's columns only until softmax_finish */
    float shrink[2];      /* by what O must be multiplied before the next P . V */
};

#define ATTN_MAX_NONE (-1e30f) /* m of a row that has seen no key */
#define ATTN_PREFILL_SLACK 12

ATTN_DEVICE void softmax_init(softmax_rows &r)
{
    r.max[0] = r.max[1] = ATTN_MAX_NONE;
    r.sum[0] = r.sum[1] = 0.0f;
    r.shrink[0] = r.shrink[1] = 1.0f;
}

/* Maximum or sum over the quad of lanes that shares a row. */
ATTN_DEVICE float quad_max(float x)
{
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

ATTN_DEVICE float quad_sum(float x)
{
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

/* Moves the maxima of rows that grew by more than SLACK since. */
template <int N, int SLACK = 8>
ATTN_DEVICE void softmax_update_max(softmax_rows &r, const float (&s)[N / 2], float exp_scale)
{
    float top[2] = {s[0], s[2]};
#pragma unroll
    for (int i = 0; i < N / 2; i += 4) {
        top[0] = fmaxf(top[0], fmaxf(s[i], s[i + 1]));
        top[1] = fmaxf(top[1], fmaxf(s[i + 2], s[i + 3]));
    }
    bool kept = (top[0] - r.max[0]) * exp_scale <= (float)SLACK &&
                (top[1] - r.max[1]) * exp_scale <= (float)SLACK;
    r.shrink[0] = r.shrink[1] = 1.0f;
    if (__all_sync(0xffffffff, kept)) return;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float grown = fmaxf(r.max[h], quad_max(top[h]));
        if ((grown - r.max[h]) * exp_scale <= (float)SLACK) grown = r.max[h];
        r.shrink[h] = ex2_approx((r.max[h] - grown) * exp_scale);
        r.max[h] = grown;
    }
}

/* S becomes P, and P is added to the sums. */
template <int N>
ATTN_DEVICE void softmax_exponentiate(softmax_rows &r, float (&s)[N / 2], float exp_scale)
{
    float shift0 = r.max[0] * exp_scale, shift1 = r.max[1] * exp_scale;
    float sum0 = 0.0f, sum1 = 0.0f;
#pragma unroll
    for (int i = 0; i < N / 2; i += 4) {
        s[i] = ex2_approx(fmaf(s[i], exp_scale, -shift0));
        s[i + 1] = ex2_approx(fmaf(s[i + 1], exp_scale, -shift0));
        s[i + 2] = ex2_approx(fmaf(s[i + 2], exp_scale, -shift1));
        s[i + 3] = ex2_approx(fmaf(s[i + 3], exp_scale, -shift1));
        sum0 += s[i] + s[i + 1];
        sum1 += s[i + 2] + s[i + 3];
    }
    r.sum[0] = fmaf(r.sum[0], r.shrink[0], sum0);
    r.sum[1] = fmaf(r.sum[1], r.shrink[1], sum1);
}

/* The maxima of a row tile's first step.  Not `upper`: no row sees the second half of its columns. */
template <int N>
ATTN_DEVICE void softmax_start(softmax_rows &r, const float (&s)[N / 2], bool upper)
{
    float top[2] = {ATTN_MAX_NONE, ATTN_MAX_NONE};
#pragma unroll
    for (int from = 0; from < N / 2; from += N / 4) {
        if (from && !upper) continue;
#pragma unroll
        for (int i = from; i < from + N / 4; i += 4) {
            top[0] = fmaxf(top[0], fmaxf(s[i], s[i + 1]));
            top[1] = fmaxf(top[1], fmaxf(s[i + 2], s[i + 3]));
        }
    }
    r.max[0] = quad_max(top[0]);
    r.max[1] = quad_max(top[1]);
}

/* A step in which no maximum moves: P packed as the A operand, and added to the sums.  False, and all
 * but `packed` as it was, where a thread's sum shows that some p may be above 2^ATTN_PREFILL_SLACK (not
 * CHECKED: none is).  Not `upper`: p is 0 in the second half of the columns. */
template <int FP16, int N, int CHECKED = 1>
ATTN_DEVICE bool softmax_keep_max(softmax_rows &r, uint32_t (&packed)[N / 4],
                                  const float (&s)[N / 2], bool upper, float exp_scale)
{
    float shift0 = r.max[0] * exp_scale, shift1 = r.max[1] * exp_scale;
    float sum0 = 0.0f, sum1 = 0.0f;
#pragma unroll
    for (int from = 0; from < N / 2; from += N / 4) {
        if (from && !upper) {
#pragma unroll
            for (int i = from; i < from + N / 4; i += 2)
                packed[i / 2] = 0;
            continue;
        }
#pragma unroll
        for (int i = from; i < from + N / 4; i += 4) {
            float p0 = ex2_approx(fmaf(s[i], exp_scale, -shift0));
            float p1 = ex2_approx(fmaf(s[i + 1], exp_scale, -shift0));
            float p2 = ex2_approx(fmaf(s[i + 2], exp_scale, -shift1));
            float p3 = ex2_approx(fmaf(s[i + 3], exp_scale, -shift1));
            sum0 += p0 + p1;
            sum1 += p2 + p3;
            packed[i / 2] = pack_16x2<FP16>(p0, p1);
            packed[i / 2 + 1] = pack_16x2<FP16>(p2, p3);
        }
    }
    const float most = (float)(1 << ATTN_PREFILL_SLACK);
    if (CHECKED && !__all_sync(0xffffffff, sum0 <= most && sum1 <= most)) return false;
    r.sum[0] += sum0;
    r.sum[1] += sum1;
    return true;
}

/* The accumulator of P in the layout of an A operand. */
template <int FP16, int N>
ATTN_DEVICE void softmax_pack(uint32_t (&packed)[N / 4], const float (&s)[N / 2])
{
#pragma unroll
    for (int i = 0; i < N / 4; i++)
        packed[i] = pack_16x2<FP16>(s[2 * i], s[2 * i + 1]);
}

/* O *= shrink, in the warps where some row's maximum moved. */
template <int DV> ATTN_DEVICE void softmax_rescale(const softmax_rows &r, float (&o)[DV / 2])
{
    if (__any_sync(0xffffffff, r.shrink[0] != 1.0f || r.shrink[1] != 1.0f)) {
#pragma unroll
        for (int i = 0; i < DV / 2; i += 4) {
            o[i] *= r.shrink[0];
            o[i + 1] *= r.shrink[0];
            o[i + 2] *= r.shrink[1];
            o[i + 3] *= r.shrink[1];
        }
    }
}

/* The factor that normalises a row of O, and the row's LSE (natural logarithm).  A sink is one more
 * logit in the sum; the larger of it and the row's maximum carries the scale.  A sum of 0 means no
 * visible key; a NaN is no 0 and goes through. */
ATTN_DEVICE void softmax_finish(float max, float sum, float exp_scale, bool has_sink, float sink,
                                float lse_empty, float *normalise, float *lse)
{
    const float log2e = 1.4426950408889634f, ln2 = 0.6931471805599453f;
    float top = sum == 0.0f ? -INFINITY : max * exp_scale, factor = 1.0f;
    if (has_sink) {
        float logit = sink * log2e;
        if (logit > top) {
            factor = ex2_approx(top - logit);
            sum = fmaf(sum, factor, 1.0f);
            top = logit;
        } else if (top > -INFINITY) {
            sum += ex2_approx(logit - top);
        }
    }
    *normalise = sum == 0.0f ? 0.0f : __fdividef(factor, sum);
    *lse = sum == 0.0f ? lse_empty : (top + lg2_approx(sum)) * ln2;
}
