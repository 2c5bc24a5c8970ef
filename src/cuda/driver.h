/* SPDX-License-Identifier: MIT
 *
 * libcuda, opened when first asked for.  No header of the toolkit is needed: the few types and
 * numbers used are declared here, and tests/unit_cuda compares them with cuda.h where there is one.
 * A call runs in the context that is current in the calling thread when that is on the tensors'
 * device, and else in the device's primary context, the one the CUDA run time uses.
 */
#ifndef ATTN_CUDA_DRIVER_H
#define ATTN_CUDA_DRIVER_H

#include <stddef.h>
#include <stdint.h>

#include "core/status.h"

typedef int cu_result;
typedef int cu_device;
typedef struct cu_context_opaque *cu_context;
typedef struct cu_stream_opaque *cu_stream;
typedef struct cu_library_opaque *cu_library;
typedef struct cu_kernel_opaque *cu_kernel; /* of a library, or of a context: CUfunction */

enum {
    CU_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE = 720,
    CU_DEVICE_MULTIPROCESSOR_COUNT = 16,
    CU_DEVICE_CAPABILITY_MAJOR = 75,
    CU_DEVICE_CAPABILITY_MINOR = 76,
    CU_KERNEL_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,
    CU_KERNEL_NON_PORTABLE_CLUSTER_SIZE = 14,
    CU_LAUNCH_COOPERATIVE = 2,
    CU_LAUNCH_CLUSTER_DIMENSION = 4,
    CU_LAUNCH_PROGRAMMATIC_STREAM_SERIALIZATION = 6,
    CU_TENSOR_FLOAT16 = 6,
    CU_TENSOR_BFLOAT16 = 9,
    CU_TENSOR_SWIZZLE_128B = 3,
    CU_TENSOR_L2_PROMOTION_128B = 2,
    CU_TENSOR_L2_PROMOTION_256B = 3,
};

struct cu_launch_attribute {
    int id;
    char pad[4];
    union {
        char bytes[64];
        unsigned cluster[3];
        int programmatic, cooperative;
    } value;
};

struct cu_launch_config {
    unsigned grid[3], block[3];
    unsigned shared_bytes;
    cu_stream stream;
    struct cu_launch_attribute *attributes;
    unsigned attribute_count;
};

/* Every entry point is always there once attn_cuda_driver() has returned ATTN_OK. */
struct attn_cuda_driver {
    cu_result (*init)(unsigned flags);
    cu_result (*driver_get_version)(int *version);
    cu_result (*get_error_name)(cu_result error, const char **text);
    cu_result (*get_error_string)(cu_result error, const char **text);
    cu_result (*device_get_count)(int *count);
    cu_result (*device_get)(cu_device *device, int ordinal);
    cu_result (*device_get_attribute)(int *value, int attribute, cu_device device);
    cu_result (*ctx_get_device)(cu_device *device);
    cu_result (*ctx_get_id)(cu_context context, uint64_t *id); /* NULL: of the current one */
    cu_result (*ctx_push_current)(cu_context context);
    cu_result (*ctx_pop_current)(cu_context *context);
    cu_result (*device_primary_ctx_retain)(cu_context *context, cu_device device);
    cu_result (*library_load_data)(cu_library *library, const void *code, int *jit_options,
                                   void **jit_values, unsigned jit_count, int *options,
                                   void **values, unsigned count);
    cu_result (*library_get_kernel)(cu_kernel *kernel, cu_library library, const char *name);
    cu_result (*kernel_set_attribute)(int attribute, int value, cu_kernel kernel, cu_device device);
    cu_result (*kernel_get_function)(cu_kernel *function, cu_kernel kernel);
    cu_result (*launch_kernel_ex)(const struct cu_launch_config *config, cu_kernel kernel,
                                  void **arguments, void **extra);
    cu_result (*occupancy_max_active_clusters)(int *count, cu_kernel kernel,
                                               const struct cu_launch_config *config);
    cu_result (*memset_d32_async)(uint64_t address, unsigned value, size_t count, cu_stream stream);
    cu_result (*tensor_map_encode_tiled)(void *map, int type, uint32_t rank, void *base,
                                         const uint64_t *extents, const uint64_t *strides_bytes,
                                         const uint32_t *box, const uint32_t *element_strides,
                                         int interleave, int swizzle, int l2_promotion,
                                         int out_of_bounds_fill);
};

/* The entry points, or ATTN_E_DRIVER with what is missing.  Opens and initialises once a process;
 * a failure is remembered. */
attn_status attn_cuda_driver(const struct attn_cuda_driver **driver);

/* ATTN_OK, or ATTN_E_DRIVER with `what`, the driver's name of the error and its words. */
attn_status attn_cuda_status(cu_result result, const char *what);

/* A GPU this build has kernels for, with a context of it current. */
struct attn_cuda_device {
    cu_device device;
    int multiprocessors;
    int pushed; /* 1: attn_cuda_leave has a context to take away again */
};

/* Makes a context of device `ordinal` current if none is; ATTN_E_NOT_BUILT unless the device's
 * compute capability is 9.0.  After ATTN_OK, attn_cuda_leave ends it. */
attn_status attn_cuda_enter(int ordinal, struct attn_cuda_device *device);
void attn_cuda_leave(const struct attn_cuda_device *device);

#endif
