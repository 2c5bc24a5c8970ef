/* SPDX-License-Identifier: MIT
 *
 * The consumers of kda_fwd: the recurrence over chunks, its state in registers, transposed.
 */
#pragma once
#include "kda_smem.cuh"

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

/* Through this warp's 16 tokens x 32 bytes of shared memory; the halves of a token swap in rows
 * 4..7 and 12..15, so that both ways are free of bank conflicts. */
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

/* Sixteen tokens of the recurrence on 64 value rows.  The outputs of the chunk before are stored
 * under the first product; those of this one take their place. */
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
