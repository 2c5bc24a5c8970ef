/* SPDX-License-Identifier: MIT
 *
 * Packed query rows of the decode kernels: q in, results out.  A warpgroup calls each function.
 */
#pragma once
#include "attend.cuh"
#include "decode_sched.cuh"

/* A place in a ring of stages.  A consumer starts at parity 0, a producer at parity 1. */
template <int STAGES> struct decode_ring {
    uint32_t stage, parity;

    __device__ __forceinline__ void next()
    {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

/* A packed row: its token of the sequence, its head, and where that lies. */
struct query_row {
    int h_q, b; /* b: batch index, 0 when packed */
    int64_t at; /* row of the packed tensors or of sequence b */
};

ATTN_DEVICE query_row find_row(const attn_decode_params &p, const decode_piece &piece, int row)
{
    int token = row / p.call.group;
    return {piece.h_kv * p.call.group + row - token * p.call.group,
            p.call.cu_seqlens_q ? 0 : piece.b, (int64_t)piece.seq.q_offset + token};
}

/* Columns from column0 on of the q rows of the tile that begins with row `first`, zeros below the
 * last, in panels. */
template <int PANELS>
ATTN_DEVICE void load_q(const attn_decode_params &p, const decode_piece &piece, int first,
                        int column0, uint32_t dst)
{
    constexpr int CHUNKS = PANELS * 8;
    const uint16_t *q = (const uint16_t *)p.q + column0;
#pragma unroll 4
    for (int i = (int)threadIdx.x % 128; i < ATTN_DECODE_ROWS * CHUNKS; i += 128) {
        int row = i / CHUNKS, chunk = i % CHUNKS;
        bool live = first + row < piece.rows && column0 + chunk * 8 < p.call.d_qk;
        query_row r = find_row(p, piece, live ? first + row : 0);
        cp_async_16(dst + chunk / 8 * (ATTN_DECODE_ROWS * 128) + row * 128 +
                        ((chunk % 8 ^ (row & 7)) << 4),
                    live ? q + r.b * p.q_stride_b + r.at * p.q_stride_s + r.h_q * p.q_stride_h +
                               chunk * 8
                         : q,
                    live ? 16 : 0);
    }
    cp_async_wait_all();
    fence_proxy_async_shared();
}

/* The lse of a thread's rows `row` and row + 8. */
ATTN_DEVICE void store_lse(const attn_decode_params &p, const decode_piece &piece, int row,
                           const float (&lse)[2])
{
    if (threadIdx.x % 4) return;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        if (row + 8 * h >= piece.rows) continue;
        query_row r = find_row(p, piece, row + 8 * h);
        if (piece.slot < 0)
            p.call.lse[r.b * p.call.lse_stride_b + r.h_q * p.call.lse_stride_h +
                       r.at * p.lse_stride_s] = lse[h];
        else
            *partial_lse_at(p, piece.slot, r.b, r.h_q, r.at, (row + 8 * h) % ATTN_DECODE_ROWS) =
                lse[h];
    }
}

/* Columns column0 .. column0 + COLUMNS - 1 of those rows, from the accumulator: to out, or as a
 * partial result. */
template <int FP16, int COLUMNS>
ATTN_DEVICE void store_out(const attn_decode_params &p, const decode_piece &piece, int row,
                           int column0, const float (&normalise)[2], const float (&o)[COLUMNS / 2])
{
    const attn_mha_fwd_params &call = p.call;
    int c = (int)threadIdx.x % 4;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        bool live = row + 8 * h < piece.rows;
        query_row r = find_row(p, piece, live ? row + 8 * h : 0);
        if (piece.slot < 0) {
            uint16_t *out = (uint16_t *)call.out + r.b * call.out_stride_b +
                            r.at * call.out_stride_s + r.h_q * call.out_stride_h;
#pragma unroll
            for (int j = 0; j < COLUMNS / 32; j++) {
                uint32_t x[4];
#pragma unroll
                for (int e = 0; e < 4; e++)
                    x[e] = pack_16x2<FP16>(o[16 * j + 4 * e + 2 * h] * normalise[h],
                                           o[16 * j + 4 * e + 2 * h + 1] * normalise[h]);
                quad_transpose(x);
                int column = column0 + 32 * j + 8 * c;
                if (live && column < call.d_v)
                    *(uint4 *)(out + column) = make_uint4(x[0], x[1], x[2], x[3]);
            }
        } else if (live) {
            float *out = partial_out_row(p, piece.slot, r.b, r.h_q, r.at,
                                         (row + 8 * h) % ATTN_DECODE_ROWS);
#pragma unroll
            for (int j = 0; j < COLUMNS / 8; j++) {
                int column = column0 + 8 * j + 2 * c;
                if (column < call.d_v)
                    *(float2 *)(out + column) = make_float2(o[4 * j + 2 * h] * normalise[h],
                                                            o[4 * j + 2 * h + 1] * normalise[h]);
            }
        }
    }
}
