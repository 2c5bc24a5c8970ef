/* SPDX-License-Identifier: MIT
 *
 * kda_fwd: Kimi Delta Attention, forward, on Hopper.
 *
 * Math, per sequence and head, S [v, k] the state in fp32, in chunks of 16 tokens i, j (base-2 logs):
 *     gamma_i = bound / (1 + 2^-(slope (g_i + dt_bias)))      G_i = gamma_1 + .. + gamma_i
 *     kd_i = k_i 2^G_i    qd_i = q_i 2^G_i    ki_j = k_j 2^(-G_j - 40)    kr_j = k_j 2^(G_16 - G_j - 40)
 *     r_i = (|k_i|^2 + 1e-6)^-1/2, the norm of a key, s_i that of a query times the scale, b_i = sigmoid(beta_i)
 *     L_ij = b_i r_i <kd_i, ki_j> 2^40 r_j, i > j         A_ij = 2^40 r_i ((1 + L)^-1)_ij b_j
 *     M_ij = <qd_i, ki_j>, i >= j
 *     R = v - r (kd S^T)        U = A R        out = s (qd S^T + M U)        S <- S 2^G_16 + U^T kr
 * k and q are never normalised themselves: r and s scale rows of the small products.  The 2^40 keeps
 * ki inside bf16 for long keys under the strongest decay (2^115 over a chunk).  Factors are bf16, the
 * inverse is a substitution in fp32, sums are fp32.  Rows past the end of a sequence have k = 0,
 * gamma = 0, r = 0, b = 0, v = 0.
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
 *     consumers (1, 2 WGs) | [P; O]^T = S [kd; qd]^T, S 2^G beside it | R | U^T = R^T A^T | O += U^T M^T, S += U^T kr |
 */
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
    float slope = -LOG2E * (p.a_log ? ex2_approx(fminf(p.a_log[head] * LOG2E, 60.0f)) : 1.0f);
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

/* ---- the producers --------------------------------------------------------------------------- */

/* The 16 x 16 fragments of k step s of a tile: rows 0..7, 8..15 by columns 0..7, then 8..15: the
 * operand A of mma, and (0, 2), (1, 3) the operands B of its two halves of rows. */
template <int PANEL_BYTES>
ATTN_DEVICE void load_fragment(uint32_t (&r)[4], uint32_t tile, uint32_t lane_offset, int s)
{
    ldmatrix_x4(r, (tile + lane_offset ^ s % 4 * 32) + s / 4 * PANEL_BYTES);
}

/* Rows of 128 bytes: this lane's part of the address of a fragment. */
ATTN_DEVICE uint32_t fragment_offset()
{
    uint32_t lane = threadIdx.x % 32, row = lane % 16;
    return row * 128 + ((lane / 16 ^ row % 8) * 16);
}

/* d[n tile * 4 + i] = X[16][D] . Y[16][D]^T */
template <int D, int X_PANEL, int Y_PANEL>
ATTN_DEVICE void product_16x16(float (&d)[8], uint32_t x, uint32_t y)
{
    uint32_t lane_offset = fragment_offset();
    float odd[8]; /* even and odd k steps apart: chains of half the length */
#pragma unroll
    for (int i = 0; i < 8; i++) d[i] = odd[i] = 0;
#pragma unroll
    for (int s = 0; s < D / 16; s++) {
        uint32_t a[4], b[4];
        load_fragment<X_PANEL>(a, x, lane_offset, s);
        load_fragment<Y_PANEL>(b, y, lane_offset, s);
        mma_m16n8k16_bf16(s % 2 ? odd : d, a, b[0], b[2]);
        mma_m16n8k16_bf16((s % 2 ? odd : d) + 4, a, b[1], b[3]);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) d[i] += odd[i];
}

/* scale / |row| of the 16 rows of a raw tile, 0 from row `rows` on: the diagonal of X X^T. */
template <int D> ATTN_DEVICE void inverse_norms(uint32_t tile, uint32_t to, float scale, int rows)
{
    float d[8];
    uint32_t lane_offset = fragment_offset(), lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
#pragma unroll
    for (int i = 0; i < 8; i++) d[i] = 0;
#pragma unroll
    for (int s = 0; s < D / 16; s++) {
        uint32_t a[4];
        load_fragment<2048>(a, tile, lane_offset, s);
        mma_m16n8k16_bf16(d, a, a[0], a[2]);
        mma_m16n8k16_bf16(d + 4, a, a[1], a[3]);
    }
    if (c == g / 2) {
        float upper = g % 2 ? d[1] : d[0], lower = g % 2 ? d[7] : d[6];
        shared_store_f(to + 4 * g, g < rows ? scale * rsqrt_approx(upper + EPSILON) : 0.0f);
        shared_store_f(to + 4 * g + 32,
                       g + 8 < rows ? scale * rsqrt_approx(lower + EPSILON) : 0.0f);
    }
}

template <int PAIRS> ATTN_DEVICE void load_pairs(uint32_t (&r)[PAIRS], uint32_t address)
{
    if constexpr (PAIRS == 2) {
        uint2 x = shared_load_64(address);
        r[0] = x.x;
        r[1] = x.y;
    } else {
        r[0] = shared_load_32(address);
    }
}

template <int PAIRS> ATTN_DEVICE void store_pairs(uint32_t address, const uint32_t (&r)[PAIRS])
{
    if constexpr (PAIRS == 2)
        shared_store_64(address, r[0], r[1]);
    else
        shared_store_32(address, r[0]);
}

/* Gates, decays and the four factors of a chunk: channels of this thread for its four tokens. */
template <int D>
ATTN_DEVICE void prepare_factors(const kda_item &item, float bound, int rows, uint32_t raw,
                                 kda_factor<D> &factor)
{
    constexpr int CHANNELS = D / 32, PAIRS = CHANNELS / 2;
    constexpr int TILE_BYTES = 32 * D;
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, group = lane / 8;
    uint32_t channel = warp * (D / 4) + lane % 8 * CHANNELS, in_row = channel * 2 % 128;
    /* token 4 group + i: at + 128 i with i in bits 4 and 5 flipped */
    uint32_t at = group * 512 + (in_row / 16 ^ group % 2 * 4) * 16 + in_row % 16;
    uint32_t from = raw + channel / 64 * 2048 + at;
    uint32_t kd = shared_address(factor.kd_qd) + channel / 64 * 4096 + at;
    uint32_t kr = kd + (uint32_t)sizeof factor.kd_qd;
#define AT(base, i) (((base) ^ (i) * 16) + (i) * 128)

    float bias[CHANNELS], slope = item.slope;
#pragma unroll
    for (int c = 0; c < CHANNELS; c += 2) {
        float2 pair = shared_load_2f(shared_address(item.bias + channel + c));
        bias[c] = pair.x;
        bias[c + 1] = pair.y;
    }
    float step[4][CHANNELS]; /* gamma, then 2^gamma */
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t g[PAIRS];
        load_pairs(g, AT(from, i) + 2 * TILE_BYTES);
#pragma unroll
        for (int c = 0; c < CHANNELS; c++) {
            float x = __uint_as_float(c % 2 ? g[c / 2] & 0xffff0000u : g[c / 2] << 16);
            float e = ex2_approx(fmaf(x, slope, bias[c]));
            step[i][c] = bound * rcp_approx(1.0f + e);
        }
    }
    if (rows < 16) { /* every thread clears what it will read itself */
        const uint32_t zero[PAIRS] = {};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i < rows - 4 * (int)group) continue;
            store_pairs(AT(from, i) + TILE_BYTES, zero);
#pragma unroll
            for (int c = 0; c < CHANNELS; c++) step[i][c] = 0;
        }
        fence_proxy_async_shared(); /* the next load writes there */
    }

    float down[CHANNELS], up[CHANNELS], whole[CHANNELS];
#pragma unroll
    for (int c = 0; c < CHANNELS; c++) {
        float own = (step[0][c] + step[1][c]) + (step[2][c] + step[3][c]);
        float other = __shfl_xor_sync(0xffffffff, own, 8), pair = own + other;
        float before = group % 2 ? other : 0.0f;
        other = __shfl_xor_sync(0xffffffff, pair, 16);
        before += group / 2 ? other : 0.0f;
        down[c] = ex2_approx(before);
        up[c] = ex2_approx(-LIFT_LOG2 - (before + own));
        whole[c] = ex2_approx(pair + other);
#pragma unroll
        for (int i = 0; i < 4; i++) step[i][c] = ex2_approx(step[i][c]);
    }
#pragma unroll
    for (int c = 0; c < CHANNELS; c += 2) {
        if (group == 0)
            shared_store_2f(shared_address(factor.decay) + decay_offset(channel + c), whole[c],
                            whole[c + 1]);
    }
    uint32_t k[2][PAIRS]; /* this token's and the next one's */
    load_pairs(k[0], AT(from, 0) + TILE_BYTES);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t q[PAIRS], scaled[PAIRS];
        load_pairs(q, AT(from, i));
        if (i < 3) load_pairs(k[1 - i % 2], AT(from, i + 1) + TILE_BYTES);
#pragma unroll
        for (int c = 0; c < CHANNELS; c++) down[c] *= step[i][c];
#pragma unroll
        for (int c = 0; c < PAIRS; c++) {
            uint32_t power = pack_16x2<0>(down[2 * c], down[2 * c + 1]);
            scaled[c] = mul_bf16x2(k[i % 2][c], power);
            q[c] = mul_bf16x2(q[c], power);
        }
        store_pairs(AT(kd, i), scaled);
        store_pairs(AT(kd, i) + 2048, q);
    }
    /* k[1] still has the last token */
#pragma unroll
    for (int i = 3; i >= 0; i--) {
        uint32_t rising[PAIRS], falling[PAIRS];
        if (i > 0) load_pairs(k[1 - i % 2], AT(from, i - 1) + TILE_BYTES);
#pragma unroll
        for (int c = 0; c < PAIRS; c++) {
            float x = up[2 * c], y = up[2 * c + 1];
            rising[c] = mul_bf16x2(k[i % 2][c], pack_16x2<0>(x, y));
            falling[c] = mul_bf16x2(k[i % 2][c],
                                    pack_16x2<0>(x * whole[2 * c], y * whole[2 * c + 1]));
        }
        store_pairs(AT(kr, i), falling);
        store_pairs(AT(kr, i) + 2048, rising);
#pragma unroll
        for (int c = 0; c < CHANNELS; c++) up[c] *= step[i][c];
    }
#undef AT
}

/* A from kd, ki, r and b of token `lane`: L, then the rows of A, a lane each.  One warp. */
template <int D>
ATTN_DEVICE void prepare_inverse(kda_factor<D> &factor, float beta, const uint64_t *normed,
                                 uint32_t now)
{
    uint32_t lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    uint32_t l = shared_address(factor.l), r = shared_address(factor.r);
    float d[8], x[16];
    if (lane < 16) factor.b[lane] = beta;
    product_16x16<D, 4096, 4096>(d, shared_address(factor.kd_qd),
                                 shared_address(factor.kr_ki) + 2048);
    wait_full<ATTN_KDA_FACTOR_STAGES>(normed, now);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32_t i = g + 8 * half;
        float row = LIFT * __shfl_sync(0xffffffff, beta, i) *
                    __uint_as_float(shared_load_32(r + 4 * i));
#pragma unroll
        for (int tile = 0; tile <= half; tile++) {
            uint32_t j = 8 * tile + 2 * c;
            float2 column = shared_load_2f(r + 4 * j);
            float first = d[4 * tile + 2 * half] * row * column.x;
            float second = d[4 * tile + 2 * half + 1] * row * column.y;
            shared_store_2f(l + 80 * i + 4 * j, j < i ? first : 0.0f, j + 1 < i ? second : 0.0f);
        }
    }
    __syncwarp();
    uint32_t row = lane % 16;
    float own = LIFT * __uint_as_float(shared_load_32(r + 4 * row));
#pragma unroll
    for (int j = 0; j < 16; j++) x[j] = j == row ? own : 0.0f;
#pragma unroll
    for (int j = 15; j > 0; j--) {
#pragma unroll
        for (int i = 0; i < j; i += 4) {
            float4 entry = shared_load_4f(l + 80 * j + 4 * i);
            x[i] -= x[j] * entry.x;
            if (i + 1 < j) x[i + 1] -= x[j] * entry.y;
            if (i + 2 < j) x[i + 2] -= x[j] * entry.z;
            if (i + 3 < j) x[i + 3] -= x[j] * entry.w;
        }
    }
    uint32_t packed[8];
#pragma unroll
    for (int j = 0; j < 16; j += 4) {
        float4 b = shared_load_4f(shared_address(factor.b) + 4 * j);
        packed[j / 2] = pack_16x2<0>(x[j] * b.x, x[j + 1] * b.y);
        packed[j / 2 + 1] = pack_16x2<0>(x[j + 2] * b.z, x[j + 3] * b.w);
    }
    if (lane < 16) {
        uint32_t to = shared_address(factor.a) + row / 8 * 256 + row % 8 * 16;
        shared_store_128(to, packed[0], packed[1], packed[2], packed[3]);
        shared_store_128(to + 128, packed[4], packed[5], packed[6], packed[7]);
    }
}

/* M from qd and ki.  One warp. */
template <int D> ATTN_DEVICE void prepare_scores(kda_factor<D> &factor)
{
    uint32_t lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    float d[8];
    product_16x16<D, 4096, 4096>(d, shared_address(factor.kd_qd) + 2048,
                                 shared_address(factor.kr_ki) + 2048);
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
            uint32_t i = g + 8 * half, j = 8 * tile + 2 * c;
            float first = j <= i ? d[4 * tile + 2 * half] : 0.0f;
            float second = j + 1 <= i ? d[4 * tile + 2 * half + 1] : 0.0f;
            shared_store_32(shared_address(factor.m) + 256 * half + 128 * tile + 4 * lane,
                            pack_16x2<0>(first, second));
        }
}

/* Warpgroup `group` of the producers prepares chunks group, group + PRODUCERS, ..  Of its four warps one
 * has the inverse of a chunk, one the scores, two the norms, in turn; inverse and scores need what all
 * four scale, and wait for it best by scaling their part of the chunk after first. */
template <int D, int VB>
ATTN_DEVICE void produce(const attn_kda_fwd_params &p, kda_fwd_smem<D, VB> &sm, int group)
{
    typedef kda_fwd_smem<D, VB> smem;
    int lane = threadIdx.x % 32;
    uint32_t now = group; /* the next chunk */
    float b = 0; /* of token `lane` of the chunk before, where its inverse is this warp's */
    for (uint32_t turn = 0;; turn++) {
        wait_full<smem::ITEMS>(sm.item_full, turn);
        const kda_item &item = sm.item[turn % smem::ITEMS];
        if (item.length < 0) return;
        bool owes = false; /* inverse or scores of the chunk before, now - PRODUCERS */
#pragma unroll 1
        for (;; now += smem::PRODUCERS) {
            int done = 16 * (int)(now - item.first), rows = item.length - done;
            uint32_t duty = (threadIdx.x / 32 + now / smem::PRODUCERS + 2 * group) % 4;
            uint32_t logit = 0;
            if (rows > 0) {
                kda_factor<D> &factor = *(kda_factor<D> *)sm.factor[now % smem::FACTORS];
                uint32_t raw = shared_address(sm.raw[now % smem::RAW]);
                if (duty == 0 && lane < 16 && lane < rows)
                    logit = ((const uint16_t *)p.beta)[item.beta + (done + lane) * p.beta_t];
                wait_empty<smem::FACTORS>(sm.factor_empty, now);
                wait_full<smem::RAW>(sm.raw_full, now);
                prepare_factors<D>(item, p.bound, rows, raw, factor);
                arrive<smem::FACTORS>(sm.factor_scaled, now);
                if (duty == 2) {
                    inverse_norms<D>(raw + smem::TILE_BYTES, shared_address(factor.r), 1.0f, rows);
                    arrive<smem::FACTORS>(sm.factor_normed, now);
                }
                if (duty == 3) inverse_norms<D>(raw, shared_address(factor.s), p.scale, rows);
                arrive<smem::RAW>(sm.raw_empty, now);
                if (duty >= 2) {
                    fence_proxy_async_shared();
                    arrive<smem::FACTORS>(sm.factor_full, now);
                }
            }
            if (owes) {
                uint32_t before = now - smem::PRODUCERS;
                kda_factor<D> &factor = *(kda_factor<D> *)sm.factor[before % smem::FACTORS];
                wait_full<smem::FACTORS>(sm.factor_scaled, before);
                if (duty == 1)
                    prepare_inverse<D>(factor, b, sm.factor_normed, before);
                else
                    prepare_scores<D>(factor);
                fence_proxy_async_shared();
                arrive<smem::FACTORS>(sm.factor_full, before);
            }
            if (rows <= 0) break;
            owes = duty < 2;
            b = __uint_as_float(logit << 16);
            if (!p.beta_activated) b = rcp_approx(1.0f + ex2_approx(-LOG2E * b));
            if (lane >= rows) b = 0;
        }
        arrive<smem::ITEMS>(sm.item_empty, turn);
    }
}

/* ---- the consumers --------------------------------------------------------------------------- */

/* The accumulators of a consumer warpgroup, from and to rows of the state: this thread's two rows,
 * channels 8 i + 2 c, + 1. */
template <int D>
ATTN_DEVICE void load_state(float (&state)[D / 2], const void *from, int64_t offset, int is_bf16)
{
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    offset += row * D + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int64_t at = offset + 8 * half * D + 8 * i;
            float2 pair;
            if (is_bf16) {
                uint32_t bits = *(const uint32_t *)((const uint16_t *)from + at);
                pair = make_float2(__uint_as_float(bits << 16),
                                   __uint_as_float(bits & 0xffff0000u));
            } else {
                pair = *(const float2 *)((const float *)from + at);
            }
            state[4 * i + 2 * half] = pair.x;
            state[4 * i + 2 * half + 1] = pair.y;
        }
    }
}

template <int D>
ATTN_DEVICE void store_state(const float (&state)[D / 2], void *to, int64_t offset, int is_bf16)
{
    int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    offset += row * D + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int64_t at = offset + 8 * half * D + 8 * i;
            float x = state[4 * i + 2 * half], y = state[4 * i + 2 * half + 1];
            if (is_bf16)
                *(uint32_t *)((uint16_t *)to + at) = pack_16x2<0>(x, y);
            else
                *(float2 *)((float *)to + at) = make_float2(x, y);
        }
    }
}

/* Where eight values of a token lie in a tile of v: half 0 or 1 of this warp's sixteen. */
ATTN_DEVICE uint32_t v_offset(uint32_t token, uint32_t half)
{
    return token * 128 + (threadIdx.x / 32 % 4 * 2 + half ^ token % 8) * 16;
}

/* Sixteen outputs a thread on their way: packed as accumulators, to be stored as rows. */
struct kda_outputs {
    uint32_t packed[4];
    uint16_t *to; /* this lane's half of its token's row */
    int rows;     /* tokens of the chunk that there are */
};

/* Through this warp's 16 tokens x 32 bytes of shared memory; the halves of a token swap in rows 4..7
 * and 12..15, so that both ways are free of bank conflicts. */
ATTN_DEVICE void store_outputs(const kda_outputs &o, uint32_t stage, int aligned)
{
    uint32_t lane = threadIdx.x % 32, token = lane / 2, to_row = lane % 8 + lane / 16 * 8;
    stmatrix_x4_trans(stage + to_row * 32 + (lane / 8 % 2 ^ to_row / 4 % 2) * 16, o.packed);
    __syncwarp();
    uint4 row = shared_load_128(stage + token * 32 + (lane % 2 ^ token / 4 % 2) * 16);
    if ((int)token < o.rows) {
        if (aligned) {
            *(uint4 *)o.to = row;
        } else {
            const uint32_t pair[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
            for (int i = 0; i < 8; i++) o.to[i] = (uint16_t)(pair[i / 2] >> i % 2 * 16);
        }
    }
    __syncwarp();
}

/* Sixteen tokens of the recurrence on 64 value rows.  The outputs of the chunk before are stored under
 * the first product; those of this one take their place. */
template <int D>
ATTN_DEVICE void recur(float (&state)[D / 2], kda_outputs &o, uint32_t stage, int aligned,
                       const kda_factor<D> &factor, uint32_t v_tile)
{
    constexpr int STEPS = D / 16;
    int lane = threadIdx.x % 32, c = lane % 4;
    uint32_t a[STEPS][4];
    float p[16];
    /* Nothing is under way, but ptxas looks for that in this basic block only: without the wait it
     * puts one behind the first product, before the decay that should run beside it. */
    wgmma_wait_group<0>();
    wgmma_pin(state);
#pragma unroll
    for (int s = 0; s < STEPS; s++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            a[s][j] = pack_16x2<0>(state[8 * s + 2 * j], state[8 * s + 2 * j + 1]);
    uint32_t kd = shared_address(factor.kd_qd);
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < STEPS; s++)
        wgmma_rs_n32(p, a[s], wgmma_descriptor(kd + s / 4 * 4096 + s % 4 * 32, 16), s != 0);
    wgmma_commit_group();

    store_outputs(o, stage, aligned);
    uint32_t decay = shared_address(factor.decay) + c * 16;
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
        float4 power = shared_load_4f(decay + 64 * j);
        state[8 * j] *= power.x;
        state[8 * j + 1] *= power.y;
        state[8 * j + 2] *= power.x;
        state[8 * j + 3] *= power.y;
        state[8 * j + 4] *= power.z;
        state[8 * j + 5] *= power.w;
        state[8 * j + 6] *= power.z;
        state[8 * j + 7] *= power.w;
    }
    uint32_t v[4];
    ldmatrix_x4_trans(v, v_tile + v_offset(lane % 8 + lane / 16 * 8, lane / 8 % 2));
    float2 r[2] = {shared_load_2f(shared_address(factor.r) + 8 * c),
                   shared_load_2f(shared_address(factor.r) + 8 * c + 32)};
    wgmma_wait_group<0>();
    wgmma_pin(p);

    uint32_t left[4];
#pragma unroll
    for (int j = 0; j < 4; j++)
        left[j] = pack_16x2<0>(fmaf(-r[j / 2].x, p[2 * j], __uint_as_float(v[j] << 16)),
                               fmaf(-r[j / 2].y, p[2 * j + 1],
                                    __uint_as_float(v[j] & 0xffff0000u)));
    float u[8], out[8];
    /* A copy: with the upper half of p itself as accumulator ptxas serialises every wgmma. */
#pragma unroll
    for (int i = 0; i < 8; i++) out[i] = p[8 + i];
    wgmma_pin(out);
    wgmma_fence();
    wgmma_rs_n16(u, left, wgmma_descriptor_16x16(shared_address(factor.a)), 0);
    wgmma_commit_group();
    wgmma_wait_group<0>();
    wgmma_pin(u);

#pragma unroll
    for (int j = 0; j < 4; j++) left[j] = pack_16x2<0>(u[2 * j], u[2 * j + 1]);
    wgmma_pin(state);
    wgmma_fence();
    wgmma_rs_n16(out, left, wgmma_descriptor_16x16(shared_address(factor.m)), 1);
    wgmma_commit_group();
    wgmma_rs<0, D>(state, left, wgmma_descriptor(shared_address(factor.kr_ki), 4096));
    wgmma_commit_group();
    float2 s[2] = {shared_load_2f(shared_address(factor.s) + 8 * c),
                   shared_load_2f(shared_address(factor.s) + 8 * c + 32)};
    wgmma_wait_group<1>();
    wgmma_pin(out);
#pragma unroll
    for (int j = 0; j < 4; j++)
        o.packed[j] = pack_16x2<0>(out[2 * j] * s[j / 2].x, out[2 * j + 1] * s[j / 2].y);
    wgmma_wait_group<0>();
    wgmma_pin(state);
}

/* Warpgroup `group` of the consumers: value rows 64 group .. of the block's. */
template <int D, int VB>
ATTN_DEVICE void consume(const attn_kda_fwd_params &p, kda_fwd_smem<D, VB> &sm, int group)
{
    typedef kda_fwd_smem<D, VB> smem;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, token = lane / 2;
    uint32_t stage = shared_address(sm.out[group * 4 + warp]);
    float state[D / 2];
    for (uint32_t turn = 0, n = 0;; turn++) {
        wait_full<smem::ITEMS>(sm.item_full, turn);
        const volatile kda_item &item = sm.item[turn % smem::ITEMS];
        int left = item.length;
        if (left < 0) return;
        uint16_t *out = (uint16_t *)p.out + item.batch * p.out_b + (item.start + token) * p.out_t +
                        item.head * p.out_h + item.value + group * 64 + warp * 16 + lane % 2 * 8;
        if (item.state_in >= 0) {
            load_state<D>(state, p.state_in, item.state_in + group * 64 * D, p.state_is_bf16);
        } else {
#pragma unroll
            for (int i = 0; i < D / 2; i++) state[i] = 0;
        }
        kda_outputs o = {{}, out, 0};
        for (; left > 0; left -= 16, n++) {
            wait_full<smem::VALUES>(sm.v_full, n);
            wait_full<smem::FACTORS>(sm.factor_full, n);
            uint32_t v_tile = shared_address(sm.v[n % smem::VALUES]) + group * 2048;
            if (left < 16) { /* what follows the sequence may be NaN */
                if (token >= left) shared_zero_16(v_tile + v_offset(token, lane % 2));
                fence_proxy_async_shared(); /* the next load writes there */
                __syncwarp();
            }
            recur<D>(state, o, stage, p.out_aligned,
                     *(const kda_factor<D> *)sm.factor[n % smem::FACTORS], v_tile);
            arrive<smem::FACTORS>(sm.factor_empty, n);
            arrive<smem::VALUES>(sm.v_empty, n);
            if (o.rows) o.to += 16 * p.out_t;
            o.rows = left;
            if (p.checkpoints && left >= 16) {
                int done = item.length - left + 16;
                int64_t row = item.saved + done / p.every - 1;
                if (done % p.every == 0 && row < p.checkpoint_rows)
                    store_state<D>(state, p.checkpoints,
                                   item.checkpoint + row * p.checkpoint_n + group * 64 * D,
                                   p.checkpoint_is_bf16);
            }
        }
        store_outputs(o, stage, p.out_aligned);
        if (item.state_out >= 0)
            store_state<D>(state, p.state_out, item.state_out + group * 64 * D, p.state_is_bf16);
        arrive<smem::ITEMS>(sm.item_empty, turn);
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
