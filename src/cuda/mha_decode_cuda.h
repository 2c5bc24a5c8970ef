/* SPDX-License-Identifier: MIT
 *
 * mha_decode on Hopper: the form of mha_fwd for few queries and long caches, for num_splits > 1,
 * and for qv and d_v above 256 with any number of queries.
 */
#ifndef ATTN_CUDA_MHA_DECODE_CUDA_H
#define ATTN_CUDA_MHA_DECODE_CUDA_H

#include "cuda/kernels/decode_params.h"
#include "cuda/mha_fwd_cuda.h"

/* How one call runs. */
struct attn_mha_decode_cuda_plan {
    int kernel;         /* attn_mha_decode_kernels, then attn_mla_decode_kernels */
    int box_rows;       /* rows of a k or v box; 0: rows are gathered */
    int tiles;          /* row tiles of the longest sequence */
    int parts;          /* blocks that share the keys; the grid is parts * tiles */
    int splits;         /* 0: equal shares for the parts; n: every item is cut in n */
    int cluster;        /* blocks that share an item and merge in place; 1: no clusters */
    int slot_rows;      /* rows of a partial result in the workspace */
    int64_t out, bytes; /* the workspace: lse, then rows from `out` on; its size */
};

/* Whether decode kernels, not those of mha_fwd, run the call: shapes and num_splits only. */
bool attn_mha_decode_cuda_wanted(const struct attn_mha_fwd_problem *problem, int multiprocessors);

/* As attn_mha_fwd_cuda_choose. */
attn_status attn_mha_decode_cuda_choose(const struct attn_mha_fwd_problem *problem,
                                        const struct attn_mha_fwd_cuda_tile *tiles, int tile_count,
                                        int multiprocessors,
                                        struct attn_mha_decode_cuda_plan *plan);

/* Blocks that could share an item and merge what they have in place, where all items cost the same;
 * 1: none.  Fewer may be used: with so many, the plan becomes one that needs no workspace. */
int attn_mha_decode_cuda_cluster(const struct attn_mha_fwd_problem *problem,
                                 const struct attn_mha_decode_cuda_plan *plan);
void attn_mha_decode_cuda_use_cluster(const struct attn_mha_fwd_problem *problem, int cluster,
                                      struct attn_mha_decode_cuda_plan *plan);

/* Parts, slots and workspace of `tiles` row tiles for `items` KV heads times sequences of at most
 * `steps` key steps. */
void attn_decode_share(int64_t tiles, int64_t items, int64_t steps, int64_t rows, int64_t d_v,
                       int multiprocessors, struct attn_mha_decode_cuda_plan *plan);

/* The call on a current device; `workspace` is decode's own part. */
attn_status attn_mha_decode_cuda_plan(const struct attn_mha_fwd_problem *problem,
                                      const struct attn_cuda_device *device,
                                      struct attn_mha_fwd_plan *out);
attn_status attn_mha_decode_cuda_check(const struct attn_mha_fwd_problem *problem,
                                       const struct attn_cuda_device *device,
                                       int64_t workspace_bytes);
attn_status attn_mha_decode_cuda_launch(const struct attn_mha_fwd_problem *problem,
                                        const struct attn_cuda_device *device, char *workspace,
                                        cu_stream stream);

/* Fills what follows from the plan, and launches the kernel and, where pieces are to be merged,
 * decode_combine behind it. */
void attn_decode_fill_plan(const struct attn_mha_decode_cuda_plan *plan, char *workspace,
                           struct attn_decode_params *params);
attn_status attn_decode_launch(struct attn_decode_params *params,
                               const struct attn_mha_fwd_maps *maps,
                               struct attn_cuda_kernel *kernel, int threads,
                               const struct attn_cuda_device *device, cu_stream stream);

#endif
