/* SPDX-License-Identifier: MIT
 *
 * mha_fwd as a whole, on every rung and on a Hopper GPU where there is one: each feature alone,
 * then random combinations, against the oracle of check_oracle.c.  Some cases run again with other
 * thread counts (on a GPU: as they are), and again with every query row but a few made NaN; the
 * bits must not change.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "check_gpu.h"
#include "check_run.h"
#include "cuda/module.h"

#define RUNNERS_MAX 32 /* the reference, those of check_rungs, and a dtype's kernels for the GPU */

struct runner {
    const char *name;
    const struct attn_cpu_kernels *table;
    const struct attn_cuda_kernel *kernel; /* NULL: a CPU */
};

static int runners(struct runner list[RUNNERS_MAX], enum attn_dtype dtype)
{
    const struct check_rung *rungs;
    int n = check_rungs(&rungs), count = 0;
    list[count++] = (struct runner){"ref", NULL, NULL};
    for (int i = 0; i < n; ++i)
        list[count++] = (struct runner){rungs[i].name, &rungs[i].table, NULL};
    for (int i = 0; check_gpu() && i < attn_mha_fwd_kernel_count; ++i)
        if (attn_mha_fwd_kernels[i].dtype == (int)dtype && count < RUNNERS_MAX)
            list[count++] = (struct runner){"sm90", NULL, &attn_mha_fwd_kernels[i]};
    return count;
}

/* The same case with other thread counts, and once more: not a bit may differ. */
static void check_threads_bits(struct check_test *test, struct mha_run *run, const char *text,
                               size_t mark)
{
    static const int threads[] = {1, 2, 3, 16};
    struct mha_bits bits = mha_bits_take(run->c);
    for (size_t i = 0; i < (run->gpu ? 1 : sizeof threads / sizeof *threads); ++i) {
        check_pool_release(mark);
        mha_case_restore(run->c);
        run->threads = threads[i];
        if (!check_guarded(test, mha_run_case, run)) return;
        if (run->status || !mha_bits_same(run->c, &bits)) {
            check_fail(test, "%s: %s: other bits with %d threads", text, run->plan.kernel,
                       threads[i]);
            return;
        }
    }
}

/* Rows are computed apart: with all but one query row NaN, that row keeps its bits. */
static void check_isolation(struct check_test *test, struct check_random *r, struct mha_run *run,
                            const char *text)
{
    struct mha_case *c = run->c;
    int64_t b = random_range(r, 0, c->b - 1), bytes = c->d_v * attn_dtype_bytes(c->out_dtype);
    if (c->seq[b].q_len == 0) return;
    int64_t keep = random_range(r, 0, c->seq[b].q_len - 1), head = random_range(r, 0, c->h_q - 1);
    const struct check_buffer *q = &c->tensor[ARG_q].buffer;
    char *q_before = memcpy(check_scratch(q->bytes), q->data, q->bytes), out[512 * 4];
    float lse = *mha_lse_at(c, b, keep, head);
    memcpy(out, mha_out_at(c, b, keep, head), (size_t)bytes);
    check_buffer_protect(q, false);
    for (int64_t a = 0; a < c->b; ++a)
        for (int64_t i = 0; i < c->seq[a].q_len; ++i)
            for (int64_t h = 0; h < c->h_q; ++h)
                if (a != b || i != keep || h != head)
                    check_fill_nan(c->dtype, mha_q_at(c, ARG_q, a, i, h), c->d_qk);
    mha_case_restore(c);
    run->threads = 1;
    bool same = check_guarded(test, mha_run_case, run) && run->status == ATTN_OK &&
                memcmp(out, mha_out_at(c, b, keep, head), (size_t)bytes) == 0 &&
                memcmp(&lse, mha_lse_at(c, b, keep, head), sizeof lse) == 0;
    memcpy(q->data, q_before, q->bytes);
    if (!same)
        check_fail(test, "%s: %s: sequence %d row %d head %d depends on the other rows", text,
                   run->plan.kernel, (int)b, (int)keep, (int)head);
}

static void check_one(struct check_test *test, struct check_random r, const struct runner *runner,
                      struct mha_case *c, const struct mha_answer *answer, bool thorough)
{
    char text[512], why[400];
    struct mha_run run = {.c = c, .table = runner->table, .threads = 1};
    run.gpu = runner->kernel != NULL;
    if (run.gpu) run.kernel = (int)(runner->kernel - attn_mha_fwd_kernels);
    size_t mark = check_pool_mark(); /* before the workspace and accumulators of a run */
    mha_case_text(c, text);
    mha_case_restore(c);
    test->cases += 1;
    if (!check_guarded(test, mha_run_case, &run)) return;
    if (run.gpu && (run.status == ATTN_E_NOT_BUILT || run.status == ATTN_E_SHAPE)) {
        test->cases -= 1; /* other head dims, features not built, rows that start off 16 bytes */
        return;
    }
    if (run.status) {
        check_fail(test, "%s: status %d: %s", text, (int)run.status, attn_last_error());
        return;
    }
    if (check_options.broken && !mha_case_spoil(&r, c, answer)) {
        test->cases -= 1; /* no live row */
        return;
    }
    if (run.complaint) check_fail(test, "%s: %s: %s", text, run.plan.kernel, run.complaint);
    if (!mha_case_compare(c, answer, why)) {
        check_fail(test, "%s: %s splits %d: %s", text, run.plan.kernel, run.plan.splits, why);
        return;
    }
    if (check_options.broken || !thorough) return;
    if (!run.gpu && (!run.table || !run.table->mha_fwd[c->dtype])) return;
    check_threads_bits(test, &run, text, mark);
    check_pool_release(mark);
    if (c->live_rows > 1 && !(c->features & WITH_pathological))
        check_isolation(test, &r, &run, text);
}

static unsigned random_features(struct check_random *r)
{
    unsigned f = 0;
    int64_t n = random_range(r, 2, 7);
    for (int64_t i = 0; i < n; ++i) f |= 1u << random_range(r, 0, MHA_FEATURE_COUNT - 1);
    return f;
}

/* `features` of every case, or -1: drawn for each. */
static void check_features(enum attn_dtype dtype, const char *name, int features, int rounds)
{
    struct runner list[RUNNERS_MAX];
    struct check_test tests[RUNNERS_MAX];
    int n = runners(list, dtype), open = 0;
    for (int i = 0; i < n; ++i) {
        const char *tile = list[i].kernel ? strstr(list[i].kernel->name, "_d") : "";
        open += check_open(&tests[i], "mha_fwd", list[i].name, attn_dtype_name(dtype), "%s%s", name,
                           tile);
    }
    for (int64_t i = 0; i < rounds && open; ++i) {
        if (check_options.only_case >= 0 && check_options.only_case != i) continue;
        struct check_random r = check_case_random(&tests[0], i);
        struct mha_case c;
        struct mha_answer answer;
        check_pool_reset();
        mha_case_make(&r, dtype, features < 0 ? random_features(&r) : (unsigned)features, &c);
        mha_case_answer(&c, &answer);
        for (int k = 0; k < n; ++k) {
            bool kernels = list[k].kernel || (list[k].table && list[k].table->mha_fwd[dtype]);
            int64_t every = kernels         ? 1
                            : list[k].table ? 8
                                            : 2; /* the slow reference, less often */
            if (!tests[k].open || (i % every && check_options.only_case < 0)) continue;
            size_t mark = check_pool_mark();
            tests[k].index = i;
            check_one(&tests[k], r, &list[k], &c, &answer, i % 4 == 0);
            mha_case_accum(&c, 1);
            check_pool_release(mark);
        }
    }
    for (int i = 0; i < n; ++i) check_close(&tests[i]);
}

void check_mha_fwd(void)
{
    for (int t = 0; t < ATTN_DTYPES; ++t) {
        enum attn_dtype dtype = (enum attn_dtype)t;
        check_features(dtype, "plain", 0, check_rounds(12));
        for (int f = 0; f < MHA_FEATURE_COUNT; ++f) {
            if (f == FEATURE_INDEX_qv && dtype == ATTN_F8) continue;
            if (f == FEATURE_INDEX_descale && dtype != ATTN_F8) continue;
            check_features(dtype, mha_feature_name[f], 1 << f, check_rounds(12));
        }
        check_features(dtype, "mix", -1, check_rounds(120));
    }
}

/* A case on a GPU hides keys behind large numbers, then behind NaN again (check_gpu.c): its caches
 * are then as they were made. */
static void check_hidden(enum attn_dtype dtype)
{
    static const unsigned masks[] = {WITH_causal, WITH_window, WITH_chunk, WITH_chunk | WITH_paged};
    struct check_test test;
    if (!check_open(&test, "control", "", attn_dtype_name(dtype), "hidden keys are NaN again"))
        return;
    for (int64_t i = 0; i < check_rounds(400); ++i) {
        struct check_random r = check_case_random(&test, i);
        struct mha_case c;
        char text[512];
        check_pool_reset();
        mha_case_make(&r, dtype, masks[i % 4] | WITH_pathological, &c);
        if (!c.hidden) continue;
        const struct check_buffer *k = &c.tensor[ARG_k].buffer, *v = &c.tensor[ARG_v].buffer;
        check_buffer_protect(k, false);
        check_buffer_protect(v, false);
        mha_case_hide(&c, 3e4f);
        mha_case_hide(&c, check_options.broken ? 0 : NAN);
        test.cases += 1;
        if (memcmp(k->data, c.k_before, k->bytes) != 0 ||
            memcmp(v->data, c.v_before, v->bytes) != 0)
            check_fail(&test, "%s", mha_case_text(&c, text));
    }
    check_close(&test);
}

/* The comparison itself: each way of spoiling a result must be noticed. */
void check_control(void)
{
    static const unsigned features[] = {0,
                                        WITH_causal,
                                        WITH_packed_q | WITH_seqused_q,
                                        WITH_append | WITH_paged,
                                        WITH_sinks,
                                        WITH_splits};
    for (int t = 0; t < ATTN_DTYPES; ++t) {
        struct check_test test;
        check_hidden((enum attn_dtype)t);
        if (!check_open(&test, "control", "", attn_dtype_name((enum attn_dtype)t),
                        "spoiled results are caught"))
            continue;
        for (int64_t i = 0; i < check_rounds(60); ++i) {
            struct check_random r = check_case_random(&test, i);
            struct mha_case c;
            struct mha_answer answer;
            char why[400], text[512];
            check_pool_reset();
            mha_case_make(&r, (enum attn_dtype)t, features[i % 6], &c);
            mha_case_answer(&c, &answer);
            struct mha_run run = {.c = &c, .threads = 1};
            mha_case_restore(&c);
            if (!check_guarded(&test, mha_run_case, &run)) continue;
            bool right = mha_case_compare(&c, &answer, why);
            if (!right) check_fail(&test, "%s: %s", mha_case_text(&c, text), why);
            if (!right || !mha_case_spoil(&r, &c, &answer)) continue;
            test.cases += 1;
            if (mha_case_compare(&c, &answer, why) != check_options.broken)
                check_fail(&test, "%s: a spoiled result passed", mha_case_text(&c, text));
        }
        check_close(&test);
    }
}
