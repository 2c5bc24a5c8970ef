/* SPDX-License-Identifier: MIT
 *
 * Tensors of a case on a Hopper GPU.  Each goes, with the guard bytes around it, to an arena of
 * device memory; what a run wrote comes back to the case's own buffers, where it is compared as
 * after any other run.
 */
#ifndef ATTN_CHECK_GPU_H
#define ATTN_CHECK_GPU_H

#include "attn/attn.h"
#include "check.h"

enum { MIRROR_MAX = 40 };

/* The tensors of one run; the arena holds one such set at a time. */
struct check_mirror {
    struct image {
        uint64_t pages; /* where the buffer's pages lie on the device */
        const struct check_buffer *buffer;
        bool written;
    } image[MIRROR_MAX];
    DLTensor tensor[MIRROR_MAX];
    int count;
    struct check_buffer workspace;
};

/* Whether there is a device of compute capability 9.0; its context stays current. */
bool check_gpu(void);

/* Empties the arena. */
void check_mirror_open(struct check_mirror *m);

/* `t`, whose bytes are those of `b`, on the device; NULL for no tensor.  `written`: a result. */
const DLTensor *check_mirror_add(struct check_mirror *m, const DLTensor *t,
                                 const struct check_buffer *b, bool written);

/* Device memory that starts with each bit set. */
void *check_mirror_workspace(struct check_mirror *m, int64_t bytes);

/* Waits, brings results back; a complaint when the device failed, or when bytes beside a tensor or
 * of one that is only read have changed. */
const char *check_mirror_close(struct check_mirror *m);

#endif
