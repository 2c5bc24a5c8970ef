/* SPDX-License-Identifier: MIT
 *
 * kda_fwd and kda_step on a CPU: the plan, the driver that cuts a problem into kernel tasks, and
 * the scalar reference.  What they share about one sequence is here too.
 */
#ifndef ATTN_CPU_KDA_H
#define ATTN_CPU_KDA_H

#include "cpu/kernels.h"
#include "ops/kda.h"

struct attn_kda_seq {
    int64_t row;        /* of q: the sequence's, or 0 when packed */
    int64_t start, len; /* its tokens in that row */
    int64_t slot;       /* of its states; -1: none */
};

/* Sequence i, of a problem whose values are checked. */
struct attn_kda_seq attn_kda_seq(const struct attn_kda_problem *p, int64_t i);

/* Checks cu_seqlens, state_indices and the room for checkpoints; ATTN_E_VALUE names the entry. */
attn_status attn_kda_check_values(const struct attn_kda_problem *p);

/* Row v of the state of head h in `slot`. */
static inline char *attn_kda_state(const struct attn_states *s, int64_t slot, int64_t h, int64_t v,
                                   int64_t d)
{
    return s->data + (slot * s->slot + h * s->head + v * d) * attn_dtype_bytes(s->dtype);
}

attn_status attn_kda_fwd_cpu_plan(const struct attn_kda_problem *p, struct attn_kda_fwd_plan *plan);
attn_status attn_kda_fwd_cpu_run(const struct attn_kda_problem *p,
                                 const struct attn_kda_fwd_plan *plan, char *workspace,
                                 int64_t workspace_bytes, void *stream);
attn_status attn_kda_step_cpu_run(const struct attn_kda_problem *p, void *stream);

/* The same with a table of the caller's: how the tests run every rung.  The plan must come from
 * the same table. */
attn_status attn_kda_fwd_cpu_plan_with(const struct attn_cpu_kernels *table,
                                       const struct attn_kda_problem *p,
                                       struct attn_kda_fwd_plan *plan);
attn_status attn_kda_fwd_cpu_run_with(const struct attn_cpu_kernels *table,
                                      const struct attn_kda_problem *p,
                                      const struct attn_kda_fwd_plan *plan, char *workspace,
                                      int64_t workspace_bytes);
attn_status attn_kda_step_cpu_run_with(const struct attn_cpu_kernels *table,
                                       const struct attn_kda_problem *p);

/* Token by token in fp64, straight from the definition (kda_ref.c).  The values are checked. */
void attn_kda_ref_run(const struct attn_kda_problem *p, int threads);

#endif
