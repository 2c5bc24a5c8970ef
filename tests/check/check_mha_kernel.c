/* SPDX-License-Identifier: MIT
 *
 * Kernels of mha_fwd and mha_decode alone: random tasks, straight through the contract of
 * cpu/kernels.h.  Keys outside [k_begin, k_end), keys that no row sees, unused pages and padding
 * hold NaN, table entries that must not be read are wild, scratch is exactly as large as asked for
 * and starts as garbage; and each row computed alone must have the bits it has in company.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check_attention.h"
#include "cpu/threads.h"

struct task_case {
    const struct attn_mha_kernel *kernel;
    struct attn_mha_task task;
    enum attn_dtype dtype, out_dtype;
    int64_t keys; /* the sequence's; k_end may be less */
    char *scratch;
    struct check_buffer q, qv, k, v, out, lse, scratch_buffer, packed;
    int64_t k_row, v_row, k_head, v_head, k_page, v_page;
    int32_t *pages;
    int64_t page, page_count;
};

static int32_t *offsets32(int64_t n) { return check_scratch((size_t)n * sizeof(int32_t)); }

static int64_t *offsets64(int64_t n) { return check_scratch((size_t)n * sizeof(int64_t)); }

/* Row offsets 0, step, 2 step, ... in random order. */
static int64_t *shuffled(struct check_random *r, int64_t n, int64_t step)
{
    int64_t *at = offsets64(n);
    for (int64_t i = 0; i < n; ++i) at[i] = i * step;
    for (int64_t i = n - 1; i > 0; --i) {
        int64_t j = random_range(r, 0, i), x = at[i];
        at[i] = at[j];
        at[j] = x;
    }
    return at;
}

/* [lo, hi) of every row: all keys, a causal edge, a window, anything; empty ones among them. */
static void make_intervals(struct check_random *r, struct attn_mha_task *t, int64_t keys)
{
    int32_t *lo = offsets32(t->rows), *hi = offsets32(t->rows);
    int64_t kind = random_range(r, 0, 4), group = random_range(r, 1, 4);
    int64_t edge = random_range(r, -3, keys), left = random_edge(r, keys);
    for (int64_t i = 0; i < t->rows; ++i) {
        int64_t a = 0, b = keys;
        if (kind == 1 || kind == 2) b = edge + i / group;
        if (kind == 2) a = b - left;
        if (kind == 3) {
            a = random_edge(r, keys);
            b = random_edge(r, keys);
        }
        a = a < 0 ? 0 : a;
        b = b > keys ? keys : b;
        bool none = a >= b || random_percent(r, 3);
        lo[i] = none ? 0 : (int32_t)a;
        hi[i] = none ? 0 : (int32_t)b;
    }
    t->lo = lo;
    t->hi = hi;
}

/* Address of key j in k or v, by this file's own arithmetic. */
static char *key_at(const struct task_case *c, bool value, int64_t head, int64_t j)
{
    int64_t x = c->task.kv.first + j, page = 0;
    if (c->pages) {
        page = c->pages[x / c->page];
        x %= c->page;
    }
    return value ? c->v.data + page * c->v_page + x * c->v_row + head * c->v_head
                 : c->k.data + page * c->k_page + x * c->k_row + head * c->k_head;
}

static bool seen(const struct attn_mha_task *t, int64_t i, int64_t j)
{
    return j >= t->lo[i] && j < t->hi[i] && j >= t->k_begin && j < t->k_end;
}

/* The keys from the first to the last that some row sees; the cache holds NaN elsewhere. */
static void hull(const struct attn_mha_task *t, int64_t *low, int64_t *high)
{
    *low = t->k_end;
    *high = t->k_begin;
    for (int64_t i = 0; i < t->rows; ++i) {
        int64_t a = t->lo[i] > t->k_begin ? t->lo[i] : t->k_begin;
        int64_t b = t->hi[i] < t->k_end ? t->hi[i] : t->k_end;
        if (a >= b) continue;
        *low = a < *low ? a : *low;
        *high = b > *high ? b : *high;
    }
}

/* A cache of positions x heads, heads inside or outside; NaN but for what some row sees. */
static void make_cache(struct check_random *r, struct task_case *c)
{
    struct attn_mha_task *t = &c->task;
    int64_t bytes = attn_dtype_bytes(c->dtype), first = t->kv.first;
    int64_t positions = first + c->keys, count = positions;
    bool paged = random_percent(r, 40), head_major = random_percent(r, 30);
    if (paged) {
        c->page = PICK(r, 1, 2, 3, 7, 16, 24, 64, 100, 256);
        c->page_count = (positions + c->page - 1) / c->page;
        int64_t stored = c->page_count + random_range(r, 1, 3);
        int64_t *order = shuffled(r, stored, 1);
        c->pages = offsets32(c->page_count + 1);
        for (int64_t i = 0; i <= c->page_count; ++i) c->pages[i] = (int32_t)PICK(r, -7, INT32_MAX);
        int64_t from = (first + t->k_begin) / c->page, to = first + t->k_end;
        for (int64_t i = from; i * c->page < to; ++i) c->pages[i] = (int32_t)order[i];
        count = stored * c->page;
    }
    int64_t pad = PICK(r, 0, 0, 8, 24), widths[2] = {t->d_qk + pad, t->d_v + pad};
    struct check_buffer *buffers[2] = {&c->k, &c->v};
    int64_t *row[2] = {&c->k_row, &c->v_row}, *head[2] = {&c->k_head, &c->v_head};
    int64_t *page[2] = {&c->k_page, &c->v_page};
    for (int side = 0; side < 2; ++side) {
        int64_t w = widths[side], in_page = paged ? c->page : count;
        *buffers[side] = check_buffer((size_t)(count * t->heads * w * bytes), (size_t)bytes);
        check_fill_nan(c->dtype, buffers[side]->data, count * t->heads * w);
        *row[side] = (head_major ? w : t->heads * w) * bytes;
        *head[side] = (head_major ? in_page * w : w) * bytes;
        *page[side] = in_page * t->heads * w * bytes;
    }
    int64_t low, high;
    hull(t, &low, &high);
    for (int64_t j = low; j < high; ++j) {
        for (int64_t h = 0; h < t->heads; ++h) {
            check_fill_normal(r, c->dtype, key_at(c, false, h, j), t->d_qk, 1);
            check_fill_normal(r, c->dtype, key_at(c, true, h, j), t->d_v, 1);
        }
    }
    t->kv.k = c->k.data;
    t->kv.v = c->v.data;
    t->kv.k_row = c->k_row;
    t->kv.v_row = c->v_row;
    t->kv.k_head = c->k_head;
    t->kv.v_head = c->v_head;
    t->kv.k_page = paged ? c->k_page : 0;
    t->kv.v_page = paged ? c->v_page : 0;
    t->kv.pages = c->pages;
    t->kv.page = c->page;
}

/* Rows of q in random order and with gaps, [heads][rows] or interleaved. */
static void make_rows(struct check_random *r, struct task_case *c, bool qv)
{
    struct attn_mha_task *t = &c->task;
    int64_t bytes = attn_dtype_bytes(c->dtype),
            out_bytes = t->partial ? 4 : attn_dtype_bytes(c->out_dtype);
    int64_t pad = PICK(r, 0, 0, 8), q_step = (t->d_qk + pad) * bytes;
    int64_t v_step = (t->d_v + pad) * bytes, out_step = (t->d_v + pad) * out_bytes;
    int64_t n = (int64_t)t->rows * t->heads;
    c->q = check_buffer((size_t)(n * q_step), (size_t)bytes);
    check_fill_normal(r, c->dtype, c->q.data, n * (t->d_qk + pad), 1);
    t->q = c->q.data;
    t->q_row = shuffled(r, t->rows, q_step);
    t->q_head = t->rows * q_step;
    if (qv) {
        c->qv = check_buffer((size_t)(n * v_step), (size_t)bytes);
        check_fill_normal(r, c->dtype, c->qv.data, n * (t->d_v + pad), 0.5f);
        t->qv = c->qv.data;
        t->qv_row = shuffled(r, t->rows, v_step);
        t->qv_head = t->rows * v_step;
    }
    c->out = check_buffer((size_t)(n * out_step), (size_t)out_bytes);
    c->lse = check_buffer((size_t)n * 4, 4);
    t->out = c->out.data;
    t->lse = (float *)c->lse.data;
    t->out_row = shuffled(r, t->rows, out_step);
    t->out_head = t->rows * out_step;
    t->lse_row = shuffled(r, t->rows, 1);
    t->lse_head = t->rows;
}

static void make_scalars(struct check_random *r, struct task_case *c)
{
    struct attn_mha_task *t = &c->task;
    float *score_scale = check_scratch((size_t)t->heads * sizeof(float));
    float *out_scale = check_scratch((size_t)t->heads * sizeof(float));
    float scale = (float)(pow((double)(t->d_qk + (t->qv ? t->d_v : 0)), -0.5) *
                          (double)PICK(r, 1, 1, 1, 3, 40, -1, 0));
    for (int64_t h = 0; h < t->heads; ++h) {
        score_scale[h] = scale * (c->dtype == ATTN_F8 ? (float)random_range(r, 1, 8) / 4 : 1);
        out_scale[h] = c->dtype == ATTN_F8 ? (float)random_range(r, 1, 8) / 4 : 1;
    }
    t->score_scale = score_scale;
    t->out_scale = out_scale;
    t->softcap = random_percent(r, 25) ? (float)PICK(r, 1, 5, 30, 50) : 0;
    if (!t->partial && random_percent(r, 25)) {
        float *sinks = check_scratch((size_t)(t->heads * t->rows) * sizeof(float));
        for (int64_t i = 0; i < (int64_t)t->heads * t->rows; ++i)
            sinks[i] = (float)random_normal(r);
        t->sinks = sinks;
    }
}

static void make_case(struct check_random *r, const struct attn_mha_kernel *kernel,
                      enum attn_dtype dtype, struct task_case *c)
{
    memset(c, 0, sizeof *c);
    struct attn_mha_task *t = &c->task;
    int64_t unit = dtype == ATTN_F8 ? 16 : 8;
    c->kernel = kernel;
    c->dtype = dtype;
    t->d_qk = (int32_t)(random_percent(r, 60) ? PICK(r, 64, 128)
                                              : unit * random_range(r, 1, 512 / unit));
    t->d_v = (int32_t)(random_percent(r, 70) ? t->d_qk : unit * random_range(r, 1, 512 / unit));
    t->rows = (int32_t)(1 + random_edge(r, kernel->rows_max - 1));
    t->heads = kernel->decode ? (int32_t)random_range(r, 1, 5) : 1;
    t->partial = random_percent(r, 25);
    c->out_dtype = t->partial ? ATTN_F32 : attn_dtype_out(dtype);
    bool qv = dtype != ATTN_F8 && random_percent(r, 15);

    t->kv.first = random_percent(r, 30) ? random_range(r, 0, 70) : 0;
    c->keys = random_edge(r, 3 * kernel->n + 20);
    t->k_begin = random_percent(r, 30) ? random_range(r, 0, c->keys / kernel->n) * kernel->n : 0;
    t->k_end = random_percent(r, 60) ? c->keys : random_range(r, t->k_begin, c->keys);
    make_intervals(r, t, c->keys);
    make_cache(r, c);
    make_rows(r, c, qv);
    make_scalars(r, c);

    int64_t d_s = t->d_qk + (qv ? t->d_v : 0);
    int64_t bytes = kernel->scratch_bytes(d_s, t->d_v, t->rows, t->heads);
    c->scratch_buffer = check_buffer((size_t)bytes, 64);
    c->scratch = c->scratch_buffer.data;
    memset(c->scratch, 0xff, (size_t)bytes);
    if (kernel->pack) {
        int64_t block = kernel->pack_bytes(d_s, t->d_v),
                blocks = (t->k_end + kernel->n - 1) / kernel->n;
        c->packed = check_buffer((size_t)(block * blocks), 64);
        memset(c->packed.data, 0xff, (size_t)(block * blocks));
        t->packed = c->packed.data;
    }
}

static void run_task(void *context)
{
    struct task_case *c = context;
    struct attn_mha_task *t = &c->task;
    uint32_t state = attn_fp_enter();
    if (c->kernel->pack) {
        int64_t block = c->kernel->pack_bytes(t->d_qk + (t->qv ? t->d_v : 0), t->d_v);
        int64_t low, high, n = c->kernel->n;
        hull(t, &low, &high);
        for (int64_t j = t->k_begin; j < t->k_end; j += n)
            c->kernel->pack(&t->kv, t->d_qk, t->d_v, t->qv != NULL, j, low, high,
                            c->packed.data + j / n * block);
    }
    c->kernel->run(t, c->scratch);
    attn_fp_leave(state);
}

/* Expected rows, [heads][rows]. */
static struct attention_expect expect(const struct task_case *c)
{
    const struct attn_mha_task *t = &c->task;
    int64_t n = t->k_end - t->k_begin;
    struct attention_expect e = attention_expect(c->dtype, c->out_dtype,
                                                 (int64_t)t->heads * t->rows, t->d_v);
    struct rows64 k = rows64_make(n, t->d_qk), v = rows64_make(n, t->d_v);
    struct rows64 q = rows64_make(1, t->d_qk), qv = rows64_make(1, t->d_v);
    int32_t *visible = offsets32(n);
    int64_t low, high;
    hull(t, &low, &high);
    for (int64_t h = 0; h < t->heads; ++h) {
        for (int64_t j = low; j < high; ++j) {
            rows64_set(&k, j - t->k_begin, c->dtype, key_at(c, false, h, j));
            rows64_set(&v, j - t->k_begin, c->dtype, key_at(c, true, h, j));
        }
        for (int64_t i = 0; i < t->rows; ++i) {
            double sink = t->sinks ? t->sinks[h * t->rows + i] : 0;
            rows64_set(&q, 0, c->dtype, t->q + h * t->q_head + t->q_row[i]);
            if (t->qv) rows64_set(&qv, 0, c->dtype, t->qv + h * t->qv_head + t->qv_row[i]);
            struct attention_row row = {
                .q = q.x,
                .q_norm = q.norm[0],
                .qv = t->qv ? qv.x : NULL,
                .qv_norm = qv.norm[0],
                .k = &k,
                .v = &v,
                .keys = visible,
                .scale = t->score_scale[h],
                .softcap = t->softcap,
                .out_scale = t->out_scale[h],
                .sink = t->sinks ? &sink : NULL,
            };
            for (int64_t j = 0; j < n; ++j)
                if (seen(t, i, t->k_begin + j)) visible[row.n++] = (int32_t)j;
            attention_expect_row(&e, h * t->rows + i, &row);
        }
    }
    return e;
}

static void describe(const struct task_case *c, char text[256])
{
    const struct attn_mha_task *t = &c->task;
    snprintf(text, 256,
             "rows %d heads %d d %d/%d keys [%d, %d) of %d first %d page %d%s%s%s%s scale %g",
             t->rows, t->heads, t->d_qk, t->d_v, (int)t->k_begin, (int)t->k_end, (int)c->keys,
             (int)t->kv.first, (int)c->page, t->qv ? " qv" : "", t->softcap > 0 ? " softcap" : "",
             t->sinks ? " sinks" : "", t->partial ? " partial" : "", (double)t->score_scale[0]);
}

/* The bytes of row i of head h in `out`. */
static const char *out_at(const struct task_case *c, int64_t h, int64_t i)
{
    return c->out.data + h * c->task.out_head + c->task.out_row[i];
}

static bool check_results(struct check_test *test, const struct task_case *c,
                          const struct attention_expect *e)
{
    const struct attn_mha_task *t = &c->task;
    char why[160], what[256];
    describe(c, what);
    for (int64_t h = 0; h < t->heads; ++h) {
        for (int64_t i = 0; i < t->rows; ++i) {
            float lse = t->lse[h * t->lse_head + t->lse_row[i]];
            if (attention_matches(e, h * t->rows + i, out_at(c, h, i), lse, why)) continue;
            check_fail(test, "%s: head %d row %d sees [%d, %d): %s", what, (int)h, (int)i, t->lo[i],
                       t->hi[i], why);
            return false;
        }
    }
    /* What is between the rows is still the canary. */
    int64_t bytes = t->d_v * attn_dtype_bytes(c->out_dtype);
    char *copy = check_scratch(c->out.bytes);
    memcpy(copy, c->out.data, c->out.bytes);
    for (int64_t h = 0; h < t->heads; ++h)
        for (int64_t i = 0; i < t->rows; ++i)
            memset(copy + (out_at(c, h, i) - c->out.data), CHECK_CANARY, (size_t)bytes);
    bool clean = true;
    for (size_t i = 0; i < c->out.bytes; ++i)
        clean = clean && (unsigned char)copy[i] == CHECK_CANARY;
    if (!clean || !check_buffer_intact(&c->out) || !check_buffer_intact(&c->lse))
        check_fail(test, "%s: bytes beside the out or lse rows were written", what);
    if (!check_buffer_intact(&c->scratch_buffer) ||
        (c->kernel->pack && !check_buffer_intact(&c->packed)))
        check_fail(test, "%s: bytes beside the scratch or packed blocks were written", what);
    return clean;
}

/* One row, or one head, alone: the bits it had in company. */
static void check_alone(struct check_test *test, struct check_random *r, struct task_case *c)
{
    struct attn_mha_task whole = c->task;
    int64_t bytes = whole.d_v * attn_dtype_bytes(c->out_dtype);
    int64_t h = random_range(r, 0, whole.heads - 1), i = random_range(r, 0, whole.rows - 1);
    int64_t rows = random_range(r, 1, whole.rows - i), kept = random_percent(r, 50) ? 1 : rows;
    char *out = check_scratch((size_t)(bytes * kept));
    float *lse = check_scratch((size_t)kept * sizeof *lse);
    for (int64_t a = 0; a < kept; ++a) {
        memcpy(out + a * bytes, out_at(c, h, i + a), (size_t)bytes);
        lse[a] = whole.lse[h * whole.lse_head + whole.lse_row[i + a]];
    }
    struct attn_mha_task *t = &c->task;
    t->rows = (int32_t)kept;
    t->heads = 1;
    t->q += h * t->q_head;
    if (t->qv) t->qv += h * t->qv_head;
    t->kv.k += h * t->kv.k_head;
    t->kv.v += h * t->kv.v_head;
    t->out += h * t->out_head;
    t->lse += h * t->lse_head;
    t->q_row += i;
    t->qv_row += t->qv ? i : 0;
    t->out_row += i;
    t->lse_row += i;
    t->lo += i;
    t->hi += i;
    t->score_scale += h;
    t->out_scale += h;
    if (t->sinks) t->sinks += h * whole.rows + i;
    memset(c->out.data, CHECK_CANARY, c->out.bytes);
    memset(c->scratch, 0x7f, c->scratch_buffer.bytes);
    char what[256];
    struct task_case company = {.task = whole, .keys = c->keys, .page = c->page};
    describe(&company, what);
    if (!check_guarded(test, run_task, c)) return;
    for (int64_t a = 0; a < kept; ++a) {
        const char *now = t->out + t->out_row[a];
        if (memcmp(now, out + a * bytes, (size_t)bytes) == 0 &&
            memcmp(&t->lse[t->lse_row[a]], &lse[a], 4) == 0)
            continue;
        check_fail(test, "%s: head %d row %d has other bits among %d rows of one head", what,
                   (int)h, (int)(i + a), (int)kept);
        return;
    }
}

static void spoil(struct check_random *r, struct task_case *c, const struct attention_expect *e)
{
    const struct attn_mha_task *t = &c->task;
    int64_t h = random_range(r, 0, t->heads - 1), i = random_range(r, 0, t->rows - 1);
    char *row = c->out.data + h * t->out_head + t->out_row[i];
    float x = attn_load(c->out_dtype, row, 0);
    attn_store(c->out_dtype, row, 0, x + 1 + 0.1f * (float)e->row[h * t->rows + i].magnitude);
}

static void check_kernel(struct check_test *test, const struct attn_mha_kernel *kernel,
                         enum attn_dtype dtype, int rounds)
{
    for (int64_t i = 0; i < rounds; ++i) {
        if (check_options.only_case >= 0 && check_options.only_case != i) continue;
        struct check_random r = check_case_random(test, i);
        struct task_case c;
        check_pool_reset();
        make_case(&r, kernel, dtype, &c);
        struct attention_expect e = expect(&c);
        test->cases += 1;
        if (!check_guarded(test, run_task, &c)) continue;
        if (check_options.broken) spoil(&r, &c, &e);
        if (check_results(test, &c, &e) && c.packed.bytes < ((size_t)8 << 20))
            check_alone(test, &r, &c);
    }
}

void check_mha_kernel(void)
{
    const struct check_rung *rungs;
    int n = check_rungs(&rungs);
    for (int i = 0; i < n; ++i) {
        for (int dtype = 0; dtype < ATTN_DTYPES; ++dtype) {
            const struct attn_cpu_kernels *t = &rungs[i].table,
                                          *below = i ? &rungs[i - 1].table : t;
            const struct {
                const char *what;
                const struct attn_mha_kernel *now, *before;
            } slots[] = {{"mha_fwd", t->mha_fwd[dtype], below->mha_fwd[dtype]},
                         {"mha_fwd_short", t->mha_fwd_short[dtype], below->mha_fwd_short[dtype]},
                         {"mha_decode", t->mha_decode[dtype], below->mha_decode[dtype]}};
            for (size_t s = 0; s < sizeof slots / sizeof *slots; ++s) {
                const struct attn_mha_kernel *k = slots[s].now;
                struct check_test test;
                bool twice = k == slots[s].before || (s == 1 && k == t->mha_fwd[dtype]);
                if (!k || twice) continue;
                if (check_options.kernel && !strstr(k->name, check_options.kernel)) continue;
                if (!check_open(&test, "mha_kernel", rungs[i].name,
                                attn_dtype_name((enum attn_dtype)dtype), "%s as %s", k->name,
                                slots[s].what))
                    continue;
                check_kernel(&test, k, (enum attn_dtype)dtype, check_rounds(100));
                check_close(&test);
            }
        }
    }
}
