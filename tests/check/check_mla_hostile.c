/* SPDX-License-Identifier: MIT
 *
 * Hostile calls of the mla ops: one argument of a call that works is spoiled at a time.  Each has
 * to come back with the status named here and a message that begins with the argument, and must
 * write nothing.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "attn/attn.h"
#include "check.h"

enum { B = 2, S_Q = 2, H = 3, N = 4, PAGE = 4, TOPK = 8, T = N * PAGE };

struct argument {
    const char *name;
    DLTensor t;
    int64_t shape[4], strides[4];
};

enum { Q, K, TABLE, LENS, INDICES, LENGTH, SINK, EXTRA_K, EXTRA, OUT, LSE, MAX, SLOTS, ARGUMENTS };

struct call {
    int op; /* 0 decode, 1 sparse decode, 2 sparse fwd, 3 quantize, 4 dequantize */
    struct argument a[ARGUMENTS];
    double scale;
    int64_t d_v;
    uint32_t size; /* 0: the right one */
    attn_status status;
};

static const DLDataType bf16 = {kDLBfloat, 16, 1}, fp32 = {kDLFloat, 32, 1},
                        int32 = {kDLInt, 32, 1};
static const DLDataType bytes = {kDLUInt, 8, 1};

static void set(struct call *c, int n, const char *name, DLDataType type, int ndim,
                const int64_t *shape)
{
    struct argument *a = &c->a[n];
    int64_t count = 1;
    a->name = name;
    for (int i = ndim - 1; i >= 0; --i) {
        a->shape[i] = shape[i];
        a->strides[i] = count;
        count *= shape[i];
    }
    void *data = check_scratch((size_t)(count * type.bits / 8));
    a->t = (DLTensor){.data = data, .device = {kDLCPU, 0}, .ndim = ndim, .dtype = type};
}

static void make_call(struct call *c, int op)
{
    *c = (struct call){.op = op, .scale = 0.05, .d_v = 512};
    if (op == 0) {
        set(c, Q, "q", bf16, 4, (int64_t[]){B, S_Q, H, 576});
        set(c, K, "k_cache", bf16, 4, (int64_t[]){N, PAGE, 1, 576});
        set(c, TABLE, "block_table", int32, 2, (int64_t[]){B, 2});
        set(c, LENS, "cache_seqlens", int32, 1, (int64_t[]){B});
    } else if (op == 1) {
        set(c, Q, "q", bf16, 4, (int64_t[]){B, S_Q, H, 576});
        set(c, K, "k_cache", bytes, 4, (int64_t[]){N, PAGE, 1, 656});
        set(c, INDICES, "indices", int32, 3, (int64_t[]){B, S_Q, TOPK});
        set(c, LENGTH, "topk_length", int32, 1, (int64_t[]){B});
        set(c, SINK, "attn_sink", fp32, 1, (int64_t[]){H});
        set(c, EXTRA_K, "extra_k_cache", bytes, 4, (int64_t[]){N, PAGE, 1, 656});
        set(c, EXTRA, "extra_indices_in_kvcache", int32, 3, (int64_t[]){B, S_Q, TOPK});
    } else if (op == 2) {
        set(c, Q, "q", bf16, 3, (int64_t[]){B, H, 576});
        set(c, K, "kv", bf16, 3, (int64_t[]){T, 1, 576});
        set(c, INDICES, "indices", int32, 3, (int64_t[]){B, 1, TOPK});
        set(c, LENGTH, "topk_length", int32, 1, (int64_t[]){B});
        set(c, SINK, "attn_sink", fp32, 1, (int64_t[]){H});
        set(c, OUT, "out", bf16, 3, (int64_t[]){B, H, 512});
        set(c, MAX, "max_logits", fp32, 2, (int64_t[]){B, H});
        set(c, LSE, "lse", fp32, 2, (int64_t[]){B, H});
    } else {
        set(c, Q, "kv", bf16, 2, (int64_t[]){5, 576});
        set(c, K, "cache", bytes, 4, (int64_t[]){N, PAGE, 1, 656});
        set(c, SLOTS, "slots", int32, 1, (int64_t[]){5});
    }
    if (op < 2) {
        set(c, OUT, "out", bf16, 4, (int64_t[]){B, S_Q, H, 512});
        set(c, LSE, "lse", fp32, 3, (int64_t[]){B, H, S_Q});
    }
}

/* The call's own copies of shapes and strides are read only here, where they have found their
 * place. */
static const DLTensor *given(struct call *c, int n)
{
    struct argument *a = &c->a[n];
    if (!a->t.data) return NULL;
    a->t.shape = a->shape;
    a->t.strides = a->strides;
    return &a->t;
}

#define COMMON(type) .size = c->size ? c->size : sizeof(type), .threads = 1

static void run(void *context)
{
    struct call *c = context;
    struct attn_mla_plan plan = {.size = sizeof plan};
    char *work = NULL;
    if (c->op == 0) {
        struct attn_mla_decode_args a = {COMMON(a),
                                         .q = given(c, Q),
                                         .k_cache = given(c, K),
                                         .block_table = given(c, TABLE),
                                         .cache_seqlens = given(c, LENS),
                                         .out = given(c, OUT),
                                         .lse = given(c, LSE),
                                         .softmax_scale = c->scale,
                                         .head_dim_v = c->d_v,
                                         .causal = 1};
        c->status = attn_mla_decode_plan(&a, &plan);
        if (c->status) return;
        work = check_buffer((size_t)plan.workspace_bytes, 64).data;
        c->status = attn_mla_decode_run(&a, &plan, work, plan.workspace_bytes, NULL);
    } else if (c->op == 1) {
        struct attn_mla_sparse_decode_args a = {COMMON(a),
                                                .q = given(c, Q),
                                                .k_cache = given(c, K),
                                                .indices = given(c, INDICES),
                                                .topk_length = given(c, LENGTH),
                                                .attn_sink = given(c, SINK),
                                                .extra_k_cache = given(c, EXTRA_K),
                                                .extra_indices_in_kvcache = given(c, EXTRA),
                                                .out = given(c, OUT),
                                                .lse = given(c, LSE),
                                                .softmax_scale = c->scale,
                                                .head_dim_v = c->d_v};
        c->status = attn_mla_sparse_decode_plan(&a, &plan);
        if (c->status) return;
        work = check_buffer((size_t)plan.workspace_bytes, 64).data;
        c->status = attn_mla_sparse_decode_run(&a, &plan, work, plan.workspace_bytes, NULL);
    } else if (c->op == 2) {
        struct attn_mla_sparse_fwd_args a = {COMMON(a),
                                             .q = given(c, Q),
                                             .kv = given(c, K),
                                             .indices = given(c, INDICES),
                                             .topk_length = given(c, LENGTH),
                                             .attn_sink = given(c, SINK),
                                             .out = given(c, OUT),
                                             .max_logits = given(c, MAX),
                                             .lse = given(c, LSE),
                                             .softmax_scale = c->scale,
                                             .head_dim_v = c->d_v};
        c->status = attn_mla_sparse_fwd_plan(&a, &plan);
        if (c->status) return;
        work = check_buffer((size_t)plan.workspace_bytes, 64).data;
        c->status = attn_mla_sparse_fwd_run(&a, &plan, work, plan.workspace_bytes, NULL);
    } else {
        struct attn_mla_cache_args a = {COMMON(a), .kv = given(c, Q), .cache = given(c, K),
                                        .slots = given(c, SLOTS)};
        c->status = c->op == 3 ? attn_mla_cache_quantize_run(&a, NULL)
                               : attn_mla_cache_dequantize_run(&a, NULL);
    }
}

/* What is done to an argument; the status it must give, ATTN_OK where the op allows it. */
enum harm {
    ABSENT,
    RANK,
    LONGER,
    NO_ROOM,
    TYPE,
    LAST_STRIDE,
    BELOW_ZERO,
    VAST,
    DEVICE,
    ODD,
    HARMS
};

static attn_status spoil(struct argument *a, enum harm harm)
{
    int last = a->t.ndim - 1;
    switch (harm) {
    case ABSENT: a->t.data = NULL; return ATTN_E_VALUE;
    case RANK: a->t.ndim -= 1; return ATTN_E_SHAPE;
    case LONGER: a->shape[last] += 1; return ATTN_E_SHAPE;
    case NO_ROOM: a->shape[0] = -1; return ATTN_E_SHAPE;
    case TYPE: a->t.dtype = (DLDataType){kDLInt, 16, 1}; return ATTN_E_DTYPE;
    case LAST_STRIDE: a->strides[last] = 2; return ATTN_E_SHAPE;
    case BELOW_ZERO: a->strides[0] = -1; return ATTN_E_SHAPE;
    case VAST: a->strides[0] = INT64_MAX / 2; return ATTN_E_SHAPE;
    case DEVICE: a->t.device.device_id = 7; return ATTN_E_DEVICE;
    default: a->t.byte_offset = 1; return ATTN_E_VALUE;
    }
}

/* Pairs that the contract lets through. */
static bool allowed(const struct call *c, int n, enum harm harm)
{
    const char *name = c->a[n].name;
    bool list = n == INDICES || n == EXTRA, optional = n == LENGTH || n == SINK || n == SLOTS;
    if (harm == ABSENT) return optional || n == EXTRA_K || n == EXTRA;
    if (harm == LONGER) return list || n == TABLE; /* another topk, another table */
    if (harm == ODD) return c->a[n].t.dtype.bits == 8;
    if (harm == DEVICE) return !strcmp(name, "q") || !strcmp(name, "kv"); /* the others are wrong */
    if (harm == LAST_STRIDE) return n == LSE || n == MAX || n == SINK || n == SLOTS;
    if (harm == VAST || harm == BELOW_ZERO) return c->a[n].shape[0] <= 1;
    return false;
}

static void try_one(struct check_test *test, int op, int n, enum harm harm)
{
    struct call c;
    check_pool_reset();
    make_call(&c, op);
    if (!c.a[n].name || allowed(&c, n, harm)) return;
    const char *name = c.a[n].name;
    attn_status want = spoil(&c.a[n], harm);
    if (check_options.broken) want = ATTN_OK;
    test->cases += 1;
    if (!check_guarded(test, run, &c)) return;
    if (c.status != want || strncmp(attn_last_error(), name, strlen(name)) != 0)
        check_fail(test, "op %d %s harm %d: status %d, want %d: %s", op, name, (int)harm,
                   (int)c.status, (int)want, attn_last_error());
}

/* Numbers, and values inside index tensors. */
static void try_values(struct check_test *test)
{
    struct call c;
    for (int i = 0; i < 9; ++i) {
        static const attn_status wants[9] = {ATTN_OK,      ATTN_E_VALUE,   ATTN_E_VALUE,
                                             ATTN_E_SHAPE, ATTN_E_VERSION, ATTN_E_VALUE,
                                             ATTN_E_VALUE, ATTN_E_VALUE,   ATTN_E_VALUE};
        check_pool_reset();
        make_call(&c, 0);
        int32_t *lens = c.a[LENS].t.data, *table = c.a[TABLE].t.data;
        lens[0] = 5;
        if (i == 1) c.scale = NAN;
        if (i == 2) c.scale = INFINITY;
        if (i == 3) c.d_v = 128;
        if (i == 4) c.size = 8;
        if (i == 5) lens[1] = -1;
        if (i == 6) lens[1] = 2 * PAGE + 1;
        if (i == 7) table[1] = N;
        if (i == 8) c.a[OUT].t.data = c.a[LENS].t.data;
        test->cases += 1;
        if (!check_guarded(test, run, &c)) continue;
        if (c.status != (check_options.broken ? ATTN_E_DRIVER : wants[i]))
            check_fail(test, "value %d: status %d: %s", i, (int)c.status, attn_last_error());
    }
}

void check_mla_hostile(void)
{
    struct check_test test;
    if (!check_open(&test, "mla_hostile", "", "", "each argument spoiled")) return;
    for (int op = 0; op < 5; ++op)
        for (int n = 0; n < ARGUMENTS; ++n)
            for (int harm = 0; harm < HARMS; ++harm) try_one(&test, op, n, (enum harm)harm);
    try_values(&test);
    check_close(&test);
}
