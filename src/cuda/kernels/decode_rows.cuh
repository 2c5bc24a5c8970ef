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
    int token = divide_anew(p.by_group, row);
    return {piece.h_kv * p.call.group + row - token * p.call.group,
            p.call.cu_seqlens_q ? 0 : piece.b, (int64_t)piece.seq.q_offset + token};
}

/* q or qv: [b, s_q, h_q, width] or [t_q, h_q, width]; width 0: there is none. */
struct query_rows {
    const uint16_t *data;
    int64_t stride_b, stride_s, stride_h;
    int width;

    __device__ __forceinline__ const uint16_t *at(const query_row &r) const
    {
        return data + r.b * stride_b + r.at * stride_s + r.h_q * stride_h;
    }
};

ATTN_DEVICE query_rows q_rows(const attn_decode_params &p)
{
    return {(const uint16_t *)p.q, p.q_stride_b, p.q_stride_s, p.q_stride_h, p.call.d_qk};
}

ATTN_DEVICE query_rows qv_rows(const attn_decode_params &p)
{
    return {(const uint16_t *)p.qv, p.qv_stride_b, p.qv_stride_s, p.qv_stride_h,
            p.qv ? p.call.d_v : 0};
}

/* `x`, known from here on only: what follows from it is computed again for every piece instead of
 * being kept in registers, or spilled, from one piece to the next. */
ATTN_DEVICE int known_here(int x)
{
    asm volatile("" : "+r"(x));
    return x;
}

/* Columns from column0 on of the ROWS rows from `first` on, in panels of 64 rows; zeros below the
 * last row and right of the last column.  Under way until wait_q. */
template <int PANELS, int ROWS = ATTN_DECODE_ROWS>
ATTN_DEVICE void load_query(const attn_decode_params &p, const query_rows &rows,
                            const decode_piece &piece, int first, int column0, uint32_t dst,
                            int threads = 128)
{
    constexpr int CHUNKS = PANELS * 8, PANEL = ATTN_DECODE_ROWS * 128;
#pragma unroll 1
    for (int i = known_here((int)threadIdx.x) & (threads - 1); i < ROWS * CHUNKS; i += threads) {
        int row = i / CHUNKS, chunk = i % CHUNKS;
        uint32_t to = dst + chunk / 8 * PANEL + row * 128 + ((chunk % 8 ^ (row & 7)) << 4);
        if (first + row < piece.rows && column0 + chunk * 8 < rows.width)
            cp_async_16(to, rows.at(find_row(p, piece, first + row)) + column0 + chunk * 8);
        else
            shared_zero_16(to);
    }
}

ATTN_DEVICE void wait_q()
{
    cp_async_wait_all();
    fence_proxy_async_shared();
}

/* The lse of a row, where it is wanted. */
ATTN_DEVICE void write_lse(const attn_decode_params &p, const query_row &r, float lse)
{
    if (p.call.lse)
        p.call.lse[r.b * p.call.lse_stride_b + r.h_q * p.call.lse_stride_h +
                   r.at * p.lse_stride_s] = lse;
}

/* Four columns of a row of out. */
ATTN_DEVICE void write_four(const attn_decode_params &p, const query_row &r, int column,
                            const float4 &x)
{
    const attn_mha_fwd_params &call = p.call;
    uint16_t *out = (uint16_t *)call.out + r.b * call.out_stride_b + r.at * call.out_stride_s +
                    r.h_q * call.out_stride_h + column;
    *(uint2 *)out = p.fp16 ? make_uint2(pack_16x2<1>(x.x, x.y), pack_16x2<1>(x.z, x.w))
                           : make_uint2(pack_16x2<0>(x.x, x.y), pack_16x2<0>(x.z, x.w));
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
            write_lse(p, r, lse[h]);
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
    int c = known_here((int)threadIdx.x) % 4;
    row = known_here(row);
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
