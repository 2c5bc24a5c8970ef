/* SPDX-License-Identifier: MIT
 *
 * attn_gpu_count in a build without the CUDA back end.
 */
#ifndef ATTN_WITH_CUDA
#include <stdio.h>

#include "attn/attn.h"

int attn_gpu_count(char *text, size_t text_bytes)
{
    if (text && text_bytes) snprintf(text, text_bytes, "this build has no CUDA back end");
    return 0;
}
#else
typedef int attn_gpu_count_is_in_cuda;
#endif
