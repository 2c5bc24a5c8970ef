/* SPDX-License-Identifier: MIT
 *
 * Attention in fp64 and in plain low precision, row by row; see check_attention.h for the rule.
 */
#include "check_attention.h"

#include <math.h>
#include <stdio.h>

#define WIDTH_MAX 512
#define DENORMAL 0x1p-120 /* kernels flush denormals, operands and sums of them */

struct rows64 rows64_make(int64_t n, int64_t d)
{
    struct rows64 r = {.n = n, .d = d};
    r.x = check_scratch((size_t)(n * d) * sizeof *r.x);
    r.norm = check_scratch((size_t)n * sizeof *r.norm);
    r.mean = check_scratch((size_t)n * sizeof *r.mean);
    return r;
}

void rows64_set(struct rows64 *rows, int64_t i, enum attn_dtype t, const void *from)
{
    double *x = rows->x + i * rows->d, squares = 0, sum = 0;
    for (int64_t c = 0; c < rows->d; ++c) {
        x[c] = attn_load(t, from, c);
        if (!isfinite(x[c])) continue;
        squares += x[c] * x[c];
        sum += fabs(x[c]);
    }
    rows->norm[i] = sqrt(squares);
    rows->mean[i] = sum / (double)rows->d;
}

static double dot(const double *a, const double *b, int64_t n)
{
    double s[8] = {0};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int k = 0; k < 8; ++k) s[k] += a[i + k] * b[i + k];
    for (; i < n; ++i) s[0] += a[i] * b[i];
    return ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
}

static float dot32(const double *a, const double *b, int64_t n, float s)
{
    for (int64_t i = 0; i < n; ++i) s += (float)a[i] * (float)b[i];
    return s;
}

struct attention_expect attention_expect(enum attn_dtype dtype, enum attn_dtype out_dtype,
                                         int64_t rows, int64_t d_v)
{
    struct attention_expect e = {dtype, out_dtype, rows, d_v, NULL, NULL, 0, 0};
    e.out = check_scratch((size_t)(rows * d_v) * sizeof *e.out);
    e.row = check_scratch((size_t)rows * sizeof *e.row);
    return e;
}

static float round_to(enum attn_dtype t, float x)
{
    uint32_t bits = 0;
    attn_store(t, &bits, 0, x);
    return attn_load(t, &bits, 0);
}

/* Scores in s, their plain fp32 form in plain; the largest |score| and its slack. */
static void scores(const struct attention_row *r, bool fp32, double *s, float *plain, double *slack)
{
    double reach = 0, largest = 0;
    for (int64_t i = 0; i < r->n; ++i) {
        int64_t j = r->keys[i];
        const double *k = r->k->x + j * r->k->d, *v = r->v->x + j * r->v->d;
        double x = dot(r->q, k, r->k->d), norms = r->q_norm * r->k->norm[j];
        if (r->qv) {
            x += dot(r->qv, v, r->v->d);
            norms += r->qv_norm * r->v->norm[j];
        }
        x *= r->scale;
        float y = (float)x;
        if (fp32) {
            y = dot32(r->q, k, r->k->d, 0);
            if (r->qv) y = dot32(r->qv, v, r->v->d, y);
            y *= (float)r->scale;
        }
        reach = fmax(reach, norms);
        if (isfinite(x)) largest = fmax(largest, fabs(x));
        if (r->softcap > 0) {
            x = r->softcap * tanh(x / r->softcap);
            y = (float)r->softcap * tanhf(y / (float)r->softcap);
        }
        s[i] = x;
        plain[i] = y;
    }
    double width = (double)(r->k->d + (r->qv ? r->v->d : 0));
    *slack = 4 * 0x1p-24 * sqrt(width) * reach * fabs(r->scale) + 0x1p-23 * largest +
             0x1p-20 * r->softcap + r->extra_slack;
}

/* The row in plain low precision; returns its largest error and the error of its lse. */
static double plain_error(enum attn_dtype dtype, enum attn_dtype out_dtype,
                          const struct attention_row *r, const float *s, const double *out,
                          double lse, double *lse_error)
{
    enum attn_dtype p_dtype = dtype == ATTN_F8 ? ATTN_BF16 : dtype;
    float acc[WIDTH_MAX] = {0}, m = -INFINITY, l = 0;
    for (int64_t i = 0; i < r->n; ++i) m = fmaxf(m, s[i]);
    for (int64_t i = 0; i < r->n; ++i) {
        float p = expf(s[i] - m);
        const double *v = r->v->x + r->keys[i] * r->v->d;
        l += p;
        p = round_to(p_dtype, p);
        for (int64_t c = 0; c < r->v->d; ++c) acc[c] += p * (float)v[c];
    }
    if (r->sink) l += expf((float)*r->sink - m);
    double worst = 0;
    for (int64_t c = 0; c < r->v->d; ++c) {
        float x = round_to(out_dtype, acc[c] / l * (float)r->out_scale);
        double e = fabs((double)x - out[c]) - check_ulp(out_dtype, out[c]) / 2;
        if (isfinite(e)) worst = fmax(worst, e);
    }
    *lse_error = fabs((double)(m + logf(l)) - lse);
    return worst;
}

void attention_expect_row(struct attention_expect *e, int64_t at, const struct attention_row *r)
{
    double *out = e->out + at * e->d_v, m = -INFINITY, l = 0, magnitude = 0;
    double *s = check_scratch((size_t)r->n * sizeof *s);
    float *plain = check_scratch((size_t)r->n * sizeof *plain);
    bool nan = r->sink && isnan(*r->sink);
    e->row[at].lse = r->sink ? *r->sink : r->no_keys ? INFINITY : -INFINITY;
    e->row[at].exact = true;
    if (r->n == 0 && !nan) return;

    scores(r, e->dtype == ATTN_F32, s, plain, &e->row[at].slack);
    for (int64_t i = 0; i < r->n; ++i) {
        nan = nan || isnan(s[i]);
        m = fmax(m, s[i]);
    }
    if (r->sink) m = fmax(m, *r->sink);
    if (m == -INFINITY && !nan) {
        e->row[at].lse = -INFINITY;
        return;
    }
    e->row[at].exact = false;
    if (nan || m == INFINITY) {
        for (int64_t c = 0; c < e->d_v; ++c) out[c] = NAN;
        e->row[at].lse = nan ? NAN : INFINITY;
        return;
    }
    for (int64_t i = 0; i < r->n; ++i) {
        double p = exp(s[i] - m);
        const double *v = r->v->x + r->keys[i] * r->v->d;
        l += p;
        magnitude += p * r->v->mean[r->keys[i]];
        for (int64_t c = 0; c < e->d_v; ++c) out[c] += p * v[c];
    }
    if (r->sink) l += exp(*r->sink - m);
    for (int64_t c = 0; c < e->d_v; ++c) {
        out[c] *= r->out_scale / l;
        if (isfinite(out[c])) e->row[at].largest = fmax(e->row[at].largest, fabs(out[c]));
    }
    e->row[at].magnitude = magnitude * fabs(r->out_scale) / l;
    e->row[at].lse = m + log(l);
    if (e->row[at].slack > 0.2) return;
    double lse_error;
    double error = plain_error(e->dtype, e->out_dtype, r, plain, out, e->row[at].lse, &lse_error);
    if (e->row[at].magnitude > 0) e->low = fmax(e->low, error / e->row[at].magnitude);
    if (isfinite(lse_error)) e->low_lse = fmax(e->low_lse, lse_error);
}

/* NaN against NaN, infinity against the same infinity. */
static bool same_class(double want, double got)
{
    if (isnan(want) || isnan(got)) return isnan(want) && isnan(got);
    return want == got;
}

bool attention_matches(const struct attention_expect *e, int64_t at, const void *out, float lse,
                       char why[160])
{
    static const double floors[ATTN_DTYPES] = {0x1p-20, 0x1p-9, 0x1p-11, 0x1p-9};
    const double *want = e->out + at * e->d_v;
    double slack = e->row[at].slack, lse_want = e->row[at].lse;
    bool vague = slack > 0.2;
    double lse_floor = e->dtype == ATTN_F32 ? 0x1p-19 * (1 + fabs(lse_want)) : 1.5e-4;
    double lse_limit = 2 * e->low_lse + lse_floor + slack + 0x1p-23 * fabs(lse_want);
    bool lost = isnan(want[0]) && isnan(want[e->d_v - 1]); /* a NaN or +inf score: NaN or +inf */
    if (lost) lse_want = lse == INFINITY ? INFINITY : NAN;
    if (!isfinite(lse_want) || !isfinite(lse)
            ? !same_class(lse_want, lse)
            : fabs(lse - lse_want) > (vague ? 2 * lse_limit : lse_limit)) {
        snprintf(why, 160, "lse %.9g, want %.9g within %.2g", (double)lse, lse_want, lse_limit);
        return false;
    }
    double base = (2 * e->low + floors[e->dtype] + 2 * slack) * e->row[at].magnitude + DENORMAL;
    enum attn_dtype coarse = attn_dtype_out(e->dtype); /* P's, where the result is a split's fp32 */
    for (int64_t c = 0; c < e->d_v; ++c) {
        double got = attn_load(e->out_dtype, out, c);
        double limit = e->row[at].exact ? 0 : base + check_ulp(coarse, want[c]);
        bool ok = isfinite(want[c]) && isfinite(got) ? vague || fabs(got - want[c]) <= limit
                                                     : same_class(want[c], got);
        if (ok) continue;
        snprintf(why, 160, "out[%d] %.9g, want %.9g within %.2g (lse %.6g)", (int)c, got, want[c],
                 limit, lse_want);
        return false;
    }
    return true;
}
