/* SPDX-License-Identifier: MIT
 *
 * One device function per PTX instruction that CUDA C has no name for; wgmma is in wgmma.cuh.
 * Shared-memory addresses are 32-bit shared::cta addresses throughout.
 */
#pragma once
#include <stdint.h>

#define ATTN_DEVICE static __device__ __forceinline__

ATTN_DEVICE uint32_t shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* A condition whose code is laid out off the way: a short call is bound by instruction fetch. */
ATTN_DEVICE bool rarely(bool condition) { return __builtin_expect(condition, 0); }

/* ---- warps, warpgroups, clusters ------------------------------------------------------------- */

/* True in one lane of a converged warp.  PTX ISA: elect.sync */
ATTN_DEVICE bool elect_one()
{
    uint32_t is_elected;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }"
                 : "=r"(is_elected));
    return is_elected != 0;
}

/* Takes registers from the block's pool, waiting for them.  PTX ISA: setmaxnreg */
template <int REGISTERS> ATTN_DEVICE void setmaxnreg_inc()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

/* Gives registers of this warpgroup to the block's pool.  PTX ISA: setmaxnreg */
template <int REGISTERS> ATTN_DEVICE void setmaxnreg_dec()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

/* PTX ISA: %cluster_ctarank */
ATTN_DEVICE uint32_t cluster_rank()
{
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

/* The `threads` threads that use barrier `id` (1 to 15).  PTX ISA: bar.sync */
template <int ID, int THREADS> ATTN_DEVICE void named_barrier_sync()
{
    asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(THREADS) : "memory");
}

template <int ID> ATTN_DEVICE void named_barrier_sync(int threads)
{
    asm volatile("bar.sync %0, %1;" ::"n"(ID), "r"(threads) : "memory");
}

template <int THREADS> ATTN_DEVICE void named_barrier_sync_at(int id)
{
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(THREADS) : "memory");
}

/* The same without waiting; `threads` counts who waits, too.  PTX ISA: bar.arrive */
template <int THREADS> ATTN_DEVICE void named_barrier_arrive_at(int id)
{
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(THREADS) : "memory");
}

/* All threads of the cluster.  PTX ISA: barrier.cluster */
ATTN_DEVICE void cluster_sync()
{
    asm volatile("barrier.cluster.arrive.aligned;\n"
                 "barrier.cluster.wait.aligned;" ::: "memory");
}

/* The same, without an order of what the threads wrote.  PTX ISA: barrier.cluster */
ATTN_DEVICE void cluster_sync_relaxed()
{
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\n"
                 "barrier.cluster.wait.aligned;" ::: "memory");
}

/* Lets the next kernel of the stream start, where it was launched to overlap this one.
 * PTX ISA: griddepcontrol */
ATTN_DEVICE void launch_dependents()
{
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

/* Waits until the kernel before this one is over and its writes are here.
 * PTX ISA: griddepcontrol */
ATTN_DEVICE void wait_for_previous_kernel()
{
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

/* ---- mbarrier -------------------------------------------------------------------------------- */

/* PTX ISA: mbarrier.init */
ATTN_DEVICE void mbarrier_init(uint32_t bar, uint32_t arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}

/* Makes initialised barriers visible to the cluster and the copy engine.
 * PTX ISA: fence.mbarrier_init */
ATTN_DEVICE void fence_mbarrier_init()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/* PTX ISA: mbarrier.arrive */
ATTN_DEVICE void mbarrier_arrive(uint32_t bar)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

/* Arrives on the barrier at the same offset in block `rank` of the cluster.  Unqualified on
 * purpose: .release.cluster would add a fence of the whole GPU.  PTX ISA: mapa, mbarrier.arrive */
ATTN_DEVICE void mbarrier_arrive_cluster(uint32_t bar, uint32_t rank)
{
    asm volatile("{ .reg .b32 remote;\n"
                 "mapa.shared::cluster.u32 remote, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(bar), "r"(rank)
                 : "memory");
}

/* Arrives once and adds `bytes` to what the phase waits for.  PTX ISA: mbarrier.arrive.expect_tx */
ATTN_DEVICE void mbarrier_arrive_expect_tx(uint32_t bar, uint32_t bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
                 : "memory");
}

/* Waits until the phase of `bar` with this parity is over.  PTX ISA: mbarrier.try_wait */
ATTN_DEVICE void mbarrier_wait_parity(uint32_t bar, uint32_t parity)
{
    asm volatile("{ .reg .pred done;\n"
                 "again_%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again_%=; }" ::"r"(bar), "r"(parity)
                 : "memory");
}

/* ---- the copy engine ------------------------------------------------------------------------- */

/* PTX ISA: prefetch.tensormap */
ATTN_DEVICE void prefetch_tensormap(const void *map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/* One box of a 4-D tensor to shared memory; its bytes count on `bar`.
 * PTX ISA: cp.async.bulk.tensor */
ATTN_DEVICE void tma_load_4d(uint32_t dst, const void *map, uint32_t bar, int c0, int c1, int c2,
                             int c3)
{
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(dst),
                 "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                 : "memory");
}

/* One box of a 5-D tensor.  PTX ISA: cp.async.bulk.tensor */
ATTN_DEVICE void tma_load_5d(uint32_t dst, const void *map, uint32_t bar, int c0, int c1, int c2,
                             int c3, int c4)
{
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(dst),
                 "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
                 : "memory");
}

/* The same box to the same offset in every block of `mask`, counted on each one's own barrier.
 * PTX ISA: cp.async.bulk.tensor.multicast::cluster */
ATTN_DEVICE void tma_load_5d_multicast(uint32_t dst, const void *map, uint32_t bar, uint16_t mask,
                                       int c0, int c1, int c2, int c3, int c4)
{
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 ".multicast::cluster [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(dst),
                 "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "h"(mask)
                 : "memory");
}

/* One box of a 5-D tensor from shared memory, in a bulk group of this thread's.
 * PTX ISA: cp.async.bulk.tensor */
ATTN_DEVICE void tma_store_5d(uint32_t src, const void *map, int c0, int c1, int c2, int c3, int c4)
{
    asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group "
                 "[%1, {%2, %3, %4, %5, %6}], [%0];" ::"r"(src),
                 "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
                 : "memory");
}

/* PTX ISA: cp.async.bulk.commit_group */
ATTN_DEVICE void bulk_commit_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

/* Waits until this thread's bulk groups have read shared memory.  PTX ISA: cp.async.bulk.wait_group */
ATTN_DEVICE void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

/* Orders this thread's ordinary accesses to shared memory before later ones of the tensor cores
 * and the copy engine.  PTX ISA: fence.proxy.async */
ATTN_DEVICE void fence_proxy_async_shared()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* Sixteen zero bytes.  PTX ISA: st.shared */
ATTN_DEVICE void shared_zero_16(uint32_t dst)
{
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(dst), "r"(0) : "memory");
}

/* PTX ISA: ld.shared */
ATTN_DEVICE uint4 shared_load_16(uint32_t src)
{
    uint4 x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(src)
                 : "memory");
    return x;
}

/* Four 8 x 8 matrices of 16-bit elements; lane l passes the address of row l.  Lane l gets elements
 * 2 (l % 4) and the next of row l / 4 of each; TRANSPOSED: of column l / 4.  PTX ISA: ldmatrix */
template <int TRANSPOSED> ATTN_DEVICE void ldmatrix_x4(uint32_t (&x)[4], uint32_t row)
{
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                     : "r"(row)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                     : "r"(row)
                     : "memory");
}

/* Four 8 x 8 matrices of 16-bit elements; lane l passes the address of row l.
 * PTX ISA: stmatrix */
ATTN_DEVICE void stmatrix_x4(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
                 "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

/* Four bytes to the same offset in block `rank` of the cluster, counted on the barrier there.
 * PTX ISA: st.async */
ATTN_DEVICE void store_async_cluster(uint32_t dst, int value, uint32_t bar, uint32_t rank)
{
    asm volatile("{ .reg .b32 there, its_bar;\n"
                 "mapa.shared::cluster.u32 there, %0, %3;\n"
                 "mapa.shared::cluster.u32 its_bar, %2, %3;\n"
                 "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], %1, [its_bar];"
                 " }" ::"r"(dst),
                 "r"(value), "r"(bar), "r"(rank)
                 : "memory");
}

/* Two floats at the same offset in block `rank` of the cluster.
 * PTX ISA: mapa, ld.shared::cluster */
ATTN_DEVICE float2 load_cluster_2(uint32_t src, uint32_t rank)
{
    float2 x;
    asm volatile("{ .reg .b32 there;\n"
                 "mapa.shared::cluster.u32 there, %2, %3;\n"
                 "ld.shared::cluster.v2.f32 {%0, %1}, [there]; }"
                 : "=f"(x.x), "=f"(x.y)
                 : "r"(src), "r"(rank)
                 : "memory");
    return x;
}

/* Four floats at the same offset in block `rank` of the cluster.
 * PTX ISA: mapa, ld.shared::cluster */
ATTN_DEVICE float4 load_cluster_4(uint32_t src, uint32_t rank)
{
    float4 x;
    asm volatile("{ .reg .b32 there;\n"
                 "mapa.shared::cluster.u32 there, %4, %5;\n"
                 "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there]; }"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(src), "r"(rank)
                 : "memory");
    return x;
}

/* ---- ordinary asynchronous copies ------------------------------------------------------------ */

/* Sixteen bytes.  PTX ISA: cp.async */
ATTN_DEVICE void cp_async_16(uint32_t dst, const void *src)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
}

/* Sixteen bytes, of which the first `bytes` (0 or 16) are read and the rest is zero.
 * PTX ISA: cp.async */
ATTN_DEVICE void cp_async_16(uint32_t dst, const void *src, uint32_t bytes)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes)
                 : "memory");
}

/* Waits for this thread's earlier cp.async.  PTX ISA: cp.async.wait_all */
ATTN_DEVICE void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

/* Arrives on `bar` (inside its expected count) when this thread's earlier cp.async have landed.
 * PTX ISA: cp.async.mbarrier.arrive */
ATTN_DEVICE void cp_async_mbarrier_arrive(uint32_t bar)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}

/* ---- the tensor cores, a warp an instruction ------------------------------------------------- */

/* D[16][8] += A[16][16] . B[8][16]^T.  Accumulator and A operand: those of wgmma.cuh for one warp;
 * b[j] of lane l holds row l / 4 of B, k = 2 (l % 4) + {0, 1} + 8 j.  PTX ISA: mma */
template <int FP16>
ATTN_DEVICE void mma_16x8(float *d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1)
{
    if constexpr (FP16)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
                     "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
                     "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* ---- arithmetic ------------------------------------------------------------------------------ */

/* 2^x; subnormal results are zero.  PTX ISA: ex2 */
ATTN_DEVICE float ex2_approx(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* log2 x.  PTX ISA: lg2 */
ATTN_DEVICE float lg2_approx(float x)
{
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* 1 / x, relative error 2^-23; 0 of inf.  PTX ISA: rcp */
ATTN_DEVICE float rcp_approx(float x)
{
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* tanh y, absolute error 3e-7: that of the instruction, 8e-6, is a visible part of an lse. */
ATTN_DEVICE float tanh_approx(float y)
{
    return fmaf(-2.0f, rcp_approx(ex2_approx(y * 2.8853900817779268f) + 1.0f), 1.0f);
}

/* `yes` or `no` without a branch.  PTX ISA: selp */
ATTN_DEVICE float select(bool condition, float yes, float no)
{
    asm("{ .reg .pred p; setp.ne.u32 p, %3, 0; selp.f32 %0, %1, %2, p; }"
        : "=f"(no)
        : "f"(yes), "f"(no), "r"((uint32_t)condition));
    return no;
}

/* The fp16 number in the low half of `bits`.  PTX ISA: cvt.f32.f16 */
ATTN_DEVICE float half_to_float(uint32_t bits)
{
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"((uint16_t)bits));
    return y;
}

/* PTX ISA: cvt.rn.bf16x2.f32 and cvt.rn.f16x2.f32; `low` lands in bits 0 to 15 */
template <int FP16> ATTN_DEVICE uint32_t pack_16x2(float low, float high)
{
    uint32_t packed;
    if constexpr (FP16)
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    else
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
