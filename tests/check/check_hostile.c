/* SPDX-License-Identifier: MIT
 *
 * Hostile calls: a valid case, broken in one way, and called.  Each call must fail with a message
 * that names the argument, crash nowhere and write nothing; the valid call, made before and after,
 * must give the same bits, and now and then these are compared with the oracle.
 */
#include <stdio.h>
#include <string.h>

#include "check_run.h"

struct hostile {
    struct mha_case *c;
    struct attn_mha_fwd_args args;
    DLTensor t[MHA_ARGUMENT_COUNT];
    int64_t shape[MHA_ARGUMENT_COUNT][8], strides[MHA_ARGUMENT_COUNT][8];
    struct attn_mha_fwd_plan plan;
    const struct attn_mha_fwd_plan *plan_pointer;
    char *workspace;
    int64_t workspace_bytes;
    int32_t *poked, poked_before; /* an index entry, to be put back */
    const struct check_buffer *poked_buffer;
    const char *names[3]; /* one must be in the message; none: any argument's */
    char what[120];
    attn_status status;
};

/* A fresh copy of the valid call. */
static void start(struct hostile *h, struct mha_case *c, const struct attn_mha_fwd_plan *plan,
                  const struct check_buffer *workspace)
{
    memset(h, 0, sizeof *h);
    h->c = c;
    h->args = c->args;
    h->plan = *plan;
    h->plan_pointer = &h->plan;
    h->workspace = workspace->data;
    h->workspace_bytes = plan->workspace_bytes;
    for (int a = 0; a < MHA_ARGUMENT_COUNT; ++a) {
        if (!*mha_argument_slot(&c->args, a)) continue;
        const struct mha_tensor *from = &c->tensor[a];
        h->t[a] = from->t;
        memcpy(h->shape[a], from->shape, sizeof from->shape);
        memcpy(h->strides[a], from->strides, sizeof from->strides);
        h->t[a].shape = h->shape[a];
        h->t[a].strides = h->strides[a];
        *mha_argument_slot(&h->args, a) = &h->t[a];
    }
}

static void run_hostile(void *context)
{
    struct hostile *h = context;
    struct attn_mha_fwd_plan plan = {.size = sizeof plan};
    attn_mha_fwd_plan(&h->args, &plan); /* whatever it says; it must not crash */
    h->status = attn_mha_fwd_run(&h->args, h->plan_pointer, h->workspace, h->workspace_bytes, NULL);
}

static bool given(const struct hostile *h, int argument)
{
    return *mha_argument_slot((struct attn_mha_fwd_args *)(uintptr_t)&h->args, argument) != NULL;
}

static bool empty(const DLTensor *t)
{
    for (int i = 0; i < t->ndim; ++i)
        if (t->shape[i] == 0) return true;
    return false;
}

static int pick_given(struct check_random *r, const struct hostile *h)
{
    int a;
    do a = (int)random_range(r, 0, MHA_ARGUMENT_COUNT - 1);
    while (!given(h, a));
    return a;
}

#define SAY(h, ...) (snprintf((h)->what, sizeof(h)->what, __VA_ARGS__), true)

/* ---- ways to break a tensor ------------------------------------------------------------------ */

static bool break_rank(struct check_random *r, struct hostile *h)
{
    int a = pick_given(r, h);
    int32_t rank = (int32_t)PICK(r, 0, 1, 2, 3, 4, 5, 6, 7, -1, INT32_MIN);
    if (rank == h->t[a].ndim) return false;
    h->t[a].ndim = rank;
    h->names[0] = mha_argument_name[a];
    return SAY(h, "%s with %d dimensions", mha_argument_name[a], rank);
}

static bool break_dtype(struct check_random *r, struct hostile *h)
{
    static const DLDataType types[] = {
        {kDLInt, 64, 1},        {kDLUInt, 32, 1},     {kDLFloat, 64, 1}, {kDLComplex, 64, 1},
        {kDLFloat, 16, 2},      {kDLInt, 32, 0},      {kDLInt, 4, 1},    {200, 32, 1},
        {kDLFloat8_e5m2, 8, 1}, {kDLBool, 8, 1},      {kDLInt, 8, 4},    {kDLBfloat, 32, 1},
        {kDLFloat, 0, 1},       {kDLInt, 255, 65535},
    };
    int a = pick_given(r, h);
    h->t[a].dtype = types[random_range(r, 0, sizeof types / sizeof *types - 1)];
    h->names[0] = mha_argument_name[a];
    return SAY(h, "%s of type %d bits %d lanes %d", mha_argument_name[a], h->t[a].dtype.code,
               h->t[a].dtype.bits, h->t[a].dtype.lanes);
}

/* A type that is known, but not this tensor's. */
static bool break_dtype_mismatch(struct check_random *r, struct hostile *h)
{
    static const DLDataType types[] = {{kDLFloat, 32, 1},
                                       {kDLBfloat, 16, 1},
                                       {kDLFloat, 16, 1},
                                       {kDLFloat8_e4m3fn, 8, 1}};
    int a = pick_given(r, h);
    DLDataType type = types[random_range(r, 0, 3)];
    if (a == ARG_q || a == ARG_sinks || memcmp(&type, &h->t[a].dtype, sizeof type) == 0)
        return false;
    h->t[a].dtype = type;
    h->names[0] = mha_argument_name[a];
    return SAY(h, "%s of another float type", mha_argument_name[a]);
}

/* An extent that no tensor may have. */
static bool break_extent(struct check_random *r, struct hostile *h)
{
    int a = pick_given(r, h), i = (int)random_range(r, 0, h->t[a].ndim - 1);
    int64_t n = PICK(r, -1, INT64_MIN, (int64_t)1 << 31, ((int64_t)1 << 32) + 1, (int64_t)1 << 62,
                     INT64_MAX);
    h->shape[a][i] = n;
    h->names[0] = mha_argument_name[a];
    return SAY(h, "%s with extent %lld in dimension %d", mha_argument_name[a], (long long)n, i);
}

/* An extent that does not fit the other tensors. */
static bool break_agreement(struct check_random *r, struct hostile *h)
{
    int a = pick_given(r, h), i = (int)random_range(r, 0, h->t[a].ndim - 1);
    if (a == ARG_page_table && i == 0 && h->args.kv_batch_idx)
        return false; /* any count is legal */
    int64_t n = h->shape[a][i] + PICK(r, 1, -1, 7, 1000);
    if (n < 0) return false;
    h->shape[a][i] = n;
    return SAY(h, "%s with extent %lld in dimension %d", mha_argument_name[a], (long long)n, i);
}

static bool break_stride(struct check_random *r, struct hostile *h)
{
    int a = pick_given(r, h), i = (int)random_range(r, 0, h->t[a].ndim - 1);
    if (h->shape[a][i] <= 1 || empty(&h->t[a])) return false;
    int64_t n = PICK(r, -1, -8, INT64_MIN, (int64_t)1 << 62, INT64_MAX);
    h->strides[a][i] = n;
    h->names[0] = mha_argument_name[a];
    return SAY(h, "%s with stride %lld in dimension %d", mha_argument_name[a], (long long)n, i);
}

static bool break_last_stride(struct check_random *r, struct hostile *h)
{
    int a = pick_given(r, h), i = h->t[a].ndim - 1;
    bool free = a == ARG_sinks || (a >= ARG_q_descale && a <= ARG_v_descale);
    if (free || h->shape[a][i] <= 1 || empty(&h->t[a])) return false;
    h->strides[a][i] = PICK(r, 0, 2, 3);
    h->names[0] = mha_argument_name[a];
    return SAY(h, "%s with last stride %lld", mha_argument_name[a], (long long)h->strides[a][i]);
}

/* Rows of a result on top of each other. */
static bool break_overlap(struct check_random *r, struct hostile *h)
{
    int a = (int)PICK(r, ARG_out, ARG_lse, ARG_k, ARG_v),
        i = (int)random_range(r, 0, h->t[a].ndim - 1);
    if (((a == ARG_k || a == ARG_v) && !h->args.k_new) || h->shape[a][i] <= 1 || empty(&h->t[a]))
        return false;
    h->strides[a][i] = 0;
    h->names[0] = mha_argument_name[a];
    return SAY(h, "%s with stride 0 in dimension %d", mha_argument_name[a], i);
}

static bool break_device(struct check_random *r, struct hostile *h)
{
    int a = pick_given(r, h);
    h->t[a].device.device_type = (DLDeviceType)PICK(r, kDLCUDA, kDLCUDAHost, kDLROCM, 77, 0, -1);
    h->t[a].device.device_id = (int32_t)PICK(r, 0, 3, -1);
    if (a != ARG_q) h->names[0] = mha_argument_name[a];
    return SAY(h, "%s on device type %d", mha_argument_name[a], (int)h->t[a].device.device_type);
}

static bool break_pointer(struct check_random *r, struct hostile *h)
{
    int a = pick_given(r, h), bytes = h->t[a].dtype.bits / 8;
    bool null = random_percent(r, 50);
    if (empty(&h->t[a]) || (!null && bytes == 1)) return false;
    if (null)
        h->t[a].data = NULL;
    else if (random_percent(r, 50))
        h->t[a].byte_offset += (uint64_t)random_range(r, 1, bytes - 1);
    else
        h->t[a].data = (char *)h->t[a].data + random_range(r, 1, bytes - 1);
    h->names[0] = mha_argument_name[a];
    return SAY(h, "%s with %s data", mha_argument_name[a], null ? "no" : "misaligned");
}

/* A tensor that may not be left out here. */
static bool break_absence(struct check_random *r, struct hostile *h)
{
    int a = pick_given(r, h);
    const struct attn_mha_fwd_args *v = &h->args;
    bool needed = a == ARG_q || a == ARG_k || a == ARG_v || a == ARG_out || a == ARG_lse;
    needed = needed || a == ARG_k_new || a == ARG_v_new || a == ARG_rotary_cos ||
             a == ARG_rotary_sin;
    needed = needed || a == ARG_out_accum || a == ARG_lse_accum || a == ARG_cp_tot_seqused_k;
    needed = needed || (a == ARG_seqused_k && v->k_new);
    if (!needed) return false;
    *mha_argument_slot(&h->args, a) = NULL;
    h->names[0] = mha_argument_name[a];
    h->names[1] = a == ARG_rotary_cos || a == ARG_rotary_sin ? "rotary_cos" : NULL;
    return SAY(h, "no %s", mha_argument_name[a]);
}

/* ---- ways to break a number ------------------------------------------------------------------ */

static bool break_number(struct check_random *r, struct hostile *h)
{
    struct attn_mha_fwd_args *a = &h->args;
    double bad = (double[]){NAN, INFINITY, -INFINITY}[random_range(r, 0, 2)];
    switch (random_range(r, 0, 6)) {
    case 0:
        a->size = (uint32_t)PICK(r, 0, 8, sizeof *a - 8, sizeof *a + 8, UINT32_MAX);
        h->names[0] = "size";
        return SAY(h, "size %u", a->size);
    case 1:
        a->softmax_scale = bad;
        h->names[0] = "softmax_scale";
        return SAY(h, "softmax_scale %g", bad);
    case 2:
        bad = bad < 0 ? 1e30 : bad; /* below zero is off */
        a->softcap = bad;
        h->names[0] = "softcap";
        return SAY(h, "softcap %g", bad);
    case 3:
        if (!a->cu_seqlens_q) return false;
        a->max_seqlen_q = PICK(r, -1, INT64_MIN, (int64_t)1 << 31, INT64_MAX);
        h->names[0] = "max_seqlen_q";
        return SAY(h, "max_seqlen_q %lld", (long long)a->max_seqlen_q);
    case 4:
        if (!a->cu_seqlens_k) return false;
        a->max_seqlen_k = PICK(r, -1, INT64_MIN, (int64_t)1 << 31, INT64_MAX);
        h->names[0] = "max_seqlen_k";
        return SAY(h, "max_seqlen_k %lld", (long long)a->max_seqlen_k);
    case 5:
        a->num_splits = (int32_t)PICK(r, 257, 1000, INT32_MAX);
        h->names[0] = "num_splits";
        return SAY(h, "num_splits %d", a->num_splits);
    default:
        if (a->cp_world_size <= 1) return false;
        a->cp_rank = (int32_t)PICK(r, -1, a->cp_world_size, INT32_MAX, INT32_MIN);
        h->names[0] = "cp_rank";
        return SAY(h, "cp_rank %d", a->cp_rank);
    }
}

/* Two arguments that exclude each other. */
static bool break_exclusion(struct check_random *r, struct hostile *h)
{
    struct attn_mha_fwd_args *a = &h->args;
    switch (random_range(r, 0, 3)) {
    case 0:
        if (a->cp_world_size <= 1) return false;
        if (random_percent(r, 50))
            a->window_left = 3;
        else
            a->attention_chunk = 5;
        h->names[0] = "cp_world_size";
        return SAY(h, "a window or chunk with context parallel");
    case 1:
        if (!a->cu_seqlens_k || h->c->b == 0) return false;
        a->kv_batch_idx = a->cu_seqlens_k;
        h->names[0] = "kv_batch_idx";
        h->names[1] = "cu_seqlens_k";
        return SAY(h, "kv_batch_idx with cu_seqlens_k");
    case 2:
        if (!a->cu_seqlens_k) return false;
        a->page_table = a->cu_seqlens_k;
        h->names[0] = "page_table";
        h->names[1] = "cu_seqlens_k";
        return SAY(h, "page_table with cu_seqlens_k");
    default:
        if (a->k_new || h->c->dtype == ATTN_F8) return false;
        a->rotary_cos = a->rotary_sin = a->q;
        h->names[0] = "rotary";
        return SAY(h, "rotary tables without k_new");
    }
}

static bool break_workspace(struct check_random *r, struct hostile *h)
{
    switch (random_range(r, 0, 4)) {
    case 0:
        if (h->plan.workspace_bytes == 0) return false;
        h->workspace = NULL;
        break;
    case 1:
        if (h->plan.workspace_bytes == 0) return false;
        h->workspace_bytes -= random_percent(r, 50) ? 1 : h->workspace_bytes;
        break;
    case 2: h->workspace += random_range(r, 1, 63); break;
    case 3: h->workspace_bytes = PICK(r, -1, INT64_MIN); break;
    default:
        h->names[0] = "plan";
        if (random_percent(r, 30))
            h->plan_pointer = NULL;
        else if (random_percent(r, 50))
            h->plan.size = (uint32_t)PICK(r, 0, 1, UINT32_MAX);
        else
            h->plan.shape[random_range(r, 0, 11)] += PICK(r, 1, -1, INT32_MAX);
        return SAY(h, "a plan of another call");
    }
    h->names[0] = "workspace";
    return SAY(h, "a workspace of %lld bytes at %p", (long long)h->workspace_bytes,
               (void *)h->workspace);
}

/* ---- ways to break an index entry ------------------------------------------------------------ */

static bool poke(struct hostile *h, int argument, int64_t at, int64_t value, const char *alias)
{
    const struct mha_tensor *t = &h->c->tensor[argument];
    if (!given(h, argument)) return false;
    int32_t *data = (int32_t *)(void *)t->buffer.data;
    h->poked = data + at;
    h->poked_before = data[at];
    if (h->poked_before == value || value < INT32_MIN || value > INT32_MAX) return false;
    h->poked_buffer = &t->buffer;
    check_buffer_protect(&t->buffer, false);
    data[at] = (int32_t)value;
    h->names[0] = mha_argument_name[argument];
    h->names[1] = alias;
    return SAY(h, "%s entry %lld is %lld", mha_argument_name[argument], (long long)at,
               (long long)value);
}

static bool break_index(struct check_random *r, struct hostile *h)
{
    struct mha_case *c = h->c;
    if (c->b == 0) return false;
    int64_t b = random_range(r, 0, c->b - 1);
    const struct mha_seq *s = &c->seq[b];
    int64_t wild = PICK(r, INT32_MAX, INT32_MIN, -1);
    switch (random_range(r, 0, 9)) {
    case 0:
        return poke(h, ARG_cu_seqlens_q, b + 1, random_percent(r, 50) ? wild : c->t_q + 1, NULL);
    case 1:
        return poke(h, ARG_cu_seqlens_k, b + 1, random_percent(r, 50) ? wild : c->t_k + 1, NULL);
    case 2:
        return poke(h, ARG_cu_seqlens_k_new, b + 1, random_percent(r, 50) ? wild : c->t_new + 1,
                    NULL);
    case 3: return poke(h, ARG_seqused_q, b, random_percent(r, 50) ? wild : s->q_space + 1, NULL);
    case 4:
        return poke(h, ARG_seqused_k, b, random_percent(r, 50) ? wild : s->k_space - s->new_len + 1,
                    "cache_seqlens");
    case 5:
        return poke(h, ARG_leftpad_k, b,
                    random_percent(r, 50) ? wild : s->k_cached + s->new_len + 1, NULL);
    case 6:
        return mha_keys(c, b) > 0 &&
               poke(h, ARG_kv_batch_idx, b, random_percent(r, 50) ? wild : c->rows, NULL);
    case 7: {
        if (!h->args.page_table || mha_keys(c, b) == 0) return false;
        int64_t x = random_range(r, s->pad, s->pad + mha_keys(c, b) - 1);
        const struct mha_tensor *t = &c->tensor[ARG_page_table];
        int64_t at = (tensor_at(t, s->row, x / c->page, 0, 0) - t->buffer.data) / 4;
        return poke(h, ARG_page_table, at, random_percent(r, 50) ? wild : c->num_pages, NULL);
    }
    case 8:
        if (s->q_len == 0 && s->new_len == 0) return false;
        return poke(h, ARG_seqlens_rotary, b, random_percent(r, 50) ? wild : c->ro, "rotary");
    default: return poke(h, ARG_cp_tot_seqused_k, b, PICK(r, -1, INT32_MIN), NULL);
    }
}

/* ---- the calls ------------------------------------------------------------------------------- */

static bool (*const breaks[])(struct check_random *, struct hostile *) = {
    break_rank,    break_dtype,   break_dtype_mismatch, break_extent,    break_agreement,
    break_stride,  break_overlap, break_last_stride,    break_device,    break_pointer,
    break_absence, break_number,  break_exclusion,      break_workspace, break_index,
    break_index,   break_index,   break_extent,         break_stride,
};

static bool names_an_argument(const struct hostile *h, const char *message)
{
    static const char *const others[] = {"plan", "workspace", "max_seqlen", "cache_seqlens",
                                         "num_splits"};
    for (int i = 0; i < 3 && h->names[0]; ++i) {
        if (!h->names[i]) continue;
        if (strstr(message, h->names[i])) return true;
        /* Python's name of the same argument. */
        if (!strcmp(h->names[i], "seqlens_rotary") && strstr(message, "rotary_seqlens"))
            return true;
    }
    if (h->names[0]) return false;
    for (int a = 0; a < MHA_ARGUMENT_COUNT; ++a)
        if (strstr(message, mha_argument_name[a])) return true;
    for (size_t i = 0; i < sizeof others / sizeof *others; ++i)
        if (strstr(message, others[i])) return true;
    return false;
}

/* All buffers as they were: results still canary, caches untouched, guards whole. */
static bool untouched(const struct mha_case *c)
{
    const struct check_buffer *k = &c->tensor[ARG_k].buffer, *v = &c->tensor[ARG_v].buffer;
    if (memcmp(k->data, c->k_before, k->bytes) != 0 || memcmp(v->data, c->v_before, v->bytes) != 0)
        return false;
    const int results[2] = {ARG_out, ARG_lse};
    for (int i = 0; i < 2; ++i) {
        const struct check_buffer *b = &c->tensor[results[i]].buffer;
        for (size_t at = 0; at < b->page_bytes; ++at)
            if ((unsigned char)b->pages[at] != CHECK_CANARY) return false;
    }
    return true;
}

static void call(struct check_test *test, struct check_random *r, struct hostile *h)
{
    char text[512];
    while (!breaks[random_range(r, 0, sizeof breaks / sizeof *breaks - 1)](r, h)) {
        if (h->poked_buffer) check_buffer_protect(h->poked_buffer, true);
        h->poked_buffer = NULL;
        h->names[0] = h->names[1] = NULL;
    }
    test->cases += 1;
    bool survived = check_guarded(test, run_hostile, h);
    if (h->poked_buffer) {
        *h->poked = h->poked_before;
        check_buffer_protect(h->poked_buffer, true);
    }
    const char *message = attn_last_error();
    const char *fault = !survived                        ? "crashed"
                        : h->status == ATTN_OK           ? "was accepted"
                        : !*message                      ? "left no message"
                        : !names_an_argument(h, message) ? "does not name the argument"
                        : !untouched(h->c)               ? "wrote something"
                                                         : NULL;
    if (check_options.broken) fault = fault ? NULL : "spoiled";
    if (fault)
        check_fail(test, "%s: %s: %s: \"%s\"", mha_case_text(h->c, text), h->what, fault, message);
    if (!untouched(h->c)) mha_case_restore(h->c);
}

struct valid_call {
    struct mha_case *c;
    struct attn_mha_fwd_plan plan;
    struct check_buffer workspace;
    attn_status status;
};

static void plan_valid(void *context)
{
    struct valid_call *v = context;
    v->c->args.threads = 1;
    v->plan.size = sizeof v->plan;
    v->status = attn_mha_fwd_plan(&v->c->args, &v->plan);
    if (v->status) return;
    mha_case_accum(v->c, v->plan.splits);
    v->workspace = check_buffer((size_t)v->plan.workspace_bytes, 64);
}

static void run_valid(void *context)
{
    struct valid_call *v = context;
    v->status = attn_mha_fwd_run(&v->c->args, &v->plan, v->workspace.data, v->plan.workspace_bytes,
                                 NULL);
}

static void check_case(struct check_test *test, struct check_random *r, int calls, bool with_oracle)
{
    char why[400], text[512];
    struct mha_case c;
    struct valid_call valid = {.c = &c};
    struct mha_answer answer;
    unsigned features = 0;
    for (int64_t n = random_range(r, 1, 7); n > 0; --n)
        features |= 1u << random_range(r, 0, FEATURE_INDEX_pathological - 1);
    enum attn_dtype dtype = (enum attn_dtype)random_range(r, 0, ATTN_DTYPES - 1);
    mha_case_make(r, dtype, features, &c);
    mha_case_restore(&c);
    if (!check_guarded(test, plan_valid, &valid) || !check_guarded(test, run_valid, &valid)) return;
    if (valid.status) {
        check_fail(test, "%s: valid, but: %s", mha_case_text(&c, text), attn_last_error());
        return;
    }
    struct mha_bits bits = mha_bits_take(&c);
    mha_case_restore(&c);
    for (int i = 0; i < calls; ++i) {
        struct hostile h;
        start(&h, &c, &valid.plan, &valid.workspace);
        call(test, r, &h);
    }
    mha_case_restore(&c);
    if (!check_guarded(test, run_valid, &valid)) return;
    if (valid.status || !mha_bits_same(&c, &bits))
        check_fail(test, "%s: the valid call gives other bits after the hostile ones",
                   mha_case_text(&c, text));
    if (!with_oracle) return;
    mha_case_answer(&c, &answer);
    if (!mha_case_compare(&c, &answer, why))
        check_fail(test, "%s: %s", mha_case_text(&c, text), why);
}

void check_hostile(void)
{
    struct check_test test;
    check_hostile_combine();
    if (!check_open(&test, "hostile", "", "", "broken calls are refused")) return;
    for (int64_t i = 0; i < check_rounds(300); ++i) {
        if (check_options.only_case >= 0 && check_options.only_case != i) continue;
        struct check_random r = check_case_random(&test, i);
        check_pool_reset();
        check_case(&test, &r, 40, i % 4 == 0);
    }
    check_close(&test);
}
