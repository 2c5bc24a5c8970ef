/* SPDX-License-Identifier: MIT
 *
 * mla_decode on Hopper: attention to a latent cache, whose rows are keys and, their first 512
 * columns, values; and mha_fwd with qv, or with d_v above 256, which is the same on two tensors.
 *
 * Math: that of mha_fwd.cu, with v_j = k_j[0 .. 511]; from two tensors with scores
 * q_i . k_j + qv_i . v_j, or the first term alone.  Pieces, splits and partial results: those of
 * mha_decode.cu.
 *
 * Layout.  q [b, s_q, h_q, 576], out [b, s_q, h_q, 512], cache [pages, page, h_k, 576].  A block
 * computes 64 packed rows and walks its keys 64 a step.  The 576 columns of a step's keys are nine
 * tiles of [64 keys][64 columns]: a left and a right half of four tiles each, which are K and V,
 * and the rope tile, which is K only.  A tile is read once: as the K-major operand of S = Q K^T and
 * as the MN-major one of O += P V.  SOURCE says where tiles come from:
 *
 *     LATENT  pages of 576 columns
 *     APART   halves: v [b, s_k, h_k, d_v <= 512] with qv for q; rope tile: k [.., d_qk <= 64]
 *             with q; both contiguous, packed or in pages.  Columns past the widths are zeros.
 *
 *     shared memory  | q: 5 tiles | ring of 5 halves: 20 tiles | ring of 2 rope tiles | P: 1 tile |
 *
 * The other four tiles of q, of the right half, are in S's registers: the shared memory they leave
 * holds half a step's keys more, and those arrive while the tensor cores are busy.
 *
 * Roles, a warpgroup each: S computes the scores and P; L and R keep the left and the right 256
 * columns of O.  Who is the last to read a half loads the half that comes next in its place, five
 * halves on: L the right half and the rope tile of the step after next, R the left half of the step
 * after that, a tile a warp.  So there are no "empty" barriers.
 *
 * Pipeline: L starts as soon as P is there, beside the next scores; R when those have been issued,
 * beside their softmax.  So the left tiles are free early, and the tensor cores are kept busy.
 *
 *  S | S0 |P0| S1          |P1| S2          |P2|
 *  L |       | O += P0 V0  |  | O += P1 V1  |
 *  R |          | O += P0 V0  |  | O += P1 V1  |
 *
 * The block's pieces are found in advance, some at a time, and lie in shared memory.
 */
#include "decode_rows.cuh"
#include "mla_tiles.cuh"

enum { THREADS = 384, D = 576, PIECES = 16 };

enum mla_source { LATENT, APART };

/* One warp's way through the key steps of sm.piece[]: always the same columns of every one. */
struct tile_loader {
    int piece, step; /* the next to load; piece == sm.pieces: none */
    int page;        /* that this lane's box lies in (or its batch), read a step ahead */
};

struct mla_smem {
    uint8_t q[5 * TILE]; /* columns 0 .. 255 and 512 .. 575 */
    uint8_t half[HALVES][HALF];
    uint8_t rope[ROPES][TILE];
    uint8_t probability[TILE];

    float shrink[M];    /* of O's rows, before P V */
    float normalise[M]; /* at a piece's end */
    key_interval whole;     /* steps that all rows of a piece see whole */
    key_interval bounds[M]; /* visible keys of each row; a warp of S writes and reads its own 16 */
    decode_piece piece[PIECES];
    int pieces;
    uint32_t searches; /* for pieces, so far */
    decode_start_smem start;

    /* half_full: four warps' tiles (gathered: 128 lanes); rope_full: one tile
     * p_full: S: P and shrink; p_free: L and R
     * s_issued: a warp of S each, once its part of a product is under way; R waits for it, but S
     *   itself for that of a piece's first step, since every phase has to be waited for
     * end_full: S: normalise; end_free: L and R
     * pieces_free: all threads; pieces_full: thread 0 */
    uint64_t half_full[HALVES], rope_full[ROPES];
    uint64_t p_full, p_free, s_issued, end_full, end_free, pieces_free, pieces_full;
};

/* ---- loads ----------------------------------------------------------------------------------- */

/* Moves on where the step is before the piece's first, and looks its pages up. */
template <int SOURCE>
ATTN_DEVICE void loader_settle(const attn_decode_params &p, const mla_smem &sm, tile_loader &l)
{
    const attn_mha_fwd_params &call = p.call;
    while (l.piece < sm.pieces && l.step < sm.piece[l.piece].begin) {
        l.piece++;
        if (l.piece < sm.pieces) l.step = sm.piece[l.piece].end - 1;
    }
    if (l.piece == sm.pieces || call.gather) return;
    const sequence &seq = sm.piece[l.piece].seq;
    if (SOURCE == APART && !call.page_table) {
        l.page = seq.k_row;
        return;
    }
    int row = (int)threadIdx.x % 32 * call.box_rows, key = l.step * N + row;
    if (row < N && key < seq.s_k)
        l.page = __ldg(call.page_table + seq.k_row * call.page_table_stride +
                       divide_anew(p.by_page, key));
}

/* What the tile of columns 64 * panel .. + 63 is a part of. */
struct tile_columns {
    const attn_tensor_map *map;
    key_rows rows; /* the tensor, for gathered loads */
    int first;     /* the tile's first column of it; all of the tile's may lie past its width */
};

template <int SOURCE>
ATTN_DEVICE tile_columns find_columns(const attn_mha_fwd_params &call,
                                      const attn_mha_fwd_maps &maps, int panel)
{
    const key_rows k = {(const uint16_t *)call.k, call.k_stride_b, call.k_stride_s, call.k_stride_h,
                        call.d_qk};
    const key_rows v = {(const uint16_t *)call.v, call.v_stride_b, call.v_stride_s, call.v_stride_h,
                        call.d_v};
    if (SOURCE == LATENT) return {&maps.k, k, panel * 64};
    return panel == 8 ? tile_columns{&maps.k, k, 0} : tile_columns{&maps.v, v, panel * 64};
}

/* Offset of the row at `position` of a sequence from its head. */
template <int SOURCE>
ATTN_DEVICE int64_t row_offset(const attn_mha_fwd_params &call, const key_rows &rows, int k_row,
                               int position)
{
    int source = k_row;
    if (SOURCE == LATENT || call.page_table) {
        int page = position / call.page;
        position -= page * call.page;
        source = within(__ldg(call.page_table + k_row * call.page_table_stride + page),
                        call.num_pages - 1);
    }
    return source * rows.stride_b + position * rows.stride_s;
}

/* Loads the tile of columns 64 * panel .. + 63 of the loader's step.  A whole warp calls it. */
template <int SOURCE>
ATTN_DEVICE void load_tile(const attn_decode_params &p, const attn_mha_fwd_maps &maps,
                           const mla_smem &sm, const tile_loader &l, int panel, uint32_t dst,
                           uint32_t bar)
{
    const attn_mha_fwd_params &call = p.call;
    const decode_piece &piece = sm.piece[l.piece];
    int lane = (int)threadIdx.x % 32, key = l.step * N, live = min(piece.seq.s_k - key, (int)N);
    tile_columns columns = find_columns<SOURCE>(call, maps, panel);
    if (SOURCE == APART && columns.first >= columns.rows.width) {
        for (int i = lane; i < TILE / 16; i += 32)
            shared_zero_16(dst + i * 16);
        fence_proxy_async_shared();
        if (call.gather || elect_one()) mbarrier_arrive(bar);
    } else if (!call.gather) {
        int rows = call.box_rows, row = lane * rows;
        open_tile<1, N, 1>(call, dst, bar, live);
        if (row < live) {
            int n = min(live - row, rows), position = key + row, source = l.page;
            if (SOURCE == APART) position += piece.seq.k_offset;
            if (SOURCE == LATENT || call.page_table) {
                position -= divide_anew(p.by_page, position) * call.page;
                source = within(source, call.num_pages - 1);
            }
            tma_load_5d(dst + row * 128, columns.map, bar, columns.first, rows - n, position + n,
                        piece.h_kv, source);
        }
    } else {
        int chunk = lane % 8, column = columns.first + chunk * 8;
        const uint16_t *head =
            columns.rows.data + piece.h_kv * columns.rows.stride_h + chunk * 8 + columns.first;
        if (SOURCE == APART) {
            key += piece.seq.k_offset;
            if (column >= columns.rows.width) live = 0;
        }
#pragma unroll 1
        for (int row = lane / 8; row < N; row += 4) { /* eight lanes share a row */
            const uint16_t *from = columns.rows.data;
            if (row < live)
                from = head + row_offset<SOURCE>(call, columns.rows, piece.seq.k_row, key + row);
            cp_async_16(dst + row * 128 + ((chunk ^ (row & 7)) << 4), from, row < live ? 16 : 0);
        }
        cp_async_mbarrier_arrive(bar);
    }
    __syncwarp();
}

/* The half with columns 256 * side .. of the loader's next step to place `place`, by warp `warp` of
 * its warpgroup; with the right one the rope tile, to place `rope`. */
template <int SOURCE>
ATTN_DEVICE void load_half(const attn_decode_params &p, const attn_mha_fwd_maps &maps, mla_smem &sm,
                           tile_loader &l, int side, int place, int rope, int warp)
{
    if (l.piece == sm.pieces) return;
    load_tile<SOURCE>(p, maps, sm, l, side * 4 + warp, shared_address(sm.half[place]) + warp * TILE,
                      shared_address(&sm.half_full[place]));
    if (side == 1 && warp == 0)
        load_tile<SOURCE>(p, maps, sm, l, 8, shared_address(sm.rope[rope]),
                          shared_address(&sm.rope_full[rope]));
    l.step--;
    loader_settle<SOURCE>(p, sm, l);
}

/* ---- scores ---------------------------------------------------------------------------------- */

/* Columns 256 .. 511 of a thread's two rows of q, as A operands (wgmma.cuh); zeros where a row is
 * past the last. */
template <int SOURCE>
ATTN_DEVICE void load_q_registers(const attn_decode_params &p, const query_rows &rows,
                                  const decode_piece &piece, int row, uint32_t (&q)[64])
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
        bool live = row + 8 * h < piece.rows;
        query_row r = find_row(p, piece, live ? row + 8 * h : 0);
        const uint32_t *from = (const uint32_t *)(rows.at(r) + 256) + threadIdx.x % 4;
#pragma unroll
        for (int step = 0; step < 16; step++) { /* widths are multiples of 8 */
            bool low = live && (SOURCE == LATENT || 256 + 16 * step < rows.width);
            bool high = live && (SOURCE == LATENT || 256 + 16 * step + 8 < rows.width);
            q[4 * step + h] = low ? __ldg(from + 8 * step) : 0;
            q[4 * step + 2 + h] = high ? __ldg(from + 8 * step + 4) : 0;
        }
    }
}

/* Where the steps of a block have come to, over all its pieces. */
struct step_ring {
    decode_ring<HALVES> half; /* of the step's left half; the right one is the next */
    uint32_t step;            /* counted; its low bit is the phase of what changes every step */
    uint32_t end;             /* pieces, counted likewise */

    __device__ __forceinline__ uint32_t rope() const { return step % ROPES; }
    __device__ __forceinline__ uint32_t rope_parity() const { return step / ROPES % 2; }
};

template <int FP16, int SOURCE>
ATTN_DEVICE void score(const attn_decode_params &p, mla_smem &sm, step_ring &r)
{
    const attn_mha_fwd_params &call = p.call;
    int t = (int)threadIdx.x % 128, lane = t % 32, warp = t / 32;
    int first = (int)blockIdx.x % p.tiles * M, own = warp * 16 + lane / 4;
    uint32_t q = shared_address(sm.q), probability = shared_address(sm.probability);
    bool latent_scores = SOURCE == LATENT || p.qv; /* else the rope tile's alone */
    float s[N / 2];
    uint32_t packed[N / 4], q_more[64];

    for (int i = 0; i < sm.pieces; i++) {
        const decode_piece &piece = sm.piece[i];
        named_barrier_sync<BARRIER_S, 128>(); /* the products with the last q are over */
        query_rows latent = SOURCE == LATENT ? q_rows(p) : qv_rows(p);
        load_query<4>(p, latent, piece, first, 0, q);
        load_query<1>(p, q_rows(p), piece, first, SOURCE == LATENT ? 512 : 0, q + 4 * TILE);
        wait_q();
        load_q_registers<SOURCE>(p, latent, piece, first + own, q_more);
        named_barrier_sync<BARRIER_S, 128>();

        int last = min(first + (int)M, piece.rows) - 1;
        auto sees = [&](int r) {
            return visible_keys(call, min(r, last) / call.group, piece.seq.s_q, piece.seq.s_k,
                                piece.cp_tot);
        };
        if (lane < 16) sm.bounds[warp * 16 + lane] = sees(first + warp * 16 + lane);
        __syncwarp();
        if (t == 0) sm.whole = {(sees(last).lo + N - 1) / N, sees(first).hi / N};
        named_barrier_sync<BARRIER_S, 128>();
        softmax_rows rows;
        softmax_init(rows);

        for (int n = piece.end - 1; n >= piece.begin; n--) {
            decode_ring<HALVES> left = r.half;
            r.half.next();
            decode_ring<HALVES> right = r.half;
            r.half.next();
            wgmma_pin(s);
            wgmma_pin(q_more);
            mbarrier_wait_parity(shared_address(&sm.half_full[left.stage]), left.parity);
            if (call.gather) fence_proxy_async_shared();
            wgmma_fence();
            if (latent_scores) issue_scores<FP16, 4>(s, q, shared_address(sm.half[left.stage]));
            mbarrier_wait_parity(shared_address(&sm.rope_full[r.rope()]), r.rope_parity());
            if (call.gather) fence_proxy_async_shared();
            wgmma_fence();
            issue_scores<FP16, 1>(s, q + 4 * TILE, shared_address(sm.rope[r.rope()]),
                                  latent_scores);
            mbarrier_wait_parity(shared_address(&sm.half_full[right.stage]), right.parity);
            if (call.gather) fence_proxy_async_shared();
            wgmma_fence();
            if (latent_scores)
                issue_more_scores<FP16>(s, q_more, shared_address(sm.half[right.stage]));
            wgmma_commit_group();
            if (lane == 0) mbarrier_arrive(shared_address(&sm.s_issued));
            wgmma_wait_group<0>();
            wgmma_pin(s);
            if (first + warp * 16 < piece.rows) {
                if (call.score != ATTN_SCORE_PLAIN) transform_scores<N>(call, s);
                if (n >= sm.whole.hi || n < sm.whole.lo)
                    mask_scores<N>(s, n * N + 2 * (lane % 4), sm.bounds[own],
                                   sm.bounds[own + 8]);
                softmax_guessed<FP16>(rows, packed, s, call.exp_scale);
            } else {
#pragma unroll
                for (int e = 0; e < N / 4; e++)
                    packed[e] = 0;
            }

            if (n + 1 == piece.end) /* not R, which may still be storing two steps on */
                mbarrier_wait_parity(shared_address(&sm.s_issued), r.step % 2);
            mbarrier_wait_parity(shared_address(&sm.p_free), r.step % 2 ^ 1);
            store_probability(probability, packed, warp, lane);
            if (lane % 4 == 0) {
                sm.shrink[own] = rows.shrink[0];
                sm.shrink[own + 8] = rows.shrink[1];
            }
            fence_proxy_async_shared();
            mbarrier_arrive(shared_address(&sm.p_full));
            r.step++;
        }

        float normalise[2], lse[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            bool sink = call.sink != ATTN_SINK_NONE && piece.first;
            auto head = [&] {
                return find_row(p, piece, min(first + own + 8 * h, piece.rows - 1)).h_q;
            };
            softmax_finish(rows.max[h], quad_sum(rows.sum[h]), call.exp_scale, sink,
                           sink ? load_sink(call, head()) : 0.0f,
                           piece.slot < 0 ? call.lse_empty : -INFINITY, &normalise[h], &lse[h]);
        }
        store_lse(p, piece, first + own, lse);
        mbarrier_wait_parity(shared_address(&sm.end_free), r.end % 2 ^ 1);
        if (lane % 4 == 0) {
            sm.normalise[own] = normalise[0];
            sm.normalise[own + 8] = normalise[1];
        }
        mbarrier_arrive(shared_address(&sm.end_full));
        r.end++;
    }
}

/* ---- results --------------------------------------------------------------------------------- */

/* The left (SIDE 0) or right 256 columns of O. */
template <int FP16, int SOURCE, int SIDE>
ATTN_DEVICE void accumulate(const attn_decode_params &p, const attn_mha_fwd_maps &maps,
                            mla_smem &sm, step_ring &r)
{
    int t = (int)threadIdx.x % 128, lane = t % 32;
    int warp = __shfl_sync(0xffffffff, t / 32, 0);
    int first = (int)blockIdx.x % p.tiles * M, own = warp * 16 + lane / 4;
    float o[DV / 4];

    tile_loader loader = {0, sm.piece[0].end - 1, 0}; /* of the other side: HALVES is odd */
    loader_settle<SOURCE>(p, sm, loader);
    for (int i = 1 - SIDE; i < HALVES; i += 2)
        load_half<SOURCE>(p, maps, sm, loader, 1 - SIDE, (r.half.stage + i) % HALVES,
                          (r.step + i / 2) % ROPES, warp);

    for (int i = 0; i < sm.pieces; i++) {
        const decode_piece &piece = sm.piece[i];
#pragma unroll
        for (int e = 0; e < DV / 4; e++)
            o[e] = 0.0f;
        if (SIDE == 1 && piece.end > piece.begin) /* as below: so ptxas finds registers for all */
            mbarrier_wait_parity(shared_address(&sm.p_full), r.step % 2);
        for (int n = piece.end - 1; n >= piece.begin; n--) {
            mbarrier_wait_parity(shared_address(&sm.p_full), r.step % 2);
            softmax_rescale<DV / 2>({{}, {}, {sm.shrink[own], sm.shrink[own + 8]}}, o);
            if (SIDE == 1 && n > piece.begin) /* the scores of the next step come first */
                mbarrier_wait_parity(shared_address(&sm.s_issued), (r.step + 1) % 2);
            if (SIDE == 1) r.half.next();
            uint32_t half = r.half.stage;
            mbarrier_wait_parity(shared_address(&sm.half_full[half]), r.half.parity);
            if (p.call.gather) fence_proxy_async_shared();
            uint64_t a = wgmma_descriptor(shared_address(sm.probability), 16);
            uint64_t b = wgmma_descriptor(shared_address(sm.half[half]), TILE);
            add_values<FP16>(o, a, b);
            mbarrier_arrive(shared_address(&sm.p_free));
            named_barrier_sync<SIDE ? BARRIER_R : BARRIER_L, 128>();
            load_half<SOURCE>(p, maps, sm, loader, 1 - SIDE, half, r.rope(), warp);
            r.half.next();
            if (SIDE == 0) r.half.next();
            r.step++;
        }
        mbarrier_wait_parity(shared_address(&sm.end_full), r.end % 2);
        float normalise[2] = {sm.normalise[own], sm.normalise[own + 8]};
        mbarrier_arrive(shared_address(&sm.end_free));
        r.end++;
        store_out<FP16, DV / 2>(p, piece, first + own, SIDE * (DV / 2), normalise, o);
    }
}

/* ---- the kernel ------------------------------------------------------------------------------ */

/* The block's next pieces into sm.piece[]; false: there are none.  All threads call it, each role
 * in a loop of its own; thread 0, of those that SEARCH, finds them. */
template <bool SEARCH>
ATTN_DEVICE bool find_pieces(const attn_decode_params &p, mla_smem &sm)
{
    uint32_t parity = sm.searches % 2;
    mbarrier_arrive(shared_address(&sm.pieces_free));
    if (SEARCH && threadIdx.x == 0) {
        mbarrier_wait_parity(shared_address(&sm.pieces_free), parity);
        int n = 0;
        while (n < PIECES && decode_next(p, sm.start.walk, sm.piece[n]))
            n++;
        sm.pieces = n;
        sm.searches++;
        mbarrier_arrive(shared_address(&sm.pieces_full));
    }
    mbarrier_wait_parity(shared_address(&sm.pieces_full), parity);
    return sm.pieces > 0;
}

template <int FP16, int SOURCE>
ATTN_DEVICE void mla_decode_body(const attn_decode_params &p, const attn_mha_fwd_maps &maps)
{
    static_assert(sizeof(mla_smem) <= ATTN_MLA_DECODE_SMEM, "the host asks for less");
    extern __shared__ __align__(1024) uint8_t raw[];
    mla_smem &sm = *(mla_smem *)raw;

    if (threadIdx.x == 0) {
        int lanes = p.call.gather ? 32 : 1;
        for (int i = 0; i < HALVES; i++)
            mbarrier_init(shared_address(&sm.half_full[i]), 4 * lanes);
        for (int i = 0; i < ROPES; i++)
            mbarrier_init(shared_address(&sm.rope_full[i]), lanes);
        mbarrier_init(shared_address(&sm.p_full), 128);
        mbarrier_init(shared_address(&sm.p_free), 256);
        mbarrier_init(shared_address(&sm.s_issued), 4);
        mbarrier_init(shared_address(&sm.end_full), 128);
        mbarrier_init(shared_address(&sm.end_free), 256);
        mbarrier_init(shared_address(&sm.pieces_free), THREADS);
        mbarrier_init(shared_address(&sm.pieces_full), 1);
        sm.searches = 0;
        fence_mbarrier_init();
        prefetch_tensormap(&maps.k);
        if (SOURCE == APART) prefetch_tensormap(&maps.v);
    }
    wait_for_previous_kernel(); /* kv_append, when p.after_append */
    launch_dependents(); /* not before: decode_combine reads the lengths at once */
    decode_start(p, sm.start);
    int group = __shfl_sync(0xffffffff, (int)threadIdx.x / 128, 0);
    step_ring r = {{0, 0}, 0, 0};
    if (group == 0) {
        while (find_pieces<true>(p, sm))
            score<FP16, SOURCE>(p, sm, r);
    } else if (group == 1) {
        while (find_pieces<false>(p, sm))
            accumulate<FP16, SOURCE, 0>(p, maps, sm, r);
    } else {
        while (find_pieces<false>(p, sm))
            accumulate<FP16, SOURCE, 1>(p, maps, sm, r);
    }
}

/* The build compiles this file once a line of mla_decode.def, with the line's fields as macros. */
#define ATTN_KERNEL(op, arch, dtype, dqk, dv, rows, keys)                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                       \
        attn_##op##_##arch##_##dtype##_d##dqk##x##dv##_m##rows##n##keys(                           \
            const __grid_constant__ attn_decode_params p,                                          \
            const __grid_constant__ attn_mha_fwd_maps maps)                                        \
    {                                                                                              \
        static_assert((dqk == D || dqk == D - DV) && dv == DV, "the tiles are fixed");             \
        static_assert(rows == M && keys == N, "the tiles are fixed");                              \
        op##_body<DTYPE_##dtype, dqk == D ? LATENT : APART>(p, maps);                              \
    }
#define ATTN_EXPAND(...) ATTN_KERNEL(__VA_ARGS__)
ATTN_EXPAND(mla_decode, sm90, VARIANT_DTYPE, VARIANT_DQK, VARIANT_DV, VARIANT_ROWS, VARIANT_KEYS)
