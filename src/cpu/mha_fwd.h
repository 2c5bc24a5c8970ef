/* SPDX-License-Identifier: MIT
 *
 * mha_fwd on a CPU: the plan, the driver that cuts a problem into kernel tasks, and the scalar
 * reference.  What the driver and kv_append share about one sequence is here too.
 */
#ifndef ATTN_CPU_MHA_FWD_H
#define ATTN_CPU_MHA_FWD_H

#include "cpu/kernels.h"
#include "ops/mha_fwd.h"

/* One sequence, its lengths read and found in range. */
struct attn_cpu_seq {
    int64_t q_start, q_len; /* rows of the packed q (or 0), live rows */
    int64_t k_start,
        k_len;      /* first row of packed k (or 0); effective keys: cached - leftpad + new */
    int64_t cached; /* cache position where the append starts */
    int64_t new_start, new_len;
    int64_t leftpad, row; /* row: of the cache or the page table */
    int64_t rotary;       /* position of the first new key */
    int64_t total;        /* context parallel: global key count */
};

/* Reads and checks what the index tensors say of sequence i; ATTN_E_VALUE names the entry. */
attn_status attn_cpu_seq_read(const struct attn_mha_fwd_problem *p, int64_t i,
                              struct attn_cpu_seq *seq);

/* Bytes from a cache tensor's data to position x of the sequence, KV head 0. */
int64_t attn_cpu_cache_offset(const struct attn_mha_fwd_problem *p, const struct attn_rows *cache,
                              const struct attn_cpu_seq *seq, int64_t x);

/* Writes the new rows of every sequence into the caches, rotated where there is a table. */
void attn_kv_append_cpu(const struct attn_mha_fwd_problem *p, const struct attn_cpu_seq *seqs,
                        const struct attn_rotary_kernel *rotary, int threads);

/* Position of query row i in the rotary table. */
static inline int64_t attn_rotary_query_position(const struct attn_mha_fwd_problem *p,
                                                 const struct attn_cpu_seq *seq, int64_t i)
{
    return seq->rotary + (p->is_causal || p->is_local ? i : 0);
}

attn_status attn_mha_fwd_cpu_plan(const struct attn_mha_fwd_problem *p,
                                  struct attn_mha_fwd_plan *plan);
attn_status attn_mha_fwd_cpu_run(const struct attn_mha_fwd_problem *p,
                                 const struct attn_mha_fwd_plan *plan, char *workspace,
                                 int64_t workspace_bytes, void *stream);

/* The same with a table of the caller's: how the tests run every rung.  The plan must come from
 * the same table. */
attn_status attn_mha_fwd_cpu_plan_with(const struct attn_cpu_kernels *table,
                                       const struct attn_mha_fwd_problem *p,
                                       struct attn_mha_fwd_plan *plan);
attn_status attn_mha_fwd_cpu_run_with(const struct attn_cpu_kernels *table,
                                      const struct attn_mha_fwd_problem *p,
                                      const struct attn_mha_fwd_plan *plan, char *workspace,
                                      int64_t workspace_bytes);

/* Plain scalar C with fp64 sums, straight from the definition (mha_fwd_ref.c); in `splits` pieces
 * of `piece` keys when splits > 1. */
attn_status attn_mha_fwd_ref_run(const struct attn_mha_fwd_problem *p, int32_t splits,
                                 int64_t piece, int threads);

#endif
