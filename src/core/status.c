/* SPDX-License-Identifier: MIT
 *
 * The thread's last message, and the library's version.
 */
#include "core/status.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char message[512];

attn_status attn_fail(attn_status status, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    return status;
}

const char *attn_last_error(void) { return message; }

const char *attn_version(void) { return ATTN_VERSION_STRING; }
