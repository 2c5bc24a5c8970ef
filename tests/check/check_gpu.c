/* SPDX-License-Identifier: MIT
 *
 * Running a case of mha_fwd on a Hopper GPU: every tensor goes, with the guard bytes around it, to
 * an arena of device memory; plan and run are those of the C ABI; what was written comes back to
 * the case's own buffers, where the caller compares it as after any other run.
 */
#include <dlfcn.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "attn/attn.h"
#include "check_run.h"
#include "cuda/module.h"

#define ARENA_BYTES ((size_t)1 << 30)
#define GUARD ((size_t)4096) /* before and after each buffer, filled with CHECK_CANARY */

static struct {
    int (*mem_alloc)(uint64_t *address, size_t bytes);
    int (*memcpy_to)(uint64_t address, const void *from, size_t bytes);
    int (*memcpy_from)(void *to, uint64_t address, size_t bytes);
    int (*memset_bytes)(uint64_t address, unsigned char value, size_t count);
    int (*synchronize)(void);
} cuda;

static uint64_t arena;
static size_t arena_used;
static int first_error; /* of a copy or of the device; once set, no later result counts */

/* Looks once: a device of compute capability 9.0, with a context that stays current. */
bool check_gpu(void)
{
    static int found = -1;
    struct attn_cuda_device device;
    if (found >= 0) return found;
    found = 0;
    if (attn_gpu_count(NULL, 0) == 0 || attn_cuda_enter(0, &device)) return false;
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    const struct {
        const char *name;
        void *to;
    } wanted[] = {
        {"cuMemAlloc_v2", &cuda.mem_alloc},      {"cuMemcpyHtoD_v2", &cuda.memcpy_to},
        {"cuMemcpyDtoH_v2", &cuda.memcpy_from},  {"cuMemsetD8_v2", &cuda.memset_bytes},
        {"cuCtxSynchronize", &cuda.synchronize},
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; ++i) {
        void *symbol = library ? dlsym(library, wanted[i].name) : NULL;
        if (!symbol) return false;
        memcpy(wanted[i].to, &symbol, sizeof symbol);
    }
    found = cuda.mem_alloc(&arena, ARENA_BYTES) == 0;
    return found;
}

static void note(int error)
{
    if (!first_error) first_error = error;
}

/* Where a buffer's pages lie on the device; the buffer itself starts on 16 bytes there. */
struct image {
    uint64_t pages;
    const struct check_buffer *buffer;
};

static struct image upload(const struct check_buffer *b)
{
    size_t inside = (size_t)(b->data - b->pages);
    uint64_t at = arena + arena_used + (16 - inside % 16) % 16;
    struct image image = {at + GUARD, b};
    arena_used += (b->page_bytes + 2 * GUARD + 16 + 255) / 256 * 256;
    if (arena_used > ARENA_BYTES) {
        note(2); /* CUDA_ERROR_OUT_OF_MEMORY */
        return image;
    }
    note(cuda.memset_bytes(at, CHECK_CANARY, b->page_bytes + 2 * GUARD));
    note(cuda.memcpy_to(image.pages, b->pages, b->page_bytes));
    return image;
}

/* Brings back what was written; false when a guard, or a tensor only to be read, has changed. */
static bool download(const struct image *image, bool written)
{
    const struct check_buffer *b = image->buffer;
    unsigned char *guards = check_scratch(2 * GUARD), *now = check_scratch(b->page_bytes);
    note(cuda.memcpy_from(guards, image->pages - GUARD, GUARD));
    note(cuda.memcpy_from(guards + GUARD, image->pages + b->page_bytes, GUARD));
    note(cuda.memcpy_from(now, image->pages, b->page_bytes));
    for (size_t i = 0; i < 2 * GUARD; ++i)
        if (guards[i] != CHECK_CANARY) return false;
    if (!written) return memcmp(now, b->pages, b->page_bytes) == 0;
    memcpy(b->pages, now, b->page_bytes);
    return true;
}

static bool is_written(const struct mha_case *c, int argument)
{
    return argument == ARG_out || argument == ARG_lse || argument == ARG_out_accum ||
           argument == ARG_lse_accum ||
           ((argument == ARG_k || argument == ARG_v) && c->args.k_new != NULL);
}

/* The case's arguments with each tensor on the device. */
static void upload_case(const struct mha_case *c, struct attn_mha_fwd_args *args,
                        DLTensor tensors[MHA_ARGUMENT_COUNT],
                        struct image images[MHA_ARGUMENT_COUNT])
{
    *args = c->args;
    for (int i = 0; i < MHA_ARGUMENT_COUNT; ++i) {
        const struct mha_tensor *t = &c->tensor[i];
        const DLTensor **slot = mha_argument_slot(args, i);
        images[i].buffer = NULL;
        if (!*slot) continue;
        images[i] = upload(&t->buffer);
        tensors[i] = t->t;
        tensors[i].device = (DLDevice){kDLCUDA, 0};
        if (t->t.data)
            tensors[i].data = (void *)(uintptr_t)(images[i].pages +
                                                  (uint64_t)((char *)t->t.data - t->buffer.pages));
        *slot = &tensors[i];
    }
}

/* Plans with one kernel of the table only: the others seem to hold no head. */
static attn_status plan_with(int kernel, const struct attn_mha_fwd_args *args,
                             struct attn_mha_fwd_plan *plan)
{
    for (int i = 0; i < attn_mha_fwd_kernel_count; ++i)
        if (i != kernel) attn_mha_fwd_kernels[i].d_qk = -attn_mha_fwd_kernels[i].d_qk;
    return attn_mha_fwd_plan(args, plan);
}

static void show_all_kernels(void)
{
    for (int i = 0; i < attn_mha_fwd_kernel_count; ++i)
        attn_mha_fwd_kernels[i].d_qk = abs(attn_mha_fwd_kernels[i].d_qk);
}

/* Hidden keys are NaN in a case, which a CPU never reads.  A GPU walks steps of many keys, and 0
 * times NaN is NaN: there they are large numbers while it runs. */
static void hide_keys(struct mha_case *c, float value)
{
    if (!c->hidden) return;
    check_buffer_protect(&c->tensor[ARG_k].buffer, false);
    check_buffer_protect(&c->tensor[ARG_v].buffer, false);
    mha_case_hide(c, value);
    if (is_written(c, ARG_k)) return;
    check_buffer_protect(&c->tensor[ARG_k].buffer, true);
    check_buffer_protect(&c->tensor[ARG_v].buffer, true);
}

static void run_on_gpu(struct mha_run *run)
{
    struct mha_case *c = run->c;
    struct attn_mha_fwd_args args;
    DLTensor tensors[MHA_ARGUMENT_COUNT];
    struct image images[MHA_ARGUMENT_COUNT];
    memset(&run->plan, 0, sizeof run->plan);
    run->plan.size = sizeof run->plan;
    run->complaint = NULL;

    arena_used = 0;
    mha_case_accum(c, 1);
    upload_case(c, &args, tensors, images);
    run->status = plan_with(run->kernel, &args, &run->plan);
    if (run->status) return;
    if (run->plan.splits > 1) {
        arena_used = 0;
        mha_case_accum(c, run->plan.splits);
        upload_case(c, &args, tensors, images);
    }
    run->workspace = check_buffer((size_t)run->plan.workspace_bytes, 64);
    memset(run->workspace.data, 0xff, run->workspace.bytes);
    struct image workspace = upload(&run->workspace);
    uint64_t at = workspace.pages + (uint64_t)(run->workspace.data - run->workspace.pages);
    run->status = attn_mha_fwd_run(&args, &run->plan, (void *)(uintptr_t)at,
                                   run->plan.workspace_bytes, NULL);
    note(cuda.synchronize());
    if (run->status) return;
    for (int i = 0; i < MHA_ARGUMENT_COUNT; ++i)
        if (images[i].buffer && !download(&images[i], is_written(c, i)))
            run->complaint = "bytes beside a tensor, or of one that is only read, written";
    if (!download(&workspace, true)) run->complaint = "bytes beside the workspace written";
    if (first_error) run->complaint = "a copy or the device failed";
}

void mha_run_on_gpu(struct mha_run *run)
{
    hide_keys(run->c, 3e4f);
    run_on_gpu(run);
    hide_keys(run->c, NAN);
    show_all_kernels();
}
