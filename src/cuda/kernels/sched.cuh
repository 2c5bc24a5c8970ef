/* SPDX-License-Identifier: MIT
 *
 * Which block computes what.  The grid is persistent.  An item is one pair of row tiles (one tile
 * when p.cluster is 1) of one KV head of one sequence: the rows of tile t are rows
 *     [t / group * M, + M) of query head h_k * group + t % group,
 * so that the blocks of a cluster read the same keys.  Items are numbered so that heads of one
 * section are walked together, their last (when causal: longest) rows first; cluster c of n takes
 *     c, 2 n - 1 - c, 2 n + c, 4 n - 1 - c, ...
 * which deals long and short items out evenly.
 *
 * Lengths in device memory (ragged q) are read here: a warp walks the sequences 32 at a time and
 * keeps a prefix sum of their items, so an item costs a few instructions after the first.
 */
#pragma once
#include "mask.cuh"

/* One row tile of one query head, as the producer tells it to the consumers. */
struct row_tile {
    int b;         /* sequence; -1: no more work */
    int h_q;       /* query head */
    int h_kv;      /* its KV head */
    int row;       /* first row inside the sequence; at or past s_q: only keep in step */
    int s_q, s_k;  /* the sequence's lengths */
    int q_offset;  /* of the sequence's row 0 in q, out and lse */
    int cp_tot;
    int begin, end; /* key steps [begin, end) that some row of the cluster's tiles sees */
};

/* Where a sequence lies. */
struct sequence {
    int s_q, q_offset;
    int s_k, k_offset; /* k_offset: position of key 0, after the left padding */
    int k_row;         /* batch coordinate of k and v, or row of the page table */
};

ATTN_DEVICE int query_length(const attn_mha_fwd_params &p, int b)
{
    int s_q = p.s_q;
    if (p.seqused_q)
        s_q = __ldg(p.seqused_q + b);
    else if (p.cu_seqlens_q)
        s_q = __ldg(p.cu_seqlens_q + b + 1) - __ldg(p.cu_seqlens_q + b);
    return max(s_q, 0);
}

ATTN_DEVICE sequence locate_sequence(const attn_mha_fwd_params &p, int b)
{
    sequence s;
    s.s_q = query_length(p, b);
    s.q_offset = p.cu_seqlens_q ? __ldg(p.cu_seqlens_q + b) : 0;
    s.s_k = p.s_k;
    s.k_offset = 0;
    s.k_row = p.kv_batch_idx ? __ldg(p.kv_batch_idx + b) : b;
    if (p.cu_seqlens_k) {
        s.k_offset = __ldg(p.cu_seqlens_k + b);
        s.s_k = __ldg(p.cu_seqlens_k + b + 1) - s.k_offset;
        s.k_row = 0;
    }
    if (p.seqused_k) s.s_k = __ldg(p.seqused_k + b);
    if (p.leftpad_k) {
        int pad = __ldg(p.leftpad_k + b);
        s.k_offset += pad;
        s.s_k -= pad;
    }
    s.s_k = max(s.s_k, 0);
    return s;
}

struct scheduler {
    int cluster, clusters; /* this one, and how many */
    int round;
    int first, before; /* ragged q: sequences from `first` on start at item `before` */
};

ATTN_DEVICE void scheduler_init(scheduler &s, const attn_mha_fwd_params &p)
{
    s.cluster = (int)blockIdx.x / p.cluster;
    s.clusters = (int)gridDim.x / p.cluster;
    s.round = s.first = s.before = 0;
}

/* Items of one KV head with s_q rows. */
template <int M> ATTN_DEVICE int head_items(const attn_mha_fwd_params &p, int s_q)
{
    return ((s_q + M - 1) / M * p.group + p.cluster - 1) / p.cluster;
}

/* Item `k` of `heads` heads with `items` items each: sections of heads, last item first. */
ATTN_DEVICE void item_in_order(int k, int heads, int items, int section, int *head, int *item)
{
    int per_section = section * items;
    int at = k / per_section, rest = k - at * per_section;
    int width = min(section, heads - at * section);
    *head = at * section + rest % width;
    *item = items - 1 - rest / width;
}

/* The next sequence, KV head and item of this cluster; false when there is no more.  A whole warp
 * calls it. */
template <int M>
ATTN_DEVICE bool next_item(scheduler &s, const attn_mha_fwd_params &p, int *b, int *h_kv, int *item)
{
    int turn = s.round & 1 ? s.clusters - 1 - s.cluster : s.cluster;
    int k = s.round++ * s.clusters + turn;
    if (!p.cu_seqlens_q && !p.seqused_q) {
        int items = head_items<M>(p, p.s_q), head;
        if (k >= p.b * p.h_k * items) return false;
        item_in_order(k, p.b * p.h_k, items, p.section, &head, item);
        *b = head / p.h_k;
        *h_kv = head % p.h_k;
        return true;
    }
    int lane = (int)threadIdx.x % 32;
    for (; s.first < p.b; s.first += 32) {
        int mine = s.first + lane < p.b ? head_items<M>(p, query_length(p, s.first + lane)) : 0;
        int through = mine * p.h_k;
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            int left = __shfl_up_sync(0xffffffff, through, d);
            if (lane >= d) through += left;
        }
        int total = __shfl_sync(0xffffffff, through, 31);
        if (k - s.before < total) {
            int at = __ffs((int)__ballot_sync(0xffffffff, k - s.before < through)) - 1;
            int items = __shfl_sync(0xffffffff, mine, at);
            int start = __shfl_sync(0xffffffff, through, at) - items * p.h_k;
            *b = s.first + at;
            item_in_order(k - s.before - start, p.h_k, items, min(p.section, p.h_k), h_kv, item);
            return true;
        }
        s.before += total;
    }
    return false;
}

/* The row tile of block `rank` in an item, and the key steps of N that its cluster walks. */
template <int M, int N>
ATTN_DEVICE row_tile locate_tile(const attn_mha_fwd_params &p, const sequence &seq, int b, int h_kv,
                                 int item, int rank)
{
    int first = item * p.cluster, tiles = (seq.s_q + M - 1) / M * p.group;
    int last = min(first + p.cluster, tiles) - 1;
    row_tile t;
    t.b = b;
    t.h_q = h_kv * p.group + (first + rank) % p.group;
    t.h_kv = h_kv;
    t.row = (first + rank) / p.group * M;
    t.s_q = seq.s_q;
    t.s_k = seq.s_k;
    t.q_offset = seq.q_offset;
    t.cp_tot = p.cp_tot ? __ldg(p.cp_tot + b) : 0;
    int top = first / p.group * M, bottom = min((last / p.group + 1) * M, seq.s_q) - 1;
    t.begin = visible_keys(p, top, seq.s_q, seq.s_k, t.cp_tot).lo / N;
    t.end = (visible_keys(p, bottom, seq.s_q, seq.s_k, t.cp_tot).hi + N - 1) / N;
    return t;
}
