// Solves with a Cholesky factor and residuals, by what they leave over in float64.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "cuda/triangular_solve.h"
#include "executor.h"
#include "guarded.h"
#include "tests.h"

namespace {

namespace cuda = rep_fast::cuda;

struct Shape {
    std::int64_t key_dim, n_columns, padding;
    bool aligned;
};

constexpr Shape kShapes[] = {{1, 1, 0, false},   {63, 2, 1, false}, {64, 64, 0, true},
                             {65, 65, 3, false}, {150, 7, 2, true}, {200, 1, 0, true}};
// More rows than the launches that move columns in and out have blocks.
constexpr Shape kManyRows = {1030, 2, 2, true};

// A factor whose upper triangle is NaN, with right-hand sides of very different sizes.
struct Problem {
    Shape shape;
    std::int64_t stride;
    Guarded<float> lower;
    Guarded<double> scale, b;

    Problem(const Shape& shape_, unsigned seed)
        : shape(shape_),
          stride(shape.key_dim + shape.padding),
          lower(static_cast<std::size_t>((shape.key_dim - 1) * stride + shape.key_dim), shape.aligned),
          scale(static_cast<std::size_t>(shape.key_dim)),
          b(static_cast<std::size_t>(shape.key_dim * shape.n_columns)) {
        std::mt19937 random(seed);
        std::normal_distribution<double> normal;
        const double size = 0.7 / std::sqrt(static_cast<double>(shape.key_dim));
        for (std::int64_t i = 0; i < shape.key_dim; ++i) {
            for (std::int64_t j = 0; j <= i; ++j) {
                const double entry = i == j ? 1.0 + std::abs(normal(random)) : size * normal(random);
                lower[static_cast<std::size_t>(i * stride + j)] = static_cast<float>(entry);
            }
            scale[static_cast<std::size_t>(i)] = std::exp(normal(random));
            for (std::int64_t j = 0; j < shape.n_columns; ++j) {
                b[static_cast<std::size_t>(i * shape.n_columns + j)] =
                    j % 3 == 2 ? 0.0 : normal(random) * (j % 3 == 0 ? 1e-200 : 1e100);
            }
        }
    }

    [[nodiscard]] double at(std::int64_t i, std::int64_t j) const {
        return j <= i ? static_cast<double>(lower[static_cast<std::size_t>(i * stride + j)]) : 0.0;
    }

    std::vector<float> inverses() const {
        Guarded<float> found(static_cast<std::size_t>(shape.key_dim * cuda::kSolveBlock));
        cuda::invert_diagonal_blocks(lower.data(), stride, shape.key_dim, found.data(), nullptr);
        return {found.begin(), found.end()};
    }

    // x, contiguous, for columns [first, first + n).
    std::vector<double> solve(std::int64_t first, std::int64_t n) const {
        const Guarded<float> inverted(inverses());
        Guarded<double> x(static_cast<std::size_t>(shape.key_dim * n));
        cuda::CholeskySolve call = {lower.data(),
                                    stride,
                                    inverted.data(),
                                    scale.data(),
                                    shape.key_dim,
                                    b.data() + first,
                                    shape.n_columns,
                                    x.data(),
                                    n,
                                    n};
        Guarded<unsigned char> scratch(cuda::scratch_bytes(call), true);
        call.scratch = scratch.data();
        cuda::cholesky_solve(call, nullptr);
        return {x.begin(), x.end()};
    }
};

void test_inverses_are_those_of_float64() {
    for (const Shape& shape : kShapes) {
        const Problem problem(shape, 3);
        const std::vector<float> found = problem.inverses();
        for (std::int64_t i = 0; i < shape.key_dim; ++i) {
            const std::int64_t first = i / cuda::kSolveBlock * cuda::kSolveBlock;
            for (std::int64_t j = 0; j < cuda::kSolveBlock; ++j) {
                // row i of L_bb⁻¹ times column j of L_bb
                double sum = 0.0, size = 0.0;
                for (std::int64_t k = j; k <= i - first; ++k) {
                    const auto entry = static_cast<double>(found[static_cast<std::size_t>(i * cuda::kSolveBlock + k)]);
                    sum += entry * problem.at(first + k, first + j);
                    size += std::abs(entry * problem.at(first + k, first + j));
                }
                EXPECT(std::abs(sum - (first + j == i ? 1.0 : 0.0)) <= 2 * 0x1p-24 * size);
                EXPECT(j <= i - first || found[static_cast<std::size_t>(i * cuda::kSolveBlock + j)] == 0.0f);
            }
        }
    }
}

// Largest row sum of |L_bb| |L_bb⁻¹|: what the products with inverses may cost beside substitution.
double block_condition(const Problem& problem) {
    const std::vector<float> inverses = problem.inverses();
    double largest = 1.0;
    for (std::int64_t i = 0; i < problem.shape.key_dim; ++i) {
        const std::int64_t first = i / cuda::kSolveBlock * cuda::kSolveBlock;
        double sum = 0.0;
        for (std::int64_t k = first; k <= i; ++k) {
            for (std::int64_t j = 0; j < cuda::kSolveBlock; ++j) {
                sum += std::abs(problem.at(i, k) *
                                static_cast<double>(inverses[static_cast<std::size_t>(k * cuda::kSolveBlock + j)]));
            }
        }
        largest = std::max(largest, sum);
    }
    return largest;
}

// |b − L Lᵀ y| against |L| |Lᵀ| |y| row by row, all divided by the column's size.
void expect_small_rest(const Problem& problem, const std::vector<double>& x, std::int64_t column) {
    const auto M = problem.shape.key_dim;
    std::vector<double> inner(static_cast<std::size_t>(M)), inner_size(static_cast<std::size_t>(M));
    const auto y = [&](std::int64_t i) {
        return x[static_cast<std::size_t>(i * problem.shape.n_columns + column)] /
               problem.scale[static_cast<std::size_t>(i)];
    };
    for (std::int64_t i = 0; i < M; ++i) {
        for (std::int64_t j = 0; j <= i; ++j) {
            inner[static_cast<std::size_t>(j)] += problem.at(i, j) * y(i);
            inner_size[static_cast<std::size_t>(j)] += std::abs(problem.at(i, j) * y(i));
        }
    }
    const double eps = 2.0 * static_cast<double>(M + 2 * cuda::kSolveBlock) * 0x1p-24 * block_condition(problem);
    double largest = 0.0;
    for (std::int64_t i = 0; i < M; ++i) {
        const auto at = static_cast<std::size_t>(i * problem.shape.n_columns + column);
        largest = std::max(largest, std::abs(problem.b[at] * problem.scale[static_cast<std::size_t>(i)]));
    }
    for (std::int64_t i = 0; i < M; ++i) {
        double rest = problem.b[static_cast<std::size_t>(i * problem.shape.n_columns + column)] *
                      problem.scale[static_cast<std::size_t>(i)];
        double size = std::abs(rest);
        for (std::int64_t j = 0; j <= i; ++j) {
            rest -= problem.at(i, j) * inner[static_cast<std::size_t>(j)];
            size += std::abs(problem.at(i, j)) * inner_size[static_cast<std::size_t>(j)];
        }
        EXPECT(std::abs(rest) <= eps * size + 0x1p-140 * largest);
    }
}

void expect_solved(const Problem& problem) {
    const std::vector<double> x = problem.solve(0, problem.shape.n_columns);
    for (std::int64_t column = 0; column < problem.shape.n_columns; ++column) {
        expect_small_rest(problem, x, column);
    }
}

void test_solves_leave_little_over() {
    unsigned seed = 0;
    for (const Shape& shape : kShapes) {
        cuda_on_cpu::set_seed(++seed);
        expect_solved(Problem(shape, seed));
    }
    expect_solved(Problem(kManyRows, 7));
}

// Wherever the entry lies that alone makes a column's size, in b or by its scale: float32 would overflow without it.
void test_size_is_that_of_the_largest_entry() {
    constexpr std::int64_t kRows = 130;
    for (const std::int64_t large : {0, 1, 63, 64, 127, 128, 129}) {
        const auto at = static_cast<std::size_t>(large);
        Problem by_entry({kRows, 1, 0, true}, 5);
        by_entry.b[at] = -1e150;
        expect_solved(by_entry);
        Problem by_scale({kRows, 1, 0, true}, 6);
        by_scale.scale[at] = 1e60;
        expect_solved(by_scale);
    }
}

void test_a_column_does_not_depend_on_others() {
    const Problem problem({130, 66, 2, true}, 4);
    const std::vector<double> together = problem.solve(0, 66);
    for (const std::int64_t column : {1, 65}) {
        const std::vector<double> alone = problem.solve(column, 1);
        for (std::int64_t i = 0; i < 130; ++i) {
            EXPECT(alone[static_cast<std::size_t>(i)] == together[static_cast<std::size_t>(i * 66 + column)]);
        }
    }
}

template <class T>
void test_residuals_are_those_of_float64(bool is_double) {
    for (const Shape& shape : kShapes) {
        std::mt19937 random(5);
        std::normal_distribution<double> normal;
        const std::int64_t M = shape.key_dim, n = shape.n_columns, stride = M + shape.padding;
        Guarded<T> matrix(static_cast<std::size_t>((M - 1) * stride + M));
        for (T& entry : matrix) {
            entry = static_cast<T>(normal(random));
        }
        const std::int64_t x_stride = n + shape.padding, rest_stride = n + 1;
        Guarded<double> x(static_cast<std::size_t>((M - 1) * x_stride + n));
        Guarded<double> rest(static_cast<std::size_t>((M - 1) * rest_stride + n));
        for (double& entry : x) {
            entry = normal(random);
        }
        for (double& entry : rest) {
            entry = normal(random);
        }
        const std::vector<double> before(rest.begin(), rest.end());
        cuda::subtract_product(
            {matrix.data(), is_double, stride, 0.25, M, x.data(), x_stride, rest.data(), rest_stride, n}, nullptr);
        for (std::int64_t i = 0; i < M; ++i) {
            for (std::int64_t j = 0; j < n; ++j) {
                const auto place = static_cast<std::size_t>(i * rest_stride + j);
                const auto own = static_cast<long double>(x[static_cast<std::size_t>(i * x_stride + j)]);
                long double wanted = static_cast<long double>(before[place]) - 0.25L * own;
                long double size = std::abs(wanted) + std::abs(own);
                for (std::int64_t k = 0; k < M; ++k) {
                    const auto term = static_cast<long double>(matrix[static_cast<std::size_t>(i * stride + k)]) *
                                      static_cast<long double>(x[static_cast<std::size_t>(k * x_stride + j)]);
                    wanted -= term;
                    size += std::abs(term);
                }
                EXPECT(std::abs(static_cast<long double>(rest[place]) - wanted) <=
                       static_cast<long double>(M + 3) * 0x1p-53L * size);
            }
        }
        for (std::int64_t i = 0; i + 1 < M; ++i) {  // between the rows nothing was written
            const auto place = static_cast<std::size_t>(i * rest_stride + n);
            EXPECT(rest[place] == before[place]);
        }
    }
}

}  // namespace

void test_triangular_solve() {
    test_inverses_are_those_of_float64();
    test_solves_leave_little_over();
    test_size_is_that_of_the_largest_entry();
    test_a_column_does_not_depend_on_others();
    test_residuals_are_those_of_float64<float>(false);
    test_residuals_are_those_of_float64<double>(true);
}
