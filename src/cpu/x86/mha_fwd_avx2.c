/* SPDX-License-Identifier: MIT
 *
 * mha_fwd on AVX2 FMA, all element types: 4 x 3 accumulators, 3 vectors of B and a broadcast fill
 * the 16 registers.
 */
#include "cpu/x86/kernels_x86.h"
#include "cpu/x86/vec_avx2.h"

#include "cpu/x86/mha_fwd_vec.h"

const struct attn_mha_kernel attn_mha_fwd_avx2[ATTN_DTYPES] = FWD_KERNELS(avx2);
