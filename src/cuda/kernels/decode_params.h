/* SPDX-License-Identifier: MIT
 *
 * What the host hands to the decode kernels and to decode_combine: plain C, the same bytes on both
 * sides.  Strides are in elements.
 *
 * The query heads of one KV head are packed: row r is query r / group of head r % group, and a row
 * tile is 64 rows.  An item is one row tile of one KV head of one sequence.  Blocks are numbered
 * part * tiles + tile.
 */
#ifndef ATTN_DECODE_PARAMS_H
#define ATTN_DECODE_PARAMS_H

#include "mha_fwd_params.h"

#define ATTN_DECODE_ROWS 64 /* of a row tile */
#define ATTN_DECODE_KEYS 64 /* of a step */
#define ATTN_DECODE_STAGES_MAX 8
#define ATTN_DECODE_CLUSTER_MAX 16 /* blocks */

#define ATTN_DECODE_MERGED_BYTES 32 /* of a thread of decode_combine: what its pieces amount to */

struct attn_decode_params {
    struct attn_mha_fwd_params call; /* the ticket, section and cluster of mha_fwd are unused */
    const void *q;                   /* [b, s_q, h_q, d_qk] or [t_q, h_q, d_qk] */
    int64_t q_stride_b, q_stride_s, q_stride_h;
    const void *qv; /* [b, s_q, h_q, d_v] or [t_q, h_q, d_v]; NULL: scores are q k^T alone */
    int64_t qv_stride_b, qv_stride_s, qv_stride_h;
    int64_t lse_stride_s;

    /* Partial results, fp32: normalised rows and their lse.  splits 0: rows of slots, two slots a
     * block: [block][continued, begun][slot_rows][d_v].  splits > 1: out_accum and lse_accum. */
    float *partial_out, *partial_lse;
    int64_t partial_out_stride_n, partial_out_stride_b, partial_out_stride_s, partial_out_stride_h;
    int64_t partial_lse_stride_n, partial_lse_stride_b, partial_lse_stride_h;

    int32_t tiles;     /* row tiles of the longest sequence */
    int32_t parts;     /* blocks that share the keys of the call */
    int32_t splits;    /* 0: the parts get equal shares; n: every item is cut in n */
    int32_t slot_rows; /* rows of a slot: 64, or fewer when no tile has as many */
    int32_t item_cost; /* of an item beside its keys, in steps */
    int32_t fp16;
    int32_t combine_groups; /* of threads that share a row's pieces in decode_combine: 2^n */
    int32_t after_append;   /* 1: kv_append comes first and may be running still */
    int32_t narrow;         /* 1: equal shares, at most 32 sequences, less than 2^30 cost in all */
    struct attn_division by_group, by_page, by_parts;
    int32_t cluster; /* 2^n > 1: blocks that share an item; one sequence, one tile */
};

/* Consumer warpgroups of a block in a cluster, which take its steps in turns; with wider heads one,
 * as two would not have the registers. */
#define ATTN_MHA_DECODE_CONSUMERS(d_v) ((d_v) <= 128 ? 2 : 1)

/* Shared memory of an mha_decode kernel: q, stages of k and v (panels of 64 columns), barriers. */
#define ATTN_DECODE_PANEL (ATTN_DECODE_KEYS * 128)
#define ATTN_MHA_DECODE_STAGE(d_qk, d_v)                                                           \
    ((ATTN_MHA_FWD_PANELS(d_qk) + ATTN_MHA_FWD_PANELS(d_v)) * ATTN_DECODE_PANEL)
#define ATTN_MHA_DECODE_FIT(d_qk, d_v)                                                             \
    ((232448 - 2048 - ATTN_MHA_FWD_PANELS(d_qk) * ATTN_DECODE_PANEL) /                             \
     ATTN_MHA_DECODE_STAGE(d_qk, d_v))
#define ATTN_MHA_DECODE_STAGES(d_qk, d_v)                                                          \
    (ATTN_MHA_DECODE_FIT(d_qk, d_v) < ATTN_DECODE_STAGES_MAX ? ATTN_MHA_DECODE_FIT(d_qk, d_v)      \
                                                             : ATTN_DECODE_STAGES_MAX)
#define ATTN_MHA_DECODE_SMEM(d_qk, d_v)                                                            \
    (2048 + ATTN_MHA_FWD_PANELS(d_qk) * ATTN_DECODE_PANEL +                                        \
     ATTN_MHA_DECODE_STAGES(d_qk, d_v) * ATTN_MHA_DECODE_STAGE(d_qk, d_v))

/* Shared memory of an mla_decode kernel: five tiles of q, halves of the latent columns, rope tiles,
 * P, the rest. */
#define ATTN_MLA_DECODE_HALVES 5
#define ATTN_MLA_DECODE_ROPES 2
#define ATTN_MLA_DECODE_SMEM                                                                       \
    ((5 + 4 * ATTN_MLA_DECODE_HALVES + ATTN_MLA_DECODE_ROPES + 1) * ATTN_DECODE_PANEL + 3072)

/* mla_decode_few: sequences of a call, a lane each; threads of a block. */
#define ATTN_MLA_FEW_SEQUENCES 32
#define ATTN_MLA_FEW_THREADS 384

#ifdef __cplusplus
static_assert(sizeof(struct attn_decode_params) == 632, "the host's and the kernel's layout");
#else
_Static_assert(sizeof(struct attn_decode_params) == 632, "the host's and the kernel's layout");
#endif
#endif
