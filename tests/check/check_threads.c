/* SPDX-License-Identifier: MIT
 *
 * Callers: many threads at once, a child after fork, a parallel region of the caller's own, and
 * callers with an odd floating-point state.  Results have the bits of a lone, plain call.
 *
 * Under the thread sanitizer (OMP_NUM_THREADS=1, since libgomp is not instrumented) this is all
 * that runs by default.
 */
#define _DEFAULT_SOURCE

#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check_run.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <xmmintrin.h>
#endif

#define CALLERS 12

/* One caller: a case of its own, planned and run once by the main thread. */
struct caller {
    struct mha_case c;
    struct attn_mha_fwd_plan plan;
    struct check_buffer workspace;
    struct mha_bits bits;
    int threads, calls;
    attn_status status;
    bool message_lost; /* an error text of another thread */
    pthread_t thread;
};

static void prepare(void *context)
{
    struct caller *a = context;
    a->c.args.threads = a->threads;
    a->plan.size = sizeof a->plan;
    a->status = attn_mha_fwd_plan(&a->c.args, &a->plan);
    if (a->status) return;
    mha_case_accum(&a->c, a->plan.splits);
    a->workspace = check_buffer((size_t)a->plan.workspace_bytes, 64);
    mha_case_restore(&a->c);
    a->status = attn_mha_fwd_run(&a->c.args, &a->plan, a->workspace.data, a->plan.workspace_bytes,
                                 NULL);
    a->bits = mha_bits_take(&a->c);
}

static void run_again(void *context)
{
    struct caller *a = context;
    a->status = attn_mha_fwd_run(&a->c.args, &a->plan, a->workspace.data, a->plan.workspace_bytes,
                                 NULL);
}

static void *call_many_times(void *context)
{
    struct caller *a = context;
    for (int i = 0; i < a->calls && a->status == ATTN_OK; ++i) {
        char wish[32];
        struct attn_mha_fwd_args broken = a->c.args;
        struct attn_mha_fwd_plan plan = {.size = sizeof plan};
        broken.num_splits = 1000 + (int)(a->plan.workspace_bytes % 1000) + i;
        snprintf(wish, sizeof wish, "%d", broken.num_splits);
        if (attn_mha_fwd_plan(&broken, &plan) == ATTN_OK) a->message_lost = true;
        attn_status status = attn_mha_fwd_plan(&a->c.args, &plan);
        if (status || memcmp(&plan, &a->plan, sizeof plan) != 0)
            a->status = ATTN_E_VALUE;
        else if (attn_mha_fwd_plan(&broken, &plan) == ATTN_OK || !strstr(attn_last_error(), wish))
            a->message_lost = true;
        if (a->status == ATTN_OK) run_again(a);
    }
    return NULL;
}

static void make_caller(struct check_random *r, struct caller *a, int threads)
{
    unsigned features = 0;
    for (int64_t n = random_range(r, 0, 4); n > 0; --n)
        features |= 1u << random_range(r, 0, FEATURE_INDEX_pathological - 1);
    mha_case_make(r, (enum attn_dtype)random_range(r, 0, ATTN_DTYPES - 1), features, &a->c);
    a->threads = threads;
}

static void judge(struct check_test *test, const struct caller *a, const char *when)
{
    char text[512];
    if (a->status || a->message_lost || !mha_bits_same(&a->c, &a->bits) || check_options.broken)
        check_fail(test, "%s: %s: %s: %s", mha_case_text(&a->c, text), a->plan.kernel, when,
                   a->status         ? "fails"
                   : a->message_lost ? "loses its message"
                                     : "other bits");
}

static void check_many_callers(void)
{
    struct check_test test;
    static struct caller callers[CALLERS];
    if (!check_open(&test, "threads", "", "", "%d callers at once", CALLERS)) return;
    for (int64_t i = 0; i < check_rounds(20); ++i) {
        struct check_random r = check_case_random(&test, i);
        check_pool_reset();
        memset(callers, 0, sizeof callers);
        for (int k = 0; k < CALLERS; ++k) {
            make_caller(&r, &callers[k], 1);
            callers[k].calls = check_options.quick ? 3 : 10;
            if (!check_guarded(&test, prepare, &callers[k])) return check_close(&test);
            test.cases += 1;
        }
        for (int k = 0; k < CALLERS; ++k)
            pthread_create(&callers[k].thread, NULL, call_many_times, &callers[k]);
        for (int k = 0; k < CALLERS; ++k) pthread_join(callers[k].thread, NULL);
        for (int k = 0; k < CALLERS; ++k) judge(&test, &callers[k], "beside other threads");
    }
    check_close(&test);
}

/* Parent's pool in use, then fork: the child, which has no pool, must neither hang nor differ. */
static void check_fork(void)
{
    struct check_test test;
    if (!check_open(&test, "threads", "", "", "a child after fork")) return;
    for (int64_t i = 0; i < check_rounds(10); ++i) {
        struct check_random r = check_case_random(&test, i);
        struct caller a;
        check_pool_reset();
        memset(&a, 0, sizeof a);
        make_caller(&r, &a, 3);
        test.cases += 1;
        if (!check_guarded(&test, prepare, &a) || a.status) continue;
        fflush(stdout);
        pid_t child = fork();
        if (child == 0) {
            alarm(60); /* a hang ends here */
            run_again(&a);
            _exit(a.status == ATTN_OK && mha_bits_same(&a.c, &a.bits) ? 0 : 1);
        }
        int how = 0;
        waitpid(child, &how, 0);
        if (how || check_options.broken) check_fail(&test, "the child ended with status 0x%x", how);
        run_again(&a);
        judge(&test, &a, "in the parent after fork");
    }
    check_close(&test);
}

static void check_nested(void)
{
    struct check_test test;
    if (!check_open(&test, "threads", "", "", "inside a parallel region")) return;
    for (int64_t i = 0; i < check_rounds(10); ++i) {
        struct check_random r = check_case_random(&test, i);
        static struct caller callers[2];
        check_pool_reset();
        memset(callers, 0, sizeof callers);
        for (int k = 0; k < 2; ++k) {
            make_caller(&r, &callers[k], 2);
            if (!check_guarded(&test, prepare, &callers[k])) return check_close(&test);
            test.cases += 1;
        }
#pragma omp parallel for num_threads(2) schedule(static, 1)
        for (int k = 0; k < 2; ++k) run_again(&callers[k]);
        for (int k = 0; k < 2; ++k) judge(&test, &callers[k], "inside a parallel region");
    }
    check_close(&test);
}

#if defined(__x86_64__)

struct state_call {
    struct caller *caller;
    unsigned state, after;
    bool tiles_after;
};

/* Whether the AMX registers of this thread hold anything: a configuration, or data. */
static bool tiles_in_use(void)
{
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) return false;          /* OSXSAVE */
    if (!__get_cpuid_count(13, 1, &a, &b, &c, &d) || !(a & (1u << 2))) return false; /* XINUSE */
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(1));
    return (low & (3u << 17)) != 0;
}

static void run_in_state(void *context)
{
    struct state_call *s = context;
    unsigned before = _mm_getcsr();
    _mm_setcsr(s->state);
    run_again(s->caller);
    s->after = _mm_getcsr();
    s->tiles_after = tiles_in_use();
    _mm_setcsr(before);
}

/* The caller's rounding mode, flushed denormals and traps are kept and have no influence; AMX tiles
 * are left empty. */
static void check_fp_state(void)
{
    static const struct {
        const char *name;
        unsigned state;
    } states[] = {
        {"round down", 0x3f80},
        {"round up", 0x5f80},
        {"round to zero", 0x7f80},
        {"FTZ and DAZ", 0x9fc0},
        {"DAZ, round up", 0x5fc0},
        {"flags set", 0x1fbf},
        {"invalid and division trap", 0x1d00},
    };
    struct check_test test;
    if (!check_open(&test, "threads", "", "", "the caller's MXCSR")) return;
    for (int64_t i = 0; i < check_rounds(30); ++i) {
        struct check_random r = check_case_random(&test, i);
        struct caller a;
        check_pool_reset();
        memset(&a, 0, sizeof a);
        make_caller(&r, &a, CHECK_TSAN ? 1 : (int)random_range(&r, 1, 3));
        if (!check_guarded(&test, prepare, &a) || a.status || strstr(a.plan.kernel, "_ref"))
            continue;
        for (size_t k = 0; k < sizeof states / sizeof *states; ++k) {
            struct state_call call = {.caller = &a, .state = states[k].state};
            char text[512];
            test.cases += 1;
            mha_case_restore(&a.c);
            bool survived = check_guarded(&test, run_in_state, &call);
            if (!survived) _mm_setcsr(0x1f80);
            judge(&test, &a, states[k].name);
            if (survived && (call.after & 0xffc0) != (states[k].state & 0xffc0))
                check_fail(&test, "%s: %s: MXCSR 0x%x came back as 0x%x", mha_case_text(&a.c, text),
                           states[k].name, states[k].state, call.after);
            if (survived && call.tiles_after)
                check_fail(&test, "%s: AMX tiles are left in use", mha_case_text(&a.c, text));
        }
    }
    check_close(&test);
}

#else
static void check_fp_state(void) {}
#endif

void check_threads(void)
{
    check_many_callers();
    if (!CHECK_TSAN) { /* which knows neither libgomp nor threads in a child */
        check_fork();
        check_nested();
    }
    check_fp_state();
}
