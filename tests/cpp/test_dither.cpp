// The int8 pass of whitened_topk: its draws, its kernels against their definitions, and its certificate.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "check.h"
#include "cpu/dither.h"
#include "cpu/dithered_queries.h"
#include "cpu/whitened_topk.h"
#include "cpu/whitened_topk_kernels.h"
#include "key_numbers.h"
#include "tests.h"

namespace rep_fast::tests {
namespace {

void test_constant() {
    EXPECT(std::abs(dither_constant({.delta = 1e-9, .n_keys = 80e6}, 100) - 4.74) < 0.01);
    EXPECT(std::abs(dither_constant({.delta = 1e-9}, 100) - 5.22) < 0.01);
}

void test_draws() {
    constexpr std::int64_t kDraws = 60'000;
    const auto keys = draw_dither(3, DitherOf::kKeys, kDraws);
    EXPECT(keys == draw_dither(3, DitherOf::kKeys, kDraws));
    for (const auto& other : {draw_dither(3, DitherOf::kQueries, kDraws), draw_dither(4, DitherOf::kKeys, kDraws)}) {
        // for a uniform number on a unit interval: mean 1/2 ± 0.29/√n, covariance 0 ± 1/(12·√n)
        double sum = 0.0;
        double products = 0.0;
        for (std::size_t i = 0; i < keys.size(); ++i) {
            EXPECT(keys[i] >= 0 && keys[i] < 1 << 16);
            sum += keys[i] * 0x1p-16;
            products += (keys[i] * 0x1p-16 - 0.5) * (other[i] * 0x1p-16 - 0.5);
        }
        const double root = std::sqrt(static_cast<double>(kDraws));
        EXPECT(std::abs(sum / kDraws - 0.5) < 5 * 0.29 / root && std::abs(products / kDraws) < 5 / 12.0 / root);
    }
}

void test_scales() {
    std::vector<float> keys(20 * 4);
    std::vector<float> queries(3 * 4);
    for (std::size_t i = 0; i < keys.size(); ++i) {
        keys[i] = i % 4 == 0 ? 64.0f : i % 4 == 1 ? 0.0f : 1.0f;
    }
    for (std::size_t i = 0; i < queries.size(); ++i) {
        queries[i] = i % 4 == 3 ? 0x1p-20f : 1.0f;
    }
    keys[4] = std::numeric_limits<float>::quiet_NaN();  // its row is left out
    const auto scales = column_scales(MatrixView<const float>{keys.data(), 20, 4, 4}, {queries.data(), 3, 4, 4});
    // √(64/1) = 8, nothing known, 1, √2²⁰ = 2¹⁰, all times a common factor of the samples' sizes
    EXPECT(scales[0] == 8 * scales[2] && scales[1] == 1.0 && scales[3] == 0x1p10 * scales[2]);
    EXPECT(scales[2] == 1.0 || scales[2] == 2.0);
}

// ---- kernels -------------------------------------------------------------------------------------------------------

template <class T>
void test_quantise(const Int8Products& products) {
    std::mt19937 generator(5);
    std::normal_distribution<float> normal;
    for (const std::int64_t n : {1, 15, 16, 33, 64, 65, 127, 300}) {
        const auto dither_at = [&](std::size_t j) { return j % 3 == 0 ? 65535 : j % 3 == 1 ? 0 : 40'000; };
        const auto padded = static_cast<std::size_t>((n + 63) / 64 * 64);
        std::vector<T> row(static_cast<std::size_t>(n));
        std::vector<float> scales(padded);
        std::vector<std::int32_t> dither(padded);
        std::vector<std::uint8_t> bytes(padded, 7);
        for (std::size_t j = 0; j < row.size(); ++j) {
            row[j] = as_key<T>(normal(generator));
            scales[j] = j % 2 == 0 ? 2.0f : 0.25f;
            dither[j] = dither_at(j);
        }
        float largest = 0.0f;
        for (std::size_t j = 0; j < row.size(); ++j) {
            largest = std::max(largest, std::abs(to_float(row[j]) * scales[j]));
        }
        const QuantiseKernels<T>& kernels = products.rows.of<T>();
        EXPECT(kernels.largest(row.data(), scales.data(), n) == largest);
        const FixedPoint point = fixed_point(largest);
        EXPECT(point.step >= static_cast<double>(largest) / 127.0 &&
               std::abs(point.step * static_cast<double>(point.per_step) - 0x1p16) < 1e-9);
        const std::int64_t square =
            kernels.quantise(row.data(), scales.data(), dither.data(), point.per_step, n, bytes.data());
        std::int64_t wanted = 0;
        for (std::size_t j = 0; j < padded; ++j) {
            const double x = j < row.size() ? static_cast<double>(to_float(row[j]) * scales[j]) : 0.0;
            const int q = static_cast<int>(bytes[j]) - 128;
            // two units of 2⁻¹⁶ to either side of floor(x/s + u), and never beyond 127
            const double shifted = x / point.step + dither[j] * 0x1p-16;
            EXPECT(std::abs(q) <= 127 && q >= std::floor(shifted - 0x1p-15) && q <= std::floor(shifted + 0x1p-15));
            wanted += q * q;
        }
        EXPECT(square == wanted);
        for (const float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
            if constexpr (!std::is_same_v<T, Float16>) {
                row.back() = as_key<T>(-bad);
                EXPECT(!std::isfinite(kernels.largest(row.data(), scales.data(), n)));
            }
        }
    }
}

void test_multiply(const Int8Products& products, std::int64_t n_rows, std::int64_t n_panels, std::int64_t depth,
                   bool is_extreme) {
    std::mt19937 generator(6);
    const std::int64_t n_tile_rows = (n_rows + kTileKeys - 1) / kTileKeys * kTileKeys;
    const std::int64_t n_queries = n_panels * kPanelQueries;
    std::vector<std::uint8_t> keys(static_cast<std::size_t>(n_tile_rows * depth));
    std::vector<std::int8_t> queries(static_cast<std::size_t>(n_queries * depth));
    std::generate(keys.begin(), keys.end(),
                  [&] { return static_cast<std::uint8_t>(is_extreme ? 255 : 1 + generator() % 255); });
    std::generate(queries.begin(), queries.end(), [&] {
        return static_cast<std::int8_t>(is_extreme ? -127 : static_cast<int>(generator() % 255) - 127);
    });
    std::vector<std::uint32_t> panels(static_cast<std::size_t>(n_queries * depth / 4));
    std::vector<std::int32_t> starts(static_cast<std::size_t>(n_queries));
    for (std::int64_t query = 0; query < n_queries; ++query) {
        for (std::int64_t j = 0; j < depth; ++j) {
            const auto value = queries[static_cast<std::size_t>(query * depth + j)];
            const std::int64_t at = (query / kPanelQueries * depth / 4 + j / 4) * kPanelQueries + query % kPanelQueries;
            panels[static_cast<std::size_t>(at)] |= static_cast<std::uint32_t>(static_cast<std::uint8_t>(value))
                                                    << 8 * (j % 4);
            starts[static_cast<std::size_t>(query)] -= 128 * value;
        }
    }
    std::vector<std::int32_t> sums(static_cast<std::size_t>(n_tile_rows * n_queries), 5);
    const std::int64_t first = depth / 8 * 4;  // two k-blocks
    products.multiply({keys.data(), depth, n_rows, first}, panels.data(), n_panels, kPanelQueries * depth / 4,
                      sums.data(), n_queries, starts.data());
    products.multiply({keys.data() + first, depth, n_rows, depth - first}, panels.data() + first / 4 * kPanelQueries,
                      n_panels, kPanelQueries * depth / 4, sums.data(), n_queries, nullptr);
    for (std::int64_t row = 0; row < n_rows; ++row) {
        for (std::int64_t query = 0; query < n_queries; query += is_extreme ? 5 : 1) {
            std::int64_t wanted = 0;
            for (std::int64_t j = 0; j < depth; ++j) {
                wanted += (keys[static_cast<std::size_t>(row * depth + j)] - 128) *
                          queries[static_cast<std::size_t>(query * depth + j)];
            }
            EXPECT(sums[static_cast<std::size_t>(row * n_queries + query)] == wanted);
        }
    }
}

// ---- the certificate ------------------------------------------------------------------------------------------------

struct Data {
    std::vector<float> keys;
    std::vector<float> queries;
    std::int64_t dim;
};

// c(s_K‖w‖ + s_W‖k_q‖) + 2⁻¹⁵(s_K‖w‖₁ + s_W‖k_q‖₁) of one pair, no column scaled.
double stated_margin(double c, double key_step, const std::uint8_t* key, double query_step, const float* query,
                     std::int64_t dim) {
    double squares[2] = {};
    double sums[2] = {};
    for (std::int64_t j = 0; j < dim; ++j) {
        const double values[2] = {static_cast<double>(query[j]), key_step * (static_cast<int>(key[j]) - 128)};
        for (int side = 0; side < 2; ++side) {
            squares[side] += values[side] * values[side];
            sums[side] += std::abs(values[side]);
        }
    }
    return c * (key_step * std::sqrt(squares[0]) + query_step * std::sqrt(squares[1])) +
           0x1p-15 * (key_step * sums[0] + query_step * sums[1]);
}

// Largest |true score − fast score| beside its margin over all pairs.
double largest_share_of_margin(const Data& data, const Int8Products& products, const DitherOptions& options,
                               bool is_balanced = true) {
    const std::int64_t dim = data.dim;
    const MatrixView<const float> keys{data.keys.data(), std::ssize(data.keys) / dim, dim, dim};
    const MatrixView<const float> queries{data.queries.data(), std::ssize(data.queries) / dim, dim, dim};
    const std::vector<double> none(static_cast<std::size_t>(dim), 1.0);
    const DitheredQueries packed(queries, products, is_balanced ? column_scales(keys, queries) : none, options, 1);
    std::vector<std::uint8_t> bytes(static_cast<std::size_t>(kTileKeys * (dim + kQuantisedMultiple)));
    const auto n_padded = static_cast<std::size_t>(packed.n_padded());
    std::vector<std::int32_t> sums(static_cast<std::size_t>(kTileKeys) * n_padded);
    const std::vector<float> thresholds(n_padded);
    std::vector<float> bounds(n_padded);
    std::vector<std::int32_t> survivors(n_padded);
    double largest_share = 0.0;
    for (std::int64_t row = 0; row < keys.rows; ++row) {
        const FixedPoint point = fixed_point(products.rows.f32.largest(keys.row(row), packed.key_scales(), dim));
        const std::int64_t square = products.rows.f32.quantise(keys.row(row), packed.key_scales(), packed.key_dither(),
                                                               point.per_step, dim, bytes.data());
        products.multiply({bytes.data(), dim + kQuantisedMultiple, 1, (dim + 3) / 4 * 4}, packed.panel(0, 0),
                          packed.n_padded() / kPanelQueries, packed.panel_stride(), sums.data(), packed.n_padded(),
                          packed.starts(0));
        const Int8Margins margins = packed.margins(0, point.step, square);
        std::vector<double> exact(n_padded);
        for (std::int64_t query = 0; query < queries.rows; ++query) {
            long double score = 0.0L;
            for (std::int64_t j = 0; j < dim; ++j) {
                score += static_cast<long double>(keys.row(row)[j]) * static_cast<long double>(queries.row(query)[j]);
            }
            exact[static_cast<std::size_t>(query)] = static_cast<double>(score);
        }
        products.select(sums.data(), margins, thresholds.data(), packed.n_padded(), bounds.data(), survivors.data());
        for (std::size_t query = 0; query < static_cast<std::size_t>(queries.rows); ++query) {
            const double step = static_cast<double>(margins.query_steps[query]);
            const double margin =
                static_cast<double>(margins.key_step) * static_cast<double>(margins.of_queries[query]) +
                step * static_cast<double>(margins.key_norm);
            const double score = point.step * step * sums[query];
            largest_share = std::max(largest_share, margin > 0.0 ? std::abs(exact[query] - score) / margin : 0.0);
            EXPECT(is_balanced ||
                   margin >= (1.0 - 0x1p-22) *
                                 stated_margin(dither_constant(options, queries.rows), point.step, bytes.data(), step,
                                               data.queries.data() + static_cast<std::int64_t>(query) * dim, dim));
            // the margin holds the roundings of this sum too
            EXPECT(std::abs(static_cast<double>(bounds[query]) - score - margin) <= 1e-2 * margin + 0x1p-125);
            const double least = least_score(sums[query], static_cast<std::int64_t>(query), margins);
            EXPECT(std::abs(score - margin - least) <= 1e-2 * margin + 0x1p-125);
        }
    }
    return largest_share;
}

std::vector<float> generated(std::int64_t n, const std::function<float(std::int64_t)>& value) {
    std::vector<float> found(static_cast<std::size_t>(n));
    for (std::int64_t i = 0; i < n; ++i) {
        found[static_cast<std::size_t>(i)] = value(i);
    }
    return found;
}

// Data on which Hoeffding's bound is nearly met: every entry of one side stands half-way between two steps, beside a
// single large one that sets the step, and the other side is flat, with random signs. There one term of the margin has
// to hold alone, and half of it does not.
Data half_way(bool of_keys, std::mt19937& generator) {
    constexpr std::int64_t kDim = 128, kFew = 4, kMany = 4096;
    const auto rounded = [&](std::int64_t i) {
        return i % kDim == 0 ? 127.0f : static_cast<float>(generator() % 2) - 0.5f;
    };
    const auto flat = [&](std::int64_t i) { return i % kDim == 0 ? 0.0f : generator() % 2 == 0 ? 1.0f : -1.0f; };
    if (of_keys) {
        return {generated(kFew * kDim, rounded), generated(kMany * kDim, flat), kDim};
    }
    return {generated(kMany * kDim, flat), generated(kFew * kDim, rounded), kDim};
}

void test_certificate_is_tight(const Int8Products& products) {
    for (const bool of_keys : {true, false}) {
        std::mt19937 generator(31);
        double largest = 0.0;
        for (std::uint64_t seed = 0; seed < 8; ++seed) {
            const Data data = half_way(of_keys, generator);
            const auto n_keys = static_cast<double>(std::ssize(data.keys) / data.dim);
            largest = std::max(largest, largest_share_of_margin(data, products,
                                                                {.delta = 0.1, .seed = seed, .n_keys = n_keys}, false));
        }
        EXPECT(largest <= 1.0);
        EXPECT(largest > 0.55);  // neither half of c nor one of the two terms would do
    }
}

// Hostile data with the default probability: the margin is never used up.
void test_certificate_holds(const Int8Products& products) {
    std::mt19937 generator(32);
    std::normal_distribution<float> normal;
    constexpr std::int64_t kKeys = 60, kQueries = 50;
    for (const std::int64_t dim : {1, 7, 64, 301}) {
        const auto gaussian = [&](std::int64_t) { return normal(generator); };
        const auto outliers = [&](std::int64_t i) { return normal(generator) * (i % dim % 37 == 3 ? 1e3f : 1.0f); };
        const auto spread = [&](std::int64_t i) {
            return normal(generator) * std::pow(10.0f, -4.0f * static_cast<float>(i % dim) / static_cast<float>(dim));
        };
        const auto whitened = [&](std::int64_t i) { return gaussian(i) / std::max(std::abs(spread(i)), 1e-4f); };
        const auto constant = [&](std::int64_t i) { return static_cast<float>(i / dim) - 20.0f; };
        const auto tiny = [&](std::int64_t) { return 1e-41f * normal(generator); };
        const auto any = [&](std::int64_t) {
            return std::ldexp(normal(generator), static_cast<int>(generator() % 160) - 120);
        };
        const std::function<float(std::int64_t)> kinds[] = {gaussian, outliers, spread, whitened, constant, tiny, any};
        for (const auto& of_keys : kinds) {
            for (const auto& of_queries : kinds) {
                const Data data = {generated(kKeys * dim, of_keys), generated(kQueries * dim, of_queries), dim};
                EXPECT(largest_share_of_margin(data, products, {.seed = generator()}) <= 1.0);
            }
        }
    }
}

}  // namespace

void test_dither(CpuLevel level) {
    test_constant();
    test_draws();
    test_scales();
    const Int8Products* const products = at_level(whitened_topk_table(), level).kernels.int8_products;
    EXPECT((products != nullptr) == (level == CpuLevel::kAvx512Bf16));
    if (products == nullptr) {
        return;
    }
    test_quantise<float>(*products);
    test_quantise<BFloat16>(*products);
    test_quantise<Float16>(*products);
    test_multiply(*products, 1, 1, 4, false);
    test_multiply(*products, 7, 2, 12, false);
    test_multiply(*products, 12, 7, 260, false);
    test_multiply(*products, 1, 1, kLargestInt8Width, true);
    test_certificate_is_tight(*products);
    test_certificate_holds(*products);
}

}  // namespace rep_fast::tests
