/* SPDX-License-Identifier: MIT
 *
 * kda_step and kda_scan: Kimi Delta Attention token by token, a few tokens on states that change in
 * place, and whole sequences whose gates come activated.  Those have no bound, so that no power of
 * two serves a chunk; here nothing is ever divided by a decay.
 *
 * Math, per sequence, head and token, all in fp32, S [v, k] the state:
 *     S <- S 2^gamma      u = b (v - S k^)      S <- S + u k^T      out = scale S q^
 * with k^ = k / sqrt(|k|^2 + 1e-6), q^ likewise, gamma and b as in kda_fwd.cu.  Both products take
 * the decayed state: S_new q^ = S q^ + u (k^ . q^).
 *
 * Layout.  A state row of D channels is D / 4 lanes of four channels.  A block has 64 rows of one
 * (sequence, head), a warp eight of them, held in registers over the tokens:
 *     grid = [n h D / 64], 8 warps; row = slice 64 + warp 8 + i (128 / D) + lane / (D / 4)
 * Every warp makes gate, norms and decay of all channels anew, which is little beside the state.
 * In kda_scan the rows of the next token are on their way while this one is worked on.
 */
#pragma once
#include "kda_step_params.h"
#include "kda_ptx.cuh"
#include "kda_ragged.cuh"

#define LOG2E 1.4426950408889634f
#define EPSILON 1e-6f

ATTN_DEVICE uint16_t *row_at(const attn_kda_rows &r, int64_t batch, int64_t token, int head)
{
    return (uint16_t *)r.data + batch * r.b + token * r.t + head * r.h;
}

ATTN_DEVICE float bf16_float(uint32_t bits) { return __uint_as_float(bits << 16); }

ATTN_DEVICE void load_four(float (&x)[4], const uint16_t *from, int aligned)
{
    uint2 bits;
    if (aligned) {
        bits = *(const uint2 *)from;
    } else {
        bits.x = from[0] | (uint32_t)from[1] << 16;
        bits.y = from[2] | (uint32_t)from[3] << 16;
    }
    x[0] = bf16_float(bits.x);
    x[1] = __uint_as_float(bits.x & 0xffff0000u);
    x[2] = bf16_float(bits.y);
    x[3] = __uint_as_float(bits.y & 0xffff0000u);
}

ATTN_DEVICE float dot_four(const float (&x)[4], const float (&y)[4])
{
    return fmaf(x[3], y[3], fmaf(x[2], y[2], fmaf(x[1], y[1], x[0] * y[0])));
}

/* The sum over the LANES lanes of a row, in all of them. */
template <int LANES> ATTN_DEVICE float row_sum(float x)
{
#pragma unroll
    for (int step = LANES / 2; step; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
    return x;
}

/* Sums of R values over the LANES lanes of a row, halving values and lanes: lane `at` gets that of
 * value at / (LANES / R). */
template <int LANES, int R> ATTN_DEVICE float row_sums(float (&x)[R], int at)
{
    int step = LANES / 2;
#pragma unroll
    for (int half = R / 2; half; half /= 2, step /= 2) {
        bool upper = at & step;
#pragma unroll
        for (int i = 0; i < half; i++) {
            float give = upper ? x[i] : x[i + half];
            x[i] = (upper ? x[i + half] : x[i]) + __shfl_xor_sync(0xffffffff, give, step);
        }
    }
    float sum = x[0];
    for (; step; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
    return sum;
}

/* Four channels of each of a lane's rows, STEP elements apart; `at` is the first. */
template <int R, int STEP>
ATTN_DEVICE void load_rows(float (&s)[R][4], const void *from, int64_t at, int is_bf16)
{
#pragma unroll
    for (int i = 0; i < R; i++) {
        if (is_bf16) {
            load_four(s[i], (const uint16_t *)from + at + i * STEP, 1);
        } else {
            float4 x = *(const float4 *)((const float *)from + at + i * STEP);
            s[i][0] = x.x, s[i][1] = x.y, s[i][2] = x.z, s[i][3] = x.w;
        }
    }
}

template <int R, int STEP>
ATTN_DEVICE void store_rows(const float (&s)[R][4], void *to, int64_t at, int is_bf16)
{
#pragma unroll
    for (int i = 0; i < R; i++) {
        if (is_bf16)
            *(uint2 *)((uint16_t *)to + at + i * STEP) = make_uint2(pack_16x2<0>(s[i][0], s[i][1]),
                                                                    pack_16x2<0>(s[i][2], s[i][3]));
        else
            *(float4 *)((float *)to + at + i * STEP) = make_float4(s[i][0], s[i][1], s[i][2],
                                                                   s[i][3]);
    }
}

/* What a lane takes of a token: four channels of q k g, one value, the write strength. */
struct kda_token {
    float q[4], k[4], g[4], v, b;
};

ATTN_DEVICE void load_token(kda_token &x, const attn_kda_step_params &p, int64_t batch,
                            int64_t token, int head, int channel, int value)
{
    load_four(x.q, row_at(p.q, batch, token, head) + channel, p.aligned);
    load_four(x.k, row_at(p.k, batch, token, head) + channel, p.aligned);
    load_four(x.g, row_at(p.g, batch, token, head) + channel, p.aligned);
    x.v = bf16_float(row_at(p.v, batch, token, head)[value]);
    x.b = bf16_float(*row_at(p.beta, batch, token, head));
}

/* IN_PLACE: kda_step, a few tokens on states that change; else whole sequences. */
template <int D, bool IN_PLACE> ATTN_DEVICE void kda_step_body(const attn_kda_step_params &p)
{
    constexpr int LANES = D / 4, ACROSS = 32 / LANES, R = 8 / ACROSS, SLICES = D / 64;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, at = lane % LANES;
    int slice = blockIdx.x % SLICES, head = blockIdx.x / SLICES % p.h;
    int sequence = blockIdx.x / SLICES / p.h;
    int first = slice * 64 + warp * 8; /* rows of this warp: first + i ACROSS + lane / LANES */
    int64_t begin = p.cu_seqlens ? boundary(p, sequence) : 0;
    int64_t end = p.cu_seqlens ? boundary(p, sequence + 1) : p.t;
    int64_t batch = p.cu_seqlens ? 0 : sequence;
    int64_t slot = p.state_index ? p.state_index[sequence] : sequence;
    bool held = slot >= 0 && slot < p.slots;
    if (IN_PLACE && !held) {
        for (int64_t token = begin; token < end; token++)
            if (lane < 8) row_at(p.out, batch, token, head)[first + lane] = 0;
        return;
    }
    if (IN_PLACE && begin >= end) return;

    int64_t place = (first + lane / LANES) * D + 4 * at;
    float s[R][4] = {};
    if (IN_PLACE || (p.in.data && held))
        load_rows<R, ACROSS * D>(s, p.in.data, slot * p.in.n + head * p.in.h + place,
                                 p.state_is_bf16);
    int64_t row = 0, until = INT64_MAX; /* the next checkpoint, and the token it comes before */
    if (!IN_PLACE && p.checkpoint.data) {
        row = checkpoints_before(p, sequence);
        until = begin + p.every;
    }
    float slope = -LOG2E * (p.a_log ? ex2_approx(at_most(p.a_log[head] * LOG2E, 60.0f)) : 1.0f);
    float bias[4];
#pragma unroll
    for (int c = 0; c < 4; c++)
        bias[c] = p.dt_bias ? slope * p.dt_bias[head * p.dt_bias_h + 4 * at + c] : 0.0f;
    int own = at / (LANES / R) * ACROSS + lane / LANES; /* the row whose sums this lane gets */

    kda_token next;
    if (!IN_PLACE && begin < end) load_token(next, p, batch, begin, head, 4 * at, first + own);
    for (int64_t token = begin; token < end; token++) {
        kda_token now = next;
        float(&q)[4] = now.q, (&k)[4] = now.k, (&g)[4] = now.g, &b = now.b;
        if (IN_PLACE) /* one token as a rule: registers are better spent on the state */
            load_token(now, p, batch, token, head, 4 * at, first + own);
        else if (token + 1 < end)
            load_token(next, p, batch, token + 1, head, 4 * at, first + own);
        if (!p.beta_activated) b = rcp_approx(1.0f + ex2_approx(-LOG2E * b));
        float over_k = rsqrt_approx(row_sum<LANES>(dot_four(k, k)) + EPSILON);
        float over_q = p.scale * rsqrt_approx(row_sum<LANES>(dot_four(q, q)) + EPSILON);
        float both = row_sum<LANES>(dot_four(k, q)) * over_k * over_q;
        float along_k[R], along_q[R];
#pragma unroll
        for (int c = 0; c < 4; c++) {
            float e = ex2_approx(fmaf(g[c], slope, bias[c]));
            float decay = ex2_approx(p.gate_activated ? g[c] * LOG2E
                                                      : p.bound * rcp_approx(1.0f + e));
            k[c] *= over_k;
            q[c] *= over_q;
#pragma unroll
            for (int i = 0; i < R; i++) s[i][c] *= decay;
        }
#pragma unroll
        for (int i = 0; i < R; i++) {
            along_k[i] = dot_four(s[i], k);
            along_q[i] = dot_four(s[i], q);
        }
        float u = b * (now.v - row_sums<LANES, R>(along_k, at));
        float o = fmaf(u, both, row_sums<LANES, R>(along_q, at));
        if (at % (LANES / R) == 0)
            row_at(p.out, batch, token, head)[first + own] = (uint16_t)pack_16x2<0>(o, 0.0f);
#pragma unroll
        for (int i = 0; i < R; i++) {
            float from = __shfl_sync(0xffffffff, u, lane / LANES * LANES + i * (LANES / R));
#pragma unroll
            for (int c = 0; c < 4; c++) s[i][c] = fmaf(from, k[c], s[i][c]);
        }
        if (!IN_PLACE && token + 1 == until) {
            if (row < p.checkpoint_rows)
                store_rows<R, ACROSS * D>(s, p.checkpoint.data,
                                          row * p.checkpoint.n + head * p.checkpoint.h + place,
                                          p.checkpoint_is_bf16);
            row++;
            until += p.every;
        }
    }
    if (IN_PLACE || (p.kept.data && held))
        store_rows<R, ACROSS * D>(s, p.kept.data, slot * p.kept.n + head * p.kept.h + place,
                                  p.state_is_bf16);
}
