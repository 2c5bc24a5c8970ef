/* SPDX-License-Identifier: MIT
 *
 * The environment: ATTN_LOG=1 prints the kernel and plan of each call to stderr, ATTN_CPU caps the
 * CPU rung.  Read once a process.
 */
#ifndef ATTN_CORE_ENV_H
#define ATTN_CORE_ENV_H

#include <stdbool.h>

bool attn_log_on(void);
void attn_log(const char *format, ...) __attribute__((format(printf, 1, 2), cold));

#endif
