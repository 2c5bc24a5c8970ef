/* SPDX-License-Identifier: MIT
 *
 * mla_decode_few on Hopper: mla_decode for few sequences, whose calls are over in microseconds.
 *
 * Math: that of mla_decode.cu.  A piece leaves rows that are not normalised, with their top m and
 * sum l, in units of the score, and those are merged as
 *
 *     M = max_n m_n      w_n = 2^((m_n - M) k)      out = sum_n w_n O_n / sum_n w_n l_n
 *     lse = M k ln 2 + ln sum_n w_n l_n             k = exp_scale
 *
 * Layout, tiles, roles and pipeline: those of mla_decode.cu, one KV head, keys in boxes only.  Lay
 * the sequences of one row tile out in a line, each as long as its key steps and what its start
 * costs; block c walks the c-th of p.parts equal shares of it:
 *
 *     | cost | steps of sequence 0       | cost | steps of sequence 1 |
 *     |    part 0     |     part 1     |     part 2     |    part 3   |
 *
 * Along the line part + sequence grows from piece to piece, so it numbers them: the slots of the
 * workspace.  Columns of a slot lie as the accumulators hold them, sixteen bytes a thread:
 *
 *     rows: [slot][64][m, l]      columns: [slot][warp of rows][strip of 8 columns][lane][4]
 *
 * A unit of merging is a strip of a warp's rows; some warps of a block share its pieces.  Merging
 * waits for all blocks of the launch, which is cooperative: that saves a second kernel's start.
 *
 * Cold code.  Instructions that run for the first time cost some 300 clocks every eight: more than
 * what they do in so short a call.  So code is short (loops, the copy engine for q, results as they
 * lie) and runs once for nothing while the keys are under way: S does a step on whatever is in
 * shared memory, L merges nothing and stores zeros, which it overwrites itself in the end.
 *
 *  S | step on anything    | q | S0 |P0| S1  ..            | wait | merge |
 *  L | pieces, loads | merge nothing   | O += P0 V0 ..     | wait | merge |
 *  R | q's load, loads                   | O += P0 V0 ..   | wait | merge |
 */
#include <cooperative_groups.h>

#include "decode_sched.cuh"
#include "mla_tiles.cuh"

enum { THREADS = ATTN_MLA_FEW_THREADS, WARPS = THREADS / 32, STRIPS = DV / 8, Q_TILES = 9 };
enum { SEQUENCES = ATTN_MLA_FEW_SEQUENCES, BATCH = 8 }; /* pieces merged at once */

/* Key steps [begin, end) of sequence b. */
struct few_piece {
    int b, s_k, begin, end, slot;
};

/* One warp's way through the key steps of sm.piece[]: always the same columns of every one. */
struct tile_loader {
    int piece, step; /* the next to load; piece == sm.pieces: none */
    int page;        /* that this lane's box lies in, read a step ahead */
};

/* Some pieces of two rows, r and r + 8 of a warp's, merged but not normalised; two columns. */
struct few_merged {
    float top[2], sum[2];
    float out[4];
};

struct few_smem {
    uint8_t q[5 * TILE]; /* columns 0 .. 255 and 512 .. 575 */
    uint8_t half[HALVES][HALF];
    uint8_t rope[ROPES][TILE];
    uint8_t probability[TILE];

    float shrink[M]; /* of O's rows, before P V */
    int visible[M];  /* keys of each row; a warp of S writes and reads its own 16 */
    int whole;       /* steps that all rows of a piece see whole */
    int pieces;
    few_piece piece[SEQUENCES];
    int share;                            /* of a block, of the line */
    int begin[SEQUENCES], end[SEQUENCES]; /* where a sequence's steps lie in it */

    /* half_full: four warps' tiles; rope_full: one
     * found: the pieces; q_full: tiles of q; q_moved: the first piece's q has left the ring
     * p_full: a warp of S each: P and shrink; p_free: L's and R's warps
     * s_issued: a warp of S each, once its part of a product is under way; R waits for it, but S
     *   itself for that of a piece's first step, since every phase has to be waited for */
    uint64_t half_full[HALVES], rope_full[ROPES];
    uint64_t found, q_full, q_moved, p_full, p_free, s_issued;
};
static_assert(sizeof(few_merged) * THREADS <= HALVES * HALF, "they lie where the keys were");

/* ---- pieces ---------------------------------------------------------------------------------- */

/* Keys that packed row `row` sees of s_k. */
ATTN_DEVICE int visible_to(const attn_decode_params &p, int row, int s_k)
{
    int query = divide_anew(p.by_group, min(row, p.call.s_q * p.call.group - 1));
    return within(query + s_k - p.call.s_q + p.call.window_right + 1, s_k);
}

/* Lays out the line of row tile `tile` and finds this block's pieces.  One warp calls it, a
 * sequence a lane. */
ATTN_DEVICE void find_pieces(const attn_decode_params &p, few_smem &sm, int tile, int part)
{
    int lane = (int)threadIdx.x % 32, steps = 0, s_k = 0;
    if (lane < p.call.b) {
        s_k = within(__ldg(p.call.seqused_k + lane), p.call.s_k);
        steps = (visible_to(p, tile * M + M - 1, s_k) + N - 1) / N;
    }
    int end = steps ? steps + p.item_cost : 0;
#pragma unroll
    for (int d = 1; d < SEQUENCES; d *= 2) {
        int below = __shfl_up_sync(0xffffffff, end, d);
        if (lane >= d) end += below;
    }
    int total = __shfl_sync(0xffffffff, end, SEQUENCES - 1), begin = end - steps;
    int share = max(divide_anew(p.by_parts, total + p.parts - 1), 1);
    int from = max(begin, share * part), to = min(end, share * (part + 1));
    uint32_t lanes = __ballot_sync(0xffffffff, from < to);
    if (from < to)
        sm.piece[__popc(lanes & ((1u << lane) - 1))] = {lane, s_k, from - begin, to - begin,
                                                        (part + lane) * p.tiles + tile};
    if (lane < SEQUENCES) {
        sm.begin[lane] = begin;
        sm.end[lane] = end;
    }
    if (lane == 0) {
        sm.pieces = __popc(lanes);
        sm.share = share;
    }
    mbarrier_arrive(shared_address(&sm.found));
}

/* ---- loads ----------------------------------------------------------------------------------- */

/* Tiles [tile, end) of q's rows from `first` on, to dst; zeros below the last row.  One thread
 * calls it. */
ATTN_DEVICE void load_q(const attn_mha_fwd_maps &maps, few_smem &sm, int b, int first, int tile,
                        int end, uint32_t dst)
{
    uint32_t bar = shared_address(&sm.q_full);
    mbarrier_arrive_expect_tx(bar, (end - tile) * TILE);
#pragma unroll 1
    for (; tile < end; tile++, dst += TILE)
        tma_load_4d(dst, &maps.q, bar, tile * 64, first, b, 0);
}

/* All of the first piece's q at once, the right half to the ring's last place, free as yet. */
ATTN_DEVICE void load_first_q(const attn_mha_fwd_maps &maps, few_smem &sm, int first)
{
    uint32_t bar = shared_address(&sm.q_full);
    mbarrier_arrive_expect_tx(bar, Q_TILES * TILE);
#pragma unroll 1
    for (int i = 0; i < Q_TILES; i++) {
        bool right = i >= 4 && i < 8;
        uint32_t to = shared_address(right ? sm.half[HALVES - 1] : sm.q);
        tma_load_4d(to + (i < 8 ? i % 4 : 4) * TILE, &maps.q, bar, i * 64, first, sm.piece[0].b, 0);
    }
}

/* Moves on where the step is before the piece's first, and looks its pages up. */
ATTN_DEVICE void loader_settle(const attn_decode_params &p, const few_smem &sm, tile_loader &l)
{
    if (l.step < sm.piece[l.piece].begin) {
        if (++l.piece == sm.pieces) return;
        l.step = sm.piece[l.piece].end - 1;
    }
    const few_piece &piece = sm.piece[l.piece];
    int row = (int)threadIdx.x % 32 * p.call.box_rows, key = l.step * N + row;
    if (row < N && key < piece.s_k)
        l.page = __ldg(p.call.page_table + piece.b * p.call.page_table_stride +
                       divide_anew(p.by_page, key));
}

/* Loads the tile of columns 64 * panel .. + 63 of the loader's step.  A whole warp calls it. */
ATTN_DEVICE void load_tile(const attn_decode_params &p, const attn_mha_fwd_maps &maps,
                           const few_smem &sm, const tile_loader &l, int panel, uint32_t dst,
                           uint32_t bar)
{
    int key = l.step * N, live = min(sm.piece[l.piece].s_k - key, (int)N);
    int rows = p.call.box_rows, row = (int)threadIdx.x % 32 * rows;
    open_tile<1, N, 1>(p.call, dst, bar, live);
    if (row < live) {
        int n = min(live - row, rows), position = key + row;
        position -= divide_anew(p.by_page, position) * p.call.page;
        tma_load_5d(dst + row * 128, &maps.k, bar, panel * 64, rows - n, position + n, 0,
                    within(l.page, p.call.num_pages - 1));
    }
    __syncwarp();
}

/* The half with columns 256 * side .. of the loader's next step to place `place`, by warp `warp` of
 * its warpgroup; with the right one the rope tile, to place `rope`. */
ATTN_DEVICE void load_half(const attn_decode_params &p, const attn_mha_fwd_maps &maps, few_smem &sm,
                           tile_loader &l, int side, int place, int rope, int warp)
{
    if (l.piece == sm.pieces) return;
    load_tile(p, maps, sm, l, side * 4 + warp, shared_address(sm.half[place]) + warp * TILE,
              shared_address(&sm.half_full[place]));
    if (side == 1 && warp == 0)
        load_tile(p, maps, sm, l, 8, shared_address(sm.rope[rope]),
                  shared_address(&sm.rope_full[rope]));
    l.step--;
    loader_settle(p, sm, l);
}

/* The first steps' halves: L loads the right ones, R the left ones and q.  Where q lies at first, R
 * loads when S has taken it. */
ATTN_DEVICE tile_loader load_first(const attn_decode_params &p, const attn_mha_fwd_maps &maps,
                                   few_smem &sm, int side, int first, int warp)
{
    if (sm.pieces == 0) return {0, 0, 0};
    if (side == 0 && warp == 3 && elect_one()) load_first_q(maps, sm, first);
    __syncwarp();
    tile_loader loader = {0, sm.piece[0].end - 1, 0};
    loader_settle(p, sm, loader);
#pragma unroll 1
    for (int i = side; i < HALVES; i += 2) {
        if (i == HALVES - 1) mbarrier_wait_parity(shared_address(&sm.q_moved), 0);
        load_half(p, maps, sm, loader, side, i, i / 2, warp);
    }
    return loader;
}

/* ---- scores ---------------------------------------------------------------------------------- */

/* Where the steps of a block have come to, over all its pieces. */
struct step_ring {
    int place;       /* of the step's left half; the right one is the next */
    uint32_t parity; /* of that place */
    uint32_t step;   /* counted; its low bit is the phase of what changes every step */

    __device__ __forceinline__ void next()
    {
        if (++place == HALVES) {
            place = 0;
            parity ^= 1;
        }
    }
    __device__ __forceinline__ uint32_t rope() const { return step % ROPES; }
    __device__ __forceinline__ uint32_t rope_parity() const { return step / ROPES % 2; }
};

/* A piece's q: columns 256 .. 511 through shared memory to registers, as A operands (wgmma.cuh),
 * the others to sm.q.  Only the first piece's come at once. */
ATTN_DEVICE void take_q(const attn_mha_fwd_maps &maps, few_smem &sm, int piece, int first,
                        uint32_t (&q)[64])
{
    int t = (int)threadIdx.x % 128, row = t / 32 * 16 + t % 16;
    bool again = piece > 0;
    uint32_t from = shared_address(again ? sm.q : sm.half[HALVES - 1]);
    named_barrier_sync<BARRIER_S, 128>(); /* the products with the last q are over */
    if (again && t == 0) load_q(maps, sm, sm.piece[piece].b, first, 4, Q_TILES, from);
    mbarrier_wait_parity(shared_address(&sm.q_full), again);
#pragma unroll
    for (int step = 0; step < 16; step++) {
        int chunk = step % 4 * 2 + t % 32 / 16;
        uint32_t x[4];
        ldmatrix_x4<0>(x, from + step / 4 * TILE + row * 128 + ((chunk ^ (row & 7)) << 4));
#pragma unroll
        for (int i = 0; i < 4; i++)
            q[4 * step + i] = x[i];
    }
    fence_proxy_async_shared();
    named_barrier_sync<BARRIER_S, 128>();
    if (again) {
        if (t == 0) load_q(maps, sm, sm.piece[piece].b, first, 0, 4, shared_address(sm.q));
        mbarrier_wait_parity(shared_address(&sm.q_full), 0);
    } else if (t == 0) {
        mbarrier_arrive(shared_address(&sm.q_moved));
    }
}

template <int FP16>
ATTN_DEVICE void score(const attn_decode_params &p, const attn_mha_fwd_maps &maps, few_smem &sm,
                       int first)
{
    const attn_mha_fwd_params &call = p.call;
    int t = (int)threadIdx.x % 128, lane = t % 32, warp = t / 32, own = warp * 16 + lane / 4;
    bool has_rows = first + warp * 16 < call.s_q * call.group;
    uint32_t q = shared_address(sm.q), probability = shared_address(sm.probability);
    float s[N / 2];
    uint32_t packed[N / 4], q_more[64];
    step_ring r = {0, 0, 0};
#pragma unroll
    for (int i = 0; i < 64; i++)
        q_more[i] = 0;

#pragma unroll 1
    for (int i = -1;; i++) { /* round -1 is for the code: it neither waits nor tells anyone */
        bool live = i >= 0;
        int n = 0, begin = 0;
        if (live) {
            if (i == 0) {
                r = {0, 0, 0};
                mbarrier_wait_parity(shared_address(&sm.found), 0);
            }
            if (i == sm.pieces) return;
            int s_k = sm.piece[i].s_k;
            if (lane < 16)
                sm.visible[warp * 16 + lane] = visible_to(p, first + warp * 16 + lane, s_k);
            if (t == 0) sm.whole = visible_to(p, first, s_k) / N;
            take_q(maps, sm, i, first, q_more);
            begin = sm.piece[i].begin;
            n = sm.piece[i].end - 1;
        }
        softmax_rows rows;
        softmax_init(rows);
        bool fresh = true;
#pragma unroll 1
        for (; n >= begin; n--) {
            step_ring left = r;
            r.next();
            step_ring right = r;
            r.next();
            wgmma_pin(s);
            wgmma_pin(q_more);
            if (live) mbarrier_wait_parity(shared_address(&sm.half_full[left.place]), left.parity);
            wgmma_fence();
            issue_scores<FP16, 4>(s, q, shared_address(sm.half[left.place]));
            if (live)
                mbarrier_wait_parity(shared_address(&sm.rope_full[r.rope()]), r.rope_parity());
            wgmma_fence();
            issue_scores<FP16, 1>(s, q + 4 * TILE, shared_address(sm.rope[r.rope()]));
            if (live)
                mbarrier_wait_parity(shared_address(&sm.half_full[right.place]), right.parity);
            wgmma_fence();
            issue_more_scores<FP16>(s, q_more, shared_address(sm.half[right.place]));
            wgmma_commit_group();
            if (live && lane == 0) mbarrier_arrive(shared_address(&sm.s_issued));
            wgmma_wait_group<0>();
            wgmma_pin(s);
            if (has_rows) {
                if (rarely(call.score != ATTN_SCORE_PLAIN)) transform_scores<N>(call, s);
                if (rarely(!live || n >= sm.whole))
                    mask_scores<N>(s, n * N + 2 * (lane % 4), {0, sm.visible[own]},
                                   {0, sm.visible[own + 8]});
                softmax_guessed<FP16>(rows, packed, s, call.exp_scale);
            } else {
#pragma unroll
                for (int e = 0; e < N / 4; e++)
                    packed[e] = 0;
            }

            if (live && fresh) /* not R, which may still be storing two steps on */
                mbarrier_wait_parity(shared_address(&sm.s_issued), r.step % 2);
            if (live) mbarrier_wait_parity(shared_address(&sm.p_free), r.step % 2 ^ 1);
            store_probability(probability, packed, warp, lane);
            if (lane % 4 == 0) { /* a piece's first step finds zeros: no need to shrink them */
                sm.shrink[own] = fresh ? 1.0f : rows.shrink[0];
                sm.shrink[own + 8] = fresh ? 1.0f : rows.shrink[1];
            }
            fresh = false;
            fence_proxy_async_shared();
            if (live) mbarrier_arrive(shared_address(&sm.p_full));
            r.step++;
        }
        float sum0 = quad_sum(rows.sum[0]), sum1 = quad_sum(rows.sum[1]);
        if (live && lane % 4 == 0) {
            float2 *to = (float2 *)p.partial_lse + sm.piece[i].slot * M + own;
            to[0] = make_float2(rows.max[0], sum0);
            to[8] = make_float2(rows.max[1], sum1);
        }
    }
}

/* ---- results --------------------------------------------------------------------------------- */

/* Warps that the rows from `first` on fill, and those that a slot has room for. */
ATTN_DEVICE int row_warps(const attn_decode_params &p, int first)
{
    return min((p.call.s_q * p.call.group - first + 15) / 16, M / 16);
}

ATTN_DEVICE int64_t slot_size(const attn_decode_params &p) /* in float4 */
{
    return p.slot_rows / 16 * STRIPS * 32;
}

/* The left (SIDE 0) or right 256 columns of O. */
template <int FP16, int SIDE>
ATTN_DEVICE void accumulate(const attn_decode_params &p, const attn_mha_fwd_maps &maps,
                            few_smem &sm, tile_loader &loader, int first, int warp)
{
    int t = (int)threadIdx.x % 128, lane = t % 32, own = warp * 16 + lane / 4;
    bool has_rows = warp < row_warps(p, first);
    float o[DV / 4];
    step_ring r = {0, 0, 0};

#pragma unroll 1
    for (int i = 0; i < sm.pieces; i++) {
        const few_piece &piece = sm.piece[i];
#pragma unroll
        for (int e = 0; e < DV / 4; e++)
            o[e] = 0.0f;
#pragma unroll 1
        for (int n = piece.end - 1; n >= piece.begin; n--) {
            mbarrier_wait_parity(shared_address(&sm.p_full), r.step % 2);
            softmax_rescale<DV / 2>({{}, {}, {sm.shrink[own], sm.shrink[own + 8]}}, o);
            if (SIDE == 1 && n > piece.begin) /* the scores of the next step come first */
                mbarrier_wait_parity(shared_address(&sm.s_issued), (r.step + 1) % 2);
            if (SIDE == 1) r.next();
            int place = r.place;
            mbarrier_wait_parity(shared_address(&sm.half_full[place]), r.parity);
            uint64_t a = wgmma_descriptor(shared_address(sm.probability), 16);
            uint64_t b = wgmma_descriptor(shared_address(sm.half[place]), TILE);
            add_values<FP16>(o, a, b);
            mbarrier_arrive(shared_address(&sm.p_free));
            named_barrier_sync<SIDE ? BARRIER_R : BARRIER_L, 128>();
            load_half(p, maps, sm, loader, 1 - SIDE, place, r.rope(), warp);
            r.next();
            if (SIDE == 0) r.next();
            r.step++;
        }
        if (has_rows) {
            float4 *to = (float4 *)p.partial_out + piece.slot * slot_size(p) +
                         (warp * STRIPS + SIDE * (STRIPS / 2)) * 32 + lane;
#pragma unroll
            for (int j = 0; j < STRIPS / 2; j++)
                to[j * 32] = make_float4(o[4 * j], o[4 * j + 1], o[4 * j + 2], o[4 * j + 3]);
        }
    }
}

/* ---- merging --------------------------------------------------------------------------------- */

/* Adds COUNT pieces: (m, l) of either row, and their columns.  A NaN stays; a row that saw no key
 * of a piece (l 0) takes nothing from it, whatever its columns hold. */
template <int COUNT>
ATTN_DEVICE void merge(few_merged &to, const float2 (&row0)[COUNT], const float2 (&row1)[COUNT],
                       const float4 (&x)[COUNT], float exp_scale)
{
    float top0 = to.top[0], top1 = to.top[1];
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        top0 = fmaxf(top0, row0[i].x);
        top1 = fmaxf(top1, row1[i].x);
    }
    float keep0 = ex2_approx((to.top[0] - top0) * exp_scale);
    float keep1 = ex2_approx((to.top[1] - top1) * exp_scale);
    to = {{top0, top1},
          {to.sum[0] * keep0, to.sum[1] * keep1},
          {to.out[0] * keep0, to.out[1] * keep0, to.out[2] * keep1, to.out[3] * keep1}};
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        float w0 = ex2_approx((row0[i].x - top0) * exp_scale);
        float w1 = ex2_approx((row1[i].x - top1) * exp_scale);
        if (row0[i].y != 0.0f) {
            to.sum[0] = fmaf(w0, row0[i].y, to.sum[0]);
            to.out[0] = fmaf(w0, x[i].x, to.out[0]);
            to.out[1] = fmaf(w0, x[i].y, to.out[1]);
        }
        if (row1[i].y != 0.0f) {
            to.sum[1] = fmaf(w1, row1[i].y, to.sum[1]);
            to.out[2] = fmaf(w1, x[i].z, to.out[2]);
            to.out[3] = fmaf(w1, x[i].w, to.out[3]);
        }
    }
}

/* Pieces turn, turn + turns, .. of `pieces`, whose slots are p.tiles apart; `rows` and `columns`
 * are this thread's of piece 0. */
ATTN_DEVICE few_merged merge_pieces(const attn_decode_params &p, const float2 *rows,
                                    const float4 *columns, int pieces, int turn, int turns)
{
    few_merged merged = {{-1e30f, -1e30f}, {0.0f, 0.0f}, {0.0f, 0.0f, 0.0f, 0.0f}};
    int64_t size = slot_size(p);
#pragma unroll 1
    do { /* at least once: the code */
        float2 row0[BATCH], row1[BATCH];
        float4 x[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
            int piece = turn + j * turns, slot = piece * p.tiles;
            row0[j] = row1[j] = make_float2(-1e30f, 0.0f);
            x[j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (piece < pieces) {
                row0[j] = __ldcg(rows + slot * M);
                row1[j] = __ldcg(rows + slot * M + 8);
                x[j] = __ldcg(columns + slot * size);
            }
        }
        merge(merged, row0, row1, x, p.call.exp_scale);
        turn += BATCH * turns;
    } while (turn < pieces);
    return merged;
}

/* Two columns, from `column` on, of packed rows `row` and row + 8 of sequence b; column 0: lse. */
template <int FP16>
ATTN_DEVICE void store_merged(const attn_decode_params &p, const few_merged &m, int b, int row,
                              int column)
{
    const attn_mha_fwd_params &call = p.call;
    const float ln2 = 0.6931471805599453f;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int token = divide_anew(p.by_group, row + 8 * h), head = row + 8 * h - token * call.group;
        if (token >= call.s_q) continue;
        float sum = m.sum[h], scale = sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
        uint16_t *to = (uint16_t *)call.out + b * call.out_stride_b + token * call.out_stride_s +
                       head * call.out_stride_h + column;
        *(uint32_t *)to = pack_16x2<FP16>(m.out[2 * h] * scale, m.out[2 * h + 1] * scale);
        if (column == 0)
            call.lse[b * call.lse_stride_b + head * call.lse_stride_h + token * p.lse_stride_s] =
                sum == 0.0f ? call.lse_empty
                            : (m.top[h] * call.exp_scale + lg2_approx(sum)) * ln2;
    }
}

/* Merges and stores the rows of tile `tile`, with the other blocks that have it: units
 * part * at_once + own, .. of them.  Not live: the first unit without pieces, by one warpgroup. */
template <int FP16>
ATTN_DEVICE void merge_tile(const attn_decode_params &p, few_smem &sm, int tile, int part, int warp,
                            bool live)
{
    int lane = (int)threadIdx.x % 32, turns = p.combine_groups; /* warps that share a unit */
    int at_once = WARPS / turns, own = warp / turns, turn = warp - own * turns;
    int first = tile * M, strips = row_warps(p, first) * STRIPS, units = p.call.b * strips;
    few_merged *shared = (few_merged *)sm.half;

#pragma unroll 1
    for (int from = part * at_once; from < units; from += p.parts * at_once) {
        int unit = min(from + own, units - 1), b = unit / strips, strip = unit - b * strips;
        int row = strip / STRIPS * 16 + lane / 4, part0 = sm.begin[b] / sm.share, pieces = 0;
        if (live && sm.begin[b] < sm.end[b]) pieces = (sm.end[b] - 1) / sm.share - part0 + 1;
        int slot = (part0 + b) * p.tiles + tile;
        const float2 *rows = (const float2 *)p.partial_lse + slot * M + row;
        const float4 *columns = (const float4 *)p.partial_out + slot * slot_size(p) + strip * 32;
        few_merged merged = merge_pieces(p, rows, columns + lane, pieces, turn, turns);
        if (live) {
            __syncthreads(); /* the last unit's have been read */
            shared[threadIdx.x] = merged;
            __syncthreads();
        }
        if (turn == 0 && from + own < units) {
#pragma unroll 1
            for (int i = 1; i < turns; i++) {
                few_merged other = shared[threadIdx.x + 32 * i];
                float2 row0[1] = {{other.top[0], other.sum[0]}};
                float2 row1[1] = {{other.top[1], other.sum[1]}};
                float4 x[1] = {{other.out[0], other.out[1], other.out[2], other.out[3]}};
                merge(merged, row0, row1, x, p.call.exp_scale);
            }
            store_merged<FP16>(p, merged, b, first + row, strip % STRIPS * 8 + lane % 4 * 2);
        }
        if (!live) return;
    }
}

/* ---- the kernel ------------------------------------------------------------------------------ */

template <int FP16>
ATTN_DEVICE void mla_decode_few_body(const attn_decode_params &p, const attn_mha_fwd_maps &maps)
{
    static_assert(sizeof(few_smem) <= ATTN_MLA_DECODE_SMEM, "the host asks for less");
    extern __shared__ __align__(1024) uint8_t raw[];
    few_smem &sm = *(few_smem *)raw;
    int block_warp = __shfl_sync(0xffffffff, (int)threadIdx.x / 32, 0);
    int group = block_warp / 4, warp = block_warp % 4;
    int tile = decode_tile(p), part = decode_part(p), first = tile * M;

    if (threadIdx.x == 0) {
        for (int i = 0; i < HALVES; i++)
            mbarrier_init(shared_address(&sm.half_full[i]), 4);
        for (int i = 0; i < ROPES; i++)
            mbarrier_init(shared_address(&sm.rope_full[i]), 1);
        mbarrier_init(shared_address(&sm.found), 32);
        mbarrier_init(shared_address(&sm.q_full), 1);
        mbarrier_init(shared_address(&sm.q_moved), 1);
        mbarrier_init(shared_address(&sm.p_full), 128);
        mbarrier_init(shared_address(&sm.p_free), 256);
        mbarrier_init(shared_address(&sm.s_issued), 4);
        fence_mbarrier_init();
    }
    if (threadIdx.x == 128) {
        prefetch_tensormap(&maps.k);
        prefetch_tensormap(&maps.q);
    }
    __syncthreads();
    tile_loader loader = {0, 0, 0};
    if (group > 0) {
        if (block_warp == 4) find_pieces(p, sm, tile, part);
        mbarrier_wait_parity(shared_address(&sm.found), 0);
        loader = load_first(p, maps, sm, 2 - group, first, warp);
    }
#pragma unroll 1
    for (int live = group != 1; live < 2; live++) { /* L's first round is for the code */
        if (live) {
            if (group == 0) score<FP16>(p, maps, sm, first);
            else if (group == 1) accumulate<FP16, 0>(p, maps, sm, loader, first, warp);
            else accumulate<FP16, 1>(p, maps, sm, loader, first, warp);
            cooperative_groups::this_grid().sync();
        }
        merge_tile<FP16>(p, sm, tile, part, block_warp, live);
    }
}

/* The build compiles this file once a line of mla_decode_few.def, its fields as macros. */
#define ATTN_KERNEL(op, arch, dtype, dqk, dv, rows, keys)                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                       \
        attn_##op##_##arch##_##dtype##_d##dqk##x##dv##_m##rows##n##keys(                           \
            const __grid_constant__ attn_decode_params p,                                          \
            const __grid_constant__ attn_mha_fwd_maps maps)                                        \
    {                                                                                              \
        static_assert(dqk == Q_TILES * 64 && dv == DV, "the tiles are fixed");                     \
        static_assert(rows == M && keys == N, "the tiles are fixed");                              \
        op##_body<DTYPE_##dtype>(p, maps);                                                         \
    }
#define ATTN_EXPAND(...) ATTN_KERNEL(__VA_ARGS__)
ATTN_EXPAND(mla_decode_few, sm90, VARIANT_DTYPE, VARIANT_DQK, VARIANT_DV, VARIANT_ROWS,
            VARIANT_KEYS)
