/* SPDX-License-Identifier: MIT
 *
 * Cases on a Hopper GPU: the arena that their tensors go to, and the runner of mha_fwd's, whose
 * plan and run are those of the C ABI.
 */
#include <dlfcn.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "attn/attn.h"
#include "check_gpu.h"
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

/* Looks once. */
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

void check_mirror_open(struct check_mirror *m)
{
    m->count = 0;
    arena_used = 0;
}

/* The buffer itself starts on 16 bytes there. */
static struct image *upload(struct check_mirror *m, const struct check_buffer *b, bool written)
{
    struct image *image = &m->image[m->count++];
    size_t inside = (size_t)(b->data - b->pages);
    uint64_t at = arena + arena_used + (16 - inside % 16) % 16;
    *image = (struct image){at + GUARD, b, written};
    arena_used += (b->page_bytes + 2 * GUARD + 16 + 255) / 256 * 256;
    if (arena_used > ARENA_BYTES) {
        note(2); /* CUDA_ERROR_OUT_OF_MEMORY */
        return image;
    }
    note(cuda.memset_bytes(at, CHECK_CANARY, b->page_bytes + 2 * GUARD));
    note(cuda.memcpy_to(image->pages, b->pages, b->page_bytes));
    return image;
}

/* Brings back what was written; false when a guard, or a tensor only to be read, has changed. */
static bool download(const struct image *image)
{
    static unsigned char guards[2 * GUARD], *now; /* a case has many runs, and scratch is short */
    static size_t room;
    const struct check_buffer *b = image->buffer;
    if (room < b->page_bytes) {
        room = b->page_bytes;
        free(now);
        now = malloc(room);
        if (!now) abort();
    }
    note(cuda.memcpy_from(guards, image->pages - GUARD, GUARD));
    note(cuda.memcpy_from(guards + GUARD, image->pages + b->page_bytes, GUARD));
    note(cuda.memcpy_from(now, image->pages, b->page_bytes));
    for (size_t i = 0; i < 2 * GUARD; ++i)
        if (guards[i] != CHECK_CANARY) return false;
    if (!image->written) return memcmp(now, b->pages, b->page_bytes) == 0;
    memcpy(b->pages, now, b->page_bytes);
    return true;
}

const DLTensor *check_mirror_add(struct check_mirror *m, const DLTensor *t,
                                 const struct check_buffer *b, bool written)
{
    if (!t) return NULL;
    DLTensor *there = &m->tensor[m->count];
    const struct image *image = upload(m, b, written);
    *there = *t;
    there->device = (DLDevice){kDLCUDA, 0};
    if (t->data)
        there->data = (void *)(uintptr_t)(image->pages + (uint64_t)((char *)t->data - b->pages));
    return there;
}

void *check_mirror_workspace(struct check_mirror *m, int64_t bytes)
{
    m->workspace = check_buffer((size_t)bytes, 64);
    memset(m->workspace.data, 0xff, m->workspace.bytes);
    const struct image *image = upload(m, &m->workspace, true);
    return (void *)(uintptr_t)(image->pages + (uint64_t)(m->workspace.data - m->workspace.pages));
}

const char *check_mirror_close(struct check_mirror *m)
{
    const char *complaint = NULL;
    note(cuda.synchronize());
    for (int i = 0; i < m->count; ++i)
        if (!download(&m->image[i]))
            complaint = "bytes beside a tensor, or of one that is only read, written";
    return first_error ? "a copy or the device failed" : complaint;
}

/* ---- mha_fwd --------------------------------------------------------------------------------- */

static bool is_written(const struct mha_case *c, int argument)
{
    return argument == ARG_out || argument == ARG_lse || argument == ARG_out_accum ||
           argument == ARG_lse_accum ||
           ((argument == ARG_k || argument == ARG_v) && c->args.k_new != NULL);
}

/* The case's arguments with each tensor on the device. */
static void upload_case(const struct mha_case *c, struct attn_mha_fwd_args *args,
                        struct check_mirror *m)
{
    check_mirror_open(m);
    *args = c->args;
    for (int i = 0; i < MHA_ARGUMENT_COUNT; ++i) {
        const struct mha_tensor *t = &c->tensor[i];
        const DLTensor **slot = mha_argument_slot(args, i);
        if (*slot) *slot = check_mirror_add(m, &t->t, &t->buffer, is_written(c, i));
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
    struct check_mirror mirror;
    memset(&run->plan, 0, sizeof run->plan);
    run->plan.size = sizeof run->plan;
    run->complaint = NULL;

    mha_case_accum(c, 1);
    upload_case(c, &args, &mirror);
    run->status = plan_with(run->kernel, &args, &run->plan);
    if (run->status) return;
    if (run->plan.splits > 1) {
        mha_case_accum(c, run->plan.splits);
        upload_case(c, &args, &mirror);
    }
    void *workspace = check_mirror_workspace(&mirror, run->plan.workspace_bytes);
    run->status = attn_mha_fwd_run(&args, &run->plan, workspace, run->plan.workspace_bytes, NULL);
    run->workspace = mirror.workspace;
    const char *complaint = check_mirror_close(&mirror);
    if (!run->status) run->complaint = complaint;
}

void mha_run_on_gpu(struct mha_run *run)
{
    hide_keys(run->c, 3e4f);
    run_on_gpu(run);
    hide_keys(run->c, NAN);
    show_all_kernels();
}
