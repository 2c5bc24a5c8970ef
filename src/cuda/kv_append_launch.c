/* SPDX-License-Identifier: MIT
 *
 * kv_append on Hopper: the first kernel of an mha_fwd call with k_new.
 */
#include <string.h>

#include "cuda/kernels/kv_append_params.h"
#include "cuda/mha_fwd_cuda.h"

#define BLOCK 256
#define GRID_MAX 1056 /* eight blocks a multiprocessor */

static struct attn_device_rows device_rows(const struct attn_rows *r)
{
    return (struct attn_device_rows){r->data, r->batch, r->row, r->head};
}

/* The workspace: lengths [b] on lines of their own, then the rotated q, packed. */
static int64_t lengths_bytes(const struct attn_mha_fwd_problem *p)
{
    return (p->b * 4 + 63) / 64 * 64;
}

int64_t attn_kv_append_bytes(const struct attn_mha_fwd_problem *p)
{
    if (!p->k_new.data) return 0;
    return lengths_bytes(p) + (p->rotary_cos ? p->t_q * p->h_q * p->d_qk * 2 : 0);
}

void attn_kv_append_result(const struct attn_mha_fwd_problem *p, char *workspace,
                           struct attn_mha_fwd_problem *after)
{
    *after = *p;
    after->seqused_k = (const int32_t *)(const void *)workspace;
    if (!p->rotary_cos) return;
    int64_t head = p->d_qk, row = p->h_q * head;
    after->q = (struct attn_rows){workspace + lengths_bytes(p), p->cu_seqlens_q ? 0 : p->s_q * row,
                                  row, head};
}

attn_status attn_kv_append_launch(const struct attn_mha_fwd_problem *p, cu_device device,
                                  char *workspace, cu_stream stream)
{
    const struct attn_cuda_driver *cu;
    struct attn_cuda_kernel *kernel;
    struct attn_kv_append_params params;
    cu_kernel handle;
    ATTN_TRY(attn_cuda_driver(&cu));
    ATTN_TRY(attn_plain_kernel("attn_kv_append_sm90", &kernel));
    ATTN_TRY(attn_cuda_kernel_load(kernel, device, &handle));

    struct attn_mha_fwd_problem after;
    attn_kv_append_result(p, workspace, &after);
    memset(&params, 0, sizeof params);
    params.k = device_rows(&p->k);
    params.v = device_rows(&p->v);
    params.k_new = device_rows(&p->k_new);
    params.v_new = device_rows(&p->v_new);
    params.q = device_rows(&p->q);
    params.q_rotated = device_rows(&after.q);
    params.seqused_k = p->seqused_k;
    params.cu_seqlens_k_new = p->cu_seqlens_k_new;
    params.cu_seqlens_q = p->cu_seqlens_q;
    params.kv_batch_idx = p->kv_batch_idx;
    params.seqlens_rotary = p->seqlens_rotary;
    params.page_table = p->page_table;
    params.lengths = (int32_t *)(void *)workspace;
    params.page_table_stride = p->page_table_row;
    params.cos = p->rotary_cos;
    params.sin = p->rotary_sin;
    params.tokens = p->t_new;
    params.queries = p->rotary_cos ? p->t_q : 0;
    params.s_k = p->s_k;
    params.cache_rows = p->cache_rows;
    params.num_pages = p->num_pages;
    params.b = (int32_t)p->b;
    params.s_new = (int32_t)p->s_new;
    params.s_q = (int32_t)p->s_q;
    params.h_q = (int32_t)p->h_q;
    params.h_k = (int32_t)p->h_k;
    params.d_qk = (int32_t)p->d_qk;
    params.d_v = (int32_t)p->d_v;
    params.page = (int32_t)p->page;
    params.rotary_width = (int32_t)p->rotary_width;
    params.rotary_rows = (int32_t)p->rotary_rows;
    params.interleaved = p->rotary_interleaved;
    params.query_moves = p->is_causal || p->is_local;
    params.fp16 = p->dtype == ATTN_F16;

    int64_t rows = params.queries * p->h_q > p->t_new * p->h_k ? params.queries * p->h_q
                                                               : p->t_new * p->h_k;
    int64_t width = p->d_qk > p->d_v ? p->d_qk : p->d_v;
    int64_t blocks = (rows * (width / 8) + BLOCK - 1) / BLOCK;
    blocks = blocks < 1 ? 1 : blocks < GRID_MAX ? blocks : GRID_MAX;
    struct cu_launch_config config = {
        .grid = {(unsigned)blocks, params.queries ? 3 : 2, 1},
        .block = {BLOCK, 1, 1},
        .stream = stream,
    };
    void *arguments[] = {&params};
    return attn_cuda_status(cu->launch_kernel_ex(&config, handle, arguments, NULL), kernel->name);
}
