/* SPDX-License-Identifier: MIT
 *
 * Attention from C, without Python: causal, grouped queries, fp32, two sequences.
 *
 *   cc attention.c $(pkg-config --cflags --libs attn) -o attention    or CMakeLists.txt beside it
 *
 * Every op goes the same way: describe the tensors, plan, bring the workspace the plan asks for,
 * run.  At the end the result is compared with attn_mha_fwd_ref, the library's plain scalar C.
 */
#include <attn/attn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { B = 2, S_Q = 5, S_K = 300, H_Q = 8, H_K = 2, D = 64 };

/* A compact CPU tensor of 32-bit floats over memory of the caller. */
static DLTensor tensor(float *data, int32_t ndim, int64_t *shape)
{
    return (DLTensor){
        .data = data,
        .device = {kDLCPU, 0},
        .ndim = ndim,
        .dtype = {kDLFloat, 32, 1},
        .shape = shape, /* strides NULL: row-major, without gaps */
    };
}

static float *random_floats(size_t n)
{
    float *x = malloc(n * sizeof *x);
    for (size_t i = 0; x && i < n; i++) x[i] = (float)rand() / (float)RAND_MAX - 0.5f;
    return x;
}

/* attn_last_error() names the argument, what was expected and what was found. */
static void expect_ok(attn_status status, const char *call)
{
    if (status == ATTN_OK) return;
    fprintf(stderr, "%s: %s\n", call, attn_last_error());
    exit(1);
}

int main(void)
{
    if (strcmp(attn_version(), ATTN_VERSION_STRING)) {
        fprintf(stderr, "compiled with libattn %s, running with %s\n", ATTN_VERSION_STRING,
                attn_version());
        return 1;
    }

    int64_t q_shape[] = {B, S_Q, H_Q, D}, kv_shape[] = {B, S_K, H_K, D},
            lse_shape[] = {B, H_Q, S_Q};
    float *q_data = random_floats(B * S_Q * H_Q * D), *k_data = random_floats(B * S_K * H_K * D);
    float *v_data = random_floats(B * S_K * H_K * D), *out_data = random_floats(B * S_Q * H_Q * D);
    float *lse_data = random_floats(B * H_Q * S_Q), *ref_data = random_floats(B * S_Q * H_Q * D);
    if (!q_data || !k_data || !v_data || !out_data || !lse_data || !ref_data) return 1;

    DLTensor q = tensor(q_data, 4, q_shape), k = tensor(k_data, 4, kv_shape);
    DLTensor v = tensor(v_data, 4, kv_shape), out = tensor(out_data, 4, q_shape);
    DLTensor lse = tensor(lse_data, 3, lse_shape), ref = tensor(ref_data, 4, q_shape);

    struct attn_mha_fwd_args args = {
        .size = sizeof args,
        .q = &q,
        .k = &k,
        .v = &v,
        .out = &out,
        .lse = &lse,
        .softmax_scale = 1 / sqrt(D),
        .causal = 1,
        .window_left = -1,
        .window_right = -1, /* no window */
        .num_splits = 1,
        .pack_gqa = -1,
    };
    struct attn_mha_fwd_plan plan = {.size = sizeof plan};
    expect_ok(attn_mha_fwd_plan(&args, &plan), "attn_mha_fwd_plan");

    /* aligned_alloc wants a multiple of the alignment. */
    size_t bytes = ((size_t)plan.workspace_bytes + 63) / 64 * 64;
    void *workspace = bytes ? aligned_alloc(64, bytes) : NULL;
    expect_ok(attn_mha_fwd_run(&args, &plan, workspace, (int64_t)bytes, NULL), "attn_mha_fwd_run");

    args.out = &ref;
    expect_ok(attn_mha_fwd_ref(&args), "attn_mha_fwd_ref");
    double worst = 0;
    for (size_t i = 0; i < B * S_Q * H_Q * D; i++)
        worst = fmax(worst, fabs((double)out_data[i] - (double)ref_data[i]));

    printf("libattn %s, %s\nkernel %s, workspace %lld bytes\n", attn_version(), attn_cpu_features(),
           plan.kernel, (long long)plan.workspace_bytes);
    printf("out[0, 0, 0, :4] = %.5f %.5f %.5f %.5f   lse[0, 0, 0] = %.5f\n", out_data[0],
           out_data[1], out_data[2], out_data[3], lse_data[0]);
    printf("largest difference to plain C: %.1e\n", worst);

    free(workspace);
    free(q_data), free(k_data), free(v_data), free(out_data), free(lse_data), free(ref_data);
    return worst < 1e-5 ? 0 : 1;
}
