/* SPDX-License-Identifier: MIT
 *
 * mla: query rows against one run of latent rows, by broadcasts.  Compiled once a rung over vec_
 * names, and over words of 32 bits, which are
 *
 *   MLA_STEP 1   fp32 numbers: a product is a multiply and add; bf16 and narrower rows are widened
 *   MLA_STEP 2   pairs of bf16: a product is VDPBF16PS; bf16 rows are read where they lie
 *
 * A lane is a query row, so maxima, sums and rescaling are vertical.  Rows are worked on in groups
 * of up to 3 vectors, keys in blocks of 64:
 *
 *   S [64 keys][group]  = K Q^T     a word of K broadcast, against Q [words][group]
 *   P = 2^(scale S - m)             in place of S; with pairs, two keys in a word
 *   O [512][group]     += V^T P^T   a word of V broadcast; V is K's first 512 values, and with
 *                                   pairs two rows interleaved: [32][512]
 *
 * The reference m of a row moves only when a score exceeds it by 8, so O is rarely rescaled; 2^8 is
 * no danger to any sum.  A kernel reads each cache row once for all groups.
 */
#ifndef ATTN_CPU_X86_MLA_VEC_H
#define ATTN_CPU_X86_MLA_VEC_H

#include <float.h>

#include "cpu/kernels.h"

enum {
    BLOCK = 64,                            /* keys */
    COLS = 3,                              /* vectors of a group at most */
    WORDS = ATTN_MLA_WIDTH_MAX / MLA_STEP, /* of the longest row */
    KEYS = VEC_LANES / 2,                  /* rows of a register tile: 8 x 3 or 4 x 3 sums */
    ROWS_MAX = 128,
};

#define SLACK 8.0f /* log2 units by which a score may exceed the reference */

/* ---- scratch --------------------------------------------------------------------------------- */

struct work {
    float *q; /* [groups][words][lanes of the group] */
    float *o; /* [groups][512][lanes of the group] */
    float *s; /* [BLOCK][lanes of the group] */
    float *k; /* [BLOCK + 1][WORDS] rows that had to be converted; the last one is zero */
    float *v; /* pairs: [BLOCK / 2][512] */
    float *m, *l, *top;
    int32_t *hi;                /* [rows] */
    const char **row, **scales; /* [BLOCK] */
};

static int64_t lay_out(struct work *w, char *base, int64_t rows, int64_t d_qk)
{
    int64_t at = 0, lanes = (rows + VEC_LANES - 1) / VEC_LANES * VEC_LANES;
#define PART(member, count)                                                                        \
    do {                                                                                           \
        w->member = (void *)(base + at);                                                           \
        at += ((count) * (int64_t)sizeof *w->member + 63) / 64 * 64;                               \
    } while (0)
    PART(q, lanes * d_qk / MLA_STEP);
    PART(o, lanes * ATTN_MLA_LATENT);
    PART(s, BLOCK * COLS * VEC_LANES);
    PART(k, (BLOCK + 1) * WORDS);
    PART(v, MLA_STEP == 2 ? BLOCK / 2 * ATTN_MLA_LATENT : 0);
    PART(m, lanes);
    PART(l, lanes);
    PART(top, lanes);
    PART(hi, lanes);
    PART(row, BLOCK);
    PART(scales, BLOCK);
#undef PART
    return at;
}

static int64_t mla_scratch_bytes(int64_t rows, int64_t d_qk)
{
    struct work w;
    static char base[64];
    return lay_out(&w, base, rows, d_qk);
}

struct block {
    const float *k[BLOCK]; /* rows; past `keys` zeros, up to a whole register tile */
    const float *v[BLOCK]; /* steps */
    int32_t first, keys;   /* keys before this block, keys of it */
};

/* Vectors of the next group of `vectors` that are left. */
static int group_cols(int vectors) { return vectors == 4 ? 2 : vectors < COLS ? vectors : COLS; }

/* ---- rows to words --------------------------------------------------------------------------- */

#if MLA_STEP == 1
VEC_INLINE vec word(const float *p) { return vec_set1(*p); }
VEC_INLINE vec product(vec a, vec b, vec sum) { return vec_fma(a, b, sum); }

VEC_INLINE vec round_bf16(vec x) { return vec_from_bf16(vec_to_bf16(x)); }

/* x[0 .. n) = e4m3 values times a scale, rounded to bf16 where that is not exact already. */
static void widen_f8(const char *from, float scale, int n, float *x)
{
    const bool power = (attn_float_bits(scale) & 0x7fffff) == 0;
    const vec s = vec_set1(scale);
    for (int c = 0; c < n; c += VEC_LANES) {
        vec y = vec_mul(vec_load_f8(from + c), s);
        vec_store(x + c, power ? y : round_bf16(y));
    }
}

VEC_INLINE void widen(enum attn_dtype t, const char *from, int n, float *x)
{
    for (int c = 0; c < n; c += VEC_LANES)
        vec_store(x + c, vec_load_elem(t, from + c * attn_dtype_bytes(t)));
}

/* A row of the cache, or of q, as words. */
static const float *row_words(enum attn_mla_format format, const char *row, const char *scales,
                              int32_t d, float *x)
{
    switch ((int)format) {
    case ATTN_F32: return (const float *)(const void *)row;
    case ATTN_BF16: widen(ATTN_BF16, row, d, x); break;
    case ATTN_F16: widen(ATTN_F16, row, d, x); break;
    case ATTN_F8: widen(ATTN_F8, row, d, x); break;
    case ATTN_MLA_V32:
        for (int i = 0; i < 4; i++) {
            float scale;
            memcpy(&scale, row + ATTN_MLA_LATENT + 4 * i, sizeof scale);
            widen_f8(row + ATTN_V32_TILE * i, scale, ATTN_V32_TILE, x + ATTN_V32_TILE * i);
        }
        widen(ATTN_BF16, row + ATTN_MLA_LATENT + 16, ATTN_MLA_ROPE, x + ATTN_MLA_LATENT);
        break;
    default:
        for (int i = 0; i < 7; i++)
            widen_f8(row + ATTN_MODEL1_TILE * i, attn_e8m0_to_float((uint8_t)scales[i]),
                     ATTN_MODEL1_TILE, x + ATTN_MODEL1_TILE * i);
        widen(ATTN_BF16, row + ATTN_MODEL1_QUANTISED, ATTN_MLA_ROPE, x + ATTN_MODEL1_QUANTISED);
    }
    return x;
}

/* The rows are V as they are. */
VEC_INLINE void value_words(struct block *b, const struct work *w)
{
    (void)w;
    memcpy(b->v, b->k, sizeof b->v);
}
#else
VEC_INLINE vec word(const float *p)
{
    int32_t x;
    memcpy(&x, p, sizeof x); /* a row of bf16 may lie at any even address */
    return _mm512_castsi512_ps(_mm512_set1_epi32(x));
}

VEC_INLINE vec product(vec a, vec b, vec sum)
{
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(a),
                            (__m512bh)_mm512_castps_si512(b));
}

/* A row of the cache, or of q, as words. */
static const float *row_words(enum attn_mla_format format, const char *row, const char *scales,
                              int32_t d, float *x)
{
    if (format == (enum attn_mla_format)ATTN_BF16) return (const float *)(const void *)row;
    row_to_bf16(format, row, scales, d, (uint16_t *)(void *)x);
    return x;
}

/* Two rows of V interleaved to one of words; the last may be alone. */
VEC_INLINE void value_words(struct block *b, const struct work *w)
{
    const __m512i lower = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i upper = _mm512_add_epi32(lower, _mm512_set1_epi32(8));
    for (int32_t j = 0; j < b->keys; j += 2) {
        const char *x = (const char *)b->k[j], *y = (const char *)(w->k + BLOCK * WORDS);
        float *v = w->v + j / 2 * ATTN_MLA_LATENT;
        if (j + 1 < b->keys) y = (const char *)b->k[j + 1];
        for (int c = 0; c < ATTN_MLA_LATENT / 32; c++) {
            const __m512i p = _mm512_loadu_si512(x + 64 * c), q = _mm512_loadu_si512(y + 64 * c);
            const __m512i low = _mm512_unpacklo_epi16(p, q), high = _mm512_unpackhi_epi16(p, q);
            _mm512_store_si512(v + 32 * c, _mm512_permutex2var_epi32(low, lower, high));
            _mm512_store_si512(v + 32 * c + 16, _mm512_permutex2var_epi32(low, upper, high));
        }
        b->v[j / 2] = v;
    }
}
#endif

/* w->q: each row's words down a lane; lanes past the last row are 0. */
static void pack_q(const struct attn_mla_task *t, enum attn_mla_format format, const struct work *w)
{
    const enum attn_mla_format type = format < ATTN_MLA_V32 ? format
                                                            : (enum attn_mla_format)ATTN_BF16;
    const int32_t words = t->d_qk / MLA_STEP;
    const int vectors = (t->rows + VEC_LANES - 1) / VEC_LANES;
    for (int g = 0, cols; g < vectors; g += cols) {
        cols = group_cols(vectors - g);
        for (int c = 0; c < cols; c++) {
            const float *row[VEC_LANES];
            for (int i = 0; i < VEC_LANES; i++) {
                const int32_t r = (g + c) * VEC_LANES + i;
                row[i] = w->k + BLOCK * WORDS;
                if (r < t->rows)
                    row[i] = row_words(type, t->q + t->q_row[r], NULL, t->d_qk, w->k + i * WORDS);
            }
            float *q = w->q + (int64_t)g * VEC_LANES * words + c * VEC_LANES;
            for (int32_t x = 0; x < words; x += VEC_LANES) {
                vec block[VEC_LANES];
                VEC_UNROLL
                for (int i = 0; i < VEC_LANES; i++) block[i] = vec_load_f32(row[i] + x);
                vec_transpose(block);
                VEC_UNROLL
                for (int i = 0; i < VEC_LANES; i++)
                    vec_store(q + (x + i) * (int64_t)cols * VEC_LANES, block[i]);
            }
        }
    }
}

/* ---- the two products ------------------------------------------------------------------------ */

/* S rows of KEYS keys: s[i][c] = k[i] . q[.][c] */
VEC_INLINE void scores(const float *const *k, const float *q, int32_t words, int cols, float *s)
{
    vec sum[KEYS][COLS];
    VEC_UNROLL
    for (int i = 0; i < KEYS; i++) {
        VEC_UNROLL
        for (int c = 0; c < cols; c++) sum[i][c] = vec_zero();
    }
    for (int32_t x = 0; x < words; x++) {
        vec b[COLS];
        VEC_UNROLL
        for (int c = 0; c < cols; c++) b[c] = vec_load(q + (x * cols + c) * VEC_LANES);
        VEC_UNROLL
        for (int i = 0; i < KEYS; i++) {
            vec a = word(k[i] + x);
            VEC_UNROLL
            for (int c = 0; c < cols; c++) sum[i][c] = product(a, b[c], sum[i][c]);
        }
    }
    VEC_UNROLL
    for (int i = 0; i < KEYS; i++) {
        VEC_UNROLL
        for (int c = 0; c < cols; c++) vec_store(s + (i * cols + c) * VEC_LANES, sum[i][c]);
    }
}

/* KEYS rows of O^T: o[i][c] += sum over steps j of v[j][i] p[j][c] */
VEC_INLINE void values(const float *const *v, int32_t at, const float *p, int32_t steps, int cols,
                       float *o)
{
    vec sum[KEYS][COLS];
    VEC_UNROLL
    for (int i = 0; i < KEYS; i++) {
        VEC_UNROLL
        for (int c = 0; c < cols; c++) sum[i][c] = vec_load(o + (i * cols + c) * VEC_LANES);
    }
    for (int32_t j = 0; j < steps; j++) {
        const float *x = v[j] + at;
        vec b[COLS];
        VEC_UNROLL
        for (int c = 0; c < cols; c++) b[c] = vec_load(p + (j * cols + c) * VEC_LANES);
        VEC_UNROLL
        for (int i = 0; i < KEYS; i++) {
            vec a = word(x + i);
            VEC_UNROLL
            for (int c = 0; c < cols; c++) sum[i][c] = product(a, b[c], sum[i][c]);
        }
    }
    VEC_UNROLL
    for (int i = 0; i < KEYS; i++) {
        VEC_UNROLL
        for (int c = 0; c < cols; c++) vec_store(o + (i * cols + c) * VEC_LANES, sum[i][c]);
    }
}

/* ---- a block of keys, a group of rows -------------------------------------------------------- */

/* P of two keys, or one, over a vector of lanes; returns l plus their sum. */
#if MLA_STEP == 1
VEC_INLINE vec probabilities(float *s, int step, int32_t keys, vec m, vec l)
{
    for (int32_t j = 0; j < keys; j++) {
        const vec p = vec_exp2(vec_sub(vec_load(s + j * step), m));
        l = vec_add(l, p);
        vec_store(s + j * step, p);
    }
    return l;
}
#else
VEC_INLINE vec probabilities(float *s, int step, int32_t keys, vec m, vec l)
{
    for (int32_t j = 0; j < keys; j += 2) {
        const vec low = vec_exp2(vec_sub(vec_load(s + j * step), m));
        const vec high = j + 1 < keys ? vec_exp2(vec_sub(vec_load(s + (j + 1) * step), m))
                                      : vec_zero();
        l = vec_add(l, vec_add(low, high));
        _mm512_store_si512(s + j / 2 * step, pair_bf16(low, high));
    }
    return l;
}
#endif

/* S to P for one vector of lanes, column c of the group that starts with q, o and the lane. */
VEC_INLINE void softmax(const struct attn_mla_task *t, const struct work *w, const struct block *b,
                        int lane, int c, int cols, float *o)
{
    static const int32_t zeros[VEC_LANES] __attribute__((aligned(64)));
    const vec scale = vec_set1(t->scale), none = vec_set1(-INFINITY);
    const int step = cols * VEC_LANES;
    float *s = w->s + c * VEC_LANES;
    vec high = none;
    for (int32_t j = 0; j < b->keys; j++) {
        vec x = vec_mul(vec_load(s + j * step), scale);
        if (t->hi)
            x = vec_select(vec_within(b->first + j, vec_int_load(zeros),
                                      vec_int_load(w->hi + lane)),
                           x, none);
        vec_store(s + j * step, x);
        high = vec_max(x, high);
    }
    vec m = vec_load(w->m + lane), l = vec_load(w->l + lane);
    vec_store(w->top + lane, vec_max(high, vec_load(w->top + lane)));
    const vec_mask rises = vec_gt(high, vec_add(m, vec_set1(SLACK)));
    if (vec_any(rises)) {
        const vec to = vec_select(rises, high, m), f = vec_exp2(vec_sub(m, to));
        for (int32_t x = 0; x < ATTN_MLA_LATENT; x++) {
            float *p = o + x * step + c * VEC_LANES;
            vec_store(p, vec_mul(vec_load(p), f));
        }
        l = vec_mul(l, f);
        m = to;
        vec_store(w->m + lane, m);
    }
    vec_store(w->l + lane, probabilities(s, step, b->keys, m, l));
}

VEC_INLINE void attend_group(const struct attn_mla_task *t, const struct work *w,
                             const struct block *b, int g, int cols)
{
    const int32_t words = t->d_qk / MLA_STEP;
    const float *q = w->q + (int64_t)g * VEC_LANES * words;
    float *o = w->o + (int64_t)g * VEC_LANES * ATTN_MLA_LATENT;
    for (int32_t j = 0; j < b->keys; j += KEYS)
        scores(b->k + j, q, words, cols, w->s + j * cols * VEC_LANES);
    for (int c = 0; c < cols; c++) softmax(t, w, b, (g + c) * VEC_LANES, c, cols, o);
    for (int32_t x = 0; x < ATTN_MLA_LATENT; x += KEYS)
        values(b->v, x, w->s, (b->keys + MLA_STEP - 1) / MLA_STEP, cols, o + x * cols * VEC_LANES);
}

/* ---- a task ---------------------------------------------------------------------------------- */

/* The next keys, as words.  False: there are none. */
static bool next_block(struct attn_mla_cursor *keys, enum attn_mla_format format, int32_t d,
                       const struct work *w, struct block *b)
{
    b->first += b->keys;
    b->keys = attn_mla_next_keys(keys, BLOCK, w->row, w->scales);
    for (int32_t j = 0; j < b->keys; j++)
        b->k[j] = row_words(format, w->row[j], keys->scales ? w->scales[j] : NULL, d,
                            w->k + j * WORDS);
    for (int32_t j = b->keys; j < (b->keys + KEYS - 1) / KEYS * KEYS; j++)
        b->k[j] = w->k + BLOCK * WORDS;
    value_words(b, w);
    return b->keys > 0;
}

/* O to [rows][512]. */
static void write_rows(const struct attn_mla_task *t, const float *o, int lane, int c, int cols)
{
    for (int32_t x = 0; x < ATTN_MLA_LATENT; x += VEC_LANES) {
        vec block[VEC_LANES];
        VEC_UNROLL
        for (int i = 0; i < VEC_LANES; i++)
            block[i] = vec_load(o + ((x + i) * cols + c) * VEC_LANES);
        vec_transpose(block);
        VEC_UNROLL
        for (int i = 0; i < VEC_LANES; i++)
            if (lane + i < t->rows)
                vec_store(t->o + (int64_t)(lane + i) * ATTN_MLA_LATENT + x, block[i]);
    }
}

static void attend(const struct attn_mla_task *t, enum attn_mla_format format, char *scratch)
{
    struct work w;
    struct block b = {.keys = 0};
    struct attn_mla_cursor keys = t->keys;
    const int vectors = (t->rows + VEC_LANES - 1) / VEC_LANES;
    lay_out(&w, scratch, t->rows, t->d_qk);
    memset(w.k + BLOCK * WORDS, 0, WORDS * sizeof *w.k);
    memset(w.o, 0, (size_t)vectors * VEC_LANES * ATTN_MLA_LATENT * sizeof *w.o);
    for (int i = 0; i < vectors * VEC_LANES; i++) {
        w.m[i] = -FLT_MAX;
        w.l[i] = 0;
        w.top[i] = -INFINITY;
        w.hi[i] = t->hi && i < t->rows ? t->hi[i] : 0;
    }
    pack_q(t, format, &w);
    while (next_block(&keys, format, t->d_qk, &w, &b)) {
        for (int g = 0, cols; g < vectors; g += cols) {
            cols = group_cols(vectors - g);
            if (cols == 3)
                attend_group(t, &w, &b, g, 3);
            else if (cols == 2)
                attend_group(t, &w, &b, g, 2);
            else
                attend_group(t, &w, &b, g, 1);
        }
    }
    for (int g = 0, cols; g < vectors; g += cols) {
        cols = group_cols(vectors - g);
        for (int c = 0; c < cols; c++)
            write_rows(t, w.o + (int64_t)g * VEC_LANES * ATTN_MLA_LATENT, (g + c) * VEC_LANES, c,
                       cols);
    }
    memcpy(t->m, w.m, (size_t)t->rows * sizeof *t->m);
    memcpy(t->l, w.l, (size_t)t->rows * sizeof *t->l);
    memcpy(t->top, w.top, (size_t)t->rows * sizeof *t->top);
}

#endif
