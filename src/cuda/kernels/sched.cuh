/* SPDX-License-Identifier: MIT
 *
 * Which block computes what.  The grid is persistent.  An item is one pair of row tiles (one tile
 * when p.cluster is 1) of one KV head of one sequence: with T = p.tile_heads, tile t is
 *     queries [t / T * Q, + Q) of query head h_k * group + t % T,    Q = p.tile_queries,
 * so that the blocks of a cluster read the same keys.  Few queries of grouped heads are packed: then
 * T is 1 and row r of a warpgroup is query r / pack of head h_k * group + r % pack.  Where both tiles
 * are of one head (T = 1), their warpgroups take turns instead, 64 rows each, so that under a causal
 * mask the blocks have the same work:
 *
 *     T > 1    block 0: 0 1 2   block 1: 0 1 2 of the next head        (3 warpgroups a block)
 *     T = 1    block 0: 0 2 4   block 1: 1 3 5
 *
 * A head's last tile (pair, where T is 1) ends with its last query: under a causal mask the rows that
 * are missing from a whole number of tiles are so those of the shortest item, not of the longest.  With
 * chunks, tiles begin with query 0 and so with chunks.
 *
 * Items are numbered so that heads of one section are walked together, their last (when causal:
 * longest) rows first in the last section, last in the one before, and so on: a section that begins
 * with short items asks memory for the keys of new heads step by step.  The first item of
 * cluster c is item c; then either every n-th, n clusters in all, or, where items differ in length,
 * the next that nobody has: p.ticket counts them, and the cluster's first block draws for both.
 *
 * Lengths in device memory (ragged q) are read here: a warp takes the sequences 32 at a time, those
 * with most keys first, and keeps a prefix sum of their items.
 *
 * No host has seen the values of index tensors: each is brought into its range where it is read
 * (page numbers: load_paged_tile, load_gathered), so that nothing outside the call's tensors is
 * touched, whatever they hold.
 */
#pragma once
#include "mask.cuh"

/* Where a sequence lies. */
struct sequence {
    int s_q, q_offset; /* q_offset: of row 0 in q, out and lse */
    int s_k, k_offset; /* k_offset: position of key 0, after the left padding */
    int k_row;         /* batch coordinate of k and v, or row of the page table */
};

/* One row tile of one query head, as the scheduler tells it to loaders and consumers. */
struct row_tile {
    int b;          /* sequence; -1: no more work */
    int h_q, h_kv;  /* query head, its KV head */
    int query;      /* its first query, maybe negative; at or past s_q: only keep in step */
    int cp_tot;     /* global key count of the sequence, with context parallelism */
    int begin, end; /* key steps [begin, end) that some row of the cluster's tiles sees */
    sequence seq;
};

/* The key steps [begin, end) that a warpgroup's rows see, and those that all of them see whole.  `half`, of
 * the last step's keys: 1, only the first half is seen; 2, all rows see that half whole. */
struct row_steps {
    int begin, end, whole_begin, whole_end, half;
};

/* `x`, brought into [0, high]. */
ATTN_DEVICE int within(int x, int high) { return min(max(x, 0), high); }

/* Segment b of cumulative lengths over `rows` packed rows. */
ATTN_DEVICE void locate_segment(const int32_t *cu, int b, int rows, int *offset, int *length)
{
    *offset = within(__ldg(cu + b), rows);
    *length = max(within(__ldg(cu + b + 1), rows) - *offset, 0);
}

ATTN_DEVICE sequence locate_sequence(const attn_mha_fwd_params &p, int b)
{
    sequence s = {p.s_q, 0, p.s_k, 0, b};
    if (p.cu_seqlens_q) {
        locate_segment(p.cu_seqlens_q, b, p.t_q, &s.q_offset, &s.s_q);
        s.s_q = min(s.s_q, p.s_q);
    }
    if (p.seqused_q) s.s_q = within(__ldg(p.seqused_q + b), s.s_q);
    if (p.kv_batch_idx) s.k_row = within(__ldg(p.kv_batch_idx + b), p.k_rows - 1);
    if (p.cu_seqlens_k) {
        locate_segment(p.cu_seqlens_k, b, p.t_k, &s.k_offset, &s.s_k);
        s.k_row = 0;
    }
    if (p.seqused_k) s.s_k = within(__ldg(p.seqused_k + b), s.s_k);
    if (p.leftpad_k) {
        int pad = within(__ldg(p.leftpad_k + b), s.s_k);
        s.k_offset += pad;
        s.s_k -= pad;
    }
    return s;
}

/* Row tiles of one KV head with s_q queries, and its items. */
ATTN_DEVICE int head_tiles(const attn_mha_fwd_params &p, int s_q)
{
    return (s_q + p.tile_queries - 1) / p.tile_queries * p.tile_heads;
}

ATTN_DEVICE int head_items(const attn_mha_fwd_params &p, int s_q)
{
    return (head_tiles(p, s_q) + p.cluster - 1) / p.cluster;
}

/* Queries by which a head's first tile begins before query 0. */
ATTN_DEVICE int head_lead(const attn_mha_fwd_params &p, int s_q)
{
    int queries = p.tile_heads == 1 ? p.cluster * p.tile_queries : p.tile_queries;
    return p.chunk > 0 ? 0 : (s_q + queries - 1) / queries * queries - s_q;
}

/* The item at place `k` of a head's, longest first: the last one, or the last of every chunk. */
ATTN_DEVICE int longest_first(int k, int items, int fold)
{
    if (fold <= 1) return items - 1 - k;
    int chunks = items / fold, rest = items - chunks * fold; /* `rest` more are in the last one */
    if (k < (fold - rest) * chunks) return (k % chunks + 1) * fold - 1 - k / chunks;
    k -= (fold - rest) * chunks;
    return k % (chunks + 1) * fold + rest - 1 - k / (chunks + 1);
}

/* Item `k` of `heads` heads with `items` items each: sections of heads, longest item first in the last
 * one, then alternately.  The first section has the heads that are left over, so that the last one, in
 * which some cluster draws its last long item, is a whole one. */
ATTN_DEVICE void item_in_order(int k, int heads, int items, int section, int fold, int *head,
                               int *item)
{
    int sections = (heads + section - 1) / section, missing = sections * section - heads;
    int place = k + missing * items, at = place / (section * items);
    int width = at ? section : section - missing, rest = at ? place - at * section * items : k;
    *head = (at ? at * section - missing : 0) + rest % width;
    int turn = (sections - at) % 2 ? rest / width : items - 1 - rest / width;
    *item = longest_first(turn, items, fold);
}

/* Ragged q: the 32 sequences that are being walked, one a lane, most keys first. */
struct sequence_group {
    int first;   /* of the 32; -32 before the first group */
    int before;  /* items of all sequences ahead of the group */
    int mine;    /* items of one head of this lane's sequence, times 32, plus its place */
    int through; /* items of the group up to and with this lane's sequence */
};

/* Reads the next 32 sequences.  A whole warp calls it. */
ATTN_DEVICE void next_group(sequence_group &g, const attn_mha_fwd_params &p)
{
    int lane = (int)threadIdx.x % 32;
    if (g.first >= 0) g.before += __shfl_sync(0xffffffff, g.through, 31);
    g.first += 32;
    int b = g.first + lane, items = 0, s_k = -1;
    if (b < p.b) {
        sequence s = locate_sequence(p, b);
        items = head_items(p, s.s_q);
        s_k = s.s_k;
    }
    int rank = 0; /* lanes with more keys, or as many and a smaller number */
#pragma unroll 1
    for (int other = 0; other < 32; other++) {
        int theirs = __shfl_sync(0xffffffff, s_k, other);
        rank += theirs > s_k || (theirs == s_k && other < lane);
    }
#pragma unroll 1
    for (int from = 0; from < 32; from++) {
        int to = __shfl_sync(0xffffffff, rank, from), count = __shfl_sync(0xffffffff, items, from);
        if (to == lane) g.mine = count * 32 + from;
    }
    g.through = g.mine / 32 * p.h_k;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        int left = __shfl_up_sync(0xffffffff, g.through, d);
        if (lane >= d) g.through += left;
    }
}

/* The sequence, KV head and item with number k, which never falls from call to call; false past the
 * last.  A whole warp calls it. */
ATTN_DEVICE bool find_item(sequence_group &g, const attn_mha_fwd_params &p, int fold, int k,
                           int *b, int *h_kv, int *item)
{
    if (!p.cu_seqlens_q && !p.seqused_q) {
        int items = head_items(p, p.s_q), head;
        if (k >= p.b * p.h_k * items) return false;
        item_in_order(k, p.b * p.h_k, items, p.section, fold, &head, item);
        *b = head / p.h_k;
        *h_kv = head % p.h_k;
        return true;
    }
    while (g.first < 0 || k - g.before >= __shfl_sync(0xffffffff, g.through, 31)) {
        if (g.first + 32 >= p.b) return false;
        next_group(g, p);
    }
    int at = __ffs((int)__ballot_sync(0xffffffff, k - g.before < g.through)) - 1;
    int there = __shfl_sync(0xffffffff, g.mine, at), items = there / 32;
    int start = __shfl_sync(0xffffffff, g.through, at) - items * p.h_k;
    *b = g.first + there % 32;
    item_in_order(k - g.before - start, p.h_k, items, min(p.section, p.h_k), 1, h_kv, item);
    return true;
}

/* The row tile of block `rank` in an item, and the key steps of N that its cluster walks. */
template <int N>
ATTN_DEVICE row_tile locate_tile(const attn_mha_fwd_params &p, int b, int h_kv, int item, int rank)
{
    sequence seq = locate_sequence(p, b);
    int first = item * p.cluster, queries = p.tile_queries, block = first / p.tile_heads;
    int head = first - block * p.tile_heads, ends = head + p.cluster > p.tile_heads;
    int top = block * queries - head_lead(p, seq.s_q);
    int bottom = min(top + (1 + ends) * queries, seq.s_q) - 1;
    bool wraps = head + rank >= p.tile_heads;
    row_tile t;
    t.b = b;
    t.h_q = h_kv * p.group + (wraps ? 0 : head + rank);
    t.h_kv = h_kv;
    t.query = top + (p.tile_heads == 1 ? rank * p.queries : wraps ? queries : 0);
    t.seq = seq;
    t.cp_tot = p.cp_tot ? max(__ldg(p.cp_tot + b), 0) : 0;
    t.begin = visible_keys(p, max(top, 0), seq.s_q, seq.s_k, t.cp_tot).lo / N;
    t.end = (visible_keys(p, bottom, seq.s_q, seq.s_k, t.cp_tot).hi + N - 1) / N;
    return t;
}

/* The steps of a warpgroup whose first row sees `high` and whose last live one `low`; without a live row
 * none, from step `none` on. */
template <int N>
ATTN_DEVICE row_steps find_steps(key_interval high, key_interval low, bool live, int none)
{
    row_steps steps = {high.lo / N, (low.hi + N - 1) / N, (low.lo + N - 1) / N, high.hi / N, 0};
    int middle = steps.end * N - N / 2; /* of the last step */
    steps.half = (low.hi <= middle ? 1 : 0) + (high.hi >= middle ? 2 : 0);
    if (!live || steps.end <= steps.begin) steps.begin = steps.end = none;
    return steps;
}
