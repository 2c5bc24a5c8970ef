/* SPDX-License-Identifier: MIT
 *
 * The mla ops on a CPU: from a problem to kernel tasks.
 *
 *   count keys -> cut units into pieces -> tasks -> combine the pieces of units that were cut
 *
 * A unit is what shares keys: (sequence, KV head) with s_q * h_q / h_k query rows in dense decode,
 * (token) with h_q rows in the sparse ops.  A task is a unit's piece of keys and block of rows; a
 * unit of one piece writes its result straight away.
 *
 *   target pieces   64, or 32 from 64 rows a unit on, over the row blocks of a unit
 *   piece           keys of all units / target, at least 256; a unit is cut into equal parts
 *
 * so that one long sequence uses every core, many short ones are not cut at all, and at most
 * 2 * target pieces wait to be combined: a unit is cut only above one piece's length, so cutting at
 * most doubles their number; with a target of 1, none.  Lengths decide, threads never do: results
 * do not depend on them.
 *
 * Workspace, each part 64-byte aligned:
 *   first task of each unit [units + 1] | cut units [2 target] | their first slot [2 target] |
 *   slots [2 target][rows * (512 + 3) floats: o, m, l, top] | scratch [threads]
 */
#include "cpu/mla.h"

#include <stdio.h>

#include "core/int.h"
#include "cpu/mla_kernel.h"
#include "cpu/threads.h"

typedef struct attn_mla_problem problem_t;
typedef struct attn_mla_plan plan_t;

enum { TILE_KERNEL, TILE_ROWS, TILE_TARGET, TILE_THREADS, TILE_SCRATCH }; /* plan.tile */

#define PIECE_MIN 256
#define SMALL_WORK 4e6 /* FLOP below which waking threads costs more */
#define LOG2E 1.4426950408889634

/* ---- keys ------------------------------------------------------------------------------------ */

attn_status attn_mla_values_check(const problem_t *p)
{
    if (!p->block_table) return ATTN_OK;
    const struct attn_mla_cache *c = &p->cache[0];
    for (int64_t i = 0; i < p->b; ++i) {
        int64_t n = p->cache_seqlens[i];
        ATTN_CHECK(
            n >= 0 && n <= p->max_pages * c->page, ATTN_E_VALUE,
            "cache_seqlens: expected in [0, %lld], the room of block_table, got %lld at %lld",
            (long long)(p->max_pages * c->page), (long long)n, (long long)i);
        const int32_t *pages = p->block_table + i * p->block_table_row;
        for (int64_t j = 0; j * c->page < n; ++j)
            ATTN_CHECK(pages[j] >= 0 && pages[j] < c->num_pages, ATTN_E_VALUE,
                       "block_table: expected pages in [0, %lld), got %d at [%lld, %lld]",
                       (long long)c->num_pages, (int)pages[j], (long long)i, (long long)j);
    }
    return ATTN_OK;
}

static int32_t next_paged(struct attn_mla_cursor *c, int32_t max, const char **row)
{
    const struct attn_mla_cache *k = &c->cache[0];
    int32_t n = 0;
    while (n < max && c->at < c->end) {
        int64_t o = c->at % k->page, run = min64(min64(k->page - o, c->end - c->at), max - n);
        const char *from = attn_mla_row(k, c->pages[c->at / k->page], o, 0) + c->head_bytes;
        for (int64_t i = 0; i < run; ++i) row[n + i] = from + i * k->row_stride;
        n += (int32_t)run;
        c->at += run;
    }
    return n;
}

int32_t attn_mla_next_keys(struct attn_mla_cursor *c, int32_t max, const char **row,
                           const char **scales)
{
    if (c->pages) return next_paged(c, max, row);
    int32_t n = 0;
    for (; n < max && c->at < c->end; ++c->at) {
        bool extra = c->at >= c->first;
        const struct attn_mla_cache *k = &c->cache[extra];
        int64_t index = extra ? c->list[1][c->at - c->first] : c->list[0][c->at];
        if (index < 0 || index >= k->num_pages * k->page) continue;
        int64_t page = k->num_pages == 1 ? 0 : index / k->page, o = index - page * k->page;
        row[n] = attn_mla_row(k, page, o, 0);
        if (c->scales) scales[n] = attn_mla_scales(k, page, o);
        ++n;
    }
    return n;
}

static int64_t units_of(const problem_t *p) { return p->b * (p->block_table ? p->h_k : p->s_q); }

static int64_t rows_of(const problem_t *p)
{
    return p->block_table ? p->s_q * (p->h_q / p->h_k) : p->h_q;
}

/* Positions of unit u, skipped indices counted. */
static int64_t unit_keys(const problem_t *p, int64_t u)
{
    if (p->block_table) return p->cache_seqlens[u / p->h_k];
    int64_t i = u / p->s_q;
    return attn_mla_list_length(&p->list[0], i) + attn_mla_list_length(&p->list[1], i);
}

/* ---- plan ------------------------------------------------------------------------------------ */

struct layout {
    int64_t first_task, cut, first_slot, slots, slot_floats, scratch, bytes;
};

static struct layout lay_out(const problem_t *p, const plan_t *plan)
{
    struct layout l = {0};
    int64_t target = plan->tile[TILE_TARGET], most = target > 1 ? 2 * target : 0, at = 0;
    l.first_task = at;
    at += round_up((units_of(p) + 1) * (int64_t)sizeof(int64_t), 64);
    l.cut = at;
    at += round_up(most * (int64_t)sizeof(int64_t), 64);
    l.first_slot = at;
    at += round_up(most * (int64_t)sizeof(int64_t), 64);
    l.slots = at;
    l.slot_floats = round_up(rows_of(p) * (p->d_v + 3), 16);
    at += most * l.slot_floats * (int64_t)sizeof(float);
    l.scratch = at;
    l.bytes = at + plan->tile[TILE_THREADS] * plan->tile[TILE_SCRATCH];
    return l;
}

/* A thread's scratch begins with a task's row tables and its result, when it is not a slot's. */
static int64_t task_bytes(int64_t rows, int64_t d_v)
{
    int64_t tables = rows * (int64_t)(sizeof(int64_t) + sizeof(int32_t));
    return round_up(tables, 128) + round_up(rows * (d_v + 3) * (int64_t)sizeof(float), 128);
}

attn_status attn_mla_cpu_plan_with(const struct attn_cpu_kernels *table, const problem_t *p,
                                   plan_t *plan)
{
    static const char *const formats[ATTN_MLA_FORMATS] = {"fp32", "bf16", "fp16",
                                                          "fp8",  "v32",  "model1"};
    const struct attn_mla_kernel *kernel = table->mla[p->format];
    if (!kernel) {
        snprintf(plan->kernel, sizeof plan->kernel, "attn_mla_%s_ref", formats[p->format]);
        return ATTN_OK;
    }
    snprintf(plan->kernel, sizeof plan->kernel, "%s", kernel->name);
    int64_t rows = max64(rows_of(p), 1), blocks = ceil_div(rows, kernel->rows_max);
    int64_t keys = p->block_table ? p->max_pages * p->cache[0].page
                                  : p->list[0].topk + p->list[1].topk;
    double work = 2.0 * (double)(units_of(p) * rows) * (double)keys * (double)(p->d_qk + p->d_v);
    plan->tile[TILE_KERNEL] = 1;
    plan->tile[TILE_ROWS] = min64(round_up(ceil_div(rows, blocks), 16), kernel->rows_max);
    plan->tile[TILE_TARGET] = max64((rows < 64 ? 64 : 32) / blocks, 1);
    plan->tile[TILE_THREADS] = work < SMALL_WORK ? 1 : attn_threads(p->threads, INT64_MAX);
    plan->tile[TILE_SCRATCH] = task_bytes(plan->tile[TILE_ROWS], p->d_v) +
                               round_up(kernel->scratch_bytes(plan->tile[TILE_ROWS], p->d_qk), 128);
    plan->workspace_bytes = lay_out(p, plan).bytes;
    return ATTN_OK;
}

/* ---- run ------------------------------------------------------------------------------------- */

struct call {
    const problem_t *p;
    const plan_t *plan;
    const struct attn_mla_kernel *kernel;
    const struct attn_mla_finish_kernel *finish;
    struct layout at;
    int64_t *first_task; /* [units + 1] tasks of the units before */
    int64_t *cut;        /* [cuts] units in more than one piece */
    int64_t *first_slot; /* [cuts] */
    char *slots, *scratch;
    int64_t units, rows, block_rows, blocks, piece, cuts;
    float scale, v_scale;
};

/* Equal parts of a unit's keys, multiples of 64 but for the last. */
static int64_t pieces_of(const struct call *c, int64_t keys)
{
    return max64(ceil_div(keys, c->piece), 1);
}

static int64_t piece_of(int64_t keys, int64_t pieces)
{
    return max64(round_up(ceil_div(keys, pieces), 64), 64);
}

/* Index of the last entry of first[0 .. n) that is at most x. */
static int64_t find(const int64_t *first, int64_t n, int64_t x)
{
    int64_t low = 0, high = n;
    while (high - low > 1) {
        int64_t middle = low + (high - low) / 2;
        if (first[middle] <= x)
            low = middle;
        else
            high = middle;
    }
    return low;
}

static void count_tasks(struct call *c)
{
    const problem_t *p = c->p;
    int64_t keys = 0, slots = 0;
    for (int64_t u = 0; u < c->units; ++u) keys += unit_keys(p, u);
    c->piece = max64(round_up(ceil_div(keys, c->plan->tile[TILE_TARGET]), 64), PIECE_MIN);
    c->first_task[0] = 0;
    for (int64_t u = 0; u < c->units; ++u) {
        int64_t pieces = pieces_of(c, unit_keys(p, u));
        c->first_task[u + 1] = c->first_task[u] + pieces * c->blocks;
        if (pieces == 1) continue;
        c->cut[c->cuts] = u;
        c->first_slot[c->cuts++] = slots;
        slots += pieces;
    }
}

/* Query row r of unit u: its sequence, token and head. */
struct row {
    int64_t i, t, h;
};

static struct row row_at(const problem_t *p, int64_t u, int64_t r)
{
    if (!p->block_table) return (struct row){u / p->s_q, u % p->s_q, r};
    int64_t group = p->h_q / p->h_k;
    return (struct row){u / p->h_k, r / group, u % p->h_k * group + r % group};
}

static void finish_row(const struct call *c, int64_t u, int64_t r, struct attn_mla_pieces *in)
{
    const problem_t *p = c->p;
    struct row x = row_at(p, u, r);
    in->v_scale = c->v_scale;
    in->sink = p->sink ? p->sink[x.h * p->sink_stride] : -INFINITY;
    char *out = p->out.data + attn_dtype_bytes(p->out_dtype) *
                                  (x.i * p->out.batch + x.t * p->out.row + x.h * p->out.head);
    float *max = p->max_logits
                     ? p->max_logits + x.i * p->max_batch + x.t * p->max_row + x.h * p->max_head
                     : NULL;
    c->finish->run(in, p->out_dtype, out,
                   p->lse + x.i * p->lse_batch + x.t * p->lse_row + x.h * p->lse_head, max);
}

static struct attn_mla_cursor keys_of(const problem_t *p, int64_t u, int64_t from, int64_t to)
{
    struct attn_mla_cursor keys = {.cache = p->cache, .at = from, .end = to};
    if (p->block_table) {
        keys.pages = p->block_table + u / p->h_k * p->block_table_row;
        keys.head_bytes = u % p->h_k * p->cache[0].head_stride;
        return keys;
    }
    int64_t i = u / p->s_q, t = u % p->s_q;
    for (int n = 0; n < 2; ++n)
        if (p->list[n].topk)
            keys.list[n] = p->list[n].indices + i * p->list[n].batch + t * p->list[n].row;
    keys.first = attn_mla_list_length(&p->list[0], i);
    keys.scales = p->format == ATTN_MLA_MODEL1;
    return keys;
}

/* Whether any of the keys holds an infinity or a NaN. */
static bool not_finite(const problem_t *p, struct attn_mla_cursor keys)
{
    const char *row;
    while (attn_mla_next_keys(&keys, 1, &row, NULL) > 0)
        for (int64_t x = 0; x < p->d_qk; ++x)
            if (!isfinite(attn_load(p->dtype, row, x))) return true;
    return false;
}

/* Runs the kernel.  A kernel gives hidden keys the weight 0, and 0 * NaN is NaN: where the keys
 * that some rows do not see are not all finite, rows of equal sight go by themselves. */
static void run_kernel(const struct call *c, struct attn_mla_task *work, char *scratch)
{
    int32_t least = INT32_MAX;
    for (int32_t r = 0; work->hi && r < work->rows; ++r)
        least = work->hi[r] < least ? work->hi[r] : least;
    struct attn_mla_cursor hidden = work->keys;
    hidden.at = min64(hidden.end, hidden.at + least);
    if (!work->hi || !not_finite(c->p, hidden)) {
        c->kernel->run(work, scratch);
        return;
    }
    const int64_t from = work->keys.at;
    for (int32_t r = 0, next; r < work->rows; r = next) {
        for (next = r + 1; next < work->rows && work->hi[next] == work->hi[r];) ++next;
        struct attn_mla_task part = *work;
        part.rows = next - r;
        part.q_row += r;
        part.hi = NULL;
        part.keys.end = from + work->hi[r];
        part.o += r * c->p->d_v;
        part.m += r;
        part.l += r;
        part.top += r;
        if (part.keys.end > from)
            c->kernel->run(&part, scratch);
        else
            for (int32_t x = 0; x < part.rows; ++x)
                part.m[x] = part.l[x] = 0, part.top[x] = -INFINITY;
    }
}

static void attend(void *context, int64_t task, int thread)
{
    const struct call *c = context;
    const problem_t *p = c->p;
    char *scratch = c->scratch + thread * c->plan->tile[TILE_SCRATCH];
    int64_t u = find(c->first_task, c->units, task);
    int64_t local = task - c->first_task[u], j = local / c->blocks;
    int64_t r0 = local % c->blocks * c->block_rows, rows = min64(c->block_rows, c->rows - r0);
    int64_t keys = unit_keys(p, u), pieces = pieces_of(c, keys), step = piece_of(keys, pieces);
    int64_t from = min64(j * step, keys), to = min64(from + step, keys), seen = to - from;

    int64_t *q_row = (int64_t *)(void *)scratch;
    int32_t *hi = (int32_t *)(void *)(q_row + rows);
    float *o = (float *)(void *)(scratch + round_up(rows * 12, 128));
    float *stats = o + rows * p->d_v;
    int64_t stat_rows = rows;
    scratch += task_bytes(c->block_rows, p->d_v);
    if (pieces > 1) {
        float *slot = (float *)(void *)c->slots +
                      (c->first_slot[find(c->cut, c->cuts, u)] + j) * c->at.slot_floats;
        o = slot + r0 * p->d_v;
        stats = slot + c->rows * p->d_v + r0;
        stat_rows = c->rows;
    }

    int64_t bytes = attn_dtype_bytes(p->dtype);
    for (int64_t r = 0; r < rows; ++r) {
        struct row x = row_at(p, u, r0 + r);
        q_row[r] = bytes * (x.i * p->q.batch + x.t * p->q.row + x.h * p->q.head);
        int64_t end = p->causal ? keys - p->s_q + x.t + 1 - from : to - from;
        hi[r] = (int32_t)max64(min64(end, to - from), 0);
        seen = r == 0 ? hi[r] : max64(seen, hi[r]);
    }
    struct attn_mla_task work = {
        .rows = (int32_t)rows,
        .d_qk = (int32_t)p->d_qk,
        .q = p->q.data,
        .q_row = q_row,
        .hi = p->causal ? hi : NULL,
        .scale = c->scale,
        .keys = keys_of(p, u, from, from + seen),
        .o = o,
        .m = stats,
        .l = stats + stat_rows,
        .top = stats + 2 * stat_rows,
    };
    if (seen > 0)
        run_kernel(c, &work, scratch);
    else
        for (int64_t r = 0; r < rows; ++r) work.m[r] = work.l[r] = 0, work.top[r] = -INFINITY;
    for (int64_t r = 0; r < rows && pieces == 1; ++r)
        finish_row(c, u, r0 + r,
                   &(struct attn_mla_pieces){.o = o + r * p->d_v,
                                             .m = work.m + r,
                                             .l = work.l + r,
                                             .top = work.top + r,
                                             .pieces = 1});
}

/* Task: a row of a unit that was cut. */
static void combine(void *context, int64_t task, int thread)
{
    (void)thread;
    const struct call *c = context;
    int64_t n = task / c->rows, r = task % c->rows, u = c->cut[n];
    const float *slot = (const float *)(const void *)c->slots +
                        c->first_slot[n] * c->at.slot_floats;
    const float *stats = slot + c->rows * c->p->d_v + r;
    finish_row(c, u, r,
               &(struct attn_mla_pieces){
                   .o = slot + r * c->p->d_v,
                   .m = stats,
                   .l = stats + c->rows,
                   .top = stats + 2 * c->rows,
                   .piece = c->at.slot_floats,
                   .pieces = (int32_t)pieces_of(c, unit_keys(c->p, u)),
               });
}

attn_status attn_mla_cpu_run_with(const struct attn_cpu_kernels *table, const problem_t *p,
                                  const plan_t *plan, char *workspace, int64_t workspace_bytes)
{
    int64_t threads = attn_threads(p->threads, INT64_MAX);
    if (!plan->tile[TILE_KERNEL]) return attn_mla_ref_run(p, (int)threads);
    ATTN_TRY(attn_mla_values_check(p));
    struct call c = {
        .p = p,
        .plan = plan,
        .kernel = table->mla[p->format],
        .finish = table->mla_finish,
        .at = lay_out(p, plan),
        .units = units_of(p),
        .rows = rows_of(p),
        .block_rows = plan->tile[TILE_ROWS],
        .v_scale = p->descale_k ? *p->descale_k : 1,
    };
    (void)workspace_bytes;
    if (c.rows == 0) return ATTN_OK;
    c.first_task = (int64_t *)(void *)(workspace + c.at.first_task);
    c.cut = (int64_t *)(void *)(workspace + c.at.cut);
    c.first_slot = (int64_t *)(void *)(workspace + c.at.first_slot);
    c.slots = workspace + c.at.slots;
    c.scratch = workspace + c.at.scratch;
    c.blocks = ceil_div(c.rows, c.block_rows);
    double scale = p->scale * LOG2E * (double)c.v_scale;
    c.scale = (float)(p->descale_q ? scale * (double)*p->descale_q : scale);
    count_tasks(&c);

    /* One team for both: a smaller one would end the threads that it has no use for. */
    int64_t tasks = c.first_task[c.units];
    int team = (int)min64(min64(plan->tile[TILE_THREADS], threads), tasks);
    attn_parallel(team, tasks, attend, &c);
    attn_parallel(team, c.cuts * c.rows, combine, &c);
    return ATTN_OK;
}

attn_status attn_mla_cpu_plan(const problem_t *p, plan_t *plan)
{
    return attn_mla_cpu_plan_with(attn_cpu_kernels(), p, plan);
}

attn_status attn_mla_cpu_run(const problem_t *p, const plan_t *plan, char *workspace,
                             int64_t workspace_bytes, void *stream)
{
    (void)stream;
    return attn_mla_cpu_run_with(attn_cpu_kernels(), p, plan, workspace, workspace_bytes);
}
