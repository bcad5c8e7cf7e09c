// The Hopper body of accumulate_moment against float64, for both of its tiles: sizes around tiles, stages and chains,
// tokens that do not count, and the order of tiles.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "core/error.h"
#include "cuda/accumulate_moment_sm90a.cuh"
#include "cuda/accumulate_moment_sm90a.h"
#include "cuda/launch.cuh"
#include "executor.h"
#include "moment_problem.h"
#include "tests.h"

namespace {

using rep_fast::BFloat16;
using rep_fast::DType;
using rep_fast::Float16;
namespace cuda = rep_fast::cuda;

constexpr int kTiles[] = {cuda::kNarrowMomentTile, cuda::kWideMomentTile};

// Rows of keys begin at multiples of 16 bytes.
MomentSize size_of(std::int64_t n_tokens, std::int64_t key_dim, std::int64_t total_padding = 1) {
    return {n_tokens, key_dim, (key_dim + 7) / 8 * 8 - key_dim + n_tokens % 2 * 8, true, total_padding};
}

template <class Key>
void run(MomentProblem<Key>& problem, int tile, bool with_counts) {
    cuda::accumulate_moment_by_wgmma(problem.on_device(), with_counts ? problem.counts.data() : nullptr,
                                     problem.total.data(), problem.total_stride, tile, nullptr);
}

template <class Key>
void test_sums_are_those_of_float64(int tile) {
    const MomentSize sizes[] = {size_of(1, 1),    size_of(63, 128),    size_of(65, 129),
                                size_of(64, 127), size_of(130, 193),   size_of(66, 192, 0),
                                size_of(5, 260),  size_of(70, 386, 2), size_of(600, 64, 0)};
    unsigned seed = 0;
    for (const MomentSize& size : sizes) {
        cuda_on_cpu::set_seed(++seed);
        MomentProblem<Key> all(size, 1.0, seed);
        run(all, tile, false);
        all.expect_reference();
        MomentProblem<Key> some(size, 0.6, seed);
        run(some, tile, true);
        some.expect_reference();
    }
}

// More tokens than float32 holds, all of one sign: what is cut off would add up. In the rows of either warpgroup.
void test_long_sums_are_cut_short(int tile) {
    MomentProblem<BFloat16> problem(size_of(cuda::kMomentTokens + 65, 72), 1.0, 7);
    for (std::int64_t t = 0; t < problem.size.n_tokens; ++t) {
        for (const std::int64_t column : {1, 70}) {
            problem.keys[static_cast<std::size_t>(t * problem.stride + column)] = key_of<BFloat16>(1.0f + 0x1p-7f);
        }
    }
    run(problem, tile, false);
    problem.expect_reference();
}

// 4096 tokens of 64² are 2²⁴, to which float32 cannot add one: the last token is lost unless the sums before it went to
// the totals, the first warpgroup's after 4096 tokens, the second's after 2048 and 4096 more.
void test_float32_holds_no_more_than_it_can(int tile) {
    constexpr std::int64_t kTokens = 2048 + cuda::kMomentTokens + 1;
    MomentProblem<BFloat16> problem(size_of(kTokens, 72), 1.0, 9);
    for (std::int64_t t = 0; t < kTokens; ++t) {
        std::fill_n(problem.keys.begin() + t * problem.stride, 72, key_of<BFloat16>(t + 1 < kTokens ? 64.0f : 1.0f));
    }
    run(problem, tile, false);
    for (std::int64_t i = 0; i < 72; ++i) {
        EXPECT(problem.total[static_cast<std::size_t>(i * problem.total_stride)] == 1e5 + 6144 * 4096.0 + 1.0);
    }
}

// Whole stages, single tokens of either half of a warp's, and the last token.
void test_tokens_that_do_not_count_add_nothing(int tile) {
    MomentProblem<Float16> problem(size_of(200, 140), 1.0, 3);
    for (std::int64_t t = 0; t < 200; ++t) {
        const bool counts = !(t == 0 || t == 31 || t == 32 || t == 63 || (t >= 64 && t < 128) || t == 199);
        problem.counts[static_cast<std::size_t>(t)] = counts;
        for (std::int64_t i = 0; !counts && i < 140; ++i) {
            problem.keys[static_cast<std::size_t>(t * problem.stride + i)] = {
                static_cast<std::uint16_t>(t % 2 == 0 ? 0x7e00 : 0xfc00)};  // NaN, -∞
        }
    }
    run(problem, tile, true);
    problem.expect_reference();
}

// Blocks, threads and copies in any order; more tiles than blocks, more stages than the ring has.
void test_the_schedule_changes_nothing(int tile) {
    const MomentSize size = size_of(450, 300);
    cuda_on_cpu::set_seed(0);
    MomentProblem<BFloat16> first(size, 0.9, 11);
    run(first, tile, true);
    first.expect_reference();
    for (std::uint64_t seed = 1; seed < 5; ++seed) {
        cuda_on_cpu::set_seed(seed);
        MomentProblem<BFloat16> again(size, 0.9, 11);
        run(again, tile, true);
        EXPECT(std::equal(first.total.begin(), first.total.end(), again.total.begin()));
    }
}

template <int kColumns>
__global__ void plain_kernel(const cuda::MomentShape<Float16> shape) {
    cuda::add_tiles_plainly<Float16, kColumns>(shape);
}

// What runs where there is no code for sm_90a.
template <int kColumns>
void test_plain_loops() {
    MomentProblem<Float16> problem(size_of(9, 200), 0.7, 5);
    const cuda::MomentShape<Float16> shape = {problem.keys.data(),
                                              problem.stride,
                                              problem.counts.data(),
                                              problem.total.data(),
                                              problem.total_stride,
                                              false,
                                              9,
                                              1,
                                              200,
                                              cuda::n_tiles_of<kColumns>(200)};
    cuda::launch("plain", plain_kernel<kColumns>, {dim3(2), dim3(cuda::kMomentThreads), 0, nullptr}, shape);
    problem.expect_reference();
}

// Every tile with an entry on or below the diagonal, once.
template <int kColumns>
void test_tiles_cover_the_lower_triangle() {
    for (const int key_dim : {1, 127, 128, 129, 192, 193, 1000, 1536, 1537, 4096, 11008}) {
        std::set<std::pair<int, int>> places;
        const int n_tiles = cuda::n_tiles_of<kColumns>(key_dim);
        for (int number = 0; number < n_tiles; ++number) {
            const cuda::TilePlace place = cuda::place_of_tile<kColumns>(key_dim, number);
            EXPECT(place.row % cuda::kTileRows == 0 && place.row >= 0 && place.row < key_dim);
            EXPECT(place.column % kColumns == 0 && place.column >= 0 && place.column < key_dim);
            EXPECT(place.column < place.row + cuda::kTileRows);
            EXPECT(places.insert({place.row, place.column}).second);
        }
        for (int row = 0; row < key_dim; row += cuda::kTileRows) {
            for (int column = 0; column < std::min(row + cuda::kTileRows, key_dim); column += kColumns) {
                EXPECT(places.contains({row, column}));
            }
        }
    }
}

// Of the columns of keys, 132 blocks at a time read less than half from memory, however wide the keys are.
template <int kColumns>
void test_blocks_that_run_together_share_columns() {
    constexpr int kBlocks = 132, kKeyDim = 11008;
    const int n_tiles = cuda::n_tiles_of<kColumns>(kKeyDim);
    std::int64_t n_read = 0, n_rounds = 0;
    for (int first = 0; first + kBlocks <= n_tiles; first += kBlocks, ++n_rounds) {
        std::set<int> columns;  // in units of 64
        for (int number = first; number < first + kBlocks; ++number) {
            const cuda::TilePlace place = cuda::place_of_tile<kColumns>(kKeyDim, number);
            for (int offset = 0; offset < cuda::kTileRows; offset += 64) {
                columns.insert((place.row + offset) / 64);
            }
            for (int offset = 0; offset < kColumns; offset += 64) {
                columns.insert((place.column + offset) / 64);
            }
        }
        n_read += std::ssize(columns);
    }
    EXPECT(n_read * 64 < n_rounds * kKeyDim / 2);
}

void test_groups_add_to_the_totals_at_different_times() {
    std::set<int> first_sums;
    for (int tile = 0; tile < 100; ++tile) {
        for (const int group : {0, 1}) {
            const int steps = cuda::steps_of_first_sum(tile, group);
            EXPECT(steps >= cuda::kChainSteps && steps <= cuda::kSumSteps && steps % cuda::kChainSteps == 0);
            first_sums.insert(steps);
        }
        EXPECT(2 * (cuda::steps_of_first_sum(tile, 0) - cuda::steps_of_first_sum(tile, 1)) == cuda::kSumSteps);
    }
    EXPECT(std::ssize(first_sums) == cuda::kSumSteps / cuda::kChainSteps);
}

void expect_refused(const cuda::MomentKeys& keys, int tile, const std::string& why) {
    double total = 0.0;
    try {
        cuda::accumulate_moment_by_wgmma(keys, nullptr, &total, 1, tile, nullptr);
    } catch (const rep_fast::Error& error) {
        EXPECT(std::string(error.what()).find(why) != std::string::npos);
        return;
    }
    EXPECT(!"it was taken");
}

void test_what_is_refused() {
    alignas(16) static const BFloat16 keys[32] = {};
    cuda::MomentKeys good = {keys, DType::kBFloat16, 2, 7, 8};
    EXPECT(cuda::can_accumulate_by_wgmma(good));
    expect_refused(good, 64, "128 or 192 columns, got 64");
    cuda::MomentKeys other = good;
    other.row_stride = 7;
    EXPECT(!cuda::can_accumulate_by_wgmma(other));
    expect_refused(other, 128, "bfloat16 rows 7 apart; use accumulate_moment");
    other.row_stride = 0;
    EXPECT(!cuda::can_accumulate_by_wgmma(other));
    other = good;
    other.dtype = DType::kFloat32;
    EXPECT(!cuda::can_accumulate_by_wgmma(other));
    other = good;
    other.key_dim = cuda::kWidestMoment + 1;
    EXPECT(!cuda::can_accumulate_by_wgmma(other));
    good.n_tokens = 0;
    cuda::accumulate_moment_by_wgmma(good, nullptr, nullptr, 7, 128, nullptr);  // nothing to read or write
}

}  // namespace

void test_accumulate_moment_sm90a() {
    test_tiles_cover_the_lower_triangle<cuda::kNarrowMomentTile>();
    test_tiles_cover_the_lower_triangle<cuda::kWideMomentTile>();
    test_blocks_that_run_together_share_columns<cuda::kNarrowMomentTile>();
    test_blocks_that_run_together_share_columns<cuda::kWideMomentTile>();
    test_groups_add_to_the_totals_at_different_times();
    for (const int tile : kTiles) {
        test_sums_are_those_of_float64<BFloat16>(tile);
        test_sums_are_those_of_float64<Float16>(tile);
        test_long_sums_are_cut_short(tile);
        test_float32_holds_no_more_than_it_can(tile);
        test_tokens_that_do_not_count_add_nothing(tile);
        test_the_schedule_changes_nothing(tile);
    }
    test_plain_loops<cuda::kNarrowMomentTile>();
    test_plain_loops<cuda::kWideMomentTile>();
    test_what_is_refused();
}
