/* SPDX-License-Identifier: MIT
 *
 * kda_fwd and kda_step on every rung against the fp64 recurrence: random sizes, gates from no decay
 * to all of it in one chunk, strided tensors, packed sequences with poison between them, pools of
 * states, checkpoints.  Then what has to be the same to the bit: any number of threads, a sequence
 * alone and in company, a neighbour that is NaN, a run cut at a chunk.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "check.h"
#include "check_gpu.h"
#include "check_kda_recipe.h"
#include "cpu/kda.h"
#include "cpu/x86/kernels_x86.h"

enum { SEQUENCES = 4, SLOTS = 6, TOKENS = 300, CHUNK = 32, WINDOW = 64 };

/* The tensors of a case. */
enum { Q, K, V, G, BETA, OUT, A_LOG, DT_BIAS, INITIAL, FINAL, CU, INDICES, CHECKPOINTS, TENSORS };

struct tensor {
    DLTensor t;
    int64_t shape[4], strides[4];
    struct check_buffer buffer;
};

struct kda_case {
    enum attn_dtype dtype, state_dtype, checkpoint_dtype;
    bool step;
    int64_t b, t, n, h, d;
    int64_t start[SEQUENCES], len[SEQUENCES]; /* start: in the row, or in the packed one */
    int32_t slot[SEQUENCES];
    struct tensor tensor[TENSORS];
    struct attn_kda_fwd_args fwd;
    struct attn_kda_step_args one;
    int32_t threads;
    /* The run under way. */
    const struct attn_cpu_kernels *table; /* NULL: the reference, or the GPU */
    bool gpu;
    bool recipe;           /* instead of either */
    const char *complaint; /* of a run on the GPU */
    attn_status status;
    struct attn_kda_fwd_plan plan;
};

/* What a run wrote. */
struct answer {
    char *out, *final, *checkpoints;
};

static DLDataType type_of(enum attn_dtype t)
{
    return (DLDataType){t == ATTN_BF16 ? kDLBfloat : kDLFloat, t == ATTN_F32 ? 32 : 16, 1};
}

/* Strides with the extents' order kept or, `swap`, dimensions 1 and 2 exchanged; a gap of `gap`
 * elements after each of the innermost `dense` dimensions' blocks. */
static void make(struct tensor *x, DLDataType type, int ndim, const int64_t *shape, int dense,
                 int64_t gap, bool swap)
{
    static const int kept[4] = {0, 1, 2, 3}, swapped[4] = {0, 2, 1, 3};
    const int *order = swap && ndim == 4 ? swapped : kept;
    int64_t stride = 1;
    for (int i = ndim - 1; i >= 0; --i) {
        x->shape[order[i]] = shape[order[i]];
        x->strides[order[i]] = stride;
        stride *= shape[order[i]] ? shape[order[i]] : 1;
        if (i == ndim - dense) stride += gap;
    }
    int64_t last = 1;
    for (int i = 0; i < ndim; ++i) last += (shape[i] - 1) * x->strides[i];
    for (int i = 0; i < ndim; ++i)
        if (shape[i] == 0) last = 0;
    x->buffer = check_buffer((size_t)(last * type.bits / 8), type.bits / 8);
    x->t = (DLTensor){.data = x->buffer.data,
                      .device = {kDLCPU, 0},
                      .ndim = ndim,
                      .dtype = type,
                      .shape = x->shape,
                      .strides = x->strides};
}

static char *at(const struct tensor *x, int64_t i, int64_t j, int64_t k)
{
    int64_t e = i * x->strides[0] + j * x->strides[1] + (x->t.ndim > 2 ? k * x->strides[2] : 0);
    return x->buffer.data + e * x->t.dtype.bits / 8;
}

/* Row of the tensors and token in it of sequence i's token t. */
static int64_t row_of(const struct kda_case *c, int64_t i) { return c->fwd.cu_seqlens ? 0 : i; }

static void fill_token(struct check_random *r, struct kda_case *c, int64_t i, int64_t t, bool nan,
                       float gate, float offset)
{
    static const int arrays[] = {Q, K, V, G};
    int64_t row = row_of(c, i), token = c->start[i] + t;
    for (int64_t h = 0; h < c->h; ++h) {
        for (int a = 0; a < 4; ++a) {
            char *to = at(&c->tensor[arrays[a]], row, token, h);
            if (nan) {
                check_fill_nan(c->dtype, to, c->d);
                continue;
            }
            check_fill_normal(r, c->dtype, to, c->d, arrays[a] == G ? gate : 1);
            for (int64_t e = 0; arrays[a] == G && e < c->d; ++e) {
                float x = attn_load(c->dtype, to, e) + offset;
                attn_store(c->dtype, to, e, c->fwd.gate_activated ? -fabsf(x) : x);
            }
        }
        char *beta = at(&c->tensor[BETA], row, token, h);
        attn_store(c->dtype, beta, 0, nan ? NAN : (float)(random_normal(r) * (double)gate));
        if (!nan && c->fwd.beta_activated) attn_store(c->dtype, beta, 0, (float)random_unit(r));
    }
}

static void make_sequences(struct check_random *r, struct kda_case *c, bool packed)
{
    int64_t most = c->step ? ATTN_KDA_STEP_MAX : random_percent(r, 30) ? TOKENS : 70, at_token = 0;
    c->n = random_range(r, 1, SEQUENCES);
    if (!packed) {
        c->b = c->n;
        c->t = random_edge(r, most);
        if (c->step && c->t == 0) c->t = 1;
        for (int64_t i = 0; i < c->n; ++i) c->start[i] = 0, c->len[i] = c->t;
        return;
    }
    c->b = 1;
    at_token = random_range(r, 0, 3);
    for (int64_t i = 0; i < c->n; ++i) {
        c->start[i] = at_token;
        c->len[i] = random_edge(r, most);
        at_token += c->len[i];
    }
    c->t = at_token + random_range(r, 0, 3);
}

static void make_states(struct check_random *r, struct kda_case *c, bool pool)
{
    int64_t slots = pool ? SLOTS : c->n, gap = pool ? 8 * random_range(r, 0, 3) : 0;
    const int64_t shape[4] = {slots, c->h, c->d, c->d};
    bool first = c->step || random_percent(r, 60), last = !c->step && random_percent(r, 80);
    if (pool && !first && !last) first = true;
    float size = c->dtype == ATTN_F16 ? 3 : (float)PICK(r, 1, 1, 1000000);
    if (first) {
        struct tensor *x = &c->tensor[INITIAL];
        make(x, type_of(c->state_dtype), 4, shape, 3, gap, false);
        check_fill_nan(c->state_dtype, x->buffer.data,
                       (int64_t)x->buffer.bytes / attn_dtype_bytes(c->state_dtype));
        for (int64_t i = 0; i < c->n; ++i)
            for (int64_t h = 0; c->slot[i] >= 0 && h < c->h; ++h)
                check_fill_normal(r, c->state_dtype, at(x, c->slot[i], h, 0), c->d * c->d, size);
        c->fwd.initial_state = c->one.state = &x->t;
    }
    if (last && first && random_percent(r, 40)) {
        c->tensor[FINAL] = c->tensor[INITIAL]; /* in place */
        c->fwd.final_state = &c->tensor[INITIAL].t;
    } else if (last) {
        make(&c->tensor[FINAL], type_of(c->state_dtype), 4, shape, 3, gap, false);
        c->fwd.final_state = &c->tensor[FINAL].t;
    }
}

static void make_case(struct check_random *r, enum attn_dtype dtype, bool step, struct kda_case *c)
{
    *c = (struct kda_case){.dtype = dtype, .step = step, .threads = 1};
    bool packed = random_percent(r, 60), pool = random_percent(r, 50), wide = random_percent(r, 50);
    c->h = random_range(r, 1, 3);
    c->d = PICK(r, 64, 128);
    c->state_dtype = random_percent(r, 70) ? ATTN_F32 : ATTN_BF16;
    c->checkpoint_dtype = random_percent(r, 50) ? ATTN_F32 : ATTN_BF16;
    make_sequences(r, c, packed);

    int32_t slots[SLOTS] = {0, 1, 2, 3, 4, 5};
    for (int64_t i = 0; i < SEQUENCES; ++i) {
        int64_t j = random_range(r, i, SLOTS - 1);
        int32_t swap = slots[i];
        slots[i] = slots[j];
        slots[j] = swap;
        c->slot[i] = pool ? (random_percent(r, 15) ? -1 : slots[i]) : (int32_t)i;
    }

    const int64_t shape[4] = {c->b, c->t, c->h, c->d};
    bool strided = random_percent(r, 50);
    for (int a = Q; a <= OUT; ++a) {
        make(&c->tensor[a], type_of(dtype), a == BETA ? 3 : 4, shape, 1,
             strided && a != BETA ? 8 * random_range(r, 0, 2) : 0,
             strided && random_percent(r, 50));
        if (a != OUT)
            check_fill_nan(dtype, c->tensor[a].buffer.data,
                           (int64_t)c->tensor[a].buffer.bytes / attn_dtype_bytes(dtype));
    }
    c->fwd = (struct attn_kda_fwd_args){.size = sizeof c->fwd,
                                        .q = &c->tensor[Q].t,
                                        .k = &c->tensor[K].t,
                                        .v = &c->tensor[V].t,
                                        .g = &c->tensor[G].t,
                                        .beta = &c->tensor[BETA].t,
                                        .out = &c->tensor[OUT].t,
                                        .scale = 0.09,
                                        .gate_activated = random_percent(r, 25),
                                        .beta_activated = random_percent(r, 25)};
    if (!c->fwd.gate_activated) {
        c->fwd.lower_bound = (double)-PICK(r, 0, 1, 5, 5, 5);
        if (random_percent(r, 70)) {
            make(&c->tensor[A_LOG], type_of(ATTN_F32), 1, &c->h, 1, 0, false);
            for (int64_t h = 0; h < c->h; ++h)
                ((float *)(void *)c->tensor[A_LOG].buffer.data)[h] = (float)PICK(r, 0, 1, 3, -3,
                                                                                 90);
            c->fwd.A_log = &c->tensor[A_LOG].t;
        }
        if (random_percent(r, 70)) {
            make(&c->tensor[DT_BIAS], type_of(ATTN_F32), 2, &shape[2], 1, 0, false);
            check_fill_normal(r, ATTN_F32, c->tensor[DT_BIAS].buffer.data, c->h * c->d, 1);
            c->fwd.dt_bias = &c->tensor[DT_BIAS].t;
        }
    }
    if (packed) {
        const int64_t entries = c->n + 1;
        make(&c->tensor[CU], (DLDataType){kDLInt, wide ? 64 : 32, 1}, 1, &entries, 1, 0, false);
        for (int64_t i = 0; i <= c->n; ++i) {
            int64_t now = i < c->n ? c->start[i] : c->start[i - 1] + c->len[i - 1];
            char *to = c->tensor[CU].buffer.data;
            if (wide)
                ((int64_t *)(void *)to)[i] = now;
            else
                ((int32_t *)(void *)to)[i] = (int32_t)now;
        }
        c->fwd.cu_seqlens = &c->tensor[CU].t;
    }
    make_states(r, c, pool);
    if (pool) {
        make(&c->tensor[INDICES], (DLDataType){kDLInt, 32, 1}, 1, &c->n, 1, 0, false);
        memcpy(c->tensor[INDICES].buffer.data, c->slot, 4 * (size_t)c->n);
        c->fwd.state_indices = &c->tensor[INDICES].t;
    }
    if (!step && random_percent(r, 40)) {
        int64_t every = PICK(r, 16, 32, 48, 64, 80), rows = random_range(r, 0, 1);
        for (int64_t i = 0; i < c->n; ++i) rows += c->len[i] / every;
        const int64_t states[4] = {rows, c->h, c->d, c->d};
        make(&c->tensor[CHECKPOINTS], type_of(c->checkpoint_dtype), 4, states, 3, 8, false);
        c->fwd.checkpoint_states = &c->tensor[CHECKPOINTS].t;
        c->fwd.checkpoint_every = every;
    }
    /* Decays: near one, middling, all gone at once, both in one chunk, and none at all. */
    float gate = (float)PICK(r, 1, 1, 8, 30), offset = (float)PICK(r, 0, 0, -9, 8);
    for (int64_t i = 0; i < c->n; ++i)
        for (int64_t t = 0; t < c->len[i]; ++t) fill_token(r, c, i, t, false, gate, offset);
    c->one = (struct attn_kda_step_args){.size = sizeof c->one,
                                         .q = c->fwd.q,
                                         .k = c->fwd.k,
                                         .v = c->fwd.v,
                                         .g = c->fwd.g,
                                         .beta = c->fwd.beta,
                                         .out = c->fwd.out,
                                         .A_log = c->fwd.A_log,
                                         .dt_bias = c->fwd.dt_bias,
                                         .state = c->fwd.initial_state,
                                         .state_indices = c->fwd.state_indices,
                                         .cu_seqlens = c->fwd.cu_seqlens,
                                         .scale = c->fwd.scale,
                                         .lower_bound = c->fwd.lower_bound,
                                         .gate_activated = c->fwd.gate_activated,
                                         .beta_activated = c->fwd.beta_activated};
}

static const char *case_text(const struct kda_case *c, char text[256])
{
    int n = snprintf(text, 256, "%s b %d t %d h %d d %d%s%s%s every %d bound %g lengths",
                     attn_dtype_name(c->dtype), (int)c->b, (int)c->t, (int)c->h, (int)c->d,
                     c->fwd.gate_activated ? " gate_activated" : "",
                     c->fwd.state_indices ? " pool" : "", c->fwd.cu_seqlens ? " packed" : "",
                     (int)c->fwd.checkpoint_every, c->fwd.lower_bound);
    for (int64_t i = 0; i < c->n && n < 230; ++i)
        n += snprintf(text + n, 256 - (size_t)n, " %d", (int)c->len[i]);
    return text;
}

/* ---- running --------------------------------------------------------------------------------- */

static void run_on_gpu(struct kda_case *c)
{
    struct attn_kda_fwd_args fwd = c->fwd;
    struct attn_kda_step_args one = c->one;
    const DLTensor **slots[TENSORS][2] = {
        [Q] = {&fwd.q, &one.q},
        [K] = {&fwd.k, &one.k},
        [V] = {&fwd.v, &one.v},
        [G] = {&fwd.g, &one.g},
        [BETA] = {&fwd.beta, &one.beta},
        [OUT] = {&fwd.out, &one.out},
        [A_LOG] = {&fwd.A_log, &one.A_log},
        [DT_BIAS] = {&fwd.dt_bias, &one.dt_bias},
        [INITIAL] = {&fwd.initial_state, &one.state},
        [FINAL] = {&fwd.final_state},
        [CU] = {&fwd.cu_seqlens, &one.cu_seqlens},
        [INDICES] = {&fwd.state_indices, &one.state_indices},
        [CHECKPOINTS] = {&fwd.checkpoint_states},
    };
    bool in_place = c->fwd.final_state && c->fwd.final_state == c->fwd.initial_state;
    struct check_mirror m;
    check_mirror_open(&m);
    for (int a = 0; a < TENSORS; ++a) {
        const struct tensor *x = &c->tensor[a];
        const DLTensor **slot = slots[a][c->step];
        if (!slot || !*slot) continue;
        if (a == FINAL && in_place)
            *slot = fwd.initial_state;
        else
            *slot = check_mirror_add(&m, &x->t, &x->buffer,
                                     a == OUT || a == FINAL || a == CHECKPOINTS ||
                                         (a == INITIAL && (c->step || in_place)));
    }
    if (c->step) {
        c->status = attn_kda_step_run(&one, NULL);
    } else {
        c->plan = (struct attn_kda_fwd_plan){.size = sizeof c->plan};
        c->status = attn_kda_fwd_plan(&fwd, &c->plan);
        if (c->status) return;
        void *workspace = check_mirror_workspace(&m, c->plan.workspace_bytes);
        c->status = attn_kda_fwd_run(&fwd, &c->plan, workspace, c->plan.workspace_bytes, NULL);
    }
    c->complaint = check_mirror_close(&m);
}

static void run_case(void *context)
{
    struct kda_case *c = context;
    struct attn_kda_problem p;
    if (c->gpu && !c->recipe) {
        run_on_gpu(c);
        return;
    }
    c->fwd.threads = c->one.threads = c->threads;
    c->status = c->step ? attn_kda_step_check(&c->one, &p) : attn_kda_fwd_check(&c->fwd, &p, true);
    if (c->status) return;
    if (c->recipe) {
        c->status = attn_kda_check_values(&p);
        if (!c->status) check_kda_recipe(&p);
        return;
    }
    if (!c->table) {
        c->status = attn_kda_check_values(&p);
        if (!c->status) attn_kda_ref_run(&p, c->threads);
        return;
    }
    if (c->step) {
        c->status = attn_kda_step_cpu_run_with(c->table, &p);
        return;
    }
    c->plan = (struct attn_kda_fwd_plan){.size = sizeof c->plan};
    c->status = attn_kda_fwd_cpu_plan_with(c->table, &p, &c->plan);
    if (c->status) return;
    struct check_buffer w = check_buffer((size_t)c->plan.workspace_bytes, 64);
    c->status = attn_kda_fwd_cpu_run_with(c->table, &p, &c->plan, w.data, c->plan.workspace_bytes);
}

/* States before the run, so that one in place can be run again. */
static char *states_before(const struct kda_case *c)
{
    const struct check_buffer *x = &c->tensor[INITIAL].buffer;
    return x->data ? memcpy(check_scratch(x->bytes + 1), x->data, x->bytes) : NULL;
}

/* Runs with fresh outputs; false when it failed. */
static bool run_fresh(struct check_test *test, struct kda_case *c, const char *before,
                      struct answer *answer)
{
    static const int written[] = {FINAL, OUT, CHECKPOINTS};
    char **to[] = {&answer->final, &answer->out, &answer->checkpoints}, text[256];
    for (int a = 0; a < 3; ++a) {
        const struct check_buffer *x = &c->tensor[written[a]].buffer;
        if (x->data) memset(x->data, CHECK_CANARY, x->bytes);
    }
    const struct check_buffer *initial = &c->tensor[INITIAL].buffer;
    if (initial->data) memcpy(initial->data, before, initial->bytes);
    if (!check_guarded(test, run_case, c)) return false;
    if (c->gpu && c->status == ATTN_E_NOT_BUILT) return false;
    if (c->status || c->complaint) {
        check_fail(test, "%s: status %d: %s", case_text(c, text), (int)c->status,
                   c->status ? attn_last_error() : c->complaint);
        return false;
    }
    if (c->step) c->tensor[FINAL] = c->tensor[INITIAL];
    for (int a = 0; a < 3; ++a) {
        const struct check_buffer *x = &c->tensor[written[a]].buffer;
        *to[a] = x->data ? memcpy(check_scratch(x->bytes + 1), x->data, x->bytes) : NULL;
        if (x->data && !check_buffer_intact(x)) {
            check_fail(test, "%s: bytes beside an output were written", case_text(c, text));
            return false;
        }
    }
    return true;
}

static bool same(const struct kda_case *c, const struct answer *a, const struct answer *b)
{
    return memcmp(a->out, b->out, c->tensor[OUT].buffer.bytes) == 0 &&
           (!a->final || memcmp(a->final, b->final, c->tensor[FINAL].buffer.bytes) == 0) &&
           (!a->checkpoints ||
            memcmp(a->checkpoints, b->checkpoints, c->tensor[CHECKPOINTS].buffer.bytes) == 0);
}

/* ---- comparing ------------------------------------------------------------------------------- */

struct error {
    double difference, reference;
};

static void add(struct error *e, enum attn_dtype t, const char *got, const char *want, int64_t n)
{
    for (int64_t i = 0; i < n; ++i) {
        double x = (double)attn_load(t, got, i), y = (double)attn_load(t, want, i);
        e->difference += (x - y) * (x - y);
        e->reference += y * y;
    }
}

/* RMS of the difference over RMS of the reference.  An inf or NaN on one side alone is NaN. */
static bool within(const struct error *e, double limit)
{
    return sqrt(e->difference) <= limit * sqrt(e->reference) + 1e-30;
}

/* Of one run against the reference. */
struct errors {
    struct error out, states, checkpoints;
};

/* Whether the kernel's operands are bf16 tiles, so that it is measured beside the recipe. */
static bool on_tiles(const struct kda_case *c)
{
    bool tiles = c->table && c->table->kda_fwd[c->dtype] &&
                 c->table->kda_fwd[c->dtype] != &attn_kda_fwd_avx2[ATTN_BF16] &&
                 c->table->kda_fwd[c->dtype] != &attn_kda_fwd_avx512[ATTN_BF16];
    return c->dtype == ATTN_BF16 && !c->step && (tiles || c->gpu);
}

/* Relative error allowed for results of type `result`, whose own rounding a few tokens do not
 * average.  On tiles a little more than the recipe's, where that is finite: activated gates may
 * exceed the range of its 2^-G. */
static double limit_of(const struct kda_case *c, enum attn_dtype result, const struct error *recipe)
{
    double limit = (on_tiles(c) ? 0.006 : 1e-5) + 1.5 * check_unit(result);
    double allowed = 1.1 * sqrt(recipe->difference / recipe->reference);
    return isfinite(allowed) ? fmax(limit, allowed) : limit;
}

/* All of out but the sequences' tokens is canary. */
static void check_outside(struct check_test *test, const struct kda_case *c, const char *out)
{
    char text[256];
    const struct tensor *x = &c->tensor[OUT];
    char *left = memcpy(check_scratch(x->buffer.bytes + 1), out, x->buffer.bytes);
    for (int64_t i = 0; i < c->n; ++i)
        for (int64_t t = 0; t < c->len[i]; ++t)
            for (int64_t h = 0; h < c->h; ++h)
                memset(left + (at(x, row_of(c, i), c->start[i] + t, h) - x->buffer.data),
                       CHECK_CANARY, (size_t)(c->d * attn_dtype_bytes(c->dtype)));
    for (size_t i = 0; i < x->buffer.bytes; ++i) {
        if ((unsigned char)left[i] == CHECK_CANARY) continue;
        check_fail(test, "%s: out was written outside the sequences", case_text(c, text));
        return;
    }
}

/* Tokens t0 <= t < t1 of sequence i. */
static void add_tokens(struct error *e, const struct kda_case *c, const struct answer *got,
                       const struct answer *want, int64_t i, int64_t t0, int64_t t1)
{
    const struct tensor *out = &c->tensor[OUT];
    for (int64_t t = t0; t < t1; ++t)
        for (int64_t h = 0; h < c->h; ++h) {
            int64_t offset = at(out, row_of(c, i), c->start[i] + t, h) - out->buffer.data;
            add(e, c->dtype, got->out + offset, want->out + offset, c->d);
        }
}

static struct errors errors_of(const struct kda_case *c, const struct answer *got,
                               const struct answer *want)
{
    struct errors e = {0};
    const struct tensor *final = &c->tensor[FINAL], *checkpoints = &c->tensor[CHECKPOINTS];
    for (int64_t i = 0; i < c->n; ++i) {
        add_tokens(&e.out, c, got, want, i, 0, c->len[i]);
        for (int64_t h = 0; got->final && c->slot[i] >= 0 && h < c->h; ++h) {
            int64_t offset = at(final, c->slot[i], h, 0) - final->buffer.data;
            add(&e.states, c->state_dtype, got->final + offset, want->final + offset, c->d * c->d);
        }
    }
    for (int64_t i = 0; got->checkpoints && i < checkpoints->shape[0]; ++i)
        for (int64_t h = 0; h < c->h; ++h) {
            int64_t offset = at(checkpoints, i, h, 0) - checkpoints->buffer.data;
            add(&e.checkpoints, c->checkpoint_dtype, got->checkpoints + offset,
                want->checkpoints + offset, c->d * c->d);
        }
    return e;
}

static void check_error(struct check_test *test, const struct kda_case *c, const char *what,
                        const struct error *e, double limit)
{
    char text[256];
    if (!within(e, limit))
        check_fail(test, "%s: %s: error %.2e, limit %.2e", case_text(c, text), what,
                   sqrt(e->difference / e->reference), limit);
}

static void compare(struct check_test *test, const struct kda_case *c, const struct answer *got,
                    const struct answer *want, const struct answer *rounded)
{
    char text[48];
    struct errors e = errors_of(c, got, want), recipe = {0};
    if (rounded) recipe = errors_of(c, rounded, want);
    double limit = limit_of(c, c->dtype, &recipe.out);
    check_error(test, c, "out", &e.out, limit);
    check_error(test, c, "states", &e.states, limit_of(c, c->state_dtype, &recipe.states));
    check_error(test, c, "checkpoints", &e.checkpoints,
                limit_of(c, c->checkpoint_dtype, &recipe.checkpoints));
    for (int64_t i = 0; i < c->n; ++i)
        for (int64_t t = 0; t < c->len[i]; t += WINDOW) {
            int64_t end = t + WINDOW < c->len[i] ? t + WINDOW : c->len[i];
            struct error window = {0};
            add_tokens(&window, c, got, want, i, t, end);
            snprintf(text, sizeof text, "out of sequence %d from token %d", (int)i, (int)t);
            check_error(test, c, text, &window, 2 * limit);
        }
    check_outside(test, c, got->out);
}

/* ---- what has to be the same to the bit ------------------------------------------------------ */

static void check_same_bits(struct check_test *test, struct check_random *r, struct kda_case *c,
                            const char *before, const struct answer *first)
{
    static const int threads[] = {2, 3, 16};
    char text[256];
    struct answer again;
    size_t mark = check_pool_mark();
    for (int i = 0; i < 3; ++i) {
        c->threads = threads[i];
        if (!run_fresh(test, c, before, &again)) return;
        if (!same(c, first, &again))
            check_fail(test, "%s: other bits with %d threads", case_text(c, text), threads[i]);
        check_pool_release(mark);
    }
    c->threads = 1;

    /* One sequence alone, the others as short as they can be: only in packed cases. */
    int64_t lost = random_range(r, 0, c->n - 1);
    if (c->len[lost] == 0) return;
    for (int64_t t = 0; t < c->len[lost]; ++t) fill_token(r, c, lost, t, true, 1, 0);
    if (!run_fresh(test, c, before, &again)) return;
    const struct tensor *out = &c->tensor[OUT], *final = &c->tensor[FINAL];
    for (int64_t i = 0; i < c->n; ++i) {
        if (i == lost) continue;
        bool right = true;
        for (int64_t h = 0; h < c->h; ++h) {
            for (int64_t t = 0; t < c->len[i]; ++t) {
                int64_t offset = at(out, row_of(c, i), c->start[i] + t, h) - out->buffer.data;
                right = right && memcmp(first->out + offset, again.out + offset,
                                        (size_t)(c->d * attn_dtype_bytes(c->dtype))) == 0;
            }
            if (!first->final || c->slot[i] < 0) continue;
            int64_t offset = at(final, c->slot[i], h, 0) - final->buffer.data;
            right = right && memcmp(first->final + offset, again.final + offset,
                                    (size_t)(c->d * c->d * attn_dtype_bytes(c->state_dtype))) == 0;
        }
        if (!right)
            check_fail(test, "%s: NaN in sequence %d reached sequence %d", case_text(c, text),
                       (int)lost, (int)i);
    }
}

/* A dense fp32-state run cut at a multiple of the chunk has the bits of the whole. */
static void check_cut(struct check_test *test, struct check_random *r, struct kda_case *c,
                      const char *before, const struct answer *whole)
{
    char text[256];
    if (c->fwd.cu_seqlens || c->fwd.checkpoint_states || c->fwd.state_indices || c->t <= CHUNK ||
        !c->fwd.initial_state || !c->fwd.final_state || c->state_dtype != ATTN_F32)
        return;
    int64_t cut = CHUNK * random_range(r, 1, (c->t - 1) / CHUNK);
    struct answer part;
    for (int a = Q; a <= OUT; ++a) c->tensor[a].shape[1] = cut;
    if (!run_fresh(test, c, before, &part)) return;
    memcpy(c->tensor[INITIAL].buffer.data, part.final, c->tensor[INITIAL].buffer.bytes);
    for (int a = Q; a <= OUT; ++a) {
        c->tensor[a].shape[1] = c->t - cut;
        c->tensor[a].t.data = (char *)c->tensor[a].t.data +
                              cut * c->tensor[a].strides[1] * attn_dtype_bytes(c->dtype);
    }
    if (!check_guarded(test, run_case, c) || c->status) return;
    if (memcmp(c->tensor[OUT].buffer.data, whole->out, c->tensor[OUT].buffer.bytes) != 0 ||
        memcmp(c->tensor[FINAL].buffer.data, whole->final, c->tensor[FINAL].buffer.bytes) != 0)
        check_fail(test, "%s: cut at %d: other bits than the whole", case_text(c, text), (int)cut);
}

/* Index values that make no sense are named, and nothing is written. */
static void check_wild(struct check_test *test, struct check_random *r, struct kda_case *c)
{
    char text[256];
    int argument = c->fwd.cu_seqlens ? CU : INDICES;
    if (!c->tensor[argument].buffer.data || c->n == 0) return;
    struct tensor *x = &c->tensor[argument];
    int64_t i = random_range(r, 0, x->shape[0] - 1);
    int64_t wild = PICK(r, INT32_MIN, -2, INT32_MAX, TOKENS * SEQUENCES + 100);
    if (x->t.dtype.bits == 64)
        ((int64_t *)(void *)x->buffer.data)[i] = random_percent(r, 30) ? INT64_MIN : wild;
    else
        ((int32_t *)(void *)x->buffer.data)[i] = (int32_t)wild;
    memset(c->tensor[OUT].buffer.data, CHECK_CANARY, c->tensor[OUT].buffer.bytes);
    if (!check_guarded(test, run_case, c)) return;
    bool clean = c->status == ATTN_E_VALUE || c->status == ATTN_E_SHAPE;
    for (size_t b = 0; b < c->tensor[OUT].buffer.bytes; ++b)
        clean = clean && (unsigned char)c->tensor[OUT].buffer.data[b] == CHECK_CANARY;
    if (!clean)
        check_fail(test, "%s: %lld in an index tensor: status %d", case_text(c, text),
                   (long long)wild, (int)c->status);
}

static bool has_kernel(const struct check_rung *rung, enum attn_dtype dtype, bool step)
{
    return step ? rung->table.kda_step[dtype] != NULL : rung->table.kda_fwd[dtype] != NULL;
}

/* A case on one rung, or on a GPU, against the fp64 recurrence. */
static void check_one(struct check_test *test, const struct check_rung *rung, int64_t i,
                      struct check_random r, enum attn_dtype dtype, bool step)
{
    struct kda_case c;
    struct answer want, got, rounded;
    check_pool_reset();
    make_case(&r, dtype, step, &c);
    test->index = i;
    test->cases += 1;
    char *before = states_before(&c);
    if (!run_fresh(test, &c, before, &want)) return;
    c.table = rung ? &rung->table : NULL;
    c.gpu = !rung;
    if (on_tiles(&c)) {
        c.recipe = true;
        if (!run_fresh(test, &c, before, &rounded)) return;
        c.recipe = false;
    }
    if (!run_fresh(test, &c, before, &got)) {
        test->cases -= c.gpu && c.status == ATTN_E_NOT_BUILT;
        return;
    }
    if (check_options.broken) memset(got.out, 0x7f, c.tensor[OUT].buffer.bytes);
    compare(test, &c, &got, &want, on_tiles(&c) ? &rounded : NULL);
    if (check_options.broken || i % 3) return;
    if (i % 2)
        check_same_bits(test, &r, &c, before, &got);
    else if (!step && (c.gpu || has_kernel(rung, dtype, step)))
        check_cut(test, &r, &c, before, &got);
    if (rung) check_wild(test, &r, &c); /* a GPU brings them into range */
}

static void check_op(const char *op, enum attn_dtype dtype, bool step)
{
    const struct check_rung *rungs;
    struct check_test tests[8];
    int n = check_rungs(&rungs), open = 0;
    int all = n + (dtype != ATTN_F32 && check_gpu());
    for (int k = 0; k < all; ++k)
        open += check_open(&tests[k], "kda", k < n ? rungs[k].name : "sm90", attn_dtype_name(dtype),
                           "%s", op);
    for (int64_t i = 0; i < check_rounds(60) && open; ++i) {
        if (check_options.only_case >= 0 && check_options.only_case != i) continue;
        for (int k = 0; k < all; ++k) {
            if (!tests[k].open || (k < n && !has_kernel(&rungs[k], dtype, step) && i % 8)) continue;
            check_one(&tests[k], k < n ? &rungs[k] : NULL, i, check_case_random(&tests[0], i),
                      dtype, step);
        }
    }
    for (int k = 0; k < all; ++k) check_close(&tests[k]);
}

void check_kda(void)
{
    for (int t = 0; t < ATTN_F8; ++t) { /* fp32, bf16, fp16 */
        check_op("kda_fwd", (enum attn_dtype)t, false);
        check_op("kda_step", (enum attn_dtype)t, true);
    }
}
