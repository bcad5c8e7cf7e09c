// Keys whose second moment is known from float64, for the bodies of accumulate_moment.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <type_traits>

#include "check.h"
#include "core/dtype.h"
#include "cuda/accumulate_moment.h"
#include "guarded.h"

struct MomentSize {
    std::int64_t n_tokens, key_dim, padding;
    bool aligned;
    std::int64_t total_padding = 1;
};

template <class Key>
Key key_of(float value) {
    if constexpr (std::is_same_v<Key, rep_fast::Float16>) {
        return {__builtin_bit_cast(std::uint16_t, static_cast<_Float16>(value))};
    } else {
        return {static_cast<std::uint16_t>(__builtin_bit_cast(std::uint32_t, value) >> 16)};
    }
}

template <class Key>
struct MomentProblem {
    MomentSize size;
    std::int64_t stride;
    Guarded<Key> keys;
    Guarded<bool> counts;
    std::int64_t total_stride;
    Guarded<double> total;

    // Padding is NaN, and so are the tokens that do not count.
    MomentProblem(const MomentSize& size_, double share, unsigned seed)
        : size(size_),
          stride(size.key_dim + size.padding),
          keys(static_cast<std::size_t>((size.n_tokens - 1) * stride + size.key_dim), size.aligned),
          counts(static_cast<std::size_t>(size.n_tokens)),
          total_stride(size.key_dim + size.total_padding),
          total(static_cast<std::size_t>((size.key_dim - 1) * total_stride + size.key_dim)) {
        std::mt19937 random(seed);
        std::normal_distribution<float> normal(0.3f, 1.0f);
        for (std::int64_t t = 0; t < size.n_tokens; ++t) {
            counts[static_cast<std::size_t>(t)] = std::bernoulli_distribution(share)(random);
            for (std::int64_t i = 0; counts[static_cast<std::size_t>(t)] && i < size.key_dim; ++i) {
                keys[static_cast<std::size_t>(t * stride + i)] = key_of<Key>(normal(random));
            }
        }
        for (double& entry : total) {
            entry = 1e5;
        }
    }

    [[nodiscard]] rep_fast::cuda::MomentKeys on_device() const {
        return {keys.data(), rep_fast::dtype_of<Key>, size.n_tokens, size.key_dim, stride};
    }

    [[nodiscard]] double key(std::int64_t t, std::int64_t i) const {
        return static_cast<double>(rep_fast::to_float(keys[static_cast<std::size_t>(t * stride + i)]));
    }

    void expect_reference() const {
        using rep_fast::cuda::kMomentChain;
        using rep_fast::cuda::kMomentTokens;
        const double eps = static_cast<double>(kMomentChain / 16 + 16) * 0x1p-23 +
                           static_cast<double>(kMomentTokens / kMomentChain) * 0x1p-24;
        for (std::int64_t i = 0; i < size.key_dim; ++i) {
            for (std::int64_t j = 0; j < size.key_dim; ++j) {
                double wanted = 1e5, sum_of_sizes = 0.0;
                for (std::int64_t t = 0; j <= i && t < size.n_tokens; ++t) {
                    if (counts[static_cast<std::size_t>(t)]) {
                        wanted += key(t, i) * key(t, j);
                        sum_of_sizes += std::abs(key(t, i) * key(t, j));
                    }
                }
                const double got = total[static_cast<std::size_t>(i * total_stride + j)];
                EXPECT(std::abs(got - wanted) <= eps * sum_of_sizes + 1e-10);
            }
            // what lies behind a row of the total is not ours
            EXPECT(size.total_padding == 0 || i + 1 == size.key_dim ||
                   total[static_cast<std::size_t>(i * total_stride + size.key_dim)] == 1e5);
        }
    }
};
