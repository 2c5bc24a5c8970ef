/* SPDX-License-Identifier: MIT
 *
 * Which kernel runs a kda problem and on how many blocks: integers in, integers out.
 */
#include <string.h>

#include "cuda/kda_cuda.h"
#include "cuda/kernels/kda_fwd_params.h"

/* Rows on multiples of 16 bytes, which the copy engine wants and vector stores. */
static bool aligned(const struct attn_rows *r, const struct attn_kda_problem *p)
{
    return (p->b <= 1 || r->batch % 8 == 0) && (p->t <= 1 || r->row % 8 == 0) &&
           (p->h <= 1 || r->head % 8 == 0) && (uintptr_t)r->data % 16 == 0;
}

void attn_kda_cuda_choose(const struct attn_kda_problem *p, int multiprocessors,
                          struct attn_kda_cuda_plan *plan)
{
    memset(plan, 0, sizeof *plan);
    plan->cluster = ATTN_KDA_CLUSTER((int32_t)p->d, ATTN_KDA_VALUE_ROWS);
    int64_t pairs = p->n * p->h, clusters = multiprocessors / plan->cluster;
    plan->grid = plan->cluster * (int32_t)(pairs < clusters ? pairs : clusters);
    plan->ordered = p->cu_seqlens && p->n > 1 && pairs > clusters;
    if (plan->ordered) plan->workspace_bytes = ATTN_KDA_TICKET_BYTES + (p->n * 4 + 63) / 64 * 64;

    const struct attn_rows *inputs[4] = {&p->q, &p->k, &p->g, &p->v};
    plan->copy_bytes = (p->b * p->t * p->h * p->d * 2 + 63) / 64 * 64;
    for (int i = 0; i < 4; i++) {
        if (aligned(inputs[i], p)) continue;
        plan->copied |= 1 << i;
        plan->workspace_bytes += plan->copy_bytes;
    }
    plan->out_aligned = aligned(&p->out, p);
}

/* States are read in fours or in pairs of elements. */
static attn_status check_states(const struct attn_states *s, const struct attn_kda_problem *p,
                                const char *name)
{
    if (!s->data) return ATTN_OK;
    uintptr_t unit = s->dtype == ATTN_F32 ? 16 : 8;
    bool steps = (p->h <= 1 || s->head % 4 == 0) && s->slot % 4 == 0;
    ATTN_CHECK(
        steps && (uintptr_t)s->data % unit == 0, ATTN_E_NOT_BUILT,
        "%s: on a GPU slots and heads on multiples of 4 elements and data on multiples of %d "
        "bytes are built, got strides %lld and %lld at %p",
        name, (int)unit, (long long)s->slot, (long long)s->head, s->data);
    return ATTN_OK;
}

attn_status attn_kda_cuda_check(const struct attn_kda_problem *p)
{
    ATTN_CHECK(p->dtype == ATTN_BF16, ATTN_E_NOT_BUILT, "q: on a GPU bf16 is built, got %s",
               attn_dtype_name(p->dtype));
    ATTN_CHECK(p->n * p->h * (p->d / 64) <= INT32_MAX, ATTN_E_NOT_BUILT,
               "q: on a GPU fewer than 2^30 pairs of sequence and head are built, got %lld",
               (long long)(p->n * p->h));
    ATTN_TRY(check_states(&p->initial, p, p->step ? "state" : "initial_state"));
    ATTN_TRY(check_states(&p->final, p, "final_state"));
    return check_states(&p->checkpoint, p, "checkpoint_states");
}
