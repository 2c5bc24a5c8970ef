/* SPDX-License-Identifier: MIT
 *
 * The products of mha_decode_vec.h by fp32 multiply-adds: elements are widened as row_<isa>.h does,
 * a step is its pair of vectors, and V is taken a key at a time.  decode_dot.h gives the same
 * names.
 */
#ifndef ATTN_CPU_X86_DECODE_FMA_H
#define ATTN_CPU_X86_DECODE_FMA_H

#include "core/dtype.h"

enum {
    STEP = 2 * VEC_LANES, /* elements of a row taken together */
    Q_STEP = STEP,        /* floats that a step of q takes in scratch */
    V_KEYS = 1,           /* keys whose V is taken together */
    ROUNDED = 0,          /* P is multiplied as it is */
};

/* STEP elements of a row. */
struct step {
    vec a, b;
};

VEC_INLINE struct step step_load(enum attn_dtype t, const char *p)
{
    struct step x;
    vec_load_pair(t, p, &x.a, &x.b);
    return x;
}

/* The first n; zeros for the others. */
VEC_INLINE struct step step_load_part(enum attn_dtype t, const char *p, int n)
{
    struct step x;
    vec_load_pair_part(t, p, n, &x.a, &x.b);
    return x;
}

VEC_INLINE struct step step_zero(void) { return (struct step){vec_zero(), vec_zero()}; }

/* What a step is to be multiplied with to give its elements' values. */
VEC_INLINE float step_scale(enum attn_dtype t) { return vec_pair_scale(t); }

VEC_INLINE struct step query_load(const float *q)
{
    return (struct step){vec_load(q), vec_load(q + VEC_LANES)};
}

VEC_INLINE void query_store(float *q, struct step x)
{
    vec_store(q, x.a);
    vec_store(q + VEC_LANES, x.b);
}

/* sum + k . q, spread over lanes. */
VEC_INLINE vec step_dot(struct step k, struct step q, vec sum)
{
    return vec_fma(k.b, q.b, vec_fma(k.a, q.a, sum));
}

/* A step of V of V_KEYS keys as two vectors of columns. */
VEC_INLINE void step_columns(const struct step v[V_KEYS], vec x[2]) { x[0] = v->a, x[1] = v->b; }

VEC_INLINE vec add_values(vec weight, vec x, vec sum) { return vec_fma(weight, x, sum); }

/* The two vectors of step_columns in the order of elements. */
VEC_INLINE void columns_in_order(enum attn_dtype t, vec *a, vec *b) { vec_unpair(t, a, b); }

/* P as add_values wants it; *rounded: its values there. */
VEC_INLINE vec weights(vec p, vec *rounded) { return *rounded = p; }

#endif
