#include <xmmintrin.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "core/cpu_level.h"
#include "core/dtype.h"
#include "core/error.h"
#include "core/work_queue.h"
#include "tests.h"

namespace rep_fast::tests {
namespace {

void test_levels() {
    const CpuLevel machine = machine_cpu_level();
    EXPECT(resolve_cpu_level("") == machine);
    EXPECT(resolve_cpu_level("portable") == CpuLevel::kPortable);
    EXPECT(resolve_cpu_level("avx512_bf16") == machine);
    for (int level = 0; level < kCpuLevels; ++level) {
        EXPECT(parse_cpu_level(cpu_level_name(static_cast<CpuLevel>(level))) == static_cast<CpuLevel>(level));
    }
    try {
        parse_cpu_level("sse9");
        EXPECT(false);
    } catch (const Error& error) {
        EXPECT(std::strstr(error.what(), "'sse9' is unknown; use portable, avx2") != nullptr);
    }
}

void test_float16() {
    EXPECT(to_float(Float16{0x3c00}) == 1.0f);
    EXPECT(to_float(Float16{0x0001}) == 0x1p-24f);
    EXPECT(to_float(Float16{0x03ff}) == 0x3ffp-24f);
    EXPECT(to_float(Float16{0x0400}) == 0x1p-14f);
    EXPECT(to_float(Float16{0xfbff}) == -65504.0f);
    EXPECT(to_float(Float16{0xfc00}) == -std::numeric_limits<float>::infinity());
    EXPECT(std::isnan(to_float(Float16{0x7e01})));
    EXPECT(std::bit_cast<std::uint32_t>(to_float(Float16{0x8000})) == 0x80000000u);
    EXPECT(to_float(BFloat16{0xc049}) == -3.140625f);
}

void test_queue_runs_every_block_once() {
    for (const int n_threads : {1, 3, 8}) {
        for (const std::int64_t n_blocks : {std::int64_t{0}, std::int64_t{1}, std::int64_t{2}, std::int64_t{1000}}) {
            std::vector<std::atomic<int>> seen(static_cast<std::size_t>(n_blocks));
            run_blocks(n_blocks, n_threads, [&](std::int64_t block, int worker) {
                EXPECT(worker >= 0 && worker < n_threads);
                ++seen[static_cast<std::size_t>(block)];
            });
            for (const auto& count : seen) {
                EXPECT(count == 1);
            }
        }
    }
}

void test_queue_hands_on_the_exception() {
    for (const int n_threads : {1, 4}) {
        std::atomic<int> n_run = 0;
        try {
            run_blocks(1000, n_threads, [&](std::int64_t block, int) {
                ++n_run;
                if (block == 3) {
                    throw std::runtime_error("block 3");
                }
            });
            EXPECT(false);
        } catch (const std::runtime_error& error) {
            EXPECT(std::strcmp(error.what(), "block 3") == 0);
        }
        EXPECT(n_threads > 1 || n_run == 4);  // other threads may finish the queue before block 3 throws
    }
}

void test_queue_keeps_subnormals() {
    constexpr unsigned kFlush = 0x8040u;
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | kFlush);
    std::atomic<int> n_flushing = 0;
    run_blocks(16, 2, [&](std::int64_t, int) { n_flushing += (_mm_getcsr() & kFlush) != 0 ? 1 : 0; });
    EXPECT((_mm_getcsr() & kFlush) == kFlush);
    _mm_setcsr(before);
    EXPECT(n_flushing == 0);
}

}  // namespace

void test_core() {
    test_levels();
    test_float16();
    test_queue_runs_every_block_once();
    test_queue_hands_on_the_exception();
    test_queue_keeps_subnormals();
}

}  // namespace rep_fast::tests
