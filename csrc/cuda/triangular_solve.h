// Few right-hand sides on a GPU: solves with a float32 Cholesky factor that read it once per pass, and the residual in
// float64. The contract is that of cpu/spd_solver.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rep_fast::cuda {

// Rows of a diagonal block, whose inverse stands in for its solve.
inline constexpr std::int64_t kSolveBlock = 64;
// Columns that share one read of the matrix; more are taken in groups.
inline constexpr std::int64_t kSolveColumns = 64;

// inverses [M, kSolveBlock] contiguous: row i holds row i of L_bb⁻¹ for the diagonal block b it is in, made in float64,
// zeros behind. Element (i, j) of L is lower[i * lower_stride + j]; entries above the diagonal are not read.
void invert_diagonal_blocks(const float* lower, std::int64_t lower_stride, std::int64_t key_dim, float* inverses,
                            void* stream);

// x = S L⁻ᵀ L⁻¹ S b in float32 for float64 columns, each brought to size one before it is rounded; S is diagonal. The
// bits of a column do not depend on the other columns.
struct CholeskySolve {
    const float* lower = nullptr;  // [key_dim, key_dim]
    std::int64_t lower_stride = 0;
    const float* inverses = nullptr;  // [key_dim, kSolveBlock], of invert_diagonal_blocks
    const double* scale = nullptr;    // [key_dim]
    std::int64_t key_dim = 0;
    const double* b = nullptr;  // [key_dim, n_columns]
    std::int64_t b_stride = 0;
    double* x = nullptr;  // [key_dim, n_columns]
    std::int64_t x_stride = 0;
    std::int64_t n_columns = 0;
    void* scratch = nullptr;  // scratch_bytes() bytes, aligned to 256
};

// Needs key_dim and n_columns only.
std::size_t scratch_bytes(const CholeskySolve& call);

void cholesky_solve(const CholeskySolve& call, void* stream);

// rest [key_dim, n_columns] becomes rest − (matrix + shift·I) x in float64.
struct Residual {
    const void* matrix = nullptr;  // [key_dim, key_dim], float64 or float32
    bool is_double = false;
    std::int64_t matrix_stride = 0;
    double shift = 0.0;
    std::int64_t key_dim = 0;
    const double* x = nullptr;
    std::int64_t x_stride = 0;
    double* rest = nullptr;
    std::int64_t rest_stride = 0;
    std::int64_t n_columns = 0;
};
void subtract_product(const Residual& call, void* stream);

}  // namespace rep_fast::cuda
