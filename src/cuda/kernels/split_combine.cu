/* SPDX-License-Identifier: MIT
 *
 * split_combine: partial results of disjoint key ranges, merged by their LSE.
 *
 *     M = max_s lse_s      w_s = exp(lse_s - M)      out = sum_s w_s out_s / sum_s w_s
 *     lse = M + ln sum_s w_s;  all lse_s -inf: out 0, lse -inf, and no partial is read
 *
 * A warp a row (i, t, h): lanes hold the weights of up to 8 splits each, then share the columns.
 */
#include "ptx.cuh"
#include "split_combine_params.h"

enum { SPLITS_A_LANE = 8 }; /* 256 splits at most */

ATTN_DEVICE float warp_max(float x)
{
#pragma unroll
    for (int d = 16; d; d /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, d));
    return x;
}

ATTN_DEVICE float warp_sum(float x)
{
#pragma unroll
    for (int d = 16; d; d /= 2)
        x += __shfl_xor_sync(0xffffffff, x, d);
    return x;
}

ATTN_DEVICE void store(const attn_split_combine_params &p, int64_t at, float x)
{
    if (p.type == ATTN_COMBINE_FP32)
        ((float *)p.out)[at] = x;
    else
        ((uint16_t *)p.out)[at] = (uint16_t)(p.type == ATTN_COMBINE_FP16 ? pack_16x2<1>(x, 0.0f)
                                                                         : pack_16x2<0>(x, 0.0f));
}

extern "C" __global__ void __launch_bounds__(128)
    attn_split_combine_sm90(const __grid_constant__ attn_split_combine_params p)
{
    int lane = threadIdx.x % 32;
    int64_t row = blockIdx.x * 4ll + threadIdx.x / 32;
    if (row >= p.rows) return;
    int64_t h = row % p.h, t = row / p.h % p.s, i = row / p.h / p.s;
    const int64_t *ls = p.lse_partial_stride, *os = p.out_partial_stride;
    const float *lse = p.lse_partial + i * ls[1] + t * ls[2] + h * ls[3];
    const float *partial = p.out_partial + i * os[1] + t * os[2] + h * os[3];

    float weight[SPLITS_A_LANE], top = -INFINITY;
    bool unordered = false;
#pragma unroll
    for (int n = 0; n < SPLITS_A_LANE; n++) {
        int split = lane + 32 * n;
        weight[n] = split < p.splits ? lse[split * ls[0]] : -INFINITY;
        unordered |= isnan(weight[n]);
        top = fmaxf(top, weight[n]);
    }
    top = warp_max(top);
    if (__any_sync(0xffffffff, unordered)) top = NAN;
    bool empty = top == -INFINITY;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < SPLITS_A_LANE; n++) {
        weight[n] = empty ? 0.0f : expf(weight[n] - top);
        sum += weight[n];
    }
    sum = warp_sum(sum);
    if (lane == 0)
        p.lse[i * p.lse_stride[0] + t * p.lse_stride[1] + h * p.lse_stride[2]] =
            empty ? -INFINITY : top + logf(sum);

    int64_t out = i * p.out_stride[0] + t * p.out_stride[1] + h * p.out_stride[2];
    for (int first = 0; first < p.d_v; first += 32) {
        int column = first + lane;
        float total = 0.0f;
#pragma unroll
        for (int n = 0; n < SPLITS_A_LANE; n++) {
            for (int from = 0; from < 32 && 32 * n + from < p.splits; from++) {
                float w = __shfl_sync(0xffffffff, weight[n], from);
                if (w != 0.0f && column < p.d_v)
                    total = fmaf(w, partial[(32 * n + from) * os[0] + column], total);
            }
        }
        if (column < p.d_v) store(p, out + column, empty ? 0.0f : total / sum);
    }
}
