/* SPDX-License-Identifier: MIT
 *
 * split_combine on a CPU: a row a call of the kernel; the scalar reference where there is none.
 */
#include <stdbool.h>

#include "cpu/kernels.h"
#include "cpu/split_combine.h"
#include "cpu/threads.h"

#include "core/env.h"

void attn_split_combine_ref(const float *o, int64_t o_split, const float *lse, int64_t lse_split,
                            int32_t splits, int32_t d_v, const float *sink, void *out,
                            enum attn_dtype out_dtype, float *lse_out)
{
    double m = sink ? (double)*sink : -INFINITY, l;
    bool nan = false;
    for (int32_t s = 0; s < splits; ++s) {
        m = fmax(m, (double)lse[s * lse_split]);
        nan = nan || isnan(lse[s * lse_split]);
    }
    if (m == -INFINITY && !nan) {
        for (int32_t c = 0; c < d_v; ++c) attn_store(out_dtype, out, c, 0.0f);
        *lse_out = -INFINITY;
        return;
    }
    l = sink ? exp((double)*sink - m) : 0;
    for (int32_t s = 0; s < splits; ++s) l += exp((double)lse[s * lse_split] - m);
    for (int32_t c = 0; c < d_v; ++c) {
        double sum = 0;
        for (int32_t s = 0; s < splits; ++s)
            if (lse[s * lse_split] != -INFINITY)
                sum += exp((double)lse[s * lse_split] - m) * (double)o[s * o_split + c];
        attn_store(out_dtype, out, c, (float)(sum / l));
    }
    *lse_out = (float)(m + log(l));
}

struct combine {
    const struct attn_split_combine_problem *p;
    const struct attn_split_combine_kernel *kernel;
};

/* Task: all heads of row (i, t). */
static void combine_row(void *context, int64_t task, int thread)
{
    (void)thread;
    const struct combine *c = context;
    const struct attn_split_combine_problem *p = c->p;
    const int64_t *os = p->out_partial_stride, *ls = p->lse_partial_stride;
    int64_t i = task / p->s, t = task % p->s;
    char *out = p->out +
                attn_dtype_bytes(p->out_dtype) * (i * p->out_stride[0] + t * p->out_stride[1]);
    float *lse = p->lse + i * p->lse_stride[0] + t * p->lse_stride[1];
    for (int64_t h = 0; h < p->h; ++h)
        c->kernel->run(p->out_partial + i * os[1] + t * os[2] + h * os[3], os[0],
                       p->lse_partial + i * ls[1] + t * ls[2] + h * ls[3], ls[0],
                       (int32_t)p->splits, (int32_t)p->d_v, NULL,
                       out + attn_dtype_bytes(p->out_dtype) * h * p->out_stride[2], p->out_dtype,
                       lse + h * p->lse_stride[2]);
}

attn_status attn_split_combine_cpu_run(const struct attn_split_combine_problem *p, void *stream)
{
    (void)stream;
    static const struct attn_split_combine_kernel reference = {"attn_split_combine_ref",
                                                               attn_split_combine_ref};
    const struct attn_split_combine_kernel *kernel = attn_cpu_kernels()->split_combine;
    struct combine c = {p, kernel ? kernel : &reference};
    if (attn_log_on())
        attn_log("%s splits %lld b %lld s %lld h %lld d_v %lld", c.kernel->name,
                 (long long)p->splits, (long long)p->b, (long long)p->s, (long long)p->h,
                 (long long)p->d_v);
    int threads = attn_threads(p->threads, p->b * p->s * p->h * p->splits * p->d_v / 65536);
    attn_parallel(threads, p->h > 0 ? p->b * p->s : 0, combine_row, &c);
    return ATTN_OK;
}
