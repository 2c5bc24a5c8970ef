// SPDX-License-Identifier: MIT
//
// The device helpers of src/cuda/kernels, each alone against plain arithmetic.  Operands are small
// integers, so that products are exact.  One program, one line a helper:
//     nvcc -gencode arch=compute_90a,code=sm_90a -std=c++17 -Isrc/cuda/kernels
//          tests/unit_cuda/test_helpers.cu -o test_helpers && ./test_helpers
#include <cuda.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define VARIANT_OP mha_fwd
#define VARIANT_DTYPE bf16
#define VARIANT_DQK 64
#define VARIANT_DV 64
#define VARIANT_ROWS 192
#define VARIANT_KEYS 128
#include "mha_fwd.cu"

static int failures;

static void check(cudaError_t e, int line)
{
    if (e == cudaSuccess) return;
    printf("line %d: %s\n", line, cudaGetErrorString(e));
    exit(1);
}
#define CHECK(call) check(call, __LINE__)

static void report(const char *what, int bad)
{
    printf("%-60s %s\n", what, bad ? "FAILED" : "ok");
    failures += bad != 0;
}

template <class T> static T *on_device(const std::vector<T> &host)
{
    T *p;
    CHECK(cudaMalloc(&p, host.size() * sizeof(T) + 16));
    CHECK(cudaMemcpy(p, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
    return p;
}

template <class T> static std::vector<T> from_device(const T *p, size_t n)
{
    std::vector<T> host(n);
    CHECK(cudaDeviceSynchronize());
    CHECK(cudaMemcpy(host.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
}

static CUresult encode_tiled(void *map, void *base, const cuuint64_t *extent,
                             const cuuint64_t *stride, const cuuint32_t *box)
{
    typedef decltype(&cuTensorMapEncodeTiled) encode;
    void *entry = NULL;
    cudaDriverEntryPointQueryResult found;
    CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                           cudaEnableDefault, &found));
    const cuuint32_t ones[5] = {1, 1, 1, 1, 1};
    return ((encode)entry)((CUtensorMap *)map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 5, base, extent,
                           stride, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
                           CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                           CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

static uint16_t bf16(float x) // small integers only: the low half is zero
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)(bits >> 16);
}

static float small(uint32_t i)
{
    i = (i ^ 61) * 2654435761u;
    return (float)((int)((i >> 20) % 15) - 7);
}

// Rows of `width` columns to swizzled panels of 64 columns, `pitch` bytes apart: what the copy engine
// does, from the formula at the top of wgmma.cuh.
static __device__ void to_panels(uint8_t *dst, int pitch, const uint16_t *src, int rows, int width)
{
    for (int i = threadIdx.x; i < rows * width; i += blockDim.x) {
        int r = i / width, c = i % width;
        *(uint16_t *)(dst + c / 64 * pitch + r * 128 + (c % 64 / 8 ^ (r & 7)) * 16 + c % 8 * 2) =
            src[i];
    }
}

// ---- wgmma --------------------------------------------------------------------------------------

// out = a[64][d] b[n][d]^T: accumulator map, K-major descriptors, every k step.
template <int N, int D>
static __global__ void run_qk(const uint16_t *a, const uint16_t *b, float *out)
{
    extern __shared__ __align__(1024) uint8_t raw[];
    uint8_t *k = raw + (D + 63) / 64 * 64 * 128;
    to_panels(raw, 64 * 128, a, 64, D);
    to_panels(k, N * 128, b, N, D);
    fence_proxy_async_shared();
    __syncthreads();
    float s[N / 2];
    wgmma_pin(s);
    wgmma_fence();
    issue_qk<0, D, 64, N>(s, shared_address(raw), shared_address(k));
    wgmma_wait_group<0>();
    wgmma_pin(s);
    int t = threadIdx.x, w = t / 32, g = t % 32 / 4, c = t % 4;
    for (int i = 0; i < N / 2; i++)
        out[(16 * w + g + 8 * (i / 2 % 2)) * N + 8 * (i / 4) + 2 * c + i % 2] = s[i];
}

template <int N, int D> static void test_qk()
{
    std::vector<uint16_t> a(64 * D), b(N * D);
    for (size_t i = 0; i < a.size(); i++) a[i] = bf16(small(i));
    for (size_t i = 0; i < b.size(); i++) b[i] = bf16(small(i + 99991));
    float *out = on_device(std::vector<float>(64 * N, NAN));
    int bytes = (D + 63) / 64 * (64 + N) * 128;
    CHECK(cudaFuncSetAttribute(run_qk<N, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    run_qk<N, D><<<1, 128, bytes>>>(on_device(a), on_device(b), out);
    std::vector<float> got = from_device(out, 64 * N);
    int bad = 0;
    for (int i = 0; i < 64; i++)
        for (int j = 0; j < N; j++) {
            float want = 0;
            for (int d = 0; d < D; d++) want += small(i * D + d) * small(j * D + d + 99991);
            bad += got[i * N + j] != want;
        }
    char name[64];
    snprintf(name, sizeof name, "issue_qk, n %d, d %d", N, D);
    report(name, bad);
}

// out = p[64][n] v[n][d]: p is laid out as an accumulator, packed to an A operand; MN-major V.
template <int N, int D> static __global__ void run_pv(const uint16_t *v, float *out)
{
    extern __shared__ __align__(1024) uint8_t raw[];
    to_panels(raw, N * 128, v, N, D);
    fence_proxy_async_shared();
    __syncthreads();
    int t = threadIdx.x, w = t / 32, g = t % 32 / 4, c = t % 4;
    float s[N / 2], o[D / 2];
    uint32_t packed[N / 4];
    for (int i = 0; i < N / 2; i++) {
        int row = 16 * w + g + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * c + i % 2;
        s[i] = (float)((row * 5 + column * 3) % 11 - 5);
    }
    softmax_pack<0, N>(packed, s);
    for (int i = 0; i < D / 2; i++) o[i] = 1.0f;
    wgmma_pin(o);
    wgmma_pin(packed);
    wgmma_fence();
    issue_pv<0, D, N>(o, packed, shared_address(raw), 1);
    wgmma_wait_group<0>();
    wgmma_pin(o);
    for (int i = 0; i < D / 2; i++)
        out[(16 * w + g + 8 * (i / 2 % 2)) * D + 8 * (i / 4) + 2 * c + i % 2] = o[i];
}

template <int N, int D> static void test_pv()
{
    std::vector<uint16_t> v(N * D);
    for (size_t i = 0; i < v.size(); i++) v[i] = bf16(small(i));
    float *out = on_device(std::vector<float>(64 * D, NAN));
    int bytes = (D + 63) / 64 * N * 128;
    CHECK(cudaFuncSetAttribute(run_pv<N, D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    run_pv<N, D><<<1, 128, bytes>>>(on_device(v), out);
    std::vector<float> got = from_device(out, 64 * D);
    int bad = 0;
    for (int i = 0; i < 64; i++)
        for (int d = 0; d < D; d++) {
            float want = 1;
            for (int j = 0; j < N; j++) want += (float)((i * 5 + j * 3) % 11 - 5) * small(j * D + d);
            bad += got[i * D + d] != want;
        }
    char name[64];
    snprintf(name, sizeof name, "softmax_pack and issue_pv, n %d, d %d", N, D);
    report(name, bad);
}

// ---- quads, masks, softmax ----------------------------------------------------------------------

static __global__ void run_transpose(uint32_t *out)
{
    uint32_t x[4];
    for (int j = 0; j < 4; j++) x[j] = threadIdx.x % 4 * 10 + j;
    quad_transpose(x);
    for (int j = 0; j < 4; j++) out[threadIdx.x * 4 + j] = x[j];
}

static void test_transpose()
{
    uint32_t *out = on_device(std::vector<uint32_t>(128));
    run_transpose<<<1, 32>>>(out);
    std::vector<uint32_t> got = from_device(out, 128);
    int bad = 0;
    for (int t = 0; t < 32; t++)
        for (int j = 0; j < 4; j++) bad += got[t * 4 + j] != (uint32_t)(j * 10 + t % 4);
    report("quad_transpose", bad);
}

struct mask_case {
    int left, right, chunk, world, rank, causal, s_q, s_k, total;
    attn_division by_chunk;
};

static __global__ void run_mask(const mask_case *cases, int n, int *bad)
{
    for (int at = blockIdx.x; at < n; at += gridDim.x) {
        mask_case m = cases[at];
        attn_mha_fwd_params p = {};
        p.window_left = m.left < 0 || m.world > 1 ? ATTN_WINDOW_OFF : m.left;
        p.window_right = m.right < 0 || m.world > 1 ? ATTN_WINDOW_OFF : m.right;
        p.chunk = m.world > 1 ? 0 : m.chunk;
        p.chunk_division = m.by_chunk;
        p.cp_world = m.world;
        p.cp_rank = m.rank;
        p.cp_causal = m.causal;
        key_interval before = {0, 0};
        for (int i = 0; i < m.s_q; i++) {
            key_interval r = visible_keys(p, i, m.s_q, m.s_k, m.total);
            if (r.lo < before.lo || r.hi < before.hi || r.lo < 0 || r.hi > m.s_k) atomicAdd(bad, 1);
            before = r;
            for (int j = threadIdx.x; j < m.s_k; j += blockDim.x) {
                int at_row = i + m.s_k - m.s_q, seen = 1;
                if (m.world > 1) {
                    int key = j * m.world + m.rank;
                    seen = key < m.total && (!m.causal || key <= i + m.total - m.s_q);
                } else {
                    seen = (m.left < 0 || j >= at_row - m.left) &&
                           (m.right < 0 || j <= at_row + m.right);
                    if (m.chunk) {
                        int c = at_row >= 0 ? at_row / m.chunk : -((m.chunk - 1 - at_row) / m.chunk);
                        seen = seen && j >= c * m.chunk && j < (c + 1) * m.chunk;
                    }
                }
                if (seen != (j >= r.lo && j < r.hi)) atomicAdd(bad, 1);
            }
        }
    }
}

static void test_mask()
{
    std::vector<mask_case> cases;
    srand(1);
    for (int i = 0; i < 4000; i++) {
        mask_case m = {rand() % 3 ? -1 : rand() % 40, rand() % 3 ? -1 : rand() % 40,
                       rand() % 3 ? 0 : 1 + rand() % 30, rand() % 4 ? 1 : 2 + rand() % 3, 0,
                       rand() % 2, 1 + rand() % 60, rand() % 90, 0, {}};
        m.rank = rand() % m.world;
        m.total = m.s_k * m.world - rand() % m.world;
        if (m.total < 0) m.total = 0;
        m.by_chunk = attn_division_by(m.chunk);
        cases.push_back(m);
    }
    int *bad = on_device(std::vector<int>(1, 0));
    run_mask<<<132, 32>>>(on_device(cases), (int)cases.size(), bad);
    report("visible_keys: one rising interval, as the definition", from_device(bad, 1)[0]);
}

static __global__ void run_finish(const float *in, int n, float *out)
{
    for (int i = 0; i < n; i++)
        softmax_finish(in[4 * i], in[4 * i + 1], 1.4426950408889634f, in[4 * i + 2] != 0.0f,
                       in[4 * i + 3], -INFINITY, out + 2 * i, out + 2 * i + 1);
}

static void test_finish()
{
    // max, sum, has sink, sink -> 1 / denominator relative to max, lse
    std::vector<float> in = {2, 3, 0, 0, -1e30f, 0, 0, 0, -1e30f, 0, 1, 5, 2, 3, 1, 1,
                             2, 3, 1, 300, 2, 3, 1, -INFINITY, -1e30f, 0, 1, -INFINITY, 2, NAN, 0, 0};
    int n = (int)in.size() / 4, bad = 0;
    float *out = on_device(std::vector<float>(2 * n));
    run_finish<<<1, 1>>>(on_device(in), n, out);
    std::vector<float> got = from_device(out, 2 * n);
    for (int i = 0; i < n; i++) {
        double max = in[4 * i], sum = in[4 * i + 1], sink = in[4 * i + 3];
        bool has = in[4 * i + 2] != 0;
        double total = sum == 0 ? 0 : sum * exp(max > -1e29 ? 0.0 : 0.0);
        double lse = sum == 0 ? -INFINITY : max + log(total), scale = sum == 0 ? 0 : 1 / total;
        if (has && sink > -INFINITY) {
            double top = fmax(lse, sink);
            double with = top + log(exp(lse - top) + exp(sink - top));
            scale = sum == 0 ? 0 : exp(max - with);
            lse = with;
        }
        auto same = [](double a, double b) {
            return (std::isnan(a) && std::isnan(b)) || a == b || fabs(a - b) < 1e-5 * (1 + fabs(b));
        };
        bad += !same(got[2 * i], scale) || !same(got[2 * i + 1], lse);
    }
    report("softmax_finish: empty rows, sinks, NaN", bad);
}

// ---- the schedule -------------------------------------------------------------------------------

// Of every item, the live queries of each of its tiles' warpgroups (two a block).
static __global__ void run_tiles(attn_mha_fwd_params p, int *hits, int s_max)
{
    int b = blockIdx.x, h_kv = blockIdx.y, s_q = locate_sequence(p, b).s_q;
    for (int item = 0; item < head_items(p, s_q); item++)
        for (int rank = 0; rank < p.cluster; rank++) {
            row_tile tile = locate_tile<80>(p, b, h_kv, item, rank);
            for (int group = 0; group < 2; group++)
                for (int i = threadIdx.x; i < p.queries; i += blockDim.x) {
                    int query = tile.query + group * p.pitch + i;
                    if (query >= 0 && query < s_q)
                        atomicAdd(&hits[(b * p.h_k * p.group + tile.h_q) * s_max + query], 1);
                }
        }
}

static __global__ void run_schedule(attn_mha_fwd_params p, int *hits, int items_max, int clusters)
{
    for (int c = 0; c < clusters; c++) {
        sequence_group group = {-32, 0, 0, 0};
        int b, h_kv, item;
        for (int k = c; find_item(group, p, p.fold, k, &b, &h_kv, &item); k += clusters)
            if (threadIdx.x == 0) hits[(b * p.h_k + h_kv) * items_max + item]++;
    }
}

static void test_schedule()
{
    int bad = 0, uncovered = 0;
    srand(2);
    for (int n = 0; n < 60; n++) {
        int b = 1 + rand() % (n % 3 ? 100 : 4), h_k = 1 + rand() % 5, most = 700;
        std::vector<int> cu(b + 1, 0), used(b);
        for (int i = 0; i < b; i++) {
            cu[i + 1] = cu[i] + (rand() % 4 ? rand() % most : 0);
            used[i] = rand() % most;
        }
        attn_mha_fwd_params p = {};
        p.b = b;
        p.h_k = h_k;
        p.group = 1 + rand() % 4;
        p.cluster = 1 + rand() % 2;
        p.section = 1 + rand() % 6;
        p.fold = rand() % 6;
        p.pack = rand() % 2 ? 1 : p.group; /* tiles of 128 rows */
        p.tile_heads = p.group / p.pack;
        p.queries = 64 / p.pack;
        p.tile_queries = 2 * p.queries;
        p.pitch = p.tile_heads == 1 ? p.cluster * p.queries : p.queries;
        p.window_left = p.window_right = ATTN_WINDOW_OFF;
        p.cp_world = 1;
        p.s_q = most;
        p.s_k = 100;
        p.t_q = p.t_k = cu[b];
        int kind = rand() % 3;
        if (kind == 1) p.cu_seqlens_q = p.cu_seqlens_k = on_device(cu);
        if (kind == 2) p.seqused_q = on_device(used);
        int items_max = (most / p.tile_queries + 1) * p.tile_heads;
        int *hits = on_device(std::vector<int>((size_t)b * h_k * items_max, 0));
        run_schedule<<<1, 32>>>(p, hits, items_max, 1 + rand() % 5);
        std::vector<int> got = from_device(hits, (size_t)b * h_k * items_max);
        for (int i = 0; i < b; i++) {
            int s_q = kind == 0 ? most : kind == 1 ? cu[i + 1] - cu[i] : used[i];
            int tiles = (s_q + p.tile_queries - 1) / p.tile_queries * p.tile_heads;
            int items = (tiles + p.cluster - 1) / p.cluster;
            for (int h = 0; h < h_k; h++)
                for (int item = 0; item < items_max; item++)
                    bad += got[(i * h_k + h) * items_max + item] != (item < items);
        }
        int heads = h_k * p.group;
        hits = on_device(std::vector<int>((size_t)b * heads * most, 0));
        run_tiles<<<dim3(b, h_k), 64>>>(p, hits, most);
        got = from_device(hits, (size_t)b * heads * most);
        for (int i = 0; i < b; i++) {
            int s_q = kind == 0 ? most : kind == 1 ? cu[i + 1] - cu[i] : used[i];
            for (int h = 0; h < heads; h += p.pack)
                for (int query = 0; query < most; query++)
                    uncovered += got[(i * heads + h) * most + query] != (query < s_q);
        }
    }
    report("locate_tile: every query once", uncovered);
    report("find_item: every item once, dense and ragged", bad);
}

// ---- barriers, boxes, clusters ------------------------------------------------------------------

// One warp fills a ring of two stages, another empties it, over many passes.
static __global__ void run_ring(int *out, int n)
{
    __shared__ uint64_t full[2], empty[2];
    __shared__ volatile int value[2];
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) {
            mbarrier_init(shared_address(&full[i]), 1);
            mbarrier_init(shared_address(&empty[i]), 1);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        ring r = {0, 1};
        for (int i = 0; i < n; i++, ring_next(r)) {
            mbarrier_wait_parity(shared_address(&empty[r.stage()]), r.parity());
            value[r.stage()] = 3 * i;
            mbarrier_arrive(shared_address(&full[r.stage()]));
        }
    } else if (threadIdx.x == 32) {
        ring r = {0, 0};
        for (int i = 0; i < n; i++, ring_next(r)) {
            wait_full(full, r);
            out[i] = value[r.stage()];
            mbarrier_arrive(shared_address(&empty[r.stage()]));
        }
    }
}

static void test_ring()
{
    int *out = on_device(std::vector<int>(100, -1)), bad = 0;
    run_ring<<<1, 64>>>(out, 100);
    std::vector<int> got = from_device(out, 100);
    for (int i = 0; i < 100; i++) bad += got[i] != 3 * i;
    report("mbarriers in a ring of two, 50 passes", bad);
}

// A k or v tile as load_tile leaves it, with `cluster` blocks: rows past s_k zero, panels swizzled.
template <int D, int N>
static __global__ void run_boxes(attn_mha_fwd_params p, const __grid_constant__ attn_tensor_map map,
                                 int s_k, int key, uint16_t *out)
{
    extern __shared__ __align__(1024) uint8_t raw[];
    __shared__ uint64_t bar;
    const int bytes = (D + 63) / 64 * N * 128;
    for (int i = threadIdx.x; i < bytes; i += blockDim.x) raw[i] = 0x7f;
    if (threadIdx.x == 0) {
        mbarrier_init(shared_address(&bar), 1);
        fence_mbarrier_init();
    }
    fence_proxy_async_shared();
    __syncthreads();
    cluster_sync();
    sequence seq = {1, 0, s_k, 3, 1};
    if (p.page_table) seq.k_offset = 0;
    if (threadIdx.x < 32) {
        if (p.page_table)
            load_paged_tile<D, N, 1>(p, &map, shared_address(raw), shared_address(&bar), seq, 1, key);
        else
            load_tile<D, N, 1>(p, &map, shared_address(raw), shared_address(&bar), seq, 1, key);
    }
    mbarrier_wait_parity(shared_address(&bar), 0);
    for (int i = threadIdx.x; i < bytes / 2; i += blockDim.x)
        out[blockIdx.x * (bytes / 2) + i] = ((uint16_t *)raw)[i];
    cluster_sync();
}

// Element (batch or page, row, head, column) of the tensor under test.
static uint16_t element(int64_t b, int64_t row, int h, int d)
{
    return (uint16_t)(b * 7919 + row * 131 + h * 17 + d + 1);
}

template <int D, int N> static void test_boxes(int cluster, int page)
{
    const int heads = 2, rows = page ? page : 300, batches = page ? 40 : 2, width = D - 8;
    std::vector<uint16_t> data((size_t)batches * rows * heads * width);
    for (int b = 0; b < batches; b++)
        for (int r = 0; r < rows; r++)
            for (int h = 0; h < heads; h++)
                for (int d = 0; d < width; d++)
                    data[((size_t)(b * rows + r) * heads + h) * width + d] = element(b, r, h, d);
    uint16_t *base = on_device(data);
    std::vector<int> table(80);
    for (int i = 0; i < 80; i++) table[i] = (i * 7 + 3) % batches;
    attn_mha_fwd_params p = {};
    p.cluster = cluster;
    p.box_rows = page ? 16 : N / cluster;
    p.page = page;
    p.page_division = attn_division_by(page);
    p.page_table = page ? on_device(table) : NULL;
    p.page_table_stride = 40;
    p.num_pages = batches;
    p.d_v = width;
    attn_tensor_map map;
    cuuint64_t extent[5] = {(cuuint64_t)width, (cuuint64_t)p.box_rows, (cuuint64_t)rows + 1,
                            (cuuint64_t)heads, (cuuint64_t)batches};
    cuuint64_t row = heads * width * 2, stride[4] = {row, row, (cuuint64_t)width * 2, row * rows};
    cuuint32_t box[5] = {64, (cuuint32_t)p.box_rows, 1, 1, 1};
    if (encode_tiled(&map, base - p.box_rows * row / 2, extent, stride, box)) {
        report("cuTensorMapEncodeTiled", 1);
        return;
    }
    const int panels = (D + 63) / 64, bytes = panels * N * 128;
    uint16_t *out = on_device(std::vector<uint16_t>((size_t)cluster * bytes / 2));
    auto kernel = run_boxes<D, N>;
    CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    int bad = 0;
    for (int s_k : {1, 7, 16, N / 2, N / 2 + 1, N - 1, N, N + 5}) {
        cudaLaunchConfig_t config = {};
        cudaLaunchAttribute attribute[1];
        attribute[0].id = cudaLaunchAttributeClusterDimension;
        attribute[0].val.clusterDim = {(unsigned)cluster, 1, 1};
        config.gridDim = dim3(cluster);
        config.blockDim = dim3(64);
        config.dynamicSmemBytes = bytes;
        config.attrs = attribute;
        config.numAttrs = 1;
        CHECK(cudaLaunchKernelEx(&config, kernel, p, map, s_k, 0, out));
        std::vector<uint16_t> got = from_device(out, (size_t)cluster * bytes / 2);
        for (int block = 0; block < cluster; block++)
            for (int r = 0; r < N; r++)
                for (int c = 0; c < panels * 64; c++) {
                    int at = c / 64 * N * 64 + r * 64 + (c % 64 / 8 ^ (r & 7)) * 8 + c % 8;
                    uint16_t want = 0;
                    if (r < s_k && c < width)
                        want = page ? element(table[40 + r / page], r % page, 1, c)
                                    : element(1, 3 + r, 1, c);
                    bad += got[block * (bytes / 2) + at] != want;
                }
    }
    char name[64];
    snprintf(name, sizeof name, "boxes, d %d, n %d, cluster %d, page %d", D, N, cluster, page);
    report(name, bad);
}

int main()
{
    CHECK(cudaFree(0));
    test_qk<80, 128>();
    test_qk<80, 256>();
    test_qk<96, 96>();
    test_qk<96, 192>();
    test_qk<128, 64>();
    test_pv<128, 64>();
    test_pv<96, 96>();
    test_pv<80, 128>();
    test_pv<96, 192>();
    test_pv<80, 256>();
    test_transpose();
    test_mask();
    test_finish();
    test_schedule();
    test_ring();
    test_boxes<64, 128>(1, 0);
    test_boxes<128, 80>(2, 0);
    test_boxes<192, 96>(2, 0);
    test_boxes<128, 80>(1, 16);
    test_boxes<128, 80>(2, 48);
    test_boxes<256, 80>(2, 16);
    printf("%d failures\n", failures);
    return failures != 0;
}
