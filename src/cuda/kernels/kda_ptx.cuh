/* SPDX-License-Identifier: MIT
 *
 * The instructions only the KDA kernels use: narrow wgmma, packed bf16, copies within a cluster,
 * shared memory by address.
 */
#pragma once
#include "wgmma.cuh"

/* The way back from ldmatrix_x4<1>.  PTX ISA: stmatrix */
ATTN_DEVICE void stmatrix_x4_trans(uint32_t address, const uint32_t (&r)[4])
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     address),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

/* Two products, each rounded once.  PTX ISA: mul.bf16x2 */
ATTN_DEVICE uint32_t mul_bf16x2(uint32_t x, uint32_t y)
{
    uint32_t z;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
    return z;
}

/* 1 / sqrt x, relative error 2^-22.  PTX ISA: rsqrt */
ATTN_DEVICE float rsqrt_approx(float x)
{
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* The shared::cluster address of this block's `address` in block `rank`.  PTX ISA: mapa */
ATTN_DEVICE uint32_t address_in_block(uint32_t address, uint32_t rank)
{
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

/* An arrival at a shared::cluster address.  PTX ISA: mbarrier.arrive */
ATTN_DEVICE void mbarrier_arrive_at(uint32_t bar)
{
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(bar) : "memory");
}

/* Shared memory of this block, to the same place in block `rank` of the cluster; the bytes count on
 * that block's barrier at `bar`.  PTX ISA: mapa, cp.async.bulk */
ATTN_DEVICE void bulk_copy_to_block(uint32_t at, uint32_t bytes, uint32_t bar, uint32_t rank)
{
    asm volatile("{ .reg .b32 there, counted;\n"
                 "mapa.shared::cluster.u32 there, %0, %3;\n"
                 "mapa.shared::cluster.u32 counted, %2, %3;\n"
                 "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
                 "[there], [%0], %1, [counted]; }" ::"r"(at),
                 "r"(bytes), "r"(bar), "r"(rank)
                 : "memory");
}

/* Asks for `bytes` of global memory in L2; both multiples of 16.
 * PTX ISA: cp.async.bulk.prefetch.L2 */
ATTN_DEVICE void prefetch_l2(const void *from, uint32_t bytes)
{
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

/* Whether the phase of `bar` with this parity is over.  PTX ISA: mbarrier.test_wait */
ATTN_DEVICE bool mbarrier_test_parity(uint32_t bar, uint32_t parity)
{
    uint32_t done;
    asm volatile("{ .reg .pred done;\n"
                 "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, done; }"
                 : "=r"(done)
                 : "r"(bar), "r"(parity)
                 : "memory");
    return done;
}

/* min(x, limit), a NaN of x included; fminf would drop it. */
ATTN_DEVICE float at_most(float x, float limit) { return x > limit ? limit : x; }

/* ---- shared memory by address: the compiler keeps one register and immediates ---------------- */

ATTN_DEVICE uint32_t shared_load_32(uint32_t address)
{
    uint32_t x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
    return x;
}

ATTN_DEVICE uint2 shared_load_64(uint32_t address)
{
    uint2 x;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                 : "=r"(x.x), "=r"(x.y)
                 : "r"(address)
                 : "memory");
    return x;
}

ATTN_DEVICE float2 shared_load_2f(uint32_t address)
{
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(x.x), "=f"(x.y)
                 : "r"(address)
                 : "memory");
    return x;
}

ATTN_DEVICE float4 shared_load_4f(uint32_t address)
{
    float4 x;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(address)
                 : "memory");
    return x;
}

ATTN_DEVICE uint4 shared_load_128(uint32_t address)
{
    uint4 x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(address)
                 : "memory");
    return x;
}

ATTN_DEVICE void shared_store_32(uint32_t address, uint32_t x)
{
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

ATTN_DEVICE void shared_store_f(uint32_t address, float x)
{
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}

ATTN_DEVICE void shared_store_64(uint32_t address, uint32_t x, uint32_t y)
{
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(x), "r"(y) : "memory");
}

ATTN_DEVICE void shared_store_2f(uint32_t address, float x, float y)
{
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}

ATTN_DEVICE void shared_store_128(uint32_t address, uint32_t x, uint32_t y, uint32_t z, uint32_t w)
{
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x), "r"(y), "r"(z),
                 "r"(w)
                 : "memory");
}

/* 16 bytes to global memory where `wanted`: a branch would split the warp.  PTX ISA: st.global */
ATTN_DEVICE void global_store_128_if(bool wanted, void *to, uint4 x)
{
    asm volatile("{ .reg .pred wanted; setp.ne.b32 wanted, %0, 0;\n"
                 "@wanted st.global.v4.b32 [%1], {%2, %3, %4, %5}; }" ::"r"((int)wanted),
                 "l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
}

/* ---- narrow products of the recurrence ------------------------------------------------------- */

/* A 16x16 operand, K-major, not swizzled: blocks of 8 rows x 16 bytes, 128 bytes each, the next
 * eight columns 128 bytes on, the next eight rows 256.  PTX ISA: matrix descriptor format */
ATTN_DEVICE uint64_t wgmma_descriptor_16x16(uint32_t address)
{
    uint32_t low = ((address & 0x3ffff) >> 4) | 8u << 16;
    uint64_t descriptor;
    asm volatile("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(low), "n"(0x10));
    return descriptor;
}

/* D[64][N] = A . B^T (+ D), A in registers, B K-major.  PTX ISA: wgmma.mma_async */
ATTN_DEVICE void wgmma_rs_n16(float (&d)[8], const uint32_t *a, uint64_t b_desc, int accumulate)
{
    asm volatile("{ .reg .pred keep; setp.ne.b32 keep, %13, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, keep, 1, 1, 0; }"
                 : D8(d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_desc), "r"(accumulate));
}

ATTN_DEVICE void wgmma_rs_n32(float (&d)[16], const uint32_t *a, uint64_t b_desc, int accumulate)
{
    asm volatile("{ .reg .pred keep; setp.ne.b32 keep, %21, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
                 "{%16, %17, %18, %19}, %20, keep, 1, 1, 0; }"
                 : D16(d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_desc), "r"(accumulate));
}
