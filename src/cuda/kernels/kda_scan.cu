/* SPDX-License-Identifier: MIT
 *
 * kda_scan: kda_fwd with activated gates, token by token.  Math and layout are at the top of
 * kda_step.cuh.
 */
#include "kda_step.cuh"

extern "C" __global__ void __launch_bounds__(256)
    attn_kda_scan_sm90(const __grid_constant__ attn_kda_step_params p)
{
    if (p.d == 128)
        kda_step_body<128, false>(p);
    else
        kda_step_body<64, false>(p);
}
