/* SPDX-License-Identifier: MIT
 *
 * kda_fwd and kda_step for Python.  What every call has comes first, then features, the rarer the
 * later; a tensor that is off is None.  libattn/kda.py is the caller.
 */
#include "ffi.h"

#include <stdio.h>
#include <string.h>

static void read_kda_fwd(struct attn_kda_fwd_args *a, ffi_args *in)
{
    memset(a, 0, sizeof *a);
    a->size = sizeof *a;
    a->q = ffi_tensor(in, "q");
    a->k = ffi_tensor(in, "k");
    a->v = ffi_tensor(in, "v");
    a->g = ffi_tensor(in, "g");
    a->beta = ffi_tensor(in, "beta");
    a->out = ffi_tensor_or_null(in, "out");
    a->scale = ffi_double(in, "scale");
    a->lower_bound = ffi_double(in, "lower_bound");
    a->threads = ffi_int32(in, "threads", 0);
    ffi_optional(in);
    a->A_log = ffi_tensor_or_null(in, "A_log");
    a->dt_bias = ffi_tensor_or_null(in, "dt_bias");
    a->initial_state = ffi_tensor_or_null(in, "initial_state");
    a->final_state = ffi_tensor_or_null(in, "final_state");
    a->cu_seqlens = ffi_tensor_or_null(in, "cu_seqlens");
    a->state_indices = ffi_tensor_or_null(in, "state_indices");
    a->checkpoint_states = ffi_tensor_or_null(in, "checkpoint_states");
    a->checkpoint_every = ffi_int64(in, "checkpoint_every", 0);
    a->gate_activated = ffi_bool(in, "gate_activated");
    a->beta_activated = ffi_bool(in, "beta_activated");
}

/* kda_fwd(...): the workspace is scratch of the binding's.  On a GPU dense calls need none as a
 * rule, and a plan of their own would be half a microsecond of checks. */
FFI_FUNCTION(kda_fwd)
{
    (void)self, (void)result;
    struct attn_kda_fwd_args a;
    struct attn_kda_fwd_plan plan = {.size = sizeof plan};
    ffi_scratch scratch;
    ffi_args in = ffi_begin("kda_fwd", args, count);
    read_kda_fwd(&a, &in);
    if (ffi_end(&in)) return -1;
    if (a.q->device.device_type != kDLCPU && !a.cu_seqlens) {
        const attn_status status = attn_kda_fwd_run(&a, NULL, NULL, 0, ffi_stream(a.q));
        if (status != ATTN_E_WORKSPACE) return ffi_status(status);
    }
    if (ffi_status(attn_kda_fwd_plan(&a, &plan))) return -1;
    if (ffi_scratch_take(&scratch, a.q, plan.workspace_bytes)) return -1;
    const attn_status status = attn_kda_fwd_run(&a, &plan, scratch.memory, plan.workspace_bytes,
                                                ffi_stream(a.q));
    ffi_scratch_give(&scratch);
    return ffi_status(status);
}

/* kda_fwd_plan(...) -> "kernel workspace_bytes".  Out may be None. */
FFI_FUNCTION(kda_fwd_plan)
{
    (void)self;
    struct attn_kda_fwd_args a;
    struct attn_kda_fwd_plan plan = {.size = sizeof plan};
    ffi_args in = ffi_begin("kda_fwd_plan", args, count);
    read_kda_fwd(&a, &in);
    if (ffi_end(&in)) return -1;
    if (ffi_status(attn_kda_fwd_plan(&a, &plan))) return -1;
    char text[sizeof plan.kernel + 32];
    snprintf(text, sizeof text, "%.*s %lld", (int)sizeof plan.kernel, plan.kernel,
             (long long)plan.workspace_bytes);
    return ffi_return_text(result, text);
}

/* kda_fwd_ref(...): the scalar oracle, CPU tensors only. */
FFI_FUNCTION(kda_fwd_ref)
{
    (void)self, (void)result;
    struct attn_kda_fwd_args a;
    ffi_args in = ffi_begin("kda_fwd_ref", args, count);
    read_kda_fwd(&a, &in);
    if (ffi_end(&in)) return -1;
    return ffi_status(attn_kda_fwd_ref(&a));
}

/* kda_step(...) */
FFI_FUNCTION(kda_step)
{
    (void)self, (void)result;
    struct attn_kda_step_args a = {.size = sizeof a};
    ffi_args in = ffi_begin("kda_step", args, count);
    a.q = ffi_tensor(&in, "q");
    a.k = ffi_tensor(&in, "k");
    a.v = ffi_tensor(&in, "v");
    a.g = ffi_tensor(&in, "g");
    a.beta = ffi_tensor(&in, "beta");
    a.out = ffi_tensor(&in, "out");
    a.state = ffi_tensor(&in, "state");
    a.scale = ffi_double(&in, "scale");
    a.lower_bound = ffi_double(&in, "lower_bound");
    a.threads = ffi_int32(&in, "threads", 0);
    ffi_optional(&in);
    a.A_log = ffi_tensor_or_null(&in, "A_log");
    a.dt_bias = ffi_tensor_or_null(&in, "dt_bias");
    a.state_indices = ffi_tensor_or_null(&in, "state_indices");
    a.cu_seqlens = ffi_tensor_or_null(&in, "cu_seqlens");
    a.gate_activated = ffi_bool(&in, "gate_activated");
    a.beta_activated = ffi_bool(&in, "beta_activated");
    if (ffi_end(&in)) return -1;
    return ffi_status(attn_kda_step_run(&a, ffi_stream(a.q)));
}
