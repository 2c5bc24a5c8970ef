/* SPDX-License-Identifier: MIT
 *
 * Status and message.  A function that can fail returns attn_status; the one that notices writes
 * the message into a buffer of its thread, all above pass the status on.
 */
#ifndef ATTN_CORE_STATUS_H
#define ATTN_CORE_STATUS_H

#include "attn/attn.h"

/* Formats the message "argument: expected WISH, got FINDING" and returns `status`. */
attn_status attn_fail(attn_status status, const char *format, ...)
    __attribute__((format(printf, 2, 3), cold));

#define ATTN_CHECK(condition, status, ...)                                                         \
    do {                                                                                           \
        if (__builtin_expect(!(condition), 0)) return attn_fail(status, __VA_ARGS__);              \
    } while (0)

#define ATTN_TRY(call)                                                                             \
    do {                                                                                           \
        attn_status attn_try_status = (call);                                                      \
        if (__builtin_expect(attn_try_status != ATTN_OK, 0)) return attn_try_status;               \
    } while (0)

#endif
