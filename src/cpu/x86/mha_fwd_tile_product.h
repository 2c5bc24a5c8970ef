/* SPDX-License-Identifier: MIT
 *
 * Tile products of mha_fwd_tile.h: S = K Q^T and O += V^T P^T, 32 x 32 at a time, with exponentials
 * between their steps.
 */
#ifndef ATTN_CPU_X86_MHA_FWD_TILE_PRODUCT_H
#define ATTN_CPU_X86_MHA_FWD_TILE_PRODUCT_H

#include "cpu/x86/mha_fwd_tile_exp.h"

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

#endif
