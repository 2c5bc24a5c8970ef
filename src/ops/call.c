/* SPDX-License-Identifier: MIT */
#include "ops/call.h"

#include "attn/attn.h"

attn_status attn_struct_check(const char *name, const void *given, size_t size)
{
    ATTN_CHECK(given, ATTN_E_VALUE, "%s: expected a pointer, got NULL", name);
    uint32_t got = *(const uint32_t *)given;
    ATTN_CHECK(got == size, ATTN_E_VERSION,
               "%s.size: expected %zu (libattn %s), got %u: caller and library differ", name, size,
               ATTN_VERSION_STRING, (unsigned)got);
    return ATTN_OK;
}

attn_status attn_plan_check(const char *op, const void *plan, size_t size)
{
    ATTN_CHECK(plan && *(const uint32_t *)plan == size, ATTN_E_VERSION,
               "plan: expected one that attn_%s_plan of libattn %s filled", op,
               ATTN_VERSION_STRING);
    return ATTN_OK;
}

attn_status attn_workspace_check(const void *workspace, int64_t bytes, int64_t wanted)
{
    ATTN_CHECK(bytes >= wanted && (workspace || !wanted), ATTN_E_WORKSPACE,
               "workspace: expected %lld bytes, got %lld%s", (long long)wanted, (long long)bytes,
               workspace ? "" : " at NULL");
    ATTN_CHECK(((uintptr_t)workspace & 63) == 0, ATTN_E_WORKSPACE,
               "workspace: expected 64-byte aligned, got %p", workspace);
    return ATTN_OK;
}
