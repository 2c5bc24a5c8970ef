/* SPDX-License-Identifier: MIT
 *
 * Ends a pair of mha_fwd_tile.h: infinities of V, sinks, out and lse.
 */
#ifndef ATTN_CPU_X86_MHA_FWD_TILE_FINISH_H
#define ATTN_CPU_X86_MHA_FWD_TILE_FINISH_H

#include <math.h>

#include "cpu/x86/mha_fwd_tile_ruler.h"

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
    __m512 p_sum = l, lost = _mm512_setzero_ps();
    const __mmask16 ruled = PLANES == 1 ? still_ruled(w, tile) : 0;
    if (ruled) lost = rulers_lost(w, tile, ruled);
    if (t->partial)
        p_sum = _mm512_add_ps(lost, _mm512_add_ps(_mm512_load_ps(w->p_sum[0] + 16 * tile),
                                                  _mm512_load_ps(w->p_sum[1] + 16 * tile)));
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
    float lost_f[16] __attribute__((aligned(64)));
    _mm512_store_ps(lost_f, _mm512_mul_ps(lost, f));
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
            if (ruled >> i & 1) add_ruler(w, 16 * tile + i, s, lost_f[i], &low[i], &high[i]);
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

#endif
