/* SPDX-License-Identifier: MIT
 *
 * mha_fwd: the contract.  check() is the only place where arguments are looked at; what comes out
 * is the problem, plain numbers that back ends trust.
 */
#ifndef ATTN_OPS_MHA_FWD_H
#define ATTN_OPS_MHA_FWD_H

#include <stdbool.h>

#include "core/dtype.h"
#include "core/status.h"
#include "ops/rows.h"

#define ATTN_WIDTH_MAX 512 /* d_qk and d_v */
#define ATTN_SPLITS_MAX 256

struct attn_mha_fwd_problem {
    enum attn_dtype dtype, out_dtype;
    DLDevice device;
    int32_t threads;

    int64_t b, h_q, h_k, d_qk, d_v;
    int64_t s_q; /* longest query sequence: q's extent or max_seqlen_q */
    int64_t s_k; /* longest cached key sequence: extent, capacity, max_pages * page, max_seqlen_k */
    int64_t s_new;           /* longest append: extent, or t_new when packed; 0 without k_new */
    int64_t max_q, max_k;    /* the caller's static maxima, over-estimates too: what masks, rotary
                             positions and metadata are normalised on; s_q <= max_q, s_k <= max_k */
    int64_t t_q, t_k, t_new; /* rows of the packed tensor, or b * extent */
    struct attn_rows q, k, v, k_new, v_new, qv, out;
    float *lse; /* element (i, h, s) at lse + i * lse_batch + h * lse_head + s; NULL: not wanted */
    int64_t lse_batch, lse_head;
    struct attn_rows out_accum; /* fp32; split s at data + 4 * s * out_accum_split */
    int64_t out_accum_split;
    float *lse_accum;
    int64_t lse_accum_split, lse_accum_batch, lse_accum_head;
    int64_t accum_splits; /* first extent of the pair; 0 when absent */

    /* int32 tensors, NULL when absent */
    const int32_t *cu_seqlens_q, *cu_seqlens_k, *cu_seqlens_k_new;
    const int32_t *seqused_q, *seqused_k, *kv_batch_idx, *leftpad_k, *seqlens_rotary;
    const int32_t *page_table;
    int64_t page_table_row;             /* elements from one row of the table to the next */
    int64_t page, num_pages, max_pages; /* 0 when not paged */
    int64_t cache_rows;                 /* rows that kv_batch_idx may name */

    const void *rotary_cos, *rotary_sin;
    int64_t rotary_rows, rotary_width; /* ro, r */
    bool rotary_interleaved;

    const float *q_descale, *k_descale, *v_descale; /* (i, h) at p + i * batch + h * head */
    int64_t q_descale_batch, q_descale_head, k_descale_batch, k_descale_head;
    int64_t v_descale_batch, v_descale_head;

    const void *sinks;
    int64_t sinks_stride;
    enum attn_dtype sinks_dtype;

    double scale, softcap; /* softcap 0: off */
    /* The mask in its normal form: at most one of causal and local. */
    int64_t window_left, window_right; /* -1: unlimited; causal has window_right 0 */
    int64_t chunk;                     /* 0: off */
    bool causal, is_causal, is_local;
    int64_t cp_world, cp_rank; /* world 1: off */
    const int32_t *cp_tot_seqused_k;
    int32_t num_splits, pack_gqa, sm_margin;
    bool no_keys; /* no key storage at all: every live row gives 0 and lse +inf */
};

attn_status attn_mha_fwd_check(const struct attn_mha_fwd_args *args,
                               struct attn_mha_fwd_problem *problem, bool outputs);

/* plan->shape of a problem; run compares it. */
void attn_mha_fwd_shape(const struct attn_mha_fwd_problem *problem, int64_t shape[12]);

#endif
