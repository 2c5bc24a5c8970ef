/* SPDX-License-Identifier: MIT
 *
 * kda_fwd, token by token in fp64, written from the definition in attn.h and sharing no formula
 * with the chunked kernels: the oracle of the tests and the fallback below AVX2.
 *
 * Rows of the state (value indices) never mix, so ROWS of them at a time go through the whole
 * sequence on the stack; what all rows share is computed again for each group of rows.
 */
#include <math.h>

#include "cpu/kda.h"
#include "cpu/threads.h"

enum { ROWS = 16, WIDTH = 128 };

/* One token of one head, ready for the recurrence. */
struct token {
    double q[WIDTH], k[WIDTH]; /* normalised; q times scale */
    double decay[WIDTH];
    double b;
};

static int64_t offset(const struct attn_rows *r, const struct attn_kda_seq *s, int64_t t, int64_t h)
{
    return s->row * r->batch + (s->start + t) * r->row + h * r->head;
}

static double sigmoid(double x) { return 1 / (1 + exp(-x)); }

static void normalise(const struct attn_kda_problem *p, const struct attn_rows *rows, int64_t at,
                      double factor, double *to)
{
    double sum = 0;
    for (int64_t c = 0; c < p->d; ++c) {
        to[c] = (double)attn_load(p->dtype, rows->data, at + c);
        sum += to[c] * to[c];
    }
    for (int64_t c = 0; c < p->d; ++c) to[c] *= factor / sqrt(sum + ATTN_KDA_EPSILON);
}

static void read_token(const struct attn_kda_problem *p, const struct attn_kda_seq *s, int64_t t,
                       int64_t h, struct token *x)
{
    normalise(p, &p->q, offset(&p->q, s, t, h), p->scale, x->q);
    normalise(p, &p->k, offset(&p->k, s, t, h), 1, x->k);
    int64_t at = offset(&p->g, s, t, h);
    double slope = p->A_log ? exp((double)p->A_log[h]) : 1;
    for (int64_t c = 0; c < p->d; ++c) {
        double g = (double)attn_load(p->dtype, p->g.data, at + c);
        double bias = p->dt_bias ? (double)p->dt_bias[h * p->dt_bias_head + c] : 0;
        x->decay[c] = exp(p->gate_activated ? g : p->lower_bound * sigmoid(slope * (g + bias)));
    }
    double beta = (double)attn_load(p->dtype, p->beta,
                                    s->row * p->beta_batch + (s->start + t) * p->beta_row +
                                        h * p->beta_head);
    x->b = p->beta_activated ? beta : sigmoid(beta);
}

/* The output of one state row for value v; the row is advanced by the token. */
static double advance(const struct token *x, double *state, double v, int64_t d)
{
    double seen = 0, out = 0;
    for (int64_t c = 0; c < d; ++c) {
        state[c] *= x->decay[c];
        seen += state[c] * x->k[c];
    }
    for (int64_t c = 0; c < d; ++c) {
        state[c] += x->b * (v - seen) * x->k[c];
        out += state[c] * x->q[c];
    }
    return out;
}

static void store_rows(const struct attn_states *to, int64_t slot, int64_t h, int64_t v0,
                       double (*state)[WIDTH], int64_t d)
{
    for (int64_t r = 0; r < ROWS; ++r)
        for (int64_t c = 0; c < d; ++c)
            attn_store(to->dtype, attn_kda_state(to, slot, h, v0 + r, d), c, (float)state[r][c]);
}

/* Rows v0 <= v < v0 + ROWS of a sequence's head; its checkpoints begin at `checkpoint`. */
static void run_rows(const struct attn_kda_problem *p, const struct attn_kda_seq *s,
                     int64_t checkpoint, int64_t h, int64_t v0)
{
    double state[ROWS][WIDTH];
    struct token x;
    for (int64_t r = 0; r < ROWS; ++r)
        for (int64_t c = 0; c < p->d; ++c)
            state[r][c] = p->initial.data && s->slot >= 0
                              ? (double)attn_load(p->initial.dtype,
                                                  attn_kda_state(&p->initial, s->slot, h, v0 + r,
                                                                 p->d),
                                                  c)
                              : 0;
    for (int64_t t = 0; t < s->len; ++t) {
        char *out = p->out.data + attn_dtype_bytes(p->dtype) * (offset(&p->out, s, t, h) + v0);
        if (p->step && s->slot < 0) {
            for (int64_t r = 0; r < ROWS; ++r) attn_store(p->dtype, out, r, 0);
            continue;
        }
        read_token(p, s, t, h, &x);
        for (int64_t r = 0; r < ROWS; ++r) {
            float v = attn_load(p->dtype, p->v.data, offset(&p->v, s, t, h) + v0 + r);
            attn_store(p->dtype, out, r, (float)advance(&x, state[r], (double)v, p->d));
        }
        if (p->checkpoint_every && (t + 1) % p->checkpoint_every == 0)
            store_rows(&p->checkpoint, checkpoint++, h, v0, state, p->d);
    }
    if (p->final.data && s->slot >= 0) store_rows(&p->final, s->slot, h, v0, state, p->d);
}

void attn_kda_ref_run(const struct attn_kda_problem *p, int threads)
{
    int64_t checkpoint = 0; /* the sequence's first */
    for (int64_t i = 0; i < p->n; ++i) {
        struct attn_kda_seq s = attn_kda_seq(p, i);
        int64_t blocks = p->d / ROWS;
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t task = 0; task < p->h * blocks; ++task)
            run_rows(p, &s, checkpoint, task / blocks, task % blocks * ROWS);
        if (p->checkpoint_every) checkpoint += s.len / p->checkpoint_every;
    }
}

attn_status attn_kda_fwd_ref(const struct attn_kda_fwd_args *args)
{
    struct attn_kda_problem p;
    ATTN_TRY(attn_kda_fwd_check(args, &p, true));
    ATTN_CHECK(p.device.device_type == kDLCPU, ATTN_E_DEVICE,
               "q: expected on a CPU for the reference, got DLPack device type %d",
               (int)p.device.device_type);
    ATTN_TRY(attn_kda_check_values(&p));
    attn_kda_ref_run(&p, attn_threads(p.threads, p.h * p.t));
    return ATTN_OK;
}
