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
 * one key then gives that key's V to fp32's accuracy.  In bf16 the P of a key that rules its row is
 * not rounded at all: see mha_fwd_tile_ruler.h.
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
 * product (four TDPBF16PS, 64 clocks) come chunks of exp (8 keys x 16 queries, or 4), since the
 * scheduler is too small to find the overlap by itself.  The results of a product are stored during
 * the first step of the next one.  S is a ring of three steps, P a double buffer of units.
 *
 * While tiles multiply, port 5 has no FMA: an exponential may cost 8 slots of port 0, and takes 6.
 *
 * Exponentials are taken with the m of the beat's begin; where it turns out too small (close_beat)
 * the beat's exponentials are taken again.
 *
 * Here are beats and the task; what they are made of is in mha_fwd_tile_work.h (the state), _exp.h,
 * _ruler.h, _product.h and _finish.h.
 */
#ifndef ATTN_CPU_X86_MHA_FWD_TILE_H
#define ATTN_CPU_X86_MHA_FWD_TILE_H

#include <math.h>
#include <string.h>

#include "cpu/x86/mha_fwd_tile_finish.h"
#include "cpu/x86/mha_fwd_tile_product.h"

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

/* S of one beat; the last step's tiles are not stored yet. */
static void score(struct work *w, const struct beat *b)
{
    for (int64_t i = b->begin; i < b->end; i++)
        product_s(w, k_tiles(w, i), q_tiles(w, b->pair), s_quad(w, b, i));
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
    _mm512_mask_store_ps(w->ruler_p + 16 * tile, up, _mm512_set1_ps(P_FIRST));
    _mm512_mask_store_epi32(w->ruler + 16 * tile, up, _mm512_set1_epi32(-1));
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
        __m512 beat = _mm512_load_ps(beat_l), sum = _mm512_add_ps(_mm512_load_ps(l), beat);
        __m512 share = _mm512_mul_ps(sum, _mm512_set1_ps(RULES));
        __mmask16 large = _mm512_cmp_ps_mask(beat, share, _CMP_GT_OQ);
        if (PLANES == 1 && large && !w->exp.first) find_rulers(w, side, large, share);
        _mm512_store_ps(l, sum);
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
    /* At the first half step two of the four tiles of this beat's last S are stored: the first four
     * chunks'.  So no more may be due of the 16 that a beat of one step has. */
    if (halves(w->capped)) w->ticks = w->ticks == 1 ? 4 : 2 * w->ticks;
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

/* What a beat's pair will want besides K and V: its own q, and that of the pair after it, before
 * its first beat; a share of its rows of out before those of its last block. */
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
        w->ruler_p[r] = P_FIRST;
        w->ruler[r] = -1;
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
        .rows_least = ROWS_LEAST,                                                                  \
        .n = BLOCK_KEYS,                                                                           \
        .scratch_bytes = scratch_bytes,                                                            \
        .pack_bytes = pack_bytes,                                                                  \
        .pack = pack_##dtype,                                                                      \
        .run = run_##dtype,                                                                        \
    }

#endif
