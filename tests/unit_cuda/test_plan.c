/* SPDX-License-Identifier: MIT
 *
 * Plans of mha_fwd and of its decode form on Hopper, by the thousand and without a GPU.
 *     test_plan [seed]
 * What must hold of every plan: a kernel wide enough; boxes that divide the key step and never
 * straddle a page; a grid of whole clusters that fits the machine; a ticket wherever row tiles can
 * differ in length and are more than the grid, and, where s_q is s_k, two items a cluster in a section of heads.
 * Of a decode plan: a grid that fits the machine, rows covered by tiles, slots for two pieces a block.
 * And of attn_division: it divides exactly.
 */
#include <stdio.h>
#include <stdlib.h>

#include "cuda/mha_decode_cuda.h"

enum { CAPPED_mha_fwd, CAPPED_mha_fwd_cap, CAPPED_mha_decode = 0, CAPPED_mla_decode = 0 };
#define ATTN_KERNEL(op, arch, dtype, dqk, dv, rows, keys)                                          \
    {DTYPE_##dtype, dqk, dv, rows, keys, CAPPED_##op},
#define DTYPE_bf16 ATTN_BF16
#define DTYPE_fp16 ATTN_F16
static const struct attn_mha_fwd_cuda_tile tiles[] = {
#include "cuda/kernels/mha_fwd.def"
};
static const struct attn_mha_fwd_cuda_tile decode_tiles[] = {
#include "cuda/kernels/mha_decode.def"
#include "cuda/kernels/mla_decode.def"
};
enum {
    TILES = sizeof tiles / sizeof *tiles,
    DECODE_TILES = sizeof decode_tiles / sizeof *decode_tiles,
};

static uint64_t state;

static int64_t below(int64_t n)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (int64_t)((state >> 33) % (uint64_t)n);
}

static int64_t pick(const int64_t *values, size_t count) { return values[below((int64_t)count)]; }
#define PICK(...) pick((const int64_t[]){__VA_ARGS__}, sizeof((int64_t[]){__VA_ARGS__}) / 8)

static int failures;

#define EXPECT(condition)                                                                          \
    do {                                                                                           \
        if (!(condition) && failures++ < 20) printf("case %d: %s\n", n, #condition);               \
    } while (0)

static void random_problem(struct attn_mha_fwd_problem *p)
{
    static const int32_t something;
    const int32_t *there = &something;
    *p = (struct attn_mha_fwd_problem){.cp_world = 1, .window_left = -1, .window_right = -1};
    p->dtype = below(2) ? ATTN_BF16 : ATTN_F16;
    p->b = PICK(1, 1, 2, 7, 64);
    p->h_k = PICK(1, 2, 3, 8);
    p->h_q = p->h_k * PICK(1, 2, 3, 4, 7, 16);
    p->pack_gqa = (int32_t)PICK(-1, -1, 0, 1);
    do { /* the pairs that check lets through */
        p->d_qk = 8 * (1 + below(32));
        p->d_v = below(2) ? p->d_qk : 8 * (1 + below(p->d_qk <= 64 ? 64 : 32));
    } while (p->d_qk != p->d_v && p->d_qk > 64 &&
             !(p->d_qk > 128 && p->d_qk <= 192 && p->d_v > 96 && p->d_v <= 128));
    p->s_q = PICK(1, 17, 64, 191, 192, 193, 1024, 4096, 100000);
    if (p->s_q < 100 && below(8) == 0) p->h_q = p->h_k * PICK(64, 65);
    p->s_k = PICK(0, 1, 79, 80, 1024, 4096, 131072);
    p->t_q = p->b * p->s_q;
    p->cache_rows = p->b;
    p->causal = below(2);
    if (below(3) == 0) p->window_left = PICK(0, 127, 4096);
    if (p->causal) p->window_right = 0;
    if (below(4) == 0) p->chunk = PICK(1, 100, 8192);
    if (below(4) == 0) p->softcap = 30;
    if (below(4) == 0) p->cu_seqlens_q = there;
    if (below(3) == 0) {
        p->page_table = there;
        p->page = PICK(1, 3, 8, 16, 48, 64, 80, 128, 256, 1000);
        p->num_pages = 1 + below(1000);
        if (below(4) == 0) p->leftpad_k = there;
    } else if (p->b == 1 && below(2)) {
        p->cu_seqlens_k = there;
        p->t_k = p->b * p->s_k;
    }
    struct attn_rows *rows[] = {&p->q, &p->k, &p->v, &p->out, &p->qv};
    bool with_qv = p->d_qk <= 64 && p->d_v >= 256 && below(2);
    for (int i = 0; i < 4 + with_qv; i++)
        *rows[i] = (struct attn_rows){(char *)(uintptr_t)4096, 1 << 20, below(20) ? 4096 : 0, 256};
    p->sm_margin = (int32_t)PICK(0, 0, 4, 131, 500);
}

static void check_decode(int n, struct attn_mha_fwd_problem *p)
{
    struct attn_mha_decode_cuda_plan plan;
    p->num_splits = (int32_t)PICK(-1, 0, 1, 2, 7, 256);
    attn_status status = attn_mha_decode_cuda_choose(p, decode_tiles, DECODE_TILES, 132, &plan);
    EXPECT(status == ATTN_OK);
    if (status) return;
    const struct attn_mha_fwd_cuda_tile *t = &decode_tiles[plan.kernel];
    int64_t rows = p->s_q * (p->h_q / p->h_k), blocks = (int64_t)plan.parts * plan.tiles;
    EXPECT(t->dtype == (int)p->dtype && t->d_qk >= p->d_qk && t->d_v >= p->d_v);
    EXPECT((t->d_qk + 63) / 64 == (p->d_qk + 63) / 64);
    EXPECT((t->d_v == 512) == (p->qv.data || p->d_v > 256)); /* the engine that takes qv */
    EXPECT((int64_t)plan.tiles * 64 >= rows && (plan.tiles - 1) * (int64_t)64 < rows);
    EXPECT(plan.parts >= 1 && (plan.parts == 1 || blocks <= 132));
    EXPECT(plan.splits == (p->num_splits > 0 ? p->num_splits : p->s_k <= 64));
    EXPECT(plan.slot_rows == (rows < 64 ? rows : 64));
    EXPECT(plan.box_rows == 0 || (64 % plan.box_rows == 0 && plan.box_rows % 8 == 0));
    if (plan.box_rows && p->page_table) EXPECT(p->page % plan.box_rows == 0 && !p->leftpad_k);
    EXPECT(plan.out % 64 == 0);
    if (!plan.splits && plan.parts > 1) {
        EXPECT(plan.out >= 2 * blocks * plan.slot_rows * 4);
        EXPECT(plan.bytes - plan.out == 2 * blocks * plan.slot_rows * p->d_v * 4);
    }
    EXPECT(attn_mha_decode_cuda_wanted(p, 132) || (p->num_splits <= 1 && t->d_v < 512));

    EXPECT(plan.cluster == 1);
    int cluster = attn_mha_decode_cuda_cluster(p, &plan), before = plan.parts;
    EXPECT(cluster >= 1 && cluster <= 16 &&
           cluster * p->h_k <= (before > p->h_k ? before : p->h_k));
    if (plan.splits || plan.tiles > 1 || p->b != 1) EXPECT(cluster == 1);
    attn_mha_decode_cuda_use_cluster(p, cluster, &plan);
    if (plan.cluster > 1) {
        EXPECT(plan.cluster == cluster && plan.parts == cluster * p->h_k && plan.bytes == 0);
        EXPECT(plan.parts <= 132 && 5 * plan.parts >= 2 * before);
    } else {
        EXPECT(plan.parts == before);
    }
}

/* attn_division_by, by what the kernels do with it, beside the processor's own division. */
static void check_division(int n)
{
    static const int64_t edges[] = {0, 1, 2, 3, 64, 1000, INT32_MAX - 1, INT32_MAX};
    int64_t by = below(2) ? PICK(1, 2, 3, 7, 64, 1 << 30, INT32_MAX) : 1 + below(INT32_MAX);
    if (below(2)) by = 1 + by % 4096;
    struct attn_division d = attn_division_by((int32_t)by);
    for (int i = 0; i < 8; i++) {
        int64_t x = below(2) ? pick(edges, 8) : below((int64_t)INT32_MAX + 1);
        if (below(2)) x = x / by * by - below(2); /* where the quotient jumps */
        if (x < 0) continue;
        EXPECT((int64_t)((uint64_t)(2 * (uint32_t)x) * d.magic >> 32 >> d.shift) == x / by);
    }
}

int main(int argc, char **argv)
{
    state = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
    int planned = 0;
    for (int n = 0; n < 100000; n++) {
        struct attn_mha_fwd_problem p;
        struct attn_mha_fwd_cuda_plan plan;
        random_problem(&p);
        check_decode(n, &p);
        check_division(n);
        if (p.qv.data) continue; /* always decode */
        attn_status status = attn_mha_fwd_cuda_choose(&p, tiles, TILES, 132, &plan);
        if (p.d_v > 256) {
            EXPECT(status == ATTN_E_NOT_BUILT);
            continue;
        }
        EXPECT(status == ATTN_OK);
        if (status) continue;
        planned++;
        const struct attn_mha_fwd_cuda_tile *t = &tiles[plan.kernel];
        int64_t group = p.h_q / p.h_k, queries = t->rows / 64 * (64 / plan.pack);
        int64_t row_tiles = (p.s_q + queries - 1) / queries * (group / plan.pack);
        EXPECT(plan.pack == 1 || (plan.pack == group && p.pack_gqa != 0));
        EXPECT(plan.pack == group || 64 % group || p.pack_gqa <= 0);
        if (p.pack_gqa < 0 && group > 1 && 64 % group == 0 && p.s_q == 17 && p.b * p.h_k > 132)
            EXPECT(plan.pack == group);
        EXPECT(t->capped == (p.softcap > 0));
        EXPECT(t->dtype == (int)p.dtype && t->d_qk >= p.d_qk && t->d_v >= p.d_v);
        EXPECT((t->d_qk + 63) / 64 == (p.d_qk + 63) / 64); /* no box wholly right of k's head */
        EXPECT(plan.cluster == 1 || (plan.cluster == 2 && !plan.gather));
        EXPECT(plan.grid % plan.cluster == 0 && plan.grid >= plan.cluster && plan.grid <= 132);
        EXPECT(plan.box_rows % 8 == 0 && t->keys % plan.box_rows == 0 && plan.box_rows <= 256);
        if (!plan.gather && p.page_table) EXPECT(p.page % plan.box_rows == 0 && !p.leftpad_k);
        if (!plan.gather && !p.page_table) EXPECT(plan.box_rows * plan.cluster == t->keys);
        if (!plan.gather && (p.page_table ? p.page : p.s_k) > 1) EXPECT(p.k.row > 0 && p.v.row > 0);
        EXPECT(plan.section >= 1 && plan.section <= p.b * p.h_k);
        if (p.causal && row_tiles * p.h_k * p.b > 2 * 132) EXPECT(plan.ticket);
        int64_t head_items = (row_tiles + plan.cluster - 1) / plan.cluster;
        bool square = p.causal && p.s_q == p.s_k && p.window_left < 0 && !p.chunk;
        if (square && plan.ticket && plan.section < p.b * p.h_k) /* less what rounding takes */
            EXPECT(10 * (plan.section + 1) * head_items >=
                   19 * (plan.grid / plan.cluster) * p.s_k / (p.s_k + 2 * t->rows));
    }
    printf("%d plans, %d failures\n", planned, failures);
    return failures != 0;
}
