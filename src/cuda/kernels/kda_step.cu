/* SPDX-License-Identifier: MIT
 *
 * kda_step: a few tokens of Kimi Delta Attention on states that change in place.  Math and layout
 * are at the top of kda_step.cuh.
 */
#include "kda_step.cuh"

extern "C" __global__ void __launch_bounds__(256)
    attn_kda_step_sm90(const __grid_constant__ attn_kda_step_params p)
{
    if (p.d == 128)
        kda_step_body<128, true>(p);
    else
        kda_step_body<64, true>(p);
}
