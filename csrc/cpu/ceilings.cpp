#include "cpu/ceilings.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "core/error.h"
#include "core/work_queue.h"
#include "cpu/ceiling_loop.h"
#include "cpu/simd_portable.h"

namespace rep_fast {
namespace portable {
namespace {

constexpr CeilingKernels kCeilings = {.float32 = kMultiplyAdd<Simd>, .bf16 = {}, .int8 = {}};

}  // namespace
}  // namespace portable

const DispatchTable<CeilingKernels>& ceilings_table() {
    static const auto table = [] {
        CeilingKernels wide = avx2::kCeilings;
        wide.float32 = avx512::kFloat32Ceiling;
        CeilingKernels with_bf16 = wide;
        with_bf16.bf16 = avx512_bf16::kBf16Ceiling;
        with_bf16.int8 = avx512_bf16::kInt8Ceiling;
        return DispatchTable<CeilingKernels>{{{CpuLevel::kPortable, portable::kCeilings},
                                              {CpuLevel::kAvx2, avx2::kCeilings},
                                              {CpuLevel::kAvx512, wide},
                                              {CpuLevel::kAvx512Bf16, with_bf16}}};
    }();
    return table;
}

namespace {

using Clock = std::chrono::steady_clock;

// The best of several stretches, each long beside the clock and short beside the scheduler's interruptions.
template <class Work>
double best_rate(double amount, double seconds, const Work& work) {
    const auto end = Clock::now() + std::chrono::duration<double>(seconds);
    double best = 0.0;
    do {
        const auto begin = Clock::now();
        work();
        best = std::max(best, amount / std::chrono::duration<double>(Clock::now() - begin).count());
    } while (Clock::now() < end);
    return best;
}

const CeilingLoop& loop_of(const CeilingKernels& kernels, Product product) {
    switch (product) {
        case Product::kBf16:
            return kernels.bf16;
        case Product::kInt8:
            return kernels.int8;
        case Product::kFloat32:
            break;
    }
    return kernels.float32;
}

// A sum that the compiler cannot leave out; eight of them, so that loads do not wait for each other.
std::uint64_t sum_words(const std::uint64_t* words, std::int64_t n) {
    std::uint64_t sums[8] = {};
    for (std::int64_t i = 0; i + 8 <= n; i += 8) {
        for (int lane = 0; lane < 8; ++lane) {
            sums[lane] += words[i + lane];
        }
    }
    std::uint64_t total = 0;
    for (const std::uint64_t sum : sums) {
        total += sum;
    }
    return total;
}

}  // namespace

double product_rate(Product product, CpuLevel level, int n_threads, double seconds) {
    const CeilingLoop& loop = loop_of(at_level(ceilings_table(), level).kernels, product);
    if (loop.run == nullptr) {
        return 0.0;
    }
    constexpr std::int64_t kRounds = 200'000;  // about a millisecond
    std::vector<float> results(static_cast<std::size_t>(n_threads));
    const auto amount = static_cast<double>(n_threads * kRounds * loop.operations_per_round);
    return best_rate(amount, seconds, [&] {
        run_blocks(n_threads, n_threads,
                   [&](std::int64_t block, int) { results[static_cast<std::size_t>(block)] = loop.run(kRounds); });
    });
}

double transfer_rate(Transfer transfer, std::int64_t n_bytes, int n_threads, double seconds) {
    constexpr std::int64_t kBlockWords = 1 << 17;  // 1 MiB
    const std::int64_t n_blocks = n_bytes / (kBlockWords * 8);
    REP_FAST_CHECK(n_blocks >= 2, "at least 2 MiB are needed to measure memory, got " << n_bytes << " bytes");
    std::vector<std::uint64_t> words(static_cast<std::size_t>(n_blocks * kBlockWords), 1);
    std::vector<std::uint64_t> totals(static_cast<std::size_t>(n_blocks));
    const std::int64_t half = n_blocks / 2;
    const bool is_copy = transfer == Transfer::kCopy;
    const auto moved = static_cast<double>((is_copy ? 2 * half : n_blocks) * kBlockWords * 8);
    return best_rate(moved, seconds, [&] {
        run_blocks(is_copy ? half : n_blocks, n_threads, [&](std::int64_t block, int) {
            std::uint64_t* const from = words.data() + block * kBlockWords;
            if (is_copy) {
                std::memcpy(from + half * kBlockWords, from, kBlockWords * 8);
            } else {
                totals[static_cast<std::size_t>(block)] = sum_words(from, kBlockWords);
            }
        });
    });
}

}  // namespace rep_fast
