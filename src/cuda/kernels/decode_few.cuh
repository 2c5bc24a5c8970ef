/* SPDX-License-Identifier: MIT
 *
 * The consumers of mha_decode for at most 16 packed rows.  A warpgroup's product of 64 rows would
 * leave 48 of them empty, and all the softmax to one warp; here each warp takes 16 keys of a step
 * for itself, with its own running maximum, sum and O, and the four are merged at a piece's end.
 *
 *     warp w   S = Q K^T of keys 16 w .. 16 w + 15 [16 rows][16 keys]   P   O += P V [16 rows][d_v]
 *
 * S and O have the accumulator layout of wgmma.cuh for one warp
 * (row g and g + 8 of lane 4 g + c), so P is the next A operand as it is.
 */
#pragma once
#include "decode_cluster.cuh"
#include "softmax.cuh"

enum { FEW_ROWS = 16, FEW_KEYS = 16 };

/* Address of what lane l passes to ldmatrix for two 16-byte columns of 16 rows of a panel: matrices
 * (rows 0-7, first column), then the same rows' second column with DOWN 0, or rows 8-15. */
template <int DOWN> ATTN_DEVICE uint32_t few_address(uint32_t panel, int row)
{
    int lane = (int)threadIdx.x % 32, high = lane / 8 % 2, higher = lane / 16;
    int at = row + lane % 8 + 8 * (DOWN ? high : higher);
    return panel + at * 128 + (((DOWN ? higher : high) ^ (at & 7)) << 4);
}

/* S = Q K^T in two sums, so that half as many products wait for each other. */
template <int FP16, int DQK>
ATTN_DEVICE void few_scores(float (&s)[FEW_KEYS / 2], uint32_t q, uint32_t k)
{
    float odd[FEW_KEYS / 2];
#pragma unroll
    for (int i = 0; i < FEW_KEYS / 2; i++)
        s[i] = odd[i] = 0.0f;
#pragma unroll
    for (int step = 0; step < DQK / 16; step++) {
        uint32_t a[4], b[4];
        float *sum = step % 2 ? odd : s;
        ldmatrix_x4<0>(a, (q + step / 4 * ATTN_DECODE_PANEL) ^ (step % 4 * 32));
        ldmatrix_x4<0>(b, (k + step / 4 * ATTN_DECODE_PANEL) ^ (step % 4 * 32));
        mma_16x8<FP16>(sum, a, b[0], b[1]);
        mma_16x8<FP16>(sum + 4, a, b[2], b[3]);
    }
#pragma unroll
    for (int i = 0; i < FEW_KEYS / 2; i++)
        s[i] += odd[i];
}

/* O += P V */
template <int FP16, int DV>
ATTN_DEVICE void few_outputs(float (&o)[DV / 2], const uint32_t (&packed)[4], uint32_t v)
{
#pragma unroll
    for (int two = 0; two < DV / 16; two++) {
        uint32_t b[4];
        ldmatrix_x4<1>(b, (v + two / 4 * ATTN_DECODE_PANEL) ^ (two % 4 * 32));
        mma_16x8<FP16>(o + 8 * two, packed, b[0], b[1]);
        mma_16x8<FP16>(o + 8 * two + 4, packed, b[2], b[3]);
    }
}

/* Rows 8 * half .. + 7 of the four warps' O, normalised, summed through shared memory
 * [warp][row][DV], columns swizzled, and stored. */
template <int FP16, int DV>
ATTN_DEVICE void few_store(const attn_decode_params &p, const decode_piece &piece, float *shared,
                           int half, float normalise, const float (&o)[DV / 2], float *near)
{
    int t = (int)threadIdx.x, lane = t % 32, warp = t / 32, g = lane / 4;
#pragma unroll
    for (int j = 0; j < DV / 8; j++)
        *(float2 *)&shared[(warp * 8 + g) * DV + ((8 * j + 2 * (lane % 4)) ^ (g % 4 * 8))] =
            make_float2(o[4 * j + 2 * half] * normalise, o[4 * j + 2 * half + 1] * normalise);
    named_barrier_sync<1, 128>();
    int live = min(piece.rows - 8 * half, 8);
#pragma unroll 1
    for (int i = t; i < live * (DV / 4); i += 128) {
        int row = i / (DV / 4), column = i % (DV / 4) * 4;
        float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int w = 0; w < 4; w++) {
            float4 x = *(float4 *)&shared[(w * 8 + row) * DV + (column ^ (row % 4 * 8))];
            sum = {sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w};
        }
        if (column >= p.call.d_v) continue;
        query_row r = find_row(p, piece, 8 * half + row);
        if (near)
            *(float4 *)&near[(8 * half + row) * near_rows<DV>::PITCH + column] = sum;
        else if (piece.slot < 0)
            *(uint2 *)((uint16_t *)p.call.out + r.b * p.call.out_stride_b +
                       r.at * p.call.out_stride_s + r.h_q * p.call.out_stride_h + column) =
                make_uint2(pack_16x2<FP16>(sum.x, sum.y), pack_16x2<FP16>(sum.z, sum.w));
        else
            *(float4 *)(partial_out_row(p, piece.slot, r.b, r.h_q, r.at, 8 * half + row) + column) =
                sum;
    }
    named_barrier_sync<1, 128>();
}

template <int FP16, int DQK, int DV, class SMEM>
ATTN_DEVICE void consume_few(const attn_decode_params &p, SMEM &sm, decode_walk walk,
                             decode_piece next)
{
    constexpr int STAGES = SMEM::STAGES, STEP = ATTN_DECODE_KEYS, PITCH = near_rows<DV>::PITCH;
    static_assert(DV <= DQK, "O is merged where q was");
    const attn_mha_fwd_params &call = p.call;
    int t = (int)threadIdx.x, lane = t % 32, warp = t / 32, g = lane / 4;
    int own = warp * FEW_KEYS; /* first key of a step */
    float *near = p.cluster > 1 ? (float *)sm.k : nullptr;
    decode_ring<STAGES> ring = {0, 0};
    float o[DV / 2], s[FEW_KEYS / 2];
    uint32_t packed[4];
    softmax_rows rows;
    const decode_piece &piece = sm.piece;

    do {
        load_query<ATTN_MHA_FWD_PANELS(DQK), FEW_ROWS>(p, q_rows(p), next, 0, 0,
                                                       shared_address(sm.q));
        if (t < FEW_ROWS)
            sm.bounds[t] = visible_keys(call, divide_anew(p.by_group, min(t, next.rows - 1)),
                                        next.seq.s_q, next.seq.s_k, next.cp_tot);
        if (t == 0) {
            sm.piece = next;
            sm.walk = walk;
        }
        cp_async_wait_all();
        named_barrier_sync<1, 128>();
        int whole_begin = (sm.bounds[FEW_ROWS - 1].lo + STEP - 1) / STEP;
        int whole_end = sm.bounds[0].hi / STEP;
        softmax_init(rows);
#pragma unroll
        for (int i = 0; i < DV / 2; i++)
            o[i] = 0.0f;
#pragma unroll 1
        for (int n = piece.end - 1, begin = piece.begin; n >= begin; n--) {
            mbarrier_wait_parity(shared_address(&sm.k_full[ring.stage]), ring.parity);
            few_scores<FP16, DQK>(s, few_address<1>(shared_address(sm.q), 0),
                                  few_address<0>(shared_address(sm.k[ring.stage]), own));
            mbarrier_arrive(shared_address(&sm.k_empty[ring.stage]));
            if (rarely(call.score != ATTN_SCORE_PLAIN)) transform_scores<FEW_KEYS>(call, s);
            if (n >= whole_end || n < whole_begin)
                mask_scores<FEW_KEYS>(s, n * STEP + own + 2 * (lane % 4), sm.bounds[g],
                                      sm.bounds[g + 8]);
            softmax_update_max<FEW_KEYS>(rows, s, call.exp_scale);
            softmax_exponentiate<FEW_KEYS>(rows, s, call.exp_scale);
            softmax_pack<FP16, FEW_KEYS>(packed, s);
            softmax_rescale<DV>(rows, o);
            mbarrier_wait_parity(shared_address(&sm.v_full[ring.stage]), ring.parity);
            few_outputs<FP16, DV>(o, packed, few_address<1>(shared_address(sm.v[ring.stage]), own));
            mbarrier_arrive(shared_address(&sm.v_empty[ring.stage]));
            ring.next();
        }

        /* The four warps' maxima and sums become one. */
        float normalise[2], lse[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float sum = quad_sum(rows.sum[h]);
            if (lane % 4 == 0) sm.few[warp][g + 8 * h] = make_float2(rows.max[h], sum);
        }
        named_barrier_sync<1, 128>();
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float2 part[4];
            float top = -INFINITY, sum = 0.0f;
#pragma unroll
            for (int w = 0; w < 4; w++) {
                part[w] = sm.few[w][g + 8 * h];
                top = fmaxf(top, part[w].x);
            }
#pragma unroll
            for (int w = 0; w < 4; w++)
                sum = fmaf(part[w].y, ex2_approx((part[w].x - top) * call.exp_scale), sum);
            bool sink = call.sink != ATTN_SINK_NONE && piece.first;
            int row = min(g + 8 * h, piece.rows - 1);
            softmax_finish(top, sum, call.exp_scale, sink,
                           sink ? load_sink(call, find_row(p, piece, row).h_q) : 0.0f,
                           piece.slot < 0 ? call.lse_empty : -INFINITY, &normalise[h], &lse[h]);
            if (near) normalise[h] = 1.0f; /* left to merge_cluster */
            if (near && warp == 0 && lane % 4 == 0)
                *(float2 *)&near[(g + 8 * h) * PITCH + DV] = make_float2(top, sum);
            normalise[h] *= ex2_approx((rows.max[h] - top) * call.exp_scale);
        }
        if (warp == 0 && !near) store_lse(p, piece, g, lse);
        few_store<FP16, DV>(p, piece, (float *)sm.q, 0, normalise[0], o, near);
        if (piece.rows > 8) few_store<FP16, DV>(p, piece, (float *)sm.q, 1, normalise[1], o, near);
        if (near) return;
        walk = sm.walk;
    } while (decode_next(p, walk, next));
}
