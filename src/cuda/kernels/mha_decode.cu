/* SPDX-License-Identifier: MIT
 *
 * mha_decode on Hopper: attention of few queries to long caches.
 *
 * Math: that of mha_fwd.cu.  A block that sees only some of an item's keys writes a partial result,
 * its rows normalised over those keys and their lse, which decode_combine merges.
 *
 * Layout.  q, out [b, s_q, h_q, d] or [t_q, h_q, d]; k, v [b, s_k, h_k, d], [t_k, h_k, d] or pages.
 * The query heads of a KV head are packed: row r of an item is query r / group of its head
 * r % group; a block computes 64 rows and walks the keys that decode_sched.cuh gives it, 64 a step,
 * last keys first.  Shared memory holds q and as many stages of k and v as fit (3 to 8): what
 * counts here is bytes under way.  S, P and O are in registers as in mha_fwd.
 *
 * Pipeline: a consumer warpgroup runs S of a step beside the softmax of the step before; warps
 * without a live row only take part in the products.  In a cluster (decode_cluster.cuh) two
 * consumers take the steps in turns; elsewhere there is one.  Two warps load k and two load v, each
 * half of a tile, as far ahead as there are stages, also into the next item.  At d 64 and 16 rows
 * or fewer decode_few.cuh consumes.
 *
 * A short call is bound by its way to the first box: instructions come cold, eight in some 100
 * clocks, so the roles share the code of the first piece, k and v that of their loader.
 *
 *  loaders  | K0 V0 K1 V1 K2 V2 ..        (all stages)
 *  wgmma    | S0        | S1        O += P0 V0   | S2        O += P1 V1   | O += Pn Vn
 *  consumer | q      P0 |        P1   rescale O  |        P2   rescale O  | rows or partial rows
 */
#include "decode_few.cuh"

enum { N = ATTN_DECODE_KEYS, M = ATTN_DECODE_ROWS, CONSUMER_BARRIER = 1 };

template <int DQK, int DV> struct decode_smem {
    static constexpr int QK_PANELS = ATTN_MHA_FWD_PANELS(DQK), V_PANELS = ATTN_MHA_FWD_PANELS(DV);
    static constexpr int STAGES = ATTN_MHA_DECODE_STAGES(DQK, DV);
    static constexpr int GROUPS = ATTN_MHA_DECODE_CONSUMERS(DV);
    static constexpr int CONSUMER_REGISTERS = 184, LOADER_REGISTERS = 64;

    /* Panels of 64 columns, swizzled: [panel][row][128 bytes]. */
    uint8_t q[QK_PANELS * M * 128];
    uint8_t k[STAGES][QK_PANELS * N * 128];
    uint8_t v[STAGES][V_PANELS * N * 128];

    /* full: one a loading warp, and the bytes (gathered: one a lane); empty: one a consumer warp,
     * or one each of its lanes where they read with ldmatrix (decode_few.cuh) */
    uint64_t k_full[STAGES], v_full[STAGES], k_empty[STAGES], v_empty[STAGES];
    decode_start_smem start;
    decode_walk walk;       /* the consumers' */
    decode_piece piece;
    key_interval bounds[M]; /* visible keys of each row; a warp writes and reads its own 16 */
    float2 few[4][FEW_ROWS]; /* maximum and sum of each warp's keys */
};

/* ---- loaders --------------------------------------------------------------------------------- */

/* What a loader of k and one of v do not share; the code they share is fetched once. */
template <int DQK, int DV> struct key_side {
    static constexpr int QK_PANELS = ATTN_MHA_FWD_PANELS(DQK), V_PANELS = ATTN_MHA_FWD_PANELS(DV);
    static constexpr int MOST = QK_PANELS > V_PANELS ? QK_PANELS : V_PANELS;

    bool is_v;
    const attn_tensor_map *map;
    uint32_t tiles, full, empty; /* shared memory */
    key_rows rows;

    __device__ __forceinline__ int panels() const
    {
        return QK_PANELS == V_PANELS ? QK_PANELS : is_v ? V_PANELS : QK_PANELS;
    }
};

template <int DQK, int DV>
ATTN_DEVICE key_side<DQK, DV> choose_side(const attn_mha_fwd_params &call,
                                          const attn_mha_fwd_maps &maps, decode_smem<DQK, DV> &sm,
                                          bool is_v)
{
    if (is_v)
        return {true, &maps.v, shared_address(sm.v[0]), shared_address(sm.v_full),
                shared_address(sm.v_empty),
                {(const uint16_t *)call.v, call.v_stride_b, call.v_stride_s, call.v_stride_h,
                 call.d_v}};
    return {false, &maps.k, shared_address(sm.k[0]), shared_address(sm.k_full),
            shared_address(sm.k_empty),
            {(const uint16_t *)call.k, call.k_stride_b, call.k_stride_s, call.k_stride_h,
             call.d_qk}};
}

/* The pages that 32 boxes or rows ahead lie in, one a lane, so that a step does not wait for the
 * page table. */
struct page_window {
    int entry; /* this lane's */
    int step;  /* the first step that lane 0 stands for; steps fall */
    int steps; /* that the window holds */
};

/* Boxes of one k or v tile, the two warps of a loader in turn. */
template <int DQK, int DV>
ATTN_DEVICE void load_boxes(const attn_decode_params &p, const key_side<DQK, DV> &side,
                            uint32_t dst, uint32_t bar, const decode_piece &piece, int n,
                            page_window &pages, int warp)
{
    const attn_mha_fwd_params &call = p.call;
    int lane = (int)threadIdx.x % 32, key = n * N, live = min(piece.seq.s_k - key, (int)N);
    int panels = side.panels(), rows = call.box_rows, boxes = N >> (__ffs(rows) - 1);
    int i = lane * 2 + warp, box = i / panels, panel = i - box * panels, row = box * rows;
    int position = piece.seq.k_offset + key + row, source = piece.seq.k_row;
    if (call.page_table) {
        if (pages.step - n >= pages.steps) {
            const int32_t *table = call.page_table + piece.seq.k_row * call.page_table_stride;
            int ahead = lane * rows / N; /* of 32 boxes, in steps */
            int at = (n - ahead) * N + lane * rows - ahead * N;
            bool there = at >= piece.begin * N && at < piece.seq.s_k;
            pages.entry =
                there ? within(__ldg(table + divide_anew(p.by_page, at)), call.num_pages - 1) : 0;
            pages.step = n;
        }
        source = __shfl_sync(0xffffffff, pages.entry, (pages.step - n) * boxes + box);
        position -= divide_anew(p.by_page, position) * call.page;
    }
    if (warp == 1) { /* arrives too, or it could fall behind the ring */
        if (lane == 0) mbarrier_arrive(bar);
    } else if (side.is_v) {
        open_tile<key_side<DQK, DV>::V_PANELS, N, 1>(call, dst, bar, live);
    } else {
        open_tile<key_side<DQK, DV>::QK_PANELS, N, 0>(call, dst, bar, live);
    }
    if (row < live) {
        int there = min(live - row, rows);
        /* A panel right of v's head: see load_box in attend.cuh. */
        int column = panel * 64 < side.rows.width ? panel * 64 : 0;
        tma_load_5d(dst + panel * N * 128 + row * 128, side.map, bar, column, rows - there,
                    position + there, piece.h_kv, source);
    }
    __syncwarp();
}

/* Offset of the row of key n * N + row of a piece from its head; -1: past the sequence's end. */
ATTN_DEVICE int64_t gathered_row(const attn_decode_params &p, const key_rows &rows,
                                 const decode_piece &piece, int n, int row)
{
    const attn_mha_fwd_params &call = p.call;
    int key = n * N + row, position = piece.seq.k_offset + key, source = piece.seq.k_row;
    if (n < piece.begin || key >= piece.seq.s_k) return -1;
    if (call.page_table) {
        int page = divide_anew(p.by_page, position);
        position -= page * call.page;
        source = within(__ldg(call.page_table + source * call.page_table_stride + page),
                        call.num_pages - 1);
    }
    return source * rows.stride_b + position * rows.stride_s;
}

/* Half of a tile by copies of 16 bytes: any page size, any strides.  Lane l knows row 32 warp + l;
 * eight lanes share a row.  Each lane arrives. */
template <int DQK, int DV>
ATTN_DEVICE void load_rows(const key_side<DQK, DV> &side, uint32_t dst, uint32_t bar, int h_kv,
                           int warp, int64_t offset)
{
    int lane = (int)threadIdx.x % 32, chunk = lane % 8;
    const uint16_t *head = side.rows.data + h_kv * side.rows.stride_h;
#pragma unroll 4
    for (int four = 0; four < 32; four += 4) {
        int from = four + lane / 8, row = 32 * warp + from;
        int64_t at = __shfl_sync(0xffffffff, offset, from);
        uint32_t to = dst + row * 128 + ((chunk ^ (row & 7)) << 4);
#pragma unroll
        for (int panel = 0; panel < side.MOST; panel++) {
            int column = panel * 64 + chunk * 8;
            bool inside = at >= 0 && column < side.rows.width;
            if (panel < side.panels())
                cp_async_16(to + panel * N * 128, inside ? head + at + column : head,
                            inside ? 16 : 0);
        }
    }
    cp_async_mbarrier_arrive(bar);
}

/* The same for whole rows that are near: every instruction counts. */
template <int DQK, int DV>
ATTN_DEVICE void load_whole_rows(const key_side<DQK, DV> &side, uint32_t dst, uint32_t bar,
                                 int h_kv, int warp, int64_t offset)
{
    int own = (int)threadIdx.x % 32 / 8, chunk = (int)threadIdx.x % 8;
    const uint16_t *column = side.rows.data + h_kv * side.rows.stride_h + chunk * 8;
    uint32_t to = dst + (32 * warp + own) * 128 + ((chunk ^ own) << 4);
    uint32_t near = (uint32_t)(offset >> 3);
#pragma unroll
    for (int i = 0; i < 8; i++, to += 512) {
        const uint16_t *from = column + (uint64_t)__shfl_sync(0xffffffff, near, own + 4 * i) * 8;
#pragma unroll
        for (int panel = 0; panel < side.MOST; panel++) /* ^ 64: odd half of a swizzle */
            if (panel < side.panels())
                cp_async_16((i % 2 ? to ^ 64 : to) + panel * N * 128, from + panel * 64);
    }
    cp_async_mbarrier_arrive(bar);
}

/* All k or v tiles of this block, by warp `warp` of the side's two. */
template <int DQK, int DV>
ATTN_DEVICE void load(const attn_decode_params &p, const key_side<DQK, DV> &side, decode_walk &walk,
                      decode_piece &piece, int warp)
{
    const attn_mha_fwd_params &call = p.call;
    int row = 32 * warp + (int)threadIdx.x % 32;
    decode_ring<decode_smem<DQK, DV>::STAGES> r = {0, 1};
    do {
        page_window pages = {0, piece.end + 32, call.gather ? 0 : 32 * call.box_rows / N};
        int64_t offset = 0;
        if (call.gather) offset = gathered_row(p, side.rows, piece, piece.end - 1, row);
        for (int n = piece.end - 1; n >= piece.begin; n--) {
            uint32_t dst = side.tiles + r.stage * (side.panels() * N * 128);
            uint32_t bar = side.full + 8 * r.stage;
            mbarrier_wait_parity(side.empty + 8 * r.stage, r.parity);
            if (call.gather) {
                int64_t next = gathered_row(p, side.rows, piece, n - 1, row);
                if (call.gather == ATTN_GATHER_NEAR && side.rows.width == 64 * side.panels() &&
                    (n + 1) * N <= piece.seq.s_k)
                    load_whole_rows(side, dst, bar, piece.h_kv, warp, offset);
                else
                    load_rows(side, dst, bar, piece.h_kv, warp, offset);
                offset = next;
            } else {
                load_boxes(p, side, dst, bar, piece, n, pages, warp);
            }
            r.next();
        }
    } while (decode_next(p, walk, piece));
}

/* ---- the consumer warpgroups ----------------------------------------------------------------- */

template <int FP16, int DQK, int DV>
ATTN_DEVICE void consume(const attn_decode_params &p, decode_smem<DQK, DV> &sm, int group,
                         int groups, decode_walk walk, decode_piece next)
{
    typedef decode_smem<DQK, DV> smem;
    constexpr int STAGES = smem::STAGES;
    const attn_mha_fwd_params &call = p.call;
    int t = (int)threadIdx.x % 128, lane = t % 32, first = decode_tile(p) * M;
    int warp_row = first + t / 32 * 16, row = warp_row + lane / 4;
    uint32_t q = shared_address(sm.q), walked = 0; /* steps of this block, so far */
    float o[DV / 2], s[N / 2];
    uint32_t packed[N / 4];
    softmax_rows rows;
    const decode_piece &piece = sm.piece; /* and the walk in shared memory: registers are few */

    do {
        load_query<smem::QK_PANELS>(p, q_rows(p), next, first, 0, q, 128 * groups);
        int last = min(first + (int)M, next.rows) - 1; /* and what this thread's rows see */
        bool live = warp_row <= last;
        if (group == 0 && lane < 16)
            sm.bounds[warp_row - first + lane] =
                visible_keys(call, divide_anew(p.by_group, min(warp_row + lane, last)),
                             next.seq.s_q, next.seq.s_k, next.cp_tot);
        if (threadIdx.x == 0) sm.piece = next;
        wait_q();
        named_barrier_sync<CONSUMER_BARRIER>(128 * groups);
        if (threadIdx.x == 0) sm.walk = walk;

        int whole_begin = (sm.bounds[M - 1].lo + N - 1) / N, whole_end = sm.bounds[0].hi / N;

        auto wait = [&](const uint64_t *full, uint32_t step) {
            mbarrier_wait_parity(shared_address(&full[step % STAGES]), step / STAGES % 2);
            if (call.gather) fence_proxy_async_shared();
        };
        auto release = [&](const uint64_t *empty, uint32_t step) {
            if (lane == 0) mbarrier_arrive(shared_address(&empty[step % STAGES]));
        };
        auto scores_to_probabilities = [&](int n) {
            if (!live) {
#pragma unroll
                for (int i = 0; i < N / 2; i++)
                    s[i] = 0.0f;
                return;
            }
            if (rarely(call.score != ATTN_SCORE_PLAIN)) transform_scores<N>(call, s);
            if (n >= whole_end || n < whole_begin)
                mask_scores<N>(s, n * N + 2 * (lane % 4), sm.bounds[row - first],
                               sm.bounds[row - first + 8]);
            softmax_update_max<N>(rows, s, call.exp_scale);
            softmax_exponentiate<N>(rows, s, call.exp_scale);
        };

        softmax_init(rows);
#pragma unroll
        for (int i = 0; i < DV / 2; i++)
            o[i] = 0.0f;
        int begin = piece.begin, top = piece.end - 1 - group; /* this group's first step */
        uint32_t step = walked + group;
        walked += piece.end - begin;
        for (int n = top; n >= begin; n -= groups, step += groups) {
            wait(sm.k_full, step);
            wgmma_pin(s);
            wgmma_pin(o);
            wgmma_pin(packed);
            wgmma_fence();
            issue_qk<FP16, DQK, M, N>(s, q, shared_address(sm.k[step % STAGES]));
            if (n < top) {
                wait(sm.v_full, step - groups);
                issue_pv<FP16, DV, N>(o, packed, shared_address(sm.v[(step - groups) % STAGES]), 1);
            } else {
                wgmma_commit_group();
            }
            wgmma_wait_group<1>();
            wgmma_pin(s);
            release(sm.k_empty, step);
            scores_to_probabilities(n);
            wgmma_wait_group<0>();
            wgmma_pin(o);
            if (n < top) release(sm.v_empty, step - groups);
            softmax_pack<FP16, N>(packed, s);
            softmax_rescale<DV>(rows, o);
        }
        if (begin <= top) {
            wait(sm.v_full, step - groups);
            wgmma_pin(o);
            wgmma_pin(packed);
            wgmma_fence();
            issue_pv<FP16, DV, N>(o, packed, shared_address(sm.v[(step - groups) % STAGES]), 1);
            wgmma_wait_group<0>();
            wgmma_pin(o);
            release(sm.v_empty, step - groups);
        }
        if (p.cluster > 1) { /* one piece a block */
            named_barrier_sync<CONSUMER_BARRIER>(128 * groups); /* all products are over */
            float *near = (float *)sm.k + group * near_rows<DV>::FLOATS;
            return store_near<DV>(near, row, piece.rows, rows, o);
        }

        float normalise[2], lse[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            bool sink = call.sink != ATTN_SINK_NONE && piece.first;
            int r = min(row + 8 * h, last);
            softmax_finish(rows.max[h], quad_sum(rows.sum[h]), call.exp_scale, sink,
                           sink ? load_sink(call, find_row(p, piece, r).h_q) : 0.0f,
                           piece.slot < 0 ? call.lse_empty : -INFINITY, &normalise[h], &lse[h]);
        }
        store_lse(p, piece, row, lse);
        store_out<FP16, DV>(p, piece, row, 0, normalise, o);
        named_barrier_sync<CONSUMER_BARRIER>(128 * groups); /* all products with q are over */
        walk = sm.walk;
    } while (decode_next(p, walk, next));
}

/* ---- the kernel ------------------------------------------------------------------------------ */

template <int FP16, int DQK, int DV>
ATTN_DEVICE void mha_decode_body(const attn_decode_params &p, const attn_mha_fwd_maps &maps)
{
    typedef decode_smem<DQK, DV> smem;
    static_assert(sizeof(smem) <= ATTN_MHA_DECODE_SMEM(DQK, DV), "the host asks for less");
    static_assert(smem::GROUPS * near_rows<DV>::FLOATS * 4 <= sizeof(smem::k) + sizeof(smem::v),
                  "results lie there");
    extern __shared__ __align__(1024) uint8_t raw[];
    smem &sm = *(smem *)raw;

    int t = (int)threadIdx.x, warp = __shfl_sync(0xffffffff, t / 32, 0);
    bool few = DQK == 64 && DV == 64 && p.slot_rows <= FEW_ROWS; /* a step has fewest bytes */
    if (t % 32 == 0) {
        if (warp == 4) {
            prefetch_tensormap(&maps.k);
            prefetch_tensormap(&maps.v);
        }
#pragma unroll 1
        for (int i = warp; i < 4 * smem::STAGES; i += (int)blockDim.x / 32) /* in smem's order */
            mbarrier_init(shared_address(&sm.k_full[i]),
                          i >= 2 * smem::STAGES ? (few ? 128 : 4) : p.call.gather ? 64 : 2);
        fence_mbarrier_init();
    }
    wait_for_previous_kernel(); /* kv_append, when p.after_append */
    decode_walk walk;
    decode_piece piece;
    bool any = decode_first(p, sm.start, walk, piece);
    __syncthreads();
    launch_dependents();
    if (!any) return;

    int group = warp / 4;
    int groups = (int)blockDim.x / 128 - 1; /* consumers */
    bool loads = group == groups;
    if (loads) {
        if (smem::GROUPS == 2) setmaxnreg_dec<smem::LOADER_REGISTERS>();
        key_side<DQK, DV> side = choose_side<DQK, DV>(p.call, maps, sm, warp % 4 >= 2);
        load<DQK, DV>(p, side, walk, piece, warp % 2);
    } else {
        if (smem::GROUPS == 2) setmaxnreg_inc<smem::CONSUMER_REGISTERS>();
        if (few) groups = 1;
        if (group >= groups) return;
        if constexpr (DQK == 64 && DV == 64) {
            if (few) consume_few<FP16, DQK, DV>(p, sm, walk, piece);
        }
        if (!few) consume<FP16, DQK, DV>(p, sm, group, groups, walk, piece);
    }
    if (p.cluster > 1) {
        decode_piece merged = loads ? piece : sm.piece;
        merge_cluster<DV>(p, merged, shared_address(sm.k), (float4 *)sm.q, groups, loads);
    }
}

/* Of a thread: beside two consumers there is room left for a block of decode_combine. */
#define ATTN_MHA_DECODE_REGISTERS(d_v) (ATTN_MHA_DECODE_CONSUMERS(d_v) == 2 ? 144 : 248)

/* The build compiles this file once a line of mha_decode.def, with the line's fields as macros. */
#define ATTN_KERNEL(op, arch, dtype, dqk, dv, rows, keys)                                          \
    extern "C" __global__ void __maxnreg__(ATTN_MHA_DECODE_REGISTERS(dv))                          \
        attn_##op##_##arch##_##dtype##_d##dqk##x##dv##_m##rows##n##keys(                           \
            const __grid_constant__ attn_decode_params p,                                          \
            const __grid_constant__ attn_mha_fwd_maps maps)                                        \
    {                                                                                              \
        static_assert(rows == M && keys == N, "the tile is fixed");                                \
        op##_body<DTYPE_##dtype, dqk, dv>(p, maps);                                                \
    }
#define ATTN_EXPAND(...) ATTN_KERNEL(__VA_ARGS__)
ATTN_EXPAND(mha_decode, sm90, VARIANT_DTYPE, VARIANT_DQK, VARIANT_DV, VARIANT_ROWS, VARIANT_KEYS)
