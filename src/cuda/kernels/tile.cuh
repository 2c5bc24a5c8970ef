/* SPDX-License-Identifier: MIT
 *
 * Shared memory of the forward kernels, and its barriers.
 */
#pragma once
#include "sched.cuh"

/* Widths and tile of one kernel: M rows of q a block (64 a consumer warpgroup), N keys a step. */
template <int DQK, int DV, int M, int N> struct mha_fwd_smem {
    static constexpr int QK_PANELS = ATTN_MHA_FWD_PANELS(DQK), V_PANELS = ATTN_MHA_FWD_PANELS(DV);
    static constexpr int STAGES = ATTN_MHA_FWD_STAGES;
    static constexpr int Q_STAGES = ATTN_MHA_FWD_Q_STAGES(DQK, DV, M, N);
    static constexpr int CONSUMERS = M / 64;

    /* Registers a thread.  The block's pool is what it starts with, 512 x 128 or 384 x 168; the
     * scheduler and the loaders spill at 32 where they are asked to do so only for N = 128. */
    static constexpr int CONSUMER_REGISTERS =
        CONSUMERS == 2 ? (DV + N < 352 ? 224 : 232) : N < 128 ? 152 : 160;
    static constexpr int PRODUCER_REGISTERS =
        CONSUMERS == 2 ? (DV + N < 352 ? 56 : 40) : N < 128 ? 56 : 32;
    static constexpr bool FEW = PRODUCER_REGISTERS < 56; /* such producers do without extras */

    /* Out is stored under the next tile's first product: 3 % faster at 1024 keys, but 1 to 3 %
     * slower in the 152 registers of three warpgroups with 64 of them for O. */
    static constexpr bool STORES_LATE = CONSUMERS == 2 || DV < 128;

    /* Out leaves through its rows' place in q, which is free only then (d 96 would spill 4 bytes). */
    static constexpr bool STAGED = Q_STAGES == 2 && V_PANELS <= QK_PANELS && DV % 64 == 0;

    /* Panels of 64 columns, swizzled: [panel][row][128 bytes]. */
    uint8_t q[Q_STAGES][QK_PANELS * M * 128];
    uint8_t k[STAGES][QK_PANELS * N * 128];
    uint8_t v[STAGES][V_PANELS * N * 128];

    /* What the scheduler tells of a tile. */
    row_tile tile[2];
    row_steps steps[2][CONSUMERS];
    key_interval bounds[2][M]; /* visible keys of each row */
    int drawn[2]; /* numbers of items, drawn by the first block of a cluster of two */

    /* full: 1 arrival and the bytes (gathered k and v: one a lane)
     * empty: one a consumer warpgroup of the cluster, or of the block for q
     * tile_full: 1; tile_empty: one a thread of the consumers and of the two loaders
     * drawn_full: 1 and four bytes; drawn_empty, in the first of two blocks: one a block
     * ending: 1, once a tile, when its last loads of k are near */
    uint64_t q_full[2], q_empty[2];
    uint64_t k_full[STAGES], k_empty[STAGES];
    uint64_t v_full[STAGES], v_empty[STAGES];
    uint64_t tile_full[2], steps_full[2], tile_empty[2];
    uint64_t drawn_full[2], drawn_empty[2];
    uint64_t ending;
};

/* A place in a ring of one or two stages: which one, and the parity of its current phase.  A consumer
 * starts at parity 0; a producer, whose stages start empty, at parity 1. */
struct ring {
    uint32_t at, phase;
    __device__ uint32_t stage() const { return at; }
    __device__ uint32_t parity() const { return phase; }
};

template <int STAGES = 2> ATTN_DEVICE void ring_next(ring &r)
{
    if (STAGES == 2) r.at ^= 1;
    r.phase ^= r.at == 0;
}

/* The same in one register, for warps that have few, by the turn that comes next: 0 is {0, 0}, 2 is
 * {0, 1}.  A ring of one stage has the even turns only. */
struct lean_ring {
    uint32_t turn;
    __device__ uint32_t stage() const { return turn % 2; }
    __device__ uint32_t parity() const { return turn / 2 % 2; }
};

template <int STAGES = 2> ATTN_DEVICE void ring_next(lean_ring &r) { r.turn += STAGES == 2 ? 1 : 2; }
