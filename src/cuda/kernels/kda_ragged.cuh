/* SPDX-License-Identifier: MIT
 *
 * Where the sequences of a KDA kernel begin and end: of its parameters cu_seqlens, cu_is_64 and t.
 * Values of cu_seqlens are looked at here only, and wild ones count as the nearest of 0 and t.
 */
#pragma once
#include "ptx.cuh"

/* The first token of sequence i, or the end of the last one. */
template <class Params> ATTN_DEVICE int64_t boundary(const Params &p, int i)
{
    int64_t at = p.cu_is_64 ? ((const int64_t *)p.cu_seqlens)[i]
                            : ((const int32_t *)p.cu_seqlens)[i];
    return at < 0 ? 0 : at > p.t ? p.t : at;
}

template <class Params> ATTN_DEVICE int sequence_length(const Params &p, int i)
{
    if (!p.cu_seqlens) return p.t;
    int64_t length = boundary(p, i + 1) - boundary(p, i);
    return length < 0 ? 0 : (int)length;
}

/* Checkpoints of the sequences before `sequence`.  One warp, all its lanes get the sum. */
template <class Params> ATTN_DEVICE int64_t checkpoints_before(const Params &p, int sequence)
{
    if (!p.cu_seqlens) return (int64_t)sequence * (p.t / p.every);
    int64_t sum = 0;
    int i = threadIdx.x % 32;
    asm volatile("" : "+r"(i)); /* else registers of addresses live across the caller's loop */
#pragma unroll 1
    for (; i < sequence; i += 32) sum += sequence_length(p, i) / p.every;
#pragma unroll 1
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
    return sum;
}
