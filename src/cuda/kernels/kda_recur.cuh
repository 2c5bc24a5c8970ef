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

/* Sixteen tokens x sixteen value rows of outputs on their way, through 512 bytes of shared memory a
 * warp; the halves of a token swap in rows 4..7 and 12..15, so that both ways are free of bank
 * conflicts. */
struct kda_outputs {
    uint32_t stage; /* this warp's bytes */
    uint16_t *to;   /* this lane's half of its token's row, of the chunk that is staged */
    int rows;       /* tokens of the chunk that there are; 0: nothing on its way */
    int aligned;
};

ATTN_DEVICE void stage_outputs(const kda_outputs &o, const uint32_t (&packed)[4])
{
    uint32_t lane = threadIdx.x % 32, to_row = lane % 8 + lane / 16 * 8;
    stmatrix_x4_trans(o.stage + to_row * 32 + (lane / 8 % 2 ^ to_row / 4 % 2) * 16, packed);
    __syncwarp();
}

ATTN_DEVICE uint4 staged_outputs(const kda_outputs &o)
{
    uint32_t lane = threadIdx.x % 32, token = lane / 2;
    return shared_load_128(o.stage + token * 32 + (lane % 2 ^ token / 4 % 2) * 16);
}

ATTN_DEVICE void store_outputs(const kda_outputs &o, uint4 row)
{
    bool mine = (int)(threadIdx.x % 32 / 2) < o.rows;
    if (o.aligned) {
        global_store_128_if(mine, o.to, row);
        return;
    }
    const uint32_t pair[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (mine) o.to[i] = (uint16_t)(pair[i / 2] >> i % 2 * 16);
}

/* Sixteen tokens of the recurrence on 64 value rows.  What of the chunk before is staged is stored
 * under the first product; the outputs of this one take its place.  Shared memory is read before
 * the products that hide it, and the factors of the next chunk, whose barrier is `next`, are waited
 * for under the last: 0 if there is none. */
template <int D>
ATTN_DEVICE void recur(float (&state)[D / 2], kda_outputs &o, const kda_factor<D> &factor,
                       uint32_t v_tile, int left, uint32_t next, uint32_t next_parity)
{
    constexpr int STEPS = D / 16;
    int lane = threadIdx.x % 32, c = lane % 4;
    uint32_t a[STEPS][4];
    float p[16];
    float4 power[STEPS];
    uint32_t rows = shared_address(factor.rows), decay = shared_address(factor.decay) + 16 * c;
    /* Nothing is under way, but ptxas looks for that in this basic block only: without the wait it
     * puts one behind the first product, before the decay that should run beside it. */
    wgmma_wait_group<0>();
    wgmma_pin(state);
    uint4 row = staged_outputs(o);
#pragma unroll
    for (int j = 0; j < STEPS; j++) power[j] = shared_load_4f(decay + 64 * j);
    uint64_t kd = wgmma_descriptor(rows, 16);
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int s = half * STEPS / 2; s < (half + 1) * STEPS / 2; s++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                a[s][j] = pack_16x2<0>(state[8 * s + 2 * j], state[8 * s + 2 * j + 1]);
        wgmma_fence();
#pragma unroll
        for (int s = half * STEPS / 2; s < (half + 1) * STEPS / 2; s++)
            wgmma_rs_n32(p, a[s], kd + (s / 4 * factor.PANEL_BYTES + s % 4 * 32) / 16, s != 0);
    }
    wgmma_commit_group();
    /* Else the compiler decays the state, and waits for these loads, before the product. */
#pragma unroll
    for (int j = 0; j < STEPS; j++)
        asm volatile("" : "+f"(power[j].x), "+f"(power[j].y), "+f"(power[j].z), "+f"(power[j].w));
    if (left < 16) { /* what follows the sequence may be NaN */
        if (lane / 2 >= left) shared_zero_16(v_tile + v_offset(lane / 2, lane % 2));
        fence_proxy_async_shared(); /* the next load writes there */
        __syncwarp();
    }
    uint32_t v[4];
    ldmatrix_x4<1>(v, v_tile + v_offset(lane % 8 + lane / 16 * 8, lane / 8 % 2));
    float2 r[2] = {shared_load_2f(shared_address(factor.r) + 8 * c),
                   shared_load_2f(shared_address(factor.r) + 8 * c + 32)};
    float2 s[2] = {shared_load_2f(shared_address(factor.s) + 8 * c),
                   shared_load_2f(shared_address(factor.s) + 8 * c + 32)};
#pragma unroll
    for (int j = 0; j < STEPS; j++) {
        state[8 * j] *= power[j].x;
        state[8 * j + 1] *= power[j].y;
        state[8 * j + 2] *= power[j].x;
        state[8 * j + 3] *= power[j].y;
        state[8 * j + 4] *= power[j].z;
        state[8 * j + 5] *= power[j].w;
        state[8 * j + 6] *= power[j].z;
        state[8 * j + 7] *= power[j].w;
    }
    store_outputs(o, row);
    wgmma_wait_group<0>();
    wgmma_pin(p);

    uint32_t packed[4];
#pragma unroll
    for (int j = 0; j < 4; j++)
        packed[j] = pack_16x2<0>(fmaf(-r[j / 2].x, p[2 * j], __uint_as_float(v[j] << 16)),
                                 fmaf(-r[j / 2].y, p[2 * j + 1],
                                      __uint_as_float(v[j] & 0xffff0000u)));
    float u[8], out[8];
    /* A copy: with the upper half of p itself as accumulator ptxas serialises every wgmma. */
#pragma unroll
    for (int i = 0; i < 8; i++) out[i] = p[8 + i];
    wgmma_pin(out);
    wgmma_fence();
    wgmma_rs_n16(u, packed, wgmma_descriptor_16x16(shared_address(factor.a)), 0);
    wgmma_commit_group();
    wgmma_wait_group<0>();
    wgmma_pin(u);

#pragma unroll
    for (int j = 0; j < 4; j++) packed[j] = pack_16x2<0>(u[2 * j], u[2 * j + 1]);
    wgmma_pin(state);
    wgmma_fence();
    wgmma_rs_n16(out, packed, wgmma_descriptor_16x16(shared_address(factor.m)), 1);
    wgmma_commit_group();
    wgmma_rs<0, D>(state, packed, wgmma_descriptor(rows + 4096, factor.PANEL_BYTES));
    wgmma_commit_group();
    if (next) mbarrier_wait_parity(next, next_parity);
    wgmma_wait_group<1>();
    wgmma_pin(out);
#pragma unroll
    for (int j = 0; j < 4; j++)
        packed[j] = pack_16x2<0>(out[2 * j] * s[j / 2].x, out[2 * j + 1] * s[j / 2].y);
    __syncwarp(); /* all lanes have read what was staged */
    stage_outputs(o, packed);
    wgmma_wait_group<0>();
    wgmma_pin(state);
}

/* Warpgroup `group` of the consumers: value rows 64 group .. of the block's. */
template <int D, int VB>
ATTN_DEVICE void consume(const attn_kda_fwd_params &p, kda_fwd_smem<D, VB> &sm, int group)
{
    typedef kda_fwd_smem<D, VB> smem;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, token = lane / 2;
    kda_outputs o = {shared_address(sm.out[group * 4 + warp]), NULL, 0, p.out_aligned};
    /* block 0's, and how far block 1's lies from it: who made a chunk's factors is told */
    uint32_t empty = address_in_block(shared_address(sm.factor_empty), 0);
    uint32_t apart = address_in_block(shared_address(sm.factor_empty), smem::CLUSTER - 1) - empty;
    float state[D / 2];
    for (uint32_t turn = 0, n = 0;; turn++) {
        wait_full<smem::ITEMS>(sm.item_full, turn);
        const volatile kda_item &item = sm.item[turn % smem::ITEMS];
        int left = item.length;
        if (left < 0) return;
        uint16_t *to = (uint16_t *)p.out + item.batch * p.out_b + (item.start + token) * p.out_t +
                       item.head * p.out_h + item.value + group * 64 + warp * 16 + lane % 2 * 8;
        int64_t stride = 16 * p.out_t;
        asm volatile("" : "+l"(stride)); /* else it is loaded anew in every turn */
        o.rows = 0;
        if (item.state_in >= 0) {
            load_state<D>(state, p.state_in, item.state_in + group * 64 * D, p.state_is_bf16);
        } else {
#pragma unroll
            for (int i = 0; i < D / 2; i++) state[i] = 0;
        }
        int save_at = p.checkpoints ? left - p.every + 16 : 0; /* with so many left one is due */
        int64_t saved = item.saved;
        if (left > 0) wait_full<smem::FACTORS>(sm.factor_full, n);
        for (; left > 0; left -= 16, n++) {
            uint32_t stage = n % smem::FACTORS, next = (n + 1) % smem::FACTORS;
            recur<D>(state, o, *(const kda_factor<D> *)sm.factor[stage],
                     shared_address(sm.v[stage]) + group * 2048, left,
                     left > 16 ? shared_address(sm.factor_full + next) : 0,
                     (n + 1) / smem::FACTORS & 1);
            mbarrier_arrive_at(empty + n % smem::CLUSTER * apart + 8 * stage);
            arrive<smem::FACTORS>(sm.v_empty, n);
            o.to = to;
            o.rows = left;
            to += stride;
            if (left == save_at && left >= 16) {
                if (saved < p.checkpoint_rows)
                    store_state<D>(state, p.checkpoints,
                                   item.checkpoint + saved * p.checkpoint_n + group * 64 * D,
                                   p.checkpoint_is_bf16);
                saved++;
                save_at -= p.every;
            }
        }
        store_outputs(o, staged_outputs(o));
        __syncwarp();
        if (item.state_out >= 0)
            store_state<D>(state, p.state_out, item.state_out + group * 64 * D, p.state_is_bf16);
        arrive<smem::ITEMS>(sm.item_empty, turn);
    }
}
