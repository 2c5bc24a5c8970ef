/* SPDX-License-Identifier: MIT
 *
 * decode_combine: merges the partial results of a decode kernel.
 *
 *     M = max_n lse_n      w_n = exp(lse_n - M)      out = sum_n w_n out_n / sum_n w_n
 *     lse = M + ln sum_n w_n;  all lse_n -inf: out 0, and no partial is read
 *
 * Layout.  d_v / 4 threads (rounded up to a power of two) share a row, four columns each; of those
 * p.combine_groups groups share the pieces, and the first merges what they have.
 * splits 0: the rows of the items that were cut, which every block finds in the line that the
 * decode kernel walked (decode_sched.cuh).  splits n: all rows of the call.
 * Starts while the decode kernel runs, finds its rows and waits; a block is small enough to lie
 * beside one of it.
 */
#include "decode_rows.cuh"

enum { THREADS_MAX = 256, ITEMS_MAX = 256 };

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

/* Adds COUNT other parts.  A NaN stays; a part without keys (top -inf) changes nothing. */
template <int COUNT> ATTN_DEVICE void merge(merged &m, const merged (&part)[COUNT])
{
    const float log2e = 1.4426950408889634f;
    float top = m.top;
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        top = fmaxf(top, part[i].top);
    float base = top == -INFINITY ? 0.0f : top, keep = ex2_approx((m.top - base) * log2e);
    m.top = top;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        float w = ex2_approx((part[i].top - base) * log2e);
        if (part[i].top != -INFINITY) {
            m.sum = fmaf(w, part[i].sum, m.sum * keep);
            scale_add(m.out, keep, w, part[i].out);
            keep = 1.0f;
        }
    }
    if (isnan(m.sum)) m.top = m.sum; /* or a later merge would take it for one without keys */
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
    int row = tile * ATTN_DECODE_ROWS + tile_row, token = divide_anew(p.by_group, row);
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
#pragma unroll 1
    for (int i = group; i < r.pieces; i += 4 * groups) {
        merged part[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int piece = i + j * groups, n = piece ? r.second + (piece - 1) * r.step : r.first;
            part[j] = {-INFINITY, 1.0f, {0.0f, 0.0f, 0.0f, 0.0f}};
            if (piece < r.pieces) {
                part[j].top = *partial_lse_at(p, n, r.b, r.h_q, r.at, r.tile_row);
                part[j].out = *(const float4 *)(partial_out_row(p, n, r.b, r.h_q, r.at,
                                                                r.tile_row) +
                                                column);
            }
        }
        merge(m, part);
    }
    return m;
}

ATTN_DEVICE void store_row(const attn_decode_params &p, const query_row &r, int column,
                           const merged &m)
{
    const float ln2 = 0.6931471805599453f;
    float scale = m.sum == 0.0f ? 0.0f : 1.0f / m.sum;
    if (column == 0)
        write_lse(p, r, m.sum == 0.0f ? p.call.lse_empty : m.top + lg2_approx(m.sum) * ln2);
    write_four(p, r, column,
               {m.out.x * scale, m.out.y * scale, m.out.z * scale, m.out.w * scale});
}

/* The cut items of a call, in the order of the blocks that began them. */
struct cut_items {
    struct {
        int block, b, h_kv, pieces;
    } item[ITEMS_MAX];
    int found[THREADS_MAX / 32];
    decode_line_smem line;
};

/* Finds them, and returns how many there are.  All threads call it; `through` is a number each. */
ATTN_DEVICE int find_cut_items(const attn_decode_params &p, cut_items &sm, int64_t *through)
{
    int t = (int)threadIdx.x, threads = (int)blockDim.x, count = 0;
    for (int tile = 0; tile < p.tiles; tile++) {
        decode_line line = decode_lay(p, tile, sm.line);
        through[t] = line.through; /* where the sequences of this thread end */
        __syncthreads();
        for (int base = 0; base < p.parts; base += threads) {
            int part = base + t, pieces = 0;
            decode_item item = {};
            int64_t place = line.share * (part + 1) - 1;
            if (part < p.parts && place < line.total) {
                int owner = 0; /* the first thread whose sequences end behind the place */
                for (int step = THREADS_MAX / 2; step; step /= 2)
                    if (owner + step <= threads && through[owner + step - 1] <= place)
                        owner += step;
                int each = (p.call.b + threads - 1) / threads;
                int64_t before = owner ? through[owner - 1] : 0;
                item = decode_find(p, tile, owner * each, before, place);
                pieces = decode_pieces(p, item, line.share, part);
            }
            uint32_t lanes = __ballot_sync(0xffffffff, pieces > 0);
            if (t % 32 == 0) sm.found[t / 32] = __popc(lanes);
            __syncthreads();
            int at = count + __popc(lanes & ((1u << t % 32) - 1));
            for (int w = 0; w < threads / 32; w++) {
                if (w < t / 32) at += sm.found[w];
                count += sm.found[w];
            }
            if (pieces) sm.item[at] = {part * p.tiles + tile, item.b, item.h, pieces};
            __syncthreads();
        }
    }
    return count;
}

extern "C" __global__ void __launch_bounds__(THREADS_MAX)
    attn_decode_combine_sm90(const __grid_constant__ attn_decode_params p)
{
    __shared__ cut_items cut;
    extern __shared__ __align__(16) uint8_t raw[]; /* a `merged` a thread */
    merged *shared = (merged *)raw;
    int t = (int)threadIdx.x, threads = (int)blockDim.x, groups = p.combine_groups;
    int sharers = 16; /* threads of a group */
    while (sharers * 4 < p.call.d_v)
        sharers *= 2;
    int column = t % sharers * 4, group = t / sharers % groups, own = t / (sharers * groups);
    int rows = threads / (sharers * groups); /* of a block */

    int items = p.splits ? p.call.b * p.call.h_k : find_cut_items(p, cut, (int64_t *)raw);
    int item_rows = p.splits ? p.tiles * ATTN_DECODE_ROWS : p.slot_rows;
    uint32_t all = (uint32_t)items * item_rows;
    for (uint32_t first = blockIdx.x * rows; first < all; first += gridDim.x * rows) {
        uint32_t at = first + own;
        combined_row r = {};
        if (at < all && column < p.call.d_v) {
            int item = (int)(at / item_rows), row = (int)(at % item_rows);
            if (p.splits) {
                r = find_combined(p, item / p.call.h_k, item % p.call.h_k, row / ATTN_DECODE_ROWS,
                                  row % ATTN_DECODE_ROWS, 0, p.splits);
            } else {
                auto found = cut.item[item];
                r = find_combined(p, found.b, found.h_kv, found.block % p.tiles, row,
                                  found.block * 2 + 1, found.pieces);
            }
        }
        wait_for_previous_kernel();
        merged m = merge_pieces(p, r, column, group, groups);
        if (groups > 1) {
            __syncthreads(); /* the last row's have been read */
            shared[t] = m;
            __syncthreads();
            for (int g = 1; group == 0 && g < groups; g += 4) {
                merged part[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    part[j] = {-INFINITY, 0.0f, {0.0f, 0.0f, 0.0f, 0.0f}};
                    if (g + j < groups) part[j] = shared[t + (g + j) * sharers];
                }
                merge(m, part);
            }
        }
        if (group == 0 && r.pieces) store_row(p, {r.h_q, r.b, r.at}, column, m);
    }
    wait_for_previous_kernel(); /* always: no later call may overtake the decode kernel */
}
