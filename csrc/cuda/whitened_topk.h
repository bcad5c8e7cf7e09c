// The collision scan on a GPU: a library product makes approximate scores of a chunk of keys that stays in L2, and the
// kernels here turn them into exact hits. See cpu/whitened_topk.h for the contract.
//
// Error of an approximate score: ‖k‖ · margin(query) + slack(query), where the caller puts into margin(query) what
// rounding the query costs, ‖w − ŵ‖, and the product's own accumulation, γ‖w‖, and into slack(query) what underflows.
// Tensor cores cut off addends instead of rounding them, so γ must allow for two units in the last place per addition.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace rep_fast::cuda {

// Rows of keys on the device; element (i, j) is data[i * row_stride + j].
struct KeyChunk {
    const void* data = nullptr;
    DType dtype = DType::kBFloat16;
    std::int64_t n_keys = 0;
    std::int64_t key_dim = 0;
    std::int64_t row_stride = 0;
};

// One entry per key of the chunk and two counters for the whole scan, all on the device.
struct KeyNorms {
    float* upper = nullptr;                   // [n_keys] not below ‖k‖; infinite where the row is not finite
    std::int64_t* n_nonfinite = nullptr;      // [1] += rows with a NaN or infinity
    std::int64_t* first_nonfinite = nullptr;  // [1] the lowest id among them, so that no block has to be waited for
};

// Position p is excluded for query i if last_tokens[i] occurs at p, p−1, …, p−window inside p's sequence. Positions are
// those of the block, of which the chunk may be a part; before its row 0 lie `n_lookback` tokens, oldest first.
struct LastTokens {
    const std::int64_t* token_ids = nullptr;  // [block rows]; nullptr: the rule is off
    const std::int64_t* sequence_starts = nullptr;
    std::int64_t n_sequences = 0;
    const std::int64_t* last_tokens = nullptr;  // [n_queries]
    const std::int64_t* lookback = nullptr;
    std::int64_t n_lookback = 0;
    std::int64_t window = 0;
};

// Row p of the block is excluded for the queries subjects[indptr[p]], …, subjects[indptr[p + 1] − 1].
struct ListedPairs {
    const std::int64_t* indptr = nullptr;  // [block rows + 1]; nullptr: the rule is off
    const std::int64_t* subjects = nullptr;
};

// Sums over products of rows in whole steps (quantised_rows.h): a score is key_step · query_step · sum, off by at most
// key_step · margin(query) + query_step · key_margin.
struct Int8Sums {
    const std::int32_t* sums = nullptr;  // [n_queries, n_keys]; nullptr: the scores are those of a float32 product
    std::int64_t stride = 0;
    const float* key_steps = nullptr;    // [n_keys]
    const float* key_margins = nullptr;  // [n_keys]; NaN: the row is left out
    const float* query_steps = nullptr;  // [n_queries]
};

struct Selection {
    KeyChunk keys;
    const float* key_norms = nullptr;    // [n_keys], of `measure_keys`
    std::int64_t first_row = 0;          // of the chunk in its block
    std::int64_t first_id = 0;           // id of the block's row 0
    const float* approximate = nullptr;  // [n_queries, n_keys]
    std::int64_t approximate_stride = 0;
    Int8Sums int8 = {};              // in place of `key_norms` and `approximate`
    const float* queries = nullptr;  // [n_queries, key_dim]
    std::int64_t query_stride = 0;
    const float* query_margins = nullptr;  // [n_queries]; NaN: the query is left out
    const float* query_slacks = nullptr;   // [n_queries]
    std::int64_t n_queries = 0;
    LastTokens last_token = {};
    ListedPairs pairs = {};
    double* scores = nullptr;     // [n_queries, k], descending, contiguous
    std::int64_t* ids = nullptr;  // [n_queries, k], −1 where there is no hit
    std::int64_t k = 0;
};

// ‖k‖ of every key, rounded up, and whether it is finite. `first_id` is that of the chunk's row 0.
void measure_keys(const KeyChunk& keys, std::int64_t first_id, const KeyNorms& norms, void* stream);

// Hits per query that a block's shared memory has room for.
std::int64_t largest_k();

// Puts every key of the chunk that belongs there into the running top k. The result does not depend on how the stream
// was cut into chunks. Throws Error for k > largest_k().
void select_hits(const Selection& selection, void* stream);

}  // namespace rep_fast::cuda
