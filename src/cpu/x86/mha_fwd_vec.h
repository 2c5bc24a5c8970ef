/* SPDX-License-Identifier: MIT
 *
 * mha_fwd on fp32 FMA for all four element types, written once over the vec_ abstraction.
 * mha_fwd_avx512.c and mha_fwd_avx2.c include a vec_<isa>.h and then this file.
 *
 * Math.  For query row r and its visible keys lo[r] <= j < hi[r], block by block of N keys:
 *
 *   t_j = (q_r . k_j + qv_r . v_j) * score_scale * log2 e                 scores in base 2
 *         or softcap * log2 e * tanh(q.k * score_scale / softcap)
 *   p_j = 2^(t_j - m),  l = sum p_j,  o = sum p_j v_j                      fp32 throughout
 *
 * m is a reference, not the maximum: it moves up to a block's maximum only when that exceeds it by
 * more than SLACK (then l and o are multiplied by 2^(m_old - m)), so p stays below 2^SLACK and most
 * blocks rescale nothing.  In the end out = o * out_scale / l and lse = ln l + m ln 2.  Hidden
 * scores are -inf, their p is exactly 0.  A row that sees no key, or only scores of -inf, keeps
 * m = -inf and l = 0: out 0, lse -inf or the sink.  A weight below 2^-126 is 0, so an infinite v_j
 * under it gives NaN where exact arithmetic gives inf.
 *
 * Layout.  S^T = K Q^T and O^T = V^T P^T: keys run down, queries across, a lane is a query.  So
 * maximum, sum, rescaling and mask are vertical operations, and lanes never mix: a row's bits do
 * not depend on its neighbours.  Query rows come in groups of up to 3 vectors (48 or 24 rows):
 *
 *             columns: rows of the group
 *             |<- lanes ->|<- lanes ->|<- lanes ->|
 *   q   [d_s] |   q^T, scaled                     |     s [N]  | S^T, then P^T in place           |
 *   o   [d_v] |   O^T                             |     m l lo hi, one each a lane
 *
 *   k [N]               | k_j (with qv: k_j, v_j) | pad |   fp32 rows of one key block
 *   v [d_v / A_ROWS][N] | A_ROWS elements of v_j |          its V in panels, a pad after each
 *
 * A tile of O^T walks down one panel of V: contiguous, where a column of rows would touch a line a
 * key.  Pads keep rows and panels off multiples of 4 KB, where all would share a few sets of L1.
 * With qv the scores are [k | v] against [q | qv].
 *
 * Both products are one micro-kernel, C[A_ROWS][columns] (+)= A[A_ROWS][depth] B[depth][columns],
 * A by broadcasts and C in registers (8 x 3 zmm or 4 x 3 ymm accumulators).
 *
 * Order.      for each key block             convert what any group sees of it, a few %
 *               for each group that sees it    S^T;  mask, softcap, maximum;  P^T, l;  O^T
 *             for each group                   transpose back, scale, round, store
 *
 * A group's q (24 KB at d_s 128) stays in L1 while S^T is made, its P^T while O^T is; the block
 * streams from L2.  Rows of K and V often lie a page apart, so reading them costs more than
 * converting them: hence many rows a task.  Prefetching the next block made it slower.
 */
#ifndef ATTN_CPU_X86_MHA_FWD_VEC_H
#define ATTN_CPU_X86_MHA_FWD_VEC_H

#include <float.h>
#include <math.h>

#include "cpu/kernels.h"

enum {
    N = 128,                  /* keys of a block */
    COLS = 3,                 /* most vectors across a group */
    GROUP = COLS * VEC_LANES, /* most rows of a group */
    ROWS_MAX = 384,
    GROUPS_MAX = ROWS_MAX / GROUP,
    DEPTH = 256,               /* of S^T's product at a time: this much q stays in L1 */
    LINE = 16,                 /* floats of a cache line */
    A_ROWS = VEC_LANES / 2,    /* rows of the micro-kernel */
    PANEL = N * A_ROWS + LINE, /* floats of a panel of V */
};

#define SLACK 8.0f
#define LOG2E 0x1.715476p+0f
#define LN2 0x1.62e430p-1f

/* Up to GROUP query rows.  Arrays of [width] have one element a row, padding included. */
struct group {
    int32_t rows, cols;     /* live rows; vectors across, width = cols * VEC_LANES */
    int32_t lo_min, hi_max; /* keys lo_min <= j < hi_max are seen by some row, */
    int32_t lo_max, hi_min; /* lo_max <= j < hi_min by every row */
    float *q, *o;           /* [d_s][width], [d_v][width] */
    float *m, *l;           /* [width] */
    int32_t *lo, *hi;       /* [width] */
};

/* The block's keys that a group, or any group, sees: rows begin <= i < end, multiples of A_ROWS. */
struct span {
    int32_t begin, end;
};

struct forward {
    const struct attn_mha_task *task;
    int64_t d_s, k_stride; /* width of a score's product; floats from one k to the next */
    float cap;             /* softcap * log2 e; 0: off */
    float *k, *v, *s;      /* [N][k_stride], [d_v / A_ROWS][PANEL], [N][width] */
    int32_t j0;            /* the block's first key */
    bool poisoned;         /* some V of the block is infinite or NaN */
    int32_t groups;
    struct group group[GROUPS_MAX];
};

static int64_t odd_lines(int64_t floats) { return ((floats + LINE - 1) / LINE | 1) * LINE; }

static int64_t fwd_scratch_bytes(int64_t d_s, int64_t d_v, int64_t rows, int64_t heads)
{
    (void)heads;
    int64_t width = (rows + VEC_LANES - 1) / VEC_LANES * VEC_LANES;
    int64_t block = N * odd_lines(d_s) + d_v / A_ROWS * PANEL;
    int64_t floats = block + N * GROUP + width * (d_s + d_v + 4);
    return floats * (int64_t)sizeof(float);
}

/* C[A_ROWS][cols] = or += A B.  A[r][k] is a[r * a_row + k * a_step], B and C have cols vectors a
 * row.  cols, accumulate and one of a's strides are constants where this is called, and the
 * accumulators stay in registers. */
VEC_INLINE void product(const float *a, int64_t a_row, int64_t a_step, const float *b,
                        int64_t depth, float *c, int cols, bool accumulate)
{
    vec acc[A_ROWS][COLS];
    VEC_UNROLL
    for (int r = 0; r < A_ROWS; r++) VEC_UNROLL
    for (int x = 0; x < cols; x++)
        acc[r][x] = accumulate ? vec_load(c + (r * cols + x) * VEC_LANES) : vec_zero();

    for (int64_t k = 0; k < depth; k++) {
        vec bk[COLS];
        VEC_UNROLL
        for (int x = 0; x < cols; x++) bk[x] = vec_load(b + x * VEC_LANES);
        VEC_UNROLL
        for (int r = 0; r < A_ROWS; r++) {
            vec ark = vec_set1(a[r * a_row]);
            VEC_UNROLL
            for (int x = 0; x < cols; x++) acc[r][x] = vec_fma(ark, bk[x], acc[r][x]);
        }
        a += a_step;
        b += cols * VEC_LANES;
    }

    VEC_UNROLL
    for (int r = 0; r < A_ROWS; r++) VEC_UNROLL
    for (int x = 0; x < cols; x++) vec_store(c + (r * cols + x) * VEC_LANES, acc[r][x]);
}

/* S^T rows of the span = K Q^T. */
VEC_INLINE void scores(const struct forward *f, const struct group *g, struct span w, int cols)
{
    for (int64_t k = 0; k < f->d_s; k += DEPTH) {
        int64_t depth = f->d_s - k < DEPTH ? f->d_s - k : DEPTH;
        const float *q = g->q + k * cols * VEC_LANES;
        for (int32_t j = w.begin; j < w.end; j += A_ROWS) {
            const float *keys = f->k + j * f->k_stride + k;
            float *s = f->s + j * cols * VEC_LANES;
            if (k == 0)
                product(keys, f->k_stride, 1, q, depth, s, cols, false);
            else
                product(keys, f->k_stride, 1, q, depth, s, cols, true);
        }
    }
}

/* O^T += V^T P^T over the span. */
VEC_INLINE void values(const struct forward *f, const struct group *g, struct span w, int cols)
{
    const float *v = f->v + w.begin * A_ROWS, *p = f->s + w.begin * cols * VEC_LANES;
    float *o = g->o;
    for (int32_t i = 0; i < f->task->d_v; i += A_ROWS) {
        product(v, 1, A_ROWS, p, w.end - w.begin, o, cols, true);
        v += PANEL;
        o += A_ROWS * cols * VEC_LANES;
    }
}

/* The same where hidden keys' V may not be touched, since 0 * NaN is NaN: same bits, slowly. */
static void values_poisoned(const struct forward *f, const struct group *g, struct span w)
{
    int width = g->cols * VEC_LANES;
    for (int x = 0; x < width; x += VEC_LANES) {
        vec_int lo = vec_int_load(g->lo + x), hi = vec_int_load(g->hi + x);
        for (int32_t i = 0; i < f->task->d_v; i++) {
            const float *v = f->v + i / A_ROWS * PANEL + i % A_ROWS;
            vec o = vec_load(g->o + i * width + x);
            for (int32_t j = w.begin; j < w.end; j++) {
                vec sum = vec_fma(vec_set1(v[j * A_ROWS]), vec_load(f->s + j * width + x), o);
                o = vec_select(vec_within(f->j0 + j, lo, hi), sum, o);
            }
            vec_store(g->o + i * width + x, o);
        }
    }
}

/* Masks and caps one vector column of S^T where asked to, and returns its maximum; NaN is passed
 * over.  s, lo and hi point at the column. */
VEC_INLINE vec column_max(const struct forward *f, struct span w, float *s, int width,
                          const int32_t *lo, const int32_t *hi, bool cap, bool edge)
{
    const vec hidden = vec_set1(-INFINITY), scale = vec_set1(f->cap);
    vec_int first = vec_int_load(lo), last = vec_int_load(hi);
    vec max[4] = {hidden, hidden, hidden, hidden};
    for (int32_t j = w.begin; j < w.end; j += 4) VEC_UNROLL
    for (int u = 0; u < 4; u++) {
        float *at = s + (j + u) * width;
        vec t = vec_load(at);
        if (cap) t = vec_mul(scale, vec_tanh(t));
        if (edge) t = vec_select(vec_within(f->j0 + j + u, first, last), t, hidden);
        if (cap || edge) vec_store(at, t);
        max[u] = vec_max(t, max[u]);
    }
    return vec_max(vec_max(max[0], max[1]), vec_max(max[2], max[3]));
}

/* Turns one vector column of S^T into P^T = 2^(S^T - m) and returns its sum.  Four partial sums by
 * key modulo 4: the order does not depend on the span. */
VEC_INLINE vec column_exp(struct span w, float *s, int width, vec m)
{
    vec sum[4] = {vec_zero(), vec_zero(), vec_zero(), vec_zero()};
    for (int32_t j = w.begin; j < w.end; j += 4) VEC_UNROLL
    for (int u = 0; u < 4; u++) {
        float *at = s + (j + u) * width;
        vec p = vec_exp2(vec_sub(vec_load(at), m));
        vec_store(at, p);
        sum[u] = vec_add(sum[u], p);
    }
    return vec_add(vec_add(sum[0], sum[1]), vec_add(sum[2], sum[3]));
}

static void softmax(const struct forward *f, struct group *g, struct span w, bool edge)
{
    int width = g->cols * VEC_LANES;
    for (int x = 0; x < width; x += VEC_LANES) {
        float *s = f->s + x;
        const int32_t *lo = g->lo + x, *hi = g->hi + x;
        vec max, m_old = vec_load(g->m + x), l = vec_load(g->l + x);
        if (f->cap != 0.0f)
            max = column_max(f, w, s, width, lo, hi, true, true);
        else if (edge)
            max = column_max(f, w, s, width, lo, hi, false, true);
        else
            max = column_max(f, w, s, width, lo, hi, false, false);

        vec_mask rises = vec_gt(max, vec_add(m_old, vec_set1(SLACK)));
        vec m = vec_select(rises, max, m_old);
        if (vec_any(rises)) {
            vec shrink = vec_select(rises, vec_exp2(vec_sub(m_old, m)), vec_set1(1.0f));
            l = vec_mul(l, shrink);
            for (float *o = g->o + x; o < g->o + f->task->d_v * width; o += width)
                vec_store(o, vec_mul(vec_load(o), shrink));
            vec_store(g->m + x, m);
        }
        /* A finite reference keeps -inf - -inf and inf - inf out: p is 0 there, inf here. */
        m = vec_max(vec_set1(-FLT_MAX), vec_min(vec_set1(FLT_MAX), m));
        vec_store(g->l + x, vec_add(l, column_exp(w, s, width, m)));
    }
}

/* What group g sees of the block whose keys end before key j1. */
static struct span group_span(const struct forward *f, const struct group *g, int32_t j1)
{
    int32_t lo = g->lo_min > f->j0 ? g->lo_min : f->j0, hi = g->hi_max < j1 ? g->hi_max : j1;
    if (lo >= hi) return (struct span){0, 0};
    return (struct span){(lo - f->j0) & -A_ROWS, (hi - f->j0 + A_ROWS - 1) & -A_ROWS};
}

static void attend(const struct forward *f, struct group *g, struct span w)
{
    bool edge = g->lo_max > f->j0 + w.begin || g->hi_min < f->j0 + w.end;
    switch (g->cols) {
    case 1: scores(f, g, w, 1); break;
    case 2: scores(f, g, w, 2); break;
    default: scores(f, g, w, 3); break;
    }
    softmax(f, g, w, edge);
    switch (edge && f->poisoned ? 0 : g->cols) {
    case 0: values_poisoned(f, g, w); break;
    case 1: values(f, g, w, 1); break;
    case 2: values(f, g, w, 2); break;
    default: values(f, g, w, 3); break;
    }
}

VEC_INLINE vec load_some(enum attn_dtype t, const char *p, int32_t n)
{
    return n >= VEC_LANES ? vec_load_elem(t, p) : vec_load_part_elem(t, p, n);
}

VEC_INLINE void convert_key(enum attn_dtype t, const char *x, int32_t d, float *y)
{
    for (int32_t i = 0; i < d; i += VEC_LANES) {
        vec e = load_some(t, x + i * attn_dtype_bytes(t), d - i);
        if (d - i >= VEC_LANES)
            vec_store_f32(y + i, e);
        else
            vec_store_part_f32(y + i, e, d - i);
    }
}

/* y is the key's row of the first panel.  Returns 0 if all elements were finite, else NaN, in some
 * lane. */
VEC_INLINE vec convert_value(enum attn_dtype t, const char *x, int32_t d, float *y)
{
    vec poison = vec_zero();
    for (int32_t i = 0; i < d; i += VEC_LANES) {
        vec e = load_some(t, x + i * attn_dtype_bytes(t), d - i);
        poison = vec_fma(e, vec_zero(), poison);
        vec_store_low(y, e);
        if (d - i >= VEC_LANES) vec_store_high(y + PANEL, e);
        y += 2 * PANEL;
    }
    return poison;
}

/* Makes the block's rows of the span, those of keys from j1 on zero. */
VEC_INLINE void convert_block(struct forward *f, enum attn_dtype t, struct span w, int32_t j1)
{
    const struct attn_mha_task *task = f->task;
    const struct attn_kv_view *kv = &task->kv;
    vec poison = vec_zero();
    int32_t live = j1 - f->j0 < w.end ? j1 - f->j0 : w.end;
    for (int32_t i = w.begin; i < live; i++) {
        const char *k = kv->k + attn_kv_k_offset(kv, f->j0 + i);
        const char *v = kv->v + attn_kv_v_offset(kv, f->j0 + i);
        convert_key(t, k, task->d_qk, f->k + i * f->k_stride);
        if (task->qv) convert_key(t, v, task->d_v, f->k + i * f->k_stride + task->d_qk);
        poison = vec_add(poison, convert_value(t, v, task->d_v, f->v + i * A_ROWS));
    }
    for (int32_t i = live; i < w.end; i++) {
        memset(f->k + i * f->k_stride, 0, (size_t)f->d_s * sizeof(float));
        for (int32_t c = 0; c < task->d_v / A_ROWS; c++)
            memset(f->v + c * PANEL + i * A_ROWS, 0, A_ROWS * sizeof(float));
    }
    f->poisoned = vec_reduce_add(poison) != 0.0f;
}

/* d elements of each of up to VEC_LANES rows, scaled, become d vectors `width` floats apart. */
VEC_INLINE void pack_queries(enum attn_dtype t, const char *x, const int64_t *at, int32_t rows,
                             int32_t d, float scale, float *y, int width)
{
    for (int32_t i = 0; i < d; i += VEC_LANES) {
        int32_t n = d - i < VEC_LANES ? d - i : VEC_LANES;
        vec e[VEC_LANES];
        VEC_UNROLL
        for (int r = 0; r < VEC_LANES; r++) {
            e[r] = vec_zero();
            if (r >= rows) continue;
            e[r] = vec_mul(load_some(t, x + at[r] + i * attn_dtype_bytes(t), n), vec_set1(scale));
        }
        vec_transpose(e);
        VEC_UNROLL
        for (int k = 0; k < VEC_LANES; k++)
            if (k < n) vec_store(y + (i + k) * width, e[k]);
    }
}

/* What a row's o is multiplied by to be its output, and its lse.  Where a score or sink is +inf the
 * output is NaN; l still tells +inf from a NaN score, for lse. */
static float finish_row(const struct attn_mha_task *task, float m, float l, float sink, float *lse)
{
    float top = m > sink ? m : sink; /* a NaN sink stays */
    if (top == INFINITY) {
        *lse = l + INFINITY;
        return NAN;
    }
    float share = m == top ? 1.0f : expf(m - top);
    float sum = l * share + (sink == -INFINITY ? 0.0f : expf(sink - top));
    *lse = logf(sum) + top;
    return sum == 0.0f ? 0.0f : *task->out_scale * share / sum;
}

/* o[r] is n elements, from column i on, of row r. */
VEC_INLINE void store_rows(enum attn_dtype t, const struct attn_mha_task *task, const vec *o,
                           const int64_t *at, int32_t rows, int32_t i, int n)
{
    char *out = task->out + i * attn_dtype_bytes(t);
    VEC_UNROLL
    for (int r = 0; r < VEC_LANES; r++) {
        if (r >= rows) continue;
        if (n == VEC_LANES)
            vec_store_elem(t, out + at[r], o[r]);
        else
            vec_store_part_elem(t, out + at[r], o[r], n);
    }
}

/* Scales, transposes, rounds and stores a group; its first row is the task's row r0. */
VEC_INLINE void finish_group(const struct attn_mha_task *task, enum attn_dtype t,
                             const struct group *g, int32_t r0)
{
    int width = g->cols * VEC_LANES;
    for (int32_t r = 0; r < g->rows; r++) {
        float sink = task->sinks ? task->sinks[r0 + r] : -INFINITY;
        float *lse = task->lse + task->lse_row[r0 + r];
        g->l[r] = finish_row(task, g->m[r] * LN2, g->l[r], sink, lse);
    }
    for (int32_t x = 0; x < width; x += VEC_LANES) {
        vec share = vec_load(g->l + x);
        const int64_t *at = task->out_row + r0 + x;
        for (int32_t i = 0; i < task->d_v; i += VEC_LANES) {
            int32_t n = task->d_v - i < VEC_LANES ? task->d_v - i : VEC_LANES;
            vec o[VEC_LANES];
            VEC_UNROLL
            for (int k = 0; k < VEC_LANES; k++)
                o[k] = k < n ? vec_mul(vec_load(g->o + (i + k) * width + x), share) : vec_zero();
            vec_transpose(o);
            if (task->partial)
                store_rows(ATTN_F32, task, o, at, g->rows - x, i, n);
            else
                store_rows(attn_dtype_out(t), task, o, at, g->rows - x, i, n);
        }
    }
}

/* Lays a group out from p on, packs its queries, and returns what follows it. */
VEC_INLINE float *start_group(const struct forward *f, enum attn_dtype t, struct group *g,
                              int32_t r0, float *p)
{
    const struct attn_mha_task *task = f->task;
    int32_t left = task->rows - r0;
    g->rows = left < GROUP ? left : GROUP;
    g->cols = (g->rows + VEC_LANES - 1) / VEC_LANES;
    int width = g->cols * VEC_LANES;
    g->q = p;
    g->o = g->q + f->d_s * width;
    g->m = g->o + (int64_t)task->d_v * width;
    g->l = g->m + width;
    g->lo = (int32_t *)(void *)(g->l + width);
    g->hi = g->lo + width;

    float scale = *task->score_scale * (f->cap != 0.0f ? 1.0f / task->softcap : LOG2E);
    for (int32_t x = 0; x < width; x += VEC_LANES) {
        int32_t r = r0 + x, rows = g->rows - x;
        pack_queries(t, task->q, task->q_row + r, rows, task->d_qk, scale, g->q + x, width);
        if (task->qv)
            pack_queries(t, task->qv, task->qv_row + r, rows, task->d_v, scale,
                         g->q + (int64_t)task->d_qk * width + x, width);
    }
    memset(g->o, 0, (size_t)(task->d_v * width) * sizeof(float));

    g->lo_min = INT32_MAX;
    g->lo_max = 0;
    g->hi_min = INT32_MAX;
    g->hi_max = 0;
    for (int32_t r = 0; r < width; r++) {
        int32_t row = r0 + (r < g->rows ? r : g->rows - 1); /* padding sees what the last does */
        int32_t lo = task->lo[row], hi = task->hi[row];
        if (hi > task->k_end) hi = (int32_t)task->k_end;
        g->m[r] = -INFINITY;
        g->l[r] = 0.0f;
        g->lo[r] = lo;
        g->hi[r] = hi;
        if (lo < hi && lo < g->lo_min) g->lo_min = lo;
        if (lo > g->lo_max) g->lo_max = lo;
        if (hi < g->hi_min) g->hi_min = hi;
        if (hi > g->hi_max) g->hi_max = hi;
    }
    return p + width * (f->d_s + task->d_v + 4);
}

VEC_INLINE void run(const struct attn_mha_task *task, char *scratch, enum attn_dtype t)
{
    struct forward f = {
        .task = task,
        .d_s = task->d_qk + (task->qv ? task->d_v : 0),
        .cap = task->softcap * LOG2E,
    };
    f.k_stride = odd_lines(f.d_s);
    f.k = (float *)(void *)scratch;
    f.v = f.k + N * f.k_stride;
    f.s = f.v + task->d_v / A_ROWS * PANEL;
    float *next = f.s + N * GROUP;
    for (int32_t r = 0; r < task->rows; r += GROUP)
        next = start_group(&f, t, &f.group[f.groups++], r, next);

    for (int64_t j0 = task->k_begin; j0 < task->k_end; j0 += N) {
        int32_t j1 = (int32_t)(j0 + N < task->k_end ? j0 + N : task->k_end);
        struct span seen = {N, 0}, span[GROUPS_MAX];
        f.j0 = (int32_t)j0;
        for (int i = 0; i < f.groups; i++) {
            span[i] = group_span(&f, &f.group[i], j1);
            if (span[i].begin == span[i].end) continue;
            if (span[i].begin < seen.begin) seen.begin = span[i].begin;
            if (span[i].end > seen.end) seen.end = span[i].end;
        }
        convert_block(&f, t, seen, j1);
        for (int i = 0; i < f.groups; i++)
            if (span[i].begin < span[i].end) attend(&f, &f.group[i], span[i]);
    }

    for (int i = 0; i < f.groups; i++) finish_group(task, t, &f.group[i], i * GROUP);
}

static void run_fp32(const struct attn_mha_task *task, char *scratch)
{
    run(task, scratch, ATTN_F32);
}

static void run_bf16(const struct attn_mha_task *task, char *scratch)
{
    run(task, scratch, ATTN_BF16);
}

static void run_fp16(const struct attn_mha_task *task, char *scratch)
{
    run(task, scratch, ATTN_F16);
}

static void run_fp8(const struct attn_mha_task *task, char *scratch)
{
    run(task, scratch, ATTN_F8);
}

#define FWD_KERNEL(dtype, isa)                                                                     \
    {                                                                                              \
        .name = "attn_mha_fwd_" #dtype "_" #isa,                                                   \
        .rows_max = ROWS_MAX,                                                                      \
        .rows_step = VEC_LANES,                                                                    \
        .n = N,                                                                                    \
        .scratch_bytes = fwd_scratch_bytes,                                                        \
        .run = run_##dtype,                                                                        \
    }

#define FWD_KERNELS(isa)                                                                           \
    {                                                                                              \
        [ATTN_F32] = FWD_KERNEL(fp32, isa),                                                        \
        [ATTN_BF16] = FWD_KERNEL(bf16, isa),                                                       \
        [ATTN_F16] = FWD_KERNEL(fp16, isa),                                                        \
        [ATTN_F8] = FWD_KERNEL(fp8, isa),                                                          \
    }

#endif
