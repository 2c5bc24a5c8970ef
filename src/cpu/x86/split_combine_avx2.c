/* SPDX-License-Identifier: MIT
 *
 * split_combine for AVX2: see split_combine_vec.h.
 */
#include "cpu/x86/kernels_x86.h"
#include "cpu/x86/vec_avx2.h"

#include "cpu/x86/split_combine_vec.h"

const struct attn_split_combine_kernel attn_split_combine_avx2 = {
    "attn_split_combine_avx2",
    combine,
};
