/* SPDX-License-Identifier: MIT
 *
 * What this CPU can do, what ATTN_CPU allows of it, and the kernel table that follows.
 *
 * A rung counts only when the operating system saves its registers (XCR0), and AMX only when the
 * kernel gave permission.  ATTN_CPU is c, avx2, avx512, avx512bf16 or amx: the highest rung to use;
 * another word is ignored, and said so at ATTN_LOG=1.
 *
 * On Intel's CPUs VDPBF16PS has half the rate of fp32 multiply-adds, so there the rung avx512bf16
 * is taken only if ATTN_CPU names it.
 */
#include <cpuid.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "attn/attn.h"
#include "core/env.h"
#include "cpu/amx.h"
#include "cpu/kernels.h"

static const struct rung {
    const char *name;
    unsigned bit;
} rungs[] = {
    {"c", 0},
    {"avx2", ATTN_CPU_AVX2},
    {"avx512", ATTN_CPU_AVX512},
    {"avx512bf16", ATTN_CPU_AVX512BF16},
    {"amx", ATTN_CPU_AMX},
};
#define RUNGS (sizeof rungs / sizeof *rungs)

static pthread_once_t once = PTHREAD_ONCE_INIT;
static struct attn_cpu_kernels table;
static unsigned have, can;
static char features[256];

static uint64_t xcr0(void)
{
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return ((uint64_t)high << 32) | low;
}

/* The features of the machine, whatever ATTN_CPU says; *slow: those that cost more than they
 * give. */
static unsigned probe(char *text, size_t bytes, unsigned *slow)
{
    unsigned a, b, c, d, b7 = 0, c7 = 0, d7 = 0, a71 = 0, found = 0;
    char vendor[13] = {0}, brand[49] = {0};
    if (!__get_cpuid(0, &a, &b, &c, &d)) return 0;
    memcpy(vendor, &b, 4);
    memcpy(vendor + 4, &d, 4);
    memcpy(vendor + 8, &c, 4);
    for (unsigned i = 0; i < 3; ++i) {
        unsigned r[4];
        if (!__get_cpuid(0x80000002u + i, &r[0], &r[1], &r[2], &r[3])) break;
        memcpy(brand + 16 * i, r, 16);
    }
    __get_cpuid(1, &a, &b, &c, &d);
    uint64_t state = c & (1u << 27) ? xcr0() : 0;
    bool fma = c & (1u << 12), f16c = c & (1u << 29);
    if (__get_cpuid_count(7, 0, &a, &b7, &c7, &d7) && a >= 1)
        __get_cpuid_count(7, 1, &a71, &b, &c, &d);
    bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6;
    if (ymm && fma && f16c && (b7 & (1u << 5))) found |= ATTN_CPU_AVX2;
    unsigned avx512 = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31); /* F DQ BW VL */
    if ((found & ATTN_CPU_AVX2) && zmm && (b7 & avx512) == avx512) found |= ATTN_CPU_AVX512;
    bool bf16 = a71 & (1u << 5);
    bool vbmi = c7 & (1u << 1);
    if ((found & ATTN_CPU_AVX512) && bf16) found |= ATTN_CPU_AVX512BF16;
    *slow = strcmp(vendor, "GenuineIntel") == 0 ? ATTN_CPU_AVX512BF16 : 0;
    if ((found & ATTN_CPU_AVX512) && bf16 && vbmi && attn_amx_usable()) found |= ATTN_CPU_AMX;
    snprintf(text, bytes, "%s, %s:%s%s%s%s", vendor, brand[0] ? brand : "unnamed",
             found & ATTN_CPU_AVX2 ? " avx2 fma f16c" : "",
             found & ATTN_CPU_AVX512 ? " avx512" : "", bf16 ? " avx512-bf16" : "",
             found & ATTN_CPU_AMX ? " amx-bf16" : "");
    return found;
}

static void make_table(void)
{
    unsigned slow = 0, found = probe(features, sizeof features, &slow), allowed = ~0u;
    const char *cap = getenv("ATTN_CPU");
    if (cap) {
        unsigned mask = 0;
        bool known = false;
        for (size_t i = 0; i < RUNGS; ++i) {
            mask |= rungs[i].bit;
            if (strcmp(cap, rungs[i].name) != 0) continue;
            allowed = mask;
            slow &= ~rungs[i].bit; /* asked for by its name */
            known = true;
        }
        if (!known && attn_log_on()) attn_log("ATTN_CPU=%s names no rung and is ignored", cap);
    }
    can = found & allowed;
    have = can & ~slow;
    attn_cpu_init_x86(&table, have);
}

const struct attn_cpu_kernels *attn_cpu_kernels(void)
{
    pthread_once(&once, make_table);
    return &table;
}

unsigned attn_cpu_have(void)
{
    pthread_once(&once, make_table);
    return have;
}

unsigned attn_cpu_can(void)
{
    pthread_once(&once, make_table);
    return can;
}

const char *attn_cpu_features(void)
{
    pthread_once(&once, make_table);
    return features;
}

const char *attn_cpu_rung(void)
{
    unsigned now = attn_cpu_have();
    size_t i = RUNGS - 1;
    while (i > 0 && !(now & rungs[i].bit)) --i;
    return rungs[i].name;
}
