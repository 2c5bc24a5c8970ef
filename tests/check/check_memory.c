/* SPDX-License-Identifier: MIT
 *
 * Guarded buffers: one reserved range of addresses, handed out from the front, with a page that
 * faults before and after each buffer; and random fills.
 */
#define _DEFAULT_SOURCE

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "check.h"

#define PAGE ((size_t)4096)
#define POOL_BYTES ((size_t)4 << 30)
#define SCRATCH_BYTES ((size_t)1 << 30)
#define KEPT_BYTES ((size_t)64 << 20) /* of each, not given back between cases: faults cost more */

static char *pool, *scratch;
static size_t pool_used, scratch_used;

static char *reserve(size_t bytes, int protection)
{
    void *p = mmap(NULL, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        perror("attn_check: mmap");
        exit(2);
    }
    return p;
}

struct check_buffer check_buffer(size_t bytes, size_t align)
{
    if (!pool) pool = reserve(POOL_BYTES, PROT_NONE);
    size_t page_bytes = (bytes + PAGE - 1) / PAGE * PAGE;
    if (page_bytes == 0) page_bytes = PAGE;
    if (pool_used + page_bytes + 2 * PAGE > POOL_BYTES) {
        fprintf(stderr, "attn_check: a case wants more than the pool's memory\n");
        exit(2);
    }
    struct check_buffer b = {.bytes = bytes, .page_bytes = page_bytes};
    b.pages = pool + pool_used + PAGE;
    pool_used += page_bytes + PAGE;
    if (mprotect(b.pages, page_bytes, PROT_READ | PROT_WRITE) != 0) {
        perror("attn_check: mprotect");
        exit(2);
    }
    b.data = b.pages + (page_bytes - bytes) / align * align;
    memset(b.pages, CHECK_CANARY, page_bytes);
    return b;
}

void check_buffer_protect(const struct check_buffer *b, bool read_only)
{
    mprotect(b->pages, b->page_bytes, read_only ? PROT_READ : PROT_READ | PROT_WRITE);
}

static bool is_canary(const char *p, size_t n)
{
    for (size_t i = 0; i < n; ++i)
        if ((unsigned char)p[i] != CHECK_CANARY) return false;
    return true;
}

bool check_buffer_intact(const struct check_buffer *b)
{
    size_t before = (size_t)(b->data - b->pages), used = before + b->bytes;
    return is_canary(b->pages, before) && is_canary(b->data + b->bytes, b->page_bytes - used);
}

static void give_back(char *memory, size_t from, size_t to)
{
    if (from < KEPT_BYTES) from = KEPT_BYTES;
    if (to > from) madvise(memory + from, to - from, MADV_DONTNEED);
}

void check_pool_reset(void)
{
    check_pool_release(0);
    give_back(scratch, 0, scratch_used);
    scratch_used = 0;
}

size_t check_pool_mark(void) { return pool_used; }

void check_pool_release(size_t mark)
{
    if (pool_used == mark) return;
    give_back(pool, mark + PAGE, pool_used + PAGE);
    mprotect(pool + mark + PAGE, pool_used - mark, PROT_NONE);
    pool_used = mark;
}

void *check_scratch(size_t bytes)
{
    if (!scratch) scratch = reserve(SCRATCH_BYTES, PROT_READ | PROT_WRITE);
    bytes = (bytes + 63) / 64 * 64;
    if (scratch_used + bytes > SCRATCH_BYTES) {
        fprintf(stderr, "attn_check: a case wants more than the scratch memory\n");
        exit(2);
    }
    char *p = scratch + scratch_used;
    scratch_used += bytes;
    return memset(p, 0, bytes);
}

/* ---- values ---------------------------------------------------------------------------------- */

#define TABLE 65521 /* prime, so that strides through it visit everything */

static const float *normal_table(void)
{
    static float table[TABLE];
    if (table[0] == 0) {
        struct check_random r = {12345};
        for (int i = 0; i < TABLE; ++i) table[i] = (float)random_normal(&r);
    }
    return table;
}

void check_fill_normal(struct check_random *r, enum attn_dtype t, void *to, int64_t n, float scale)
{
    const float *table = normal_table();
    int64_t at = random_range(r, 0, TABLE - 1);
    for (int64_t i = 0; i < n; ++i) {
        float x = table[at++] * scale;
        if (at == TABLE) at = 0;
        if (t == ATTN_F8 && fabsf(x) > 448) x = x < 0 ? -448.0f : 448.0f;
        attn_store(t, to, i, x);
    }
}

void check_fill_nan(enum attn_dtype t, void *to, int64_t n)
{
    for (int64_t i = 0; i < n; ++i) attn_store(t, to, i, NAN);
}

double check_ulp(enum attn_dtype t, double x)
{
    static const int digits[ATTN_DTYPES] = {24, 8, 11, 4},
                     least[ATTN_DTYPES] = {-149, -133, -24, -9};
    int e;
    frexp(x, &e);
    int exponent = e - digits[t];
    return ldexp(1.0, exponent > least[t] ? exponent : least[t]);
}

double check_unit(enum attn_dtype t)
{
    static const double unit[ATTN_DTYPES] = {0x1p-24, 0x1p-8 / 2, 0x1p-11 / 2, 0x1p-4};
    return unit[t];
}
