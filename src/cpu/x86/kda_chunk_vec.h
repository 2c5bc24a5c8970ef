/* SPDX-License-Identifier: MIT
 *
 * What the kernels of kda_fwd share, written over vec_ for every rung: the triangular inverse, the
 * state's way from memory and back.
 */
#ifndef ATTN_CPU_X86_KDA_CHUNK_VEC_H
#define ATTN_CPU_X86_KDA_CHUNK_VEC_H

#include "cpu/x86/kda_gate_vec.h"

enum { KDA_SLICE = 2 * VEC_LANES }; /* values a scan takes */

/* t = (I + diag(b) N)^-1 diag(b), N the part of n below the diagonal; rows beyond `rows` are 0.
 * By rows: t_i = b_i (e_i - sum over j < i of N_ij t_j). */
static void kda_inverse(const float *n, const float *b, int32_t rows, float *t)
{
    static const float unit[2 * VEC_LANES] = {[VEC_LANES] = 1};
    for (int32_t c = 0; c < KDA_CHUNK; c += VEC_LANES) {
        for (int32_t i = 0; i < KDA_CHUNK; ++i) {
            if (i < c || i >= rows) {
                vec_store(t + i * KDA_CHUNK + c, vec_zero());
                continue;
            }
            vec sum[4] = {vec_zero(), vec_zero(), vec_zero(), vec_zero()};
            if (i < c + VEC_LANES) sum[0] = vec_load_f32(unit + VEC_LANES - (i - c));
            int32_t j = c;
            for (; j + 4 <= i; j += 4) VEC_UNROLL
            for (int u = 0; u < 4; ++u)
                sum[u] = vec_fnma(vec_set1(n[i * KDA_CHUNK + j + u]),
                                  vec_load(t + (j + u) * KDA_CHUNK + c), sum[u]);
            for (; j < i; ++j)
                sum[0] = vec_fnma(vec_set1(n[i * KDA_CHUNK + j]), vec_load(t + j * KDA_CHUNK + c),
                                  sum[0]);
            vec all = vec_add(vec_add(sum[0], sum[1]), vec_add(sum[2], sum[3]));
            vec_store(t + i * KDA_CHUNK + c, vec_mul(vec_set1(b[i]), all));
        }
    }
}

/* ---- the state: [V, K] in memory, [place of K][KDA_SLICE values] here ------------------------ */

VEC_INLINE void kda_load_slice(enum attn_dtype t, enum attn_dtype memory, const char *from,
                               int32_t v0, int32_t d, float *state)
{
    int64_t bytes = attn_dtype_bytes(memory);
    for (int32_t v = 0; v < KDA_SLICE; v += VEC_LANES) {
        for (int32_t c = 0; c < d; c += VEC_LANES) {
            vec r[VEC_LANES];
            for (int i = 0; i < VEC_LANES; ++i)
                r[i] = vec_load_elem(memory, from + ((v0 + v + i) * d + c) * bytes);
            vec_transpose(r);
            for (int i = 0; i < VEC_LANES; ++i)
                vec_store(state + kda_place(t, c + i) * KDA_SLICE + v, r[i]);
        }
    }
}

VEC_INLINE void kda_store_slice(enum attn_dtype t, enum attn_dtype memory, char *to, int32_t v0,
                                int32_t d, const float *state)
{
    int64_t bytes = attn_dtype_bytes(memory);
    for (int32_t v = 0; v < KDA_SLICE; v += VEC_LANES) {
        for (int32_t c = 0; c < d; c += VEC_LANES) {
            vec r[VEC_LANES];
            for (int i = 0; i < VEC_LANES; ++i)
                r[i] = vec_load(state + kda_place(t, c + i) * KDA_SLICE + v);
            vec_transpose(r);
            for (int i = 0; i < VEC_LANES; ++i)
                vec_store_elem(memory, to + ((v0 + v + i) * d + c) * bytes, r[i]);
        }
    }
}

static void kda_read_state(enum attn_dtype t, const struct attn_kda_scan *s)
{
    if (!s->first) return;
    if (!s->initial)
        for (int64_t i = 0; i < s->d * KDA_SLICE; i += VEC_LANES)
            vec_store(s->state + i, vec_zero());
    else if (s->state_dtype == ATTN_F32)
        kda_load_slice(t, ATTN_F32, s->initial, s->v0, s->d, s->state);
    else
        kda_load_slice(t, ATTN_BF16, s->initial, s->v0, s->d, s->state);
}

static void kda_write_state(enum attn_dtype t, const struct attn_kda_scan *s,
                            enum attn_dtype memory, char *to)
{
    if (!to) return;
    if (memory == ATTN_F32)
        kda_store_slice(t, ATTN_F32, to, s->v0, s->d, s->state);
    else
        kda_store_slice(t, ATTN_BF16, to, s->v0, s->d, s->state);
}

#endif
