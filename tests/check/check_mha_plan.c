/* SPDX-License-Identifier: MIT
 *
 * Plans by the thousand: of random cases on every rung, and of huge problems whose tensors do not
 * exist, since a plan reads no data.  That the workspace suffices exactly is shown by every run of
 * check_mha_fwd.c, in a buffer of just that size with a page that faults behind it.  Here, too: a
 * run allocates nothing.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check_run.h"

/* ---- what every plan must keep --------------------------------------------------------------- */

static const char *plan_fault(const struct attn_mha_fwd_args *a, const struct attn_mha_fwd_plan *p,
                              bool kernels)
{
    if (p->size != sizeof *p) return "size";
    if (p->splits < 1 || p->splits > 256) return "splits outside 1 to 256";
    if (a->num_splits == 1 && p->splits != 1) return "splits although num_splits is 1";
    if (p->workspace_bytes < 0) return "negative workspace";
    if (p->piece < 0 || (p->splits > 1 && p->piece == 0)) return "splits without keys";
    if (p->splits > 1 && p->piece > INT64_MAX / p->splits) return "piece";
    if (!memchr(p->kernel, 0, sizeof p->kernel) ||
        (strncmp(p->kernel, "attn_mha_", 9) != 0 && strcmp(p->kernel, "nothing") != 0))
        return "no kernel's name";
    if (kernels && strstr(p->kernel, "_ref")) return "the reference on a rung with kernels";
    return NULL;
}

/* The splits, each `piece` keys long, reach the last key. */
static bool splits_cover(const struct attn_mha_fwd_plan *p)
{
    return p->splits == 1 || p->piece * p->splits >= p->shape[2];
}

static void check_plan(struct check_test *test, const struct attn_cpu_kernels *table,
                       struct attn_mha_fwd_args *args, const char *text)
{
    struct attn_mha_fwd_plan plan = {.size = sizeof plan}, again = {.size = sizeof again};
    bool kernels = table->mha_fwd[ATTN_F32] != NULL;
    test->cases += 1;
    args->threads = 1;
    if (mha_plan_with(table, args, &plan)) {
        check_fail(test, "%s: %s", text, attn_last_error());
        return;
    }
    const char *fault = plan_fault(args, &plan, kernels);
    if (!fault && kernels && !splits_cover(&plan)) fault = "splits that do not reach the last key";
    if (check_options.broken) fault = "spoiled";
    if (fault)
        check_fail(test, "%s: %s: splits %d piece %lld workspace %lld: %s", text, plan.kernel,
                   plan.splits, (long long)plan.piece, (long long)plan.workspace_bytes, fault);
    static const int threads[] = {1, 2, 3, 16, 64};
    for (size_t i = 0; i < sizeof threads / sizeof *threads; ++i) {
        args->threads = threads[i];
        mha_plan_with(table, args, &again);
        bool same = again.splits == plan.splits && again.piece == plan.piece &&
                    strcmp(again.kernel, plan.kernel) == 0 &&
                    (i > 0 || memcmp(&again, &plan, sizeof plan) == 0);
        if (!same) check_fail(test, "%s: another plan with %d threads", text, threads[i]);
    }
    args->threads = 1;
}

/* The same shapes at other addresses, where nothing is: the same plan. */
static void check_addresses(struct check_test *test, const struct attn_cpu_kernels *table,
                            struct mha_case *c, const char *text)
{
    struct attn_mha_fwd_plan plan = {.size = sizeof plan}, elsewhere = {.size = sizeof elsewhere};
    void *data[MHA_ARGUMENT_COUNT];
    if (mha_plan_with(table, &c->args, &plan)) return;
    for (int a = 0; a < MHA_ARGUMENT_COUNT; ++a) {
        data[a] = c->tensor[a].t.data;
        c->tensor[a].t.data = (void *)(uintptr_t)64;
    }
    attn_status status = mha_plan_with(table, &c->args, &elsewhere);
    for (int a = 0; a < MHA_ARGUMENT_COUNT; ++a) c->tensor[a].t.data = data[a];
    if (status || memcmp(&plan, &elsewhere, sizeof plan) != 0)
        check_fail(test, "%s: %s, %lld bytes: at other addresses %s, %lld bytes", text, plan.kernel,
                   (long long)plan.workspace_bytes, elsewhere.kernel,
                   (long long)elsewhere.workspace_bytes);
}

static void check_cases(const struct check_rung *rung)
{
    struct check_test test;
    if (!check_open(&test, "mha_plan", rung->name, "", "random cases")) return;
    for (int64_t i = 0; i < check_rounds(800); ++i) {
        if (check_options.only_case >= 0 && check_options.only_case != i) continue;
        struct check_random r = check_case_random(&test, i);
        struct mha_case c;
        char text[512];
        unsigned features = 0;
        for (int64_t n = random_range(&r, 0, 7); n > 0; --n)
            features |= 1u << random_range(&r, 0, FEATURE_INDEX_pathological - 1);
        check_pool_reset();
        mha_case_make(&r, (enum attn_dtype)random_range(&r, 0, ATTN_DTYPES - 1), features, &c);
        mha_case_text(&c, text);
        check_plan(&test, &rung->table, &c.args, text);
        check_addresses(&test, &rung->table, &c, text);
    }
    check_close(&test);
}

/* ---- problems too large to exist ------------------------------------------------------------- */

struct huge {
    DLTensor q, k, v, table;
    int64_t q_shape[4], k_shape[4], v_shape[4], table_shape[2];
    struct attn_mha_fwd_args args;
};

static DLTensor nowhere(DLDataType type, int ndim, int64_t *shape)
{
    return (DLTensor){.data = (void *)(uintptr_t)64,
                      .device = {kDLCPU, 0},
                      .ndim = ndim,
                      .dtype = type,
                      .shape = shape};
}

static void make_huge(struct check_random *r, struct huge *h, char text[256])
{
    static const DLDataType types[] = {{kDLFloat, 32, 1}, {kDLBfloat, 16, 1}, {kDLFloat, 16, 1}};
    DLDataType type = types[random_range(r, 0, 2)];
    int64_t b = PICK(r, 1, 1, 7, 992, 993, 4096), h_k = PICK(r, 1, 2, 8, 128);
    int64_t h_q = h_k * PICK(r, 1, 4, 16), d = 8 * random_range(r, 1, 64),
            d_v = 8 * random_range(r, 1, 64);
    int64_t s_q = PICK(r, 0, 1, 2, 128, 8192, 1 << 20), page = PICK(r, 0, 0, 1, 16, 4096);
    int64_t s_k = PICK(r, 0, 1, 255, 4096, 1 << 17, 1 << 24, (1 << 30) - 1, INT32_MAX - 1024);
    int64_t pages = page ? s_k / page : 0;
    memcpy(h->q_shape, (int64_t[]){b, s_q, h_q, d}, sizeof h->q_shape);
    memcpy(h->k_shape, (int64_t[]){page ? pages : b, page ? page : s_k, h_k, d}, sizeof h->k_shape);
    memcpy(h->v_shape, (int64_t[]){page ? pages : b, page ? page : s_k, h_k, d_v},
           sizeof h->v_shape);
    memcpy(h->table_shape, (int64_t[]){b, pages}, sizeof h->table_shape);
    h->q = nowhere(type, 4, h->q_shape);
    h->k = nowhere(type, 4, h->k_shape);
    h->v = nowhere(type, 4, h->v_shape);
    h->table = nowhere((DLDataType){kDLInt, 32, 1}, 2, h->table_shape);
    h->args = (struct attn_mha_fwd_args){
        .size = sizeof h->args,
        .threads = 1,
        .q = &h->q,
        .k = &h->k,
        .v = &h->v,
        .page_table = page ? &h->table : NULL,
        .softmax_scale = 0.1,
        .window_left = -1,
        .window_right = -1,
        .causal = random_percent(r, 50),
        .num_splits = (int32_t)PICK(r, 0, 0, 1, 2, 77, 256),
    };
    snprintf(text, 256, "b %d s_q %d s_k %d h %d/%d d %d/%d page %d num_splits %d", (int)b,
             (int)s_q, (int)s_k, (int)h_q, (int)h_k, (int)d, (int)d_v, (int)page,
             h->args.num_splits);
}

static void check_huge(const struct check_rung *rung)
{
    struct check_test test;
    if (!check_open(&test, "mha_plan", rung->name, "", "huge problems")) return;
    for (int64_t i = 0; i < check_rounds(3000); ++i) {
        if (check_options.only_case >= 0 && check_options.only_case != i) continue;
        struct check_random r = check_case_random(&test, i);
        struct huge h;
        char text[256];
        make_huge(&r, &h, text);
        check_plan(&test, &rung->table, &h.args, text);
    }
    check_close(&test);
}

/* ---- run allocates nothing ------------------------------------------------------------------- */

static void check_allocation(const struct check_rung *rung)
{
    struct check_test test;
    if (!check_allocations_counted()) return;
    if (!check_open(&test, "mha_plan", rung->name, "", "run allocates nothing")) return;
    for (int64_t i = 0; i < check_rounds(40); ++i) {
        if (check_options.only_case >= 0 && check_options.only_case != i) continue;
        struct check_random r = check_case_random(&test, i);
        struct mha_case c;
        char text[512];
        check_pool_reset();
        unsigned features = 1u << random_range(&r, 0, FEATURE_INDEX_pathological - 1);
        features |= 1u << random_range(&r, 0, FEATURE_INDEX_pathological - 1);
        mha_case_make(&r, (enum attn_dtype)random_range(&r, 0, ATTN_DTYPES - 1), features, &c);
        struct mha_run run = {.c = &c, .table = &rung->table, .threads = i % 2 ? 1 : 3};
        test.cases += 1;
        mha_case_restore(&c);
        if (!check_guarded(&test, mha_run_case, &run) || run.status) continue; /* the warm-up */
        mha_case_restore(&c);
        int64_t before = check_allocations();
        if (!check_guarded(&test, mha_run_case, &run)) continue;
        int64_t count = check_allocations() - before + check_options.broken;
        if (count)
            check_fail(&test, "%s: %s: %lld allocations with %d threads", mha_case_text(&c, text),
                       run.plan.kernel, (long long)count, run.threads);
    }
    check_close(&test);
}

void check_mha_plan(void)
{
    const struct check_rung *rungs;
    int n = check_rungs(&rungs);
    for (int i = 0; i < n; ++i) {
        check_cases(&rungs[i]);
        check_huge(&rungs[i]);
        check_allocation(&rungs[i]);
    }
}
