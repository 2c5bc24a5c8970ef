/* SPDX-License-Identifier: MIT
 *
 * Rotary kernels, row by row against fp64; and the conversions of core/dtype.h against the
 * definition of each type, since every other test reads and writes values through them.
 *
 * Rule: |got - exact| <= ulp / 2 of the dtype + 2^-22 (|x cos| + |y sin|): one rounding to the
 * dtype of an fp32 result.  What is not rotated keeps its bits.
 */
#include <math.h>
#include <string.h>

#include "check.h"
#include "cpu/threads.h"

struct rotary_case {
    const struct attn_rotary_kernel *kernel;
    const char *x, *cosines, *sines;
    char *y;
    int32_t d, r;
    bool interleaved;
};

static void run_rotary(void *context)
{
    const struct rotary_case *c = context;
    uint32_t state = attn_fp_enter();
    c->kernel->run(c->x, c->y, c->cosines, c->sines, c->d, c->r, c->interleaved);
    attn_fp_leave(state);
}

static void check_row(struct check_test *test, const struct rotary_case *c, enum attn_dtype t,
                      const char *x)
{
    int64_t bytes = attn_dtype_bytes(t), half = c->r / 2;
    for (int64_t i = 0; i < c->d; ++i) {
        double got = attn_load(t, c->y, i), want = attn_load(t, x, i), limit = 0;
        if (i < c->r) {
            int64_t m = c->interleaved ? i / 2 : i % half;
            bool second = c->interleaved ? i % 2 : i >= half;
            int64_t mate = c->interleaved ? i ^ 1 : second ? i - half : i + half;
            double a = want * attn_load(t, c->cosines, m);
            double b = (second ? 1 : -1) * (double)attn_load(t, x, mate) *
                       attn_load(t, c->sines, m);
            want = a + b;
            limit = check_ulp(t, want) * 0.5001 + 0x1p-22 * (fabs(a) + fabs(b)) + 0x1p-120;
        } else if (memcmp(c->y + i * bytes, x + i * bytes, (size_t)bytes) == 0) {
            continue;
        }
        if (fabs(got - want) <= limit && i < c->r) continue;
        check_fail(test, "%s: d %d r %d%s%s: element %d is %.9g, want %.9g within %.2g",
                   c->kernel->name, c->d, c->r, c->interleaved ? " interleaved" : "",
                   c->x == c->y ? " in place" : "", (int)i, got, want, limit);
        return;
    }
}

static void check_rotary_kernel(struct check_test *test, const struct attn_rotary_kernel *kernel,
                                enum attn_dtype t)
{
    for (int64_t i = 0; i < check_rounds(400); ++i) {
        if (check_options.only_case >= 0 && check_options.only_case != i) continue;
        struct check_random r = check_case_random(test, i);
        int64_t bytes = attn_dtype_bytes(t), d = 8 * random_range(&r, 2, 64);
        struct rotary_case c = {.kernel = kernel, .d = (int32_t)d};
        c.r = (int32_t)(16 * random_range(&r, 0, d / 16));
        c.interleaved = random_percent(&r, 50);
        check_pool_reset();
        struct check_buffer x = check_buffer((size_t)(d * bytes), (size_t)bytes);
        struct check_buffer y = check_buffer((size_t)(d * bytes), (size_t)bytes);
        struct check_buffer tables[2];
        check_fill_normal(&r, t, x.data, d, random_percent(&r, 20) ? 1e-3f : 1);
        for (int k = 0; k < 2; ++k) {
            tables[k] = check_buffer((size_t)(c.r / 2 * bytes), (size_t)bytes);
            for (int64_t m = 0; m < c.r / 2; ++m)
                attn_store(t, tables[k].data, m, (float)(2 * random_unit(&r) - 1));
        }
        char *before = memcpy(check_scratch(x.bytes), x.data, x.bytes);
        c.x = x.data;
        c.y = random_percent(&r, 30) ? x.data : y.data;
        c.cosines = tables[0].data;
        c.sines = tables[1].data;
        test->cases += 1;
        if (!check_guarded(test, run_rotary, &c)) continue;
        if (check_options.broken) attn_store(t, c.y, d - 1, attn_load(t, c.y, d - 1) + 1);
        check_row(test, &c, t, before);
        if (!check_buffer_intact(&x) || !check_buffer_intact(&y))
            check_fail(test, "%s: d %d r %d: bytes beside the row were written", kernel->name, c.d,
                       c.r);
    }
}

void check_rotary(void)
{
    const struct check_rung *rungs;
    int n = check_rungs(&rungs);
    for (int i = 0; i < n; ++i) {
        for (int t = 0; t < ATTN_DTYPES; ++t) {
            const struct attn_rotary_kernel *k = rungs[i].table.rotary[t];
            struct check_test test;
            if (!k || k == rungs[i - 1].table.rotary[t]) continue;
            if (check_options.kernel && !strstr(k->name, check_options.kernel)) continue;
            if (!check_open(&test, "rotary", rungs[i].name, attn_dtype_name((enum attn_dtype)t),
                            "%s", k->name))
                continue;
            check_rotary_kernel(&test, k, (enum attn_dtype)t);
            check_close(&test);
        }
    }
}

/* ---- conversions ----------------------------------------------------------------------------- */

/* Value of a pattern with these many exponent and mantissa bits, straight from the definition. */
static double decode(enum attn_dtype t, unsigned bits)
{
    static const int exponents[] = {8, 8, 5, 4}, mantissas[] = {23, 7, 10, 3};
    int e_bits = exponents[t], m_bits = mantissas[t], bias = (1 << (e_bits - 1)) - 1;
    unsigned e = bits >> m_bits & ((1u << e_bits) - 1), m = bits & ((1u << m_bits) - 1);
    double sign = bits >> (e_bits + m_bits) & 1 ? -1 : 1;
    bool top = e == (1u << e_bits) - 1;
    if (t == ATTN_F8 && top && m == 7) return NAN;
    if (t != ATTN_F8 && top) return m ? NAN : sign * INFINITY;
    if (e == 0) return sign * ldexp(m, 1 - bias - m_bits);
    return sign * ldexp(1.0 + ldexp(m, -m_bits), (int)e - bias);
}

/* Each pattern's value; it comes back to the same bits; halves between neighbours go to even. */
static void check_type(struct check_test *test, enum attn_dtype t)
{
    unsigned count = t == ATTN_F8 ? 256 : 65536, half = count / 2;
    for (unsigned bits = 0; bits < count; ++bits) {
        uint32_t back = 0, pattern = bits;
        float x = attn_load(t, &pattern, 0);
        double want = decode(t, bits);
        test->cases += 1;
        attn_store(t, &back, 0, x);
        bool nan = isnan(want);
        bool same = nan ? isnan(x) : (double)x == want && !signbit(x) == !signbit(want);
        if (!same || (!nan && back != bits) || (nan && !isnan(attn_load(t, &back, 0)))) {
            check_fail(test, "pattern 0x%x is %g, want %g, and rounds to 0x%x", bits, (double)x,
                       want, back);
            return;
        }
        double next = decode(t, bits + 1);
        if ((bits & (half - 1)) == half - 1 || !isfinite(want) || !isfinite(next)) continue;
        float middle = (float)((want + next) / 2);
        attn_store(t, &back, 0, middle);
        unsigned low, high;
        attn_store(t, memset(&low, 0, 4), 0, nextafterf(middle, x));
        attn_store(t, memset(&high, 0, 4), 0, nextafterf(middle, (float)next));
        if (back == bits + (bits & 1) && low == bits && high == bits + 1) continue;
        check_fail(test, "%g, between 0x%x and its neighbour, rounds to 0x%x", (double)middle, bits,
                   back);
        return;
    }
}

void check_dtype(void)
{
    for (int t = ATTN_BF16; t < ATTN_DTYPES; ++t) {
        struct check_test test;
        if (check_options.broken ||
            !check_open(&test, "dtype", "", attn_dtype_name((enum attn_dtype)t), "conversions"))
            continue;
        check_type(&test, (enum attn_dtype)t);
        check_close(&test);
    }
}
