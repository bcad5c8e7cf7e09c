// What SpdSolver does between two looks at its residual: solves with a float32 Cholesky factor, and the residual in
// float64. Both are products with few columns: a matrix of M² entries is read once and each entry meets n numbers.
#pragma once

#include <cstdint>
#include <span>

#include "core/dispatch.h"
#include "core/matrix_view.h"

namespace rep_fast {

// Rows of a diagonal block, whose inverse stands in for its solve.
inline constexpr std::int64_t kSolveBlock = 96;
// inverses [M, kSolveBlock]: row i holds row i of −L_bb⁻¹ for the diagonal block b it is in, made in float64, zeros
// behind. lower [M, M], entries above the diagonal are not read.
void invert_diagonal_blocks(const MatrixView<const float>& lower, const MatrixView<float>& inverses, int n_threads);

// x [M, n] = S L⁻ᵀ L⁻¹ S b in float32 for float64 columns b [M, n], each brought to size one before it is rounded; S is
// diagonal, scale its M entries. lower as above. The bits of a column depend neither on the thread count nor on the
// other columns. Throws Error when sizes do not fit together.
struct CholeskyFactor {
    MatrixView<const float> lower;     // [M, M]
    MatrixView<const float> inverses;  // [M, kSolveBlock]
    std::span<const double> scale;     // M
};
void cholesky_solve(const CholeskyFactor& factor, const MatrixView<const double>& b, const MatrixView<double>& x,
                    CpuLevel level, int n_threads);

// rest [M, n] becomes rest − (matrix + shift·I) x in float64, matrix [M, M] float32 or float64. Bits and errors as
// above.
template <class T>
void subtract_product(const MatrixView<const T>& matrix, double shift, const MatrixView<const double>& x,
                      const MatrixView<double>& rest, CpuLevel level, int n_threads);
extern template void subtract_product(const MatrixView<const float>&, double, const MatrixView<const double>&,
                                      const MatrixView<double>&, CpuLevel, int);
extern template void subtract_product(const MatrixView<const double>&, double, const MatrixView<const double>&,
                                      const MatrixView<double>&, CpuLevel, int);

// c[n_rows, n_cols] −= a b. Entry (r, k) of a is a[r · row_stride + k · depth_stride], one of which is 1.
template <class T>
struct Subtraction {
    const T* a;
    std::int64_t row_stride;
    std::int64_t depth_stride;
    const T* b;
    std::int64_t b_stride;
    std::int64_t depth;
    T* c;
    std::int64_t c_stride;
    std::int64_t n_rows;
};

// One register tile's width of c at a time: columns [0, n_cols), at most `columns_at_once` and a multiple of the lanes;
// every entry takes its products in ascending order, so that neither rows nor columns taken together change a bit.
template <class T>
struct Subtract {
    void (*run)(const Subtraction<T>& task, std::int64_t n_cols);
    std::int64_t rows_at_once;
    std::int64_t lanes;
    std::int64_t columns_at_once;
};

struct SpdSolverKernels {
    Subtract<float> float32;
    Subtract<double> float64;
    void (*widen)(const float* from, std::int64_t n, double* to);
};

const DispatchTable<SpdSolverKernels>& spd_solver_table();

namespace avx2 {
extern const SpdSolverKernels kSpdSolver;
}
namespace avx512 {
extern const SpdSolverKernels kSpdSolver;
}

}  // namespace rep_fast
