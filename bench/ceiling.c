/* SPDX-License-Identifier: MIT
 *
 * What this machine can do at most, measured: one line a rate, "name units-per-second".
 *
 *   fma_fp32     FLOP/s of fp32 multiply-adds, the widest vectors there are, registers only
 *   dp_bf16      FLOP/s of VDPBF16PS, registers only
 *   amx_bf16     FLOP/s of TDPBF16PS, tiles only
 *   read         bytes/s of reading more memory than caches hold, each thread its own part
 *
 * Best of several runs of all threads at once; a rate that the machine does not have is left out.
 * Usage: ceiling [threads] [megabytes to read].   Built by bench/cpu_mha_fwd.py: cc -O3 -fopenmp.
 */
#define _GNU_SOURCE
#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* Of runs for each rate, the best of many short ones, as neighbours come and go; of a rate
 * alone. */
#define SECONDS 0.7
#define SECONDS_ALONE 0.15
#define STEPS 200000 /* of a loop of 12 or 4 independent chains */

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static volatile float sink; /* keeps results alive */

/* Twelve chains hide the latency of 4 to 6 clocks on two ports.  Names, not an array: gcc 12 keeps
 * an array of vectors that an asm touches in memory, and the loop then runs at a quarter of its
 * rate. */
#define CHAINS(step)                                                                               \
    step(0) step(1) step(2) step(3) step(4) step(5) step(6) step(7) step(8) step(9) step(10)       \
        step(11)

__attribute__((target("avx2,fma"))) static double fma_avx2(void)
{
    __m256 a = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(1e-6f);
#define START(i) __m256 x##i = _mm256_set1_ps((float)i);
    CHAINS(START)
#undef START
    for (long n = 0; n < STEPS; n++) {
#define STEP(i)                                                                                    \
    x##i = _mm256_fmadd_ps(x##i, a, b);                                                            \
    __asm__ volatile("" : "+x"(x##i));
        CHAINS(STEP)
#undef STEP
    }
    __m256 sum = _mm256_setzero_ps();
#define ADD(i) sum = _mm256_add_ps(sum, x##i);
    CHAINS(ADD)
#undef ADD
    sink = _mm256_cvtss_f32(sum);
    return 12.0 * 8 * 2 * STEPS;
}

__attribute__((target("avx512f"))) static double fma_avx512(void)
{
    __m512 a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(1e-6f);
#define START(i) __m512 x##i = _mm512_set1_ps((float)i);
    CHAINS(START)
#undef START
    for (long n = 0; n < STEPS; n++) {
#define STEP(i)                                                                                    \
    x##i = _mm512_fmadd_ps(x##i, a, b);                                                            \
    __asm__ volatile("" : "+v"(x##i));
        CHAINS(STEP)
#undef STEP
    }
    __m512 sum = _mm512_setzero_ps();
#define ADD(i) sum = _mm512_add_ps(sum, x##i);
    CHAINS(ADD)
#undef ADD
    sink = _mm512_cvtss_f32(sum);
    return 12.0 * 16 * 2 * STEPS;
}

__attribute__((target("avx512f,avx512bf16"))) static double dp_bf16(void)
{
    __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f80);
#define START(i) __m512 x##i = _mm512_set1_ps((float)i);
    CHAINS(START)
#undef START
    for (long n = 0; n < STEPS; n++) {
#define STEP(i)                                                                                    \
    x##i = _mm512_dpbf16_ps(x##i, a, a);                                                           \
    __asm__ volatile("" : "+v"(x##i));
        CHAINS(STEP)
#undef STEP
    }
    __m512 sum = _mm512_setzero_ps();
#define ADD(i) sum = _mm512_add_ps(sum, x##i);
    CHAINS(ADD)
#undef ADD
    sink = _mm512_cvtss_f32(sum);
    return 12.0 * 32 * 2 * STEPS;
}

/* Four accumulators in rotation; 16 rows of 16 columns, 32 products each. */
__attribute__((target("amx-tile,amx-bf16"))) static double amx_bf16(void)
{
    static _Alignas(64) uint8_t zeros[1024];
    struct {
        uint8_t palette, start, pad[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
    __asm__ volatile(""
                     :
                     : "r"(&config)
                     : "memory"); /* the intrinsic claims to read 8 bytes only */
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, zeros, 64);
    _tile_loadd(5, zeros, 64);
    _tile_loadd(6, zeros, 64);
    _tile_loadd(7, zeros, 64);
    for (long n = 0; n < STEPS / 4; n++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
    return 4.0 * 16 * 16 * 32 * 2 * (STEPS / 4);
}

static const char *memory;
static size_t memory_bytes;

__attribute__((target("avx2"))) static double read_memory(void)
{
    size_t each = memory_bytes / (size_t)omp_get_num_threads() / 4096 * 4096;
    const char *p = memory + each * (size_t)omp_get_thread_num();
    __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
    for (size_t i = 0; i < each; i += 128) {
        _mm_prefetch(p + i + 4096, _MM_HINT_T0);
        _mm_prefetch(p + i + 4160, _MM_HINT_T0);
        a = _mm256_xor_si256(a, _mm256_load_si256((const __m256i *)(p + i)));
        b = _mm256_xor_si256(b, _mm256_load_si256((const __m256i *)(p + i + 32)));
        c = _mm256_xor_si256(c, _mm256_load_si256((const __m256i *)(p + i + 64)));
        d = _mm256_xor_si256(d, _mm256_load_si256((const __m256i *)(p + i + 96)));
    }
    a = _mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_xor_si256(c, d));
    sink = (float)_mm256_extract_epi32(a, 0);
    return (double)each;
}

static const char *only; /* the rate to measure; NULL: all */

static void report(const char *name, double (*work)(void), int threads)
{
    double best = 0, seconds = only ? SECONDS_ALONE : SECONDS;
    if (only && strcmp(only, name) != 0) return;
    for (double until = now() + seconds; now() < until;) {
        double done = 0, begin = 0, end = 0;
#pragma omp parallel num_threads(threads) reduction(+ : done)
        {
#pragma omp barrier
#pragma omp master
            begin = now();
#pragma omp barrier
            done += work();
#pragma omp barrier
#pragma omp master
            end = now();
        }
        if (done / (end - begin) > best) best = done / (end - begin);
    }
    printf("%s %.4g\n", name, best);
}

int main(int count, char **args)
{
    int threads = count > 1 ? atoi(args[1]) : omp_get_max_threads();
    memory_bytes = (size_t)(count > 2 ? atoi(args[2]) : 1024) << 20;
    only = count > 3 ? args[3] : NULL;
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f"))
        report("fma_fp32", fma_avx512, threads);
    else if (__builtin_cpu_supports("fma"))
        report("fma_fp32", fma_avx2, threads);
    unsigned a, b, c, d;
    __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
    int amx = (d >> 22 & 1) && (d >> 24 & 1) && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(1));
    if (__builtin_cpu_supports("avx512f") && (a >> 5 & 1)) report("dp_bf16", dp_bf16, threads);
    if (amx) report("amx_bf16", amx_bf16, threads);
    if (__builtin_cpu_supports("avx2") && (!only || strcmp(only, "read") == 0)) {
        char *fresh = aligned_alloc(1 << 21, memory_bytes + (1 << 21));
        if (!fresh) return 1;
        memset(fresh, 1, memory_bytes + (1 << 21));
        memory = fresh;
        report("read", read_memory, threads);
        free(fresh);
    }
    return 0;
}
