/* SPDX-License-Identifier: MIT
 *
 * Hostile calls of split_combine: one thing wrong in a valid call; each must fail, name the
 * argument and write nothing.
 */
#include <stdio.h>
#include <string.h>

#include "attn/attn.h"
#include "check.h"

enum { PARTIAL, LSE_PARTIAL, OUT, LSE, TENSORS };
static const char *const names[TENSORS] = {"out_partial", "lse_partial", "out", "lse"};

struct broken {
    DLTensor t[TENSORS];
    int64_t shape[TENSORS][8], strides[TENSORS][8];
    struct check_buffer buffer[TENSORS];
    struct attn_split_combine_args args;
    const char *name; /* must be in the message */
    char what[96];
    attn_status status;
};

static void run(void *context)
{
    struct broken *x = context;
    x->status = attn_split_combine_run(&x->args, NULL);
}

static const DLTensor **slot(struct broken *x, int i)
{
    const DLTensor **slots[TENSORS] = {&x->args.out_partial, &x->args.lse_partial, &x->args.out,
                                       &x->args.lse};
    return slots[i];
}

static void make_valid(struct check_random *r, struct broken *x)
{
    int64_t extents[5];
    memset(x, 0, sizeof *x);
    for (int i = 0; i < 5; ++i) extents[i] = random_range(r, 2, 5);
    x->args.size = sizeof x->args;
    for (int i = 0; i < TENSORS; ++i) {
        int first = i >= OUT, ndim = (int[]){5, 4, 4, 3}[i];
        int64_t n = 1;
        for (int k = ndim - 1; k >= 0; --k) {
            x->shape[i][k] = extents[first + k];
            x->strides[i][k] = n;
            n *= extents[first + k];
        }
        x->buffer[i] = check_buffer((size_t)n * 4, 4);
        if (i < OUT) check_fill_normal(r, ATTN_F32, x->buffer[i].data, n, 1);
        x->t[i] = (DLTensor){.data = x->buffer[i].data,
                             .device = {kDLCPU, 0},
                             .ndim = ndim,
                             .dtype = {kDLFloat, 32, 1},
                             .shape = x->shape[i],
                             .strides = x->strides[i]};
        *slot(x, i) = &x->t[i];
    }
}

static void spoil(struct check_random *r, struct broken *x)
{
    static const DLDataType types[] = {{kDLInt, 32, 1}, {kDLFloat, 64, 1}, {kDLFloat, 32, 2}};
    int i = (int)random_range(r, 0, TENSORS - 1), k = (int)random_range(r, 0, x->t[i].ndim - 1);
    const char *text = "";
    x->name = names[i];
    switch (random_range(r, 0, 9)) {
    case 0:
        x->t[i].ndim = (int32_t)PICK(r, -1, 0, 1, 2, 6, 7);
        text = "another rank";
        break;
    case 1:
        x->t[i].dtype = types[random_range(r, 0, 2)];
        text = "another dtype";
        break;
    case 2:
        x->shape[i][k] = PICK(r, -1, INT64_MIN, (int64_t)1 << 31, INT64_MAX);
        text = "an impossible extent";
        break;
    case 3:
        x->shape[i][k] += 1;
        x->name = i == PARTIAL ? "" : x->name; /* any of them: the others no longer fit */
        text = "an extent of its own";
        break;
    case 4:
        x->strides[i][k] = PICK(r, -1, INT64_MIN, (int64_t)1 << 62);
        text = "an impossible stride";
        break;
    case 5:
        i = (int)PICK(r, OUT, LSE);
        x->name = names[i];
        x->strides[i][random_range(r, 0, x->t[i].ndim - 1)] = 0;
        text = "rows on top of each other";
        break;
    case 6:
        x->t[i].device = (DLDevice){(DLDeviceType)PICK(r, kDLCUDA, kDLROCM, 77), 1};
        x->name = i == PARTIAL ? "" : x->name;
        text = "another device";
        break;
    case 7:
        x->t[i].data = random_percent(r, 50) ? NULL : (char *)x->t[i].data + random_range(r, 1, 3);
        text = "a bad pointer";
        break;
    case 8:
        *slot(x, i) = NULL;
        text = "absence";
        break;
    default:
        x->args.size = (uint32_t)PICK(r, 0, 1, UINT32_MAX);
        x->name = "size";
        text = "a wrong struct size";
        break;
    }
    snprintf(x->what, sizeof x->what, "%s: %s", names[i], text);
}

void check_hostile_combine(void)
{
    struct check_test test;
    if (!check_open(&test, "hostile", "", "", "broken combines are refused")) return;
    for (int64_t i = 0; i < check_rounds(2000); ++i) {
        if (check_options.only_case >= 0 && check_options.only_case != i) continue;
        struct check_random r = check_case_random(&test, i);
        struct broken x;
        check_pool_reset();
        make_valid(&r, &x);
        if (i % 20) spoil(&r, &x);
        test.cases += 1;
        if (!check_guarded(&test, run, &x)) continue;
        const char *message = attn_last_error(), *fault = NULL;
        if (!x.name) {
            if (x.status) fault = "valid, but refused";
        } else if (x.status == ATTN_OK) {
            fault = "was accepted";
        } else if (!*message || !strstr(message, x.name)) {
            fault = "does not name the argument";
        }
        for (int k = OUT; k < TENSORS && x.name; ++k)
            for (size_t at = 0; at < x.buffer[k].page_bytes && !fault; ++at)
                if ((unsigned char)x.buffer[k].pages[at] != CHECK_CANARY) fault = "wrote something";
        if (check_options.broken) fault = fault ? NULL : "spoiled";
        if (fault) check_fail(&test, "%s: %s: \"%s\"", x.what, fault, message);
    }
    check_close(&test);
}
