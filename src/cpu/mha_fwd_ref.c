/* SPDX-License-Identifier: MIT
 *
 * mha_fwd straight from its definition: scalar C, fp64 sums, one predicate that says whether a key
 * is visible.  It shares no blocking, no masks and no mathematics with the kernels it judges; of
 * the driver it uses only the reading of lengths and the cache's address rule.  It is also what
 * runs on a machine below AVX2.
 *
 *   s(i, j) = scale qd kd (q_i . k_j + qv_i . v_j);  softcap: s = c tanh(s / c)
 *   out_i = vd sum_j exp(s(i, j) - m) v_j / l,  lse = m + ln l,  the sink in m and l
 *
 * With splits each piece of the keys gives such a result, without the sink, in fp32; then they are
 * combined.
 */
#include "cpu/mha_fwd.h"
#include "cpu/split_combine.h"
#include "cpu/threads.h"

static int64_t floor_div(int64_t a, int64_t b)
{
    int64_t q = a / b;
    return a % b < 0 ? q - 1 : q;
}

/* Each mask by the predicate that defines it, not by its interval. */
static bool visible(const struct attn_mha_fwd_problem *p, const struct attn_cpu_seq *seq, int64_t i,
                    int64_t j)
{
    if (j < 0 || j >= seq->k_len) return false;
    if (p->cp_world > 1) {
        int64_t global = j * p->cp_world + p->cp_rank;
        if (global >= seq->total) return false;
        return !p->causal || global <= i + seq->total - seq->q_len;
    }
    int64_t at = i + seq->k_len - seq->q_len;
    if (p->causal && j > at) return false;
    if (p->window_left >= 0 && j < at - p->window_left) return false;
    if (p->window_right >= 0 && j > at + p->window_right) return false;
    if (p->chunk > 0) {
        int64_t c = floor_div(at, p->chunk);
        if (j < c * p->chunk || j >= (c + 1) * p->chunk) return false;
    }
    return true;
}

/* y = x rotated and rounded to the dtype, as fp32. */
static void rotate(const struct attn_mha_fwd_problem *p, const void *x, int64_t position, float *y)
{
    int64_t r = p->rotary_width, half = r / 2;
    for (int64_t c = 0; c < p->d_qk; ++c) y[c] = attn_load(p->dtype, x, c);
    for (int64_t m = 0; m < half; ++m) {
        int64_t a = p->rotary_interleaved ? 2 * m : m, b = p->rotary_interleaved ? a + 1 : m + half;
        float cosine = attn_load(p->dtype, p->rotary_cos, position * half + m);
        float sine = attn_load(p->dtype, p->rotary_sin, position * half + m);
        float u = attn_load(p->dtype, x, a), v = attn_load(p->dtype, x, b);
        float rotated[2] = {u * cosine - v * sine, u * sine + v * cosine};
        uint32_t rounded[2] = {0, 0};
        for (int k = 0; k < 2; ++k) attn_store(p->dtype, &rounded[k], 0, rotated[k]);
        y[a] = attn_load(p->dtype, &rounded[0], 0);
        y[b] = attn_load(p->dtype, &rounded[1], 0);
    }
}

struct row {
    const struct attn_mha_fwd_problem *p;
    const struct attn_cpu_seq *seq;
    int64_t b, i, h, hk;
    int64_t begin, end; /* keys looked at */
    int32_t split;      /* whose they are; -1: the call has none */
    double scale;
    float q[ATTN_WIDTH_MAX], qv[ATTN_WIDTH_MAX];
};

static const char *key_row(const struct row *r, const struct attn_rows *cache, int64_t j)
{
    int64_t head = r->hk * cache->head * attn_dtype_bytes(r->p->dtype);
    return cache->data + attn_cpu_cache_offset(r->p, cache, r->seq, r->seq->leftpad + j) + head;
}

static double score(const struct row *r, int64_t j)
{
    const struct attn_mha_fwd_problem *p = r->p;
    const char *k = key_row(r, &p->k, j), *v = key_row(r, &p->v, j);
    double dot = 0;
    for (int64_t c = 0; c < p->d_qk; ++c) dot += (double)r->q[c] * attn_load(p->dtype, k, c);
    if (p->qv.data)
        for (int64_t c = 0; c < p->d_v; ++c) dot += (double)r->qv[c] * attn_load(p->dtype, v, c);
    double s = r->scale * dot;
    return p->softcap > 0 ? p->softcap * tanh(s / p->softcap) : s;
}

static double load_descale(const float *d, int64_t batch, int64_t head, int64_t i, int64_t h)
{
    return d ? (double)d[i * batch + h * head] : 1.0;
}

/* One row's results: the caller's, or a split's partial ones. */
static void write_row(const struct row *r, const double *out, double lse)
{
    const struct attn_mha_fwd_problem *p = r->p;
    const bool partial = r->split >= 0;
    const struct attn_rows *to = partial ? &p->out_accum : &p->out;
    const enum attn_dtype type = partial ? ATTN_F32 : p->out_dtype;
    int64_t t = r->seq->q_start + r->i;
    int64_t at = r->b * to->batch + t * to->row + r->h * to->head;
    if (partial) at += r->split * p->out_accum_split;
    for (int64_t c = 0; c < p->d_v; ++c) attn_store(type, to->data, at + c, (float)out[c]);
    if (partial)
        p->lse_accum[r->split * p->lse_accum_split + r->b * p->lse_accum_batch +
                     r->h * p->lse_accum_head + t] = (float)lse;
    else
        p->lse[r->b * p->lse_batch + r->h * p->lse_head + t] = (float)lse;
}

/* Attention of a row to its keys [begin, end). */
static void attend(const struct row *r)
{
    const struct attn_mha_fwd_problem *p = r->p;
    double out[ATTN_WIDTH_MAX] = {0}, m = -INFINITY, l = 0, sink = -INFINITY;
    bool nan = false; /* a NaN score must show whatever the order of comparisons */
    for (int64_t j = r->begin; j < r->end; ++j) {
        if (!visible(p, r->seq, r->i, j)) continue;
        double s = score(r, j);
        nan = nan || isnan(s);
        if (s > m) m = s;
    }
    if (p->sinks && r->split < 0) {
        sink = attn_load(p->sinks_dtype, p->sinks, r->h * p->sinks_stride);
        nan = nan || isnan(sink);
        if (sink > m) m = sink;
    }
    if (nan || m == INFINITY) {
        for (int64_t c = 0; c < p->d_v; ++c) out[c] = NAN;
        write_row(r, out, m == INFINITY && !nan ? INFINITY : NAN);
        return;
    }
    if (m == -INFINITY) {
        write_row(r, out, -INFINITY);
        return;
    }
    for (int64_t j = r->begin; j < r->end; ++j) {
        if (!visible(p, r->seq, r->i, j)) continue;
        double weight = exp(score(r, j) - m);
        const char *v = key_row(r, &p->v, j);
        l += weight;
        for (int64_t c = 0; c < p->d_v; ++c) out[c] += weight * attn_load(p->dtype, v, c);
    }
    l += exp(sink - m);
    double v_scale = load_descale(p->v_descale, p->v_descale_batch, p->v_descale_head, r->b, r->hk);
    for (int64_t c = 0; c < p->d_v; ++c) out[c] *= v_scale / l;
    write_row(r, out, m + log(l));
}

static void combine_splits(const struct attn_mha_fwd_problem *p, const struct row *r,
                           int32_t splits)
{
    int64_t t = r->seq->q_start + r->i;
    const float *o = (const float *)(const void *)p->out_accum.data;
    o += r->b * p->out_accum.batch + t * p->out_accum.row + r->h * p->out_accum.head;
    const float *lse = p->lse_accum + r->b * p->lse_accum_batch + r->h * p->lse_accum_head + t;
    int64_t at = r->b * p->out.batch + t * p->out.row + r->h * p->out.head;
    float sink;
    if (p->sinks) sink = attn_load(p->sinks_dtype, p->sinks, r->h * p->sinks_stride);
    attn_split_combine_ref(o, p->out_accum_split, lse, p->lse_accum_split, splits, (int32_t)p->d_v,
                           p->sinks ? &sink : NULL,
                           p->out.data + attn_dtype_bytes(p->out_dtype) * at, p->out_dtype,
                           p->lse + r->b * p->lse_batch + r->h * p->lse_head + t);
}

/* Row i of head h of sequence b: as one, or in `splits` pieces of `piece` keys. */
static void compute_row(const struct attn_mha_fwd_problem *p, const struct attn_cpu_seq *seq,
                        int64_t b, int64_t h, int64_t i, int32_t splits, int64_t piece)
{
    struct row r = {.p = p, .seq = seq, .b = b, .i = i, .h = h, .hk = h / (p->h_q / p->h_k)};
    int64_t bytes = attn_dtype_bytes(p->dtype), t = seq->q_start + i;
    r.scale = p->scale *
              load_descale(p->q_descale, p->q_descale_batch, p->q_descale_head, b, r.hk) *
              load_descale(p->k_descale, p->k_descale_batch, p->k_descale_head, b, r.hk);

    const char *q = p->q.data + bytes * (b * p->q.batch + t * p->q.row + h * p->q.head);
    if (p->rotary_cos)
        rotate(p, q, attn_rotary_query_position(p, seq, i), r.q);
    else
        for (int64_t c = 0; c < p->d_qk; ++c) r.q[c] = attn_load(p->dtype, q, c);
    const char *qv = p->qv.data + bytes * (b * p->qv.batch + t * p->qv.row + h * p->qv.head);
    for (int64_t c = 0; p->qv.data && c < p->d_v; ++c) r.qv[c] = attn_load(p->dtype, qv, c);

    r.split = -1;
    if (p->no_keys) {
        const double zeros[ATTN_WIDTH_MAX] = {0};
        write_row(&r, zeros, INFINITY);
        return;
    }
    if (splits == 1) {
        r.end = seq->k_len;
        attend(&r);
        return;
    }
    for (r.split = 0; r.split < splits; ++r.split) {
        r.begin = r.split * piece;
        r.end = r.begin + piece < seq->k_len ? r.begin + piece : seq->k_len;
        attend(&r);
    }
    combine_splits(p, &r, splits);
}

/* Stores one new token's K and V, K rotated. */
static void append(const struct attn_mha_fwd_problem *p, const struct attn_cpu_seq *seq, int64_t b,
                   int64_t t)
{
    int64_t bytes = attn_dtype_bytes(p->dtype), at = seq->new_start + t, x = seq->cached + t;
    char *k = p->k.data + attn_cpu_cache_offset(p, &p->k, seq, x);
    char *v = p->v.data + attn_cpu_cache_offset(p, &p->v, seq, x);
    for (int64_t h = 0; h < p->h_k; ++h) {
        const char *from = p->k_new.data +
                           bytes * (b * p->k_new.batch + at * p->k_new.row + h * p->k_new.head);
        char *to = k + bytes * h * p->k.head;
        if (p->rotary_cos) {
            float y[ATTN_WIDTH_MAX];
            rotate(p, from, seq->rotary + t, y);
            for (int64_t c = 0; c < p->d_qk; ++c) attn_store(p->dtype, to, c, y[c]);
        } else {
            memcpy(to, from, (size_t)(p->d_qk * bytes));
        }
        memcpy(v + bytes * h * p->v.head,
               p->v_new.data + bytes * (b * p->v_new.batch + at * p->v_new.row + h * p->v_new.head),
               (size_t)(p->d_v * bytes));
    }
}

attn_status attn_mha_fwd_ref_run(const struct attn_mha_fwd_problem *p, int32_t splits,
                                 int64_t piece, int threads)
{
    struct attn_cpu_seq seq;
    for (int64_t b = 0; b < p->b; ++b) ATTN_TRY(attn_cpu_seq_read(p, b, &seq));
    for (int64_t b = 0; p->k_new.data && b < p->b; ++b) {
        attn_cpu_seq_read(p, b, &seq);
        for (int64_t t = 0; t < seq.new_len; ++t) append(p, &seq, b, t);
    }
#pragma omp parallel for schedule(dynamic) num_threads(threads) collapse(2)
    for (int64_t b = 0; b < p->b; ++b) {
        for (int64_t h = 0; h < p->h_q; ++h) {
            struct attn_cpu_seq s;
            attn_cpu_seq_read(p, b, &s);
            for (int64_t i = 0; i < s.q_len; ++i) compute_row(p, &s, b, h, i, splits, piece);
        }
    }
    return ATTN_OK;
}

attn_status attn_mha_fwd_ref(const struct attn_mha_fwd_args *args)
{
    struct attn_mha_fwd_problem p;
    ATTN_TRY(attn_mha_fwd_check(args, &p, true));
    ATTN_CHECK(p.device.device_type == kDLCPU, ATTN_E_DEVICE,
               "q: expected on a CPU for the reference, got DLPack device type %d",
               (int)p.device.device_type);
    return attn_mha_fwd_ref_run(&p, 1, 0, attn_threads(p.threads, p.b * p.h_q));
}
