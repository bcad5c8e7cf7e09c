// Sums of absolute products against float64, over sizes around the tiles.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "cuda/packed_scores.h"
#include "executor.h"
#include "guarded.h"
#include "tests.h"

namespace {

namespace cuda = rep_fast::cuda;

struct Shape {
    std::int64_t n_tokens, n_left, n_right, padding;
    bool aligned;
};

// Numbers from a normal distribution, ending at the guard or beginning where 16-byte copies may.
Guarded<float> normal_matrix(std::int64_t rows, std::int64_t cols, std::int64_t stride, bool aligned,
                             std::mt19937& random) {
    std::normal_distribution<float> normal;
    Guarded<float> matrix(rows == 0 ? 0 : static_cast<std::size_t>((rows - 1) * stride + cols), aligned);
    for (std::int64_t i = 0; i < rows * cols; ++i) {
        matrix[static_cast<std::size_t>(i / cols * stride + i % cols)] = normal(random);
    }
    return matrix;
}

struct Problem {
    Shape shape;
    std::mt19937 random;
    std::int64_t a_stride, b_stride;
    Guarded<float> a, b;

    Problem(const Shape& shape_, unsigned seed)
        : shape(shape_),
          random(seed),
          a_stride(shape.n_left + shape.padding),
          b_stride(shape.n_right + shape.padding),
          a(normal_matrix(shape.n_tokens, shape.n_left, a_stride, shape.aligned, random)),
          b(normal_matrix(shape.n_tokens, shape.n_right, b_stride, shape.aligned, random)) {}

    std::vector<double> run() {
        Guarded<double> sums(static_cast<std::size_t>(shape.n_right));
        cuda::AbsProductCall call = {a.data(),     a_stride,      b.data(),    b_stride, shape.n_tokens,
                                     shape.n_left, shape.n_right, sums.data(), nullptr};
        Guarded<double> scratch(cuda::scratch_bytes(call) / sizeof(double));
        call.scratch = scratch.data();
        cuda::abs_product_sum(call, nullptr);
        return {sums.begin(), sums.end()};
    }

    void expect_reference(const std::vector<double>& sums) const {
        // each product is a chain of n_tokens fused multiply-adds, then eight absolute values are added
        const double eps = static_cast<double>(shape.n_tokens + 9) * 0x1p-24;
        for (std::int64_t q = 0; q < shape.n_right; ++q) {
            double wanted = 0.0, size = 0.0;
            for (std::int64_t p = 0; p < shape.n_left; ++p) {
                double product = 0.0;
                for (std::int64_t t = 0; t < shape.n_tokens; ++t) {
                    const double term = static_cast<double>(a[static_cast<std::size_t>(t * a_stride + p)]) *
                                        static_cast<double>(b[static_cast<std::size_t>(t * b_stride + q)]);
                    product += term;
                    size += std::abs(term);
                }
                wanted += std::abs(product);
            }
            EXPECT(std::abs(sums[static_cast<std::size_t>(q)] - wanted) <= eps * size);
        }
    }
};

void test_sums_are_those_of_float64() {
    const Shape shapes[] = {{1, 1, 1, 0, false},     {17, 129, 5, 1, false}, {16, 128, 128, 0, true},
                            {33, 300, 130, 4, true}, {3, 7, 257, 2, true},   {40, 127, 129, 0, false},
                            {5, 127, 131, 1, true},  {0, 5, 3, 0, true},     {2, 0, 3, 0, false}};
    unsigned seed = 0;
    for (const Shape& shape : shapes) {
        Problem problem(shape, ++seed);
        cuda_on_cpu::set_seed(seed);
        problem.expect_reference(problem.run());
    }
}

void test_bits_do_not_depend_on_the_schedule() {
    Problem problem({20, 260, 9, 0, true}, 3);
    const std::vector<double> first = problem.run();
    for (std::uint64_t seed = 10; seed < 13; ++seed) {
        cuda_on_cpu::set_seed(seed);
        EXPECT(problem.run() == first);
    }
}

// More tiles of columns than blocks are wanted: one block walks over several tiles of rows.
void test_a_block_takes_several_tiles() {
    Problem problem({2, 260, 128 * 300, 0, true}, 4);
    problem.expect_reference(problem.run());
}

// What a thread hands on from its first tile is 2²⁴, to which float32 could not add the 1 of the next.
void test_sums_over_tiles_are_float64() {
    constexpr std::int64_t kLeft = 257, kRight = 128 * 300;
    Problem problem({1, kLeft, kRight, 0, true}, 5);
    std::fill(problem.a.begin(), problem.a.end(), 0x1p21f);
    problem.a[kLeft - 1] = 1.0f;
    std::fill(problem.b.begin(), problem.b.end(), 1.0f);
    for (const double sum : problem.run()) {
        EXPECT(sum == 0x1p21 * (kLeft - 1) + 1.0);
    }
}

}  // namespace

void test_packed_scores() {
    test_sums_are_those_of_float64();
    test_bits_do_not_depend_on_the_schedule();
    test_a_block_takes_several_tiles();
    test_sums_over_tiles_are_float64();
}
