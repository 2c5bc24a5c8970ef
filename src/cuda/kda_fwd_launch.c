/* SPDX-License-Identifier: MIT
 *
 * Runs a checked kda_fwd problem on the current device: copies of what the copy engine cannot
 * address, for ragged batches the order of their sequences, then the kernel.  Activated gates, which
 * have no bound, go token by token through kda_scan.
 */
#include <string.h>

#include "cuda/kda_cuda.h"
#include "cuda/kernels/kda_fwd_params.h"
#include "cuda/kernels/kda_order_params.h"
#include "cuda/kernels/kda_pack_params.h"
#include "cuda/tma.h"

#define LOG2E 1.4426950408889634
#define CHUNK 16
#define PACK_BLOCK 256
#define PACK_GRID_MAX 1056 /* eight blocks a multiprocessor */

typedef struct attn_kda_problem problem_t;
typedef struct attn_kda_cuda_plan plan_t;

static struct attn_cuda_kernel *kernel_of(const problem_t *p)
{
    for (int i = 0; i < attn_kda_fwd_kernel_count; i++)
        if (attn_kda_fwd_kernels[i].d_qk == p->d) return &attn_kda_fwd_kernels[i];
    return NULL;
}

static attn_status choose(const problem_t *p, int multiprocessors, plan_t *plan,
                          struct attn_cuda_kernel **kernel)
{
    memset(plan, 0, sizeof *plan);
    ATTN_TRY(attn_kda_cuda_check(p));
    if (p->gate_activated) return attn_plain_kernel("attn_kda_scan_sm90", kernel);
    attn_kda_cuda_choose(p, multiprocessors, plan);
    *kernel = kernel_of(p);
    ATTN_CHECK(*kernel, ATTN_E_NOT_BUILT,
               "kda_fwd: not in this build for GPUs, which was made without nvcc");
    return ATTN_OK;
}

attn_status attn_kda_fwd_cuda_plan(const problem_t *p, struct attn_kda_fwd_plan *out)
{
    struct attn_cuda_device device;
    struct attn_cuda_kernel *kernel;
    plan_t plan;
    ATTN_TRY(attn_cuda_enter(p->device.device_id, &device));
    attn_status status = choose(p, device.multiprocessors, &plan, &kernel);
    attn_cuda_leave(&device);
    if (status) return status;
    out->workspace_bytes = plan.workspace_bytes;
    strncpy(out->kernel, kernel->name, sizeof out->kernel - 1);
    return ATTN_OK;
}

/* A [b, t, h, d] tensor, `panels` of 64 columns a box: see struct attn_kda_fwd_maps. */
static attn_status encode(const problem_t *p, const struct attn_rows *r, int64_t panels,
                          const char *name, struct attn_tensor_map *map)
{
    return attn_tma_encode(&(struct attn_tma){.rank = 5,
                                              .base = r->data,
                                              .extent = {64, p->t, p->d / 64, p->h, p->b},
                                              .stride = {r->row, 64, r->head, r->batch},
                                              .box = {64, CHUNK, (int32_t)panels, 1, 1}},
                           false, name, map);
}

static void fill_params(const problem_t *p, const plan_t *plan, char *workspace,
                        struct attn_kda_fwd_params *out)
{
    const struct attn_states *any = p->initial.data ? &p->initial : &p->final;
    memset(out, 0, sizeof *out);
    out->beta = p->beta;
    out->a_log = p->A_log;
    out->dt_bias = p->dt_bias;
    out->out = p->out.data;
    out->state_in = p->initial.data;
    out->state_out = p->final.data;
    out->state_index = p->state_indices;
    out->checkpoints = p->checkpoint.data;
    out->cu_seqlens = p->cu_seqlens;
    if (plan->ordered) {
        out->ticket = (int32_t *)(void *)workspace;
        out->order = (const int32_t *)(const void *)(workspace + ATTN_KDA_TICKET_BYTES);
    }
    out->beta_b = p->beta_batch;
    out->beta_t = p->beta_row;
    out->beta_h = p->beta_head;
    out->out_b = p->out.batch;
    out->out_t = p->out.row;
    out->out_h = p->out.head;
    out->in_n = p->initial.slot;
    out->in_h = p->initial.head;
    out->out_n = p->final.slot;
    out->out_state_h = p->final.head;
    out->checkpoint_n = p->checkpoint.slot;
    out->checkpoint_h = p->checkpoint.head;
    out->checkpoint_rows = p->checkpoint_rows;
    out->dt_bias_h = p->dt_bias_head;
    out->slots = p->slots;
    out->n = (int32_t)p->n;
    out->h = (int32_t)p->h;
    out->t = (int32_t)p->t;
    out->out_aligned = plan->out_aligned;
    out->every = (int32_t)p->checkpoint_every;
    out->cu_is_64 = p->cu_wide;
    out->state_is_bf16 = any->dtype == ATTN_BF16;
    out->checkpoint_is_bf16 = p->checkpoint.dtype == ATTN_BF16;
    out->beta_activated = p->beta_activated;
    out->scale = (float)p->scale;
    out->bound = (float)(p->lower_bound * LOG2E);
}

static attn_status launch_plain(const char *name, void *params, unsigned grid, unsigned block,
                                cu_device device, cu_stream stream)
{
    const struct attn_cuda_driver *cu;
    struct attn_cuda_kernel *kernel;
    cu_kernel handle;
    ATTN_TRY(attn_cuda_driver(&cu));
    ATTN_TRY(attn_plain_kernel(name, &kernel));
    ATTN_TRY(attn_cuda_kernel_load(kernel, device, &handle));
    struct cu_launch_config config = {.grid = {grid, 1, 1},
                                      .block = {block, 1, 1},
                                      .stream = stream};
    return attn_cuda_status(cu->launch_kernel_ex(&config, handle, (void *[]){params}, NULL), name);
}

static attn_status launch_order(const struct attn_kda_fwd_params *fwd, cu_device device,
                                cu_stream stream)
{
    struct attn_kda_order_params params = {
        .cu_seqlens = fwd->cu_seqlens,
        .order = (int32_t *)(uintptr_t)fwd->order,
        .ticket = fwd->ticket,
        .n = fwd->n,
        .t = fwd->t,
        .cu_is_64 = fwd->cu_is_64,
    };
    return launch_plain("attn_kda_order_sm90", &params, 1, 1024, device, stream);
}

/* Dense copies where the plan wants them; *dense is p with these in place. */
static attn_status launch_copies(const problem_t *p, const plan_t *plan, char *workspace,
                                 cu_device device, cu_stream stream, problem_t *dense)
{
    char *to = workspace + plan->workspace_bytes;
    *dense = *p;
    struct attn_rows *rows[4] = {&dense->q, &dense->k, &dense->g, &dense->v};
    for (int i = 0; i < 4; i++) {
        if (!(plan->copied >> i & 1)) continue;
        to -= plan->copy_bytes;
        struct attn_kda_pack_params params = {
            .from = (const uint16_t *)(const void *)rows[i]->data,
            .to = (uint16_t *)(void *)to,
            .from_b = rows[i]->batch,
            .from_t = rows[i]->row,
            .from_h = rows[i]->head,
            .chunks = p->b * p->t * p->h * p->d / 8,
            .t = (int32_t)p->t,
            .h = (int32_t)p->h,
            .d = (int32_t)p->d,
        };
        int64_t blocks = (params.chunks + PACK_BLOCK - 1) / PACK_BLOCK;
        if (blocks > PACK_GRID_MAX) blocks = PACK_GRID_MAX;
        if (blocks)
            ATTN_TRY(launch_plain("attn_kda_pack_sm90", &params, (unsigned)blocks, PACK_BLOCK,
                                  device, stream));
        *rows[i] = (struct attn_rows){to, p->t * p->h * p->d, p->h * p->d, p->d};
    }
    return ATTN_OK;
}

/* Pointers and strides may have changed since the plan was made: choosing again is cheap. */
static attn_status launch(const problem_t *p, const struct attn_cuda_device *device,
                          char *workspace, int64_t workspace_bytes, cu_stream stream)
{
    const struct attn_cuda_driver *cu;
    struct attn_cuda_kernel *kernel;
    cu_kernel handle;
    plan_t plan;
    problem_t dense;
    struct attn_kda_fwd_params params;
    struct attn_kda_fwd_maps maps;
    ATTN_TRY(choose(p, device->multiprocessors, &plan, &kernel));
    ATTN_CHECK(workspace_bytes >= plan.workspace_bytes, ATTN_E_WORKSPACE,
               "workspace: expected %lld bytes, got %lld: plan and run differ",
               (long long)plan.workspace_bytes, (long long)workspace_bytes);
    ATTN_TRY(attn_cuda_driver(&cu));
    ATTN_TRY(attn_cuda_kernel_load(kernel, device->device, &handle));
    fill_params(p, &plan, workspace, &params);
    ATTN_TRY(launch_copies(p, &plan, workspace, device->device, stream, &dense));
    ATTN_TRY(encode(p, &dense.q, p->d / 64, "q", &maps.q));
    ATTN_TRY(encode(p, &dense.k, p->d / 64, "k", &maps.k));
    ATTN_TRY(encode(p, &dense.g, p->d / 64, "g", &maps.g));
    ATTN_TRY(encode(p, &dense.v, ATTN_KDA_VALUE_ROWS / 64, "v", &maps.v));
    if (plan.ordered) ATTN_TRY(launch_order(&params, device->device, stream));

    struct cu_launch_config config = {
        /* the kernel says itself how many of them are a cluster */
        .grid = {(unsigned)plan.grid, 1, 1},
        .block = {ATTN_KDA_FWD_THREADS((unsigned)p->d, ATTN_KDA_VALUE_ROWS), 1, 1},
        .shared_bytes = (unsigned)kernel->shared_bytes,
        .stream = stream,
    };
    void *arguments[] = {&params, &maps};
    return attn_cuda_status(cu->launch_kernel_ex(&config, handle, arguments, NULL), kernel->name);
}

attn_status attn_kda_fwd_cuda_run(const problem_t *p, const struct attn_kda_fwd_plan *plan,
                                  char *workspace, int64_t workspace_bytes, void *stream)
{
    struct attn_cuda_device device;
    (void)plan;
    if (p->n * p->h == 0) return ATTN_OK;
    ATTN_TRY(attn_cuda_enter(p->device.device_id, &device));
    attn_status status = p->gate_activated ? attn_kda_step_launch(p, device.device, stream)
                                           : launch(p, &device, workspace, workspace_bytes, stream);
    attn_cuda_leave(&device);
    return status;
}
