/* SPDX-License-Identifier: MIT
 *
 * kda_order: sequences by falling length, before the kda_fwd of a ragged batch.
 *
 * One block sorts by counting: lengths fall into 256 buckets, eight an octave, so that neighbours
 * in the order differ by an eighth at most.  Which of a bucket comes first is left open: every
 * sequence is computed alone, and its bits do not depend on it.
 */
#include "kda_order_params.h"
#include "kda_ragged.cuh"

#define BUCKETS 256

/* 0 for the longest: three bits of the length below its highest one. */
ATTN_DEVICE int bucket(const attn_kda_order_params &p, int i)
{
    int length = sequence_length(p, i);
    if (length < 8) return BUCKETS - 1 - length;
    int octave = 28 - __clz(length); /* 0: 8 to 15 */
    return BUCKETS - 1 - (octave * 8 + (length >> octave));
}

extern "C" __global__ void __launch_bounds__(1024)
    attn_kda_order_sm90(const __grid_constant__ attn_kda_order_params p)
{
    __shared__ int place[BUCKETS];
    int thread = threadIdx.x;
    if (thread < BUCKETS) place[thread] = 0;
    if (thread == 0) *p.ticket = 0;
    __syncthreads();
    for (int i = thread; i < p.n; i += 1024) atomicAdd(&place[bucket(p, i)], 1);
    __syncthreads();
    if (thread < 32) { /* counts to first places, eight buckets a lane */
        int count[BUCKETS / 32], sum = 0;
        for (int i = 0; i < BUCKETS / 32; i++) {
            count[i] = sum;
            sum += place[thread * (BUCKETS / 32) + i];
        }
        int before = sum;
        for (int step = 1; step < 32; step *= 2) {
            int other = __shfl_up_sync(0xffffffff, before, step);
            if (thread >= step) before += other;
        }
        for (int i = 0; i < BUCKETS / 32; i++)
            place[thread * (BUCKETS / 32) + i] = before - sum + count[i];
    }
    __syncthreads();
    for (int i = thread; i < p.n; i += 1024) p.order[atomicAdd(&place[bucket(p, i)], 1)] = i;
}
