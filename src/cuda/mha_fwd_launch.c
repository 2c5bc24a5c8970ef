/* SPDX-License-Identifier: MIT
 *
 * Runs a checked mha_fwd problem on the current device: parameters, tensor maps, one launch.
 */
#include <math.h>
#include <string.h>

#include "core/int.h"
#include "cuda/mha_decode_cuda.h"
#include "cuda/tma.h"

#define KERNELS_MAX 64
#define LOG2E 1.4426950408889634
#define TICKET_BYTES 64 /* behind kv_append's part of the workspace: a counter on its own line */

typedef struct attn_mha_fwd_problem problem_t;
typedef struct attn_mha_fwd_cuda_plan plan_t;

static attn_status choose(const problem_t *p, const struct attn_cuda_device *device, plan_t *plan)
{
    struct attn_mha_fwd_cuda_tile tiles[KERNELS_MAX];
    for (int i = 0; i < attn_mha_fwd_kernel_count; i++) {
        const struct attn_cuda_kernel *k = &attn_mha_fwd_kernels[i];
        tiles[i] = (struct attn_mha_fwd_cuda_tile){k->dtype, k->d_qk, k->d_v,
                                                   k->rows,  k->keys, k->capped};
    }
    return attn_mha_fwd_cuda_choose(p, tiles, attn_mha_fwd_kernel_count, device->multiprocessors,
                                    plan);
}

static int32_t window(int64_t edge)
{
    return edge < 0 || edge > ATTN_WINDOW_OFF ? ATTN_WINDOW_OFF : (int32_t)edge;
}

/* The exponent limit tanh(S c), see struct attn_softcap.  tanh y is y (1 - y^2 / 3 + ..), with the coefficients
 * that err least up to 0.4.  Where these leave fp32's range no score counts as small. */
static struct attn_softcap softcap(double c, double limit)
{
    const double a = 0.9999937 * limit * c, b = -0.3326241 * limit * pow(c, 3);
    const double d = 0.121267 * limit * pow(c, 5), t = 0.16 / (c * c);
    static const double middle[] = {0.94986881, -0.29430307, 0.10886511, -0.03657071, 0.007636};
    struct attn_softcap x = {
        .small = -1.0f,
        .t = -1.0f,
        .middle = -1.0f,
        .sign = c < 0 ? -1.0f : 1.0f,
        .rate = (float)fmin(2 * LOG2E * fabs(c), 3e38), /* finite, or 0 times it were NaN */
        .limit = (float)limit,
        .deep = INFINITY,
    };
    if (!(c > 0 && d > 1e-30 && d < 1e30 && t > 1e-30 && t < 1e30)) return x;
    x.small = (float)(0.399999 / c);
    x.t = (float)t;
    x.a = (float)(a + b * t + d * t * t);
    x.b = (float)(b + 2 * d * t);
    x.d = (float)d;
    double last = middle[4] * limit * pow(c, 9);
    x.middle = last > 1e-36 && last < 1e36 ? (float)(1 / c) : x.small;
    for (int i = 0; i < 5; i++) x.e[i] = (float)(middle[i] * limit * pow(c, 2 * i + 1));
    double largest = limit * tanh(0.399999);
    x.shallow = (float)(largest - ATTN_SOFTCAP_SLACK - 1e-3);
    if (16 - largest <= x.shallow) x.deep = (float)(16 - largest);
    return x;
}

static void fill_scores(const problem_t *p, struct attn_mha_fwd_params *out)
{
    out->score = ATTN_SCORE_PLAIN;
    out->exp_scale = (float)(p->scale * LOG2E);
    if (p->softcap > 0) {
        out->score_scale = (float)(p->scale / p->softcap);
        out->exp_scale = (float)(p->softcap * LOG2E);
        out->score = ATTN_SCORE_CAPPED;
        out->softcap = softcap(p->scale / p->softcap, p->softcap * LOG2E);
    } else if (!(p->scale > 0)) {
        out->score = ATTN_SCORE_SCALED;
        out->score_scale = (float)p->scale;
        out->exp_scale = (float)LOG2E;
    }
    out->sinks = p->sinks;
    out->sink = !p->sinks || p->no_keys       ? ATTN_SINK_NONE
                : p->sinks_dtype == ATTN_F32  ? ATTN_SINK_FP32
                : p->sinks_dtype == ATTN_BF16 ? ATTN_SINK_BF16
                                              : ATTN_SINK_FP16;
    out->lse_empty = p->no_keys ? INFINITY : -INFINITY;
}

/* `count` steps of `stride` elements cover less than 2^34. */
static bool is_near(int64_t count, int64_t stride)
{
    return stride >= 0 && stride < ((int64_t)1 << 34) / (count > 0 ? count : 1);
}

/* How rows that no box fits are found. */
static int32_t gather(const problem_t *p)
{
    int64_t batches = p->page_table ? p->num_pages : p->cu_seqlens_k ? 1 : p->cache_rows;
    int64_t rows = p->page_table ? p->page : p->cu_seqlens_k ? p->t_k : p->s_k;
    bool near = is_near(batches, p->k.batch) && is_near(batches, p->v.batch) &&
                is_near(rows, p->k.row) && is_near(rows, p->v.row);
    return near ? ATTN_GATHER_NEAR : ATTN_GATHER_FAR;
}

/* A cache or page pool without a row: no length can be live, whatever the index tensors say. */
static bool no_rows(const problem_t *p)
{
    return !p->cu_seqlens_k && (p->cache_rows == 0 || (p->page_table && p->num_pages == 0));
}

void attn_mha_fwd_fill_params(const problem_t *p, const plan_t *plan,
                              struct attn_mha_fwd_params *out)
{
    memset(out, 0, sizeof *out);
    out->out = p->out.data;
    out->lse = p->lse;
    out->cu_seqlens_q = p->cu_seqlens_q;
    out->cu_seqlens_k = p->cu_seqlens_k;
    out->seqused_q = p->seqused_q;
    out->seqused_k = p->seqused_k;
    out->leftpad_k = p->leftpad_k;
    out->kv_batch_idx = p->kv_batch_idx;
    out->page_table = p->page_table;
    out->page_table_stride = p->page_table_row;
    out->cp_tot = p->cp_world > 1 ? p->cp_tot_seqused_k : NULL;
    out->k = p->k.data;
    out->v = p->v.data;

    out->out_stride_b = p->out.batch;
    out->out_stride_s = p->out.row;
    out->out_stride_h = p->out.head;
    out->lse_stride_b = p->lse_batch;
    out->lse_stride_h = p->lse_head;
    out->k_stride_b = p->k.batch;
    out->k_stride_s = p->k.row;
    out->k_stride_h = p->k.head;
    out->v_stride_b = p->v.batch;
    out->v_stride_s = p->v.row;
    out->v_stride_h = p->v.head;

    out->b = (int32_t)p->b;
    out->s_q = (int32_t)p->s_q;
    out->s_k = p->no_keys || no_rows(p) ? 0 : (int32_t)p->s_k;
    out->t_q = (int32_t)(p->cu_seqlens_q ? p->t_q : 0);
    out->t_k = (int32_t)(p->cu_seqlens_k ? p->t_k : 0);
    out->k_rows = (int32_t)p->cache_rows;
    out->num_pages = (int32_t)p->num_pages;
    out->h_k = (int32_t)p->h_k;
    out->group = (int32_t)(p->h_q / p->h_k);
    out->d_qk = (int32_t)p->d_qk;
    out->d_v = (int32_t)p->d_v;
    out->page = (int32_t)p->page;
    out->page_division = attn_division_by(out->page);
    out->box_rows = plan->box_rows;
    out->gather = plan->gather ? gather(p) : ATTN_GATHER_NONE;
    out->cluster = plan->cluster;
    out->section = plan->section;
    out->pack = plan->pack;
    out->tile_heads = out->group / plan->pack;
    out->queries = 64 / plan->pack;
    out->pitch = out->tile_heads == 1 && out->cluster == 2 ? 2 * out->queries : out->queries;

    /* With context parallelism causal is a bound on global keys, and there is no window. */
    bool cp = p->cp_world > 1;
    out->window_left = cp ? ATTN_WINDOW_OFF : window(p->window_left);
    out->window_right = cp ? ATTN_WINDOW_OFF : p->causal ? 0 : window(p->window_right);
    out->chunk = cp ? 0 : (int32_t)(p->chunk > ATTN_WINDOW_OFF ? ATTN_WINDOW_OFF : p->chunk);
    out->chunk_division = attn_division_by(out->chunk);
    out->cp_world = cp ? (int32_t)p->cp_world : 1;
    out->cp_rank = cp ? (int32_t)p->cp_rank : 0;
    out->cp_causal = cp && p->causal;
    fill_scores(p, out);
}

/* k or v: see struct attn_mha_fwd_maps. */
attn_status attn_mha_fwd_encode_keys(const problem_t *p, int box_rows, const struct attn_rows *r,
                                     int64_t width, bool alone, const char *name,
                                     struct attn_tensor_map *map)
{
    bool packed = p->cu_seqlens_k != NULL;
    int64_t rows = p->page_table ? p->page : packed ? p->t_k : p->s_k;
    int64_t batches = p->page_table ? p->num_pages : packed ? 1 : p->cache_rows;
    int64_t row = rows > 1 ? r->row : 8; /* the stride of a single row may be anything */
    return attn_tma_encode(&(struct attn_tma){.rank = 5,
                                              .base = r->data - 2 * box_rows * row,
                                              .extent = {width, box_rows, rows + 1, p->h_k,
                                                         batches},
                                              .stride = {row, row, r->head, r->batch},
                                              .box = {64, box_rows, 1, 1, 1},
                                              .alone = alone},
                           p->dtype == ATTN_F16, name, map);
}

static attn_status encode_maps(const problem_t *p, const plan_t *plan,
                               struct attn_mha_fwd_maps *maps)
{
    bool ragged = p->cu_seqlens_q != NULL;
    int64_t group = p->h_q / p->h_k, head = p->q.head;
    ATTN_TRY(
        attn_tma_encode(&(struct attn_tma){.rank = 5,
                                           .base = p->q.data,
                                           .extent = {p->d_qk, group, ragged ? p->t_q : p->s_q,
                                                      p->h_k, ragged ? 1 : p->b},
                                           .stride = {head, p->q.row, group * head, p->q.batch},
                                           .box = {64, plan->pack, 64 / plan->pack, 1, 1}},
                        p->dtype == ATTN_F16, "q: cuTensorMapEncodeTiled", &maps->q));
    if (plan->gather || p->no_keys) { /* no box of k or v is ever loaded */
        maps->k = maps->v = maps->q;
        return ATTN_OK;
    }
    ATTN_TRY(attn_mha_fwd_encode_keys(p, plan->box_rows, &p->k, p->d_qk, false,
                                      "k: cuTensorMapEncodeTiled", &maps->k));
    return attn_mha_fwd_encode_keys(p, plan->box_rows, &p->v, p->d_v, false,
                                    "v: cuTensorMapEncodeTiled", &maps->v);
}

/* out as boxes of a warpgroup's rows, like q; without any where it cannot be. */
static attn_status encode_out(const problem_t *p, const plan_t *plan, struct attn_mha_fwd_out *out)
{
    const struct attn_rows *r = &p->out;
    bool ragged = p->cu_seqlens_q != NULL;
    int64_t group = p->h_q / p->h_k, rows = ragged ? p->t_q : p->s_q, batches = ragged ? 1 : p->b;
    out->boxes = attn_mha_fwd_cuda_fits_boxes(r, batches, rows, p->h_q);
    if (!out->boxes) return ATTN_OK;
    return attn_tma_encode(&(struct attn_tma){.rank = 5,
                                              .base = r->data,
                                              .extent = {p->d_v, group, rows, p->h_k, batches},
                                              .stride = {r->head, r->row, group * r->head,
                                                         r->batch},
                                              .box = {64, plan->pack, 64 / plan->pack, 1, 1}},
                           p->dtype == ATTN_F16, "out: cuTensorMapEncodeTiled", &out->map);
}

/* The workspace: kv_append's part, then decode's own or the ticket of mha_fwd. */
static int64_t append_bytes(const problem_t *p) { return round_up(attn_kv_append_bytes(p), 64); }

static attn_status plan_on(const problem_t *p, const struct attn_cuda_device *device,
                           struct attn_mha_fwd_plan *out)
{
    plan_t plan;
    if (attn_mha_decode_cuda_wanted(p, device->multiprocessors)) {
        ATTN_TRY(attn_mha_decode_cuda_plan(p, device, out));
        out->workspace_bytes += append_bytes(p);
        return ATTN_OK;
    }
    ATTN_TRY(choose(p, device, &plan));
    out->splits = 1;
    out->piece = p->s_k;
    out->workspace_bytes = append_bytes(p) + (plan.ticket ? TICKET_BYTES : 0);
    out->tile[0] = plan.kernel;
    out->tile[1] = plan.cluster;
    out->tile[2] = plan.gather;
    out->tile[3] = plan.grid;
    strncpy(out->kernel, attn_mha_fwd_kernels[plan.kernel].name, sizeof out->kernel - 1);
    return ATTN_OK;
}

attn_status attn_mha_fwd_cuda_plan(const problem_t *p, struct attn_mha_fwd_plan *out)
{
    struct attn_cuda_device device;
    ATTN_TRY(attn_cuda_enter(p->device.device_id, &device));
    attn_status status = plan_on(p, &device, out);
    attn_cuda_leave(&device);
    return status;
}

/* Pointers and strides may have changed since the plan was made: choosing again is cheap.  Where `ticket`
 * is NULL, items are dealt in turn. */
static attn_status launch(const problem_t *p, const struct attn_cuda_device *device, char *ticket,
                          cu_stream stream)
{
    const struct attn_cuda_driver *cu;
    struct attn_mha_fwd_params params;
    struct attn_mha_fwd_maps maps;
    struct attn_mha_fwd_out out;
    cu_kernel handle;
    plan_t plan;
    ATTN_TRY(choose(p, device, &plan));
    struct attn_cuda_kernel *kernel = &attn_mha_fwd_kernels[plan.kernel];
    ATTN_TRY(attn_cuda_driver(&cu));
    ATTN_TRY(attn_cuda_kernel_load(kernel, device->device, &handle));
    attn_mha_fwd_fill_params(p, &plan, &params);
    params.tile_queries = kernel->rows / 64 * params.queries;
    int64_t fold = (int64_t)(params.chunk / params.tile_queries) * params.tile_heads / plan.cluster;
    params.fold = (int32_t)(fold < ATTN_WINDOW_OFF ? fold : 1);
    ATTN_TRY(encode_maps(p, &plan, &maps));
    ATTN_TRY(encode_out(p, &plan, &out));
    if (plan.ticket && ticket) {
        params.ticket = (int32_t *)(void *)ticket;
        ATTN_TRY(attn_cuda_status(cu->memset_d32_async((uint64_t)(uintptr_t)ticket, 0, 1, stream),
                                  "cuMemsetD32Async"));
    }

    struct cu_launch_attribute cluster = {.id = CU_LAUNCH_CLUSTER_DIMENSION,
                                          .value.cluster = {(unsigned)plan.cluster, 1, 1}};
    struct cu_launch_config config = {
        .grid = {(unsigned)plan.grid, 1, 1},
        .block = {(unsigned)kernel->rows * 2 + 128, 1, 1},
        .shared_bytes = (unsigned)kernel->shared_bytes,
        .stream = stream,
        .attributes = &cluster,
        .attribute_count = 1,
    };
    void *arguments[] = {&params, &maps, &out};
    return attn_cuda_status(cu->launch_kernel_ex(&config, handle, arguments, NULL), kernel->name);
}

/* Whatever is wrong shows before the cache changes. */
static attn_status append_and_launch(const problem_t *p, const struct attn_cuda_device *device,
                                     char *workspace, int64_t workspace_bytes, cu_stream stream)
{
    problem_t after = *p;
    plan_t plan;
    bool decode = attn_mha_decode_cuda_wanted(p, device->multiprocessors);
    if (decode)
        ATTN_TRY(attn_mha_decode_cuda_check(p, device, workspace_bytes - append_bytes(p)));
    else if (p->k_new.data)
        ATTN_TRY(choose(p, device, &plan));
    if (p->k_new.data) {
        ATTN_TRY(attn_kv_append_launch(p, device->device, workspace, stream));
        attn_kv_append_result(p, workspace, &after);
    }
    if (p->s_q == 0 || p->t_q == 0) return ATTN_OK;
    int64_t own = workspace_bytes - append_bytes(p);
    if (workspace) workspace += append_bytes(p);
    if (decode) return attn_mha_decode_cuda_launch(&after, device, workspace, stream);
    return launch(&after, device, own >= TICKET_BYTES ? workspace : NULL, stream);
}

attn_status attn_mha_fwd_cuda_run(const problem_t *p, const struct attn_mha_fwd_plan *planned,
                                  char *workspace, int64_t workspace_bytes, void *stream)
{
    struct attn_cuda_device device;
    (void)planned;
    if (p->b == 0) return ATTN_OK;
    ATTN_TRY(attn_cuda_enter(p->device.device_id, &device));
    attn_status status = append_and_launch(p, &device, workspace, workspace_bytes, stream);
    attn_cuda_leave(&device);
    return status;
}
