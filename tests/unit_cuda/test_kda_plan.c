/* SPDX-License-Identifier: MIT
 *
 * Plans of kda_fwd on Hopper, by the thousand and without a GPU.
 *     test_kda_plan [seed]
 * What must hold of every plan: blocks that hold the value rows once; a grid that fits the machine
 * and is no larger than the items; an order wherever sequences can differ and are more than the
 * grid; a workspace for it and for every tensor the copy engine cannot address.
 */
#include <stdio.h>
#include <stdlib.h>

#include "cuda/kda_cuda.h"

enum { BLOCKS = 132, ROUNDS = 20000 };

static uint64_t state;
static int failures;

static int64_t below(int64_t n)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (int64_t)((state >> 33) % (uint64_t)n);
}

#define EXPECT(condition)                                                                          \
    do {                                                                                           \
        if (!(condition) && failures++ < 20) printf("line %d: %s\n", __LINE__, #condition);        \
    } while (0)

static struct attn_rows rows_of(const struct attn_kda_problem *p, int64_t skew)
{
    int64_t row = p->h * p->d + skew;
    return (struct attn_rows){(char *)(uintptr_t)4096, p->t * row, row, p->d};
}

int main(int argc, char **argv)
{
    static const int32_t lengths[2];
    unsigned seed = argc > 1 ? (unsigned)atoi(argv[1]) : 1;
    state = seed;
    for (int i = 0; i < ROUNDS; i++) {
        struct attn_kda_problem p = {.dtype = ATTN_BF16, .d = below(2) ? 128 : 64};
        struct attn_kda_cuda_plan plan;
        p.h = 1 + below(100);
        p.t = 2 + below(9000);
        p.n = 1 + below(below(2) ? 4 : 1000);
        p.cu_seqlens = below(2) ? lengths : NULL;
        p.b = p.cu_seqlens ? 1 : p.n;
        bool skewed = below(4) == 0;
        p.q = p.k = p.g = p.out = rows_of(&p, 0);
        p.v = rows_of(&p, skewed ? 2 : 0);
        attn_kda_cuda_choose(&p, BLOCKS, &plan);

        int64_t items = p.n * p.h * plan.cluster;
        EXPECT(plan.cluster * 64 == p.d);
        EXPECT(plan.grid >= 1 && plan.grid <= BLOCKS && plan.grid <= items);
        EXPECT(plan.grid % plan.cluster == 0);
        EXPECT(plan.grid > BLOCKS - plan.cluster || plan.grid == items);
        EXPECT(plan.ordered == (p.cu_seqlens && p.n > 1 && items > plan.grid));
        EXPECT(plan.copied == (skewed ? 8 : 0) && plan.out_aligned);
        int64_t need = (plan.ordered ? ATTN_KDA_TICKET_BYTES + p.n * 4 : 0) +
                       (skewed ? p.b * p.t * p.h * p.d * 2 : 0);
        EXPECT(plan.workspace_bytes >= need && plan.workspace_bytes % 64 == 0);
        EXPECT(need || plan.workspace_bytes == 0);
    }
    printf("kda plans: seed %u, %d rounds, %d failures\n", seed, ROUNDS, failures);
    return failures != 0;
}
