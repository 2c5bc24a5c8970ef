/* SPDX-License-Identifier: MIT
 *
 * Running a case of mha_fwd with the table of a rung; comparing bits; spoiling a result.
 */
#include "check_run.h"

#include <math.h>
#include <string.h>

#include "cpu/mha_fwd.h"

static const int bit_arguments[4] = {ARG_out, ARG_lse, ARG_k, ARG_v};

attn_status mha_plan_with(const struct attn_cpu_kernels *table,
                          const struct attn_mha_fwd_args *args, struct attn_mha_fwd_plan *plan)
{
    struct attn_mha_fwd_problem p;
    attn_status status = attn_mha_fwd_check(args, &p, false);
    if (status) return status;
    memset(plan, 0, sizeof *plan);
    plan->size = sizeof *plan;
    plan->splits = 1;
    attn_mha_fwd_shape(&p, plan->shape);
    return attn_mha_fwd_cpu_plan_with(table, &p, plan);
}

void mha_run_case(void *context)
{
    struct mha_run *run = context;
    struct mha_case *c = run->c;
    struct attn_mha_fwd_problem p;
    run->complaint = NULL;
    c->args.threads = run->threads;
    if (run->gpu) {
        mha_run_on_gpu(run);
        return;
    }
    if (!run->table) {
        run->status = attn_mha_fwd_ref(&c->args);
        return;
    }
    run->status = mha_plan_with(run->table, &c->args, &run->plan);
    if (run->status) return;
    mha_case_accum(c, run->plan.splits);
    run->workspace = check_buffer((size_t)run->plan.workspace_bytes, 64);
    memset(run->workspace.data, 0xff,
           run->workspace.bytes); /* NaN: nothing may rest on old bytes */
    run->status = attn_mha_fwd_check(&c->args, &p, true);
    if (run->status) return;
    run->status = attn_mha_fwd_cpu_run_with(run->table, &p, &run->plan, run->workspace.data,
                                            run->plan.workspace_bytes);
    if (!check_buffer_intact(&run->workspace))
        run->complaint = "bytes beside the workspace written";
    if (run->table->mha_fwd[c->dtype] && strstr(run->plan.kernel, "_ref"))
        run->complaint = "the scalar reference ran although the rung has kernels";
}

struct mha_bits mha_bits_take(const struct mha_case *c)
{
    struct mha_bits bits;
    for (int i = 0; i < 4; ++i) {
        const struct check_buffer *b = &c->tensor[bit_arguments[i]].buffer;
        bits.data[i] = memcpy(check_scratch(b->bytes), b->data, b->bytes);
    }
    return bits;
}

bool mha_bits_same(const struct mha_case *c, const struct mha_bits *bits)
{
    for (int i = 0; i < 4; ++i) {
        const struct check_buffer *b = &c->tensor[bit_arguments[i]].buffer;
        if (memcmp(b->data, bits->data[i], b->bytes) != 0) return false;
    }
    return true;
}

bool mha_case_spoil(struct check_random *r, struct mha_case *c, const struct mha_answer *answer)
{
    int64_t b = 0;
    while (b < c->b && c->seq[b].q_len == 0) b += 1;
    if (b == c->b) return false;
    int64_t i = random_range(r, 0, c->seq[b].q_len - 1), h = random_range(r, 0, c->h_q - 1);
    int64_t row = c->seq[b].first_row + i * c->h_q + h, at = random_range(r, 0, c->d_v - 1);
    char *out = mha_out_at(c, b, i, h);
    float *lse = mha_lse_at(c, b, i, h), x = attn_load(c->out_dtype, out, at);
    bool vague = answer->rows.row[row].slack > 0.2 || isnan(answer->rows.row[row].lse);
    switch (vague ? 2 : random_range(r, 0, 4)) { /* what cannot be judged closely: grossly */
    case 0: /* an element, by a twentieth of what its row weighs */
        x = isfinite(x) ? x + 0.05f * (float)answer->rows.row[row].magnitude +
                              4 * (float)check_ulp(c->out_dtype, x)
                        : 0;
        attn_store(c->out_dtype, out, at, x);
        break;
    case 1: *lse = isfinite(*lse) ? *lse + 0.01f + 1e-3f * fabsf(*lse) : 0; break;
    case 2: attn_store(c->out_dtype, out, at, isnan(x) ? 0 : NAN); break;
    case 3: *lse = isinf(*lse) ? -*lse : INFINITY; break;
    default: /* a byte behind the tensor, or one before it */
        if (c->tensor[ARG_lse].buffer.data == c->tensor[ARG_lse].buffer.pages)
            *lse = NAN;
        else
            c->tensor[ARG_lse].buffer.data[-1] = 0;
        if (isnan(answer->rows.row[row].lse)) *lse = 0;
        break;
    }
    return true;
}
