/* SPDX-License-Identifier: MIT
 *
 * What the attention kernels share: boxes of keys, the two products of a step, scores, sinks.
 */
#pragma once
#include "mha_fwd_params.h"
#include "wgmma.cuh"

enum { DTYPE_bf16 = 0, DTYPE_fp16 = 1 };

/* ---- loads ----------------------------------------------------------------------------------- */

/* A box of `p.box_rows` rows of a k or v tile, of which the first `live` (at least 1) are the
 * sequence's.  The rest become zero: their P is zero, but 0 times whatever lies there could be NaN.
 * With a cluster of two the box lands in both blocks.
 * A panel wholly right of the head, which only v in a wider kernel has, gets its first columns once
 * more: a box there would make the copy engine touch the shifted base of the map, which need not be
 * mapped memory, and nothing reads the products of those columns. */
template <int IS_V>
ATTN_DEVICE void load_box(const attn_mha_fwd_params &p, const attn_tensor_map *map, uint32_t dst,
                          uint32_t bar, int panel, int live, int position, int h_kv, int source)
{
    int column = IS_V && panel * 64 >= p.d_v ? 0 : panel * 64;
    if (p.cluster == 2)
        tma_load_5d_multicast(dst, map, bar, 3, column, p.box_rows - live, position + live, h_kv,
                              source);
    else
        tma_load_5d(dst, map, bar, column, p.box_rows - live, position + live, h_kv, source);
}

/* Opens the barrier for the boxes of a tile that hold one of its `live` rows; returns their rows.
 * Boxes without any are not loaded (the copy engine would touch the shifted base of the map, which
 * need not be mapped memory); those of v become zero here, in each block.  By a whole warp. */
template <int PANELS, int N, int IS_V>
ATTN_DEVICE int open_tile(const attn_mha_fwd_params &p, uint32_t dst, uint32_t bar, int live)
{
    int rows = p.box_rows;
    while (rows < live)
        rows += p.box_rows;
    if (IS_V && rows < N) {
        int lane = (int)threadIdx.x % 32, chunks = (N - rows) * 8;
        for (int panel = 0; panel < PANELS; panel++)
            for (int i = lane; i < chunks; i += 32)
                shared_zero_16(dst + panel * N * 128 + rows * 128 + i * 16);
        fence_proxy_async_shared();
        __syncwarp();
    }
    if (elect_one()) mbarrier_arrive_expect_tx(bar, PANELS * 128 * rows);
    __syncwarp();
    return rows;
}

/* Where k or v lies, for gathered loads. */
struct key_rows {
    const uint16_t *data; /* [batch or page, rows, h_k, width] */
    int64_t stride_b, stride_s, stride_h;
    int width;
};

/* ---- products and scores --------------------------------------------------------------------- */

/* Issues S = Q K^T for a warpgroup's 64 rows and KEYS of a tile of N. */
template <int FP16, int DQK, int M, int N, int KEYS = N>
ATTN_DEVICE void issue_qk(float (&s)[KEYS / 2], uint32_t q, uint32_t k)
{
    uint64_t a = wgmma_descriptor(q, 16), b = wgmma_descriptor(k, 16);
#pragma unroll
    for (int step = 0; step < DQK / 16; step++) {
        int panel = step / 4, inside = step % 4 * 2;
        wgmma_ss<FP16, KEYS>(s, a + panel * (M * 8) + inside, b + panel * (N * 8) + inside, step != 0);
    }
    wgmma_commit_group();
}

/* Issues O += P V, or O = P V with `accumulate` 0. */
template <int FP16, int DV, int N, int STEPS = N / 16>
ATTN_DEVICE void issue_pv(float (&o)[DV / 2], uint32_t (&packed)[N / 4], uint32_t v, int accumulate)
{
    uint64_t b = wgmma_descriptor(v, N * 128);
#pragma unroll
    for (int step = 0; step < STEPS; step++)
        wgmma_rs<FP16, DV>(o, packed + 4 * step, b + step * 128, step != 0 || accumulate);
    wgmma_commit_group();
}

/* Softcap, and a scale that is not positive, in decode. */
template <int N> ATTN_DEVICE void transform_scores(const attn_mha_fwd_params &p, float (&s)[N / 2])
{
    bool capped = p.score != ATTN_SCORE_SCALED; /* one loop: two of them spill in d64 */
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        s[i] *= p.score_scale;
        if (capped) s[i] = tanh_approx(s[i]);
    }
}

ATTN_DEVICE float load_sink(const attn_mha_fwd_params &p, int h_q)
{
    if (p.sink == ATTN_SINK_FP32) return __ldg((const float *)p.sinks + h_q);
    uint32_t bits = __ldg((const uint16_t *)p.sinks + h_q);
    return p.sink == ATTN_SINK_BF16 ? __uint_as_float(bits << 16) : half_to_float(bits);
}

/* Four registers x[j] of lane c of a quad become what lane j had in x[c]: so a lane ends with
 * sixteen neighbouring bytes of a row instead of four times four. */
ATTN_DEVICE void quad_transpose(uint32_t (&x)[4])
{
    bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        uint32_t got = __shfl_xor_sync(0xffffffff, odd ? x[i] : x[i + 1], 1);
        if (odd) x[i] = got;
        else x[i + 1] = got;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint32_t got = __shfl_xor_sync(0xffffffff, high ? x[i] : x[i + 2], 2);
        if (high) x[i] = got;
        else x[i + 2] = got;
    }
}
