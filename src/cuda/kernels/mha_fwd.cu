/* SPDX-License-Identifier: MIT
 *
 * mha_fwd on Hopper: attention, forward.
 *
 * Math, a query row i over its visible keys j (mask.cuh: one interval a row):
 *     S = q_i . k_j       P = 2^(S k - m k)       l = sum P       out_i = sum P v_j / l
 *     lse_i = (m k + log2 l) ln 2                 k = scale log2 e, m = a running maximum of S
 * S, m, l and O are fp32, P is rounded to the inputs' type.  Softcap: S = tanh(S scale / cap),
 * k = cap log2 e.  A row without visible keys gives 0 and lse -inf.
 *
 * Layout.  q, out [b, s_q, h_q, d] or [t_q, h_q, d]; k, v [b, s_k, h_k, d], [t_k, h_k, d] or pages.
 * A block has M / 64 consumer warpgroups of 64 rows and a producer warpgroup; sched.cuh says which
 * rows.  Blocks of a cluster of two share every k and v tile: each loads half of it and the copy
 * engine lands it in both.  Shared memory holds q and two stages each of k and v (tile.cuh), O
 * stays in registers and P goes from accumulator to A operand without leaving them (wgmma.cuh).
 *
 * Pipeline: S = Q K^T of one step runs on the tensor cores beside the softmax of the step before.
 *
 *  turn     | 0         | 1                      | 2                      | last
 *  producer | Q K0 V0   | K1 V1                  | K2 V2                  | next tile: Q K0 V0
 *  wgmma    | S0        | S1        O += P0 V0   | S2        O += P1 V1   | O += Pn Vn
 *  consumer |        P0 |        P1   rescale O  |        P2   rescale O  |        out, lse
 *
 * Key steps run from the last to the first, so that causal's masked steps come first.  A warpgroup
 * that sees none of a step's keys waits for the tile and releases it, to keep the rings in step.
 */
#include "attend.cuh"
#include "softmax.cuh"
#include "tile.cuh"

ATTN_DEVICE void wait_full(const uint64_t *full, const ring &r)
{
    mbarrier_wait_parity(shared_address(&full[r.stage]), r.parity);
}

/* ---- the producer warpgroup ------------------------------------------------------------------ */

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
        int row = i / PANELS * p.box_rows, page = (key + row) / p.page;
        load_box<IS_V>(p, map, dst + i % PANELS * (N * 128) + row * 128, bar, i % PANELS,
                       min(seq.s_k - key - row, p.box_rows), key + row - page * p.page, h_kv,
                       within(__ldg(pages + page), p.num_pages - 1));
    }
    __syncwarp();
}

/* Copies N rows by 16 bytes a lane, eight lanes a row.  Lane l holds where rows l, l + 32, .. lie from
 * `head` on, -1 for one past the sequence's end.  WHOLE: no such row, and heads as wide as the tile. */
template <int D, int N, int WHOLE>
ATTN_DEVICE void copy_rows(const uint16_t *head, const int64_t (&offset)[(N + 31) / 32], int width,
                           uint32_t dst)
{
    int lane = (int)threadIdx.x % 32, chunk = lane % 8;
#pragma unroll
    for (int i = 0; i < (N + 31) / 32; i++) {
#pragma unroll(WHOLE ? 2 : 4)
        for (int four = 0; four < 32 && 32 * i + four < N; four += 4) {
            int from = four + lane / 8, row = 32 * i + from;
            int64_t at = __shfl_sync(0xffffffff, offset[i], from);
            uint32_t to = dst + row * 128 + ((chunk ^ (row & 7)) << 4);
#pragma unroll
            for (int panel = 0; panel < ATTN_MHA_FWD_PANELS(D); panel++) {
                int column = panel * 64 + chunk * 8;
                bool inside = at >= 0 && column < width;
                if (WHOLE)
                    cp_async_16(to + panel * N * 128, head + at + column);
                else
                    cp_async_16(to + panel * N * 128, inside ? head + at + column : head,
                                inside ? 16 : 0);
            }
        }
    }
}

/* The same tile row by row: any page size, any strides.  A lane finds the rows lane, lane + 32, ..
 * A whole warp calls it; each lane arrives. */
template <int D, int N>
ATTN_DEVICE void load_gathered(const attn_mha_fwd_params &p, const key_rows &rows, uint32_t dst,
                               uint32_t bar, const sequence &seq, int h_kv, int key)
{
    int lane = (int)threadIdx.x % 32;
    const uint16_t *head = rows.data + h_kv * rows.stride_h;
    int64_t offset[(N + 31) / 32];
#pragma unroll
    for (int i = 0; i < (N + 31) / 32; i++) {
        int position = seq.k_offset + key + 32 * i + lane, source = seq.k_row;
        offset[i] = -1;
        if (key + 32 * i + lane < seq.s_k) {
            if (p.page_table) {
                int page = position / p.page;
                position -= page * p.page;
                source = within(__ldg(p.page_table + seq.k_row * p.page_table_stride + page),
                                p.num_pages - 1);
            }
            offset[i] = source * rows.stride_b + position * rows.stride_s;
        }
    }
    if (D % 64 == 0 && rows.width == D && key + N <= seq.s_k)
        copy_rows<D, N, 1>(head, offset, rows.width, dst);
    else
        copy_rows<D, N, 0>(head, offset, rows.width, dst);
    cp_async_mbarrier_arrive(bar);
}

/* All k or v tiles of a row tile, last keys first.  A whole warp calls it. */
template <int D, int N, int IS_V>
ATTN_DEVICE void load_keys(const attn_mha_fwd_params &p, const attn_tensor_map *map,
                           const key_rows &rows, const row_tile &tile, uint32_t stages,
                           uint32_t full, uint32_t empty, ring &r)
{
    for (int n = tile.end - 1; n >= tile.begin; n--) {
        uint32_t bar = full + 8 * r.stage;
        uint32_t dst = stages + r.stage * (ATTN_MHA_FWD_PANELS(D) * N * 128);
        mbarrier_wait_parity(empty + 8 * r.stage, r.parity);
        if (p.gather)
            load_gathered<D, N>(p, rows, dst, bar, tile.seq, tile.h_kv, n * N);
        else if (p.page_table)
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
    ring tiles = {0, 0}, stages = {0, 1};
    uint32_t q_parity = 1;
    for (;;) {
        wait_full(sm.tile_full, tiles);
        const row_tile &tile = sm.tile[tiles.stage]; /* read in place: registers are few here */
        if (tile.b < 0) break;
        if (IS_V) {
            uint32_t bar = shared_address(&sm.q_full);
            mbarrier_wait_parity(shared_address(&sm.q_empty), q_parity);
            if (elect_one()) {
                mbarrier_arrive_expect_tx(bar, sizeof sm.q);
#pragma unroll
                for (int panel = 0; panel < sm.QK_PANELS; panel++)
                    tma_load_4d(shared_address(sm.q) + panel * M * 128, &maps.q, bar, panel * 64,
                                tile.seq.q_offset + tile.row, tile.h_q,
                                p.cu_seqlens_q ? 0 : tile.b);
            }
            __syncwarp();
            q_parity ^= 1;
            key_rows rows = {(const uint16_t *)p.v, p.v_stride_b, p.v_stride_s, p.v_stride_h,
                             p.d_v};
            load_keys<DV, N, 1>(p, &maps.v, rows, tile, shared_address(sm.v),
                                shared_address(sm.v_full), shared_address(sm.v_empty), stages);
        } else {
            key_rows rows = {(const uint16_t *)p.k, p.k_stride_b, p.k_stride_s, p.k_stride_h,
                             p.d_qk};
            load_keys<DQK, N, 0>(p, &maps.k, rows, tile, shared_address(sm.k),
                                 shared_address(sm.k_full), shared_address(sm.k_empty), stages);
        }
        __syncwarp();
        if (elect_one()) mbarrier_arrive(shared_address(&sm.tile_empty[tiles.stage]));
        ring_next(tiles);
    }
}

/* The number of this cluster's item after number `k`; `r` is the ring of tiles.  In a cluster of
 * two the first block draws and stores the number into both; that form must not be used in a cluster of
 * one, where it is no legal access. */
template <class SMEM>
ATTN_DEVICE int next_number(const attn_mha_fwd_params &p, SMEM &sm, const ring &r, int k)
{
    if (!p.ticket) return k + (int)gridDim.x / p.cluster;
    if (p.cluster == 1) {
        if (elect_one()) k = (int)gridDim.x + atomicAdd(p.ticket, 1);
        return __reduce_max_sync(0xffffffff, k); /* numbers only grow */
    }
    uint32_t full = shared_address(&sm.drawn_full[r.stage]);
    uint32_t empty = shared_address(&sm.drawn_empty[r.stage]);
    if (elect_one()) {
        mbarrier_arrive_expect_tx(full, 4);
        if (cluster_rank() == 0) {
            mbarrier_wait_parity(empty, r.parity);
            int number = (int)gridDim.x / 2 + atomicAdd(p.ticket, 1);
            for (int block = 0; block < 2; block++)
                store_async_cluster(shared_address(&sm.drawn[r.stage]), number, full, block);
        }
    }
    __syncwarp();
    mbarrier_wait_parity(full, r.parity ^ 1);
    k = *(volatile int *)&sm.drawn[r.stage];
    __syncwarp();
    if (elect_one()) mbarrier_arrive_cluster(empty, 0);
    return k;
}

/* Finds this block's tiles, one ahead of the loads, and tells loaders and consumers.  One warp. */
template <int DQK, int DV, int M, int N>
ATTN_DEVICE void schedule(const attn_mha_fwd_params &p, mha_fwd_smem<DQK, DV, M, N> &sm)
{
    sequence_group group = {-32, 0, 0, 0};
    ring tiles = {0, 1};
    int number = (int)blockIdx.x / p.cluster;
    for (bool more = true; more; ring_next(tiles)) {
        int b, h_kv, item;
        more = find_item<M>(group, p, number, &b, &h_kv, &item);
        mbarrier_wait_parity(shared_address(&sm.tile_empty[tiles.stage]), tiles.parity);
        if (elect_one()) {
            row_tile &tile = sm.tile[tiles.stage];
            if (more)
                tile = locate_tile<M, N>(p, b, h_kv, item, (int)cluster_rank());
            else
                tile = {-1};
            mbarrier_arrive(shared_address(&sm.tile_full[tiles.stage]));
        }
        __syncwarp();
        if (more) number = next_number(p, sm, tiles, number);
    }
}

/* ---- the consumer warpgroups ----------------------------------------------------------------- */

/* Frees a stage in every block of the cluster; one thread a warpgroup. */
ATTN_DEVICE void release(const attn_mha_fwd_params &p, const uint64_t *empty, ring &r)
{
    if (threadIdx.x % 128 == 0) {
        uint32_t bar = shared_address(&empty[r.stage]);
        if (p.cluster == 2) {
            mbarrier_arrive_cluster(bar, 0);
            mbarrier_arrive_cluster(bar, 1);
        } else {
            mbarrier_arrive(bar);
        }
    }
    ring_next(r);
}

/* Writes out and lse of a warpgroup's live rows.  `row` is this thread's first row. */
template <int FP16, int DV>
ATTN_DEVICE void store_rows(const attn_mha_fwd_params &p, const row_tile &tile, int row,
                            softmax_rows &rows, float (&o)[DV / 2])
{
    int c = (int)threadIdx.x % 4, b = p.cu_seqlens_q ? 0 : tile.b;
    float sink = p.sink != ATTN_SINK_NONE ? load_sink(p, tile.h_q) : 0.0f;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int i = row + 8 * h;
        float normalise, lse;
        softmax_finish(rows.max[h], quad_sum(rows.sum[h]), p.exp_scale, p.sink != ATTN_SINK_NONE,
                       sink, p.lse_empty, &normalise, &lse);
        int64_t at = (int64_t)tile.seq.q_offset + i;
        if (i < tile.seq.s_q && c == 0)
            p.lse[b * p.lse_stride_b + tile.h_q * p.lse_stride_h + at] = lse;
        uint16_t *out = (uint16_t *)p.out + b * p.out_stride_b + at * p.out_stride_s +
                        tile.h_q * p.out_stride_h;
#pragma unroll
        for (int j = 0; j < DV / 32; j++) {
            uint32_t x[4];
#pragma unroll
            for (int e = 0; e < 4; e++)
                x[e] = pack_16x2<FP16>(o[16 * j + 4 * e + 2 * h] * normalise,
                                       o[16 * j + 4 * e + 2 * h + 1] * normalise);
            quad_transpose(x);
            int column = 32 * j + 8 * c;
            if (i < tile.seq.s_q && column < p.d_v)
                *(uint4 *)(out + column) = make_uint4(x[0], x[1], x[2], x[3]);
        }
    }
}

template <int FP16, int DQK, int DV, int M, int N>
ATTN_DEVICE void consume(const attn_mha_fwd_params &p, mha_fwd_smem<DQK, DV, M, N> &sm, int group)
{
    int t = (int)threadIdx.x % 128, warp = t / 32, lane = t % 32;
    int own_row = group * 64 + warp * 16 + lane / 4; /* of this thread, and the 8th on */
    uint32_t q = shared_address(sm.q) + group * 8192;
    ring tiles = {0, 0}, ks = {0, 0}, vs = {0, 0};
    uint32_t q_parity = 0;

    /* Where STORES_LATE, a tile's rows are stored under the first product of the next tile: o, rows
     * and `last`, the tile they are of (b < 0: nothing to store), live on until then. */
    constexpr bool STORES_LATE = mha_fwd_smem<DQK, DV, M, N>::STORES_LATE;
    float o[DV / 2], s[N / 2];
    uint32_t packed[N / 4];
    softmax_rows rows;
    row_tile last;
    last.b = -1;

    for (;;) {
        wait_full(sm.tile_full, tiles);
        row_tile tile = sm.tile[tiles.stage]; /* the end of the work is a tile without rows */
        if (!STORES_LATE && tile.b < 0) break;

        /* Bounds of the rows this warp owns; key steps that the warpgroup sees at all, and those
         * that all its rows see whole. */
        __syncwarp(); /* other lanes have read the last tile's */
        if (lane < 16) {
            int r = group * 64 + warp * 16 + lane;
            sm.bounds[r] = visible_keys(p, tile.row + r, tile.seq.s_q, tile.seq.s_k, tile.cp_tot);
        }
        int top = tile.row + group * 64, bottom = min(top + 64, tile.seq.s_q) - 1;
        key_interval high = visible_keys(p, top, tile.seq.s_q, tile.seq.s_k, tile.cp_tot);
        key_interval low = visible_keys(p, bottom, tile.seq.s_q, tile.seq.s_k, tile.cp_tot);
        int begin = high.lo / N, end = (low.hi + N - 1) / N;
        int whole_begin = (low.lo + N - 1) / N, whole_end = high.hi / N;
        if (top >= tile.seq.s_q || end <= begin) begin = end = tile.begin; /* sees none */
        __syncwarp();
        if (lane == 0) mbarrier_arrive(shared_address(&sm.tile_empty[tiles.stage]));
        ring_next(tiles);

        auto skip = [&]() {
            wait_full(sm.k_full, ks);
            release(p, sm.k_empty, ks);
            wait_full(sm.v_full, vs);
            release(p, sm.v_empty, vs);
        };
        auto scores_to_probabilities = [&](int n) {
            if (p.score != ATTN_SCORE_PLAIN) transform_scores<N>(p, s);
            if (n >= whole_end || n < whole_begin)
                mask_scores<N>(s, n * N + 2 * (lane % 4), sm.bounds[own_row],
                               sm.bounds[own_row + 8]);
            if (p.score != ATTN_SCORE_BOUNDED) softmax_update_max<N>(rows, s, p.exp_scale);
            softmax_exponentiate<N>(rows, s, p.exp_scale);
        };
        auto release_k = [&](int n) { /* and q behind the last product that reads it */
            release(p, sm.k_empty, ks);
            if (n == begin && t == 0) mbarrier_arrive(shared_address(&sm.q_empty));
        };
        auto wait_k = [&]() {
            wait_full(sm.k_full, ks);
            if (p.gather) fence_proxy_async_shared();
        };
        auto wait_v = [&]() {
            wait_full(sm.v_full, vs);
            if (p.gather) fence_proxy_async_shared();
        };

        auto store_last = [&]() {
            if (last.b >= 0) store_rows<FP16, DV>(p, last, last.row + own_row, rows, o);
            last = tile;
            if (top >= tile.seq.s_q) last.b = -1;
        };

        if (STORES_LATE && begin == end) {
            store_last();
            if (tile.b < 0) break;
        }
        if (begin == end) {
#pragma unroll
            for (int i = 0; i < DV / 2; i++)
                o[i] = 0.0f;
        }
        if (!STORES_LATE || begin == end) softmax_init(rows, p.score == ATTN_SCORE_BOUNDED);
        int n = tile.end - 1;
        for (; n >= end; n--)
            skip();
        mbarrier_wait_parity(shared_address(&sm.q_full), q_parity);
        q_parity ^= 1;
        if (n >= begin) {
            wait_k();
            wgmma_pin(s);
            wgmma_fence();
            issue_qk<FP16, DQK, M, N>(s, q, shared_address(sm.k[ks.stage]));
            if (STORES_LATE) {
                store_last();
                softmax_init(rows, p.score == ATTN_SCORE_BOUNDED);
            }
            wgmma_wait_group<0>();
            wgmma_pin(s);
            release_k(n);
            scores_to_probabilities(n);
            softmax_pack<FP16, N>(packed, s);
            int accumulate = 0; /* the first product overwrites what O holds of the last tile */
            for (n--; n >= begin; n--) {
                wait_k();
                wgmma_pin(s);
                wgmma_pin(o);
                wgmma_pin(packed);
                wgmma_fence();
                issue_qk<FP16, DQK, M, N>(s, q, shared_address(sm.k[ks.stage]));
                wait_v();
                issue_pv<FP16, DV, N>(o, packed, shared_address(sm.v[vs.stage]), accumulate);
                accumulate = 1;
                wgmma_wait_group<1>();
                wgmma_pin(s);
                release_k(n);
                scores_to_probabilities(n);
                wgmma_wait_group<0>();
                wgmma_pin(o);
                release(p, sm.v_empty, vs);
                softmax_pack<FP16, N>(packed, s);
                softmax_rescale<DV>(rows, o);
            }
            wait_v();
            wgmma_pin(o);
            wgmma_pin(packed);
            wgmma_fence();
            issue_pv<FP16, DV, N>(o, packed, shared_address(sm.v[vs.stage]), accumulate);
            wgmma_wait_group<0>();
            wgmma_pin(o);
            release(p, sm.v_empty, vs);
        } else if (t == 0) {
            mbarrier_arrive(shared_address(&sm.q_empty));
        }
        for (; n >= tile.begin; n--)
            skip();
        if (!STORES_LATE && top < tile.seq.s_q)
            store_rows<FP16, DV>(p, tile, tile.row + own_row, rows, o);
    }
}

/* ---- the kernel ------------------------------------------------------------------------------ */

template <int FP16, int DQK, int DV, int M, int N>
ATTN_DEVICE void mha_fwd_body(const attn_mha_fwd_params &p, const attn_mha_fwd_maps &maps)
{
    typedef mha_fwd_smem<DQK, DV, M, N> smem;
    constexpr int CONSUMERS = smem::CONSUMERS;
    static_assert(sizeof(smem) <= ATTN_MHA_FWD_SMEM(DQK, DV, M, N), "the host asks for less");
    extern __shared__ __align__(1024) uint8_t raw[];
    smem &sm = *(smem *)raw;

    int group = __shfl_sync(0xffffffff, (int)threadIdx.x / 128, 0);
    if (threadIdx.x == 0) {
        uint32_t loads = p.gather ? 32 : 1, readers = CONSUMERS * p.cluster;
        mbarrier_init(shared_address(&sm.q_full), 1);
        mbarrier_init(shared_address(&sm.q_empty), CONSUMERS);
        for (int i = 0; i < smem::STAGES; i++) {
            mbarrier_init(shared_address(&sm.k_full[i]), loads);
            mbarrier_init(shared_address(&sm.v_full[i]), loads);
            mbarrier_init(shared_address(&sm.k_empty[i]), readers);
            mbarrier_init(shared_address(&sm.v_empty[i]), readers);
        }
        for (int i = 0; i < 2; i++) {
            mbarrier_init(shared_address(&sm.tile_full[i]), 1);
            mbarrier_init(shared_address(&sm.tile_empty[i]), CONSUMERS * 4 + 2);
            mbarrier_init(shared_address(&sm.drawn_full[i]), 1);
            mbarrier_init(shared_address(&sm.drawn_empty[i]), 2);
        }
        fence_mbarrier_init();
        prefetch_tensormap(&maps.q);
        prefetch_tensormap(&maps.k);
        prefetch_tensormap(&maps.v);
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
        consume<FP16, DQK, DV, M, N>(p, sm, group);
    }
    __syncwarp();
    cluster_sync();
}

/* The build compiles this file once a line of mha_fwd.def, with the line's fields as macros. */
#define ATTN_KERNEL(op, arch, dtype, dqk, dv, rows, keys)                                          \
    extern "C" __global__ void __launch_bounds__((rows) * 2 + 128, 1)                              \
        attn_##op##_##arch##_##dtype##_d##dqk##x##dv##_m##rows##n##keys(                           \
            const __grid_constant__ attn_mha_fwd_params p,                                         \
            const __grid_constant__ attn_mha_fwd_maps maps)                                        \
    {                                                                                              \
        op##_body<DTYPE_##dtype, dqk, dv, rows, keys>(p, maps);                                    \
    }
#define ATTN_EXPAND(...) ATTN_KERNEL(__VA_ARGS__)
ATTN_EXPAND(mha_fwd, sm90, VARIANT_DTYPE, VARIANT_DQK, VARIANT_DV, VARIANT_ROWS, VARIANT_KEYS)
