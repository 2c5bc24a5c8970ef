/* SPDX-License-Identifier: MIT
 *
 * The binding: libattn behind tvm-ffi's plain C ABI.  A function exported as __tvm_ffi_<name>
 * takes an array of TVMFFIAny; it reads its arguments in order through an ffi_args cursor, calls
 * libattn, and turns a status into a raised error.  Nothing here checks a shape: src/ops does.
 *
 *   ffi_args in = ffi_begin("split_combine", args, count);
 *   call.out = ffi_tensor(&in, "out");
 *   ...
 *   ffi_optional(&in);                           what follows may be left off at the end
 *   ...
 *   if (ffi_end(&in)) return -1;                 the first misfit is raised here, by name
 *   return ffi_status(attn_split_combine_run(&call, ffi_stream(call.out)));
 */
#ifndef ATTN_FFI_H
#define ATTN_FFI_H

#include <stddef.h>
#include <stdint.h>

#include <tvm/ffi/c_api.h>
#include <tvm/ffi/extra/c_env_api.h>

#include <attn/attn.h>

#define FFI_EXPORT __attribute__((visibility("default")))

/* Declares and begins the function `name`. */
#define FFI_FUNCTION(name)                                                                         \
    FFI_EXPORT int __tvm_ffi_##name(void *self, const TVMFFIAny *args, int32_t count,              \
                                    TVMFFIAny *result);                                            \
    int __tvm_ffi_##name(void *self, const TVMFFIAny *args, int32_t count, TVMFFIAny *result)

/* ---- arguments ------------------------------------------------------------------------------- */

typedef struct ffi_args {
    const char *function; /* for messages */
    const TVMFFIAny *args;
    int32_t count, next;
    int32_t required; /* arguments that may not be left off; -1: all that are read */
    /* The first argument that did not fit; later ones are still read, so that no reader needs an
     * exit of its own.  `name` is NULL while all is well. */
    const char *name, *wanted;
    int32_t found; /* type index of what came instead */
    int too_large; /* an integer beyond 32 bits: a bad value, not a bad type */
} ffi_args;

/* The tensor that an argument is, or NULL.  A tensor object is a TVMFFIObject header and then the
 * DLTensor itself. */
static inline const DLTensor *ffi_tensor_of(const TVMFFIAny *a)
{
    if (a->type_index == kTVMFFITensor)
        return (const DLTensor *)(const void *)((const char *)a->v_obj + sizeof(TVMFFIObject));
    if (a->type_index == kTVMFFIDLTensorPtr) return (const DLTensor *)a->v_ptr;
    return NULL;
}

ffi_args ffi_begin(const char *function, const TVMFFIAny *args, int32_t count);
void ffi_optional(ffi_args *in);
const DLTensor *ffi_tensor(ffi_args *in, const char *name);
const DLTensor *ffi_tensor_or_null(ffi_args *in, const char *name); /* None gives NULL */
/* `absent` is what an argument that was left off counts as. */
int64_t ffi_int64(ffi_args *in, const char *name, int64_t absent);
int32_t ffi_int32(ffi_args *in, const char *name, int32_t absent);
int32_t ffi_bool(ffi_args *in, const char *name);  /* bool or int; 0 or 1; 0 when left off */
double ffi_double(ffi_args *in, const char *name); /* float, int or bool */
/* 0, or -1 with TypeError (wrong type or number of arguments) or ArgumentError raised. */
int ffi_end(const ffi_args *in);

/* ---- results --------------------------------------------------------------------------------- */

/* Raises `message` as the Python class registered under `kind`; always -1. */
int ffi_raise(const char *kind, const char *message);
/* 0 for ATTN_OK, else -1 with this thread's message raised as the class of the status. */
int ffi_status(attn_status status);
void ffi_return_int(TVMFFIAny *result, int64_t value);
int ffi_return_text(TVMFFIAny *result, const char *text);

/* ---- surroundings ---------------------------------------------------------------------------- */

/* The caller's current stream on the tensor's device; NULL on a CPU. */
void *ffi_stream(const DLTensor *tensor);

/* Scratch memory for one call, aligned to 256 bytes, on the device of `like`: on a CPU a block that
 * the thread keeps for its next call, on a GPU one from torch's stream-ordered allocator.
 * `bytes` 0 gives NULL memory.  ffi_scratch_take: 0, or -1 with an error raised. */
typedef struct ffi_scratch {
    void *memory;
    TVMFFIObjectHandle tensor; /* owns device memory; NULL on a CPU */
} ffi_scratch;

int ffi_scratch_take(ffi_scratch *scratch, const DLTensor *like, int64_t bytes);
void ffi_scratch_give(ffi_scratch *scratch);

#endif
