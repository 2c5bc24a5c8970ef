/* SPDX-License-Identifier: MIT
 *
 * Where the rows of a checked tensor lie.
 */
#ifndef ATTN_OPS_ROWS_H
#define ATTN_OPS_ROWS_H

#include <stdint.h>

/* Rows of width d: element (i, s, h, :) at data + i * batch + s * row + h * head, strides in
 * elements, last stride 1.  Packed tensors have batch 0; in a paged cache `batch` is the page's. */
struct attn_rows {
    char *data; /* NULL: absent */
    int64_t batch, row, head;
};

#endif
