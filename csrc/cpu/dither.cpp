#include "cpu/dither.h"

#include <algorithm>
#include <cmath>

#include "cpu/spread_rows.h"

namespace rep_fast {
namespace {

constexpr std::int64_t kSample = 64;  // rows whose squares tell a column's size within a factor of two
constexpr double kLargestExponent = 40.0;

// One step of SplitMix64: a bijection of 64 bits whose outputs on consecutive multiples of an odd constant pass as
// independent.
std::uint64_t mixed(std::uint64_t state) {
    state = (state ^ (state >> 30)) * 0xbf58476d1ce4e5b9u;
    state = (state ^ (state >> 27)) * 0x94d049bb133111ebu;
    return state ^ (state >> 31);
}

// size M: Σ x² of each column over the sampled rows; rows that hold a NaN or infinity are left out.
template <class T>
std::vector<double> column_squares(const MatrixView<const T>& matrix) {
    std::vector<double> squares(static_cast<std::size_t>(matrix.cols));
    for (const std::int64_t row : spread_rows(matrix.rows, kSample)) {
        const T* const values = matrix.row(row);
        if (!std::all_of(values, values + matrix.cols, [](T value) { return std::isfinite(to_float(value)); })) {
            continue;
        }
        for (std::int64_t j = 0; j < matrix.cols; ++j) {
            const auto value = static_cast<double>(to_float(values[j]));
            squares[static_cast<std::size_t>(j)] += value * value;
        }
    }
    return squares;
}

}  // namespace

double dither_constant(const DitherOptions& options, std::int64_t n_queries) {
    const double n_pairs = options.n_keys * static_cast<double>(std::max<std::int64_t>(n_queries, 1));
    return std::sqrt(std::log(4.0 * n_pairs / options.delta) / 2.0);
}

std::vector<std::int32_t> draw_dither(std::uint64_t seed, DitherOf whose, std::int64_t n) {
    constexpr std::uint64_t kGolden = 0x9e3779b97f4a7c15u;
    const std::uint64_t stream = mixed(mixed(seed + kGolden) + static_cast<std::uint64_t>(whose) * kGolden);
    std::vector<std::int32_t> dither(static_cast<std::size_t>(n));
    for (std::size_t j = 0; j < dither.size(); ++j) {
        dither[j] = static_cast<std::int32_t>(mixed(stream + (j + 1) * kGolden) >> 48);
    }
    return dither;
}

FixedPoint fixed_point(float largest) {
    // the factor covers the division's rounding and that of x · per_step
    const double per_step = 127.0 * 0x1p16 * (1.0 - 0x1p-21) / std::max(static_cast<double>(largest), 127.0 * 0x1p-60);
    const auto rounded = static_cast<float>(per_step);
    return {rounded, 0x1p16 / static_cast<double>(rounded)};
}

std::vector<double> column_scales(const KeyMatrix& keys, MatrixView<const float> queries) {
    const std::vector<double> of_keys = std::visit([](const auto& matrix) { return column_squares(matrix); }, keys);
    const std::vector<double> of_queries = column_squares(queries);
    std::vector<double> scales(of_queries.size(), 1.0);
    for (std::size_t j = 0; j < scales.size(); ++j) {
        if (of_keys[j] > 0.0 && of_queries[j] > 0.0) {
            // √(rms of keys / rms of queries), a fourth root of the ratio of squares
            const double exponent = std::round((std::log2(of_keys[j]) - std::log2(of_queries[j])) / 4.0);
            scales[j] = std::exp2(std::clamp(exponent, -kLargestExponent, kLargestExponent));
        }
    }
    return scales;
}

}  // namespace rep_fast
