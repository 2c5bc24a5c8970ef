/* SPDX-License-Identifier: MIT
 *
 * The oracle of a mha_fwd case: addresses, the mask, rotary, the append and every live row, all
 * taken from the definition and from nothing in the library; and the comparison of what a run
 * left behind, to the last byte of every tensor it may write.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "check_case.h"

static bool with(const struct mha_case *c, unsigned feature)
{
    return (c->features & feature) != 0;
}

/* ---- addresses ------------------------------------------------------------------------------- */

char *tensor_at(const struct mha_tensor *t, int64_t i0, int64_t i1, int64_t i2, int64_t i3)
{
    const int64_t at[4] = {i0, i1, i2, i3};
    int64_t offset = 0;
    for (int i = 0; i < t->t.ndim && i < 4; ++i) offset += at[i] * t->strides[i];
    return t->buffer.data + offset * (t->t.dtype.bits / 8);
}

/* Row s of entry i, head h: packed tensors have no axis for i. */
static char *row_at(const struct mha_tensor *t, int64_t i, int64_t s, int64_t h)
{
    return t->t.ndim == 3 ? tensor_at(t, s, h, 0, 0) : tensor_at(t, i, s, h, 0);
}

char *mha_q_at(const struct mha_case *c, int argument, int64_t b, int64_t i, int64_t h)
{
    return row_at(&c->tensor[argument], b, c->seq[b].q_off + i, h);
}

char *mha_out_at(const struct mha_case *c, int64_t b, int64_t i, int64_t h)
{
    return mha_q_at(c, ARG_out, b, i, h);
}

float *mha_lse_at(const struct mha_case *c, int64_t b, int64_t i, int64_t h)
{
    const struct mha_tensor *t = &c->tensor[ARG_lse];
    int64_t s = c->seq[b].q_off + i;
    return (float *)(void *)(t->t.ndim == 2 ? tensor_at(t, h, s, 0, 0) : tensor_at(t, b, h, s, 0));
}

char *mha_cache_at(const struct mha_case *c, int argument, int64_t b, int64_t x, int64_t h)
{
    const struct mha_seq *s = &c->seq[b];
    const struct mha_tensor *t = &c->tensor[argument];
    if (!with(c, WITH_paged)) return row_at(t, s->row, s->k_off + x, h);
    int32_t page;
    memcpy(&page, tensor_at(&c->tensor[ARG_page_table], s->row, x / c->page, 0, 0), 4);
    return tensor_at(t, page, x % c->page, h, 0);
}

char *mha_new_at(const struct mha_case *c, int argument, int64_t b, int64_t t, int64_t h)
{
    return row_at(&c->tensor[argument], b, c->seq[b].new_off + t, h);
}

/* ---- the mask -------------------------------------------------------------------------------- */

int64_t mha_keys(const struct mha_case *c, int64_t b)
{
    const struct mha_seq *s = &c->seq[b];
    return s->k_cached - s->pad + s->new_len;
}

bool mha_visible(const struct mha_case *c, int64_t b, int64_t i, int64_t j)
{
    const struct attn_mha_fwd_args *a = &c->args;
    const struct mha_seq *s = &c->seq[b];
    int64_t keys = mha_keys(c, b), p = i + keys - s->q_len;
    if (j < 0 || j >= keys) return false;
    if (a->cp_world_size > 1) {
        int64_t global = j * a->cp_world_size + a->cp_rank;
        return global < s->total && (!a->causal || global <= i + s->total - s->q_len);
    }
    int64_t right = a->causal ? 0 : a->window_right;
    if (a->window_left >= 0 && j < p - a->window_left) return false;
    if (right >= 0 && j > p + right) return false;
    if (a->attention_chunk > 0) {
        int64_t n = a->attention_chunk, chunk = p >= 0 ? p / n : -((-p + n - 1) / n);
        if (j < chunk * n || j >= (chunk + 1) * n) return false;
    }
    return true;
}

/* Whether queries advance through the rotary table: by the normal form of the mask. */
static bool queries_advance(const struct mha_case *c)
{
    const struct attn_mha_fwd_args *a = &c->args;
    if (a->causal) return true;
    int64_t left = a->window_left, right = a->window_right;
    if (left >= c->s_k - 1) left = -1;
    if (right >= c->s_q - 1) right = -1;
    return left >= 0 || right >= 0 || a->attention_chunk > 0;
}

/* ---- the answer ------------------------------------------------------------------------------ */

/* y = x rotated as position `at` of the tables, rounded to the dtype. */
static void rotate(const struct mha_case *c, const char *x, int64_t at, char *y)
{
    enum attn_dtype t = c->dtype;
    int64_t half = c->r / 2;
    const char *cosines = c->tensor[ARG_rotary_cos].buffer.data;
    const char *sines = c->tensor[ARG_rotary_sin].buffer.data;
    memcpy(y, x, (size_t)(c->d_qk * attn_dtype_bytes(t)));
    for (int64_t m = 0; m < half; ++m) {
        bool pairs = c->args.rotary_interleaved != 0;
        int64_t i = pairs ? 2 * m : m, j = pairs ? 2 * m + 1 : m + half;
        float cosine = attn_load(t, cosines, at * half + m),
              sine = attn_load(t, sines, at * half + m);
        float u = attn_load(t, x, i), v = attn_load(t, x, j);
        attn_store(t, y, i, u * cosine - v * sine);
        attn_store(t, y, j, u * sine + v * cosine);
    }
}

static void append(const struct mha_case *c, struct mha_answer *answer)
{
    int64_t bytes = attn_dtype_bytes(c->dtype);
    const char *k = c->tensor[ARG_k].buffer.data, *v = c->tensor[ARG_v].buffer.data;
    for (int64_t b = 0; b < c->b; ++b) {
        const struct mha_seq *s = &c->seq[b];
        for (int64_t t = 0; t < s->new_len; ++t) {
            for (int64_t h = 0; h < c->h_k; ++h) {
                char *to = answer->k_after + (mha_cache_at(c, ARG_k, b, s->k_cached + t, h) - k);
                const char *from = mha_new_at(c, ARG_k_new, b, t, h);
                if (with(c, WITH_rotary))
                    rotate(c, from, s->rotary + t, to);
                else
                    memcpy(to, from, (size_t)(c->d_qk * bytes));
                to = answer->v_after + (mha_cache_at(c, ARG_v, b, s->k_cached + t, h) - v);
                memcpy(to, mha_new_at(c, ARG_v_new, b, t, h), (size_t)(c->d_v * bytes));
            }
        }
    }
}

static double descale(const struct mha_case *c, int argument, int64_t b, int64_t h)
{
    float x = 1;
    const struct mha_tensor *t = &c->tensor[argument];
    if (t->buffer.pages) memcpy(&x, tensor_at(t, b, h, 0, 0), 4);
    return x;
}

/* Rows of one sequence and KV head. */
static void answer_head(const struct mha_case *c, struct mha_answer *answer, int64_t b, int64_t hk)
{
    const struct mha_seq *s = &c->seq[b];
    int64_t keys = mha_keys(c, b), group = c->h_q / c->h_k;
    const char *k_data = c->tensor[ARG_k].buffer.data, *v_data = c->tensor[ARG_v].buffer.data;
    struct rows64 k = rows64_make(keys, c->d_qk), v = rows64_make(keys, c->d_v);
    struct rows64 q = rows64_make(1, c->d_qk), qv = rows64_make(1, c->d_v);
    int32_t *visible = check_scratch((size_t)keys * sizeof *visible);
    char *rotated = check_scratch((size_t)c->d_qk * 4);
    for (int64_t j = 0; j < keys; ++j) {
        int64_t x = s->pad + j;
        rows64_set(&k, j, c->dtype, answer->k_after + (mha_cache_at(c, ARG_k, b, x, hk) - k_data));
        rows64_set(&v, j, c->dtype, answer->v_after + (mha_cache_at(c, ARG_v, b, x, hk) - v_data));
    }
    double q_descale = descale(c, ARG_q_descale, b, hk),
           k_descale = descale(c, ARG_k_descale, b, hk);
    struct attention_row row = {
        .q = q.x,
        .qv = with(c, WITH_qv) ? qv.x : NULL,
        .k = &k,
        .v = &v,
        .keys = visible,
        .scale = c->args.softmax_scale * q_descale * k_descale,
        .softcap = c->args.softcap > 0 ? c->args.softcap : 0,
        .out_scale = descale(c, ARG_v_descale, b, hk),
        .no_keys = c->t_k + c->t_new == 0,
    };
    bool advance = queries_advance(c);
    for (int64_t i = 0; i < s->q_len; ++i) {
        row.n = 0;
        for (int64_t j = 0; j < keys; ++j)
            if (mha_visible(c, b, i, j)) visible[row.n++] = (int32_t)j;
        for (int64_t h = hk * group; h < (hk + 1) * group; ++h) {
            double sink = 0;
            const char *from = mha_q_at(c, ARG_q, b, i, h);
            if (with(c, WITH_rotary)) {
                rotate(c, from, s->rotary + (advance ? i : 0), rotated);
                from = rotated;
            }
            rows64_set(&q, 0, c->dtype, from);
            row.q_norm = q.norm[0];
            if (with(c, WITH_qv)) rows64_set(&qv, 0, c->dtype, mha_q_at(c, ARG_qv, b, i, h));
            row.qv_norm = qv.norm[0];
            if (with(c, WITH_sinks)) {
                const struct mha_tensor *t = &c->tensor[ARG_sinks];
                sink = attn_load(t->dtype, tensor_at(t, h, 0, 0, 0), 0);
            }
            row.sink = with(c, WITH_sinks) && !row.no_keys ? &sink : NULL;
            attention_expect_row(&answer->rows, s->first_row + i * c->h_q + h, &row);
        }
    }
}

void mha_case_answer(const struct mha_case *c, struct mha_answer *answer)
{
    const struct check_buffer *k = &c->tensor[ARG_k].buffer, *v = &c->tensor[ARG_v].buffer;
    answer->k_after = memcpy(check_scratch(k->bytes), c->k_before, k->bytes);
    answer->v_after = memcpy(check_scratch(v->bytes), c->v_before, v->bytes);
    append(c, answer);
    answer->rows = attention_expect(c->dtype, c->out_dtype, c->live_rows, c->d_v);
    for (int64_t b = 0; b < c->b; ++b)
        for (int64_t h = 0; h < c->h_k; ++h) answer_head(c, answer, b, h);
}

/* ---- comparison ------------------------------------------------------------------------------ */

void mha_case_restore(struct mha_case *c)
{
    const struct check_buffer *k = &c->tensor[ARG_k].buffer, *v = &c->tensor[ARG_v].buffer;
    if (with(c, WITH_append)) {
        memcpy(k->data, c->k_before, k->bytes);
        memcpy(v->data, c->v_before, v->bytes);
    }
    memset(c->tensor[ARG_out].buffer.data, CHECK_CANARY, c->tensor[ARG_out].buffer.bytes);
    memset(c->tensor[ARG_lse].buffer.data, CHECK_CANARY, c->tensor[ARG_lse].buffer.bytes);
}

/* Bytes equal but for rotated keys, which may differ by one unit in the last place. */
static bool same_cache(const struct mha_case *c, int argument, const char *want)
{
    const struct check_buffer *got = &c->tensor[argument].buffer;
    if (memcmp(got->data, want, got->bytes) == 0) return true;
    if (argument != ARG_k || !with(c, WITH_rotary)) return false;
    for (int64_t i = 0; i < (int64_t)got->bytes / attn_dtype_bytes(c->dtype); ++i) {
        double x = attn_load(c->dtype, got->data, i), y = attn_load(c->dtype, want, i);
        if ((isnan(x) && isnan(y)) || x == y) continue;
        if (!(fabs(x - y) <= check_ulp(c->dtype, y) + 0x1p-22 * (c->dtype == ATTN_F32)))
            return false;
    }
    return true;
}

/* Whether all of `t` but the case's live rows is still the canary. */
static bool beside_is_canary(const struct mha_case *c, int argument)
{
    const struct check_buffer *buffer = &c->tensor[argument].buffer;
    int64_t bytes = argument == ARG_out ? c->d_v * attn_dtype_bytes(c->out_dtype) : 4;
    char *copy = memcpy(check_scratch(buffer->bytes), buffer->data, buffer->bytes);
    for (int64_t b = 0; b < c->b; ++b) {
        for (int64_t i = 0; i < c->seq[b].q_len; ++i) {
            for (int64_t h = 0; h < c->h_q; ++h) {
                const char *at = argument == ARG_out ? mha_out_at(c, b, i, h)
                                                     : (const char *)mha_lse_at(c, b, i, h);
                memset(copy + (at - buffer->data), CHECK_CANARY, (size_t)bytes);
            }
        }
    }
    for (size_t i = 0; i < buffer->bytes; ++i)
        if ((unsigned char)copy[i] != CHECK_CANARY) return false;
    return true;
}

bool mha_case_compare(const struct mha_case *c, const struct mha_answer *answer, char why[400])
{
    char text[160];
    for (int64_t b = 0; b < c->b; ++b) {
        for (int64_t i = 0; i < c->seq[b].q_len; ++i) {
            for (int64_t h = 0; h < c->h_q; ++h) {
                int64_t row = c->seq[b].first_row + i * c->h_q + h;
                float lse = *mha_lse_at(c, b, i, h);
                if (attention_matches(&answer->rows, row, mha_out_at(c, b, i, h), lse, text))
                    continue;
                snprintf(why, 400, "sequence %d (q %d, keys %d) row %d head %d: %s", (int)b,
                         (int)c->seq[b].q_len, (int)mha_keys(c, b), (int)i, (int)h, text);
                return false;
            }
        }
    }
    for (int a = 0; a < MHA_ARGUMENT_COUNT; ++a) {
        if (!c->tensor[a].buffer.pages || check_buffer_intact(&c->tensor[a].buffer)) continue;
        snprintf(why, 400, "bytes beside %s were written", mha_argument_name[a]);
        return false;
    }
    const bool kept[4] = {beside_is_canary(c, ARG_out), beside_is_canary(c, ARG_lse),
                          same_cache(c, ARG_k, answer->k_after),
                          same_cache(c, ARG_v, answer->v_after)};
    static const char *const complaints[4] = {"rows of out that are not live were written",
                                              "entries of lse that are not live were written",
                                              "k is not the cache with the new keys, each byte",
                                              "v is not the cache with the new values"};
    for (int i = 0; i < 4; ++i) {
        if (kept[i]) continue;
        snprintf(why, 400, "%s", complaints[i]);
        return false;
    }
    return true;
}

void mha_case_accum(struct mha_case *c, int64_t splits)
{
    struct check_random r = {(uint64_t)splits};
    bool packed = with(c, WITH_packed_q);
    c->args.out_accum = c->args.lse_accum = NULL;
    c->tensor[ARG_out_accum].buffer = c->tensor[ARG_lse_accum].buffer = (struct check_buffer){0};
    if (splits <= 1) return;
    int64_t rows = packed ? c->t_q : c->s_q;
    const int64_t dense[5] = {splits, c->b, c->h_q, rows, c->d_v};
    const int64_t flat[4] = {splits, c->h_q, rows, c->d_v};
    const DLDataType fp32 = {kDLFloat, 32, 1};
    const int64_t *shape = packed ? flat : dense;
    bool strided = with(c, WITH_strided);
    mha_tensor_make(&r, c, ARG_out_accum, fp32, packed ? 4 : 5, shape, strided);
    mha_tensor_make(&r, c, ARG_lse_accum, fp32, packed ? 3 : 4, shape, strided);
    const int arguments[2] = {ARG_out_accum, ARG_lse_accum};
    for (int i = 0; i < 2; ++i) /* NaN, so that a split that nobody wrote shows */
        memset(c->tensor[arguments[i]].buffer.data, 0xff, c->tensor[arguments[i]].buffer.bytes);
}

const char *mha_case_text(const struct mha_case *c, char text[512])
{
    const struct attn_mha_fwd_args *a = &c->args;
    int n = snprintf(text, 512, "b %d h %d/%d d %d/%d s_q %d s_k %d", (int)c->b, (int)c->h_q,
                     (int)c->h_k, (int)c->d_qk, (int)c->d_v, (int)c->s_q, (int)c->s_k);
    for (int i = 0; i < MHA_FEATURE_COUNT && n < 440; ++i)
        if (c->features >> i & 1)
            n += snprintf(text + n, 512 - (size_t)n, " %s", mha_feature_name[i]);
    if (n < 440)
        snprintf(text + n, 512 - (size_t)n,
                 " (window %d %d chunk %d page %d new %d kind %d scale %.3g)", (int)a->window_left,
                 (int)a->window_right, (int)a->attention_chunk, (int)c->page, (int)c->s_new,
                 c->pathology, a->softmax_scale);
    return text;
}
