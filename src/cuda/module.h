/* SPDX-License-Identifier: MIT
 *
 * The embedded kernels: a row for each line of a .def file, with the cubin that holds it.
 */
#ifndef ATTN_CUDA_MODULE_H
#define ATTN_CUDA_MODULE_H

#include <pthread.h>
#include <stdatomic.h>

#include "cuda/driver.h"

/* A kernel in one context: launching it spares the driver a search, half a microsecond a call.  Ids
 * of contexts are not used twice. */
struct attn_cuda_function {
    uint64_t context;
    cu_kernel handle;
    struct attn_cuda_function *next;
};

/* One kernel.  All but the last three members are constants; those of mha_fwd's tiles are 0 in a
 * kernel without variants. */
struct attn_cuda_kernel {
    const char *name;
    int dtype;      /* enum attn_dtype */
    int d_qk, d_v;  /* widths it holds */
    int rows, keys; /* of a block's tile, of a step */
    int capped;     /* mha_fwd: 1 where scores are capped */
    int shared_bytes;
    const unsigned char *cubin;

    pthread_mutex_t lock;
    cu_kernel handle; /* NULL until loaded */
    _Atomic(struct attn_cuda_function *) functions;
};

/* The kernels of this build; 0 of them when it was made without nvcc. */
extern struct attn_cuda_kernel attn_mha_fwd_kernels[];
extern const int attn_mha_fwd_kernel_count;
extern struct attn_cuda_kernel attn_kda_fwd_kernels[]; /* rows: value rows, keys: tokens */
extern const int attn_kda_fwd_kernel_count;
extern struct attn_cuda_kernel attn_mha_decode_kernels[];
extern const int attn_mha_decode_kernel_count;
extern struct attn_cuda_kernel attn_mla_decode_kernels[];
extern const int attn_mla_decode_kernel_count;
extern struct attn_cuda_kernel attn_mla_decode_few_kernels[];
extern const int attn_mla_decode_few_kernel_count;
extern struct attn_cuda_kernel attn_plain_kernels[];
extern const int attn_plain_kernel_count;

/* The kernel of that name in attn_plain_kernels; ATTN_E_NOT_BUILT where there is none. */
attn_status attn_plain_kernel(const char *name, struct attn_cuda_kernel **kernel);

/* The kernel in the current context, which is on `device`: loaded when it is asked for first there, in
 * any thread.  Later calls take no lock. */
attn_status attn_cuda_kernel_load(struct attn_cuda_kernel *kernel, cu_device device,
                                  cu_kernel *handle);

#endif
