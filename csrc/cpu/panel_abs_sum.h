// Column sums of |AᵀB| for two packed panels (cpu/panel_product.h): the product lives in registers, or, where it is
// deep, in one tile on the stack.
#pragma once

#include "cpu/panel_product.h"

namespace rep_fast {

// Rows whose products stay in registers: a panel of this depth (24 KB) stays in the first-level cache.
inline constexpr std::int64_t kAbsDepth = 128;

// sums[0, kCols) += Σ_p |registers[p, ·]|.
template <class V>
[[gnu::always_inline]] inline void add_absolute(const PanelTile<V>& registers, float* sums) {
#pragma GCC unroll 4
    for (int q = 0; q < PanelTile<V>::kVectors; ++q) {
        typename V::Vector total = V::load(sums + q * V::kLanes);
#pragma GCC unroll 16
        for (int p = 0; p < PanelTile<V>::kRows; ++p) {
            total = V::add(total, V::absolute(registers.sums[p][q]));
        }
        V::store(sums + q * V::kLanes, total);
    }
}

// column_sums[48] = Σ_p |Aᵀ B|[p, ·] over the 48 columns p of A.
template <class V>
[[gnu::always_inline]] inline void panel_abs_sum(const float* a, const float* b, std::int64_t depth,
                                                 float* column_sums) {
    alignas(64) float tile[kPanel * kPanel];
    std::int64_t done = 0;
    for (; depth - done > kAbsDepth; done += kAbsDepth) {
        panel_product<V>(a + done * kPanel, b + done * kPanel, kAbsDepth, tile, done == 0);
    }
    for (std::int64_t q = 0; q < kPanel; ++q) {
        column_sums[q] = 0.0f;
    }
    for (std::int64_t q0 = 0; q0 < kPanel; q0 += PanelTile<V>::kCols) {
        for (std::int64_t p0 = 0; p0 < kPanel; p0 += PanelTile<V>::kRows) {
            PanelTile<V> registers;
            registers.multiply(a + done * kPanel + p0, b + done * kPanel + q0, depth - done);
            if (done > 0) {
                registers.add_to(tile + p0 * kPanel + q0);
            }
            add_absolute(registers, column_sums + q0);
        }
    }
}

}  // namespace rep_fast
