/* SPDX-License-Identifier: MIT
 *
 * The tensor cores of Hopper: D[64][N] (+)= A[64][16] . B[N][16]^T, a warpgroup an instruction.
 *
 * Accumulator: element i of thread t (w = t / 32, g = t % 32 / 4, c = t % 4) is
 *     row 16 w + g + 8 (i / 2 % 2),  column 8 (i / 4) + 2 c + i % 2,
 * so a quad of lanes shares a row; a thread owns columns of the two rows g and g + 8 of its warp.
 * A from registers: a[j] holds row 16 w + g + 8 (j % 2), k = 2 c + {0, 1} + 8 (j / 2): the packed
 * accumulator of one product is the A operand of the next without moving between threads.
 *
 * Operands in shared memory are panels: rows of 128 bytes (64 elements), the sixteen-byte chunk at
 * column c of row r stored at column c ^ (r & 7), every panel on a multiple of 1024 bytes.
 *     K-major (Q, K):  a k step of 16 is +32 bytes inside a panel, the next panel after four
 *     MN-major (V):    a k step of 16 is +2048 bytes; panels of 64 columns lie `panel_bytes` apart
 */
#pragma once
#include "ptx.cuh"

/* ---- order ----------------------------------------------------------------------------------- */

/* Before the first wgmma of a group whose registers were touched.  PTX ISA: wgmma.fence */
ATTN_DEVICE void wgmma_fence()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

/* PTX ISA: wgmma.commit_group */
ATTN_DEVICE void wgmma_commit_group()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* Waits until at most `PENDING` groups are under way.  PTX ISA: wgmma.wait_group */
template <int PENDING> ATTN_DEVICE void wgmma_wait_group()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

/* Keeps the compiler from moving uses of these registers across this place.  Without it the front
 * end moves reads of an accumulator above the wait, or writes below the fence. */
template <int COUNT> ATTN_DEVICE void wgmma_pin(float (&r)[COUNT])
{
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        asm volatile("" : "+f"(r[i])::"memory");
}

template <int COUNT> ATTN_DEVICE void wgmma_pin(uint32_t (&r)[COUNT])
{
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        asm volatile("" : "+r"(r[i])::"memory");
}

/* ---- descriptors of operands in shared memory ------------------------------------------------ */

/* Bits 0-13 address / 16, 16-29 leading offset / 16, 32-45 stride offset / 16 (1024: the next eight
 * rows), 62-63 swizzle (1: 128 bytes).  Kept as a low word plus a constant high word; the low word
 * is hidden from the optimiser, which would otherwise hold one descriptor per k step in registers.
 * PTX ISA: matrix descriptor format */
ATTN_DEVICE uint64_t wgmma_descriptor(uint32_t address, uint32_t panel_bytes)
{
    uint32_t low = ((address & 0x3ffff) >> 4) | (panel_bytes >> 4) << 16;
    uint64_t descriptor;
    asm volatile("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(low), "n"(0x40000040));
    return descriptor;
}

/* ---- the instructions ------------------------------------------------------------------------ */

#define D8(d, i)                                                                                   \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),    \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define D16(d, i) D8(d, i), D8(d, i + 8)
#define D32(d, i) D16(d, i), D16(d, i + 16)
#define D40(d, i) D32(d, i), D8(d, i + 32)
#define D48(d, i) D32(d, i), D16(d, i + 32)
#define D64(d, i) D32(d, i), D32(d, i + 32)
#define D96(d, i) D64(d, i), D32(d, i + 64)
#define D128(d, i) D64(d, i), D64(d, i + 64)

#define L32                                                                                        \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"       \
    "%24,%25,%26,%27,%28,%29,%30,%31"
#define L40 L32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define L48 L40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define L64 L48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define L96                                                                                        \
    L64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,"        \
        "%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define L128                                                                                       \
    L96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,"            \
        "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

/* `list` names the N / 2 accumulators, `outs` passes them, a, b, p number the operands after them.
 * Both A and B K-major; `accumulate` 0 overwrites D. */
#define WGMMA_SS(n, list, outs, a, b, p)                                                           \
    if constexpr (FP16)                                                                            \
        asm volatile("{ .reg .pred keep; setp.ne.b32 keep, %" #p ", 0;\n"                          \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16 {" list "}, %" #a     \
                     ", %" #b ", keep, 1, 1, 0, 0; }"                                              \
                     : outs                                                                        \
                     : "l"(a_desc), "l"(b_desc), "r"(accumulate));                                 \
    else                                                                                           \
        asm volatile("{ .reg .pred keep; setp.ne.b32 keep, %" #p ", 0;\n"                          \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" list "}, %" #a   \
                     ", %" #b ", keep, 1, 1, 0, 0; }"                                              \
                     : outs                                                                        \
                     : "l"(a_desc), "l"(b_desc), "r"(accumulate))

/* A K-major and B MN-major, both in shared memory; always adds to D. */
#define WGMMA_SS_MN(n, list, outs, a, b)                                                           \
    if constexpr (FP16)                                                                            \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16 {" list "}, %" #a     \
                     ", %" #b ", 1, 1, 1, 0, 1;"                                                   \
                     : outs                                                                        \
                     : "l"(a_desc), "l"(b_desc));                                                  \
    else                                                                                           \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" list "}, %" #a   \
                     ", %" #b ", 1, 1, 1, 0, 1;"                                                   \
                     : outs                                                                        \
                     : "l"(a_desc), "l"(b_desc))

/* A from registers, B MN-major. */
#define WGMMA_RS(n, list, outs, a0, a1, a2, a3, b, p)                                              \
    if constexpr (FP16)                                                                            \
        asm volatile("{ .reg .pred keep; setp.ne.b32 keep, %" #p ", 0;\n"                          \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16 {" list "}, {%" #a0   \
                     ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #b ", keep, 1, 1, 1; }"                     \
                     : outs                                                                        \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_desc), "r"(accumulate));  \
    else                                                                                           \
        asm volatile("{ .reg .pred keep; setp.ne.b32 keep, %" #p ", 0;\n"                          \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" list "}, {%" #a0 \
                     ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #b ", keep, 1, 1, 1; }"                     \
                     : outs                                                                        \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_desc), "r"(accumulate))

/* A from registers, B K-major; always adds to D. */
#define WGMMA_RS_K(n, list, outs, a0, a1, a2, a3, b)                                               \
    if constexpr (FP16)                                                                            \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16 {" list "}, {%" #a0   \
                     ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #b ", 1, 1, 1, 0;"                          \
                     : outs                                                                        \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_desc));                   \
    else                                                                                           \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" list "}, {%" #a0 \
                     ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #b ", 1, 1, 1, 0;"                          \
                     : outs                                                                        \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_desc))

/* D[64][N] = A . B^T (+ D), both operands in shared memory.  PTX ISA: wgmma.mma_async */
template <int FP16, int N>
ATTN_DEVICE void wgmma_ss(float (&d)[N / 2], uint64_t a_desc, uint64_t b_desc, int accumulate)
{
    static_assert(N == 64 || N == 80 || N == 96 || N == 128, "add a line for this width");
    if constexpr (N == 64) {
        WGMMA_SS(64, L32, D32(d, 0), 32, 33, 34);
    } else if constexpr (N == 80) {
        WGMMA_SS(80, L40, D40(d, 0), 40, 41, 42);
    } else if constexpr (N == 96) {
        WGMMA_SS(96, L48, D48(d, 0), 48, 49, 50);
    } else {
        WGMMA_SS(128, L64, D64(d, 0), 64, 65, 66);
    }
}

/* D[64][N] = A . B (+ D), A in registers, B MN-major in shared memory.  PTX ISA: wgmma.mma_async */
template <int FP16, int N>
ATTN_DEVICE void wgmma_rs(float (&d)[N / 2], const uint32_t *a, uint64_t b_desc,
                          int accumulate = 1)
{
    static_assert(N == 64 || N == 96 || N == 128 || N == 192 || N == 256,
                  "add a line for this width");
    if constexpr (N == 64) {
        WGMMA_RS(64, L32, D32(d, 0), 32, 33, 34, 35, 36, 37);
    } else if constexpr (N == 96) {
        WGMMA_RS(96, L48, D48(d, 0), 48, 49, 50, 51, 52, 53);
    } else if constexpr (N == 128) {
        WGMMA_RS(128, L64, D64(d, 0), 64, 65, 66, 67, 68, 69);
    } else if constexpr (N == 192) {
        WGMMA_RS(192, L96, D96(d, 0), 96, 97, 98, 99, 100, 101);
    } else {
        WGMMA_RS(256, L128, D128(d, 0), 128, 129, 130, 131, 132, 133);
    }
}

/* D[64][256] += A . B, A K-major and B MN-major in shared memory.  PTX ISA: wgmma.mma_async */
template <int FP16>
ATTN_DEVICE void wgmma_ss_mn256(float (&d)[128], uint64_t a_desc, uint64_t b_desc)
{
    WGMMA_SS_MN(256, L128, D128(d, 0), 128, 129);
}

/* D[64][64] += A . B^T, A in registers, B K-major in shared memory.  PTX ISA: wgmma.mma_async */
template <int FP16>
ATTN_DEVICE void wgmma_rs_k64(float (&d)[32], const uint32_t *a, uint64_t b_desc)
{
    WGMMA_RS_K(64, L32, D32(d, 0), 32, 33, 34, 35, 36);
}
