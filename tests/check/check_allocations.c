/* SPDX-License-Identifier: MIT
 *
 * Counts what the process allocates, by standing before the C library's allocator.  What the
 * OpenMP run time allocates for a team is its own affair and not counted: calls from its code are
 * told by their return address.  Only with glibc, whose own entry points do the work, and not in
 * sanitizer builds, which need that place.
 */
#define _GNU_SOURCE

#include <errno.h>
#include <link.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"

static atomic_llong allocations;

int64_t check_allocations(void) { return atomic_load(&allocations); }

#if defined(__GLIBC__) && !CHECK_SANITIZED

static uintptr_t runtime_low, runtime_high; /* addresses of the OpenMP run time's code */

static int find_runtime(struct dl_phdr_info *info, size_t bytes, void *context)
{
    (void)bytes;
    (void)context;
    if (!info->dlpi_name ||
        !(strstr(info->dlpi_name, "libgomp") || strstr(info->dlpi_name, "libomp")))
        return 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const ElfW(Phdr) *segment = &info->dlpi_phdr[i];
        if (segment->p_type != PT_LOAD || !(segment->p_flags & PF_X)) continue;
        runtime_low = info->dlpi_addr + segment->p_vaddr;
        runtime_high = runtime_low + segment->p_memsz;
    }
    return 1;
}

static void count(const void *caller)
{
    uintptr_t at = (uintptr_t)caller;
    if (at < runtime_low || at >= runtime_high) atomic_fetch_add(&allocations, 1);
}

bool check_allocations_counted(void)
{
    dl_iterate_phdr(find_runtime, NULL);
    return true;
}

void *__libc_malloc(size_t bytes);
void *__libc_calloc(size_t n, size_t bytes);
void *__libc_realloc(void *p, size_t bytes);
void *__libc_memalign(size_t align, size_t bytes);
void *memalign(size_t align, size_t bytes);

void *malloc(size_t bytes)
{
    count(__builtin_return_address(0));
    return __libc_malloc(bytes);
}

void *calloc(size_t n, size_t bytes)
{
    count(__builtin_return_address(0));
    return __libc_calloc(n, bytes);
}

void *realloc(void *p, size_t bytes)
{
    count(__builtin_return_address(0));
    return __libc_realloc(p, bytes);
}

void *memalign(size_t align, size_t bytes)
{
    count(__builtin_return_address(0));
    return __libc_memalign(align, bytes);
}

void *aligned_alloc(size_t align, size_t bytes)
{
    count(__builtin_return_address(0));
    return __libc_memalign(align, bytes);
}

int posix_memalign(void **p, size_t align, size_t bytes)
{
    count(__builtin_return_address(0));
    *p = __libc_memalign(align, bytes);
    return *p ? 0 : ENOMEM;
}

#else

bool check_allocations_counted(void) { return false; }

#endif
