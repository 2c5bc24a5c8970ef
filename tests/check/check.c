/* SPDX-License-Identifier: MIT
 *
 * attn_check: every kernel of every rung this machine has against the fp64 oracle, hostile calls,
 * plans and threads, in one C program after the manner of checkasm.  See check.h and --help.
 */
#define _DEFAULT_SOURCE

#include "check.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "attn/attn.h"

struct check_options check_options = {.only_case = -1, .repeat = 1};

/* libgomp is not instrumented, so under the thread sanitizer only `threads` runs by default. */
static const struct op {
    const char *name;
    void (*run)(void);
    bool tsan;
} ops[] = {
    {"dtype", check_dtype, false},
    {"rotary", check_rotary, false},
    {"split_combine", check_split_combine, false},
    {"mha_kernel", check_mha_kernel, false},
    {"control", check_control, false},
    {"mha_fwd", check_mha_fwd, false},
    {"mha_plan", check_mha_plan, false},
    {"mla", check_mla, false},
    {"mla_hostile", check_mla_hostile, false},
    {"kda", check_kda, false},
    {"hostile", check_hostile, false},
    {"threads", check_threads, true},
};

/* ---- verdicts -------------------------------------------------------------------------------- */

static int64_t passed, failed, total_cases;
static struct check_test *volatile running;
static sigjmp_buf net;
static volatile sig_atomic_t net_spread;
static pthread_t main_thread;

int check_rounds(int n)
{
    int64_t rounds = check_options.quick ? (n + 4) / 5 : n;
    return (int)(rounds * check_options.repeat);
}

static uint64_t hash_text(uint64_t h, const char *s)
{
    for (; *s; ++s) h = (h ^ (unsigned char)*s) * 0x100000001b3u;
    return h;
}

bool check_open(struct check_test *t, const char *op, const char *isa, const char *dtype,
                const char *format, ...)
{
    const struct check_options *o = &check_options;
    va_list arguments;
    memset(t, 0, sizeof *t);
    snprintf(t->op, sizeof t->op, "%s", op);
    snprintf(t->isa, sizeof t->isa, "%s", isa);
    snprintf(t->dtype, sizeof t->dtype, "%s", dtype);
    va_start(arguments, format);
    vsnprintf(t->name, sizeof t->name, format, arguments);
    va_end(arguments);
    /* The rung is left out: every rung sees the same cases. */
    t->seed = hash_text(hash_text(hash_text(o->seed ^ 0xcbf29ce484222325u, op), dtype), t->name);
    if ((o->isa && *isa && strcmp(o->isa, isa)) ||
        (o->dtype && *dtype && strcmp(o->dtype, dtype)) || (o->test && !strstr(t->name, o->test)))
        return false;
    if (o->list) {
        printf("%s %s %s %s\n", op, isa, dtype, t->name);
        return false;
    }
    t->open = true;
    t->start = check_seconds();
    return true;
}

void check_close(struct check_test *t)
{
    if (!t->open) return;
    t->open = false;
    bool ok = (t->failures == 0) != check_options.broken || t->cases == 0;
    *(ok ? &passed : &failed) += 1;
    total_cases += t->cases;
    if (!ok || check_options.verbose)
        printf("%-6s %-14s %-10s %-5s %-44s %5" PRId64 " cases %6.2f s\n", ok ? "ok" : "FAILED",
               t->op, t->isa, t->dtype, t->name, t->cases, check_seconds() - t->start);
}

void check_fail(struct check_test *t, const char *format, ...)
{
    if (++t->failures > (check_options.verbose ? 20 : 3) || check_options.broken) return;
    va_list arguments;
    printf("  %s %s %s %s: ", t->op, t->isa, t->dtype, t->name);
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    printf("\n    again: attn_check --op %s --isa '%s' --dtype '%s' --test '%s' --seed %" PRIu64
           " --case %" PRId64 "\n",
           t->op, t->isa, t->dtype, t->name, check_options.seed, t->index);
    fflush(stdout);
}

void check_note(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    putchar('\n');
    fflush(stdout);
}

static void on_signal(int number)
{
    if (net_spread && pthread_equal(pthread_self(), main_thread)) siglongjmp(net, number);
    char text[256];
    const struct check_test *t = running;
    int n = snprintf(text, sizeof text,
                     "attn_check: signal %d outside the net, in %s %s %s %s case "
                     "%" PRId64 " seed %" PRIu64 "\n",
                     number, t ? t->op : "", t ? t->isa : "", t ? t->dtype : "", t ? t->name : "",
                     t ? t->index : 0, check_options.seed);
    if (write(2, text, (size_t)n) < 0) _exit(4);
    _exit(3);
}

static void catch_signals(void)
{
    struct sigaction action = {.sa_flags = SA_NODEFER};
    action.sa_handler = on_signal;
    sigemptyset(&action.sa_mask);
    const int numbers[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; ++i) sigaction(numbers[i], &action, 0);
    main_thread = pthread_self();
}

bool check_guarded(struct check_test *t, void (*f)(void *), void *context)
{
    running = t;
    int number = sigsetjmp(net, 1);
    if (number == 0) {
        net_spread = 1;
        f(context);
    }
    net_spread = 0;
    if (number) check_fail(t, "signal %d (%s)", number, strsignal(number));
    return number == 0;
}

/* ---- rungs ----------------------------------------------------------------------------------- */

int check_rungs(const struct check_rung **rungs)
{
    static const struct {
        const char *name;
        unsigned adds;
    } ladder[] = {{"avx2", ATTN_CPU_AVX2},
                  {"avx512", ATTN_CPU_AVX512},
                  {"avx512bf16", ATTN_CPU_AVX512BF16},
                  {"amx", ATTN_CPU_AMX}};
    static struct check_rung made[5];
    static int count;
    if (count == 0) {
        made[count++].name = "c";
        unsigned have = attn_cpu_can(), mask = 0;
        for (size_t i = 0; i < sizeof ladder / sizeof *ladder; ++i) {
            if (!(have & ladder[i].adds)) continue;
            mask |= ladder[i].adds;
            made[count].name = ladder[i].name;
            attn_cpu_init_x86(&made[count].table, mask);
            /* A rung that changes no entry would only be tested twice. */
            count += memcmp(&made[count].table, &made[count - 1].table, sizeof made->table) != 0;
        }
    }
    *rungs = made;
    return count;
}

/* ---- random numbers -------------------------------------------------------------------------- */

double random_normal(struct check_random *r)
{
    double u = random_unit(r) + 0x1p-54, v = random_unit(r);
    return sqrt(-2 * log(u)) * cos(6.283185307179586 * v);
}

int64_t random_edge(struct check_random *r, int64_t max)
{
    int64_t x;
    switch (random_range(r, 0, 7)) {
    case 0: x = random_range(r, 0, 2); break;
    case 1: x = max - random_range(r, 0, 1); break;
    case 2: x = 16 * random_range(r, 1, 20) + random_range(r, -1, 1); break;
    case 3: x = ((int64_t)1 << random_range(r, 3, 9)) + random_range(r, -1, 1); break;
    default: x = random_range(r, 0, max); break;
    }
    return x < 0 ? 0 : x > max ? max : x;
}

struct check_random check_case_random(struct check_test *t, int64_t index)
{
    t->index = index;
    struct check_random r = {t->seed + (uint64_t)index * 0x632be59bd9b4e019u};
    random_next(&r);
    return r;
}

double check_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- the command line ------------------------------------------------------------------------ */

static const char usage[] =
    "attn_check: tests of libattn's CPU kernels\n"
    "  --op NAME       one of: dtype rotary split_combine mha_kernel control mha_fwd mha_plan\n"
    "                  hostile mla mla_hostile kda threads\n"
    "  --kernel PART   kernels whose name holds PART (ops that test kernels alone, and --bench)\n"
    "  --isa NAME      c, ref, avx2, avx512, avx512bf16, amx or sm90\n"
    "  --dtype NAME    fp32, bf16, fp16 or fp8\n"
    "  --test PART     tests whose name holds PART\n"
    "  --seed N        default: the time; printed\n"
    "  --case N        this case of each test only\n"
    "  --repeat N      N times as many cases\n"
    "  --bench         times instead of tests\n"
    "  --break         spoil every result: each test must notice\n"
    "  --quick         a fifth of the cases; the default of sanitizer builds\n"
    "  --list          names of tests\n"
    "  --verbose       a line a test\n";

static int64_t parse_number(const char *option, const char *text)
{
    char *end;
    errno = 0;
    unsigned long long n = strtoull(text, &end, 0);
    if (*end || end == text || errno) {
        fprintf(stderr, "attn_check: %s: expected a number, got %s\n", option, text);
        exit(2);
    }
    return (int64_t)n;
}

static void parse(int argc, char **argv)
{
    struct check_options *o = &check_options;
    o->seed = (uint64_t)time(NULL);
    o->quick = CHECK_SANITIZED;
    for (int i = 1; i < argc; ++i) {
        const char *a = argv[i], *value = i + 1 < argc ? argv[i + 1] : "";
        bool flag = true;
        if (!strcmp(a, "--bench"))
            o->bench = true;
        else if (!strcmp(a, "--break"))
            o->broken = true;
        else if (!strcmp(a, "--quick"))
            o->quick = true;
        else if (!strcmp(a, "--verbose"))
            o->verbose = true;
        else if (!strcmp(a, "--list"))
            o->list = true;
        else
            flag = false;
        if (flag) continue;
        i += 1;
        if (!strcmp(a, "--op"))
            o->op = value;
        else if (!strcmp(a, "--kernel"))
            o->kernel = value;
        else if (!strcmp(a, "--isa"))
            o->isa = *value ? value : NULL;
        else if (!strcmp(a, "--dtype"))
            o->dtype = *value ? value : NULL;
        else if (!strcmp(a, "--test"))
            o->test = value;
        else if (!strcmp(a, "--seed"))
            o->seed = (uint64_t)parse_number(a, value);
        else if (!strcmp(a, "--case"))
            o->only_case = parse_number(a, value);
        else if (!strcmp(a, "--repeat"))
            o->repeat = (int)parse_number(a, value);
        else {
            fputs(usage, strcmp(a, "--help") ? stderr : stdout);
            exit(strcmp(a, "--help") ? 2 : 0);
        }
    }
}

int main(int argc, char **argv)
{
    parse(argc, argv);
    const struct check_options *o = &check_options;
    catch_signals();
    if (o->bench) {
        check_bench();
        return 0;
    }
    if (!o->list)
        check_note("libattn %s, rung %s, seed %" PRIu64 "%s%s", attn_version(), attn_cpu_rung(),
                   o->seed, o->quick ? ", quick" : "", o->broken ? ", results spoiled" : "");
    for (size_t i = 0; i < sizeof ops / sizeof *ops; ++i) {
        if (o->op ? strcmp(o->op, ops[i].name) != 0 : CHECK_TSAN && !ops[i].tsan) continue;
        double start = check_seconds();
        int64_t before[3] = {passed, failed, total_cases};
        ops[i].run();
        check_pool_reset();
        if (!o->list)
            check_note("%-14s %5" PRId64 " passed %4" PRId64 " failed %7" PRId64 " cases %6.1f s",
                       ops[i].name, passed - before[0], failed - before[1], total_cases - before[2],
                       check_seconds() - start);
    }
    if (!o->list) check_note("%" PRId64 " passed, %" PRId64 " failed", passed, failed);
    if (!o->list && passed + failed == 0)
        check_note(
            "nothing ran: no test has this op, dtype and name, or this machine has no such rung");
    return failed != 0;
}
