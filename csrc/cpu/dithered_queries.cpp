#include "cpu/dithered_queries.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include "core/work_queue.h"
#include "cpu/packed_queries.h"

namespace rep_fast {
namespace {

constexpr double kRoundingSlack = 1.0 + 0x1p-20;  // for the rounding of norms and of their float32 products
// A step times a margin may be subnormal, off by 2⁻¹⁵⁰; a normal number, because arithmetic on others is slow.
constexpr float kUnderflow = 0x1p-126f;
constexpr double kLargest = 1e37;  // scores and their parts stay below the largest float32

std::int64_t padded_width(std::int64_t key_dim) {
    return (key_dim + kQuantisedMultiple - 1) / kQuantisedMultiple * kQuantisedMultiple;
}

template <class T>
std::vector<T> padded(std::vector<T> values) {
    values.resize(static_cast<std::size_t>(padded_width(std::ssize(values))));
    return values;
}

std::vector<float> powers(std::span<const double> scales, bool is_inverse) {
    std::vector<float> found;
    for (const double scale : scales) {
        found.push_back(static_cast<float>(is_inverse ? 1.0 / scale : scale));
    }
    return padded(found);
}

// Σ (w_j d_j)², in lanes that do not wait for each other.
double scaled_square(const float* query, std::span<const double> scales) {
    constexpr std::size_t kLanes = 8;
    double lanes[kLanes] = {};
    std::size_t j = 0;
    for (; j + kLanes <= scales.size(); j += kLanes) {
        for (std::size_t lane = 0; lane < kLanes; ++lane) {
            const double scaled = static_cast<double>(query[j + lane]) * scales[j + lane];
            lanes[lane] += scaled * scaled;
        }
    }
    for (; j < scales.size(); ++j) {
        const double scaled = static_cast<double>(query[j]) * scales[j];
        lanes[0] += scaled * scaled;
    }
    double sum = 0.0;
    for (const double lane : lanes) {
        sum += lane;
    }
    return sum;
}

double root(std::int64_t width) {
    return std::sqrt(static_cast<double>(width));
}

}  // namespace

double least_score(std::int32_t sum, std::int64_t query, const Int8Margins& margins) {
    const auto step = static_cast<double>(margins.key_step);
    const double by_step = step * static_cast<double>(sum) - static_cast<double>(margins.key_norm);
    return by_step * static_cast<double>(margins.query_steps[query]) -
           step * static_cast<double>(margins.of_queries[query]) - static_cast<double>(margins.underflow);
}

DitheredQueries::DitheredQueries(MatrixView<const float> queries, const Int8Products& products,
                                 std::span<const double> column_scales, const DitherOptions& options, int n_threads)
    : key_dim_(queries.cols),
      n_panels_((queries.rows + kPanelQueries - 1) / kPanelQueries),
      // ‖x‖₁ ≤ √M·‖x‖
      constant_(dither_constant(options, queries.rows) + 0x1p-15 * root(queries.cols)),
      query_scales_(powers(column_scales, false)),
      key_scales_(powers(column_scales, true)),
      query_dither_(padded(draw_dither(options.seed, DitherOf::kQueries, queries.cols))),
      key_dither_(padded(draw_dither(options.seed, DitherOf::kKeys, queries.cols))),
      panels_(static_cast<std::size_t>(n_panels_ * panel_stride())),
      starts_(static_cast<std::size_t>(n_padded())),
      steps_(starts_.size()),
      margins_(starts_.size()),
      norms_(starts_.size()) {
    run_blocks(n_panels_, n_threads, [&](std::int64_t panel, int) { pack(queries, products, column_scales, panel); });
    const double longest = 127.0 * root(key_dim_);
    for (const float step : steps_) {
        largest_norm_ = std::max(largest_norm_, static_cast<double>(step) * longest);
    }
}

Int8Margins DitheredQueries::margins(std::int64_t first, double step, std::int64_t square) const {
    const double longest_query = 127.0 * root(key_dim_);
    const double norm = step * std::sqrt(static_cast<double>(square));
    const double roundings = 0x1p-21 * longest_query;
    if (!(norm * std::max(longest_query, largest_norm_) < kLargest) || !(step < kLargest)) {
        return no_margins(first);
    }
    return {.key_step = static_cast<float>(step),
            .key_norm = round_up((constant_ + roundings) * norm * kRoundingSlack),
            .underflow = kUnderflow,
            .of_queries = margins_.data() + first,
            .query_steps = steps_.data() + first};
}

Int8Margins DitheredQueries::no_margins(std::int64_t first) const {
    return {.key_step = 0.0f,
            .key_norm = std::numeric_limits<float>::infinity(),
            .underflow = kUnderflow,
            .of_queries = margins_.data() + first,
            .query_steps = steps_.data() + first};
}

void DitheredQueries::pack(MatrixView<const float> queries, const Int8Products& products,
                           std::span<const double> column_scales, std::int64_t panel) {
    const std::int64_t width = std::ssize(query_scales_);
    std::vector<std::uint8_t> quantised(static_cast<std::size_t>(kPanelQueries * width),
                                        128);  // zeros where no query is
    const std::int64_t first = panel * kPanelQueries;
    for (std::int64_t query = first; query < std::min(first + kPanelQueries, queries.rows); ++query) {
        quantise(queries.row(query), products, column_scales, query, quantised.data() + (query - first) * width);
    }
    std::uint32_t* out = panels_.data() + panel * panel_stride();
    for (std::int64_t depth = 0; depth < key_dim_; depth += 4) {
        for (std::int64_t query = 0; query < kPanelQueries; ++query) {
            std::uint32_t bytes;
            std::memcpy(&bytes, quantised.data() + query * width + depth, sizeof bytes);
            *out++ = bytes ^ 0x80808080u;  // q + 128 as unsigned is q as signed with the top bit flipped
        }
    }
}

void DitheredQueries::quantise(const float* query, const Int8Products& products, std::span<const double> column_scales,
                               std::int64_t number, std::uint8_t* quantised) {
    const auto index = static_cast<std::size_t>(number);
    norms_[index] = std::sqrt(scaled_square(query, column_scales));
    const float largest = products.rows.f32.largest(query, query_scales_.data(), key_dim_);
    if (!std::isfinite(largest)) {  // dropped, or beyond float32 once scaled
        steps_[index] = 1.0f;
        margins_[index] = std::numeric_limits<float>::infinity();
        return;
    }
    const FixedPoint point = fixed_point(largest);
    steps_[index] = static_cast<float>(point.step);
    margins_[index] = round_up(constant_ * norms_[index] * kRoundingSlack);
    products.rows.f32.quantise(query, query_scales_.data(), query_dither_.data(), point.per_step, key_dim_, quantised);
    std::int32_t sum = 0;  // of the width's entries, zeros behind them included, fits
    for (std::int64_t j = 0; j < std::ssize(query_scales_); ++j) {
        sum += quantised[j] - 128;
    }
    starts_[index] = -128 * sum;
}

}  // namespace rep_fast
