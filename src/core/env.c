/* SPDX-License-Identifier: MIT
 *
 * ATTN_LOG, read once.  A line is written by one call, so lines of several threads do not mix.
 */
#include "core/env.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

static bool log_on;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void read_environment(void)
{
    const char *value = getenv("ATTN_LOG");
    log_on = value && value[0] && value[0] != '0';
}

bool attn_log_on(void)
{
    pthread_once(&once, read_environment);
    return log_on;
}

void attn_log(const char *format, ...)
{
    char line[1024];
    va_list arguments;
    va_start(arguments, format);
    int n = snprintf(line, sizeof line, "libattn: ");
    vsnprintf(line + n, sizeof line - (size_t)n, format, arguments);
    va_end(arguments);
    fprintf(stderr, "%s\n", line);
}
