// The tiled pass of the `zabs` score: sums[q] = Σ_p |Σ_t a[t, p] b[t, q]|, the product AᵀB never stored.
#pragma once

#include <cstdint>
#include <span>

#include "core/dispatch.h"
#include "core/matrix_view.h"

namespace rep_fast {

// a [n_tokens, P], b [n_tokens, Q], sums Q. Float32 inside a tile of 48 columns of a, float64 between tiles; the bits
// do not depend on the thread count. Throws Error when sizes do not fit together.
void abs_product_sum(const MatrixView<const float>& a, const MatrixView<const float>& b, std::span<double> sums,
                     CpuLevel level, int n_threads);

struct PackedScoresKernels {
    // column_sums[48] = Σ_p |AᵀB|[p, ·] of two packed panels [depth, 48] (cpu/panel_product.h).
    void (*abs_sum)(const float* a, const float* b, std::int64_t depth, float* column_sums);
};

const DispatchTable<PackedScoresKernels>& packed_scores_table();

namespace avx2 {
extern const PackedScoresKernels kPackedScores;
}
namespace avx512 {
extern const PackedScoresKernels kPackedScores;
}

}  // namespace rep_fast
