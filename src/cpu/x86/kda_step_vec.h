/* SPDX-License-Identifier: MIT
 *
 * kda_step in fp32 vectors: the body of the AVX2 and AVX-512 rungs.
 *
 * A state row s (one value index v, K wide) meets token after token:
 *   u = b (v - s (a k))    out = scale (s (a q) + u (k q))    s <- s a + u k
 * with the token's a, k, q; so both sums come from the state before the token, in one sweep.
 * VEC_LANES rows at a time are read into L1, taken through all tokens and written back by the last
 * one: memory is read and written once.
 */
#ifndef ATTN_CPU_X86_KDA_STEP_VEC_H
#define ATTN_CPU_X86_KDA_STEP_VEC_H

#include "cpu/x86/kda_gate_vec.h"

enum { KDA_STEP_MAX = 16, KDA_STEP_AHEAD = 32 /* rows */ };

/* One token, channels in their own order. */
struct kda_step_token {
    float a[KDA_WIDTH] __attribute__((aligned(64)));
    float k[KDA_WIDTH] __attribute__((aligned(64)));
    float ak[KDA_WIDTH] __attribute__((aligned(64))); /* a k, a q */
    float aq[KDA_WIDTH] __attribute__((aligned(64)));
    float b, kq; /* k . q */
};

VEC_INLINE void kda_step_token(enum attn_dtype t, const struct attn_kda_tokens *x,
                               const struct kda_gates *g, int32_t i, struct kda_step_token *to)
{
    int64_t bytes = attn_dtype_bytes(t);
    vec kq = vec_zero();
    for (int32_t c = 0; c < x->d; c += 2 * VEC_LANES) {
        vec k[2], q[2], a[2];
        vec_load_pair(t, x->k + i * x->k_row + c * bytes, &k[0], &k[1]);
        vec_load_pair(t, x->q + i * x->q_row + c * bytes, &q[0], &q[1]);
        a[0] = vec_load(&g->decay[i][c]);
        a[1] = vec_load(&g->decay[i][c + VEC_LANES]);
        vec_unpair(t, &k[0], &k[1]);
        vec_unpair(t, &q[0], &q[1]);
        vec_unpair(t, &a[0], &a[1]);
        for (int j = 0; j < 2; ++j) {
            int32_t at = c + j * VEC_LANES;
            vec kn = vec_mul(k[j], vec_set1(g->k[i])), qn = vec_mul(q[j], vec_set1(g->q[i]));
            kq = vec_fma(kn, qn, kq);
            vec_store(to->a + at, a[j]);
            vec_store(to->k + at, kn);
            vec_store(to->ak + at, vec_mul(a[j], kn));
            vec_store(to->aq + at, vec_mul(a[j], qn));
        }
    }
    to->b = g->b[i];
    to->kq = vec_reduce_add(kq);
}

/* Stores and fetches the same place `ahead` bytes on, so that memory is read while rows are worked
 * on.  After the last rows that is the next head's state, or nobody's, which is no fault. */
VEC_INLINE void kda_step_put(enum attn_dtype memory, char *to, int64_t ahead, vec x)
{
    _mm_prefetch((const char *)((uintptr_t)to + (uintptr_t)ahead), _MM_HINT_T0);
    vec_store_elem(memory, to, x);
}

/* VEC_LANES state rows from v0 on. */
VEC_INLINE void kda_step_rows(enum attn_dtype t, enum attn_dtype memory,
                              const struct attn_kda_step_task *s,
                              const struct kda_step_token *tokens, int32_t v0)
{
    int32_t d = s->tokens.d, last = s->tokens.rows - 1;
    int64_t bytes = attn_dtype_bytes(memory), ahead = KDA_STEP_AHEAD * d * bytes;
    char *state = s->state + v0 * d * bytes;
    float rows[VEC_LANES][KDA_WIDTH] __attribute__((aligned(64)));
    for (int r = 0; r < VEC_LANES; ++r)
        for (int32_t c = 0; c < d; c += VEC_LANES)
            vec_store(&rows[r][c], vec_load_elem(memory, state + (r * d + c) * bytes));
    for (int32_t i = 0; i <= last; ++i) {
        const struct kda_step_token *x = &tokens[i];
        vec seen[VEC_LANES], out[VEC_LANES];
        for (int r = 0; r < VEC_LANES; ++r) {
            seen[r] = out[r] = vec_zero();
            for (int32_t c = 0; c < d; c += VEC_LANES) {
                vec y = vec_load(&rows[r][c]);
                seen[r] = vec_fma(y, vec_load(x->ak + c), seen[r]);
                out[r] = vec_fma(y, vec_load(x->aq + c), out[r]);
            }
        }
        vec v = vec_load_elem(t, s->v + i * s->v_row + v0 * attn_dtype_bytes(t));
        vec u = vec_mul(vec_set1(x->b), vec_sub(v, vec_sums(seen)));
        vec o = vec_fma(u, vec_set1(x->kq), vec_sums(out));
        vec_store_elem(t, s->out + i * s->out_row + v0 * attn_dtype_bytes(t),
                       vec_mul(vec_set1(s->scale), o));

        float us[VEC_LANES] __attribute__((aligned(64)));
        vec_store(us, u);
        for (int r = 0; r < VEC_LANES; ++r) {
            vec ur = vec_set1(us[r]);
            for (int32_t c = 0; c < d; c += VEC_LANES) {
                vec y = vec_mul(vec_load(&rows[r][c]), vec_load(x->a + c));
                y = vec_fma(ur, vec_load(x->k + c), y);
                if (i < last)
                    vec_store(&rows[r][c], y);
                else
                    kda_step_put(memory, state + (r * d + c) * bytes, ahead, y);
            }
        }
    }
}

VEC_INLINE void kda_step(enum attn_dtype t, const struct attn_kda_step_task *s)
{
    struct kda_gates g;
    struct kda_step_token tokens[KDA_STEP_MAX];
    kda_gates(t, &s->tokens, &g);
    for (int32_t i = 0; i < s->tokens.rows; ++i) kda_step_token(t, &s->tokens, &g, i, &tokens[i]);
    for (int32_t v0 = 0; v0 < s->rows; v0 += VEC_LANES) {
        if (s->state_dtype == ATTN_F32)
            kda_step_rows(t, ATTN_F32, s, tokens, v0);
        else
            kda_step_rows(t, ATTN_BF16, s, tokens, v0);
    }
}

static void step_fp32(const struct attn_kda_step_task *s) { kda_step(ATTN_F32, s); }
static void step_bf16(const struct attn_kda_step_task *s) { kda_step(ATTN_BF16, s); }
static void step_fp16(const struct attn_kda_step_task *s) { kda_step(ATTN_F16, s); }

#endif
