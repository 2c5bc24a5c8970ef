/* SPDX-License-Identifier: MIT
 *
 * What both kernels of MLA decode do in a step: S = Q K^T, P, and O += P V.
 */
#pragma once
#include "attend.cuh"
#include "decode_params.h"
#include "softmax.cuh"

enum { N = ATTN_DECODE_KEYS, M = ATTN_DECODE_ROWS, DV = 512 };
enum { HALVES = ATTN_MLA_DECODE_HALVES, ROPES = ATTN_MLA_DECODE_ROPES };
enum { TILE = ATTN_DECODE_PANEL, HALF = 4 * TILE };
enum { BARRIER_S = 1, BARRIER_L = 2, BARRIER_R = 3 }; /* the threads of one warpgroup */

/* S = Q K^T of four tiles, or S += that of one (S = that, with `accumulate` 0), q in shared
 * memory. */
template <int FP16, int TILES>
ATTN_DEVICE void issue_scores(float (&s)[N / 2], uint32_t q, uint32_t k,
                              int accumulate = TILES == 1)
{
    uint64_t a = wgmma_descriptor(q, 16), b = wgmma_descriptor(k, 16);
#pragma unroll
    for (int step = 0; step < TILES * 4; step++) {
        int at = step / 4 * (TILE / 16) + step % 4 * 2;
        wgmma_ss<FP16, N>(s, a + at, b + at, accumulate || step != 0);
    }
}

/* S += Q K^T of four tiles, q in registers. */
template <int FP16>
ATTN_DEVICE void issue_more_scores(float (&s)[N / 2], const uint32_t (&q)[64], uint32_t k)
{
    uint64_t b = wgmma_descriptor(k, 16);
#pragma unroll
    for (int step = 0; step < 16; step++)
        wgmma_rs_k64<FP16>(s, q + 4 * step, b + (step / 4 * (TILE / 16) + step % 4 * 2));
}

/* The 16 rows of P that warp `warp` has, packed, to the tile that add_values reads. */
ATTN_DEVICE void store_probability(uint32_t probability, const uint32_t (&packed)[N / 4], int warp,
                                   int lane)
{
#pragma unroll
    for (int step = 0; step < N / 16; step++) {
        int to = 16 * warp + lane % 16, chunk = 2 * step + lane / 16;
        stmatrix_x4(probability + to * 128 + ((chunk ^ (to & 7)) << 4), packed[4 * step],
                    packed[4 * step + 1], packed[4 * step + 2], packed[4 * step + 3]);
    }
}

/* O += P V of a step, for 256 columns of V, `p` and `v` their descriptors; on return the products
 * are over. */
template <int FP16> ATTN_DEVICE void add_values(float (&o)[DV / 4], uint64_t p, uint64_t v)
{
    wgmma_pin(o);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < N / 16; step++)
        wgmma_ss_mn256<FP16>(o, p + step * 2, v + step * 128);
    wgmma_commit_group();
    wgmma_wait_group<0>();
    wgmma_pin(o);
}

/* P of scores S, packed, and its sums: softmax_update_max, softmax_exponentiate and softmax_pack at
 * once.  The old maxima are tried first, so that the exponents need not wait for new ones; where
 * some exponent of the warp passes 8, that was for nothing. */
template <int FP16>
ATTN_DEVICE void softmax_guessed(softmax_rows &r, uint32_t (&packed)[N / 4], float (&s)[N / 2],
                                 float exp_scale)
{
    float shift[2] = {r.max[0] * exp_scale, r.max[1] * exp_scale};
    float top = -INFINITY, sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < N / 2; i += 2) {
        int h = i / 2 % 2;
        float x = fmaf(s[i], exp_scale, -shift[h]), y = fmaf(s[i + 1], exp_scale, -shift[h]);
        top = fmaxf(top, fmaxf(x, y));
        x = ex2_approx(x);
        y = ex2_approx(y);
        sum[h] += x + y;
        packed[i / 2] = pack_16x2<FP16>(x, y);
    }
    r.shrink[0] = r.shrink[1] = 1.0f;
    if (rarely(__any_sync(0xffffffff, top > 8.0f))) {
        softmax_update_max<N>(r, s, exp_scale);
        softmax_exponentiate<N>(r, s, exp_scale);
        softmax_pack<FP16, N>(packed, s);
    } else {
        r.sum[0] += sum[0];
        r.sum[1] += sum[1];
    }
}
