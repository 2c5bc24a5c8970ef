/* SPDX-License-Identifier: MIT
 *
 * One sequence of mha_fwd on a CPU: its lengths and cache row, read from the index tensors and
 * checked.  Everything behind this file may trust them.  Entries that nothing live depends on are
 * not looked at: page-table entries outside [leftpad, end), the row of a sequence without keys.
 */
#include "cpu/mha_fwd.h"

typedef struct attn_mha_fwd_problem problem_t;

#define IN_RANGE(value, low, high, name, at)                                                       \
    ATTN_CHECK((value) >= (low) && (value) <= (high), ATTN_E_VALUE,                                \
               "%s: expected entry %lld in [%lld, %lld], got %lld", name, (long long)(at),         \
               (long long)(low), (long long)(high), (long long)(value))

/* Segment i of a cu_seqlens tensor over `total` packed rows. */
static attn_status read_segment(const int32_t *cu, const char *name, int64_t i, int64_t total,
                                int64_t *start, int64_t *length)
{
    int64_t from = cu[i], to = cu[i + 1];
    IN_RANGE(from, 0, total, name, i);
    IN_RANGE(to, from, total, name, i + 1);
    *start = from;
    *length = to - from;
    return ATTN_OK;
}

static attn_status read_query(const problem_t *p, int64_t i, struct attn_cpu_seq *s)
{
    s->q_start = 0;
    s->q_len = p->s_q;
    if (p->cu_seqlens_q)
        ATTN_TRY(read_segment(p->cu_seqlens_q, "cu_seqlens_q", i, p->t_q, &s->q_start, &s->q_len));
    if (p->seqused_q) {
        IN_RANGE(p->seqused_q[i], 0, s->q_len, "seqused_q", i);
        s->q_len = p->seqused_q[i];
    }
    ATTN_CHECK(s->q_len <= p->s_q, ATTN_E_VALUE,
               "max_seqlen_q: expected at least sequence %lld's %lld rows, got %lld", (long long)i,
               (long long)s->q_len, (long long)p->s_q);
    return ATTN_OK;
}

static attn_status read_pages(const problem_t *p, const struct attn_cpu_seq *s)
{
    const int32_t *pages = p->page_table + s->row * p->page_table_row;
    int64_t end = s->leftpad + s->k_len, begin = s->leftpad;
    if (s->new_len > 0 && s->cached < begin) begin = s->cached; /* appended under the padding */
    for (int64_t n = begin / p->page; n * p->page < end; ++n)
        ATTN_CHECK(pages[n] >= 0 && pages[n] < p->num_pages, ATTN_E_VALUE,
                   "page_table: expected entry (%lld, %lld) in [0, %lld), got %d",
                   (long long)s->row, (long long)n, (long long)p->num_pages, (int)pages[n]);
    return ATTN_OK;
}

attn_status attn_cpu_seq_read(const problem_t *p, int64_t i, struct attn_cpu_seq *s)
{
    int64_t n = p->s_k;
    *s = (struct attn_cpu_seq){.row = i};
    ATTN_TRY(read_query(p, i, s));
    if (p->cu_seqlens_k)
        ATTN_TRY(read_segment(p->cu_seqlens_k, "cu_seqlens_k", i, p->t_k, &s->k_start, &n));
    if (p->seqused_k) {
        IN_RANGE(p->seqused_k[i], 0, n, "seqused_k", i);
        n = p->seqused_k[i];
    }
    ATTN_CHECK(n <= p->s_k, ATTN_E_VALUE,
               "max_seqlen_k: expected at least sequence %lld's %lld keys, got %lld", (long long)i,
               (long long)n, (long long)p->s_k);
    if (p->k_new.data) {
        s->new_len = p->s_new;
        if (p->cu_seqlens_k_new)
            ATTN_TRY(read_segment(p->cu_seqlens_k_new, "cu_seqlens_k_new", i, p->t_new,
                                  &s->new_start, &s->new_len));
        ATTN_CHECK(n + s->new_len <= p->s_k, ATTN_E_VALUE,
                   "cache_seqlens: expected entry %lld plus %lld new keys within the cache's %lld "
                   "positions, got %lld",
                   (long long)i, (long long)s->new_len, (long long)p->s_k, (long long)n);
    }
    if (p->leftpad_k) {
        IN_RANGE(p->leftpad_k[i], 0, n + s->new_len, "leftpad_k", i);
        s->leftpad = p->leftpad_k[i];
    }
    s->cached = n;
    s->k_len = n - s->leftpad + s->new_len;
    bool used = s->k_len > 0 || s->new_len > 0; /* some position of the row is read or written */
    if (used && p->kv_batch_idx) {
        IN_RANGE(p->kv_batch_idx[i], 0, p->cache_rows - 1, "kv_batch_idx", i);
        s->row = p->kv_batch_idx[i];
    }
    if (p->page_table && used) ATTN_TRY(read_pages(p, s));
    if (p->rotary_cos) {
        s->rotary = p->seqlens_rotary ? p->seqlens_rotary[i] : p->seqused_k[i];
        int64_t queries = p->is_causal || p->is_local ? s->q_len : s->q_len > 0;
        int64_t rows = s->new_len > queries ? s->new_len : queries;
        ATTN_CHECK(rows == 0 || (s->rotary >= 0 && s->rotary + rows <= p->rotary_rows),
                   ATTN_E_VALUE,
                   "rotary_cos: expected positions %lld to %lld of sequence %lld within its %lld "
                   "rows",
                   (long long)s->rotary, (long long)(s->rotary + rows - 1), (long long)i,
                   (long long)p->rotary_rows);
    }
    if (p->cp_world > 1) {
        IN_RANGE(p->cp_tot_seqused_k[i], 0, (int64_t)INT32_MAX, "cp_tot_seqused_k", i);
        s->total = p->cp_tot_seqused_k[i];
    }
    return ATTN_OK;
}

int64_t attn_cpu_cache_offset(const problem_t *p, const struct attn_rows *cache,
                              const struct attn_cpu_seq *s, int64_t x)
{
    int64_t bytes = attn_dtype_bytes(p->dtype);
    if (p->page_table) {
        int64_t n = p->page_table[s->row * p->page_table_row + x / p->page];
        return bytes * (n * cache->batch + x % p->page * cache->row);
    }
    return bytes * (s->row * cache->batch + (s->k_start + x) * cache->row);
}
