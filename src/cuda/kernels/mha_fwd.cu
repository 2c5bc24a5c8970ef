/* SPDX-License-Identifier: MIT
 *
 * mha_fwd on Hopper: attention, forward.
 *
 * Math, a query row i over its visible keys j (mask.cuh: one interval a row):
 *     S = q_i . k_j       P = 2^(S k - m k)       l = sum P       out_i = sum P v_j / l
 *     lse_i = (m k + log2 l) ln 2                 k = scale log2 e, m = a running maximum of S
 * S, m, l and O are fp32, P is rounded to the inputs' type.  Softcap has kernels of its own (CAP), and its
 * exponents are in softcap.cuh.  A row without visible keys gives 0 and lse -inf.
 *
 * Layout.  q, out [b, s_q, h_q, d] or [t_q, h_q, d]; k, v [b, s_k, h_k, d], [t_k, h_k, d] or pages.
 * A block has M / 64 consumer warpgroups of 64 rows and a producer warpgroup; sched.cuh says which
 * rows.  Blocks of a cluster of two share every k and v tile: each loads half of it and the copy
 * engine lands it in both.  Shared memory holds q and two stages each of k and v (tile.cuh), O
 * stays in registers and P goes from accumulator to A operand without leaving them (wgmma.cuh); out
 * leaves through the place of q where q has two stages.
 *
 * Pipeline: S = Q K^T of one step is computed beside O += P V of the step before.  A warp has to stay
 * until its last product has started, so the tensor cores work beside the softmax of other warpgroups:
 * the warpgroups of a block take turns, step by step, and who has its turn keeps it until its S is there.
 *
 *  turn     | 0         | 1                      | 2                      | last
 *  producer | Q K0 V0   | K1 V1                  | K2 V2                  | next tile: Q K0 V0
 *  wgmma    | S0        | S1        O += P0 V0   | S2        O += P1 V1   | O += Pn Vn
 *  consumer |        P0 |                     P1 |                     P2 |        out, lse
 *
 * Key steps run from the first to the last.  Under a causal mask the warpgroups of a cluster so begin
 * together and end one after the other, and what one does at its end runs beside the others' products.
 * A warpgroup that sees none of a step's keys waits for the tile and releases it, to keep the rings in
 * step.
 */
#include "attend.cuh"
#include "softcap.cuh"
#include "softmax.cuh"
#include "tile.cuh"

template <class RING> ATTN_DEVICE void wait_full(const uint64_t *full, const RING &r)
{
    mbarrier_wait_parity(shared_address(&full[r.stage()]), r.parity());
}

/* ---- the producer warpgroup ------------------------------------------------------------------ */

/* The next item is drawn when the present one has this many key steps left to load: in time for its
 * first loads, and no earlier, as who draws an item is the one to compute it, however late. */
#define DRAW_AHEAD 3

/* One k or v tile of N rows, from the sequence's key `key` on: a box a panel, of which each block
 * of a cluster loads its half of the rows.  A whole warp calls it. */
template <int D, int N, int IS_V>
ATTN_DEVICE void load_tile(const attn_mha_fwd_params &p, const attn_tensor_map *map, uint32_t dst,
                           uint32_t bar, const sequence &seq, int h_kv, int key)
{
    constexpr int PANELS = ATTN_MHA_FWD_PANELS(D);
    int row = (int)cluster_rank() * p.box_rows, live = p.box_rows;
    bool whole = key + N <= seq.s_k;
    if (!whole) {
        open_tile<PANELS, N, IS_V>(p, dst, bar, seq.s_k - key);
        live = min(seq.s_k - key - row, p.box_rows);
    }
    if (elect_one()) {
        if (whole) mbarrier_arrive_expect_tx(bar, PANELS * N * 128);
        if (live > 0) {
#pragma unroll
            for (int panel = 0; panel < PANELS; panel++)
                load_box<IS_V>(p, map, dst + panel * N * 128 + row * 128, bar, panel, live,
                               seq.k_offset + key + row, h_kv, seq.k_row);
        }
    }
    __syncwarp();
}

/* The same tile out of pages: a box never straddles two of them.  Lanes look up pages side by side,
 * blocks of a cluster take boxes in turn. */
template <int D, int N, int IS_V>
ATTN_DEVICE void load_paged_tile(const attn_mha_fwd_params &p, const attn_tensor_map *map,
                                 uint32_t dst, uint32_t bar, const sequence &seq, int h_kv, int key)
{
    constexpr int PANELS = ATTN_MHA_FWD_PANELS(D);
    int first = (int)cluster_rank() + (int)threadIdx.x % 32 * p.cluster, step = 32 * p.cluster;
    int rows = open_tile<PANELS, N, IS_V>(p, dst, bar, min(seq.s_k - key, N));
    const int32_t *pages = p.page_table + seq.k_row * p.page_table_stride;
    for (int i = first; i / PANELS * p.box_rows < rows; i += step) {
        int row = i / PANELS * p.box_rows, page = divide(p.page_division, key + row);
        load_box<IS_V>(p, map, dst + i % PANELS * (N * 128) + row * 128, bar, i % PANELS,
                       min(seq.s_k - key - row, p.box_rows), key + row - page * p.page, h_kv,
                       within(__ldg(pages + page), p.num_pages - 1));
    }
    __syncwarp();
}

/* Copies `count` rows (16 or 32) of a tile of N by 16 bytes a lane, eight lanes a row, to `dst`.  Lane
 * l holds where row l lies from `head` on.  Every instruction counts: one warp copies all of k. */
template <int D, int N>
ATTN_DEVICE void copy_whole_rows(const uint16_t *head, int64_t place, int count, uint32_t dst)
{
    int own = (int)threadIdx.x % 32 / 8, chunk = (int)threadIdx.x % 8;
    const uint16_t *column = head + chunk * 8;
    uint32_t to = dst + own * 128 + ((chunk ^ own) << 4), near = (uint32_t)(place >> 3);
#pragma unroll 1
    for (int row = own; row < count; row += 16, to += 2048) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t at = __shfl_sync(0xffffffff, near, row + 4 * i);
            const uint16_t *from = column + (uint64_t)at * 8;
#pragma unroll
            for (int panel = 0; panel < ATTN_MHA_FWD_PANELS(D); panel++) /* ^ 64: odd half of a swizzle */
                cp_async_16((i % 2 ? to ^ 64 : to) + i * 512 + panel * N * 128, from + panel * 64);
        }
    }
}

/* The same for rows that may lie past the sequence's end (`place` is -1, and zeros are copied), heads
 * narrower than the tile, and rows far apart. */
template <int D, int N>
ATTN_DEVICE void copy_rows(const uint16_t *head, int64_t place, int count, int width, uint32_t dst)
{
    int own = (int)threadIdx.x % 32 / 8, chunk = (int)threadIdx.x % 8;
#pragma unroll 1
    for (int row = own; row < count; row += 4) {
        int64_t at = __shfl_sync(0xffffffff, place, row);
        uint32_t to = dst + row * 128 + ((chunk ^ (row & 7)) << 4);
#pragma unroll
        for (int panel = 0; panel < ATTN_MHA_FWD_PANELS(D); panel++) {
            int column = panel * 64 + chunk * 8;
            bool inside = at >= 0 && column < width;
            cp_async_16(to + panel * N * 128, inside ? head + at + column : head, inside ? 16 : 0);
        }
    }
}

/* The page-table entry of a key; outside the sequence, that of its first or last key. */
ATTN_DEVICE int look_up_page(const attn_mha_fwd_params &p, const sequence &seq, int key)
{
    if (!p.page_table) return 0;
    return __ldg(p.page_table + seq.k_row * p.page_table_stride +
                 divide(p.page_division, seq.k_offset + within(key, seq.s_k - 1)));
}

/* All k or v tiles of a row tile row by row: any page size, any strides.  Lane l finds row l of 32, and
 * looks up its page 32 rows ahead.  A whole warp calls it; each lane arrives. */
template <int D, int N, int IS_V, int FEW>
ATTN_DEVICE void load_gathered(const attn_mha_fwd_params &p, const key_rows &rows,
                               const row_tile &tile, uint32_t stages, uint32_t full,
                               uint32_t empty, uint32_t ending, lean_ring &r)
{
    const uint16_t *head = rows.data + tile.h_kv * rows.stride_h;
    int lane = (int)threadIdx.x % 32;
    int entry = FEW ? 0 : look_up_page(p, tile.seq, tile.begin * N + lane);
    for (int n = tile.begin; n < tile.end; n++) {
        if (!IS_V && n == tile.end - 1 - DRAW_AHEAD && elect_one()) mbarrier_arrive(ending);
        uint32_t dst = stages + r.stage() * (ATTN_MHA_FWD_PANELS(D) * N * 128);
        bool whole = D % 64 == 0 && rows.width == D && (n + 1) * N <= tile.seq.s_k;
        mbarrier_wait_parity(empty + 8 * r.stage(), r.parity());
#pragma unroll 1
        for (int row = 0; row < N; row += 32, dst += 4096) {
            int key = n * N + row + lane, source = tile.seq.k_row;
            int position = tile.seq.k_offset + key;
            if (FEW) entry = look_up_page(p, tile.seq, key);
            if (p.page_table) {
                position -= divide(p.page_division, position) * p.page;
                source = within(entry, p.num_pages - 1);
            }
            int64_t place = source * rows.stride_b + position * rows.stride_s;
            if (!FEW)
                entry = look_up_page(p, tile.seq, row + 32 < N ? key + 32 : (n + 1) * N + lane);
            if (!FEW && whole && p.gather == ATTN_GATHER_NEAR) {
                copy_whole_rows<D, N>(head, place, min(N - row, 32), dst);
            } else {
                if (key >= tile.seq.s_k) place = -1;
                copy_rows<D, N>(head, place, min(N - row, 32), rows.width, dst);
            }
        }
        cp_async_mbarrier_arrive(full + 8 * r.stage());
        ring_next(r);
    }
}

/* All k or v tiles of a row tile; of k, it tells the scheduler when DRAW_AHEAD steps are left.  A whole
 * warp calls it. */
template <int D, int N, int IS_V, int FEW>
ATTN_DEVICE void load_keys(const attn_mha_fwd_params &p, const attn_tensor_map *map,
                           const key_rows &rows, const row_tile &tile, uint32_t stages,
                           uint32_t full, uint32_t empty, uint32_t ending, lean_ring &r)
{
    if (p.gather) {
        if (tile.begin < tile.end)
            load_gathered<D, N, IS_V, FEW>(p, rows, tile, stages, full, empty, ending, r);
        return;
    }
    for (int n = tile.begin; n < tile.end; n++) {
        if (!IS_V && n == tile.end - 1 - DRAW_AHEAD && elect_one()) mbarrier_arrive(ending);
        uint32_t bar = full + 8 * r.stage();
        uint32_t dst = stages + r.stage() * (ATTN_MHA_FWD_PANELS(D) * N * 128);
        mbarrier_wait_parity(empty + 8 * r.stage(), r.parity());
        if (p.page_table)
            load_paged_tile<D, N, IS_V>(p, map, dst, bar, tile.seq, tile.h_kv, n * N);
        else
            load_tile<D, N, IS_V>(p, map, dst, bar, tile.seq, tile.h_kv, n * N);
        ring_next(r);
    }
}

/* Keeps k (IS_V 0) or v and q (IS_V 1) coming.  One warp each: the two run apart, as the consumers
 * free k a product earlier than v, and q between the last of them. */
template <int DQK, int DV, int M, int N, int IS_V>
ATTN_DEVICE void load(const attn_mha_fwd_params &p, const attn_mha_fwd_maps &maps,
                      mha_fwd_smem<DQK, DV, M, N> &sm)
{
    using S = mha_fwd_smem<DQK, DV, M, N>;
    lean_ring tiles = {0}, stages = {2}, qs = {2};
    for (;;) {
        wait_full(sm.tile_full, tiles);
        const row_tile &tile = sm.tile[tiles.stage()]; /* read in place: registers are few here */
        if (tile.b < 0) break;
        if (IS_V) {
            uint32_t bar = shared_address(&sm.q_full[qs.stage()]);
            mbarrier_wait_parity(shared_address(&sm.q_empty[qs.stage()]), qs.parity());
            if (elect_one()) {
                mbarrier_arrive_expect_tx(bar, sm.QK_PANELS * sm.CONSUMERS * p.queries * p.pack * 128);
#pragma unroll
                for (int box = 0; box < sm.QK_PANELS * sm.CONSUMERS; box++) {
                    int panel = box / sm.CONSUMERS, group = box % sm.CONSUMERS;
                    tma_load_5d(shared_address(sm.q[qs.stage()]) + (panel * M + group * 64) * 128, &maps.q, bar,
                                panel * 64, tile.h_q - tile.h_kv * p.group,
                                tile.seq.q_offset + tile.query + group * p.pitch, tile.h_kv,
                                p.cu_seqlens_q ? 0 : tile.b);
                }
            }
            __syncwarp();
            ring_next<S::Q_STAGES>(qs);
            key_rows rows = {(const uint16_t *)p.v, p.v_stride_b, p.v_stride_s, p.v_stride_h,
                             p.d_v};
            load_keys<DV, N, 1, S::FEW>(p, &maps.v, rows, tile, shared_address(sm.v),
                                shared_address(sm.v_full), shared_address(sm.v_empty), 0, stages);
        } else {
            key_rows rows = {(const uint16_t *)p.k, p.k_stride_b, p.k_stride_s, p.k_stride_h,
                             p.d_qk};
            if (tile.end - tile.begin <= DRAW_AHEAD && elect_one())
                mbarrier_arrive(shared_address(&sm.ending));
            load_keys<DQK, N, 0, S::FEW>(p, &maps.k, rows, tile, shared_address(sm.k),
                                 shared_address(sm.k_full), shared_address(sm.k_empty),
                                 shared_address(&sm.ending), stages);
        }
        mbarrier_arrive(shared_address(&sm.tile_empty[tiles.stage()])); /* each lane has read it */
        ring_next(tiles);
    }
}

/* The query of a warpgroup's row, from its first one on. */
ATTN_DEVICE int query_of(const attn_mha_fwd_params &p, int row)
{
    return p.pack == 1 ? row : row / p.pack;
}

/* The number of this cluster's item after number `k`; `r` is the ring of tiles.  In a cluster of
 * two the first block draws and stores the number into both; that form must not be used in a cluster of
 * one, where it is no legal access. */
template <class SMEM>
ATTN_DEVICE int next_number(const attn_mha_fwd_params &p, SMEM &sm, const lean_ring &r, int k)
{
    if (!p.ticket) return k + (int)gridDim.x / p.cluster;
    if (p.cluster == 1) {
        if (elect_one()) k = (int)gridDim.x + atomicAdd(p.ticket, 1);
        return __reduce_max_sync(0xffffffff, k); /* numbers only grow */
    }
    uint32_t full = shared_address(&sm.drawn_full[r.stage()]);
    uint32_t empty = shared_address(&sm.drawn_empty[r.stage()]);
    if (elect_one()) {
        mbarrier_arrive_expect_tx(full, 4);
        if (cluster_rank() == 0) {
            mbarrier_wait_parity(empty, r.parity());
            int number = (int)gridDim.x / 2 + atomicAdd(p.ticket, 1);
            for (int block = 0; block < 2; block++)
                store_async_cluster(shared_address(&sm.drawn[r.stage()]), number, full, block);
        }
    }
    __syncwarp();
    mbarrier_wait_parity(full, r.parity() ^ 1);
    k = *(volatile int *)&sm.drawn[r.stage()];
    __syncwarp();
    if (elect_one()) mbarrier_arrive_cluster(empty, 0);
    return k;
}

/* Finds this block's tiles, one ahead of the loads, and tells loaders and consumers.  One warp. */
template <int DQK, int DV, int M, int N>
ATTN_DEVICE void schedule(const attn_mha_fwd_params &p, mha_fwd_smem<DQK, DV, M, N> &sm)
{
    sequence_group group = {-32, 0, 0, 0};
    lean_ring tiles = {2};
    int number = (int)blockIdx.x / p.cluster, lane = (int)threadIdx.x % 32;
    for (;; ring_next(tiles)) {
        int b, h_kv, item;
        bool more = find_item(group, p, sm.FEW ? 1 : p.fold, number, &b, &h_kv, &item);
        mbarrier_wait_parity(shared_address(&sm.tile_empty[tiles.stage()]), tiles.parity());
        row_tile &tile = sm.tile[tiles.stage()];
        if (elect_one()) {
            if (more)
                tile = locate_tile<N>(p, b, h_kv, item, (int)cluster_rank());
            else
                tile = {-1};
            mbarrier_arrive(shared_address(&sm.tile_full[tiles.stage()]));
        }
        __syncwarp();
        key_interval *bounds = sm.bounds[tiles.stage()];
#pragma unroll 1
        for (int row = lane; row < M; row += 32)
            bounds[row] = visible_keys(p, tile.query + row / 64 * p.pitch + query_of(p, row % 64),
                                       tile.seq.s_q, tile.seq.s_k, tile.cp_tot);
        __syncwarp();
        if (lane < sm.CONSUMERS) {
            int top = tile.query + lane * p.pitch, live = min(p.queries, tile.seq.s_q - top);
            const key_interval *own = bounds + lane * 64;
            sm.steps[tiles.stage()][lane] = find_steps<N>(own[0], own[max(live * p.pack, 1) - 1],
                                                          live > max(-top, 0), tile.begin);
        }
        mbarrier_arrive(shared_address(&sm.steps_full[tiles.stage()]));
        if (!more) break;
        mbarrier_wait_parity(shared_address(&sm.ending), tiles.stage());
        number = next_number(p, sm, tiles, number);
    }
}

/* ---- the consumer warpgroups ----------------------------------------------------------------- */

/* Frees a stage in every block of the cluster; one thread a warpgroup. */
ATTN_DEVICE void release(const attn_mha_fwd_params &p, const uint64_t *empty, ring &r)
{
    if (threadIdx.x % 128 == 0) {
        uint32_t bar = shared_address(&empty[r.stage()]);
        if (p.cluster == 2) {
            mbarrier_arrive_cluster(bar, 0);
            mbarrier_arrive_cluster(bar, 1);
        } else {
            mbarrier_arrive(bar);
        }
    }
    ring_next(r);
}

/* Writes out and lse of a warpgroup's live rows, whose first query is `top`; maxima times `unit` are
 * exponents. */
template <int FP16, int DV>
ATTN_DEVICE void store_rows(const attn_mha_fwd_params &p, const row_tile &tile, int top,
                            softmax_rows &rows, float unit, float (&o)[DV / 2])
{
    int c = (int)threadIdx.x % 4, b = p.cu_seqlens_q ? 0 : tile.b;
    float normalise[2];
    uint16_t *out[2];
    bool live[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int row = (int)threadIdx.x % 128 / 32 * 16 + (int)threadIdx.x % 32 / 4 + 8 * h;
        int i = query_of(p, row), h_q = tile.h_q + row - i * p.pack;
        live[h] = i < p.queries && (uint32_t)(top + i) < (uint32_t)tile.seq.s_q;
        float sink = p.sink != ATTN_SINK_NONE ? load_sink(p, live[h] ? h_q : 0) : 0.0f, lse;
        softmax_finish(rows.max[h], quad_sum(rows.sum[h]), unit, p.sink != ATTN_SINK_NONE, sink,
                       p.lse_empty, &normalise[h], &lse);
        int64_t at = (int64_t)tile.seq.q_offset + top + i;
        if (live[h] && c == 0 && p.lse)
            p.lse[b * p.lse_stride_b + h_q * p.lse_stride_h + at] = lse;
        out[h] = (uint16_t *)p.out + b * p.out_stride_b + at * p.out_stride_s +
                 h_q * p.out_stride_h + 8 * c;
    }
    /* 128 columns of both rows at a time, so that their shuffles overlap. */
#pragma unroll
    for (int first = 0; first < DV; first += 128) {
        constexpr int MOST = DV < 128 ? DV / 32 : 4;
        uint32_t x[2 * MOST][4];
#pragma unroll
        for (int j = 0; j < 2 * MOST; j++) {
            if (first + j / 2 * 32 >= DV) continue;
            const float *row = o + first / 2 + j / 2 * 16 + j % 2 * 2;
#pragma unroll
            for (int e = 0; e < 4; e++)
                x[j][e] = pack_16x2<FP16>(row[4 * e] * normalise[j % 2],
                                          row[4 * e + 1] * normalise[j % 2]);
        }
#pragma unroll
        for (int j = 0; j < 2 * MOST; j++)
            if (first + j / 2 * 32 < DV) quad_transpose(x[j]);
#pragma unroll
        for (int j = 0; j < 2 * MOST; j++) {
            int column = first + j / 2 * 32;
            if (column < DV && live[j % 2] && column + 8 * c < p.d_v)
                *(uint4 *)(out[j % 2] + column) = make_uint4(x[j][0], x[j][1], x[j][2], x[j][3]);
        }
    }
}

/* The same through the warpgroup's rows of q in shared memory, [panel of 64 columns][M rows][128 bytes]:
 * where all 64 rows are live the copy engine stores them, else the threads do, 16 bytes each. */
template <int FP16, int DV, int M>
ATTN_DEVICE void stage_rows(const attn_mha_fwd_params &p, const attn_mha_fwd_out &to,
                            const row_tile &tile, int group, softmax_rows &rows, float unit,
                            float (&o)[DV / 2], uint32_t place)
{
    constexpr int CHUNKS = DV / 8; /* of 16 bytes */
    int t = (int)threadIdx.x % 128, lane = t % 32, b = p.cu_seqlens_q ? 0 : tile.b;
    int top = tile.query + group * p.pitch;
    float normalise[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int row = t / 32 * 16 + lane / 4 + 8 * h;
        int i = query_of(p, row), h_q = tile.h_q + row - i * p.pack;
        bool lives = i < p.queries && (uint32_t)(top + i) < (uint32_t)tile.seq.s_q;
        float sink = p.sink != ATTN_SINK_NONE ? load_sink(p, lives ? h_q : 0) : 0.0f, lse;
        softmax_finish(rows.max[h], quad_sum(rows.sum[h]), unit, p.sink != ATTN_SINK_NONE, sink,
                       p.lse_empty, &normalise[h], &lse);
        if (lives && lane % 4 == 0 && p.lse)
            p.lse[b * p.lse_stride_b + h_q * p.lse_stride_h + tile.seq.q_offset + top + i] = lse;
    }

    /* Lane l passes row l % 16 of the warp's sixteen, chunk l / 16 of a pair of 16 bytes. */
    uint32_t own = place + (t / 32 * 16 + lane % 16) * 128;
    uint32_t turn = (uint32_t)(lane / 16 ^ lane % 8) << 4;
#pragma unroll
    for (int j = 0; j < CHUNKS; j += 2) {
        const float *x = o + 4 * j;
        stmatrix_x4(own + j / 8 * (M * 128) + (turn ^ j % 8 << 4),
                    pack_16x2<FP16>(x[0] * normalise[0], x[1] * normalise[0]),
                    pack_16x2<FP16>(x[2] * normalise[1], x[3] * normalise[1]),
                    pack_16x2<FP16>(x[4] * normalise[0], x[5] * normalise[0]),
                    pack_16x2<FP16>(x[6] * normalise[1], x[7] * normalise[1]));
    }
    fence_proxy_async_shared();
    named_barrier_sync_at<128>(1 + group);
    if (to.boxes && top >= 0 && top + p.queries <= tile.seq.s_q) {
        if (t == 0) {
#pragma unroll
            for (int panel = 0; panel < ATTN_MHA_FWD_PANELS(DV); panel++)
                if (panel * 64 < p.d_v)
                    tma_store_5d(place + panel * (M * 128), &to.map, panel * 64,
                                 tile.h_q - tile.h_kv * p.group, tile.seq.q_offset + top, tile.h_kv, b);
            bulk_commit_group();
        }
        return;
    }
#pragma unroll 1
    for (int at = t; at < 64 * CHUNKS; at += 128) {
        int row = at / CHUNKS, chunk = at % CHUNKS, i = query_of(p, row);
        int64_t position = (int64_t)tile.seq.q_offset + top + i;
        uint4 x = shared_load_16(place + chunk / 8 * (M * 128) + row * 128 + ((chunk ^ row) % 8 << 4));
        if (i < p.queries && (uint32_t)(top + i) < (uint32_t)tile.seq.s_q && chunk * 8 < p.d_v)
            *(uint4 *)((uint16_t *)p.out + b * p.out_stride_b + position * p.out_stride_s +
                       (tile.h_q + row - i * p.pack) * p.out_stride_h + chunk * 8) = x;
    }
    named_barrier_sync_at<128>(1 + group); /* before one thread frees the place */
}

template <int CAP, int FP16, int DQK, int DV, int M, int N>
ATTN_DEVICE void consume(const attn_mha_fwd_params &p, const attn_mha_fwd_out &to,
                         mha_fwd_smem<DQK, DV, M, N> &sm, int group)
{
    int t = (int)threadIdx.x % 128, warp = t / 32, lane = t % 32;
    int slot = group * 64 + warp * 16; /* of this warp's rows in bounds */
    ring tiles = {0, 0}, qs = {0, 0}, ks = {0, 0}, vs = {0, 0};

    /* Where STORES_LATE, a tile's rows are stored under the first product of the next tile: o, rows
     * and `last`, the tile they are of (b < 0: nothing to store), live on until then. */
    constexpr bool STORES_LATE = mha_fwd_smem<DQK, DV, M, N>::STORES_LATE;
    constexpr bool STAGED = mha_fwd_smem<DQK, DV, M, N>::STAGED;
    constexpr bool HALVES = N == 128; /* steps of which a warpgroup may see but one 64 by 64 triangle */
    constexpr int TURN = 4; /* the first warpgroup's named barrier; stage_rows has 1 to 3 */
    constexpr int LOOK = 2; /* in `accumulate`: capped scores are looked at before they count as small */
    const float unit = CAP ? 1.0f : p.exp_scale;
    float o[DV / 2], s[N / 2];
    uint32_t packed[N / 4];
    softmax_rows rows;
    row_tile last;
    bool held = false; /* the last tile's stage of q: with STAGED it takes that one's out first */
    last.b = -1;
    if (group == M / 64 - 1) named_barrier_arrive_at<256>(TURN); /* the first turn */

    for (;;) {
        wait_full(sm.steps_full, tiles);
        const row_tile &tile = sm.tile[tiles.stage()]; /* the end of the work is a tile without rows */
        if (!STORES_LATE && tile.b < 0) break;

        int top = tile.query + group * p.pitch, bottom = min(top + p.queries, tile.seq.s_q) - 1;
        const row_steps &steps = sm.steps[tiles.stage()][group];
        int begin = steps.begin, end = steps.end, tile_end = tile.end;
        int whole_begin = steps.whole_begin, whole_end = steps.whole_end;

        auto wait_turn = [&]() { named_barrier_sync_at<256>(TURN + group); };
        auto pass_turn = [&]() {
            named_barrier_arrive_at<256>(TURN + (group + 1 < M / 64 ? group + 1 : 0));
        };
        auto skip = [&]() {
            wait_turn();
            pass_turn();
            wait_full(sm.k_full, ks);
            release(p, sm.k_empty, ks);
            wait_full(sm.v_full, vs);
            release(p, sm.v_empty, vs);
        };
        auto mask = [&](int n) { /* false: no row sees the second half of the keys */
            int key = n * N + 2 * (lane % 4), row = slot + lane / 4;
            int half = HALVES && n == end - 1 ? steps.half : 0;
            const key_interval *bounds = sm.bounds[tiles.stage()];
            if (n >= whole_end) {
                int hi0 = bounds[row].hi, hi1 = bounds[row + 8].hi;
                if (!(half & 2)) mask_after<0, N / 2>(s, key, hi0, hi1);
                mask_after<N / 2, N>(s, key, hi0, hi1);
            }
            if (n < whole_begin) mask_before(s, key, bounds[row].lo, bounds[row + 8].lo);
            return !(half & 1);
        };
        auto scores_to_probabilities = [&](int n) {
            if constexpr (CAP) {
                softcap_open<N>(s, p.softcap);
                mask(n);
                softcap_exponentiate<N>(rows, s, p.softcap);
            } else {
                if (p.score == ATTN_SCORE_SCALED) {
#pragma unroll
                    for (int i = 0; i < N / 2; i++)
                        s[i] *= p.score_scale;
                }
                mask(n);
                softmax_update_max<N, ATTN_PREFILL_SLACK>(rows, s, p.exp_scale);
                softmax_exponentiate<N>(rows, s, p.exp_scale);
            }
        };
        auto release_k = [&](int n) { /* and q behind the last product that reads it */
            release(p, sm.k_empty, ks);
            if (!STAGED && n == end - 1 && t == 0)
                mbarrier_arrive(shared_address(&sm.q_empty[qs.stage()]));
        };
        auto wait_k = [&]() {
            wait_full(sm.k_full, ks);
            if (p.gather) fence_proxy_async_shared();
        };
        auto wait_v = [&]() {
            wait_full(sm.v_full, vs);
            if (p.gather) fence_proxy_async_shared();
        };

        auto store = [&](const row_tile &of, int stage) {
            if constexpr (STAGED)
                stage_rows<FP16, DV, M>(p, to, of, group, rows, unit, o,
                                        shared_address(sm.q[stage]) + group * 8192);
            else
                store_rows<FP16, DV>(p, of, of.query + group * p.pitch, rows, unit, o);
        };
        auto release_last_q = [&]() { /* once the copy engine has read out from it */
            if (STAGED && held && t == 0) {
                bulk_wait_read();
                mbarrier_arrive(shared_address(&sm.q_empty[qs.stage() ^ 1]));
            }
        };

        int n = tile.begin;
        for (; n < begin; n++)
            skip();
        bool sees = n < end, ends = STORES_LATE && tile.b < 0;
        if (!ends) wait_full(sm.q_full, qs);
        uint32_t q = shared_address(sm.q[qs.stage()]) + group * 8192;
        if (sees) wait_k();
        /* Where no key is seen, and after the last tile, this product is of whatever lies there and nobody
         * reads it: so there is one copy of the code that stores. */
        if (sees) wait_turn();
        wgmma_pin(s);
        wgmma_fence();
        issue_qk<FP16, DQK, M, N>(s, q, shared_address(sm.k[ks.stage()]));
        if (sees) pass_turn();
        if (STORES_LATE && last.b >= 0) store(last, qs.stage() ^ 1);
        softmax_init(rows);
        wgmma_wait_group<0>();
        wgmma_pin(s);
        if (ends) break;
        if (sees) {
            release_k(n);
            if constexpr (CAP) {
                if (softcap_look<N>(s, p.softcap) == SCORES_SMALL) {
                    bool upper = mask(n);
                    softcap_start<N>(rows, s, upper, p.softcap);
                    softcap_keep_max<FP16, N, 0, 0>(rows, packed, s, upper, true, p.softcap);
                } else {
                    scores_to_probabilities(n);
                    softmax_pack<FP16, N>(packed, s);
                }
            } else if (p.score == ATTN_SCORE_PLAIN) {
                bool upper = mask(n);
                softmax_start<N>(rows, s, upper);
                softmax_keep_max<FP16, N, 0>(rows, packed, s, upper, p.exp_scale);
            } else {
                scores_to_probabilities(n);
                softmax_pack<FP16, N>(packed, s);
            }
            release_last_q();
            int accumulate = 0; /* the first product overwrites what O holds of the last tile */
            if (CAP && !softcap_deep(rows, p.softcap)) accumulate = LOOK;
            for (n++; n < end; n++) {
                wait_k();
                wait_turn();
                wgmma_pin(s);
                wgmma_pin(o);
                wgmma_pin(packed);
                wgmma_fence();
                issue_qk<FP16, DQK, M, N>(s, q, shared_address(sm.k[ks.stage()]));
                wait_v();
                issue_pv<FP16, DV, N>(o, packed, shared_address(sm.v[vs.stage()]), accumulate & 1);
                accumulate |= 1;
                wgmma_wait_group<1>();
                pass_turn();
                wgmma_pin(s);
                release_k(n);
                if constexpr (CAP) {
                    wgmma_wait_group<0>();
                    wgmma_pin(o);
                    wgmma_pin(packed);
                    release(p, sm.v_empty, vs);
                    bool look = accumulate & LOOK;
                    int scores = look ? softcap_look<N>(s, p.softcap) : SCORES_SMALL;
                    bool upper = mask(n);
                    if (scores == SCORES_SMALL &&
                        softcap_keep_max<FP16, N>(rows, packed, s, upper, look, p.softcap))
                        continue;
                    if (scores == SCORES_MIDDLE &&
                        softcap_keep_max<FP16, N, 1>(rows, packed, s, upper, true, p.softcap))
                        continue;
                    accumulate |= LOOK;
                    scores_to_probabilities(n);
                    softmax_pack<FP16, N>(packed, s);
                    softmax_rescale<DV>(rows, o);
                    continue;
                }
                if (p.score == ATTN_SCORE_PLAIN) {
                    bool upper = mask(n);
                    wgmma_wait_group<0>(); /* not for long: it has started, or we would not be here */
                    wgmma_pin(o);
                    wgmma_pin(packed);
                    if (softmax_keep_max<FP16, N>(rows, packed, s, upper, p.exp_scale)) {
                        release(p, sm.v_empty, vs);
                        continue;
                    }
                }
                scores_to_probabilities(n);
                wgmma_wait_group<0>();
                wgmma_pin(o);
                release(p, sm.v_empty, vs);
                softmax_pack<FP16, N>(packed, s);
                softmax_rescale<DV>(rows, o);
            }
            wait_v();
            if (HALVES && (steps.half & 1)) { /* each way whole, or ptxas serialises all products */
                wgmma_pin(o);
                wgmma_pin(packed);
                wgmma_fence();
                issue_pv<FP16, DV, N, N / 32>(o, packed, shared_address(sm.v[vs.stage()]),
                                              accumulate & 1);
                wgmma_wait_group<0>();
                wgmma_pin(o);
            } else {
                wgmma_pin(o);
                wgmma_pin(packed);
                wgmma_fence();
                issue_pv<FP16, DV, N>(o, packed, shared_address(sm.v[vs.stage()]), accumulate & 1);
                wgmma_wait_group<0>();
                wgmma_pin(o);
            }
            release(p, sm.v_empty, vs);
        } else {
#pragma unroll
            for (int i = 0; i < DV / 2; i++)
                o[i] = 0.0f;
            release_last_q();
            if (!STAGED && t == 0) mbarrier_arrive(shared_address(&sm.q_empty[qs.stage()]));
        }
        for (; n < tile_end; n++)
            skip();
        if (STORES_LATE) {
            last = tile;
            if (bottom < max(top, 0)) last.b = -1;
        } else if (bottom >= max(top, 0)) {
            store(tile, qs.stage());
        }
        mbarrier_arrive(shared_address(&sm.tile_empty[tiles.stage()]));
        ring_next(tiles);
        ring_next<mha_fwd_smem<DQK, DV, M, N>::Q_STAGES>(qs);
        held = true;
    }
    if (STAGED && t == 0) bulk_wait_read(); /* shared memory lasts as long as the block */
}

/* ---- the kernel ------------------------------------------------------------------------------ */

template <int CAP, int FP16, int DQK, int DV, int M, int N>
ATTN_DEVICE void mha_fwd_body(const attn_mha_fwd_params &p, const attn_mha_fwd_maps &maps,
                              const attn_mha_fwd_out &out)
{
    typedef mha_fwd_smem<DQK, DV, M, N> smem;
    constexpr int CONSUMERS = smem::CONSUMERS;
    static_assert(sizeof(smem) <= ATTN_MHA_FWD_SMEM(DQK, DV, M, N), "the host asks for less");
    extern __shared__ __align__(1024) uint8_t raw[];
    smem &sm = *(smem *)raw;

    int group = __shfl_sync(0xffffffff, (int)threadIdx.x / 128, 0);
    if (threadIdx.x == 0) {
        uint32_t loads = p.gather ? 32 : 1, readers = CONSUMERS * p.cluster;
        for (int i = 0; i < smem::STAGES; i++) {
            mbarrier_init(shared_address(&sm.k_full[i]), loads);
            mbarrier_init(shared_address(&sm.v_full[i]), loads);
            mbarrier_init(shared_address(&sm.k_empty[i]), readers);
            mbarrier_init(shared_address(&sm.v_empty[i]), readers);
        }
        for (int i = 0; i < 2; i++) {
            mbarrier_init(shared_address(&sm.q_full[i]), 1);
            mbarrier_init(shared_address(&sm.q_empty[i]), CONSUMERS);
            mbarrier_init(shared_address(&sm.tile_full[i]), 1);
            mbarrier_init(shared_address(&sm.steps_full[i]), 32);
            mbarrier_init(shared_address(&sm.tile_empty[i]), CONSUMERS * 128 + 64);
            mbarrier_init(shared_address(&sm.drawn_full[i]), 1);
            mbarrier_init(shared_address(&sm.drawn_empty[i]), 2);
        }
        mbarrier_init(shared_address(&sm.ending), 1);
        fence_mbarrier_init();
        prefetch_tensormap(&maps.q);
        prefetch_tensormap(&maps.k);
        prefetch_tensormap(&maps.v);
        if (smem::STAGED && out.boxes) prefetch_tensormap(&out.map);
    }
    cluster_sync();

    if (group == CONSUMERS) {
        setmaxnreg_dec<smem::PRODUCER_REGISTERS>();
        int warp = __shfl_sync(0xffffffff, (int)threadIdx.x % 128 / 32, 0);
        if (warp == 0)
            schedule<DQK, DV, M, N>(p, sm);
        else if (warp == 1)
            load<DQK, DV, M, N, 0>(p, maps, sm);
        else if (warp == 2)
            load<DQK, DV, M, N, 1>(p, maps, sm);
    } else {
        setmaxnreg_inc<smem::CONSUMER_REGISTERS>();
        consume<CAP, FP16, DQK, DV, M, N>(p, out, sm, group);
    }
    __syncwarp();
    cluster_sync();
}

/* The build compiles this file once a line of mha_fwd.def, with the line's fields as macros. */
#define mha_fwd_CAP 0
#define mha_fwd_cap_CAP 1
#define ATTN_KERNEL(op, arch, dtype, dqk, dv, rows, keys)                                          \
    extern "C" __global__ void __launch_bounds__((rows) * 2 + 128, 1)                              \
        attn_##op##_##arch##_##dtype##_d##dqk##x##dv##_m##rows##n##keys(                           \
            const __grid_constant__ attn_mha_fwd_params p,                                         \
            const __grid_constant__ attn_mha_fwd_maps maps,                                        \
            const __grid_constant__ attn_mha_fwd_out out)                                          \
    {                                                                                              \
        mha_fwd_body<op##_CAP, DTYPE_##dtype, dqk, dv, rows, keys>(p, maps, out);                  \
    }
#define ATTN_EXPAND(...) ATTN_KERNEL(__VA_ARGS__)
ATTN_EXPAND(VARIANT_OP, sm90, VARIANT_DTYPE, VARIANT_DQK, VARIANT_DV, VARIANT_ROWS, VARIANT_KEYS)
