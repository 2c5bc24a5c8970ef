/* SPDX-License-Identifier: MIT
 *
 * kda_fwd in fp32 vectors, for every input type: the body of the AVX2 and AVX-512 rungs.
 *
 * A chunk of C = 32 tokens of one head (names of kda_gate_vec.h; k and q normalised):
 *   kd_i = k_i D_i   qd_i = q_i D_i   kr_i = k_i D / D_i
 *   N_ij = k_i . (k_j D_i / D_j)  j < i     M_ij = q_i . (k_j D_i / D_j)  j <= i
 *   T = (I + diag(b) N)^-1 diag(b)
 * and with S0 the state before it, [K, V] as it is held here:
 *   X = V - kd S0    U = T X    O = qd S0 + M U    S1 = diag(D) S0 + kr^T U
 * prepare computes all that has no S in it, scan the second line for a slice of V.  O is scaled
 * last.
 *
 * D_i / D_j is split at the middle token m into (D_i / D_m) (D_m / D_j), so that N and M are matrix
 * products.  Away from m one factor is a product of decays, the other its reciprocal; what lies
 * above the diagonal may be huge and is not looked at.  Where even that could overflow kda_apart
 * takes pairs one by one.
 *
 * Every product is C[rows][slice] += A[rows][n] B[n][slice] with scalars of A broadcast:
 * KDA_ROWS rows x 2 vectors of sums stay in registers.
 */
#ifndef ATTN_CPU_X86_KDA_FWD_VEC_H
#define ATTN_CPU_X86_KDA_FWD_VEC_H

#include "cpu/x86/kda_chunk_vec.h"

enum { KDA_ROWS = VEC_LANES == 16 ? 8 : 4 };

/* A record, in floats: kd (negated) and qd [C][d], kr^T [d][C], T and M [C][C], D [d]. */
struct kda_record {
    float *kd, *qd, *kr, *t, *m, *decay;
};

static struct kda_record kda_record(const char *at, int32_t d)
{
    struct kda_record r = {.kd = (float *)(uintptr_t)at};
    r.qd = r.kd + KDA_CHUNK * d;
    r.kr = r.qd + KDA_CHUNK * d;
    r.t = r.kr + KDA_CHUNK * d;
    r.m = r.t + KDA_CHUNK * KDA_CHUNK;
    r.decay = r.m + KDA_CHUNK * KDA_CHUNK;
    return r;
}

static int64_t kda_record_bytes(int64_t d)
{
    return 4 * (3 * KDA_CHUNK * d + 2 * KDA_CHUNK * KDA_CHUNK + d);
}

struct kda_prepare_scratch {
    struct kda_gates g;
    /* Relative to the middle token, or k and q themselves when apart. */
    float k[KDA_CHUNK][KDA_WIDTH] __attribute__((aligned(64))); /* k_i D_i / D_m */
    float q[KDA_CHUNK][KDA_WIDTH] __attribute__((aligned(64)));
    float ki[KDA_WIDTH][KDA_CHUNK] __attribute__((aligned(64))); /* k_j D_m / D_j, transposed */
    float n[KDA_CHUNK][KDA_CHUNK] __attribute__((aligned(64)));
    float m[KDA_CHUNK][KDA_CHUNK] __attribute__((aligned(64)));
};

struct kda_scan_scratch {
    float x[KDA_CHUNK][KDA_SLICE] __attribute__((aligned(64)));
    float u[KDA_CHUNK][KDA_SLICE] __attribute__((aligned(64)));
};

static int64_t kda_scratch_bytes(int64_t d)
{
    (void)d;
    return sizeof(struct kda_prepare_scratch) > sizeof(struct kda_scan_scratch)
               ? sizeof(struct kda_prepare_scratch)
               : sizeof(struct kda_scan_scratch);
}

/* sum[r] += A[r][0 .. n) B[0 .. n)[2 vectors]; rows of A and B lie a_row and b_row floats apart. */
VEC_INLINE void kda_multiply(vec sum[KDA_ROWS][2], const float *a, int64_t a_row, const float *b,
                             int64_t b_row, int64_t n)
{
    for (int64_t i = 0; i < n; ++i) {
        vec b0 = vec_load(b + i * b_row), b1 = vec_load(b + i * b_row + VEC_LANES);
        VEC_UNROLL
        for (int r = 0; r < KDA_ROWS; ++r) {
            vec x = vec_set1(a[r * a_row + i]);
            sum[r][0] = vec_fma(x, b0, sum[r][0]);
            sum[r][1] = vec_fma(x, b1, sum[r][1]);
        }
    }
}

VEC_INLINE void kda_clear(vec sum[KDA_ROWS][2])
{
    VEC_UNROLL
    for (int r = 0; r < KDA_ROWS; ++r) sum[r][0] = sum[r][1] = vec_zero();
}

VEC_INLINE void kda_put(float *to, int64_t row, vec sum[KDA_ROWS][2])
{
    VEC_UNROLL
    for (int r = 0; r < KDA_ROWS; ++r) {
        vec_store(to + r * row, sum[r][0]);
        vec_store(to + r * row + VEC_LANES, sum[r][1]);
    }
}

static inline int32_t kda_round_up(int32_t rows)
{
    return (rows + KDA_ROWS - 1) / KDA_ROWS * KDA_ROWS;
}

/* ---- prepare --------------------------------------------------------------------------------- */

/* For chunks that no reference point serves: the two triangles pair by pair, by products of decays
 * <= 1 alone.  k and q are [C][KDA_WIDTH], normalised.
 *   n[i][j] = sum over channels of k_i k_j D_i / D_j  (j < i)
 *   m[i][j] = the same with q_i  (j <= i) */
static void kda_apart(const struct kda_gates *g, const float *k, const float *q, int32_t rows,
                      int32_t d, float *n, float *m)
{
    float e[KDA_WIDTH] __attribute__((aligned(64))); /* k_j times the decays of j + 1 .. i */
    for (int32_t j = 0; j < rows; ++j) {
        for (int32_t c = 0; c < d; c += VEC_LANES)
            vec_store(e + c, vec_load(k + j * KDA_WIDTH + c));
        for (int32_t i = j; i < rows; ++i) {
            vec ks = vec_zero(), qs = vec_zero();
            for (int32_t c = 0; c < d; c += VEC_LANES) {
                vec x = vec_load(e + c);
                if (i > j) x = vec_mul(x, vec_load(&g->decay[i][c]));
                vec_store(e + c, x);
                ks = vec_fma(x, vec_load(k + i * KDA_WIDTH + c), ks);
                qs = vec_fma(x, vec_load(q + i * KDA_WIDTH + c), qs);
            }
            n[i * KDA_CHUNK + j] = vec_reduce_add(ks);
            m[i * KDA_CHUNK + j] = vec_reduce_add(qs);
        }
    }
}

/* One vector of channels (places c ...) of k and q, normalised; zeros past the last token. */
struct kda_column {
    vec k[KDA_CHUNK], q[KDA_CHUNK];
};

/* Writes a column of [C][VEC_LANES] transposed: to[place][token]. */
VEC_INLINE void kda_put_transposed(float *to, const vec x[KDA_CHUNK])
{
    for (int i = 0; i < KDA_CHUNK; i += VEC_LANES) {
        vec r[VEC_LANES];
        for (int j = 0; j < VEC_LANES; ++j) r[j] = x[i + j];
        vec_transpose(r);
        for (int j = 0; j < VEC_LANES; ++j) vec_store(to + j * KDA_CHUNK + i, r[j]);
    }
}

/* kd, qd, kr and D of one column. */
VEC_INLINE void kda_state_factors(const struct kda_column *x, const struct kda_gates *g, int32_t c,
                                  int32_t rows, int32_t d, const struct kda_record *to)
{
    vec f = vec_set1(1.0f), kr[KDA_CHUNK];
    for (int32_t i = 0; i < rows; ++i) {
        f = vec_mul(f, vec_load(&g->decay[i][c]));
        vec_store(to->kd + i * d + c, vec_sub(vec_zero(), vec_mul(x->k[i], f)));
        vec_store(to->qd + i * d + c, vec_mul(x->q[i], f));
    }
    vec_store(to->decay + c, f);
    for (int32_t i = rows; i < kda_round_up(rows); ++i) {
        vec_store(to->kd + i * d + c, vec_zero());
        vec_store(to->qd + i * d + c, vec_zero());
    }
    for (int32_t i = rows; i < KDA_CHUNK; ++i) kr[i] = vec_zero();
    f = vec_set1(1.0f);
    for (int32_t i = rows - 1; i >= 0; --i) {
        kr[i] = vec_mul(x->k[i], f);
        f = vec_mul(f, vec_load(&g->decay[i][c]));
    }
    kda_put_transposed(to->kr + c * KDA_CHUNK, kr);
}

/* The factors of N and M of one column, relative to the middle token. */
VEC_INLINE void kda_pair_factors(const struct kda_column *x, const struct kda_gates *g, int32_t c,
                                 int32_t rows, struct kda_prepare_scratch *s)
{
    vec f = vec_set1(1 / KDA_LIFT), ki[KDA_CHUNK];
    for (int32_t i = KDA_MIDDLE; i >= 0; --i) { /* f = D_m / D_i / lift */
        vec back = vec_recip(f);
        vec_store(&s->k[i][c], vec_mul(x->k[i], back));
        vec_store(&s->q[i][c], vec_mul(x->q[i], back));
        ki[i] = vec_mul(x->k[i], f);
        if (i < rows) f = vec_mul(f, vec_load(&g->decay[i][c]));
    }
    f = vec_set1(KDA_LIFT);
    for (int32_t i = KDA_MIDDLE + 1; i < KDA_CHUNK; ++i) { /* f = D_i / D_m * lift */
        if (i < rows) f = vec_mul(f, vec_load(&g->decay[i][c]));
        vec_store(&s->k[i][c], vec_mul(x->k[i], f));
        vec_store(&s->q[i][c], vec_mul(x->q[i], f));
        ki[i] = vec_mul(x->k[i], vec_recip(f));
    }
    kda_put_transposed(&s->ki[c][0], ki);
}

VEC_INLINE void kda_columns(enum attn_dtype t, const struct attn_kda_tokens *x,
                            struct kda_prepare_scratch *s, const struct kda_record *to)
{
    struct kda_column column[2];
    int64_t bytes = attn_dtype_bytes(t);
    for (int32_t c = 0; c < x->d; c += 2 * VEC_LANES) {
        for (int32_t i = 0; i < KDA_CHUNK; ++i) {
            vec k[2] = {vec_zero(), vec_zero()}, q[2] = {vec_zero(), vec_zero()};
            if (i < x->ahead) {
                kda_fetch(x->k + x->k_ahead + i * x->k_row + c * bytes, 2 * VEC_LANES * bytes);
                kda_fetch(x->q + x->q_ahead + i * x->q_row + c * bytes, 2 * VEC_LANES * bytes);
            }
            if (i < x->rows) {
                vec_load_pair(t, x->k + i * x->k_row + c * bytes, &k[0], &k[1]);
                vec_load_pair(t, x->q + i * x->q_row + c * bytes, &q[0], &q[1]);
            }
            for (int j = 0; j < 2; ++j) {
                column[j].k[i] = vec_mul(k[j], vec_set1(s->g.k[i]));
                column[j].q[i] = vec_mul(q[j], vec_set1(s->g.q[i]));
            }
        }
        for (int j = 0; j < 2; ++j) {
            int32_t at = c + j * VEC_LANES;
            kda_state_factors(&column[j], &s->g, at, x->rows, x->d, to);
            if (!s->g.apart) {
                kda_pair_factors(&column[j], &s->g, at, x->rows, s);
                continue;
            }
            for (int32_t i = 0; i < KDA_CHUNK; ++i) {
                vec_store(&s->k[i][at], column[j].k[i]);
                vec_store(&s->q[i][at], column[j].q[i]);
            }
        }
    }
}

VEC_INLINE void kda_prepare(enum attn_dtype t, const struct attn_kda_tokens *x, char *record,
                            char *scratch)
{
    struct kda_prepare_scratch *s = (struct kda_prepare_scratch *)(void *)scratch;
    const struct kda_record to = kda_record(record, x->d);
    kda_gates(t, x, &s->g);
    kda_columns(t, x, s, &to);
    if (s->g.apart) {
        kda_apart(&s->g, &s->k[0][0], &s->q[0][0], x->rows, x->d, &s->n[0][0], &s->m[0][0]);
    } else {
        for (int32_t i = 0; i < x->rows; i += KDA_ROWS) {
            for (int32_t j = 0; j < i + KDA_ROWS; j += KDA_SLICE) {
                vec sum[KDA_ROWS][2];
                kda_clear(sum);
                kda_multiply(sum, &s->k[i][0], KDA_WIDTH, &s->ki[0][j], KDA_CHUNK, x->d);
                kda_put(&s->n[i][j], KDA_CHUNK, sum);
                kda_clear(sum);
                kda_multiply(sum, &s->q[i][0], KDA_WIDTH, &s->ki[0][j], KDA_CHUNK, x->d);
                kda_put(&s->m[i][j], KDA_CHUNK, sum);
            }
        }
    }
    kda_inverse(&s->n[0][0], s->g.b, x->rows, to.t);
    for (int32_t i = 0; i < KDA_CHUNK; ++i) {
        for (int32_t j = 0; j < KDA_CHUNK; j += VEC_LANES) { /* no more than the lower triangle */
            int32_t keep = i < x->rows ? i + 1 - j : 0;
            keep = keep < 0 ? 0 : keep > VEC_LANES ? VEC_LANES : keep;
            vec_store(to.m + i * KDA_CHUNK + j, vec_load_part_f32(&s->m[i][j], keep));
        }
    }
}

/* ---- scan ------------------------------------------------------------------------------------ */

VEC_INLINE void kda_scan_part(enum attn_dtype t, const struct attn_kda_scan *s,
                              const struct attn_kda_part *p, struct kda_scan_scratch *w)
{
    const struct kda_record r = kda_record(p->record, s->d);
    int64_t bytes = attn_dtype_bytes(t);
    vec scale = vec_set1(s->scale), sum[KDA_ROWS][2];
    for (int32_t i = 0; i < p->rows; i += KDA_ROWS) {
        for (int j = 0; j < KDA_ROWS; ++j) {
            const char *v = p->v + (i + j) * s->v_row + s->v0 * bytes;
            bool live = i + j < p->rows;
            sum[j][0] = live ? vec_load_elem(t, v) : vec_zero();
            sum[j][1] = live ? vec_load_elem(t, v + VEC_LANES * bytes) : vec_zero();
        }
        kda_multiply(sum, r.kd + i * s->d, s->d, s->state, KDA_SLICE, s->d);
        kda_put(w->x[i], KDA_SLICE, sum);
    }
    for (int32_t i = 0; i < p->rows; i += KDA_ROWS) {
        kda_clear(sum);
        kda_multiply(sum, r.t + i * KDA_CHUNK, KDA_CHUNK, w->x[0], KDA_SLICE, i + KDA_ROWS);
        kda_put(w->u[i], KDA_SLICE, sum);
        kda_clear(sum);
        kda_multiply(sum, r.qd + i * s->d, s->d, s->state, KDA_SLICE, s->d);
        kda_multiply(sum, r.m + i * KDA_CHUNK, KDA_CHUNK, w->u[0], KDA_SLICE, i + KDA_ROWS);
        for (int j = 0; j < KDA_ROWS && i + j < p->rows; ++j) {
            char *out = p->out + (i + j) * s->out_row + s->v0 * bytes;
            vec_store_elem(t, out, vec_mul(scale, sum[j][0]));
            vec_store_elem(t, out + VEC_LANES * bytes, vec_mul(scale, sum[j][1]));
        }
    }
    for (int32_t c = 0; c < s->d; c += KDA_ROWS) {
        float *state = s->state + c * KDA_SLICE;
        for (int j = 0; j < KDA_ROWS; ++j) {
            vec decay = vec_set1(r.decay[c + j]);
            sum[j][0] = vec_mul(decay, vec_load(state + j * KDA_SLICE));
            sum[j][1] = vec_mul(decay, vec_load(state + j * KDA_SLICE + VEC_LANES));
        }
        kda_multiply(sum, r.kr + c * KDA_CHUNK, KDA_CHUNK, w->u[0], KDA_SLICE, p->rows);
        kda_put(state, KDA_SLICE, sum);
    }
}

VEC_INLINE void kda_scan(enum attn_dtype t, const struct attn_kda_scan *s, char *scratch)
{
    kda_read_state(t, s);
    for (int32_t i = 0; i < s->count; ++i) {
        kda_scan_part(t, s, &s->parts[i], (struct kda_scan_scratch *)(void *)scratch);
        kda_write_state(t, s, s->checkpoint_dtype, s->parts[i].checkpoint);
    }
    kda_write_state(t, s, s->state_dtype, s->final);
}

#define KDA_FWD_VEC(name, t)                                                                       \
    static void prepare_##name(const struct attn_kda_tokens *x, char *record, char *scratch)       \
    {                                                                                              \
        kda_prepare(t, x, record, scratch);                                                        \
    }                                                                                              \
    static void scan_##name(const struct attn_kda_scan *s, char *scratch)                          \
    {                                                                                              \
        kda_scan(t, s, scratch);                                                                   \
    }

KDA_FWD_VEC(fp32, ATTN_F32)
KDA_FWD_VEC(bf16, ATTN_BF16)
KDA_FWD_VEC(fp16, ATTN_F16)

#define KDA_FWD_KERNEL(isa, name)                                                                  \
    {"attn_kda_fwd_" #name "_" #isa,                                                               \
     KDA_CHUNK,                                                                                    \
     KDA_SLICE,                                                                                    \
     kda_record_bytes,                                                                             \
     kda_scratch_bytes,                                                                            \
     prepare_##name,                                                                               \
     scan_##name,                                                                                  \
     NULL,                                                                                         \
     NULL}

#endif
