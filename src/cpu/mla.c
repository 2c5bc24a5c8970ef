/* SPDX-License-Identifier: MIT
 *
 * The mla ops on a CPU: from a problem to kernel tasks.
 */
#include "cpu/mla.h"

#include <stdio.h>

#include "cpu/threads.h"

attn_status attn_mla_values_check(const struct attn_mla_problem *p)
{
    if (!p->block_table) return ATTN_OK;
    const struct attn_mla_cache *c = &p->cache[0];
    for (int64_t i = 0; i < p->b; ++i) {
        int64_t n = p->cache_seqlens[i];
        ATTN_CHECK(n >= 0 && n <= p->max_pages * c->page, ATTN_E_VALUE,
                   "cache_seqlens: expected in [0, %lld], the room of block_table, got %lld at %lld",
                   (long long)(p->max_pages * c->page), (long long)n, (long long)i);
        const int32_t *pages = p->block_table + i * p->block_table_row;
        for (int64_t j = 0; j * c->page < n; ++j)
            ATTN_CHECK(pages[j] >= 0 && pages[j] < c->num_pages, ATTN_E_VALUE,
                       "block_table: expected pages in [0, %lld), got %d at [%lld, %lld]",
                       (long long)c->num_pages, (int)pages[j], (long long)i, (long long)j);
    }
    return ATTN_OK;
}

attn_status attn_mla_cpu_plan_with(const struct attn_cpu_kernels *table,
                                   const struct attn_mla_problem *p, struct attn_mla_plan *plan)
{
    (void)table;
    snprintf(plan->kernel, sizeof plan->kernel, "attn_%s_ref", attn_mla_op_name(p->op));
    return ATTN_OK;
}

attn_status attn_mla_cpu_run_with(const struct attn_cpu_kernels *table,
                                  const struct attn_mla_problem *p,
                                  const struct attn_mla_plan *plan, char *workspace,
                                  int64_t workspace_bytes)
{
    (void)table, (void)plan, (void)workspace, (void)workspace_bytes;
    return attn_mla_ref_run(p, attn_threads(p->threads, p->b * p->s_q * p->h_q));
}

attn_status attn_mla_cpu_plan(const struct attn_mla_problem *p, struct attn_mla_plan *plan)
{
    return attn_mla_cpu_plan_with(attn_cpu_kernels(), p, plan);
}

attn_status attn_mla_cpu_run(const struct attn_mla_problem *p, const struct attn_mla_plan *plan,
                             char *workspace, int64_t workspace_bytes, void *stream)
{
    (void)stream;
    return attn_mla_cpu_run_with(attn_cpu_kernels(), p, plan, workspace, workspace_bytes);
}
