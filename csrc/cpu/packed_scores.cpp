// Driver and portable body of packed_scores: A is packed once, a task is up to four panels of B against all
// panels of A, which it reads once.
#include "cpu/packed_scores.h"

#include <algorithm>
#include <vector>

#include "core/aligned_buffer.h"
#include "core/error.h"
#include "core/work_queue.h"
#include "cpu/panel_abs_sum.h"
#include "cpu/simd_portable.h"

namespace rep_fast {
namespace {

constexpr std::int64_t kGroup = 4;
// Floats of B a task keeps in the second-level cache (half a megabyte).
constexpr std::int64_t kGroupFloats = std::int64_t{1} << 17;

}  // namespace

namespace portable {
namespace {

void abs_sum(const float* a, const float* b, std::int64_t depth, float* column_sums) {
    panel_abs_sum<Simd>(a, b, depth, column_sums);
}

constexpr PackedScoresKernels kPackedScores = {abs_sum};

}  // namespace
}  // namespace portable

const DispatchTable<PackedScoresKernels>& packed_scores_table() {
    static const auto table = table_up_to_avx512(portable::kPackedScores, avx2::kPackedScores, avx512::kPackedScores);
    return table;
}

void abs_product_sum(const MatrixView<const float>& a, const MatrixView<const float>& b, std::span<double> sums,
                     CpuLevel level, int n_threads) {
    REP_FAST_CHECK(a.rows == b.rows, "a has " << a.rows << " rows, b " << b.rows);
    REP_FAST_CHECK(sums.size() == static_cast<std::size_t>(b.cols),
                   "sums must have " << b.cols << " entries, got " << sums.size());
    const PackedScoresKernels& kernels = at_level(packed_scores_table(), level).kernels;
    const std::int64_t n_left = panels_of(a.cols);
    AlignedBuffer left_panels;
    float* const left = left_panels.reserve(n_left * a.rows * kPanel);
    run_blocks(n_left, n_threads, [&](std::int64_t panel, int) {
        pack_panel(a, 0, a.rows, panel * kPanel, left + panel * a.rows * kPanel);
    });
    const std::int64_t group =
        std::clamp<std::int64_t>(kGroupFloats / (kPanel * std::max<std::int64_t>(b.rows, 1)), 1, kGroup);
    const std::int64_t n_right = panels_of(b.cols);
    std::vector<AlignedBuffer> right(static_cast<std::size_t>(std::max(n_threads, 1)));
    run_blocks((n_right + group - 1) / group, n_threads, [&](std::int64_t number, int worker) {
        float* const packed = right[static_cast<std::size_t>(worker)].reserve(group * b.rows * kPanel);
        const std::int64_t first = number * group;
        const std::int64_t n = std::min(group, n_right - first);
        for (std::int64_t q = 0; q < n; ++q) {
            pack_panel(b, 0, b.rows, (first + q) * kPanel, packed + q * b.rows * kPanel);
        }
        double totals[kGroup * kPanel] = {};
        for (std::int64_t p = 0; p < n_left; ++p) {
            for (std::int64_t q = 0; q < n; ++q) {
                float column_sums[kPanel];
                kernels.abs_sum(left + p * a.rows * kPanel, packed + q * b.rows * kPanel, b.rows, column_sums);
                for (std::int64_t j = 0; j < kPanel; ++j) {
                    totals[q * kPanel + j] += static_cast<double>(column_sums[j]);
                }
            }
        }
        std::copy_n(totals, std::min(n * kPanel, b.cols - first * kPanel), sums.data() + first * kPanel);
    });
}

}  // namespace rep_fast
