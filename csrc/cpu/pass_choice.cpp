#include "cpu/pass_choice.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/error.h"
#include "cpu/ceilings.h"
#include "cpu/packed_queries.h"

namespace rep_fast {
namespace {

constexpr std::int64_t kSample = 16;  // rows, and queries: some hundred products of the scan's millions
// A margin of half a standard deviation multiplies the survivors by about ten where the k-th best stands at 5 of them.
constexpr double kSmallMargin = 0.5;

// Row numbers spread evenly over n.
std::vector<std::int64_t> spread(std::int64_t n) {
    std::vector<std::int64_t> rows;
    const std::int64_t count = std::min(n, kSample);
    for (std::int64_t i = 0; i < count; ++i) {
        rows.push_back(i * n / count);
    }
    return rows;
}

// A lead that the noise of a short measurement does not make.
constexpr double kClearLead = 1.1;

// Standard deviation of a query's scores over the sampled rows; NaN when one is not finite.
double deviation(const ScanInput& input, MatrixView<const BFloat16> keys, const std::vector<std::int64_t>& rows,
                 std::int64_t query, const WhitenedTopkKernels& kernels) {
    double sum = 0.0;
    double squares = 0.0;
    for (const std::int64_t row : rows) {
        const double score = kernels.bf16.exact_score(keys.row(row), input.queries.row(query), keys.cols);
        sum += score;
        squares += score * score;
    }
    const auto n = static_cast<double>(rows.size());
    return std::sqrt(std::max(squares / n - sum / n * sum / n, 0.0));
}

// Rows without a NaN or infinity: `nonfinite` may leave the others out.
std::vector<std::int64_t> finite_rows(MatrixView<const BFloat16> keys) {
    std::vector<std::int64_t> rows = spread(keys.rows);
    std::erase_if(rows, [&](std::int64_t row) {
        return !std::all_of(keys.row(row), keys.row(row) + keys.cols,
                            [](BFloat16 key) { return std::isfinite(to_float(key)); });
    });
    return rows;
}

ScanPass choose_for(const ScanInput& input, MatrixView<const BFloat16> keys, const WhitenedTopkKernels& kernels,
                    double gain) {
    const std::vector<std::int64_t> rows = finite_rows(keys);
    const std::vector<std::int64_t> queries = spread(input.queries.rows);
    double largest_square = 0.0;
    for (const std::int64_t row : rows) {
        double square = 0.0;
        for (std::int64_t j = 0; j < keys.cols; ++j) {
            const auto key = static_cast<double>(to_float(keys.row(row)[j]));
            square += key * key;
        }
        largest_square = std::max(largest_square, square);
    }
    std::vector<float> sampled(queries.size() * static_cast<std::size_t>(keys.cols));
    for (std::size_t i = 0; i < queries.size(); ++i) {
        const float* const from = input.queries.row(queries[i]);
        std::copy(from, from + keys.cols, sampled.data() + i * static_cast<std::size_t>(keys.cols));
    }
    for (const ScanPass pass : {ScanPass::kBf16, ScanPass::kBf16Twice}) {
        if (gain < kClearLead * (pass == ScanPass::kBf16 ? 1.0 : 2.0)) {
            break;  // the high and low halves are two products
        }
        // the scan's own margins, so that the choice knows what the scan will find
        const PackedQueries packed({sampled.data(), std::ssize(queries), keys.cols, keys.cols}, pass, 1);
        const auto key_norm = static_cast<double>(packed.key_norm(largest_square));
        std::int64_t n_small = 0;
        std::int64_t n_finite = 0;
        for (std::int64_t i = 0; i < std::ssize(queries); ++i) {
            if (!packed.is_finite(i)) {
                continue;
            }
            ++n_finite;
            const double margin =
                key_norm * static_cast<double>(packed.margins()[i]) + static_cast<double>(packed.underflow());
            const double spread_of_scores = deviation(input, keys, rows, queries[static_cast<std::size_t>(i)], kernels);
            n_small += margin <= kSmallMargin * spread_of_scores ? 1 : 0;
        }
        if (2 * n_small > n_finite) {
            return pass;
        }
    }
    return ScanPass::kFloat32;
}

ScanPass named_pass(ScanPrecision precision) {
    switch (precision) {
        case ScanPrecision::kFloat64:
            return ScanPass::kFloat64;
        case ScanPrecision::kBf16:
            return ScanPass::kBf16;
        case ScanPrecision::kBf16Twice:
            return ScanPass::kBf16Twice;
        case ScanPrecision::kAuto:
        case ScanPrecision::kFloat32:
            break;
    }
    return ScanPass::kFloat32;
}

}  // namespace

double bf16_gain() {
    static const double gain = [] {
        constexpr double kSeconds = 3e-3;
        const CpuLevel level = machine_cpu_level();
        const double float32 = product_rate(Product::kFloat32, level, 1, kSeconds);
        return product_rate(Product::kBf16, level, 1, kSeconds) / float32;
    }();
    return gain;
}

ScanPass choose_pass(const ScanInput& input, const WhitenedTopkKernels& kernels, double (*gain)()) {
    const auto* const keys = std::get_if<MatrixView<const BFloat16>>(&input.keys);
    const bool has_bf16 = keys != nullptr && kernels.bf16_products != nullptr;
    const ScanPass named = named_pass(input.precision);
    REP_FAST_CHECK(has_bf16 || (named != ScanPass::kBf16 && named != ScanPass::kBf16Twice),
                   "a bfloat16 pass needs bfloat16 keys and a processor with AVX-512 BF16; use precision auto");
    const bool is_open = input.precision == ScanPrecision::kAuto && has_bf16;
    if (!is_open || keys->rows == 0 || input.queries.rows == 0) {
        return named;
    }
    const double measured = gain();
    return measured < kClearLead ? named : choose_for(input, *keys, kernels, measured);
}

}  // namespace rep_fast
