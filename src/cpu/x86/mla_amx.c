/* SPDX-License-Identifier: MIT
 *
 * mla on AMX tiles: bf16 rows, and rows that are exact in bf16 (e4m3, V32, MODEL1).
 *
 * Rows are padded to row tiles of 16 and taken two at a time, keys in blocks of up to 256; while a
 * block is multiplied, lines of the next one are asked for:
 *
 *   rows -> K, V      16 keys of a page are a tile of K where they lie; others are copied, or
 *                     decoded.  V is two rows interleaved, made once for all row tiles.
 *   S^T = K Q^T       2 x 2 tiles of 16 keys x 16 rows; Q of a row pair stays in L1, K streams
 *   P = 2^(scale S - m)  a lane is a row, so maximum and sum are vertical; 16 pairs of keys are
 *                     then transposed, 16 x 16 dwords, to be A of the next product
 *   O += P V          2 x 2 tiles of 16 rows x 16 columns, over the block's keys
 *
 *   K, A   [16 keys][32 d]            in place, rows any distance apart
 *   Q, B   [row tile][d / 32]         [16 pairs of d][16 rows][2]
 *   S, C   [16 keys][row tile]        [16 keys][16 rows] fp32
 *   P, A   [row tile][32 keys]        [16 rows][32 keys]
 *   V, B   [pair of keys] V_ROW       [512 columns][2], columns in the order of interleave()
 *   O, C   [row tile][16 columns]     [16 rows][16 columns] fp32
 *
 * Up to 16 rows have their own form of P V, which takes V where it lies, too.  As an operand B, a
 * row of V is 32 columns in pairs, so that two operands A for 16 keys, each with zeros in every
 * other place, give the even and the odd columns; twice the products, but no copy of V, which cost
 * more:
 *
 *   P, A   [16 keys][even, odd]       [16 rows][16 keys][2]: (p, 0), (0, p)
 *   O, C   [32 columns][even, odd]    [16 rows][16 columns] fp32
 *
 * The reference m of a row moves only when a score exceeds it by 8: O is rarely rescaled.
 */
#include <float.h>

#include "cpu/x86/kernels_x86.h"
#include "cpu/x86/mla_rows_avx512.h"
#include "cpu/x86/tile_amx.h"

enum {
    BLOCK = 256,      /* keys */
    BLOCK_LONE = 128, /* of a single row tile: O is small, and K is read again from L2 */
    STEP = 32,        /* keys of a step of P V */
    STEPS = BLOCK / STEP,
    ROWS_MAX = 128,
    COLUMN_TILES = ATTN_MLA_LATENT / 16,
    K_ROW = 2 * ATTN_MLA_WIDTH_MAX,
    V_ROW = 4 * ATTN_MLA_LATENT +
        64, /* bytes; the gap keeps a tile's rows in different cache sets */
};
#define SLACK 8.0f /* log2 units by which a score may exceed the reference */

/* 16 keys as an operand A. */
struct key_tile {
    const char *row;
    int64_t bytes; /* from one row to the next */
};

/* Rows of the next block of which lines are still to be asked for, `step` bytes apart: all lines of
 * single rows, every third of long runs, as the hardware then fetches those between. */
struct ahead {
    const char *const *row;
    int32_t rows, at, bytes, step; /* at: in the first of the rows */
};

struct work {
    char *q, *k, *v, *s, *p, *o;
    float *m, *l, *top;         /* [rows] */
    int32_t *hi;                /* [rows] */
    const char **row, **scales; /* [2][BLOCK] */
    struct key_tile *tile;      /* [BLOCK / 16] */
    struct ahead *ahead;
    int row_tiles, width; /* width: d_qk / 32 */
    bool lone;            /* one row tile, V in place */
};

static int64_t lay_out(struct work *w, char *base, int64_t rows, int64_t d_qk)
{
    int64_t at = 0, tiles = (rows + 15) / 16;
#define PART(member, bytes)                                                                        \
    do {                                                                                           \
        w->member = (void *)(base + at);                                                           \
        at += ((bytes) + 63) / 64 * 64;                                                            \
    } while (0)
    PART(q, tiles * (d_qk / 32) * TILE_BYTES);
    PART(k, BLOCK * (int64_t)K_ROW);
    PART(v, BLOCK / 2 * (int64_t)V_ROW);
    PART(s, 2 * 4 * (int64_t)TILE_BYTES);
    PART(p, (tiles < 2 ? 2 : tiles) * STEPS * TILE_BYTES);
    PART(o, tiles * COLUMN_TILES * TILE_BYTES);
    PART(m, tiles * 64);
    PART(l, tiles * 64);
    PART(top, tiles * 64);
    PART(hi, tiles * 64);
    PART(row, 2 * BLOCK * (int64_t)sizeof(char *));
    PART(scales, 2 * BLOCK * (int64_t)sizeof(char *));
    PART(tile, BLOCK / 16 * (int64_t)sizeof(struct key_tile));
#undef PART
    w->row_tiles = (int)tiles;
    w->width = (int)(d_qk / 32);
    return at;
}

static int64_t scratch_bytes(int64_t rows, int64_t d_qk)
{
    struct work w;
    static char base[64];
    return lay_out(&w, base, rows, d_qk);
}

/* ---- operands -------------------------------------------------------------------------------- */

/* q as tiles B: 16 rows at a time, 16 x 16 dwords transposed; rows past the last are 0. */
static void pack_q(const struct attn_mla_task *t, enum attn_mla_format format, const struct work *w)
{
    const enum attn_mla_format type = format == (enum attn_mla_format)ATTN_F8
                                          ? format
                                          : (enum attn_mla_format)ATTN_BF16;
    for (int r0 = 0; r0 < w->row_tiles; r0++) {
        for (int i = 0; i < 16; i++) {
            uint16_t *to = (uint16_t *)(void *)(w->k + i * K_ROW);
            if (r0 * 16 + i < t->rows)
                row_to_bf16(type, t->q + t->q_row[r0 * 16 + i], NULL, t->d_qk, to);
            else
                memset(to, 0, (size_t)t->d_qk * 2);
        }
        for (int x = 0; x < w->width; x++) {
            vec block[16];
            VEC_UNROLL
            for (int i = 0; i < 16; i++) block[i] = vec_load_f32(w->k + i * K_ROW + 64 * x);
            vec_transpose(block);
            char *to = w->q + (r0 * w->width + x) * TILE_BYTES;
            VEC_UNROLL
            for (int i = 0; i < 16; i++) vec_store((float *)(void *)(to + 64 * i), block[i]);
        }
    }
}

/* Whether these 16 rows lie one distance apart. */
static bool evenly_spaced(const char *const *row)
{
    const intptr_t step = (intptr_t)row[1] - (intptr_t)row[0];
    bool even = true;
    for (int i = 2; i < 16; i++) even &= (intptr_t)row[i] - (intptr_t)row[i - 1] == step;
    return even;
}

/* ---- a block of keys ------------------------------------------------------------------------- */

struct block {
    const char **row, **scales; /* [n] */
    int32_t first, n;           /* keys before it, keys of it */
    int steps;                  /* of 32 keys, the last one perhaps not full */
};

enum { FETCH = 384 }; /* bytes asked for at a time, a third of a row of bf16 */

VEC_INLINE void fetch(struct ahead *a)
{
    if (a->rows == 0) return;
    for (int32_t i = 0; i < FETCH; i += a->step) _mm_prefetch(*a->row + a->at + i, _MM_HINT_T1);
    a->at += FETCH;
    if (a->at < a->bytes) return;
    a->at = 0;
    a->row++;
    a->rows--;
}

/* The tiles of K.  Rows past the last key, up to a whole step, are 0. */
static void find_keys(const struct block *b, enum attn_mla_format format, int32_t d,
                      const struct work *w)
{
    for (int32_t j = 0; j < b->steps * STEP; j += 16) {
        struct key_tile *tile = &w->tile[j / 16];
        *tile = (struct key_tile){w->k + j * K_ROW, K_ROW};
        if (format == (enum attn_mla_format)ATTN_BF16 && j + 16 <= b->n &&
            evenly_spaced(b->row + j)) {
            *tile = (struct key_tile){b->row[j], b->row[j + 1] - b->row[j]};
            continue;
        }
        for (int32_t i = j; i < j + 16; i++) {
            uint16_t *to = (uint16_t *)(void *)(w->k + i * K_ROW);
            if (i < b->n)
                row_to_bf16(format, b->row[i], b->scales ? b->scales[i] : NULL, d, to);
            else
                memset(to, 0, (size_t)d * 2);
        }
    }
    tile_fence();
}

/* Keys j and j + 1 to V; those past the last key are 0. */
VEC_INLINE void make_values(const struct work *w, const struct block *b, int32_t j)
{
    const struct key_tile *tile = &w->tile[j / 16];
    const char *k = tile->row + j % 16 * tile->bytes;
    char *v = w->v + j / 2 * V_ROW;
    if (j < b->n)
        interleave(k, j + 1 < b->n ? k + tile->bytes : NULL, v);
    else
        memset(v, 0, V_ROW - 64);
}

/* ---- P of 32 keys x 16 rows ------------------------------------------------------------------ */

/* S of row tile r: key j at s + j / 16 * s_tile + j % 16 * 64, its P tile at p. */
struct strip {
    char *s, *p;
    int64_t s_tile;
    int r;
    vec m, l, factor; /* the exponent is S * factor - m */
};

VEC_INLINE float *strip_row(const struct strip *b, int j)
{
    return (float *)(void *)(b->s + j / 16 * b->s_tile + j % 16 * 64);
}

/* Row r of P for 16 keys, as (p, 0) and, a tile on, (0, p). */
VEC_INLINE void put_apart(char *p, vec x)
{
    const __m512i odd = pair_bf16(vec_zero(), x);
    _mm512_store_si512(p, _mm512_srli_epi32(odd, 16));
    _mm512_store_si512(p + TILE_BYTES, odd);
}

/* Multiplies the rows of row tile r of O and of the P tiles before step x. */
static void rescale(const struct work *w, const struct block *b, int r, int x, vec f)
{
    float factor[16] __attribute__((aligned(64)));
    const __m512i upper = _mm512_set1_epi32(-0x10000);
    char *o = w->o + (int64_t)r * COLUMN_TILES * TILE_BYTES;
    char *p = w->p + (int64_t)r * STEPS * TILE_BYTES;
    vec_store(factor, f);
    for (int64_t c = 0; b->first > 0 && c < COLUMN_TILES * 16; c++) {
        float *row = (float *)(void *)(o + c * 64);
        vec_store(row, vec_mul(vec_load(row), vec_set1(factor[c % 16])));
    }
    for (int64_t c = 0; w->lone && c < x * 32; c++) {
        char *pair = p + c / 16 * 2 * TILE_BYTES + c % 16 * 64;
        const vec old = vec_load((const float *)(const void *)(pair + TILE_BYTES));
        put_apart(pair, vec_mul(old, vec_set1(factor[c % 16])));
    }
    if (w->lone) return;
    for (int64_t c = 0; c < x * 16; c++) {
        const __m512i pair = _mm512_load_si512(p + c * 64);
        const vec low = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
        const vec high = _mm512_castsi512_ps(_mm512_and_si512(pair, upper));
        const vec by = vec_set1(factor[c % 16]);
        _mm512_store_si512(p + c * 64, pair_bf16(vec_mul(low, by), vec_mul(high, by)));
    }
}

/* Opens the strip: the maximum, and the reference m if it has to move. */
VEC_INLINE void strip_begin(const struct work *w, const struct attn_mla_task *t,
                            const struct block *b, struct strip *strip, int x, int32_t least)
{
    const vec none = vec_set1(-INFINITY), scale = vec_set1(t->scale);
    const int at = 16 * strip->r, n = b->n - x * STEP;
    const int32_t first = b->first + x * STEP;
    vec high = none;
    strip->factor = scale;
    if (n >= STEP && first + STEP <= least) {
        VEC_UNROLL
        for (int j = 0; j < STEP; j++)
            high = vec_max(vec_mul(vec_load(strip_row(strip, j)), scale), high);
    } else { /* some row does not see some key */
        strip->factor = vec_set1(1.0f);
        for (int j = 0; j < STEP; j++) {
            const vec_mask seen = _mm512_cmpgt_epi32_mask(vec_int_load(w->hi + at),
                                                          _mm512_set1_epi32(first + j));
            vec s = vec_mul(vec_load(strip_row(strip, j)), scale);
            s = vec_select(j < n ? seen : 0, s, none);
            vec_store(strip_row(strip, j), s);
            high = vec_max(s, high);
        }
    }
    strip->m = vec_load(w->m + at);
    strip->l = vec_load(w->l + at);
    vec_store(w->top + at, vec_max(high, vec_load(w->top + at)));
    const vec_mask rises = vec_gt(high, vec_add(strip->m, vec_set1(SLACK)));
    if (vec_any(rises)) {
        const vec to = vec_select(rises, high, strip->m), f = vec_exp2(vec_sub(strip->m, to));
        rescale(w, b, strip->r, x, f);
        strip->l = vec_mul(strip->l, f);
        strip->m = to;
        vec_store(w->m + at, to);
    }
}

/* Keys 2 i and 2 i + 1. */
VEC_INLINE void strip_pair(struct strip *b, int i)
{
    const vec x = _mm512_fmsub_ps(vec_load(strip_row(b, 2 * i)), b->factor, b->m);
    const vec y = _mm512_fmsub_ps(vec_load(strip_row(b, 2 * i + 1)), b->factor, b->m);
    const vec low = vec_exp2(x), high = vec_exp2(y);
    b->l = vec_add(b->l, vec_add(low, high));
    _mm512_store_si512(b->p + 64 * i, pair_bf16(low, high));
}

/* Closes it: [16 pairs][16 rows] becomes [16 rows][16 pairs]. */
VEC_INLINE void strip_end(const struct work *w, const struct strip *b)
{
    vec pairs[16];
    VEC_UNROLL
    for (int i = 0; i < 16; i++) pairs[i] = vec_load((const float *)(const void *)(b->p + 64 * i));
    vec_transpose(pairs);
    VEC_UNROLL
    for (int i = 0; i < 16; i++) vec_store((float *)(void *)(b->p + 64 * i), pairs[i]);
    vec_store(w->l + 16 * b->r, b->l);
}

static struct strip strip_of(const struct work *w, char *s, int64_t s_tile, int r, int x)
{
    return (struct strip){.s = s,
                          .s_tile = s_tile,
                          .r = r,
                          .p = w->p + ((int64_t)r * STEPS + x) * TILE_BYTES};
}

/* ---- S^T = K Q^T ----------------------------------------------------------------------------- */

/* What one 32 x 32 product of S does beside its own work. */
struct beside {
    struct strip *strips;       /* two whose exponentials are due, or NULL */
    const struct block *values; /* a block whose V is to be made from key `at` on, or NULL */
    int32_t at;
};

/* 32 keys x 32 rows; S tiles [key tile][row tile].  Tile products wait for the tile unit alone, so
 * a pair of keys of the strips, and of V, goes with each step of 32 d. */
VEC_INLINE void scores_pair(const struct work *w, const struct key_tile *k, const char *q0,
                            const char *q1, const struct beside *beside)
{
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
    for (int x = 0; x < w->width; x++) {
        tile_load_at_once(4, k[0].row + 64 * x, k[0].bytes);
        tile_load(6, q0 + TILE_BYTES * x);
        tile_load(7, q1 + TILE_BYTES * x);
        tile_load_at_once(5, k[1].row + 64 * x, k[1].bytes);
        tile_dpbf16(0, 4, 6);
        tile_dpbf16(1, 4, 7);
        tile_dpbf16(2, 5, 6);
        tile_dpbf16(3, 5, 7);
        fetch(w->ahead);
        if (x >= 16) continue;
        if (beside->strips) {
            strip_pair(&beside->strips[0], x);
            strip_pair(&beside->strips[1], x);
        }
        if (beside->values) make_values(w, beside->values, beside->at + 2 * x);
    }
}

/* S and P of row tiles r and r + 1 over the block; the exponentials of a step go beside the
 * products of the next, those of the last step of all beside the next pair's first.  `due` are the
 * strips that wait: none, or two. */
static void weigh_pair(const struct work *w, const struct attn_mla_task *t, const struct block *b,
                       int r, int32_t least, struct strip due[2], bool *waiting, int *turn)
{
    const char *q = w->q + r * w->width * TILE_BYTES, *q1 = q + w->width * TILE_BYTES;
    for (int x = 0; x < b->steps; x++) {
        char *s = w->s + *turn * 4 * TILE_BYTES;
        if (*waiting && r == 0)
            scores_pair(w, w->tile + 2 * x, q, q1, &(struct beside){due, b, x * STEP});
        else if (*waiting)
            scores_pair(w, w->tile + 2 * x, q, q1, &(struct beside){due, NULL, 0});
        else
            scores_pair(w, w->tile + 2 * x, q, q1, &(struct beside){NULL, b, x * STEP});
        if (*waiting) {
            strip_end(w, &due[0]);
            strip_end(w, &due[1]);
        }
        tile_store(0, s);
        tile_store(1, s + TILE_BYTES);
        tile_store(2, s + 2 * TILE_BYTES);
        tile_store(3, s + 3 * TILE_BYTES);
        tile_fence();
        for (int i = 0; i < 2; i++) {
            due[i] = strip_of(w, s + i * TILE_BYTES, 2 * TILE_BYTES, r + i, x);
            strip_begin(w, t, b, &due[i], x, least);
        }
        *waiting = true;
        *turn ^= 1;
    }
}

/* Those that no product is left to hide. */
static void finish_strips(const struct work *w, struct strip due[2])
{
    for (int n = 0; n < 2; n++) {
        for (int i = 0; i < 16; i++) strip_pair(&due[n], i);
        strip_end(w, &due[n]);
    }
}

/* 32 keys x 16 rows; S tiles [key tile]. */
static void scores_one(const struct key_tile *k, const char *q, int width, char *s)
{
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
    for (int x = 0; x < width; x += 2) { /* two chains a tile: a sum waits 64 clocks for the last */
        tile_load(6, q + TILE_BYTES * x);
        tile_load_at_once(4, k[0].row + 64 * x, k[0].bytes);
        tile_load_at_once(5, k[1].row + 64 * x, k[1].bytes);
        tile_dpbf16(0, 4, 6);
        tile_dpbf16(1, 5, 6);
        tile_load(7, q + TILE_BYTES * (x + 1));
        tile_load_at_once(4, k[0].row + 64 * (x + 1), k[0].bytes);
        tile_load_at_once(5, k[1].row + 64 * (x + 1), k[1].bytes);
        tile_dpbf16(2, 4, 7);
        tile_dpbf16(3, 5, 7);
    }
    tile_store(0, s);
    tile_store(1, s + TILE_BYTES);
    tile_store(2, s + 2 * TILE_BYTES);
    tile_store(3, s + 3 * TILE_BYTES);
    tile_fence();
    for (int i = 0; i < 32; i++) {
        float *x = (float *)(void *)(s + 64 * i);
        vec_store(x, vec_add(vec_load(x), vec_load(x + 2 * TILE_BYTES / 4)));
    }
}

/* The same for a row tile that has no partner.  V is made here when it is the only one. */
static void weigh_one(const struct work *w, const struct attn_mla_task *t, const struct block *b,
                      int r, int32_t least)
{
    for (int x = 0; x < b->steps; x++) {
        for (int i = 0; r == 0 && i < STEP; i += 2) make_values(w, b, x * STEP + i);
        scores_one(w->tile + 2 * x, w->q + r * w->width * TILE_BYTES, w->width, w->s);
        struct strip strip = strip_of(w, w->s, TILE_BYTES, r, x);
        strip_begin(w, t, b, &strip, x, least);
        for (int i = 0; i < 16; i++) strip_pair(&strip, i);
        strip_end(w, &strip);
    }
}

/* The same for the only row tile, whose P is laid out for V in place. */
static void weigh_lone(const struct work *w, const struct attn_mla_task *t, const struct block *b,
                       int32_t least)
{
    for (int x = 0; x < b->steps; x++) {
        scores_one(w->tile + 2 * x, w->q, w->width, w->s);
        struct strip strip = strip_of(w, w->s, TILE_BYTES, 0, x);
        strip_begin(w, t, b, &strip, x, least);
        for (int j = 0; j < STEP; j += 16) {
            char *p = w->p + (2 * x + j / 16) * 2 * TILE_BYTES;
            vec e[16];
            VEC_UNROLL
            for (int i = 0; i < 16; i++) {
                const vec y = vec_load(strip_row(&strip, j + i));
                e[i] = vec_exp2(_mm512_fmsub_ps(y, strip.factor, strip.m));
                strip.l = vec_add(strip.l, e[i]);
            }
            vec_transpose(e);
            VEC_UNROLL
            for (int i = 0; i < 16; i++) put_apart(p + 64 * i, e[i]);
        }
        vec_store(w->l, strip.l);
    }
}

/* ---- O += P V -------------------------------------------------------------------------------- */

/* 32 rows x 32 columns. */
static void values_pair(const char *p0, const char *p1, const char *v, int steps, bool first,
                        char *o0, char *o1, struct ahead *ahead)
{
    if (first) {
        tile_zero(0);
        tile_zero(1);
        tile_zero(2);
        tile_zero(3);
    } else {
        tile_load(0, o0);
        tile_load(1, o0 + TILE_BYTES);
        tile_load(2, o1);
        tile_load(3, o1 + TILE_BYTES);
    }
    for (int x = 0; x < steps; x++) {
        tile_load_at(6, v + x * 16 * V_ROW, V_ROW);
        tile_load(4, p0 + TILE_BYTES * x);
        tile_load(5, p1 + TILE_BYTES * x);
        tile_load_at(7, v + x * 16 * V_ROW + 64, V_ROW);
        tile_dpbf16(0, 4, 6);
        tile_dpbf16(2, 5, 6);
        tile_dpbf16(1, 4, 7);
        tile_dpbf16(3, 5, 7);
        fetch(ahead);
    }
    tile_store(0, o0);
    tile_store(1, o0 + TILE_BYTES);
    tile_store(2, o1);
    tile_store(3, o1 + TILE_BYTES);
}

/* 16 rows x 64 columns. */
static void values_four(const char *p, const char *v, int steps, bool first, char *o)
{
    if (first) {
        tile_zero(0);
        tile_zero(1);
        tile_zero(2);
        tile_zero(3);
    } else {
        tile_load(0, o);
        tile_load(1, o + TILE_BYTES);
        tile_load(2, o + 2 * TILE_BYTES);
        tile_load(3, o + 3 * TILE_BYTES);
    }
    for (int x = 0; x < steps; x++) {
        const char *b = v + x * 16 * V_ROW;
        tile_load(4, p + TILE_BYTES * x);
        tile_load_at(5, b, V_ROW);
        tile_load_at(6, b + 64, V_ROW);
        tile_load_at(7, b + 128, V_ROW);
        tile_dpbf16(0, 4, 5);
        tile_load_at(5, b + 192, V_ROW);
        tile_dpbf16(1, 4, 6);
        tile_dpbf16(2, 4, 7);
        tile_dpbf16(3, 4, 5);
    }
    tile_store(0, o);
    tile_store(1, o + TILE_BYTES);
    tile_store(2, o + 2 * TILE_BYTES);
    tile_store(3, o + 3 * TILE_BYTES);
}

/* Row tiles r0 and, with count 2, the next. */
static void values(const struct work *w, int r0, int count, int steps, bool first)
{
    const char *p = w->p + (int64_t)r0 * STEPS * TILE_BYTES;
    char *o = w->o + (int64_t)r0 * COLUMN_TILES * TILE_BYTES;
    if (count == 2) {
        char *o1 = o + COLUMN_TILES * TILE_BYTES;
        for (int c = 0; c < COLUMN_TILES; c += 2)
            values_pair(p, p + STEPS * TILE_BYTES, w->v + 64 * c, steps, first, o + c * TILE_BYTES,
                        o1 + c * TILE_BYTES, w->ahead);
    } else {
        for (int c = 0; c < COLUMN_TILES; c += 4)
            values_four(p, w->v + 64 * c, steps, first, o + c * TILE_BYTES);
    }
}

/* 16 rows x 64 columns, V in place. */
static void values_lone(const struct work *w, int key_tiles, bool first)
{
    for (int c = 0; c < COLUMN_TILES; c += 4) {
        char *o = w->o + c * TILE_BYTES;
        if (first) {
            tile_zero(0);
            tile_zero(1);
            tile_zero(2);
            tile_zero(3);
        } else {
            tile_load(0, o);
            tile_load(1, o + TILE_BYTES);
            tile_load(2, o + 2 * TILE_BYTES);
            tile_load(3, o + 3 * TILE_BYTES);
        }
        for (int x = 0; x < key_tiles; x++) {
            const char *p = w->p + x * 2 * TILE_BYTES, *v = w->tile[x].row + 32 * c;
            tile_load_at_once(6, v, w->tile[x].bytes);
            tile_load_at_once(7, v + 64, w->tile[x].bytes);
            tile_load(4, p);
            tile_load(5, p + TILE_BYTES);
            tile_dpbf16(0, 4, 6);
            tile_dpbf16(1, 5, 6);
            tile_dpbf16(2, 4, 7);
            tile_dpbf16(3, 5, 7);
        }
        tile_store(0, o);
        tile_store(1, o + TILE_BYTES);
        tile_store(2, o + 2 * TILE_BYTES);
        tile_store(3, o + 3 * TILE_BYTES);
    }
}

/* ---- a task ---------------------------------------------------------------------------------- */

/* O to [rows][512], columns put back in order.  True: a NaN in a row whose l is a number. */
static bool write_rows(const struct attn_mla_task *t, const struct work *w)
{
    const __m512i unpacked = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22,
                                               23);
    const __m512i in_turn = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7,
                                              23);
    const __m512i lower = w->lone ? in_turn : unpacked;
    const __m512i upper = _mm512_add_epi32(lower, _mm512_set1_epi32(8));
    bool stray = false;
    for (int32_t r = 0; r < t->rows; r++) {
        vec_mask nan = 0;
        const char *o = w->o + (int64_t)(r / 16) * COLUMN_TILES * TILE_BYTES + r % 16 * 64;
        float *to = t->o + (int64_t)r * ATTN_MLA_LATENT;
        for (int c = 0; c < COLUMN_TILES; c += 2) {
            const vec a = vec_load((const float *)(const void *)(o + c * TILE_BYTES));
            const vec b = vec_load((const float *)(const void *)(o + (c + 1) * TILE_BYTES));
            vec_store(to + 16 * c, _mm512_permutex2var_ps(a, lower, b));
            vec_store(to + 16 * c + 16, _mm512_permutex2var_ps(a, upper, b));
            nan |= _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q);
        }
        stray |= nan && w->l[r] == w->l[r];
    }
    return stray;
}

static int32_t row_bytes(enum attn_mla_format format, int32_t d)
{
    switch ((int)format) {
    case ATTN_BF16: return 2 * d;
    case ATTN_F8: return d;
    case ATTN_MLA_V32: return ATTN_V32_BYTES;
    default: return ATTN_MODEL1_ROW_BYTES;
    }
}

/* The block after b, of up to `max` keys, in the halves of w->row and w->scales that b leaves. */
static struct block block_after(const struct block *b, struct attn_mla_cursor *keys, int32_t max,
                                const struct work *w)
{
    const int64_t half = b->row == w->row ? BLOCK : 0;
    struct block next = {
        .row = w->row + half,
        .scales = keys->scales ? w->scales + half : NULL,
        .first = b->first + b->n,
    };
    next.n = attn_mla_next_keys(keys, max, next.row, next.scales);
    next.steps = (next.n + STEP - 1) / STEP;
    return next;
}

/* True: O has a NaN in a row whose l is a number. */
static bool attend_in(const struct attn_mla_task *t, enum attn_mla_format format, char *scratch,
                      bool lone)
{
    struct work w;
    struct attn_mla_cursor keys = t->keys;
    lay_out(&w, scratch, t->rows, t->d_qk);
    w.lone = lone;
    int32_t least = INT32_MAX;
    for (int i = 0; i < 16 * w.row_tiles; i++) {
        w.m[i] = -FLT_MAX;
        w.l[i] = 0;
        w.top[i] = -INFINITY;
        w.hi[i] = t->hi && i < t->rows ? t->hi[i] : INT32_MAX;
        least = w.hi[i] < least ? w.hi[i] : least;
    }
    pack_q(t, format, &w);
    const bool runs = keys.pages && keys.cache->row_stride == 2 * t->d_qk;
    const int32_t max = lone ? BLOCK_LONE : BLOCK;
    struct ahead ahead;
    w.ahead = &ahead;
    struct block next = block_after(&(struct block){0}, &keys, max, &w);
    tile_begin();
    while (next.n > 0) {
        const struct block b = next;
        struct strip due[2];
        bool waiting = false;
        int turn = 0, r = 0;
        next = block_after(&b, &keys, max, &w);
        ahead = (struct ahead){next.row, next.n, 0, row_bytes(format, t->d_qk), runs ? 192 : 64};
        find_keys(&b, format, t->d_qk, &w);
        if (lone) {
            weigh_lone(&w, t, &b, least);
            tile_fence();
            values_lone(&w, 2 * b.steps, b.first == 0);
            tile_fence();
            continue;
        }
        for (; r + 2 <= w.row_tiles; r += 2) weigh_pair(&w, t, &b, r, least, due, &waiting, &turn);
        if (waiting) finish_strips(&w, due);
        if (r < w.row_tiles) weigh_one(&w, t, &b, r, least);
        tile_fence();
        for (r = 0; r < w.row_tiles; r += 2)
            values(&w, r, w.row_tiles - r > 1 ? 2 : 1, b.steps, b.first == 0);
        tile_fence();
    }
    tile_end();
    memcpy(t->m, w.m, (size_t)t->rows * sizeof *t->m);
    memcpy(t->l, w.l, (size_t)t->rows * sizeof *t->l);
    memcpy(t->top, w.top, (size_t)t->rows * sizeof *t->top);
    return write_rows(t, &w);
}

/* V in place carries an infinity to the column beside it, by a product with 0: such tasks are done
 * again with V interleaved. */
static void attend(const struct attn_mla_task *t, enum attn_mla_format format, char *scratch)
{
    const bool lone = t->rows <= 16;
    if (attend_in(t, format, scratch, lone) && lone) attend_in(t, format, scratch, false);
}

static void run_bf16(const struct attn_mla_task *t, char *s)
{
    attend(t, (enum attn_mla_format)ATTN_BF16, s);
}
static void run_f8(const struct attn_mla_task *t, char *s)
{
    attend(t, (enum attn_mla_format)ATTN_F8, s);
}
static void run_v32(const struct attn_mla_task *t, char *s) { attend(t, ATTN_MLA_V32, s); }
static void run_model1(const struct attn_mla_task *t, char *s) { attend(t, ATTN_MLA_MODEL1, s); }

const struct attn_mla_kernel attn_mla_amx[ATTN_MLA_FORMATS] = {
    [ATTN_BF16] = {"attn_mla_bf16_amx", ROWS_MAX, scratch_bytes, run_bf16},
    [ATTN_F8] = {"attn_mla_fp8_amx", ROWS_MAX, scratch_bytes, run_f8},
    [ATTN_MLA_V32] = {"attn_mla_v32_amx", ROWS_MAX, scratch_bytes, run_v32},
    [ATTN_MLA_MODEL1] = {"attn_mla_model1_amx", ROWS_MAX, scratch_bytes, run_model1},
};
