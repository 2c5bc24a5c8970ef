/* SPDX-License-Identifier: MIT
 *
 * kda_pack: a dense copy of a tensor that the copy engine cannot address, because its rows do not
 * lie on multiples of 16 bytes (a slice of a fused projection, say).  A thread moves eight columns.
 */
#include "kda_pack_params.h"
#include "ptx.cuh"

extern "C" __global__ void __launch_bounds__(256)
    attn_kda_pack_sm90(const __grid_constant__ attn_kda_pack_params p)
{
    for (int64_t at = blockIdx.x * 256ll + threadIdx.x; at < p.chunks; at += gridDim.x * 256ll) {
        int64_t row = at / (p.d / 8), token = row / p.h;
        const uint16_t *from = p.from + token / p.t * p.from_b + token % p.t * p.from_t +
                               row % p.h * p.from_h + at % (p.d / 8) * 8;
        uint32_t pair[4];
#pragma unroll
        for (int i = 0; i < 4; i++) pair[i] = from[2 * i] | (uint32_t)from[2 * i + 1] << 16;
        ((uint4 *)p.to)[at] = make_uint4(pair[0], pair[1], pair[2], pair[3]);
    }
}
