/* SPDX-License-Identifier: MIT
 *
 * Merging in place: the blocks of a cluster share an item (p.cluster in decode_sched.cuh).  Each of
 * their consumers leaves what it has of the rows in its block's shared memory, where all of the
 * cluster read it.  No workspace, no second kernel.
 *
 *     consumer n of a block     [row][DV columns of O, m, l, 2 unused]
 *     M = max_n m_n     w_n = 2^((m_n - M) k)     l = sum_n w_n l_n     out = sum_n w_n O_n / l
 *
 * A lane takes one consumer's part of four columns of a row, its neighbours the others', and sums
 * go over them in a fixed order; the blocks take such fours of columns in turns.
 */
#pragma once
#include "decode_rows.cuh"
#include "softmax.cuh"

enum { CLUSTER_BARRIER = 2 };

template <int DV> struct near_rows {
    static constexpr int PITCH = DV + 4, FLOATS = ATTN_DECODE_ROWS * PITCH;
};

/* A thread's rows `row` and row + 8 of O, their maxima and, over the quad, sums. */
template <int DV>
ATTN_DEVICE void store_near(float *near, int row, int rows, const softmax_rows &r,
                            const float (&o)[DV / 2])
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float sum = quad_sum(r.sum[h]), *to = near + (row + 8 * h) * near_rows<DV>::PITCH;
        if (row + 8 * h >= rows) continue;
        if (threadIdx.x % 4 == 0) *(float2 *)(to + DV) = make_float2(r.max[h], sum);
        to += threadIdx.x % 4 * 2;
#pragma unroll
        for (int j = 0; j < DV / 8; j++)
            *(float2 *)(to + 8 * j) = make_float2(o[4 * j + 2 * h], o[4 * j + 2 * h + 1]);
    }
}

/* Writes the item's results.  Called by the `groups` consumers of every block when they have stored
 * theirs, at `near` everywhere; `scratch` is the block's own.  Called before that, with `early`, by
 * warps that have nothing else to do: they read their own block's memory, whatever is there, and
 * leave the instructions in the cache. */
template <int DV>
ATTN_DEVICE void merge_cluster(const attn_decode_params &p, const decode_piece &piece,
                               uint32_t near, float4 *scratch, int groups, bool early)
{
    constexpr int FOURS = DV / 4, PITCH = near_rows<DV>::PITCH;
    const attn_mha_fwd_params &call = p.call;
    int threads = 128 * groups, t = (int)threadIdx.x & (threads - 1), rank = (int)cluster_rank();
    int parts = p.cluster * groups, each = threads / parts; /* fours of a block at a time */
    int part = t / each, block = early ? rank : part >> (groups - 1);
    float2 *states = (float2 *)(scratch + threads + parts); /* both [part][each + 1] */
    near += (part & (groups - 1)) * near_rows<DV>::FLOATS * 4;
    if (!early) { /* shared memory has one copy: no fence beyond the block's own barrier */
        named_barrier_sync<CLUSTER_BARRIER>(threads);
        cluster_sync_relaxed();
    }
#pragma unroll 1
    for (int base = early ? 0 : rank * each; base < piece.rows * FOURS; base += p.cluster * each) {
        /* Lanes side by side fetch columns side by side .. */
        int four = base + t % each, row = min(four / FOURS, piece.rows - 1);
        float2 state = load_cluster_2(near + (row * PITCH + DV) * 4, block);
        float4 x = load_cluster_4(near + (row * PITCH + four % FOURS * 4) * 4, block);
        /* .. and exchange them to hold the parts of the same columns side by side. */
        four = base + t / parts;
        row = min(four / FOURS, piece.rows - 1);
        int column = four % FOURS * 4;
        if (!early) {
            int to = part * (each + 1) + t % each, from = t % parts * (each + 1) + t / parts;
            scratch[to] = x;
            states[to] = state;
            named_barrier_sync<CLUSTER_BARRIER>(threads);
            x = scratch[from];
            state = states[from];
        }
        float top = state.x;
#pragma unroll 1
        for (int d = 1; d < parts; d *= 2)
            top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, d));
        float w = ex2_approx((state.x - top) * call.exp_scale), sum = w * state.y;
        x = {x.x * w, x.y * w, x.z * w, x.w * w};
#pragma unroll 1
        for (int d = 1; d < parts; d *= 2) {
            sum += __shfl_xor_sync(0xffffffff, sum, d);
            x.x += __shfl_xor_sync(0xffffffff, x.x, d);
            x.y += __shfl_xor_sync(0xffffffff, x.y, d);
            x.z += __shfl_xor_sync(0xffffffff, x.z, d);
            x.w += __shfl_xor_sync(0xffffffff, x.w, d);
        }
        query_row r = find_row(p, piece, row);
        float normalise, lse;
        bool sink = call.sink != ATTN_SINK_NONE && !early;
        softmax_finish(top, sum, call.exp_scale, sink, sink ? load_sink(call, r.h_q) : 0.0f,
                       call.lse_empty, &normalise, &lse);
        x = {x.x * normalise, x.y * normalise, x.z * normalise, x.w * normalise};
        if (t % parts == 0 && four / FOURS < piece.rows && column < call.d_v && !early) {
            if (column == 0) write_lse(p, r, lse);
            write_four(p, r, column, x);
        }
        if (early) return;
        named_barrier_sync<CLUSTER_BARRIER>(threads);
    }
    if (!early) cluster_sync_relaxed(); /* no block leaves before all have read */
}
