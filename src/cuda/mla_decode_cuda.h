/* SPDX-License-Identifier: MIT
 *
 * MLA decode on Hopper.
 */
#ifndef ATTN_CUDA_MLA_DECODE_CUDA_H
#define ATTN_CUDA_MLA_DECODE_CUDA_H

#include "cuda/kernels/decode_params.h"
#include "cuda/module.h"
#include "ops/mla.h"

/* The rows of struct attn_backend; ATTN_E_NOT_BUILT for the sparse ops, fp8 and other widths. */
attn_status attn_mla_cuda_plan(const struct attn_mla_problem *problem, struct attn_mla_plan *plan);
attn_status attn_mla_cuda_run(const struct attn_mla_problem *problem,
                              const struct attn_mla_plan *plan, char *workspace,
                              int64_t workspace_bytes, void *stream);

/* attn_decode_launch for a kernel of attn_mla_decode_kernels. */
attn_status attn_mla_decode_launch(struct attn_decode_params *params,
                                   const struct attn_mha_fwd_maps *maps,
                                   struct attn_cuda_kernel *kernel,
                                   const struct attn_cuda_device *device, cu_stream stream);

#endif
