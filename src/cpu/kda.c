/* SPDX-License-Identifier: MIT
 *
 * kda_fwd and kda_step on a CPU: plan, tasks, threads.
 *
 * A unit is a head of a sequence.  Its tokens are cut into chunks; each is prepared into a record,
 * then every slice of the state is taken through the records in order (kernels.h).  Two ways to
 * spread that over threads, with the same bits:
 *
 *   whole   a task is a unit, or as many as HEADS whose rows lie side by side: a chunk of each is
 *           prepared and scanned, then the next, so that memory is read in runs and a page is
 *           visited once.  A unit alone goes by GROUP chunks.  Where threads get but a few units
 *           each, tasks are cut into stretches, first all units' first ones: a slow thread then
 *           costs a stretch
 *   waves   for units too few or too uneven to keep all threads busy: a turn prepares wave w of all
 *           units, a task a chunk, while slices of the state, a task each, go through wave w - 1
 *
 *   turn | 0         1         2         ...
 *        |           scan 0    scan 1    ...      units x slices tasks, begun first
 *        | prepare 0 prepare 1 prepare 2 ...      units x wave tasks
 */
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include <xmmintrin.h>

#include "core/env.h"
#include "core/int.h"
#include "cpu/kda.h"
#include "cpu/threads.h"

typedef struct attn_kda_problem problem_t;
typedef struct attn_kda_fwd_plan plan_t;
typedef struct attn_kda_fwd_kernel kernel_t;

enum { TILE_FORM, TILE_THREADS, TILE_SCRATCH, TILE_RECORDS, TILE_STATES, TILE_WAVE, TILE_HEADS };
enum { FORM_REF, FORM_KERNEL };
enum {
    HEADS = 8,           /* at most, that a thread takes through a chunk side by side */
    GROUP = 4,           /* chunks a thread prepares before it scans them, of one head alone */
    STRETCH = 32,        /* chunks of a unit in a task, when units are cut */
    STRETCH_UNITS = 8,   /* units are cut if there are at most this many a thread */
    WAVE_MAX = 64,       /* chunks of one unit in a wave */
    WAVE_CHUNKS = 128,   /* chunks of all units in a wave, about */
    WAVE_UNITS = 4,      /* waves are for at most this many units a thread */
    SPINS = 200,         /* looks before a waiting thread gives way */
    TOKENS_A_THREAD = 64 /* with fewer, a thread costs more than it does */
};

/* ---- the cut into chunks --------------------------------------------------------------------- */

/* Chunks end at multiples of `chunk` tokens from the sequence's start, or, with checkpoints, from
 * the last checkpoint, and at each checkpoint. */
struct cut {
    int64_t chunk, every, per; /* per: chunks between two checkpoints; 0 without them */
};

static struct cut make_cut(const problem_t *p, const kernel_t *kernel)
{
    struct cut c = {.chunk = kernel->chunk, .every = p->checkpoint_every};
    if (c.every) c.per = ceil_div(c.every, c.chunk);
    return c;
}

static int64_t cut_count(const struct cut *c, int64_t len)
{
    if (!c->every) return ceil_div(len, c->chunk);
    return len / c->every * c->per + ceil_div(len % c->every, c->chunk);
}

static int64_t cut_begin(const struct cut *c, int64_t i)
{
    return c->every ? i / c->per * c->every + i % c->per * c->chunk : i * c->chunk;
}

static int64_t cut_rows(const struct cut *c, int64_t i, int64_t len)
{
    int64_t begin = cut_begin(c, i), end = min64(begin + c->chunk, len);
    if (c->every) end = min64(end, (i / c->per + 1) * c->every);
    return end - begin;
}

/* ---- plan ------------------------------------------------------------------------------------ */

static int64_t record_bytes(const kernel_t *kernel, int64_t d)
{
    return round_up(kernel->record_bytes(d), 64);
}

/* Workspace: [checkpoint rows of sequences][stretches done][scratch of
 * threads][states][records]. */
struct layout {
    int64_t done, scratch, states, records, bytes;
};

static struct layout lay_out(const problem_t *p, const plan_t *plan, const kernel_t *kernel)
{
    struct layout l = {0};
    l.done = p->checkpoint_every ? round_up(8 * p->n, 128) : 0;
    l.scratch = l.done + round_up(4 * plan->tile[TILE_STATES], 128);
    l.states = l.scratch + plan->tile[TILE_THREADS] * plan->tile[TILE_SCRATCH];
    l.records = l.states + plan->tile[TILE_STATES] * p->d * p->d * 4;
    l.bytes = l.records + plan->tile[TILE_RECORDS] * record_bytes(kernel, p->d);
    return l;
}

/* Heads a task takes side by side: where rows of heads are closer than those of tokens, and enough
 * tasks remain for the threads to share evenly. */
static int64_t heads_of_task(const problem_t *p, int64_t threads)
{
    int64_t heads = 1, units = p->n * p->h;
    if (p->q.row < p->q.head || p->k.row < p->k.head || p->g.row < p->g.head) return 1;
    while (heads < HEADS && p->h % (2 * heads) == 0 &&
           (threads == 1 || 3 * (units / (2 * heads)) >= 4 * threads))
        heads *= 2;
    return heads;
}

attn_status attn_kda_fwd_cpu_plan_with(const struct attn_cpu_kernels *table, const problem_t *p,
                                       plan_t *plan)
{
    const kernel_t *kernel = table->kda_fwd[p->dtype];
    int64_t units = p->n * p->h;
    if (!kernel || units == 0) {
        plan->tile[TILE_FORM] = FORM_REF;
        snprintf(plan->kernel, sizeof plan->kernel, "attn_kda_fwd_ref");
        return ATTN_OK;
    }
    int64_t threads = attn_threads(p->threads, ceil_div(p->b * p->t * p->h, TOKENS_A_THREAD));
    plan->tile[TILE_FORM] = FORM_KERNEL;
    plan->tile[TILE_THREADS] = threads;
    plan->tile[TILE_SCRATCH] = round_up(kernel->scratch_bytes(p->d), 128) + 128;
    plan->tile[TILE_HEADS] = heads_of_task(p, threads);
    plan->tile[TILE_STATES] = threads * plan->tile[TILE_HEADS];
    if (threads > 1 && units <= threads * STRETCH_UNITS)
        plan->tile[TILE_STATES] = max64(plan->tile[TILE_STATES], units);
    plan->tile[TILE_RECORDS] = threads * GROUP;
    if (threads > 1 && units <= threads * WAVE_UNITS) {
        int64_t wave = min64(max64(WAVE_CHUNKS / units, 4), WAVE_MAX);
        plan->tile[TILE_WAVE] = wave;
        plan->tile[TILE_RECORDS] = max64(threads * GROUP, 2 * units * wave);
    }
    plan->workspace_bytes = lay_out(p, plan, kernel).bytes;
    snprintf(plan->kernel, sizeof plan->kernel, "%s", kernel->name);
    return ATTN_OK;
}

/* ---- tasks ----------------------------------------------------------------------------------- */

struct call {
    const problem_t *p;
    const plan_t *plan;
    const kernel_t *kernel;
    struct cut cut;
    int threads;
    int64_t *checkpoints; /* [n] row of a sequence's first checkpoint */
    char *scratch, *states, *records;
    int64_t record_bytes, slices;
    int64_t heads;    /* of a task of the whole form */
    int64_t stretch;  /* chunks in it */
    atomic_int *done; /* [units] stretches of it, or NULL: units are not cut */
    int64_t turn;     /* of waves */
};

static float slope(const problem_t *p, int64_t h)
{
    float s = p->A_log ? expf(p->A_log[h]) : 1.0f;
    return s > 1e30f ? 1e30f : s < 1e-30f ? 1e-30f : s; /* finite and not 0; NaN stays */
}

/* The tokens [begin, begin + rows) of a sequence's head as kernels read them. */
static struct attn_kda_tokens tokens_at(const problem_t *p, const struct attn_kda_seq *s, int64_t h,
                                        int64_t begin, int64_t rows)
{
    int64_t bytes = attn_dtype_bytes(p->dtype), t = s->start + begin;
    return (struct attn_kda_tokens){
        .rows = (int32_t)rows,
        .d = (int32_t)p->d,
        .q = p->q.data + bytes * (s->row * p->q.batch + t * p->q.row + h * p->q.head),
        .k = p->k.data + bytes * (s->row * p->k.batch + t * p->k.row + h * p->k.head),
        .g = p->g.data + bytes * (s->row * p->g.batch + t * p->g.row + h * p->g.head),
        .beta = p->beta + bytes * (s->row * p->beta_batch + t * p->beta_row + h * p->beta_head),
        .q_row = bytes * p->q.row,
        .k_row = bytes * p->k.row,
        .g_row = bytes * p->g.row,
        .beta_row = bytes * p->beta_row,
        .bias = p->dt_bias ? p->dt_bias + h * p->dt_bias_head : NULL,
        .slope = slope(p, h),
        .lower_bound = (float)p->lower_bound,
        .gate_activated = p->gate_activated,
        .beta_activated = p->beta_activated,
    };
}

static char *scratch_of(const struct call *c, int thread)
{
    return c->scratch + thread * c->plan->tile[TILE_SCRATCH];
}

/* Chunk `chunk` of head h; next_chunk of next_h comes after it. */
static void prepare(const struct call *c, const struct attn_kda_seq *s, int64_t h, int64_t chunk,
                    int64_t next_h, int64_t next_chunk, char *record, int thread)
{
    const problem_t *p = c->p;
    int64_t begin = cut_begin(&c->cut, chunk), rows = cut_rows(&c->cut, chunk, s->len);
    int64_t next = cut_begin(&c->cut, next_chunk), bytes = attn_dtype_bytes(p->dtype);
    struct attn_kda_tokens tokens = tokens_at(p, s, h, begin, rows);
    tokens.ahead = (int32_t)max64(min64(rows, s->len - next), 0);
    tokens.q_ahead = bytes * ((next - begin) * p->q.row + (next_h - h) * p->q.head);
    tokens.k_ahead = bytes * ((next - begin) * p->k.row + (next_h - h) * p->k.head);
    tokens.g_ahead = bytes * ((next - begin) * p->g.row + (next_h - h) * p->g.head);
    c->kernel->prepare(&tokens, record, scratch_of(c, thread));
}

/* Takes slices [slice0, slice1) of unit (i, h) through its chunks [begin, end), the first of which
 * has `records`.  Begins the sequence at chunk 0 and ends it with its last chunk. */
static void scan(const struct call *c, int64_t i, const struct attn_kda_seq *s, int64_t h,
                 int64_t begin, int64_t end, const char *records, char *states, int64_t slice0,
                 int64_t slice1, int thread)
{
    const problem_t *p = c->p;
    struct attn_kda_part parts[WAVE_MAX];
    int64_t bytes = attn_dtype_bytes(p->dtype);
    const char *v = p->v.data + bytes * (s->row * p->v.batch + s->start * p->v.row + h * p->v.head);
    char *out = p->out.data +
                bytes * (s->row * p->out.batch + s->start * p->out.row + h * p->out.head);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        int64_t at = cut_begin(&c->cut, chunk), rows = cut_rows(&c->cut, chunk, s->len);
        bool ends = p->checkpoint_every && (at + rows) % p->checkpoint_every == 0;
        parts[chunk - begin] = (struct attn_kda_part){
            .record = records + (chunk - begin) * c->record_bytes,
            .rows = (int32_t)rows,
            .at = (int32_t)(at - cut_begin(&c->cut, begin)),
            .v = v + bytes * at * p->v.row,
            .out = out + bytes * at * p->out.row,
            .checkpoint = ends ? attn_kda_state(&p->checkpoint,
                                                c->checkpoints[i] + at / p->checkpoint_every, h, 0,
                                                p->d)
                               : NULL,
        };
    }
    bool state = s->slot >= 0, last = end == cut_count(&c->cut, s->len);
    struct attn_kda_scan task = {
        .d = (int32_t)p->d,
        .count = (int32_t)(end - begin),
        .parts = parts,
        .tokens = tokens_at(p, s, h, cut_begin(&c->cut, begin), 0),
        .v_row = bytes * p->v.row,
        .out_row = bytes * p->out.row,
        .scale = (float)p->scale,
        .first = begin == 0,
        .initial = state && p->initial.data ? attn_kda_state(&p->initial, s->slot, h, 0, p->d)
                                            : NULL,
        .final = state && last && p->final.data ? attn_kda_state(&p->final, s->slot, h, 0, p->d)
                                                : NULL,
        .state_dtype = p->initial.data ? p->initial.dtype : p->final.dtype,
        .checkpoint_dtype = p->checkpoint.dtype,
    };
    for (int64_t slice = slice0; slice < slice1; ++slice) {
        task.v0 = (int32_t)(slice * c->kernel->slice);
        task.state = (float *)(void *)(states + slice * c->kernel->slice * p->d * 4);
        c->kernel->scan(&task, scratch_of(c, thread));
    }
}

static void wait_for(atomic_int *done, int64_t stretches)
{
    int looks = 0;
    while (atomic_load_explicit(done, memory_order_acquire) < stretches) {
        if (looks < SPINS) {
            ++looks;
            _mm_pause();
        } else {
            sched_yield();
        }
    }
}

/* Takes heads [h0, h1) of sequence i, whose states are at `states`, through chunks [begin, end). */
static void run_heads(const struct call *c, int64_t i, const struct attn_kda_seq *s, int64_t h0,
                      int64_t h1, int64_t begin, int64_t end, char *states, int thread)
{
    char *records = c->records + thread * GROUP * c->record_bytes;
    for (int64_t h = h0; h < h1; ++h) {
        for (int64_t chunk = begin; chunk < end; ++chunk) {
            bool last = chunk + 1 == end, all = last && h + 1 == h1;
            prepare(c, s, h, chunk,
                    all    ? h0
                    : last ? h + 1
                           : h,
                    last && !all ? begin : chunk + 1, records + (chunk - begin) * c->record_bytes,
                    thread);
        }
        scan(c, i, s, h, begin, end, records, states + (h - h0) * c->p->d * c->p->d * 4, 0,
             c->slices, thread);
    }
}

/* A stretch of a unit or of some heads' units.  The one before it was begun long ago, and the
 * thread that has it waits for earlier ones alone. */
static void whole_task(void *context, int64_t task, int thread)
{
    const struct call *c = context;
    int64_t tasks = c->p->n * c->p->h / c->heads, u = task % tasks * c->heads;
    int64_t i = u / c->p->h, h = u % c->p->h, group = c->heads > 1 ? 1 : GROUP;
    struct attn_kda_seq s = attn_kda_seq(c->p, i);
    int64_t count = cut_count(&c->cut, s.len), begin = task / tasks * c->stretch;
    int64_t last = min64(begin + c->stretch, count);
    if (begin && begin >= count) return;
    char *states = c->states + (c->done ? u : thread * c->heads) * c->p->d * c->p->d * 4;
    if (c->done) wait_for(&c->done[u], task / tasks);
    if (c->kernel->begin) c->kernel->begin();
    do {
        int64_t end = min64(begin + group, last);
        run_heads(c, i, &s, h, h + c->heads, begin, end, states, thread);
        begin = end;
    } while (begin < last);
    if (c->kernel->end) c->kernel->end();
    if (c->done) atomic_fetch_add_explicit(&c->done[u], 1, memory_order_release);
}

static void run_whole(struct call *c, int64_t longest)
{
    int64_t units = c->p->n * c->p->h, stretches = 1;
    c->heads = c->plan->tile[TILE_HEADS];
    c->stretch = longest;
    if (c->threads > 1 && units <= c->plan->tile[TILE_STATES]) {
        c->stretch = STRETCH;
        stretches = max64(ceil_div(longest, STRETCH), 1);
        for (int64_t u = 0; u < units; ++u) atomic_init(&c->done[u], 0);
    } else {
        c->done = NULL;
    }
    attn_parallel(c->threads, units / c->heads * stretches, whole_task, c);
}

/* Records of a unit in the wave of an even or odd turn. */
static char *wave_records(const struct call *c, int64_t turn, int64_t u)
{
    int64_t units = c->p->n * c->p->h;
    return c->records + (turn % 2 * units + u) * c->plan->tile[TILE_WAVE] * c->record_bytes;
}

static void wave_task(void *context, int64_t task, int thread)
{
    const struct call *c = context;
    const problem_t *p = c->p;
    int64_t wave = c->plan->tile[TILE_WAVE], scans = c->turn ? p->n * p->h * c->slices : 0;
    bool scanning = task < scans;
    int64_t u = scanning ? task / c->slices : (task - scans) / wave;
    struct attn_kda_seq s = attn_kda_seq(p, u / p->h);
    int64_t count = cut_count(&c->cut, s.len);
    if (c->kernel->begin) c->kernel->begin();
    if (scanning) {
        int64_t begin = (c->turn - 1) * wave, slice = task % c->slices;
        if (begin < max64(count, 1))
            scan(c, u / p->h, &s, u % p->h, begin, min64(begin + wave, count),
                 wave_records(c, c->turn - 1, u), c->states + u * p->d * p->d * 4, slice, slice + 1,
                 thread);
    } else {
        int64_t in = (task - scans) % wave, chunk = c->turn * wave + in;
        if (chunk < count)
            prepare(c, &s, u % p->h, chunk, u % p->h, chunk + 1,
                    wave_records(c, c->turn, u) + in * c->record_bytes, thread);
    }
    if (c->kernel->end) c->kernel->end();
}

static void run_waves(struct call *c, int64_t longest)
{
    int64_t units = c->p->n * c->p->h, wave = c->plan->tile[TILE_WAVE];
    int64_t waves = max64(ceil_div(longest, wave), 1);
    for (c->turn = 0; c->turn <= waves; ++c->turn) {
        int64_t scans = c->turn ? units * c->slices : 0;
        int64_t prepares = c->turn < waves ? units * wave : 0;
        attn_parallel(c->threads, scans + prepares, wave_task, c);
    }
}

/* Whether whole units would leave more than a quarter of the threads' time idle. */
static bool uneven(const struct call *c, int64_t chunks, int64_t longest)
{
    int64_t rounds = ceil_div(chunks, c->threads * max64(longest, 1));
    return 4 * chunks < 3 * rounds * longest * c->threads;
}

attn_status attn_kda_fwd_cpu_run_with(const struct attn_cpu_kernels *table, const problem_t *p,
                                      const plan_t *plan, char *workspace, int64_t workspace_bytes)
{
    ATTN_TRY(attn_kda_check_values(p));
    if (plan->tile[TILE_FORM] == FORM_REF) {
        attn_kda_ref_run(p, attn_threads(p->threads, p->h * p->t));
        return ATTN_OK;
    }
    const kernel_t *kernel = table->kda_fwd[p->dtype];
    struct layout l = lay_out(p, plan, kernel);
    ATTN_CHECK(workspace_bytes >= l.bytes, ATTN_E_WORKSPACE,
               "workspace: expected %lld bytes, got %lld", (long long)l.bytes,
               (long long)workspace_bytes);
    struct call c = {
        .p = p,
        .plan = plan,
        .kernel = kernel,
        .cut = make_cut(p, kernel),
        .checkpoints = (int64_t *)(void *)workspace,
        .done = (atomic_int *)(void *)(workspace + l.done),
        .scratch = workspace + l.scratch,
        .states = workspace + l.states,
        .records = workspace + l.records,
        .record_bytes = record_bytes(kernel, p->d),
        .slices = p->d / kernel->slice,
    };
    int64_t chunks = 0, longest = 0, checkpoint = 0;
    for (int64_t i = 0; i < p->n; ++i) {
        int64_t len = attn_kda_seq(p, i).len, count = cut_count(&c.cut, len);
        chunks += count * p->h;
        longest = max64(longest, count);
        if (!p->checkpoint_every) continue;
        c.checkpoints[i] = checkpoint;
        checkpoint += len / p->checkpoint_every;
    }
    int threads = attn_threads(p->threads, INT64_MAX); /* fewer than planned after a fork */
    c.threads = (int)min64(threads, plan->tile[TILE_THREADS]);
    if (plan->tile[TILE_WAVE] && c.threads > 1 && uneven(&c, chunks, longest))
        run_waves(&c, longest);
    else
        run_whole(&c, longest);
    return ATTN_OK;
}

/* ---- kda_step -------------------------------------------------------------------------------- */

enum { STEP_RUN = 4, STEP_TASKS = 8 }; /* heads a task, if that leaves so many tasks a thread */

struct step_call {
    const problem_t *p;
    const struct attn_kda_step_kernel *kernel;
    int64_t blocks; /* a head's state is cut into */
    int64_t run;    /* heads of a task: what it fetches ahead is mostly its own */
};

static void zero_out(const problem_t *p, const struct attn_kda_seq *s, int64_t h)
{
    int64_t bytes = attn_dtype_bytes(p->dtype);
    for (int64_t t = s->start; t < s->start + s->len; ++t)
        memset(p->out.data + bytes * (s->row * p->out.batch + t * p->out.row + h * p->out.head), 0,
               (size_t)(bytes * p->d));
}

/* A block of rows of the state of unit u, a (sequence, head). */
static void step_block(const struct step_call *c, int64_t u, int64_t block)
{
    const problem_t *p = c->p;
    int64_t h = u % p->h;
    int64_t rows = p->d / c->blocks, v0 = block * rows, bytes = attn_dtype_bytes(p->dtype);
    struct attn_kda_seq s = attn_kda_seq(p, u / p->h);
    if (s.len == 0) return;
    if (s.slot < 0) {
        if (block == 0) zero_out(p, &s, h);
        return;
    }
    struct attn_kda_step_task x = {
        .tokens = tokens_at(p, &s, h, 0, s.len),
        .rows = (int32_t)rows,
        .v = p->v.data + bytes * (s.row * p->v.batch + s.start * p->v.row + h * p->v.head + v0),
        .out = p->out.data +
               bytes * (s.row * p->out.batch + s.start * p->out.row + h * p->out.head + v0),
        .state = attn_kda_state(&p->initial, s.slot, h, v0, p->d),
        .v_row = bytes * p->v.row,
        .out_row = bytes * p->out.row,
        .scale = (float)p->scale,
        .state_dtype = p->initial.dtype,
    };
    c->kernel->run(&x);
}

static void step_task(void *context, int64_t task, int thread)
{
    (void)thread;
    const struct step_call *c = context;
    int64_t u = task / c->blocks * c->run, end = min64(u + c->run, c->p->n * c->p->h);
    for (; u < end; ++u) step_block(c, u, task % c->blocks);
}

attn_status attn_kda_step_cpu_run_with(const struct attn_cpu_kernels *table, const problem_t *p)
{
    ATTN_TRY(attn_kda_check_values(p));
    struct step_call c = {.p = p, .kernel = table->kda_step[p->dtype], .blocks = 1, .run = 1};
    int64_t units = p->n * p->h, most = p->d / 16;
    if (attn_log_on())
        attn_log("%s n %lld h %lld d %lld", c.kernel ? c.kernel->name : "attn_kda_fwd_ref",
                 (long long)p->n, (long long)p->h, (long long)p->d);
    if (!c.kernel) {
        attn_kda_ref_run(p, attn_threads(p->threads, p->h * p->t));
        return ATTN_OK;
    }
    int threads = attn_threads(p->threads, units * most);
    while (c.blocks < most && units * c.blocks < 4 * threads) c.blocks *= 2;
    if (units >= STEP_TASKS * STEP_RUN * threads) c.run = STEP_RUN;
    attn_parallel(threads, ceil_div(units, c.run) * c.blocks, step_task, &c);
    return ATTN_OK;
}

attn_status attn_kda_fwd_cpu_plan(const problem_t *p, plan_t *plan)
{
    return attn_kda_fwd_cpu_plan_with(attn_cpu_kernels(), p, plan);
}

attn_status attn_kda_fwd_cpu_run(const problem_t *p, const plan_t *plan, char *workspace,
                                 int64_t workspace_bytes, void *stream)
{
    (void)stream;
    return attn_kda_fwd_cpu_run_with(attn_cpu_kernels(), p, plan, workspace, workspace_bytes);
}

attn_status attn_kda_step_cpu_run(const problem_t *p, void *stream)
{
    (void)stream;
    return attn_kda_step_cpu_run_with(attn_cpu_kernels(), p);
}
