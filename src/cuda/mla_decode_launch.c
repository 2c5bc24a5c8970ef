/* SPDX-License-Identifier: MIT
 *
 * Runs a checked mla_decode problem: plan, parameters, one tensor map, the kernel and the merging.
 */
#include "cuda/mla_decode_cuda.h"

#include <math.h>
#include <string.h>

#include "core/int.h"
#include "cuda/mha_decode_cuda.h"
#include "cuda/tma.h"

#define THREADS 384
#define FEW_WARPS (ATTN_MLA_FEW_THREADS / 32)
#define LOG2E 1.4426950408889634
#define LENGTH_MAX ((int64_t)1 << 30)
#define ITEM_COST 4 /* steps that an item costs beside its keys: q, the first product, its rows */

typedef struct attn_mla_problem problem_t;
typedef struct attn_mha_decode_cuda_plan plan_t;

static bool multiple_of_16(int64_t bytes, int64_t extent) { return extent <= 1 || bytes % 16 == 0; }

/* Every row starts on 16 bytes, the unit in which it is read or written; strides in bytes. */
static attn_status check_rows(const char *name, const void *data, int64_t batch, int64_t batches,
                              int64_t row, int64_t rows, int64_t head, int64_t heads)
{
    ATTN_CHECK((uintptr_t)data % 16 == 0 && multiple_of_16(batch, batches) &&
                   multiple_of_16(row, rows) && multiple_of_16(head, heads),
               ATTN_E_SHAPE,
               "%s: expected rows that start on multiples of 16 bytes, got strides of %lld, %lld, "
               "%lld bytes at %p",
               name, (long long)batch, (long long)row, (long long)head, data);
    return ATTN_OK;
}

static attn_status check_built(const problem_t *p)
{
    const struct attn_mla_cache *c = &p->cache[0];
    ATTN_CHECK(p->op == ATTN_MLA_DECODE, ATTN_E_NOT_BUILT, "%s: not built for Hopper",
               attn_mla_op_name(p->op));
    ATTN_CHECK(p->dtype == ATTN_BF16 || p->dtype == ATTN_F16, ATTN_E_NOT_BUILT,
               "q: %s is not built for mla_decode on Hopper; bf16 and fp16 are",
               attn_dtype_name(p->dtype));
    ATTN_CHECK(p->d_qk == 576 && p->d_v == 512, ATTN_E_NOT_BUILT,
               "q: widths 576 and 512 are built for mla_decode on Hopper, got %lld and %lld",
               (long long)p->d_qk, (long long)p->d_v);
    ATTN_CHECK(p->s_q * p->h_q < LENGTH_MAX && p->max_pages * c->page < LENGTH_MAX,
               ATTN_E_NOT_BUILT,
               "q, block_table: fewer than 2^30 rows and keys are built for Hopper, got %lld and "
               "%lld",
               (long long)(p->s_q * p->h_q), (long long)(p->max_pages * c->page));
    ATTN_TRY(check_rows("q", p->q.data, 2 * p->q.batch, p->b, 2 * p->q.row, p->s_q, 2 * p->q.head,
                        p->h_q));
    ATTN_TRY(check_rows("k_cache", c->data, c->page_stride, c->num_pages, c->row_stride, c->page,
                        c->head_stride, p->h_k));
    return check_rows("out", p->out.data, 2 * p->out.batch, p->b, 2 * p->out.row, p->s_q,
                      2 * p->out.head, p->h_q);
}

/* Rows of the largest box that never straddles two pages; 0: rows are gathered. */
static int box_rows(const problem_t *p)
{
    const struct attn_mla_cache *c = &p->cache[0];
    const int64_t limit = (int64_t)1 << 40;
    if ((c->num_pages > 1 && (c->page_stride <= 0 || c->page_stride >= limit)) ||
        (c->page > 1 && (c->row_stride <= 0 || c->row_stride >= limit)) ||
        (p->h_k > 1 && (c->head_stride <= 0 || c->head_stride >= limit)))
        return 0;
    for (int rows = ATTN_DECODE_KEYS; rows >= 8; rows /= 2)
        if (c->page % rows == 0) return rows;
    return 0;
}

static attn_status choose(const problem_t *p, const struct attn_cuda_device *device, plan_t *plan)
{
    ATTN_TRY(check_built(p));
    memset(plan, 0, sizeof *plan);
    plan->kernel = -1;
    for (int i = 0; i < attn_mla_decode_kernel_count; i++)
        if (attn_mla_decode_kernels[i].dtype == (int)p->dtype &&
            attn_mla_decode_kernels[i].d_qk == p->d_qk)
            plan->kernel = i;
    ATTN_CHECK(plan->kernel >= 0, ATTN_E_NOT_BUILT,
               "mla_decode: no Hopper kernel in this build, which was made without nvcc");
    plan->box_rows = box_rows(p);
    int64_t rows = p->s_q * (p->h_q / p->h_k), keys = p->max_pages * p->cache[0].page;
    int64_t tiles = (rows + ATTN_DECODE_ROWS - 1) / ATTN_DECODE_ROWS;
    attn_decode_share(tiles > 0 ? tiles : 1, p->b * p->h_k,
                      (keys + ATTN_DECODE_KEYS - 1) / ATTN_DECODE_KEYS, rows, p->d_v,
                      device->multiprocessors, plan);
    return ATTN_OK;
}

/* Whether mla_decode_few can take the call that `plan` is for, and its plan: boxes of q and of
 * keys, one KV head, pieces that one warp can find, and blocks that are on the device together. */
static bool choose_few(const problem_t *p, const struct attn_cuda_device *device,
                       const plan_t *plan, plan_t *few)
{
    const struct attn_rows *q = &p->q;
    const int64_t limit = (int64_t)1 << 40;
    bool heads = p->h_q == 1 || (q->head > 0 && 2 * q->head < limit);
    bool queries = p->s_q == 1 ||
                   (p->h_q > 1 ? q->row == p->h_q * q->head : q->row > 0 && 2 * q->row < limit);
    bool batch = p->b == 1 || (q->batch > 0 && 2 * q->batch < limit);
    if (p->b > ATTN_MLA_FEW_SEQUENCES || p->h_k != 1 || plan->parts == 1 || !plan->box_rows ||
        p->cache[0].num_pages == 0 || !(heads && queries && batch) ||
        plan->parts * plan->tiles > device->multiprocessors)
        return false;

    *few = *plan;
    few->kernel = -1;
    for (int i = 0; i < attn_mla_decode_few_kernel_count; i++)
        if (attn_mla_decode_few_kernels[i].dtype == (int)p->dtype) few->kernel = i;
    int64_t slots = (plan->parts + p->b) * plan->tiles; /* of rows: [m, l]; of columns */
    few->slot_rows = (int)round_up(plan->slot_rows, 16);
    few->out = slots * ATTN_DECODE_ROWS * 8;
    few->bytes = few->out + slots * few->slot_rows * p->d_v * 4;
    return few->kernel >= 0;
}

static void fill_params(const problem_t *p, const plan_t *plan, char *workspace,
                        struct attn_decode_params *out)
{
    const struct attn_mla_cache *c = &p->cache[0];
    struct attn_mha_fwd_params *call = &out->call;
    memset(out, 0, sizeof *out);
    attn_decode_fill_plan(plan, workspace, out);
    out->q = p->q.data;
    out->q_stride_b = p->q.batch;
    out->q_stride_s = p->q.row;
    out->q_stride_h = p->q.head;
    out->lse_stride_s = p->lse_row;
    out->fp16 = p->dtype == ATTN_F16;

    call->out = p->out.data;
    call->lse = p->lse;
    call->seqused_k = p->cache_seqlens;
    call->page_table = p->block_table;
    call->page_table_stride = p->block_table_row;
    call->k = c->data;
    call->out_stride_b = p->out.batch;
    call->out_stride_s = p->out.row;
    call->out_stride_h = p->out.head;
    call->lse_stride_b = p->lse_batch;
    call->lse_stride_h = p->lse_head;
    call->k_stride_b = c->page_stride / 2;
    call->k_stride_s = c->row_stride / 2;
    call->k_stride_h = c->head_stride / 2;
    call->b = (int32_t)p->b;
    call->s_q = (int32_t)p->s_q;
    call->s_k = c->num_pages > 0 ? (int32_t)(p->max_pages * c->page) : 0;
    call->k_rows = (int32_t)p->b;
    call->num_pages = (int32_t)c->num_pages;
    call->h_k = (int32_t)p->h_k;
    call->group = (int32_t)(p->h_q / p->h_k);
    call->d_qk = (int32_t)p->d_qk;
    call->d_v = (int32_t)p->d_v;
    call->page = (int32_t)c->page;
    call->box_rows = plan->box_rows;
    call->gather = plan->box_rows == 0;
    call->cluster = 1;
    call->section = 1;
    call->window_left = ATTN_WINDOW_OFF;
    call->window_right = p->causal ? 0 : ATTN_WINDOW_OFF;
    call->cp_world = 1;
    call->score = p->scale > 0 ? ATTN_SCORE_PLAIN : ATTN_SCORE_SCALED;
    call->score_scale = (float)p->scale;
    call->exp_scale = (float)(p->scale > 0 ? p->scale * LOG2E : LOG2E);
    call->lse_empty = INFINITY;
}

/* As the k of struct attn_mha_fwd_maps. */
static attn_status encode_cache(const problem_t *p, int rows, struct attn_tensor_map *map)
{
    const struct attn_mla_cache *c = &p->cache[0];
    int64_t row = c->page > 1 ? c->row_stride / 2 : 8; /* of a single row: anything */
    return attn_tma_encode(&(struct attn_tma){.rank = 5,
                                              .base = c->data - 2 * rows * row,
                                              .extent = {p->d_qk, rows, c->page + 1, p->h_k,
                                                         c->num_pages},
                                              .stride = {row, row, c->head_stride / 2,
                                                         c->page_stride / 2},
                                              .box = {64, rows, 1, 1, 1}},
                           p->dtype == ATTN_F16, "k_cache: cuTensorMapEncodeTiled", map);
}

/* {576, packed rows, b, 1}; a box is a tile of one row tile. */
static attn_status encode_q(const problem_t *p, struct attn_tensor_map *map)
{
    int64_t row = p->h_q > 1   ? p->q.head
                  : p->s_q > 1 ? p->q.row
                               : 8; /* of a single row: anything */
    int64_t batch = p->b > 1 ? p->q.batch : 8;
    return attn_tma_encode(&(struct attn_tma){.rank = 4,
                                              .base = (void *)(uintptr_t)p->q.data,
                                              .extent = {p->d_qk, p->s_q * p->h_q, p->b, 1},
                                              .stride = {row, batch, 8},
                                              .box = {64, ATTN_DECODE_ROWS, 1, 1}},
                           p->dtype == ATTN_F16, "q: cuTensorMapEncodeTiled", map);
}

/* Warps that share a unit of merging, a strip of a warp's rows: as many as give each block one. */
static int merge_turns(const problem_t *p, const plan_t *few)
{
    int64_t warps = few->parts * few->tiles * FEW_WARPS;
    int64_t units = p->b * few->tiles * (few->slot_rows / 16) * (p->d_v / 8);
    int turns = FEW_WARPS;
    while (turns > 1 && (FEW_WARPS % turns || units * turns > warps)) turns--;
    return turns;
}

/* One launch, which also merges: its blocks wait for each other. */
static attn_status launch_few(const problem_t *p, const plan_t *few, char *workspace,
                              const struct attn_cuda_device *device, cu_stream stream,
                              cu_result *result)
{
    const struct attn_cuda_driver *cu;
    struct attn_cuda_kernel *kernel = &attn_mla_decode_few_kernels[few->kernel];
    struct attn_decode_params params;
    struct attn_mha_fwd_maps maps;
    cu_kernel handle;
    ATTN_TRY(attn_cuda_driver(&cu));
    ATTN_TRY(attn_cuda_kernel_load(kernel, device->device, &handle));
    fill_params(p, few, workspace, &params);
    params.item_cost = p->b > 1 ? ITEM_COST : 0;
    params.combine_groups = merge_turns(p, few);
    params.by_group = attn_division_by(params.call.group);
    params.by_page = attn_division_by(params.call.page);
    params.by_parts = attn_division_by(params.parts);
    memset(&maps, 0, sizeof maps);
    ATTN_TRY(encode_q(p, &maps.q));
    ATTN_TRY(encode_cache(p, few->box_rows, &maps.k));
    struct cu_launch_attribute together = {.id = CU_LAUNCH_COOPERATIVE, .value.cooperative = 1};
    struct cu_launch_config config = {
        .grid = {(unsigned)(few->parts * few->tiles), 1, 1},
        .block = {ATTN_MLA_FEW_THREADS, 1, 1},
        .shared_bytes = (unsigned)kernel->shared_bytes,
        .stream = stream,
        .attributes = &together,
        .attribute_count = 1,
    };
    void *arguments[] = {&params, &maps};
    *result = cu->launch_kernel_ex(&config, handle, arguments, NULL);
    return ATTN_OK;
}

static attn_status plan_on(const problem_t *p, const struct attn_cuda_device *device,
                           struct attn_mla_plan *out)
{
    plan_t plan, few;
    ATTN_TRY(choose(p, device, &plan));
    out->workspace_bytes = plan.bytes;
    out->tile[0] = plan.kernel;
    out->tile[1] = plan.tiles;
    out->tile[2] = plan.box_rows == 0;
    out->tile[3] = plan.parts * plan.tiles;
    const char *name = attn_mla_decode_kernels[plan.kernel].name;
    if (choose_few(p, device, &plan, &few)) { /* room for either, see run_on */
        out->workspace_bytes = max64(plan.bytes, few.bytes);
        name = attn_mla_decode_few_kernels[few.kernel].name;
    }
    strncpy(out->kernel, name, sizeof out->kernel - 1);
    return ATTN_OK;
}

attn_status attn_mla_decode_launch(struct attn_decode_params *params,
                                   const struct attn_mha_fwd_maps *maps,
                                   struct attn_cuda_kernel *kernel,
                                   const struct attn_cuda_device *device, cu_stream stream)
{
    params->item_cost = ITEM_COST;
    return attn_decode_launch(params, maps, kernel, THREADS, device, stream);
}

/* Pointers and strides may have changed since the plan was made: choosing again is cheap.  Where
 * the context has fewer multiprocessors than the device, mla_decode_few may not start: then
 * mla_decode does. */
static attn_status run_on(const problem_t *p, const struct attn_cuda_device *device,
                          char *workspace, int64_t workspace_bytes, cu_stream stream)
{
    struct attn_decode_params params;
    struct attn_mha_fwd_maps maps;
    plan_t plan, few;
    ATTN_TRY(choose(p, device, &plan));
    ATTN_CHECK(workspace_bytes >= plan.bytes, ATTN_E_WORKSPACE,
               "workspace: expected %lld bytes, got %lld: plan and run differ",
               (long long)plan.bytes, (long long)workspace_bytes);
    if (choose_few(p, device, &plan, &few) && workspace_bytes >= few.bytes) {
        cu_result result;
        ATTN_TRY(launch_few(p, &few, workspace, device, stream, &result));
        if (result != CU_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE)
            return attn_cuda_status(result, attn_mla_decode_few_kernels[few.kernel].name);
    }
    fill_params(p, &plan, workspace, &params);
    memset(&maps, 0, sizeof maps);
    if (plan.box_rows && params.call.s_k > 0) ATTN_TRY(encode_cache(p, plan.box_rows, &maps.k));
    return attn_mla_decode_launch(&params, &maps, &attn_mla_decode_kernels[plan.kernel], device,
                                  stream);
}

attn_status attn_mla_cuda_plan(const problem_t *p, struct attn_mla_plan *out)
{
    struct attn_cuda_device device;
    ATTN_TRY(attn_cuda_enter(p->device.device_id, &device));
    attn_status status = plan_on(p, &device, out);
    attn_cuda_leave(&device);
    return status;
}

attn_status attn_mla_cuda_run(const problem_t *p, const struct attn_mla_plan *planned,
                              char *workspace, int64_t workspace_bytes, void *stream)
{
    struct attn_cuda_device device;
    (void)planned;
    if (p->s_q == 0 || p->h_q == 0) return ATTN_OK;
    ATTN_TRY(attn_cuda_enter(p->device.device_id, &device));
    attn_status status = run_on(p, &device, workspace, workspace_bytes, stream);
    attn_cuda_leave(&device);
    return status;
}
