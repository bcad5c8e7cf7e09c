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

// Rows multiplied at a time: two panel pieces of this depth (24 KB) stay in the first-level cache, and chains of
// additions are no longer.
inline constexpr std::int64_t kPanelDepth = 64;

// Packs columns [col, col + 48) of rows [row, row + n_rows), widened; columns past the end become zeros.
template <class T>
inline void pack_panel(const MatrixView<const T>& matrix, std::int64_t row, std::int64_t n_rows, std::int64_t col,
                       float* panel) {
    const std::int64_t n_cols = matrix.cols - col < kPanel ? matrix.cols - col : kPanel;
    for (std::int64_t i = 0; i < n_rows; ++i) {
        const T* const from = matrix.row(row + i) + col;
        float* const to = panel + i * kPanel;
        if (n_cols == kPanel) {  // a constant number of columns becomes vectors
            for (std::int64_t j = 0; j < kPanel; ++j) {
                to[j] = to_float(from[j]);
            }
            continue;
        }
        for (std::int64_t j = 0; j < n_cols; ++j) {
            to[j] = to_float(from[j]);
        }
        for (std::int64_t j = n_cols; j < kPanel; ++j) {
            to[j] = 0.0f;
        }
    }
}

// As pack_panel, with two rows beside each other: [⌈n_rows / 2⌉][48] pairs, the even row in the low half. An odd last
// row has a zero beside it.
inline void pack_pairs(const MatrixView<const BFloat16>& matrix, std::int64_t row, std::int64_t n_rows,
                       std::int64_t col, std::uint32_t* panel) {
    const std::int64_t n_cols = matrix.cols - col < kPanel ? matrix.cols - col : kPanel;
    for (std::int64_t i = 0; i < n_rows; i += 2) {
        const BFloat16* const even = matrix.row(row + i) + col;
        const BFloat16* const odd = i + 1 < n_rows ? matrix.row(row + i + 1) + col : nullptr;
        std::uint32_t* const to = panel + i / 2 * kPanel;
        for (std::int64_t j = 0; j < n_cols; ++j) {
            to[j] = even[j].bits | (odd == nullptr ? 0u : static_cast<std::uint32_t>(odd[j].bits) << 16);
        }
        for (std::int64_t j = n_cols; j < kPanel; ++j) {
            to[j] = 0;
        }
    }
}

// Register tile: V::kPanelRows columns of A × V::kPanelVectors vectors of columns of B. V is a Simd struct of internal
// linkage, so every instantiation has internal linkage too; V::Element is what the panels hold, V::Factor a vector of
// them.
template <class V>
struct PanelTile {
    static constexpr int kRows = V::kPanelRows;
    static constexpr int kVectors = V::kPanelVectors;
    static constexpr std::int64_t kCols = kVectors * V::kLanes;
    static_assert(kPanel % kRows == 0 && kPanel % kCols == 0, "register tiles must divide the panel");

    typename V::Vector sums[kRows][kVectors];

    // a, b: where the tile's columns begin in their panels.
    [[gnu::always_inline]] inline void multiply(const typename V::Element* a, const typename V::Element* b,
                                                std::int64_t depth) {
#pragma GCC unroll 16
        for (int p = 0; p < kRows; ++p) {
#pragma GCC unroll 4
            for (int q = 0; q < kVectors; ++q) {
                sums[p][q] = V::zero();
            }
        }
        for (std::int64_t k = 0; k < depth; ++k) {
            typename V::Factor right[kVectors];
#pragma GCC unroll 4
            for (int q = 0; q < kVectors; ++q) {
                right[q] = V::load(b + k * kPanel + q * V::kLanes);
            }
#pragma GCC unroll 16
            for (int p = 0; p < kRows; ++p) {
                const typename V::Factor left = V::broadcast(a + k * kPanel + p);
#pragma GCC unroll 4
                for (int q = 0; q < kVectors; ++q) {
                    sums[p][q] = V::multiply_add(left, right[q], sums[p][q]);
                }
            }
        }
    }

    // out: row stride 48.
    [[gnu::always_inline]] inline void add_to(const float* out) {
#pragma GCC unroll 16
        for (int p = 0; p < kRows; ++p) {
#pragma GCC unroll 4
            for (int q = 0; q < kVectors; ++q) {
                sums[p][q] = V::add(V::load(out + p * kPanel + q * V::kLanes), sums[p][q]);
            }
        }
    }

    [[gnu::always_inline]] inline void store(float* out) const {
#pragma GCC unroll 16
        for (int p = 0; p < kRows; ++p) {
#pragma GCC unroll 4
            for (int q = 0; q < kVectors; ++q) {
                V::store(out + p * kPanel + q * V::kLanes, sums[p][q]);
            }
        }
    }
};

// tile[48][48] (+)= Aᵀ B of two packed panels; `first` overwrites. Of the rows at least the first n_rows are made.
template <class V>
[[gnu::always_inline]] inline void panel_product(const typename V::Element* a, const typename V::Element* b,
                                                 std::int64_t depth, float* tile, bool first,
                                                 std::int64_t n_rows = kPanel) {
    for (std::int64_t q0 = 0; q0 < kPanel; q0 += PanelTile<V>::kCols) {
        for (std::int64_t p0 = 0; p0 < n_rows; p0 += PanelTile<V>::kRows) {
            float* const out = tile + p0 * kPanel + q0;
            PanelTile<V> registers;
            registers.multiply(a + p0, b + q0, depth);
            if (!first) {
                registers.add_to(out);
            }
            registers.store(out);
        }
    }
}

}  // namespace rep_fast
