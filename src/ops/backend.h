/* SPDX-License-Identifier: MIT
 *
 * A back end: a device type and the functions that plan and run each op there on checked problems.
 * Adding one is a folder beside cpu/ and a row in backend.c.
 */
#ifndef ATTN_OPS_BACKEND_H
#define ATTN_OPS_BACKEND_H

#include "ops/kda.h"
#include "ops/mha_fwd.h"
#include "ops/mla.h"
#include "ops/split_combine.h"

struct attn_backend {
    DLDeviceType device;
    /* Fills splits, piece, workspace_bytes, tile and kernel; the rest is filled already. */
    attn_status (*mha_fwd_plan)(const struct attn_mha_fwd_problem *problem,
                                struct attn_mha_fwd_plan *plan);
    attn_status (*mha_fwd_run)(const struct attn_mha_fwd_problem *problem,
                               const struct attn_mha_fwd_plan *plan, char *workspace,
                               int64_t workspace_bytes, void *stream);
    attn_status (*split_combine_run)(const struct attn_split_combine_problem *problem,
                                     void *stream);
    /* Fills workspace_bytes, tile and kernel; the rest is filled already. */
    attn_status (*kda_fwd_plan)(const struct attn_kda_problem *problem,
                                struct attn_kda_fwd_plan *plan);
    attn_status (*kda_fwd_run)(const struct attn_kda_problem *problem,
                               const struct attn_kda_fwd_plan *plan, char *workspace,
                               int64_t workspace_bytes, void *stream);
    attn_status (*kda_step_run)(const struct attn_kda_problem *problem, void *stream);
    /* The three mla ops: problem->op says which.  The plan as in kda_fwd. */
    attn_status (*mla_plan)(const struct attn_mla_problem *problem, struct attn_mla_plan *plan);
    attn_status (*mla_run)(const struct attn_mla_problem *problem, const struct attn_mla_plan *plan,
                           char *workspace, int64_t workspace_bytes, void *stream);
    /* NULL: not built. */
    attn_status (*mla_cache_quantize_run)(const struct attn_mla_cache_problem *problem,
                                          void *stream);
    attn_status (*mla_cache_dequantize_run)(const struct attn_mla_cache_problem *problem,
                                            void *stream);
    const char *(*kernel_name)(int index); /* NULL past the last */
};

extern const struct attn_backend attn_backend_cpu, attn_backend_cuda;

const struct attn_backend *attn_backend_for(DLDeviceType device); /* NULL: no such back end */

#endif
