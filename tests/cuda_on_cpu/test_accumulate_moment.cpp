// Second moments against float64, over sizes around the tiles, with tokens that do not count.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/error.h"
#include "cuda/accumulate_moment.h"
#include "executor.h"
#include "guarded.h"
#include "tests.h"

namespace {

using rep_fast::BFloat16;
using rep_fast::DType;
using rep_fast::Float16;
namespace cuda = rep_fast::cuda;

struct Shape {
    std::int64_t n_tokens, key_dim, padding;
    bool aligned;
};

template <class Key>
Key key_of(float value) {
    if constexpr (std::is_same_v<Key, Float16>) {
        return {__builtin_bit_cast(std::uint16_t, static_cast<_Float16>(value))};
    } else {
        return {static_cast<std::uint16_t>(__builtin_bit_cast(std::uint32_t, value) >> 16)};
    }
}

template <class Key>
struct Problem {
    Shape shape;
    std::int64_t stride;
    Guarded<Key> keys;
    Guarded<bool> counts;
    std::int64_t total_stride;
    Guarded<double> total;

    // Padding is NaN, and so are the tokens that do not count.
    Problem(const Shape& shape_, double share, unsigned seed)
        : shape(shape_),
          stride(shape.key_dim + shape.padding),
          keys(static_cast<std::size_t>((shape.n_tokens - 1) * stride + shape.key_dim), shape.aligned),
          counts(static_cast<std::size_t>(shape.n_tokens)),
          total_stride(shape.key_dim + 1),
          total(static_cast<std::size_t>((shape.key_dim - 1) * total_stride + shape.key_dim)) {
        std::mt19937 random(seed);
        std::normal_distribution<float> normal(0.3f, 1.0f);
        for (std::int64_t t = 0; t < shape.n_tokens; ++t) {
            counts[static_cast<std::size_t>(t)] = std::bernoulli_distribution(share)(random);
            for (std::int64_t i = 0; counts[static_cast<std::size_t>(t)] && i < shape.key_dim; ++i) {
                keys[static_cast<std::size_t>(t * stride + i)] = key_of<Key>(normal(random));
            }
        }
        for (double& entry : total) {
            entry = 1e5;
        }
    }

    [[nodiscard]] cuda::MomentKeys on_device() const {
        return {keys.data(), rep_fast::dtype_of<Key>, shape.n_tokens, shape.key_dim, stride};
    }

    void run(bool with_counts) {
        cuda::accumulate_moment(on_device(), with_counts ? counts.data() : nullptr, total.data(), total_stride,
                                nullptr);
    }

    [[nodiscard]] double key(std::int64_t t, std::int64_t i) const {
        return static_cast<double>(rep_fast::to_float(keys[static_cast<std::size_t>(t * stride + i)]));
    }

    void expect_reference() const {
        const double eps = static_cast<double>(cuda::kMomentChain / 16 + 16) * 0x1p-23 +
                           static_cast<double>(cuda::kMomentTokens / cuda::kMomentChain) * 0x1p-24;
        for (std::int64_t i = 0; i < shape.key_dim; ++i) {
            for (std::int64_t j = 0; j < shape.key_dim; ++j) {
                double wanted = 1e5, size = 0.0;
                for (std::int64_t t = 0; j <= i && t < shape.n_tokens; ++t) {
                    if (counts[static_cast<std::size_t>(t)]) {
                        wanted += key(t, i) * key(t, j);
                        size += std::abs(key(t, i) * key(t, j));
                    }
                }
                const double got = total[static_cast<std::size_t>(i * total_stride + j)];
                EXPECT(std::abs(got - wanted) <= eps * size + 1e-10);
            }
            // what lies behind a row of the total is not ours
            EXPECT(i + 1 == shape.key_dim || total[static_cast<std::size_t>(i * total_stride + shape.key_dim)] == 1e5);
        }
    }
};

template <class Key>
void test_sums_are_those_of_float64() {
    const Shape shapes[] = {
        {1, 1, 0, false}, {33, 128, 0, true}, {31, 129, 7, true}, {96, 17, 2, false}, {40, 260, 4, true}};
    unsigned seed = 0;
    for (const Shape& shape : shapes) {
        cuda_on_cpu::set_seed(++seed);
        Problem<Key> all(shape, 1.0, seed);
        all.run(false);
        all.expect_reference();
        Problem<Key> some(shape, 0.6, seed);
        some.run(true);
        some.expect_reference();
    }
}

// One token more than float32 holds, all of one sign: what is cut off would add up.
void test_long_sums_are_cut_short() {
    Problem<BFloat16> problem({cuda::kMomentTokens + 1, 3, 5, true}, 1.0, 7);
    for (std::int64_t t = 0; t < problem.shape.n_tokens; ++t) {
        problem.keys[static_cast<std::size_t>(t * problem.stride + 1)] = key_of<BFloat16>(1.0f + 0x1p-7f);
    }
    problem.run(false);
    problem.expect_reference();
}

// Whole numbers are exact as long as float32 holds their sums, which are 2²⁴ when they are handed on.
void test_sums_of_whole_numbers_are_exact() {
    const std::int64_t n_tokens = cuda::kMomentTokens + 1;
    Guarded<BFloat16> keys(static_cast<std::size_t>(n_tokens));
    for (BFloat16& key : keys) {
        key = key_of<BFloat16>(64.0f);
    }
    keys[keys.size() - 1] = key_of<BFloat16>(1.0f);
    double total = 0.0;
    cuda::accumulate_moment({keys.data(), DType::kBFloat16, n_tokens, 1, 1}, nullptr, &total, 1, nullptr);
    EXPECT(total == 64.0 * 64.0 * static_cast<double>(cuda::kMomentTokens) + 1.0);
}

// The largest finite number counts; padding is NaN.
template <class Key>
void test_tokens_are_counted(Key largest, Key infinity, Key nan) {
    constexpr std::int64_t kTokens = 21, kDim = 40, kStride = kDim + 3;
    Guarded<Key> keys((kTokens - 1) * kStride + kDim);
    std::vector<std::uint8_t> wanted(kTokens, 1);
    Guarded<bool> mask(kTokens), counts(kTokens);
    for (std::size_t t = 0; t < kTokens; ++t) {
        std::fill_n(keys.data() + t * kStride, kDim, largest);
        mask[t] = t % 5 != 0;
        wanted[t] = mask[t];
    }
    keys[20 * kStride + 39] = nan;  // outside the mask
    for (const std::size_t t : {7u, 13u}) {
        keys[t * kStride + 2 * t] = infinity;
        wanted[t] = 0;
    }
    const cuda::MomentKeys on_device = {keys.data(), rep_fast::dtype_of<Key>, kTokens, kDim, kStride};
    std::int64_t n_counted = 100, n_nonfinite = 10, first = std::numeric_limits<std::int64_t>::max();
    const cuda::TokenCounts found = {counts.data(), &n_counted, &n_nonfinite, &first};
    cuda::count_tokens(on_device, mask.data(), 1000, found, nullptr);
    EXPECT(n_counted == 100 + 14 && n_nonfinite == 12 && first == 1007);
    for (std::size_t t = 0; t < kTokens; ++t) {
        EXPECT(counts[t] == (wanted[t] != 0));
    }
    cuda::count_tokens(on_device, nullptr, 0, found, nullptr);
    EXPECT(n_counted == 114 + 18 && n_nonfinite == 15 && first == 7);
}

void test_other_keys_are_refused() {
    double total = 0.0;
    try {
        cuda::accumulate_moment({&total, DType::kFloat32, 1, 1, 1}, nullptr, &total, 1, nullptr);
    } catch (const rep_fast::Error& error) {
        EXPECT(std::string(error.what()).find("got float32; leave others") != std::string::npos);
        return;
    }
    EXPECT(!"float32 keys were taken");
}

}  // namespace

void test_accumulate_moment() {
    test_sums_are_those_of_float64<BFloat16>();
    test_sums_are_those_of_float64<Float16>();
    test_long_sums_are_cut_short();
    test_sums_of_whole_numbers_are_exact();
    test_tokens_are_counted<float>(3e38f, -std::numeric_limits<float>::infinity(),
                                   std::numeric_limits<float>::quiet_NaN());
    test_tokens_are_counted<BFloat16>({0x7f7f}, {0xff80}, {0x7fc0});
    test_tokens_are_counted<Float16>({0x7bff}, {0xfc00}, {0x7e00});
    test_other_keys_are_refused();
}
