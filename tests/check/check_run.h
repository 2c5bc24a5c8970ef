/* SPDX-License-Identifier: MIT
 *
 * Running a case of mha_fwd: plan and run with the kernel table of a rung, in exactly the
 * workspace the plan asks for, or the scalar reference.
 */
#ifndef ATTN_CHECK_RUN_H
#define ATTN_CHECK_RUN_H

#include "check_case.h"

struct mha_run {
    struct mha_case *c;
    const struct attn_cpu_kernels *table; /* NULL: attn_mha_fwd_ref, or the GPU */
    bool gpu;
    int kernel; /* on a GPU: the line of mha_fwd.def to run, whatever the plan prefers */
    int threads;
    attn_status status;
    struct attn_mha_fwd_plan plan;
    struct check_buffer workspace;
    const char *complaint; /* of the run itself, NULL when there is none */
};

/* A struct mha_run, for check_guarded; the tensors must be as mha_case_restore leaves them. */
void mha_run_case(void *run);

/* The same on a Hopper GPU. */
void mha_run_on_gpu(struct mha_run *run);

attn_status mha_plan_with(const struct attn_cpu_kernels *table,
                          const struct attn_mha_fwd_args *args, struct attn_mha_fwd_plan *plan);

/* out, lse and both caches as they are now, to compare bits with a later run of the same case. */
struct mha_bits {
    char *data[4];
};
struct mha_bits mha_bits_take(const struct mha_case *c);
bool mha_bits_same(const struct mha_case *c, const struct mha_bits *bits);

/* Puts one wrong thing into a live row of the results; false when there is none. */
bool mha_case_spoil(struct check_random *r, struct mha_case *c, const struct mha_answer *answer);

#endif
