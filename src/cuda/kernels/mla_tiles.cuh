/* SPDX-License-Identifier: MIT
 *
 * What both kernels of MLA decode do with a step's tiles: S = Q K^T.
 */
#pragma once
#include "attend.cuh"
#include "decode_params.h"

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
