/* SPDX-License-Identifier: MIT
 *
 * Units over threads: who works where.
 *
 *   units <= slots           every unit has a slot of its own; threads share units from the start
 *   units > slots >= threads  thread t owns slot t.  It begins another unit only while some unit
 *                            has not begun, and nobody helps before that; so its last unit is over
 *                            and the slot free
 *   units > slots < threads  waves of `slots` units, each as in the first case
 */
#include "cpu/units.h"

#include <sched.h>

#include <xmmintrin.h>

#include "cpu/threads.h"

#define SPINS 200 /* looks before a waiting thread gives way */

/* A wave: units [begin, end). */
struct wave {
    struct attn_units *units;
    int64_t begin, end;
    int threads;
    bool owned; /* slots belong to threads, else to units */
};

static void wait_a_little(int *looks)
{
    if (++*looks < SPINS)
        _mm_pause();
    else
        sched_yield();
}

/* Helps with unit u until nothing of it is left to take. */
static void work_on(const struct wave *w, int64_t u, int thread)
{
    struct attn_units *all = w->units;
    struct attn_unit *unit = &all->unit[u];
    int64_t part, task;
    while ((part = atomic_fetch_add(&unit->part, 1)) < unit->parts) {
        all->prepare(all->context, u, unit->slot, part);
        atomic_fetch_add(&unit->ready, 1);
    }
    for (int looks = 0; atomic_load(&unit->ready) < unit->parts;) wait_a_little(&looks);
    while ((task = atomic_fetch_add(&unit->task, 1)) < unit->tasks)
        all->compute(all->context, u, unit->slot, task, thread);
}

/* The unit in which a thread's share of the wave's work begins. */
static int64_t first_unit(const struct wave *w, int thread)
{
    const struct attn_unit *unit = w->units->unit;
    double from = unit[w->begin].before;
    double to = w->end < w->units->count ? unit[w->end].before : w->units->work;
    double at = from + (to - from) * thread / w->threads;
    int64_t low = w->begin, high = w->end;
    while (high - low > 1) {
        int64_t middle = low + (high - low) / 2;
        if (unit[middle].before <= at)
            low = middle;
        else
            high = middle;
    }
    return low;
}

static void work(void *context, int64_t task, int thread)
{
    (void)task;
    const struct wave *w = context;
    int64_t n = w->end - w->begin, first = first_unit(w, thread) - w->begin;
    for (int64_t i = 0; w->owned && i < n; i++) {
        int64_t u = w->begin + (first + i) % n;
        struct attn_unit *unit = &w->units->unit[u];
        int32_t no = 0;
        if (atomic_load(&unit->begun) || !atomic_compare_exchange_strong(&unit->begun, &no, 1))
            continue;
        unit->slot = thread;
        atomic_store(&unit->begun, 2);
        work_on(w, u, thread);
    }
    for (int64_t i = 0; i < n; i++) {
        int64_t u = w->begin + (first + i) % n;
        struct attn_unit *unit = &w->units->unit[u];
        if (atomic_load(&unit->task) >= unit->tasks) continue;
        int looks = 0; /* until its slot is known */
        while (w->owned && atomic_load(&unit->begun) < 2) wait_a_little(&looks);
        work_on(w, u, thread);
    }
}

void attn_units_run(struct attn_units *units, int threads)
{
    struct wave w = {.units = units, .threads = threads};
    w.owned = units->count > units->slots && units->slots >= threads;
    int64_t step = w.owned ? units->count : units->slots;
    for (int64_t u = 0; !w.owned && u < units->count; u++)
        units->unit[u].slot = (int32_t)(u % step);
    for (; w.begin < units->count; w.begin = w.end) {
        w.end = w.begin + step < units->count ? w.begin + step : units->count;
        attn_parallel(threads, threads, work, &w);
    }
}
