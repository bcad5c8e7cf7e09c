#include "cpu/pass_choice.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/error.h"
#include "cpu/dithered_queries.h"
#include "cpu/packed_queries.h"
#include "cpu/spread_rows.h"

namespace rep_fast {
namespace {

// A hundred pairs of the scan's millions.
constexpr std::int64_t kSampleRows = 16;
constexpr std::int64_t kSampleQueries = 8;
// A margin of half a standard deviation multiplies the survivors by about ten where the k-th best stands at 5 of them.
constexpr double kSmallMargin = 0.5;
// A lead that the noise of a short measurement does not make.
constexpr double kClearLead = 1.1;
// A pair's way from a fast score to an exact one costs as much as scoring so many elements.
constexpr double kPairElements = 1000.0;

// Mean and standard deviation of a query's scores over sampled rows.
struct Spread {
    double mean;
    double deviation;
};

template <class T>
Spread spread_of_scores(const MatrixView<const T>& keys, const float* query, const std::vector<std::int64_t>& rows,
                        const WhitenedTopkKernels& kernels) {
    const RowKernels<T>& of_key = kernels.rows.template of<T>();
    double sum = 0.0;
    double squares = 0.0;
    for (const std::int64_t row : rows) {
        const double score = of_key.exact_score(keys.row(row), query, keys.cols, keys.row(row));
        sum += score;
        squares += score * score;
    }
    const auto n = static_cast<double>(rows.size());
    return {sum / n, std::sqrt(std::max(squares / n - sum / n * sum / n, 0.0))};
}

// Rows without a NaN or infinity: `nonfinite` may leave the others out.
template <class T>
std::vector<std::int64_t> finite_rows(const MatrixView<const T>& keys) {
    std::vector<std::int64_t> rows = spread_rows(keys.rows, kSampleRows);
    std::erase_if(rows, [&](std::int64_t row) {
        return !std::all_of(keys.row(row), keys.row(row) + keys.cols,
                            [](T key) { return std::isfinite(to_float(key)); });
    });
    return rows;
}

double normal_tail(double x) {
    return 0.5 * std::erfc(x / std::sqrt(2.0));
}

// x with normal_tail(x) = share, by halving.
double normal_quantile(double share) {
    double low = -10.0;
    double high = 40.0;
    for (int i = 0; i < 60; ++i) {
        const double middle = (low + high) / 2.0;
        (normal_tail(middle) > share ? low : high) = middle;
    }
    return low;
}

// Sampled rows of keys and what the queries' scores on them say.
template <class T>
class Sample {
  public:
    Sample(const ScanInput& input, const ScanState& state, const MatrixView<const T>& keys,
           const WhitenedTopkKernels& kernels)
        : input_(input),
          state_(state),
          keys_(keys),
          kernels_(kernels),
          rows_(finite_rows(keys)),
          queries_(spread_rows(input.queries.rows, kSampleQueries)) {
        for (const std::int64_t query : queries_) {
            const float* const row = input.queries.row(query);
            sampled_.insert(sampled_.end(), row, row + keys.cols);
            spreads_.push_back(spread_of_scores(keys, row, rows_, kernels));
        }
    }

    // Median over queries of the margin beside the scores' deviation is small.
    bool has_small_margins(ScanPass pass) const {
        // the scan's own margins, so that the choice knows what the scan will find
        const PackedQueries packed(queries(), pass, 1);
        const auto key_norm = static_cast<double>(packed.key_norm(largest_square()));
        std::int64_t n_small = 0;
        std::int64_t n_finite = 0;
        for (std::int64_t i = 0; i < std::ssize(queries_); ++i) {
            if (!packed.is_finite(i)) {
                continue;
            }
            ++n_finite;
            const double margin =
                key_norm * static_cast<double>(packed.margins()[i]) + static_cast<double>(packed.underflow());
            n_small += margin <= kSmallMargin * spreads_[static_cast<std::size_t>(i)].deviation ? 1 : 0;
        }
        return 2 * n_small > n_finite;
    }

    // Share of the pairs that survive the int8 pass for its margin alone, as the k-th best rises over the block.
    double int8_survivors(double n_keys_before) const {
        const Int8Products& products = *kernels_.int8_products;
        const DitheredQueries dithered(queries(), products, column_scales(keys_, input_.queries), input_.dither, 1);
        const std::vector<Int8Margins> margins = int8_margins(dithered);
        const auto k = static_cast<double>(state_.scores.cols);
        const auto n_keys = static_cast<double>(keys_.rows);
        const double n_seen = n_keys_before + n_keys;  // at the block's end
        const double usual = normal_quantile(std::min(k / n_seen, 1.0));
        // while the k-th best rises from nothing, 1.5 to 2.2 times the share at the end was found
        const double beside_end = 1.0 + n_keys / n_seen;
        double share = 0.0;
        std::int64_t n = 0;
        for (std::size_t i = 0; i < queries_.size(); ++i) {
            const auto query = static_cast<std::int64_t>(i);
            if (!dithered.is_finite(query)) {
                continue;
            }
            const Spread& scores = spreads_[i];
            const double known = state_.scores.row(queries_[i])[state_.scores.cols - 1];
            const double threshold = std::max(known, scores.mean + usual * scores.deviation);
            for (const Int8Margins& own : margins) {
                const double margin = static_cast<double>(own.key_step) * static_cast<double>(own.of_queries[query]) +
                                      static_cast<double>(own.key_norm) * static_cast<double>(own.query_steps[query]);
                const auto surviving = [&](double bound) {
                    return scores.deviation > 0.0
                               ? std::min(beside_end * normal_tail((bound - scores.mean) / scores.deviation), 1.0)
                               : 1.0;
                };
                share += surviving(threshold - margin) - (scores.deviation > 0.0 ? surviving(threshold) : 0.0);
                ++n;
            }
        }
        return n == 0 ? 0.0 : share / static_cast<double>(n);
    }

  private:
    MatrixView<const float> queries() const { return {sampled_.data(), std::ssize(queries_), keys_.cols, keys_.cols}; }

    double largest_square() const {
        double largest = 0.0;
        for (const std::int64_t row : rows_) {
            double square = 0.0;
            for (std::int64_t j = 0; j < keys_.cols; ++j) {
                const auto key = static_cast<double>(to_float(keys_.row(row)[j]));
                square += key * key;
            }
            largest = std::max(largest, square);
        }
        return largest;
    }

    // Of each sampled row.
    std::vector<Int8Margins> int8_margins(const DitheredQueries& dithered) const {
        const QuantiseKernels<T>& of_key = kernels_.int8_products->rows.template of<T>();
        std::vector<std::uint8_t> bytes(static_cast<std::size_t>(keys_.cols + kQuantisedMultiple));
        std::vector<Int8Margins> margins;
        for (const std::int64_t row : rows_) {
            const float largest = of_key.largest(keys_.row(row), dithered.key_scales(), keys_.cols);
            if (!std::isfinite(largest)) {
                margins.push_back(dithered.no_margins(0));
                continue;
            }
            const FixedPoint point = fixed_point(largest);
            const std::int64_t square = of_key.quantise(keys_.row(row), dithered.key_scales(), dithered.key_dither(),
                                                        point.per_step, keys_.cols, bytes.data());
            margins.push_back(dithered.margins(0, point.step, square));
        }
        return margins;
    }

    const ScanInput& input_;
    const ScanState& state_;
    const MatrixView<const T>& keys_;
    const WhitenedTopkKernels& kernels_;
    std::vector<std::int64_t> rows_;
    std::vector<std::int64_t> queries_;
    std::vector<float> sampled_;   // the queries' rows
    std::vector<Spread> spreads_;  // of each sampled query
};

// Seconds that a pass takes for one key, per element of it, without what is scored again.
double pass_seconds(ScanPass pass, const ScanRates& rates, std::int64_t n_queries) {
    const double operations = 2.0 * static_cast<double>(n_queries);
    switch (pass) {
        case ScanPass::kBf16:
            return operations / rates.bf16;
        case ScanPass::kBf16Twice:  // the high and low halves are two products
            return 2.0 * operations / rates.bf16;
        case ScanPass::kInt8:
            return 1.0 / rates.quantise + operations / rates.int8;
        default:
            return 1.0 / rates.widen + operations / rates.float32;
    }
}

template <class T>
ScanPass choose_exact_product(const Sample<T>& sample, const ScanInput& input, const WhitenedTopkKernels& kernels,
                              const ScanRates& rates) {
    const std::int64_t n_queries = input.queries.rows;
    const double affordable = pass_seconds(ScanPass::kFloat32, rates, n_queries) / kClearLead;
    for (const ScanPass pass : {ScanPass::kBf16, ScanPass::kBf16Twice}) {
        if (has_pass(kernels, pass, input.keys) && pass_seconds(pass, rates, n_queries) <= affordable &&
            sample.has_small_margins(pass)) {
            return pass;
        }
    }
    return ScanPass::kFloat32;
}

// About how many keys the state comes from: ids are mostly row numbers of a stream.
double keys_before(const ScanInput& input, const ScanState& state) {
    const bool is_fresh = std::isinf(state.scores.row(0)[state.scores.cols - 1]);
    return is_fresh ? 0.0 : static_cast<double>(input.first_id);
}

}  // namespace

double expected_entries(double n_keys, double k) {
    return n_keys <= k ? n_keys : k * (1.0 + std::log(n_keys / k));
}

bool has_pass(const WhitenedTopkKernels& kernels, ScanPass pass, const KeyMatrix& keys) {
    const std::int64_t width = std::visit([](const auto& matrix) { return matrix.cols; }, keys);
    switch (pass) {
        case ScanPass::kFloat64:
        case ScanPass::kFloat32:
            break;
        case ScanPass::kBf16:
        case ScanPass::kBf16Twice:
            return kernels.bf16_products != nullptr && std::holds_alternative<MatrixView<const BFloat16>>(keys);
        case ScanPass::kInt8:
            return kernels.int8_products != nullptr && width <= kLargestInt8Width;
    }
    return true;
}

PassChoice choose_pass(const ScanInput& input, const ScanState& state, const WhitenedTopkKernels& kernels,
                       ScanRates (*rates)()) {
    if (input.pass.has_value()) {
        REP_FAST_CHECK(has_pass(kernels, *input.pass, input.keys),
                       "the pass " << kScanPassNames[static_cast<std::size_t>(*input.pass)]
                                   << " cannot run on these keys and this processor; use precision auto");
        return {.first = *input.pass, .second = *input.pass, .reason = PassReason::kAskedFor};
    }
    const bool has_bf16 = has_pass(kernels, ScanPass::kBf16, input.keys);
    const bool has_int8 = has_pass(kernels, ScanPass::kInt8, input.keys);
    return std::visit(
        [&](const auto& keys) -> PassChoice {
            if ((!has_bf16 && !has_int8) || keys.rows == 0 || input.queries.rows == 0) {
                return {};
            }
            const ScanRates measured = rates();
            const Sample sample(input, state, keys, kernels);
            const ScanPass other = choose_exact_product(sample, input, kernels, measured);
            const PassChoice fallback = {.first = other, .second = other, .reason = PassReason::kFastest};
            if (!has_int8) {
                return fallback;
            }
            const std::int64_t n_queries = input.queries.rows;
            const double gained = pass_seconds(other, measured, n_queries) / kClearLead -
                                  pass_seconds(ScanPass::kInt8, measured, n_queries);
            if (gained <= 0.0) {
                return fallback;
            }
            PassChoice int8 = {.first = ScanPass::kInt8, .second = other, .reason = PassReason::kFastest};
            int8.largest_survivor_share = gained * measured.exact / static_cast<double>(n_queries) /
                                          (1.0 + kPairElements / static_cast<double>(keys.cols));
            int8.n_keys_before = keys_before(input, state);
            if (sample.int8_survivors(int8.n_keys_before) <= int8.largest_survivor_share) {
                return int8;
            }
            return {.first = other, .second = other, .reason = PassReason::kWideMargin};
        },
        input.keys);
}

}  // namespace rep_fast
