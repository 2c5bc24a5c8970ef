/* SPDX-License-Identifier: MIT
 *
 * The permission to use AMX tiles, asked of the kernel once.
 */
#include "cpu/amx.h"

#include <cpuid.h>
#include <pthread.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ARCH_REQ_XCOMP_PERM 0x1023
#define XFEATURE_XTILEDATA 18

static pthread_once_t once = PTHREAD_ONCE_INIT;
static bool usable;

#ifdef ATTN_AMX_EMU
static void ask(void) { usable = true; } /* tiles in memory: nobody to ask */
#else
static void ask(void)
{
    unsigned a, b, c, d;
    uint32_t low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) return; /* OSXSAVE */
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & (3u << 17)) != (3u << 17)) return; /* XTILECFG, XTILEDATA */
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    if (!(d & (1u << 22)) || !(d & (1u << 24))) return; /* AMX-BF16, AMX-TILE */
    usable = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#endif

bool attn_amx_usable(void)
{
    pthread_once(&once, ask);
    return usable;
}
