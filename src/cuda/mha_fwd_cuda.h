/* SPDX-License-Identifier: MIT
 *
 * mha_fwd on Hopper: the plan, integers in and integers out, and the launch.
 */
#ifndef ATTN_CUDA_MHA_FWD_CUDA_H
#define ATTN_CUDA_MHA_FWD_CUDA_H

#include "cuda/kernels/mha_fwd_params.h"
#include "cuda/module.h"
#include "ops/mha_fwd.h"

/* How one call runs. */
struct attn_mha_fwd_cuda_plan {
    int kernel;   /* index into attn_mha_fwd_kernels */
    int gather;   /* 1: k and v rows copied one by one: pages or strides that no box fits */
    int box_rows; /* rows of a k or v box */
    int cluster;  /* blocks that share k and v tiles: 1 or 2 */
    int section;  /* KV heads walked together */
    int pack;     /* query heads of a KV head that share a row tile: 1 or all */
    int grid;     /* blocks, a multiple of cluster */
    int ticket;   /* 1: row tiles differ in length and are drawn from a counter in the workspace */
};

/* What a kernel of the table must be good at, so that plans can be tested without one. */
struct attn_mha_fwd_cuda_tile {
    int dtype, d_qk, d_v, rows, keys;
    int capped; /* 1: with softcap, 0: without */
};

/* ATTN_E_NOT_BUILT names the feature that no kernel has; ATTN_E_SHAPE a tensor whose rows the
 * kernels cannot read. */
attn_status attn_mha_fwd_cuda_choose(const struct attn_mha_fwd_problem *problem,
                                     const struct attn_mha_fwd_cuda_tile *tiles, int tile_count,
                                     int multiprocessors, struct attn_mha_fwd_cuda_plan *plan);

/* The part of it that does not depend on the tile; decode's too. */
attn_status attn_mha_fwd_cuda_check(const struct attn_mha_fwd_problem *problem);

/* Whether the strides of a tensor fit the maps of the copy engine. */
bool attn_mha_fwd_cuda_fits_boxes(const struct attn_rows *rows, int64_t batches, int64_t per_batch,
                                  int64_t heads);

/* Rows of the largest box of k or v that divides `keys` and never straddles two pages; 0: none, the
 * rows are gathered. */
int attn_mha_fwd_cuda_box(const struct attn_mha_fwd_problem *problem, int keys);

/* The call as kernels see it, but for the ticket; and the map of k or v (struct
 * attn_mha_fwd_maps). */
void attn_mha_fwd_fill_params(const struct attn_mha_fwd_problem *problem,
                              const struct attn_mha_fwd_cuda_plan *plan,
                              struct attn_mha_fwd_params *params);
attn_status attn_mha_fwd_encode_keys(const struct attn_mha_fwd_problem *problem, int box_rows,
                                     const struct attn_rows *rows, int64_t width, bool alone,
                                     const char *name, struct attn_tensor_map *map);

/* Calls with k_new run kv_append first: it writes the cache and, into attn_kv_append_bytes() of
 * workspace, the lengths with the new keys and (with a rotary table) a rotated copy of q.
 * attn_kv_append_result: the problem whose seqused_k and q are those. */
int64_t attn_kv_append_bytes(const struct attn_mha_fwd_problem *problem);
attn_status attn_kv_append_launch(const struct attn_mha_fwd_problem *problem, cu_device device,
                                  char *workspace, cu_stream stream);
void attn_kv_append_result(const struct attn_mha_fwd_problem *problem, char *workspace,
                           struct attn_mha_fwd_problem *after);

/* The rows of struct attn_backend. */
attn_status attn_mha_fwd_cuda_plan(const struct attn_mha_fwd_problem *problem,
                                   struct attn_mha_fwd_plan *plan);
attn_status attn_mha_fwd_cuda_run(const struct attn_mha_fwd_problem *problem,
                                  const struct attn_mha_fwd_plan *plan, char *workspace,
                                  int64_t workspace_bytes, void *stream);

#endif
