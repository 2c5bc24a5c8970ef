/* SPDX-License-Identifier: MIT
 *
 * kda_fwd: Kimi Delta Attention, forward, on Hopper.
 *
 * Math, per sequence and head, S [v, k] the state in fp32, in chunks of 16 tokens i, j:
 *     gamma_i = bound / (1 + 2^-(slope (g_i + dt_bias)))      G_i = gamma_1 + .. + gamma_i
 *     kd_i = k_i 2^G_i                qd_i = q_i 2^G_i
 *     ki_j = k_j 2^(-G_j - 40)        kr_j = k_j 2^(G_16 - G_j - 40)
 *     r_i = (|k_i|^2 + 1e-6)^-1/2     s_i = scale (|q_i|^2 + 1e-6)^-1/2     b_i = sigmoid(beta_i)
 *     L_ij = b_i r_i <kd_i, ki_j> 2^40 r_j, i > j
 *     A_ij = 2^40 r_i ((1 + L)^-1)_ij b_j
 *     M_ij = <qd_i, ki_j>, i >= j
 *     R = v - r (kd S^T)      U = A R      out = s (qd S^T + M U)      S <- S 2^G_16 + U^T kr
 * k and q are never normalised themselves: r and s scale rows of the small products.  The 2^40
 * keeps ki inside bf16 for long keys under the strongest decay (2^115 over a chunk).  Factors are
 * bf16, the inverse is a substitution in fp32, sums are fp32.  Rows past the end of a sequence have
 * k = 0, gamma = 0, r = 0, b = 0, v = 0.
 *
 * Layout.  q k g v out [b, t, h, d]; a block holds VB value rows of one (sequence, head) at a time.
 * Tiles of 16 tokens are panels of 64 channels, [16 tokens][128 bytes], swizzled by 128 bytes.
 * Preparing, warp w of a warpgroup has channels w D / 4 .. of the chunk; a lane D / 32 of these for
 * four tokens, so that sums along the chunk are two shuffles.  The recurrence runs transposed: a
 * consumer warpgroup has 64 rows of S as wgmma accumulators, which packed are the left operand.
 *
 * Pipeline, one persistent block an SM; every arrow is a ring in shared memory:
 *     scheduler, loader    items; q k g of chunk n --> producers,  v of chunk n --> consumers
 *     producers (2, 3 WGs) chunk n by warpgroup n mod 2 or 3: kd qd kr A M 2^G_16 r s --> consumers
 *     consumers (1, 2 WGs) 64 value rows each, chunk by chunk:
 *         [P; O]^T = S [kd; qd]^T       | R | U^T = R^T A^T | O^T += U^T M^T, S += U^T kr
 *         beside it S 2^G_16, old O out |   |               | O packed
 */
#include "kda_prepare.cuh"
#include "kda_recur.cuh"

/* ---- the loader ------------------------------------------------------------------------------ */

ATTN_DEVICE int64_t sequence_end(const attn_kda_fwd_params &p, int i)
{
    int64_t at = p.cu_is_64 ? ((const int64_t *)p.cu_seqlens)[i]
                            : ((const int32_t *)p.cu_seqlens)[i];
    return at < 0 ? 0 : at > p.t ? p.t : at;
}

ATTN_DEVICE int sequence_length(const attn_kda_fwd_params &p, int i)
{
    if (!p.cu_seqlens) return p.t;
    int64_t length = sequence_end(p, i + 1) - sequence_end(p, i);
    return length < 0 ? 0 : (int)length;
}

/* Checkpoints of the sequences before `sequence`.  All lanes get the sum. */
ATTN_DEVICE int64_t checkpoints_before(const attn_kda_fwd_params &p, int sequence)
{
    if (!p.cu_seqlens) return (int64_t)sequence * (p.t / p.every);
    int64_t sum = 0;
    int i = threadIdx.x % 32;
    asm volatile(""
                 : "+r"(i)); /* else four registers of addresses live across the scheduler's loop */
#pragma unroll 1
    for (; i < sequence; i += 32) sum += sequence_length(p, i) / p.every;
#pragma unroll 1
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
    return sum;
}

/* Fills in item number `number`: split, then head, then sequence.  One warp. */
template <int D, int VB>
ATTN_DEVICE void describe(const attn_kda_fwd_params &p, int number, kda_item &item)
{
    int split = number % p.splits, head = number / p.splits % p.h;
    int sequence = number / p.splits / p.h;
    if (p.order) sequence = p.order[sequence];
    item.saved = p.checkpoints ? checkpoints_before(p, sequence) : 0;
    float slope = -LOG2E * (p.a_log ? ex2_approx(at_most(p.a_log[head] * LOG2E, 60.0f)) : 1.0f);
    item.slope = slope;
#pragma unroll 1
    for (int c = threadIdx.x % 32; c < D; c += 32)
        item.bias[c] = p.dt_bias ? slope * p.dt_bias[head * p.dt_bias_h + c] : 0.0f;

    int batch = p.cu_seqlens ? 0 : sequence, start = 0;
    if (p.cu_seqlens) start = (int)sequence_end(p, sequence);
    item.batch = batch;
    item.start = start;
    item.length = sequence_length(p, sequence);
    item.head = head;
    item.value = split * VB;
    item.beta = batch * p.beta_b + start * p.beta_t + head * p.beta_h;
    int64_t dense = (int64_t)split * VB * D;
    int row = p.state_index ? p.state_index[sequence] : sequence;
    bool kept = row >= 0 && row < p.slots;
    item.state_in = p.state_in && kept ? row * p.in_n + head * p.in_h + dense : -1;
    item.state_out = p.state_out && kept ? row * p.out_n + head * p.out_state_h + dense : -1;
    item.checkpoint = head * p.checkpoint_h + dense;
}

/* Fills the ring of items: dealt in turn, or drawn where sequences have lengths of their own. */
template <int D, int VB>
ATTN_DEVICE void schedule(const attn_kda_fwd_params &p, kda_fwd_smem<D, VB> &sm)
{
    typedef kda_fwd_smem<D, VB> smem;
    int lane = threadIdx.x % 32;
    for (uint32_t turn = 0;; turn++) {
        int number = blockIdx.x + turn * gridDim.x;
        if (p.ticket) { /* drawn late, so that whoever is done first gets the next */
            if (turn) mbarrier_wait_parity(shared_address(&sm.item_wanted), ~turn & 1);
            if (lane == 0) number = atomicAdd(p.ticket, 1);
            number = __shfl_sync(0xffffffff, number, 0);
        }
        bool last = number >= p.n * p.h * p.splits;
        kda_item &item = sm.item[turn % smem::ITEMS];
        wait_empty<smem::ITEMS>(sm.item_empty, turn);
        const kda_item &before = sm.item[(turn + smem::ITEMS - 1) % smem::ITEMS];
        item.first = turn ? before.first + (before.length + 15) / 16 : 0;
        if (!last)
            describe<D, VB>(p, number, item);
        else
            item.length = -1;
        arrive<smem::ITEMS>(sm.item_full, turn);
        if (last) return;
    }
}

/* Every chunk of every item: g, k, q, and v behind them.  One lane. */
template <int D, int VB>
ATTN_DEVICE void load(const attn_kda_fwd_maps &maps, kda_fwd_smem<D, VB> &sm)
{
    typedef kda_fwd_smem<D, VB> smem;
    for (uint32_t turn = 0, n = 0;; turn++) {
        wait_full<smem::ITEMS>(sm.item_full, turn);
        const volatile kda_item &item = sm.item[turn % smem::ITEMS];
        int left = item.length, token = item.start;
        if (left < 0) return;
        if (left == 0) mbarrier_arrive(shared_address(&sm.item_wanted));
#pragma unroll 1
        for (; left > 0; left -= 16, token += 16, n++) {
            uint32_t full = shared_address(sm.raw_full + n % smem::RAW);
            uint32_t raw = shared_address(sm.raw[n % smem::RAW]);
            wait_empty<smem::RAW>(sm.raw_empty, n);
            mbarrier_arrive_expect_tx(full, 3 * smem::TILE_BYTES);
            if (left <= 16) mbarrier_arrive(shared_address(&sm.item_wanted));
            int head = item.head, batch = item.batch;
            tma_load_5d(raw + 2 * smem::TILE_BYTES, &maps.g, full, 0, token, 0, head, batch);
            tma_load_5d(raw + smem::TILE_BYTES, &maps.k, full, 0, token, 0, head, batch);
            tma_load_5d(raw, &maps.q, full, 0, token, 0, head, batch);
            full = shared_address(sm.v_full + n % smem::VALUES);
            wait_empty<smem::VALUES>(sm.v_empty, n);
            mbarrier_arrive_expect_tx(full, smem::VALUE_BYTES);
            tma_load_5d(shared_address(sm.v[n % smem::VALUES]), &maps.v, full, 0, token,
                        item.value / 64, head, batch);
        }
        mbarrier_arrive(shared_address(sm.item_empty + turn % smem::ITEMS));
    }
}

/* ---- the kernel ------------------------------------------------------------------------------ */

template <int D, int VB>
ATTN_DEVICE void kda_fwd_body(const attn_kda_fwd_params &p, const attn_kda_fwd_maps &maps)
{
    typedef kda_fwd_smem<D, VB> smem;
    static_assert(sizeof(smem) <= ATTN_KDA_FWD_SMEM(D, VB), "the host asks for less");
    static_assert(sizeof(kda_item) <= ATTN_KDA_ITEM_BYTES, "an item fits");
    static_assert(sizeof(kda_factor<D>) <= ATTN_KDA_FACTOR_BYTES(D), "a stage holds a chunk");
    extern __shared__ __align__(1024) uint8_t shared[];
    smem &sm = *(smem *)shared;
    int group = __shfl_sync(0xffffffff, (int)threadIdx.x / 128, 0);
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < smem::RAW; i++) {
            mbarrier_init(shared_address(sm.raw_full + i), 1);
            mbarrier_init(shared_address(sm.raw_empty + i), 4);
        }
        for (uint32_t i = 0; i < smem::VALUES; i++) {
            mbarrier_init(shared_address(sm.v_full + i), 1);
            mbarrier_init(shared_address(sm.v_empty + i), 4 * smem::CONSUMERS);
        }
        for (uint32_t i = 0; i < smem::FACTORS; i++) {
            mbarrier_init(shared_address(sm.factor_scaled + i), 4);
            mbarrier_init(shared_address(sm.factor_normed + i), 1);
            mbarrier_init(shared_address(sm.factor_full + i), 4);
            mbarrier_init(shared_address(sm.factor_empty + i), 4 * smem::CONSUMERS);
        }
        for (uint32_t i = 0; i < smem::ITEMS; i++) {
            mbarrier_init(shared_address(sm.item_full + i), 1);
            mbarrier_init(shared_address(sm.item_empty + i),
                          4 * (smem::PRODUCERS + smem::CONSUMERS) + 1);
        }
        mbarrier_init(shared_address(&sm.item_wanted), 1);
        fence_mbarrier_init();
        prefetch_tensormap(&maps.q);
        prefetch_tensormap(&maps.k);
        prefetch_tensormap(&maps.g);
        prefetch_tensormap(&maps.v);
    }
    __syncthreads();

    if (group < smem::PRODUCERS) {
        setmaxnreg_dec<smem::PRODUCER_REGISTERS>();
        produce<D, VB>(p, sm, group);
    } else if (group < smem::PRODUCERS + smem::CONSUMERS) {
        setmaxnreg_inc<smem::CONSUMER_REGISTERS>();
        consume<D, VB>(p, sm, group - smem::PRODUCERS);
    } else {
        setmaxnreg_dec<smem::LOADER_REGISTERS>();
        int warp = __shfl_sync(0xffffffff, (int)threadIdx.x % 128 / 32, 0);
        if (warp == 0)
            schedule<D, VB>(p, sm);
        else if (warp == 1 && elect_one())
            load<D, VB>(maps, sm);
    }
}

/* The build compiles this file once a line of kda_fwd.def, with the line's fields as macros. */
#define ATTN_KERNEL(op, arch, dtype, dk, dv, rows, tokens)                                         \
    extern "C" __global__ void __launch_bounds__((kda_fwd_smem<dk, rows>::THREADS), 1)             \
        attn_##op##_##arch##_##dtype##_d##dk##x##dv##_m##rows##n##tokens(                          \
            const __grid_constant__ attn_kda_fwd_params p,                                         \
            const __grid_constant__ attn_kda_fwd_maps maps)                                        \
    {                                                                                              \
        op##_body<dk, rows>(p, maps);                                                              \
    }
#define ATTN_EXPAND(...) ATTN_KERNEL(__VA_ARGS__)
ATTN_EXPAND(kda_fwd, sm90, VARIANT_DTYPE, VARIANT_DQK, VARIANT_DV, VARIANT_ROWS, VARIANT_KEYS)
