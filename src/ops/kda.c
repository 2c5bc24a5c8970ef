/* SPDX-License-Identifier: MIT
 *
 * kda_fwd and kda_step: every argument check, and the way to the back end.
 *
 * Messages read "argument: expected WISH, got FINDING"; letters in a wish are those of attn.h.
 * Values inside cu_seqlens and state_indices are not looked at here: a CPU back end checks them
 * before it writes anything, a GPU back end clamps or skips on the device.
 */
#include "ops/kda.h"

#include "core/env.h"
#include "core/tensor.h"
#include "ops/backend.h"
#include "ops/call.h"

#define LOWER_BOUND_MIN (-5.0)
#define CHECKPOINT_UNIT 16
/* Beyond it the product of scale and a state overflows in the kernels' floats. */
#define SCALE_MAX 1e30

/* Stands for the data of an empty tensor, which may be NULL: its presence still has to show. */
#define EMPTY_DATA ((void *)(uintptr_t)64)

typedef struct attn_kda_problem problem_t;

/* The arguments that kda_fwd and kda_step share. */
struct inputs {
    const DLTensor *q, *k, *v, *g, *beta, *A_log, *dt_bias, *cu_seqlens, *state_indices;
    double scale, lower_bound;
    bool gate_activated, beta_activated;
};
#define INPUTS_OF(a)                                                                               \
    {                                                                                              \
        .q = (a)->q,                                                                               \
        .k = (a)->k,                                                                               \
        .v = (a)->v,                                                                               \
        .g = (a)->g,                                                                               \
        .beta = (a)->beta,                                                                         \
        .A_log = (a)->A_log,                                                                       \
        .dt_bias = (a)->dt_bias,                                                                   \
        .cu_seqlens = (a)->cu_seqlens,                                                             \
        .state_indices = (a)->state_indices,                                                       \
        .scale = (a)->scale,                                                                       \
        .lower_bound = (a)->lower_bound,                                                           \
        .gate_activated = (a)->gate_activated != 0,                                                \
        .beta_activated = (a)->beta_activated != 0,                                                \
    }

static void *data_of(const DLTensor *t)
{
    return attn_tensor_empty(t) ? EMPTY_DATA : attn_tensor_data(t);
}

/* Rank, extents and device.  `wish` spells the extents in words. */
static attn_status check_shape(const DLTensor *t, const char *name, const char *wish, int32_t ndim,
                               const int64_t *want, const problem_t *p)
{
    char text[128];
    ATTN_CHECK(t, ATTN_E_VALUE, "%s: expected a tensor, got none", name);
    ATTN_TRY(attn_tensor_check(t, name, ndim, wish));
    ATTN_TRY(attn_device_check(t, name, p->device));
    for (int32_t i = 0; i < ndim; ++i)
        ATTN_CHECK(t->shape[i] == want[i], ATTN_E_SHAPE,
                   "%s: expected %s with extent %lld in dimension %d, got %s", name, wish,
                   (long long)want[i], (int)i, attn_tensor_shape_text(t, text));
    return ATTN_OK;
}

static attn_status check_dtype(const DLTensor *t, const char *name, enum attn_dtype want)
{
    enum attn_dtype got = ATTN_F32;
    ATTN_TRY(attn_tensor_dtype(t, name, attn_dtype_name(want), &got));
    ATTN_CHECK(got == want, ATTN_E_DTYPE, "%s: expected dtype %s, got %s", name,
               attn_dtype_name(want), attn_dtype_name(got));
    return ATTN_OK;
}

static attn_status check_stride(const DLTensor *t, const char *name, int32_t dim, int64_t want)
{
    ATTN_CHECK(t->shape[dim] <= 1 || attn_tensor_empty(t) || attn_tensor_stride(t, dim) == want,
               ATTN_E_SHAPE, "%s: expected stride %lld in dimension %d, got %lld", name,
               (long long)want, (int)dim, (long long)attn_tensor_stride(t, dim));
    return ATTN_OK;
}

/* A [b, t, h, d] tensor of the problem's dtype. */
static attn_status check_rows(const DLTensor *t, const char *name, const problem_t *p,
                              struct attn_rows *rows)
{
    ATTN_TRY(check_shape(t, name, "[b, t, h, d]", 4, (int64_t[]){p->b, p->t, p->h, p->d}, p));
    ATTN_TRY(check_dtype(t, name, p->dtype));
    ATTN_TRY(check_stride(t, name, 3, 1));
    *rows = (struct attn_rows){data_of(t), attn_tensor_stride(t, 0), attn_tensor_stride(t, 1),
                               attn_tensor_stride(t, 2)};
    return ATTN_OK;
}

/* q, what it says of the problem, and the number of sequences. */
static attn_status check_query(const struct inputs *a, problem_t *p)
{
    char text[128];
    const DLTensor *q = a->q, *cu = a->cu_seqlens;
    ATTN_CHECK(q, ATTN_E_VALUE, "q: expected a tensor, got none");
    p->device = q->device;
    ATTN_CHECK(attn_backend_for(p->device.device_type), ATTN_E_DEVICE,
               "q: expected on a CPU or CUDA device, got DLPack device type %d",
               (int)p->device.device_type);
    const char *wish = p->device.device_type == kDLCPU ? "fp32, bf16 or fp16" : "bf16 or fp16";
    ATTN_TRY(attn_tensor_dtype(q, "q", wish, &p->dtype));
    ATTN_CHECK(p->dtype == ATTN_BF16 || p->dtype == ATTN_F16 ||
                   (p->dtype == ATTN_F32 && p->device.device_type == kDLCPU),
               ATTN_E_DTYPE, "q: expected dtype %s, got %s", wish, attn_dtype_name(p->dtype));
    ATTN_CHECK(q->ndim == 4, ATTN_E_SHAPE, "q: expected [b, t, h, d], got %d dimensions",
               (int)q->ndim);
    p->b = q->shape[0];
    p->t = q->shape[1];
    p->h = q->shape[2];
    p->d = q->shape[3];
    ATTN_CHECK(p->d == 64 || p->d == 128, ATTN_E_SHAPE,
               "q: expected a head dim of 64 or 128, got %s", attn_tensor_shape_text(q, text));
    ATTN_TRY(check_rows(q, "q", p, &p->q));

    p->n = p->b;
    if (!cu) return ATTN_OK;
    ATTN_TRY(attn_tensor_check(cu, "cu_seqlens", 1, "[n + 1]"));
    ATTN_TRY(attn_device_check(cu, "cu_seqlens", p->device));
    ATTN_CHECK(cu->dtype.code == kDLInt && (cu->dtype.bits == 32 || cu->dtype.bits == 64),
               ATTN_E_DTYPE, "cu_seqlens: expected dtype int32 or int64, got %s",
               attn_tensor_dtype_text(cu, text));
    ATTN_CHECK(cu->shape[0] >= 1, ATTN_E_SHAPE, "cu_seqlens: expected [n + 1], got [0]");
    ATTN_TRY(check_stride(cu, "cu_seqlens", 0, 1));
    ATTN_CHECK(p->b == 1, ATTN_E_SHAPE, "q: expected b = 1 with cu_seqlens, got %s",
               attn_tensor_shape_text(q, text));
    p->n = cu->shape[0] - 1;
    p->cu_seqlens = attn_tensor_data(cu);
    p->cu_wide = cu->dtype.bits == 64;
    return ATTN_OK;
}

/* beta and what the gate is made of. */
static attn_status check_gate(const struct inputs *a, problem_t *p)
{
    ATTN_TRY(check_shape(a->beta, "beta", "[b, t, h]", 3, (int64_t[]){p->b, p->t, p->h}, p));
    ATTN_TRY(check_dtype(a->beta, "beta", p->dtype));
    p->beta = data_of(a->beta);
    p->beta_batch = attn_tensor_stride(a->beta, 0);
    p->beta_row = attn_tensor_stride(a->beta, 1);
    p->beta_head = attn_tensor_stride(a->beta, 2);
    p->gate_activated = a->gate_activated;
    p->beta_activated = a->beta_activated;

    ATTN_CHECK(a->lower_bound >= LOWER_BOUND_MIN && a->lower_bound <= 0, ATTN_E_VALUE,
               "lower_bound: expected in [-5, 0], got %g", a->lower_bound);
    ATTN_CHECK(!a->gate_activated || a->lower_bound == 0, ATTN_E_VALUE,
               "lower_bound: expected 0 with gate_activated, got %g", a->lower_bound);
    ATTN_CHECK(!a->gate_activated || !a->A_log, ATTN_E_VALUE,
               "A_log: expected none with gate_activated, got a tensor");
    ATTN_CHECK(!a->gate_activated || !a->dt_bias, ATTN_E_VALUE,
               "dt_bias: expected none with gate_activated, got a tensor");
    p->lower_bound = a->lower_bound;
    if (a->A_log) {
        ATTN_TRY(check_shape(a->A_log, "A_log", "[h]", 1, &p->h, p));
        ATTN_TRY(check_dtype(a->A_log, "A_log", ATTN_F32));
        ATTN_TRY(check_stride(a->A_log, "A_log", 0, 1));
        p->A_log = data_of(a->A_log);
    }
    if (a->dt_bias) {
        ATTN_TRY(check_shape(a->dt_bias, "dt_bias", "[h, d]", 2, (int64_t[]){p->h, p->d}, p));
        ATTN_TRY(check_dtype(a->dt_bias, "dt_bias", ATTN_F32));
        ATTN_TRY(check_stride(a->dt_bias, "dt_bias", 1, 1));
        p->dt_bias = data_of(a->dt_bias);
        p->dt_bias_head = attn_tensor_stride(a->dt_bias, 0);
    }
    return ATTN_OK;
}

static attn_status check_inputs(const struct inputs *a, problem_t *p)
{
    ATTN_TRY(check_query(a, p));
    ATTN_TRY(check_rows(a->k, "k", p, &p->k));
    ATTN_TRY(check_rows(a->v, "v", p, &p->v));
    ATTN_TRY(check_rows(a->g, "g", p, &p->g));
    ATTN_TRY(check_gate(a, p));
    ATTN_CHECK(a->scale >= -SCALE_MAX && a->scale <= SCALE_MAX, ATTN_E_VALUE,
               "scale: expected in [-1e30, 1e30], got %g", a->scale);
    p->scale = a->scale;
    if (!a->state_indices) return ATTN_OK;
    ATTN_TRY(attn_index_check(a->state_indices, "state_indices", p->n, p->device));
    p->state_indices = data_of(a->state_indices);
    return ATTN_OK;
}

static attn_status check_out(const DLTensor *out, problem_t *p)
{
    ATTN_TRY(check_rows(out, "out", p, &p->out));
    return attn_distinct_check(out, "out");
}

/* States [slots, h, V, K], fp32 or bf16; slots < 0: any number. */
static attn_status check_states(const DLTensor *t, const char *name, int64_t slots,
                                const problem_t *p, struct attn_states *states)
{
    ATTN_CHECK(t->ndim == 4, ATTN_E_SHAPE, "%s: expected [slots, h, V, K], got %d dimensions", name,
               (int)t->ndim);
    if (slots < 0) slots = t->shape[0];
    ATTN_TRY(check_shape(t, name, "[slots, h, V, K]", 4, (int64_t[]){slots, p->h, p->d, p->d}, p));
    ATTN_TRY(attn_tensor_dtype(t, name, "fp32 or bf16", &states->dtype));
    ATTN_CHECK(states->dtype == ATTN_F32 || states->dtype == ATTN_BF16, ATTN_E_DTYPE,
               "%s: expected dtype fp32 or bf16, got %s", name, attn_dtype_name(states->dtype));
    ATTN_TRY(check_stride(t, name, 3, 1));
    ATTN_TRY(check_stride(t, name, 2, p->d));
    states->data = data_of(t);
    states->slot = attn_tensor_stride(t, 0);
    states->head = attn_tensor_stride(t, 1);
    return ATTN_OK;
}

static attn_status check_fwd_states(const struct attn_kda_fwd_args *a, problem_t *p)
{
    ATTN_CHECK(!a->state_indices || a->initial_state || a->final_state, ATTN_E_VALUE,
               "state_indices: expected with initial_state or final_state, got neither");
    p->slots = a->state_indices ? -1 : p->n;
    if (a->initial_state) {
        ATTN_TRY(check_states(a->initial_state, "initial_state", p->slots, p, &p->initial));
        p->slots = a->initial_state->shape[0];
    }
    if (a->final_state) {
        ATTN_TRY(check_states(a->final_state, "final_state", p->slots, p, &p->final));
        ATTN_TRY(attn_distinct_check(a->final_state, "final_state"));
        p->slots = a->final_state->shape[0];
        ATTN_CHECK(!a->initial_state || p->initial.dtype == p->final.dtype, ATTN_E_DTYPE,
                   "final_state: expected initial_state's dtype %s, got %s",
                   attn_dtype_name(p->initial.dtype), attn_dtype_name(p->final.dtype));
    }

    ATTN_CHECK(a->checkpoint_states || a->checkpoint_every == 0, ATTN_E_VALUE,
               "checkpoint_every: expected 0 without checkpoint_states, got %lld",
               (long long)a->checkpoint_every);
    if (!a->checkpoint_states) return ATTN_OK;
    ATTN_CHECK(a->checkpoint_every > 0 && a->checkpoint_every <= ATTN_EXTENT_MAX &&
                   a->checkpoint_every % CHECKPOINT_UNIT == 0,
               ATTN_E_VALUE, "checkpoint_every: expected a multiple of %d in [%d, 2^31), got %lld",
               CHECKPOINT_UNIT, CHECKPOINT_UNIT, (long long)a->checkpoint_every);
    p->checkpoint_every = a->checkpoint_every;
    ATTN_TRY(check_states(a->checkpoint_states, "checkpoint_states", -1, p, &p->checkpoint));
    ATTN_TRY(attn_distinct_check(a->checkpoint_states, "checkpoint_states"));
    p->checkpoint_rows = a->checkpoint_states->shape[0];
    int64_t need = p->b * (p->t / p->checkpoint_every);
    ATTN_CHECK(p->cu_seqlens || p->checkpoint_rows >= need, ATTN_E_SHAPE,
               "checkpoint_states: expected at least %lld states, got %lld", (long long)need,
               (long long)p->checkpoint_rows);
    return ATTN_OK;
}

attn_status attn_kda_fwd_check(const struct attn_kda_fwd_args *a, problem_t *p, bool outputs)
{
    ATTN_TRY(attn_struct_check("args", a, sizeof *a));
    *p = (problem_t){.threads = a->threads};
    const struct inputs in = INPUTS_OF(a);
    ATTN_TRY(check_inputs(&in, p));
    ATTN_TRY(check_fwd_states(a, p));
    if (!outputs && !a->out) return ATTN_OK;
    ATTN_TRY(check_out(a->out, p));
    const DLTensor *const written[3] = {a->out, a->final_state, a->checkpoint_states};
    ATTN_TRY(attn_apart_check(a->cu_seqlens, "cu_seqlens", written, 3));
    return attn_apart_check(a->state_indices, "state_indices", written, 3);
}

attn_status attn_kda_step_check(const struct attn_kda_step_args *a, problem_t *p)
{
    ATTN_TRY(attn_struct_check("args", a, sizeof *a));
    *p = (problem_t){.threads = a->threads, .step = true};
    const struct inputs in = INPUTS_OF(a);
    ATTN_TRY(check_inputs(&in, p));
    ATTN_CHECK(p->cu_seqlens || (p->t >= 1 && p->t <= ATTN_KDA_STEP_MAX), ATTN_E_SHAPE,
               "q: expected 1 to %d tokens a sequence, got %lld", ATTN_KDA_STEP_MAX,
               (long long)p->t);
    ATTN_CHECK(a->state, ATTN_E_VALUE, "state: expected a tensor, got none");
    ATTN_TRY(check_states(a->state, "state", a->state_indices ? -1 : p->n, p, &p->initial));
    ATTN_TRY(attn_distinct_check(a->state, "state"));
    p->final = p->initial;
    p->slots = a->state->shape[0];
    ATTN_TRY(check_out(a->out, p));
    const DLTensor *const written[2] = {a->out, a->state};
    ATTN_TRY(attn_apart_check(a->cu_seqlens, "cu_seqlens", written, 2));
    return attn_apart_check(a->state_indices, "state_indices", written, 2);
}

void attn_kda_fwd_shape(const problem_t *p, int64_t shape[8])
{
    int64_t features = (int64_t)p->dtype | (p->cu_seqlens ? 8 : 0) |
                       (int64_t)p->device.device_type << 16;
    const int64_t now[8] = {p->b, p->t, p->n, p->h, p->d, p->slots, p->checkpoint_every, features};
    memcpy(shape, now, sizeof now);
}

attn_status attn_kda_fwd_plan(const struct attn_kda_fwd_args *args, struct attn_kda_fwd_plan *plan)
{
    problem_t p;
    ATTN_TRY(attn_struct_check("plan", plan, sizeof *plan));
    ATTN_TRY(attn_kda_fwd_check(args, &p, false));
    memset(plan, 0, sizeof *plan);
    plan->size = sizeof *plan;
    attn_kda_fwd_shape(&p, plan->shape);
    return attn_backend_for(p.device.device_type)->kda_fwd_plan(&p, plan);
}

attn_status attn_kda_fwd_run(const struct attn_kda_fwd_args *args,
                             const struct attn_kda_fwd_plan *plan, void *workspace,
                             int64_t workspace_bytes, void *stream)
{
    problem_t p;
    struct attn_kda_fwd_plan own = {.size = sizeof own};
    ATTN_TRY(attn_kda_fwd_check(args, &p, true));
    attn_kda_fwd_shape(&p, own.shape);
    if (plan) {
        ATTN_TRY(attn_plan_check("kda_fwd", plan, sizeof *plan));
        ATTN_CHECK(memcmp(own.shape, plan->shape, sizeof own.shape) == 0, ATTN_E_VALUE,
                   "plan: expected one made for these shapes, got another's");
    } else {
        ATTN_TRY(attn_backend_for(p.device.device_type)->kda_fwd_plan(&p, &own));
        plan = &own;
    }
    ATTN_TRY(attn_workspace_check(workspace, workspace_bytes, plan->workspace_bytes));
    if (attn_log_on())
        attn_log("%s b %lld t %lld n %lld h %lld d %lld workspace %lld", plan->kernel,
                 (long long)p.b, (long long)p.t, (long long)p.n, (long long)p.h, (long long)p.d,
                 (long long)plan->workspace_bytes);
    if (p.t == 0 && !p.final.data) return ATTN_OK; /* nothing to write, however many heads */
    return attn_backend_for(p.device.device_type)
        ->kda_fwd_run(&p, plan, workspace, workspace_bytes, stream);
}

attn_status attn_kda_step_run(const struct attn_kda_step_args *args, void *stream)
{
    problem_t p;
    ATTN_TRY(attn_kda_step_check(args, &p));
    return attn_backend_for(p.device.device_type)->kda_step_run(&p, stream);
}
