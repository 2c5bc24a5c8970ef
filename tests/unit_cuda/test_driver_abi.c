/* SPDX-License-Identifier: MIT
 *
 * Compiles only when the numbers and layouts of src/cuda/driver.h are those of the toolkit's
 * cuda.h:
 *     cc -fsyntax-only -Isrc -Iinclude -I$CUDA_HOME/include tests/unit_cuda/test_driver_abi.c
 */
#include <cuda.h>

#include "cuda/driver.h"
#include "cuda/kernels/mha_fwd_params.h"

#define SAME(ours, theirs) _Static_assert((int)(ours) == (int)(theirs), #theirs)

SAME(CU_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE, CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE);
SAME(CU_DEVICE_MULTIPROCESSOR_COUNT, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
SAME(CU_DEVICE_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
SAME(CU_DEVICE_CAPABILITY_MINOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
SAME(CU_KERNEL_MAX_DYNAMIC_SHARED_SIZE_BYTES, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
SAME(CU_KERNEL_NON_PORTABLE_CLUSTER_SIZE, CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED);
SAME(CU_LAUNCH_COOPERATIVE, CU_LAUNCH_ATTRIBUTE_COOPERATIVE);
SAME(CU_LAUNCH_CLUSTER_DIMENSION, CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION);
SAME(CU_TENSOR_FLOAT16, CU_TENSOR_MAP_DATA_TYPE_FLOAT16);
SAME(CU_TENSOR_BFLOAT16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16);
SAME(CU_TENSOR_SWIZZLE_128B, CU_TENSOR_MAP_SWIZZLE_128B);
SAME(CU_TENSOR_L2_PROMOTION_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
SAME(CU_TENSOR_L2_PROMOTION_256B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
SAME(0, CU_TENSOR_MAP_INTERLEAVE_NONE);
SAME(0, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
SAME(0, CUDA_SUCCESS);

SAME(sizeof(struct attn_tensor_map), sizeof(CUtensorMap));
SAME(sizeof(cu_device), sizeof(CUdevice));
SAME(sizeof(struct cu_launch_attribute), sizeof(CUlaunchAttribute));
SAME(offsetof(struct cu_launch_attribute, value), offsetof(CUlaunchAttribute, value));
SAME(sizeof(struct cu_launch_config), sizeof(CUlaunchConfig));
SAME(offsetof(struct cu_launch_config, block), offsetof(CUlaunchConfig, blockDimX));
SAME(offsetof(struct cu_launch_config, shared_bytes), offsetof(CUlaunchConfig, sharedMemBytes));
SAME(offsetof(struct cu_launch_config, stream), offsetof(CUlaunchConfig, hStream));
SAME(offsetof(struct cu_launch_config, attributes), offsetof(CUlaunchConfig, attrs));
SAME(offsetof(struct cu_launch_config, attribute_count), offsetof(CUlaunchConfig, numAttrs));
