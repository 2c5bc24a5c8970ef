/* SPDX-License-Identifier: MIT
 *
 * The back ends, a row each, and the questions that go to all of them.
 */
#include "ops/backend.h"

static const struct attn_backend *const backends[] = {&attn_backend_cpu, &attn_backend_cuda};

const struct attn_backend *attn_backend_for(DLDeviceType device)
{
    for (size_t i = 0; i < sizeof backends / sizeof *backends; ++i)
        if (backends[i]->device == device) return backends[i];
    return NULL;
}

const char *attn_kernel_name(int index)
{
    for (size_t i = 0; i < sizeof backends / sizeof *backends; ++i)
        for (int n = 0; backends[i]->kernel_name(n); ++n)
            if (index-- == 0) return backends[i]->kernel_name(n);
    return NULL;
}
