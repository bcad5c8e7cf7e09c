// Register tiles of c −= a b for the solver (cpu/spd_solver.h): V::kPanelRows rows × up to V::kPanelVectors vectors. V
// is a Simd struct of internal linkage, so every instantiation has internal linkage too.
#pragma once

#include <cstdint>

#include "cpu/spd_solver.h"

namespace rep_fast {

template <class V, int kRows, int kVectors, bool kByRows>
[[gnu::always_inline]] inline void subtract_tile(const Subtraction<typename V::Element>& task, std::int64_t row) {
    using T = typename V::Element;
    const std::int64_t row_stride = kByRows ? task.row_stride : 1;
    const std::int64_t depth_stride = kByRows ? 1 : task.depth_stride;
    typename V::Vector sums[kRows][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            sums[r][v] = V::zero();
        }
    }
    // two base pointers and multiples of the stride keep all addresses in few registers
    const T* a = task.a + row * row_stride;
    const T* b = task.b;
    for (std::int64_t k = 0; k < task.depth; ++k) {
        typename V::Vector right[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            right[v] = V::load(b + v * V::kLanes);
        }
        const T* const upper = a + 3 * row_stride;
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
            const T* const from = r < 3 ? a + r * row_stride : upper + (r - 3) * row_stride;
            const typename V::Vector left = V::broadcast(from);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                sums[r][v] = V::multiply_add(left, right[v], sums[r][v]);
            }
        }
        a += depth_stride;
        b += task.b_stride;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            T* const out = task.c + (row + r) * task.c_stride + v * V::kLanes;
            V::store(out, V::subtract(V::load(out), sums[r][v]));
        }
    }
}

template <class V, int kVectors, bool kByRows>
[[gnu::always_inline]] inline void subtract_rows(const Subtraction<typename V::Element>& task) {
    std::int64_t row = 0;
    for (; row + V::kPanelRows <= task.n_rows; row += V::kPanelRows) {
        subtract_tile<V, V::kPanelRows, kVectors, kByRows>(task, row);
    }
    for (; row < task.n_rows; ++row) {
        subtract_tile<V, 1, kVectors, kByRows>(task, row);
    }
}

template <class V, bool kByRows>
[[gnu::always_inline]] inline void subtract_vectors(const Subtraction<typename V::Element>& task,
                                                    std::int64_t n_vectors) {
    static_assert(V::kPanelVectors <= 3);
    if constexpr (V::kPanelVectors == 3) {
        if (n_vectors == 3) {
            return subtract_rows<V, 3, kByRows>(task);
        }
    }
    if (n_vectors == 2) {
        return subtract_rows<V, 2, kByRows>(task);
    }
    subtract_rows<V, 1, kByRows>(task);
}

template <class V>
[[gnu::always_inline]] inline void subtract(const Subtraction<typename V::Element>& task, std::int64_t n_cols) {
    if (task.depth_stride == 1) {
        subtract_vectors<V, true>(task, n_cols / V::kLanes);
    } else {
        subtract_vectors<V, false>(task, n_cols / V::kLanes);
    }
}

template <class V>
constexpr Subtract<typename V::Element> subtract_of(void (*run)(const Subtraction<typename V::Element>&,
                                                                std::int64_t)) {
    return {run, V::kPanelRows, V::kLanes, V::kPanelVectors * V::kLanes};
}

}  // namespace rep_fast
