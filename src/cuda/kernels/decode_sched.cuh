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
 * others continue (its last).  Both go to slots of the workspace, where decode_combine, which lays
 * out the same line, finds them.  Everything follows from the lengths, which every block reads for
 * itself: no schedule is made ahead, and none can be stale.
 *
 * splits n > 0.  Every item is cut in n pieces of as many steps, dealt to the parts in turn.
 *
 * cluster n > 1.  There is one sequence of one row tile, so that all items cost the same: each is a
 * cluster's, cut in n pieces of as many steps, some of which may have none.
 */
#pragma once
#include "decode_params.h"
#include "sched.cuh"

/* divide, hidden from the compiler, which else keeps quotients in registers over whole loops. */
ATTN_DEVICE int divide_anew(attn_division d, int x)
{
    int quotient;
    asm volatile("{ .reg .u32 x; shl.b32 x, %1, 1; mul.hi.u32 x, x, %2; shr.u32 %0, x, %3; }"
                 : "=r"(quotient)
                 : "r"(x), "r"(d.magic), "r"(d.shift));
    return quotient;
}

/* The row tile and the part of this block. */
ATTN_DEVICE int decode_tile(const attn_decode_params &p)
{
    return rarely(p.tiles > 1) ? (int)blockIdx.x % p.tiles : 0;
}

ATTN_DEVICE int decode_part(const attn_decode_params &p)
{
    return rarely(p.tiles > 1) ? (int)blockIdx.x / p.tiles : (int)blockIdx.x;
}

/* A run of key steps of an item. */
struct decode_piece {
    int b, h_kv;
    int begin, end; /* steps [begin, end), may be none */
    int slot;       /* where its partial result goes: -1: nowhere, the piece is the whole item */
    bool first;     /* the item's first piece: it adds the sink */
    int rows;       /* of the sequence, packed */
    int cp_tot;
    sequence seq;
};

/* Steps [begin, end) that the rows of tile `tile` see; false: the sequence has no such rows. */
ATTN_DEVICE bool decode_steps(const attn_decode_params &p, const sequence &seq, int cp_tot,
                              int tile, int *begin, int *end)
{
    int rows = seq.s_q * p.call.group, first = tile * ATTN_DECODE_ROWS, lo = 0;
    if (first >= rows) return false;
    int last = min(first + ATTN_DECODE_ROWS, rows) - 1;
    int top = divide_anew(p.by_group, first), bottom = divide_anew(p.by_group, last);
#pragma unroll 1
    for (int query = top;; query = bottom) {
        key_interval sees = visible_keys(p.call, query, seq.s_q, seq.s_k, cp_tot);
        if (query == top) lo = sees.lo;
        if (query < bottom) continue;
        *begin = lo / ATTN_DECODE_KEYS;
        *end = max((sees.hi + ATTN_DECODE_KEYS - 1) / ATTN_DECODE_KEYS, *begin);
        return true;
    }
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

/* Shares of whole items, where all items cost `cost` (else 0) and whole ones are not much more than
 * equal shares: a cut costs two visits to the item, and the merging. */
template <class INT> ATTN_DEVICE INT whole_share(const attn_decode_params &p, INT share, int cost)
{
    if (cost == 0 || share + 2 * p.item_cost < cost) return share;
    INT whole = (share + cost - 1) / cost * cost;
    return whole <= share + 2 * p.item_cost ? whole : share;
}

/* ---- the line, laid out by all threads of a block -------------------------------------------- */

struct decode_line {
    int from, to;            /* the sequences of this thread */
    int64_t before, through; /* where they begin and end */
    int64_t total, share;
};

struct decode_line_smem {
    int64_t sums[32];
    int low[32], high[32]; /* cheapest and dearest item */
};

ATTN_DEVICE decode_line decode_lay(const attn_decode_params &p, int tile, decode_line_smem &sm)
{
    int t = (int)threadIdx.x, threads = (int)blockDim.x, lane = t % 32;
    int each = (p.call.b + threads - 1) / threads;
    decode_line line;
    line.from = min(t * each, p.call.b);
    line.to = min(line.from + each, p.call.b);
    int64_t sum = 0;
    int low = INT32_MAX, high = 0;
    for (int b = line.from; b < line.to; b++) {
        int cost = decode_cost(p, tile, b);
        sum += (int64_t)cost * p.call.h_k;
        high = max(high, cost);
        if (cost > 0) low = min(low, cost);
    }
    low = __reduce_min_sync(0xffffffff, low);
    high = __reduce_max_sync(0xffffffff, high);
    line.through = sum;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        int64_t below = __shfl_up_sync(0xffffffff, line.through, d);
        if (lane >= d) line.through += below;
    }
    if (lane == 31) {
        sm.sums[t / 32] = line.through;
        sm.low[t / 32] = low;
        sm.high[t / 32] = high;
    }
    __syncthreads();
    line.total = 0;
#pragma unroll 1
    for (int w = 0; w < threads / 32; w++) {
        if (w == t / 32) line.through += line.total;
        line.total += sm.sums[w];
        low = min(low, sm.low[w]);
        high = max(high, sm.high[w]);
    }
    line.before = line.through - sum;
    line.share = whole_share(p, (line.total + p.parts - 1) / p.parts, low == high ? high : 0);
    return line;
}

/* The item at a place of the line between `before` and `through`. */
struct decode_item {
    int b, h, cost;
    int64_t begin; /* its place */
};

ATTN_DEVICE decode_item decode_find(const attn_decode_params &p, int tile, int b, int64_t before,
                                    int64_t place)
{
    for (;; b++) {
        int cost = decode_cost(p, tile, b);
        int64_t through = before + (int64_t)cost * p.call.h_k;
        if (place < through) {
            int h = (int)((place - before) / cost);
            return {b, h, cost, before + (int64_t)h * cost};
        }
        before = through;
    }
}

/* ---- the walk of a block --------------------------------------------------------------------- */

/* Where a walk stands; every warp role of a block keeps one of its own. */
struct decode_walk {
    int b, h;     /* the next item; splits n: its number in h */
    int at;       /* cost of it that earlier parts have; splits n: the next piece of it */
    int64_t left; /* cost still to walk */
};

/* What the threads of a block share while they look for its first item. */
struct decode_start_smem {
    decode_line_smem line;
    decode_walk walk;
};

/* Sets sequence and steps of piece.b; false: it has no rows of this block's tile. */
ATTN_DEVICE bool decode_locate(const attn_decode_params &p, decode_piece &piece)
{
    piece.seq = locate_sequence(p.call, piece.b);
    piece.cp_tot = decode_cp_tot(p, piece.b);
    piece.rows = piece.seq.s_q * p.call.group;
    return decode_steps(p, piece.seq, piece.cp_tot, decode_tile(p), &piece.begin, &piece.end);
}

/* With p.narrow: the walk's start, by every warp for itself; `own` becomes the lane's sequence. */
ATTN_DEVICE decode_walk decode_start_narrow(const attn_decode_params &p, decode_piece &own)
{
    int lane = (int)threadIdx.x % 32, cost = 0;
    own.b = lane;
    if (lane < p.call.b && decode_locate(p, own)) cost = own.end - own.begin + p.item_cost;
    int high = __reduce_max_sync(0xffffffff, cost);
    int low = __reduce_min_sync(0xffffffff, cost ? cost : high);
    int sum = cost * p.call.h_k, through = sum;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        int below = __shfl_up_sync(0xffffffff, through, d);
        if (lane >= d) through += below;
    }
    int total = __shfl_sync(0xffffffff, through, 31);
    int even = divide_anew(p.by_parts, total + p.parts - 1);
    int share = whole_share(p, even, low == high ? high : 0);
    int place = share * decode_part(p);
    if (place >= total) return {p.call.b, 0, 0, 0};
    int b = __ffs((int)__ballot_sync(0xffffffff, place < through)) - 1;
    int inside = place - __shfl_sync(0xffffffff, through - sum, b);
    cost = __shfl_sync(0xffffffff, cost, b);
    int h = inside / cost;
    return {b, h, inside - h * cost, share};
}

/* The walk's start without p.narrow; all threads call it. */
ATTN_DEVICE decode_walk decode_start_wide(const attn_decode_params &p, decode_start_smem &sm)
{
    if (p.splits || p.parts == 1) {
        int part = decode_part(p), item = p.splits ? part / p.splits : 0;
        return {0, item, part - item * p.splits, INT64_MAX};
    }
    int tile = decode_tile(p);
    if (threadIdx.x == 0) sm.walk = {p.call.b, 0, 0, 0};
    decode_line line = decode_lay(p, tile, sm.line);
    int64_t place = line.share * decode_part(p);
    if (line.before <= place && place < line.through) {
        decode_item item = decode_find(p, tile, line.from, line.before, place);
        sm.walk = {item.b, item.h, (int)(place - item.begin), line.share};
    }
    __syncthreads();
    return sm.walk;
}

/* The walk of this block, in sm.walk, for thread 0.  All threads call it and meet in it. */
ATTN_DEVICE void decode_start(const attn_decode_params &p, decode_start_smem &sm)
{
    decode_piece own;
    decode_walk walk = p.narrow ? decode_start_narrow(p, own) : decode_start_wide(p, sm);
    __syncthreads(); /* all have taken it */
    if (threadIdx.x == 0) sm.walk = walk;
}

/* Takes the walk's share of the item that it is at, whose steps are those of `piece`; false: no key
 * of it. */
ATTN_DEVICE bool decode_take(const attn_decode_params &p, decode_walk &w, decode_piece &piece)
{
    int steps = piece.end - piece.begin, cost = steps + p.item_cost, at = w.at;
    int take = (int)min((int64_t)(cost - at), w.left);
    int from = max(at - p.item_cost, 0), to = max(at + take - p.item_cost, 0);
    piece.h_kv = w.h;
    w.left -= take;
    w.at += take;
    if (w.at == cost) {
        w.at = 0;
        if (++w.h == p.call.h_k) {
            w.h = 0;
            w.b++;
        }
    }
    if (from == to && (steps > 0 || at > 0)) return false;
    piece.end = piece.begin + to;
    piece.begin += from;
    piece.first = from == 0;
    piece.slot = piece.first && to == steps ? -1 : (int)blockIdx.x * 2 + piece.first;
    return true;
}

/* The next piece of a walk with splits; false when there is no more. */
ATTN_DEVICE bool decode_next_split(const attn_decode_params &p, decode_walk &w, decode_piece &piece)
{
    for (;;) {
        int item = w.h, at = w.at, next = at + p.parts, items = next / p.splits;
        if (item >= p.call.b * p.call.h_k) return false;
        w.h += items;
        w.at = next - items * p.splits;
        piece.b = item / p.call.h_k;
        piece.h_kv = item - piece.b * p.call.h_k;
        if (!decode_locate(p, piece)) continue;
        int steps = piece.end - piece.begin, each = steps / p.splits;
        int more = steps - each * p.splits;
        piece.begin += each * at + min(at, more);
        piece.end = piece.begin + each + (at < more);
        piece.slot = p.splits == 1 ? -1 : at;
        piece.first = at == 0;
        return true;
    }
}

/* The next piece; false when there is no more. */
ATTN_DEVICE bool decode_next(const attn_decode_params &p, decode_walk &w, decode_piece &piece)
{
    if (rarely(p.splits)) return decode_next_split(p, w, piece);
    while (w.left > 0 && w.b < p.call.b) {
        piece.b = w.b;
        if (!decode_locate(p, piece)) w.b++;
        else if (decode_take(p, w, piece)) return true;
    }
    return false;
}

/* This block's piece, with p.cluster; false: there are no rows. */
ATTN_DEVICE bool decode_of_cluster(const attn_decode_params &p, decode_piece &piece)
{
    piece.b = 0;
    int shift = __ffs(p.cluster) - 1;
    piece.h_kv = (int)blockIdx.x >> shift;
    if (!decode_locate(p, piece)) return false;
    int rank = (int)blockIdx.x - piece.h_kv * p.cluster;
    int begin = piece.begin, steps = piece.end - begin; /* below 2^24 */
    piece.begin = begin + (steps * rank >> shift);
    piece.end = begin + (steps * (rank + 1) >> shift);
    piece.first = rank == 0;
    piece.slot = rank;
    return true;
}

/* Walk and first piece of this block; false: it has none.  All threads call it; a barrier must
 * follow. */
ATTN_DEVICE bool decode_first(const attn_decode_params &p, decode_start_smem &sm, decode_walk &walk,
                              decode_piece &piece)
{
    if (p.cluster > 1) {
        walk = {p.call.b, 0, 0, 0};
        return decode_of_cluster(p, piece);
    }
    if (rarely(!p.narrow)) {
        walk = decode_start_wide(p, sm);
    } else {
        decode_piece own;
        walk = decode_start_narrow(p, own);
        auto there = [&](int x) { return __shfl_sync(0xffffffff, x, walk.b); };
        piece.b = walk.b;
        piece.begin = there(own.begin);
        piece.end = there(own.end);
        piece.rows = there(own.rows);
        piece.cp_tot = there(own.cp_tot);
        piece.seq = {there(own.seq.s_q), there(own.seq.q_offset), there(own.seq.s_k),
                     there(own.seq.k_offset), there(own.seq.k_row)};
        if (walk.left > 0 && decode_take(p, walk, piece)) return true;
    }
    return decode_next(p, walk, piece);
}

/* The item that part `part` begins and others finish, and how many pieces it has in all; 0: there
 * is none.  `place` is the end of the part's share, less one. */
ATTN_DEVICE int decode_pieces(const attn_decode_params &p, const decode_item &item, int64_t share,
                              int part)
{
    int64_t end = item.begin + item.cost, cut = share * (part + 1);
    int from = (int)max(share * part - item.begin - p.item_cost, (int64_t)0);
    int to = (int)max(cut - item.begin - p.item_cost, (int64_t)0);
    if (end <= cut || from > 0 || to == 0) return 0;
    return 1 + (int)((end - cut + share - 1) / share);
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
