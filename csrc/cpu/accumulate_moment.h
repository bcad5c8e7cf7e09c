// Second moment of keys: total += tril(Σ_t k_t k_tᵀ), float32 products over blocks of tokens, float64 between them.
#pragma once

#include <cstdint>

#include "core/dispatch.h"
#include "core/key_matrix.h"

namespace rep_fast {

// Tokens whose products are added in float32, 64 at a time (cpu/panel_product.h): no chain of additions is longer than
// 64 + kMomentRows / 64, so one entry's error is at most 96 · 2⁻²⁴ · Σ |k_i k_j|.
inline constexpr std::int64_t kMomentRows = 2048;

// Products of bfloat16 are exact in float32 too: kBf16 is a question of speed, except that subnormal numbers count as
// zero. kAuto takes it where this processor does clearly more of them in a second.
enum class MomentProducts { kAuto, kFloat32, kBf16 };

// keys [n_tokens, key_dim], total [key_dim, key_dim]; entries above the diagonal are left alone. The bits do not depend
// on the thread count. Throws Error when sizes do not fit together, or kBf16 is asked for where keys or level have no
// such products.
void accumulate_moment(const KeyMatrix& keys, const MatrixView<double>& total, MomentProducts products, CpuLevel level,
                       int n_threads);

// tile[48, 48] (+)= Aᵀ B of two packed panels; `first` overwrites (cpu/panel_product.h).
using MomentProduct = void (*)(const float* a, const float* b, std::int64_t depth, float* tile, bool first);
// The same for panels of pairs of bfloat16.
using MomentPairProduct = void (*)(const std::uint32_t* a, const std::uint32_t* b, std::int64_t n_pairs, float* tile,
                                   bool first);

struct AccumulateMomentKernels {
    MomentProduct product;
    MomentPairProduct pair_product = nullptr;  // where the level has it
};

const DispatchTable<AccumulateMomentKernels>& accumulate_moment_table();

namespace avx2 {
extern const AccumulateMomentKernels kAccumulateMoment;
}
namespace avx512 {
extern const AccumulateMomentKernels kAccumulateMoment;
}
namespace avx512_bf16 {
extern const MomentPairProduct kMomentPairProduct;
}

}  // namespace rep_fast
