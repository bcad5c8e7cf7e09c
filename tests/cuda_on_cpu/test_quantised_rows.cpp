// Rows quantised by the GPU's kernels: bit for bit the fixed point of cpu/dither.h, and hits selected from sums of
// them.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/dither.h"
#include "cuda/quantised_rows.h"
#include "cuda/whitened_topk.h"
#include "executor.h"
#include "guarded.h"
#include "key_numbers.h"
#include "tests.h"

namespace {

using rep_fast::BFloat16;
using rep_fast::DitherOf;
using rep_fast::FixedPoint;
using rep_fast::Float16;
using rep_fast::to_float;
using rep_fast::tests::as_key;
namespace cuda = rep_fast::cuda;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr double kConstant = 5.3;

void test_draws_are_those_of_the_cpu() {
    for (const std::int64_t n : {1, 255, 256, 1000}) {
        for (const DitherOf whose : {DitherOf::kKeys, DitherOf::kQueries}) {
            for (const std::uint64_t seed : {std::uint64_t{0}, std::uint64_t{3}, std::uint64_t{1} << 62}) {
                Guarded<std::int32_t> drawn(static_cast<std::size_t>(n));
                cuda::draw_dither(seed, static_cast<std::uint64_t>(whose), drawn.data(), n, nullptr);
                EXPECT(std::ranges::equal(drawn, rep_fast::draw_dither(seed, whose, n)));
            }
        }
    }
}

std::int64_t padded(std::int64_t width) {
    return (width + cuda::kQuantisedMultiple - 1) / cuda::kQuantisedMultiple * cuda::kQuantisedMultiple;
}

struct Columns {
    std::vector<float> scales;
    std::vector<std::int32_t> dither;
    Guarded<std::int32_t> packed;

    Columns(std::int64_t width, std::mt19937& random)
        : scales(static_cast<std::size_t>(width)),
          dither(rep_fast::draw_dither(random(), DitherOf::kKeys, width)),
          packed(static_cast<std::size_t>(padded(width)), true) {
        std::fill(packed.begin(), packed.end(), 0);
        for (std::size_t j = 0; j < scales.size(); ++j) {
            scales[j] = std::ldexp(1.0f, static_cast<int>(random() % 9) - 4);
            dither[j] = j % 5 == 0 ? 65535 : j % 7 == 0 ? 0 : dither[j];
            packed[j] = std::bit_cast<std::int32_t>(scales[j]) | dither[j];
        }
    }
};

template <class T>
struct Quantised {
    std::int64_t n_rows, width;
    Guarded<std::int8_t> values;
    std::vector<float> steps, margins;
    std::int64_t n_nonfinite = 0, first_nonfinite = std::numeric_limits<std::int64_t>::max();

    Quantised(const Guarded<T>& rows, std::int64_t n, std::int64_t dim, std::int64_t stride, const Columns& columns)
        : n_rows(n),
          width(padded(dim)),
          values(static_cast<std::size_t>(n * width), true),
          steps(static_cast<std::size_t>(n)),
          margins(static_cast<std::size_t>(n)) {
        cuda::quantise_rows({rows.data(), rep_fast::dtype_of<T>, n, dim, stride}, columns.packed.data(), kConstant, 100,
                            {values.data(), width, steps.data(), margins.data(), &n_nonfinite, &first_nonfinite},
                            nullptr);
    }

    std::int8_t at(std::int64_t row, std::int64_t j) const { return values[static_cast<std::size_t>(row * width + j)]; }
};

// The definition: (round(2¹⁶x/s) + U) >> 16 with the CPU's steps.
template <class T>
void expect_row(const T* row, std::int64_t dim, const Columns& columns, const Quantised<T>& found,
                std::int64_t number) {
    float largest = 0.0f;
    for (std::int64_t j = 0; j < dim; ++j) {
        largest = std::max(largest, std::abs(to_float(row[j]) * columns.scales[static_cast<std::size_t>(j)]));
    }
    const FixedPoint point = rep_fast::fixed_point(largest);
    double square = 0.0;
    for (std::int64_t j = 0; j < found.width; ++j) {
        int wanted = 0;
        if (j < dim) {
            const auto at = static_cast<std::size_t>(j);
            const float scaled = to_float(row[j]) * columns.scales[at];
            wanted = (static_cast<int>(std::nearbyint(scaled * point.per_step)) + columns.dither[at]) >> 16;
        }
        EXPECT(std::abs(wanted) <= 127);
        EXPECT(found.at(number, j) == wanted);
        square += wanted * wanted;
    }
    const auto at = static_cast<std::size_t>(number);
    const double margin = kConstant * static_cast<double>(found.steps[at]) * std::sqrt(square);
    EXPECT(found.steps[at] == static_cast<float>(point.step));
    EXPECT(static_cast<double>(found.margins[at]) >= margin &&
           static_cast<double>(found.margins[at]) <= margin * (1.0 + 0x1p-20));
}

template <class T>
void test_quantisation() {
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    for (const std::int64_t dim : {1, 7, 8, 15, 16, 33, 300, 2048, 2051}) {
        for (const std::int64_t padding : {0, 3}) {
            const std::int64_t n_rows = 5, stride = (dim + 7) / 8 * 8 + padding;
            Guarded<T> rows(static_cast<std::size_t>((n_rows - 1) * stride + dim), padding == 0);
            for (std::size_t i = 0; i < rows.size(); ++i) {
                rows[i] = as_key<T>(normal(random) * std::ldexp(1.0f, static_cast<int>(i) / static_cast<int>(stride)));
            }
            for (std::int64_t j = 0; j < dim; ++j) {
                rows[static_cast<std::size_t>(stride + j)] = T{};                                       // a zero row
                rows[static_cast<std::size_t>(2 * stride + j)] = as_key<T>(j % 2 == 0 ? 3.0f : -3.0f);  // all at an end
            }
            rows[static_cast<std::size_t>(3 * stride + dim - 1)] = as_key<T>(0x1p14f);  // the largest comes last
            const Columns columns(dim, random);
            const Quantised<T> found(rows, n_rows, dim, stride, columns);
            EXPECT(found.n_nonfinite == 0);
            for (std::int64_t row = 0; row < n_rows; ++row) {
                expect_row(rows.data() + row * stride, dim, columns, found, row);
            }
        }
    }
}

void test_subnormal_and_largest_rows() {
    std::mt19937 random(6);
    for (const float size : {1e-44f, 1e-38f, 1e-20f, 1e34f}) {
        Guarded<float> rows(40);
        for (float& value : rows) {
            value = size * static_cast<float>(static_cast<int>(random() % 9) - 4);
        }
        const Columns columns(40, random);
        const Quantised<float> found(rows, 1, 40, 40, columns);
        expect_row(rows.data(), 40, columns, found, 0);
    }
}

void test_rows_without_a_step() {
    std::mt19937 random(7);
    constexpr std::int64_t kDim = 300;
    Guarded<float> rows(6 * kDim);
    std::fill(rows.begin(), rows.end(), 1.0f);
    Columns columns(kDim, random);
    columns.packed[17] = std::bit_cast<std::int32_t>(0x1p40f);
    rows[0 * kDim + 17] = 1e38f;  // finite, but not when scaled
    rows[2 * kDim + 299] = kNaN;
    rows[4 * kDim + 0] = -kInfinity;
    rows[5 * kDim + 17] = 1e38f;
    rows[5 * kDim + 18] = kInfinity;
    const Quantised<float> found(rows, 6, kDim, kDim, columns);
    EXPECT(found.n_nonfinite == 3 && found.first_nonfinite == 102);
    for (const std::size_t row : {0u, 2u, 4u, 5u}) {
        EXPECT(found.steps[row] == 0.0f);
        EXPECT(row == 0 ? found.margins[row] == kInfinity : std::isnan(found.margins[row]));
    }
    EXPECT(found.steps[1] > 0.0f && std::isfinite(found.margins[1]) && std::isfinite(found.margins[3]));

    std::vector<float> steps(6), margins(6);  // the same without counters
    Guarded<std::int8_t> values(6 * static_cast<std::size_t>(padded(kDim)), true);
    cuda::quantise_rows({rows.data(), rep_fast::DType::kFloat32, 6, kDim, kDim}, columns.packed.data(), kConstant, 100,
                        {values.data(), padded(kDim), steps.data(), margins.data(), nullptr, nullptr}, nullptr);
    EXPECT(steps == found.steps && std::isnan(margins[2]) && margins[1] == found.margins[1]);
}

// Sums anywhere inside the bound; the true scores are whole numbers. Keys 0 and 1: no step, and left out.
void test_hits_from_sums_are_exact() {
    constexpr std::int64_t kKeys = 1500, kQueries = 3, kBest = 7, kStride = kKeys + 5;
    std::mt19937 random(8);
    std::uniform_int_distribution<int> small(-50, 50), share(-100, 100);
    std::vector<float> keys(kKeys), queries{1.0f, -2.0f, 3.0f};
    std::vector<float> key_steps(kKeys), key_margins(kKeys), query_steps{0.5f, 2.0f, 1.0f}, margins{9.0f, 0.0f, 30.0f};
    std::vector<std::int32_t> sums(kQueries * kStride, 1 << 30);  // what lies behind a row is not read
    for (std::size_t key = 0; key < kKeys; ++key) {
        keys[key] = static_cast<float>(small(random));
        key_steps[key] = key == 0 ? 0.0f : std::ldexp(1.0f, static_cast<int>(random() % 3) - 1);
        key_margins[key] = key == 0 ? kInfinity : key == 1 ? kNaN : static_cast<float>(random() % 8);
        for (std::size_t query = 0; query < kQueries; ++query) {
            const double unit = static_cast<double>(key_steps[key]) * static_cast<double>(query_steps[query]);
            const double margin = static_cast<double>(key_steps[key]) * static_cast<double>(margins[query]) +
                                  static_cast<double>(query_steps[query]) * static_cast<double>(key_margins[key]);
            const double exact = static_cast<double>(keys[key]) * static_cast<double>(queries[query]);
            if (key > 1) {  // towards zero, so that rounding to a whole sum keeps the bound
                const double error = std::trunc(margin * share(random) / 100.0 / unit) * unit;
                const double sum = (exact + error) / unit;
                sums[query * kStride + key] = static_cast<std::int32_t>(error > 0.0 ? std::floor(sum) : std::ceil(sum));
            }
        }
    }
    std::vector<double> scores(kQueries * kBest, -static_cast<double>(kInfinity));
    std::vector<std::int64_t> ids(kQueries * kBest, -1);
    const std::vector<float> slacks(kQueries, 0.0f);
    cuda::Selection selection;
    selection.keys = {keys.data(), rep_fast::DType::kFloat32, kKeys, 1, 1};
    selection.int8 = {sums.data(), kStride, key_steps.data(), key_margins.data(), query_steps.data()};
    selection.queries = queries.data();
    selection.query_stride = 1;
    selection.query_margins = margins.data();
    selection.query_slacks = slacks.data();
    selection.n_queries = kQueries;
    selection.scores = scores.data();
    selection.ids = ids.data();
    selection.k = kBest;
    cuda::select_hits(selection, nullptr);
    for (std::size_t query = 0; query < kQueries; ++query) {
        std::vector<std::int64_t> order(kKeys);
        std::iota(order.begin(), order.end(), 0);
        std::erase(order, 1);
        std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
            return keys[static_cast<std::size_t>(a)] * queries[query] >
                   keys[static_cast<std::size_t>(b)] * queries[query];
        });
        for (std::size_t place = 0; place < kBest; ++place) {
            EXPECT(ids[query * kBest + place] == order[place]);
        }
    }
}

}  // namespace

void test_quantised_rows() {
    test_draws_are_those_of_the_cpu();
    test_quantisation<float>();
    test_quantisation<BFloat16>();
    test_quantisation<Float16>();
    test_subnormal_and_largest_rows();
    test_rows_without_a_step();
    test_hits_from_sums_are_exact();
}
