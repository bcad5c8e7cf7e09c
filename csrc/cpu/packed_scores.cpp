// Driver and portable body of packed_scores: A is packed once, a task is one panel of B against all panels of A.
#include "cpu/packed_scores.h"

#include <algorithm>
#include <vector>

#include "core/aligned_buffer.h"
#include "core/error.h"
#include "core/work_queue.h"
#include "cpu/panel_product.h"
#include "cpu/simd_portable.h"

namespace rep_fast {
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
    std::vector<AlignedBuffer> right(static_cast<std::size_t>(std::max(n_threads, 1)));
    run_blocks(panels_of(b.cols), n_threads, [&](std::int64_t panel, int worker) {
        float* const packed = right[static_cast<std::size_t>(worker)].reserve(b.rows * kPanel);
        pack_panel(b, 0, b.rows, panel * kPanel, packed);
        double totals[kPanel] = {};
        for (std::int64_t p = 0; p < n_left; ++p) {
            float column_sums[kPanel];
            kernels.abs_sum(left + p * a.rows * kPanel, packed, b.rows, column_sums);
            for (std::int64_t j = 0; j < kPanel; ++j) {
                totals[j] += static_cast<double>(column_sums[j]);
            }
        }
        std::copy_n(totals, std::min(kPanel, b.cols - panel * kPanel), sums.data() + panel * kPanel);
    });
}

}  // namespace rep_fast
