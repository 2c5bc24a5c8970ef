/* SPDX-License-Identifier: MIT
 *
 * What the host hands to the mha_fwd kernels: plain C, the same bytes on both sides.
 * Strides are in elements; a NULL pointer means the feature is off.
 */
#ifndef ATTN_MHA_FWD_PARAMS_H
#define ATTN_MHA_FWD_PARAMS_H

#include <stdint.h>

/* A CUtensorMap: opaque, 128 bytes. */
struct __attribute__((aligned(128))) attn_tensor_map {
    uint8_t bytes[128];
};

/* q is (d_qk, group, s_q or t_q, h_k, b), a box the rows of a warpgroup.
 * k and v are (d, box rows, rows + 1, h_k, batch or page): the second and the third extent have the
 * same stride and the base lies `box_rows` rows early, so that the box at
 * (0, box_rows - n, first + n, ..) holds n rows from `first` on, and zeros below. */
struct attn_mha_fwd_maps {
    struct attn_tensor_map q, k, v;
};

/* out, with q's extents but d_v columns, a box likewise; `boxes` is 0 where its strides fit no map. */
struct attn_mha_fwd_out {
    struct attn_tensor_map map;
    int32_t boxes;
};

/* Division by a number n that the host knows, n <= 0 counting as 1: shift = ceil(log2 n),
 * magic = ceil(2^(31 + shift) / n).  For 0 <= x < 2^31, x / n = (2 x magic >> 32) >> shift. */
struct attn_division {
    uint32_t magic;
    int32_t shift;
};

static inline struct attn_division attn_division_by(int32_t n)
{
    struct attn_division d = {0, 0};
    n = n > 1 ? n : 1;
    while ((int64_t)1 << d.shift < n) d.shift++;
    d.magic = (uint32_t)((((int64_t)1 << (31 + d.shift)) + n - 1) / n);
    return d;
}

enum attn_mha_fwd_score {
    ATTN_SCORE_PLAIN,  /* exponent = score * exp_scale */
    ATTN_SCORE_SCALED, /* exponent = score * score_scale * exp_scale: a scale <= 0 */
    ATTN_SCORE_CAPPED, /* exponent = tanh(score * score_scale) * exp_scale: softcap */
};

/* Softcap in prefill (softcap.cuh): x = limit tanh(S scale / cap).  Of a score of at most `small` it is
 * S (a + b z + d z^2), z = S^2 - t; of one up to `middle` S (e[0] + e[1] z + .. e[4] z^4); of a larger one
 * limit - 2 limit / (2^(S sign rate) + 1). */
struct attn_softcap {
    float small; /* 0.4 cap / scale; -1: no score is small */
    float t;     /* small^2 */
    float a, b, d;
    float middle; /* cap / scale; or -1 */
    float e[5];
    float sign; /* of the scale */
    float rate, limit;
    float deep, shallow; /* the least and the largest m with which no score is looked at */
};
#define ATTN_SOFTCAP_SLACK 8 /* p <= 2^8 then */

/* k and v rows copied one by one, where no box fits. */
enum attn_mha_fwd_gather {
    ATTN_GATHER_NONE,
    ATTN_GATHER_FAR,  /* rows anywhere */
    ATTN_GATHER_NEAR, /* all rows of a head less than 2^36 bytes apart */
};

enum attn_mha_fwd_sink { ATTN_SINK_NONE, ATTN_SINK_FP32, ATTN_SINK_BF16, ATTN_SINK_FP16 };

/* "Unlimited" for a window edge; adding it to any position stays inside an int32. */
#define ATTN_WINDOW_OFF (1 << 30)

struct attn_mha_fwd_params {
    void *out;                   /* [b, s_q, h_q, d_v] or [t_q, h_q, d_v], last stride 1 */
    float *lse;                  /* [b, h_q, s_q] or [h_q, t_q], last stride 1 */
    const int32_t *cu_seqlens_q; /* [b + 1] */
    const int32_t *cu_seqlens_k; /* [b + 1] */
    const int32_t *seqused_q;    /* [b] */
    const int32_t *seqused_k;    /* [b] */
    const int32_t *leftpad_k;    /* [b] */
    const int32_t *kv_batch_idx; /* [b] */
    const int32_t *page_table;   /* [rows, max_pages], row stride page_table_stride */
    const int32_t *cp_tot;       /* [b] global key counts; with cp_world > 1 */
    const void *sinks;           /* [h_q] */
    int32_t *ticket;             /* counts items given out, 0 at the start; NULL: dealt in turn */
    const void *k, *v;           /* for gathered loads: [batch or page, rows, h_k, d] */

    int64_t out_stride_b, out_stride_s, out_stride_h;
    int64_t lse_stride_b, lse_stride_h;
    int64_t k_stride_b, k_stride_s, k_stride_h;
    int64_t v_stride_b, v_stride_s, v_stride_h;
    int64_t page_table_stride;

    int32_t b, s_q, s_k; /* static lengths; packed q: the longest; packed k: unread */
    int32_t t_q, t_k;    /* rows of packed q and of packed k */
    int32_t k_rows;      /* of the cache or of the page table: what kv_batch_idx may name */
    int32_t num_pages;   /* what the page table may name */
    int32_t h_k, group;  /* group = h_q / h_k */
    int32_t d_qk, d_v;   /* true widths: at most the kernel's, multiples of 8 */
    int32_t page;        /* rows of a page, 0 without a page table */
    struct attn_division page_division;
    int32_t box_rows; /* rows of a k or v box; divides the key tile (and the page) */
    int32_t gather;   /* enum attn_mha_fwd_gather */
    int32_t cluster;  /* blocks of a cluster: 1, or 2 that share every k and v tile */
    int32_t section;  /* KV heads walked together, so that their k and v stay in L2 */
    int32_t fold;     /* items of a chunk, whose last rows see most keys; 0, 1: no chunks */

    /* Rows of a tile (sched.cuh): a warpgroup's 64 are `queries` queries of `pack` heads each. */
    int32_t pack;         /* 1, or group */
    int32_t tile_heads;   /* query heads of a KV head with tiles of their own: group / pack */
    int32_t queries;      /* 64 / pack */
    int32_t tile_queries; /* queries, times the warpgroups of a block */
    int32_t pitch;        /* from a warpgroup's first query to the next one's: queries, or twice as
                             many where the blocks of a cluster take turns */

    int32_t window_left, window_right; /* ATTN_WINDOW_OFF: unlimited; causal is right = 0 */
    int32_t chunk;                     /* 0: off */
    struct attn_division chunk_division;
    int32_t cp_world, cp_rank; /* 1, 0: off */
    int32_t cp_causal;

    int32_t score;     /* enum attn_mha_fwd_score */
    int32_t sink;      /* enum attn_mha_fwd_sink */
    float score_scale; /* before the tanh */
    float exp_scale;   /* log2 e, times the softmax scale or the cap: positive */
    struct attn_softcap softcap;
    float lse_empty; /* LSE of a row without keys: -inf, or +inf when the call has no keys */
};

/* Shared memory of a kernel: one or, where they fit, two stages of q, two each of k and v (panels of
 * 64 columns), then the row bounds, tile slots and barriers. */
#define ATTN_MHA_FWD_PANELS(d) (((d) + 63) / 64)
#define ATTN_MHA_FWD_STAGES 2
#define ATTN_MHA_FWD_SMEM_WITH(q_stages, d_qk, d_v, m, n)                                          \
    (128 * (ATTN_MHA_FWD_PANELS(d_qk) * ((q_stages) * (m) + ATTN_MHA_FWD_STAGES * (n)) +           \
            ATTN_MHA_FWD_PANELS(d_v) * ATTN_MHA_FWD_STAGES * (n)) +                                \
     16 * (m) + 488)
#define ATTN_MHA_FWD_Q_STAGES(d_qk, d_v, m, n)                                                     \
    (ATTN_MHA_FWD_SMEM_WITH(2, d_qk, d_v, m, n) <= 227 * 1024 ? 2 : 1)
#define ATTN_MHA_FWD_SMEM(d_qk, d_v, m, n)                                                         \
    ATTN_MHA_FWD_SMEM_WITH(ATTN_MHA_FWD_Q_STAGES(d_qk, d_v, m, n), d_qk, d_v, m, n)

#ifdef __cplusplus
static_assert(sizeof(struct attn_mha_fwd_maps) == 384, "three tensor maps");
static_assert(sizeof(struct attn_mha_fwd_params) == 424, "the host's and the kernel's layout");
#else
_Static_assert(sizeof(struct attn_mha_fwd_maps) == 384, "three tensor maps");
_Static_assert(sizeof(struct attn_mha_fwd_params) == 424, "the host's and the kernel's layout");
#endif
#endif
