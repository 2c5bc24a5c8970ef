/* SPDX-License-Identifier: MIT
 *
 * mha_fwd on a CPU: from a problem to kernel tasks.
 *
 *   read lengths -> append -> rotate q -> [pack K, V of a KV head -> its tasks]* -> combine
 *
 * The query axis of a KV head is flat: row r is token r / G, head r % G of the group, so GQA and
 * MQA fill a tile of rows as MHA does and K and V are read once a group.  A task is
 *   prefill  (sequence, KV head, block of rows, split of the keys), dealt out by units.h: a unit
 *            is a KV head of a sequence, its parts are blocks of keys to pack
 *   decode   (sequence, split, several KV heads), for kernels that walk the cache in address order
 * Every mask is an interval [lo, hi) of keys a row: see visible().
 *
 * What may depend on the number of threads: rows and heads a task, the order of tasks, how many KV
 * heads are packed at once.  None of these changes a bit (kernels.h).  What may not: the kernel,
 * the splits and their grid; they follow from shapes.
 *
 * Workspace, each part 64-byte aligned:
 *   seqs [b] | units [b h_k] | score and out scales [b, h_k] | sinks [h_q] |
 *   rotated q [b s_q or t_q, h_q, d_qk] | packed K, V [slots] | scratch [threads]
 */
#include "cpu/mha_fwd.h"

#include <stdio.h>
#include <stdlib.h>

#include "core/env.h"
#include "core/int.h"
#include "cpu/threads.h"
#include "cpu/units.h"

typedef struct attn_mha_fwd_problem problem_t;
typedef struct attn_mha_fwd_plan plan_t;
typedef struct attn_cpu_seq seq_t;

enum form { FORM_REF, FORM_PREFILL, FORM_DECODE, FORM_NOTHING };
enum {
    TILE_FORM,
    TILE_ROWS,
    TILE_SLOTS,
    TILE_SLOT_BYTES,
    TILE_THREADS,
    TILE_SCRATCH
}; /* plan.tile */

#define PACK_BYTES_MAX ((int64_t)48 << 20) /* of packed K and V, unless one head needs more */
#define FEW_ROWS 128                       /* a KV head: a block of rows at most */
#define PACKS_LEAST 16                     /* tasks of them, where heads have few rows */
#define STREAM_BYTES ((int64_t)4 << 20)    /* of out; less may still be in L2 when it is read */
#define LARGE_PAGE ((int64_t)2 << 20)
#define ROTATE_TOKENS 64 /* a task */
#define SMALL_WORK 4e6   /* FLOP below which waking threads costs more */

static int64_t floor_div(int64_t a, int64_t b)
{
    int64_t q = a / b;
    return a % b < 0 ? q - 1 : q;
}

/* ---- plan ------------------------------------------------------------------------------------ */

/* Splits and keys a split.  Shapes only: about 64 pieces of work in all, none below 256 keys. */
static void choose_splits(const problem_t *p, const struct attn_mha_kernel *kernel, plan_t *plan)
{
    int64_t n = kernel->n, rows = p->s_q * (p->h_q / p->h_k), piece = p->s_k;
    if (p->num_splits > 1) {
        piece = ceil_div(p->s_k, p->num_splits);
        plan->splits = p->num_splits;
        plan->piece = max64(round_up(piece, n), n);
        return;
    }
    if (p->num_splits <= 0) {
        int64_t units = kernel->decode ? p->b : p->b * p->h_k * ceil_div(rows, kernel->rows_max);
        piece = 64 * ceil_div(p->s_k * min64(max64(units, 1), 64 * 64), 64 * 64);
        piece = max64(kernel->decode ? min64(max64(piece, 256), 4096) : max64(piece, 512),
                      ceil_div(p->s_k, ATTN_SPLITS_MAX));
    }
    plan->piece = max64(round_up(piece, n), n);
    plan->splits = (int32_t)max64(ceil_div(p->s_k, plan->piece), 1);
}

/* Bytes of the packed K and V of one KV head. */
static int64_t slot_bytes(const problem_t *p, const struct attn_mha_kernel *kernel)
{
    int64_t d_s = p->d_qk + (p->qv.data ? p->d_v : 0);
    return round_up(ceil_div(max64(p->s_k, 1), kernel->n) * kernel->pack_bytes(d_s, p->d_v), 64);
}

/* Whether a kernel that packs finds work for many threads though its heads have one block of rows,
 * and so a task a split: packs of enough of them must be there at a time. */
static bool packs_feed_threads(const problem_t *p, const struct attn_mha_kernel *kernel)
{
    plan_t plan = {0};
    choose_splits(p, kernel, &plan);
    int64_t slots = PACK_BYTES_MAX / slot_bytes(p, kernel);
    return slots >= p->b * p->h_k || slots * plan.splits >= PACKS_LEAST;
}

static const struct attn_mha_kernel *choose_kernel(const struct attn_cpu_kernels *table,
                                                   const problem_t *p)
{
    int64_t rows = p->s_q * (p->h_q / p->h_k);
    const struct attn_mha_kernel *decode = table->mha_decode[p->dtype];
    const struct attn_mha_kernel *few = table->mha_fwd_short[p->dtype];
    const struct attn_mha_kernel *many = table->mha_fwd[p->dtype];
    if (decode && rows <= decode->rows_max) return decode;
    if (few == many || rows >= FEW_ROWS) return many;
    return rows < many->rows_least || !packs_feed_threads(p, many) ? few : many;
}

struct layout {
    int64_t seqs, units, scales, sinks, q, packs, scratch, bytes;
};

/* Where the parts of the workspace begin; needs plan.tile. */
static struct layout lay_out(const problem_t *p, const plan_t *plan)
{
    struct layout l = {0};
    int64_t at = 0;
    l.seqs = at;
    at += round_up(p->b * (int64_t)sizeof(seq_t), 64);
    l.units = at;
    at += plan->tile[TILE_FORM] == FORM_PREFILL ? p->b * p->h_k * (int64_t)sizeof(struct attn_unit)
                                                : 0;
    l.scales = at;
    at += round_up(2 * p->b * p->h_k * (int64_t)sizeof(float), 64);
    l.sinks = at;
    at += p->sinks ? round_up(p->h_q * (int64_t)sizeof(float), 64) : 0;
    l.q = at;
    at += p->rotary_cos ? round_up(p->t_q * p->h_q * p->d_qk * attn_dtype_bytes(p->dtype), 64) : 0;
    l.packs = at;
    at += plan->tile[TILE_SLOTS] * plan->tile[TILE_SLOT_BYTES];
    l.scratch = at;
    l.bytes = at + plan->tile[TILE_THREADS] * plan->tile[TILE_SCRATCH];
    return l;
}

/* A thread's scratch begins with the task's row tables, in this order. */
static int64_t row_table_bytes(int64_t rows, int64_t heads)
{
    int64_t each = 4 * (int64_t)sizeof(int64_t) + 2 * (int64_t)sizeof(int32_t);
    return round_up(rows * each + rows * heads * (int64_t)sizeof(float), 128);
}

attn_status attn_mha_fwd_cpu_plan_with(const struct attn_cpu_kernels *table, const problem_t *p,
                                       plan_t *plan)
{
    const struct attn_mha_kernel *kernel = choose_kernel(table, p);
    if (p->t_q == 0 && p->t_new == 0) {
        plan->tile[TILE_FORM] = FORM_NOTHING;
        snprintf(plan->kernel, sizeof plan->kernel, "nothing");
        return ATTN_OK;
    }
    if (!kernel) {
        plan->tile[TILE_FORM] = FORM_REF;
        plan->splits = (int32_t)max64(p->num_splits, 1);
        plan->piece = max64(ceil_div(p->s_k, plan->splits), 1);
        snprintf(plan->kernel, sizeof plan->kernel, "attn_mha_fwd_%s_ref",
                 attn_dtype_name(p->dtype));
        return ATTN_OK;
    }
    snprintf(plan->kernel, sizeof plan->kernel, "%s", kernel->name);
    choose_splits(p, kernel, plan);

    int64_t d_s = p->d_qk + (p->qv.data ? p->d_v : 0);
    int64_t rows = p->s_q * (p->h_q / p->h_k), heads = kernel->decode ? p->h_k : 1;
    rows = min64(round_up(max64(rows, 1), kernel->rows_step), kernel->rows_max);
    double work = 2.0 * (double)(p->t_q * p->h_q) * (double)p->s_k * (double)(d_s + p->d_v);
    plan->tile[TILE_FORM] = kernel->decode ? FORM_DECODE : FORM_PREFILL;
    plan->tile[TILE_ROWS] = rows;
    plan->tile[TILE_THREADS] = work < SMALL_WORK ? 1 : attn_threads(p->threads, INT64_MAX);
    plan->tile[TILE_SCRATCH] = row_table_bytes(rows, heads) +
                               round_up(kernel->scratch_bytes(d_s, p->d_v, rows, heads), 128);
    if (kernel->pack) {
        int64_t slot = slot_bytes(p, kernel);
        int64_t units = p->b * p->h_k;
        plan->tile[TILE_SLOT_BYTES] = slot;
        plan->tile[TILE_SLOTS] = min64(min64(units, plan->tile[TILE_THREADS]),
                                       max64(PACK_BYTES_MAX / slot, 1));
    }
    plan->workspace_bytes = lay_out(p, plan).bytes;
    return ATTN_OK;
}

/* ---- run ------------------------------------------------------------------------------------- */

/* What all tasks of one call share. */
struct call {
    problem_t p;            /* q replaced by its rotated copy where there is a rotary table */
    struct attn_rows raw_q; /* the caller's */
    const plan_t *plan;
    const struct attn_mha_kernel *kernel;
    const struct attn_rotary_kernel *rotary;
    const struct attn_split_combine_kernel *combine;
    seq_t *seqs;
    struct attn_unit *units;        /* [b, h_k] */
    float *score_scale, *out_scale; /* [b, h_k] */
    float *sinks;                   /* [h_q] or NULL */
    char *packs, *scratch;
    int64_t group;       /* query heads a KV head */
    int64_t block_rows;  /* rows a prefill task */
    int64_t block_heads; /* KV heads a decode task */
    int threads;
};

/* Keys visible to query row i: lo <= j < hi, within [0, k_len]; lo >= hi: none.  Both ends rise
 * with i. */
static void visible(const problem_t *p, const seq_t *s, int64_t i, int64_t *lo, int64_t *hi)
{
    int64_t first = 0, end = s->k_len, at = i + s->k_len - s->q_len;
    if (p->cp_world > 1) {
        end = min64(end, ceil_div(max64(s->total - p->cp_rank, 0), p->cp_world));
        if (p->causal)
            end = min64(end, floor_div(i + s->total - s->q_len - p->cp_rank, p->cp_world) + 1);
    } else {
        if (p->window_left >= 0) first = max64(first, at - p->window_left);
        if (p->window_right >= 0) end = min64(end, at + p->window_right + 1);
        if (p->chunk > 0) {
            int64_t start = floor_div(at, p->chunk) * p->chunk;
            first = max64(first, start);
            end = min64(end, start + p->chunk);
        }
    }
    *lo = first;
    *hi = max64(end, 0);
}

static struct attn_kv_view kv_view(const problem_t *p, const seq_t *s, int64_t head)
{
    int64_t bytes = attn_dtype_bytes(p->dtype);
    struct attn_kv_view kv = {
        .k = p->k.data + bytes * head * p->k.head,
        .v = p->v.data + bytes * head * p->v.head,
        .k_row = bytes * p->k.row,
        .v_row = bytes * p->v.row,
        .k_head = bytes * p->k.head,
        .v_head = bytes * p->v.head,
        .first = s->leftpad,
    };
    if (p->page_table) {
        kv.k_page = bytes * p->k.batch;
        kv.v_page = bytes * p->v.batch;
        kv.pages = p->page_table + s->row * p->page_table_row;
        kv.page = p->page;
    } else {
        kv.k += bytes * (s->row * p->k.batch + s->k_start * p->k.row);
        kv.v += bytes * (s->row * p->v.batch + s->k_start * p->v.row);
    }
    return kv;
}

static bool large_out(const problem_t *p)
{
    return p->t_q * p->h_q * p->d_v * attn_dtype_bytes(p->out_dtype) >= STREAM_BYTES;
}

/* Fills the task for rows [r0, r0 + rows) of `heads` KV heads from `head`, keys of `split`, and
 * runs the kernel. */
static void run_task(const struct call *c, int64_t i, int64_t head, int64_t heads, int64_t r0,
                     int64_t rows, int64_t split, const char *packed, char *scratch)
{
    const problem_t *p = &c->p;
    const seq_t *s = &c->seqs[i];
    int64_t in = attn_dtype_bytes(p->dtype), group = c->group, q_head = head * group;
    bool partial = c->plan->splits > 1;
    int64_t out_bytes = partial ? 4 : attn_dtype_bytes(p->out_dtype);
    const struct attn_rows *out = partial ? &p->out_accum : &p->out;
    int64_t lse_head = partial ? p->lse_accum_head : p->lse_head;

    int64_t *q_row = (int64_t *)scratch, *qv_row = q_row + rows, *out_row = qv_row + rows;
    int64_t *lse_row = out_row + rows;
    int32_t *lo = (int32_t *)(lse_row + rows), *hi = lo + rows;
    float *sinks = (float *)(hi + rows);
    scratch += row_table_bytes(rows, heads);

    int64_t first = INT64_MAX, end = 0, from = 0, to = 0;
    int64_t token = r0 / group, g = r0 % group;
    visible(p, s, token, &from, &to);
    for (int64_t r = 0; r < rows; ++r) {
        q_row[r] = in * (token * p->q.row + g * p->q.head);
        qv_row[r] = in * (token * p->qv.row + g * p->qv.head);
        out_row[r] = out_bytes * (token * out->row + g * out->head);
        lse_row[r] = token + g * lse_head;
        lo[r] = from < to ? (int32_t)from : 0;
        hi[r] = from < to ? (int32_t)to : 0;
        if (from < to) {
            first = min64(first, from);
            end = max64(end, to);
        }
        if (++g < group) continue;
        g = 0;
        visible(p, s, ++token, &from, &to);
    }
    if (c->sinks && !partial)
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t r = 0; r < rows; ++r)
                sinks[h * rows + r] = c->sinks[(head + h) * group + (r0 + r) % group];

    int64_t n = c->kernel->n, k_begin = max64(split * c->plan->piece, first / n * n);
    int64_t k_end = split == c->plan->splits - 1 ? end : min64(end, (split + 1) * c->plan->piece);
    if (first > end || k_begin >= k_end) k_begin = k_end = 0;

    struct attn_mha_task task = {
        .rows = (int32_t)rows,
        .heads = (int32_t)heads,
        .d_qk = (int32_t)p->d_qk,
        .d_v = (int32_t)p->d_v,
        .q = p->q.data + in * (i * p->q.batch + s->q_start * p->q.row + q_head * p->q.head),
        .qv = p->qv.data ? p->qv.data +
                               in * (i * p->qv.batch + s->q_start * p->qv.row + q_head * p->qv.head)
                         : NULL,
        .out = out->data +
               out_bytes * (i * out->batch + s->q_start * out->row + q_head * out->head +
                            (partial ? split * p->out_accum_split : 0)),
        .lse = partial ? p->lse_accum + split * p->lse_accum_split + i * p->lse_accum_batch +
                             s->q_start + q_head * lse_head
                       : p->lse + i * p->lse_batch + s->q_start + q_head * lse_head,
        .q_row = q_row,
        .qv_row = qv_row,
        .out_row = out_row,
        .lse_row = lse_row,
        .q_head = in * group * p->q.head,
        .qv_head = in * group * p->qv.head,
        .out_head = out_bytes * group * out->head,
        .lse_head = group * lse_head,
        .lo = lo,
        .hi = hi,
        .k_begin = k_begin,
        .k_end = k_end,
        .kv = kv_view(p, s, head),
        .packed = packed,
        .score_scale = c->score_scale + i * p->h_k + head,
        .out_scale = c->out_scale + i * p->h_k + head,
        .softcap = (float)p->softcap,
        .sinks = c->sinks && !partial ? sinks : NULL,
        .partial = partial,
        .stream_out = !partial && large_out(p),
    };
    c->kernel->run(&task, scratch);
}

/* ---- phases: each a body for attn_parallel --------------------------------------------------- */

/* The key blocks of sequence i that some row sees: those from block *first on, their number. */
static int64_t seen_blocks(const struct call *c, int64_t i, int64_t *first)
{
    const seq_t *s = &c->seqs[i];
    int64_t n = c->kernel->n, begin, end, unused;
    *first = 0;
    if (s->q_len == 0) return 0;
    visible(&c->p, s, 0, &begin, &unused);
    visible(&c->p, s, s->q_len - 1, &unused, &end);
    *first = begin / n;
    return begin < end ? ceil_div(end, n) - *first : 0;
}

/* Packs one of the seen key blocks of a unit. */
static void pack_block(void *context, int64_t u, int32_t slot, int64_t part)
{
    const struct call *c = context;
    const problem_t *p = &c->p;
    const seq_t *s = &c->seqs[u / p->h_k];
    int64_t d_s = p->d_qk + (p->qv.data ? p->d_v : 0), first, begin, end, unused;
    seen_blocks(c, u / p->h_k, &first);
    visible(p, s, 0, &begin, &unused);
    visible(p, s, s->q_len - 1, &unused, &end);
    struct attn_kv_view kv = kv_view(p, s, u % p->h_k);
    c->kernel->pack(&kv, (int32_t)p->d_qk, (int32_t)p->d_v, p->qv.data != NULL,
                    (first + part) * c->kernel->n, begin, end,
                    c->packs + slot * c->plan->tile[TILE_SLOT_BYTES] +
                        (first + part) * c->kernel->pack_bytes(d_s, p->d_v));
}

static char *thread_scratch(const struct call *c, int thread)
{
    return c->scratch + thread * c->plan->tile[TILE_SCRATCH];
}

static int64_t row_blocks(const struct call *c, int64_t i)
{
    return ceil_div(c->seqs[i].q_len * c->group, c->block_rows);
}

/* Task order in a unit: row blocks from the last (the longest, if causal), splits. */
static void prefill_task(void *context, int64_t u, int32_t slot, int64_t task, int thread)
{
    const struct call *c = context;
    const problem_t *p = &c->p;
    int64_t i = u / p->h_k, splits = c->plan->splits;
    int64_t r0 = (row_blocks(c, i) - 1 - task / splits) * c->block_rows;
    int64_t rows = min64(c->seqs[i].q_len * c->group - r0, c->block_rows);
    run_task(c, i, u % p->h_k, 1, r0, rows, task % splits,
             c->kernel->pack ? c->packs + slot * c->plan->tile[TILE_SLOT_BYTES] : NULL,
             thread_scratch(c, thread));
}

static void run_prefill(struct call *c)
{
    const problem_t *p = &c->p;
    struct attn_units all = {
        .unit = c->units,
        .count = p->b * p->h_k,
        .slots = c->kernel->pack ? c->plan->tile[TILE_SLOTS] : c->threads,
        .prepare = pack_block,
        .compute = prefill_task,
        .context = c,
    };
    for (int64_t u = 0; u < all.count; ++u) {
        int64_t i = u / p->h_k, first, blocks = seen_blocks(c, i, &first);
        c->units[u] = (struct attn_unit){
            .parts = c->kernel->pack ? blocks : 0,
            .tasks = row_blocks(c, i) * c->plan->splits,
            .before = all.work,
        };
        all.work += (double)c->seqs[i].q_len * (double)blocks;
    }
    attn_units_run(&all, c->threads);
}

/* Tokens whose rows of out fill a large page. */
static int64_t page_tokens(const problem_t *p)
{
    int64_t bytes = llabs(p->out.row * attn_dtype_bytes(p->out_dtype));
    return max64(LARGE_PAGE / max64(bytes, 1), 1);
}

/* Writes to one row of out, its value unchanged.  The system clears a fresh page when it is first
 * written, and threads at the same tokens of different heads would all wait for one page. */
static void touch_out(void *context, int64_t task, int thread)
{
    (void)thread;
    const struct call *c = context;
    const problem_t *p = &c->p;
    int64_t tokens = page_tokens(p), chunks = ceil_div(p->s_q, tokens), i = task / chunks;
    int64_t token = task % chunks * tokens;
    if (token >= c->seqs[i].q_len) return;
    char *row = p->out.data + attn_dtype_bytes(p->out_dtype) *
                                  (i * p->out.batch + (c->seqs[i].q_start + token) * p->out.row);
    __atomic_fetch_or(row, 0, __ATOMIC_RELAXED);
}

/* Task: (sequence, split, chunk of KV heads). */
static void decode_task(void *context, int64_t t, int thread)
{
    const struct call *c = context;
    const problem_t *p = &c->p;
    int64_t splits = c->plan->splits, chunks = ceil_div(p->h_k, c->block_heads);
    int64_t i = t / (splits * chunks), head = t % chunks * c->block_heads;
    if (c->seqs[i].q_len == 0) return;
    run_task(c, i, head, min64(c->block_heads, p->h_k - head), 0, c->seqs[i].q_len * c->group,
             t / chunks % splits, NULL, thread_scratch(c, thread));
}

/* Merges the splits of every live row of (sequence, query head). */
static void combine_head(void *context, int64_t task, int thread)
{
    (void)thread;
    const struct call *c = context;
    const problem_t *p = &c->p;
    int64_t i = task / p->h_q, h = task % p->h_q, out_bytes = attn_dtype_bytes(p->out_dtype);
    const float *o = (const float *)(const void *)p->out_accum.data + i * p->out_accum.batch +
                     h * p->out_accum.head;
    const float *lse = p->lse_accum + i * p->lse_accum_batch + h * p->lse_accum_head;
    for (int64_t t = c->seqs[i].q_start; t < c->seqs[i].q_start + c->seqs[i].q_len; ++t)
        c->combine->run(o + t * p->out_accum.row, p->out_accum_split, lse + t, p->lse_accum_split,
                        c->plan->splits, (int32_t)p->d_v, c->sinks ? c->sinks + h : NULL,
                        p->out.data +
                            out_bytes * (i * p->out.batch + t * p->out.row + h * p->out.head),
                        p->out_dtype, p->lse + i * p->lse_batch + h * p->lse_head + t);
}

/* Rotates up to ROTATE_TOKENS queries of a sequence into the workspace. */
static void rotate_tokens(void *context, int64_t task, int thread)
{
    (void)thread;
    const struct call *c = context;
    const problem_t *p = &c->p;
    const struct attn_rows *from = &c->raw_q;
    int64_t bytes = attn_dtype_bytes(p->dtype), half_bytes = p->rotary_width / 2 * bytes;
    int64_t chunks = ceil_div(p->s_q, ROTATE_TOKENS), i = task / chunks;
    int64_t first = task % chunks * ROTATE_TOKENS;
    int64_t end = min64(first + ROTATE_TOKENS, c->seqs[i].q_len);
    for (int64_t token = first; token < end; ++token) {
        int64_t t = c->seqs[i].q_start + token;
        int64_t at = attn_rotary_query_position(p, &c->seqs[i], token) * half_bytes;
        for (int64_t h = 0; h < p->h_q; ++h)
            c->rotary->run(from->data + bytes * (i * from->batch + t * from->row + h * from->head),
                           p->q.data + bytes * (i * p->q.batch + t * p->q.row + h * p->q.head),
                           (const char *)p->rotary_cos + at, (const char *)p->rotary_sin + at,
                           (int32_t)p->d_qk, (int32_t)p->rotary_width, p->rotary_interleaved);
    }
}

/* No key storage at all: every live row gives 0 and +inf. */
static void write_no_keys(const problem_t *p, const seq_t *seqs)
{
    int64_t bytes = attn_dtype_bytes(p->out_dtype);
    for (int64_t i = 0; i < p->b; ++i) {
        for (int64_t t = seqs[i].q_start; t < seqs[i].q_start + seqs[i].q_len; ++t) {
            for (int64_t h = 0; h < p->h_q; ++h) {
                memset(p->out.data + bytes * (i * p->out.batch + t * p->out.row + h * p->out.head),
                       0, (size_t)(bytes * p->d_v));
                p->lse[i * p->lse_batch + h * p->lse_head + t] = INFINITY;
            }
        }
    }
}

static void fill_scales(struct call *c)
{
    const problem_t *p = &c->p;
    for (int64_t i = 0; i < p->b; ++i) {
        for (int64_t h = 0; h < p->h_k; ++h) {
            double scale = p->scale;
            if (p->q_descale) scale *= p->q_descale[i * p->q_descale_batch + h * p->q_descale_head];
            if (p->k_descale) scale *= p->k_descale[i * p->k_descale_batch + h * p->k_descale_head];
            c->score_scale[i * p->h_k + h] = (float)scale;
            c->out_scale[i * p->h_k + h] =
                p->v_descale ? p->v_descale[i * p->v_descale_batch + h * p->v_descale_head] : 1.0f;
        }
    }
    for (int64_t h = 0; c->sinks && h < p->h_q; ++h)
        c->sinks[h] = attn_load(p->sinks_dtype, p->sinks, h * p->sinks_stride);
}

/* Rows a prefill task: as many as leave every thread four tasks, evenly shared out. */
static int64_t choose_rows(const struct call *c)
{
    const problem_t *p = &c->p;
    int64_t step = c->kernel->rows_step, rows = c->plan->tile[TILE_ROWS];
    for (;;) {
        int64_t tasks = 0;
        for (int64_t i = 0; i < p->b; ++i)
            tasks += ceil_div(c->seqs[i].q_len * c->group, rows) * p->h_k * c->plan->splits;
        if (rows <= step || tasks >= 4 * c->plan->tile[TILE_THREADS]) return rows;
        rows = round_up(rows / 2, step);
    }
}

/* The phases, in a known floating-point state. */
static void run_phases(struct call *c)
{
    problem_t *p = &c->p;
    if (p->k_new.data) attn_kv_append_cpu(p, c->seqs, c->rotary, c->threads);
    if (p->no_keys) {
        write_no_keys(p, c->seqs);
        return;
    }
    fill_scales(c);
    if (p->rotary_cos)
        attn_parallel(c->threads, p->b * ceil_div(p->s_q, ROTATE_TOKENS), rotate_tokens, c);
    if (c->kernel->decode) {
        int64_t pieces = p->b * c->plan->splits;
        c->block_heads = min64(p->h_k, max64(1, p->h_k * pieces / (4 * c->threads)));
        attn_parallel(c->threads, pieces * ceil_div(p->h_k, c->block_heads), decode_task, c);
    } else {
        c->block_rows = choose_rows(c);
        if (c->threads > 1 && c->plan->splits == 1 && large_out(p))
            attn_parallel(c->threads, p->b * ceil_div(p->s_q, page_tokens(p)), touch_out, c);
        run_prefill(c);
    }
    if (c->plan->splits > 1) attn_parallel(c->threads, p->b * p->h_q, combine_head, c);
}

/* A call with nothing to do still refuses what a call with work would. */
static attn_status check_index_values(const problem_t *p)
{
    seq_t seq;
    bool any = p->cu_seqlens_q || p->cu_seqlens_k || p->cu_seqlens_k_new || p->seqused_q ||
               p->seqused_k || p->kv_batch_idx || p->leftpad_k || p->page_table ||
               p->cp_tot_seqused_k;
    for (int64_t i = 0; any && i < p->b; ++i) ATTN_TRY(attn_cpu_seq_read(p, i, &seq));
    return ATTN_OK;
}

attn_status attn_mha_fwd_cpu_run_with(const struct attn_cpu_kernels *table, const problem_t *p,
                                      const plan_t *plan, char *workspace, int64_t workspace_bytes)
{
    if (plan->tile[TILE_FORM] == FORM_NOTHING) return check_index_values(p);
    if (plan->tile[TILE_FORM] == FORM_REF)
        return attn_mha_fwd_ref_run(p, plan->splits, plan->piece,
                                    attn_threads(p->threads, p->b * p->h_q));

    struct layout l = lay_out(p, plan);
    ATTN_CHECK(workspace_bytes >= l.bytes, ATTN_E_WORKSPACE,
               "workspace: expected %lld bytes, got %lld", (long long)l.bytes,
               (long long)workspace_bytes);
    struct call c = {
        .p = *p,
        .raw_q = p->q,
        .plan = plan,
        .kernel = choose_kernel(table, p),
        .rotary = table->rotary[p->dtype],
        .combine = table->split_combine,
        .seqs = (seq_t *)(void *)(workspace + l.seqs),
        .units = (struct attn_unit *)(void *)(workspace + l.units),
        .score_scale = (float *)(void *)(workspace + l.scales),
        .out_scale = (float *)(void *)(workspace + l.scales) + p->b * p->h_k,
        .sinks = p->sinks ? (float *)(void *)(workspace + l.sinks) : NULL,
        .packs = workspace + l.packs,
        .scratch = workspace + l.scratch,
        .group = p->h_q / p->h_k,
    };
    for (int64_t i = 0; i < p->b; ++i) ATTN_TRY(attn_cpu_seq_read(p, i, &c.seqs[i]));
    if (p->rotary_cos)
        c.p.q = (struct attn_rows){workspace + l.q, p->cu_seqlens_q ? 0 : p->s_q * p->h_q * p->d_qk,
                                   p->h_q * p->d_qk, p->d_qk};
    if (attn_log_on() && p->rotary_cos) attn_log("%s", c.rotary->name);
    if (attn_log_on() && plan->splits > 1) attn_log("%s", c.combine->name);

    int threads = attn_threads(p->threads, INT64_MAX); /* fewer than planned after a fork */
    c.threads = (int)min64(threads, plan->tile[TILE_THREADS]);
    uint32_t state = attn_fp_enter();
    run_phases(&c);
    attn_fp_leave(state);
    return ATTN_OK;
}

attn_status attn_mha_fwd_cpu_plan(const problem_t *p, plan_t *plan)
{
    return attn_mha_fwd_cpu_plan_with(attn_cpu_kernels(), p, plan);
}

attn_status attn_mha_fwd_cpu_run(const problem_t *p, const plan_t *plan, char *workspace,
                                 int64_t workspace_bytes, void *stream)
{
    (void)stream;
    return attn_mha_fwd_cpu_run_with(attn_cpu_kernels(), p, plan, workspace, workspace_bytes);
}
