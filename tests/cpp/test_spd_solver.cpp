#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "core/error.h"
#include "cpu/spd_solver.h"
#include "tests.h"

namespace rep_fast::tests {
namespace {

std::size_t at(std::int64_t i, std::int64_t j, std::int64_t n) {
    return static_cast<std::size_t>(i * n + j);
}

// Unit diagonal and small entries below it, so that the solve is well conditioned; NaN above, which nobody may read.
std::vector<float> lower_matrix(std::int64_t n) {
    std::mt19937 generator(static_cast<unsigned>(n));
    std::uniform_real_distribution<float> entry(-0.5f, 0.5f);
    std::vector<float> lower(static_cast<std::size_t>(n * n), std::nanf(""));
    for (std::int64_t i = 0; i < n; ++i) {
        for (std::int64_t j = 0; j < i; ++j) {
            lower[at(i, j, n)] = entry(generator) / std::sqrt(static_cast<float>(n));
        }
        lower[at(i, i, n)] = 1.0f;
    }
    return lower;
}

void test_solve(std::int64_t n, std::int64_t n_cols, CpuLevel level) {
    const auto lower = lower_matrix(n);
    std::mt19937 generator(5);
    std::normal_distribution<float> normal;
    std::vector<double> want(static_cast<std::size_t>(n * n_cols));
    for (double& value : want) {
        value = static_cast<double>(normal(generator));
    }
    std::vector<double> scale(static_cast<std::size_t>(n));
    for (std::int64_t i = 0; i < n; ++i) {
        scale[static_cast<std::size_t>(i)] = i % 2 == 0 ? 4.0 : 0.5;
    }
    std::vector<double> half(want.size(), 0.0);  // Lᵀ x
    std::vector<double> b(want.size());
    for (std::int64_t col = 0; col < n_cols; ++col) {
        for (std::int64_t i = 0; i < n; ++i) {
            for (std::int64_t k = i; k < n; ++k) {
                half[at(i, col, n_cols)] += static_cast<double>(lower[at(k, i, n)]) * want[at(k, col, n_cols)];
            }
        }
        for (std::int64_t i = 0; i < n; ++i) {
            double sum = 0.0;
            for (std::int64_t k = 0; k <= i; ++k) {
                sum += static_cast<double>(lower[at(i, k, n)]) * half[at(k, col, n_cols)];
            }
            b[at(i, col, n_cols)] = sum / scale[static_cast<std::size_t>(i)];
        }
    }
    std::vector<float> inverses(static_cast<std::size_t>(n * kSolveBlock));
    const MatrixView<const float> factor = {lower.data(), n, n, n};
    invert_diagonal_blocks(factor, {inverses.data(), n, kSolveBlock, kSolveBlock}, 2);
    const CholeskyFactor whole = {factor, {inverses.data(), n, kSolveBlock, kSolveBlock}, scale};
    for (const int n_threads : {1, 3}) {
        std::vector<double> x(want.size());
        cholesky_solve(whole, {b.data(), n, n_cols, n_cols}, {x.data(), n, n_cols, n_cols}, level, n_threads);
        for (std::int64_t i = 0; i < n; ++i) {
            for (std::int64_t j = 0; j < n_cols; ++j) {
                // condition below 10, 2n + 96 roundings of numbers below 10
                const double found = x[at(i, j, n_cols)] / scale[static_cast<std::size_t>(i)];
                EXPECT(std::abs(found - want[at(i, j, n_cols)]) <= 100.0 * static_cast<double>(2 * n + 96) * 0x1p-24);
            }
        }
    }
}

template <class T>
void test_residual(std::int64_t n, std::int64_t n_cols, CpuLevel level) {
    std::mt19937 generator(9);
    std::uniform_int_distribution<int> whole(-9, 9);
    std::vector<T> matrix(static_cast<std::size_t>(n * n));
    for (T& entry : matrix) {
        entry = static_cast<T>(whole(generator));
    }
    std::vector<double> x(static_cast<std::size_t>(n * n_cols)), b(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) {
        x[i] = whole(generator);
        b[i] = whole(generator);
    }
    for (const int n_threads : {1, 3}) {
        std::vector<double> rest = b;
        subtract_product(MatrixView<const T>{matrix.data(), n, n, n}, 0.5, {x.data(), n, n_cols, n_cols},
                         {rest.data(), n, n_cols, n_cols}, level, n_threads);
        for (std::int64_t i = 0; i < n; ++i) {
            for (std::int64_t j = 0; j < n_cols; ++j) {
                double want = b[at(i, j, n_cols)] - 0.5 * x[at(i, j, n_cols)];
                for (std::int64_t k = 0; k < n; ++k) {
                    want -= static_cast<double>(matrix[at(i, k, n)]) * x[at(k, j, n_cols)];
                }
                EXPECT(rest[at(i, j, n_cols)] == want);  // whole numbers and halves: exact
            }
        }
    }
}

void test_refusals(CpuLevel level) {
    std::vector<float> numbers(400, 1.0f);
    std::vector<double> wide(400, 1.0);
    const MatrixView<const float> matrix = {numbers.data(), 3, 3, 3};
    const auto refused = [&](std::int64_t rows, std::int64_t cols, std::size_t n_scale) {
        try {
            cholesky_solve({matrix, {numbers.data(), 3, kSolveBlock, kSolveBlock}, {wide.data(), n_scale}},
                           {wide.data(), rows, cols, cols}, {wide.data(), 3, 2, 2}, level, 1);
        } catch (const Error&) {
            return true;
        }
        return false;
    };
    EXPECT(!refused(3, 2, 3));
    EXPECT(refused(4, 2, 3));
    EXPECT(refused(3, 1, 3));
    EXPECT(refused(3, 2, 2));
    bool found = false;
    try {
        subtract_product(matrix, 0.0, {wide.data(), 3, 2, 2}, {wide.data(), 3, 3, 3}, level, 1);
    } catch (const Error&) {
        found = true;
    }
    EXPECT(found);
}

}  // namespace

void test_spd_solver(CpuLevel level) {
    for (const std::int64_t n : {1, 7, 95, 97, 193, 225}) {
        for (const std::int64_t n_cols : {0, 1, 17, 64, 100, 256}) {
            test_solve(n, n_cols, level);
        }
        for (const std::int64_t n_cols : {0, 1, 7, 25, 100}) {
            test_residual<float>(n, n_cols, level);
            test_residual<double>(n, n_cols, level);
        }
    }
    test_refusals(level);
}

}  // namespace rep_fast::tests
