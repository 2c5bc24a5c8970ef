/* SPDX-License-Identifier: MIT
 *
 * What mha_fwd_tile.h keeps of a task: the beat whose exponentials are taken, the unit that is
 * multiplied, and a lane a query of everything else.
 */
#ifndef ATTN_CPU_X86_MHA_FWD_TILE_WORK_H
#define ATTN_CPU_X86_MHA_FWD_TILE_WORK_H

#include "cpu/x86/kernels_x86.h"
#include "cpu/x86/mha_fwd_amx_pack.h"
#include "cpu/x86/softcap_avx512.h"

enum {
    ROWS_MAX = 256,
    PAIRS_MAX = ROWS_MAX / 32,
    ROWS_LEAST = PLANES == 1 ? 9
    : PLANES == 2            ? 20
                             : 80, /* measured beside AVX-512 */
    BEAT_STEPS = 2,
    S_STEPS = 3, /* S of the steps being made and being used */
    VECTORS = 4, /* keys whose exponentials are taken together */
    S_PRODUCTS = PLANES == 2 ? 4 : PLANES * (PLANES + 1) / 2, /* of planes, in a product K Q; */
    PV_PRODUCTS = PLANES * (PLANES + 1) / 2,                  /* in one of V P */
};

#define M_NONE (-0x1p120f)
#define M_SLACK 8.0f    /* log2: how far scores may pass the first maximum */
#define P_FIRST 0x1p-7f /* p of the maximum that m was set by: 2^(1 - M_SLACK) */
#define RULES 0.25f     /* share of l from which on a key rules its row */
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
    float ruler_p[ROWS_MAX] __attribute__((aligned(64)));  /* P of the last key to rule the row */
    int32_t ruler[ROWS_MAX] __attribute__((aligned(64)));  /* and the key; P_FIRST, -1: none */
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

/* Scores of key j of a step with 16 queries, first planes only. */
static inline __m512 plain_score(const struct work *w, int pair, int64_t step, int j, int side)
{
    const char *k = k_tiles(w, step) + j / 16 * TILE_BYTES + j % 16 * TILE_ROW_BYTES;
    const char *q = q_tiles(w, pair) + side * TILE_BYTES;
    __m512 sum[4];
    EACH(i, 4) sum[i] = _mm512_setzero_ps();
    for (int64_t s = 0; s < w->k_steps; s++) VEC_UNROLL
    for (int i = 0; i < 16; i++) {
        int32_t two;
        memcpy(&two, k + s * OPERAND_BYTES + 4 * i, 4);
        __m512i q_pair = _mm512_load_si512(q + s * OPERAND_BYTES + i * TILE_ROW_BYTES);
        sum[i % 4] = _mm512_dpbf16_ps(sum[i % 4], (__m512bh)_mm512_set1_epi32(two),
                                      (__m512bh)q_pair);
    }
    return _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3]));
}

#endif
