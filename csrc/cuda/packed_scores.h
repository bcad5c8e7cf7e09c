// The tiled pass of the `zabs` score on a GPU: sums[q] = Σ_p |Σ_t a[t, p] b[t, q]|, the product AᵀB never stored. With
// a the inputs divided by the rows' deviations and b the centred upstream gradient, both from float64 moments, this is
// the sum of standardised gradients (see rep_fast/ops/packed_scores.py).
#pragma once

#include <cstddef>
#include <cstdint>

namespace rep_fast::cuda {

// Element (t, p) of a is a[t * a_stride + p]. Products and the sums of up to 8 absolute values are float32, sums of
// those float64; the bits depend on the sizes alone.
struct AbsProductCall {
    const float* a = nullptr;  // [n_tokens, n_left]
    std::int64_t a_stride = 0;
    const float* b = nullptr;  // [n_tokens, n_right]
    std::int64_t b_stride = 0;
    std::int64_t n_tokens = 0;
    std::int64_t n_left = 0;
    std::int64_t n_right = 0;
    double* sums = nullptr;     // [n_right], written whole
    double* scratch = nullptr;  // scratch_bytes() bytes
};

// Needs the sizes only.
std::size_t scratch_bytes(const AbsProductCall& call);

void abs_product_sum(const AbsProductCall& call, void* stream);

}  // namespace rep_fast::cuda
