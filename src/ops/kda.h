/* SPDX-License-Identifier: MIT
 *
 * kda_fwd and kda_step: the contract.  The two checks end in one problem, as kda_step is kda_fwd of
 * short sequences whose state is changed in place.
 */
#ifndef ATTN_OPS_KDA_H
#define ATTN_OPS_KDA_H

#include <stdbool.h>

#include "core/dtype.h"
#include "core/status.h"
#include "ops/rows.h"

#define ATTN_KDA_STEP_MAX 16 /* tokens a sequence of kda_step */
#define ATTN_KDA_EPSILON 1e-6

/* States [slots, h, V, K]: row v of (i, j) at data + (i * slot + j * head + v * d) elements. */
struct attn_states {
    char *data; /* NULL: absent */
    int64_t slot, head;
    enum attn_dtype dtype; /* fp32 or bf16 */
};

struct attn_kda_problem {
    enum attn_dtype dtype;
    DLDevice device;
    int32_t threads;

    int64_t b, t; /* rows and their tokens; with cu_seqlens 1 and the packed total */
    int64_t n;    /* sequences */
    int64_t h, d; /* K = V = d */
    struct attn_rows q, k, v, g, out;
    const char *beta; /* element (i, t, h) at beta_batch, beta_row, beta_head, in elements */
    int64_t beta_batch, beta_row, beta_head;
    const float *A_log;   /* [h], NULL: 0 */
    const float *dt_bias; /* [h, d], NULL: 0 */
    int64_t dt_bias_head;

    const void *cu_seqlens; /* [n + 1] int32, or int64 with cu_wide; NULL: dense */
    bool cu_wide;
    const int32_t *state_indices; /* [n] or NULL */
    struct attn_states initial, final, checkpoint;
    int64_t slots;            /* of initial and final; n without state_indices */
    int64_t checkpoint_rows;  /* states there is room for */
    int64_t checkpoint_every; /* 0: none wanted */

    double scale, lower_bound;
    bool gate_activated, beta_activated;
    bool step; /* kda_step: initial is final, index -1 is padding, out becomes 0 */
};

attn_status attn_kda_fwd_check(const struct attn_kda_fwd_args *args,
                               struct attn_kda_problem *problem, bool outputs);
attn_status attn_kda_step_check(const struct attn_kda_step_args *args,
                                struct attn_kda_problem *problem);

/* plan->shape of a problem; run compares it. */
void attn_kda_fwd_shape(const struct attn_kda_problem *problem, int64_t shape[8]);

#endif
