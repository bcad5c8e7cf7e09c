#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "core/error.h"
#include "cpu/packed_scores.h"
#include "tests.h"

namespace rep_fast::tests {
namespace {

// Small whole numbers, whose sums of products are exact; exactly as many as needed, for the address sanitizer.
std::vector<float> whole_numbers(std::int64_t count, unsigned seed) {
    std::mt19937 generator(seed);
    std::uniform_int_distribution<int> whole(-9, 9);
    std::vector<float> numbers(static_cast<std::size_t>(count));
    for (float& number : numbers) {
        number = static_cast<float>(whole(generator));
    }
    return numbers;
}

void test_shape(std::int64_t n, std::int64_t left, std::int64_t right, CpuLevel level) {
    const auto a = whole_numbers(n * left, 1);
    const auto b = whole_numbers(n * right, 2);
    for (const int n_threads : {1, 3}) {
        std::vector<double> sums(static_cast<std::size_t>(right), -1.0);
        abs_product_sum({a.data(), n, left, left}, {b.data(), n, right, right}, sums, level, n_threads);
        for (std::int64_t j = 0; j < right; ++j) {
            double want = 0.0;
            for (std::int64_t i = 0; i < left; ++i) {
                double entry = 0.0;
                for (std::int64_t t = 0; t < n; ++t) {
                    entry += static_cast<double>(a[static_cast<std::size_t>(t * left + i)]) *
                             static_cast<double>(b[static_cast<std::size_t>(t * right + j)]);
                }
                want += std::abs(entry);
            }
            EXPECT(sums[static_cast<std::size_t>(j)] == want);
        }
    }
}

}  // namespace

void test_packed_scores(CpuLevel level) {
    test_shape(0, 3, 5, level);
    for (const std::int64_t n : {1, 2, 127, 129, 257}) {
        test_shape(n, 1, 1, level);
        test_shape(n, 49, 47, level);
    }
    test_shape(3, 97, 389, level);
    std::vector<float> numbers(12);
    std::vector<double> sums(3);
    bool refused = false;
    try {
        abs_product_sum({numbers.data(), 3, 4, 4}, {numbers.data(), 4, 3, 3}, sums, level, 1);
    } catch (const Error&) {
        refused = true;
    }
    EXPECT(refused);
}

}  // namespace rep_fast::tests
