/* SPDX-License-Identifier: MIT
 *
 * One random problem of mha_fwd: shapes, lengths, tensors in guarded memory, and the argument
 * struct.  Whatever a correct implementation has no business reading is poison: NaN in cache
 * slots, padding and rows that are not live, wild numbers in index entries that are not live.
 */
#ifndef ATTN_CHECK_CASE_H
#define ATTN_CHECK_CASE_H

#include "attn/attn.h"
#include "check_attention.h"

/* The tensors of attn_mha_fwd_args in its order. */
/* clang-format off */
#define MHA_ARGUMENTS(X)                                                                           \
    X(q) X(k) X(v) X(k_new) X(v_new) X(qv) X(out) X(lse) X(out_accum) X(lse_accum)                 \
    X(cu_seqlens_q) X(cu_seqlens_k) X(cu_seqlens_k_new) X(seqused_q) X(seqused_k) X(page_table)    \
    X(kv_batch_idx) X(leftpad_k) X(rotary_cos) X(rotary_sin) X(seqlens_rotary) X(q_descale)        \
    X(k_descale) X(v_descale) X(sinks) X(cp_tot_seqused_k) X(scheduler_metadata)
/* clang-format on */

enum mha_argument {
#define X(name) ARG_##name,
    MHA_ARGUMENTS(X)
#undef X
        MHA_ARGUMENT_COUNT
};

extern const char *const mha_argument_name[MHA_ARGUMENT_COUNT];
const DLTensor **mha_argument_slot(struct attn_mha_fwd_args *args, int argument);

/* What a case may be made of; each is also a test of its own. */
/* clang-format off */
#define MHA_FEATURES(X)                                                                            \
    X(causal) X(window) X(chunk) X(softcap) X(sinks) X(qv) X(descale) X(packed_q) X(packed_k)      \
    X(seqused_q) X(seqused_k) X(paged) X(batch_idx) X(leftpad) X(append) X(append_packed)          \
    X(rotary) X(cp) X(splits) X(strided) X(pathological)
/* clang-format on */

enum mha_feature {
#define X(name) FEATURE_INDEX_##name,
    MHA_FEATURES(X)
#undef X
        MHA_FEATURE_COUNT
};
enum {
#define X(name) WITH_##name = 1 << FEATURE_INDEX_##name,
    MHA_FEATURES(X)
#undef X
};

extern const char *const mha_feature_name[MHA_FEATURE_COUNT];

#define CASE_BATCH 6

struct mha_seq {
    int64_t q_off, q_space;  /* first row of packed q; rows the sequence has */
    int64_t q_len;           /* and live ones */
    int64_t k_off, k_cached; /* first row of packed k; keys before the append, padding included */
    int64_t k_space;         /* positions the sequence has: its segment or the capacity */
    int64_t pad, new_off, new_len;
    int64_t row; /* of the cache or page table */
    int64_t rotary;
    int64_t total;     /* context parallel: global keys */
    int64_t first_row; /* of the case's live rows: row (i, h) is first_row + i h_q + h */
};

struct mha_tensor {
    DLTensor t;
    int64_t shape[5], strides[5];
    struct check_buffer buffer;
    enum attn_dtype dtype; /* of its values; index tensors: ATTN_F32, by their size */
};

struct mha_case {
    unsigned features;
    enum attn_dtype dtype, out_dtype;
    int64_t b, h_q, h_k, d_qk, d_v;
    int64_t s_q, s_k, s_new; /* static maxima: extents, or max_seqlen, or capacity */
    int64_t t_q, t_k, t_new; /* packed totals */
    int64_t page, max_pages, num_pages, rows;
    int64_t ro, r;
    bool shared; /* sequences may share cache rows or pages */
    int pathology;
    bool hidden; /* keys that no row sees are NaN */
    struct mha_seq seq[CASE_BATCH];
    int64_t live_rows;
    struct mha_tensor tensor[MHA_ARGUMENT_COUNT];
    struct attn_mha_fwd_args args;
    char *k_before, *v_before; /* the caches as they were made */
};

/* A case of these features, and of no others.  Features that exclude each other are dropped. */
void mha_case_make(struct check_random *r, enum attn_dtype dtype, unsigned features,
                   struct mha_case *c);

/* One line of shapes and features. */
const char *mha_case_text(const struct mha_case *c, char text[512]);

char *tensor_at(const struct mha_tensor *t, int64_t i0, int64_t i1, int64_t i2, int64_t i3);
char *mha_q_at(const struct mha_case *c, int argument, int64_t b, int64_t i, int64_t h);
char *mha_out_at(const struct mha_case *c, int64_t b, int64_t i, int64_t h);
float *mha_lse_at(const struct mha_case *c, int64_t b, int64_t i, int64_t h);
/* Cache position x of sequence b in k or v; token t of k_new or v_new. */
char *mha_cache_at(const struct mha_case *c, int argument, int64_t b, int64_t x, int64_t h);
char *mha_new_at(const struct mha_case *c, int argument, int64_t b, int64_t t, int64_t h);

/* The mask, by the predicates that define it. */
bool mha_visible(const struct mha_case *c, int64_t b, int64_t i, int64_t j);
int64_t mha_keys(const struct mha_case *c, int64_t b);

/* A tensor of the case: rank, extents and (strided) strides with gaps and another order. */
void mha_tensor_make(struct check_random *r, struct mha_case *c, int argument, DLDataType type,
                     int ndim, const int64_t *shape, bool strided);

/* Gives cached keys that no row of their sequence sees this value, unless sequences share rows. */
void mha_case_hide(struct mha_case *c, float value);

/* Caches, out and lse as they were made; accumulators of so many splits (1: none). */
void mha_case_restore(struct mha_case *c);
void mha_case_accum(struct mha_case *c, int64_t splits);

/* The oracle: every live row's expected result, and the caches after the append. */
struct mha_answer {
    struct attention_expect rows;
    char *k_after, *v_after;
};
void mha_case_answer(const struct mha_case *c, struct mha_answer *answer);

/* Compares what a run left in the case's tensors with the answer; false and `why` if not equal. */
bool mha_case_compare(const struct mha_case *c, const struct mha_answer *answer, char why[400]);

#endif
