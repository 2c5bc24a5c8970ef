/* SPDX-License-Identifier: MIT
 *
 * What the host hands to the kda_fwd kernels: plain C, the same bytes on both sides.
 * Strides are in elements; a NULL pointer means the feature is off.
 */
#ifndef ATTN_KDA_FWD_PARAMS_H
#define ATTN_KDA_FWD_PARAMS_H

#include <stdint.h>

#include "mha_fwd_params.h" /* struct attn_tensor_map */

/* bf16, each (64 columns, t, d / 64 panels, h, b): a box holds 16 tokens of one head, panel by
 * panel; rows past t arrive as zero. */
struct attn_kda_fwd_maps {
    struct attn_tensor_map q, k, g, v;
};

struct attn_kda_fwd_params {
    const void *beta;           /* bf16 [b, t, h]: logits */
    const float *a_log;         /* [h]; NULL: slope 1 */
    const float *dt_bias;       /* [h, d]; NULL: 0 */
    void *out;                  /* bf16 [b, t, h, d], last stride 1 */
    const void *state_in;       /* [n or slots, h, d_v, d_k], fp32 or bf16; NULL: zero */
    void *state_out;            /* the same; may be the same memory */
    const int32_t *state_index; /* [n]: rows of both states; negative: no state in, none out */
    void *checkpoints;          /* [sum of length / every, h, d_v, d_k], fp32 or bf16 */
    const void *cu_seqlens;     /* [n + 1], int32 or int64; NULL: every row of b is a sequence */
    const int32_t *order;       /* [n]: sequences, longest first; NULL: as they come */
    int32_t *ticket;            /* items given out, 0 at the start; NULL: dealt in turn */

    int64_t beta_b, beta_t, beta_h;
    int64_t out_b, out_t, out_h;
    int64_t in_n, in_h; /* rows of a state's head are dense */
    int64_t out_n, out_state_h;
    int64_t checkpoint_n, checkpoint_h;
    int64_t checkpoint_rows; /* states there is room for */
    int64_t dt_bias_h;
    int64_t slots; /* rows of the states: an index past them counts as negative */

    int32_t n, h, t; /* sequences, heads, tokens of a batch row */
    int32_t every;   /* tokens between checkpoints, a multiple of 16 */
    int32_t cu_is_64;
    int32_t state_is_bf16, checkpoint_is_bf16;
    int32_t beta_activated;
    int32_t out_aligned; /* rows of out lie on multiples of 16 bytes */
    float scale;         /* of q */
    float bound;         /* lower bound of the log-decay, times log2 e */
};

#define ATTN_KDA_VALUE_ROWS 64 /* of a block */

/* Blocks of a cluster, which share the value rows of a (sequence, head) and its preparation. */
#define ATTN_KDA_CLUSTER(d, vb) ((d) / (vb))

/* Warpgroups beside the loaders': preparing, and 64 value rows each. */
#define ATTN_KDA_PRODUCERS(d) ((d) == 64 ? 3 : 2)
#define ATTN_KDA_CONSUMERS(vb) ((vb) / 64)
#define ATTN_KDA_FWD_THREADS(d, vb) (128 * (1 + ATTN_KDA_PRODUCERS(d) + ATTN_KDA_CONSUMERS(vb)))

/* Stages of the rings in shared memory. */
#define ATTN_KDA_RAW_STAGES 4     /* q k g as loaded */
#define ATTN_KDA_FACTOR_STAGES 8  /* what the recurrence takes of a chunk, v among it */
#define ATTN_KDA_SCRATCH_STAGES 4 /* what stays with the producers */
#define ATTN_KDA_ITEM_STAGES 4    /* (sequence, head) pairs */

#define ATTN_KDA_FACTOR_BYTES(d) (((d) / 64 * 6144 + (d) * 4 + 1152 + 1023) / 1024 * 1024)
#define ATTN_KDA_SCRATCH_BYTES(d) ((d) * 32 + 1408)
#define ATTN_KDA_ITEM_BYTES 640

#define ATTN_KDA_FWD_SMEM(d, vb)                                                                   \
    (ATTN_KDA_FACTOR_STAGES * (ATTN_KDA_FACTOR_BYTES(d) + 32 * (vb)) +                             \
     ATTN_KDA_RAW_STAGES * 96 * (d) + ATTN_KDA_SCRATCH_STAGES * ATTN_KDA_SCRATCH_BYTES(d) +        \
     (vb) * 32 + ATTN_KDA_ITEM_STAGES * ATTN_KDA_ITEM_BYTES + 1024)

#ifdef __cplusplus
static_assert(sizeof(struct attn_kda_fwd_maps) == 512, "four tensor maps");
static_assert(sizeof(struct attn_kda_fwd_params) == 256, "the host's and the kernel's layout");
#else
_Static_assert(sizeof(struct attn_kda_fwd_maps) == 512, "four tensor maps");
_Static_assert(sizeof(struct attn_kda_fwd_params) == 256, "the host's and the kernel's layout");
#endif
#endif
