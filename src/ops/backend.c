/* SPDX-License-Identifier: MIT
 *
 * The back ends of this build, a row each.
 */
#include "ops/backend.h"

static const struct attn_backend *const backends[] = {
    &attn_backend_cpu,
#ifdef ATTN_WITH_CUDA
    &attn_backend_cuda,
#endif
};

const struct attn_backend *attn_backend_for(DLDeviceType device)
{
    for (size_t i = 0; i < sizeof backends / sizeof *backends; ++i)
        if (backends[i]->device == device) return backends[i];
    return NULL;
}
