/* SPDX-License-Identifier: MIT
 *
 * Cubins by .incbin, and their loading.  The build passes ATTN_CUBIN_DIR, where tools/variants.py
 * left one cubin a .def line, named after its kernel; without it the table is empty.
 */
#include "cuda/module.h"

#include <stdlib.h>
#include <string.h>

#include "core/dtype.h"
#include "cuda/kernels/decode_params.h"
#include "cuda/kernels/kda_fwd_params.h"
#include "cuda/kernels/mha_fwd_params.h"

#ifdef ATTN_CUBIN_DIR

#define DTYPE_bf16 ATTN_BF16
#define DTYPE_fp16 ATTN_F16
#define NAME(op, arch, dtype, dqk, dv, rows, keys)                                                 \
    "attn_" #op "_" #arch "_" #dtype "_d" #dqk "x" #dv "_m" #rows "n" #keys
#define CUBIN(op, arch, dtype, dqk, dv, rows, keys)                                                \
    cubin_##op##_##arch##_##dtype##_##dqk##_##dv##_##rows##_##keys

#define ATTN_KERNEL(...) INCBIN(NAME(__VA_ARGS__), CUBIN(__VA_ARGS__))
#define INCBIN(name, symbol) INCBIN_TEXT(name, symbol)
#define INCBIN_TEXT(name, symbol)                                                                  \
    extern const unsigned char symbol[] __attribute__((visibility("hidden")));                     \
    __asm__(".section .rodata\n"                                                                   \
            ".balign 64\n"                                                                         \
            ".global " #symbol "\n"                                                                \
            ".hidden " #symbol "\n" #symbol ":\n"                                                  \
            ".incbin \"" ATTN_CUBIN_DIR "/" name ".cubin\"\n"                                      \
            ".previous\n");
#define ATTN_PLAIN_KERNEL(op, arch) INCBIN_TEXT("attn_" #op "_" #arch, cubin_##op##_##arch)
#include "cuda/kernels/kda_fwd.def"
#include "cuda/kernels/mha_decode.def"
#include "cuda/kernels/mha_fwd.def"
#include "cuda/kernels/mla_decode.def"
#include "cuda/kernels/mla_decode_few.def"
#include "cuda/kernels/plain.def"
#undef ATTN_KERNEL
#undef ATTN_PLAIN_KERNEL

#define ATTN_KERNEL(op, arch, dtype_, dqk, dv, rows_, keys_)                                       \
    {.name = NAME(op, arch, dtype_, dqk, dv, rows_, keys_),                                        \
     .dtype = DTYPE_##dtype_,                                                                      \
     .d_qk = dqk,                                                                                  \
     .d_v = dv,                                                                                    \
     .rows = rows_,                                                                                \
     .keys = keys_,                                                                                \
     .capped = CAPPED(op),                                                                         \
     .shared_bytes = SMEM(dqk, dv, rows_, keys_),                                                  \
     .cubin = CUBIN(op, arch, dtype_, dqk, dv, rows_, keys_),                                      \
     .lock = PTHREAD_MUTEX_INITIALIZER},
enum { CAPPED_mha_fwd, CAPPED_mha_fwd_cap };
#define CAPPED(op) CAPPED_##op
#define SMEM ATTN_MHA_FWD_SMEM
struct attn_cuda_kernel attn_mha_fwd_kernels[] = {
#include "cuda/kernels/mha_fwd.def"
};
#undef SMEM
#undef CAPPED
const int attn_mha_fwd_kernel_count = sizeof attn_mha_fwd_kernels / sizeof *attn_mha_fwd_kernels;

#define CAPPED(op) 0

#define SMEM(dqk, dv, rows, keys) ATTN_KDA_FWD_SMEM(dqk, rows)
struct attn_cuda_kernel attn_kda_fwd_kernels[] = {
#include "cuda/kernels/kda_fwd.def"
};
#undef SMEM
const int attn_kda_fwd_kernel_count = sizeof attn_kda_fwd_kernels / sizeof *attn_kda_fwd_kernels;

#define SMEM(dqk, dv, rows, keys) ATTN_MHA_DECODE_SMEM(dqk, dv)
struct attn_cuda_kernel attn_mha_decode_kernels[] = {
#include "cuda/kernels/mha_decode.def"
};
#undef SMEM
const int attn_mha_decode_kernel_count = sizeof attn_mha_decode_kernels /
                                         sizeof *attn_mha_decode_kernels;

#define SMEM(dqk, dv, rows, keys) ATTN_MLA_DECODE_SMEM
struct attn_cuda_kernel attn_mla_decode_kernels[] = {
#include "cuda/kernels/mla_decode.def"
};
const int attn_mla_decode_kernel_count = sizeof attn_mla_decode_kernels /
                                         sizeof *attn_mla_decode_kernels;

struct attn_cuda_kernel attn_mla_decode_few_kernels[] = {
#include "cuda/kernels/mla_decode_few.def"
};
#undef SMEM
const int attn_mla_decode_few_kernel_count = sizeof attn_mla_decode_few_kernels /
                                             sizeof *attn_mla_decode_few_kernels;

#define ATTN_PLAIN_KERNEL(op, arch)                                                                \
    {.name = "attn_" #op "_" #arch,                                                                \
     .cubin = cubin_##op##_##arch,                                                                 \
     .lock = PTHREAD_MUTEX_INITIALIZER},
struct attn_cuda_kernel attn_plain_kernels[] = {
#include "cuda/kernels/plain.def"
};
const int attn_plain_kernel_count = sizeof attn_plain_kernels / sizeof *attn_plain_kernels;

#else

struct attn_cuda_kernel attn_mha_fwd_kernels[1];
const int attn_mha_fwd_kernel_count = 0;
struct attn_cuda_kernel attn_kda_fwd_kernels[1];
const int attn_kda_fwd_kernel_count = 0;
struct attn_cuda_kernel attn_mha_decode_kernels[1];
const int attn_mha_decode_kernel_count = 0;
struct attn_cuda_kernel attn_mla_decode_kernels[1];
const int attn_mla_decode_kernel_count = 0;
struct attn_cuda_kernel attn_mla_decode_few_kernels[1];
const int attn_mla_decode_few_kernel_count = 0;
struct attn_cuda_kernel attn_plain_kernels[1];
const int attn_plain_kernel_count = 0;

#endif

attn_status attn_plain_kernel(const char *name, struct attn_cuda_kernel **kernel)
{
    for (int i = 0; i < attn_plain_kernel_count; i++) {
        *kernel = &attn_plain_kernels[i];
        if (strcmp(name, (*kernel)->name) == 0) return ATTN_OK;
    }
    return attn_fail(ATTN_E_NOT_BUILT, "%s: not in this build, which was made without nvcc", name);
}

/* The function of context `id`, or NULL. */
static const struct attn_cuda_function *find(struct attn_cuda_kernel *kernel, uint64_t id)
{
    const struct attn_cuda_function *f = atomic_load_explicit(&kernel->functions,
                                                              memory_order_acquire);
    while (f && f->context != id) f = f->next;
    return f;
}

/* Adds the function of the current context, whose id that is. */
static attn_status load(const struct attn_cuda_driver *cu, struct attn_cuda_kernel *kernel,
                        cu_device device, uint64_t id)
{
    cu_result result = 0;
    if (!kernel->handle) {
        cu_library library;
        cu_kernel handle;
        result = cu->library_load_data(&library, kernel->cubin, NULL, NULL, 0, NULL, NULL, 0);
        if (!result) result = cu->library_get_kernel(&handle, library, kernel->name);
        if (!result) kernel->handle = handle;
    }
    if (!result && kernel->shared_bytes)
        result = cu->kernel_set_attribute(CU_KERNEL_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                          kernel->shared_bytes, kernel->handle, device);
    if (!result)
        result = cu->kernel_set_attribute(CU_KERNEL_NON_PORTABLE_CLUSTER_SIZE, 1, kernel->handle,
                                          device);
    struct attn_cuda_function f = {.context = id, .next = atomic_load(&kernel->functions)};
    if (!result) result = cu->kernel_get_function(&f.handle, kernel->handle);
    if (result) return attn_cuda_status(result, kernel->name);
    struct attn_cuda_function *kept = malloc(sizeof *kept);
    ATTN_CHECK(kept, ATTN_E_DRIVER, "%s: no memory", kernel->name);
    *kept = f;
    atomic_store_explicit(&kernel->functions, kept, memory_order_release);
    return ATTN_OK;
}

attn_status attn_cuda_kernel_load(struct attn_cuda_kernel *kernel, cu_device device,
                                  cu_kernel *handle)
{
    const struct attn_cuda_driver *cu;
    uint64_t id;
    ATTN_TRY(attn_cuda_driver(&cu));
    ATTN_TRY(attn_cuda_status(cu->ctx_get_id(NULL, &id), "cuCtxGetId"));
    const struct attn_cuda_function *f = find(kernel, id);
    if (!f) {
        pthread_mutex_lock(&kernel->lock);
        attn_status status = find(kernel, id) ? ATTN_OK : load(cu, kernel, device, id);
        pthread_mutex_unlock(&kernel->lock);
        if (status) return status;
        f = find(kernel, id);
    }
    *handle = f->handle;
    return ATTN_OK;
}
