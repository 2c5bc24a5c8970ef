/* SPDX-License-Identifier: MIT
 *
 * What the host hands to kda_step: plain C, the same bytes on both sides.  Strides in elements.
 */
#ifndef ATTN_KDA_STEP_PARAMS_H
#define ATTN_KDA_STEP_PARAMS_H

#include <stdint.h>

/* bf16 [b, t, h, d], last stride 1. */
struct attn_kda_rows {
    void *data;
    int64_t b, t, h;
};

/* fp32 or bf16 [rows, h, d_v, d_k], heads dense; data NULL: absent. */
struct attn_kda_states {
    void *data;
    int64_t n, h;
};

struct attn_kda_step_params {
    struct attn_kda_rows q, k, v, g, out;
    struct attn_kda_rows beta;         /* [b, t, h] */
    const float *a_log;                /* [h]; NULL: slope 1 */
    const float *dt_bias;              /* [h, d]; NULL: 0 */
    struct attn_kda_states in;         /* absent: zeros */
    struct attn_kda_states kept;       /* after the last token; may be the same memory */
    struct attn_kda_states checkpoint; /* after every `every` tokens, sequence after sequence */
    /* [n]; NULL: i.  Outside 0 .. slots - 1: in kda_step padding, out becomes 0; in kda_scan no
     * state in and none kept. */
    const int32_t *state_index;
    const void *cu_seqlens; /* [n + 1], int32 or int64; NULL: row i of b is sequence i */
    int64_t dt_bias_h, slots, checkpoint_rows;
    int32_t n, h, t, d;
    int32_t every;
    int32_t cu_is_64, state_is_bf16, checkpoint_is_bf16;
    int32_t gate_activated, beta_activated;
    int32_t aligned;    /* 1: rows of q k g on multiples of 8 bytes */
    float scale, bound; /* of q; lower bound of the log-decay, times log2 e */
};

#ifdef __cplusplus
static_assert(sizeof(struct attn_kda_step_params) == 376, "the host's and the kernel's layout");
#else
_Static_assert(sizeof(struct attn_kda_step_params) == 376, "the host's and the kernel's layout");
#endif
#endif
