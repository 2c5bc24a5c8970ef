/* SPDX-License-Identifier: MIT
 *
 * --bench: times of mha_fwd by rung and dtype, through the same plan and run as the tests.  A row
 * is the median of repeated runs, the spread (the middle half, in per cent of the median), and the
 * rates of useful work: 2 (d_qk + d_v) FLOP a visible score, and each byte of q, k, v, out once.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check_run.h"
#include "cpu/mha_fwd.h"

struct shape {
    const char *name;
    int64_t b, s_q, s_k, h_q, h_k, d, d_v, page;
    bool causal;
    double scores; /* visible ones of a head */
};

static const struct shape shapes[] = {
    {"prefill", 1, 1024, 1024, 8, 8, 128, 128, 0, false, 1024. * 1024},
    {"prefill causal", 1, 1024, 1024, 8, 8, 128, 128, 0, true, 1024. * 1025 / 2},
    {"prefill d64", 1, 1024, 1024, 8, 8, 64, 64, 0, false, 1024. * 1024},
    {"prefill d256", 1, 512, 512, 4, 4, 256, 256, 0, false, 512. * 512},
    {"gqa prefill causal", 1, 512, 512, 32, 8, 128, 128, 0, true, 512. * 513 / 2},
    {"short", 4, 16, 2048, 8, 8, 128, 128, 0, true, 16. * 2048 - 120},
    {"decode", 1, 1, 16384, 32, 8, 128, 128, 0, false, 16384},
    {"decode paged 16", 4, 1, 4096, 32, 8, 128, 128, 16, false, 4096},
    {"decode mqa", 4, 1, 4096, 16, 1, 128, 128, 0, false, 4096},
};

struct bench {
    DLTensor q, k, v, out, lse, out_accum, lse_accum, table;
    int64_t q_shape[4], k_shape[4], v_shape[4], out_shape[4], lse_shape[3], table_shape[2];
    int64_t out_accum_shape[5], lse_accum_shape[4];
    struct attn_mha_fwd_args args;
    struct attn_mha_fwd_plan plan;
    struct attn_mha_fwd_problem problem;
    const struct attn_cpu_kernels *table_of_kernels;
    char *workspace;
    attn_status status;
};

static DLTensor make(enum attn_dtype t, int ndim, int64_t *to, const int64_t *shape, bool fill)
{
    static const DLDataType types[ATTN_DTYPES] = {{kDLFloat, 32, 1},
                                                  {kDLBfloat, 16, 1},
                                                  {kDLFloat, 16, 1},
                                                  {kDLFloat8_e4m3fn, 8, 1}};
    struct check_random r = {99};
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= to[i] = shape[i];
    char *data = check_buffer((size_t)((n * attn_dtype_bytes(t) + 63) / 64 * 64), 64).data;
    if (fill) check_fill_normal(&r, t, data, n, 1);
    return (DLTensor){.data = data,
                      .device = {kDLCPU, 0},
                      .ndim = ndim,
                      .dtype = types[t],
                      .shape = to};
}

static void set_up(struct bench *x, const struct shape *s, enum attn_dtype t)
{
    int64_t per_page = s->page ? s->page : s->s_k, pages = s->b * s->s_k / per_page;
    const int64_t q[4] = {s->b, s->s_q, s->h_q, s->d}, out[4] = {s->b, s->s_q, s->h_q, s->d_v};
    const int64_t k[4] = {pages, per_page, s->h_k, s->d}, v[4] = {pages, per_page, s->h_k, s->d_v};
    const int64_t lse[3] = {s->b, s->h_q, s->s_q}, table[2] = {s->b, pages / s->b};
    x->q = make(t, 4, x->q_shape, q, true);
    x->k = make(t, 4, x->k_shape, k, true);
    x->v = make(t, 4, x->v_shape, v, true);
    x->out = make(attn_dtype_out(t), 4, x->out_shape, out, false);
    x->lse = make(ATTN_F32, 3, x->lse_shape, lse, false);
    x->args = (struct attn_mha_fwd_args){
        .size = sizeof x->args,
        .q = &x->q,
        .k = &x->k,
        .v = &x->v,
        .out = &x->out,
        .lse = &x->lse,
        .softmax_scale = pow((double)s->d, -0.5),
        .window_left = -1,
        .window_right = -1,
        .causal = s->causal,
    };
    if (!s->page) return;
    x->table = make(ATTN_F32, 2, x->table_shape, table, false);
    x->table.dtype = (DLDataType){kDLInt, 32, 1};
    for (int64_t i = 0; i < pages; ++i) ((int32_t *)x->table.data)[i] = (int32_t)(i * 7919 % pages);
    x->args.page_table = &x->table;
}

static void plan_bench(void *context)
{
    struct bench *x = context;
    x->status = mha_plan_with(x->table_of_kernels, &x->args, &x->plan);
    if (x->status) return;
    x->workspace = check_buffer((size_t)x->plan.workspace_bytes, 64).data;
    if (x->plan.splits > 1) {
        const int64_t *o = x->out_shape;
        const int64_t accum[5] = {x->plan.splits, o[0], o[2], o[1], o[3]};
        x->out_accum = make(ATTN_F32, 5, x->out_accum_shape, accum, false);
        x->lse_accum = make(ATTN_F32, 4, x->lse_accum_shape, accum, false);
        x->args.out_accum = &x->out_accum;
        x->args.lse_accum = &x->lse_accum;
    }
    x->status = attn_mha_fwd_check(&x->args, &x->problem, true);
}

static void run_bench(void *context)
{
    struct bench *x = context;
    x->status = attn_mha_fwd_cpu_run_with(x->table_of_kernels, &x->problem, &x->plan, x->workspace,
                                          x->plan.workspace_bytes);
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

#define RUNS_MAX 200

static void report(const struct check_rung *rung, const struct shape *s, enum attn_dtype t,
                   struct bench *x)
{
    double times[RUNS_MAX], begin = check_seconds(), limit = check_options.quick ? 0.1 : 0.5;
    int n = 0;
    while (n < 3 || (n < RUNS_MAX && check_seconds() - begin < limit * check_options.repeat)) {
        double start = check_seconds();
        run_bench(x);
        times[n++] = check_seconds() - start;
    }
    qsort(times, (size_t)n, sizeof *times, ascending);
    double median = times[n / 2], spread = (times[3 * n / 4] - times[n / 4]) / median;
    double flop = 2 * (double)(s->b * s->h_q * (s->d + s->d_v)) * s->scores;
    double bytes = (double)attn_dtype_bytes(t) *
                       (double)(s->b * s->s_k * s->h_k * (s->d + s->d_v)) +
                   (double)attn_dtype_bytes(t) * (double)(s->b * s->s_q * s->h_q * s->d) +
                   (double)attn_dtype_bytes(attn_dtype_out(t)) *
                       (double)(s->b * s->s_q * s->h_q * s->d_v);
    printf("%-8s %-5s %-20s %-32s %10.1f us +-%3.0f %% %9.1f GFLOP/s %7.1f GB/s\n", rung->name,
           attn_dtype_name(t), s->name, x->plan.kernel, median * 1e6, spread * 100,
           flop / median * 1e-9, bytes / median * 1e-9);
    fflush(stdout);
}

void check_bench(void)
{
    const struct check_rung *rungs;
    const struct check_options *o = &check_options;
    int n = check_rungs(&rungs);
    for (int i = 1; i < n; ++i) {
        for (int t = 0; t < ATTN_DTYPES; ++t) {
            for (size_t k = 0; k < sizeof shapes / sizeof *shapes; ++k) {
                struct bench x = {.table_of_kernels = &rungs[i].table};
                struct check_test test;
                const struct shape *s = &shapes[k];
                enum attn_dtype dtype = (enum attn_dtype)t;
                if (!check_open(&test, "bench", rungs[i].name, attn_dtype_name(dtype), "%s",
                                s->name))
                    continue;
                check_pool_reset();
                set_up(&x, s, dtype);
                bool ready = check_guarded(&test, plan_bench, &x) && x.status == ATTN_OK;
                if (ready && o->kernel && !strstr(x.plan.kernel, o->kernel)) continue;
                if (!ready || !check_guarded(&test, run_bench, &x) || x.status)
                    printf("%s %s %s: %s\n", rungs[i].name, attn_dtype_name(dtype), s->name,
                           attn_last_error());
                else
                    report(&rungs[i], s, dtype, &x);
            }
        }
    }
}
