/* SPDX-License-Identifier: MIT
 *
 * What src/cuda/driver.c makes of drivers and GPUs: none, too old, without an entry point, failing,
 * of another compute capability, and as it wants them.  dlopen and dlsym are this file's, so
 * libcuda is too.  A process opens its driver once, so each case runs in a child.
 */
#include <dlfcn.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cuda/driver.h"

/* The driver of this case. */
static struct stand_in {
    const char *name;
    bool absent;         /* no libcuda */
    int version;         /* 1000 major + 10 minor */
    const char *missing; /* an entry point */
    int init;            /* what cuInit returns */
    int major, minor;
    bool current; /* a context of the device is current */
    attn_status want;
    const char *words; /* part of the message */
} the;

static int pushes;

static cu_result init(unsigned flags) { return flags ? 1 : the.init; }
static cu_result get_version(int *version) { return *version = the.version, 0; }
static cu_result error_name(cu_result e, const char **text)
{
    return *text = e == 999 ? "CUDA_ERROR_UNKNOWN" : "CUDA_ERROR_OTHER", 0;
}
static cu_result error_string(cu_result e, const char **text)
{
    return *text = e == 999 ? "unknown error" : "another one", 0;
}
static cu_result get_count(int *count) { return *count = 2, 0; }
static cu_result get_device(cu_device *device, int ordinal)
{
    return *device = ordinal, ordinal < 2 ? 0 : 101;
}
static cu_result get_attribute(int *value, int attribute, cu_device device)
{
    (void)device;
    *value = attribute == CU_DEVICE_CAPABILITY_MAJOR   ? the.major
             : attribute == CU_DEVICE_CAPABILITY_MINOR ? the.minor
                                                       : 132;
    return 0;
}
static cu_result current_device(cu_device *device) { return *device = 1, the.current ? 0 : 201; }
static cu_result retain(cu_context *context, cu_device device)
{
    (void)device;
    return *context = (cu_context)(void *)&the, 0;
}
static cu_result push(cu_context context)
{
    return pushes += context == (cu_context)(void *)&the, 0;
}
static cu_result pop(cu_context *context) { return *context = NULL, pushes -= 1, 0; }
static cu_result unused(void) { return 1; }

void *dlopen(const char *name, int flags)
{
    (void)flags;
    return the.absent || strcmp(name, "libcuda.so.1") ? NULL : &the;
}

void *dlsym(void *library, const char *symbol)
{
    static const struct {
        const char *symbol;
        void *function;
    } entries[] = {
        {"cuInit", init},
        {"cuDriverGetVersion", get_version},
        {"cuGetErrorName", error_name},
        {"cuGetErrorString", error_string},
        {"cuDeviceGetCount", get_count},
        {"cuDeviceGet", get_device},
        {"cuDeviceGetAttribute", get_attribute},
        {"cuCtxGetDevice", current_device},
        {"cuDevicePrimaryCtxRetain", retain},
        {"cuCtxPushCurrent_v2", push},
        {"cuCtxPopCurrent_v2", pop},
    };
    if (library != &the || (the.missing && !strcmp(symbol, the.missing))) return NULL;
    for (size_t i = 0; i < sizeof entries / sizeof *entries; ++i)
        if (!strcmp(symbol, entries[i].symbol)) return entries[i].function;
    return unused;
}

/* Enters device 1 twice, as two calls do.  0 when all is as the case wants it. */
static int try(void)
{
    char text[256];
    for (int call = 0; call < 2; ++call) {
        struct attn_cuda_device device = {0};
        attn_status status = attn_cuda_enter(1, &device);
        const char *words = status ? attn_last_error() : "";
        if (status != the.want || !strstr(words, the.words)) {
            printf("%s: want %d \"%s\", got %d \"%s\"\n", the.name, the.want, the.words, status,
                   words);
            return 1;
        }
        if (status) continue;
        bool right = device.multiprocessors == 132 && device.pushed == !the.current &&
                     pushes == !the.current;
        attn_cuda_leave(&device);
        if (!right || pushes) return printf("%s: contexts out of balance\n", the.name), 1;
    }
    int count = attn_gpu_count(text, sizeof text), driver = the.want != ATTN_E_DRIVER;
    if (count != 2 * driver || (!driver && !strstr(text, the.words)))
        return printf("%s: %d GPUs, \"%s\"\n", the.name, count, text), 1;
    return 0;
}

int main(void)
{
    static const struct stand_in cases[] = {
        {"no driver", .absent = true, .want = ATTN_E_DRIVER,
         .words = "no NVIDIA driver: libcuda.so.1"},
        {"an old driver", .version = 11080, .want = ATTN_E_DRIVER,
         .words = "too old: it supports CUDA 11.8, this build needs 12.0"},
        {"an entry point missing", .version = 12000, .missing = "cuLibraryLoadData",
         .want = ATTN_E_DRIVER, .words = "this build needs 12.0 and cuLibraryLoadData"},
        {"cuInit fails", .version = 13000, .init = 999, .want = ATTN_E_DRIVER,
         .words = "cuInit: CUDA_ERROR_UNKNOWN (999): unknown error"},
        {"Ampere", .version = 13000, .major = 8, .want = ATTN_E_NOT_BUILT,
         .words = "device 1: kernels are built for compute capability 9.0 (Hopper), got 8.0"},
        {"Blackwell", .version = 13000, .major = 10, .want = ATTN_E_NOT_BUILT, .words = "got 10.0"},
        {"Hopper", .version = 12000, .major = 9, .words = ""},
        {"Hopper, its context current", .version = 13000, .major = 9, .current = true, .words = ""},
    };
    int failures = 0, n = sizeof cases / sizeof *cases;
    for (int i = 0; i < n; ++i) {
        int status = 1;
        fflush(stdout);
        pid_t child = fork();
        if (child == 0) {
            the = cases[i];
            int result = try();
            fflush(stdout);
            _exit(result);
        }
        waitpid(child, &status, 0);
        if (status) failures += 1, printf("%s: failed\n", cases[i].name);
    }
    printf("%d drivers, %d failures\n", n, failures);
    return failures != 0;
}
