/* SPDX-License-Identifier: MIT
 *
 * The producers of kda_fwd: from q k g and beta of a chunk to the factors of the recurrence.  The
 * formulas are at the top of kda_fwd.cu.
 */
#pragma once
#include "kda_smem.cuh"

/* The 16 x 16 fragments of k step s of a tile: rows 0..7, 8..15 by columns 0..7, then 8..15: the
 * operand A of mma, and (0, 2), (1, 3) the operands B of its two halves of rows. */
template <int PANEL_BYTES>
ATTN_DEVICE void load_fragment(uint32_t (&r)[4], uint32_t tile, uint32_t lane_offset, int s)
{
    ldmatrix_x4<0>(r, (tile + lane_offset ^ s % 4 * 32) + s / 4 * PANEL_BYTES);
}

/* Rows of 128 bytes: this lane's part of the address of a fragment; of `rows` rows, the last one in
 * place of those behind it. */
ATTN_DEVICE uint32_t fragment_offset(int rows = 16)
{
    uint32_t lane = threadIdx.x % 32, row = min((int)lane % 16, rows - 1);
    return row * 128 + ((lane / 16 ^ row % 8) * 16);
}

/* l = Kd Ki^T and m = Qd Ki^T, [16][D] . [16][D]^T: fragment n tile * 4 + i. */
template <int D>
ATTN_DEVICE void products(float (&l)[8], float (&m)[8], uint32_t kd_qd, uint32_t ki)
{
    uint32_t lane_offset = fragment_offset();
    float l_odd[8], m_odd[8]; /* even and odd k steps apart: chains of half the length */
#pragma unroll
    for (int i = 0; i < 8; i++) l[i] = l_odd[i] = m[i] = m_odd[i] = 0;
#pragma unroll
    for (int s = 0; s < D / 16; s++) {
        uint32_t a[4], b[4];
        load_fragment<2048>(b, ki, lane_offset, s);
        load_fragment<kda_factor<D>::PANEL_BYTES>(a, kd_qd, lane_offset, s);
        mma_16x8<0>(s % 2 ? l_odd : l, a, b[0], b[2]);
        mma_16x8<0>((s % 2 ? l_odd : l) + 4, a, b[1], b[3]);
        load_fragment<kda_factor<D>::PANEL_BYTES>(a, kd_qd + 2048, lane_offset, s);
        mma_16x8<0>(s % 2 ? m_odd : m, a, b[0], b[2]);
        mma_16x8<0>((s % 2 ? m_odd : m) + 4, a, b[1], b[3]);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        l[i] += l_odd[i];
        m[i] += m_odd[i];
    }
}

/* A number of each of a chunk's 16 rows to `to`, 0 from row `rows` on.  A diagonal's lanes are those
 * with lane % 4 = lane / 8, which have rows lane / 4 and lane / 4 + 8. */
ATTN_DEVICE void store_diagonal(uint32_t to, float upper, float lower, int rows)
{
    int lane = threadIdx.x % 32, g = lane / 4;
    if (lane % 4 != g / 2) return;
    shared_store_f(to + 4 * g, g < rows ? upper : 0.0f);
    shared_store_f(to + 4 * g + 32, g + 8 < rows ? lower : 0.0f);
}

/* scale / |row| of the 16 rows of a raw tile: the diagonal of X X^T.  Rows from `rows` on are not
 * read: other warps are clearing them. */
template <int D> ATTN_DEVICE void inverse_norms(uint32_t tile, uint32_t to, float scale, int rows)
{
    float d[8];
    uint32_t lane_offset = fragment_offset(rows);
    bool odd = threadIdx.x / 4 % 2;
#pragma unroll
    for (int i = 0; i < 8; i++) d[i] = 0;
#pragma unroll
    for (int s = 0; s < D / 16; s++) {
        uint32_t a[4];
        load_fragment<2048>(a, tile, lane_offset, s);
        mma_16x8<0>(d, a, a[0], a[2]);
        mma_16x8<0>(d + 4, a, a[1], a[3]);
    }
    float upper = rsqrt_approx((odd ? d[1] : d[0]) + EPSILON);
    float lower = rsqrt_approx((odd ? d[7] : d[6]) + EPSILON);
    store_diagonal(to, scale * upper, scale * lower, rows);
}

/* 1 / |k_i| to `r`, M_ii = <q_i, k_i> 2^-40 to `m`: eight rows of q above eight of k, times those of
 * k. */
template <int D>
ATTN_DEVICE void key_diagonals(uint32_t q_tile, uint32_t k_tile, uint32_t r, uint32_t m, int rows)
{
    float upper[4], lower[4]; /* <q_i, k_i> in 0 and 1, |k_i|^2 in 2 and 3 */
    uint32_t lane_offset = fragment_offset(rows);
    bool odd = threadIdx.x / 4 % 2;
#pragma unroll
    for (int i = 0; i < 4; i++) upper[i] = lower[i] = 0;
#pragma unroll
    for (int s = 0; s < D / 16; s++) {
        uint32_t q[4], k[4];
        load_fragment<2048>(q, q_tile, lane_offset, s);
        load_fragment<2048>(k, k_tile, lane_offset, s);
        const uint32_t first[4] = {q[0], k[0], q[2], k[2]}, second[4] = {q[1], k[1], q[3], k[3]};
        mma_16x8<0>(upper, first, k[0], k[2]);
        mma_16x8<0>(lower, second, k[1], k[3]);
    }
    store_diagonal(r, rsqrt_approx((odd ? upper[3] : upper[2]) + EPSILON),
                   rsqrt_approx((odd ? lower[3] : lower[2]) + EPSILON), rows);
    store_diagonal(m, (odd ? upper[1] : upper[0]) / LIFT, (odd ? lower[1] : lower[0]) / LIFT, rows);
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
                                 kda_factor<D> &factor, kda_scratch<D> &scratch)
{
    constexpr int CHANNELS = D / 32, PAIRS = CHANNELS / 2;
    constexpr int TILE_BYTES = 32 * D;
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, group = lane / 8;
    uint32_t channel = warp * (D / 4) + lane % 8 * CHANNELS, in_row = channel * 2 % 128;
    /* token 4 group + i: at + 128 i with i in bits 4 and 5 flipped */
    uint32_t at = group * 512 + (in_row / 16 ^ group % 2 * 4) * 16 + in_row % 16;
    uint32_t from = raw + channel / 64 * 2048 + at;
    uint32_t kd = shared_address(factor.rows) + channel / 64 * factor.PANEL_BYTES + at;
    uint32_t ki = shared_address(scratch.ki) + channel / 64 * 2048 + at;
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
        store_pairs(AT(kd, i) + 4096, falling);
        store_pairs(AT(ki, i), rising);
#pragma unroll
        for (int c = 0; c < CHANNELS; c++) up[c] *= step[i][c];
    }
#undef AT
}

/* A and M of a chunk; `beta` is b of token `lane`.  A = (1 + L)^-1 by substitution, a row a lane.
 * One warp. */
template <int D>
ATTN_DEVICE void prepare_small(kda_factor<D> &factor, kda_scratch<D> &scratch, float beta)
{
    uint32_t lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    uint32_t l = shared_address(scratch.l), r = shared_address(factor.r);
    float d[8], m[8], x[16];
    if (lane < 16) scratch.b[lane] = beta;
    products<D>(d, m, shared_address(factor.rows), shared_address(scratch.ki));
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
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
            uint32_t i = g + 8 * half, j = 8 * tile + 2 * c;
            float first = m[4 * tile + 2 * half], second = m[4 * tile + 2 * half + 1];
            if (tile == half) {
                float own = __uint_as_float(shared_load_32(shared_address(scratch.qk) + 4 * i));
                first = j < i ? first : j == i ? own : 0.0f;
                second = j + 1 < i ? second : j + 1 == i ? own : 0.0f;
            }
            shared_store_32(shared_address(factor.m) + 256 * half + 128 * tile + 4 * lane,
                            tile > half ? 0 : pack_16x2<0>(first, second));
        }
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
        float4 b = shared_load_4f(shared_address(scratch.b) + 4 * j);
        packed[j / 2] = pack_16x2<0>(x[j] * b.x, x[j + 1] * b.y);
        packed[j / 2 + 1] = pack_16x2<0>(x[j + 2] * b.z, x[j + 3] * b.w);
    }
    if (lane < 16) {
        uint32_t to = shared_address(factor.a) + row / 8 * 256 + row % 8 * 16;
        shared_store_128(to, packed[0], packed[1], packed[2], packed[3]);
        shared_store_128(to + 128, packed[4], packed[5], packed[6], packed[7]);
    }
}

/* Warpgroup `group` of the producers: this block's chunks group, group + PRODUCERS, .., but for A
 * and M.  Of its four warps two have the diagonals of a chunk, in turn. */
template <int D, int VB>
ATTN_DEVICE void produce(const attn_kda_fwd_params &p, kda_fwd_smem<D, VB> &sm, int group, int rank)
{
    typedef kda_fwd_smem<D, VB> smem;
    uint32_t own = group; /* the next chunk, counted over those of this block */
    for (uint32_t turn = 0;; turn++) {
        wait_full<smem::ITEMS>(sm.item_full, turn);
        const kda_item &item = sm.item[turn % smem::ITEMS];
        if (item.length < 0) return;
#pragma unroll 1
        for (;; own += smem::PRODUCERS) {
            uint32_t now = own * smem::CLUSTER + rank;
            int rows = item.length - 16 * (int)(now - item.first);
            if (rows <= 0) break;
            uint32_t duty = (threadIdx.x / 32 + own / smem::PRODUCERS + 2 * group) % 4;
            kda_factor<D> &factor = *(kda_factor<D> *)sm.factor[now % smem::FACTORS];
            uint32_t raw = shared_address(sm.raw[own % smem::RAW]);
            wait_empty<smem::SCRATCHES>(sm.scratch_empty, own);
            wait_empty<smem::FACTORS>(sm.factor_empty, now);
            wait_full<smem::RAW>(sm.raw_full, own);
            kda_scratch<D> &scratch = sm.scratch[own % smem::SCRATCHES];
            prepare_factors<D>(item, p.bound, rows, raw, factor, scratch);
            if (duty == 0)
                key_diagonals<D>(raw, raw + smem::TILE_BYTES, shared_address(factor.r),
                                 shared_address(scratch.qk), rows);
            if (duty == 2) inverse_norms<D>(raw, shared_address(factor.s), p.scale, rows);
            fence_proxy_async_shared();
            arrive<smem::FACTORS>(sm.factor_scaled, now);
            arrive<smem::RAW>(sm.raw_empty, own);
        }
        arrive<smem::ITEMS>(sm.item_empty, turn);
    }
}

/* b of token `lane` of a chunk, from its logit. */
ATTN_DEVICE float write_strength(const attn_kda_fwd_params &p, uint32_t logit, int rows)
{
    float b = __uint_as_float(logit << 16);
    if (!p.beta_activated) b = rcp_approx(1.0f + ex2_approx(-LOG2E * b));
    return (int)(threadIdx.x % 32) < rows ? b : 0.0f;
}

/* Finisher `which` adds A and M to every FINISHERS-th chunk that the producers made, and hands it
 * on: to the consumers here and, of a cluster of two, to the other block.  One warp. */
template <int D, int VB>
ATTN_DEVICE void finish(const attn_kda_fwd_params &p, kda_fwd_smem<D, VB> &sm, int which, int rank)
{
    typedef kda_fwd_smem<D, VB> smem;
    int lane = threadIdx.x % 32;
    uint32_t own = which;
    for (uint32_t turn = 0;; turn++) {
        wait_full<smem::ITEMS>(sm.item_full, turn);
        const kda_item &item = sm.item[turn % smem::ITEMS];
        if (item.length < 0) return;
        uint32_t logit = 0;
        for (bool first = true;; first = false) {
            constexpr int STEP = 16 * smem::FINISHERS * smem::CLUSTER;
            uint32_t now = own * smem::CLUSTER + rank, stage = now % smem::FACTORS;
            int done = 16 * (int)(now - item.first), rows = item.length - done;
            if (rows <= 0) break;
            const uint16_t *beta = (const uint16_t *)p.beta + item.beta + (done + lane) * p.beta_t;
            if (first && lane < 16 && lane < rows) logit = *beta;
            float b = write_strength(p, logit, rows);
            /* the next chunk's are on their way while this one is worked on */
            if (lane < 16 && lane + STEP < rows) logit = beta[STEP * p.beta_t];
            wait_full<smem::FACTORS>(sm.factor_scaled, now);
            prepare_small<D>(*(kda_factor<D> *)sm.factor[stage],
                             sm.scratch[own % smem::SCRATCHES], b);
            fence_proxy_async_shared();
            arrive<smem::FACTORS>(sm.factor_full, now);
            __syncwarp();
            if (smem::CLUSTER == 2 && lane == 0)
                bulk_copy_to_block(shared_address(sm.factor[stage]), sizeof(kda_factor<D>),
                                   shared_address(sm.factor_full + stage), 1 - rank);
            arrive<smem::SCRATCHES>(sm.scratch_empty, own);
            own += smem::FINISHERS;
        }
        arrive<smem::ITEMS>(sm.item_empty, turn);
    }
}
