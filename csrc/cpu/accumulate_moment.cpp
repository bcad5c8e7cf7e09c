// Driver and portable body of accumulate_moment. Tokens are packed kMomentRows at a time; a task is a square of 8 × 8
// panels of the lower triangle, multiplied 64 tokens at a time: two panel pieces (24 KB) stay in the first-level cache,
// all sixteen and the 64 tiles (786 KB) in the second. A square is added to the float64 total once per kMomentRows
// tokens.
#include "cpu/accumulate_moment.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "core/aligned_buffer.h"
#include "core/error.h"
#include "core/work_queue.h"
#include "cpu/ceilings.h"
#include "cpu/panel_product.h"
#include "cpu/simd_portable.h"

namespace rep_fast {
namespace portable {
namespace {

void product(const float* a, const float* b, std::int64_t depth, float* tile, bool first) {
    panel_product<Simd>(a, b, depth, tile, first);
}

constexpr AccumulateMomentKernels kAccumulateMoment = {.product = product};

}  // namespace
}  // namespace portable

namespace {

constexpr std::int64_t kSquare = 8;  // panels on a side of a task
constexpr std::int64_t kTile = kPanel * kPanel;
constexpr double kClearLead = 1.1;  // a lead that the noise of a short measurement does not make

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

// Adds what lies on and below the diagonal of one panel of rows, tiles side by side from column panel `col` on: row by
// row, so that the total is read in pieces of kSquare panels (3 KB) and the next one is asked for in time.
void add_rows(const float* tiles, std::int64_t row_panel, std::int64_t col_panel, std::int64_t n_tiles,
              const MatrixView<double>& total) {
    const std::int64_t begin = col_panel * kPanel;
    for (std::int64_t row = row_panel * kPanel; row < std::min((row_panel + 1) * kPanel, total.rows); ++row) {
        const std::int64_t end = std::min(begin + n_tiles * kPanel, row + 1);
        if (row + 1 < total.rows) {
            for (std::int64_t col = begin; col < end; col += 8) {  // a line each
                __builtin_prefetch(total.row(row + 1) + col, 1, 2);
            }
        }
        const float* from = tiles + (row - row_panel * kPanel) * kPanel;
        for (std::int64_t col = begin; col < end; col += kPanel, from += kTile) {
            double* const to = total.row(row) + col;
            const std::int64_t n = std::min(kPanel, end - col);
            for (std::int64_t j = 0; j < n; ++j) {
                to[j] += static_cast<double>(from[j]);
            }
        }
    }
}

// What a task multiplies: float32 panels, or panels of pairs of bfloat16.
template <class Element>
struct Panels {
    void (*product)(const Element* a, const Element* b, std::int64_t depth, float* tile, bool first);
    const Element* pieces;  // [block of tokens][panel][kPiece]
    std::int64_t n_panels;
    std::int64_t depth;        // of all blocks together
    std::int64_t block_depth;  // of all but the last
};

// The pieces that the next block of tokens will need, fetched into the second-level cache a share at a time: requests
// that come faster than memory answers hold up the products' own loads.
template <class Element>
class PiecesAhead {
  public:
    // None.
    explicit PiecesAhead(const Panels<Element>& panels) : piece_(panels.block_depth * kPanel) {}
    // block: the next one's first piece.
    PiecesAhead(const Panels<Element>& panels, const Square& square, const Element* block)
        : piece_(panels.block_depth * kPanel),
          sides_{block + square.row * piece_, block + square.col * piece_},
          left_{std::min(kSquare, panels.n_panels - square.row) * piece_,
                square.row == square.col ? 0 : kSquare * piece_} {}

    // A quarter of a piece: the kSquare² products of a whole square fetch its 2 · kSquare pieces.
    void fetch() {
        constexpr std::int64_t kLine = 64 / static_cast<std::int64_t>(sizeof(Element));
        const int side = left_[0] > 0 ? 0 : 1;
        const std::int64_t share = std::min(piece_ / 4, left_[side]);
        for (std::int64_t i = 0; i < share; i += kLine) {
            __builtin_prefetch(sides_[side] + i, 0, 2);
        }
        sides_[side] += share;
        left_[side] -= share;
    }

  private:
    std::int64_t piece_;
    const Element* sides_[2] = {};  // rows' panels, columns' panels
    std::int64_t left_[2] = {};     // elements
};

// tiles: kSquare · kSquare tiles of scratch.
template <class Element>
void do_square(const Panels<Element>& panels, const Square& square, float* tiles, const MatrixView<double>& total) {
    const std::int64_t row_end = std::min(square.row + kSquare, panels.n_panels);
    const auto n_tiles = [&](std::int64_t row) { return std::min(square.col + kSquare, row + 1) - square.col; };
    const std::int64_t piece = panels.block_depth * kPanel;
    const Element* block = panels.pieces;
    for (std::int64_t k = 0; k < panels.depth; k += panels.block_depth) {
        const std::int64_t depth = std::min(panels.block_depth, panels.depth - k);
        const bool is_last = k + panels.block_depth >= panels.depth;
        auto ahead = is_last ? PiecesAhead<Element>(panels)
                             : PiecesAhead<Element>(panels, square, block + panels.n_panels * piece);
        for (std::int64_t row = square.row; row < row_end; ++row) {
            float* tile = tiles + (row - square.row) * kSquare * kTile;
            for (std::int64_t i = 0; i < n_tiles(row); ++i, tile += kTile) {
                ahead.fetch();
                panels.product(block + row * piece, block + (square.col + i) * piece, depth, tile, k == 0);
            }
        }
        block += panels.n_panels * piece;
    }
    for (std::int64_t row = square.row; row < row_end; ++row) {
        add_rows(tiles + (row - square.row) * kSquare * kTile, row, square.col, n_tiles(row), total);
    }
}

struct Packing {
    std::int64_t n_panels;
    AlignedBuffer buffer;
    int n_threads;

    // pack_one(first token of the block, tokens of the block, first column, piece).
    template <class Element, class PackOne>
    const Element* pack(std::int64_t n_rows, std::int64_t tokens_of_element, const PackOne& pack_one) {
        static_assert(sizeof(Element) == sizeof(float));
        const std::int64_t piece = kPanelDepth / tokens_of_element * kPanel;
        const std::int64_t n_blocks = (n_rows + kPanelDepth - 1) / kPanelDepth;
        auto* const pieces = reinterpret_cast<Element*>(buffer.reserve(n_blocks * n_panels * piece));
        run_blocks(n_blocks, n_threads, [&](std::int64_t block, int) {
            const std::int64_t k = block * kPanelDepth;
            for (std::int64_t panel = 0; panel < n_panels; ++panel) {
                pack_one(k, std::min(kPanelDepth, n_rows - k), panel * kPanel,
                         pieces + (block * n_panels + panel) * piece);
            }
        });
        return pieces;
    }
};

template <class T>
void accumulate(const AccumulateMomentKernels& kernels, const MatrixView<const T>& keys, bool in_pairs,
                const MatrixView<double>& total, int n_threads) {
    Packing packing{panels_of(keys.cols), {}, n_threads};
    const std::vector<Square> squares = lower_squares(packing.n_panels);
    std::vector<AlignedBuffer> tiles(static_cast<std::size_t>(std::max(n_threads, 1)));
    const auto do_squares = [&](const auto& panels) {
        run_blocks(static_cast<std::int64_t>(squares.size()), n_threads, [&](std::int64_t number, int worker) {
            float* const scratch = tiles[static_cast<std::size_t>(worker)].reserve(kSquare * kSquare * kTile);
            do_square(panels, squares[static_cast<std::size_t>(number)], scratch, total);
        });
    };
    for (std::int64_t first = 0; first < keys.rows; first += kMomentRows) {
        const std::int64_t n_rows = std::min(kMomentRows, keys.rows - first);
        if constexpr (std::is_same_v<T, BFloat16>) {
            if (in_pairs) {
                const auto* const pieces = packing.pack<std::uint32_t>(
                    n_rows, 2, [&](std::int64_t k, std::int64_t n, std::int64_t col, std::uint32_t* piece) {
                        pack_pairs(keys, first + k, n, col, piece);
                    });
                do_squares(Panels<std::uint32_t>{kernels.pair_product, pieces, packing.n_panels, (n_rows + 1) / 2,
                                                 kPanelDepth / 2});
                continue;
            }
        }
        const auto* const pieces =
            packing.pack<float>(n_rows, 1, [&](std::int64_t k, std::int64_t n, std::int64_t col, float* piece) {
                pack_panel(keys, first + k, n, col, piece);
            });
        do_squares(Panels<float>{kernels.product, pieces, packing.n_panels, n_rows, kPanelDepth});
    }
}

// Measured at the first call (some milliseconds): bfloat16 is twice as fast as float32 on some processors with AVX-512
// BF16, half as fast on others.
bool pairs_are_faster() {
    static const bool are_faster = [] {
        constexpr double kSeconds = 3e-3;
        const CpuLevel level = machine_cpu_level();
        const double float32 = product_rate(Product::kFloat32, level, 1, kSeconds);
        return product_rate(Product::kBf16, level, 1, kSeconds) >= kClearLead * float32;
    }();
    return are_faster;
}

bool takes_pairs(const AccumulateMomentKernels& kernels, const KeyMatrix& keys, MomentProducts products) {
    const bool has_pairs = kernels.pair_product != nullptr && std::holds_alternative<MatrixView<const BFloat16>>(keys);
    REP_FAST_CHECK(has_pairs || products != MomentProducts::kBf16,
                   "products of bfloat16 need bfloat16 keys and a processor with AVX-512 BF16; use precision auto");
    return has_pairs &&
           (products == MomentProducts::kBf16 || (products == MomentProducts::kAuto && pairs_are_faster()));
}

}  // namespace

const DispatchTable<AccumulateMomentKernels>& accumulate_moment_table() {
    static const auto table = [] {
        AccumulateMomentKernels with_pairs = avx512::kAccumulateMoment;
        with_pairs.pair_product = avx512_bf16::kMomentPairProduct;
        return DispatchTable<AccumulateMomentKernels>{{{CpuLevel::kPortable, portable::kAccumulateMoment},
                                                       {CpuLevel::kAvx2, avx2::kAccumulateMoment},
                                                       {CpuLevel::kAvx512, avx512::kAccumulateMoment},
                                                       {CpuLevel::kAvx512Bf16, with_pairs}}};
    }();
    return table;
}

void accumulate_moment(const KeyMatrix& key_matrix, const MatrixView<double>& total, MomentProducts products,
                       CpuLevel level, int n_threads) {
    const AccumulateMomentKernels& kernels = at_level(accumulate_moment_table(), level).kernels;
    const bool in_pairs = takes_pairs(kernels, key_matrix, products);
    std::visit(
        [&](const auto& keys) {
            REP_FAST_CHECK(
                total.rows == keys.cols && total.cols == keys.cols,
                "total must be " << keys.cols << " x " << keys.cols << ", got " << total.rows << " x " << total.cols);
            accumulate(kernels, keys, in_pairs, total, n_threads);
        },
        key_matrix);
}

}  // namespace rep_fast
