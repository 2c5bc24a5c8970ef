/* SPDX-License-Identifier: MIT
 *
 * mha_fwd on dot products of bf16 pairs (VDPBF16PS), for bf16 and for fp8, which is exact in bf16.
 *
 * Math and order are those of mha_fwd_vec.h, keys down and queries across, a lane a query:
 *
 *   S^T = K Q^T,  P = 2^(S c - m),  O^T = V^T P^T,  out = O out_scale / l,  lse = ln l + m ln 2
 *
 * with c = |scale| log2 e (the sign is Q's), and softcap in between.  P is rounded to bf16 for its
 * product; l sums it before that, and r after, by which a partial result is divided: a row ruled by
 * one key then gives that key's V to fp32's accuracy.  m moves when a score passes it by SLACK.
 *
 * Layout.  A word is a pair of bf16, which VDPBF16PS multiplies and adds to one fp32 lane:
 *
 *   q [d_s / 2][width]          words (q[2i], q[2i + 1]) of the rows of a group
 *   k [N][d_s / 2]         pad  words of the row as it lies
 *   s [N][width]                S^T; then in its place
 *   p   [N / 2][width]          words (p of key 2i, of key 2i + 1)
 *   v [d_v / 8][N / 2][8]  pad  words (v of key 2i, of key 2i + 1), in panels of 8 elements
 *   o [d_v][width]              O^T
 *
 * Infinities and NaNs of V are stored as zeros and added to O for the rows that see their key, since
 * 0 * NaN would reach those that do not.
 */
#include <float.h>
#include <math.h>

#include "cpu/x86/kernels_x86.h"
#include "cpu/x86/vec_avx512.h"

enum {
    N = 128,                  /* keys of a block */
    COLS = 3,                 /* most vectors across a group */
    GROUP = COLS * VEC_LANES, /* most rows of a group */
    ROWS_MAX = 384,
    GROUPS_MAX = ROWS_MAX / GROUP,
    A_ROWS = 8,                    /* rows of the micro-kernel */
    LINE = 16,                     /* words of a cache line */
    PANEL = N / 2 * A_ROWS + LINE, /* words of a panel of V */
};

#define SLACK 8.0f
#define LOG2E 0x1.715476p+0f
#define LN2 0x1.62e430p-1f

/* Up to GROUP query rows.  Arrays of [width] have one element a row, padding included. */
struct group {
    int32_t rows, cols;     /* live rows; vectors across, width = cols * VEC_LANES */
    int32_t lo_min, hi_max; /* keys lo_min <= j < hi_max are seen by some row, */
    int32_t lo_max, hi_min; /* lo_max <= j < hi_min by every row */
    float *q, *o;           /* [d_s / 2][width] words, [d_v][width] */
    float *m, *l, *r;       /* [width] */
    int32_t *lo, *hi;       /* [width] */
};

/* The block's keys that a group, or any group, sees: begin <= i < end, multiples of A_ROWS. */
struct span {
    int32_t begin, end;
};

struct forward {
    const struct attn_mha_task *task;
    enum attn_dtype type;
    int64_t pairs, k_stride; /* words of a score's product; from one k to the next */
    float scale, cap, inner; /* c, or 1 with softcap: cap log2 e, and the factor inside tanh */
    float *k, *v, *s;
    int32_t j0;           /* the block's first key */
    uint64_t bad[N / 64]; /* keys whose V has an infinity or a NaN */
    int32_t groups;
    struct group group[GROUPS_MAX];
};

static int64_t odd_lines(int64_t words) { return ((words + LINE - 1) / LINE | 1) * LINE; }

static int64_t scratch_bytes(int64_t d_s, int64_t d_v, int64_t rows, int64_t heads)
{
    (void)heads;
    int64_t width = (rows + VEC_LANES - 1) / VEC_LANES * VEC_LANES;
    int64_t block = N * odd_lines(d_s / 2) + d_v / A_ROWS * PANEL;
    return 4 * (block + N * GROUP + width * (d_s / 2 + d_v + 5));
}

/* ---- products -------------------------------------------------------------------------------- */

/* C[A_ROWS][cols] = or += A B over `depth` words.  A[r][k] is a[r * a_row + k * a_step], B and C
 * have cols vectors a row. */
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
            for (int x = 0; x < cols; x++)
                acc[r][x] = _mm512_dpbf16_ps(acc[r][x], (__m512bh)ark, (__m512bh)bk[x]);
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
    for (int32_t j = w.begin; j < w.end; j += A_ROWS)
        product(f->k + j * f->k_stride, f->k_stride, 1, g->q, f->pairs, f->s + j * cols * VEC_LANES,
                cols, false);
}

/* O^T += V^T P^T over the span. */
VEC_INLINE void values(const struct forward *f, const struct group *g, struct span w, int cols)
{
    const float *v = f->v + w.begin / 2 * A_ROWS, *p = f->s + w.begin / 2 * cols * VEC_LANES;
    for (int32_t i = 0; i < f->task->d_v / A_ROWS; i++)
        product(v + i * PANEL, 1, A_ROWS, p, (w.end - w.begin) / 2,
                g->o + i * A_ROWS * cols * VEC_LANES, cols, true);
}

/* Adds the infinities and NaNs of V to the rows that see their key. */
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
        if (cap) t = vec_mul(outer, vec_tanh(vec_mul(t, inner)));
        if (edge) t = vec_select(vec_within(f->j0 + j + u, first, last), t, hidden);
        if (cap || edge) vec_store(at, t);
        max[u] = vec_max(t, max[u]);
    }
    return vec_max(vec_max(max[0], max[1]), vec_max(max[2], max[3]));
}

/* Turns one vector column of S^T into words of P^T, rounded to nearest (ties away from zero).  *l
 * and *r get the sums before and after rounding: four partial ones by key modulo 4, so the order
 * does not depend on the span. */
VEC_INLINE void column_exp(const struct forward *f, struct span w, float *s, int width, vec m,
                           vec *l, vec *r)
{
    const vec scale = vec_set1(f->scale), minus_m = vec_sub(vec_zero(), m);
    const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(-0x10000);
    vec sum[4], rounded[4];
    VEC_UNROLL
    for (int u = 0; u < 4; u++) sum[u] = rounded[u] = vec_zero();
    for (int32_t j = w.begin; j < w.end; j += 4) {
        __m512i high[4];
        VEC_UNROLL
        for (int u = 0; u < 4; u++) {
            vec p = vec_exp2(vec_fma(vec_load(s + (j + u) * width), scale, minus_m));
            high[u] = _mm512_add_epi32(_mm512_castps_si512(p), half);
            high[u] = _mm512_and_si512(high[u], upper);
            sum[u] = vec_add(sum[u], p);
            rounded[u] = vec_add(rounded[u], _mm512_castsi512_ps(high[u]));
        }
        VEC_UNROLL
        for (int u = 0; u < 2; u++) {
            __m512i word = _mm512_or_si512(_mm512_srli_epi32(high[2 * u], 16), high[2 * u + 1]);
            vec_store(s + (j / 2 + u) * width, _mm512_castsi512_ps(word));
        }
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

        vec_mask rises = vec_gt(max, vec_add(m_old, vec_set1(SLACK)));
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
        vec_store(g->r + x, vec_add(r, more_rounded));
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
    switch (g->cols) {
    case 1: values(f, g, w, 1); break;
    case 2: values(f, g, w, 2); break;
    default: values(f, g, w, 3); break;
    }
    if (f->bad[0] | f->bad[1]) add_not_finite(f, g, w);
}

/* ---- conversion ------------------------------------------------------------------------------ */

/* 16 elements, of which n are there, as bf16; the others are 0. */
VEC_INLINE __m256i load_bf16(enum attn_dtype t, const char *x, int32_t n)
{
    __mmask16 lanes = n >= VEC_LANES ? 0xffff : vec_first(n);
    if (t == ATTN_BF16) return _mm256_maskz_loadu_epi16(lanes, x);
    return vec_to_bf16(vec_from_f8(_mm_maskz_loadu_epi8(lanes, x)));
}

VEC_INLINE void convert_key(enum attn_dtype t, const char *x, int32_t d, float *y)
{
    for (int32_t i = 0; i < d; i += VEC_LANES) {
        __mmask16 lanes = d - i >= VEC_LANES ? 0xffff : vec_first(d - i);
        _mm256_mask_storeu_epi16(y + i / 2, lanes,
                                 load_bf16(t, x + i * attn_dtype_bytes(t), d - i));
    }
}

/* Zeros infinities and NaNs and says whether there were any. */
VEC_INLINE bool keep_finite(__m256i *x)
{
    __m256i twice = _mm256_add_epi16(*x, *x); /* drops the sign */
    __mmask16 bad = _mm256_cmpge_epu16_mask(twice, _mm256_set1_epi16((short)0xff00));
    *x = _mm256_maskz_mov_epi16((__mmask16)~bad, *x);
    return bad;
}

/* Keys i and i + 1 of the block to their words of V; b NULL: zeros. */
VEC_INLINE void convert_values(struct forward *f, enum attn_dtype t, const char *a, const char *b,
                               int32_t i)
{
    float *y = f->v + i / 2 * A_ROWS;
    for (int32_t d = 0; d < f->task->d_v; d += VEC_LANES, y += 2 * PANEL) {
        const int64_t at = d * attn_dtype_bytes(t);
        const int32_t n = f->task->d_v - d;
        __m256i even = load_bf16(t, a + at, n), odd = _mm256_setzero_si256();
        if (b) odd = load_bf16(t, b + at, n);
        if (keep_finite(&even)) f->bad[i / 64] |= (uint64_t)1 << i % 64;
        if (keep_finite(&odd)) f->bad[i / 64] |= (uint64_t)1 << (i + 1) % 64;
        vec words = _mm512_castsi512_ps(
            _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                            _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16)));
        vec_store_low(y, words);
        if (n >= VEC_LANES) vec_store_high(y + PANEL, words);
    }
}

/* Makes the block's rows of the span, those of keys from j1 on zero. */
VEC_INLINE void convert_block(struct forward *f, enum attn_dtype t, struct span w, int32_t j1)
{
    const struct attn_mha_task *task = f->task;
    const struct attn_kv_view *kv = &task->kv;
    int32_t live = j1 - f->j0 < w.end ? j1 - f->j0 : w.end;
    f->bad[0] = f->bad[1] = 0;
    for (int32_t i = w.begin; i < w.end; i += 2) {
        const char *v[2] = {NULL, NULL};
        for (int32_t u = i; u < i + 2; u++) {
            float *y = f->k + u * f->k_stride;
            if (u >= live) {
                memset(y, 0, (size_t)f->pairs * sizeof(float));
                continue;
            }
            v[u - i] = kv->v + attn_kv_v_offset(kv, f->j0 + u);
            convert_key(t, kv->k + attn_kv_k_offset(kv, f->j0 + u), task->d_qk, y);
            if (task->qv) convert_key(t, v[u - i], task->d_v, y + task->d_qk / 2);
        }
        if (v[0]) {
            convert_values(f, t, v[0], v[1], i);
            continue;
        }
        for (int32_t c = 0; c < task->d_v / A_ROWS; c++)
            memset(f->v + c * PANEL + i / 2 * A_ROWS, 0, A_ROWS * sizeof(float));
    }
}

/* d elements of each of up to VEC_LANES rows become d / 2 vectors of words, `width` apart. */
VEC_INLINE void pack_queries(enum attn_dtype t, const char *x, const int64_t *at, int32_t rows,
                             int32_t d, __m256i sign, float *y, int width)
{
    for (int32_t i = 0; i < d; i += 2 * VEC_LANES) {
        vec e[VEC_LANES];
        for (int r = 0; r < VEC_LANES; r++) {
            e[r] = vec_zero();
            if (r >= rows) continue;
            const char *row = x + at[r] + i * attn_dtype_bytes(t);
            __m256i low = _mm256_xor_si256(load_bf16(t, row, d - i), sign), high = low;
            if (d - i > VEC_LANES)
                high = _mm256_xor_si256(load_bf16(t, row + VEC_LANES * attn_dtype_bytes(t),
                                                  d - i - VEC_LANES),
                                        sign);
            e[r] = _mm512_castsi512_ps(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
        }
        vec_transpose(e);
        for (int k = 0; k < VEC_LANES && i + 2 * k < d; k++)
            vec_store(y + (i / 2 + k) * width, e[k]);
    }
}

/* ---- a task ---------------------------------------------------------------------------------- */

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
    float sum = l * share + (sink == -INFINITY ? 0.0f : expf(sink - top));
    *lse = logf(sum) + top;
    if (task->partial) sum = r;
    return sum == 0.0f ? 0.0f : *task->out_scale * share / sum;
}

/* Scales, transposes, rounds and stores a group; its first row is the task's row r0. */
static void finish_group(const struct attn_mha_task *task, const struct group *g, int32_t r0)
{
    const enum attn_dtype type = task->partial ? ATTN_F32 : ATTN_BF16;
    const int width = g->cols * VEC_LANES;
    for (int32_t r = 0; r < g->rows; r++) {
        float sink = task->sinks ? task->sinks[r0 + r] : -INFINITY;
        float *lse = task->lse + task->lse_row[r0 + r];
        g->l[r] = finish_row(task, g->m[r] * LN2, g->l[r], g->r[r], sink, lse);
    }
    for (int32_t x = 0; x < width; x += VEC_LANES) {
        vec share = vec_load(g->l + x);
        for (int32_t i = 0; i < task->d_v; i += VEC_LANES) {
            int32_t n = task->d_v - i < VEC_LANES ? task->d_v - i : VEC_LANES;
            vec o[VEC_LANES];
            VEC_UNROLL
            for (int k = 0; k < VEC_LANES; k++)
                o[k] = k < n ? vec_mul(vec_load(g->o + (i + k) * width + x), share) : vec_zero();
            vec_transpose(o);
            for (int r = 0; r < VEC_LANES && x + r < g->rows; r++) {
                char *out = task->out + task->out_row[r0 + x + r] + i * attn_dtype_bytes(type);
                vec_store_part_elem(type, out, o[r], n);
            }
        }
    }
}

/* Lays a group out from p on, packs its queries, and returns what follows it. */
VEC_INLINE float *start_group(const struct forward *f, enum attn_dtype t, struct group *g,
                              int32_t r0, float *p)
{
    const struct attn_mha_task *task = f->task;
    const __m256i sign = _mm256_set1_epi16(*task->score_scale < 0 ? (short)0x8000 : 0);
    int32_t left = task->rows - r0;
    g->rows = left < GROUP ? left : GROUP;
    g->cols = (g->rows + VEC_LANES - 1) / VEC_LANES;
    int width = g->cols * VEC_LANES;
    g->q = p;
    g->o = g->q + f->pairs * width;
    g->m = g->o + (int64_t)task->d_v * width;
    g->l = g->m + width;
    g->r = g->l + width;
    g->lo = (int32_t *)(void *)(g->r + width);
    g->hi = g->lo + width;

    for (int32_t x = 0; x < width; x += VEC_LANES) {
        int32_t r = r0 + x, rows = g->rows - x;
        pack_queries(t, task->q, task->q_row + r, rows, task->d_qk, sign, g->q + x, width);
        if (task->qv)
            pack_queries(t, task->qv, task->qv_row + r, rows, task->d_v, sign,
                         g->q + (int64_t)task->d_qk / 2 * width + x, width);
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
    return p + width * (f->pairs + task->d_v + 5);
}

VEC_INLINE void run(const struct attn_mha_task *task, char *scratch, enum attn_dtype t)
{
    const float scale = fabsf(*task->score_scale), cap = task->softcap;
    struct forward f = {
        .task = task,
        .type = t,
        .pairs = (task->d_qk + (task->qv ? task->d_v : 0)) / 2,
        .scale = cap != 0.0f ? 1.0f : fmaxf(scale * LOG2E, 1e-30f), /* 0 * -inf is NaN */
        .cap = cap * LOG2E,
        .inner = cap != 0.0f ? scale / cap : 0.0f,
    };
    f.k_stride = odd_lines(f.pairs);
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

    for (int i = 0; i < f.groups; i++) finish_group(task, &f.group[i], i * GROUP);
}

static void run_bf16(const struct attn_mha_task *task, char *scratch)
{
    run(task, scratch, ATTN_BF16);
}

static void run_fp8(const struct attn_mha_task *task, char *scratch)
{
    run(task, scratch, ATTN_F8);
}

#define KERNEL(dtype)                                                                              \
    {                                                                                              \
        .name = "attn_mha_fwd_" #dtype "_avx512bf16",                                              \
        .rows_max = ROWS_MAX,                                                                      \
        .rows_step = VEC_LANES,                                                                    \
        .n = N,                                                                                    \
        .scratch_bytes = scratch_bytes,                                                            \
        .run = run_##dtype,                                                                        \
    }

const struct attn_mha_kernel attn_mha_fwd_bf16_avx512bf16 = KERNEL(bf16);
const struct attn_mha_kernel attn_mha_fwd_fp8_avx512bf16 = KERNEL(fp8);
