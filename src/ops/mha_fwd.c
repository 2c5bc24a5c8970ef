/* SPDX-License-Identifier: MIT
 *
 * mha_fwd: every argument check, the mask's normal form, and the way to the back end.
 *
 * Messages read "argument: expected WISH, got FINDING"; letters in a wish are those of attn.h.
 * Values inside index tensors are not looked at here: a CPU back end checks the live ones before
 * it writes anything, a GPU back end clamps or skips on the device.
 */
#include "ops/mha_fwd.h"

#include <stdio.h>

#include "core/env.h"
#include "core/tensor.h"
#include "ops/backend.h"
#include "ops/call.h"

/* Key indices, and a block beyond the last one, fit an int32 in every kernel. */
#define KEYS_MAX (ATTN_EXTENT_MAX - 1023)
/* Beyond these a float of the kernels overflows or vanishes. */
#define SCALE_MAX 1e30
#define SOFTCAP_MIN 1e-20
#define SOFTCAP_MAX 1e20

/* Stands for the data of an empty tensor, which may be NULL: its presence still has to show. */
#define EMPTY_DATA ((void *)(uintptr_t)64)

typedef struct attn_mha_fwd_args args_t;
typedef struct attn_mha_fwd_problem problem_t;

/* A [.., rows, heads, width] tensor of the problem's dtype on q's device, last stride 1.  `packed`
 * has no batch dimension.  Extents that are not negative in want[] must match. */
static attn_status check_rows(const DLTensor *t, const char *name, const char *wish, bool packed,
                              const problem_t *p, enum attn_dtype dtype, const int64_t want[4],
                              struct attn_rows *rows)
{
    char text[128];
    enum attn_dtype got = ATTN_F32;
    int32_t ndim = packed ? 3 : 4;
    ATTN_TRY(attn_tensor_check(t, name, ndim, wish));
    ATTN_TRY(attn_device_check(t, name, p->device));
    ATTN_TRY(attn_tensor_dtype(t, name, attn_dtype_name(dtype), &got));
    ATTN_CHECK(got == dtype, ATTN_E_DTYPE, "%s: expected dtype %s, got %s", name,
               attn_dtype_name(dtype), attn_dtype_name(got));
    for (int32_t i = 0; i < ndim; ++i) {
        int64_t w = want[i + 4 - ndim];
        ATTN_CHECK(w < 0 || t->shape[i] == w, ATTN_E_SHAPE,
                   "%s: expected %s with extent %lld in dimension %d, got %s", name, wish,
                   (long long)w, (int)i, attn_tensor_shape_text(t, text));
    }
    ATTN_CHECK(t->shape[ndim - 1] <= 1 || attn_tensor_empty(t) ||
                   attn_tensor_stride(t, ndim - 1) == 1,
               ATTN_E_SHAPE, "%s: expected last stride 1, got %lld", name,
               (long long)attn_tensor_stride(t, ndim - 1));
    rows->data = attn_tensor_empty(t) ? EMPTY_DATA : attn_tensor_data(t);
    rows->batch = packed ? 0 : attn_tensor_stride(t, 0);
    rows->row = attn_tensor_stride(t, ndim - 3);
    rows->head = attn_tensor_stride(t, ndim - 2);
    return ATTN_OK;
}

static attn_status check_index(const DLTensor *t, const char *name, int64_t n, const problem_t *p,
                               const int32_t **out)
{
    *out = NULL;
    if (!t) return ATTN_OK;
    ATTN_TRY(attn_index_check(t, name, n, p->device));
    *out = n == 0 ? EMPTY_DATA : (const int32_t *)(void *)attn_tensor_data(t);
    return ATTN_OK;
}

/* q, its packing, b, s_q and the widths. */
static attn_status check_query(const args_t *a, problem_t *p)
{
    char text[128];
    const DLTensor *q = a->q;
    bool packed = a->cu_seqlens_q != NULL;
    const char *wish = packed ? "[t_q, h_q, d_qk]" : "[b, s_q, h_q, d_qk]";
    ATTN_CHECK(q, ATTN_E_VALUE, "q: expected a tensor, got none");
    ATTN_CHECK(a->k, ATTN_E_VALUE, "k: expected a tensor, got none");
    ATTN_CHECK(a->v, ATTN_E_VALUE, "v: expected a tensor, got none");
    p->device = q->device;
    ATTN_CHECK(p->device.device_type == kDLCPU || p->device.device_type == kDLCUDA, ATTN_E_DEVICE,
               "q: expected on a CPU or CUDA device, got DLPack device type %d",
               (int)p->device.device_type);
    bool cpu = p->device.device_type == kDLCPU;
    ATTN_TRY(attn_tensor_dtype(q, "q",
                               cpu ? "fp32, bf16, fp16 or fp8 e4m3fn" : "bf16, fp16 or fp8 e4m3fn",
                               &p->dtype));
    ATTN_CHECK(cpu || p->dtype != ATTN_F32, ATTN_E_DTYPE,
               "q: expected dtype bf16, fp16 or fp8 e4m3fn on a GPU, got fp32");
    p->out_dtype = attn_dtype_out(p->dtype);
    ATTN_TRY(check_rows(q, "q", wish, packed, p, p->dtype, (int64_t[]){-1, -1, -1, -1}, &p->q));
    p->h_q = q->shape[q->ndim - 2];
    p->d_qk = q->shape[q->ndim - 1];
    if (packed) {
        ATTN_CHECK(a->cu_seqlens_q->ndim == 1 && a->cu_seqlens_q->shape[0] >= 1, ATTN_E_SHAPE,
                   "cu_seqlens_q: expected [b + 1], got %s",
                   attn_tensor_shape_text(a->cu_seqlens_q, text));
        p->b = a->cu_seqlens_q->shape[0] - 1;
        ATTN_TRY(check_index(a->cu_seqlens_q, "cu_seqlens_q", p->b + 1, p, &p->cu_seqlens_q));
        ATTN_CHECK(a->max_seqlen_q >= 0 && a->max_seqlen_q <= ATTN_EXTENT_MAX, ATTN_E_VALUE,
                   "max_seqlen_q: expected in [0, 2^31) with cu_seqlens_q, got %lld",
                   (long long)a->max_seqlen_q);
        p->t_q = q->shape[0];
        p->max_q = a->max_seqlen_q;
        p->s_q = p->max_q < p->t_q ? p->max_q : p->t_q;
    } else {
        p->b = q->shape[0];
        p->s_q = p->max_q = q->shape[1];
        p->t_q = p->b * p->s_q;
    }
    return check_index(a->seqused_q, "seqused_q", p->b, p, &p->seqused_q);
}

/* k, v and what says where a sequence's keys lie. */
static attn_status check_keys(const args_t *a, problem_t *p)
{
    char text[128];
    bool packed = a->cu_seqlens_k != NULL, paged = a->page_table != NULL;
    ATTN_CHECK(!packed || !paged, ATTN_E_VALUE,
               "cu_seqlens_k: expected none with page_table, got both");
    ATTN_CHECK(!packed || !a->kv_batch_idx, ATTN_E_VALUE,
               "cu_seqlens_k: expected none with kv_batch_idx, got both");
    const char *wish = packed  ? "[t_k, h_k, d]"
                       : paged ? "[num_pages, page, h_k, d]"
                               : "[rows, s_k, h_k, d]";
    ATTN_TRY(
        check_rows(a->k, "k", wish, packed, p, p->dtype, (int64_t[]){-1, -1, -1, p->d_qk}, &p->k));
    const int64_t *s = a->k->shape;
    p->h_k = s[a->k->ndim - 2];
    int64_t want[4] = {packed ? -1 : s[0], s[a->k->ndim - 3], p->h_k, -1};
    ATTN_TRY(check_rows(a->v, "v", wish, packed, p, p->dtype, want, &p->v));
    p->d_v = a->v->shape[a->v->ndim - 1];

    ATTN_CHECK(p->h_k > 0 && p->h_q > 0 && p->h_q % p->h_k == 0, ATTN_E_SHAPE,
               "q: expected h_q a positive multiple of k's %lld heads, got %lld", (long long)p->h_k,
               (long long)p->h_q);
    int64_t unit = p->dtype == ATTN_F8 ? 16 : 8;
    ATTN_CHECK(p->d_qk > 0 && p->d_qk <= ATTN_WIDTH_MAX && p->d_qk % unit == 0, ATTN_E_SHAPE,
               "q: expected a head dim that is a multiple of %lld up to %d for %s, got %lld",
               (long long)unit, ATTN_WIDTH_MAX, attn_dtype_name(p->dtype), (long long)p->d_qk);
    ATTN_CHECK(p->d_v > 0 && p->d_v <= ATTN_WIDTH_MAX && p->d_v % unit == 0, ATTN_E_SHAPE,
               "v: expected a head dim that is a multiple of %lld up to %d for %s, got %lld",
               (long long)unit, ATTN_WIDTH_MAX, attn_dtype_name(p->dtype), (long long)p->d_v);

    ATTN_TRY(check_index(a->cu_seqlens_k, "cu_seqlens_k", p->b + 1, p, &p->cu_seqlens_k));
    ATTN_TRY(check_index(a->seqused_k, "seqused_k", p->b, p, &p->seqused_k));
    ATTN_TRY(check_index(a->kv_batch_idx, "kv_batch_idx", p->b, p, &p->kv_batch_idx));
    ATTN_TRY(check_index(a->leftpad_k, "leftpad_k", p->b, p, &p->leftpad_k));

    if (packed) {
        ATTN_CHECK(a->max_seqlen_k >= 0 && a->max_seqlen_k <= ATTN_EXTENT_MAX, ATTN_E_VALUE,
                   "max_seqlen_k: expected in [0, 2^31) with cu_seqlens_k, got %lld",
                   (long long)a->max_seqlen_k);
        p->t_k = s[0];
        p->max_k = a->max_seqlen_k;
        p->s_k = p->max_k < p->t_k ? p->max_k : p->t_k;
        ATTN_CHECK(p->s_k <= KEYS_MAX, ATTN_E_SHAPE,
                   "k: expected at most %lld keys a sequence, got %lld", (long long)KEYS_MAX,
                   (long long)p->s_k);
        return ATTN_OK;
    }
    if (paged) {
        const DLTensor *t = a->page_table;
        ATTN_TRY(attn_tensor_check(t, "page_table", 2, "[rows, max_pages]"));
        ATTN_TRY(attn_device_check(t, "page_table", p->device));
        ATTN_CHECK(t->dtype.code == kDLInt && t->dtype.bits == 32, ATTN_E_DTYPE,
                   "page_table: expected dtype int32, got %s", attn_tensor_dtype_text(t, text));
        ATTN_CHECK(t->shape[1] <= 1 || attn_tensor_empty(t) || attn_tensor_stride(t, 1) == 1,
                   ATTN_E_SHAPE, "page_table: expected last stride 1, got %lld",
                   (long long)attn_tensor_stride(t, 1));
        ATTN_CHECK(s[1] > 0, ATTN_E_SHAPE, "k: expected pages of at least 1 position, got %s",
                   attn_tensor_shape_text(a->k, text));
        p->page_table = attn_tensor_empty(t) ? EMPTY_DATA
                                             : (const int32_t *)(void *)attn_tensor_data(t);
        p->page_table_row = attn_tensor_stride(t, 0);
        p->cache_rows = t->shape[0];
        p->max_pages = t->shape[1];
        p->num_pages = s[0];
        p->page = s[1];
        p->s_k = p->max_pages * p->page;
        ATTN_CHECK(p->kv_batch_idx || p->cache_rows == p->b, ATTN_E_SHAPE,
                   "page_table: expected %lld rows without kv_batch_idx, got %s", (long long)p->b,
                   attn_tensor_shape_text(t, text));
    } else {
        p->cache_rows = s[0];
        p->s_k = s[1];
        ATTN_CHECK(p->kv_batch_idx || p->cache_rows == p->b, ATTN_E_SHAPE,
                   "k: expected %lld rows without kv_batch_idx, got %s", (long long)p->b,
                   attn_tensor_shape_text(a->k, text));
    }
    ATTN_CHECK(p->s_k <= KEYS_MAX, ATTN_E_SHAPE,
               "k: expected room for at most %lld keys a sequence, got %lld", (long long)KEYS_MAX,
               (long long)p->s_k);
    p->max_k = p->s_k;
    p->t_k = p->b * p->s_k;
    return ATTN_OK;
}

/* Tokens appended to the cache, and the rotary tables. */
static attn_status check_append(const args_t *a, problem_t *p)
{
    char text[128];
    ATTN_CHECK(!a->k_new == !a->v_new, ATTN_E_VALUE,
               "%s: expected both k_new and v_new or neither, got one",
               a->k_new ? "v_new" : "k_new");
    ATTN_CHECK(a->k_new || !(a->rotary_cos || a->rotary_sin), ATTN_E_VALUE,
               "rotary_cos: expected none without k_new, got a table");
    if (!a->k_new) return ATTN_OK;

    ATTN_CHECK(!a->cu_seqlens_k, ATTN_E_VALUE, "k_new: expected none with cu_seqlens_k, got both");
    ATTN_CHECK(p->seqused_k, ATTN_E_VALUE,
               "cache_seqlens (seqused_k): expected a tensor with k_new, got none");
    ATTN_CHECK(p->s_q <= p->s_k, ATTN_E_VALUE,
               "q: expected at most the cache's %lld positions with k_new, got s_q %lld",
               (long long)p->s_k, (long long)p->s_q);
    bool packed = a->cu_seqlens_k_new != NULL;
    const char *wish = packed ? "[t_new, h_k, d]" : "[b, s_new, h_k, d]";
    int64_t b = packed ? -1 : p->b;
    ATTN_TRY(check_rows(a->k_new, "k_new", wish, packed, p, p->dtype,
                        (int64_t[]){b, -1, p->h_k, p->d_qk}, &p->k_new));
    p->s_new = a->k_new->shape[a->k_new->ndim - 3];
    p->t_new = packed ? p->s_new : p->b * p->s_new;
    ATTN_TRY(check_rows(a->v_new, "v_new", wish, packed, p, p->dtype,
                        (int64_t[]){b, p->s_new, p->h_k, p->d_v}, &p->v_new));
    ATTN_TRY(attn_distinct_check(a->k, "k"));
    ATTN_TRY(attn_distinct_check(a->v, "v"));
    ATTN_TRY(
        check_index(a->cu_seqlens_k_new, "cu_seqlens_k_new", p->b + 1, p, &p->cu_seqlens_k_new));

    ATTN_CHECK(!a->rotary_cos == !a->rotary_sin, ATTN_E_VALUE,
               "%s: expected both rotary_cos and rotary_sin or neither, got one",
               a->rotary_cos ? "rotary_sin" : "rotary_cos");
    if (!a->rotary_cos) return ATTN_OK;
    const DLTensor *tables[2] = {a->rotary_cos, a->rotary_sin};
    const char *const names[2] = {"rotary_cos", "rotary_sin"};
    for (int i = 0; i < 2; ++i) {
        const DLTensor *t = tables[i];
        enum attn_dtype got = ATTN_F32;
        ATTN_TRY(attn_tensor_check(t, names[i], 2, "[ro, r / 2]"));
        ATTN_TRY(attn_device_check(t, names[i], p->device));
        ATTN_TRY(attn_tensor_dtype(t, names[i], attn_dtype_name(p->dtype), &got));
        ATTN_CHECK(got == p->dtype, ATTN_E_DTYPE, "%s: expected dtype %s, got %s", names[i],
                   attn_dtype_name(p->dtype), attn_dtype_name(got));
        ATTN_CHECK(t->shape[0] == tables[0]->shape[0] && t->shape[1] == tables[0]->shape[1],
                   ATTN_E_SHAPE, "rotary_sin: expected rotary_cos's shape, got %s",
                   attn_tensor_shape_text(t, text));
        ATTN_CHECK(attn_tensor_empty(t) ||
                       ((t->shape[1] <= 1 || attn_tensor_stride(t, 1) == 1) &&
                        (t->shape[0] <= 1 || attn_tensor_stride(t, 0) == t->shape[1])),
                   ATTN_E_SHAPE, "%s: expected contiguous, got strides (%lld, %lld)", names[i],
                   (long long)attn_tensor_stride(t, 0), (long long)attn_tensor_stride(t, 1));
    }
    p->rotary_rows = a->rotary_cos->shape[0];
    p->rotary_width = 2 * a->rotary_cos->shape[1];
    ATTN_CHECK(p->rotary_width <= p->d_qk, ATTN_E_SHAPE,
               "rotary_cos: expected r at most d_qk = %lld, got r %lld", (long long)p->d_qk,
               (long long)p->rotary_width);
    ATTN_CHECK(p->rotary_width % 16 == 0, ATTN_E_SHAPE,
               "rotary_cos: expected r a multiple of 16, got %lld", (long long)p->rotary_width);
    ATTN_CHECK(!p->page_table || p->rotary_rows >= p->s_k, ATTN_E_SHAPE,
               "rotary_cos: expected at least max_pages * page = %lld rows, got %lld",
               (long long)p->s_k, (long long)p->rotary_rows);
    bool empty = attn_tensor_empty(a->rotary_cos);
    p->rotary_cos = empty ? EMPTY_DATA : attn_tensor_data(a->rotary_cos);
    p->rotary_sin = empty ? EMPTY_DATA : attn_tensor_data(a->rotary_sin);
    p->rotary_interleaved = a->rotary_interleaved != 0;
    return check_index(a->seqlens_rotary, "rotary_seqlens", p->b, p, &p->seqlens_rotary);
}

static attn_status check_descale(const DLTensor *t, const char *name, const problem_t *p,
                                 const float **data, int64_t *batch, int64_t *head)
{
    char text[128];
    *data = NULL;
    if (!t || p->dtype != ATTN_F8) return ATTN_OK; /* ignored for 16-bit input, as upstream */
    ATTN_TRY(attn_tensor_check(t, name, 2, "[b, h_k]"));
    ATTN_TRY(attn_device_check(t, name, p->device));
    ATTN_CHECK(t->dtype.code == kDLFloat && t->dtype.bits == 32, ATTN_E_DTYPE,
               "%s: expected dtype fp32, got %s", name, attn_tensor_dtype_text(t, text));
    ATTN_CHECK(t->shape[0] == p->b && t->shape[1] == p->h_k, ATTN_E_SHAPE,
               "%s: expected [b, h_k] = [%lld, %lld], got %s", name, (long long)p->b,
               (long long)p->h_k, attn_tensor_shape_text(t, text));
    *data = (const float *)attn_tensor_data(t);
    *batch = attn_tensor_stride(t, 0);
    *head = attn_tensor_stride(t, 1);
    return ATTN_OK;
}

/* qv, descales, sinks. */
static attn_status check_score_terms(const args_t *a, problem_t *p)
{
    char text[128];
    if (a->qv) {
        bool packed = p->cu_seqlens_q != NULL;
        ATTN_CHECK(p->dtype != ATTN_F8, ATTN_E_DTYPE, "qv: expected none with fp8, got a tensor");
        ATTN_TRY(check_rows(a->qv, "qv", packed ? "[t_q, h_q, d_v]" : "[b, s_q, h_q, d_v]", packed,
                            p, p->dtype,
                            (int64_t[]){p->b, packed ? p->t_q : p->s_q, p->h_q, p->d_v}, &p->qv));
    }
    ATTN_TRY(check_descale(a->q_descale, "q_descale", p, &p->q_descale, &p->q_descale_batch,
                           &p->q_descale_head));
    ATTN_TRY(check_descale(a->k_descale, "k_descale", p, &p->k_descale, &p->k_descale_batch,
                           &p->k_descale_head));
    ATTN_TRY(check_descale(a->v_descale, "v_descale", p, &p->v_descale, &p->v_descale_batch,
                           &p->v_descale_head));
    if (a->sinks) {
        const DLTensor *t = a->sinks;
        ATTN_TRY(attn_tensor_check(t, "sinks", 1, "[h_q]"));
        ATTN_TRY(attn_device_check(t, "sinks", p->device));
        ATTN_TRY(attn_tensor_dtype(t, "sinks", "fp32, bf16 or fp16", &p->sinks_dtype));
        ATTN_CHECK(p->sinks_dtype != ATTN_F8, ATTN_E_DTYPE,
                   "sinks: expected dtype fp32, bf16 or fp16, got fp8");
        ATTN_CHECK(t->shape[0] == p->h_q, ATTN_E_SHAPE, "sinks: expected [h_q] = [%lld], got %s",
                   (long long)p->h_q, attn_tensor_shape_text(t, text));
        p->sinks = attn_tensor_data(t);
        p->sinks_stride = attn_tensor_stride(t, 0);
    }
    return ATTN_OK;
}

struct mask {
    bool causal;
    int64_t left, right, chunk;
    bool is_causal, is_local;
};

/* A mask in its normal form, on the static maxima. */
static struct mask normalise_mask(int64_t s_q, int64_t s_k, int64_t d_qk, bool paged, bool causal,
                                  int64_t left, int64_t right, int64_t chunk)
{
    struct mask m = {causal, left, right, chunk > 0 ? chunk : 0, false, false};
    if (left < 0 || left >= s_k - 1) m.left = -1;
    if (right < 0 || right >= s_q - 1) m.right = -1;
    bool keeps_causal = paged && d_qk > 64 && d_qk <= 128;
    if (s_q == 1 && m.left < 0 && m.right < 0 && m.chunk == 0 && !keeps_causal) m.causal = false;
    if (m.causal) m.right = 0;
    m.is_causal = m.left < 0 && m.right == 0 && m.chunk == 0;
    m.is_local = (m.left >= 0 || m.right >= 0 || m.chunk > 0) && !m.is_causal;
    return m;
}

static attn_status check_mask(const args_t *a, problem_t *p)
{
    ATTN_CHECK(fabs(a->softmax_scale) <= SCALE_MAX, ATTN_E_VALUE,
               "softmax_scale: expected a finite number of at most %g, got %g", SCALE_MAX,
               a->softmax_scale);
    ATTN_CHECK((isfinite(a->softcap) && a->softcap <= 0) ||
                   (a->softcap >= SOFTCAP_MIN && a->softcap <= SOFTCAP_MAX),
               ATTN_E_VALUE, "softcap: expected at most 0 (off) or in [%g, %g], got %g",
               SOFTCAP_MIN, SOFTCAP_MAX, a->softcap);
    p->scale = a->softmax_scale;
    p->softcap = a->softcap > 0 ? a->softcap : 0;
    p->chunk = a->attention_chunk > 0 ? a->attention_chunk : 0;
    p->window_left = a->window_left;
    p->window_right = a->window_right;
    p->causal = a->causal != 0;

    p->cp_world = a->cp_world_size > 1 ? a->cp_world_size : 1;
    p->cp_rank = p->cp_world > 1 ? a->cp_rank : 0;
    if (p->cp_world > 1) {
        ATTN_CHECK(a->cp_rank >= 0 && a->cp_rank < a->cp_world_size, ATTN_E_VALUE,
                   "cp_rank: expected in [0, %d), got %d", (int)a->cp_world_size, (int)a->cp_rank);
        ATTN_CHECK(a->cp_tot_seqused_k, ATTN_E_VALUE,
                   "cp_tot_seqused_k: expected a tensor with cp_world_size > 1, got none");
        ATTN_CHECK(p->chunk == 0 && p->window_left < 0 && (p->window_right < 0 || p->causal),
                   ATTN_E_VALUE,
                   "cp_world_size: expected no window and no attention_chunk with it, got one");
        ATTN_TRY(
            check_index(a->cp_tot_seqused_k, "cp_tot_seqused_k", p->b, p, &p->cp_tot_seqused_k));
        /* Rows are aligned to the global length, which the static maxima do not bound. */
        p->window_left = -1;
        p->window_right = p->causal ? 0 : -1;
        p->is_causal = p->causal;
    } else {
        struct mask m = normalise_mask(p->max_q, p->max_k, p->d_qk, p->page_table != NULL,
                                       p->causal, p->window_left, p->window_right, p->chunk);
        p->causal = m.causal;
        p->window_left = m.left;
        p->window_right = m.right;
        p->is_causal = m.is_causal;
        p->is_local = m.is_local;
    }
    ATTN_CHECK(a->num_splits <= ATTN_SPLITS_MAX, ATTN_E_VALUE,
               "num_splits: expected at most %d, got %d", ATTN_SPLITS_MAX, (int)a->num_splits);
    p->num_splits = a->num_splits;
    p->pack_gqa = a->pack_gqa;
    p->sm_margin = a->sm_margin;
    return ATTN_OK;
}

int64_t attn_mha_metadata_length(int64_t b, int64_t s_q, int64_t s_k, int64_t d_qk, int32_t paged,
                                 int32_t causal, int64_t window_left, int64_t window_right,
                                 int64_t attention_chunk)
{
    struct mask m = normalise_mask(s_q, s_k, d_qk, paged != 0, causal != 0, window_left,
                                   window_right, attention_chunk);
    int64_t blocks = 2 + !m.is_local + (m.is_causal || m.is_local);
    return (b + 3) / 4 * 4 * blocks + 1;
}

/* Read by variable-length calls upstream, so only they check it; the contents are private. */
static attn_status check_metadata(const args_t *a, const problem_t *p)
{
    const DLTensor *t = a->scheduler_metadata;
    bool variable = p->cu_seqlens_q || p->cu_seqlens_k || p->seqused_q || p->seqused_k ||
                    p->leftpad_k;
    if (!t || !variable) return ATTN_OK;
    int64_t n = attn_mha_metadata_length(p->b, p->max_q, p->max_k, p->d_qk, p->page_table != NULL,
                                         p->causal, p->window_left, p->window_right, p->chunk);
    return attn_index_check(t, "scheduler_metadata", n, p->device);
}

static attn_status check_lse(const DLTensor *t, const char *name, const problem_t *p,
                             int64_t splits, float **data, int64_t *split, int64_t *batch,
                             int64_t *head)
{
    char text[128];
    bool packed = p->cu_seqlens_q != NULL, pieces = splits >= 0;
    int32_t ndim = (packed ? 2 : 3) + (pieces ? 1 : 0);
    const char *wish = packed ? (pieces ? "[splits, h_q, t_q]" : "[h_q, t_q]")
                              : (pieces ? "[splits, b, h_q, s_q]" : "[b, h_q, s_q]");
    ATTN_TRY(attn_tensor_check(t, name, ndim, wish));
    ATTN_TRY(attn_device_check(t, name, p->device));
    ATTN_CHECK(t->dtype.code == kDLFloat && t->dtype.bits == 32, ATTN_E_DTYPE,
               "%s: expected dtype fp32, got %s", name, attn_tensor_dtype_text(t, text));
    int64_t rows = packed ? p->t_q : p->s_q;
    ATTN_CHECK(t->shape[ndim - 1] == rows && t->shape[ndim - 2] == p->h_q &&
                   (packed || t->shape[ndim - 3] == p->b) && (!pieces || t->shape[0] == splits),
               ATTN_E_SHAPE, "%s: expected %s, got %s", name, wish,
               attn_tensor_shape_text(t, text));
    ATTN_CHECK(rows <= 1 || attn_tensor_empty(t) || attn_tensor_stride(t, ndim - 1) == 1,
               ATTN_E_SHAPE, "%s: expected last stride 1, got %lld", name,
               (long long)attn_tensor_stride(t, ndim - 1));
    ATTN_TRY(attn_distinct_check(t, name));
    *data = (float *)attn_tensor_data(t);
    *split = pieces ? attn_tensor_stride(t, 0) : 0;
    *batch = packed ? 0 : attn_tensor_stride(t, ndim - 3);
    *head = attn_tensor_stride(t, ndim - 2);
    return ATTN_OK;
}

static attn_status check_outputs(const args_t *a, problem_t *p)
{
    char text[128];
    bool packed = p->cu_seqlens_q != NULL;
    int64_t rows = packed ? p->t_q : p->s_q, unused = 0;
    ATTN_CHECK(a->out, ATTN_E_VALUE, "out: expected a tensor, got none");
    ATTN_CHECK(a->lse || p->device.device_type != kDLCPU, ATTN_E_VALUE,
               "lse: expected a tensor, got none");
    ATTN_TRY(check_rows(a->out, "out", packed ? "[t_q, h_q, d_v]" : "[b, s_q, h_q, d_v]", packed, p,
                        p->out_dtype, (int64_t[]){p->b, rows, p->h_q, p->d_v}, &p->out));
    ATTN_TRY(attn_distinct_check(a->out, "out"));
    if (a->lse)
        ATTN_TRY(check_lse(a->lse, "lse", p, -1, &p->lse, &unused, &p->lse_batch, &p->lse_head));

    ATTN_CHECK(!a->out_accum == !a->lse_accum, ATTN_E_VALUE,
               "%s: expected both out_accum and lse_accum or neither, got one",
               a->out_accum ? "lse_accum" : "out_accum");
    if (!a->out_accum) return ATTN_OK;
    const DLTensor *t = a->out_accum;
    const char *wish = packed ? "[splits, h_q, t_q, d_v]" : "[splits, b, h_q, s_q, d_v]";
    int32_t n = packed ? 4 : 5;
    ATTN_TRY(attn_tensor_check(t, "out_accum", n, wish));
    ATTN_TRY(attn_device_check(t, "out_accum", p->device));
    ATTN_CHECK(t->dtype.code == kDLFloat && t->dtype.bits == 32, ATTN_E_DTYPE,
               "out_accum: expected dtype fp32, got %s", attn_tensor_dtype_text(t, text));
    ATTN_CHECK(t->shape[n - 1] == p->d_v && t->shape[n - 2] == rows && t->shape[n - 3] == p->h_q &&
                   (packed || t->shape[1] == p->b),
               ATTN_E_SHAPE, "out_accum: expected %s, got %s", wish,
               attn_tensor_shape_text(t, text));
    ATTN_CHECK(attn_tensor_empty(t) || attn_tensor_stride(t, n - 1) == 1, ATTN_E_SHAPE,
               "out_accum: expected last stride 1, got %lld",
               (long long)attn_tensor_stride(t, n - 1));
    ATTN_TRY(attn_distinct_check(t, "out_accum"));
    p->accum_splits = t->shape[0];
    p->out_accum = (struct attn_rows){attn_tensor_data(t), packed ? 0 : attn_tensor_stride(t, 1),
                                      attn_tensor_stride(t, n - 2), attn_tensor_stride(t, n - 3)};
    p->out_accum_split = attn_tensor_stride(t, 0);
    return check_lse(a->lse_accum, "lse_accum", p, p->accum_splits, &p->lse_accum,
                     &p->lse_accum_split, &p->lse_accum_batch, &p->lse_accum_head);
}

/* Index tensors are read more than once: no output may lie on one. */
static attn_status check_overlaps(const args_t *a)
{
    const struct {
        const char *name;
        const DLTensor *tensor;
    } read[] = {
        {"page_table", a->page_table},         {"kv_batch_idx", a->kv_batch_idx},
        {"seqused_k", a->seqused_k},           {"cu_seqlens_q", a->cu_seqlens_q},
        {"cu_seqlens_k", a->cu_seqlens_k},     {"seqused_q", a->seqused_q},
        {"leftpad_k", a->leftpad_k},           {"cu_seqlens_k_new", a->cu_seqlens_k_new},
        {"seqlens_rotary", a->seqlens_rotary}, {"cp_tot_seqused_k", a->cp_tot_seqused_k},
    };
    const DLTensor *written[] = {
        a->out, a->lse, a->out_accum, a->lse_accum, a->k_new ? a->k : NULL, a->k_new ? a->v : NULL,
    };
    for (size_t i = 0; i < sizeof read / sizeof *read; ++i)
        ATTN_TRY(attn_apart_check(read[i].tensor, read[i].name, written,
                                  sizeof written / sizeof *written));
    return ATTN_OK;
}

/* What a GPU kernel is ever built for; a CPU takes any pair up to 512. */
static attn_status check_gpu_widths(const problem_t *p)
{
    int64_t d = p->d_qk, dv = p->d_v;
    ATTN_CHECK(d <= 256, ATTN_E_SHAPE, "q: expected a head dim of at most 256 on a GPU, got %lld",
               (long long)d);
    bool small = d <= 64 && dv <= 512, deep = d > 128 && d <= 192 && dv > 96 && dv <= 128;
    ATTN_CHECK(d == dv || small || deep, ATTN_E_SHAPE,
               "v: expected q's head dim, or up to 512 with q's <= 64, or 97..128 with q's "
               "129..192, got d_qk %lld, d_v %lld",
               (long long)d, (long long)dv);
    ATTN_CHECK(p->dtype != ATTN_F8 || d == dv || dv <= 64, ATTN_E_SHAPE,
               "v: expected q's head dim or at most 64 for fp8, got d_qk %lld, d_v %lld",
               (long long)d, (long long)dv);
    ATTN_CHECK(!p->qv.data || (d <= 64 && dv >= 256), ATTN_E_SHAPE,
               "qv: expected d_qk <= 64 and d_v >= 256, got d_qk %lld, d_v %lld", (long long)d,
               (long long)dv);
    return ATTN_OK;
}

attn_status attn_mha_fwd_check(const args_t *a, problem_t *p, bool outputs)
{
    ATTN_TRY(attn_struct_check("args", a, sizeof *a));
    *p = (problem_t){.threads = a->threads};
    ATTN_TRY(check_query(a, p));
    ATTN_TRY(check_keys(a, p));
    ATTN_TRY(check_append(a, p));
    ATTN_TRY(check_score_terms(a, p));
    ATTN_TRY(check_mask(a, p));
    ATTN_TRY(check_metadata(a, p));
    if (p->device.device_type != kDLCPU) ATTN_TRY(check_gpu_widths(p));
    if (outputs) {
        ATTN_TRY(check_outputs(a, p));
        ATTN_TRY(check_overlaps(a));
    }
    p->no_keys = p->t_k + p->t_new == 0;
    return ATTN_OK;
}

void attn_mha_fwd_shape(const problem_t *p, int64_t shape[12])
{
    /* The last one: what else the layout of the workspace depends on. */
    int64_t features = (int64_t)p->dtype | (p->qv.data ? 8 : 0) | (p->rotary_cos ? 16 : 0) |
                       (p->sinks ? 32 : 0) | (p->cu_seqlens_q ? 64 : 0) |
                       (p->cu_seqlens_k ? 128 : 0) | (p->k_new.data ? 256 : 0) |
                       (int64_t)p->device.device_type << 16;
    const int64_t now[12] = {p->b,   p->s_q,  p->s_k, p->t_q,   p->t_k,  p->h_q,
                             p->h_k, p->d_qk, p->d_v, p->s_new, p->page, features};
    memcpy(shape, now, sizeof now);
}

attn_status attn_mha_fwd_plan(const args_t *args, struct attn_mha_fwd_plan *plan)
{
    problem_t p;
    ATTN_TRY(attn_struct_check("plan", plan, sizeof *plan));
    ATTN_TRY(attn_mha_fwd_check(args, &p, false));
    const struct attn_backend *backend = attn_backend_for(p.device.device_type);
    memset(plan, 0, sizeof *plan);
    plan->size = sizeof *plan;
    plan->splits = 1;
    attn_mha_fwd_shape(&p, plan->shape);
    return backend->mha_fwd_plan(&p, plan);
}

attn_status attn_mha_fwd_run(const args_t *args, const struct attn_mha_fwd_plan *plan,
                             void *workspace, int64_t workspace_bytes, void *stream)
{
    problem_t p;
    int64_t shape[12];
    ATTN_TRY(attn_mha_fwd_check(args, &p, true));
    ATTN_TRY(attn_plan_check("mha_fwd", plan, sizeof *plan));
    attn_mha_fwd_shape(&p, shape);
    ATTN_CHECK(memcmp(shape, plan->shape, sizeof shape) == 0, ATTN_E_VALUE,
               "plan: expected one made for these shapes, got another's");
    ATTN_TRY(attn_workspace_check(workspace, workspace_bytes, plan->workspace_bytes));
    ATTN_CHECK(plan->splits == 1 || p.accum_splits == plan->splits, ATTN_E_SHAPE,
               "out_accum: expected %d splits, got %lld", (int)plan->splits,
               (long long)p.accum_splits);
    const struct attn_backend *backend = attn_backend_for(p.device.device_type);
    if (attn_log_on())
        attn_log(
            "%s b %lld s_q %lld s_k %lld t_q %lld h %lld/%lld d %lld/%lld splits %d piece %lld "
            "workspace %lld",
            plan->kernel, (long long)p.b, (long long)p.s_q, (long long)p.s_k, (long long)p.t_q,
            (long long)p.h_q, (long long)p.h_k, (long long)p.d_qk, (long long)p.d_v,
            (int)plan->splits, (long long)plan->piece, (long long)plan->workspace_bytes);
    return backend->mha_fwd_run(&p, plan, workspace, workspace_bytes, stream);
}
