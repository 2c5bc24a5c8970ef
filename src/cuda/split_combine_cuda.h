/* SPDX-License-Identifier: MIT
 *
 * split_combine on Hopper.
 */
#ifndef ATTN_CUDA_SPLIT_COMBINE_CUDA_H
#define ATTN_CUDA_SPLIT_COMBINE_CUDA_H

#include "cuda/module.h"
#include "ops/split_combine.h"

attn_status attn_split_combine_cuda_run(const struct attn_split_combine_problem *problem,
                                        void *stream);

#endif
