#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "core/error.h"
#include "cpu/accumulate_moment.h"
#include "tests.h"

namespace rep_fast::tests {
namespace {

// Numbers of eight significant bits, so that both types hold them. Exactly as many as needed: the address sanitizer
// sees every read beyond.
std::vector<float> random_keys(std::int64_t count, unsigned seed) {
    std::mt19937 generator(seed);
    std::uniform_int_distribution<int> whole(-127, 127);
    std::vector<float> keys(static_cast<std::size_t>(count));
    for (float& key : keys) {
        key = static_cast<float>(whole(generator)) / 64.0f;
    }
    return keys;
}

std::vector<BFloat16> halved(const std::vector<float>& keys) {
    std::vector<BFloat16> halves;
    for (const float key : keys) {
        halves.push_back({static_cast<std::uint16_t>(__builtin_bit_cast(std::uint32_t, key) >> 16)});
    }
    return halves;
}

// Products of eight bits add up without rounding here: every body gives the very same sum.
void expect_moment(const std::vector<double>& total, const std::vector<float>& keys, std::int64_t n,
                   std::int64_t width) {
    for (std::int64_t i = 0; i < width; ++i) {
        for (std::int64_t j = 0; j < width; ++j) {
            double sum = 1.0;
            for (std::int64_t t = 0; t < n && j <= i; ++t) {
                sum += static_cast<double>(keys[static_cast<std::size_t>(t * width + i)]) *
                       static_cast<double>(keys[static_cast<std::size_t>(t * width + j)]);
            }
            EXPECT(total[static_cast<std::size_t>(i * width + j)] == sum);
        }
    }
}

void test_shape(std::int64_t n, std::int64_t width, CpuLevel level) {
    const auto keys = random_keys(n * width, static_cast<unsigned>(n + width));
    const auto halves = halved(keys);
    const KeyMatrix whole = MatrixView<const float>{keys.data(), n, width, width};
    const KeyMatrix half = MatrixView<const BFloat16>{halves.data(), n, width, width};
    for (const int n_threads : {1, 3}) {
        for (const auto& [matrix, products] :
             {std::pair{whole, MomentProducts::kAuto}, std::pair{half, MomentProducts::kFloat32},
              std::pair{half, MomentProducts::kBf16}}) {
            if (products == MomentProducts::kBf16 && level != CpuLevel::kAvx512Bf16) {
                continue;
            }
            std::vector<double> total(static_cast<std::size_t>(width * width), 1.0);
            accumulate_moment(matrix, {total.data(), width, width, width}, products, level, n_threads);
            expect_moment(total, keys, n, width);
        }
    }
}

void test_refusals(CpuLevel level) {
    const auto keys = random_keys(12, 1);
    std::vector<double> total(9);
    const auto refused = [&](std::int64_t width, MomentProducts products) {
        try {
            accumulate_moment(MatrixView<const float>{keys.data(), 12 / width, width, width}, {total.data(), 3, 3, 3},
                              products, level, 1);
        } catch (const Error&) {
            return true;
        }
        return false;
    };
    EXPECT(!refused(3, MomentProducts::kAuto));
    EXPECT(refused(4, MomentProducts::kAuto));
    EXPECT(refused(3, MomentProducts::kBf16));
}

}  // namespace

void test_accumulate_moment(CpuLevel level) {
    for (const std::int64_t n : {0, 1, 2, 63, 65, 131}) {
        for (const std::int64_t width : {1, 47, 49, 97}) {
            test_shape(n, width, level);
        }
    }
    test_shape(3, 389, level);
    test_refusals(level);
}

}  // namespace rep_fast::tests
