/* SPDX-License-Identifier: MIT
 *
 * What the host hands to kv_append: plain C, the same bytes on both sides.  16-bit elements;
 * strides in elements; a NULL pointer means the feature is off.
 */
#ifndef ATTN_KV_APPEND_PARAMS_H
#define ATTN_KV_APPEND_PARAMS_H

#include <stdint.h>

/* Rows of one tensor: element (i, s, h, :) at data + i * batch + s * row + h * head. */
struct attn_device_rows {
    void *data;
    int64_t batch, row, head;
};

struct attn_kv_append_params {
    struct attn_device_rows k, v;         /* [rows, s_k, h_k, d] or [num_pages, page, h_k, d] */
    struct attn_device_rows k_new, v_new; /* [b, s_new, h_k, d] or [t_new, h_k, d] */
    struct attn_device_rows q, q_rotated; /* [b, s_q, h_q, d] or [t_q, h_q, d] */
    const int32_t *seqused_k;             /* [b]: where the append starts */
    const int32_t *cu_seqlens_k_new;      /* [b + 1] */
    const int32_t *cu_seqlens_q;          /* [b + 1] */
    const int32_t *kv_batch_idx;          /* [b] */
    const int32_t *seqlens_rotary;        /* [b] */
    const int32_t *page_table;            /* [rows, max_pages] */
    int32_t *lengths;                     /* [b], written: seqused_k and the new keys */
    const void *cos, *sin;                /* [rotary_rows, rotary_width / 2] */
    int64_t page_table_stride;
    int64_t tokens, queries; /* rows of k_new, rows of q to rotate (0 without a table) */
    int64_t s_k;             /* capacity; positions past it are not written */
    int64_t cache_rows;      /* what kv_batch_idx may name */
    int64_t num_pages;       /* what the page table may name */
    int32_t b, s_new, s_q, h_q, h_k, d_qk, d_v, page;
    int32_t rotary_width, rotary_rows, interleaved;
    int32_t query_moves; /* 1: query i sits at rotary position + i, 0: all at the first */
    int32_t fp16;
    int32_t reserved;
};

#ifdef __cplusplus
static_assert(sizeof(struct attn_kv_append_params) == 368, "the host's and the kernel's layout");
#else
_Static_assert(sizeof(struct attn_kv_append_params) == 368, "the host's and the kernel's layout");
#endif
#endif
