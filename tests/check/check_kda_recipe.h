/* SPDX-License-Identifier: MIT
 *
 * The yardstick of kda_fwd's tile kernels: chunks of 16 tokens with every factor and product
 * rounded to the 16-bit type that a plain kernel of that shape keeps it in, and the state to bf16
 * after every chunk.  Sums are fp32; exponentials and the sigmoid are libm's.
 */
#ifndef ATTN_CHECK_KDA_RECIPE_H
#define ATTN_CHECK_KDA_RECIPE_H

#include "cpu/kda.h"

/* The values of `p`, of type bf16, are checked; checkpoint_every is a multiple of 16. */
void check_kda_recipe(const struct attn_kda_problem *p);

#endif
