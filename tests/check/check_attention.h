/* SPDX-License-Identifier: MIT
 *
 * Attention of one row over the keys it sees, in fp64, and what a low-precision result may differ
 * from it.  Both the tests of kernels and the tests of the op rest on this; it shares no code with
 * the library but the conversions of core/dtype.h.
 *
 * The rule.  With A = vd sum_j p_j mean_c |v_jc|, a row's own magnitude, an element passes when
 *
 *   |got - out| <= (2 low + floor) A + ulp(out) + 2 slack A     ulp: of the case's out dtype
 *
 * low    largest (|plain - out| - ulp(out) / 2) / A of all rows of the case, where plain is the
 *        same row in plain low precision: scores rounded to fp32, probabilities (the largest 1)
 *        rounded to the dtype (for fp8, to bf16), fp32 sums over the dtype's v, the result rounded
 *        to out's dtype.  For fp32, all of it, dot products and exponentials too, in fp32.
 * floor  2^-9 for bf16 and fp8, 2^-11 for fp16, 2^-20 for fp32: the library's exponential (1e-4
 *        where P is 16 bits wide) and its rescaling are rounded elsewhere than plain's.
 * slack  how far a score may be off: 4 2^-24 sqrt(d) |q| |k| |scale|, two fp32 roundings of the
 *        largest score, and 2^-20 of softcap.  Rows whose slack is above 0.2 (huge scores that
 *        cancel) have no result to compare; they must be finite and within v's range.
 *
 * lse passes within 2 |plain lse - lse| + floor + slack, with floor 1.5e-4 for 16 and 8 bits and
 * 2^-19 (1 + |lse|) for fp32.  Infinities and NaNs match exactly, and so does a row of zeros that
 * has no visible key; a row that sees a score of NaN or +inf is NaN, its lse NaN or +inf.
 */
#ifndef ATTN_CHECK_ATTENTION_H
#define ATTN_CHECK_ATTENTION_H

#include "check.h"

/* Rows converted to fp64 once, with what the rule wants to know of them. */
struct rows64 {
    double *x;    /* [n][d] */
    double *norm; /* [n] sqrt(sum x^2), of finite elements */
    double *mean; /* [n] mean |x|, of finite elements */
    int64_t n, d;
};

struct rows64 rows64_make(int64_t n, int64_t d);
void rows64_set(struct rows64 *rows, int64_t i, enum attn_dtype t, const void *from);

/* One row's question. */
struct attention_row {
    const double *q, *qv; /* qv NULL: off */
    double q_norm, qv_norm;
    const struct rows64 *k, *v;
    const int32_t *keys; /* [n] the visible ones */
    int64_t n;
    double scale, softcap, out_scale;
    const double *sink; /* NULL: none */
    bool no_keys;       /* lse is +inf, not -inf */
    double extra_slack; /* of each score, from operands that may round either way */
};

/* All rows of a case. */
struct attention_expect {
    enum attn_dtype dtype, out_dtype;
    int64_t rows, d_v;
    double *out; /* [rows][d_v] */
    struct {
        double lse, magnitude, slack, largest;
        bool exact; /* nothing visible: zeros, bit for bit */
    } *row;
    double low, low_lse; /* of the case */
};

struct attention_expect attention_expect(enum attn_dtype dtype, enum attn_dtype out_dtype,
                                         int64_t rows, int64_t d_v);
void attention_expect_row(struct attention_expect *e, int64_t at, const struct attention_row *row);

/* Whether row `at` came out right; if not, `why` says what is wrong. */
bool attention_matches(const struct attention_expect *e, int64_t at, const void *out, float lse,
                       char why[160]);

#endif
