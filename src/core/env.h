/* SPDX-License-Identifier: MIT
 *
 * ATTN_LOG=1 prints the kernel and plan of each call to stderr.  Read once a process.
 */
#ifndef ATTN_CORE_ENV_H
#define ATTN_CORE_ENV_H

#include <stdbool.h>

bool attn_log_on(void);
void attn_log(const char *format, ...) __attribute__((format(printf, 1, 2), cold));

#endif
