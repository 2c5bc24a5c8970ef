/* SPDX-License-Identifier: MIT
 *
 * How many threads a call may use, and the floating-point state its threads run in.
 *
 * One `omp parallel num_threads(n)` a phase, tasks drawn from a counter; no affinity, nesting or
 * schedule is touched.  A call from inside a parallel region, and a forked child, runs alone.
 */
#ifndef ATTN_CPU_THREADS_H
#define ATTN_CPU_THREADS_H

#include <stdint.h>

/* At most `wish` threads (0: the run time's own number) and at most one per task. */
int attn_threads(int32_t wish, int64_t tasks);

/* Calls body(context, task, thread) for 0 <= task < tasks on up to `threads` threads, in rising
 * order of start, each inside attn_fp_enter / leave; returns when all are done.  One thread is the
 * caller, without OpenMP, which would allocate a team. */
void attn_parallel(int threads, int64_t tasks,
                   void (*body)(void *context, int64_t task, int thread), void *context);

/* MXCSR to round-to-nearest with denormals flushed, all exceptions masked; returns the old state,
 * which attn_fp_leave restores.  Every thread of a region does this, so results do not depend on
 * who runs what. */
uint32_t attn_fp_enter(void);
void attn_fp_leave(uint32_t state);

#endif
