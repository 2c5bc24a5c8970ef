/* SPDX-License-Identifier: MIT
 *
 * kv_append: new keys and values go to the cache, keys and queries rotated where there is a table.
 *
 * Math, with cos and sin of the row's position and pairs (x, y) of the first r columns,
 * (2 m, 2 m + 1) when interleaved and else (m, m + r / 2):
 *     x' = x cos_m - y sin_m      y' = x sin_m + y cos_m          in fp32, rounded once
 * Columns from r on, and v, are copied bit for bit.  New token t of sequence i lands at position
 * seqused_k[i] + t of its cache row, rotated by (rotary length or seqused_k)[i] + t.
 *
 * Layout.  A thread moves 16 bytes: eight columns of one head of one row.  blockIdx.y is the work:
 * 0 keys, 1 values, 2 queries (to a packed copy); blockIdx.x strides over rows x heads x chunks.
 * The lengths that the attention then sees are written too.
 *
 * No host has seen the values of index tensors: a token whose cache row, page, position or rotary
 * row does not exist is not stored.
 */
#include "kv_append_params.h"
#include "ptx.cuh"

/* The last i with starts[i] <= row: the sequence that packed row lies in; -1: in none. */
ATTN_DEVICE int find_sequence(const int32_t *starts, int b, int64_t row)
{
    if (row < starts[0] || row >= starts[b]) return -1;
    int low = 0, high = b; /* starts[low] <= row < starts[high] */
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (starts[middle] <= row) low = middle;
        else high = middle;
    }
    return low;
}

ATTN_DEVICE float load_16bit(const void *p, int64_t at, int fp16)
{
    uint32_t bits = ((const uint16_t *)p)[at];
    return fp16 ? half_to_float(bits) : __uint_as_float(bits << 16);
}

union chunk {
    uint4 vector;
    uint32_t pair[4];
    uint16_t element[8];
};

ATTN_DEVICE float chunk_float(const chunk &c, int i, int fp16)
{
    uint32_t bits = c.element[i];
    return fp16 ? half_to_float(bits) : __uint_as_float(bits << 16);
}

ATTN_DEVICE bool in_range(int64_t x, int64_t end) { return (uint64_t)x < (uint64_t)end; }

/* Columns column .. column + 7 of `row`, rotated to `position`, which is a row of the table. */
ATTN_DEVICE uint4 rotate(const attn_kv_append_params &p, const uint16_t *row, int column,
                         int64_t position)
{
    chunk own, out;
    own.vector = *(const uint4 *)(row + column);
    if (column >= p.rotary_width) return own.vector;
    int half = p.rotary_width / 2;
    int64_t table = position * half;
    float result[8];
    if (p.interleaved) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float c = load_16bit(p.cos, table + column / 2 + i, p.fp16);
            float s = load_16bit(p.sin, table + column / 2 + i, p.fp16);
            float x = chunk_float(own, 2 * i, p.fp16), y = chunk_float(own, 2 * i + 1, p.fp16);
            result[2 * i] = x * c - y * s;
            result[2 * i + 1] = x * s + y * c;
        }
    } else {
        bool second = column >= half;
        chunk other;
        other.vector = *(const uint4 *)(row + (second ? column - half : column + half));
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int m = (second ? column - half : column) + i;
            float c = load_16bit(p.cos, table + m, p.fp16);
            float s = load_16bit(p.sin, table + m, p.fp16);
            float mine = chunk_float(own, i, p.fp16), theirs = chunk_float(other, i, p.fp16);
            result[i] = mine * c + (second ? theirs * s : -(theirs * s));
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
        out.pair[i] = p.fp16 ? pack_16x2<1>(result[2 * i], result[2 * i + 1])
                             : pack_16x2<0>(result[2 * i], result[2 * i + 1]);
    return out.vector;
}

ATTN_DEVICE uint16_t *row_at(const attn_device_rows &r, int64_t batch, int64_t row, int64_t head)
{
    return (uint16_t *)r.data + batch * r.batch + row * r.row + head * r.head;
}

/* One chunk of new token `token` to the cache; none where an index has no place in its tensor. */
ATTN_DEVICE void append(const attn_kv_append_params &p, const attn_device_rows &from,
                        const attn_device_rows &to, bool is_key, int64_t token, int head,
                        int column)
{
    int64_t i, t, source;
    if (p.cu_seqlens_k_new) {
        i = find_sequence(p.cu_seqlens_k_new, p.b, token);
        if (i < 0) return;
        t = token - p.cu_seqlens_k_new[i];
        source = token;
    } else {
        i = token / p.s_new;
        source = t = token % p.s_new;
    }
    int64_t position = p.seqused_k[i] + t, row = p.kv_batch_idx ? p.kv_batch_idx[i] : i;
    int64_t turn = (p.seqlens_rotary ? p.seqlens_rotary[i] : p.seqused_k[i]) + t;
    if (!in_range(position, p.s_k) || !in_range(row, p.cache_rows)) return;
    if (p.cos && !in_range(turn, p.rotary_rows)) return;
    int64_t place = position;
    if (p.page_table) {
        row = p.page_table[row * p.page_table_stride + position / p.page];
        place = position % p.page;
        if (!in_range(row, p.num_pages)) return;
    }
    const uint16_t *src = row_at(from, p.cu_seqlens_k_new ? 0 : i, source, head);
    uint4 value = is_key && p.cos ? rotate(p, src, column, turn) : *(const uint4 *)(src + column);
    *(uint4 *)(row_at(to, row, place, head) + column) = value;
}

/* One chunk of query row `row` to the rotated copy; as it is where the table has no such row. */
ATTN_DEVICE void rotate_query(const attn_kv_append_params &p, int64_t row, int head, int column)
{
    int64_t i, s, batch = 0, at = row;
    if (p.cu_seqlens_q) {
        i = find_sequence(p.cu_seqlens_q, p.b, row);
        if (i < 0) return;
        s = row - p.cu_seqlens_q[i];
    } else {
        batch = i = row / p.s_q;
        at = s = row % p.s_q;
    }
    int64_t turn = (p.seqlens_rotary ? p.seqlens_rotary[i] : p.seqused_k[i]);
    if (p.query_moves) turn += s;
    const uint16_t *src = row_at(p.q, batch, at, head);
    *(uint4 *)(row_at(p.q_rotated, batch, at, head) + column) =
        in_range(turn, p.rotary_rows) ? rotate(p, src, column, turn)
                                      : *(const uint4 *)(src + column);
}

extern "C" __global__ void __launch_bounds__(256)
    attn_kv_append_sm90(const __grid_constant__ attn_kv_append_params p)
{
    launch_dependents(); /* decode's, which waits for all of this before it reads a length */
    int part = blockIdx.y;
    if (part == 0 && blockIdx.x == 0) {
        for (int i = threadIdx.x; i < p.b; i += 256) {
            int64_t added = p.s_new;
            if (p.cu_seqlens_k_new)
                added = (int64_t)p.cu_seqlens_k_new[i + 1] - p.cu_seqlens_k_new[i];
            p.lengths[i] = (int32_t)min(max(p.seqused_k[i] + added, (int64_t)0), p.s_k);
        }
    }
    int heads = part == 2 ? p.h_q : p.h_k, chunks = (part == 1 ? p.d_v : p.d_qk) / 8;
    int64_t work = (part == 2 ? p.queries : p.tokens) * heads * chunks;
    for (int64_t at = blockIdx.x * 256ll + threadIdx.x; at < work; at += gridDim.x * 256ll) {
        int column = (int)(at % chunks) * 8, head = (int)(at / chunks % heads);
        int64_t row = at / chunks / heads;
        if (part == 2)
            rotate_query(p, row, head, column);
        else
            append(p, part ? p.v_new : p.k_new, part ? p.v : p.k, part == 0, row, head, column);
    }
}
