/* SPDX-License-Identifier: MIT
 *
 * mha_fwd on AVX-512 FMA, all element types: 8 x 3 accumulators, 3 vectors of B and a broadcast
 * fill 28 of the 32 registers.
 */
#include "cpu/x86/kernels_x86.h"
#include "cpu/x86/vec_avx512.h"

#include "cpu/x86/mha_fwd_vec.h"

const struct attn_mha_kernel attn_mha_fwd_avx512[ATTN_DTYPES] = FWD_KERNELS(avx512);
