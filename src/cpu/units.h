/* SPDX-License-Identifier: MIT
 *
 * Units of work, each to be prepared and then computed, dealt out to threads so that what a thread
 * prepares it finds in its own cache.
 *
 *   unit = parts, in any order (packing a head's keys)  ->  tasks, in order (its blocks of queries)
 *
 * A unit's parts and tasks are drawn from counters, so several threads may share it: all first help
 * to prepare it, then take tasks.  Thread t of T begins where the share t / T of the whole work
 * begins.  With more units than threads each takes units that nobody began, one at a time, and
 * helps others when none is left; so it needs memory for one prepared unit, its slot.
 */
#ifndef ATTN_CPU_UNITS_H
#define ATTN_CPU_UNITS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct attn_unit {
    _Atomic int64_t part, ready, task; /* next to take, parts done, next to take */
    _Atomic int32_t begun;
    int32_t slot;
    int64_t parts, tasks;
    double before; /* work of the units in front of it, in any measure */
    char pad[64 - 5 * sizeof(int64_t) - 2 * sizeof(int32_t) - sizeof(double)];
};

_Static_assert(sizeof(struct attn_unit) == 64, "a cache line, so that counters do not share one");

struct attn_units {
    struct attn_unit *unit; /* [count], 64-byte aligned; parts, tasks and before set, the rest 0 */
    int64_t count, slots;   /* prepared units that memory holds at once */
    double work;            /* of all units */
    void (*prepare)(void *context, int64_t unit, int32_t slot, int64_t part);
    void (*compute)(void *context, int64_t unit, int32_t slot, int64_t task, int thread);
    void *context;
};

/* Does all of it on up to `threads` threads. */
void attn_units_run(struct attn_units *units, int threads);

#endif
