/* SPDX-License-Identifier: MIT
 *
 * Opens libcuda and asks it for what driver.h names.  Written once, under pthread_once; afterwards
 * read by any thread.
 */
#include "cuda/driver.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#define DEVICES_MAX 64

/* The oldest driver: what loads this build's cubins; the entry points below are of CUDA 12.0. */
#ifndef ATTN_CUDA_MAJOR
#define ATTN_CUDA_MAJOR 12
#endif

static pthread_once_t once = PTHREAD_ONCE_INIT;
static struct attn_cuda_driver driver;
static char failure[256]; /* empty: the driver is there */
static int version;

/* A function pointer read from where dlsym's object pointer lies: what POSIX asks for. */
#define ENTRY(field, symbol) {symbol, offsetof(struct attn_cuda_driver, field)}
static const struct {
    const char *symbol;
    size_t offset;
} entries[] = {
    ENTRY(init, "cuInit"),
    ENTRY(driver_get_version, "cuDriverGetVersion"),
    ENTRY(get_error_name, "cuGetErrorName"),
    ENTRY(get_error_string, "cuGetErrorString"),
    ENTRY(device_get_count, "cuDeviceGetCount"),
    ENTRY(device_get, "cuDeviceGet"),
    ENTRY(device_get_attribute, "cuDeviceGetAttribute"),
    ENTRY(ctx_get_device, "cuCtxGetDevice"),
    ENTRY(ctx_get_id, "cuCtxGetId"),
    ENTRY(ctx_push_current, "cuCtxPushCurrent_v2"),
    ENTRY(ctx_pop_current, "cuCtxPopCurrent_v2"),
    ENTRY(device_primary_ctx_retain, "cuDevicePrimaryCtxRetain"),
    ENTRY(library_load_data, "cuLibraryLoadData"),
    ENTRY(library_get_kernel, "cuLibraryGetKernel"),
    ENTRY(kernel_set_attribute, "cuKernelSetAttribute"),
    ENTRY(kernel_get_function, "cuKernelGetFunction"),
    ENTRY(launch_kernel_ex, "cuLaunchKernelEx"),
    ENTRY(occupancy_max_active_clusters, "cuOccupancyMaxActiveClusters"),
    ENTRY(memset_d32_async, "cuMemsetD32Async"),
    ENTRY(tensor_map_encode_tiled, "cuTensorMapEncodeTiled"),
};

static void describe(cu_result result, char *text, size_t bytes)
{
    const char *name = NULL, *words = NULL;
    if (driver.get_error_name) driver.get_error_name(result, &name);
    if (driver.get_error_string) driver.get_error_string(result, &words);
    snprintf(text, bytes, "%s (%d): %s", name ? name : "CUresult", result, words ? words : "?");
}

static void open_driver(void)
{
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        snprintf(failure, sizeof failure,
                 "no NVIDIA driver: libcuda.so.1 cannot be opened (needs one with CUDA %d.0)",
                 ATTN_CUDA_MAJOR);
        return;
    }
    const char *missing = NULL;
    for (size_t i = 0; i < sizeof entries / sizeof *entries; i++) {
        void *symbol = dlsym(library, entries[i].symbol);
        memcpy((char *)&driver + entries[i].offset, &symbol, sizeof symbol);
        if (!symbol && !missing) missing = entries[i].symbol;
    }
    if (driver.driver_get_version) driver.driver_get_version(&version);
    if (missing || version < ATTN_CUDA_MAJOR * 1000) {
        snprintf(failure, sizeof failure,
                 "the NVIDIA driver is too old: it supports CUDA %d.%d, this build needs %d.0%s%s",
                 version / 1000, version % 1000 / 10, ATTN_CUDA_MAJOR, missing ? " and " : "",
                 missing ? missing : "");
        return;
    }
    cu_result result = driver.init(0);
    if (result) {
        char text[160];
        describe(result, text, sizeof text);
        snprintf(failure, sizeof failure, "cuInit: %s", text);
    }
}

attn_status attn_cuda_driver(const struct attn_cuda_driver **out)
{
    pthread_once(&once, open_driver);
    ATTN_CHECK(!failure[0], ATTN_E_DRIVER, "%s", failure);
    *out = &driver;
    return ATTN_OK;
}

attn_status attn_cuda_status(cu_result result, const char *what)
{
    char text[256];
    if (!result) return ATTN_OK;
    describe(result, text, sizeof text);
    return attn_fail(ATTN_E_DRIVER, "%s: %s", what, text);
}

/* The primary context of a device, retained once and kept for the process. */
static attn_status primary_context(cu_device device, cu_context *context)
{
    static _Atomic(cu_context) kept[DEVICES_MAX];
    ATTN_CHECK(device < DEVICES_MAX, ATTN_E_DEVICE, "device: expected below %d, got %d",
               DEVICES_MAX, device);
    *context = atomic_load(&kept[device]);
    if (*context) return ATTN_OK;
    ATTN_TRY(attn_cuda_status(driver.device_primary_ctx_retain(context, device),
                              "cuDevicePrimaryCtxRetain"));
    atomic_store(&kept[device], *context);
    return ATTN_OK;
}

/* Multiprocessors of a 9.0 device, looked up once. */
static attn_status multiprocessors(cu_device device, int ordinal, int *count)
{
    static _Atomic int known[DEVICES_MAX];
    int major = 0, minor = 0;
    *count = device < DEVICES_MAX ? atomic_load(&known[device]) : 0;
    if (*count) return ATTN_OK;
    driver.device_get_attribute(&major, CU_DEVICE_CAPABILITY_MAJOR, device);
    driver.device_get_attribute(&minor, CU_DEVICE_CAPABILITY_MINOR, device);
    ATTN_CHECK(major == 9 && minor == 0, ATTN_E_NOT_BUILT,
               "device %d: kernels are built for compute capability 9.0 (Hopper), got %d.%d",
               ordinal, major, minor);
    ATTN_TRY(
        attn_cuda_status(driver.device_get_attribute(count, CU_DEVICE_MULTIPROCESSOR_COUNT, device),
                         "cuDeviceGetAttribute"));
    if (device < DEVICES_MAX) atomic_store(&known[device], *count);
    return ATTN_OK;
}

attn_status attn_cuda_enter(int ordinal, struct attn_cuda_device *out)
{
    const struct attn_cuda_driver *cu;
    cu_device current;
    cu_context context;
    out->pushed = 0;
    ATTN_TRY(attn_cuda_driver(&cu));
    ATTN_TRY(attn_cuda_status(cu->device_get(&out->device, ordinal), "the tensors' device"));
    ATTN_TRY(multiprocessors(out->device, ordinal, &out->multiprocessors));
    if (cu->ctx_get_device(&current) == 0 && current == out->device) return ATTN_OK;
    ATTN_TRY(primary_context(out->device, &context));
    ATTN_TRY(attn_cuda_status(cu->ctx_push_current(context), "cuCtxPushCurrent"));
    out->pushed = 1;
    return ATTN_OK;
}

void attn_cuda_leave(const struct attn_cuda_device *device)
{
    cu_context context;
    if (device->pushed) driver.ctx_pop_current(&context);
}

int attn_gpu_count(char *text, size_t text_bytes)
{
    int count = 0;
    pthread_once(&once, open_driver);
    if (!failure[0]) driver.device_get_count(&count);
    if (text && text_bytes) {
        if (failure[0])
            snprintf(text, text_bytes, "%s", failure);
        else
            snprintf(text, text_bytes,
                     "NVIDIA driver with CUDA %d.%d (this build needs %d.0), %d GPU%s",
                     version / 1000, version % 1000 / 10, ATTN_CUDA_MAJOR, count,
                     count == 1 ? "" : "s");
    }
    return count;
}
