/* SPDX-License-Identifier: MIT
 *
 * What every binding function shares: the argument cursor, errors, the stream, scratch memory, and
 * the version handshake.  The classes behind the error kinds are registered by libattn/errors.py.
 */
#define _DEFAULT_SOURCE
#include "ffi.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- errors ---------------------------------------------------------------------------------- */

static const char *const status_kinds[] = {
    [ATTN_E_SHAPE] = "libattn.ShapeError",        [ATTN_E_DTYPE] = "libattn.DtypeError",
    [ATTN_E_VALUE] = "libattn.ArgumentError",     [ATTN_E_DEVICE] = "libattn.DeviceError",
    [ATTN_E_NOT_BUILT] = "libattn.NotBuiltError", [ATTN_E_WORKSPACE] = "libattn.WorkspaceError",
    [ATTN_E_VERSION] = "libattn.VersionError",    [ATTN_E_DRIVER] = "libattn.DriverError",
};

static TVMFFIByteArray bytes_of(const char *text) { return (TVMFFIByteArray){text, strlen(text)}; }

/* The error carries no C backtrace: collecting one takes longer than most calls, and the Python
 * traceback already ends at the call. */
int ffi_raise(const char *kind, const char *message)
{
    const TVMFFIByteArray k = bytes_of(kind), m = bytes_of(message), none = bytes_of("");
    TVMFFIObjectHandle error = NULL;
    if (TVMFFIErrorCreate(&k, &m, &none, &error) == 0) {
        TVMFFIErrorSetRaised(error);
        TVMFFIObjectDecRef(error);
    }
    return -1;
}

int ffi_status(attn_status status)
{
    if (status == ATTN_OK) return 0;
    const size_t known = sizeof status_kinds / sizeof status_kinds[0];
    const char *kind = (size_t)status < known ? status_kinds[status] : NULL;
    return ffi_raise(kind ? kind : "libattn.InternalError", attn_last_error());
}

/* ---- arguments ------------------------------------------------------------------------------- */

ffi_args ffi_begin(const char *function, const TVMFFIAny *args, int32_t count)
{
    return (ffi_args){.function = function, .args = args, .count = count, .required = -1};
}

void ffi_optional(ffi_args *in) { in->required = in->next; }

/* The next argument, or NULL when it was left off. */
static inline const TVMFFIAny *step(ffi_args *in)
{
    const int32_t i = in->next++;
    return i < in->count ? &in->args[i] : NULL;
}

static void misfit(ffi_args *in, const char *name, const char *wanted, const TVMFFIAny *got)
{
    if (in->name) return;
    in->name = name;
    in->wanted = wanted;
    in->found = got->type_index;
}

static inline int is_whole(const TVMFFIAny *a)
{
    return a->type_index == kTVMFFIInt || a->type_index == kTVMFFIBool;
}

const DLTensor *ffi_tensor(ffi_args *in, const char *name)
{
    const TVMFFIAny *a = step(in);
    if (!a) return NULL;
    const DLTensor *t = ffi_tensor_of(a);
    if (!t) misfit(in, name, "a tensor", a);
    return t;
}

const DLTensor *ffi_tensor_or_null(ffi_args *in, const char *name)
{
    const TVMFFIAny *a = step(in);
    if (!a || a->type_index == kTVMFFINone) return NULL;
    const DLTensor *t = ffi_tensor_of(a);
    if (!t) misfit(in, name, "a tensor or None", a);
    return t;
}

int64_t ffi_int64(ffi_args *in, const char *name, int64_t absent)
{
    const TVMFFIAny *a = step(in);
    if (!a) return absent;
    if (is_whole(a)) return a->v_int64;
    misfit(in, name, "an int of 64 bits", a);
    return absent;
}

int32_t ffi_int32(ffi_args *in, const char *name, int32_t absent)
{
    const TVMFFIAny *a = step(in);
    if (!a) return absent;
    if (!is_whole(a)) {
        misfit(in, name, "an int", a);
    } else if (a->v_int64 < INT32_MIN || a->v_int64 > INT32_MAX) {
        if (!in->name) in->too_large = 1;
        misfit(in, name, "an int of 32 bits", a);
    } else {
        return (int32_t)a->v_int64;
    }
    return absent;
}

double ffi_double(ffi_args *in, const char *name)
{
    const TVMFFIAny *a = step(in);
    if (!a) return 0;
    if (a->type_index == kTVMFFIFloat) return a->v_float64;
    if (is_whole(a)) return (double)a->v_int64;
    misfit(in, name, "a float", a);
    return 0;
}

int32_t ffi_bool(ffi_args *in, const char *name)
{
    const TVMFFIAny *a = step(in);
    if (!a) return 0;
    if (is_whole(a)) return a->v_int64 != 0;
    misfit(in, name, "a bool", a);
    return 0;
}

/* kTVMFFIBigInt, which the headers before 0.1.15 do not name. */
#define FFI_BIG_INT 78

static const char *type_name(int32_t type_index)
{
    switch (type_index) {
    case kTVMFFINone: return "None";
    case kTVMFFIInt: return "int";
    case kTVMFFIBool: return "bool";
    case kTVMFFIFloat: return "float";
    case kTVMFFIDataType: return "a dtype";
    case kTVMFFIDevice: return "a device";
    case kTVMFFIRawStr:
    case kTVMFFISmallStr:
    case kTVMFFIStr: return "str";
    case kTVMFFISmallBytes:
    case kTVMFFIBytes: return "bytes";
    case kTVMFFIDLTensorPtr:
    case kTVMFFITensor: return "a tensor";
    case kTVMFFIFunction: return "a function";
    case kTVMFFIArray:
    case kTVMFFIList: return "a list or tuple";
    case kTVMFFIMap:
    case kTVMFFIDict: return "a dict";
    case FFI_BIG_INT: return "an int beyond 64 bits";
    default: return "an object of another type";
    }
}

int ffi_end(const ffi_args *in)
{
    char message[256];
    const int32_t least = in->required < 0 ? in->next : in->required;
    if (in->count < least || in->count > in->next) {
        snprintf(message, sizeof message, "%s: expected %d to %d arguments, got %d", in->function,
                 (int)least, (int)in->next, (int)in->count);
        return ffi_raise("TypeError", message);
    }
    if (!in->name) return 0;
    snprintf(message, sizeof message, "%s: expected %s, got %s", in->name, in->wanted,
             in->too_large ? "one out of range" : type_name(in->found));
    const int bad_value = in->too_large || in->found == FFI_BIG_INT;
    return ffi_raise(bad_value ? "libattn.ArgumentError" : "TypeError", message);
}

/* ---- results --------------------------------------------------------------------------------- */

void ffi_return_int(TVMFFIAny *result, int64_t value)
{
    *result = (TVMFFIAny){.type_index = kTVMFFIInt, .v_int64 = value};
}

int ffi_return_text(TVMFFIAny *result, const char *text)
{
    const TVMFFIByteArray bytes = bytes_of(text);
    return TVMFFIStringFromByteArray(&bytes, result);
}

/* ---- stream and scratch ---------------------------------------------------------------------- */

void *ffi_stream(const DLTensor *tensor)
{
    if (tensor->device.device_type == kDLCPU) return NULL;
    return TVMFFIEnvGetStream((int32_t)tensor->device.device_type, tensor->device.device_id);
}

#define SCRATCH_ALIGN 256
#define SCRATCH_STEP ((int64_t)64 << 10)
#define SCRATCH_KEEP ((int64_t)64 << 20) /* a thread holds on to at most this much between calls */

static _Thread_local struct {
    void *memory;
    int64_t bytes;
    int watched; /* this thread's exit frees the block */
} kept;

#if defined(__GLIBC__)
/* What C++ thread_local destructors use: runs `release` when the thread ends, and until then keeps
 * this object loaded.  Older than pthread_key_create's current symbol version. */
extern int __cxa_thread_atexit_impl(void (*release)(void *), void *argument, void *object);
extern void *__dso_handle;

static void release_kept(void *unused)
{
    (void)unused;
    free(kept.memory);
    kept.memory = NULL;
    kept.bytes = 0;
    kept.watched = 0;
}

static int watch_thread(void)
{
    return __cxa_thread_atexit_impl(release_kept, NULL, &__dso_handle) == 0;
}
#else
static int watch_thread(void) { return 0; }
#endif

static int cpu_scratch(ffi_scratch *scratch, int64_t bytes)
{
    if (bytes > kept.bytes) {
        free(kept.memory);
        kept.memory = NULL;
        kept.bytes = 0;
        if (bytes > INT64_MAX - SCRATCH_STEP)
            return ffi_raise("MemoryError", "workspace too large");
        bytes = (bytes + SCRATCH_STEP - 1) / SCRATCH_STEP * SCRATCH_STEP;
        kept.memory = aligned_alloc(SCRATCH_ALIGN, (size_t)bytes);
        if (!kept.memory) {
            char message[96];
            snprintf(message, sizeof message, "no memory for a workspace of %lld bytes",
                     (long long)bytes);
            return ffi_raise("MemoryError", message);
        }
        kept.bytes = bytes;
        if (!kept.watched) kept.watched = watch_thread();
    }
    scratch->memory = kept.memory;
    return 0;
}

static int device_scratch(ffi_scratch *scratch, const DLTensor *like, int64_t bytes)
{
    int64_t stride = 1;
    DLTensor want = {
        .device = like->device,
        .ndim = 1,
        .dtype = {.code = kDLUInt, .bits = 8, .lanes = 1},
        .shape = &bytes,
        .strides = &stride,
    };
    if (TVMFFIEnvTensorAlloc(&want, &scratch->tensor)) return -1;
    const TVMFFIAny owned = {.type_index = kTVMFFITensor, .v_obj = (TVMFFIObject *)scratch->tensor};
    const DLTensor *t = ffi_tensor_of(&owned);
    scratch->memory = (char *)t->data + t->byte_offset;
    return 0;
}

int ffi_scratch_take(ffi_scratch *scratch, const DLTensor *like, int64_t bytes)
{
    *scratch = (ffi_scratch){NULL, NULL};
    if (bytes == 0) return 0;
    return like->device.device_type == kDLCPU ? cpu_scratch(scratch, bytes)
                                              : device_scratch(scratch, like, bytes);
}

/* On a GPU the work is only queued here; giving memory back now is right all the same, as torch
 * hands it out again to later work of the same stream only. */
void ffi_scratch_give(ffi_scratch *scratch)
{
    if (scratch->tensor) TVMFFIObjectDecRef(scratch->tensor);
    if (kept.memory && (kept.bytes > SCRATCH_KEEP || !kept.watched)) {
        free(kept.memory);
        kept.memory = NULL;
        kept.bytes = 0;
    }
    *scratch = (ffi_scratch){NULL, NULL};
}

/* ---- version --------------------------------------------------------------------------------- */

/* version() -> str: the header this binding was built from.  Raises VersionError when the libattn
 * it runs on was built from another one. */
FFI_FUNCTION(version)
{
    (void)self;
    const ffi_args in = ffi_begin("version", args, count);
    if (ffi_end(&in)) return -1;
    if (strcmp(attn_version(), ATTN_VERSION_STRING) != 0) {
        char message[128];
        snprintf(message, sizeof message, "libattn.so is version %.32s, libattn_ffi.so %s",
                 attn_version(), ATTN_VERSION_STRING);
        return ffi_raise("libattn.VersionError", message);
    }
    return ffi_return_text(result, ATTN_VERSION_STRING);
}
