/* SPDX-License-Identifier: MIT
 *
 * Random problems of mha_fwd: first the numbers (sizes, lengths, places), then the tensors.
 */
#include "check_case.h"
#include "check_gpu.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

const char *const mha_argument_name[MHA_ARGUMENT_COUNT] = {
#define X(name) #name,
    MHA_ARGUMENTS(X)
#undef X
};

const char *const mha_feature_name[MHA_FEATURE_COUNT] = {
#define X(name) #name,
    MHA_FEATURES(X)
#undef X
};

const DLTensor **mha_argument_slot(struct attn_mha_fwd_args *args, int argument)
{
    static const size_t offsets[MHA_ARGUMENT_COUNT] = {
#define X(name) offsetof(struct attn_mha_fwd_args, name),
        MHA_ARGUMENTS(X)
#undef X
    };
    return (const DLTensor **)(void *)((char *)args + offsets[argument]);
}

static bool with(const struct mha_case *c, unsigned feature)
{
    return (c->features & feature) != 0;
}

/* ---- numbers --------------------------------------------------------------------------------- */

/* Drops what the interface does not let stand together and adds what a feature rests on. */
static unsigned consistent(unsigned f, enum attn_dtype dtype)
{
    if (f & (WITH_rotary | WITH_append_packed)) f |= WITH_append;
    if (f & WITH_append) f |= WITH_seqused_k;
    if (f & WITH_append) f &= ~(unsigned)WITH_packed_k;
    if (f & WITH_packed_k) f &= ~(unsigned)(WITH_paged | WITH_batch_idx);
    if (f & WITH_cp) f &= ~(unsigned)(WITH_window | WITH_chunk);
    if (dtype == ATTN_F8) f &= ~(unsigned)WITH_qv;
    if (dtype != ATTN_F8) f &= ~(unsigned)WITH_descale;
    return f;
}

static void choose_widths(struct check_random *r, struct mha_case *c)
{
    static const uint8_t groups[] = {1, 1, 2, 3, 4, 5, 8, 9};
    int64_t unit = c->dtype == ATTN_F8 ? 16 : 8;
    c->h_k = PICK(r, 1, 1, 2, 3);
    c->h_q = c->h_k * groups[random_range(r, 0, 7)];
    c->d_qk = random_percent(r, 60) ? PICK(r, 32, 64, 64, 128)
                                    : unit * random_range(r, 1, 160 / unit);
    c->d_v = random_percent(r, 70) ? c->d_qk : unit * random_range(r, 1, 160 / unit);
    if (random_percent(r, 6)) c->d_qk = unit * random_range(r, 1, 512 / unit);
    if (random_percent(r, 6)) c->d_v = unit * random_range(r, 1, 512 / unit);
    if (with(c, WITH_rotary) && c->d_qk < 16) c->d_qk = 16;
}

/* How long things may be: mostly short, with a bound on the oracle's work. */
static void choose_lengths(struct check_random *r, struct mha_case *c)
{
    double budget = check_options.quick ? 4e6 : 2.5e7;
    c->s_q = random_edge(r, random_percent(r, 40) ? 4 : 150);
    c->s_k = random_edge(r, random_percent(r, 8) ? 1100 : random_percent(r, 50) ? 80 : 350);
    while ((double)(c->b * c->h_q * (c->d_qk + c->d_v)) * (double)(c->s_q * c->s_k) > budget)
        *(c->s_q > c->s_k / 4 ? &c->s_q : &c->s_k) /= 2;
}

static void choose_queries(struct check_random *r, struct mha_case *c)
{
    int64_t longest = 0, at = 0;
    for (int64_t b = 0; b < c->b; ++b) {
        struct mha_seq *s = &c->seq[b];
        s->q_space = with(c, WITH_packed_q) ? random_edge(r, c->s_q) : c->s_q;
        s->q_len = with(c, WITH_seqused_q) ? random_edge(r, s->q_space) : s->q_space;
        s->q_off = with(c, WITH_packed_q) ? at : 0;
        at += s->q_space;
        longest = s->q_space > longest ? s->q_space : longest;
    }
    c->t_q = at;
    if (!with(c, WITH_packed_q)) return;
    if (random_percent(r, 20)) c->t_q += random_range(r, 0, 5); /* rows of no sequence */
    c->s_q = longest + (random_percent(r, 30) ? random_range(r, 0, 1000) : 0);
}

/* Lengths of one sequence within its space. */
static void choose_sequence(struct check_random *r, const struct mha_case *c, struct mha_seq *s,
                            int64_t space)
{
    s->k_space = space;
    s->new_len = with(c, WITH_append_packed) ? random_edge(r, c->s_new) : c->s_new;
    s->k_cached = with(c, WITH_seqused_k) ? random_edge(r, space - s->new_len) : space;
    s->pad = with(c, WITH_leftpad) ? random_edge(r, s->k_cached) : 0;
    if (s->pad && random_percent(r, 60)) s->pad = random_range(r, 0, s->pad < 40 ? s->pad : 40);
    if (with(c, WITH_leftpad) && random_percent(r, 5)) s->pad = s->k_cached + s->new_len / 2;
}

static void choose_keys(struct check_random *r, struct mha_case *c)
{
    if (with(c, WITH_append)) {
        c->s_new = random_edge(r, random_percent(r, 50) ? 3 : 40);
        int64_t least = c->s_new > c->s_q ? c->s_new : c->s_q; /* s_q within the cache is a rule */
        if (c->s_k < least) c->s_k = least;
    }
    if (with(c, WITH_paged)) {
        c->page = PICK(r, 1, 2, 3, 7, 16, 16, 48, 64, 100, 256);
        c->max_pages = (c->s_k + c->page - 1) / c->page;
        c->s_k = c->max_pages * c->page;
    }
    int64_t at = 0, at_new = 0, longest = 0;
    for (int64_t b = 0; b < c->b; ++b) {
        struct mha_seq *s = &c->seq[b];
        int64_t segment = with(c, WITH_packed_k) ? random_edge(r, c->s_k) : c->s_k;
        choose_sequence(r, c, s, segment);
        s->k_off = with(c, WITH_packed_k) ? at : 0;
        s->new_off = with(c, WITH_append_packed) ? at_new : 0;
        at += segment;
        at_new += s->new_len;
        longest = segment > longest ? segment : longest;
    }
    c->t_k = at;
    c->t_new = at_new;
    if (with(c, WITH_append_packed)) c->s_new = at_new; /* all that a packed tensor's shape says */
    if (with(c, WITH_packed_k)) {
        if (random_percent(r, 20)) c->t_k += random_range(r, 0, 5);
        c->s_k = longest + (random_percent(r, 30) ? random_range(r, 0, 1000) : 0);
    }
}

static void choose_rows(struct check_random *r, struct mha_case *c)
{
    c->rows = c->b;
    for (int64_t b = 0; b < c->b; ++b) c->seq[b].row = b;
    if (!with(c, WITH_batch_idx)) return;
    c->rows = c->b + random_range(r, 0, 2);
    bool repeat = !with(c, WITH_append) && random_percent(r, 40);
    for (int64_t b = 0; b < c->b; ++b) {
        int64_t row = random_range(r, 0, c->rows - 1), a = 0;
        while (!repeat && a < b) { /* distinct rows: where an append writes, nobody else reads */
            bool taken = c->seq[a].row == row;
            row = taken ? (row + 1) % c->rows : row;
            a = taken ? 0 : a + 1;
        }
        c->seq[b].row = row;
    }
    c->shared = repeat;
}

static void choose_mask(struct check_random *r, struct mha_case *c)
{
    struct attn_mha_fwd_args *a = &c->args;
    int64_t reach = c->s_k < 400 ? c->s_k : 400;
    a->causal = with(c, WITH_causal);
    a->window_left = a->window_right = -1;
    if (with(c, WITH_window)) {
        a->window_left = random_percent(r, 25) ? -1 : random_edge(r, reach + 2);
        a->window_right = random_percent(r, 25) ? -1 : random_edge(r, c->s_q + 2);
    } else if (random_percent(r, 10)) { /* unlimited in other words */
        a->window_left = PICK(r, -2, INT64_MIN);
        a->window_right = PICK(r, -5, INT64_MIN);
    }
    a->attention_chunk = with(c, WITH_chunk) ? 1 + random_edge(r, reach + 1) : PICK(r, 0, 0, -1);
    a->softcap = with(c, WITH_softcap) ? (double)PICK(r, 1, 5, 30, 50) : (double)PICK(r, 0, 0, -1);
    a->cp_world_size = with(c, WITH_cp) ? (int32_t)random_range(r, 2, 4) : (int32_t)PICK(r, 0, 1);
    a->cp_rank = with(c, WITH_cp) ? (int32_t)random_range(r, 0, a->cp_world_size - 1) : 0;
    for (int64_t b = 0; b < c->b; ++b) {
        /* Of n global keys rank k holds those with j W + k < n; off by some on purpose. */
        int64_t n = mha_keys(c, b) * a->cp_world_size + random_range(r, -3, 3);
        c->seq[b].total = n < 0 ? 0 : n;
    }
}

/* Rotary positions: the table is as long as the last one needs, or longer. */
static void choose_rotary(struct check_random *r, struct mha_case *c)
{
    if (!with(c, WITH_rotary)) return;
    int64_t need = with(c, WITH_paged) ? c->s_k : 0;
    bool given = random_percent(r, 40);
    for (int64_t b = 0; b < c->b; ++b) {
        struct mha_seq *s = &c->seq[b];
        s->rotary = given ? random_range(r, 0, 50) : s->k_cached;
        int64_t rows = s->new_len > s->q_len ? s->new_len : s->q_len;
        need = s->rotary + rows > need ? s->rotary + rows : need;
    }
    c->ro = need + (random_percent(r, 50) ? 0 : random_range(r, 0, 9));
    c->r = 16 * random_range(r, 1, c->d_qk / 16);
    c->args.rotary_interleaved = random_percent(r, 50);
    if (given) c->args.seqlens_rotary = &c->tensor[ARG_seqlens_rotary].t;
}

/* ---- tensors --------------------------------------------------------------------------------- */

static DLDataType value_type(enum attn_dtype t)
{
    static const DLDataType types[ATTN_DTYPES] = {{kDLFloat, 32, 1},
                                                  {kDLBfloat, 16, 1},
                                                  {kDLFloat, 16, 1},
                                                  {kDLFloat8_e4m3fn, 8, 1}};
    return types[t];
}

static const DLDataType int32_type = {kDLInt, 32, 1};

/* Strides of a tensor whose axes but the last lie in memory in this order, slowest first. */
static int64_t set_strides(struct check_random *r, struct mha_tensor *t, bool strided)
{
    int order[5], n = t->t.ndim;
    for (int i = 0; i < n; ++i) order[i] = i;
    if (strided && n >= 3 && random_percent(r, 60)) { /* heads outside rows, as torch transposes */
        order[n - 3] = n - 2;
        order[n - 2] = n - 3;
    }
    int64_t step = 1, span = 1;
    for (int i = n - 1; i >= 0; --i) {
        int axis = order[i];
        t->strides[axis] = step;
        span += step * (t->shape[axis] - 1);
        step *= t->shape[axis] > 0 ? t->shape[axis] : 1;
        if (strided && n >= 2 && i == n - 1) step += PICK(r, 0, 3, 8, 24);
        if (strided && i < n - 1) step += random_range(r, 0, 2) * t->strides[axis];
    }
    for (int i = 0; i < n; ++i)
        if (t->shape[i] == 0) return 0;
    return span;
}

void mha_tensor_make(struct check_random *r, struct mha_case *c, int argument, DLDataType type,
                     int ndim, const int64_t *shape, bool strided)
{
    struct mha_tensor *t = &c->tensor[argument];
    int64_t bytes = type.bits / 8;
    memcpy(t->shape, shape, (size_t)ndim * sizeof *shape);
    t->t = (DLTensor){.device = {kDLCPU, 0}, .ndim = ndim, .dtype = type, .shape = t->shape};
    int64_t span = set_strides(r, t, strided);
    t->t.strides = strided || random_percent(r, 50) ? t->strides : NULL;
    t->buffer = check_buffer((size_t)(span * bytes), (size_t)bytes);
    int64_t offset = random_percent(r, 10) ? bytes * random_range(r, 1, 9) : 0;
    t->t.data = span ? t->buffer.data - offset : NULL;
    t->t.byte_offset = span ? (uint64_t)offset : 0;
    *mha_argument_slot(&c->args, argument) = &t->t;
}

/* A tensor of rows of the case's dtype, all of it NaN. */
static void make_rows(struct check_random *r, struct mha_case *c, int argument, bool packed,
                      int64_t n, int64_t s, int64_t h, int64_t d)
{
    const int64_t shape[4] = {n, s, h, d};
    mha_tensor_make(r, c, argument, value_type(c->dtype), packed ? 3 : 4,
                    packed ? shape + 1 : shape, with(c, WITH_strided));
    struct mha_tensor *t = &c->tensor[argument];
    t->dtype = c->dtype;
    check_fill_nan(c->dtype, t->buffer.data, (int64_t)t->buffer.bytes / attn_dtype_bytes(c->dtype));
}

static int32_t *make_index(struct check_random *r, struct mha_case *c, int argument, int64_t n)
{
    mha_tensor_make(r, c, argument, int32_type, 1, &n, false);
    return (int32_t *)(void *)c->tensor[argument].buffer.data;
}

static void make_indices(struct check_random *r, struct mha_case *c)
{
    const struct mha_seq *s = c->seq;
    int64_t b = c->b;
    int32_t *p;
    if (with(c, WITH_packed_q)) {
        p = make_index(r, c, ARG_cu_seqlens_q, b + 1);
        for (int64_t i = 0; i < b; ++i) p[i] = (int32_t)s[i].q_off;
        p[b] = b > 0 ? (int32_t)(s[b - 1].q_off + s[b - 1].q_space) : 0;
        c->args.max_seqlen_q = c->s_q;
    }
    if (with(c, WITH_packed_k)) {
        p = make_index(r, c, ARG_cu_seqlens_k, b + 1);
        for (int64_t i = 0; i < b; ++i) p[i] = (int32_t)s[i].k_off;
        p[b] = b > 0 ? (int32_t)(s[b - 1].k_off + s[b - 1].k_space) : 0;
        c->args.max_seqlen_k = c->s_k;
    }
    if (with(c, WITH_append_packed)) {
        p = make_index(r, c, ARG_cu_seqlens_k_new, b + 1);
        for (int64_t i = 0; i < b; ++i) p[i] = (int32_t)s[i].new_off;
        p[b] = (int32_t)c->t_new;
    }
#define PER_SEQUENCE(argument, condition, value)                                                   \
    if (condition) {                                                                               \
        p = make_index(r, c, argument, b);                                                         \
        for (int64_t i = 0; i < b; ++i) p[i] = (int32_t)(value);                                   \
    }
    PER_SEQUENCE(ARG_seqused_q, with(c, WITH_seqused_q), s[i].q_len)
    PER_SEQUENCE(ARG_seqused_k, with(c, WITH_seqused_k), s[i].k_cached)
    PER_SEQUENCE(ARG_kv_batch_idx, with(c, WITH_batch_idx), s[i].row)
    PER_SEQUENCE(ARG_leftpad_k, with(c, WITH_leftpad), s[i].pad)
    PER_SEQUENCE(ARG_seqlens_rotary, c->args.seqlens_rotary != NULL, s[i].rotary)
    PER_SEQUENCE(ARG_cp_tot_seqused_k, with(c, WITH_cp), s[i].total)
#undef PER_SEQUENCE
}

/* Live entries name pages in random order; the others are wild. */
static void make_pages(struct check_random *r, struct mha_case *c)
{
    if (!with(c, WITH_paged)) return;
    c->num_pages = c->rows * c->max_pages + random_range(r, 0, 3);
    if (c->num_pages == 0) c->num_pages = random_range(r, 0, 2);
    const int64_t shape[2] = {c->rows, c->max_pages};
    mha_tensor_make(r, c, ARG_page_table, int32_type, 2, shape, with(c, WITH_strided));
    struct mha_tensor *t = &c->tensor[ARG_page_table];
    int32_t *all = (int32_t *)(void *)t->buffer.data;
    for (size_t i = 0; i < t->buffer.bytes / 4; ++i)
        all[i] = (int32_t)PICK(r, -1, INT32_MAX, INT32_MIN);
    int64_t *order = check_scratch((size_t)(c->num_pages + 1) * sizeof *order);
    for (int64_t i = 0; i < c->num_pages; ++i) order[i] = i;
    for (int64_t i = c->num_pages - 1; i > 0; --i) {
        int64_t j = random_range(r, 0, i), x = order[i];
        order[i] = order[j];
        order[j] = x;
    }
    bool prefix = !with(c, WITH_append) && random_percent(r, 30); /* rows share their first pages */
    c->shared = c->shared || prefix;
    for (int64_t b = 0; b < c->b; ++b) {
        const struct mha_seq *s = &c->seq[b];
        int64_t end = s->k_cached + s->new_len;
        int64_t begin = s->pad < s->k_cached || s->new_len == 0 ? s->pad : s->k_cached;
        for (int64_t n = begin / c->page; n * c->page < end; ++n) {
            int64_t row = prefix && n < 2 ? 0 : s->row;
            int32_t page = (int32_t)order[row * c->max_pages + n];
            memcpy(tensor_at(t, s->row, n, 0, 0), &page, 4);
        }
    }
}

static void fill_sequence(struct check_random *r, struct mha_case *c, int64_t b)
{
    const struct mha_seq *s = &c->seq[b];
    for (int64_t h = 0; h < c->h_q; ++h) {
        for (int64_t i = 0; i < s->q_len; ++i) {
            check_fill_normal(r, c->dtype, mha_q_at(c, ARG_q, b, i, h), c->d_qk, 1);
            if (!with(c, WITH_qv)) continue;
            check_fill_normal(r, c->dtype, mha_q_at(c, ARG_qv, b, i, h), c->d_v, 0.5f);
        }
    }
    for (int64_t h = 0; h < c->h_k; ++h) {
        for (int64_t x = s->pad; x < s->k_cached; ++x) {
            check_fill_normal(r, c->dtype, mha_cache_at(c, ARG_k, b, x, h), c->d_qk, 1);
            check_fill_normal(r, c->dtype, mha_cache_at(c, ARG_v, b, x, h), c->d_v, 1);
        }
        for (int64_t t = 0; t < s->new_len; ++t) {
            check_fill_normal(r, c->dtype, mha_new_at(c, ARG_k_new, b, t, h), c->d_qk, 1);
            check_fill_normal(r, c->dtype, mha_new_at(c, ARG_v_new, b, t, h), c->d_v, 1);
        }
    }
}

void mha_case_hide(struct mha_case *c, float value)
{
    c->hidden = true;
    if (c->shared) return;
    for (int64_t b = 0; b < c->b; ++b) {
        const struct mha_seq *s = &c->seq[b];
        for (int64_t j = 0; j < s->k_cached - s->pad; ++j) {
            bool seen = false;
            for (int64_t i = 0; i < s->q_len && !seen; ++i) seen = mha_visible(c, b, i, j);
            for (int64_t h = 0; h < c->h_k && !seen; ++h) {
                char *k = mha_cache_at(c, ARG_k, b, s->pad + j, h);
                char *v = mha_cache_at(c, ARG_v, b, s->pad + j, h);
                for (int64_t e = 0; e < c->d_qk; ++e) attn_store(c->dtype, k, e, value);
                for (int64_t e = 0; e < c->d_v; ++e) attn_store(c->dtype, v, e, value);
            }
        }
    }
}

/* Tables of few bits, so that products and sums round the same whatever their order. */
static void make_rotary(struct check_random *r, struct mha_case *c)
{
    if (!with(c, WITH_rotary)) return;
    const int64_t shape[2] = {c->ro, c->r / 2};
    const int arguments[2] = {ARG_rotary_cos, ARG_rotary_sin};
    for (int a = 0; a < 2; ++a) {
        mha_tensor_make(r, c, arguments[a], value_type(c->dtype), 2, shape, false);
        char *data = c->tensor[arguments[a]].buffer.data;
        check_fill_nan(c->dtype, data, c->ro * c->r / 2);
        for (int64_t b = 0; b < c->b; ++b) {
            const struct mha_seq *s = &c->seq[b];
            int64_t rows = s->new_len > s->q_len ? s->new_len : s->q_len;
            for (int64_t i = s->rotary * c->r / 2; i < (s->rotary + rows) * c->r / 2; ++i)
                attn_store(c->dtype, data, i, (float)random_range(r, -8, 8) / 8);
        }
    }
}

static void make_scalars(struct check_random *r, struct mha_case *c)
{
    const int64_t heads[2] = {c->b, c->h_k};
    const int descales[3] = {ARG_q_descale, ARG_k_descale, ARG_v_descale};
    for (int i = 0; i < 3 && with(c, WITH_descale); ++i) {
        if (random_percent(r, 20)) continue;
        mha_tensor_make(r, c, descales[i], value_type(ATTN_F32), 2, heads, with(c, WITH_strided));
        struct mha_tensor *t = &c->tensor[descales[i]];
        if (random_percent(r, 30) && t->t.strides) t->strides[1] = 0; /* one value broadcast */
        for (int64_t b = 0; b < c->b; ++b)
            for (int64_t h = 0; h < c->h_k; ++h) {
                float x = (float)random_range(r, 1, 12) / 8;
                memcpy(tensor_at(t, b, h, 0, 0), &x, 4);
            }
    }
    if (with(c, WITH_sinks)) {
        enum attn_dtype t = (enum attn_dtype)PICK(r, ATTN_F32, ATTN_BF16, ATTN_F16);
        mha_tensor_make(r, c, ARG_sinks, value_type(t), 1, &c->h_q, with(c, WITH_strided));
        struct mha_tensor *sinks = &c->tensor[ARG_sinks];
        sinks->dtype = t;
        for (int64_t h = 0; h < c->h_q; ++h)
            check_fill_normal(r, t, tensor_at(sinks, h, 0, 0, 0), 1, 2);
    }
}

static double score(const struct mha_case *c, int64_t b, int64_t i, int64_t h, int64_t x)
{
    const char *q = mha_q_at(c, ARG_q, b, i, h);
    const char *k = mha_cache_at(c, ARG_k, b, x, h / (c->h_q / c->h_k));
    double sum = 0;
    for (int64_t e = 0; e < c->d_qk; ++e)
        sum += (double)attn_load(c->dtype, q, e) * (double)attn_load(c->dtype, k, e);
    return sum * c->args.softmax_scale;
}

/* Whether every row of key head hk holds key x's weight in fp16, of which the row's largest is 1:
 * from 2^-20 on, four bits above fp16's least number, below half of which a weight is 0.  No mask,
 * one cache. */
static bool weight_in_fp16(const struct mha_case *c, int64_t b, int64_t hk, int64_t x)
{
    const struct mha_seq *s = &c->seq[b];
    int64_t group = c->h_q / c->h_k;
    for (int64_t h = hk * group; h < (hk + 1) * group; ++h) {
        double sink = -INFINITY;
        const struct mha_tensor *sinks = &c->tensor[ARG_sinks];
        if (with(c, WITH_sinks)) sink = attn_load(sinks->dtype, tensor_at(sinks, h, 0, 0, 0), 0);
        for (int64_t i = 0; i < s->q_len; ++i) {
            double largest = sink;
            for (int64_t j = s->pad; j < s->k_cached; ++j)
                largest = fmax(largest, score(c, b, i, h, j));
            if (score(c, b, i, h, x) - largest < log(0x1p-20)) return false;
        }
    }
    return true;
}

/* Values that break careless arithmetic.  Kinds 4 and up give NaN or infinite rows. */
static void make_pathology(struct check_random *r, struct mha_case *c)
{
    if (!with(c, WITH_pathological) || c->live_rows == 0) return;
    bool plain = !(c->features & (WITH_causal | WITH_window | WITH_chunk | WITH_cp | WITH_append |
                                  WITH_softcap | WITH_qv));
    int most = c->dtype == ATTN_F8 ? 3 : plain ? 7 : 5; /* e4m3fn has no infinities */
    c->pathology = (int)random_range(r, 1, most);
    int64_t b = random_range(r, 0, c->b - 1);
    const struct mha_seq *s = &c->seq[b];
    if (c->pathology == 1) c->args.softmax_scale *= (double)PICK(r, 30, 200, -30);
    if (c->pathology == 2) c->args.softmax_scale = (double)PICK(r, 0, 0, 1) * 1e-30;
    if (s->q_len == 0 || mha_keys(c, b) == 0) return;
    int64_t i = random_range(r, 0, s->q_len - 1), h = random_range(r, 0, c->h_q - 1);
    int64_t at = random_range(r, 0, c->d_qk - 1);
    if (c->pathology == 3) { /* denormals, or the smallest normals beside them */
        static const float tiny[ATTN_DTYPES] = {1e-39f, 1e-39f, 3e-6f, 0x1p-8f};
        for (int64_t t = 0; t < s->q_len; ++t)
            check_fill_normal(r, c->dtype, mha_q_at(c, ARG_q, b, t, h), c->d_qk, tiny[c->dtype]);
        for (int64_t x = s->pad; x < s->k_cached; ++x)
            if (!c->shared && x % 2 == 0)
                check_fill_normal(r, c->dtype, mha_cache_at(c, ARG_v, b, x, 0), c->d_v,
                                  tiny[c->dtype]);
        c->hidden = true;
    }
    float bad = (float[]){INFINITY, -INFINITY, NAN}[random_range(r, 0, 2)];
    if (c->pathology == 4) attn_store(c->dtype, mha_q_at(c, ARG_q, b, i, h), at, bad);
    if (s->pad >= s->k_cached || c->shared) return;
    int64_t x = random_range(r, s->pad, s->k_cached - 1), hk = h / (c->h_q / c->h_k);
    if (c->pathology == 5) attn_store(c->dtype, mha_cache_at(c, ARG_k, b, x, hk), at, -INFINITY);
    if (c->pathology == 6) attn_store(c->dtype, mha_cache_at(c, ARG_k, b, x, hk), at, bad);
    if (c->pathology != 7) return;
    /* A weight that fp16 rounds to 0 makes NaN of an infinite value, in plain fp16 and in any
     * kernel whose weights are fp16, where the exact result is infinite: there the value is NaN at
     * once, on machines with a GPU, whose kernels those are. */
    if (c->dtype == ATTN_F16 && check_gpu() && !weight_in_fp16(c, b, hk, x)) bad = NAN;
    attn_store(c->dtype, mha_cache_at(c, ARG_v, b, x, hk), random_range(r, 0, c->d_v - 1), bad);
}

void mha_case_make(struct check_random *r, enum attn_dtype dtype, unsigned features,
                   struct mha_case *c)
{
    memset(c, 0, sizeof *c);
    c->dtype = dtype;
    c->out_dtype = attn_dtype_out(dtype);
    c->features = consistent(features, dtype);
    c->b = random_percent(r, 4) ? 0 : random_range(r, 1, random_percent(r, 20) ? CASE_BATCH : 3);
    c->args.size = sizeof c->args;
    c->args.threads = 1;
    c->args.pack_gqa = (int32_t)random_range(r, -1, 1);
    c->args.sm_margin = (int32_t)random_range(r, 0, 2);
    choose_widths(r, c);
    choose_lengths(r, c);
    choose_queries(r, c);
    choose_keys(r, c);
    choose_rows(r, c);
    choose_mask(r, c);
    choose_rotary(r, c);
    c->args.softmax_scale = pow((double)(c->d_qk + (with(c, WITH_qv) ? c->d_v : 0)), -0.5) *
                            (double)PICK(r, 1, 1, 1, 2, 4, -1);
    c->args.num_splits = with(c, WITH_splits) ? (int32_t)PICK(r, 0, 2, 3, 5, 8, 17, 100, 256) : 1;
    for (int64_t b = 0; b < c->b; ++b) {
        c->seq[b].first_row = c->live_rows;
        c->live_rows += c->seq[b].q_len * c->h_q;
    }
    /* Results of splits take at most 128 MiB: a GPU's copy of a case lies in an arena of 1 GiB. */
    int64_t most = ((int64_t)1 << 25) / (c->t_q * c->h_q * (c->d_v + 1) + 1);
    if (c->args.num_splits > most) c->args.num_splits = most > 1 ? (int32_t)most : 1;

    make_indices(r, c);
    make_pages(r, c);
    bool packed_q = with(c, WITH_packed_q), packed_k = with(c, WITH_packed_k);
    bool packed_new = with(c, WITH_append_packed);
    int64_t rows_q = packed_q ? c->t_q : c->s_q, n = c->rows, s_k = packed_k ? c->t_k : c->s_k;
    if (with(c, WITH_paged)) n = c->num_pages, s_k = c->page;
    make_rows(r, c, ARG_q, packed_q, c->b, rows_q, c->h_q, c->d_qk);
    if (with(c, WITH_qv)) make_rows(r, c, ARG_qv, packed_q, c->b, rows_q, c->h_q, c->d_v);
    make_rows(r, c, ARG_k, packed_k, n, s_k, c->h_k, c->d_qk);
    make_rows(r, c, ARG_v, packed_k, n, s_k, c->h_k, c->d_v);
    if (with(c, WITH_append)) {
        int64_t s = packed_new ? c->t_new : c->s_new;
        make_rows(r, c, ARG_k_new, packed_new, c->b, s, c->h_k, c->d_qk);
        make_rows(r, c, ARG_v_new, packed_new, c->b, s, c->h_k, c->d_v);
    }
    make_rotary(r, c);
    make_scalars(r, c);
    const int64_t out[4] = {c->b, rows_q, c->h_q, c->d_v}, lse[3] = {c->b, c->h_q, rows_q};
    mha_tensor_make(r, c, ARG_out, value_type(c->out_dtype), packed_q ? 3 : 4, out + packed_q,
                    with(c, WITH_strided));
    mha_tensor_make(r, c, ARG_lse, value_type(ATTN_F32), packed_q ? 2 : 3, lse + packed_q,
                    with(c, WITH_strided));
    for (int64_t b = 0; b < c->b; ++b) fill_sequence(r, c, b);
    bool hide = random_percent(r, 50);
    make_pathology(r, c);
    if (hide || c->hidden) mha_case_hide(c, NAN); /* as good as absent: poison, too */

    const struct check_buffer *k = &c->tensor[ARG_k].buffer, *v = &c->tensor[ARG_v].buffer;
    c->k_before = memcpy(check_scratch(k->bytes), k->data, k->bytes);
    c->v_before = memcpy(check_scratch(v->bytes), v->data, v->bytes);
    for (int a = 0; a < MHA_ARGUMENT_COUNT; ++a) {
        bool written = a == ARG_out || a == ARG_lse ||
                       (with(c, WITH_append) && (a == ARG_k || a == ARG_v));
        if (c->tensor[a].buffer.pages && !written) check_buffer_protect(&c->tensor[a].buffer, true);
    }
}
