/* SPDX-License-Identifier: MIT
 *
 * Runs a checked mha_fwd problem through the decode kernels: parameters, tensor maps, one launch and
 * the merging behind it.
 */
#include <stdatomic.h>
#include <string.h>

#include "core/int.h"
#include "cuda/mha_decode_cuda.h"
#include "cuda/mla_decode_cuda.h"

#define KERNELS_MAX 64
#define DEVICES_MAX 64
#define COMBINE_THREADS 128
#define COMBINE_THREADS_MAX 256
#define COMBINE_BLOCKS_A_MULTIPROCESSOR 8
#define NARROW_SEQUENCES 32
#define NARROW_COST (1 << 30)
#define ITEM_COST 2 /* steps that an item costs beside its keys: q, the first product, its rows */

typedef struct attn_mha_fwd_problem problem_t;
typedef struct attn_mha_decode_cuda_plan plan_t;

/* The kernels of both engines in one row; those of mla_decode take qv. */
static bool is_latent(int i) { return i >= attn_mha_decode_kernel_count; }

static struct attn_cuda_kernel *kernel_at(int i)
{
    return is_latent(i) ? &attn_mla_decode_kernels[i - attn_mha_decode_kernel_count]
                        : &attn_mha_decode_kernels[i];
}

/* A loading warpgroup, and one or two consumers. */
static int threads(const struct attn_cuda_kernel *kernel, int cluster)
{
    return 128 + 128 * (cluster > 1 ? ATTN_MHA_DECODE_CONSUMERS(kernel->d_v) : 1);
}

/* How many clusters of `blocks` blocks run side by side: a multiprocessor takes one block, and those
 * of a cluster share a part of the GPU.  Asked once for each size. */
static attn_status cluster_room(struct attn_cuda_kernel *kernel,
                                const struct attn_cuda_device *device, int blocks, int *room)
{
    static _Atomic int known[DEVICES_MAX][ATTN_DECODE_CLUSTER_MAX + 1]; /* plus 1 */
    const struct attn_cuda_driver *cu;
    cu_kernel handle;
    *room = 0;
    if (device->device >= DEVICES_MAX) return ATTN_OK;
    *room = atomic_load_explicit(&known[device->device][blocks], memory_order_relaxed) - 1;
    if (*room >= 0) return ATTN_OK;
    ATTN_TRY(attn_cuda_driver(&cu));
    ATTN_TRY(attn_cuda_kernel_load(kernel, device->device, &handle));
    struct cu_launch_attribute cluster = {.id = CU_LAUNCH_CLUSTER_DIMENSION,
                                          .value.cluster = {(unsigned)blocks, 1, 1}};
    struct cu_launch_config config = {
        .grid = {(unsigned)blocks, 1, 1},
        .block = {(unsigned)threads(kernel, blocks), 1, 1},
        .shared_bytes = (unsigned)kernel->shared_bytes,
        .attributes = &cluster,
        .attribute_count = 1,
    };
    if (cu->occupancy_max_active_clusters(room, handle, &config)) *room = 0; /* not that large */
    atomic_store_explicit(&known[device->device][blocks], *room + 1, memory_order_relaxed);
    return ATTN_OK;
}

static attn_status choose(const problem_t *p, const struct attn_cuda_device *device, plan_t *plan)
{
    struct attn_mha_fwd_cuda_tile tiles[KERNELS_MAX];
    int count = attn_mha_decode_kernel_count + attn_mla_decode_kernel_count;
    for (int i = 0; i < count; i++) {
        const struct attn_cuda_kernel *k = kernel_at(i);
        tiles[i] = (struct attn_mha_fwd_cuda_tile){k->dtype, k->d_qk, k->d_v, k->rows, k->keys, 0};
    }
    ATTN_TRY(attn_mha_decode_cuda_choose(p, tiles, count, device->multiprocessors, plan));
    if (is_latent(plan->kernel)) return ATTN_OK;
    int cluster = attn_mha_decode_cuda_cluster(p, plan);
    for (; cluster > 1; cluster /= 2) { /* as large a one as all items find room for at once */
        int room;
        ATTN_TRY(cluster_room(kernel_at(plan->kernel), device, cluster, &room));
        if (room >= p->h_k) break;
    }
    attn_mha_decode_cuda_use_cluster(p, cluster, plan);
    return ATTN_OK;
}

attn_status attn_mha_decode_cuda_plan(const problem_t *p, const struct attn_cuda_device *device,
                                      struct attn_mha_fwd_plan *out)
{
    plan_t plan;
    ATTN_TRY(choose(p, device, &plan));
    out->splits = plan.splits > 1 ? plan.splits : 1;
    out->piece = p->s_k;
    out->workspace_bytes = plan.bytes;
    out->tile[0] = plan.kernel;
    out->tile[1] = plan.tiles;
    out->tile[2] = plan.box_rows == 0;
    out->tile[3] = plan.parts * plan.tiles;
    strncpy(out->kernel, kernel_at(plan.kernel)->name, sizeof out->kernel - 1);
    return ATTN_OK;
}

attn_status attn_mha_decode_cuda_check(const problem_t *p, const struct attn_cuda_device *device,
                                       int64_t workspace_bytes)
{
    plan_t plan;
    ATTN_TRY(choose(p, device, &plan));
    ATTN_CHECK(plan.splits <= 1 || p->accum_splits == plan.splits, ATTN_E_VALUE,
               "out_accum: expected %d splits, got %lld", plan.splits, (long long)p->accum_splits);
    ATTN_CHECK(workspace_bytes >= plan.bytes, ATTN_E_WORKSPACE,
               "workspace: expected %lld bytes for decode, got %lld: plan and run differ",
               (long long)plan.bytes, (long long)workspace_bytes);
    return ATTN_OK;
}

void attn_decode_fill_plan(const plan_t *plan, char *workspace, struct attn_decode_params *params)
{
    if (plan->bytes) {
        params->partial_lse = (float *)(void *)workspace;
        params->partial_out = (float *)(void *)(workspace + plan->out);
    }
    params->tiles = plan->tiles;
    params->parts = plan->parts;
    params->splits = plan->splits;
    params->slot_rows = plan->slot_rows;
    params->cluster = plan->cluster;
}

static attn_status launch_combine(struct attn_decode_params *params,
                                  const struct attn_cuda_device *device, cu_stream stream)
{
    const struct attn_cuda_driver *cu;
    struct attn_cuda_kernel *kernel;
    cu_kernel handle;
    ATTN_TRY(attn_cuda_driver(&cu));
    ATTN_TRY(attn_plain_kernel("attn_decode_combine_sm90", &kernel));
    ATTN_TRY(attn_cuda_kernel_load(kernel, device->device, &handle));

    /* Threads: d_v / 4 a row, times the groups that share a row of many pieces. */
    int64_t heads = (int64_t)params->call.b * params->call.h_k;
    int64_t items = params->splits ? heads : min64(heads, params->parts);
    int64_t pieces = params->splits ? params->splits : params->parts / (items ? items : 1) + 1;
    int sharers = 16, groups = 1;
    while (sharers * 4 < params->call.d_v) sharers *= 2;
    while (groups * 4 < pieces && sharers * groups < COMBINE_THREADS_MAX) groups *= 2;
    int threads = sharers * groups > COMBINE_THREADS ? sharers * groups : COMBINE_THREADS;
    int64_t rows = items * params->tiles * (params->splits ? ATTN_DECODE_ROWS : params->slot_rows);
    int64_t blocks = (rows * sharers * groups + threads - 1) / threads;
    params->combine_groups = groups;

    struct cu_launch_attribute early = {.id = CU_LAUNCH_PROGRAMMATIC_STREAM_SERIALIZATION,
                                        .value.programmatic = 1};
    struct cu_launch_config config = {
        .grid = {(unsigned)min64(blocks > 0 ? blocks : 1,
                                 device->multiprocessors * COMBINE_BLOCKS_A_MULTIPROCESSOR),
                 1, 1},
        .block = {(unsigned)threads, 1, 1},
        .shared_bytes = (unsigned)threads * ATTN_DECODE_MERGED_BYTES,
        .stream = stream,
        .attributes = &early,
        .attribute_count = 1,
    };
    void *arguments[] = {params};
    return attn_cuda_status(cu->launch_kernel_ex(&config, handle, arguments, NULL), kernel->name);
}

attn_status attn_decode_launch(struct attn_decode_params *params,
                               const struct attn_mha_fwd_maps *maps,
                               struct attn_cuda_kernel *kernel, int threads,
                               const struct attn_cuda_device *device, cu_stream stream)
{
    const struct attn_cuda_driver *cu;
    cu_kernel handle;
    ATTN_TRY(attn_cuda_driver(&cu));
    ATTN_TRY(attn_cuda_kernel_load(kernel, device->device, &handle));
    struct cu_launch_attribute attributes[2];
    unsigned count = 0;
    if (params->cluster > 1)
        attributes[count++] =
            (struct cu_launch_attribute){.id = CU_LAUNCH_CLUSTER_DIMENSION,
                                         .value.cluster = {(unsigned)params->cluster, 1, 1}};
    if (params->after_append)
        attributes[count++] =
            (struct cu_launch_attribute){.id = CU_LAUNCH_PROGRAMMATIC_STREAM_SERIALIZATION,
                                         .value.programmatic = 1};
    struct cu_launch_config config = {
        .grid = {(unsigned)(params->parts * params->tiles), 1, 1},
        .block = {(unsigned)threads, 1, 1},
        .shared_bytes = (unsigned)kernel->shared_bytes,
        .stream = stream,
        .attributes = attributes,
        .attribute_count = count,
    };
    const struct attn_mha_fwd_params *call = &params->call;
    params->by_group = attn_division_by(call->group);
    params->by_page = attn_division_by(call->page);
    params->by_parts = attn_division_by(params->parts);
    int64_t steps = (call->cu_seqlens_k ? call->t_k : call->s_k) / ATTN_DECODE_KEYS + 1;
    params->narrow = !params->splits && params->parts > 1 && call->b <= NARROW_SEQUENCES &&
                     call->b * call->h_k * (steps + params->item_cost) < NARROW_COST;
    void *arguments[] = {params, (void *)(uintptr_t)maps};
    ATTN_TRY(
        attn_cuda_status(cu->launch_kernel_ex(&config, handle, arguments, NULL), kernel->name));
    bool merges = params->splits ? params->splits > 1 : params->parts > 1 && params->cluster <= 1;
    return merges ? launch_combine(params, device, stream) : ATTN_OK;
}

static void fill_params(const problem_t *p, const plan_t *plan, char *workspace,
                        struct attn_decode_params *out)
{
    memset(out, 0, sizeof *out);
    const struct attn_mha_fwd_cuda_plan call = {.pack = 1,
                                                .gather = plan->box_rows == 0,
                                                .box_rows = plan->box_rows,
                                                .cluster = 1,
                                                .section = 1};
    attn_mha_fwd_fill_params(p, &call, &out->call);
    attn_decode_fill_plan(plan, workspace, out);
    out->q = p->q.data;
    out->q_stride_b = p->q.batch;
    out->q_stride_s = p->q.row;
    out->q_stride_h = p->q.head;
    out->qv = p->qv.data;
    out->qv_stride_b = p->qv.batch;
    out->qv_stride_s = p->qv.row;
    out->qv_stride_h = p->qv.head;
    out->lse_stride_s = 1;
    out->item_cost = ITEM_COST;
    out->fp16 = p->dtype == ATTN_F16;
    out->after_append = p->k_new.data != NULL;
    if (plan->splits <= 1) return;
    out->partial_out = (float *)(void *)p->out_accum.data;
    out->partial_lse = p->lse_accum;
    out->partial_out_stride_n = p->out_accum_split;
    out->partial_out_stride_b = p->out_accum.batch;
    out->partial_out_stride_s = p->out_accum.row;
    out->partial_out_stride_h = p->out_accum.head;
    out->partial_lse_stride_n = p->lse_accum_split;
    out->partial_lse_stride_b = p->lse_accum_batch;
    out->partial_lse_stride_h = p->lse_accum_head;
}

attn_status attn_mha_decode_cuda_launch(const problem_t *p, const struct attn_cuda_device *device,
                                        char *workspace, cu_stream stream)
{
    struct attn_decode_params params;
    struct attn_mha_fwd_maps maps;
    plan_t plan;
    ATTN_TRY(choose(p, device, &plan));
    fill_params(p, &plan, workspace, &params);
    memset(&maps, 0, sizeof maps);
    if (plan.box_rows && params.call.s_k > 0) {
        ATTN_TRY(attn_mha_fwd_encode_keys(p, plan.box_rows, &p->k, p->d_qk, true,
                                          "k: cuTensorMapEncodeTiled", &maps.k));
        ATTN_TRY(attn_mha_fwd_encode_keys(p, plan.box_rows, &p->v, p->d_v, true,
                                          "v: cuTensorMapEncodeTiled", &maps.v));
    }
    struct attn_cuda_kernel *kernel = kernel_at(plan.kernel);
    if (is_latent(plan.kernel))
        return attn_mla_decode_launch(&params, &maps, kernel, device, stream);
    return attn_decode_launch(&params, &maps, kernel, threads(kernel, plan.cluster), device,
                              stream);
}
