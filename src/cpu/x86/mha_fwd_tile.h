/* SPDX-License-Identifier: MIT
 *
 * mha_fwd on AMX tiles: one body for bf16 and fp8 (mha_fwd_amx.c), fp16 (mha_fwd_fp16_amx.c) and
 * fp32 (mha_fwd_fp32_amx.c).
 *
 * Math, keys down and queries across, so that a lane is a query everywhere:
 *   S^T = K Q^T                     fp32, tiles of 16 keys x 16 queries
 *   P   = 2^(S c - m)               c = scale log2(e), rounded to bf16 for the product
 *   O^T = V^T P^T                   fp32, tiles of 16 d x 16 queries
 *   out = O out_scale / l,  lse = (m + log2 l) ln 2       l: sum of P before it is rounded
 * Tiles multiply bf16.  fp8 is decoded to it when it is packed.  fp16, and P with it, is cut in two
 * planes, a = a1 + a2: K Q has all four products of planes, V P is a1 b2 + a1 b1 + a2 b1, which
 * leaves out 2^-18 of |a| |b|.  fp32 is cut in three, of 8 bits each, and of the nine products the
 * six largest are taken, which leaves out 2^-26 of |a| |b|: less than fp32's own rounding.
 *
 * A partial result, which is fp32, is divided by the sum of the rounded P instead: a row ruled by
 * one key then gives that key's V to fp32's accuracy.
 *
 * m is a reference, not the maximum: it begins M_SLACK - 1 above the largest score of the first
 * beat (64 keys) and moves, to as much above a later one, only when an exponential comes to 2 or
 * more.  So O is almost never rescaled, and no maximum is taken: the bits of all exponentials are
 * ORed, and the upper exponent bit says that some is 2 or more (or NaN).  A row that sees no key,
 * or only -inf, keeps m = M_NONE and l = 0: out is 0, lse -inf.
 *
 * Work is cut into units: 32 queries ("a pair" of tiles) against a block of 256 keys.  All pairs of
 * the task take a block before the next one, so K and V come once from memory into L2; from there
 * they stream past L1, which holds the pair's Q, S and P.
 *
 * Pipeline.  A beat is two score steps of 32 keys; a unit has four.
 *   beat    | 0    1    2    3    4    5    6    7    8        to the end
 *   tiles   | S0   S1   S2   S3   S4   S5   S6   S7   S8       S = K Q^T of one beat
 *           |                          O += P V of unit 0      a quarter of the unit's products
 *   vectors |      P0   P1   P2   P3   P4   P5   P6   P7       exp of the beat before
 * Within a beat tiles and vectors are interleaved in source order: after every step of a tile
 * product (four TDPBF16PS, 64 clocks) come chunks of exp (8 keys x 16 queries, or 4), since the scheduler
 * is too small to find the overlap by itself.  The results of a product are stored during the first
 * step of the next one.  S is a ring of three steps, P a double buffer of units.
 *
 * While tiles multiply, port 5 has no FMA: an exponential may cost 8 slots of port 0, and takes 6.
 *
 * Exponentials are taken with the m of the beat's begin; where it turns out too small (close_beat)
 * the beat's exponentials are taken again.
 */
#ifndef ATTN_CPU_X86_MHA_FWD_TILE_H
#define ATTN_CPU_X86_MHA_FWD_TILE_H

#include <math.h>
#include <string.h>

#include "cpu/x86/kernels_x86.h"
#include "cpu/x86/mha_fwd_amx_pack.h"
#include "cpu/x86/softcap_avx512.h"

enum {
    ROWS_MAX = 256,
    PAIRS_MAX = ROWS_MAX / 32,
    BEAT_STEPS = 2,
    S_STEPS = 3, /* S of the steps being made and being used */
    VECTORS = 4, /* keys whose exponentials are taken together */
    S_PRODUCTS = PLANES == 2 ? 4 : PLANES * (PLANES + 1) / 2, /* of planes, in a product K Q; */
    PV_PRODUCTS = PLANES * (PLANES + 1) / 2,                  /* in one of V P */
};

#define M_NONE (-0x1p120f)
#define M_SLACK 8.0f /* log2: how far scores may pass the first maximum */
#define LOG2_E 1.44269504f
#define LN_2 0.693147181f

/* Steps [begin, end) of one beat of a pair. */
struct beat {
    int64_t begin, end;
    int pair, slot; /* slot: where S of its first step lies; a ring */
    bool last;      /* of its unit */
    bool first;     /* of its pair */
    int parity;     /* of its unit: which half of the P buffer */
};

/* A unit whose P is complete; its products are spread over the beats that follow. */
struct unit {
    const char *v, *p; /* at the first of its steps */
    int64_t first, steps;
    int64_t done, products; /* products is 0 where there is no unit */
    int pair;
    bool last;       /* of its pair */
    bool accumulate; /* the pair's O holds sums */
};

struct work {
    const struct attn_mha_task *task;
    int64_t k_steps, v_steps;      /* d_s / 32, d_v / 32, rounded up */
    int64_t block_bytes;           /* of a packed block, */
    int64_t v_offset, bits_offset; /* of V in it, of the bits */
    int pairs;                     /* of 2 tiles of 16 queries */
    enum attn_dtype dtype;
    float scale; /* c above, positive; 1 with softcap */
    bool capped;
    char *q, *s, *p, *o; /* layouts in mha_fwd_amx_pack.h; two halves of p */
    char *pending;       /* where tiles 0 to 3 are to be stored, or NULL */

    struct beat exp;       /* whose exponentials are being taken */
    int chunk, chunks;     /* next one; all of the beat */
    int64_t credit, ticks; /* chunks are spread evenly over the beat's tile steps */
    struct unit full;      /* being multiplied */
    int64_t p_begin;       /* first step of the exp unit that is in no product yet */
    int complete;          /* pair whose O has all products, the last one's pending, or -1 */

    /* A lane a query: 16 a tile. */
    float beat_l[32] __attribute__((aligned(64)));    /* the beat's part of l */
    int32_t beat_or[32] __attribute__((aligned(64))); /* all bits set in its exponentials */
    float m[ROWS_MAX] __attribute__((aligned(64)));
    float l[ROWS_MAX] __attribute__((aligned(64)));
    float p_sum[2][ROWS_MAX] __attribute__((aligned(64))); /* in steps of even, odd number */
    int32_t lo[ROWS_MAX] __attribute__((aligned(64)));
    int32_t seen[ROWS_MAX] __attribute__((aligned(64)));  /* hi - lo */
    int32_t all_lo[ROWS_MAX / 16], all_hi[ROWS_MAX / 16]; /* keys that all 16 queries see */
    int64_t begin[PAIRS_MAX], end[PAIRS_MAX];             /* steps that some query sees */
    bool o_used[PAIRS_MAX];                               /* O holds sums */
    bool finished[PAIRS_MAX];                             /* out and lse are written */
    bool v_bad;                                           /* some V has infinities or NaNs */
    bool q_bad[PAIRS_MAX]; /* more planes: q of the pair has infinities or NaNs */
    struct softcap cap;
};

/* Keys whose exponentials are taken between steps of a product: as many as hide beside one. */
static inline int chunk_keys(bool capped) { return PLANES == 1 && !capped ? 8 : 4; }

/* With softcap they are more work, and half a step hides some too. */
static inline bool halves(bool capped) { return PLANES == 1 && capped; }

/* 16 queries of `tile`, element d of O. */
static inline float *o_line(const struct work *w, int64_t tile, int64_t d)
{
    char *quad = w->o + (tile / 2 * w->v_steps + d / 32) * QUAD_BYTES;
    quad += d % 32 / 16 * PAIR_BYTES + tile % 2 * TILE_BYTES + d % 16 * TILE_ROW_BYTES;
    return (float *)(void *)quad;
}

/* S of one of the steps of a beat. */
static inline char *s_quad(const struct work *w, const struct beat *b, int64_t step)
{
    return w->s + (b->slot + step - b->begin) % S_STEPS * QUAD_BYTES;
}

/* ---- exponentials ---------------------------------------------------------------------------- */

/* x = 2^x by a degree 3 polynomial in x - floor(x), relative error 7.5e-5; -inf gives 0. */
static inline __attribute__((always_inline)) void exp2_few(__m512 *x, int n)
{
    __m512 f[VECTORS], y[VECTORS];
    EACH(i, n) f[i] = _mm512_reduce_ps(x[i], 0x09);
    EACH(i, n)
    y[i] = _mm512_fmadd_ps(f[i], _mm512_set1_ps(0.0780245226f), _mm512_set1_ps(0.226067155f));
    EACH(i, n) y[i] = _mm512_fmadd_ps(y[i], f[i], _mm512_set1_ps(0.69583354f));
    EACH(i, n) y[i] = _mm512_fmadd_ps(y[i], f[i], _mm512_set1_ps(0.999925219f));
    EACH(i, n) x[i] = _mm512_scalef_ps(y[i], x[i]);
}

/* Degree 5 in `exact` lanes, to 7.5e-8, and in the others the bits of exp2_few. */
static inline __attribute__((always_inline)) void exp2_few_mixed(__m512 *x, int n, __mmask16 exact)
{
#define EITHER(yes, no) _mm512_mask_mov_ps(_mm512_set1_ps(no), exact, _mm512_set1_ps(yes))
    const __m512 c[] = {
        EITHER(0.999999925f, 0.999925219f), EITHER(0.693153073f, 0.69583354f),
        EITHER(0.240153617f, 0.226067155f), EITHER(0.0558263181f, 0.0780245226f),
        EITHER(0.00898934009f, 0),          EITHER(0.00187757668f, 0),
    };
#undef EITHER
    __m512 f[VECTORS], y[VECTORS];
    EACH(i, n) f[i] = _mm512_reduce_ps(x[i], 0x09);
    EACH(i, n) y[i] = _mm512_fmadd_ps(f[i], c[5], c[4]);
    EACH(i, n) y[i] = _mm512_fmadd_ps(y[i], f[i], c[3]);
    EACH(i, n) y[i] = _mm512_fmadd_ps(y[i], f[i], c[2]);
    EACH(i, n) y[i] = _mm512_fmadd_ps(y[i], f[i], c[1]);
    EACH(i, n) y[i] = _mm512_fmadd_ps(y[i], f[i], c[0]);
    EACH(i, n) x[i] = _mm512_scalef_ps(y[i], x[i]);
}

static inline __attribute__((always_inline)) void exp2_few_exact(__m512 *x, int n)
{
    exp2_few_mixed(x, n, 0xffff);
}

static inline __m512 exp2_16_exact(__m512 t)
{
    exp2_few_exact(&t, 1);
    return t;
}

/* log2 of x >= 0: x = 2^e y with y in [0.75, 1.5), log y = 2 atanh((y - 1) / (y + 1)). */
static inline __m512 log2_16(__m512 x)
{
    __m512 one = _mm512_set1_ps(1.0f);
    __m512 y = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
    __m512 e = _mm512_sub_ps(_mm512_getexp_ps(x), _mm512_getexp_ps(y));
    __m512 z = _mm512_div_ps(_mm512_sub_ps(y, one), _mm512_add_ps(y, one));
    __m512 z2 = _mm512_mul_ps(z, z), p = _mm512_set1_ps(2.88539008f / 9);
    p = _mm512_fmadd_ps(p, z2, _mm512_set1_ps(2.88539008f / 7));
    p = _mm512_fmadd_ps(p, z2, _mm512_set1_ps(2.88539008f / 5));
    p = _mm512_fmadd_ps(p, z2, _mm512_set1_ps(2.88539008f / 3));
    p = _mm512_fmadd_ps(p, z2, _mm512_set1_ps(2.88539008f));
    __mmask16 zero = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_EQ_OQ);
    return _mm512_mask_mov_ps(_mm512_fmadd_ps(p, z, e), zero, _mm512_set1_ps(-INFINITY));
}

/* Dwords of bf16 pairs: even below, odd above, rounded to nearest (ties away from zero). */
static inline __m512i bf16_pairs(__m512 even, __m512 odd)
{
    __m512i half = _mm512_set1_epi32(0x8000);
    __m512i high_words = _mm512_set4_epi32(0x0f0e0f0e, 0x0b0a0b0a, 0x07060706, 0x03020302);
    __m512i low = _mm512_add_epi32(_mm512_castps_si512(even), half);
    __m512i high = _mm512_add_epi32(_mm512_castps_si512(odd), half);
    low = _mm512_shuffle_epi8(low, high_words);
    return _mm512_mask_mov_epi16(low, 0xaaaaaaaa, high);
}

/* What hides keys from the queries of a tile. */
struct mask {
    __m512i lo, seen;
};

static inline struct mask load_mask(const struct work *w, int tile)
{
    return (struct mask){
        _mm512_load_si512(w->lo + 16 * tile),
        _mm512_load_si512(w->seen + 16 * tile),
    };
}

/* The queries that do not see a key. */
static inline __mmask16 hidden(const struct mask *k, int32_t key)
{
    __m512i at = _mm512_sub_epi32(_mm512_set1_epi32(key), k->lo);
    return _mm512_cmpge_epu32_mask(at, k->seen);
}

static inline __m512 mask_score(const struct mask *k, __m512 x, int32_t key)
{
    return _mm512_mask_mov_ps(x, hidden(k, key), _mm512_set1_ps(-INFINITY));
}

/* Whether step `step` needs no mask for a tile: all queries see all its keys. */
static inline bool is_plain(const struct work *w, int tile, int64_t step)
{
    return step * STEP_KEYS >= w->all_lo[tile] && (step + 1) * STEP_KEYS <= w->all_hi[tile];
}

/* Stores the bf16 planes of P of two keys, a pair each lane. */
static inline void store_p(char *p, __m512 e0, __m512 e1)
{
    VEC_UNROLL
    for (int i = 0; i < PLANES; i++) {
        __m512i high = bf16_pairs(e0, e1);
        _mm512_store_si512(p + i * PAIR_BYTES, high);
        e0 = _mm512_sub_ps(e0, _mm512_castsi512_ps(_mm512_slli_epi32(high, 16)));
        high = _mm512_and_si512(high, _mm512_set1_epi32(-0x10000));
        e1 = _mm512_sub_ps(e1, _mm512_castsi512_ps(high));
    }
}

/* One chunk: some keys x 16 queries from s[keys][16] to p[keys / 2][16 pairs].  Exponentials are exact for rows
 * that do not see all keys of the step: such a row may see few, and the error of each is that of its
 * lse.  Which these are is asked row by row, since no row may depend on its neighbours. */
static inline __attribute__((always_inline)) void
exp_rows(struct work *w, int tile, int32_t key, const float *s, char *p, bool plain, bool capped)
{
    float *beat_l = w->beat_l + tile % 2 * 16;
    int32_t *beat_or = w->beat_or + tile % 2 * 16;
    __m512 scale = _mm512_set1_ps(w->scale), m = _mm512_load_ps(w->m + 16 * tile);
    __m512 l0 = _mm512_load_ps(beat_l), l1 = _mm512_setzero_ps();
    __m512i any = _mm512_load_si512(beat_or);
    struct mask mask = {0};
    __mmask16 exact = 0;
    if (!plain) {
        const int32_t first = key & -STEP_KEYS, last = first + STEP_KEYS - 1;
        mask = load_mask(w, tile);
        exact = hidden(&mask, first) | hidden(&mask, last);
    }
    VEC_UNROLL
    for (int j = 0; j < chunk_keys(capped); j += VECTORS) {
        __m512 x[VECTORS];
        EACH(i, VECTORS) x[i] = _mm512_load_ps(s + 16 * (j + i));
        if (capped) cap_few(&w->cap, x, VECTORS, PLANES == 3);
        if (!plain) EACH(i, VECTORS) x[i] = mask_score(&mask, x[i], key + j + i);
        EACH(i, VECTORS) x[i] = capped ? _mm512_sub_ps(x[i], m) : _mm512_fmsub_ps(x[i], scale, m);
        if (PLANES > 1)
            exp2_few_exact(x, VECTORS);
        else if (plain)
            exp2_few(x, VECTORS);
        else
            exp2_few_mixed(x, VECTORS, exact);
        EACH(i, VECTORS / 2)
        {
            __m512 e0 = x[2 * i], e1 = x[2 * i + 1];
            l0 = _mm512_add_ps(l0, e0);
            l1 = _mm512_add_ps(l1, e1);
            any = _mm512_ternarylogic_epi32(any, _mm512_castps_si512(e0), _mm512_castps_si512(e1),
                                            0xfe);
            store_p(p + (j / 2 + i) * TILE_ROW_BYTES, e0, e1);
        }
    }
    _mm512_store_ps(beat_l, _mm512_add_ps(l0, l1));
    _mm512_store_si512(beat_or, any);
}

/* Out of line, so that the loops of products stay small: few steps hide keys. */
static __attribute__((noinline)) void exp_rows_masked(struct work *w, int tile, int32_t key,
                                                      const float *s, char *p, bool capped)
{
    if (capped)
        exp_rows(w, tile, key, s, p, false, true);
    else
        exp_rows(w, tile, key, s, p, false, false);
}

/* Chunk number `chunk` of w->exp: its steps, in each its tiles, in each its keys. */
static inline __attribute__((always_inline)) void exp_chunk(struct work *w, int chunk, bool capped)
{
    const int tile_chunks = STEP_KEYS / chunk_keys(capped);
    int at = chunk / tile_chunks / 2, side = chunk / tile_chunks % 2, c = chunk % tile_chunks;
    int64_t step = w->exp.begin + at;
    int tile = 2 * w->exp.pair + side, j = c * chunk_keys(capped);
    const float *s = (const float *)(const void *)(s_quad(w, &w->exp, step) + j / 16 * PAIR_BYTES +
                                                   side * TILE_BYTES + j % 16 * TILE_ROW_BYTES);
    char *p = w->p + (w->exp.parity * BLOCK_STEPS + step % BLOCK_STEPS) * OPERAND_BYTES +
              side * TILE_BYTES + j / 2 * TILE_ROW_BYTES;
    int32_t key = (int32_t)step * STEP_KEYS + j;
    bool plain = is_plain(w, tile, step);
    if (plain)
        exp_rows(w, tile, key, s, p, true, capped);
    else
        exp_rows_masked(w, tile, key, s, p, capped);
}

/* The same beside no product. */
static __attribute__((noinline)) void exp_chunk_alone(struct work *w, int chunk)
{
    if (w->capped)
        exp_chunk(w, chunk, true);
    else
        exp_chunk(w, chunk, false);
}

/* ---- tile products --------------------------------------------------------------------------- */

/* Called after each step of a product, and with softcap after half of it: takes the chunks that are
 * due. */
static inline __attribute__((always_inline)) void tick(struct work *w, bool capped)
{
    w->credit += w->chunks;
    while (w->credit >= w->ticks && w->chunk < w->chunks) {
        w->credit -= w->ticks;
        exp_chunk(w, w->chunk++, capped);
    }
}

static inline void store_pending(struct work *w)
{
    char *c = w->pending;
    if (!c) return;
    tile_store(0, c);
    tile_store(1, c + TILE_BYTES);
    tile_store(2, c + 2 * TILE_BYTES);
    tile_store(3, c + 3 * TILE_BYTES);
    w->pending = NULL;
}

/* The planes of a step after the first product of two.  A's first plane is in tiles 4 and 5 and has
 * met B's last one.  `all`: with two planes also the second of A and B. */
static inline __attribute__((always_inline)) void other_planes(struct work *w, const char *a,
                                                               const char *b, bool all, bool capped)
{
#define LOAD_A(plane)                                                                              \
    tile_load_once(4, a + (plane) * PAIR_BYTES);                                                   \
    tile_load_once(5, a + (plane) * PAIR_BYTES + TILE_BYTES)
#define LOAD_B(plane)                                                                              \
    tile_load(6, b + (plane) * PAIR_BYTES);                                                        \
    tile_load(7, b + (plane) * PAIR_BYTES + TILE_BYTES)
#define MULTIPLY                                                                                   \
    tile_dpbf16(0, 4, 6);                                                                          \
    tile_dpbf16(1, 4, 7);                                                                          \
    tile_dpbf16(2, 5, 6);                                                                          \
    tile_dpbf16(3, 5, 7);                                                                          \
    tick(w, capped)

    LOAD_B(0);
    MULTIPLY;
    if (PLANES == 3) {
        LOAD_B(1);
        MULTIPLY;
    }
    LOAD_A(1);
    MULTIPLY;
    if (PLANES == 3) {
        LOAD_B(0);
        MULTIPLY;
        LOAD_A(2);
        MULTIPLY;
    } else if (all) {
        LOAD_B(1);
        MULTIPLY;
    }
#undef LOAD_A
#undef LOAD_B
#undef MULTIPLY
}

/* c[2 x 2 tiles] = (accumulate ? c : 0) + sum over steps of a[2 tiles] b[2 tiles].  A is K or V,
 * streamed; B and C live in L1. */
static inline __attribute__((always_inline)) void product(struct work *w, const char *a,
                                                          const char *b, char *c, int64_t steps,
                                                          bool accumulate, bool all, bool capped)
{
    const int64_t last = OPERAND_BYTES - PAIR_BYTES; /* plane of B */
    char *before = w->pending;
#define FIRST(t)                                                                                   \
    if (before) tile_store(t, before + (t) * TILE_BYTES);                                          \
    if (accumulate)                                                                                \
        tile_load(t, c + (t) * TILE_BYTES);                                                        \
    else                                                                                           \
        tile_zero(t)

    tile_fence();
    tile_load_once(4, a);
    tile_load(6, b + last);
    FIRST(0);
    tile_dpbf16(0, 4, 6);
    tile_load(7, b + last + TILE_BYTES);
    FIRST(1);
    tile_dpbf16(1, 4, 7);
    if (halves(capped)) tick(w, capped);
    tile_load_once(5, a + TILE_BYTES);
    FIRST(2);
    tile_dpbf16(2, 5, 6);
    FIRST(3);
    tile_dpbf16(3, 5, 7);
#undef FIRST
    w->pending = c;
    tick(w, capped);
    if (PLANES > 1) other_planes(w, a, b, all, capped);
    for (int64_t i = 1; i < steps; i++) {
        a += OPERAND_BYTES;
        b += OPERAND_BYTES;
        tile_load_once(4, a);
        tile_load(6, b + last);
        tile_dpbf16(0, 4, 6);
        tile_load(7, b + last + TILE_BYTES);
        tile_dpbf16(1, 4, 7);
        if (halves(capped)) tick(w, capped);
        tile_load_once(5, a + TILE_BYTES);
        tile_dpbf16(2, 5, 6);
        tile_dpbf16(3, 5, 7);
        tick(w, capped);
        if (PLANES > 1) other_planes(w, a, b, all, capped);
    }
}

/* One 32 x 32 tile of S = K Q^T, of O (+)= V^T P^T. */
static void product_s(struct work *w, const char *k, const char *q, char *s)
{
    if (w->capped)
        product(w, k, q, s, w->k_steps, false, true, true);
    else
        product(w, k, q, s, w->k_steps, false, true, false);
}

static void product_o(struct work *w, const char *v, const char *p, char *o, int64_t steps,
                      bool accumulate)
{
    if (w->capped)
        product(w, v, p, o, steps, accumulate, false, true);
    else
        product(w, v, p, o, steps, accumulate, false, false);
}

/* Adds the P of w->full to p_sum by products with ones, whose rows are all the sum.  Steps of even
 * and of odd number are added apart, which makes four independent chains. */
static void sum_p(struct work *w)
{
    uint16_t ones[32] __attribute__((aligned(64)));
    _mm512_store_si512(ones, _mm512_set1_epi16(0x3f80));
    const struct unit *u = &w->full;
    float *even = w->p_sum[0] + 32 * u->pair, *odd = w->p_sum[1] + 32 * u->pair;
    store_pending(w);
    tile_fence();
    tile_load_row(4, ones);
    tile_load_row(0, even);
    tile_load_row(1, even + 16);
    tile_load_row(2, odd);
    tile_load_row(3, odd + 16);
    for (int64_t i = 0; i < PLANES * u->steps; i++) {
        tile_load(6, u->p + i * PAIR_BYTES);
        tile_load(7, u->p + i * PAIR_BYTES + TILE_BYTES);
        if ((u->first + i / PLANES) % 2 == 0) {
            tile_dpbf16(0, 4, 6);
            tile_dpbf16(1, 4, 7);
        } else {
            tile_dpbf16(2, 4, 6);
            tile_dpbf16(3, 4, 7);
        }
    }
    tile_store_row(0, even);
    tile_store_row(1, even + 16);
    tile_store_row(2, odd);
    tile_store_row(3, odd + 16);
}

/* Products of w->full up to number `until`, one for 32 d each. */
static void multiply_v(struct work *w, int64_t until)
{
    struct unit *u = &w->full;
    if (w->task->partial && u->done == 0 && until > 0) sum_p(w);
    for (; u->done < until; u->done++)
        product_o(w, u->v + u->done * BLOCK_STEPS * OPERAND_BYTES, u->p,
                  w->o + (u->pair * w->v_steps + u->done) * QUAD_BYTES, u->steps, u->accumulate);
}

/* ---- out and lse ------------------------------------------------------------------------------ */

/* A bit for every key of a step whose V row has an infinity or a NaN. */
static inline uint32_t bad_values(const struct work *w, int64_t step)
{
    const char *block = w->task->packed + step / BLOCK_STEPS * w->block_bytes;
    return ((const uint32_t *)(const void *)(block + w->bits_offset))[step % BLOCK_STEPS];
}

/* Adds the infinities and NaNs of V, which were packed as zeros, to those rows of a pair that see
 * their key. */
static void add_not_finite(struct work *w, int pair)
{
    const struct attn_mha_task *t = w->task;
    int last = 32 * pair + 32 < t->rows ? 32 * pair + 32 : t->rows;
    for (int64_t i = w->begin[pair]; i < w->end[pair]; i++) {
        for (uint32_t bits = bad_values(w, i); bits; bits &= bits - 1) {
            int32_t key = (int32_t)(i * STEP_KEYS) + __builtin_ctz(bits);
            const char *v = t->kv.v + attn_kv_v_offset(&t->kv, key);
            for (int d = 0; d < t->d_v; d++) {
                float x = attn_load(w->dtype, v, d);
                for (int r = 32 * pair; r < last && !isfinite(x); r++)
                    if (key - w->lo[r] >= 0 && key - w->lo[r] < w->seen[r])
                        o_line(w, r / 16, d)[r % 16] += x;
            }
        }
    }
}

/* 32 fp32, given as bits, as elements of out. */
static inline __m512i round_out(__m512i low, __m512i high)
{
    __m512 x = _mm512_castsi512_ps(low), y = _mm512_castsi512_ps(high);
    if (PLANES != 2) return (__m512i)_mm512_cvtne2ps_pbh(y, x);
#define NEAREST (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
    __m256i first = _mm512_cvtps_ph(x, NEAREST), second = _mm512_cvtps_ph(y, NEAREST);
#undef NEAREST
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}

/* out and lse of one tile of queries. */
static void finish_tile(struct work *w, int tile)
{
    const struct attn_mha_task *t = w->task;
    int rows = t->rows - 16 * tile;
    if (rows > 16) rows = 16;
    __m512 m = _mm512_load_ps(w->m + 16 * tile), l = _mm512_load_ps(w->l + 16 * tile);
    __m512 p_sum = l;
    if (t->partial)
        p_sum = _mm512_add_ps(_mm512_load_ps(w->p_sum[0] + 16 * tile),
                              _mm512_load_ps(w->p_sum[1] + 16 * tile));
    __m512 f = _mm512_set1_ps(1.0f);
    if (t->sinks) {
        __m512 sink = _mm512_maskz_loadu_ps((__mmask16)((1u << rows) - 1), t->sinks + 16 * tile);
        sink = _mm512_mul_ps(sink, _mm512_set1_ps(LOG2_E));
        __m512 to = _mm512_max_ps(sink, m);
        f = exp2_16_exact(_mm512_sub_ps(m, to));
        sink = exp2_16_exact(_mm512_sub_ps(sink, to));
        l = _mm512_fmadd_ps(l, f, sink);
        p_sum = _mm512_fmadd_ps(p_sum, f, sink);
        m = to;
    }
    float lse[16] __attribute__((aligned(64)));
    _mm512_store_ps(lse, _mm512_mul_ps(_mm512_add_ps(m, log2_16(l)), _mm512_set1_ps(LN_2)));
    for (int i = 0; i < rows; i++) t->lse[t->lse_row[16 * tile + i]] = lse[i];

    __mmask16 empty = _mm512_cmp_ps_mask(p_sum, _mm512_setzero_ps(), _CMP_EQ_OQ);
    f = _mm512_div_ps(_mm512_mul_ps(f, _mm512_set1_ps(t->out_scale[0])), p_sum);
    f = _mm512_mask_mov_ps(f, empty, _mm512_setzero_ps());
    for (int64_t s = 0; s < w->v_steps; s++) {
        __m512i low[16], high[16]; /* d of [32 s, 32 s + 16), the 16 after it */
        for (int i = 0; i < 16; i++) {
            __m512 zero = _mm512_setzero_ps(), x = zero, y = zero;
            if (w->o_used[tile / 2]) {
                x = _mm512_mul_ps(_mm512_load_ps(o_line(w, tile, 32 * s + i)), f);
                y = _mm512_mul_ps(_mm512_load_ps(o_line(w, tile, 32 * s + 16 + i)), f);
            }
            low[i] = _mm512_castps_si512(x);
            high[i] = _mm512_castps_si512(y);
        }
        transpose16(low);
        transpose16(high);
        __mmask32 live = lanes_within(s, 0, t->d_v);
        for (int i = 0; i < rows; i++) {
            char *out = t->out + t->out_row[16 * tile + i];
            if (t->partial || w->dtype == ATTN_F32) {
                _mm512_mask_storeu_epi32(out + 128 * s, (__mmask16)live, low[i]);
                _mm512_mask_storeu_epi32(out + 128 * s + 64, (__mmask16)(live >> 16), high[i]);
            } else if (t->stream_out && live == 0xffffffff && (uintptr_t)out % 64 == 0) {
                _mm512_stream_si512((void *)(out + 64 * s), round_out(low[i], high[i]));
            } else {
                _mm512_mask_storeu_epi16(out + 64 * s, live, round_out(low[i], high[i]));
            }
        }
    }
}

/* out and lse of a pair, whose O is complete. */
static void finish_pair(struct work *w, int pair)
{
    if (w->v_bad) add_not_finite(w, pair);
    for (int tile = 2 * pair; tile < 2 * pair + 2 && 16 * tile < w->task->rows; tile++)
        finish_tile(w, tile);
    w->finished[pair] = true;
}

/* ---- beats ----------------------------------------------------------------------------------- */

/* Makes the P of steps [p_begin, end) of the exp unit the unit to multiply. */
static void take_unit(struct work *w, int64_t end)
{
    int pair = w->exp.pair;
    int64_t offset = w->p_begin % BLOCK_STEPS * OPERAND_BYTES;
    if (w->full.last) w->complete = w->full.pair;
    w->full = (struct unit){
        .v = w->task->packed + w->p_begin / BLOCK_STEPS * w->block_bytes + w->v_offset + offset,
        .p = w->p + w->exp.parity * BLOCK_STEPS * OPERAND_BYTES + offset,
        .first = w->p_begin,
        .steps = end - w->p_begin,
        .products = w->v_steps,
        .pair = pair,
        .last = end == w->end[pair],
        .accumulate = w->o_used[pair],
    };
    w->o_used[pair] = true;
    w->p_begin = end;
}

/* Multiplies all P of earlier beats.  Rescaling a lane's O wants this, so that it comes between the
 * same two beats whatever else is in the task. */
static void multiply_all(struct work *w)
{
    multiply_v(w, w->full.products);
    if (w->p_begin < w->exp.begin) {
        take_unit(w, w->exp.begin);
        multiply_v(w, w->full.products);
    }
    store_pending(w);
}

/* K tiles of a step. */
static inline const char *k_tiles(const struct work *w, int64_t step)
{
    return w->task->packed + step / BLOCK_STEPS * w->block_bytes +
           step % BLOCK_STEPS * w->k_steps * OPERAND_BYTES;
}

static inline char *q_tiles(const struct work *w, int pair)
{
    return w->q + pair * w->k_steps * OPERAND_BYTES;
}

/* S of one beat; the last step's tiles are not stored yet. */
static void score(struct work *w, const struct beat *b)
{
    for (int64_t i = b->begin; i < b->end; i++)
        product_s(w, k_tiles(w, i), q_tiles(w, b->pair), s_quad(w, b, i));
}

/* Scores of key j of a step with 16 queries, first planes only. */
static __m512 plain_score(const struct work *w, int pair, int64_t step, int j, int side)
{
    const char *k = k_tiles(w, step) + j / 16 * TILE_BYTES + j % 16 * TILE_ROW_BYTES;
    const char *q = q_tiles(w, pair) + side * TILE_BYTES;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t s = 0; s < w->k_steps; s++)
        for (int i = 0; i < 16; i++) {
            int32_t two;
            memcpy(&two, k + s * OPERAND_BYTES + 4 * i, 4);
            __m512i q_pair = _mm512_load_si512(q + s * OPERAND_BYTES + i * TILE_ROW_BYTES);
            sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(two), (__m512bh)q_pair);
        }
    return sum;
}

/* With more planes an infinity meets zeros and other signs in the second ones, and gives NaN where
 * its score is infinite.  The first planes alone tell which it is; finite scores stay. */
static void mend_scores(struct work *w, const struct beat *b)
{
    if (PLANES == 1) return;
    for (int64_t step = b->begin; step < b->end; step++) {
        const char *block = w->task->packed + step / BLOCK_STEPS * w->block_bytes;
        const uint32_t *bits = (const uint32_t *)(const void *)(block + w->bits_offset);
        uint32_t keys = w->q_bad[b->pair] ? 0xffffffff : bits[BLOCK_STEPS + step % BLOCK_STEPS];
        if (keys) store_pending(w);
        for (; keys; keys &= keys - 1) {
            int j = __builtin_ctz(keys);
            char *s = s_quad(w, b, step) + j / 16 * PAIR_BYTES + j % 16 * TILE_ROW_BYTES;
            for (int side = 0; side < 2; side++) {
                __m512 x = plain_score(w, b->pair, step, j, side);
                _mm512_mask_store_ps(s + side * TILE_BYTES, _mm512_fpclass_ps_mask(x, 0x99), x);
            }
        }
    }
}

/* Largest score of the beat w->exp for a tile's queries, scaled; skips NaN. */
static __m512 beat_top(const struct work *w, int side)
{
    int tile = 2 * w->exp.pair + side;
    __m512 top = _mm512_set1_ps(-INFINITY);
    struct mask mask = load_mask(w, tile);
    for (int64_t i = w->exp.begin; i < w->exp.end; i++) {
        bool plain = is_plain(w, tile, i);
        for (int j = 0; j < STEP_KEYS; j++) {
            const char *s = s_quad(w, &w->exp, i) + j / 16 * PAIR_BYTES + side * TILE_BYTES +
                            j % 16 * TILE_ROW_BYTES;
            __m512 x = _mm512_load_ps(s);
            if (w->capped) cap_few(&w->cap, &x, 1, PLANES == 3);
            if (!plain) x = mask_score(&mask, x, (int32_t)i * STEP_KEYS + j);
            top = _mm512_max_ps(x, top);
        }
    }
    return _mm512_mul_ps(top, _mm512_set1_ps(w->scale));
}

/* Sets m of a tile's queries by the first beat of their pair. */
static void start_reference(struct work *w, int side)
{
    __m512 top = beat_top(w, side), none = _mm512_set1_ps(M_NONE);
    __mmask16 seen = _mm512_cmp_ps_mask(top, none, _CMP_GT_OQ);
    top = _mm512_add_ps(top, _mm512_set1_ps(M_SLACK - 1));
    _mm512_store_ps(w->m + 32 * w->exp.pair + 16 * side, _mm512_mask_mov_ps(none, seen, top));
}

/* Raises m of those `over` lanes of a tile whose scores passed it (the others have NaN), and takes
 * the beat's exponentials again. */
static void move_reference(struct work *w, int side, __mmask16 over)
{
    int pair = w->exp.pair, tile = 2 * pair + side;
    __m512 m = _mm512_load_ps(w->m + 16 * tile), l = _mm512_load_ps(w->l + 16 * tile);
    __m512 top = beat_top(w, side);
    __mmask16 up = _mm512_mask_cmp_ps_mask(over, top, m, _CMP_GT_OQ);
    __mmask16 used = _mm512_mask_cmp_ps_mask(up, m, _mm512_set1_ps(M_NONE), _CMP_NEQ_UQ);
    if (!up) return;
    top = _mm512_add_ps(top, _mm512_set1_ps(M_SLACK - 1));
    if (used) {
        __m512 f = _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), used,
                                      exp2_16_exact(_mm512_sub_ps(m, top)));
        multiply_all(w);
        for (int64_t d = 0; w->o_used[pair] && d < w->v_steps * 32; d++) {
            float *o = o_line(w, tile, d);
            _mm512_store_ps(o, _mm512_mul_ps(_mm512_load_ps(o), f));
        }
        float *even = w->p_sum[0] + 16 * tile, *odd = w->p_sum[1] + 16 * tile;
        _mm512_store_ps(w->l + 16 * tile, _mm512_mul_ps(l, f));
        _mm512_store_ps(even, _mm512_mul_ps(_mm512_load_ps(even), f));
        _mm512_store_ps(odd, _mm512_mul_ps(_mm512_load_ps(odd), f));
    }
    _mm512_store_ps(w->m + 16 * tile, _mm512_mask_mov_ps(m, up, top));
    _mm512_store_ps(w->beat_l + 16 * side, _mm512_setzero_ps());
    for (int i = 0; i < w->chunks; i++)
        if (i / (STEP_KEYS / chunk_keys(w->capped)) % 2 == side) exp_chunk_alone(w, i);
}

/* Ends the beat whose exponentials were taken: a larger m where one came to 2 or more, which is the
 * upper bit of its exponent; then the beat's part of l.  S has to be made again for that, since the
 * next beat's lies partly in its place. */
static void close_beat(struct work *w, const struct beat *next)
{
    __mmask16 over[2];
    for (int side = 0; side < 2; side++)
        over[side] = _mm512_test_epi32_mask(_mm512_load_si512(w->beat_or + 16 * side),
                                            _mm512_set1_epi32(0x40000000));
    if (over[0] | over[1]) {
        score(w, &w->exp);
        store_pending(w);
        mend_scores(w, &w->exp);
        move_reference(w, 0, over[0]);
        move_reference(w, 1, over[1]);
        if (next) score(w, next);
        if (next) mend_scores(w, next);
    }
    for (int side = 0; side < 2; side++) {
        float *l = w->l + 32 * w->exp.pair + 16 * side, *beat_l = w->beat_l + 16 * side;
        _mm512_store_ps(l, _mm512_add_ps(_mm512_load_ps(l), _mm512_load_ps(beat_l)));
        _mm512_store_ps(beat_l, _mm512_setzero_ps());
        _mm512_store_si512(w->beat_or + 16 * side, _mm512_setzero_si512());
    }
}

/* One beat: the scores of `next` (NULL: none left) and a share of the products of w->full beside
 * the exponentials of w->exp, which then becomes `next`. */
static void play(struct work *w, const struct beat *next)
{
    const struct beat *e = &w->exp;
    const int step_chunks = 2 * STEP_KEYS / chunk_keys(w->capped);
    int64_t until = 0;
    w->chunk = w->chunks = (int)(e->end - e->begin) * step_chunks;
    w->credit = 0;
    if (e->end > e->begin) {
        /* The last beat of a unit ends the products of the unit before. */
        int64_t left = w->full.products - w->full.done;
        int64_t beats = e->last ? 1 : (BLOCK_STEPS - e->begin % BLOCK_STEPS + 1) / BEAT_STEPS;
        until = w->full.done + (left + beats - 1) / beats;
        w->chunk = 0;
        if (e->first) {
            store_pending(w);
            start_reference(w, 0);
            start_reference(w, 1);
        }
    }
    w->ticks = PV_PRODUCTS * (until - w->full.done) * w->full.steps;
    if (next) w->ticks += S_PRODUCTS * (next->end - next->begin) * w->k_steps;
    if (halves(w->capped)) w->ticks *= 2;
    if (next) {
        score(w, next);
        /* Its last S is stored in the next product: the place may be that of this beat's first. */
        while (w->chunk < w->chunks && w->chunk < step_chunks) exp_chunk_alone(w, w->chunk++);
        mend_scores(w, next);
        if (w->complete >= 0) finish_pair(w, w->complete);
        w->complete = -1;
    }
    multiply_v(w, until);
    if (e->end > e->begin) {
        if (!w->ticks) store_pending(w);
        while (w->chunk < w->chunks) exp_chunk_alone(w, w->chunk++);
        close_beat(w, next);
        if (e->last) take_unit(w, e->end);
    }
    if (!next) return;
    if (next->begin < next->end && (e->last || e->end == e->begin)) w->p_begin = next->begin;
    w->exp = *next;
}

/* Packs the q of one tile, zeros for padding rows. */
static void load_q(struct work *w, int tile)
{
    const struct attn_mha_task *t = w->task;
    const char *q[16], *qv[16];
    for (int i = 0; i < 16; i++) {
        int r = 16 * tile + i;
        q[i] = r < t->rows ? t->q + t->q_row[r] : NULL;
        qv[i] = r < t->rows && t->qv ? t->qv + t->qv_row[r] : NULL;
    }
    const char *const *more = t->qv ? qv : NULL;
    bool negate = t->score_scale[0] < 0, bad;
    char *to = q_tiles(w, tile / 2) + tile % 2 * TILE_BYTES;
    if (PLANES == 3)
        bad = pack_q_rows(ATTN_F32, q, more, t->d_qk, t->d_v, negate, to);
    else if (PLANES == 2)
        bad = pack_q_rows(ATTN_F16, q, more, t->d_qk, t->d_v, negate, to);
    else if (w->dtype == ATTN_F8)
        bad = pack_q_rows(ATTN_F8, q, more, t->d_qk, t->d_v, negate, to);
    else
        bad = pack_q_rows(ATTN_BF16, q, more, t->d_qk, t->d_v, negate, to);
    w->q_bad[tile / 2] = (tile % 2 && w->q_bad[tile / 2]) || bad;
}

/* Asks for rows [from, to) of q or out, whose lines are often pages apart. */
static inline void fetch_rows(const struct work *w, const char *base, const int64_t *at, int from,
                              int to, int64_t bytes)
{
    if (to > w->task->rows) to = w->task->rows;
    for (int r = from; r < to; r++)
        for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(base + at[r] + i, _MM_HINT_T1);
}

/* What a beat's pair will want besides K and V: its own q, and that of the pair after it, before its
 * first beat; a share of its rows of out before those of its last block. */
static void fetch_for(struct work *w, const struct beat *b)
{
    const struct attn_mha_task *t = w->task;
    int row = 32 * b->pair, share = 8 * (int)(b->begin % BLOCK_STEPS / BEAT_STEPS);
    if (b->first) {
        load_q(w, 2 * b->pair);
        load_q(w, 2 * b->pair + 1);
        fetch_rows(w, t->q, t->q_row, row + 32, row + 64, attn_dtype_bytes(w->dtype) * t->d_qk);
    }
    if (!t->stream_out && b->begin / BLOCK_STEPS == (w->end[b->pair] - 1) / BLOCK_STEPS)
        fetch_rows(w, t->out, t->out_row, row + share, row + share + 8,
                   attn_dtype_bytes(attn_dtype_out(w->dtype)) * t->d_v);
}

/* All units: blocks of keys, in each the pairs that see some of it. */
static void attend(struct work *w, int64_t begin, int64_t end)
{
    struct beat b = {0};
    w->exp = b;
    w->full = (struct unit){0};
    for (int64_t block = begin / BLOCK_STEPS; block * BLOCK_STEPS < end; block++) {
        for (b.pair = 0; b.pair < w->pairs; b.pair++) {
            int64_t from = block * BLOCK_STEPS, to = from + BLOCK_STEPS;
            if (from < w->begin[b.pair]) from = w->begin[b.pair];
            if (to > w->end[b.pair]) to = w->end[b.pair];
            for (b.begin = from; b.begin < to; b.begin = b.end) {
                b.end = (b.begin / BEAT_STEPS + 1) * BEAT_STEPS;
                if (b.end > to) b.end = to;
                b.last = b.end == to;
                b.first = b.begin == w->begin[b.pair];
                fetch_for(w, &b);
                play(w, &b);
                b.slot = (int)(b.slot + b.end - b.begin) % S_STEPS;
            }
            if (from < to) b.parity ^= 1;
        }
    }
    play(w, NULL);
    w->chunk = w->chunks = 0;
    multiply_v(w, w->full.products);
    store_pending(w);
}

/* ---- a task ---------------------------------------------------------------------------------- */

/* Lays out the intervals of a pair's rows; padding rows repeat the last one.  Finds the steps that
 * some row sees. */
static void load_intervals(struct work *w, int pair)
{
    const struct attn_mha_task *t = w->task;
    int64_t first = INT32_MAX, last = 0;
    for (int r = 32 * pair; r < 32 * pair + 32; r++) {
        int from = r < t->rows ? r : t->rows - 1;
        int64_t lo = t->lo[from], hi = t->hi[from];
        if (lo < t->k_begin) lo = t->k_begin;
        if (hi > t->k_end) hi = t->k_end;
        if (lo >= hi)
            lo = hi = 0;
        else if (lo < first)
            first = lo;
        if (hi > last) last = hi;
        w->lo[r] = (int32_t)lo;
        w->seen[r] = (int32_t)(hi - lo);
        int32_t *all_lo = &w->all_lo[r / 16], *all_hi = &w->all_hi[r / 16];
        if (r % 16 == 0 || lo > *all_lo) *all_lo = (int32_t)lo;
        if (r % 16 == 0 || hi < *all_hi) *all_hi = (int32_t)hi;
        w->m[r] = M_NONE;
        w->l[r] = w->p_sum[0][r] = w->p_sum[1][r] = 0;
    }
    w->begin[pair] = last ? first / STEP_KEYS : 0;
    w->end[pair] = (last + STEP_KEYS - 1) / STEP_KEYS;
    w->o_used[pair] = w->finished[pair] = false;
}

static int64_t pairs_of(int64_t rows) { return (rows + 31) / 32; }

static void run(enum attn_dtype dtype, const struct attn_mha_task *task, char *scratch)
{
    int64_t d_s = task->d_qk + (task->qv ? task->d_v : 0), begin = INT64_MAX, end = 0;
    float scale = fabsf(task->score_scale[0]);
    struct work w;
    w.task = task;
    w.dtype = dtype;
    w.k_steps = width_steps(d_s);
    w.v_steps = width_steps(task->d_v);
    w.block_bytes = pack_bytes(d_s, task->d_v);
    w.v_offset = block_v(d_s);
    w.bits_offset = block_bits(d_s, task->d_v);
    w.pairs = (int)pairs_of(task->rows);
    w.capped = task->softcap > 0;
    w.scale = w.capped ? 1 : fmaxf(scale * LOG2_E, 1e-30f); /* 0 * -inf is NaN */
    if (w.capped) softcap_begin(&w.cap, task->softcap, scale);
    w.pending = NULL;
    w.complete = -1;
    w.v_bad = false;
    w.s = scratch;
    w.p = w.s + S_STEPS * QUAD_BYTES;
    w.q = w.p + 2 * BLOCK_STEPS * OPERAND_BYTES;
    w.o = w.q + w.pairs * w.k_steps * OPERAND_BYTES;
    for (int i = 0; i < 32; i++) {
        w.beat_l[i] = 0;
        w.beat_or[i] = 0;
    }
    for (int pair = 0; pair < w.pairs; pair++) {
        load_intervals(&w, pair);
        if (w.begin[pair] < w.end[pair] && w.begin[pair] < begin) begin = w.begin[pair];
        if (w.end[pair] > end) end = w.end[pair];
    }
    fetch_rows(&w, task->q, task->q_row, 0, 32, attn_dtype_bytes(dtype) * task->d_qk);
    if (begin < end) {
        tile_begin();
        for (int64_t i = begin; i < end; i++) w.v_bad = w.v_bad || bad_values(&w, i);
        attend(&w, begin, end);
        tile_end();
    }
    for (int pair = 0; pair < w.pairs; pair++)
        if (!w.finished[pair]) finish_pair(&w, pair);
    if (task->stream_out) _mm_sfence();
}

static int64_t scratch_bytes(int64_t d_s, int64_t d_v, int64_t rows, int64_t heads)
{
    (void)heads;
    return S_STEPS * QUAD_BYTES + 2 * BLOCK_STEPS * OPERAND_BYTES +
           pairs_of(rows) * (width_steps(d_s) * OPERAND_BYTES + width_steps(d_v) * QUAD_BYTES);
}

static inline __attribute__((always_inline)) void pack(enum attn_dtype t,
                                                       const struct attn_kv_view *kv, int32_t d_qk,
                                                       int32_t d_v, bool qv, int64_t j0,
                                                       int64_t first, int64_t end, char *block)
{
    int64_t d_s = d_qk + (qv ? d_v : 0), k_bytes = width_steps(d_s) * OPERAND_BYTES;
    uint32_t *bits = (uint32_t *)(void *)(block + block_bits(d_s, d_v));
    for (int64_t i = 0; i < BLOCK_STEPS; i++) {
        const char *k[STEP_KEYS], *v[STEP_KEYS];
        for (int64_t j = 0; j < STEP_KEYS; j++) {
            int64_t key = j0 + i * STEP_KEYS + j;
            bool live = first <= key && key < end;
            k[j] = live ? kv->k + attn_kv_k_offset(kv, key) : NULL;
            v[j] = live ? kv->v + attn_kv_v_offset(kv, key) : NULL;
        }
        bits[BLOCK_STEPS + i] = pack_k_step(t, k, v, d_qk, d_v, qv, block + i * k_bytes);
        bits[i] = pack_v_step(t, v, d_v, block + block_v(d_s) + i * OPERAND_BYTES);
    }
}

#define TILE_KERNEL(dtype, type)                                                                   \
    static void run_##dtype(const struct attn_mha_task *task, char *scratch)                       \
    {                                                                                              \
        run(type, task, scratch);                                                                  \
    }                                                                                              \
    static void pack_##dtype(const struct attn_kv_view *kv, int32_t d_qk, int32_t d_v, bool qv,    \
                             int64_t j0, int64_t first, int64_t end, char *block)                  \
    {                                                                                              \
        pack(type, kv, d_qk, d_v, qv, j0, first, end, block);                                      \
    }                                                                                              \
    const struct attn_mha_kernel attn_mha_fwd_##dtype##_amx = {                                    \
        .name = "attn_mha_fwd_" #dtype "_amx",                                                     \
        .rows_max = ROWS_MAX,                                                                      \
        .rows_step = 32,                                                                           \
        .n = BLOCK_KEYS,                                                                           \
        .scratch_bytes = scratch_bytes,                                                            \
        .pack_bytes = pack_bytes,                                                                  \
        .pack = pack_##dtype,                                                                      \
        .run = run_##dtype,                                                                        \
    }

#endif
