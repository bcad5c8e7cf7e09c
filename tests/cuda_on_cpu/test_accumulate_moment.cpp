// Second moments against float64, over sizes around the tiles, with tokens that do not count.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "core/error.h"
#include "cuda/accumulate_moment.h"
#include "executor.h"
#include "guarded.h"
#include "moment_problem.h"
#include "tests.h"

namespace {

using rep_fast::BFloat16;
using rep_fast::DType;
using rep_fast::Float16;
namespace cuda = rep_fast::cuda;

template <class Key>
void run(MomentProblem<Key>& problem, bool with_counts) {
    cuda::accumulate_moment(problem.on_device(), with_counts ? problem.counts.data() : nullptr, problem.total.data(),
                            problem.total_stride, nullptr);
}

template <class Key>
void test_sums_are_those_of_float64() {
    const MomentSize sizes[] = {
        {1, 1, 0, false}, {33, 128, 0, true}, {31, 129, 7, true}, {96, 17, 2, false}, {40, 260, 4, true}};
    unsigned seed = 0;
    for (const MomentSize& size : sizes) {
        cuda_on_cpu::set_seed(++seed);
        MomentProblem<Key> all(size, 1.0, seed);
        run(all, false);
        all.expect_reference();
        MomentProblem<Key> some(size, 0.6, seed);
        run(some, true);
        some.expect_reference();
    }
}

// One token more than float32 holds, all of one sign: what is cut off would add up.
void test_long_sums_are_cut_short() {
    MomentProblem<BFloat16> problem({cuda::kMomentTokens + 1, 3, 5, true}, 1.0, 7);
    for (std::int64_t t = 0; t < problem.size.n_tokens; ++t) {
        problem.keys[static_cast<std::size_t>(t * problem.stride + 1)] = key_of<BFloat16>(1.0f + 0x1p-7f);
    }
    run(problem, false);
    problem.expect_reference();
}

// Whole numbers are exact as long as float32 holds their sums, which are 2²⁴ when they are handed on.
void test_sums_of_whole_numbers_are_exact() {
    const std::int64_t n_tokens = cuda::kMomentTokens + 1;
    Guarded<BFloat16> keys(static_cast<std::size_t>(n_tokens));
    for (BFloat16& key : keys) {
        key = key_of<BFloat16>(64.0f);
    }
    keys[keys.size() - 1] = key_of<BFloat16>(1.0f);
    double total = 0.0;
    cuda::accumulate_moment({keys.data(), DType::kBFloat16, n_tokens, 1, 1}, nullptr, &total, 1, nullptr);
    EXPECT(total == 64.0 * 64.0 * static_cast<double>(cuda::kMomentTokens) + 1.0);
}

// The largest finite number counts; padding is NaN.
template <class Key>
void test_tokens_are_counted(Key largest, Key infinity, Key nan) {
    constexpr std::int64_t kTokens = 21, kDim = 40, kStride = kDim + 3;
    Guarded<Key> keys((kTokens - 1) * kStride + kDim);
    std::vector<std::uint8_t> wanted(kTokens, 1);
    Guarded<bool> mask(kTokens), counts(kTokens);
    for (std::size_t t = 0; t < kTokens; ++t) {
        std::fill_n(keys.data() + t * kStride, kDim, largest);
        mask[t] = t % 5 != 0;
        wanted[t] = mask[t];
    }
    keys[20 * kStride + 39] = nan;  // outside the mask
    for (const std::size_t t : {7u, 13u}) {
        keys[t * kStride + 2 * t] = infinity;
        wanted[t] = 0;
    }
    const cuda::MomentKeys on_device = {keys.data(), rep_fast::dtype_of<Key>, kTokens, kDim, kStride};
    std::int64_t n_counted = 100, n_nonfinite = 10, first = std::numeric_limits<std::int64_t>::max();
    const cuda::TokenCounts found = {counts.data(), &n_counted, &n_nonfinite, &first};
    cuda::count_tokens(on_device, mask.data(), 1000, found, nullptr);
    EXPECT(n_counted == 100 + 14 && n_nonfinite == 12 && first == 1007);
    for (std::size_t t = 0; t < kTokens; ++t) {
        EXPECT(counts[t] == (wanted[t] != 0));
    }
    cuda::count_tokens(on_device, nullptr, 0, found, nullptr);
    EXPECT(n_counted == 114 + 18 && n_nonfinite == 15 && first == 7);
}

void test_other_keys_are_refused() {
    double total = 0.0;
    try {
        cuda::accumulate_moment({&total, DType::kFloat32, 1, 1, 1}, nullptr, &total, 1, nullptr);
    } catch (const rep_fast::Error& error) {
        EXPECT(std::string(error.what()).find("got float32; leave others") != std::string::npos);
        return;
    }
    EXPECT(!"float32 keys were taken");
}

}  // namespace

void test_accumulate_moment() {
    test_sums_are_those_of_float64<BFloat16>();
    test_sums_are_those_of_float64<Float16>();
    test_long_sums_are_cut_short();
    test_sums_of_whole_numbers_are_exact();
    test_tokens_are_counted<float>(3e38f, -std::numeric_limits<float>::infinity(),
                                   std::numeric_limits<float>::quiet_NaN());
    test_tokens_are_counted<BFloat16>({0x7f7f}, {0xff80}, {0x7fc0});
    test_tokens_are_counted<Float16>({0x7bff}, {0xfc00}, {0x7e00});
    test_other_keys_are_refused();
}
