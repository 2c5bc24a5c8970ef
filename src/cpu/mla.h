/* SPDX-License-Identifier: MIT
 *
 * The mla ops on a CPU: plan, driver, the scalar reference, and the rows of a cache.
 */
#ifndef ATTN_CPU_MLA_H
#define ATTN_CPU_MLA_H

#include "cpu/kernels.h"
#include "ops/mla.h"

/* Token o of page n for KV head h: its row, and in MODEL1 its scales. */
static inline char *attn_mla_row(const struct attn_mla_cache *c, int64_t n, int64_t o, int64_t h)
{
    return c->data + n * c->page_stride + o * c->row_stride + h * c->head_stride;
}

static inline char *attn_mla_scales(const struct attn_mla_cache *c, int64_t n, int64_t o)
{
    return c->data + n * c->page_stride + ATTN_MODEL1_ROW_BYTES * c->page + 8 * o;
}

/* x[0 .. d): the values of a stored row, quantised ones rounded to bf16. */
void attn_mla_row_values(enum attn_mla_format format, const char *row, const char *scales,
                         int64_t d, float *x);

/* Lengths and live block-table entries of a dense problem are in range; ATTN_E_VALUE names the one
 * that is not. */
attn_status attn_mla_values_check(const struct attn_mla_problem *p);

/* Entries of list `which` that token (i, t) uses. */
static inline int64_t attn_mla_list_length(const struct attn_mla_list *list, int64_t i)
{
    if (!list->topk || !list->length) return list->topk;
    int64_t n = list->length[i];
    return n < 0 ? 0 : n < list->topk ? n : list->topk;
}

attn_status attn_mla_cpu_plan(const struct attn_mla_problem *p, struct attn_mla_plan *plan);
attn_status attn_mla_cpu_run(const struct attn_mla_problem *p, const struct attn_mla_plan *plan,
                             char *workspace, int64_t workspace_bytes, void *stream);

/* The same with a table of the caller's: how the tests run every rung. */
attn_status attn_mla_cpu_plan_with(const struct attn_cpu_kernels *table,
                                   const struct attn_mla_problem *p, struct attn_mla_plan *plan);
attn_status attn_mla_cpu_run_with(const struct attn_cpu_kernels *table,
                                  const struct attn_mla_problem *p,
                                  const struct attn_mla_plan *plan, char *workspace,
                                  int64_t workspace_bytes);

/* Plain scalar C with fp64 sums, straight from the definition (mla_ref.c). */
attn_status attn_mla_ref_run(const struct attn_mla_problem *p, int threads);

attn_status attn_mla_cache_quantize_cpu(const struct attn_mla_cache_problem *p, void *stream);
attn_status attn_mla_cache_dequantize_cpu(const struct attn_mla_cache_problem *p, void *stream);

#endif
