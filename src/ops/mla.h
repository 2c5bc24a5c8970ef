/* SPDX-License-Identifier: MIT
 *
 * The three mla ops: one contract.  They differ in where the keys of a query token come from
 * (a block table, or lists of indices into one or two caches) and in how a key row is stored; the
 * attention behind that is the same, so they share the problem and its way through a back end.
 */
#ifndef ATTN_OPS_MLA_H
#define ATTN_OPS_MLA_H

#include <stdbool.h>

#include "core/dtype.h"
#include "core/status.h"
#include "ops/mha_fwd.h"

enum { ATTN_MLA_LATENT = 512, ATTN_MLA_ROPE = 64, ATTN_MLA_WIDTH_MAX = 576 };

enum attn_mla_op { ATTN_MLA_DECODE, ATTN_MLA_SPARSE_DECODE, ATTN_MLA_SPARSE_FWD };

/* How a key row is stored.  The first ones are rows of d_qk elements, numbered as enum
 * attn_dtype. */
enum attn_mla_format {
    ATTN_MLA_V32 = ATTN_DTYPES, /* 656 bytes: 512 e4m3 | 4 fp32 scales | 64 bf16 */
    ATTN_MLA_MODEL1,            /* 576 bytes: 448 e4m3 | 64 bf16; 8 bytes of scales elsewhere */
    ATTN_MLA_FORMATS
};

enum {
    ATTN_V32_BYTES = 656,
    ATTN_V32_TILE = 128,
    ATTN_MODEL1_BYTES = 584, /* of a token in all: 576 in the page's first part, 8 in the second */
    ATTN_MODEL1_ROW_BYTES = 576,
    ATTN_MODEL1_QUANTISED = 448,
    ATTN_MODEL1_TILE = 64,
};

/* 2^(e - 127); 255 is NaN. */
static inline float attn_e8m0_to_float(uint8_t e)
{
    if (e == 255) return NAN;
    return attn_bits_float(e ? (uint32_t)e << 23 : 0x00400000u);
}

/* Row o of page n, KV head h: data + n * page_stride + o * row_stride + h * head_stride, in bytes.
 * MODEL1 has its scales at data + n * page_stride + 576 * page + 8 * o. */
struct attn_mla_cache {
    char *data;
    int64_t num_pages, page; /* a page's tokens */
    int64_t page_stride, row_stride, head_stride;
};

/* Index k of token (i, t): indices[i * batch + t * row + k], 0 <= k < topk, and < length[i]. */
struct attn_mla_list {
    const int32_t *indices;
    int64_t batch, row, topk; /* topk 0: no such list */
    const int32_t *length;    /* [b], NULL: topk */
};

struct attn_mla_problem {
    enum attn_mla_op op;
    enum attn_dtype dtype, out_dtype; /* of q, of out */
    enum attn_mla_format format;
    DLDevice device;
    int32_t threads;

    int64_t b, s_q, h_q, h_k, d_qk, d_v; /* sparse: h_k 1; mla_sparse_fwd: b tokens of s_q 1 */
    struct attn_rows q, out;
    float *lse, *max_logits; /* (i, t, h) at p + i * batch + t * row + h * head; max may be NULL */
    int64_t lse_batch, lse_row, lse_head, max_batch, max_row, max_head;
    double scale;
    const float *descale_q, *descale_k; /* one number each; NULL: 1 */
    const float *sink;                  /* [h_q] or NULL */
    int64_t sink_stride;

    struct attn_mla_cache cache[2]; /* the second one is the extra cache */
    /* dense */
    const int32_t *block_table, *cache_seqlens;
    int64_t block_table_row, max_pages;
    bool causal; /* off when s_q is 1 */
    /* sparse */
    struct attn_mla_list list[2];
};

/* "mla_decode", "mla_sparse_decode", "mla_sparse_fwd" */
const char *attn_mla_op_name(enum attn_mla_op op);

attn_status attn_mla_decode_check(const struct attn_mla_decode_args *args,
                                  struct attn_mla_problem *problem, bool outputs);
attn_status attn_mla_sparse_decode_check(const struct attn_mla_sparse_decode_args *args,
                                         struct attn_mla_problem *problem, bool outputs);
attn_status attn_mla_sparse_fwd_check(const struct attn_mla_sparse_fwd_args *args,
                                      struct attn_mla_problem *problem, bool outputs);

/* ---- what the three checks share (mla.c) ----------------------------------------------------- */

/* Rank, device, and the extents in want[] that are not negative. */
attn_status attn_mla_shape_check(const DLTensor *t, const char *name, const char *wish,
                                 int32_t ndim, const int64_t *want, DLDevice device);
attn_status attn_mla_last_stride_check(const DLTensor *t, const char *name);
/* q: dtype among `wish`, extents; fills dtype, out_dtype, device, h_q, d_qk. */
attn_status attn_mla_query_check(const DLTensor *q, int32_t ndim, const char *shape,
                                 const char *dtypes, unsigned allowed,
                                 struct attn_mla_problem *problem);
/* softmax_scale and head_dim_v. */
attn_status attn_mla_numbers_check(double softmax_scale, int64_t head_dim_v,
                                   struct attn_mla_problem *problem);
/* A page cache of quantised rows for d_qk 576 or 512. */
attn_status attn_mla_pages_check(const DLTensor *t, const char *name, int64_t d_qk, DLDevice device,
                                 struct attn_mla_cache *cache);
attn_status attn_mla_sink_check(const DLTensor *sink, struct attn_mla_problem *problem);
/* An fp32 output with any strides but 0; returns its data. */
attn_status attn_mla_float_check(const DLTensor *t, const char *name, const char *wish,
                                 int32_t ndim, const int64_t *want, DLDevice device, float **data);
/* out: shape `want` [.., h_q, d_v] of out_dtype, last stride 1. */
attn_status attn_mla_out_check(const DLTensor *t, const char *wish, int32_t ndim,
                               const int64_t *want, const struct attn_mla_problem *problem);
/* out [b, s_q, h_q, d_v] and lse [b, h_q, s_q] of the two decodes, into the problem. */
attn_status attn_mla_results_check(const DLTensor *out, const DLTensor *lse,
                                   struct attn_mla_problem *problem);
/* No output may share memory with a tensor of indices. */
attn_status attn_mla_apart_check(const DLTensor *const *read, const char *const *names, int reads,
                                 const DLTensor *const *written, int writes);

attn_status attn_mla_plan_problem(const struct attn_mla_problem *problem,
                                  struct attn_mla_plan *plan);
attn_status attn_mla_run_problem(const struct attn_mla_problem *problem,
                                 const struct attn_mla_plan *plan, void *workspace,
                                 int64_t workspace_bytes, void *stream);

/* ---- the cache's writer and reader ----------------------------------------------------------- */

struct attn_mla_cache_problem {
    DLDevice device;
    int32_t threads;
    enum attn_dtype dtype;       /* of kv */
    enum attn_mla_format format; /* V32 or MODEL1 */
    int64_t t, d;
    char *kv;
    int64_t kv_row; /* elements */
    struct attn_mla_cache cache;
    const void *slots; /* NULL: row i is slot i */
    int64_t slots_stride;
    bool wide_slots; /* int64, not int32 */
};

static inline int64_t attn_mla_slot(const struct attn_mla_cache_problem *p, int64_t i)
{
    if (!p->slots) return i;
    int64_t at = i * p->slots_stride;
    return p->wide_slots ? ((const int64_t *)p->slots)[at] : ((const int32_t *)p->slots)[at];
}

attn_status attn_mla_cache_check(const struct attn_mla_cache_args *args, bool write,
                                 struct attn_mla_cache_problem *problem);

#endif
