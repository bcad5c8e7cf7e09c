// Second moment of 16-bit keys on a GPU: total += tril(Σ_t k_t k_tᵀ) over the tokens that count, float32 products in
// chains that are cut short, float64 between them. Keys of float32 are the library's.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace rep_fast::cuda {

// Tokens whose products the tensor cores add up in one go; they cut off where others round.
inline constexpr std::int64_t kMomentChain = 512;
// Tokens whose sums stay in float32. One entry's error is at most
// (kMomentChain · 17 / 16 · 2⁻²³ + kMomentTokens / kMomentChain · 2⁻²⁴) · Σ |k_i k_j|: a tensor core brings the 16
// products of an instruction and the sum so far to the exponent of the largest and may cut each of them off there, and
// the new sum once more. Bits that it keeps beyond float32's halve the first part each; one that adds exactly and cuts
// off once, as the executor of tests/cuda_on_cpu does, stays below (kMomentChain / 16 + 16) · 2⁻²³ there.
inline constexpr std::int64_t kMomentTokens = 4096;

struct MomentKeys {
    const void* data = nullptr;  // [n_tokens, key_dim]; element (t, i) is data[t * row_stride + i]
    DType dtype = DType::kBFloat16;
    std::int64_t n_tokens = 0;
    std::int64_t key_dim = 0;
    std::int64_t row_stride = 0;
};

// What was seen of the tokens; the counters are added to, so that they may ride along with a running total.
struct TokenCounts {
    bool* counts = nullptr;                   // [n_tokens] whether a token counts: in the mask and finite
    std::int64_t* n_counted = nullptr;        // [1]
    std::int64_t* n_nonfinite = nullptr;      // [1] tokens of the mask with a NaN or infinity
    std::int64_t* first_nonfinite = nullptr;  // [1] the lowest `first_id` + t among them
};

// `mask` [n_tokens] may be nullptr: all tokens. float32, bfloat16 or float16 keys.
void count_tokens(const MomentKeys& keys, const bool* mask, std::int64_t first_id, const TokenCounts& found,
                  void* stream);

// total [key_dim, key_dim], element (i, j) is total[i * total_stride + j]; entries above the diagonal are left alone.
// `counts` [n_tokens] may be nullptr: all tokens. Tokens that do not count are not read. Keys bfloat16 or float16. The
// bits depend neither on the schedule nor on the device's size.
void accumulate_moment(const MomentKeys& keys, const bool* counts, double* total, std::int64_t total_stride,
                       void* stream);

}  // namespace rep_fast::cuda
