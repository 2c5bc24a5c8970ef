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
 *     M_ij = <qd_i, ki_j>, i > j      M_ii = <q_i, k_i> 2^-40
 *     R = v - r (kd S^T)      U = A R      out = s (qd S^T + M U)      S <- S 2^G_16 + U^T kr
 * k and q are never normalised themselves: r and s scale rows of the small products.  The 2^40
 * keeps ki inside bf16 for long keys under the strongest decay (2^115 over a chunk).  Factors are
 * bf16, the inverse is a substitution in fp32, sums are fp32.  M_ii holds no decay and is a product of
 * the inputs: it may be all of a token's output, where the rounding of qd and ki would show.  Rows
 * past the end of a sequence have k = 0, gamma = 0, r = 0, b = 0, v = 0.
 *
 * Layout.  q k g v out [b, t, h, d]; a block holds VB = 64 value rows of one (sequence, head) at a
 * time.  With d 128 two blocks are a cluster: each prepares every other chunk and sends it across.
 * Tiles of 16 tokens are panels of 64 channels, [16 tokens][128 bytes], swizzled by 128 bytes.
 * Preparing, warp w of a warpgroup has channels w D / 4 .. of the chunk; a lane D / 32 of these for
 * four tokens, so that sums along the chunk are two shuffles.  The recurrence runs transposed: a
 * consumer warpgroup has 64 rows of S as wgmma accumulators, which packed are the left operand.
 *
 * Pipeline, one persistent block an SM; every arrow is a ring in shared memory:
 *     scheduler, loader    items; q k g of this block's chunks --> producers,  v --> consumers
 *     producers (2, 3 WGs) chunk by chunk in turn: kd qd kr ki 2^G_16 r s --> finishers
 *     finishers (2 warps)  chunk by chunk in turn: A M --> consumers here and in the other block
 *     consumer (1 WG)      chunk by chunk:
 *         [P; O]^T = S [kd; qd]^T       | R | U^T = R^T A^T | O^T += U^T M^T, S += U^T kr
 *         beside it S 2^G_16, old O out |   |               | O packed
 */
#include "kda_prepare.cuh"
#include "kda_ragged.cuh"
#include "kda_recur.cuh"

/* ---- the loader ------------------------------------------------------------------------------ */

/* Fills in item number `number`, but for its place: head, then sequence; the value rows of block
 * `rank` of a cluster.  Returns its length.  One warp. */
template <int D, int VB>
ATTN_DEVICE int describe(const attn_kda_fwd_params &p, int number, int rank, kda_item &item)
{
    int head = number % p.h, sequence = number / p.h;
    if (p.order) sequence = p.order[sequence];
    item.saved = p.checkpoints ? checkpoints_before(p, sequence) : 0;
    float slope = -LOG2E * (p.a_log ? ex2_approx(at_most(p.a_log[head] * LOG2E, 60.0f)) : 1.0f);
    item.slope = slope;
#pragma unroll 1
    for (int c = threadIdx.x % 32; c < D; c += 32)
        item.bias[c] = p.dt_bias ? slope * p.dt_bias[head * p.dt_bias_h + c] : 0.0f;

    int batch = p.cu_seqlens ? 0 : sequence, start = 0;
    if (p.cu_seqlens) start = (int)boundary(p, sequence);
    item.batch = batch;
    item.start = start;
    item.head = head;
    item.value = rank * VB;
    item.beta = batch * p.beta_b + start * p.beta_t + head * p.beta_h;
    int64_t dense = (int64_t)rank * VB * D;
    int row = p.state_index ? p.state_index[sequence] : sequence;
    bool kept = row >= 0 && row < p.slots;
    item.state_in = p.state_in && kept ? row * p.in_n + head * p.in_h + dense : -1;
    if (item.state_in >= 0 && threadIdx.x % 32 == 0) { /* of a short item it is half the work */
        int bytes = p.state_is_bf16 ? 2 : 4;
        const char *from = (const char *)p.state_in + item.state_in * bytes;
        if ((uintptr_t)from % 16 == 0) prefetch_l2(from, VB * D * bytes);
    }
    item.state_out = p.state_out && kept ? row * p.out_n + head * p.out_state_h + dense : -1;
    item.checkpoint = head * p.checkpoint_h + dense;
    return sequence_length(p, sequence);
}

#define SHORT_ITEM 128 /* tokens */

/* The next number from the counter, after an item of `length` tokens.  Block 0 of a cluster draws
 * and tells block 1. */
template <int D, int VB>
ATTN_DEVICE int draw(const attn_kda_fwd_params &p, kda_fwd_smem<D, VB> &sm, int rank, uint32_t turn,
                     int length)
{
    typedef kda_fwd_smem<D, VB> smem;
    int lane = threadIdx.x % 32, number = 0;
    uint32_t place = turn % smem::ITEMS;
    if (rank == 1) {
        if (lane == 0)
            mbarrier_arrive_expect_tx(shared_address(sm.drawn_full + place), sizeof(int));
        wait_full<smem::ITEMS>(sm.drawn_full, turn);
        number = *(volatile int *)&sm.drawn[place];
        mbarrier_arrive_cluster(shared_address(sm.drawn_empty + place), 0);
        return number;
    }
    /* Late, so that whoever is done first gets the next; after a short item, whose work would not
     * cover the way to the next one's tokens, an item earlier. */
    uint32_t ahead = turn && length <= SHORT_ITEM ? 2 : 1;
    if (turn >= ahead) wait_full<smem::ITEMS>(sm.item_wanted, turn - ahead);
    if (lane == 0) number = atomicAdd(p.ticket, 1);
    number = __shfl_sync(0xffffffff, number, 0);
    if constexpr (smem::CLUSTER == 2) {
        wait_empty<smem::ITEMS>(sm.drawn_empty, turn);
        if (lane == 0)
            store_async_cluster(shared_address(&sm.drawn[place]), number,
                           shared_address(sm.drawn_full + place), 1);
    }
    return number;
}

/* Fills the ring of items: dealt in turn, or drawn where sequences have lengths of their own. */
template <int D, int VB>
ATTN_DEVICE void schedule(const attn_kda_fwd_params &p, kda_fwd_smem<D, VB> &sm, int rank)
{
    typedef kda_fwd_smem<D, VB> smem;
    int first = 0, length = 0; /* its first chunk, tokens of the item before */
    for (uint32_t turn = 0;; turn++) {
        int number = (blockIdx.x + turn * gridDim.x) / smem::CLUSTER;
        if (p.ticket) number = draw<D, VB>(p, sm, rank, turn, length);
        kda_item &item = sm.item[turn % smem::ITEMS];
        wait_empty<smem::ITEMS>(sm.item_empty, turn);
        length = number < p.n * p.h ? describe<D, VB>(p, number, rank, item) : -1;
        item.length = length;
        item.first = first;
        arrive<smem::ITEMS>(sm.item_full, turn);
        if (length < 0) return;
        first += (length + 15) / 16;
    }
}

/* A place in the stream of chunks: of item `turn` so many tokens are left, -1: no more items. */
struct kda_cursor {
    uint32_t turn, n; /* n: the chunk, counted over all items */
    int left, token;
};

template <int D, int VB>
ATTN_DEVICE void leave_item(kda_fwd_smem<D, VB> &sm, kda_cursor &at, bool draws)
{
    uint32_t place = at.turn++ % kda_fwd_smem<D, VB>::ITEMS;
    mbarrier_arrive(shared_address(sm.item_empty + place));
    if (draws) mbarrier_arrive(shared_address(sm.item_wanted + place));
}

/* Whether the cursor stands at a chunk; it goes on to the next item where there is one yet.  The
 * one that `draws` wants another item when it comes to the end of one. */
template <int D, int VB>
ATTN_DEVICE bool at_chunk(kda_fwd_smem<D, VB> &sm, kda_cursor &at, bool draws)
{
    typedef kda_fwd_smem<D, VB> smem;
    if (at.left) return at.left > 0;
    uint32_t place = at.turn % smem::ITEMS;
    if (!mbarrier_test_parity(shared_address(sm.item_full + place), at.turn / smem::ITEMS & 1))
        return false;
    at.left = sm.item[place].length;
    at.token = sm.item[place].start;
    if (at.left == 0) leave_item(sm, at, draws);
    return at.left > 0;
}

template <int D, int VB>
ATTN_DEVICE void next_chunk(kda_fwd_smem<D, VB> &sm, kda_cursor &at, bool draws)
{
    at.n++;
    at.token += 16;
    at.left = max(at.left - 16, 0);
    if (at.left == 0) leave_item(sm, at, draws);
}

/* Of every item g, k, q of the chunks prepared here, and v of all of them.  The producers are ahead
 * of the consumers, and neither must wait for the other's memory: two cursors.  One lane. */
template <int D, int VB>
ATTN_DEVICE void load(const attn_kda_fwd_params &p, const attn_kda_fwd_maps &maps,
                      kda_fwd_smem<D, VB> &sm, int rank)
{
    typedef kda_fwd_smem<D, VB> smem;
    bool draws = p.ticket && rank == 0;
    kda_cursor raw = {}, v = {};
    while (raw.left >= 0 || v.left >= 0) {
        if (at_chunk(sm, raw, draws)) {
            uint32_t own = raw.n / smem::CLUSTER, place = own % smem::RAW;
            bool here = (int)(raw.n % smem::CLUSTER) == rank;
            if (!here || mbarrier_test_parity(shared_address(sm.raw_empty + place),
                                              ~(own / smem::RAW) & 1)) {
                const kda_item &item = sm.item[raw.turn % smem::ITEMS];
                int head = item.head, batch = item.batch, token = raw.token;
                uint32_t full = shared_address(sm.raw_full + place);
                uint32_t to = shared_address(sm.raw[place]);
                if (here) {
                    mbarrier_arrive_expect_tx(full, 3 * smem::TILE_BYTES);
                    tma_load_5d(to + 2 * smem::TILE_BYTES, &maps.g, full, 0, token, 0, head, batch);
                    tma_load_5d(to + smem::TILE_BYTES, &maps.k, full, 0, token, 0, head, batch);
                    tma_load_5d(to, &maps.q, full, 0, token, 0, head, batch);
                }
                next_chunk(sm, raw, draws);
            }
        }
        uint32_t place = v.n % smem::FACTORS;
        if (at_chunk(sm, v, false) && mbarrier_test_parity(shared_address(sm.v_empty + place),
                                                    ~(v.n / smem::FACTORS) & 1)) {
            const kda_item &item = sm.item[v.turn % smem::ITEMS];
            uint32_t full = shared_address(sm.factor_full + place), bytes = smem::VALUE_BYTES;
            /* with what the other block will send */
            if ((int)(v.n % smem::CLUSTER) != rank) bytes += sizeof(kda_factor<D>);
            mbarrier_arrive_expect_tx(full, bytes);
            tma_load_5d(shared_address(sm.v[place]), &maps.v, full, 0, v.token, item.value / 64,
                        item.head, item.batch);
            next_chunk(sm, v, false);
        }
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
    static_assert(sizeof(kda_scratch<D>) <= ATTN_KDA_SCRATCH_BYTES(D), "and so does its scratch");
    extern __shared__ __align__(1024) uint8_t shared[];
    smem &sm = *(smem *)shared;
    int group = __shfl_sync(0xffffffff, (int)threadIdx.x / 128, 0);
    int rank = smem::CLUSTER == 1 ? 0 : (int)cluster_rank();
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < smem::RAW; i++) {
            mbarrier_init(shared_address(sm.raw_full + i), 1);
            mbarrier_init(shared_address(sm.raw_empty + i), 128);
        }
        for (uint32_t i = 0; i < smem::FACTORS; i++) {
            mbarrier_init(shared_address(sm.factor_scaled + i), 128);
            bool here = (int)(i % smem::CLUSTER) == rank;
            mbarrier_init(shared_address(sm.factor_full + i), here ? 1 + 32 : 1);
            mbarrier_init(shared_address(sm.factor_empty + i),
                          128 * smem::CONSUMERS * smem::CLUSTER);
            mbarrier_init(shared_address(sm.v_empty + i), 128 * smem::CONSUMERS);
        }
        for (uint32_t i = 0; i < smem::SCRATCHES; i++)
            mbarrier_init(shared_address(sm.scratch_empty + i), 32);
        for (uint32_t i = 0; i < smem::ITEMS; i++) {
            mbarrier_init(shared_address(sm.item_full + i), 32);
            mbarrier_init(shared_address(sm.item_empty + i),
                          128 * (smem::PRODUCERS + smem::CONSUMERS) + 32 * smem::FINISHERS + 2);
        }
        for (uint32_t i = 0; i < smem::ITEMS; i++) {
            mbarrier_init(shared_address(sm.item_wanted + i), 1);
            mbarrier_init(shared_address(sm.drawn_full + i), 1);
            mbarrier_init(shared_address(sm.drawn_empty + i), 32);
        }
        fence_mbarrier_init();
        prefetch_tensormap(&maps.q);
        prefetch_tensormap(&maps.k);
        prefetch_tensormap(&maps.g);
        prefetch_tensormap(&maps.v);
    }
    if constexpr (smem::CLUSTER == 1)
        __syncthreads();
    else
        cluster_sync();

    if (group < smem::PRODUCERS) {
        setmaxnreg_dec<smem::PRODUCER_REGISTERS>();
        produce<D, VB>(p, sm, group, rank);
    } else if (group < smem::PRODUCERS + smem::CONSUMERS) {
        setmaxnreg_inc<smem::CONSUMER_REGISTERS>();
        consume<D, VB>(p, sm, group - smem::PRODUCERS);
    } else {
        setmaxnreg_dec<smem::LOADER_REGISTERS>();
        int warp = __shfl_sync(0xffffffff, (int)threadIdx.x % 128 / 32, 0);
        if (warp == 0)
            schedule<D, VB>(p, sm, rank);
        else if (warp == 1 && elect_one())
            load<D, VB>(p, maps, sm, rank);
        else if (warp >= 2)
            finish<D, VB>(p, sm, warp - 2, rank);
    }
    if constexpr (smem::CLUSTER > 1) { /* the other block may still copy to here and arrive */
        __syncwarp();
        cluster_sync();
    }
}

#if VARIANT_DQK == 2 * VARIANT_ROWS
#define CLUSTER __cluster_dims__(2, 1, 1)
#else
#define CLUSTER
#endif

/* The build compiles this file once a line of kda_fwd.def, with the line's fields as macros. */
#define ATTN_KERNEL(op, arch, dtype, dk, dv, rows, tokens)                                         \
    extern "C" __global__ void __launch_bounds__((kda_fwd_smem<dk, rows>::THREADS), 1)             \
        CLUSTER                                                                                    \
        attn_##op##_##arch##_##dtype##_d##dk##x##dv##_m##rows##n##tokens(                          \
            const __grid_constant__ attn_kda_fwd_params p,                                         \
            const __grid_constant__ attn_kda_fwd_maps maps)                                        \
    {                                                                                              \
        op##_body<dk, rows>(p, maps);                                                              \
    }
#define ATTN_EXPAND(...) ATTN_KERNEL(__VA_ARGS__)
ATTN_EXPAND(kda_fwd, sm90, VARIANT_DTYPE, VARIANT_DQK, VARIANT_DV, VARIANT_ROWS, VARIANT_KEYS)
