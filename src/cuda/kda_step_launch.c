/* SPDX-License-Identifier: MIT
 *
 * kda_step on Hopper, and kda_fwd with activated gates: one launch.
 */
#include "cuda/kda_cuda.h"
#include "cuda/kernels/kda_step_params.h"

#define LOG2E 1.4426950408889634
#define BLOCK 256
#define ROWS_A_BLOCK 64

static struct attn_kda_rows device_rows(const struct attn_rows *r)
{
    return (struct attn_kda_rows){r->data, r->batch, r->row, r->head};
}

/* Rows on multiples of 8 bytes, which a lane reads at once. */
static int aligned(const struct attn_rows *r)
{
    return (r->batch | r->row | r->head) % 4 == 0 && (uintptr_t)r->data % 8 == 0;
}

static struct attn_kda_states device_states(const struct attn_states *s)
{
    return (struct attn_kda_states){s->data, s->slot, s->head};
}

attn_status attn_kda_step_launch(const struct attn_kda_problem *p, cu_device device,
                                 cu_stream stream)
{
    const struct attn_states *any = p->initial.data ? &p->initial : &p->final;
    const struct attn_cuda_driver *cu;
    struct attn_cuda_kernel *kernel;
    cu_kernel handle;
    ATTN_TRY(attn_kda_cuda_check(p));
    ATTN_TRY(attn_cuda_driver(&cu));
    ATTN_TRY(attn_plain_kernel(p->step ? "attn_kda_step_sm90" : "attn_kda_scan_sm90", &kernel));
    ATTN_TRY(attn_cuda_kernel_load(kernel, device, &handle));

    struct attn_kda_step_params params = {
        .q = device_rows(&p->q),
        .k = device_rows(&p->k),
        .v = device_rows(&p->v),
        .g = device_rows(&p->g),
        .out = device_rows(&p->out),
        .beta = {(void *)(uintptr_t)p->beta, p->beta_batch, p->beta_row, p->beta_head},
        .a_log = p->A_log,
        .dt_bias = p->dt_bias,
        .in = device_states(&p->initial),
        .kept = device_states(&p->final),
        .checkpoint = device_states(&p->checkpoint),
        .state_index = p->state_indices,
        .cu_seqlens = p->cu_seqlens,
        .dt_bias_h = p->dt_bias_head,
        .slots = p->slots,
        .checkpoint_rows = p->checkpoint_rows,
        .n = (int32_t)p->n,
        .h = (int32_t)p->h,
        .t = (int32_t)p->t,
        .d = (int32_t)p->d,
        .every = (int32_t)p->checkpoint_every,
        .cu_is_64 = p->cu_wide,
        .state_is_bf16 = any->dtype == ATTN_BF16,
        .checkpoint_is_bf16 = p->checkpoint.dtype == ATTN_BF16,
        .gate_activated = p->gate_activated,
        .beta_activated = p->beta_activated,
        .aligned = aligned(&p->q) && aligned(&p->k) && aligned(&p->g),
        .scale = (float)p->scale,
        .bound = (float)(p->lower_bound * LOG2E),
    };
    struct cu_launch_config config = {
        .grid = {(unsigned)(p->n * p->h * (p->d / ROWS_A_BLOCK)), 1, 1},
        .block = {BLOCK, 1, 1},
        .stream = stream,
    };
    void *arguments[] = {&params};
    return attn_cuda_status(cu->launch_kernel_ex(&config, handle, arguments, NULL), kernel->name);
}

attn_status attn_kda_step_cuda_run(const struct attn_kda_problem *p, void *stream)
{
    struct attn_cuda_device device;
    if (p->n * p->h == 0) return ATTN_OK;
    ATTN_TRY(attn_cuda_enter(p->device.device_id, &device));
    attn_status status = attn_kda_step_launch(p, device.device, stream);
    attn_cuda_leave(&device);
    return status;
}
