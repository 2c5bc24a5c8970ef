/* SPDX-License-Identifier: MIT
 *
 * The check program's frame: options, random numbers, tests and their verdicts, guarded memory and
 * the clock.
 *
 * An op's file enumerates its tests; a test is opened (the filters may refuse it), runs any number
 * of cases, each under a net that turns a signal into a failure, and is closed.  Every case draws
 * from its own generator, made from the printed seed, the test's name and the case's number, so
 * one failing case can be run again alone.
 */
#ifndef ATTN_CHECK_H
#define ATTN_CHECK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "cpu/kernels.h"

#if defined(__has_feature)
#define CHECK_HAS(feature) __has_feature(feature)
#else
#define CHECK_HAS(feature) 0
#endif
#if defined(__SANITIZE_THREAD__) || CHECK_HAS(thread_sanitizer)
#define CHECK_TSAN 1
#else
#define CHECK_TSAN 0
#endif
#if CHECK_TSAN || defined(__SANITIZE_ADDRESS__) || CHECK_HAS(address_sanitizer)
#define CHECK_SANITIZED 1
#else
#define CHECK_SANITIZED 0
#endif

/* ---- options --------------------------------------------------------------------------------- */

struct check_options {
    const char *op, *kernel, *isa, *dtype, *test; /* NULL: all; kernel and test match a part */
    uint64_t seed;
    int64_t only_case; /* -1: all */
    int repeat;        /* rounds over new seeds */
    bool bench, quick, verbose, list;
    bool broken; /* spoil every result: each test must fail */
};
extern struct check_options check_options;

/* `n` cases in a normal run, fewer in a quick one (sanitizers), more with --repeat. */
int check_rounds(int n);

/* ---- tests ----------------------------------------------------------------------------------- */

struct check_test {
    char op[24], isa[16], dtype[8], name[72];
    uint64_t seed; /* of this test: the run's seed and the test's name */
    int64_t index; /* of the running case */
    int64_t cases, failures;
    bool open;
    double start;
};

/* False when a filter refuses the test; it is then closed already. */
bool check_open(struct check_test *test, const char *op, const char *isa, const char *dtype,
                const char *format, ...) __attribute__((format(printf, 5, 6)));
void check_close(struct check_test *test);

/* Records a failure of the running case; the first few of a test are printed. */
void check_fail(struct check_test *test, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* Runs f(context) as a part of the running case; a signal is a failure of `test`.  False then. */
bool check_guarded(struct check_test *test, void (*f)(void *context), void *context);

/* A line on stdout that is no verdict. */
void check_note(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* ---- ops ------------------------------------------------------------------------------------- */

void check_control(void); /* the negative control: spoiled results must be caught */
void check_dtype(void);   /* the conversions everything else rests on */
void check_rotary(void);
void check_split_combine(void);
void check_mha_kernel(void); /* kernels alone, task by task */
void check_mha_fwd(void);    /* the op: driver, plan and kernels together */
void check_mha_plan(void);
void check_mla(void); /* the mla ops with every rung's kernels */
void check_mla_hostile(void);
void check_kda(void); /* kda_fwd and kda_step */
void check_hostile(void);
void check_hostile_combine(void); /* called by check_hostile */
void check_threads(void);
void check_bench(void);

/* ---- rungs ----------------------------------------------------------------------------------- */

struct check_rung {
    const char *name;
    struct attn_cpu_kernels table; /* all NULL: the scalar reference behind the driver */
};

/* "c" and each rung this machine has, every one with its own table. */
int check_rungs(const struct check_rung **rungs);

/* ---- random numbers -------------------------------------------------------------------------- */

struct check_random {
    uint64_t state;
};

static inline uint64_t random_next(struct check_random *r)
{
    uint64_t z = r->state += 0x9e3779b97f4a7c15u; /* splitmix64 */
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* lo <= result <= hi */
static inline int64_t random_range(struct check_random *r, int64_t lo, int64_t hi)
{
    return lo + (int64_t)(random_next(r) % (uint64_t)(hi - lo + 1));
}

static inline bool random_percent(struct check_random *r, int percent)
{
    return random_range(r, 0, 99) < percent;
}

static inline double random_unit(struct check_random *r)
{
    return (double)(random_next(r) >> 11) * 0x1p-53;
}

double random_normal(struct check_random *r);

/* In [0, max], drawn to 0, 1, max and the neighbours of small and tile multiples. */
int64_t random_edge(struct check_random *r, int64_t max);

/* The generator of a test's case. */
struct check_random check_case_random(struct check_test *test, int64_t index);

#define PICK(r, ...)                                                                               \
    ((const int64_t[]){__VA_ARGS__})[random_range(                                                 \
        r, 0, (int64_t)(sizeof (int64_t[]){__VA_ARGS__} / sizeof(int64_t)) - 1)]

/* ---- guarded memory -------------------------------------------------------------------------- */

/* A buffer of its own pages between two that fault.  Its end is flush with the page behind it as
 * far as `align` allows, and all that is in its pages beside it is filled with CHECK_CANARY. */
struct check_buffer {
    char *data;
    size_t bytes;
    char *pages;
    size_t page_bytes;
};

#define CHECK_CANARY 0xc5 /* bf16 and fp32 -6328, fp16 -5.77: no result of ours */

/* From the pool that check_pool_reset empties.  The buffer itself is CHECK_CANARY, too. */
struct check_buffer check_buffer(size_t bytes, size_t align);
void check_buffer_protect(const struct check_buffer *buffer, bool read_only);
bool check_buffer_intact(const struct check_buffer *buffer); /* the bytes round it */
void check_pool_reset(void);
/* Gives back the buffers made since the mark was taken. */
size_t check_pool_mark(void);
void check_pool_release(size_t mark);

/* Zeroed scratch of the tests' own, gone with the next reset as well. */
void *check_scratch(size_t bytes);

/* ---- values ---------------------------------------------------------------------------------- */

/* n elements of dtype t, normally distributed with deviation `scale`. */
void check_fill_normal(struct check_random *r, enum attn_dtype t, void *to, int64_t n, float scale);
void check_fill_nan(enum attn_dtype t, void *to, int64_t n);

/* The unit in the last place of x in dtype t; half of it is a rounding's error. */
double check_ulp(enum attn_dtype t, double x);

/* Relative error of rounding to dtype t, half an ulp: 2^-24, 2^-9, 2^-12 or 2^-4. */
double check_unit(enum attn_dtype t);

double check_seconds(void);

/* Allocations of the process so far, where they can be counted. */
bool check_allocations_counted(void);
int64_t check_allocations(void);

#endif
