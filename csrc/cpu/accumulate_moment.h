// Second moment of keys: total += tril(Σ_t k_t k_tᵀ), float32 products over blocks of tokens, float64 between them.
#pragma once

#include <cstdint>

#include "core/dispatch.h"
#include "core/key_matrix.h"

namespace rep_fast {

// Tokens whose products are added in float32: one entry's error is at most kMomentRows · 2⁻²⁴ · Σ |k_i k_j|.
inline constexpr std::int64_t kMomentRows = 1024;

// keys [n_tokens, key_dim], total [key_dim, key_dim]; entries above the diagonal are left alone. The bits do not depend
// on the thread count. Throws Error when sizes do not fit together.
void accumulate_moment(const KeyMatrix& keys, const MatrixView<double>& total, CpuLevel level, int n_threads);

struct AccumulateMomentKernels {
    // tile[48, 48] (+)= Aᵀ B of two packed panels [depth, 48]; `first` overwrites (cpu/panel_product.h).
    void (*product)(const float* a, const float* b, std::int64_t depth, float* tile, bool first);
};

const DispatchTable<AccumulateMomentKernels>& accumulate_moment_table();

namespace avx2 {
extern const AccumulateMomentKernels kAccumulateMoment;
}
namespace avx512 {
extern const AccumulateMomentKernels kAccumulateMoment;
}

}  // namespace rep_fast
