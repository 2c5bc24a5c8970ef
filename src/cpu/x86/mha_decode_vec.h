/* SPDX-License-Identifier: MIT
 *
 * mha_decode: attention of a few query rows a KV head (G * s_q <= 8), bound by the reading of the
 * cache.  This body is compiled once a rung over vec_ and row_ names and those of decode_fma.h or
 * decode_dot.h, which make the products; lanes run along the width d.
 *
 * Math, in fp32 (by decode_dot.h P is rounded to bf16 for its product, and O divided by the sum of
 * the rounded P), scores in base 2 units, for row r and the keys j it sees:
 *   t_j = log2e * softcap(score_scale * (q . k_j + qv . v_j))
 *   m'  = max(m, max_j t_j)      p_j = 2^(t_j - m')      a = 2^(m - m')
 *   l'  = a l + sum_j p_j        O'  = a O + sum_j p_j v_j
 * for one block of 32 keys after the other.  m starts at -FLT_MAX, so that a row which saw nothing
 * keeps l = 0 and O = 0 without an infinity being subtracted from an infinity.
 *
 * Walk.  In the usual cache [s, h_k, d] one position's heads are neighbours.  So that the cache
 * streams through in the order of its addresses, all heads take a turn of some keys before any goes
 * on, and each asks for its own rows of the next turn while it works on this one:
 *
 *                       head 0       head 1             head h_k - 1
 *   block i, scores     K turn 0     K turn 0    ...    K turn 0       asks for K turn 1
 *                       K turn 1     K turn 1    ...    K turn 1       asks for K of block i + 1
 *            softmax    S to P       S to P      ...    S to P
 *            PV         V turn 0     V turn 0    ...    V turn 0       asks for V turn 1
 *                       V turn 1     V turn 1    ...    V turn 1       asks for V of block i + 1
 *
 * A turn is LINEAR_BYTES long: more pages at a time cost bandwidth, fewer keys more traffic of O.
 * Where the rows lie is looked up once a block for all heads, pages included.
 *
 * Tiles.  Rows go R = 4, 2 or 1 at a time, with KEYS = VEC_LANES / R keys: VEC_LANES dot products
 * in as many accumulators, which vec_sums turns into one vector of scores.  Lane r * KEYS + i of
 * score vector n is row r, key n * KEYS + i, and the softmax works on whole vectors like that.
 *
 *   q    [tile][step][R][Q_STEP]  as step_dot wants it; a step is 2 VEC_LANES elements
 *   O    [tile][step][R][pair]    the two vectors of step_columns
 *   s    [tile][BLOCK / KEYS][VEC_LANES]      scores, then p as add_values wants it
 *   m, l, a, rounded [tile][VEC_LANES]        each row's value in all of its KEYS lanes
 *
 * A row's bits depend on nothing but its q, its visible keys and the blocks: a dot product is one
 * chain over the width, an output one chain over the visible keys, and l adds a block's 32
 * p as one fixed tree (key ^ 16, ^ 8, ... ^ 1) however many lanes hold them.  Rows of a tile that
 * see different keys of a block take their V one row at a time, so no row meets a V row it does
 * not see.
 */
#ifndef ATTN_CPU_X86_MHA_DECODE_VEC_H
#define ATTN_CPU_X86_MHA_DECODE_VEC_H

#include <float.h>
#include <string.h>

#include "core/int.h"
#include "cpu/kernels.h"

enum {
    BLOCK = 32,
    ROWS_MAX = 8,
    ROWS = 4, /* most rows of a tile */
    TILES_MAX = ROWS_MAX / ROWS,
    GROUP = VEC_LANES / ROWS, /* keys whose rows are walked together */
    PV_STEPS = VEC_LANES / 8, /* steps of ROWS rows of O that fit the registers */
    LINEAR_BYTES = 32768,     /* of K or V that all heads read before they read on */
};

static const float log2e = 1.44269504088896341f, ln2 = 0.69314718055994531f;

/* Byte offsets of the rows of KV head 0 for a block's keys, then for the next block's, which are
 * only asked for. */
struct window {
    int64_t k[2 * BLOCK], v[2 * BLOCK];
};

/* Rows row0 .. row0 + rows - 1 of a task, computed as R rows, and what they see of a block. */
struct tile {
    int32_t row0, rows, R;
    int32_t lo[ROWS], hi[ROWS]; /* relative to the block, 0 <= lo <= hi <= BLOCK */
    int32_t begin, end;         /* the union */
    bool same;                  /* all rows see [begin, end) */
};

/* What a KV head keeps in scratch. */
struct head {
    float *q, *o, *m, *l, *a, *s;
    float *rounded; /* like l, the sum of p after rounding; l itself where none is rounded */
};

static int64_t head_floats(int64_t d_s, int64_t d_v, int64_t rows)
{
    /* d_s may be d_qk + d_v, each rounded up by itself. */
    int64_t width = round_up(d_s, STEP) + STEP + round_up(d_v, STEP);
    return round_up(rows, ROWS) * (width + BLOCK) + (3 + ROUNDED) * TILES_MAX * VEC_LANES;
}

static int64_t scratch_bytes(int64_t d_s, int64_t d_v, int64_t rows, int64_t heads)
{
    return heads * head_floats(d_s, d_v, rows) * (int64_t)sizeof(float);
}

static struct head head_at(const struct attn_mha_task *task, char *scratch, int32_t h)
{
    int64_t d_s = task->d_qk + (task->qv ? task->d_v : 0);
    int64_t rows = round_up(task->rows, ROWS);
    float *base = (float *)(void *)scratch + h * head_floats(d_s, task->d_v, task->rows);
    struct head head = {.m = base};
    head.l = head.m + TILES_MAX * VEC_LANES;
    head.a = head.l + TILES_MAX * VEC_LANES;
    head.rounded = ROUNDED ? head.a + TILES_MAX * VEC_LANES : head.l;
    head.s = head.a + (1 + ROUNDED) * TILES_MAX * VEC_LANES;
    head.o = head.s + rows * BLOCK;
    head.q = head.o + rows * round_up(task->d_v, STEP);
    return head;
}

/* Cuts rows into tiles of four, the last one computed as 1, 2 or 4. */
static int cut_rows(int32_t rows, struct tile tiles[TILES_MAX])
{
    int n = 0;
    for (int32_t row0 = 0; row0 < rows; row0 += tiles[n++].rows) {
        int32_t left = rows - row0;
        tiles[n] = (struct tile){.row0 = row0,
                                 .rows = left < ROWS ? left : ROWS,
                                 .R = left < 3 ? left : ROWS};
    }
    return n;
}

static int32_t clamp_key(int64_t j) { return (int32_t)(j < 0 ? 0 : j > BLOCK ? BLOCK : j); }

/* What a tile sees of the block at j0; rows that only pad the tile repeat its last. */
static void see_block(const struct attn_mha_task *task, int64_t j0, struct tile *tile)
{
    tile->begin = BLOCK, tile->end = 0, tile->same = true;
    for (int32_t i = 0; i < tile->R; i++) {
        int32_t r = tile->row0 + (i < tile->rows ? i : tile->rows - 1);
        int64_t end = task->hi[r] < task->k_end ? task->hi[r] : task->k_end;
        int32_t lo = clamp_key(task->lo[r] - j0), hi = clamp_key(end - j0);
        if (hi <= lo) lo = hi = 0;
        tile->lo[i] = lo, tile->hi[i] = hi;
        tile->same = tile->same && lo == tile->lo[0] && hi == tile->hi[0];
        if (lo == hi) continue;
        tile->begin = lo < tile->begin ? lo : tile->begin;
        tile->end = hi > tile->end ? hi : tile->end;
    }
}

/* Finds the rows of the block at j0, page by page.  Keys past the task's last one have its rows, so
 * the tables never point at a position, or look up a page, that the task may not touch. */
static void find_rows(const struct attn_mha_task *task, int64_t j0, int64_t k_at[BLOCK],
                      int64_t v_at[BLOCK])
{
    const struct attn_kv_view *kv = &task->kv;
    if (j0 >= task->k_end) j0 = task->k_end - 1;
    int64_t live = task->k_end - j0 < BLOCK ? task->k_end - j0 : BLOCK;
    int64_t x = kv->first + j0, size = kv->pages ? kv->page : INT64_MAX;
    int64_t page = x / size, slot = x % size, i = 0;
    while (i < live) {
        int64_t base = kv->pages ? kv->pages[page++] : 0;
        int64_t k = base * kv->k_page + slot * kv->k_row;
        int64_t v = base * kv->v_page + slot * kv->v_row;
        int64_t stop = live - i < size - slot ? live : i + size - slot;
        for (; i < stop; i++, k += kv->k_row, v += kv->v_row) k_at[i] = k, v_at[i] = v;
        slot = 0;
    }
    for (; i < BLOCK; i++) k_at[i] = k_at[live - 1], v_at[i] = v_at[live - 1];
}

/* Asks for the cache lines of n elements at p; to L2, for all heads' rows outgrow L1. */
VEC_INLINE void prefetch(enum attn_dtype t, const char *p, int n)
{
    int bytes = n * (int)attn_dtype_bytes(t);
    VEC_UNROLL
    for (int i = 0; i < bytes; i += 64) _mm_prefetch(p + i, _MM_HINT_T1);
}

/* Floats of a row of q in scratch. */
static int64_t query_floats(int64_t d) { return round_up(d, STEP) / STEP * Q_STEP; }

/* acc[r * KEYS + i] += q[r] . row[i] over d elements, for R rows of q and the GROUP keys whose rows
 * lie at row[i]; next[i] are the same keys' rows of the next block. */
VEC_INLINE void dot_group(enum attn_dtype t, int R, vec *acc, const float *q,
                          const char *const row[GROUP], const char *const next[GROUP], int32_t d)
{
    const int keys = VEC_LANES / R;
    const int64_t bytes = STEP * attn_dtype_bytes(t);
    int64_t at = 0;
    for (int32_t left = d; left > 0; left -= STEP, at += bytes, q += R * Q_STEP) {
        struct step k[GROUP];
        if (left >= STEP) {
            VEC_UNROLL
            for (int i = 0; i < GROUP; i++) k[i] = step_load(t, row[i] + at);
        } else {
            VEC_UNROLL
            for (int i = 0; i < GROUP; i++) k[i] = step_load_part(t, row[i] + at, left);
        }
        VEC_UNROLL
        for (int i = 0; i < GROUP; i++) prefetch(t, next[i] + at, STEP);
        VEC_UNROLL
        for (int r = 0; r < R; r++) {
            struct step x = query_load(q + r * Q_STEP);
            VEC_UNROLL
            for (int i = 0; i < GROUP; i++)
                acc[r * keys + i] = step_dot(k[i], x, acc[r * keys + i]);
        }
    }
}

/* s[n][VEC_LANES] = raw scores of the tile's rows and the KEYS keys of each score vector n, for
 * keys [j, j + keys); asks for the rows `ahead` keys later. */
VEC_INLINE void scores(enum attn_dtype t, int R, const struct attn_mha_task *task,
                       const struct tile *tile, const struct window *rows, int32_t h, int32_t j,
                       int32_t stop, int32_t ahead, struct head head)
{
    const int keys = VEC_LANES / R;
    const int64_t d_k = query_floats(task->d_qk), d_v = task->qv ? query_floats(task->d_v) : 0;
    const float *q = head.q + tile->row0 * (d_k + d_v);
    const char *k = task->kv.k + h * task->kv.k_head, *v = task->kv.v + h * task->kv.v_head;
    float *s = head.s + tile->row0 * BLOCK;
    for (; j < stop; j += keys) {
        vec acc[VEC_LANES];
        VEC_UNROLL
        for (int i = 0; i < VEC_LANES; i++) acc[i] = vec_zero();
        if (j + keys > tile->begin && j < tile->end) {
            VEC_UNROLL
            for (int g = 0; g < keys; g += GROUP) {
                const char *row[GROUP], *next[GROUP];
                const int64_t *at = rows->k + j + g;
                VEC_UNROLL
                for (int i = 0; i < GROUP; i++) row[i] = k + at[i], next[i] = k + at[i + ahead];
                dot_group(t, R, acc + g, q, row, next, task->d_qk);
                if (!task->qv) continue;
                at = rows->v + j + g;
                VEC_UNROLL
                for (int i = 0; i < GROUP; i++) row[i] = v + at[i], next[i] = v + at[i + ahead];
                dot_group(t, R, acc + g, q + R * d_k, row, next, task->d_v);
            }
        }
        vec_store(s + j * R, vec_sums(acc));
    }
}

/* The sum of each row's lanes of x, in all of them. */
VEC_INLINE vec row_sums(vec *x, int vectors, int keys)
{
    VEC_UNROLL
    for (int half = vectors / 2; half > 0; half /= 2) VEC_UNROLL
    for (int n = 0; n < half; n++) x[n] = vec_add(x[n], x[n + half]);
    VEC_UNROLL
    for (int i = keys / 2; i > 0; i /= 2) x[0] = vec_add(x[0], vec_swap(x[0], i));
    return x[0];
}

/* Scores become p in place, m and l move on, and a = 2^(m - m') is what O is to be scaled by. */
VEC_INLINE void softmax(enum attn_dtype t, int R, const struct attn_mha_task *task,
                        const struct tile *tile, int32_t h, struct head head)
{
    const int64_t state = tile->row0 / ROWS * VEC_LANES;
    float *s = head.s + tile->row0 * BLOCK, *m = head.m + state, *l = head.l + state;
    float *rounded = head.rounded + state;
    const int keys = VEC_LANES / R, vectors = BLOCK / keys;
    const float cap = task->softcap, unit = step_scale(t);
    const float scale = task->score_scale[h] * unit * unit;
    const vec inner = vec_set1(cap != 0.0f ? scale / cap : 1.0f);
    const vec outer = vec_set1((cap != 0.0f ? cap : scale) * log2e);
    const bool masked = !(tile->same && tile->begin == 0 && tile->end == BLOCK);
    vec x[ROWS * BLOCK / VEC_LANES], y[ROWS * BLOCK / VEC_LANES];
    vec top = vec_set1(-INFINITY);
    VEC_UNROLL
    for (int n = 0; n < vectors; n++) {
        x[n] = vec_load(s + n * VEC_LANES);
        if (cap != 0.0f) x[n] = vec_tanh(vec_mul(x[n], inner));
        x[n] = vec_mul(x[n], outer);
    }
    if (masked) { /* lane r * keys + i sees key j + i from lo[r] - i on */
        _Alignas(64) int32_t lo[VEC_LANES], hi[VEC_LANES];
        for (int i = 0; i < VEC_LANES; i++)
            lo[i] = tile->lo[i / keys] - i % keys, hi[i] = tile->hi[i / keys] - i % keys;
        VEC_UNROLL
        for (int n = 0; n < vectors; n++)
            x[n] = vec_select(vec_within(n * keys, vec_int_load(lo), vec_int_load(hi)), x[n],
                              vec_set1(-INFINITY));
    }
    VEC_UNROLL
    for (int n = 0; n < vectors; n++) top = vec_max(top, x[n]);
    VEC_UNROLL
    for (int i = keys / 2; i > 0; i /= 2) top = vec_max(top, vec_swap(top, i));

    vec old = vec_load(m), now = vec_max(old, top), factor = vec_exp2(vec_sub(old, now));
    VEC_UNROLL
    for (int n = 0; n < vectors; n++) {
        x[n] = vec_exp2(vec_sub(x[n], now));
        vec_store(s + n * VEC_LANES, weights(x[n], &y[n]));
    }
    vec_store(m, now);
    vec_store(l, vec_fma(vec_load(l), factor, row_sums(x, vectors, keys)));
    if (ROUNDED) vec_store(rounded, vec_fma(vec_load(rounded), factor, row_sums(y, vectors, keys)));
    vec_store(head.a + state, factor);
}

/* O = a O + sum of p V over keys [begin, end) for `rows` rows, from row r0 of the tile, and for
 * `steps` steps of columns, or only `part` columns of one step when part > 0.
 * o is [step][R][pair], a and p have row r at lane r * KEYS; v is KV head h's first such column. */
VEC_INLINE void pv_columns(enum attn_dtype t, int R, int rows, int steps, int32_t part, int r0,
                           int32_t begin, int32_t end, int32_t ahead, const float *a,
                           const float *p, const char *v, const int64_t *at, float *o)
{
    const int keys = VEC_LANES / R;
    const int64_t bytes = STEP * attn_dtype_bytes(t);
    vec acc[ROWS][2 * PV_STEPS];
    a += r0 * keys, p += r0 * keys, o += r0 * STEP;
    VEC_UNROLL
    for (int r = 0; r < rows; r++) VEC_UNROLL
    for (int c = 0; c < 2 * steps; c++)
        acc[r][c] = vec_mul(vec_set1(a[r * keys]),
                            vec_load(o + (c / 2 * R + r) * STEP + c % 2 * VEC_LANES));
    for (int32_t j = begin & -V_KEYS; j < end; j += V_KEYS) {
        const float *pj = p + j / keys * VEC_LANES + j % keys;
        vec x[2 * PV_STEPS];
        VEC_UNROLL
        for (int c = 0; c < steps; c++) {
            struct step y[V_KEYS];
            VEC_UNROLL
            for (int i = 0; i < V_KEYS; i++) {
                const char *row = v + at[j + i] + c * bytes;
                if (V_KEYS > 1 && (j + i < begin || j + i >= end))
                    y[i] = step_zero(); /* hidden: what lies there may be NaN */
                else
                    y[i] = part ? step_load_part(t, row, part) : step_load(t, row);
            }
            step_columns(y, x + 2 * c);
        }
        VEC_UNROLL
        for (int i = 0; i < V_KEYS; i++) prefetch(t, v + at[j + i + ahead], steps * STEP);
        VEC_UNROLL
        for (int r = 0; r < rows; r++) {
            vec weight = vec_set1(pj[r * keys]);
            VEC_UNROLL
            for (int c = 0; c < 2 * steps; c++) acc[r][c] = add_values(weight, x[c], acc[r][c]);
        }
    }
    VEC_UNROLL
    for (int r = 0; r < rows; r++) VEC_UNROLL
    for (int c = 0; c < 2 * steps; c++)
        vec_store(o + (c / 2 * R + r) * STEP + c % 2 * VEC_LANES, acc[r][c]);
}

/* The same for all columns, and for those of the keys [begin, end) that lie in the turn [j, stop);
 * O is scaled by a in the first turn that has any, and by 1 later. */
VEC_INLINE void pv_rows(enum attn_dtype t, int R, int rows, const struct attn_mha_task *task,
                        const struct tile *tile, const struct window *window, int32_t h, int r0,
                        int32_t begin, int32_t end, int32_t j, int32_t stop, int32_t ahead,
                        struct head head)
{
    static const float ones[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    const int64_t bytes = STEP * attn_dtype_bytes(t), *at = window->v;
    const float *a = j <= begin ? head.a + tile->row0 / ROWS * VEC_LANES : ones;
    const float *p = head.s + tile->row0 * BLOCK;
    const char *v = task->kv.v + h * task->kv.v_head;
    float *o = head.o + tile->row0 * round_up(task->d_v, STEP);
    int32_t left = task->d_v;
    begin = begin > j ? begin : j, end = end < stop ? end : stop;
    if (begin >= end) return;
    for (; left >= PV_STEPS * STEP; left -= PV_STEPS * STEP) {
        pv_columns(t, R, rows, PV_STEPS, 0, r0, begin, end, ahead, a, p, v, at, o);
        v += PV_STEPS * bytes, o += PV_STEPS * R * STEP;
    }
    for (; PV_STEPS > 1 && left >= STEP; left -= STEP) {
        pv_columns(t, R, rows, 1, 0, r0, begin, end, ahead, a, p, v, at, o);
        v += bytes, o += R * STEP;
    }
    if (left > 0) pv_columns(t, R, rows, 1, left, r0, begin, end, ahead, a, p, v, at, o);
}

VEC_INLINE void pv(enum attn_dtype t, int R, const struct attn_mha_task *task,
                   const struct tile *tile, const struct window *rows, int32_t h, int32_t j,
                   int32_t stop, int32_t ahead, struct head head)
{
    if (tile->same) {
        pv_rows(t, R, R, task, tile, rows, h, 0, tile->begin, tile->end, j, stop, ahead, head);
        return;
    }
    for (int r = 0; r < tile->rows; r++)
        pv_rows(t, R, 1, task, tile, rows, h, r, tile->lo[r], tile->hi[r], j, stop, ahead, head);
}

/* Puts d elements of a query row into their places of q [step][R][Q_STEP]. */
VEC_INLINE void place_query(enum attn_dtype t, const char *from, int32_t d, int R, float *q)
{
    for (; d > 0; d -= STEP, from += STEP * attn_dtype_bytes(t), q += R * Q_STEP)
        query_store(q, d >= STEP ? step_load(t, from) : step_load_part(t, from, d));
}

VEC_INLINE void begin_head(enum attn_dtype t, const struct attn_mha_task *task,
                           const struct tile *tile, int32_t h, struct head head)
{
    int64_t d_k = query_floats(task->d_qk), d_v = round_up(task->d_v, STEP);
    int64_t d_s = d_k + (task->qv ? query_floats(task->d_v) : 0),
            state = tile->row0 / ROWS * VEC_LANES;
    float *q = head.q + tile->row0 * d_s, *o = head.o + tile->row0 * d_v;
    for (int64_t i = 0; i < tile->R * d_v; i += VEC_LANES) vec_store(o + i, vec_zero());
    vec_store(head.m + state, vec_set1(-FLT_MAX));
    vec_store(head.l + state, vec_zero());
    vec_store(head.rounded + state, vec_zero());
    if (tile->rows < tile->R)
        for (int64_t i = 0; i < tile->R * d_s; i += VEC_LANES) vec_store(q + i, vec_zero());
    for (int32_t i = 0; i < tile->rows; i++) {
        int32_t r = tile->row0 + i;
        place_query(t, task->q + h * task->q_head + task->q_row[r], task->d_qk, tile->R,
                    q + i * Q_STEP);
        if (task->qv)
            place_query(t, task->qv + h * task->qv_head + task->qv_row[r], task->d_v, tile->R,
                        q + tile->R * d_k + i * Q_STEP);
    }
}

/* Writes scale * O, of which o [step][R][pair] holds this row, as elements of `type`. */
VEC_INLINE void store_out(enum attn_dtype t, enum attn_dtype type, const float *o, int R,
                          int32_t d_v, float scale, char *out)
{
    const int64_t bytes = VEC_LANES * attn_dtype_bytes(type);
    for (; d_v > 0; d_v -= STEP, o += R * STEP, out += 2 * bytes) {
        vec a = vec_mul(vec_load(o), vec_set1(scale));
        vec b = vec_mul(vec_load(o + VEC_LANES), vec_set1(scale));
        columns_in_order(t, &a, &b);
        if (d_v >= STEP) {
            vec_store_elem(type, out, a);
            vec_store_elem(type, out + bytes, b);
        } else if (d_v > VEC_LANES) {
            vec_store_elem(type, out, a);
            vec_store_part_elem(type, out + bytes, b, d_v - VEC_LANES);
        } else {
            vec_store_part_elem(type, out, a, d_v);
        }
    }
}

VEC_INLINE void end_head(enum attn_dtype t, const struct attn_mha_task *task,
                         const struct tile *tile, int32_t h, struct head head)
{
    int64_t state = tile->row0 / ROWS * VEC_LANES;
    for (int32_t i = 0; i < tile->rows; i++) {
        int32_t r = tile->row0 + i, lane = i * (VEC_LANES / tile->R);
        float m = head.m[state + lane], l = head.l[state + lane];
        float rounded = head.rounded[state + lane], scale = task->out_scale[h] * step_scale(t);
        if (task->sinks) { /* one more score, without a V row */
            float sink = task->sinks[h * task->rows + r] * log2e, top = m > sink ? m : sink;
            float factor = exp2f(m - top);
            l = l * factor + exp2f(sink - top);
            rounded = rounded * factor + exp2f(sink - top);
            scale *= factor;
            m = top;
        }
        scale = l == 0.0f ? 0.0f : scale / rounded;
        task->lse[h * task->lse_head + task->lse_row[r]] = l == 0.0f ? -INFINITY
                                                                     : logf(l) + m * ln2;
        const float *o = head.o + tile->row0 * round_up(task->d_v, STEP) + i * STEP;
        char *out = task->out + h * task->out_head + task->out_row[r];
        if (task->partial)
            store_out(t, ATTN_F32, o, tile->R, task->d_v, scale, out);
        else
            store_out(t, attn_dtype_out(t), o, tile->R, task->d_v, scale, out);
    }
}

/* How many keys all heads take before any goes on: LINEAR_BYTES of neighbouring rows. */
static int32_t turn_keys(int64_t row, int64_t head, int32_t heads, int64_t bytes, int32_t least)
{
    int32_t keys = least;
    if (head < row) bytes *= heads; /* the heads of a position are neighbours */
    while (keys < BLOCK && keys * bytes < LINEAR_BYTES) keys *= 2;
    return keys;
}

enum phase { SCORES, SOFTMAX, PV };

VEC_INLINE void advance(enum attn_dtype t, enum phase phase, int R,
                        const struct attn_mha_task *task, const struct tile *tile,
                        const struct window *rows, int32_t h, int32_t j, int32_t stop,
                        int32_t ahead, struct head head)
{
    switch (phase) {
    case SCORES: scores(t, R, task, tile, rows, h, j, stop, ahead, head); break;
    case SOFTMAX: softmax(t, R, task, tile, h, head); break;
    case PV: pv(t, R, task, tile, rows, h, j, stop, ahead, head); break;
    }
}

/* One phase for the keys [j, stop) of the block, for all heads and tiles. */
VEC_INLINE void take_turn(enum attn_dtype t, enum phase phase, const struct attn_mha_task *task,
                          const struct tile *tiles, int n, const struct window *rows, int32_t j,
                          int32_t stop, char *scratch)
{
    for (int32_t h = 0; h < task->heads; h++) {
        const struct head head = head_at(task, scratch, h);
        for (int i = 0; i < n; i++) {
            const struct tile *tile = &tiles[i];
            const int32_t ahead = i == 0 ? stop - j : 0; /* one tile asks for all */
            if (tile->begin >= tile->end) continue;
            switch (tile->R) {
            case 1: advance(t, phase, 1, task, tile, rows, h, j, stop, ahead, head); break;
            case 2: advance(t, phase, 2, task, tile, rows, h, j, stop, ahead, head); break;
            default: advance(t, phase, ROWS, task, tile, rows, h, j, stop, ahead, head); break;
            }
        }
    }
}

VEC_INLINE void run(enum attn_dtype t, const struct attn_mha_task *task, char *scratch)
{
    const struct attn_kv_view *kv = &task->kv;
    const int64_t size = attn_dtype_bytes(t);
    struct window rows;
    struct tile tiles[TILES_MAX];
    const int n = cut_rows(task->rows, tiles);
    const int32_t turn_k = turn_keys(kv->k_row, kv->k_head, task->heads, task->d_qk * size,
                                     VEC_LANES / tiles[n - 1].R);
    const int32_t turn_v = turn_keys(kv->v_row, kv->v_head, task->heads, task->d_v * size, 4);

    for (int32_t h = 0; h < task->heads; h++)
        for (int i = 0; i < n; i++) begin_head(t, task, &tiles[i], h, head_at(task, scratch, h));

    if (task->k_begin < task->k_end) find_rows(task, task->k_begin, rows.k, rows.v);
    for (int64_t j0 = task->k_begin; j0 < task->k_end; j0 += BLOCK) {
        find_rows(task, j0 + BLOCK, rows.k + BLOCK, rows.v + BLOCK);
        for (int i = 0; i < n; i++) see_block(task, j0, &tiles[i]);
        for (int32_t j = 0; j < BLOCK; j += turn_k)
            take_turn(t, SCORES, task, tiles, n, &rows, j, j + turn_k, scratch);
        take_turn(t, SOFTMAX, task, tiles, n, &rows, 0, BLOCK, scratch);
        for (int32_t j = 0; j < BLOCK; j += turn_v)
            take_turn(t, PV, task, tiles, n, &rows, j, j + turn_v, scratch);
        memcpy(rows.k, rows.k + BLOCK, sizeof rows.k / 2);
        memcpy(rows.v, rows.v + BLOCK, sizeof rows.v / 2);
    }

    for (int32_t h = 0; h < task->heads; h++)
        for (int i = 0; i < n; i++) end_head(t, task, &tiles[i], h, head_at(task, scratch, h));
}

#define DECODE_RUN(dtype, type)                                                                    \
    static void run_##dtype(const struct attn_mha_task *task, char *scratch)                       \
    {                                                                                              \
        run(type, task, scratch);                                                                  \
    }
#define DECODE_KERNEL(dtype, isa)                                                                  \
    {                                                                                              \
        .name = "attn_mha_decode_" #dtype "_" #isa,                                                \
        .rows_max = ROWS_MAX,                                                                      \
        .rows_step = 1,                                                                            \
        .n = BLOCK,                                                                                \
        .decode = true,                                                                            \
        .scratch_bytes = scratch_bytes,                                                            \
        .run = run_##dtype,                                                                        \
    }

#endif
