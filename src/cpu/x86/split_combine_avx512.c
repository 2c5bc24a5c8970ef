/* SPDX-License-Identifier: MIT
 *
 * split_combine for AVX-512: see split_combine_vec.h.
 */
#include "cpu/x86/kernels_x86.h"
#include "cpu/x86/vec_avx512.h"

#include "cpu/x86/split_combine_vec.h"

const struct attn_split_combine_kernel attn_split_combine_avx512 = {
    "attn_split_combine_avx512",
    combine,
};
