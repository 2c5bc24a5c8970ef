/* SPDX-License-Identifier: MIT
 *
 * Shared memory of the kda_fwd kernels, its barriers, and the turns of its rings.
 */
#pragma once
#include "kda_fwd_params.h"
#include "kda_ptx.cuh"

#define LOG2E 1.4426950408889634f
#define LIFT 1099511627776.0f /* 2^40 */
#define LIFT_LOG2 40.0f
#define EPSILON 1e-6f

/* What everyone must know of one (sequence, head). */
struct kda_item {
    int64_t state_in, state_out; /* element offsets; -1: none */
    int64_t checkpoint;          /* of this head in a checkpoint */
    int64_t saved;               /* checkpoints before this sequence's */
    int64_t beta;                /* element of the first token's logit */
    int32_t batch, start;        /* first token, in row `batch` */
    int32_t length;              /* -1: no more items */
    int32_t first;               /* its first chunk, counted over the block's items */
    int32_t head, value;         /* first value row */
    float slope;                 /* -exp(a_log) log2 e */
    alignas(16) float bias[128]; /* slope dt_bias */
};

/* What the recurrence takes of one chunk. */
template <int D> struct kda_factor {
    static constexpr int PANELS = D / 64, PANEL_BYTES = 4096;
    uint8_t kd_qd[PANELS * PANEL_BYTES]; /* a panel: 16 rows of kd, then 16 of qd */
    uint8_t kr_ki[PANELS * PANEL_BYTES];
    uint8_t a[512], m[512]; /* 16 x 16, see wgmma_descriptor_16x16 */
    float decay[D];         /* 2^G_16; channels as decay_offset() says */
    float r[16], s[16], b[16];
    float l[16 * 20]; /* L, for the inverse */
};

template <int D, int VB> struct kda_fwd_smem {
    static constexpr int PRODUCERS = ATTN_KDA_PRODUCERS(VB), CONSUMERS = ATTN_KDA_CONSUMERS(VB);
    static constexpr uint32_t RAW = ATTN_KDA_RAW_STAGES, VALUES = ATTN_KDA_VALUE_STAGES;
    static constexpr uint32_t FACTORS = ATTN_KDA_FACTOR_STAGES, ITEMS = ATTN_KDA_ITEM_STAGES;
    static constexpr int THREADS = ATTN_KDA_FWD_THREADS(VB);

    /* The block's pool is what its five warpgroups start with, 96 registers a thread. */
    static constexpr int LOADER_REGISTERS = VB == 128 ? 32 : 40;
    static constexpr int PRODUCER_REGISTERS = VB == 128 ? 80 : 96;
    static constexpr int CONSUMER_REGISTERS = VB == 128 ? 144 : 152;

    static constexpr int TILE_BYTES = 32 * D, VALUE_BYTES = 32 * VB;

    uint8_t factor[FACTORS][ATTN_KDA_FACTOR_BYTES(D)];
    uint8_t raw[RAW][3 * TILE_BYTES]; /* q, k, g */
    uint8_t v[VALUES][VALUE_BYTES];
    uint8_t out[CONSUMERS * 4][512]; /* a warp's 16 tokens x 16 value rows, on their way */
    kda_item item[ITEMS];

    /* full: 1 arrival and the bytes, for factors one a producing warp, for items 1
     * empty: one a warp that reads: 4 of the warpgroup preparing it, the consumers', or all */
    uint64_t raw_full[RAW], raw_empty[RAW];
    uint64_t v_full[VALUES], v_empty[VALUES];
    uint64_t factor_full[FACTORS], factor_empty[FACTORS];
    uint64_t factor_scaled[FACTORS]; /* one a producing warp: kd qd kr ki are there */
    uint64_t factor_normed[FACTORS]; /* 1: r is there */
    uint64_t item_wanted;            /* 1 an item: its last load is under way */
    uint64_t item_full[ITEMS], item_empty[ITEMS];
};

/* Waits for turn `n` of a ring of STAGES to be full, or to be empty. */
template <uint32_t STAGES> ATTN_DEVICE void wait_full(const uint64_t *bars, uint32_t n)
{
    mbarrier_wait_parity(shared_address(bars + n % STAGES), n / STAGES & 1);
}

template <uint32_t STAGES> ATTN_DEVICE void wait_empty(const uint64_t *bars, uint32_t n)
{
    mbarrier_wait_parity(shared_address(bars + n % STAGES), ~(n / STAGES) & 1);
}

/* One arrival of this warp, after all its lanes came here. */
template <uint32_t STAGES> ATTN_DEVICE void arrive(const uint64_t *bars, uint32_t n)
{
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(shared_address(bars + n % STAGES));
}

/* Where 2^G_16 of channels c, c + 1 (c even) lies, in bytes: a thread of a consumer takes channels
 * 16 j + 2 c', + 1, + 8, + 9 in one load. */
ATTN_DEVICE uint32_t decay_offset(uint32_t c)
{
    return c / 16 * 64 + c % 8 / 2 * 16 + c % 16 / 8 * 8;
}
