/* SPDX-License-Identifier: MIT
 *
 * Which block of a decode kernel computes which keys.
 *
 * splits 0.  Lay the items of one row tile out in a line, sequence by sequence and KV head by KV
 * head, each as long as its key steps plus p.item_cost.  The line is cut into p.parts equal shares
 * and part c walks share c:
 *
 *     | item 0         | item 1   | item 2                        | item 3 |     cost ->
 *     |     part 0        |     part 1        |     part 2        |   part 3
 *
 * So a block has at most one piece of an item that it continues (its first) and one of an item that
 * others continue (its last).  Both go to slots of the workspace; the block that begins an item
 * leaves a record of it for decode_combine.  Everything follows from the lengths, which every block
 * reads for itself: no schedule is made ahead, and none can be stale.
 *
 * splits n > 0.  Every item is cut in n pieces of as many steps, dealt to the parts in turn.
 */
#pragma once
#include "decode_params.h"
#include "sched.cuh"

/* A run of key steps of an item. */
struct decode_piece {
    int b, h_kv;
    int begin, end; /* steps [begin, end), may be none */
    int slot;       /* where its partial result goes: -1: nowhere, the piece is the whole item */
    int pieces;     /* of an item that this block begins and others finish; else 0 */
    bool first;     /* the item's first piece: it adds the sink */
    int rows;       /* of the sequence, packed */
    int cp_tot;
    sequence seq;
};

/* Steps [begin, end) that the rows of tile `tile` see; false: the sequence has no such rows. */
ATTN_DEVICE bool decode_steps(const attn_decode_params &p, const sequence &seq, int cp_tot,
                              int tile, int *begin, int *end)
{
    int rows = seq.s_q * p.call.group, first = tile * ATTN_DECODE_ROWS;
    if (first >= rows) return false;
    int last = min(first + ATTN_DECODE_ROWS, rows) - 1;
    int lo = visible_keys(p.call, first / p.call.group, seq.s_q, seq.s_k, cp_tot).lo;
    int hi = visible_keys(p.call, last / p.call.group, seq.s_q, seq.s_k, cp_tot).hi;
    *begin = lo / ATTN_DECODE_KEYS;
    *end = max((hi + ATTN_DECODE_KEYS - 1) / ATTN_DECODE_KEYS, *begin);
    return true;
}

ATTN_DEVICE int decode_cp_tot(const attn_decode_params &p, int b)
{
    return p.call.cp_tot ? max(__ldg(p.call.cp_tot + b), 0) : 0;
}

/* Cost of one KV head of sequence b. */
ATTN_DEVICE int decode_cost(const attn_decode_params &p, int tile, int b)
{
    int begin, end;
    sequence seq = locate_sequence(p.call, b);
    if (!decode_steps(p, seq, decode_cp_tot(p, b), tile, &begin, &end)) return 0;
    return end - begin + p.item_cost;
}

/* Where a walk stands; every warp role of a block keeps one of its own. */
struct decode_walk {
    int b, h;      /* the next item */
    int at;        /* cost of it that earlier parts have */
    int64_t left;  /* cost still to walk */
    int64_t share; /* of every part */
    int64_t unit;  /* splits n: the next piece's number */
};

/* What the threads of a block share while they look for its first item. */
struct decode_start_smem {
    int64_t sums[32];
    int low[32], high[32]; /* cheapest and dearest item */
    decode_walk walk;
};

/* The walk of this block, in sm.walk too.  All threads call it. */
template <int THREADS>
ATTN_DEVICE decode_walk decode_start(const attn_decode_params &p, decode_start_smem &sm)
{
    int t = (int)threadIdx.x, lane = t % 32, part = (int)blockIdx.x / p.tiles;
    int tile = (int)blockIdx.x % p.tiles;
    if (p.splits || p.parts == 1) {
        if (t == 0) sm.walk = {0, 0, 0, INT64_MAX, INT64_MAX, part};
        __syncthreads();
        return sm.walk;
    }

    int each = (p.call.b + THREADS - 1) / THREADS;
    int from = min(t * each, p.call.b), to = min(from + each, p.call.b);
    int64_t sum = 0;
    int low = INT32_MAX, high = 0;
    for (int b = from; b < to; b++) {
        int cost = decode_cost(p, tile, b);
        sum += (int64_t)cost * p.call.h_k;
        high = max(high, cost);
        if (cost > 0) low = min(low, cost);
    }
    low = __reduce_min_sync(0xffffffff, low);
    high = __reduce_max_sync(0xffffffff, high);
    int64_t through = sum;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        int64_t below = __shfl_up_sync(0xffffffff, through, d);
        if (lane >= d) through += below;
    }
    if (lane == 31) {
        sm.sums[t / 32] = through;
        sm.low[t / 32] = low;
        sm.high[t / 32] = high;
    }
    if (t == 0) sm.walk = {p.call.b, 0, 0, 0, 0, 0};
    __syncthreads();
    int64_t total = 0;
#pragma unroll
    for (int w = 0; w < THREADS / 32; w++) {
        if (w == t / 32) through += total;
        total += sm.sums[w];
        low = min(low, sm.low[w]);
        high = max(high, sm.high[w]);
    }
    /* Shares of whole items, where all cost the same and that is not much more: a cut costs two
     * visits to the item, and the merging. */
    int64_t share = (total + p.parts - 1) / p.parts;
    if (low == high) {
        int64_t whole = (share + high - 1) / high * high;
        if (whole <= share + 2 * p.item_cost) share = whole;
    }
    int64_t start = share * part;
    int64_t before = through - sum;
    if (before <= start && start < through) {
        for (int b = from; b < to; b++) {
            int cost = decode_cost(p, tile, b);
            int64_t all = (int64_t)cost * p.call.h_k;
            if (start < before + all) {
                int64_t inside = start - before;
                sm.walk = {b, (int)(inside / cost), (int)(inside % cost), share, share, 0};
                break;
            }
            before += all;
        }
    }
    __syncthreads();
    return sm.walk;
}

/* The next piece; false when there is no more. */
ATTN_DEVICE bool decode_next(const attn_decode_params &p, decode_walk &w, decode_piece &piece)
{
    int tile = (int)blockIdx.x % p.tiles;
    if (p.splits) {
        for (;; w.unit += p.parts) {
            int split = (int)(w.unit % p.splits);
            int64_t item = w.unit / p.splits;
            if (item >= (int64_t)p.call.b * p.call.h_k) return false;
            piece.b = (int)(item / p.call.h_k);
            piece.h_kv = (int)(item % p.call.h_k);
            piece.seq = locate_sequence(p.call, piece.b);
            piece.cp_tot = decode_cp_tot(p, piece.b);
            int begin, end;
            if (!decode_steps(p, piece.seq, piece.cp_tot, tile, &begin, &end)) continue;
            int64_t steps = end - begin;
            piece.begin = begin + (int)(steps * split / p.splits);
            piece.end = begin + (int)(steps * (split + 1) / p.splits);
            piece.slot = p.splits == 1 ? -1 : split;
            piece.pieces = 0;
            piece.first = split == 0;
            piece.rows = piece.seq.s_q * p.call.group;
            w.unit += p.parts;
            return true;
        }
    }
    while (w.left > 0 && w.b < p.call.b) {
        sequence seq = locate_sequence(p.call, w.b);
        int cp_tot = decode_cp_tot(p, w.b), begin, end;
        if (!decode_steps(p, seq, cp_tot, tile, &begin, &end)) {
            w.b++;
            continue;
        }
        int steps = end - begin, cost = steps + p.item_cost, at = w.at;
        int take = (int)min((int64_t)(cost - at), w.left), h = w.h;
        int from = max(at - p.item_cost, 0), to = max(at + take - p.item_cost, 0);
        piece.b = w.b;
        w.left -= take;
        w.at += take;
        if (w.at == cost) {
            w.at = 0;
            if (++w.h == p.call.h_k) {
                w.h = 0;
                w.b++;
            }
        }
        if (from == to && (steps > 0 || at > 0)) continue;
        piece.h_kv = h;
        piece.begin = begin + from;
        piece.end = begin + to;
        piece.first = from == 0;
        bool whole = from == 0 && to == steps;
        piece.slot = whole ? -1 : (int)blockIdx.x * 2 + piece.first;
        int64_t rest = cost - at - take;
        piece.pieces = whole || !piece.first ? 0 : 1 + (int)((rest + w.share - 1) / w.share);
        piece.rows = seq.s_q * p.call.group;
        piece.cp_tot = cp_tot;
        piece.seq = seq;
        return true;
    }
    return false;
}

/* Where a row of a partial result lies: `n` is the slot, or the split with splits > 1. */
ATTN_DEVICE float *partial_out_row(const attn_decode_params &p, int n, int b, int h_q, int64_t at,
                                   int tile_row)
{
    if (!p.splits)
        return p.partial_out + ((int64_t)n * p.slot_rows + tile_row) * p.call.d_v;
    return p.partial_out + n * p.partial_out_stride_n + b * p.partial_out_stride_b +
           at * p.partial_out_stride_s + h_q * p.partial_out_stride_h;
}

ATTN_DEVICE float *partial_lse_at(const attn_decode_params &p, int n, int b, int h_q, int64_t at,
                                  int tile_row)
{
    if (!p.splits) return p.partial_lse + (int64_t)n * p.slot_rows + tile_row;
    return p.partial_lse + n * p.partial_lse_stride_n + b * p.partial_lse_stride_b +
           h_q * p.partial_lse_stride_h + at;
}
