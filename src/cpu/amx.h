/* SPDX-License-Identifier: MIT
 *
 * Whether AMX tiles may be used in this process.
 */
#ifndef ATTN_CPU_AMX_H
#define ATTN_CPU_AMX_H

#include <stdbool.h>

/* CPUID has AMX-TILE and AMX-BF16, the system saves tile state, and the kernel gave permission.
 * Asks once a process; the permission covers all threads and is inherited. */
bool attn_amx_usable(void);

#endif
