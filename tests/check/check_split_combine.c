/* SPDX-License-Identifier: MIT
 *
 * split_combine: the kernels row by row, and the op with strided tensors, against fp64.
 *
 * Rule, with A = sum_s w_s |o_s| (1 + |lse_s - max| / 4) / sum_s w_s, since an exponent's rounding
 * grows with it: an element within 2^-20 A + ulp(out), lse within 2^-20 (1 + |lse|).  Partials
 * whose lse is -inf hold NaN: they must not be read.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "attn/attn.h"
#include "check.h"
#include "cpu/split_combine.h"
#include "cpu/threads.h"

struct combine_case {
    void (*run)(const float *o, int64_t o_split, const float *lse, int64_t lse_split,
                int32_t splits, int32_t d_v, const float *sink, void *out,
                enum attn_dtype out_dtype, float *lse_out);
    const float *o, *lse, *sink;
    int64_t o_split, lse_split;
    int32_t splits, d_v;
    void *out;
    enum attn_dtype out_dtype;
    float *lse_out;
};

static void run_row(void *context)
{
    const struct combine_case *c = context;
    uint32_t state = attn_fp_enter();
    c->run(c->o, c->o_split, c->lse, c->lse_split, c->splits, c->d_v, c->sink, c->out, c->out_dtype,
           c->lse_out);
    attn_fp_leave(state);
}

/* Whether the row at c->out is what its partials make; the first difference otherwise. */
static bool row_is_right(const struct combine_case *c, char why[160])
{
    double m = c->sink ? (double)*c->sink : -INFINITY, l = 0;
    bool nan = false;
    for (int32_t s = 0; s < c->splits; ++s) {
        nan = nan || isnan(c->lse[s * c->lse_split]);
        m = fmax(m, (double)c->lse[s * c->lse_split]);
    }
    bool empty = m == -INFINITY && !nan;
    for (int32_t s = 0; s < c->splits && !empty; ++s)
        l += exp((double)c->lse[s * c->lse_split] - m);
    if (c->sink && !empty) l += exp((double)*c->sink - m);
    double lse = nan ? NAN : empty ? -INFINITY : m + log(l), got = *c->lse_out;
    bool ok = isfinite(lse) ? fabs(got - lse) <= 0x1p-20 * (1 + fabs(lse))
              : isnan(lse)  ? isnan(got)
                            : got == lse;
    if (!ok) {
        snprintf(why, 160, "lse %.9g, want %.9g", got, lse);
        return false;
    }
    for (int32_t i = 0; i < c->d_v; ++i) {
        double sum = 0, magnitude = 0;
        for (int32_t s = 0; s < c->splits && !nan; ++s) {
            double w = exp((double)c->lse[s * c->lse_split] - m) / l;
            if (empty || c->lse[s * c->lse_split] == -INFINITY) continue;
            sum += w * c->o[s * c->o_split + i];
            double far = 1 + fabs((double)c->lse[s * c->lse_split] - m) / 4;
            magnitude += w * far * fabs((double)c->o[s * c->o_split + i]);
        }
        double x = attn_load(c->out_dtype, c->out, i);
        double limit = empty ? 0 : 0x1p-20 * magnitude + check_ulp(c->out_dtype, sum) + 0x1p-120;
        if (nan ? isnan(x) : fabs(x - sum) <= limit) continue;
        snprintf(why, 160, "out[%d] %.9g, want %.9g within %.2g", i, x, nan ? NAN : sum, limit);
        return false;
    }
    return true;
}

/* Log-sum-exps of one row: spread wide, some -inf, now and then all of them, rarely a NaN. */
static void fill_row(struct check_random *r, float *o, int64_t o_split, float *lse,
                     int64_t lse_split, int64_t splits, int64_t d_v)
{
    bool none = random_percent(r, 8), nan = random_percent(r, 4);
    float spread = (float)PICK(r, 1, 10, 100), middle = (float)PICK(r, 0, -50, 1000);
    for (int64_t s = 0; s < splits; ++s) {
        bool dead = none || random_percent(r, 20);
        lse[s * lse_split] = dead ? -INFINITY : middle + spread * (float)random_normal(r);
        if (dead)
            check_fill_nan(ATTN_F32, o + s * o_split, d_v);
        else
            check_fill_normal(r, ATTN_F32, o + s * o_split, d_v, 1);
    }
    if (nan && !none) lse[random_range(r, 0, splits - 1) * lse_split] = NAN;
}

static enum attn_dtype pick_out(struct check_random *r)
{
    return (enum attn_dtype)PICK(r, ATTN_F32, ATTN_BF16, ATTN_F16);
}

static void check_kernel(const char *isa, const char *name, struct combine_case c)
{
    struct check_test test;
    if (check_options.kernel && !strstr(name, check_options.kernel)) return;
    if (!check_open(&test, "split_combine", isa, "", "%s", name)) return;
    for (int64_t i = 0; i < check_rounds(400); ++i) {
        if (check_options.only_case >= 0 && check_options.only_case != i) continue;
        struct check_random r = check_case_random(&test, i);
        char why[160];
        check_pool_reset();
        c.splits = (int32_t)(1 + random_edge(&r, random_percent(&r, 20) ? 255 : 9));
        c.d_v = (int32_t)(1 + random_edge(&r, 511));
        c.o_split = c.d_v + random_range(&r, 0, 9);
        c.lse_split = random_range(&r, 1, 3);
        c.out_dtype = pick_out(&r);
        int64_t out_bytes = attn_dtype_bytes(c.out_dtype);
        struct check_buffer o = check_buffer((size_t)(4 * ((c.splits - 1) * c.o_split + c.d_v)), 4);
        struct check_buffer lse = check_buffer((size_t)(4 * ((c.splits - 1) * c.lse_split + 1)), 4);
        struct check_buffer out = check_buffer((size_t)(out_bytes * c.d_v), (size_t)out_bytes);
        struct check_buffer total = check_buffer(4, 4);
        fill_row(&r, (float *)(void *)o.data, c.o_split, (float *)(void *)lse.data, c.lse_split,
                 c.splits, c.d_v);
        float sink = (float)random_normal(&r);
        c.o = (float *)(void *)o.data;
        c.lse = (float *)(void *)lse.data;
        c.sink = random_percent(&r, 30) ? &sink : NULL;
        c.out = out.data;
        c.lse_out = (float *)(void *)total.data;
        test.cases += 1;
        if (!check_guarded(&test, run_row, &c)) continue;
        if (check_options.broken) *c.lse_out = isnan(*c.lse_out) ? 0 : NAN;
        bool right = row_is_right(&c, why);
        if (!right || !check_buffer_intact(&out) || !check_buffer_intact(&total))
            check_fail(&test, "splits %d d_v %d %s%s: %s", c.splits, c.d_v,
                       attn_dtype_name(c.out_dtype), c.sink ? " sink" : "",
                       right ? "bytes beside the row were written" : why);
    }
    check_close(&test);
}

/* ---- the op ---------------------------------------------------------------------------------- */

struct op_tensor {
    DLTensor t;
    int64_t shape[5], strides[5];
    struct check_buffer buffer;
};

/* Axes but the last `fixed` in random order of memory, with gaps. */
static void make_tensor(struct check_random *r, struct op_tensor *t, enum attn_dtype type, int ndim,
                        const int64_t *shape, int fixed)
{
    static const DLDataType types[] = {{kDLFloat, 32, 1}, {kDLBfloat, 16, 1}, {kDLFloat, 16, 1}};
    int order[5];
    int64_t step = 1, span = 1;
    for (int i = 0; i < ndim; ++i) order[i] = i;
    for (int i = ndim - fixed - 1; i > 0; --i) {
        int j = (int)random_range(r, 0, i), x = order[i];
        order[i] = order[j];
        order[j] = x;
    }
    for (int i = ndim - 1; i >= 0; --i) {
        int axis = order[i];
        t->shape[axis] = shape[axis];
        t->strides[axis] = step;
        span = shape[axis] ? span + step * (shape[axis] - 1) : span;
        step *= shape[axis] ? shape[axis] : 1;
        step += i > 0 && random_percent(r, 30) ? random_range(r, 0, 3) * t->strides[axis] : 0;
    }
    for (int i = 0; i < ndim; ++i) span = shape[i] ? span : 0;
    t->t = (DLTensor){.device = {kDLCPU, 0}, .ndim = ndim, .dtype = types[type]};
    t->t.shape = t->shape;
    t->t.strides = t->strides;
    int64_t bytes = attn_dtype_bytes(type);
    t->buffer = check_buffer((size_t)(span * bytes), (size_t)bytes);
    t->t.data = t->buffer.data;
}

struct op_case {
    struct op_tensor o, lse_partial, out, lse;
    struct attn_split_combine_args args;
    attn_status status;
};

static void run_op(void *context)
{
    struct op_case *c = context;
    c->status = attn_split_combine_run(&c->args, NULL);
}

/* The row (i, t, h) as a combine_case, to be judged as a kernel's. */
static struct combine_case row_of(const struct op_case *c, int64_t i, int64_t t, int64_t h,
                                  enum attn_dtype type)
{
    const int64_t *o = c->o.strides, *p = c->lse_partial.strides, *l = c->lse.strides;
    const int64_t *out = c->out.strides;
    return (struct combine_case){
        .o = (const float *)(const void *)c->o.buffer.data + i * o[1] + t * o[2] + h * o[3],
        .lse = (const float *)(const void *)c->lse_partial.buffer.data + i * p[1] + t * p[2] +
               h * p[3],
        .o_split = o[0],
        .lse_split = p[0],
        .splits = (int32_t)c->o.shape[0],
        .d_v = (int32_t)c->o.shape[4],
        .out = c->out.buffer.data + attn_dtype_bytes(type) * (i * out[0] + t * out[1] + h * out[2]),
        .out_dtype = type,
        .lse_out = (float *)(void *)c->lse.buffer.data + i * l[0] + t * l[1] + h * l[2],
    };
}

static void check_op_case(struct check_test *test, struct check_random *r)
{
    struct op_case c;
    char why[160] = "";
    enum attn_dtype type = pick_out(r);
    int64_t b = random_range(r, 0, 3), s = random_edge(r, 20), h = random_range(r, 1, 5);
    int64_t splits = 1 + random_edge(r, random_percent(r, 10) ? 255 : 6);
    int64_t d_v = random_percent(r, 50) ? 64 : 1 + random_edge(r, 300);
    const int64_t shape[5] = {splits, b, s, h, d_v};
    make_tensor(r, &c.o, ATTN_F32, 5, shape, 1);
    make_tensor(r, &c.lse_partial, ATTN_F32, 4, shape, 0);
    make_tensor(r, &c.out, type, 4, shape + 1, 1);
    make_tensor(r, &c.lse, ATTN_F32, 3, shape + 1, 0);
    for (int64_t i = 0; i < b; ++i)
        for (int64_t t = 0; t < s; ++t)
            for (int64_t k = 0; k < h; ++k) {
                struct combine_case row = row_of(&c, i, t, k, type);
                fill_row(r, (float *)(uintptr_t)row.o, row.o_split, (float *)(uintptr_t)row.lse,
                         row.lse_split, splits, d_v);
            }
    check_buffer_protect(&c.o.buffer, true);
    check_buffer_protect(&c.lse_partial.buffer, true);
    c.args = (struct attn_split_combine_args){
        .size = sizeof c.args,
        .threads = (int32_t)random_range(r, 0, 3),
        .out_partial = &c.o.t,
        .lse_partial = &c.lse_partial.t,
        .out = &c.out.t,
        .lse = &c.lse.t,
    };
    test->cases += 1;
    if (!check_guarded(test, run_op, &c)) return;
    bool right = c.status == ATTN_OK;
    if (!right) snprintf(why, sizeof why, "status %d: %.120s", (int)c.status, attn_last_error());
    for (int64_t i = 0; right && i < b * s * h; ++i) {
        struct combine_case row = row_of(&c, i / (s * h), i / h % s, i % h, type);
        if (check_options.broken) *row.lse_out = isnan(*row.lse_out) ? 0 : NAN;
        right = row_is_right(&row, why);
        memset(row.out, CHECK_CANARY, (size_t)(d_v * attn_dtype_bytes(type)));
        memset(row.lse_out, CHECK_CANARY, 4);
    }
    /* The rows are canary again; so must be all that lies between them. */
    for (size_t i = 0; right && i < c.out.buffer.bytes; ++i)
        right = (unsigned char)c.out.buffer.data[i] == CHECK_CANARY;
    if (!right || !check_buffer_intact(&c.out.buffer) || !check_buffer_intact(&c.lse.buffer))
        check_fail(test, "splits %d b %d s %d h %d d_v %d: %s", (int)splits, (int)b, (int)s, (int)h,
                   (int)d_v, *why ? why : "bytes beside the rows were written");
}

void check_split_combine(void)
{
    const struct check_rung *rungs;
    int n = check_rungs(&rungs);
    check_kernel("ref", "attn_split_combine_ref",
                 (struct combine_case){.run = attn_split_combine_ref});
    for (int i = 1; i < n; ++i) {
        const struct attn_split_combine_kernel *k = rungs[i].table.split_combine;
        if (!k || k == rungs[i - 1].table.split_combine) continue;
        check_kernel(rungs[i].name, k->name, (struct combine_case){.run = k->run});
    }
    struct check_test test;
    if (!check_open(&test, "split_combine", attn_cpu_rung(), "", "the op")) return;
    for (int64_t i = 0; i < check_rounds(200); ++i) {
        if (check_options.only_case >= 0 && check_options.only_case != i) continue;
        struct check_random r = check_case_random(&test, i);
        check_pool_reset();
        check_op_case(&test, &r);
    }
    check_close(&test);
}
