/* SPDX-License-Identifier: MIT
 *
 * kv_append: the new tokens' K and V go to the cache, K rotated where there is a table.  Part of
 * mha_fwd, before the attention: new token t of sequence i lands at position cached + t of its
 * cache row.  V is stored bit for bit.
 */
#include "cpu/mha_fwd.h"
#include "cpu/threads.h"

#define TOKENS 64 /* a task */

/* One token: all KV heads. */
static void append_token(const struct attn_mha_fwd_problem *p, const struct attn_cpu_seq *s,
                         const struct attn_rotary_kernel *rotary, int64_t i, int64_t t)
{
    int64_t bytes = attn_dtype_bytes(p->dtype), at = s->new_start + t, x = s->cached + t;
    int64_t half_bytes = p->rotary_width / 2 * bytes, position = s->rotary + t;
    char *k = p->k.data + attn_cpu_cache_offset(p, &p->k, s, x);
    char *v = p->v.data + attn_cpu_cache_offset(p, &p->v, s, x);
    const char *k_new = p->k_new.data + bytes * (i * p->k_new.batch + at * p->k_new.row);
    const char *v_new = p->v_new.data + bytes * (i * p->v_new.batch + at * p->v_new.row);
    for (int64_t h = 0; h < p->h_k; ++h) {
        const char *from = k_new + bytes * h * p->k_new.head;
        char *to = k + bytes * h * p->k.head;
        if (p->rotary_cos)
            rotary->run(from, to, (const char *)p->rotary_cos + position * half_bytes,
                        (const char *)p->rotary_sin + position * half_bytes, (int32_t)p->d_qk,
                        (int32_t)p->rotary_width, p->rotary_interleaved);
        else
            memcpy(to, from, (size_t)(p->d_qk * bytes));
        memcpy(v + bytes * h * p->v.head, v_new + bytes * h * p->v_new.head,
               (size_t)(p->d_v * bytes));
    }
}

struct append {
    const struct attn_mha_fwd_problem *p;
    const struct attn_cpu_seq *seqs;
    const struct attn_rotary_kernel *rotary;
    int64_t chunks; /* of the longest append */
};

/* Task: up to TOKENS new tokens of a sequence. */
static void append_tokens(void *context, int64_t task, int thread)
{
    (void)thread;
    const struct append *a = context;
    int64_t i = task / a->chunks, t = task % a->chunks * TOKENS, end = t + TOKENS;
    if (end > a->seqs[i].new_len) end = a->seqs[i].new_len;
    for (; t < end; ++t) append_token(a->p, &a->seqs[i], a->rotary, i, t);
}

void attn_kv_append_cpu(const struct attn_mha_fwd_problem *p, const struct attn_cpu_seq *seqs,
                        const struct attn_rotary_kernel *rotary, int threads)
{
    struct append a = {p, seqs, rotary, (p->s_new + TOKENS - 1) / TOKENS};
    attn_parallel(threads, p->b * a.chunks, append_tokens, &a);
}
