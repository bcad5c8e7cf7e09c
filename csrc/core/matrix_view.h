// Non-owning row-major matrix whose rows may be padded.
#pragma once

#include <cstdint>

namespace rep_fast {

// T may be const. Element (i, j) is data[i * row_stride + j]; columns are always contiguous.
template <class T>
struct MatrixView {
    T* data = nullptr;
    std::int64_t rows = 0;
    std::int64_t cols = 0;
    std::int64_t row_stride = 0;

    [[gnu::always_inline]] T* row(std::int64_t i) const { return data + i * row_stride; }
};

}  // namespace rep_fast
