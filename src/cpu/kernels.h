/* SPDX-License-Identifier: MIT
 *
 * The table of CPU kernels and what a kernel is given.
 *
 * A kernel computes one task and knows nothing of batches, threads or argument checking: the
 * drivers (mha_fwd.c, split_combine.c, kv_append.c) cut an op into tasks, and every mask of
 * the interface arrives here as one interval of visible keys a row.
 *
 * What a kernel may rely on: pointers are as aligned as their element type, scratch and packed
 * blocks are 64-byte aligned, MXCSR is round-to-nearest with denormals flushed, AMX permission was
 * given.  What it must keep:
 *   - it reads K and V rows of keys k_begin <= j < k_end only, and no row that no query row of the
 *     task can see may influence a result, NaN in it included (masked P is 0 and 0 * NaN is NaN:
 *     such V rows are zeroed where they are packed or skipped);
 *   - it writes exactly `rows` out rows and lse values a head;
 *   - the bits of a row depend on that row's q, its visible keys and the grid of key blocks
 *     (multiples of n), never on which rows share its task.  So thread counts change no bits.
 */
#ifndef ATTN_CPU_KERNELS_H
#define ATTN_CPU_KERNELS_H

#include <stdbool.h>
#include <stdint.h>

#include "core/dtype.h"
#include "cpu/mla_kernel.h"

/* Where the keys of one sequence lie.  Key j is at cache position x = first + j: row x of a
 * contiguous cache, or slot x % page of page pages[x / page].  All strides are bytes. */
struct attn_kv_view {
    const char *k, *v;      /* position 0 (of page 0 when paged), KV head 0 of the task */
    int64_t k_row, v_row;   /* one position to the next */
    int64_t k_head, v_head; /* one KV head to the next */
    int64_t k_page, v_page; /* one page to the next */
    const int32_t *pages;   /* NULL: contiguous */
    int64_t page;           /* positions a page */
    int64_t first;          /* position of key 0: the left padding */
};

static inline int64_t attn_kv_k_offset(const struct attn_kv_view *kv, int64_t j)
{
    int64_t x = kv->first + j;
    if (!kv->pages) return x * kv->k_row;
    return kv->pages[x / kv->page] * kv->k_page + x % kv->page * kv->k_row;
}

static inline int64_t attn_kv_v_offset(const struct attn_kv_view *kv, int64_t j)
{
    int64_t x = kv->first + j;
    if (!kv->pages) return x * kv->v_row;
    return kv->pages[x / kv->page] * kv->v_page + x % kv->page * kv->v_row;
}

/* Attention of `rows` query rows a KV head against keys [k_begin, k_end).
 *
 * A row is a (token, query head of the group) pair; row r of the task's KV head h reads d_qk
 * elements at q + h * q_head + q_row[r], and writes d_v elements at out + h * out_head + out_row[r]
 * and one float at lse + h * lse_head + lse_row[r].
 *   s = q . k + qv . v;  s *= score_scale[h];  softcap: s = softcap * tanh(s / softcap)
 *   out = out_scale[h] * sum_j p_j v_j / l,  lse = ln(l) + max over visible j, natural units
 * A sink adds exp(sink) to l.  A row with no visible key gives out 0 and lse -inf, or the sink.  A
 * row with a NaN or +inf among its visible scores gives NaN in out, and an lse of NaN or +inf. */
struct attn_mha_task {
    int32_t rows, heads; /* heads: KV heads; 1 unless the kernel is a decode kernel */
    int32_t d_qk, d_v;
    const char *q, *qv; /* qv NULL: off */
    char *out;
    float *lse;
    const int64_t *q_row, *qv_row, *out_row; /* [rows] bytes */
    const int64_t *lse_row;                  /* [rows] elements */
    int64_t q_head, qv_head, out_head;       /* bytes */
    int64_t lse_head;                        /* elements */
    const int32_t *lo, *hi; /* [rows] row r sees keys lo <= j < hi; lo = hi = 0: none */
    int64_t k_begin, k_end; /* k_begin is a multiple of the kernel's n; empty: k_begin = k_end */
    struct attn_kv_view kv;
    const char *packed;       /* this KV head's blocks: keys [i n, (i + 1) n) at i * pack_bytes */
    const float *score_scale; /* [heads] softmax scale times q and k descales */
    const float *out_scale;   /* [heads] v descale */
    float softcap;            /* 0: off */
    const float *sinks;       /* [heads][rows] logits, or NULL */
    bool partial;             /* out is fp32 whatever the dtype: a split's partial result */
    bool stream_out; /* the call's out outgrows L2: write past the caches, where worth it */
};

/* One kernel of mha_fwd (many rows, lanes are queries) or mha_decode (few rows a KV head, lanes are
 * the width).  d_s is the width of a score's dot product: d_qk, or d_qk + d_v with qv. */
struct attn_mha_kernel {
    const char *name;   /* attn_mha_fwd_bf16_avx512 */
    int32_t rows_max;   /* most rows a task may have */
    int32_t rows_step;  /* rows are padded to a multiple of this inside; a power of two */
    int32_t rows_least; /* fewer rows a KV head do not repay its pack: mha_fwd_short takes them */
    int32_t n;          /* keys of a block */
    bool decode;        /* takes several KV heads a task and walks the cache in address order */
    /* Bytes of scratch one thread needs for tasks of at most these sizes. */
    int64_t (*scratch_bytes)(int64_t d_s, int64_t d_v, int64_t rows, int64_t heads);
    /* Kernels that want K and V rearranged once for all row blocks of a KV head; NULL: reads them
     * where they lie.  pack writes the block of keys [j0, j0 + n) of the view's KV head 0: keys
     * first <= j < end are read, the others (hidden from every row of the sequence, or past its
     * end) are written as zeros. */
    int64_t (*pack_bytes)(int64_t d_s, int64_t d_v);
    void (*pack)(const struct attn_kv_view *kv, int32_t d_qk, int32_t d_v, bool qv, int64_t j0,
                 int64_t first, int64_t end, char *block);
    void (*run)(const struct attn_mha_task *task, char *scratch);
};

/* Rotates one row: y = rotate(x) over the first r elements (cos and sin hold r / 2), the rest of d
 * copied.  Computed in fp32, rounded to the dtype.  y == x is allowed.
 *   interleaved: pairs (2m, 2m + 1), else (m, m + r / 2)
 *   x' = x cos - y sin, y' = x sin + y cos */
struct attn_rotary_kernel {
    const char *name; /* attn_rotary_bf16_avx512 */
    void (*run)(const void *x, void *y, const void *cos, const void *sin, int32_t d, int32_t r,
                bool interleaved);
};

/* Combines one row: out[0..d_v) from `splits` partial rows o + s * o_split (elements) with weights
 * exp(lse[s * lse_split] - max), sink (may be NULL) added to the sum once; *lse_out is the
 * total. */
struct attn_split_combine_kernel {
    const char *name; /* attn_split_combine_avx512 */
    void (*run)(const float *o, int64_t o_split, const float *lse, int64_t lse_split,
                int32_t splits, int32_t d_v, const float *sink, void *out,
                enum attn_dtype out_dtype, float *lse_out);
};

/* ---- kda_fwd ----
 *
 * A sequence's tokens are cut into chunks of at most `chunk` tokens.  `prepare` turns a chunk of
 * one head into a record, all that does not depend on the state; records are independent of one
 * another.  `scan` takes a slice of the state (`slice` of its rows, which never mix) through the
 * chunks in order and writes their outputs.  Bits depend on the cut into chunks alone.  Strides are
 * bytes. */

/* What prepare reads: tokens 0 <= t < rows of one head.  The `ahead` tokens at q + q_ahead and so
 * on will be prepared next: worth fetching now. */
struct attn_kda_tokens {
    int32_t rows, ahead, d;
    const char *q, *k, *g, *beta; /* q, k, g: d elements a token; beta: one */
    int64_t q_row, k_row, g_row, beta_row;
    int64_t q_ahead, k_ahead, g_ahead;
    const float *bias;                   /* [d], or NULL */
    float slope, lower_bound;            /* slope: exp(A_log) */
    bool gate_activated, beta_activated; /* gate_activated: g is the log-decay */
};

/* One chunk for scan; v and out at its first token, value 0. */
struct attn_kda_part {
    const char *record;
    int32_t rows, at; /* at: its first token, counted from the first part's */
    const char *v;
    char *out;
    char *checkpoint; /* [V, K]: where the state after the chunk goes, or NULL */
};

struct attn_kda_scan {
    int32_t d, v0; /* state rows v0 <= v < v0 + slice */
    int32_t count;
    const struct attn_kda_part *parts;
    struct attn_kda_tokens tokens; /* what the first part was prepared from */
    int64_t v_row, out_row;
    float scale;         /* of out */
    float *state;        /* d * slice floats, 64-byte aligned: the slice between two scans */
    bool first;          /* the state starts here: from `initial` [V, K], or zeros */
    const char *initial; /* NULL: zeros */
    char *final;         /* [V, K], where the state goes after the last part; or NULL */
    enum attn_dtype state_dtype, checkpoint_dtype;
};

struct attn_kda_fwd_kernel {
    const char *name;     /* attn_kda_fwd_bf16_amx */
    int32_t chunk, slice; /* chunk is a multiple of 16, slice divides 64 */
    int64_t (*record_bytes)(int64_t d);
    int64_t (*scratch_bytes)(int64_t d);
    void (*prepare)(const struct attn_kda_tokens *tokens, char *record, char *scratch);
    void (*scan)(const struct attn_kda_scan *scan, char *scratch);
    void (*begin)(void), (*end)(void); /* around a task's calls of prepare and scan, if not NULL */
};

/* ---- kda_step ---- */

/* State rows v0 <= v < v0 + rows of one head through all of tokens, each state read and written
 * once; rows is a multiple of 16.  v, out and state at value v0. */
struct attn_kda_step_task {
    struct attn_kda_tokens tokens;
    int32_t rows;
    const char *v;
    char *out, *state; /* state: rows of d */
    int64_t v_row, out_row;
    float scale; /* of out */
    enum attn_dtype state_dtype;
};

struct attn_kda_step_kernel {
    const char *name; /* attn_kda_step_bf16_avx512 */
    void (*run)(const struct attn_kda_step_task *task);
};

struct attn_cpu_kernels {
    const struct attn_mha_kernel *mha_fwd[ATTN_DTYPES];
    const struct attn_mha_kernel *mha_fwd_short[ATTN_DTYPES]; /* below mha_fwd's rows_least */
    const struct attn_mha_kernel *mha_decode[ATTN_DTYPES];    /* rows_max rows of G * s_q */
    const struct attn_rotary_kernel *rotary[ATTN_DTYPES];
    const struct attn_split_combine_kernel *split_combine;
    const struct attn_mla_kernel *mla[ATTN_MLA_FORMATS];
    const struct attn_mla_finish_kernel *mla_finish;
    const struct attn_kda_fwd_kernel *kda_fwd[ATTN_DTYPES];
    const struct attn_kda_step_kernel *kda_step[ATTN_DTYPES];
};

/* Rungs, each implies those below it. */
enum {
    ATTN_CPU_AVX2 = 1,       /* AVX2, FMA, F16C */
    ATTN_CPU_AVX512 = 2,     /* F, BW, VL, DQ */
    ATTN_CPU_AVX512BF16 = 4, /* bf16 dot products, at a rate that pays */
    ATTN_CPU_AMX = 8,        /* AMX-TILE, AMX-BF16, and the kernel's permission */
};

/* Fills the table, rung by rung, for the features in `have`; entries no rung fills stay NULL and
 * mean the scalar reference. */
void attn_cpu_init_x86(struct attn_cpu_kernels *table, unsigned have);

/* The process's table, made once from the machine's features and ATTN_CPU. */
const struct attn_cpu_kernels *attn_cpu_kernels(void);
unsigned attn_cpu_have(void);

/* All that ATTN_CPU allows and the machine can run, though slowly: what the tests go through. */
unsigned attn_cpu_can(void);

/* Name `index` of the kernels compiled in, those above the rung in use too; NULL past the last. */
const char *attn_cpu_kernel_name(int index);

#endif
