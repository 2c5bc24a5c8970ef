/* SPDX-License-Identifier: MIT
 *
 * The mla ops with the table of every rung, driver, plan and kernels together, against a judge of
 * this file's own: fp64, one key at a time, from the list of keys that the case was made from.
 *
 * Rule, with A = sum_j w_j |v_j| / sum_j w_j and S the largest sum of |products| of a score: an
 * element of out within ulp(out) + A (p + 2^-18 (1 + S)), where p is twice the rounding of a
 * probability to bf16, and 0 for fp16 and fp32; lse and max within 2^-19 (1 + S + |lse|).
 *
 * All that a call must not read holds NaN or wild numbers: cache rows no list names, table entries
 * past the last page, indices past topk_length, the workspace.  What it reads is write-protected,
 * and what it must not write is compared with what was there.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "attn/attn.h"
#include "check.h"
#include "check_gpu.h"
#include "cpu/mla.h"
#include "cpu/threads.h"

struct key {
    int cache; /* 0 or 1 */
    int64_t page, offset;
};

struct tensor {
    DLTensor t;
    int64_t shape[4], strides[4];
    struct check_buffer buffer;
};

struct mla_case {
    enum attn_mla_op op;
    enum attn_mla_format format;
    enum attn_dtype dtype, out_dtype;
    int64_t b, s_q, h_q, h_k, d, page[2], num_pages[2];
    bool causal;
    struct tensor q, cache[2], table, lens, indices[2], length[2], sink, descale[2], out, lse, max;
    struct key **keys; /* [b * s_q], of KV head 0 */
    int64_t *count;    /* [b * s_q] */
    float **values;    /* [b * s_q * h_k]: of these keys, [count, d], when first judged */
    double scale;
    int32_t threads;
    union {
        struct attn_mla_decode_args decode;
        struct attn_mla_sparse_decode_args sparse;
        struct attn_mla_sparse_fwd_args fwd;
    } args;
    const struct attn_cpu_kernels *table_of; /* kernels; NULL: the reference, or the GPU */
    bool gpu;
    struct attn_mla_plan plan;
    struct check_buffer workspace;
    attn_status status;
    const char *complaint; /* of a run on a GPU */
};

static DLDataType type_of(enum attn_dtype t)
{
    static const DLDataType types[ATTN_DTYPES] = {{kDLFloat, 32, 1},
                                                  {kDLBfloat, 16, 1},
                                                  {kDLFloat, 16, 1},
                                                  {kDLFloat8_e4m3fn, 8, 1}};
    return types[t];
}

/* Rows of `last` elements, the other axes in random order of memory, with gaps of whole elements
 * that keep 16 bytes' alignment. */
static void make(struct check_random *r, struct tensor *t, DLDataType type, int ndim,
                 const int64_t *shape, bool free_order)
{
    int64_t step = shape[ndim - 1], span = 1, bytes = type.bits / 8;
    int order[4] = {0, 1, 2, 3};
    for (int i = ndim - 2; i > 0 && free_order; --i) {
        int j = (int)random_range(r, 0, i), x = order[i];
        order[i] = order[j];
        order[j] = x;
    }
    t->strides[ndim - 1] = 1;
    if (free_order && random_percent(r, 40)) step += 16 * random_range(r, 0, 3);
    for (int i = ndim - 2; i >= 0; --i) {
        t->strides[order[i]] = step;
        step *= shape[order[i]] ? shape[order[i]] : 1;
        if (free_order && random_percent(r, 30)) step += 16 * random_range(r, 0, 2);
    }
    t->t = (DLTensor){.device = {kDLCPU, 0}, .ndim = ndim, .dtype = type};
    for (int i = 0; i < ndim; ++i) {
        t->shape[i] = shape[i];
        span = shape[i] ? span + (shape[i] - 1) * t->strides[i] : 0;
        if (!span) break;
    }
    for (int i = 0; i < ndim; ++i) t->shape[i] = shape[i];
    t->t.shape = t->shape;
    t->t.strides = t->strides;
    t->buffer = check_buffer((size_t)(span * bytes), (size_t)bytes);
    t->t.data = t->buffer.data;
}

static void *at(const struct tensor *t, int64_t i, int64_t j, int64_t k)
{
    const int64_t index[3] = {i, j, k};
    int64_t offset = 0;
    for (int n = 0; n < t->t.ndim - 1 || n < 1; ++n) offset += index[n] * t->strides[n];
    return t->buffer.data + offset * (t->t.dtype.bits / 8);
}

/* ---- caches ---------------------------------------------------------------------------------- */

/* A quantised row with scales of every kind: powers of two and not, tiny and plain. */
static void fill_quantised(struct check_random *r, const struct mla_case *c, char *row,
                           char *scales)
{
    bool v32 = c->format == ATTN_MLA_V32;
    int64_t codes = v32 ? ATTN_MLA_LATENT : ATTN_MODEL1_QUANTISED;
    for (int64_t i = 0; i < codes; ++i) {
        uint8_t code = (uint8_t)random_range(r, 0, 255);
        row[i] = (char)((code & 0x7f) == 0x7f ? 0x20 : code);
    }
    for (int i = 0; i < (v32 ? 4 : 7); ++i) {
        int e = (int)random_range(r, -11, -7);
        float s = ldexpf(1.0f, e) * (random_percent(r, 40) ? (float)(1 + random_unit(r)) : 1);
        if (v32)
            memcpy(row + ATTN_MLA_LATENT + 4 * i, &s, sizeof s);
        else
            scales[i] = (char)(e + 127);
    }
    check_fill_normal(r, ATTN_BF16, row + (v32 ? ATTN_MLA_LATENT + 16 : ATTN_MODEL1_QUANTISED),
                      ATTN_MLA_ROPE, 1);
}

static char *row_at(const struct mla_case *c, struct key k, int64_t head, char **scales)
{
    const struct tensor *t = &c->cache[k.cache];
    int64_t bytes = c->format < ATTN_MLA_V32 ? attn_dtype_bytes(c->dtype) : 1;
    char *page = t->buffer.data +
                 bytes * (c->op == ATTN_MLA_SPARSE_FWD ? 0 : k.page * t->strides[0]);
    *scales = page + 576 * c->page[k.cache] + 8 * k.offset;
    if (c->format == ATTN_MLA_V32) return page + 656 * k.offset;
    if (c->format == ATTN_MLA_MODEL1) return page + 576 * k.offset;
    if (c->op == ATTN_MLA_SPARSE_FWD) return page + bytes * k.offset * t->strides[0];
    return page + bytes * (k.offset * t->strides[1] + head * t->strides[2]);
}

static void fill_key(struct check_random *r, const struct mla_case *c, struct key k)
{
    char *scales;
    for (int64_t h = 0; h < c->h_k; ++h) {
        char *row = row_at(c, k, h, &scales);
        if (c->format >= ATTN_MLA_V32)
            fill_quantised(r, c, row, scales);
        else
            check_fill_normal(r, c->dtype, row, c->d, 1);
    }
}

static void make_cache(struct check_random *r, struct mla_case *c, int n)
{
    struct tensor *t = &c->cache[n];
    if (c->op == ATTN_MLA_DECODE) {
        const int64_t shape[4] = {c->num_pages[n], c->page[n], c->h_k, c->d};
        make(r, t, type_of(c->dtype), 4, shape, true);
        check_fill_nan(c->dtype, t->buffer.data,
                       (int64_t)t->buffer.bytes / attn_dtype_bytes(c->dtype));
    } else if (c->op == ATTN_MLA_SPARSE_FWD) {
        make(r, t, type_of(c->dtype), 3, (int64_t[]){c->page[n], 1, c->d}, true);
        check_fill_nan(c->dtype, t->buffer.data,
                       (int64_t)t->buffer.bytes / attn_dtype_bytes(c->dtype));
    } else {
        static const DLDataType types[3] = {{kDLUInt, 8, 1},
                                            {kDLInt, 8, 1},
                                            {kDLFloat8_e4m3fn, 8, 1}};
        int64_t bytes = c->d == 576 ? 656 : 584;
        make(r, t, types[random_range(r, 0, 2)], 4,
             (int64_t[]){c->num_pages[n], c->page[n], 1, bytes}, false);
        memset(t->buffer.data, 0x7f, t->buffer.bytes); /* NaN in codes, scales and bf16 */
    }
}

/* ---- cases ----------------------------------------------------------------------------------- */

static void *list(int64_t n) { return check_scratch((size_t)(n > 0 ? n : 1) * sizeof(struct key)); }

static void make_dense_keys(struct check_random *r, struct mla_case *c, int64_t longest)
{
    int64_t most = (longest + c->page[0] - 1) / c->page[0] + random_range(r, 0, 2), used = 0;
    int64_t lens[8];
    most = most > 0 ? most : 1;
    for (int64_t i = 0; i < c->b; ++i) {
        lens[i] = random_percent(r, 15) ? 0 : random_edge(r, longest);
        used += (lens[i] + c->page[0] - 1) / c->page[0];
    }
    c->num_pages[0] = used + random_range(r, used ? 0 : 1, 3);
    make_cache(r, c, 0);
    make(r, &c->table, (DLDataType){kDLInt, 32, 1}, 2, (int64_t[]){c->b, most}, false);
    make(r, &c->lens, (DLDataType){kDLInt, 32, 1}, 1, (int64_t[]){c->b}, false);
    int64_t *free_pages = list(c->num_pages[0]), left = c->num_pages[0];
    for (int64_t i = 0; i < left; ++i) free_pages[i] = i;
    for (int64_t i = 0; i < c->b; ++i) {
        int32_t *row = at(&c->table, i, 0, 0);
        ((int32_t *)(void *)c->lens.buffer.data)[i] = (int32_t)lens[i];
        struct key *keys = list(lens[i]);
        for (int64_t j = 0; j < most; ++j) row[j] = (int32_t)PICK(r, 2147480000, -1, INT32_MIN);
        for (int64_t j = 0; j < lens[i]; ++j) {
            if (j % c->page[0] == 0) {
                int64_t x = random_range(r, 0, left - 1);
                row[j / c->page[0]] = (int32_t)free_pages[x];
                free_pages[x] = free_pages[--left];
            }
            keys[j] = (struct key){0, row[j / c->page[0]], j % c->page[0]};
            fill_key(r, c, keys[j]);
        }
        if (c->causal && c->s_q > 1 && lens[i] > 0 && random_percent(r, 20) && !c->gpu) {
            char
                *scales; /* the last key, which the last token alone sees, is NaN; a GPU walks steps
                           * of many keys for all tokens, and 0 times NaN is NaN */
            for (int64_t h = 0; h < c->h_k; ++h)
                check_fill_nan(c->dtype, row_at(c, keys[lens[i] - 1], h, &scales), c->d);
        }
        for (int64_t t = 0; t < c->s_q; ++t) {
            int64_t n = c->causal && c->s_q > 1 ? lens[i] - c->s_q + t + 1 : lens[i];
            c->keys[i * c->s_q + t] = keys;
            c->count[i * c->s_q + t] = n > 0 ? n : 0;
        }
    }
}

/* The index lists into cache n; what they name is added to the tokens' keys. */
static void make_list(struct check_random *r, struct mla_case *c, int n, int64_t topk)
{
    bool fwd = c->op == ATTN_MLA_SPARSE_FWD, lengths = random_percent(r, 50);
    int64_t tokens = c->num_pages[n] * c->page[n];
    int waste = (int)PICK(r, 0, 10, 50, 100);
    const DLDataType int32 = {kDLInt, 32, 1};
    make_cache(r, c, n);
    make(r, &c->indices[n], int32, 3, (int64_t[]){c->b, fwd ? 1 : c->s_q, topk}, true);
    if (lengths) make(r, &c->length[n], int32, 1, (int64_t[]){c->b}, false);
    int32_t *length = (int32_t *)(void *)c->length[n].buffer.data;
    bool *filled = check_scratch((size_t)tokens + 1);
    for (int64_t i = 0; i < c->b; ++i) {
        if (lengths)
            length[i] = (int32_t)(random_percent(r, 10) ? PICK(r, 0, -5, INT32_MAX)
                                                        : random_edge(r, topk));
        int64_t used = !lengths || length[i] > topk ? topk : length[i] < 0 ? 0 : length[i];
        for (int64_t t = 0; t < c->s_q; ++t) {
            int32_t *index = at(&c->indices[n], i, t, 0);
            for (int64_t x = 0; x < topk; ++x) {
                index[x] = (int32_t)PICK(r, -1, INT32_MIN, INT32_MAX, tokens, -7);
                if (random_percent(r, waste) || tokens == 0) continue;
                int64_t k = random_range(r, 0, tokens - 1);
                if (x >= used && filled[k]) continue; /* past the length: NaN rows and wild ones */
                index[x] = (int32_t)k;
                if (x >= used) continue;
                struct key key = {n, fwd ? 0 : k / c->page[n], fwd ? k : k % c->page[n]};
                if (!filled[k]) fill_key(r, c, key);
                filled[k] = true;
                c->keys[i * c->s_q + t][c->count[i * c->s_q + t]++] = key;
            }
        }
    }
}

static void make_case(struct check_random *r, struct mla_case *c)
{
    bool dense = c->op == ATTN_MLA_DECODE, fwd = c->op == ATTN_MLA_SPARSE_FWD;
    c->b = random_range(r, 1, 4);
    c->s_q = fwd ? 1 : PICK(r, 1, 1, 2, 3);
    c->h_k = dense ? PICK(r, 1, 1, 1, 2, 3) : 1;
    c->h_q = c->h_k * (random_percent(r, 60) ? PICK(r, 1, 3, 8, 15, 16, 17, 32, 33, 48, 63)
                                             : random_range(r, 1, c->h_k == 1 ? 140 : 40));
    c->page[0] = PICK(r, 1, 2, 7, 16, 61, 64, 64, 128);
    c->page[1] = PICK(r, 1, 2, 5, 64);
    c->causal = dense && random_percent(r, 60);
    c->out_dtype = attn_dtype_out(c->dtype);
    c->scale = (double)PICK(r, 4, 5, 5, -5, 0) / 100;
    c->threads = (int32_t)random_range(r, 0, 3);
    int64_t tokens = c->b * c->s_q, topk = 1 + random_edge(r, 600), extra = 1 + random_edge(r, 90);
    c->keys = list(tokens);
    c->count = list(tokens);
    c->values = list(tokens * c->h_k);
    if (dense) {
        make_dense_keys(r, c, PICK(r, 5, 40, 300, 1200));
    } else {
        for (int64_t i = 0; i < tokens; ++i) c->keys[i] = list(topk + extra);
        if (fwd)
            c->page[0] = random_edge(r, 300), c->num_pages[0] = 1;
        else
            c->num_pages[0] = random_edge(r, 300 / c->page[0]);
        make_list(r, c, 0, topk);
        c->num_pages[1] = random_edge(r, 9);
        if (!fwd && random_percent(r, 40)) make_list(r, c, 1, extra);
        if (random_percent(r, 50)) {
            make(r, &c->sink, type_of(ATTN_F32), 1, (int64_t[]){c->h_q}, false);
            check_fill_normal(r, ATTN_F32, c->sink.buffer.data, c->h_q, 2);
            float *sink = (float *)(void *)c->sink.buffer.data;
            if (random_percent(r, 50)) sink[random_range(r, 0, c->h_q - 1)] = INFINITY;
            if (random_percent(r, 50)) sink[random_range(r, 0, c->h_q - 1)] = -INFINITY;
        }
    }
    for (int i = 0; i < 2 && c->dtype == ATTN_F8; ++i) {
        make(r, &c->descale[i], type_of(ATTN_F32), 1, (int64_t[]){1}, false);
        *(float *)(void *)c->descale[i].buffer.data = (float)(0.5 + random_unit(r));
    }
    const int64_t q[4] = {c->b, c->s_q, c->h_q, c->d}, o[4] = {c->b, c->s_q, c->h_q, 512};
    const int64_t l[3] = {c->b, c->h_q, c->s_q};
    const int64_t q3[3] = {c->b, c->h_q, c->d}, o3[3] = {c->b, c->h_q, 512};
    make(r, &c->q, type_of(c->dtype), fwd ? 3 : 4, fwd ? q3 : q, true);
    check_fill_normal(r, c->dtype, c->q.buffer.data,
                      (int64_t)c->q.buffer.bytes / attn_dtype_bytes(c->dtype), 1);
    make(r, &c->out, type_of(c->out_dtype), fwd ? 3 : 4, fwd ? o3 : o, true);
    make(r, &c->lse, type_of(ATTN_F32), fwd ? 2 : 3, l, true);
    if (fwd) make(r, &c->max, type_of(ATTN_F32), 2, l, true);
    for (int i = 0; i < 2; ++i) {
        if (c->cache[i].t.data) check_buffer_protect(&c->cache[i].buffer, true);
        if (c->indices[i].t.data) check_buffer_protect(&c->indices[i].buffer, true);
    }
    check_buffer_protect(&c->q.buffer, true);
}

static const DLTensor *given(const struct tensor *t) { return t->t.data ? &t->t : NULL; }

static void fill_args(struct mla_case *c)
{
    if (c->op == ATTN_MLA_DECODE)
        c->args.decode = (struct attn_mla_decode_args){.size = sizeof c->args.decode,
                                                       .threads = c->threads,
                                                       .q = &c->q.t,
                                                       .k_cache = &c->cache[0].t,
                                                       .block_table = &c->table.t,
                                                       .cache_seqlens = &c->lens.t,
                                                       .descale_q = given(&c->descale[0]),
                                                       .descale_k = given(&c->descale[1]),
                                                       .out = &c->out.t,
                                                       .lse = &c->lse.t,
                                                       .softmax_scale = c->scale,
                                                       .head_dim_v = 512,
                                                       .causal = c->causal};
    else if (c->op == ATTN_MLA_SPARSE_DECODE)
        c->args.sparse =
            (struct attn_mla_sparse_decode_args){.size = sizeof c->args.sparse,
                                                 .threads = c->threads,
                                                 .q = &c->q.t,
                                                 .k_cache = &c->cache[0].t,
                                                 .indices = &c->indices[0].t,
                                                 .topk_length = given(&c->length[0]),
                                                 .attn_sink = given(&c->sink),
                                                 .extra_k_cache = c->indices[1].t.data
                                                                      ? &c->cache[1].t
                                                                      : NULL,
                                                 .extra_indices_in_kvcache = given(&c->indices[1]),
                                                 .extra_topk_length = given(&c->length[1]),
                                                 .out = &c->out.t,
                                                 .lse = &c->lse.t,
                                                 .softmax_scale = c->scale,
                                                 .head_dim_v = 512};
    else
        c->args.fwd = (struct attn_mla_sparse_fwd_args){.size = sizeof c->args.fwd,
                                                        .threads = c->threads,
                                                        .q = &c->q.t,
                                                        .kv = &c->cache[0].t,
                                                        .indices = &c->indices[0].t,
                                                        .topk_length = given(&c->length[0]),
                                                        .attn_sink = given(&c->sink),
                                                        .out = &c->out.t,
                                                        .max_logits = &c->max.t,
                                                        .lse = &c->lse.t,
                                                        .softmax_scale = c->scale,
                                                        .head_dim_v = 512};
}

static attn_status check_args(const struct mla_case *c, struct attn_mla_problem *p)
{
    if (c->op == ATTN_MLA_DECODE) return attn_mla_decode_check(&c->args.decode, p, true);
    if (c->op == ATTN_MLA_SPARSE_DECODE)
        return attn_mla_sparse_decode_check(&c->args.sparse, p, true);
    return attn_mla_sparse_fwd_check(&c->args.fwd, p, true);
}

static void run_decode_on_gpu(struct mla_case *c)
{
    struct attn_mla_decode_args a = c->args.decode;
    struct check_mirror m;
    check_mirror_open(&m);
    a.q = check_mirror_add(&m, a.q, &c->q.buffer, false);
    a.k_cache = check_mirror_add(&m, a.k_cache, &c->cache[0].buffer, false);
    a.block_table = check_mirror_add(&m, a.block_table, &c->table.buffer, false);
    a.cache_seqlens = check_mirror_add(&m, a.cache_seqlens, &c->lens.buffer, false);
    a.out = check_mirror_add(&m, a.out, &c->out.buffer, true);
    a.lse = check_mirror_add(&m, a.lse, &c->lse.buffer, true);
    c->plan = (struct attn_mla_plan){.size = sizeof c->plan};
    c->status = attn_mla_decode_plan(&a, &c->plan);
    if (c->status) return;
    void *workspace = check_mirror_workspace(&m, c->plan.workspace_bytes);
    c->status = attn_mla_decode_run(&a, &c->plan, workspace, c->plan.workspace_bytes, NULL);
    c->workspace = m.workspace;
    c->complaint = check_mirror_close(&m);
}

static void run_case(void *context)
{
    struct mla_case *c = context;
    struct attn_mla_problem p;
    if (c->gpu) {
        run_decode_on_gpu(c);
        return;
    }
    c->status = check_args(c, &p);
    if (c->status) return;
    if (!c->table_of) {
        c->status = attn_mla_ref_run(&p, 1);
        return;
    }
    c->plan = (struct attn_mla_plan){.size = sizeof c->plan};
    c->status = attn_mla_cpu_plan_with(c->table_of, &p, &c->plan);
    if (c->status) return;
    c->workspace = check_buffer((size_t)c->plan.workspace_bytes, 64);
    memset(c->workspace.data, 0xff, c->workspace.bytes);
    c->status = attn_mla_cpu_run_with(c->table_of, &p, &c->plan, c->workspace.data,
                                      c->plan.workspace_bytes);
}

/* ---- the judge ------------------------------------------------------------------------------- */

static bool near(double x, double want, double limit)
{
    if (isnan(want)) return isnan(x);
    if (isinf(want)) return x == want;
    return fabs(x - want) <= limit;
}

/* The keys of a token as fp32, [count, d], of one KV head. */
static const float *key_values(const struct mla_case *c, int64_t token, int64_t head)
{
    float **values = &c->values[token * c->h_k + head];
    if (*values) return *values;
    *values = check_scratch((size_t)(c->count[token] * c->d) * sizeof(float));
    for (int64_t j = 0; j < c->count[token]; ++j) {
        char *scales, *row = row_at(c, c->keys[token][j], head, &scales);
        attn_mla_row_values(c->format, row, scales, c->d, *values + j * c->d);
    }
    return *values;
}

static bool judge_row(const struct mla_case *c, int64_t i, int64_t t, int64_t h, char why[200])
{
    bool fwd = c->op == ATTN_MLA_SPARSE_FWD;
    int64_t token = i * c->s_q + t, n = c->count[token];
    const float *values = key_values(c, token, h / (c->h_q / c->h_k));
    static double out[512], magnitude[512];
    double q[ATTN_MLA_WIDTH_MAX];
    double *score = check_scratch((size_t)(n + 1) * sizeof(double)), m = -INFINITY, l = 0, big = 0;
    bool nan = false;
    double scale = c->scale, v_scale = 1;
    for (int x = 0; x < 2 && c->dtype == ATTN_F8; ++x)
        scale *= v_scale = (double)*(float *)(void *)c->descale[x].buffer.data;
    const char *stored = fwd ? at(&c->q, i, h, 0) : at(&c->q, i, t, h);
    for (int64_t x = 0; x < c->d; ++x) q[x] = (double)attn_load(c->dtype, stored, x);
    memset(out, 0, sizeof out);
    memset(magnitude, 0, sizeof magnitude);
    for (int pass = 0; pass < 2; ++pass) {
        for (int64_t j = 0; j < n; ++j) {
            const float *k = values + j * c->d;
            if (pass == 0) {
                double s = 0, sum = 0;
                for (int64_t x = 0; x < c->d; ++x) {
                    double y = q[x] * (double)k[x];
                    s += y;
                    sum += fabs(y);
                }
                score[j] = s * scale;
                nan = nan || isnan(score[j]);
                m = fmax(m, score[j]);
                big = fmax(big, sum * fabs(scale));
                continue;
            }
            double w = exp(score[j] - m);
            l += w;
            for (int x = 0; x < 512; ++x) {
                out[x] += w * (double)k[x];
                magnitude[x] += w * fabs((double)k[x]);
            }
        }
    }
    double lse = nan ? NAN : n ? m + log(l) : INFINITY, keep = v_scale;
    if (c->sink.t.data) keep /= 1 + exp((double)((float *)(void *)c->sink.buffer.data)[h] - lse);
    double limit = 0x1p-19 * (1 + big + fabs(n ? lse : 0));
    float got = fwd ? ((float *)at(&c->lse, i, 0, 0))[h] : ((float *)at(&c->lse, i, h, 0))[t];
    if (!near((double)got, lse, limit)) {
        snprintf(why, 200, "lse %.9g, want %.9g within %.2g", (double)got, lse, limit);
        return false;
    }
    if (fwd && !near((double)((float *)at(&c->max, i, 0, 0))[h], m, limit)) {
        snprintf(why, 200, "max %.9g, want %.9g", (double)((float *)at(&c->max, i, 0, 0))[h], m);
        return false;
    }
    double p = c->dtype == ATTN_F32 ? 0 : c->dtype == ATTN_F16 ? (c->gpu ? 0x1p-11 : 0) : 0x1p-8;
    const char *o = fwd ? at(&c->out, i, h, 0) : at(&c->out, i, t, h);
    for (int x = 0; x < 512; ++x) {
        double want = nan ? NAN
                      : n ? out[x] / l * keep
                          : 0,
               y = (double)attn_load(c->out_dtype, o, x);
        double bound = n ? magnitude[x] / l * keep * (p + 0x1p-18 * (1 + big)) +
                               check_ulp(c->out_dtype, want)
                         : 0;
        if (near(y, want, bound)) continue;
        snprintf(why, 200, "out[%d] %.9g, want %.9g within %.2g (%d keys)", x, y, want, bound,
                 (int)n);
        return false;
    }
    return true;
}

/* All bytes of an output that its elements do not cover are canaries still. */
static bool gaps_intact(const struct tensor *t)
{
    int64_t bytes = t->t.dtype.bits / 8;
    char *copy = check_scratch(t->buffer.bytes + 1);
    const int64_t *s = t->shape;
    int dims = t->t.ndim;
    memcpy(copy, t->buffer.data, t->buffer.bytes);
    for (int64_t i = 0; i < s[0]; ++i)
        for (int64_t j = 0; j < (dims > 2 ? s[1] : 1); ++j)
            for (int64_t k = 0; k < (dims > 3 ? s[2] : 1); ++k)
                memset(copy + ((char *)at(t, i, j, k) - t->buffer.data), CHECK_CANARY,
                       (size_t)(s[dims - 1] * bytes));
    for (size_t i = 0; i < t->buffer.bytes; ++i)
        if ((unsigned char)copy[i] != CHECK_CANARY) return false;
    return check_buffer_intact(&t->buffer);
}

static void describe(const struct mla_case *c, char text[200])
{
    snprintf(text, 200, "b %d s_q %d h %d/%d d %d page %d/%d topk %d/%d%s%s", (int)c->b,
             (int)c->s_q, (int)c->h_q, (int)c->h_k, (int)c->d, (int)c->page[0], (int)c->page[1],
             (int)c->indices[0].shape[2], (int)c->indices[1].shape[2], c->causal ? " causal" : "",
             c->sink.t.data ? " sink" : "");
}

static void check_one(struct check_test *test, struct check_random *r, struct mla_case *c)
{
    char why[200] = "", text[200];
    make_case(r, c);
    fill_args(c);
    test->cases += 1;
    if (!check_guarded(test, run_case, c)) return;
    if (c->gpu && c->status == ATTN_E_NOT_BUILT) {
        test->cases -= 1; /* another width */
        return;
    }
    bool ok = c->status == ATTN_OK;
    if (!ok) snprintf(why, sizeof why, "status %d: %.150s", (int)c->status, attn_last_error());
    if (check_options.broken && ok) memset(at(&c->lse, 0, 0, 0), 0x11, 4);
    for (int n = 0; n < 24 && ok; ++n) { /* the first row, the last, and some between */
        int64_t rows = c->b * c->s_q * c->h_q, x = n == 0   ? 0
                                                   : n == 1 ? rows - 1
                                                            : random_range(r, 0, rows - 1);
        ok = judge_row(c, x / (c->s_q * c->h_q), x / c->h_q % c->s_q, x % c->h_q, why);
    }
    if (ok && !(gaps_intact(&c->out) && gaps_intact(&c->lse) &&
                (!c->max.t.data || gaps_intact(&c->max)) &&
                (!c->table_of || check_buffer_intact(&c->workspace)) && !c->complaint)) {
        ok = false;
        snprintf(why, sizeof why, "%s",
                 c->complaint ? c->complaint : "bytes beside the result were written");
    }
    if (ok && c->table_of && c->table_of->mla[c->format] && strstr(c->plan.kernel, "_ref")) {
        ok = false;
        snprintf(why, sizeof why, "the reference ran although the rung has a kernel");
    }
    if (ok && (c->table_of || c->gpu)) { /* once more, with other thread counts: same bits */
        char *first = check_scratch(c->out.buffer.bytes);
        memcpy(first, c->out.buffer.data, c->out.buffer.bytes);
        c->threads = c->threads == 1 ? 3 : 1;
        fill_args(c);
        if (!check_guarded(test, run_case, c)) return;
        ok = c->status == ATTN_OK && !memcmp(first, c->out.buffer.data, c->out.buffer.bytes);
        if (!ok) snprintf(why, sizeof why, "other bits with %d threads", (int)c->threads);
    }
    describe(c, text);
    if (!ok) check_fail(test, "%s: %s", text, why);
}

/* ---- the tests ------------------------------------------------------------------------------- */

struct kind {
    enum attn_mla_op op;
    enum attn_dtype dtype;
    int64_t d; /* 0: either */
    const char *name;
};

static void run_cases(struct check_test *test, const struct attn_cpu_kernels *table, bool gpu,
                      const struct kind *kind, enum attn_mla_format format)
{
    for (int64_t i = 0; i < check_rounds(table || gpu ? 60 : 20); ++i) {
        if (check_options.only_case >= 0 && check_options.only_case != i) continue;
        struct check_random r = check_case_random(test, i);
        check_pool_reset();
        struct mla_case c = {.op = kind->op, .format = format, .dtype = kind->dtype, .gpu = gpu};
        c.d = kind->d ? kind->d : PICK(&r, 576, 576, 512);
        c.table_of = table;
        check_one(test, &r, &c);
    }
    check_close(test);
}

static void run_kind(const struct check_rung *rung, const struct attn_cpu_kernels *below,
                     const struct kind *kind)
{
    struct check_test test;
    enum attn_mla_format format = kind->op != ATTN_MLA_SPARSE_DECODE
                                      ? (enum attn_mla_format)kind->dtype
                                  : kind->d == 576 ? ATTN_MLA_V32
                                                   : ATTN_MLA_MODEL1;
    const struct attn_mla_kernel *kernel = rung->table.mla[format];
    if (below && kernel == below->mla[format]) return; /* tested there */
    if (check_options.kernel && (!kernel || !strstr(kernel->name, check_options.kernel))) return;
    if (!check_open(&test, "mla", rung->name, attn_dtype_name(kind->dtype), "%s", kind->name))
        return;
    run_cases(&test, kernel ? &rung->table : NULL, false, kind, format);
}

void check_mla(void)
{
    static const struct kind kinds[] = {
        {ATTN_MLA_DECODE, ATTN_BF16, 0, "mla_decode"},
        {ATTN_MLA_DECODE, ATTN_F16, 0, "mla_decode"},
        {ATTN_MLA_DECODE, ATTN_F32, 0, "mla_decode"},
        {ATTN_MLA_DECODE, ATTN_F8, 0, "mla_decode"},
        {ATTN_MLA_SPARSE_DECODE, ATTN_BF16, 576, "mla_sparse_decode v32"},
        {ATTN_MLA_SPARSE_DECODE, ATTN_BF16, 512, "mla_sparse_decode model1"},
        {ATTN_MLA_SPARSE_FWD, ATTN_BF16, 0, "mla_sparse_fwd"},
        {ATTN_MLA_SPARSE_FWD, ATTN_F16, 0, "mla_sparse_fwd"},
        {ATTN_MLA_SPARSE_FWD, ATTN_F32, 0, "mla_sparse_fwd"},
    };
    const struct check_rung *rungs;
    int n = check_rungs(&rungs);
    for (int i = 0; i < n; ++i)
        for (size_t k = 0; k < sizeof kinds / sizeof *kinds; ++k)
            run_kind(&rungs[i], i > 0 ? &rungs[i - 1].table : NULL, &kinds[k]);
    for (size_t k = 0; k < 2 && check_gpu(); ++k) {
        struct check_test test;
        if (check_open(&test, "mla", "sm90", attn_dtype_name(kinds[k].dtype), "%s", kinds[k].name))
            run_cases(&test, NULL, true, &kinds[k], (enum attn_mla_format)kinds[k].dtype);
    }
}
