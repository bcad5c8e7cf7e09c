// Products AᵀB of two tall matrices, one tile of 48 × 48 at a time: A and B are packed in panels of 48 columns, each
// [depth][48] float32, the last one padded with zeros. Entry (p, q) takes its products in ascending row order.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/matrix_view.h"

namespace rep_fast {

inline constexpr std::int64_t kPanel = 48;

constexpr std::int64_t panels_of(std::int64_t n_cols) {
    return (n_cols + kPanel - 1) / kPanel;
}

// Packs columns [col, col + 48) of rows [row, row + n_rows), widened; columns past the end become zeros.
template <class T>
inline void pack_panel(const MatrixView<const T>& matrix, std::int64_t row, std::int64_t n_rows, std::int64_t col,
                       float* panel) {
    const std::int64_t n_cols = matrix.cols - col < kPanel ? matrix.cols - col : kPanel;
    for (std::int64_t i = 0; i < n_rows; ++i) {
        const T* const from = matrix.row(row + i) + col;
        float* const to = panel + i * kPanel;
        for (std::int64_t j = 0; j < n_cols; ++j) {
            to[j] = to_float(from[j]);
        }
        for (std::int64_t j = n_cols; j < kPanel; ++j) {
            to[j] = 0.0f;
        }
    }
}

// Register tile: V::kPanelRows columns of A × V::kPanelVectors vectors of columns of B. V is a Simd struct of internal
// linkage, so every instantiation has internal linkage too.
template <class V>
struct PanelTile {
    typename V::Vector sums[V::kPanelRows][V::kPanelVectors];

    [[gnu::always_inline]] inline void clear() {
        for (int p = 0; p < V::kPanelRows; ++p) {
            for (int q = 0; q < V::kPanelVectors; ++q) {
                sums[p][q] = V::zero();
            }
        }
    }

    [[gnu::always_inline]] inline void multiply(const float* a, const float* b, std::int64_t depth) {
        for (std::int64_t k = 0; k < depth; ++k) {
            typename V::Vector right[V::kPanelVectors];
            for (int q = 0; q < V::kPanelVectors; ++q) {
                right[q] = V::load(b + k * kPanel + q * V::kLanes);
            }
            for (int p = 0; p < V::kPanelRows; ++p) {
                const typename V::Vector left = V::broadcast(a + k * kPanel + p);
                for (int q = 0; q < V::kPanelVectors; ++q) {
                    sums[p][q] = V::multiply_add(left, right[q], sums[p][q]);
                }
            }
        }
    }
};

// tile[48][48] (+)= Aᵀ B of two packed panels; `first` overwrites. Of the rows at least the first n_rows are made.
template <class V>
[[gnu::always_inline]] inline void panel_product(const float* a, const float* b, std::int64_t depth, float* tile,
                                                 bool first, std::int64_t n_rows = kPanel) {
    constexpr std::int64_t kCols = V::kPanelVectors * V::kLanes;
    static_assert(kPanel % V::kPanelRows == 0 && kPanel % kCols == 0, "register tiles must divide the panel");
    for (std::int64_t q0 = 0; q0 < kPanel; q0 += kCols) {
        for (std::int64_t p0 = 0; p0 < n_rows; p0 += V::kPanelRows) {
            float* const out = tile + p0 * kPanel + q0;
            PanelTile<V> registers;
            registers.clear();
            if (!first) {
                for (int p = 0; p < V::kPanelRows; ++p) {
                    for (int q = 0; q < V::kPanelVectors; ++q) {
                        registers.sums[p][q] = V::load(out + p * kPanel + q * V::kLanes);
                    }
                }
            }
            registers.multiply(a + p0, b + q0, depth);
            for (int p = 0; p < V::kPanelRows; ++p) {
                for (int q = 0; q < V::kPanelVectors; ++q) {
                    V::store(out + p * kPanel + q * V::kLanes, registers.sums[p][q]);
                }
            }
        }
    }
}

// Rows multiplied at a time: two panel pieces of this depth (24 KB) stay in the first-level cache.
inline constexpr std::int64_t kPanelDepth = 64;

// column_sums[48] = Σ_p |Aᵀ B|[p, ·] over the 48 columns p of A; one tile of the product exists at a time.
template <class V>
[[gnu::always_inline]] inline void panel_abs_sum(const float* a, const float* b, std::int64_t depth,
                                                 float* column_sums) {
    alignas(64) float tile[kPanel * kPanel];
    std::int64_t k = 0;
    do {
        const std::int64_t rows = depth - k < kPanelDepth ? depth - k : kPanelDepth;
        panel_product<V>(a + k * kPanel, b + k * kPanel, rows, tile, k == 0);
        k += rows;
    } while (k < depth);
    for (std::int64_t q = 0; q < kPanel; q += V::kLanes) {
        typename V::Vector total = V::zero();
        for (std::int64_t p = 0; p < kPanel; ++p) {
            total = V::add(total, V::absolute(V::load(tile + p * kPanel + q)));
        }
        V::store(column_sums + q, total);
    }
}

}  // namespace rep_fast
