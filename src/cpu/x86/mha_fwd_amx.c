/* SPDX-License-Identifier: MIT
 *
 * mha_fwd for bf16 on AMX tiles.
 *
 * Math, keys down and queries across, so that a lane is a query everywhere:
 *   S^T = K Q^T                     fp32, tiles of 16 keys x 16 queries
 *   P   = 2^(S c - m)               c = scale log2(e); bf16 for the product, l sums them unrounded
 *   O^T = V^T P^T                   fp32, tiles of 16 d x 16 queries
 *   out = O out_scale / l,  lse = (m + log2 l) ln 2
 * m is a reference, not the maximum: it begins as the maximum of the first step of 32 keys and moves
 * only when a score exceeds it by more than M_SLACK (P <= 2^8 is as good as P <= 1), so O is almost
 * never rescaled.  A row that sees no key, or only -inf, keeps m = M_NONE and l = 0: out is 0, lse
 * -inf.
 *
 * Pipeline.  A beat is one score step of 32 keys; b is a block of up to 256 keys.
 *   beat    | 0    1    2   ..  8    9    10  ..             to the end
 *   tiles   | S0   S1   S2  ..  S8   S9   S10 ..             S = K Q^T of one step
 *           |                        O += V P of block 0     an eighth of the block's 2 x 2 products
 *   vectors |      P0   P1  ..  P7   P8   P9  ..             exp of the step before
 * Within a beat the two are interleaved in source order: after every step of a tile product (four
 * TDPBF16PS, 64 clocks) comes a chunk of exp (8 keys x 16 queries), since the scheduler is too small to
 * find the overlap by itself.  The results of a product are stored during the first step of the
 * next one.  Two buffers of S (a step each) and two of P (a block each) make this possible.
 *
 * Exponentials are taken with the m of the beat's begin while the maximum is gathered; where it
 * turns out too small (close_step) the step's exponentials are taken again.
 */
#include <math.h>
#include <string.h>

#include "cpu/x86/kernels_x86.h"
#include "cpu/x86/mha_fwd_amx_pack.h"

enum {
    ROWS_MAX = 64,
    PAIRS_MAX = ROWS_MAX / 32,
    TILES_MAX = ROWS_MAX / 16,
    CHUNK_KEYS = 8,
    STEP_CHUNKS = STEP_KEYS / CHUNK_KEYS, /* a tile of queries */
};

#define M_NONE (-0x1p120f)
#define M_SLACK 8.0f
#define LOG2_E 1.44269504f
#define LN_2 0.693147181f

struct work {
    const struct attn_mha_task *task;
    int64_t k_steps, v_steps;  /* d_s / 32, d_v / 32, rounded up */
    int pairs, tiles;          /* of 32 and 16 queries; tiles = 2 pairs */
    float scale;               /* c above, positive; with softcap log2(e) */
    float cap, cap_scale;      /* softcap, or 0; the score's factor inside tanh */
    char *q, *s[2], *p[2], *o; /* layouts in mha_fwd_amx_pack.h */
    bool o_used;               /* o holds sums */
    char *pending;             /* where tiles 0 to 3 are to be stored, or NULL */

    /* The step whose exponentials this beat takes. */
    const char *exp_s;
    char *exp_p;
    int32_t exp_key;
    int chunk, chunks;         /* next one; of the beat: STEP_CHUNKS a tile of queries */
    int64_t credit, ticks;     /* chunks are spread evenly over the beat's tile steps */

    /* A lane a query. */
    float m[ROWS_MAX] __attribute__((aligned(64)));
    float l[ROWS_MAX] __attribute__((aligned(64)));
    float step_l[ROWS_MAX] __attribute__((aligned(64)));   /* of the current step */
    float step_max[ROWS_MAX] __attribute__((aligned(64))); /* its largest score, not yet scaled */
    int32_t lo[ROWS_MAX] __attribute__((aligned(64)));
    int32_t seen[ROWS_MAX] __attribute__((aligned(64)));   /* hi - lo */
    int32_t all_lo[TILES_MAX], all_hi[TILES_MAX];          /* keys that all 16 queries see */
};

/* 16 queries of `tile`, element d of O. */
static inline float *o_line(const struct work *w, int64_t tile, int64_t d)
{
    char *quad = w->o + (tile / 2 * w->v_steps + d / 32) * QUAD_BYTES;
    quad += d % 32 / 16 * PAIR_BYTES + tile % 2 * TILE_BYTES + d % 16 * TILE_ROW_BYTES;
    return (float *)(void *)quad;
}

/* ---- exponentials ---------------------------------------------------------------------------- */

/* 2^t by a degree 3 polynomial in t - floor(t), relative error 7.5e-5; -inf gives 0. */
static inline __m512 exp2_16(__m512 t)
{
    __m512 f = _mm512_reduce_ps(t, 0x09);
    __m512 y = _mm512_fmadd_ps(f, _mm512_set1_ps(0.0780245226f), _mm512_set1_ps(0.226067155f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.69583354f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.999925219f));
    return _mm512_scalef_ps(y, t);
}

/* The same to 7.5e-8, degree 5. */
static inline __m512 exp2_16_exact(__m512 t)
{
    __m512 f = _mm512_reduce_ps(t, 0x09);
    __m512 y = _mm512_fmadd_ps(f, _mm512_set1_ps(0.00187757668f), _mm512_set1_ps(0.00898934009f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.0558263181f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.240153617f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.693153073f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.999999925f));
    return _mm512_scalef_ps(y, t);
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

/* tanh y = sign(y) (1 - 2 / (1 + e^2|y|)). */
static inline __m512 tanh_16(__m512 y)
{
    __m512 one = _mm512_set1_ps(1.0f), a = _mm512_abs_ps(y);
    __m512 e = exp2_16_exact(_mm512_mul_ps(a, _mm512_set1_ps(2 * LOG2_E)));
    __m512 r = _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(one, e)));
    return _mm512_or_ps(r, _mm512_and_ps(y, _mm512_set1_ps(-0.0f)));
}

/* Dwords of bf16 pairs: even below, odd above, rounded to nearest (ties away from zero). */
static inline __m512i bf16_pairs(__m512 even, __m512 odd)
{
    __m512i half = _mm512_set1_epi32(0x8000);
    __m512i low = _mm512_add_epi32(_mm512_castps_si512(even), half);
    __m512i high = _mm512_add_epi32(_mm512_castps_si512(odd), half);
    return _mm512_mask_mov_epi16(_mm512_srli_epi32(low, 16), 0xaaaaaaaa, high);
}

/* One chunk: 8 keys x 16 queries from s[8][16] to p[4][16 pairs].  `plain`: all keys are visible
 * to all queries and there is no softcap. */
static inline __attribute__((always_inline)) void exp_rows(struct work *w, int tile, int32_t key,
                                                           const float *s, char *p, bool plain)
{
    __m512 scale = _mm512_set1_ps(w->scale), m = _mm512_load_ps(w->m + 16 * tile);
    __m512 l0 = _mm512_load_ps(w->step_l + 16 * tile), l1 = _mm512_setzero_ps();
    __m512 top = _mm512_load_ps(w->step_max + 16 * tile);
    __m512i lo = _mm512_setzero_si512(), seen = lo;
    if (!plain) {
        lo = _mm512_sub_epi32(_mm512_set1_epi32(key), _mm512_load_si512(w->lo + 16 * tile));
        seen = _mm512_load_si512(w->seen + 16 * tile);
    }
#pragma GCC unroll 4
    for (int i = 0; i < CHUNK_KEYS; i += 2) {
        __m512 x[2], e[2];
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            x[j] = _mm512_load_ps(s + 16 * (i + j));
            if (!plain) {
                if (w->cap > 0) {
                    x[j] = tanh_16(_mm512_mul_ps(x[j], _mm512_set1_ps(w->cap_scale)));
                    x[j] = _mm512_mul_ps(x[j], _mm512_set1_ps(w->cap));
                }
                __m512i at = _mm512_add_epi32(lo, _mm512_set1_epi32(i + j));
                __mmask16 hidden = _mm512_cmpge_epu32_mask(at, seen);
                x[j] = _mm512_mask_mov_ps(x[j], hidden, _mm512_set1_ps(-INFINITY));
            }
            top = _mm512_max_ps(x[j], top); /* skips NaN */
            e[j] = exp2_16(_mm512_fmsub_ps(x[j], scale, m));
        }
        l0 = _mm512_add_ps(l0, e[0]);
        l1 = _mm512_add_ps(l1, e[1]);
        _mm512_store_si512(p + i / 2 * TILE_ROW_BYTES, bf16_pairs(e[0], e[1]));
    }
    _mm512_store_ps(w->step_l + 16 * tile, _mm512_add_ps(l0, l1));
    _mm512_store_ps(w->step_max + 16 * tile, top);
}

static inline __attribute__((always_inline)) void exp_chunk(struct work *w, int chunk)
{
    int tile = chunk / STEP_CHUNKS, c = chunk % STEP_CHUNKS;
    int32_t key = w->exp_key + c * CHUNK_KEYS;
    const char *s = w->exp_s + tile / 2 * QUAD_BYTES + tile % 2 * TILE_BYTES +
                    c / 2 * PAIR_BYTES + c % 2 * CHUNK_KEYS * TILE_ROW_BYTES;
    char *p = w->exp_p + tile / 2 * BLOCK_STEPS * PAIR_BYTES + tile % 2 * TILE_BYTES +
              c * CHUNK_KEYS / 2 * TILE_ROW_BYTES;
    bool plain = w->exp_key >= w->all_lo[tile] && w->exp_key + STEP_KEYS <= w->all_hi[tile];
    if (plain) exp_rows(w, tile, key, (const float *)(const void *)s, p, true);
    else exp_rows(w, tile, key, (const float *)(const void *)s, p, false);
}

/* ---- tile products --------------------------------------------------------------------------- */

/* Called after each step of a product: takes the chunks that are due. */
static inline __attribute__((always_inline)) void tick(struct work *w)
{
    w->credit += w->chunks;
    while (w->credit >= w->ticks && w->chunk < w->chunks) {
        w->credit -= w->ticks;
        exp_chunk(w, w->chunk++);
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

/* c[2 x 2 tiles] = (accumulate ? c : 0) + sum over steps of a[2 tiles] b[2 tiles]. */
static void product(struct work *w, const char *a, const char *b, char *c, int64_t steps,
                    bool accumulate)
{
    char *before = w->pending;
#define FIRST(t)                                                                                  \
    if (before) tile_store(t, before + (t) * TILE_BYTES);                                         \
    if (accumulate) tile_load(t, c + (t) * TILE_BYTES);                                           \
    else tile_zero(t)

    tile_fence();
    tile_load(4, a);
    tile_load(6, b);
    FIRST(0);
    tile_dpbf16(0, 4, 6);
    tile_load(7, b + TILE_BYTES);
    FIRST(1);
    tile_dpbf16(1, 4, 7);
    tile_load(5, a + TILE_BYTES);
    FIRST(2);
    tile_dpbf16(2, 5, 6);
    FIRST(3);
    tile_dpbf16(3, 5, 7);
#undef FIRST
    w->pending = c;
    tick(w);
    for (int64_t i = 1; i < steps; i++) {
        a += PAIR_BYTES;
        b += PAIR_BYTES;
        tile_load(4, a);
        tile_load(6, b);
        tile_dpbf16(0, 4, 6);
        tile_load(7, b + TILE_BYTES);
        tile_dpbf16(1, 4, 7);
        tile_load(5, a + TILE_BYTES);
        tile_dpbf16(2, 5, 6);
        tile_dpbf16(3, 5, 7);
        tick(w);
    }
}

/* A block of keys whose P is complete; its products are spread over the beats that follow. */
struct block {
    const char *v, *p;         /* at the first of its steps */
    int64_t steps;
    int64_t done, products;    /* products is 0 where there is no block */
    bool accumulate;
};

static void multiply_v(struct work *w, struct block *b, int64_t until)
{
    for (; b->done < until; b->done++) {
        int64_t pair = b->done / w->v_steps, d = b->done % w->v_steps;
        product(w, b->v + d * BLOCK_STEPS * PAIR_BYTES, b->p + pair * BLOCK_STEPS * PAIR_BYTES,
                w->o + (pair * w->v_steps + d) * QUAD_BYTES, b->steps, b->accumulate);
        w->o_used = true;
    }
}

/* ---- beats ----------------------------------------------------------------------------------- */

/* Where attend() is in the keys: steps of 32, blocks of BLOCK_STEPS. */
struct walk {
    int64_t begin, end;        /* steps that some row sees */
    int64_t block_bytes, v_offset;
    int64_t first;             /* first step whose P is in no product yet */
    struct block full;         /* the block being multiplied */
};

/* The products of the P of steps [first, end), which are of one block. */
static struct block take_block(struct work *w, struct walk *at, int64_t end)
{
    int64_t block = at->first / BLOCK_STEPS, offset = at->first % BLOCK_STEPS * PAIR_BYTES;
    struct block b = {
        .v = w->task->packed + block * at->block_bytes + at->v_offset + offset,
        .p = w->p[block & 1] + offset,
        .steps = end - at->first,
        .products = end > at->first ? w->pairs * w->v_steps : 0,
        .accumulate = w->o_used,
    };
    at->first = end;
    return b;
}

/* Rescaling a lane's O wants all earlier P multiplied, so that it comes between the same two steps
 * whatever else is in the task. */
static void multiply_all(struct work *w, struct walk *at, int64_t step)
{
    multiply_v(w, &at->full, at->full.products);
    if (at->first < step) {
        at->full = take_block(w, at, step);
        multiply_v(w, &at->full, at->full.products);
    }
    store_pending(w);
}

/* Closes a step: raises m where a score passed it by M_SLACK and takes the tile's exponentials
 * again, then adds the step to l. */
static void close_step(struct work *w, struct walk *at, int64_t step)
{
    for (int tile = 0; tile < w->tiles; tile++) {
        float *lanes_m = w->m + 16 * tile, *lanes_l = w->l + 16 * tile;
        float *step_l = w->step_l + 16 * tile, *step_max = w->step_max + 16 * tile;
        __m512 m = _mm512_load_ps(lanes_m), l = _mm512_load_ps(lanes_l);
        __m512 top = _mm512_mul_ps(_mm512_load_ps(step_max), _mm512_set1_ps(w->scale));
        __m512 limit = _mm512_add_ps(m, _mm512_set1_ps(M_SLACK));
        __mmask16 up = _mm512_cmp_ps_mask(top, limit, _CMP_GT_OQ);
        if (up) {
            __mmask16 used = _mm512_mask_cmp_ps_mask(up, m, _mm512_set1_ps(M_NONE), _CMP_NEQ_UQ);
            __m512 f = _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), used,
                                          exp2_16_exact(_mm512_sub_ps(m, top)));
            if (used) multiply_all(w, at, step);
            for (int64_t d = 0; used && w->o_used && d < w->v_steps * 32; d++) {
                float *o = o_line(w, tile, d);
                _mm512_store_ps(o, _mm512_mul_ps(_mm512_load_ps(o), f));
            }
            l = _mm512_mul_ps(l, f);
            _mm512_store_ps(lanes_m, _mm512_mask_mov_ps(m, up, top));
            _mm512_store_ps(step_l, _mm512_setzero_ps());
            for (int i = 0; i < STEP_CHUNKS; i++) exp_chunk(w, tile * STEP_CHUNKS + i);
        }
        _mm512_store_ps(lanes_l, _mm512_add_ps(l, _mm512_load_ps(step_l)));
        _mm512_store_ps(step_l, _mm512_setzero_ps());
        _mm512_store_ps(step_max, _mm512_set1_ps(-INFINITY));
    }
}

static void attend(struct work *w, struct walk *at)
{
    at->first = at->begin;
    at->full = (struct block){0};
    for (int64_t i = at->begin; i <= at->end; i++) {
        int64_t e = i - 1, until = 0; /* e: the step whose exponentials are taken */
        bool exp = i > at->begin, score = i < at->end;
        int64_t block_end = (e / BLOCK_STEPS + 1) * BLOCK_STEPS;
        if (block_end > at->end) block_end = at->end;
        w->chunk = w->chunks = 0;
        w->credit = 0;
        if (exp) {
            /* The last beat of a block's exponentials ends the products of the block before. */
            until = at->full.products - (at->full.products - at->full.done) *
                                            (block_end - i) / (block_end - e);
            w->chunks = STEP_CHUNKS * w->tiles;
            w->exp_s = w->s[e & 1];
            w->exp_p = w->p[e / BLOCK_STEPS & 1] + e % BLOCK_STEPS * PAIR_BYTES;
            w->exp_key = (int32_t)(e * STEP_KEYS);
        }
        w->ticks = (score ? w->pairs * w->k_steps : 0) + (until - at->full.done) * at->full.steps;
        if (score) {
            const char *k = w->task->packed + i / BLOCK_STEPS * at->block_bytes +
                            i % BLOCK_STEPS * w->k_steps * PAIR_BYTES;
            for (int pair = 0; pair < w->pairs; pair++)
                product(w, k, w->q + pair * w->k_steps * PAIR_BYTES,
                        w->s[i & 1] + pair * QUAD_BYTES, w->k_steps, false);
        }
        multiply_v(w, &at->full, until);
        if (!exp) continue;
        if (w->ticks == 0) store_pending(w);
        while (w->chunk < w->chunks) exp_chunk(w, w->chunk++);
        close_step(w, at, e);
        if (i == block_end) at->full = take_block(w, at, i);
    }
    w->chunks = 0;
    multiply_v(w, &at->full, at->full.products);
    store_pending(w);
}

/* ---- a task ---------------------------------------------------------------------------------- */

/* Adds the infinities and NaNs of V, which were packed as zeros, to the rows that see their key. */
static void add_not_finite(struct work *w, const struct walk *at, int64_t bits_offset)
{
    const struct attn_mha_task *t = w->task;
    for (int64_t i = at->begin; i < at->end; i++) {
        const char *block = t->packed + i / BLOCK_STEPS * at->block_bytes;
        uint32_t bits = ((const uint32_t *)(const void *)(block + bits_offset))[i % BLOCK_STEPS];
        for (; bits; bits &= bits - 1) {
            int32_t key = (int32_t)(i * STEP_KEYS) + __builtin_ctz(bits);
            const char *v = t->kv.v + attn_kv_v_offset(&t->kv, key);
            for (int d = 0; d < t->d_v; d++) {
                float x = attn_load(ATTN_BF16, v, d);
                for (int r = 0; r < t->rows && !isfinite(x); r++)
                    if (key - w->lo[r] >= 0 && key - w->lo[r] < w->seen[r])
                        o_line(w, r / 16, d)[r % 16] += x;
            }
        }
    }
}

/* out and lse of one tile of queries. */
static void finish_tile(struct work *w, int tile)
{
    const struct attn_mha_task *t = w->task;
    int rows = t->rows - 16 * tile;
    if (rows > 16) rows = 16;
    __m512 m = _mm512_load_ps(w->m + 16 * tile), l = _mm512_load_ps(w->l + 16 * tile);
    __m512 f = _mm512_set1_ps(1.0f);
    if (t->sinks) {
        __m512 sink = _mm512_maskz_loadu_ps((__mmask16)((1u << rows) - 1), t->sinks + 16 * tile);
        sink = _mm512_mul_ps(sink, _mm512_set1_ps(LOG2_E));
        __m512 to = _mm512_max_ps(sink, m);
        f = exp2_16_exact(_mm512_sub_ps(m, to));
        l = _mm512_fmadd_ps(l, f, exp2_16_exact(_mm512_sub_ps(sink, to)));
        m = to;
    }
    float lse[16] __attribute__((aligned(64)));
    _mm512_store_ps(lse, _mm512_mul_ps(_mm512_add_ps(m, log2_16(l)), _mm512_set1_ps(LN_2)));
    for (int i = 0; i < rows; i++) t->lse[t->lse_row[16 * tile + i]] = lse[i];

    __mmask16 empty = _mm512_cmp_ps_mask(l, _mm512_setzero_ps(), _CMP_EQ_OQ);
    f = _mm512_div_ps(_mm512_mul_ps(f, _mm512_set1_ps(t->out_scale[0])), l);
    f = _mm512_mask_mov_ps(f, empty, _mm512_setzero_ps());
    for (int64_t s = 0; s < w->v_steps; s++) {
        __m512i low[16], high[16]; /* d of [32 s, 32 s + 16), the 16 after it */
        for (int i = 0; i < 16; i++) {
            __m512 zero = _mm512_setzero_ps(), x = zero, y = zero;
            if (w->o_used) {
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
            if (t->partial) {
                _mm512_mask_storeu_epi32(out + 128 * s, (__mmask16)live, low[i]);
                _mm512_mask_storeu_epi32(out + 128 * s + 64, (__mmask16)(live >> 16), high[i]);
            } else {
                __m512bh y = _mm512_cvtne2ps_pbh(_mm512_castsi512_ps(high[i]),
                                                 _mm512_castsi512_ps(low[i]));
                _mm512_mask_storeu_epi16(out + 64 * s, live, (__m512i)y);
            }
        }
    }
}

/* Lays q and the rows' intervals out by tile; padding rows repeat the last one with a zero q.
 * Returns the steps [begin, end) that some row sees. */
static void load_rows(struct work *w, int64_t *begin, int64_t *end)
{
    const struct attn_mha_task *t = w->task;
    int64_t first = INT32_MAX, last = 0;
    for (int r = 0; r < 16 * w->tiles; r++) {
        int from = r < t->rows ? r : t->rows - 1;
        int64_t lo = t->lo[from], hi = t->hi[from];
        if (lo < t->k_begin) lo = t->k_begin;
        if (hi > t->k_end) hi = t->k_end;
        if (lo >= hi) lo = hi = 0;
        else if (lo < first) first = lo;
        if (hi > last) last = hi;
        w->lo[r] = (int32_t)lo;
        w->seen[r] = (int32_t)(hi - lo);
        int32_t *all_lo = &w->all_lo[r / 16], *all_hi = &w->all_hi[r / 16];
        if (r % 16 == 0 || lo > *all_lo) *all_lo = (int32_t)lo;
        if (r % 16 == 0 || hi < *all_hi) *all_hi = (int32_t)hi;
        w->m[r] = M_NONE;
        w->l[r] = w->step_l[r] = 0;
        w->step_max[r] = -INFINITY;
    }
    *begin = last ? first / STEP_KEYS : 0;
    *end = (last + STEP_KEYS - 1) / STEP_KEYS;

    for (int tile = 0; tile < w->tiles; tile++) {
        const char *q[16], *qv[16];
        for (int i = 0; i < 16; i++) {
            int r = 16 * tile + i;
            q[i] = r < t->rows ? t->q + t->q_row[r] : NULL;
            qv[i] = r < t->rows && t->qv ? t->qv + t->qv_row[r] : NULL;
        }
        pack_q_rows(q, t->qv ? qv : NULL, t->d_qk, t->d_v, t->score_scale[0] < 0,
                    w->q + tile / 2 * w->k_steps * PAIR_BYTES + tile % 2 * TILE_BYTES);
    }
}

static int64_t pairs_of(int64_t rows)
{
    return (rows + 31) / 32;
}

static void run(const struct attn_mha_task *task, char *scratch)
{
    int64_t d_s = task->d_qk + (task->qv ? task->d_v : 0);
    float scale = fabsf(task->score_scale[0]);
    struct work w;
    struct walk at = {.v_offset = block_v(d_s), .block_bytes = pack_bytes(d_s, task->d_v)};
    w.task = task;
    w.k_steps = width_steps(d_s);
    w.v_steps = width_steps(task->d_v);
    w.pairs = (int)pairs_of(task->rows);
    w.tiles = 2 * w.pairs;
    w.cap = task->softcap;
    w.cap_scale = w.cap > 0 ? scale / w.cap : 0;
    w.scale = w.cap > 0 ? LOG2_E : fmaxf(scale * LOG2_E, 1e-30f); /* 0 * -inf is NaN */
    w.o_used = false;
    w.pending = NULL;

    w.s[0] = scratch;
    w.s[1] = w.s[0] + w.pairs * QUAD_BYTES;
    w.p[0] = w.s[1] + w.pairs * QUAD_BYTES;
    w.p[1] = w.p[0] + w.pairs * BLOCK_STEPS * PAIR_BYTES;
    w.q = w.p[1] + w.pairs * BLOCK_STEPS * PAIR_BYTES;
    w.o = w.q + w.pairs * w.k_steps * PAIR_BYTES;

    load_rows(&w, &at.begin, &at.end);
    if (w.cap > 0) memset(w.all_hi, 0, sizeof w.all_hi);
    if (at.begin < at.end) {
        tile_begin();
        attend(&w, &at);
        tile_end();
        add_not_finite(&w, &at, block_bits(d_s, task->d_v));
    }
    for (int tile = 0; 16 * tile < task->rows; tile++) finish_tile(&w, tile);
}

static int64_t scratch_bytes(int64_t d_s, int64_t d_v, int64_t rows, int64_t heads)
{
    (void)heads;
    return pairs_of(rows) * (2 * QUAD_BYTES + 2 * BLOCK_STEPS * PAIR_BYTES +
                             width_steps(d_s) * PAIR_BYTES + width_steps(d_v) * QUAD_BYTES);
}

static void pack(const struct attn_kv_view *kv, int32_t d_qk, int32_t d_v, bool qv, int64_t j0,
                 int64_t first, int64_t end, char *block)
{
    int64_t d_s = d_qk + (qv ? d_v : 0), k_bytes = width_steps(d_s) * PAIR_BYTES;
    uint32_t *bits = (uint32_t *)(void *)(block + block_bits(d_s, d_v));
    for (int64_t i = 0; i < BLOCK_STEPS; i++) {
        const char *k[STEP_KEYS], *v[STEP_KEYS];
        for (int64_t j = 0; j < STEP_KEYS; j++) {
            int64_t key = j0 + i * STEP_KEYS + j;
            bool live = first <= key && key < end;
            k[j] = live ? kv->k + attn_kv_k_offset(kv, key) : NULL;
            v[j] = live ? kv->v + attn_kv_v_offset(kv, key) : NULL;
        }
        pack_k_step(k, v, d_qk, d_v, qv, block + i * k_bytes);
        bits[i] = pack_v_step(v, d_v, block + block_v(d_s) + i * PAIR_BYTES);
    }
}

const struct attn_mha_kernel attn_mha_fwd_bf16_amx = {
    .name = "attn_mha_fwd_bf16_amx",
    .rows_max = ROWS_MAX,
    .rows_step = 32,
    .n = BLOCK_KEYS,
    .scratch_bytes = scratch_bytes,
    .pack_bytes = pack_bytes,
    .pack = pack,
    .run = run,
};
