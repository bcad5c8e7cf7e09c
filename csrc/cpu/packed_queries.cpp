#include "cpu/packed_queries.h"

#include <algorithm>
#include <array>
#include <limits>

#include "core/work_queue.h"

namespace rep_fast {
namespace {

constexpr double kRoundingSlack = 1.0 + 0x1p-20;  // for the rounding of norms and of their float32 products

}  // namespace

float round_down(double value) {
    const auto rounded = static_cast<float>(value);
    return static_cast<double>(rounded) > value ? std::nextafter(rounded, -std::numeric_limits<float>::infinity())
                                                : rounded;
}

float round_up(double value) {
    return -round_down(-value);
}

PackedQueries::PackedQueries(MatrixView<const float> queries, int n_threads)
    : queries_(queries),
      n_panels_((queries.rows + kPanelQueries - 1) / kPanelQueries),
      panels_(buffer_.reserve(n_panels_ * kPanelQueries * queries.cols)),
      norms_(static_cast<std::size_t>(n_panels_ * kPanelQueries)),
      margins_(norms_.size()) {
    const std::int64_t n_depths = (queries.cols + kBlockDepth - 1) / kBlockDepth;
    // longest chain: a k-block and the sums of blocks; 4 more for a separate product, the margin's own rounding,
    // its addition to the score, and the float64 score
    const double chain = static_cast<double>(std::min(kBlockDepth, queries.cols) + n_depths + 4) * 0x1p-24;
    const double gamma = chain / (1.0 - chain);
    underflow_ = round_up(static_cast<double>(2 * queries.cols + 2 * n_depths + 4) * 0x1p-149);
    run_blocks(n_panels_, n_threads, [this, gamma](std::int64_t panel, int) { pack(panel, gamma); });
    for (const double norm : norms_) {
        largest_norm_ = std::isfinite(norm) ? std::max(largest_norm_, norm) : largest_norm_;
    }
}

float PackedQueries::key_norm(double square) const {
    const double norm = std::sqrt(square) * kRoundingSlack;
    return norm * largest_norm_ < 1e38 ? round_up(norm) : std::numeric_limits<float>::infinity();
}

void PackedQueries::pack(std::int64_t panel, double gamma) {
    float* const out = panels_ + panel * panel_stride();
    std::fill(out, out + panel_stride(), 0.0f);
    const std::int64_t first = panel * kPanelQueries;
    const std::int64_t n_queries = std::min(kPanelQueries, queries_.rows - first);
    std::array<double, kPanelQueries> squares{};
    // by k-blocks, so that the part of the panel being filled stays in L1 for all 16 queries
    for (std::int64_t depth = 0; depth < queries_.cols; depth += kBlockDepth) {
        const std::int64_t end = std::min(depth + kBlockDepth, queries_.cols);
        for (std::int64_t q = 0; q < n_queries; ++q) {
            const float* const query = queries_.row(first + q);
            for (std::int64_t j = depth; j < end; ++j) {
                out[j * kPanelQueries + q] = query[j];
                squares[static_cast<std::size_t>(q)] += static_cast<double>(query[j]) * static_cast<double>(query[j]);
            }
        }
    }
    for (std::int64_t q = 0; q < n_queries; ++q) {
        const auto index = static_cast<std::size_t>(first + q);
        norms_[index] = std::sqrt(squares[static_cast<std::size_t>(q)]) * kRoundingSlack;
        margins_[index] = round_up(gamma * norms_[index] * kRoundingSlack);
    }
}

}  // namespace rep_fast
