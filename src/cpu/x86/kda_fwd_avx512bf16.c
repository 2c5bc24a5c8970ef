/* SPDX-License-Identifier: MIT
 *
 * kda_fwd for bf16 on VDPBF16PS: see kda_fwd_tile.h.
 */
#include "cpu/x86/kernels_x86.h"
#include "cpu/x86/row_avx512.h"

/* 8 rows x 2 column tiles of C at a time; a pair of A's elements is broadcast. */
static inline void kda_product(float (*c)[32], bool add, const char *a, int64_t a_next,
                               const char *b, int64_t b_next, int64_t steps)
{
    for (int m = 0; m < 32; m += 8) {
        vec sum[8][2];
        VEC_UNROLL
        for (int r = 0; r < 8; ++r)
            for (int n = 0; n < 2; ++n) sum[r][n] = add ? vec_load(c[m + r] + 16 * n) : vec_zero();
        for (int64_t i = 0; i < steps; ++i) {
            const char *pairs = a + m / 16 * a_next + i * 1024 + m % 16 * 64,
                       *rows = b + b_next * i;
            for (int p = 0; p < 16; ++p, pairs += 4, rows += 64) {
                __m512bh b0 = (__m512bh)_mm512_load_si512(rows);
                __m512bh b1 = (__m512bh)_mm512_load_si512(rows + 1024);
                VEC_UNROLL
                for (int r = 0; r < 8; ++r) {
                    __m512bh x = (__m512bh)_mm512_set1_epi32(
                        *(const int32_t *)(const void *)(pairs + 64 * r));
                    sum[r][0] = _mm512_dpbf16_ps(sum[r][0], x, b0);
                    sum[r][1] = _mm512_dpbf16_ps(sum[r][1], x, b1);
                }
            }
        }
        VEC_UNROLL
        for (int r = 0; r < 8; ++r)
            for (int n = 0; n < 2; ++n) vec_store(c[m + r] + 16 * n, sum[r][n]);
    }
}

static void kda_product_rows(float (*c)[32], const char *a, const char *b, int64_t tiles)
{
    for (int64_t m = 0; m < tiles; m += 2)
        kda_product(c + 16 * m, true, a + m * 1024, 1024, b, 0, 1);
}

#include "cpu/x86/kda_fwd_tile.h"

static void kda_end(void) { _mm_sfence(); /* of out */ }

const struct attn_kda_fwd_kernel attn_kda_fwd_bf16_avx512bf16 = {
    "attn_kda_fwd_bf16_avx512bf16",
    KDA_CHUNK,
    KDA_SLICE,
    kda_record_bytes,
    kda_scratch_bytes,
    kda_prepare,
    kda_scan,
    NULL,
    kda_end,
};
