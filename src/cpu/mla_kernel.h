/* SPDX-License-Identifier: MIT
 *
 * What a kernel of the mla ops is given and must keep.
 *
 * A task is the attention of some query rows to one run of keys that all of them share: the heads
 * of a token (times its sibling tokens, in dense decode) against a piece of a sequence, or of an
 * index list.  A kernel reads each key row once for all its query rows.
 */
#ifndef ATTN_CPU_MLA_KERNEL_H
#define ATTN_CPU_MLA_KERNEL_H

#include "ops/mla.h"

/* Positions [at, end) that are left of a task's keys. */
struct attn_mla_cursor {
    const struct attn_mla_cache *cache; /* [2] */
    const int32_t *pages;   /* dense: the sequence's row of the block table, else NULL */
    int64_t head_bytes;     /* dense: from KV head 0 to the task's */
    const int32_t *list[2]; /* sparse: position x is list[0][x], or */
    int64_t first;          /* list[1][x - first] from here on */
    bool scales;            /* MODEL1 */
    int64_t at, end;
};

/* Row addresses of up to `max` keys, in order; with MODEL1 their scales beside them.  Returns how
 * many: fewer than max only at the end of the positions.  Skipped indices take no place. */
int32_t attn_mla_next_keys(struct attn_mla_cursor *c, int32_t max, const char **row,
                           const char **scales);

/* With s_j = scale (q . k_j) over the keys that row r sees, and a reference m of the kernel's
 * choice (2^(s_j - m) must neither overflow nor lose a sum to underflow):
 *   o[r] = sum_j 2^(s_j - m) v_j,  l[r] = sum_j 2^(s_j - m),  m[r] = m,  top[r] = max_j s_j
 * A row that sees no key gives o 0, l 0, top -inf.  A NaN or +inf score gives l NaN in its row. */
struct attn_mla_task {
    int32_t rows; /* 1 .. rows_max */
    int32_t d_qk;
    const char *q;
    const int64_t *q_row; /* [rows] bytes from q to the row's d_qk elements */
    const int32_t *hi;    /* [rows] row r sees the first hi[r] keys; NULL: all */
    float scale;          /* softmax scale and descales, times log2 e */
    struct attn_mla_cursor keys;
    float *o; /* [rows][512], 64-byte aligned */
    float *m, *l, *top;
};

/* Merges the pieces of one row, piece j's numbers at j * piece floats from piece 0's:
 *   lse = ln sum_j 2^m_j l_j,  max = max_j top_j ln 2
 *   out = v_scale / (1 + exp(sink - lse)) * sum_j 2^m_j o_j / sum_j 2^m_j l_j
 * All l_j 0: out 0, lse +inf, max -inf, and no o is read.  max may be NULL. */
struct attn_mla_pieces {
    const float *o, *m, *l, *top;
    int64_t piece;
    int32_t pieces;
    float sink, v_scale; /* no sink: -inf */
};

struct attn_mla_kernel {
    const char *name; /* attn_mla_v32_amx: serves the ops whose cache has this format */
    int32_t rows_max;
    int64_t (*scratch_bytes)(int64_t rows, int64_t d_qk);
    void (*run)(const struct attn_mla_task *task, char *scratch);
};

struct attn_mla_finish_kernel {
    const char *name; /* attn_mla_finish_avx512 */
    void (*run)(const struct attn_mla_pieces *in, enum attn_dtype out_dtype, void *out, float *lse,
                float *max);
};

#endif
