#include "cpu/packed_queries.h"

#include <algorithm>
#include <array>
#include <bit>
#include <limits>

#include "core/work_queue.h"

namespace rep_fast {
namespace {

constexpr double kRoundingSlack = 1.0 + 0x1p-20;  // for the rounding of norms and of their float32 products
constexpr double kSmallestNormal = 0x1p-126;

bool is_bf16(ScanPass pass) {
    return pass == ScanPass::kBf16 || pass == ScanPass::kBf16Twice;
}

std::int64_t n_k_blocks(std::int64_t key_dim) {
    return (key_dim + kBlockDepth - 1) / kBlockDepth;
}

// Products that a score adds up.
std::int64_t n_products(ScanPass pass, std::int64_t depth) {
    return pass == ScanPass::kBf16Twice ? 2 * depth : depth;
}

// To nearest, ties to even; infinite above the largest bfloat16. Not for NaN.
BFloat16 nearest_bf16(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    return {static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

}  // namespace

float round_down(double value) {
    const auto rounded = static_cast<float>(value);
    return static_cast<double>(rounded) > value ? std::nextafter(rounded, -std::numeric_limits<float>::infinity())
                                                : rounded;
}

float round_up(double value) {
    return -round_down(-value);
}

double accumulation_error(ScanPass pass, std::int64_t key_dim) {
    // longest chain: a k-block and the sums of blocks, which some bodies multiply in halves; 4 more for a separate
    // product, the margin's own rounding, its addition to the score, and the float64 score
    const std::int64_t longest = n_products(pass, std::min(kBlockDepth, key_dim)) + 2 * n_k_blocks(key_dim) + 4;
    const double chain = static_cast<double>(longest) * 0x1p-24;
    return chain / (1.0 - chain);
}

Bf16Halves bf16_halves(float query) {
    const BFloat16 high = nearest_bf16(query);
    // the difference is exact: the halves share the exponent, or are its neighbours
    return {high, nearest_bf16(query - to_float(high))};
}

PackedQueries::PackedQueries(MatrixView<const float> queries, ScanPass pass, int n_threads)
    : queries_(queries),
      pass_(pass),
      n_panels_((queries.rows + kPanelQueries - 1) / kPanelQueries),
      norms_(static_cast<std::size_t>(n_panels_ * kPanelQueries)),
      margins_(norms_.size()) {
    if (is_bf16(pass)) {
        high_.resize(static_cast<std::size_t>(n_panels_ * pairs_stride()));
        low_.resize(pass == ScanPass::kBf16Twice ? high_.size() : 0);
    } else {
        panels_ = buffer_.reserve(n_panels_ * panel_stride());
    }
    run_blocks(n_panels_, n_threads,
               [this](std::int64_t panel, int) { is_bf16(pass_) ? pack_bf16(panel) : pack_float32(panel); });
    for (const double norm : norms_) {
        largest_norm_ = std::isfinite(norm) ? std::max(largest_norm_, norm) : largest_norm_;
    }
    const auto operations = static_cast<double>(2 * n_products(pass, queries.cols) + 4 * n_k_blocks(queries.cols) + 4);
    // Σ|ŵ_j| of high and low is below 2.1·√M·‖w‖; the keys' sum is in the margins
    const double flushed = 2.1 * std::sqrt(static_cast<double>(queries.cols)) * largest_norm_;
    // at least a normal number: arithmetic on subnormal ones is slow
    underflow_ = round_up(is_bf16(pass) ? (operations + flushed) * kSmallestNormal * kRoundingSlack
                                        : std::max(operations * 0x1p-149, kSmallestNormal));
}

const float* PackedQueries::panel(std::int64_t number, std::int64_t depth) const {
    return panels_ + number * panel_stride() + depth * kPanelQueries;
}

Bf16Panels PackedQueries::bf16_panels(std::int64_t number, std::int64_t depth) const {
    const std::int64_t at = number * pairs_stride() + depth / 2 * kPanelQueries;
    return {high_.data() + at, low_.empty() ? nullptr : low_.data() + at, pairs_stride()};
}

float PackedQueries::key_norm(double square) const {
    const double norm = std::sqrt(square) * kRoundingSlack;
    return norm * largest_norm_ < 1e38 ? round_up(norm) : std::numeric_limits<float>::infinity();
}

double PackedQueries::least_score(float score, std::int64_t query, float key_norm) const {
    return static_cast<double>(score) -
           static_cast<double>(key_norm) * static_cast<double>(margins_[static_cast<std::size_t>(query)]) -
           static_cast<double>(underflow_);
}

// packed_norms: ‖w‖ as multiplied, both halves added up; rest_square: Σ (w − ŵ)².
void PackedQueries::set_margin(std::int64_t query, double square, double packed_norms, double rest_square) {
    const auto index = static_cast<std::size_t>(query);
    norms_[index] = std::sqrt(square) * kRoundingSlack;
    double margin = accumulation_error(pass_, queries_.cols) * packed_norms + std::sqrt(rest_square);
    if (is_bf16(pass_)) {
        margin += std::sqrt(static_cast<double>(queries_.cols)) * kSmallestNormal;  // ‖k‖₁ ≤ √M·‖k‖
    }
    // a half that overflowed could give −∞: with an infinite margin the pair survives as NaN
    margins_[index] = std::isfinite(margin) ? round_up(margin * kRoundingSlack * kRoundingSlack)
                                            : std::numeric_limits<float>::infinity();
}

void PackedQueries::pack_float32(std::int64_t panel) {
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
        const double square = squares[static_cast<std::size_t>(q)];
        set_margin(first + q, square, std::sqrt(square), 0.0);
    }
}

void PackedQueries::pack_bf16(std::int64_t panel) {
    const bool has_low = !low_.empty();
    std::uint32_t* const high = high_.data() + panel * pairs_stride();
    std::uint32_t* const low = has_low ? low_.data() + panel * pairs_stride() : nullptr;
    const std::int64_t first = panel * kPanelQueries;
    const std::int64_t n_queries = std::min(kPanelQueries, queries_.rows - first);
    for (std::int64_t q = 0; q < n_queries; ++q) {
        const float* const query = queries_.row(first + q);
        double square = 0.0;
        double high_square = 0.0;
        double low_square = 0.0;
        double rest_square = 0.0;
        for (std::int64_t j = 0; j < queries_.cols; ++j) {
            const auto value = static_cast<double>(query[j]);
            square += value * value;
            if (!std::isfinite(query[j])) {
                continue;  // the query is dropped: its panel entries stay zero
            }
            const Bf16Halves halves = bf16_halves(query[j]);
            const auto high_part = static_cast<double>(to_float(halves.high));
            const double low_part = has_low ? static_cast<double>(to_float(halves.low)) : 0.0;
            const double rest = value - high_part - low_part;
            high_square += high_part * high_part;
            low_square += low_part * low_part;
            rest_square += rest * rest;
            const std::int64_t at = j / 2 * kPanelQueries + q;
            const int shift = j % 2 == 0 ? 0 : 16;
            high[at] |= static_cast<std::uint32_t>(halves.high.bits) << shift;
            if (has_low) {
                low[at] |= static_cast<std::uint32_t>(halves.low.bits) << shift;
            }
        }
        set_margin(first + q, square, std::sqrt(high_square) + std::sqrt(low_square), rest_square);
    }
}

}  // namespace rep_fast
