// Driver and portable body of accumulate_moment. Tokens are packed 1024 at a time; a task is a square of 4 × 4 panels
// of the lower triangle, multiplied 64 tokens at a time: two panel pieces (24 KB) stay in the first-level cache, all
// eight and the 16 tiles in the second. A square is added to the float64 total once per 1024 tokens.
#include "cpu/accumulate_moment.h"

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

void product(const float* a, const float* b, std::int64_t depth, float* tile, bool first) {
    panel_product<Simd>(a, b, depth, tile, first);
}

constexpr AccumulateMomentKernels kAccumulateMoment = {product};

}  // namespace
}  // namespace portable

namespace {

constexpr std::int64_t kSquare = 4;  // panels on a side of a task
constexpr std::int64_t kTile = kPanel * kPanel;

struct Square {
    std::int64_t row, col;  // first panel of each side
};

std::vector<Square> lower_squares(std::int64_t n_panels) {
    std::vector<Square> squares;
    for (std::int64_t row = 0; row < n_panels; row += kSquare) {
        for (std::int64_t col = 0; col <= row; col += kSquare) {
            squares.push_back({row, col});
        }
    }
    return squares;
}

void add_lower(const float* tile, std::int64_t row0, std::int64_t col0, const MatrixView<double>& total) {
    const std::int64_t n_rows = std::min(kPanel, total.rows - row0);
    for (std::int64_t i = 0; i < n_rows; ++i) {
        double* const to = total.row(row0 + i) + col0;
        const std::int64_t n_cols = std::min(kPanel, row0 + i - col0 + 1);
        for (std::int64_t j = 0; j < n_cols; ++j) {
            to[j] += static_cast<double>(tile[i * kPanel + j]);
        }
    }
}

// tiles: kSquare · kSquare tiles of scratch.
void do_square(const AccumulateMomentKernels& kernels, const Square& square, const float* packed, std::int64_t n_rows,
               std::int64_t n_panels, float* tiles, const MatrixView<double>& total) {
    const std::int64_t row_end = std::min(square.row + kSquare, n_panels);
    const std::int64_t col_end = std::min(square.col + kSquare, n_panels);
    for (std::int64_t k = 0; k < n_rows; k += kPanelDepth) {
        const std::int64_t depth = std::min(kPanelDepth, n_rows - k);
        for (std::int64_t row = square.row; row < row_end; ++row) {
            for (std::int64_t col = square.col; col < std::min(col_end, row + 1); ++col) {
                kernels.product(packed + (row * n_rows + k) * kPanel, packed + (col * n_rows + k) * kPanel, depth,
                                tiles + ((row - square.row) * kSquare + col - square.col) * kTile, k == 0);
            }
        }
    }
    for (std::int64_t row = square.row; row < row_end; ++row) {
        for (std::int64_t col = square.col; col < std::min(col_end, row + 1); ++col) {
            add_lower(tiles + ((row - square.row) * kSquare + col - square.col) * kTile, row * kPanel, col * kPanel,
                      total);
        }
    }
}

template <class T>
void accumulate(const AccumulateMomentKernels& kernels, const MatrixView<const T>& keys,
                const MatrixView<double>& total, int n_threads) {
    const std::int64_t n_panels = panels_of(keys.cols);
    const std::vector<Square> squares = lower_squares(n_panels);
    AlignedBuffer panels;
    float* const packed = panels.reserve(n_panels * std::min(keys.rows, kMomentRows) * kPanel);
    std::vector<AlignedBuffer> tiles(static_cast<std::size_t>(std::max(n_threads, 1)));
    for (std::int64_t first = 0; first < keys.rows; first += kMomentRows) {
        const std::int64_t n_rows = std::min(kMomentRows, keys.rows - first);
        run_blocks(n_panels, n_threads, [&](std::int64_t panel, int) {
            pack_panel(keys, first, n_rows, panel * kPanel, packed + panel * n_rows * kPanel);
        });
        run_blocks(static_cast<std::int64_t>(squares.size()), n_threads, [&](std::int64_t number, int worker) {
            float* const scratch = tiles[static_cast<std::size_t>(worker)].reserve(kSquare * kSquare * kTile);
            do_square(kernels, squares[static_cast<std::size_t>(number)], packed, n_rows, n_panels, scratch, total);
        });
    }
}

}  // namespace

const DispatchTable<AccumulateMomentKernels>& accumulate_moment_table() {
    static const auto table =
        table_up_to_avx512(portable::kAccumulateMoment, avx2::kAccumulateMoment, avx512::kAccumulateMoment);
    return table;
}

void accumulate_moment(const KeyMatrix& key_matrix, const MatrixView<double>& total, CpuLevel level, int n_threads) {
    const AccumulateMomentKernels& kernels = at_level(accumulate_moment_table(), level).kernels;
    std::visit(
        [&](const auto& keys) {
            REP_FAST_CHECK(
                total.rows == keys.cols && total.cols == keys.cols,
                "total must be " << keys.cols << " x " << keys.cols << ", got " << total.rows << " x " << total.cols);
            accumulate(kernels, keys, total, n_threads);
        },
        key_matrix);
}

}  // namespace rep_fast
