/* SPDX-License-Identifier: MIT
 *
 * mha_fwd on vectors, written once over the vec_ abstraction.  What is multiplied are words of 32
 * bits: one fp32, by FMA, for all four element types (fwd_fma.h), or a pair of bf16, by dot
 * products, for bf16 and fp8 (fwd_dot.h).  mha_fwd_<isa>.c includes a vec_<isa>.h, one of the two
 * and then this file.
 *
 * Math.  For query row r and its visible keys lo[r] <= j < hi[r], block by block of N keys:
 *
 *   t_j = (q_r . k_j + qv_r . v_j) * score_scale * log2 e                 scores in base 2
 *         or softcap * log2 e * tanh(q.k * score_scale / softcap)
 *   p_j = 2^(t_j - m),  l = sum p_j,  r = sum p'_j,  o = sum p'_j v_j      fp32 throughout
 *
 * with p' = p, or p rounded to bf16.  m is a reference, not the maximum: it moves up to a block's
 * maximum only when that exceeds it by more than SLACK (then l, r and o are multiplied by
 * 2^(m_old - m)), so p stays below 2^SLACK and most blocks rescale nothing.  Where p is rounded it
 * moves to any key that rules its row, with RULES of l or more: that p is then 1, exactly.  In the
 * end out = o * out_scale / r and lse = ln l + m ln 2.  Hidden scores are -inf, their p is exactly
 * 0.  A row that sees no key, or only scores of -inf, keeps m = -inf and l = r = 0: out 0, lse -inf
 * or the sink.  A weight below 2^-126 is 0, so an infinite v_j under it gives NaN where exact
 * arithmetic gives inf.
 *
 * Layout.  S^T = K Q^T and O^T = V^T P^T: keys run down, queries across, a lane is a query.  So
 * maximum, sum, rescaling and mask are vertical operations, and lanes never mix: a row's bits do
 * not depend on its neighbours.  Query rows come in groups of up to 3 vectors (48 or 24 rows):
 *
 *             columns: rows of the group
 *             |<- lanes ->|<- lanes ->|<- lanes ->|
 *   q   [d_s] |   q^T, scaled                     |     s [N]  | S^T, then P^T in place           |
 *   o   [d_v] |   O^T                             |     m l r lo hi, one each a lane
 *
 *   k [N]               | k_j (with qv: k_j, v_j) | pad |   rows of one key block
 *   v [d_v / A_ROWS][N] | A_ROWS elements of v_j |          its V in panels, a pad after each
 *
 * with d_s / 2 words of pairs (q[2i], q[2i + 1]) and (k[2i], k[2i + 1]), and N / 2 of pairs of keys
 * in V and P, where words hold two.  Pairs take c = |scale| log2 e after their product, and the
 * sign with q.
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
    DEPTH = 256,                      /* of S^T's product at a time: this much q stays in L1 */
    LINE = 16,                        /* words of a cache line */
    A_ROWS = VEC_LANES / 2,           /* rows of the micro-kernel */
    PANEL = N / PAIR * A_ROWS + LINE, /* words of a panel of V */
};

#define SLACK 8.0f
#define RULES 0.25f
#define LOG2E 0x1.715476p+0f
#define LN2 0x1.62e430p-1f

/* Up to GROUP query rows.  Arrays of [width] have one element a row, padding included. */
struct group {
    int32_t rows, cols;     /* live rows; vectors across, width = cols * VEC_LANES */
    int32_t lo_min, hi_max; /* keys lo_min <= j < hi_max are seen by some row, */
    int32_t lo_max, hi_min; /* lo_max <= j < hi_min by every row */
    float *q, *o;           /* [words][width], [d_v][width] */
    float *m, *l, *r;       /* [width]; r is l where p is not rounded */
    int32_t *lo, *hi;       /* [width] */
};

/* The block's keys that a group, or any group, sees: rows begin <= i < end, multiples of A_ROWS. */
struct span {
    int32_t begin, end;
};

struct forward {
    const struct attn_mha_task *task;
    enum attn_dtype type;
    int64_t words, k_stride; /* of a score's product; from one k to the next */
    float scale, cap,
        inner;            /* of a score after its product; softcap * log2 e (0: off), inside tanh */
    float *k, *v, *s;     /* [N][k_stride], [d_v / A_ROWS][PANEL], [N][width] */
    int32_t j0;           /* the block's first key */
    uint64_t bad[N / 64]; /* its keys whose V has an infinity or a NaN */
    int32_t groups;
    struct group group[GROUPS_MAX];
};

static int64_t odd_lines(int64_t words) { return ((words + LINE - 1) / LINE | 1) * LINE; }

static int64_t fwd_scratch_bytes(int64_t d_s, int64_t d_v, int64_t rows, int64_t heads)
{
    (void)heads;
    int64_t width = (rows + VEC_LANES - 1) / VEC_LANES * VEC_LANES, words = d_s / PAIR;
    int64_t block = N * odd_lines(words) + d_v / A_ROWS * PANEL;
    return 4 * (block + N * GROUP + width * (words + d_v + 3 + PAIR));
}

/* ---- products -------------------------------------------------------------------------------- */

/* C[A_ROWS][cols] = or += A B over `depth` words.  A[r][k] is a[r * a_row + k * a_step], B and C
 * have cols vectors a row.  cols, accumulate and one of a's strides are constants where this is
 * called, and the accumulators stay in registers. */
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
            for (int x = 0; x < cols; x++) acc[r][x] = mul_add(ark, bk[x], acc[r][x]);
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
    for (int64_t k = 0; k < f->words; k += DEPTH) {
        int64_t depth = f->words - k < DEPTH ? f->words - k : DEPTH;
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
    const float *v = f->v + w.begin / PAIR * A_ROWS;
    const float *p = f->s + w.begin / PAIR * cols * VEC_LANES;
    float *o = g->o;
    for (int32_t i = 0; i < f->task->d_v; i += A_ROWS) {
        product(v, 1, A_ROWS, p, (w.end - w.begin) / PAIR, o, cols, true);
        v += PANEL;
        o += A_ROWS * cols * VEC_LANES;
    }
}

/* Of one fp32 a word: the same where hidden keys' V may not be touched, since 0 * NaN is NaN: same
 * bits, slowly. */
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

/* Of pairs, where infinities and NaNs of V are words of zero: adds them to the rows that see their
 * key. */
static void add_not_finite(const struct forward *f, const struct group *g, struct span w)
{
    const struct attn_mha_task *t = f->task;
    const int width = g->cols * VEC_LANES;
    for (int32_t i = w.begin; i < w.end; i++) {
        if (!(f->bad[i / 64] >> i % 64 & 1)) continue;
        int32_t key = f->j0 + i;
        const char *v = t->kv.v + attn_kv_v_offset(&t->kv, key);
        for (int32_t d = 0; d < t->d_v; d++) {
            float x = attn_load(f->type, v, d);
            for (int r = 0; r < width && !isfinite(x); r++)
                if (g->lo[r] <= key && key < g->hi[r]) g->o[d * width + r] += x;
        }
    }
}

/* ---- softmax --------------------------------------------------------------------------------- */

/* Caps and masks one vector column of S^T where asked to, and returns its maximum; NaN is passed
 * over.  s, lo and hi point at the column. */
VEC_INLINE vec column_max(const struct forward *f, struct span w, float *s, int width,
                          const int32_t *lo, const int32_t *hi, bool cap, bool edge)
{
    const vec hidden = vec_set1(-INFINITY), inner = vec_set1(f->inner), outer = vec_set1(f->cap);
    vec_int first = vec_int_load(lo), last = vec_int_load(hi);
    vec max[4] = {hidden, hidden, hidden, hidden};
    for (int32_t j = w.begin; j < w.end; j += 4) VEC_UNROLL
    for (int u = 0; u < 4; u++) {
        float *at = s + (j + u) * width;
        vec t = vec_load(at);
        if (cap) t = vec_mul(outer, vec_tanh(PAIR == 1 ? t : vec_mul(t, inner)));
        if (edge) t = vec_select(vec_within(f->j0 + j + u, first, last), t, hidden);
        if (cap || edge) vec_store(at, t);
        max[u] = vec_max(t, max[u]);
    }
    return vec_max(vec_max(max[0], max[1]), vec_max(max[2], max[3]));
}

/* Turns one vector column of S^T into words of P^T, p = 2^(S^T c - m).  *l and *r get the sums of p
 * and of its words: four partial ones by key modulo 4, so the order does not depend on the span. */
VEC_INLINE void column_exp(const struct forward *f, struct span w, float *s, int width, vec m,
                           vec *l, vec *r)
{
    const vec scale = vec_set1(f->scale), minus_m = vec_sub(vec_zero(), m);
    vec sum[4], rounded[4];
    VEC_UNROLL
    for (int u = 0; u < 4; u++) sum[u] = rounded[u] = vec_zero();
    for (int32_t j = w.begin; j < w.end; j += 4) {
        vec word[4 / PAIR];
        VEC_UNROLL
        for (int u = 0; u < 4; u += PAIR) {
            vec p[PAIR];
            VEC_UNROLL
            for (int i = 0; i < PAIR; i++) {
                vec t = vec_load(s + (j + u + i) * width);
                p[i] = vec_exp2(vec_fma(t, scale, minus_m));
                sum[u + i] = vec_add(sum[u + i], p[i]);
            }
            word[u / PAIR] = weight_words(p);
            VEC_UNROLL
            for (int i = 0; PAIR == 2 && i < PAIR; i++)
                rounded[u + i] = vec_add(rounded[u + i], p[i]);
        }
        VEC_UNROLL
        for (int u = 0; u < 4 / PAIR; u++) vec_store(s + (j / PAIR + u) * width, word[u]);
    }
    *l = vec_add(vec_add(sum[0], sum[1]), vec_add(sum[2], sum[3]));
    *r = vec_add(vec_add(rounded[0], rounded[1]), vec_add(rounded[2], rounded[3]));
}

static void softmax(const struct forward *f, struct group *g, struct span w, bool edge)
{
    int width = g->cols * VEC_LANES;
    for (int x = 0; x < width; x += VEC_LANES) {
        float *s = f->s + x;
        const int32_t *lo = g->lo + x, *hi = g->hi + x;
        vec max, m_old = vec_load(g->m + x), l = vec_load(g->l + x), r = vec_load(g->r + x);
        if (f->cap != 0.0f)
            max = column_max(f, w, s, width, lo, hi, true, true);
        else if (edge)
            max = column_max(f, w, s, width, lo, hi, false, true);
        else
            max = column_max(f, w, s, width, lo, hi, false, false);
        max = vec_mul(max, vec_set1(f->scale));

        vec most = vec_add(m_old, vec_set1(SLACK));
        if (PAIR == 2) {
            vec top = vec_exp2(vec_sub(max, m_old));
            most = vec_select(vec_gt(top, vec_mul(l, vec_set1(RULES))), m_old, most);
        }
        vec_mask rises = vec_gt(max, most);
        vec m = vec_select(rises, max, m_old);
        if (vec_any(rises)) {
            vec shrink = vec_select(rises, vec_exp2(vec_sub(m_old, m)), vec_set1(1.0f));
            l = vec_mul(l, shrink);
            r = vec_mul(r, shrink);
            for (float *o = g->o + x; o < g->o + f->task->d_v * width; o += width)
                vec_store(o, vec_mul(vec_load(o), shrink));
            vec_store(g->m + x, m);
        }
        /* A finite reference keeps -inf - -inf and inf - inf out: p is 0 there, inf here. */
        m = vec_max(vec_set1(-FLT_MAX), vec_min(vec_set1(FLT_MAX), m));
        vec more, more_rounded;
        column_exp(f, w, s, width, m, &more, &more_rounded);
        vec_store(g->l + x, vec_add(l, more));
        if (PAIR == 2) vec_store(g->r + x, vec_add(r, more_rounded));
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
    bool bad = f->bad[0] | f->bad[1];
    switch (PAIR == 1 && edge && bad ? 0 : g->cols) {
    case 0: values_poisoned(f, g, w); break;
    case 1: values(f, g, w, 1); break;
    case 2: values(f, g, w, 2); break;
    default: values(f, g, w, 3); break;
    }
    if (PAIR == 2 && bad) add_not_finite(f, g, w);
}

/* ---- a task ---------------------------------------------------------------------------------- */

/* Makes the block's rows of the span, those of keys from j1 on zero. */
VEC_INLINE void convert_block(struct forward *f, enum attn_dtype t, struct span w, int32_t j1)
{
    const struct attn_mha_task *task = f->task;
    const struct attn_kv_view *kv = &task->kv;
    int32_t live = j1 - f->j0 < w.end ? j1 - f->j0 : w.end;
    f->bad[0] = f->bad[1] = 0;
    for (int32_t i = w.begin; i < w.end; i += PAIR) {
        const char *v[PAIR] = {NULL};
        for (int32_t u = 0; u < PAIR; u++) {
            float *y = f->k + (i + u) * f->k_stride;
            if (i + u >= live) {
                memset(y, 0, (size_t)f->words * sizeof(float));
                continue;
            }
            v[u] = kv->v + attn_kv_v_offset(kv, f->j0 + i + u);
            key_words(t, kv->k + attn_kv_k_offset(kv, f->j0 + i + u), task->d_qk, y);
            if (task->qv) key_words(t, v[u], task->d_v, y + task->d_qk / PAIR);
        }
        float *y = f->v + i / PAIR * A_ROWS;
        if (v[0])
            f->bad[i / 64] |= (uint64_t)value_words(t, v, task->d_v, y, PANEL) << i % 64;
        else
            for (int32_t c = 0; c < task->d_v / A_ROWS; c++)
                memset(y + c * PANEL, 0, A_ROWS * sizeof(float));
    }
}

/* What a row's o is multiplied by to be its output, and its lse.  Where a score or sink is +inf the
 * output is NaN; l still tells +inf from a NaN score, for lse. */
static float finish_row(const struct attn_mha_task *task, float m, float l, float r, float sink,
                        float *lse)
{
    float top = m > sink ? m : sink; /* a NaN sink stays */
    if (top == INFINITY) {
        *lse = l + INFINITY;
        return NAN;
    }
    float share = m == top ? 1.0f : expf(m - top);
    float more = sink == -INFINITY ? 0.0f : expf(sink - top), sum = r * share + more;
    *lse = logf(l * share + more) + top;
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
        g->l[r] = finish_row(task, g->m[r] * LN2, g->l[r], g->r[r], sink, lse);
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
    g->o = g->q + f->words * width;
    g->m = g->o + (int64_t)task->d_v * width;
    g->l = g->m + width;
    g->r = PAIR == 1 ? g->l : g->l + width;
    g->lo = (int32_t *)(void *)(g->r + width);
    g->hi = g->lo + width;

    float scale = *task->score_scale * (f->cap != 0.0f ? 1.0f / task->softcap : LOG2E);
    for (int32_t x = 0; x < width; x += VEC_LANES) {
        int32_t r = r0 + x, rows = g->rows - x;
        query_words(t, task->q, task->q_row + r, rows, task->d_qk, scale, g->q + x, width);
        if (task->qv)
            query_words(t, task->qv, task->qv_row + r, rows, task->d_v, scale,
                        g->q + (int64_t)task->d_qk / PAIR * width + x, width);
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
        g->l[r] = g->r[r] = 0.0f;
        g->lo[r] = lo;
        g->hi[r] = hi;
        if (lo < hi && lo < g->lo_min) g->lo_min = lo;
        if (lo > g->lo_max) g->lo_max = lo;
        if (hi < g->hi_min) g->hi_min = hi;
        if (hi > g->hi_max) g->hi_max = hi;
    }
    return p + width * (f->words + task->d_v + 3 + PAIR);
}

VEC_INLINE void run(const struct attn_mha_task *task, char *scratch, enum attn_dtype t)
{
    const float scale = fabsf(*task->score_scale), cap = task->softcap;
    struct forward f = {
        .task = task,
        .type = t,
        .words = (task->d_qk + (task->qv ? task->d_v : 0)) / PAIR,
        .scale = PAIR == 1 || cap != 0.0f ? 1.0f
                                          : fmaxf(scale * LOG2E, 1e-30f), /* 0 * -inf is NaN */
        .cap = cap * LOG2E,
        .inner = cap != 0.0f ? scale / cap : 0.0f,
    };
    f.k_stride = odd_lines(f.words);
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

#define FWD_RUN(dtype, type)                                                                       \
    static void run_##dtype(const struct attn_mha_task *task, char *scratch)                       \
    {                                                                                              \
        run(task, scratch, type);                                                                  \
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

#endif
