/* SPDX-License-Identifier: MIT
 *
 * Per (sequence, head) and chunk, rows i, j of 16, G_i = gamma_1 + .. + gamma_i in log2:
 *   kd_i = k_i 2^G_i    qd_i = scale q_i 2^G_i    ki_i = k_i 2^-G_i    kr_i = ki_i 2^G_16     bf16
 *   L_ij = b_i <kd_i, ki_j>, i > j     A = (1 + L)^-1 = (1 - L)(1 + L^2)(1 + L^4)(1 + L^8)    fp16
 *   M_ij = <qd_i, ki_j>, i >= j                                                               bf16
 *   R = b (v - kd S^T)    U = A R    out = qd S^T + M U    S <- S 2^G_16 + U^T kr             bf16
 * Rows past the end have k = q = v = b = gamma = 0.
 */
#include "check_kda_recipe.h"

#include <math.h>
#include <string.h>

enum { C = 16, WIDTH = 128 };

struct chunk {
    float kd[C][WIDTH], qd[C][WIDTH], ki[C][WIDTH], kr[C][WIDTH], v[C][WIDTH];
    float decay[WIDTH], b[C]; /* of the whole chunk; write strengths */
    float a[C][C], m[C][C];
};

static float bf16(float x) { return attn_bf16_to_float(attn_float_to_bf16(x)); }
static float f16(float x) { return attn_f16_to_float(attn_float_to_f16(x)); }
static float sigmoid(float x) { return 0.5f * tanhf(0.5f * x) + 0.5f; }

/* Row t of head h, normalised. */
static void read_row(const struct attn_kda_problem *p, const struct attn_rows *x, int64_t at,
                     float *to)
{
    float sum = 0;
    for (int64_t c = 0; c < p->d; ++c) {
        to[c] = attn_load(ATTN_BF16, x->data, at + c);
        sum += to[c] * to[c];
    }
    for (int64_t c = 0; c < p->d; ++c) to[c] = bf16(to[c] / sqrtf(sum + (float)ATTN_KDA_EPSILON));
}

static int64_t row_at(const struct attn_rows *x, const struct attn_kda_seq *s, int64_t t, int64_t h)
{
    return s->row * x->batch + (s->start + t) * x->row + h * x->head;
}

/* Tokens t0 .. of the sequence: what needs no state but A and M. */
static void read_chunk(const struct attn_kda_problem *p, const struct attn_kda_seq *s, int64_t t0,
                       int64_t h, struct chunk *x)
{
    const float log2e = 0x1.715476p+0f, bound = (float)(p->lower_bound * 0x1.71547652b82fep+0);
    float sum[WIDTH] = {0}, slope = p->A_log ? exp2f(p->A_log[h] * log2e) : 1;
    *x = (struct chunk){0};
    for (int64_t i = 0; i < C && t0 + i < s->len; ++i) {
        float k[WIDTH], q[WIDTH];
        int64_t t = t0 + i, gate = row_at(&p->g, s, t, h), value = row_at(&p->v, s, t, h);
        read_row(p, &p->k, row_at(&p->k, s, t, h), k);
        read_row(p, &p->q, row_at(&p->q, s, t, h), q);
        float beta = attn_load(ATTN_BF16, p->beta,
                               s->row * p->beta_batch + (s->start + t) * p->beta_row +
                                   h * p->beta_head);
        x->b[i] = p->beta_activated ? beta : sigmoid(beta);
        for (int64_t c = 0; c < p->d; ++c) {
            float g = attn_load(ATTN_BF16, p->g.data, gate + c);
            float bias = p->dt_bias ? p->dt_bias[h * p->dt_bias_head + c] : 0;
            sum[c] += p->gate_activated ? g * log2e : bound * sigmoid(slope * (g + bias));
            x->kd[i][c] = bf16(k[c] * bf16(exp2f(sum[c])));
            x->ki[i][c] = bf16(k[c] * bf16(exp2f(-sum[c])));
            x->qd[i][c] = bf16(bf16(q[c] * bf16(exp2f(sum[c]))) * bf16((float)p->scale));
            x->v[i][c] = attn_load(ATTN_BF16, p->v.data, value + c);
        }
    }
    for (int64_t c = 0; c < p->d; ++c) {
        x->decay[c] = exp2f(sum[c]);
        for (int64_t i = 0; i < C; ++i) x->kr[i][c] = bf16(x->ki[i][c] * bf16(x->decay[c]));
    }
}

static float dot(const float *x, const float *y, int64_t n)
{
    float sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
    return sum;
}

/* product = x y, of 16 x 16 and fp16. */
static void multiply(float (*x)[C], float (*y)[C], float (*product)[C])
{
    for (int i = 0; i < C; ++i)
        for (int j = 0; j < C; ++j) {
            float sum = 0;
            for (int e = 0; e < C; ++e) sum += x[i][e] * y[e][j];
            product[i][j] = f16(sum);
        }
}

static void make_products(struct chunk *x, int64_t d)
{
    float inverse[C][C], power[C][C] = {{0}}, product[C][C];
    for (int i = 0; i < C; ++i)
        for (int j = 0; j < C; ++j) {
            if (i > j) power[i][j] = f16(f16(dot(x->kd[i], x->ki[j], d)) * f16(x->b[i]));
            if (i >= j) x->m[i][j] = bf16(dot(x->qd[i], x->ki[j], d));
            inverse[i][j] = (i == j ? 1 : 0) - power[i][j];
        }
    for (int n = 2; n < C; n *= 2) {
        multiply(power, power, product);
        memcpy(power, product, sizeof power);
        multiply(inverse, power, product);
        for (int i = 0; i < C; ++i)
            for (int j = 0; j < C; ++j) inverse[i][j] = f16(inverse[i][j] + product[i][j]);
    }
    for (int i = 0; i < C; ++i)
        for (int j = 0; j < C; ++j) x->a[i][j] = bf16(inverse[i][j]);
}

/* Value row v: its outputs, and its state row advanced by the chunk. */
static void advance(const struct chunk *x, int64_t v, int64_t d, float *state, float out[C])
{
    float r[C], u[C];
    for (int i = 0; i < C; ++i)
        r[i] = bf16(bf16(x->v[i][v] - bf16(dot(x->kd[i], state, d))) * bf16(x->b[i]));
    for (int i = 0; i < C; ++i) u[i] = bf16(dot(x->a[i], r, C));
    for (int i = 0; i < C; ++i) out[i] = bf16(dot(x->qd[i], state, d)) + bf16(dot(x->m[i], u, C));
    for (int64_t c = 0; c < d; ++c) {
        float sum = 0;
        for (int i = 0; i < C; ++i) sum += u[i] * x->kr[i][c];
        state[c] = bf16(fmaf(state[c], x->decay[c], sum));
    }
}

static void store(const struct attn_kda_problem *p, const struct attn_states *to, int64_t slot,
                  int64_t h, float (*state)[WIDTH])
{
    for (int64_t v = 0; v < p->d; ++v)
        for (int64_t c = 0; c < p->d; ++c)
            attn_store(to->dtype, attn_kda_state(to, slot, h, v, p->d), c, state[v][c]);
}

static void run_head(const struct attn_kda_problem *p, const struct attn_kda_seq *s,
                     int64_t checkpoint, int64_t h)
{
    float state[WIDTH][WIDTH] = {{0}}, out[C];
    struct chunk x;
    for (int64_t v = 0; p->initial.data && s->slot >= 0 && v < p->d; ++v)
        for (int64_t c = 0; c < p->d; ++c)
            state[v][c] = bf16(
                attn_load(p->initial.dtype, attn_kda_state(&p->initial, s->slot, h, v, p->d), c));
    for (int64_t t = 0; t < s->len; t += C) {
        read_chunk(p, s, t, h, &x);
        make_products(&x, p->d);
        for (int64_t v = 0; v < p->d; ++v) {
            advance(&x, v, p->d, state[v], out);
            for (int64_t i = 0; i < C && t + i < s->len; ++i)
                attn_store(ATTN_BF16, p->out.data, row_at(&p->out, s, t + i, h) + v, out[i]);
        }
        if (p->checkpoint_every && t + C <= s->len && (t + C) % p->checkpoint_every == 0)
            store(p, &p->checkpoint, checkpoint++, h, state);
    }
    if (p->final.data && s->slot >= 0) store(p, &p->final, s->slot, h, state);
}

void check_kda_recipe(const struct attn_kda_problem *p)
{
    int64_t checkpoint = 0; /* the sequence's first */
    for (int64_t i = 0; i < p->n; ++i) {
        struct attn_kda_seq s = attn_kda_seq(p, i);
        for (int64_t h = 0; h < p->h; ++h) run_head(p, &s, checkpoint, h);
        if (p->checkpoint_every) checkpoint += s.len / p->checkpoint_every;
    }
}
