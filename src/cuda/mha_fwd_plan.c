/* SPDX-License-Identifier: MIT
 *
 * Chooses kernel, loads, cluster and grid of an mha_fwd call.  Pure integers: no driver call, no
 * pointer followed.
 */
#include "core/int.h"
#include "cuda/mha_fwd_cuda.h"

#define LENGTH_MAX ((int64_t)1 << 30) /* window edges and positions add up inside an int32 */
#define L2_SHARE ((int64_t)16 << 20)  /* bytes of k and v that are read side by side */

/* Panels of 64 columns, the width of a box. */
static int64_t panels(int64_t width) { return ceil_div(width, 64); }

/* A feature that only other back ends have. */
static attn_status check_built(const struct attn_mha_fwd_problem *p)
{
    ATTN_CHECK(p->dtype == ATTN_BF16 || p->dtype == ATTN_F16, ATTN_E_NOT_BUILT,
               "q: %s is not built for Hopper; bf16 and fp16 are", attn_dtype_name(p->dtype));
    ATTN_CHECK(p->s_q < LENGTH_MAX && p->s_k < LENGTH_MAX, ATTN_E_NOT_BUILT,
               "q, k: lengths below 2^30 are built for Hopper, got %lld and %lld",
               (long long)p->s_q, (long long)p->s_k);
    ATTN_CHECK((!p->cu_seqlens_q || p->t_q < LENGTH_MAX) &&
                   (!p->cu_seqlens_k || p->t_k < LENGTH_MAX),
               ATTN_E_NOT_BUILT,
               "q, k: fewer than 2^30 packed rows are built for Hopper, got %lld and %lld",
               (long long)p->t_q, (long long)p->t_k);
    ATTN_CHECK(p->sinks_stride == 1 || p->h_q == 1 || !p->sinks, ATTN_E_NOT_BUILT,
               "sinks: only contiguous ones are built for Hopper");
    return ATTN_OK;
}

/* Every row starts on 16 bytes, the unit in which it is read or written. */
static attn_status check_rows(const struct attn_rows *r, const char *name, int64_t batches,
                              int64_t rows, int64_t heads)
{
    bool fits = (uintptr_t)r->data % 16 == 0 && (batches <= 1 || r->batch % 8 == 0) &&
                (rows <= 1 || r->row % 8 == 0) && (heads <= 1 || r->head % 8 == 0);
    ATTN_CHECK(fits, ATTN_E_SHAPE,
               "%s: expected rows that start on multiples of 16 bytes, got strides %lld, %lld, "
               "%lld at %p",
               name, (long long)r->batch, (long long)r->row, (long long)r->head, (void *)r->data);
    return ATTN_OK;
}

/* Boxes need strides that the copy engine takes: not 0, below 2^40 bytes. */
bool attn_mha_fwd_cuda_fits_boxes(const struct attn_rows *r, int64_t batches, int64_t rows,
                                  int64_t heads)
{
    const int64_t limit = (int64_t)1 << 39;
    return (batches <= 1 || (r->batch > 0 && r->batch < limit)) &&
           (rows <= 1 || (r->row > 0 && r->row < limit)) &&
           (heads <= 1 || (r->head > 0 && r->head < limit));
}

/* Rows of the largest box that never straddles two pages: 8 rows are one swizzle atom. */
static int paged_box(int64_t page, int keys)
{
    for (int rows = keys; rows >= 8; rows -= 8)
        if (keys % rows == 0 && page % rows == 0) return rows;
    return 0;
}

/* Keys that a pair of row tiles walks on average: what its rows see and, since the two walk the
 * same keys, what only the other's rows see. */
static int64_t mean_keys(const struct attn_mha_fwd_problem *p, int64_t rows)
{
    int64_t keys = p->s_k;
    bool causal = p->causal || (p->window_right >= 0 && p->cp_world == 1);
    if (causal) keys = clamp64(p->s_k - p->s_q / 2 + rows, 1, p->s_k);
    if (p->chunk > 0) keys = clamp64((causal ? p->chunk / 2 : p->chunk) + rows, 1, keys);
    if (p->window_left >= 0) {
        int64_t right = p->window_right >= 0 ? p->window_right : p->s_k;
        keys = clamp64(p->window_left + right + 2 * rows, 1, keys);
    }
    return keys;
}

/* Queries of a sequence; of a mean one where lengths are device data. */
static int64_t mean_queries(const struct attn_mha_fwd_problem *p)
{
    return p->cu_seqlens_q && p->b ? ceil_div(p->t_q, p->b) : p->s_q;
}

/* Row tiles of one KV head with s_q queries, `pack` of its query heads in a tile. */
static int64_t row_tiles(const struct attn_mha_fwd_problem *p, int rows, int pack, int64_t s_q)
{
    return ceil_div(s_q, rows / 64 * (64 / pack)) * (p->h_q / p->h_k / pack);
}

/* Whether tiles of all query heads of a KV head are fewer. */
static bool packs_tighter(const struct attn_mha_fwd_problem *p, int rows)
{
    int64_t queries = mean_queries(p);
    return row_tiles(p, rows, (int)(p->h_q / p->h_k), queries) < row_tiles(p, rows, 1, queries);
}

/* Time of a call in a tile with `pack` query heads, up to a factor.  A step costs its padded rows,
 * keys and widths; a tile of rows about 140 keys more (first product, epilogue); steps of 128 rows
 * run 7 % slower, small boxes of pages up to 10 %, packed rows 5 %; fewer tiles than multiprocessors
 * take as long as one on each.  From the rows of docs/kernels/mha_fwd_sm90.md. */
static double tile_cost(const struct attn_mha_fwd_problem *p,
                        const struct attn_mha_fwd_cuda_tile *t, int pack, int multiprocessors)
{
    int64_t tiles = row_tiles(p, t->rows, pack, mean_queries(p)) * p->h_k * p->b;
    double rows = (double)((tiles > multiprocessors ? tiles : multiprocessors) * t->rows);
    double keys = (double)(ceil_div(mean_keys(p, t->rows / pack), t->keys) * t->keys + 140);
    double cost = rows * keys * (t->d_qk + t->d_v) * (t->rows < 192 ? 1.07 : 1.0);
    int box = p->page_table ? paged_box(p->page, t->keys) : 0;
    if (pack > 1) cost *= 1.05;
    return box ? cost * (1.0 + 1.6 / box) : cost;
}

/* Extents of k and v as the kernels address them. */
static int64_t key_batches(const struct attn_mha_fwd_problem *p)
{
    return p->page_table ? p->num_pages : p->cu_seqlens_k ? 1 : p->cache_rows;
}

static int64_t key_rows(const struct attn_mha_fwd_problem *p)
{
    return p->page_table ? p->page : p->cu_seqlens_k ? p->t_k : p->s_k;
}

attn_status attn_mha_fwd_cuda_check(const struct attn_mha_fwd_problem *p)
{
    int64_t k_batches = key_batches(p), k_rows = key_rows(p);
    int64_t q_batches = p->cu_seqlens_q ? 1 : p->b, q_rows = p->cu_seqlens_q ? p->t_q : p->s_q;
    ATTN_TRY(check_built(p));
    ATTN_TRY(check_rows(&p->q, "q", q_batches, q_rows, p->h_q));
    if (p->qv.data) ATTN_TRY(check_rows(&p->qv, "qv", q_batches, q_rows, p->h_q));
    ATTN_TRY(check_rows(&p->k, "k", k_batches, k_rows, p->h_k));
    ATTN_TRY(check_rows(&p->v, "v", k_batches, k_rows, p->h_k));
    if (p->k_new.data) {
        int64_t batches = p->cu_seqlens_k_new ? 1 : p->b;
        ATTN_TRY(check_rows(&p->k_new, "k_new", batches, p->s_new, p->h_k));
        ATTN_TRY(check_rows(&p->v_new, "v_new", batches, p->s_new, p->h_k));
    }
    return p->out.data ? check_rows(&p->out, "out", q_batches, q_rows, p->h_q) : ATTN_OK;
}

int attn_mha_fwd_cuda_box(const struct attn_mha_fwd_problem *p, int keys)
{
    if (!attn_mha_fwd_cuda_fits_boxes(&p->k, key_batches(p), key_rows(p), p->h_k) ||
        !attn_mha_fwd_cuda_fits_boxes(&p->v, key_batches(p), key_rows(p), p->h_k))
        return 0;
    return !p->page_table ? keys : p->leftpad_k ? 0 : paged_box(p->page, keys);
}

/* Heads walked side by side.  Where all items are of a length, just as many as fill the grid, so that
 * readers of the same keys meet.  Else as many as L2 holds, and enough that in the last section the work of
 * a cluster is what the longest item has above the shortest: clusters without a long one fill up with
 * short ones. */
static int heads_in_a_section(const struct attn_mha_fwd_problem *p,
                              const struct attn_mha_fwd_cuda_plan *plan, int64_t items,
                              int64_t mean, bool even)
{
    int64_t head_bytes = p->s_k * (p->d_qk + p->d_v) * 2, heads = p->h_k * p->b;
    int64_t clusters = plan->grid / plan->cluster;
    if (items == 0 || mean < 1) return 1;
    int64_t held = clamp64(L2_SHARE / (head_bytes > 0 ? head_bytes : 1), 1, heads);
    if (even) return (int)clamp64(ceil_div(clusters * heads, items), 1, held);
    double spread = (double)(p->s_q < 2 * mean ? p->s_q : 2 * mean);
    double enough = (double)(clusters * heads) / (double)items * spread / (double)mean;
    return (int)clamp64((int64_t)enough, held, heads);
}

/* Whether tiles are over so soon that under a mask, where they differ in length, the blocks of a cluster
 * wait longer for each other than they save by sharing keys. */
static bool short_and_uneven(const struct attn_mha_fwd_problem *p,
                             const struct attn_mha_fwd_cuda_tile *t, int pack)
{
    bool masked = p->causal || p->window_left >= 0 || p->window_right >= 0 || p->chunk > 0;
    return masked && 2 * p->s_q > p->s_k && pack == 1 && t->rows < 192 && t->d_qk + t->d_v <= 256 &&
           mean_keys(p, t->rows) <= 1536;
}

attn_status attn_mha_fwd_cuda_choose(const struct attn_mha_fwd_problem *p,
                                     const struct attn_mha_fwd_cuda_tile *tiles, int tile_count,
                                     int multiprocessors, struct attn_mha_fwd_cuda_plan *plan)
{
    ATTN_TRY(attn_mha_fwd_cuda_check(p));
    int64_t group = p->h_q / p->h_k;
    bool may_pack = group > 1 && group <= 64 && 64 % group == 0 && p->pack_gqa != 0;
    double least = 0.0;
    plan->kernel = -1;
    for (int i = 0; i < tile_count; i++) {
        const struct attn_mha_fwd_cuda_tile *t = &tiles[i];
        if (t->dtype != (int)p->dtype || t->d_qk < p->d_qk || t->d_v < p->d_v) continue;
        if (t->capped != (p->softcap > 0)) continue;
        if (panels(t->d_qk) != panels(p->d_qk)) continue; /* no box wholly right of k's head */
        bool packs = may_pack && (p->pack_gqa > 0 || packs_tighter(p, t->rows));
        for (int packed = packs && p->pack_gqa > 0; packed <= packs; packed++) {
            int pack = packed ? (int)group : 1;
            double cost = tile_cost(p, t, pack, multiprocessors);
            if (plan->kernel >= 0 && cost >= least) continue;
            least = cost;
            plan->kernel = i;
            plan->pack = pack;
        }
    }
    ATTN_CHECK(plan->kernel >= 0, ATTN_E_NOT_BUILT,
               "q: no Hopper kernel for %s, head dims %lld and %lld in this build%s",
               attn_dtype_name(p->dtype), (long long)p->d_qk, (long long)p->d_v,
               tile_count ? "" : ", which was made without nvcc");
    const struct attn_mha_fwd_cuda_tile *tile = &tiles[plan->kernel];

    int box = attn_mha_fwd_cuda_box(p, tile->keys);
    plan->gather = box == 0;

    /* Blocks share keys in twos where tiles pair up: with few and odd ones too many would idle. */
    int64_t mean = row_tiles(p, tile->rows, plan->pack, mean_queries(p));
    plan->cluster = !plan->gather && (mean % 2 == 0 || mean > 8) ? 2 : 1;
    if (short_and_uneven(p, tile, plan->pack)) plan->cluster = 1;
    plan->box_rows = plan->gather ? tile->keys : p->page_table ? box : box / plan->cluster;

    int64_t items = ceil_div(row_tiles(p, tile->rows, plan->pack, p->s_q), plan->cluster) * p->h_k *
                    p->b;
    ATTN_CHECK(items < LENGTH_MAX / 32, ATTN_E_NOT_BUILT,
               "q: fewer than 2^25 row tiles are built for Hopper, got %lld", (long long)items);
    int64_t blocks = clamp64(multiprocessors - p->sm_margin, plan->cluster, multiprocessors);
    plan->grid = (int)(clamp64(items, 1, blocks / plan->cluster) * plan->cluster);
    bool even = !p->causal && p->window_left < 0 && p->window_right < 0 && !p->chunk &&
                !p->cu_seqlens_q && !p->seqused_q && !p->cu_seqlens_k && !p->seqused_k;
    plan->ticket = !even && items > plan->grid / plan->cluster;
    plan->section = heads_in_a_section(p, plan, items, mean_keys(p, tile->rows / plan->pack), even);
    return ATTN_OK;
}
