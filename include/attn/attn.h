/* SPDX-License-Identifier: MIT
 *
 * libattn: attention on CPUs and on NVIDIA Hopper behind one C ABI.
 *
 * Every op is `plan` then `run`.  `plan` checks each argument and fills a plan: plain integers,
 * among them the bytes of workspace that `run` needs.  `run` takes the same arguments (fresh
 * pointers are fine, shapes must be the plan's), the caller's workspace and a stream; it allocates
 * nothing and never waits for a device.  On a CPU `run` returns when the result is written.
 *
 * Tensors are DLTensor (dlpack.h, installed beside this file), always with strides honoured.
 * A function returns ATTN_OK or a status, and then attn_last_error() of the same thread says which
 * argument was wrong, what was expected and what was found.  Nothing here prints, exits or aborts.
 *
 * Symbols used in shapes:
 *   b batch, s_q s_k query and key length of one sequence, t_q t_k packed totals,
 *   h_q query heads, h_k KV heads (h_q % h_k == 0), d_qk width of q and k, d_v width of v and out,
 *   page tokens of one cache page, topk indices of one query token.
 */
#ifndef ATTN_ATTN_H
#define ATTN_ATTN_H

#include <stddef.h>
#include <stdint.h>

#include "dlpack.h"

#define ATTN_VERSION_MAJOR 0
#define ATTN_VERSION_MINOR 1
#define ATTN_VERSION_PATCH 0
#define ATTN_VERSION_STRING "0.1.0"

#if defined(_WIN32)
#error "libattn is built for Linux"
#endif
#if defined(__GNUC__)
#define ATTN_API __attribute__((visibility("default")))
#else
#define ATTN_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- status ---------------------------------------------------------------------------------- */

typedef enum attn_status {
    ATTN_OK = 0,
    ATTN_E_SHAPE = 1,     /* a tensor's rank, extent or stride */
    ATTN_E_DTYPE = 2,     /* a tensor's element type */
    ATTN_E_VALUE = 3,     /* a number out of range, or arguments that exclude each other */
    ATTN_E_DEVICE = 4,    /* tensors on different devices, or on one this library does not know */
    ATTN_E_NOT_BUILT = 5, /* a feature, dtype, width or GPU that this build has no kernel for */
    ATTN_E_WORKSPACE = 6, /* workspace missing, short or misaligned */
    ATTN_E_VERSION = 7,   /* caller and library were built from different headers */
    ATTN_E_DRIVER = 8,    /* the GPU driver said no; the message carries its words */
} attn_status;

/* The message of this thread's last call that failed; "" when none did.  Valid until the thread's
 * next call. */
ATTN_API const char *attn_last_error(void);

/* "0.1.0".  Compare with ATTN_VERSION_STRING: a caller built from another header must not go on. */
ATTN_API const char *attn_version(void);

/* ---- what is there --------------------------------------------------------------------------- */

/* The CPU rung in use: "c", "avx2", "avx512", "avx512bf16" or "amx"; at most what ATTN_CPU says. */
ATTN_API const char *attn_cpu_rung(void);

/* One line of CPU vendor and features, for people. */
ATTN_API const char *attn_cpu_features(void);

/* Names of the kernels compiled in, one a call: NULL past the end.  CPU kernels above the rung in
 * use are listed too. */
ATTN_API const char *attn_kernel_name(int index);

/* Number of GPUs the driver reports; 0 without a driver.  `text` (may be NULL) receives one line:
 * the driver's version, or why there is none. */
ATTN_API int attn_gpu_count(char *text, size_t text_bytes);

/* ---- mha_fwd: attention, forward ------------------------------------------------------------- */

/*  score(i, j) = scale * qd * kd * (q_i . k_j [+ qv_i . v_j])
 *                with softcap > 0:  softcap * tanh(score / softcap)
 *  out_i = vd * sum_j softmax_j(score(i, .) over visible j) v_j
 *  lse_i = ln sum_j exp(score(i, j)), with the sink's logit in the sum when there are sinks
 *
 * Dense q is [b, s_q, h_q, d_qk]; with cu_seqlens_q it is [t_q, h_q, d_qk].  k and v are one of
 *   dense or cache  [rows, s_k, h_k, d]       row of sequence i: kv_batch_idx[i], or i
 *   packed          [t_k, h_k, d]             with cu_seqlens_k
 *   paged           [num_pages, page, h_k, d] with page_table [rows, max_pages]
 * out has q's shape with d_v as the last extent; lse is fp32 [b, h_q, s_q] or packed [h_q, t_q].
 * A NULL tensor means the feature is off.  Tensors named `_new` are appended to the cache (and
 * rotated, when there is a rotary table) before the attention.  Row i of a sequence with S_q
 * queries and S_k keys sits at p = i + S_k - S_q; causal shows it keys j <= p, the window keys
 * p - window_left <= j <= p + window_right (negative: unlimited), attention_chunk c > 0 keys of the
 * chunk floor(p / c).  Every row with no visible key gives out 0 and lse -inf (with a sink: the
 * sink's value); a call with no key storage at all gives lse +inf. */
struct attn_mha_fwd_args {
    uint32_t size;   /* sizeof(struct attn_mha_fwd_args) */
    int32_t threads; /* CPU threads to use at most; 0: the OpenMP run time's own number */

    const DLTensor *q, *k, *v;     /* fp32 (CPU only), bf16, fp16 or fp8 e4m3fn, one dtype */
    const DLTensor *k_new, *v_new; /* [b, s_new, h_k, d] or, with cu_seqlens_k_new, packed */
    const DLTensor *qv;            /* [b, s_q, h_q, d_v] or packed: the second score term */
    const DLTensor *out;           /* q's dtype; bf16 for fp8.  NULL only for plan */
    const DLTensor *lse;           /* NULL for plan, and on a GPU where it is not wanted */
    const DLTensor *out_accum;     /* fp32 [splits, b, h_q, s_q, d_v] or [splits, h_q, t_q, d_v] */
    const DLTensor *lse_accum;     /* the same without d_v; both needed when plan.splits > 1 */
    const DLTensor *cu_seqlens_q;  /* int32 [b + 1], contiguous, first element 0 */
    const DLTensor *cu_seqlens_k;  /* int32 [b + 1] */
    const DLTensor *cu_seqlens_k_new;                  /* int32 [b + 1]; ignored without k_new */
    const DLTensor *seqused_q, *seqused_k;             /* int32 [b]: live rows of each sequence */
    const DLTensor *page_table;                        /* int32 [rows, max_pages] */
    const DLTensor *kv_batch_idx;                      /* int32 [b] */
    const DLTensor *leftpad_k;                         /* int32 [b] */
    const DLTensor *rotary_cos, *rotary_sin;           /* [ro, r / 2], q's dtype; need k_new */
    const DLTensor *seqlens_rotary;                    /* int32 [b]; ignored without rotary_cos */
    const DLTensor *q_descale, *k_descale, *v_descale; /* fp32 [b, h_k]; used for fp8 only */
    const DLTensor *sinks;              /* [h_q], fp32, bf16 or fp16: one more logit a head */
    const DLTensor *cp_tot_seqused_k;   /* int32 [b]: global key count, with cp_world_size > 1 */
    const DLTensor *scheduler_metadata; /* shape checked, contents never read */

    double softmax_scale;
    double softcap;                    /* <= 0: off; else in [1e-20, 1e20] */
    int64_t max_seqlen_q;              /* needed with cu_seqlens_q; an over-estimate is legal */
    int64_t max_seqlen_k;              /* needed with cu_seqlens_k */
    int64_t window_left, window_right; /* negative: unlimited */
    int64_t attention_chunk;           /* <= 0: off */
    int32_t causal;
    int32_t rotary_interleaved;
    int32_t num_splits;    /* 1: none; > 1: so many (an upper bound for ragged); <= 0: chosen */
    int32_t pack_gqa;      /* -1 unset, 0, 1: tuning only */
    int32_t sm_margin;     /* SMs left free: tuning only */
    int32_t cp_world_size; /* <= 1: off; local key j is global key j * world + rank */
    int32_t cp_rank;
    int32_t reserved;
};

/* What plan decided.  Plain data: copy it, keep it, use it again for the same shapes. */
struct attn_mha_fwd_plan {
    uint32_t size;           /* sizeof(struct attn_mha_fwd_plan), set by the caller of plan */
    int32_t splits;          /* key ranges computed apart and combined; 1 = none */
    int64_t workspace_bytes; /* may be 0; the workspace is 64-byte aligned, on q's device */
    int64_t piece;           /* keys of one split */
    int64_t shape[12]; /* b s_q s_k t_q t_k h_q h_k d_qk d_v s_new page features: compared by run */
    int64_t tile[8];   /* the backend's own integers: tiles, tasks, slots */
    char kernel[96];   /* name of the kernel that will run */
};

ATTN_API attn_status attn_mha_fwd_plan(const struct attn_mha_fwd_args *args,
                                       struct attn_mha_fwd_plan *plan);
ATTN_API attn_status attn_mha_fwd_run(const struct attn_mha_fwd_args *args,
                                      const struct attn_mha_fwd_plan *plan, void *workspace,
                                      int64_t workspace_bytes, void *stream);

/* The same function in plain scalar C with fp64 sums, CPU tensors only, slow: the oracle of the
 * tests and the fallback below AVX2.  Needs no plan and no workspace. */
ATTN_API attn_status attn_mha_fwd_ref(const struct attn_mha_fwd_args *args);

/* Length of the tensor that flash_attn_interface.get_scheduler_metadata returns for these static
 * sizes and this mask: plain arithmetic, cannot fail. */
ATTN_API int64_t attn_mha_metadata_length(int64_t b, int64_t s_q, int64_t s_k, int64_t d_qk,
                                          int32_t paged, int32_t causal, int64_t window_left,
                                          int64_t window_right, int64_t attention_chunk);

/* ---- kda_fwd, kda_step: Kimi Delta Attention ------------------------------------------------- */

/* For every sequence and head, tokens one after another, S [V, K] the state, row = value index:
 *   k^ = k / sqrt(sum k^2 + 1e-6), q^ likewise
 *   gamma = lower_bound * sigmoid(exp(A_log) (g + dt_bias))  per key channel; g with gate_activated
 *   b = sigmoid(beta); with beta_activated: beta
 *   S <- S diag(exp gamma);  S <- S + b (v - S k^) k^T;  out = scale S q^
 *
 * Tensors are [b, t, h, d] with d = K = V, 64 or 128, last stride 1; each batch row is a sequence
 * of t tokens.  With cu_seqlens [n + 1] b is 1 and sequence i is tokens cu[i] <= token < cu[i + 1];
 * tokens outside are neither read nor written.  n is the number of sequences.
 *
 * States are [n, h, V, K], or [slots, h, V, K] with state_indices [n], which names the slot that
 * sequence i starts from and ends in; slots that get a state must differ, and -1 is no state in and
 * none out.  V and K are contiguous, the outer strides free.  A state is kept in fp32 from the
 * first token to the last; bf16 is a type of memory only.  A sequence without tokens hands its
 * state on.  final_state may be initial_state itself. */
struct attn_kda_fwd_args {
    uint32_t size;   /* sizeof(struct attn_kda_fwd_args) */
    int32_t threads; /* CPU threads to use at most; 0: the OpenMP run time's own number */

    const DLTensor *q, *k, *v, *g; /* bf16, fp16 or, on a CPU, fp32; one dtype */
    const DLTensor *beta;          /* [b, t, h], q's dtype, free strides */
    const DLTensor *out;           /* q's dtype.  NULL only for plan */
    const DLTensor *A_log;         /* fp32 [h]; NULL: 0 */
    const DLTensor *dt_bias;       /* fp32 [h, d]; NULL: 0 */
    const DLTensor *initial_state; /* fp32 or bf16; NULL: zeros */
    const DLTensor *final_state;   /* initial_state's dtype, if both are there; NULL: not wanted */
    const DLTensor *cu_seqlens;    /* int32 or int64 [n + 1] */
    const DLTensor *state_indices; /* int32 [n]; needs a state */
    /* fp32 or bf16 [rows, h, V, K]: the states after every checkpoint_every tokens of a sequence,
     * sequences one after another; rows >= sum over sequences of t_i / checkpoint_every. */
    const DLTensor *checkpoint_states;

    double scale;
    double lower_bound;       /* in [-5, 0]; 0 with gate_activated */
    int64_t checkpoint_every; /* a positive multiple of 16 with checkpoint_states, else 0 */
    int32_t gate_activated;   /* g is the log-decay gamma itself, natural log; no A_log, dt_bias */
    int32_t beta_activated;   /* beta is b itself */
};

struct attn_kda_fwd_plan {
    uint32_t size; /* sizeof(struct attn_kda_fwd_plan), set by the caller of plan */
    int32_t reserved;
    int64_t workspace_bytes; /* may be 0; the workspace is 64-byte aligned, on q's device */
    int64_t shape[8];        /* b t n h d slots checkpoint_every features: compared by run */
    int64_t tile[8];         /* the backend's own integers */
    char kernel[96];         /* name of the kernel that will run */
};

/* run takes NULL for a plan too, and makes one itself: for calls that need no workspace, and others
 * get ATTN_E_WORKSPACE. */
ATTN_API attn_status attn_kda_fwd_plan(const struct attn_kda_fwd_args *args,
                                       struct attn_kda_fwd_plan *plan);
ATTN_API attn_status attn_kda_fwd_run(const struct attn_kda_fwd_args *args,
                                      const struct attn_kda_fwd_plan *plan, void *workspace,
                                      int64_t workspace_bytes, void *stream);

/* The same function token by token in fp64, plain scalar C, CPU tensors only: the oracle of the
 * tests and the fallback below AVX2.  Needs no plan and no workspace. */
ATTN_API attn_status attn_kda_fwd_ref(const struct attn_kda_fwd_args *args);

/* kda_fwd of 1 to 16 tokens a sequence (0 to 16 with cu_seqlens), the state changed in place.  A
 * sequence whose state index is -1 is padding: its tokens are not read, its out rows become 0. */
struct attn_kda_step_args {
    uint32_t size;
    int32_t threads;
    const DLTensor *q, *k, *v, *g; /* [n, s, h, d], or [1, t, h, d] with cu_seqlens */
    const DLTensor *beta;          /* [n, s, h] */
    const DLTensor *out;
    const DLTensor *A_log, *dt_bias;
    const DLTensor *state;         /* fp32 or bf16 [n, h, V, K], or [slots, h, V, K] */
    const DLTensor *state_indices; /* int32 [n] */
    const DLTensor *cu_seqlens;    /* int32 or int64 [n + 1] */
    double scale;
    double lower_bound;
    int32_t gate_activated;
    int32_t beta_activated;
};

ATTN_API attn_status attn_kda_step_run(const struct attn_kda_step_args *args, void *stream);

/* ---- split_combine: merge partial results by their LSE --------------------------------------- */

/* out = sum_s w_s out_partial_s / sum_s w_s, w_s = exp(lse_partial_s - max);
 * lse = max + ln sum w_s.  A row whose partials are all -inf gives out 0 and lse -inf; its partials
 * are not read. */
struct attn_split_combine_args {
    uint32_t size;
    int32_t threads;
    const DLTensor *out_partial; /* fp32 [splits, b, s, h, d_v], last stride 1, splits <= 256 */
    const DLTensor *lse_partial; /* fp32 [splits, b, s, h], any strides */
    const DLTensor *out;         /* fp32, fp16 or bf16 [b, s, h, d_v], last stride 1 */
    const DLTensor *lse;         /* fp32 [b, s, h], any strides */
};

ATTN_API attn_status attn_split_combine_run(const struct attn_split_combine_args *args,
                                            void *stream);

/* ---- mla: attention over a latent cache, decode and prefill ---------------------------------- */

/* One key row serves as K and, with its first d_v values, as V: K = [latent 512 | rope 64] (d_qk
 * 576) or all 512 values (d_qk 512); d_v is 512.  For query row (i, t, h) and its keys S, a
 * multiset:
 *
 *   score(j) = softmax_scale * descale_q * descale_k * (q . k_j)
 *   max = max_j score(j),  lse = max + ln sum_j exp(score(j) - max)      natural units, no sink
 *   out = descale_k * sum_j exp(score(j) - lse) v_j / (1 + exp(attn_sink[h] - lse))
 *
 * No keys: out 0, lse +inf, max -inf, whatever the sink.  A sink of -inf has no effect, one of +inf
 * gives out 0.
 *
 * Quantised caches, one page of bytes after the other, the page's stride free:
 *   V32    d_qk 576, 656 bytes a token: 512 e4m3 | 4 fp32 scales, one per 128 | 64 bf16
 *   MODEL1 d_qk 512, 584 bytes a token; token o of a page: 448 e4m3 at 576 o, 64 bf16 behind them;
 *          7 e8m0 scales, one per 64, at 576 page + 8 o, and one byte of padding
 * A value is e4m3 * scale, rounded to bf16. */

/* What plan decided for one of the three mla ops.  Plain data, as attn_mha_fwd_plan. */
struct attn_mla_plan {
    uint32_t size; /* sizeof(struct attn_mla_plan), set by the caller of plan */
    int32_t reserved;
    int64_t workspace_bytes; /* may be 0; the workspace is 64-byte aligned, on q's device */
    int64_t shape[16];       /* compared by run */
    int64_t tile[16];        /* the backend's own integers */
    char kernel[96];         /* name of the kernel that will run */
};

/* mla_decode: S = the first cache_seqlens[i] keys of sequence i, key j at
 * k_cache[block_table[i][j / page]][j % page]; causal and s_q > 1: only j <= len - s_q + t.  Query
 * head h uses KV head h / (h_q / h_k).  Neither table entries nor cache rows past a sequence's end
 * are read. */
struct attn_mla_decode_args {
    uint32_t size;   /* sizeof(struct attn_mla_decode_args) */
    int32_t threads; /* CPU threads to use at most; 0: the OpenMP run time's own number */

    const DLTensor *q;                     /* [b, s_q, h_q, d_qk] bf16, fp16, fp8; CPU: fp32 */
    const DLTensor *k_cache;               /* [num_pages, page, h_k, d_qk], q's dtype */
    const DLTensor *block_table;           /* int32 [b, max_pages], last stride 1 */
    const DLTensor *cache_seqlens;         /* int32 [b] */
    const DLTensor *descale_q, *descale_k; /* fp32 [1]; both with fp8, none otherwise */
    const DLTensor *out;                   /* [b, s_q, h_q, d_v] q's dtype, or bf16 for fp8; NULL
                                              only for plan */
    const DLTensor *lse;                   /* fp32 [b, h_q, s_q], any strides; likewise */

    double softmax_scale;
    int64_t head_dim_v; /* d_v: 512 */
    int32_t causal;
    int32_t reserved;
};

/* mla_sparse_decode: S = the rows that indices[i][t][0 .. topk_length[i]) name in k_cache together
 * with those that extra_indices[i][t][0 .. extra_topk_length[i]) name in extra_k_cache.  An index
 * is page number * page + offset; one outside [0, num_pages * page) is skipped. */
struct attn_mla_sparse_decode_args {
    uint32_t size;
    int32_t threads;

    const DLTensor *q;                        /* [b, s_q, h_q, d_qk] bf16 */
    const DLTensor *k_cache;                  /* [num_pages, page, 1, 656 or 584] bytes: uint8,
                                                 int8 or e4m3; strides past the page's are dense */
    const DLTensor *indices;                  /* int32 [b, s_q, topk], last stride 1 */
    const DLTensor *topk_length;              /* int32 [b]; above topk counts as topk */
    const DLTensor *attn_sink;                /* fp32 [h_q] */
    const DLTensor *extra_k_cache;            /* same format, pages of its own; with its indices */
    const DLTensor *extra_indices_in_kvcache; /* int32 [b, s_q, extra_topk] */
    const DLTensor *extra_topk_length;        /* int32 [b] */
    const DLTensor *out;                      /* bf16 [b, s_q, h_q, d_v]; NULL only for plan */
    const DLTensor *lse;                      /* fp32 [b, h_q, s_q], any strides; likewise */

    double softmax_scale;
    int64_t head_dim_v;
};

/* mla_sparse_fwd: S = the rows of kv that indices[t][0][0 .. topk_length[t]) name; an index outside
 * [0, s_kv) is skipped. */
struct attn_mla_sparse_fwd_args {
    uint32_t size;
    int32_t threads;

    const DLTensor *q;           /* [s_q, h_q, d_qk] bf16, fp16; CPU: fp32 */
    const DLTensor *kv;          /* [s_kv, 1, d_qk], q's dtype, last stride 1 */
    const DLTensor *indices;     /* int32 [s_q, 1, topk], last stride 1 */
    const DLTensor *topk_length; /* int32 [s_q]; above topk counts as topk */
    const DLTensor *attn_sink;   /* fp32 [h_q] */
    const DLTensor *out;         /* [s_q, h_q, d_v], q's dtype; NULL only for plan */
    const DLTensor *max_logits;  /* fp32 [s_q, h_q], any strides; likewise */
    const DLTensor *lse;         /* fp32 [s_q, h_q], any strides; likewise */

    double softmax_scale;
    int64_t head_dim_v;
};

ATTN_API attn_status attn_mla_decode_plan(const struct attn_mla_decode_args *args,
                                          struct attn_mla_plan *plan);
ATTN_API attn_status attn_mla_decode_run(const struct attn_mla_decode_args *args,
                                         const struct attn_mla_plan *plan, void *workspace,
                                         int64_t workspace_bytes, void *stream);
ATTN_API attn_status attn_mla_sparse_decode_plan(const struct attn_mla_sparse_decode_args *args,
                                                 struct attn_mla_plan *plan);
ATTN_API attn_status attn_mla_sparse_decode_run(const struct attn_mla_sparse_decode_args *args,
                                                const struct attn_mla_plan *plan, void *workspace,
                                                int64_t workspace_bytes, void *stream);
ATTN_API attn_status attn_mla_sparse_fwd_plan(const struct attn_mla_sparse_fwd_args *args,
                                              struct attn_mla_plan *plan);
ATTN_API attn_status attn_mla_sparse_fwd_run(const struct attn_mla_sparse_fwd_args *args,
                                             const struct attn_mla_plan *plan, void *workspace,
                                             int64_t workspace_bytes, void *stream);

/* The same functions in plain scalar C with fp64 sums, CPU tensors only: see attn_mha_fwd_ref. */
ATTN_API attn_status attn_mla_decode_ref(const struct attn_mla_decode_args *args);
ATTN_API attn_status attn_mla_sparse_decode_ref(const struct attn_mla_sparse_decode_args *args);
ATTN_API attn_status attn_mla_sparse_fwd_ref(const struct attn_mla_sparse_fwd_args *args);

/* mla_cache_quantize writes row i of kv as token slots[i] of the cache, mla_cache_dequantize reads
 * it back.  A slot is page number * page + offset; one outside [0, num_pages * page) is skipped by
 * quantize and gives a row of zeros in dequantize.  The scale of a tile of 128 (V32) or 64 (MODEL1)
 * values is the least power of two >= max(max |x| / 448, 1e-4), taken over finite values; a stored
 * value is e4m3(x / scale), to nearest even; rope values are rounded to bf16.  Two rows of one
 * quantize call must not name one slot. */
struct attn_mla_cache_args {
    uint32_t size;
    int32_t threads;
    const DLTensor *kv;    /* [t, 576 or 512] bf16, fp16 or fp32, last stride 1 */
    const DLTensor *cache; /* [num_pages, page, 1, 656 or 584] bytes */
    const DLTensor *slots; /* int32 or int64 [t]; NULL: row i is slot i, t = num_pages * page */
};

ATTN_API attn_status attn_mla_cache_quantize_run(const struct attn_mla_cache_args *args,
                                                 void *stream);
ATTN_API attn_status attn_mla_cache_dequantize_run(const struct attn_mla_cache_args *args,
                                                   void *stream);

#ifdef __cplusplus
}
#endif
#endif
