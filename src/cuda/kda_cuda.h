/* SPDX-License-Identifier: MIT
 *
 * kda_fwd and kda_step on Hopper: what is decided on the host.
 */
#ifndef ATTN_CUDA_KDA_CUDA_H
#define ATTN_CUDA_KDA_CUDA_H

#include "cuda/module.h"
#include "ops/backend.h"

/* How a problem is cut into blocks: plain integers, tested without a GPU. */
struct attn_kda_cuda_plan {
    int32_t cluster; /* blocks of a (sequence, head), 64 value rows each */
    int32_t grid;
    int32_t ordered; /* 1: sequences longest first, items drawn from a counter */
    /* The workspace: a counter and the order, if ordered, then dense copies of what the copy engine
     * cannot address: of q, k, g, v in bits 0 to 3. */
    int32_t copied;
    int32_t out_aligned; /* 1: rows of out on multiples of 16 bytes */
    int64_t copy_bytes;  /* of one */
    int64_t workspace_bytes;
};

#define ATTN_KDA_TICKET_BYTES 64

void attn_kda_cuda_choose(const struct attn_kda_problem *p, int multiprocessors,
                          struct attn_kda_cuda_plan *plan);

/* What this back end does not take: NOT_BUILT, naming it. */
attn_status attn_kda_cuda_check(const struct attn_kda_problem *p);

attn_status attn_kda_fwd_cuda_plan(const struct attn_kda_problem *p,
                                   struct attn_kda_fwd_plan *plan);
attn_status attn_kda_fwd_cuda_run(const struct attn_kda_problem *p,
                                  const struct attn_kda_fwd_plan *plan, char *workspace,
                                  int64_t workspace_bytes, void *stream);
attn_status attn_kda_step_launch(const struct attn_kda_problem *p, cu_device device,
                                 cu_stream stream);
attn_status attn_kda_step_cuda_run(const struct attn_kda_problem *p, void *stream);

#endif
