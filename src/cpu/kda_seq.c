/* SPDX-License-Identifier: MIT
 *
 * Where a sequence of kda_fwd lies, and whether what cu_seqlens and state_indices say makes sense.
 */
#include "cpu/kda.h"

static int64_t cu(const struct attn_kda_problem *p, int64_t i)
{
    return p->cu_wide ? ((const int64_t *)p->cu_seqlens)[i] : ((const int32_t *)p->cu_seqlens)[i];
}

struct attn_kda_seq attn_kda_seq(const struct attn_kda_problem *p, int64_t i)
{
    struct attn_kda_seq s = {.row = i, .len = p->t, .slot = i};
    if (p->cu_seqlens) {
        s.row = 0;
        s.start = cu(p, i);
        s.len = cu(p, i + 1) - s.start;
    }
    if (p->state_indices) s.slot = p->state_indices[i];
    return s;
}

static attn_status check_cu_seqlens(const struct attn_kda_problem *p)
{
    int64_t before = 0, rows = 0;
    for (int64_t i = 0; i <= p->n; ++i) {
        int64_t now = cu(p, i);
        ATTN_CHECK(now >= before && now <= p->t, ATTN_E_VALUE,
                   "cu_seqlens: expected rising from 0 to at most %lld, got %lld at %lld",
                   (long long)p->t, (long long)now, (long long)i);
        if (i > 0) {
            int64_t len = now - before;
            ATTN_CHECK(!p->step || len <= ATTN_KDA_STEP_MAX, ATTN_E_VALUE,
                       "cu_seqlens: expected at most %d tokens a sequence, got %lld at %lld",
                       ATTN_KDA_STEP_MAX, (long long)len, (long long)(i - 1));
            if (p->checkpoint_every) rows += len / p->checkpoint_every;
        }
        before = now;
    }
    ATTN_CHECK(!p->checkpoint_every || rows <= p->checkpoint_rows, ATTN_E_SHAPE,
               "checkpoint_states: expected at least %lld states, got %lld", (long long)rows,
               (long long)p->checkpoint_rows);
    return ATTN_OK;
}

/* Where states are written, each pair of slots is compared: far less work than the states are. */
static attn_status check_state_indices(const struct attn_kda_problem *p)
{
    const int32_t *slot = p->state_indices;
    const bool written = p->final.data && p->h > 0;
    for (int64_t i = 0; i < p->n; ++i) {
        ATTN_CHECK(slot[i] >= -1 && slot[i] < p->slots, ATTN_E_VALUE,
                   "state_indices: expected -1 or a slot below %lld, got %d at %lld",
                   (long long)p->slots, (int)slot[i], (long long)i);
        if (!written || slot[i] < 0) continue;
        bool seen = false;
        for (int64_t j = 0; j < i; ++j) seen |= slot[j] == slot[i];
        ATTN_CHECK(!seen, ATTN_E_VALUE,
                   "state_indices: expected slots that differ, got %d again at %lld", (int)slot[i],
                   (long long)i);
    }
    return ATTN_OK;
}

attn_status attn_kda_check_values(const struct attn_kda_problem *p)
{
    if (p->cu_seqlens) ATTN_TRY(check_cu_seqlens(p));
    return p->state_indices ? check_state_indices(p) : ATTN_OK;
}
