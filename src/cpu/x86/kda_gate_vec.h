/* SPDX-License-Identifier: MIT
 *
 * What the kernels of kda_fwd and kda_step share, written over vec_ for every rung: the gates and
 * norms of up to 32 tokens.
 *
 * Names of one chunk, rows i = 0 .. C - 1 tokens, all per key channel unless said otherwise:
 *   a_i = exp(gamma_i)     a token's decay, in (0, 1]
 *   D_i = a_0 a_1 ... a_i  and D = D_(C-1): what the state before the chunk has lost by token i
 *
 * Places.  bf16 is widened cheapest to a vector of even and a vector of odd channels, so channels
 * lie in that order inside each block of 2 VEC_LANES ("place" of a channel) everywhere between
 * the inputs and the state: products over channels do not mind.  fp32 and fp16 keep their order.
 */
#ifndef ATTN_CPU_X86_KDA_GATE_VEC_H
#define ATTN_CPU_X86_KDA_GATE_VEC_H

#include "cpu/kernels.h"

enum {
    KDA_CHUNK = 32,
    KDA_MIDDLE = KDA_CHUNK / 2 - 1, /* the token that exponents refer to */
    KDA_WIDTH = 128,
};

#define KDA_LOG2_E 1.44269504088896341f
#define KDA_EPSILON 1e-6f
/* A row's k_i and q_i meet D_i / D_m, with lower_bound -5 exp(5 * 15) = 2^108 down to exp(-5 * 16)
 * = 2^-115.5, a column's k_j its reciprocal: times this and divided by it both stay as far above
 * the least floats, so that small elements of k are not flushed. */
#define KDA_LIFT 0x1p4f
/* Lifted products of decays from the middle beyond this are left to kda_apart. */
#define KDA_RANGE 0x1p114f

struct kda_gates {
    float decay[KDA_CHUNK][KDA_WIDTH] __attribute__((aligned(64))); /* a, by place */
    float q[KDA_CHUNK] __attribute__((aligned(64))); /* 1 / |q|; 0 past the last token */
    float k[KDA_CHUNK] __attribute__((aligned(64))); /* 1 / |k|; likewise */
    float b[KDA_CHUNK] __attribute__((aligned(64)));
    bool apart; /* the chunk's decays span more than KDA_RANGE from its middle */
};

static inline int64_t kda_place(enum attn_dtype t, int64_t c)
{
    const int64_t block = 2 * VEC_LANES, in = c % block;
    return t == ATTN_BF16 ? c - in + in % 2 * VEC_LANES + in / 2 : c;
}

/* Brings the lines of a row into L2. */
VEC_INLINE void kda_fetch(const char *row, int64_t bytes)
{
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(row + i, _MM_HINT_T1);
}

/* 1 / (1 + 2^y): the logistic function of -y ln 2. */
VEC_INLINE vec kda_logistic(vec y)
{
    vec e = vec_exp2(vec_min(vec_set1(126.0f), y));
    return vec_recip(vec_add(e, vec_set1(1.0f)));
}

/* 1 / sqrt(sum of squares + epsilon) of every row. */
VEC_INLINE void kda_norms(enum attn_dtype t, const char *x, int64_t row, int32_t rows, int32_t d,
                          float *to)
{
    for (int32_t r0 = 0; r0 < KDA_CHUNK; r0 += VEC_LANES) {
        vec sums[VEC_LANES];
        for (int32_t i = 0; i < VEC_LANES; ++i) {
            vec even = vec_zero(), odd = vec_zero();
            const char *at = x + (r0 + i) * row;
            for (int32_t c = 0; r0 + i < rows && c < d; c += 2 * VEC_LANES) {
                vec a, b;
                vec_load_pair(t, at + c * attn_dtype_bytes(t), &a, &b);
                even = vec_fma(a, a, even);
                odd = vec_fma(b, b, odd);
            }
            sums[i] = vec_add(even, odd);
        }
        vec root = vec_sqrt(vec_add(vec_sums(sums), vec_set1(KDA_EPSILON)));
        vec_store(to + r0, vec_div(vec_set1(1.0f), root));
    }
    for (int32_t i = rows; i < KDA_CHUNK; ++i) to[i] = 0;
}

VEC_INLINE void kda_betas(enum attn_dtype t, const struct attn_kda_tokens *x, float *b)
{
    for (int32_t i = 0; i < KDA_CHUNK; ++i)
        b[i] = i < x->rows ? attn_load(t, x->beta + i * x->beta_row, 0) : 0;
    if (x->beta_activated) return;
    for (int32_t i = 0; i < KDA_CHUNK; i += VEC_LANES)
        vec_store(b + i, kda_logistic(vec_mul(vec_load(b + i), vec_set1(-KDA_LOG2_E))));
    for (int32_t i = x->rows; i < KDA_CHUNK; ++i) b[i] = 0;
}

/* True where lifted products of decays away from the middle token stay within KDA_RANGE; NaN counts
 * as within. */
VEC_INLINE bool kda_within(const struct kda_gates *g, int32_t rows, int32_t d)
{
    vec widest = vec_set1(1.0f), least = vec_set1(1.0f);
    for (int32_t c = 0; c < d; c += VEC_LANES) {
        vec p = vec_set1(1 / KDA_LIFT);
        for (int32_t i = KDA_MIDDLE; i > 0; --i) {
            if (i >= rows) continue;
            p = vec_mul(p, vec_load(&g->decay[i][c]));
            widest = vec_max(widest, p);
            least = vec_min(least, p);
        }
        p = vec_set1(KDA_LIFT);
        for (int32_t i = KDA_MIDDLE + 1; i < rows; ++i) {
            p = vec_mul(p, vec_load(&g->decay[i][c]));
            widest = vec_max(widest, p);
            least = vec_min(least, p);
        }
    }
    return !vec_any(vec_gt(widest, vec_set1(KDA_RANGE))) &&
           !vec_any(vec_gt(vec_set1(1 / KDA_RANGE), least));
}

VEC_INLINE void kda_gates(enum attn_dtype t, const struct attn_kda_tokens *x, struct kda_gates *g)
{
    int64_t bytes = attn_dtype_bytes(t);
    float bias[KDA_WIDTH] __attribute__((aligned(64)));
    kda_norms(t, x->q, x->q_row, x->rows, x->d, g->q);
    kda_norms(t, x->k, x->k_row, x->rows, x->d, g->k);
    kda_betas(t, x, g->b);

    for (int32_t c = 0; c < x->d; ++c) bias[kda_place(t, c)] = x->bias ? x->bias[c] : 0;
    vec slope = vec_set1(x->slope * -KDA_LOG2_E), bound = vec_set1(x->lower_bound * KDA_LOG2_E);
    for (int32_t i = 0; i < x->rows; ++i) {
        const char *row = x->g + i * x->g_row;
        if (i < x->ahead) kda_fetch(row + x->g_ahead, x->d * bytes);
        for (int32_t c = 0; c < x->d; c += 2 * VEC_LANES) {
            vec u[2];
            vec_load_pair(t, row + c * bytes, &u[0], &u[1]);
            VEC_UNROLL
            for (int j = 0; j < 2; ++j) {
                float *to = &g->decay[i][c + j * VEC_LANES];
                if (x->gate_activated) {
                    vec_store(to, vec_exp2_fine(vec_mul(u[j], vec_set1(KDA_LOG2_E))));
                } else {
                    vec y = vec_mul(slope, vec_add(u[j], vec_load(bias + c + j * VEC_LANES)));
                    vec_store(to, vec_exp2_fine(vec_mul(bound, kda_logistic(y))));
                }
            }
        }
    }
    g->apart = x->gate_activated && !kda_within(g, x->rows, x->d);
}

#endif
