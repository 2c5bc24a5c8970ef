/* SPDX-License-Identifier: MIT
 *
 * Quantised cache rows: the values of one, and the ops that write and read them.
 *
 *   V32     | 512 e4m3, 4 tiles of 128 | 4 fp32 scales | 64 bf16 |
 *   MODEL1  | 448 e4m3, 7 tiles of 64 | 64 bf16 |  and in the page's second part  | 7 e8m0 | - |
 */
#include "cpu/mla.h"
#include "cpu/threads.h"

/* The scale of tile i, wherever it is. */
static float load_scale(enum attn_mla_format format, const char *row, const char *scales, int64_t i)
{
    float s;
    if (format == ATTN_MLA_MODEL1) return attn_e8m0_to_float((uint8_t)scales[i]);
    memcpy(&s, row + ATTN_MLA_LATENT + 4 * i, sizeof s);
    return s;
}

/* Elements before the rope, elements a scale, and bytes before the rope. */
static void widths(enum attn_mla_format format, int64_t *quantised, int64_t *tile, int64_t *rope)
{
    bool v32 = format == ATTN_MLA_V32;
    *quantised = v32 ? ATTN_MLA_LATENT : ATTN_MODEL1_QUANTISED;
    *tile = v32 ? ATTN_V32_TILE : ATTN_MODEL1_TILE;
    *rope = v32 ? ATTN_MLA_LATENT + 16 : ATTN_MODEL1_QUANTISED;
}

void attn_mla_row_values(enum attn_mla_format format, const char *row, const char *scales,
                         int64_t d, float *x)
{
    if (format < ATTN_MLA_V32) {
        for (int64_t c = 0; c < d; ++c) x[c] = attn_load((enum attn_dtype)format, row, c);
        return;
    }
    int64_t quantised, tile, rope;
    widths(format, &quantised, &tile, &rope);
    for (int64_t c = 0; c < quantised; ++c) {
        float y = attn_f8_to_float((uint8_t)row[c]) * load_scale(format, row, scales, c / tile);
        x[c] = attn_bf16_to_float(attn_float_to_bf16(y));
    }
    for (int64_t c = 0; c < ATTN_MLA_ROPE; ++c) {
        uint16_t h;
        memcpy(&h, row + rope + 2 * c, sizeof h);
        x[quantised + c] = attn_bf16_to_float(h);
    }
}

/* The exponent of the least power of two >= max(a / 448, 1e-4), in [-13, 127]. */
static int scale_exponent(float a)
{
    int e;
    float s = a / 448.0f;
    float m = frexpf(s > 1e-4f ? s : 1e-4f, &e); /* m in [1/2, 1) */
    return m == 0.5f ? e - 1 : e;
}

static void quantize_row(enum attn_mla_format format, const float *x, char *row, char *scales)
{
    int64_t quantised, tile, rope;
    widths(format, &quantised, &tile, &rope);
    for (int64_t first = 0; first < quantised; first += tile) {
        float a = 0;
        for (int64_t c = first; c < first + tile; ++c)
            if (isfinite(x[c])) a = fmaxf(a, fabsf(x[c]));
        int e = scale_exponent(a);
        float s = ldexpf(1.0f, e), inverse = ldexpf(1.0f, -e);
        for (int64_t c = first; c < first + tile; ++c)
            row[c] = (char)attn_float_to_f8(x[c] * inverse);
        if (format == ATTN_MLA_MODEL1)
            scales[first / tile] = (char)(e + 127);
        else
            memcpy(row + ATTN_MLA_LATENT + 4 * (first / tile), &s, sizeof s);
    }
    for (int64_t c = 0; c < ATTN_MLA_ROPE; ++c) {
        uint16_t h = attn_float_to_bf16(x[quantised + c]);
        memcpy(row + rope + 2 * c, &h, sizeof h);
    }
}

/* ---- the ops: a task is a run of rows -------------------------------------------------------- */

enum { TASK_ROWS = 64 };

static void quantize_rows(void *context, int64_t task, int thread)
{
    (void)thread;
    const struct attn_mla_cache_problem *p = context;
    const struct attn_mla_cache *c = &p->cache;
    float x[ATTN_MLA_WIDTH_MAX];
    int64_t end = (task + 1) * TASK_ROWS < p->t ? (task + 1) * TASK_ROWS : p->t;
    for (int64_t i = task * TASK_ROWS; i < end; ++i) {
        int64_t slot = attn_mla_slot(p, i);
        if (slot < 0 || slot >= c->num_pages * c->page) continue;
        for (int64_t k = 0; k < p->d; ++k) x[k] = attn_load(p->dtype, p->kv, i * p->kv_row + k);
        quantize_row(p->format, x, attn_mla_row(c, slot / c->page, slot % c->page, 0),
                     attn_mla_scales(c, slot / c->page, slot % c->page));
    }
}

static void dequantize_rows(void *context, int64_t task, int thread)
{
    (void)thread;
    const struct attn_mla_cache_problem *p = context;
    const struct attn_mla_cache *c = &p->cache;
    int64_t end = (task + 1) * TASK_ROWS < p->t ? (task + 1) * TASK_ROWS : p->t;
    for (int64_t i = task * TASK_ROWS; i < end; ++i) {
        float x[ATTN_MLA_WIDTH_MAX] = {0};
        int64_t slot = attn_mla_slot(p, i);
        if (slot >= 0 && slot < c->num_pages * c->page)
            attn_mla_row_values(p->format, attn_mla_row(c, slot / c->page, slot % c->page, 0),
                                attn_mla_scales(c, slot / c->page, slot % c->page), p->d, x);
        for (int64_t k = 0; k < p->d; ++k) attn_store(p->dtype, p->kv, i * p->kv_row + k, x[k]);
    }
}

static attn_status run_rows(const struct attn_mla_cache_problem *p,
                            void (*body)(void *context, int64_t task, int thread))
{
    struct attn_mla_cache_problem own = *p;
    int64_t tasks = (p->t + TASK_ROWS - 1) / TASK_ROWS;
    attn_parallel(attn_threads(p->threads, tasks), tasks, body, &own);
    return ATTN_OK;
}

attn_status attn_mla_cache_quantize_cpu(const struct attn_mla_cache_problem *p, void *stream)
{
    (void)stream;
    return run_rows(p, quantize_rows);
}

attn_status attn_mla_cache_dequantize_cpu(const struct attn_mla_cache_problem *p, void *stream)
{
    (void)stream;
    return run_rows(p, dequantize_rows);
}
