/* SPDX-License-Identifier: MIT
 *
 * kda_fwd for bf16 inputs with bf16 operands and fp32 sums: the body of the AVX-512-BF16 and AMX
 * rungs, which differ in one function, the product of operands in tiles:
 *
 *   kda_product(c, add, a, a_next, b, b_next, steps):
 *     C[32][32] = (add ? C : 0) + A[32][32 steps] B[32 steps][32]
 *     A: tiles of 16 rows x 32 bf16; row tile m, step p at a + m a_next + p KB
 *     B: tiles of 16 pairs of rows x 16 columns x 2 bf16; step p, column tile n at b + p b_next
 *        + n KB
 *     C: fp32, row after row of 32
 *
 * The math is kda_fwd_vec.h's.  What is rounded to bf16: kd, qd, kr, the factors of N and M, M, X,
 * U, and S as an operand; S itself stays fp32.  Two remedies keep errors from piling up:
 *   - T is a sum of two bf16, T' + T'': terms of T X cancel, and T's rounding would be most of
 *     U's error;
 *   - 1 / |k| is r 2^e, 1 <= r < 2: kr holds 2^e, U holds r (by T's rows), M's columns 1 / r.  So
 *     kr has k's own bits where nothing decays, which is where S keeps its rounding errors.
 *
 *   operand          rows x columns          made by
 *   kd qd    A       token x place of K      packing 32 places of a token
 *   kr       A       place of K x token      16 x 16 transposes of token pairs
 *   T' T'' M A       token x token           packing rows
 *   k D_m/D  B       place of K x token      16 x 16 transposes of pairs of places
 *   S        B       place of K x value      packing the rows of two places
 *   X U      B       token x value           packing the rows of two tokens
 *
 * scan, one chunk of one slice:
 *   products |          kd S   qd S           T X            M U   S += kr U
 *   vectors  | S = D S                X = V -       pack U                     out
 */
#ifndef ATTN_CPU_X86_KDA_FWD_TILE_H
#define ATTN_CPU_X86_KDA_FWD_TILE_H

#include <string.h>

#include "cpu/x86/kda_chunk_vec.h"
#include "cpu/x86/kernels_x86.h"

enum { KDA_TILE = 1024, KDA_LINE = 64, KDA_STEP_CHANNELS = 32 };

/* Chunks of bf16 operands have whole tiles of rows; those that want more go through the kernel for
 * fp32 operands, which keeps the state as it is kept here:
 *   - an odd number of tokens, the end of a sequence: where its q are nearly at right angles to k
 *     and to the state, the operands' rounding is most of its output, and there is no other to
 *     outweigh it;
 *   - decays that no reference point serves (`apart`);
 *   - in a slice whose state is this many times its values (RMS): an initial state that is being
 *     forgotten.  What is left of it in the end is a difference of such states. */
enum { KDA_ROW_TILE = 16, KDA_OUTGROWN = 16 };

static const struct attn_kda_fwd_kernel *const kda_fine = &attn_kda_fwd_avx512[ATTN_BF16];

typedef float kda_block[32][32] __attribute__((aligned(64)));

/* A record: a line that says whether kda_fine's record follows, or
 * tiles of kd (negated) and qd [2][d / 32], kr [d / 16], T [2][T', T''], M [2]; D [d] floats. */
struct kda_record {
    int32_t *fine;
    char *kd, *qd, *kr, *t, *m;
    float *decay;
};

static struct kda_record kda_record(const char *at, int32_t d)
{
    struct kda_record r = {.fine = (int32_t *)(uintptr_t)at,
                           .kd = (char *)(uintptr_t)at + KDA_LINE};
    r.qd = r.kd + d / 16 * KDA_TILE;
    r.kr = r.qd + d / 16 * KDA_TILE;
    r.t = r.kr + d / 16 * KDA_TILE;
    r.m = r.t + 4 * KDA_TILE;
    r.decay = (float *)(void *)(r.m + 2 * KDA_TILE);
    return r;
}

static int64_t kda_record_bytes(int64_t d)
{
    int64_t tiles = (3 * d / 16 + 6) * KDA_TILE + 4 * d, fine = kda_fine->record_bytes(d);
    return KDA_LINE + (tiles > fine ? tiles : fine);
}

struct kda_prepare_scratch {
    struct kda_gates g;
    char k[8 * KDA_TILE] __attribute__((aligned(64)));  /* A: k_i D_i / D_m */
    char q[8 * KDA_TILE] __attribute__((aligned(64)));  /* A: q_i D_i / D_m */
    char ki[8 * KDA_TILE] __attribute__((aligned(64))); /* B: k_j D_m / D_j */
    kda_block n, m, t;
    float r[KDA_CHUNK] __attribute__((aligned(64))); /* of 1 / |k| = r 2^e; 1 past the last token */
    float r_inverse[KDA_CHUNK] __attribute__((aligned(64)));
};

struct kda_scan_scratch {
    char s[8 * KDA_TILE] __attribute__((aligned(64))); /* B: the slice of the state */
    char x[2 * KDA_TILE] __attribute__((aligned(64))); /* B */
    char u[2 * KDA_TILE] __attribute__((aligned(64))); /* B */
    kda_block c, out;
};

/* Scratch: one of the two above, then kda_fine's, then a record of its. */
enum {
    KDA_OWN_SCRATCH = sizeof(struct kda_prepare_scratch) > sizeof(struct kda_scan_scratch)
        ? sizeof(struct kda_prepare_scratch)
        : sizeof(struct kda_scan_scratch)
};

static int64_t kda_scratch_bytes(int64_t d)
{
    return KDA_OWN_SCRATCH + kda_fine->scratch_bytes(d) + kda_fine->record_bytes(d);
}

/* Lane i: low[i] and high[i] as bf16, ties away from zero.  NaN stays NaN but for one whose payload
 * is all ones; kda_tidy removes those. */
VEC_INLINE __m512i kda_pack(vec low, vec high)
{
    const __m512i half = _mm512_set1_epi32(0x8000);
    __m512i l = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(low), half), 16);
    __m512i h = _mm512_add_epi32(_mm512_castps_si512(high), half);
    return _mm512_mask_blend_epi16(0xaaaaaaaau, l, h);
}

/* A line of channels: low's 16 places, then high's, as bf16. */
VEC_INLINE __m512i kda_join(vec low, vec high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

/* ---- prepare --------------------------------------------------------------------------------- */

/* 32 channels of a chunk, even and odd: k and q normalised, zeros past the last token. */
struct kda_columns {
    vec k[KDA_CHUNK][2], q[KDA_CHUNK][2];
};

static void kda_load_columns(const struct attn_kda_tokens *x, const struct kda_gates *g, int32_t c,
                             struct kda_columns *to)
{
    for (int32_t i = 0; i < x->rows; ++i) {
        vec k = vec_set1(g->k[i]), q = vec_set1(g->q[i]);
        vec_load_pair(ATTN_BF16, x->k + i * x->k_row + 2 * c, &to->k[i][0], &to->k[i][1]);
        vec_load_pair(ATTN_BF16, x->q + i * x->q_row + 2 * c, &to->q[i][0], &to->q[i][1]);
        VEC_UNROLL
        for (int j = 0; j < 2; ++j) {
            to->k[i][j] = vec_mul(to->k[i][j], k);
            to->q[i][j] = vec_mul(to->q[i][j], q);
        }
    }
    for (int32_t i = x->rows; i < KDA_CHUNK; ++i)
        for (int j = 0; j < 2; ++j) to->k[i][j] = to->q[i][j] = vec_zero();
}

/* Line of token i and step c / 32 in a [2][d / 32] array of A tiles. */
VEC_INLINE char *kda_line(char *tiles, int32_t d, int32_t i, int32_t c)
{
    return tiles + (i / 16 * (d / 32) + c / 32) * KDA_TILE + i % 16 * KDA_LINE;
}

/* Writes 16 lines of 16 dwords transposed. */
VEC_INLINE void kda_put_transposed(char *tile, const __m512i x[16])
{
    vec r[16];
    VEC_UNROLL
    for (int i = 0; i < 16; ++i) r[i] = _mm512_castsi512_ps(x[i]);
    vec_transpose(r);
    VEC_UNROLL
    for (int i = 0; i < 16; ++i) _mm512_store_ps(tile + i * KDA_LINE, r[i]);
}

static void kda_mantissas(int32_t rows, struct kda_prepare_scratch *s)
{
    for (int32_t i = 0; i < KDA_CHUNK; i += 16) {
        __mmask16 tokens = (__mmask16)(((1ull << rows) - 1) >> i);
        vec norm = _mm512_mask_loadu_ps(vec_set1(1.0f), tokens, s->g.k + i);
        vec r = _mm512_getmant_ps(norm, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
        vec_store(s->r + i, r);
        vec_store(s->r_inverse + i, vec_div(vec_set1(1.0f), r));
    }
}

/* kd, qd, kr and D of 32 channels. */
static void kda_state_factors(const struct attn_kda_tokens *tokens, const struct kda_columns *x,
                              const struct kda_prepare_scratch *s, int32_t c,
                              const struct kda_record *to)
{
    const struct kda_gates *g = &s->g;
    int32_t d = tokens->d;
    vec f0 = vec_set1(1.0f), f1 = f0;
    for (int32_t i = 0; i < KDA_CHUNK; ++i) {
        if (i < tokens->ahead)
            kda_fetch(tokens->k + tokens->k_ahead + i * tokens->k_row + 2 * c, KDA_LINE);
        f0 = vec_mul(f0, vec_load(&g->decay[i][c]));
        f1 = vec_mul(f1, vec_load(&g->decay[i][c + 16]));
        __m512i kd = kda_join(vec_mul(x->k[i][0], f0), vec_mul(x->k[i][1], f1));
        __m512i qd = kda_join(vec_mul(x->q[i][0], f0), vec_mul(x->q[i][1], f1));
        kd = _mm512_xor_si512(kd, _mm512_set1_epi32((int)0x80008000u));
        _mm512_store_si512(kda_line(to->kd, d, i, c), kd);
        _mm512_store_si512(kda_line(to->qd, d, i, c), qd);
    }
    vec_store(to->decay + c, f0);
    vec_store(to->decay + c + 16, f1);

    __m512i even[16], odd[16];
    f0 = f1 = vec_set1(1.0f);
    for (int32_t i = KDA_CHUNK - 2; i >= 0; i -= 2) {
        vec r = vec_set1(s->r_inverse[i]), late = vec_set1(s->r_inverse[i + 1]);
        vec late0 = vec_mul(x->k[i + 1][0], vec_mul(late, f0));
        vec late1 = vec_mul(x->k[i + 1][1], vec_mul(late, f1));
        f0 = vec_mul(f0, vec_load(&g->decay[i + 1][c]));
        f1 = vec_mul(f1, vec_load(&g->decay[i + 1][c + 16]));
        even[i / 2] = kda_pack(vec_mul(x->k[i][0], vec_mul(r, f0)), late0);
        odd[i / 2] = kda_pack(vec_mul(x->k[i][1], vec_mul(r, f1)), late1);
        f0 = vec_mul(f0, vec_load(&g->decay[i][c]));
        f1 = vec_mul(f1, vec_load(&g->decay[i][c + 16]));
    }
    kda_put_transposed(to->kr + c / 16 * KDA_TILE, even);
    kda_put_transposed(to->kr + (c / 16 + 1) * KDA_TILE, odd);
}

/* 1 / x to 2^-14: for what is rounded to bf16. */
VEC_INLINE vec kda_recip(vec x) { return _mm512_rcp14_ps(x); }

/* Token i's lines of the factors of N and M: k and q times `f`, k times `back`. */
VEC_INLINE __m512i kda_pair_lines(const struct kda_columns *x, int32_t i, int32_t c, int32_t d,
                                  const vec f[2], const vec back[2], struct kda_prepare_scratch *s)
{
    __m512i k = kda_join(vec_mul(x->k[i][0], f[0]), vec_mul(x->k[i][1], f[1]));
    __m512i q = kda_join(vec_mul(x->q[i][0], f[0]), vec_mul(x->q[i][1], f[1]));
    _mm512_store_si512(kda_line(s->k, d, i, c), k);
    _mm512_store_si512(kda_line(s->q, d, i, c), q);
    return kda_join(vec_mul(x->k[i][0], back[0]), vec_mul(x->k[i][1], back[1]));
}

static void kda_pair_factors(const struct attn_kda_tokens *tokens, const struct kda_columns *x,
                             int32_t c, struct kda_prepare_scratch *s)
{
    int32_t d = tokens->d;
    __m512i ki[16];
    vec p[2], inverse[2]; /* p: D_m / D_i / lift, then D_i / D_m * lift */
    p[0] = p[1] = vec_set1(1 / KDA_LIFT);
    for (int32_t i = KDA_MIDDLE; i >= 0; --i) {
        VEC_UNROLL
        for (int j = 0; j < 2; ++j) inverse[j] = kda_recip(p[j]);
        ki[i] = kda_pair_lines(x, i, c, d, inverse, p, s);
        if (i < tokens->ahead)
            kda_fetch(tokens->q + tokens->q_ahead + i * tokens->q_row + 2 * c, KDA_LINE);
        VEC_UNROLL
        for (int j = 0; j < 2; ++j) p[j] = vec_mul(p[j], vec_load(&s->g.decay[i][c + 16 * j]));
    }
    kda_put_transposed(s->ki + c / 16 * KDA_TILE, ki);
    p[0] = p[1] = vec_set1(KDA_LIFT);
    for (int32_t i = KDA_MIDDLE + 1; i < KDA_CHUNK; ++i) {
        VEC_UNROLL
        for (int j = 0; j < 2; ++j) {
            p[j] = vec_mul(p[j], vec_load(&s->g.decay[i][c + 16 * j]));
            inverse[j] = kda_recip(p[j]);
        }
        ki[i - 16] = kda_pair_lines(x, i, c, d, p, inverse, s);
        if (i < tokens->ahead)
            kda_fetch(tokens->q + tokens->q_ahead + i * tokens->q_row + 2 * c, KDA_LINE);
    }
    kda_put_transposed(s->ki + (c / 16 + 1) * KDA_TILE, ki);
}

/* Row i of a triangle up to the diagonal; what lies above it becomes 0. */
VEC_INLINE void kda_load_row(const float (*x)[32], int i, vec row[2])
{
    uint32_t lower = ~0u >> (31 - i);
    row[0] = _mm512_maskz_load_ps((__mmask16)lower, x[i]);
    row[1] = _mm512_maskz_load_ps((__mmask16)(lower >> 16), x[i] + 16);
}

/* M with its columns over r. */
static void kda_put_m(const struct kda_prepare_scratch *s, char *tiles)
{
    vec r[2] = {vec_load(s->r_inverse), vec_load(s->r_inverse + 16)};
    for (int i = 0; i < KDA_CHUNK; ++i) {
        vec row[2];
        kda_load_row(s->m, i, row);
        _mm512_store_si512(tiles + i * KDA_LINE,
                           kda_join(vec_mul(row[0], r[0]), vec_mul(row[1], r[1])));
    }
}

/* T with its rows times r: T' holds the upper halves of the bits, T'' the rest. */
static void kda_put_t(const struct kda_prepare_scratch *s, char *tiles)
{
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000u);
    for (int i = 0; i < KDA_CHUNK; ++i) {
        vec row[2], high[2];
        kda_load_row(s->t, i, row);
        VEC_UNROLL
        for (int j = 0; j < 2; ++j) {
            row[j] = vec_mul(row[j], vec_set1(s->r[i]));
            high[j] = (vec)_mm512_and_si512((__m512i)row[j], upper);
            row[j] = vec_sub(row[j], high[j]);
        }
        char *line = tiles + i / 16 * 2 * KDA_TILE + i % 16 * KDA_LINE;
        _mm512_store_si512(line, kda_join(high[0], high[1]));
        _mm512_store_si512(line + KDA_TILE, kda_join(row[0], row[1]));
    }
}

static void kda_prepare(const struct attn_kda_tokens *x, char *record, char *scratch)
{
    struct kda_prepare_scratch *s = (struct kda_prepare_scratch *)(void *)scratch;
    const struct kda_record to = kda_record(record, x->d);
    struct kda_columns columns;
    *to.fine = x->rows % KDA_ROW_TILE;
    if (!*to.fine) {
        kda_gates(ATTN_BF16, x, &s->g);
        *to.fine = s->g.apart;
    }
    if (*to.fine) {
        kda_fine->prepare(x, to.kd, scratch + KDA_OWN_SCRATCH);
        return;
    }
    kda_mantissas(x->rows, s);
    for (int32_t i = x->rows; i < KDA_CHUNK; ++i)
        for (int32_t c = 0; c < x->d; c += 16) vec_store(&s->g.decay[i][c], vec_set1(1.0f));
    for (int32_t c = 0; c < x->d; c += KDA_STEP_CHANNELS) {
        kda_load_columns(x, &s->g, c, &columns);
        kda_state_factors(x, &columns, s, c, &to);
        kda_pair_factors(x, &columns, c, s);
    }
    kda_product(s->n, false, s->k, x->d / 32 * KDA_TILE, s->ki, 2 * KDA_TILE, x->d / 32);
    kda_product(s->m, false, s->q, x->d / 32 * KDA_TILE, s->ki, 2 * KDA_TILE, x->d / 32);
    kda_inverse(s->n[0], s->g.b, x->rows, s->t[0]);
    kda_put_t(s, to.t);
    kda_put_m(s, to.m);
}

/* ---- scan ------------------------------------------------------------------------------------ */

/* 32 channels of the state, places c ...: its operand for the chunk, then S = D S. */
VEC_INLINE void kda_pack_state(float *state, const float *decay, int32_t c, char *to)
{
    for (int i = 0; i < 16; ++i) {
        vec even = vec_set1(decay[c + 2 * i]), odd = vec_set1(decay[c + 2 * i + 1]);
        VEC_UNROLL
        for (int n = 0; n < 2; ++n) {
            float *e = state + (c + 2 * i) * KDA_SLICE + 16 * n, *o = e + KDA_SLICE;
            vec a = vec_load(e), b = vec_load(o);
            _mm512_store_si512(to + n * KDA_TILE + i * KDA_LINE, kda_pack(a, b));
            vec_store(e, vec_mul(a, even));
            vec_store(o, vec_mul(b, odd));
        }
    }
}

/* X = V + (-kd S), packed. */
VEC_INLINE void kda_pack_x(const struct attn_kda_scan *s, const struct attn_kda_part *p,
                           float (*c)[32], char *to)
{
    const char *v = p->v + 2 * s->v0;
    for (int i = 0; i < KDA_CHUNK; i += 2) {
        vec x[2][2];
        VEC_UNROLL
        for (int j = 0; j < 2; ++j) {
            VEC_UNROLL
            for (int n = 0; n < 2; ++n) {
                vec y = i + j < p->rows ? vec_load_bf16(v + (i + j) * s->v_row + 32 * n)
                                        : vec_zero();
                x[j][n] = vec_add(y, vec_load(c[i + j] + 16 * n));
            }
        }
        for (int n = 0; n < 2; ++n)
            _mm512_store_si512(to + n * KDA_TILE + i / 2 * KDA_LINE, kda_pack(x[0][n], x[1][n]));
    }
}

VEC_INLINE void kda_pack_u(float (*u)[32], char *to)
{
    for (int i = 0; i < KDA_CHUNK; i += 2)
        for (int n = 0; n < 2; ++n)
            _mm512_store_si512(to + n * KDA_TILE + i / 2 * KDA_LINE,
                               kda_pack(vec_load(u[i] + 16 * n), vec_load(u[i + 1] + 16 * n)));
}

/* A slice of a row is a line of memory: written past the caches where it is aligned as one. */
VEC_INLINE void kda_put_out(const struct attn_kda_scan *s, const struct attn_kda_part *p,
                            float (*out)[32])
{
    char *to = p->out + 2 * s->v0;
    vec scale = vec_set1(s->scale);
    bool line = (((uintptr_t)to | (uintptr_t)s->out_row) & 63) == 0;
    for (int i = 0; i < p->rows; ++i, to += s->out_row) {
        vec low = vec_mul(scale, vec_load(out[i])), high = vec_mul(scale, vec_load(out[i] + 16));
        __m512i y = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        if (line)
            _mm512_stream_si512((void *)to, y);
        else
            _mm512_storeu_si512(to, y);
    }
}

/* Whether the slice has outgrown part p's values, by half of each. */
static bool kda_outgrown(const struct attn_kda_scan *s, const struct attn_kda_part *p)
{
    vec state[4] = {vec_zero(), vec_zero(), vec_zero(), vec_zero()}, values = vec_zero();
    for (int32_t c = 0; c < s->d; c += 4) VEC_UNROLL
    for (int j = 0; j < 4; ++j) {
        vec x = vec_load(s->state + (c + j) * KDA_SLICE + j % 2 * 16);
        state[j] = vec_fma(x, x, state[j]);
    }
    for (int i = 0; i < p->rows; ++i) {
        vec x = vec_load_bf16(p->v + i * s->v_row + 2 * s->v0 + i % 2 * 32);
        values = vec_fma(x, x, values);
    }
    float sum = vec_reduce_add(vec_add(vec_add(state[0], state[1]), vec_add(state[2], state[3])));
    float least = (float)s->d / (float)p->rows * KDA_OUTGROWN * KDA_OUTGROWN;
    return sum > least * vec_reduce_add(values);
}

/* Part i by kda_fine, from its `record` or, NULL, from the tokens. */
static void kda_scan_fine(const struct attn_kda_scan *s, int32_t i, const char *record,
                          char *scratch)
{
    struct attn_kda_part part = s->parts[i];
    struct attn_kda_scan one = *s;
    char *made = scratch + kda_fine->scratch_bytes(s->d);
    if (!record) {
        struct attn_kda_tokens x = s->tokens;
        x.rows = part.rows;
        x.q += part.at * x.q_row;
        x.k += part.at * x.k_row;
        x.g += part.at * x.g_row;
        x.beta += part.at * x.beta_row;
        kda_fine->prepare(&x, made, scratch);
    }
    part.record = record ? record : made;
    part.checkpoint = one.final = NULL;
    one.first = false;
    one.count = 1;
    one.parts = &part;
    kda_fine->scan(&one, scratch);
}

/* Part i; v of the next part, or of the first one's next slice, is fetched on the way. */
static void kda_scan_part(const struct attn_kda_scan *s, int32_t i, struct kda_scan_scratch *w)
{
    const struct attn_kda_part *p = &s->parts[i], *next = &s->parts[(i + 1) % s->count];
    int32_t next_v0 = i + 1 < s->count ? s->v0 : (s->v0 + KDA_SLICE) % s->d;
    const struct kda_record r = kda_record(p->record, s->d);
    if (*r.fine || kda_outgrown(s, p)) {
        kda_scan_fine(s, i, *r.fine ? r.kd : NULL, (char *)w + KDA_OWN_SCRATCH);
        return;
    }
    int64_t rows = s->d / 32 * KDA_TILE, steps = s->d / 32;
    for (int32_t c = 0; c < s->d; c += 32)
        kda_pack_state(s->state, r.decay, c, w->s + c / 16 * KDA_TILE);
    kda_product(w->c, false, r.kd, rows, w->s, 2 * KDA_TILE, steps);
    kda_product(w->out, false, r.qd, rows, w->s, 2 * KDA_TILE, steps);
    kda_pack_x(s, p, w->c, w->x);
    kda_product(w->c, false, r.t, 2 * KDA_TILE, w->x, 0, 2); /* (T' + T'') X */
    kda_pack_u(w->c, w->u);
    kda_product(w->out, true, r.m, KDA_TILE, w->u, 0, 1);
    for (int64_t j = 0; j < next->rows; ++j)
        _mm_prefetch(next->v + j * s->v_row + 2 * next_v0, _MM_HINT_T0);
    kda_product_rows((float (*)[32])s->state, r.kr, w->u, 2 * steps);
    kda_put_out(s, p, w->out);
}

/* NaNs as arithmetic makes them: kda_pack would round one with all bits set to zero. */
static void kda_tidy(const struct attn_kda_scan *s)
{
    for (int64_t i = 0; i < s->d * KDA_SLICE; i += 16) {
        vec x = vec_load(s->state + i);
        __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        if (nan) vec_store(s->state + i, _mm512_mask_mov_ps(x, nan, vec_set1(NAN)));
    }
}

static void kda_scan(const struct attn_kda_scan *s, char *scratch)
{
    struct kda_scan_scratch *w = (struct kda_scan_scratch *)(void *)scratch;
    kda_read_state(ATTN_BF16, s);
    if (s->first && s->initial) kda_tidy(s);
    for (int32_t i = 0; i < s->count; ++i) {
        kda_scan_part(s, i, w);
        kda_write_state(ATTN_BF16, s, s->checkpoint_dtype, s->parts[i].checkpoint);
    }
    kda_write_state(ATTN_BF16, s, s->state_dtype, s->final);
}

#endif
