/* SPDX-License-Identifier: MIT
 *
 * Small calls of every Hopper kernel, for compute-sanitizer (sanitize.sh): what it watches runs up to a
 * thousand times slower, so a shape here is a tile and a bit.
 *     sanitize          names the groups of calls
 *     sanitize GROUP    runs one and prints the kernel of each call
 * Every tensor is an allocation of its own, so that memcheck sees where it ends.  Results and workspaces
 * start uninitialised, so that initcheck sees what is read of them before it is written.
 */
#include <dlfcn.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attn/attn.h"

enum { BF16, FP16 };
static const char *const dtype_names[] = {"bf16", "fp16"};
static const DLDataType types[] = {{kDLBfloat, 16, 1}, {kDLFloat, 16, 1}};
static const DLDataType fp32 = {kDLFloat, 32, 1}, int32 = {kDLInt, 32, 1};

static struct {
    int (*init)(unsigned flags);
    int (*retain)(void **context, int device);
    int (*set_current)(void *context);
    int (*mem_alloc)(uint64_t *address, size_t bytes);
    int (*copy_to)(uint64_t address, const void *from, size_t bytes);
    int (*synchronize)(void);
} cuda;

static void fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(1);
}

static void cuda_ok(int error, const char *what)
{
    if (error) fail("sanitize: %s: CUDA error %d", what, error);
}

static void attn_ok(attn_status status)
{
    if (status) fail("sanitize: %s", attn_last_error());
}

static void open_cuda(void)
{
    const struct {
        const char *name;
        void *to;
    } wanted[] = {{"cuInit", &cuda.init},
                  {"cuDevicePrimaryCtxRetain", &cuda.retain},
                  {"cuCtxSetCurrent", &cuda.set_current},
                  {"cuMemAlloc_v2", &cuda.mem_alloc},
                  {"cuMemcpyHtoD_v2", &cuda.copy_to},
                  {"cuCtxSynchronize", &cuda.synchronize}};
    void *library = dlopen("libcuda.so.1", RTLD_NOW), *context;
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; ++i) {
        void *symbol = library ? dlsym(library, wanted[i].name) : NULL;
        if (!symbol) fail("sanitize: no %s in libcuda.so.1", wanted[i].name);
        memcpy(wanted[i].to, &symbol, sizeof symbol);
    }
    cuda_ok(cuda.init(0), "cuInit");
    cuda_ok(cuda.retain(&context, 0), "cuDevicePrimaryCtxRetain");
    cuda_ok(cuda.set_current(context), "cuCtxSetCurrent");
}

/* ---- tensors --------------------------------------------------------------------------------- */

static DLTensor tensors[512];
static int64_t extents[512][5];
static int tensor_count;

static uint64_t allocate(size_t bytes)
{
    uint64_t address;
    cuda_ok(cuda.mem_alloc(&address, bytes ? bytes : 1), "cuMemAlloc");
    return address;
}

static size_t bytes_of(const DLTensor *t)
{
    size_t bytes = t->dtype.bits / 8;
    for (int i = 0; i < t->ndim; ++i) bytes *= (size_t)t->shape[i];
    return bytes;
}

static DLTensor *empty(DLDataType type, int ndim, const int64_t *shape)
{
    DLTensor *t = &tensors[tensor_count];
    memcpy(extents[tensor_count++], shape, (size_t)ndim * sizeof *shape);
    *t = (DLTensor){.device = {kDLCUDA, 0}, .ndim = ndim, .dtype = type};
    t->shape = extents[t - tensors];
    t->data = (void *)(uintptr_t)allocate(bytes_of(t));
    return t;
}

/* Numbers of either sign around a half. */
static DLTensor *filled(DLDataType type, int ndim, const int64_t *shape)
{
    static const uint32_t low[] = {0x3e80, 0x3400, 0x3e800000}; /* a quarter; bits below to draw */
    static const uint32_t drawn[] = {0x00ff, 0x07ff, 0x00ffffff};
    DLTensor *t = empty(type, ndim, shape);
    int kind = type.bits == 32 ? 2 : type.code == kDLFloat;
    size_t bytes = bytes_of(t), width = type.bits / 8;
    char *host = malloc(bytes);
    if (!host) fail("sanitize: no memory");
    for (size_t i = 0; i < bytes; i += width) {
        uint32_t r = (uint32_t)rand(), sign = r >> 30 & 1;
        uint32_t x = low[kind] + (r & drawn[kind]) + (sign << (type.bits - 1));
        memcpy(host + i, &x, width);
    }
    cuda_ok(cuda.copy_to((uint64_t)(uintptr_t)t->data, host, bytes), "cuMemcpyHtoD");
    free(host);
    return t;
}

#define SHAPE(...)                                                                                 \
    (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), (int64_t[]) { __VA_ARGS__ }

static DLTensor *ints(int64_t n, const int32_t *values)
{
    DLTensor *t = empty(int32, SHAPE(n));
    cuda_ok(cuda.copy_to((uint64_t)(uintptr_t)t->data, values, bytes_of(t)), "cuMemcpyHtoD");
    return t;
}

#define INTS(...) ints(sizeof((int32_t[]){__VA_ARGS__}) / sizeof(int32_t), (int32_t[]){__VA_ARGS__})

/* Page tables [b, columns] that name every page once, backwards. */
static DLTensor *table(int64_t b, int64_t columns)
{
    int32_t pages[256];
    for (int64_t i = 0; i < b * columns; ++i) pages[i] = (int32_t)(b * columns - 1 - i);
    DLTensor *t = ints(b * columns, pages);
    t->ndim = 2;
    t->shape[0] = b;
    t->shape[1] = columns;
    return t;
}

/* ---- calls ----------------------------------------------------------------------------------- */

static void done(const char *kernel)
{
    cuda_ok(cuda.synchronize(), kernel);
    printf("%s\n", kernel);
}

static void run_mha(struct attn_mha_fwd_args *a)
{
    struct attn_mha_fwd_plan plan = {.size = sizeof plan};
    a->size = sizeof *a;
    a->softmax_scale = 0.1;
    a->window_right = -1;
    attn_ok(attn_mha_fwd_plan(a, &plan));
    void *workspace = (void *)(uintptr_t)allocate((size_t)plan.workspace_bytes);
    attn_ok(attn_mha_fwd_run(a, &plan, workspace, plan.workspace_bytes, NULL));
    done(plan.kernel);
}

/* Queries and keys of one length, causal: boxes shared by a cluster of 2.  Tiles of 192 rows are for
 * more than 128 queries, of sequences for all multiprocessors. */
static void mha_dense(DLDataType type, int64_t d_qk, int64_t d_v, int64_t b, int64_t s,
                      double softcap)
{
    struct attn_mha_fwd_args a = {
        .q = filled(type, SHAPE(b, s, 2, d_qk)),
        .qv = d_v > 256 ? filled(type, SHAPE(b, s, 2, d_v)) : NULL,
        .k = filled(type, SHAPE(b, s, 1, d_qk)),
        .v = filled(type, SHAPE(b, s, 1, d_v)),
        .out = empty(type, SHAPE(b, s, 2, d_v)),
        .lse = empty(fp32, SHAPE(b, 2, s)),
        .softcap = softcap,
        .num_splits = 1,
        .causal = 1,
        .window_left = -1,
    };
    run_mha(&a);
}

/* Packed queries with an empty sequence, pages of 3 tokens (gathered), and what a score can get. */
static void mha_gathered(DLDataType type, int64_t d_qk, int64_t d_v, int64_t s, double softcap)
{
    struct attn_mha_fwd_args a = {
        .q = filled(type, SHAPE(s + 20, 2, d_qk)),
        .qv = d_v == 512 ? filled(type, SHAPE(s + 20, 2, d_v)) : NULL,
        .k = filled(type, SHAPE(120, 3, 1, d_qk)),
        .v = filled(type, SHAPE(120, 3, 1, d_v)),
        .out = empty(type, SHAPE(s + 20, 2, d_v)),
        .lse = empty(fp32, SHAPE(2, s + 20)),
        .cu_seqlens_q = INTS(0, 20, 20, (int32_t)s + 20),
        .seqused_k = INTS(7, 50, 120),
        .page_table = table(3, 40),
        .sinks = filled(fp32, SHAPE(2)),
        .max_seqlen_q = s,
        .softcap = softcap,
        .num_splits = 1,
        .causal = 1,
        .window_left = 90,
    };
    run_mha(&a);
}

/* Two queries a sequence against pages of 16 tokens, after an append with rotary embedding. */
static void mha_decode(DLDataType type, int64_t d_qk, int64_t d_v, int num_splits)
{
    struct attn_mha_fwd_args a = {
        .q = filled(type, SHAPE(3, 2, 8, d_qk)),
        .qv = d_v > 256 ? filled(type, SHAPE(3, 2, 8, d_v)) : NULL,
        .k = filled(type, SHAPE(60, 16, 2, d_qk)),
        .v = filled(type, SHAPE(60, 16, 2, d_v)),
        .k_new = filled(type, SHAPE(3, 2, 2, d_qk)),
        .v_new = filled(type, SHAPE(3, 2, 2, d_v)),
        .rotary_cos = filled(type, SHAPE(400, 16)),
        .rotary_sin = filled(type, SHAPE(400, 16)),
        .seqused_k = INTS(0, 300, 45),
        .page_table = table(3, 20),
        .out = empty(type, SHAPE(3, 2, 8, d_v)),
        .lse = empty(fp32, SHAPE(3, 8, 2)),
        .num_splits = num_splits,
        .causal = 1,
        .window_left = -1,
    };
    if (num_splits > 1) {
        a.out_accum = empty(fp32, SHAPE(num_splits, 3, 8, 2, d_v));
        a.lse_accum = empty(fp32, SHAPE(num_splits, 3, 8, 2));
        puts("attn_decode_combine_sm90");
    }
    puts("attn_kv_append_sm90");
    run_mha(&a);
}

static void mha_group(int dtype, int64_t d_qk, int64_t d_v)
{
    DLDataType type = types[dtype];
    mha_dense(type, d_qk, d_v, 1, 100, 0);
    mha_dense(type, d_qk, d_v, 70, 150, 0);
    mha_dense(type, d_qk, d_v, 1, 150, 5);
    mha_dense(type, d_qk, d_v, 70, 150, 5);
    mha_gathered(type, d_qk, d_v, 100, 0);
    mha_gathered(type, d_qk, d_v, 150, 0);
    mha_gathered(type, d_qk, d_v, 100, 5);
    mha_decode(type, d_qk, d_v, 0);
    mha_decode(type, d_qk, d_v, 3);
}

/* Up to 32 sequences with boxes of keys have a kernel of their own. */
static void mla_group(int dtype, int64_t h, int64_t page, int64_t b)
{
    int64_t columns = (200 + page - 1) / page;
    int32_t lengths[64];
    for (int64_t i = 0; i < b; ++i) lengths[i] = (int32_t[]){200, 0, 70}[i % 3];
    DLDataType type = types[dtype];
    struct attn_mla_decode_args a = {
        .size = sizeof a,
        .q = filled(type, SHAPE(b, 2, h, 576)),
        .k_cache = filled(type, SHAPE(b * columns, page, 1, 576)),
        .block_table = table(b, columns),
        .cache_seqlens = ints(b, lengths),
        .out = empty(type, SHAPE(b, 2, h, 512)),
        .lse = empty(fp32, SHAPE(b, h, 2)),
        .softmax_scale = 0.04,
        .head_dim_v = 512,
        .causal = 1,
    };
    struct attn_mla_plan plan = {.size = sizeof plan};
    attn_ok(attn_mla_decode_plan(&a, &plan));
    void *workspace = (void *)(uintptr_t)allocate((size_t)plan.workspace_bytes);
    attn_ok(attn_mla_decode_run(&a, &plan, workspace, plan.workspace_bytes, NULL));
    done(plan.kernel);
}

enum { KDA_ODD = 1, KDA_ACTIVATED = 2 };

/* n sequences of `each` tokens; odd: rows that start off 16 bytes, which are packed first. */
static void kda_fwd(int64_t d, int32_t n, int32_t each, int features)
{
    DLDataType type = types[BF16];
    const int64_t t = (int64_t)n * each, h = 2;
    int32_t ends[128] = {0};
    for (int32_t i = 1; i <= n; ++i) ends[i] = i * each;
    struct attn_kda_fwd_args a = {
        .size = sizeof a,
        .k = filled(type, SHAPE(1, t, h, d)),
        .v = filled(type, SHAPE(1, t, h, d)),
        .g = filled(type, SHAPE(1, t, h, d)),
        .beta = filled(type, SHAPE(1, t, h)),
        .out = empty(type, SHAPE(1, t, h, d)),
        .A_log = filled(fp32, SHAPE(h)),
        .dt_bias = filled(fp32, SHAPE(h, d)),
        .initial_state = filled(fp32, SHAPE(n, h, d, d)),
        .final_state = empty(fp32, SHAPE(n, h, d, d)),
        .cu_seqlens = ints(n + 1, ends),
        .scale = 0.1,
        .lower_bound = -5,
    };
    DLTensor *q = filled(type, SHAPE(1, t + 1, h, d));
    const int odd = features & KDA_ODD;
    if (features & KDA_ACTIVATED) {
        a.gate_activated = 1;
        a.A_log = a.dt_bias = NULL;
        a.lower_bound = 0;
    }
    if (odd) {
        q->byte_offset = 4;
        puts("attn_kda_pack_sm90");
    }
    q->shape[1] = t;
    a.q = q;
    if (each >= 16) {
        a.checkpoint_every = 16;
        a.checkpoint_states = empty(fp32, SHAPE(n * (each / 16), h, d, d));
    }
    struct attn_kda_fwd_plan plan = {.size = sizeof plan};
    attn_ok(attn_kda_fwd_plan(&a, &plan));
    if (plan.workspace_bytes && !odd) puts("attn_kda_order_sm90");
    void *workspace = (void *)(uintptr_t)allocate((size_t)plan.workspace_bytes);
    attn_ok(attn_kda_fwd_run(&a, &plan, workspace, plan.workspace_bytes, NULL));
    done(plan.kernel);
}

static void kda_step(int64_t d)
{
    DLDataType type = types[BF16];
    struct attn_kda_step_args a = {
        .size = sizeof a,
        .q = filled(type, SHAPE(3, 4, 2, d)),
        .k = filled(type, SHAPE(3, 4, 2, d)),
        .v = filled(type, SHAPE(3, 4, 2, d)),
        .g = filled(type, SHAPE(3, 4, 2, d)),
        .beta = filled(type, SHAPE(3, 4, 2)),
        .out = empty(type, SHAPE(3, 4, 2, d)),
        .state = filled(fp32, SHAPE(5, 2, d, d)),
        .state_indices = INTS(4, 0, 2),
        .scale = 0.1,
        .lower_bound = -5,
    };
    attn_ok(attn_kda_step_run(&a, NULL));
    done("attn_kda_step_sm90");
}

static void kda_fwd_group(int64_t d)
{
    kda_fwd(d, 3, 40, 0);
    kda_fwd(d, 2, 21, KDA_ODD);
    kda_fwd(d, 35, 17, 0); /* 70 pairs of sequence and head: more than clusters, at d 128 */
    kda_fwd(d, 70, 3, 0);  /* more pairs than multiprocessors: longest first */
}

/* Token by token. */
static void kda_step_group(int64_t d)
{
    kda_fwd(d, 2, 19, KDA_ACTIVATED);
    kda_step(d);
}

static void combine(void)
{
    struct attn_split_combine_args a = {
        .size = sizeof a,
        .out_partial = filled(fp32, SHAPE(5, 2, 3, 4, 72)),
        .lse_partial = filled(fp32, SHAPE(5, 2, 3, 4)),
        .out = empty(types[BF16], SHAPE(2, 3, 4, 72)),
        .lse = empty(fp32, SHAPE(2, 3, 4)),
    };
    attn_ok(attn_split_combine_run(&a, NULL));
    done("attn_split_combine_sm90");
}

/* Names the groups, or runs the one of that name. */
static int each_group(const char *name)
{
    static const int64_t widths[][2] = {{64, 64},  {96, 96},   {128, 128}, {192, 128}, {192, 192},
                                        {64, 256}, {256, 256}, {64, 512},  {48, 328}};
    static const int64_t caches[][3] = {/* heads, page, sequences */
                                        {16, 64, 3},
                                        {128, 64, 3},
                                        {128, 7, 3},
                                        {128, 64, 40}};
    char group[64];
    int found = 0;
#define GROUP(call, ...)                                                                           \
    do {                                                                                           \
        snprintf(group, sizeof group, __VA_ARGS__);                                                \
        if (!name) puts(group);                                                                    \
        if (!name || strcmp(name, group) != 0) break;                                              \
        found = 1;                                                                                 \
        call;                                                                                      \
    } while (0)
    for (int t = BF16; t <= FP16; ++t) {
        for (size_t i = 0; i < sizeof widths / sizeof *widths; ++i)
            GROUP(mha_group(t, widths[i][0], widths[i][1]), "mha_%s_d%dx%d", dtype_names[t],
                  (int)widths[i][0], (int)widths[i][1]);
        for (size_t i = 0; i < sizeof caches / sizeof *caches; ++i)
            GROUP(mla_group(t, caches[i][0], caches[i][1], caches[i][2]), "mla_%s_h%d_page%d_b%d",
                  dtype_names[t], (int)caches[i][0], (int)caches[i][1], (int)caches[i][2]);
    }
    for (int d = 64; d <= 128; d += 64) {
        GROUP(kda_fwd_group(d), "kda_fwd_d%d", d);
        GROUP(kda_step_group(d), "kda_step_d%d", d);
    }
    GROUP(combine(), "split_combine");
#undef GROUP
    return found;
}

int main(int argc, char **argv)
{
    if (argc < 2) return each_group(NULL);
    open_cuda();
    if (!each_group(argv[1])) fail("sanitize: no group named %s", argv[1]);
    return 0;
}
