/* SPDX-License-Identifier: MIT
 *
 * Thread counts by the OpenMP run time, fork detection, MXCSR.
 */
#include "cpu/threads.h"

#include <omp.h>
#include <pthread.h>
#include <stdatomic.h>

#include <xmmintrin.h>

static atomic_int forked; /* this process is a fork's child: its OpenMP pool died with the parent */

static void note_fork(void) { atomic_store(&forked, 1); }

/* At load: the pool may be torch's, used before our first call. */
__attribute__((constructor)) static void watch_forks(void)
{
    pthread_atfork(NULL, NULL, note_fork);
}

int attn_threads(int32_t wish, int64_t tasks)
{
    if (tasks <= 1 || atomic_load(&forked) || omp_in_parallel()) return 1;
    int n = omp_get_max_threads();
    if (wish > 0 && wish < n) n = wish;
    if (wish > n) n = wish < 1024 ? wish : 1024;
    return tasks < n ? (int)tasks : n;
}

void attn_parallel(int threads, int64_t tasks,
                   void (*body)(void *context, int64_t task, int thread), void *context)
{
    if (threads <= 1 || tasks <= 1) {
        uint32_t state = attn_fp_enter();
        for (int64_t t = 0; t < tasks; ++t) body(context, t, 0);
        attn_fp_leave(state);
        return;
    }
    _Atomic int64_t next = 0;
#pragma omp parallel num_threads(threads)
    {
        uint32_t state = attn_fp_enter();
        for (int64_t t; (t = atomic_fetch_add_explicit(&next, 1, memory_order_relaxed)) < tasks;)
            body(context, t, omp_get_thread_num());
        attn_fp_leave(state);
    }
}

uint32_t attn_fp_enter(void)
{
    uint32_t old = _mm_getcsr();
    _mm_setcsr(0x9fc0); /* FTZ, DAZ, all masks, round to nearest, no flags */
    return old;
}

void attn_fp_leave(uint32_t state) { _mm_setcsr(state); }
