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

/* What the recurrence takes of one chunk: what a block sends to the other one of its cluster. */
template <int D> struct kda_factor {
    static constexpr int PANEL_BYTES = 6144;
    uint8_t rows[D / 64 * PANEL_BYTES]; /* a panel: 16 rows of kd, 16 of qd, 16 of kr */
    uint8_t a[512], m[512]; /* 16 x 16, see wgmma_descriptor_16x16 */
    float decay[D];         /* 2^G_16; channels as decay_offset() says */
    float r[16], s[16];
};

/* What the producers keep of a chunk to themselves. */
template <int D> struct alignas(128) kda_scratch {
    uint8_t ki[D / 64 * 2048];
    float l[16 * 20]; /* L, for the inverse */
    float b[16];
    float qk[16]; /* M's diagonal */
};

template <int D, int VB> struct kda_fwd_smem {
    static constexpr int CLUSTER = ATTN_KDA_CLUSTER(D, VB);
    static constexpr int PRODUCERS = ATTN_KDA_PRODUCERS(D);
    static constexpr int CONSUMERS = ATTN_KDA_CONSUMERS(VB);
    static constexpr int FINISHERS = 2; /* warps */
    static constexpr uint32_t RAW = ATTN_KDA_RAW_STAGES, FACTORS = ATTN_KDA_FACTOR_STAGES;
    static constexpr uint32_t SCRATCHES = ATTN_KDA_SCRATCH_STAGES, ITEMS = ATTN_KDA_ITEM_STAGES;
    static constexpr int THREADS = ATTN_KDA_FWD_THREADS(D, VB);
    static_assert(FACTORS % CLUSTER == 0, "a stage is always filled by the same block");

    /* The block's pool is what its warpgroups start with: 96 registers a thread with five of them,
     * 128 with four. */
    static constexpr int LOADER_REGISTERS = 88;
    static constexpr int PRODUCER_REGISTERS = D == 64 ? 80 : 112;
    static constexpr int CONSUMER_REGISTERS = D == 64 ? 152 : 200;

    static constexpr int TILE_BYTES = 32 * D, VALUE_BYTES = 32 * VB;

    uint8_t factor[FACTORS][ATTN_KDA_FACTOR_BYTES(D)];
    uint8_t raw[RAW][3 * TILE_BYTES]; /* q, k, g */
    uint8_t v[FACTORS][VALUE_BYTES];
    kda_scratch<D> scratch[SCRATCHES];
    uint8_t out[CONSUMERS * 4][512]; /* a warp's 16 tokens x 16 value rows, on their way */
    kda_item item[ITEMS];

    /* Arrivals are those of whole warps, but for the thread that loads.
     * full: 1 of the loader and the bytes; of factors the loader's for v, with the bytes of factors
     * that come from the other block, and a finisher's for those made here
     * empty: every warp that reads; factors made here are read in both blocks */
    uint64_t raw_full[RAW], raw_empty[RAW];
    uint64_t factor_full[FACTORS], factor_empty[FACTORS], v_empty[FACTORS];
    uint64_t factor_scaled[FACTORS];   /* every producing warp: all but A and M are there */
    uint64_t scratch_empty[SCRATCHES]; /* a finisher: A and M are made */
    uint64_t item_wanted[ITEMS];       /* the loader: the item's last load is under way */
    uint64_t item_full[ITEMS], item_empty[ITEMS];
    uint64_t drawn_full[ITEMS], drawn_empty[ITEMS]; /* from block 0 of a cluster to block 1 */
    int32_t drawn[ITEMS];                           /* numbers of items */
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

/* All lanes of a warp arrive: as fast as one of them after a __syncwarp, and plain to racecheck. */
template <uint32_t STAGES> ATTN_DEVICE void arrive(const uint64_t *bars, uint32_t n)
{
    mbarrier_arrive(shared_address(bars + n % STAGES));
}

/* Where 2^G_16 of channels c, c + 1 (c even) lies, in bytes: a thread of a consumer takes channels
 * 16 j + 2 c', + 1, + 8, + 9 in one load. */
ATTN_DEVICE uint32_t decay_offset(uint32_t c)
{
    return c / 16 * 64 + c % 8 / 2 * 16 + c % 16 / 8 * 8;
}
