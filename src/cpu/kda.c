/* SPDX-License-Identifier: MIT
 *
 * kda_fwd and kda_step on a CPU.
 */
#include <stdio.h>

#include "cpu/kda.h"
#include "cpu/threads.h"

attn_status attn_kda_fwd_cpu_plan(const struct attn_kda_problem *p, struct attn_kda_fwd_plan *plan)
{
    (void)p;
    snprintf(plan->kernel, sizeof plan->kernel, "attn_kda_fwd_ref");
    return ATTN_OK;
}

attn_status attn_kda_fwd_cpu_run(const struct attn_kda_problem *p,
                                 const struct attn_kda_fwd_plan *plan, char *workspace,
                                 int64_t workspace_bytes, void *stream)
{
    (void)plan, (void)workspace, (void)workspace_bytes, (void)stream;
    ATTN_TRY(attn_kda_check_values(p));
    attn_kda_ref_run(p, attn_threads(p->threads, p->h * p->t));
    return ATTN_OK;
}

attn_status attn_kda_step_cpu_run(const struct attn_kda_problem *p, void *stream)
{
    (void)stream;
    ATTN_TRY(attn_kda_check_values(p));
    attn_kda_ref_run(p, attn_threads(p->threads, p->h * p->t));
    return ATTN_OK;
}
