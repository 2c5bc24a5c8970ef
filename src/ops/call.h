/* SPDX-License-Identifier: MIT
 *
 * What every call of the C ABI checks whatever its op: that caller and library mean the same
 * structs, and that the workspace is what plan asked for.
 */
#ifndef ATTN_OPS_CALL_H
#define ATTN_OPS_CALL_H

#include <stddef.h>
#include <stdint.h>

#include "core/status.h"

/* A struct that the caller gave as `name`, whose first member is the uint32_t size it knows. */
attn_status attn_struct_check(const char *name, const void *given, size_t size);

/* A plan given to run: one that attn_<op>_plan filled. */
attn_status attn_plan_check(const char *op, const void *plan, size_t size);

attn_status attn_workspace_check(const void *workspace, int64_t bytes, int64_t wanted);

#endif
