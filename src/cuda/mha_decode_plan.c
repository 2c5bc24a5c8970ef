/* SPDX-License-Identifier: MIT
 *
 * Chooses kernel, parts and workspace of a decode call.  Pure integers: no driver call, no pointer
 * followed.
 */
#include "core/int.h"
#include "cuda/mha_decode_cuda.h"

#define QUERIES_MAX 16  /* of a sequence: with more, mha_fwd's tiles fill by themselves */
#define SPLIT_KEYS 4096 /* keys from which splitting a call of few row tiles pays */
#define BLOCKS_MAX 256  /* decode_combine's */
#define LATENT 512      /* d_v of the kernels that take qv */

bool attn_mha_decode_cuda_wanted(const struct attn_mha_fwd_problem *p, int multiprocessors)
{
    if (p->num_splits > 1 || p->qv.data || p->d_v > 256) return true;
    if (p->no_keys) return false;
    if (p->s_q <= QUERIES_MAX) return true;
    int64_t tiles = ceil_div(p->s_q, 128) * p->h_q * p->b;
    return p->num_splits <= 0 && p->s_k >= SPLIT_KEYS && 2 * tiles <= multiprocessors;
}

void attn_decode_share(int64_t tiles, int64_t items, int64_t steps, int64_t rows, int64_t d_v,
                       int multiprocessors, struct attn_mha_decode_cuda_plan *plan)
{
    int64_t parts = clamp64(multiprocessors / tiles, 1, BLOCKS_MAX / tiles > 1 ? BLOCKS_MAX : 1);
    int64_t pieces = clamp64(items, 0, BLOCKS_MAX) * (plan->splits ? plan->splits
                                                      : steps > 0  ? steps
                                                                   : 1);
    parts = clamp64(parts, 1, pieces > 1 ? pieces : 1);
    plan->tiles = (int)tiles;
    plan->parts = (int)parts;
    plan->cluster = 1;
    plan->slot_rows = (int)clamp64(rows, 1, ATTN_DECODE_ROWS);
    int64_t slots = plan->splits || parts == 1 ? 0 : 2 * parts * tiles;
    plan->out = round_up(slots * plan->slot_rows * 4, 64);
    plan->bytes = plan->out + slots * plan->slot_rows * d_v * 4;
}

/* Rows of partial results are written in pairs and read in fours of floats. */
static attn_status check_accum(const struct attn_mha_fwd_problem *p)
{
    const struct attn_rows *r = &p->out_accum;
    bool fits = (uintptr_t)r->data % 16 == 0 && r->batch % 4 == 0 && r->row % 4 == 0 &&
                r->head % 4 == 0 && p->out_accum_split % 4 == 0;
    ATTN_CHECK(!r->data || fits, ATTN_E_SHAPE,
               "out_accum: expected rows that start on multiples of 16 bytes, got strides %lld, "
               "%lld, %lld, %lld at %p",
               (long long)p->out_accum_split, (long long)r->batch, (long long)r->head,
               (long long)r->row, (void *)r->data);
    return ATTN_OK;
}

attn_status attn_mha_decode_cuda_choose(const struct attn_mha_fwd_problem *p,
                                        const struct attn_mha_fwd_cuda_tile *tiles, int tile_count,
                                        int multiprocessors, struct attn_mha_decode_cuda_plan *plan)
{
    ATTN_TRY(attn_mha_fwd_cuda_check(p));
    ATTN_TRY(check_accum(p));
    plan->kernel = -1;
    for (int i = 0; i < tile_count; i++) {
        const struct attn_mha_fwd_cuda_tile *t = &tiles[i];
        if (t->dtype != (int)p->dtype || t->d_qk < p->d_qk || t->d_v < p->d_v) continue;
        if (ceil_div(t->d_qk, 64) != ceil_div(p->d_qk, 64)) continue; /* no box right of k's head */
        if (p->qv.data && t->d_v < LATENT) continue;
        if (plan->kernel < 0 || t->d_v < tiles[plan->kernel].d_v) plan->kernel = i;
    }
    ATTN_CHECK(plan->kernel >= 0, ATTN_E_NOT_BUILT,
               "q: no Hopper decode kernel for %s, head dims %lld and %lld in this build%s",
               attn_dtype_name(p->dtype), (long long)p->d_qk, (long long)p->d_v,
               tile_count ? "" : ", which was made without nvcc");

    int64_t rows = p->s_q * (p->h_q / p->h_k), row_tiles = ceil_div(rows, ATTN_DECODE_ROWS);
    ATTN_CHECK(rows < (int64_t)1 << 30, ATTN_E_NOT_BUILT,
               "q: fewer than 2^30 rows of a KV head are built for Hopper's splits, got %lld",
               (long long)rows);
    plan->box_rows = attn_mha_fwd_cuda_box(p, ATTN_DECODE_KEYS);
    int64_t steps = ceil_div(p->s_k, ATTN_DECODE_KEYS);
    plan->splits = p->num_splits > 0 ? p->num_splits : steps <= 1; /* a step is not cut */
    int64_t items = p->b * p->h_k;
    ATTN_CHECK(plan->splits <= 1 || items * (rows + ATTN_DECODE_ROWS) < (int64_t)1 << 31,
               ATTN_E_NOT_BUILT,
               "q: fewer than 2^31 rows are built for num_splits > 1 on Hopper, got %lld",
               (long long)(items * rows));
    int64_t blocks = multiprocessors - p->sm_margin;
    attn_decode_share(row_tiles > 0 ? row_tiles : 1, items, steps, rows, p->d_v,
                      (int)clamp64(blocks, 1, multiprocessors), plan);
    return ATTN_OK;
}

int attn_mha_decode_cuda_cluster(const struct attn_mha_fwd_problem *p,
                                 const struct attn_mha_decode_cuda_plan *plan)
{
    int cluster = 1;
    if (p->b != 1 || plan->tiles > 1 || plan->splits) return 1;
    while (2 * cluster <= ATTN_DECODE_CLUSTER_MAX && 2 * cluster * p->h_k <= plan->parts)
        cluster *= 2;
    return cluster;
}

void attn_mha_decode_cuda_use_cluster(const struct attn_mha_fwd_problem *p, int cluster,
                                      struct attn_mha_decode_cuda_plan *plan)
{
    if (cluster <= 1 || 5 * cluster * p->h_k < 2 * plan->parts) return; /* too many would idle */
    plan->cluster = cluster;
    plan->parts = cluster * (int)p->h_k;
    plan->out = plan->bytes = 0;
}
