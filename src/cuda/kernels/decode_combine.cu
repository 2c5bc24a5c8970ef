/* SPDX-License-Identifier: MIT
 *
 * decode_combine: merges the partial results of a decode kernel.
 *
 *     M = max_n lse_n      w_n = exp(lse_n - M)      out = sum_n w_n out_n / sum_n w_n
 *     lse = M + ln sum_n w_n;  all lse_n -inf: out 0, and no partial is read
 *
 * Layout.  d_v / 4 threads (rounded up to a power of two) share a row, four columns each; of those
 * p.combine_groups groups share the pieces, and the first merges what they have.
 * splits 0: the rows of the items in p.records, which the decode kernel wrote; most blocks of it
 * left none.  splits n: all rows of the call.  Starts while the decode kernel runs and waits for it;
 * a block is small enough to lie beside one of it.
 */
#include "attend.cuh"
#include "decode_sched.cuh"

enum { THREADS_MAX = 512, RECORDS_MAX = 256 };

/* Some pieces of a row, merged but not normalised: top = M, sum, and four columns. */
struct merged {
    float top, sum;
    float4 out;
};
static_assert(sizeof(merged) == ATTN_DECODE_MERGED_BYTES, "what the host asks for");

ATTN_DEVICE void scale_add(float4 &to, float keep, float w, const float4 &x)
{
    to.x = fmaf(w, x.x, to.x * keep);
    to.y = fmaf(w, x.y, to.y * keep);
    to.z = fmaf(w, x.z, to.z * keep);
    to.w = fmaf(w, x.w, to.w * keep);
}

/* Adds another part.  A NaN stays; a part without keys (top -inf) changes nothing. */
ATTN_DEVICE void merge(merged &m, float top, float sum, const float4 &out)
{
    const float log2e = 1.4426950408889634f;
    if (top == -INFINITY) return;
    float higher = m.top > top ? m.top : top; /* the NaN of m.top > NaN is `top` */
    if (isnan(m.top)) higher = m.top;
    float keep = m.top == -INFINITY ? 0.0f : ex2_approx((m.top - higher) * log2e);
    float w = ex2_approx((top - higher) * log2e);
    m.top = higher;
    m.sum = fmaf(w, sum, m.sum * keep);
    scale_add(m.out, keep, w, out);
}

/* A row of item (b, h_kv, tile). */
struct combined_row {
    int b, h_q, tile_row; /* b: batch index, 0 when packed */
    int64_t at;
    int first, second, step; /* slots or splits: of piece 0, of piece 1, and from there on */
    int pieces;              /* 0: no such row */
};

ATTN_DEVICE combined_row find_combined(const attn_decode_params &p, int b, int h_kv, int tile,
                                       int tile_row, int n, int pieces)
{
    sequence seq = locate_sequence(p.call, b);
    int row = tile * ATTN_DECODE_ROWS + tile_row, token = row / p.call.group;
    return {p.call.cu_seqlens_q ? 0 : b,
            h_kv * p.call.group + row - token * p.call.group,
            tile_row,
            (int64_t)seq.q_offset + token,
            n,
            p.splits ? 1 : n - 1 + 2 * p.tiles,
            p.splits ? 1 : 2 * p.tiles,
            token < seq.s_q ? pieces : 0};
}

/* Pieces group, group + groups, .. of a row, columns column .. column + 3. */
ATTN_DEVICE merged merge_pieces(const attn_decode_params &p, const combined_row &r, int column,
                                int group, int groups)
{
    merged m = {-INFINITY, 0.0f, {0.0f, 0.0f, 0.0f, 0.0f}};
#pragma unroll 4
    for (int i = group; i < r.pieces; i += groups) {
        int n = i ? r.second + (i - 1) * r.step : r.first;
        float lse = *partial_lse_at(p, n, r.b, r.h_q, r.at, r.tile_row);
        float4 x = *(const float4 *)(partial_out_row(p, n, r.b, r.h_q, r.at, r.tile_row) + column);
        merge(m, lse, 1.0f, x);
    }
    return m;
}

ATTN_DEVICE void store_row(const attn_decode_params &p, const combined_row &r, int column,
                           const merged &m)
{
    const attn_mha_fwd_params &call = p.call;
    const float ln2 = 0.6931471805599453f;
    bool empty = m.top == -INFINITY;
    float scale = empty ? 0.0f : 1.0f / m.sum;
    if (column == 0)
        call.lse[r.b * call.lse_stride_b + r.h_q * call.lse_stride_h + r.at * p.lse_stride_s] =
            empty ? call.lse_empty : m.top + lg2_approx(m.sum) * ln2;
    uint16_t *out = (uint16_t *)call.out + r.b * call.out_stride_b + r.at * call.out_stride_s +
                    r.h_q * call.out_stride_h + column;
    float x = m.out.x * scale, y = m.out.y * scale, z = m.out.z * scale, w = m.out.w * scale;
    *(uint2 *)out = p.fp16 ? make_uint2(pack_16x2<1>(x, y), pack_16x2<1>(z, w))
                           : make_uint2(pack_16x2<0>(x, y), pack_16x2<0>(z, w));
}

extern "C" __global__ void __launch_bounds__(THREADS_MAX)
    attn_decode_combine_sm90(const __grid_constant__ attn_decode_params p)
{
    __shared__ int begun[RECORDS_MAX]; /* blocks that began an item which others continued */
    __shared__ int found[THREADS_MAX / 32];
    extern __shared__ __align__(16) uint8_t raw[]; /* a `merged` a thread, with several groups */
    merged *shared = (merged *)raw;
    int t = (int)threadIdx.x, threads = (int)blockDim.x, groups = p.combine_groups;
    int sharers = 16; /* threads of a group */
    while (sharers * 4 < p.call.d_v)
        sharers *= 2;
    int column = t % sharers * 4, group = t / sharers % groups, own = t / (sharers * groups);
    int rows = threads / (sharers * groups); /* of a block */

    wait_for_previous_kernel();
    int count = 0; /* the list must have one order in all blocks, which share its rows */
    for (int base = 0; !p.splits && base < p.parts * p.tiles; base += threads) {
        int i = base + t, warp = t / 32;
        bool here = i < p.parts * p.tiles && p.records[i].pieces;
        uint32_t lanes = __ballot_sync(0xffffffff, here);
        if (t % 32 == 0) found[warp] = __popc(lanes);
        __syncthreads();
        int at = count + __popc(lanes & ((1u << t % 32) - 1));
        for (int w = 0; w < threads / 32; w++) {
            if (w < warp) at += found[w];
            count += found[w];
        }
        if (here) begun[at] = i;
        __syncthreads();
    }

    int item_rows = p.splits ? p.tiles * ATTN_DECODE_ROWS : p.slot_rows;
    uint32_t all = (uint32_t)(p.splits ? p.call.b * p.call.h_k : count) * item_rows;
    for (uint32_t first = blockIdx.x * rows; first < all; first += gridDim.x * rows) {
        uint32_t at = first + own;
        combined_row r = {};
        if (at < all && column < p.call.d_v) {
            int item = (int)(at / item_rows), row = (int)(at % item_rows);
            if (p.splits) {
                r = find_combined(p, item / p.call.h_k, item % p.call.h_k, row / ATTN_DECODE_ROWS,
                                  row % ATTN_DECODE_ROWS, 0, p.splits);
            } else {
                int block = begun[item];
                attn_decode_record record = p.records[block];
                r = find_combined(p, record.b, record.h_kv, block % p.tiles, row, block * 2 + 1,
                                  record.pieces);
            }
        }
        merged m = merge_pieces(p, r, column, group, groups);
        if (groups > 1) {
            __syncthreads(); /* the last row's have been read */
            shared[t] = m;
            __syncthreads();
            for (int g = 1; group == 0 && g < groups; g++) {
                const merged &other = shared[t + g * sharers];
                merge(m, other.top, other.sum, other.out);
            }
        }
        if (group == 0 && r.pieces) store_row(p, r, column, m);
    }
}
