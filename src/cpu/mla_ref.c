/* SPDX-License-Identifier: MIT
 *
 * The mla ops straight from their definition in attn.h: scalar C, fp64 sums, one key at a time.  It
 * shares no blocking and no mathematics with the kernels it judges, only the address of a row.  It
 * is also what runs on a machine below AVX2.
 */
#include "cpu/mla.h"
#include "cpu/threads.h"

/* Key x of token (i, t) and KV head h as values; false: there is none, it is skipped.  x counts the
 * positions of a dense sequence, or of the first list and then the second. */
static bool load_key(const struct attn_mla_problem *p, int64_t i, int64_t t, int64_t h, int64_t x,
                     float *values)
{
    const struct attn_mla_cache *c = &p->cache[0];
    int64_t page, o;
    if (p->block_table) {
        page = p->block_table[i * p->block_table_row + x / c->page];
        o = x % c->page;
    } else {
        const struct attn_mla_list *list = &p->list[0];
        int64_t first = attn_mla_list_length(list, i);
        if (x >= first) {
            x -= first;
            ++list;
            ++c;
        }
        int64_t index = list->indices[i * list->batch + t * list->row + x];
        if (index < 0 || index >= c->num_pages * c->page) return false;
        page = index / c->page;
        o = index % c->page;
    }
    const char *scales = p->format == ATTN_MLA_MODEL1 ? attn_mla_scales(c, page, o) : NULL;
    attn_mla_row_values(p->format, attn_mla_row(c, page, o, h), scales, p->d_qk, values);
    return true;
}

static int64_t positions(const struct attn_mla_problem *p, int64_t i, int64_t t)
{
    if (!p->block_table)
        return attn_mla_list_length(&p->list[0], i) + attn_mla_list_length(&p->list[1], i);
    int64_t n = p->cache_seqlens[i];
    if (p->causal) n += t + 1 - p->s_q;
    return n > 0 ? n : 0;
}

static void attend(const struct attn_mla_problem *p, int64_t i, int64_t t, int64_t h)
{
    float q[ATTN_MLA_WIDTH_MAX], k[ATTN_MLA_WIDTH_MAX];
    double out[ATTN_MLA_LATENT] = {0}, m = -INFINITY, l = 0, scale = p->scale, v_scale = 1;
    int64_t kv_head = h / (p->h_q / p->h_k), n = positions(p, i, t);
    bool nan = false, any = false;
    if (p->descale_q) scale *= (double)*p->descale_q;
    if (p->descale_k) scale *= v_scale = (double)*p->descale_k;
    for (int64_t c = 0; c < p->d_qk; ++c)
        q[c] = attn_load(p->dtype, p->q.data, i * p->q.batch + t * p->q.row + h * p->q.head + c);

    for (int64_t x = 0; x < n; ++x) {
        double s = 0;
        if (!load_key(p, i, t, kv_head, x, k)) continue;
        for (int64_t c = 0; c < p->d_qk; ++c) s += (double)q[c] * (double)k[c];
        s *= scale;
        any = true;
        nan = nan || isnan(s);
        if (s > m) { /* the sums so far move to the new maximum */
            double f = exp(m - s);
            l *= f;
            for (int64_t c = 0; c < p->d_v; ++c) out[c] *= f;
            m = s;
        }
        double weight = s == m ? 1 : exp(s - m);
        l += weight;
        for (int64_t c = 0; c < p->d_v; ++c) out[c] += weight * (double)k[c];
    }
    bool empty = !any || (m == -INFINITY && !nan);
    double lse = empty ? INFINITY : nan ? NAN : m + log(l), keep = 1;
    if (p->sink) keep = 1 / (1 + exp((double)p->sink[h * p->sink_stride] - lse));
    for (int64_t c = 0; c < p->d_v; ++c) {
        double y = empty ? 0 : nan || m == INFINITY ? NAN : out[c] / l * keep * v_scale;
        attn_store(p->out_dtype, p->out.data,
                   i * p->out.batch + t * p->out.row + h * p->out.head + c, (float)y);
    }
    p->lse[i * p->lse_batch + t * p->lse_row + h * p->lse_head] = (float)lse;
    if (p->max_logits)
        p->max_logits[i * p->max_batch + t * p->max_row + h * p->max_head] = (float)m;
}

attn_status attn_mla_ref_run(const struct attn_mla_problem *p, int threads)
{
    ATTN_TRY(attn_mla_values_check(p));
#pragma omp parallel for schedule(dynamic) num_threads(threads) collapse(3)
    for (int64_t i = 0; i < p->b; ++i)
        for (int64_t t = 0; t < p->s_q; ++t)
            for (int64_t h = 0; h < p->h_q; ++h) attend(p, i, t, h);
    return ATTN_OK;
}

static attn_status run_checked(const struct attn_mla_problem *p)
{
    ATTN_CHECK(p->device.device_type == kDLCPU, ATTN_E_DEVICE,
               "q: expected on a CPU for the reference, got DLPack device type %d",
               (int)p->device.device_type);
    return attn_mla_ref_run(p, attn_threads(p->threads, p->b * p->s_q * p->h_q));
}

attn_status attn_mla_decode_ref(const struct attn_mla_decode_args *args)
{
    struct attn_mla_problem p;
    ATTN_TRY(attn_mla_decode_check(args, &p, true));
    return run_checked(&p);
}

attn_status attn_mla_sparse_decode_ref(const struct attn_mla_sparse_decode_args *args)
{
    struct attn_mla_problem p;
    ATTN_TRY(attn_mla_sparse_decode_check(args, &p, true));
    return run_checked(&p);
}

attn_status attn_mla_sparse_fwd_ref(const struct attn_mla_sparse_fwd_args *args)
{
    struct attn_mla_problem p;
    ATTN_TRY(attn_mla_sparse_fwd_check(args, &p, true));
    return run_checked(&p);
}
