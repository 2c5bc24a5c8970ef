/* SPDX-License-Identifier: MIT
 *
 * How kernels ask for a loop to be unrolled whole.
 */
#ifndef ATTN_CPU_X86_UNROLL_H
#define ATTN_CPU_X86_UNROLL_H

/* Before a loop over a small array of vectors: the array is in registers only if the loop is
 * unrolled whole.  (clang reads GCC's pragma as a count and may leave the array on the stack.) */
#ifdef __clang__
#define VEC_UNROLL _Pragma("clang loop unroll(full)")
#else
#define VEC_UNROLL _Pragma("GCC unroll 16")
#endif

#endif
