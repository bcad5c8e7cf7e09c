#include "cpu/scan_rates.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <vector>

#include "core/aligned_buffer.h"
#include "cpu/whitened_topk_kernels.h"

namespace rep_fast {
namespace {

// Operations per second of work(), best of some runs: what the kernel does without the scheduler's interruptions.
template <class Work>
double best_rate(double operations, const Work& work) {
    using Clock = std::chrono::steady_clock;
    const auto end = Clock::now() + std::chrono::milliseconds(2);
    double best = 0.0;
    do {
        const auto begin = Clock::now();
        work();
        best = std::max(best, operations / std::chrono::duration<double>(Clock::now() - begin).count());
    } while (Clock::now() < end);
    return best;
}

// Of work on rows of keys as wide as those of many models.
ScanRates row_rates(const WhitenedTopkKernels& kernels) {
    constexpr std::int64_t kWidth = 4096;
    constexpr auto kElements = static_cast<double>(kWidth);
    const std::vector<BFloat16> row(static_cast<std::size_t>(kWidth), BFloat16{0x3f80});
    const std::vector<float> query(static_cast<std::size_t>(kWidth), 1.0f);
    std::vector<float> widened(static_cast<std::size_t>(kWidth));
    volatile double used = 0.0;  // or the compiler may drop the work
    ScanRates rates;
    rates.widen = best_rate(kElements, [&] { used = kernels.rows.bf16.widen(row.data(), kWidth, widened.data()); });
    rates.exact = best_rate(
        kElements, [&] { used = kernels.rows.bf16.exact_score(row.data(), query.data(), kWidth, row.data()); });
    if (kernels.int8_products != nullptr) {
        const QuantiseKernels<BFloat16>& of_key = kernels.int8_products->rows.bf16;
        const std::vector<std::int32_t> dither(static_cast<std::size_t>(kWidth));
        std::vector<std::uint8_t> bytes(static_cast<std::size_t>(kWidth));
        rates.quantise = best_rate(kElements, [&] {
            const float largest = of_key.largest(row.data(), query.data(), kWidth);
            used = static_cast<double>(
                of_key.quantise(row.data(), query.data(), dither.data(), largest, kWidth, bytes.data()));
        });
    }
    return rates;
}

ScanRates measured_rates() {
    constexpr std::int64_t kTiles = 16;
    constexpr std::int64_t kPanels = 4;
    constexpr std::int64_t kKeys = kTiles * kTileKeys;
    constexpr std::int64_t kQueries = kPanels * kPanelQueries;
    constexpr auto kOperations = static_cast<double>(2 * kKeys * kQueries * kBlockDepth);
    const WhitenedTopkKernels& kernels = at_level(whitened_topk_table(), machine_cpu_level()).kernels;
    AlignedBuffer key_buffer;
    AlignedBuffer panel_buffer;
    AlignedBuffer score_buffer;
    float* const keys = key_buffer.reserve(kKeys * kWidenedStride);
    float* const panels = panel_buffer.reserve(kQueries * kBlockDepth);
    float* const scores = score_buffer.reserve(kKeys * kQueries);
    std::fill(keys, keys + kKeys * kWidenedStride, 1.0f);
    std::fill(panels, panels + kQueries * kBlockDepth, 1.0f);
    ScanRates rates = row_rates(kernels);
    rates.float32 = best_rate(kOperations, [&] {
        kernels.float32.multiply(keys, kTiles, panels, kPanels, kPanelQueries * kBlockDepth, kBlockDepth, scores,
                                 kQueries, true);
    });
    if (kernels.bf16_products != nullptr) {
        const std::vector<BFloat16> rows(static_cast<std::size_t>(kKeys * kBlockDepth), BFloat16{0x3f80});
        const std::vector<std::uint32_t> pairs(static_cast<std::size_t>(kQueries * kBlockDepth / 2), 0x3f803f80u);
        const Bf16Keys block = {rows.data(), kBlockDepth, kKeys, kBlockDepth, 0};
        const Bf16Panels from = {pairs.data(), nullptr, kPanelQueries * kBlockDepth / 2};
        rates.bf16 = best_rate(kOperations,
                               [&] { kernels.bf16_products->multiply(block, from, kPanels, scores, kQueries, true); });
    }
    if (kernels.int8_products != nullptr) {
        const std::vector<std::uint8_t> rows(static_cast<std::size_t>(kKeys * kBlockDepth), 1);
        const std::vector<std::uint32_t> quads(static_cast<std::size_t>(kQueries * kBlockDepth / 4), 0x01010101u);
        std::vector<std::int32_t> sums(static_cast<std::size_t>(kKeys * kQueries));
        const Int8Keys block = {rows.data(), kBlockDepth, kKeys, kBlockDepth};
        rates.int8 = best_rate(kOperations, [&] {
            kernels.int8_products->multiply(block, quads.data(), kPanels, kPanelQueries * kBlockDepth / 4, sums.data(),
                                            kQueries, nullptr);
        });
    }
    return rates;
}

}  // namespace

ScanRates scan_rates() {
    static const ScanRates rates = measured_rates();
    return rates;
}

}  // namespace rep_fast
