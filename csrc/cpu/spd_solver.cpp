// Driver and portable bodies of spd_solver.
//
// Forward, L Y = B: the rows of block i take the products of all rows before them, 128 at a time, then meet the inverse
// of their diagonal block. Backward, Lᵀ X = Y: block i meets its inverse and is taken from all rows before it. Both
// read L by blocks of rows, each once. The columns of a task (45 KB per block and 112 columns) pass in groups of a
// register tile's width, whose part of b (24 KB) stays in the first-level cache.
#include "cpu/spd_solver.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <utility>
#include <vector>

#include "core/aligned_buffer.h"
#include "core/error.h"
#include "core/work_queue.h"
#include "cpu/simd_portable.h"
#include "cpu/subtract_tile.h"

namespace rep_fast {
namespace portable {
namespace {

void subtract_float32(const Subtraction<float>& task, std::int64_t n_cols) {
    subtract<Simd>(task, n_cols);
}

void subtract_float64(const Subtraction<double>& task, std::int64_t n_cols) {
    subtract<Simd64>(task, n_cols);
}

void widen(const float* from, std::int64_t n, double* to) {
    for (std::int64_t i = 0; i < n; ++i) {
        to[i] = static_cast<double>(from[i]);
    }
}

constexpr SpdSolverKernels kSpdSolver = {
    .float32 = subtract_of<Simd>(subtract_float32), .float64 = subtract_of<Simd64>(subtract_float64), .widen = widen};

}  // namespace
}  // namespace portable

const DispatchTable<SpdSolverKernels>& spd_solver_table() {
    static const auto table = table_up_to_avx512(portable::kSpdSolver, avx2::kSpdSolver, avx512::kSpdSolver);
    return table;
}

namespace {

constexpr std::int64_t kDepth = 128;
// Row stride of a copied block: off the powers of two, so that its rows do not share cache sets.
constexpr std::int64_t kCopyStride = kDepth + 16;
constexpr std::int64_t kSolveColumns = 16;   // of a task, at least
constexpr std::int64_t kMostColumns = 240;   // of one task
constexpr std::int64_t kResidualRows = 192;  // of one task

// The part of a matrix that is wanted next, asked for a few lines at a time while products are made: short pieces of
// many rows defeat the hardware's prefetcher.
template <class T>
class Ahead {
  public:
    Ahead() = default;
    Ahead(const MatrixView<const T>& matrix, std::int64_t row, std::int64_t n_rows, std::int64_t col,
          std::int64_t n_cols)
        : matrix_(matrix),
          row_(row),
          end_row_(std::min(row + n_rows, matrix.rows)),
          begin_col_(col),
          end_col_(std::min(col + n_cols, matrix.cols)),
          col_(col) {
        if (begin_col_ >= end_col_) {
            row_ = end_row_;
        }
    }

    std::int64_t n_lines() const { return (end_row_ - row_) * ((end_col_ - begin_col_ + kLine - 1) / kLine); }

    void fetch(std::int64_t n_lines) {
        for (; n_lines > 0 && row_ < end_row_; --n_lines) {
            __builtin_prefetch(matrix_.row(row_) + col_, 0, 2);
            col_ += kLine;
            if (col_ >= end_col_) {
                col_ = begin_col_;
                ++row_;
            }
        }
    }

  private:
    static constexpr std::int64_t kLine = 64 / sizeof(T);
    MatrixView<const T> matrix_;
    std::int64_t row_ = 0;
    std::int64_t end_row_ = 0;
    std::int64_t begin_col_ = 0;
    std::int64_t end_col_ = 0;
    std::int64_t col_ = 0;
};

// Columns that pass through one register tile.
struct Group {
    std::int64_t col;
    std::int64_t width;
};

// Groups of n_cols columns, filled up to whole vectors; two vectors twice rather than three and one, whose few sums
// would wait for each other.
template <class T>
std::vector<Group> groups_of(const Subtract<T>& kernel, std::int64_t n_cols) {
    const std::int64_t most = kernel.columns_at_once / kernel.lanes;
    std::vector<Group> groups;
    for (std::int64_t col = 0; col < n_cols;) {
        const std::int64_t left = (n_cols - col + kernel.lanes - 1) / kernel.lanes;
        const std::int64_t width = (left == most + 1 ? (left + 1) / 2 : std::min(left, most)) * kernel.lanes;
        groups.push_back({col, width});
        col += width;
    }
    return groups;
}

// Scratch whose groups lie one behind the other, each [n_rows, width]: what a tile reads is contiguous, which the
// hardware's prefetcher follows.
template <class T>
class GroupedColumns {
  public:
    GroupedColumns(std::vector<Group> groups, std::int64_t n_rows)
        : groups_(std::move(groups)),
          n_rows_(n_rows),
          n_cols_(groups_.empty() ? 0 : groups_.back().col + groups_.back().width),
          data_(reinterpret_cast<T*>(buffer_.reserve(n_rows_ * n_cols_ * std::int64_t{sizeof(T) / sizeof(float)}))) {}

    const std::vector<Group>& groups() const { return groups_; }
    T* at(std::int64_t row, const Group& group) const { return data_ + group.col * n_rows_ + row * group.width; }
    void clear() { std::fill_n(data_, n_rows_ * n_cols_, T{}); }

    // entry(row, column) fills columns [0, n_cols) of rows [first, first + n), zeros the rest of their vectors.
    template <class Entry>
    void fill(std::int64_t first, std::int64_t n, std::int64_t n_cols, const Entry& entry) {
        for (const Group& group : groups_) {
            const std::int64_t there = std::min(group.width, n_cols - group.col);
            for (std::int64_t row = first; row < first + n; ++row) {
                T* const to = at(row, group);
                for (std::int64_t j = 0; j < there; ++j) {
                    to[j] = entry(row, group.col + j);
                }
                std::fill(to + there, to + group.width, T{});
            }
        }
    }

    // use(row, column, entry) for the same entries.
    template <class Use>
    void for_each(std::int64_t first, std::int64_t n, std::int64_t n_cols, const Use& use) const {
        for (const Group& group : groups_) {
            const std::int64_t there = std::min(group.width, n_cols - group.col);
            for (std::int64_t row = first; row < first + n; ++row) {
                const T* const from = at(row, group);
                for (std::int64_t j = 0; j < there; ++j) {
                    use(row, group.col + j, from[j]);
                }
            }
        }
    }

  private:
    std::vector<Group> groups_;
    std::int64_t n_rows_;
    std::int64_t n_cols_;
    AlignedBuffer buffer_;
    T* data_;
};

// Entry (r, k) is data[r · row_stride + k · depth_stride].
template <class T>
struct Left {
    const T* data;
    std::int64_t row_stride;
    std::int64_t depth_stride;
    std::int64_t n_rows;
    std::int64_t depth;
};

// c[c_row…] −= a · b[b_row…], columns alike grouped.
template <class T, class A>
void subtract_block(const Subtract<T>& kernel, const Left<T>& a, const GroupedColumns<T>& b, std::int64_t b_row,
                    const GroupedColumns<T>& c, std::int64_t c_row, Ahead<A> ahead) {
    const auto n_groups = std::ssize(b.groups());
    const std::int64_t n_strips = (a.n_rows + kernel.rows_at_once - 1) / kernel.rows_at_once;
    const std::int64_t lines = ahead.n_lines() / std::max<std::int64_t>(n_groups * n_strips, 1) + 1;
    for (const Group& group : b.groups()) {
        for (std::int64_t row = 0; row < a.n_rows; row += kernel.rows_at_once) {
            ahead.fetch(lines);
            kernel.run({.a = a.data + row * a.row_stride,
                        .row_stride = a.row_stride,
                        .depth_stride = a.depth_stride,
                        .b = b.at(b_row, group),
                        .b_stride = group.width,
                        .depth = a.depth,
                        .c = c.at(c_row + row, group),
                        .c_stride = group.width,
                        .n_rows = std::min(kernel.rows_at_once, a.n_rows - row)},
                       group.width);
        }
    }
}

// The solves for one task's columns.
class ColumnSolve {
  public:
    ColumnSolve(const CholeskyFactor& factor, const SpdSolverKernels& kernels, std::int64_t n_cols)
        : lower_(factor.lower),
          inverses_(factor.inverses),
          scale_(factor.scale.data()),
          kernels_(kernels),
          x_(groups_of(kernels.float32, n_cols), lower_.rows),
          block_(x_.groups(), kSolveBlock) {}

    void run(const MatrixView<const double>& b, const MatrixView<double>& x) {
        // float32 would flush small right-hand sides to zero
        std::vector<double> sizes(static_cast<std::size_t>(b.cols), std::numeric_limits<double>::min());
        for (std::int64_t i = 0; i < b.rows; ++i) {
            for (std::int64_t j = 0; j < b.cols; ++j) {
                double& size = sizes[static_cast<std::size_t>(j)];
                size = std::max(size, std::abs(b.row(i)[j] * scale_[i]));
            }
        }
        x_.fill(0, b.rows, b.cols, [&](std::int64_t i, std::int64_t j) {
            return static_cast<float>(b.row(i)[j] * scale_[i] / sizes[static_cast<std::size_t>(j)]);
        });
        forward();
        backward();
        x_.for_each(0, b.rows, b.cols, [&](std::int64_t i, std::int64_t j, float entry) {
            x.row(i)[j] = static_cast<double>(entry) * sizes[static_cast<std::size_t>(j)] * scale_[i];
        });
    }

  private:
    void forward() {
        for (std::int64_t block = 0; block < lower_.rows; block += kSolveBlock) {
            const std::int64_t n_rows = std::min(kSolveBlock, lower_.rows - block);
            for (std::int64_t k = 0; k < block; k += kDepth) {
                const bool is_last = k + kDepth >= block;
                const Ahead<float> ahead(lower_, is_last ? block + kSolveBlock : block, n_rows,
                                         is_last ? 0 : k + kDepth, kDepth);
                const Left<float> rows = {lower_.row(block) + k, lower_.row_stride, 1, n_rows,
                                          std::min(kDepth, block - k)};
                subtract_block(kernels_.float32, rows, x_, k, x_, block, ahead);
            }
            solve_diagonal(block, n_rows, false);
        }
    }

    void backward() {
        float* const copy = copied_.reserve(kSolveBlock * kCopyStride);
        for (std::int64_t block = (lower_.rows - 1) / kSolveBlock * kSolveBlock; block >= 0; block -= kSolveBlock) {
            const std::int64_t n_rows = std::min(kSolveBlock, lower_.rows - block);
            solve_diagonal(block, n_rows, true);
            for (std::int64_t col = 0; col < block; col += kDepth) {
                const std::int64_t n = std::min(kDepth, block - col);
                for (std::int64_t i = 0; i < n_rows; ++i) {
                    std::copy_n(lower_.row(block + i) + col, n, copy + i * kCopyStride);
                }
                const bool is_last = col + kDepth >= block;
                const Ahead<float> ahead(lower_, is_last ? block - kSolveBlock : block, is_last ? kSolveBlock : n_rows,
                                         is_last ? 0 : col + kDepth, kDepth);
                subtract_block(kernels_.float32, Left<float>{copy, 1, kCopyStride, n, n_rows}, x_, block, x_, col,
                               ahead);
            }
        }
    }

    // Rows of x in the block: their product with the inverse, or its transpose. The inverse is kept negative, so that a
    // subtraction from zero is the product.
    void solve_diagonal(std::int64_t block, std::int64_t n_rows, bool transposed) {
        for (const Group& group : x_.groups()) {
            float* const rows = x_.at(block, group);
            std::copy_n(rows, n_rows * group.width, block_.at(0, group));
            std::fill_n(rows, n_rows * group.width, 0.0f);
        }
        const std::int64_t stride = inverses_.row_stride;
        const Left<float> inverse = {inverses_.row(block), transposed ? 1 : stride, transposed ? stride : 1, n_rows,
                                     n_rows};
        subtract_block(kernels_.float32, inverse, block_, 0, x_, block, Ahead<float>());
    }

    const MatrixView<const float>& lower_;
    const MatrixView<const float>& inverses_;
    const double* scale_;
    const SpdSolverKernels& kernels_;
    GroupedColumns<float> x_;
    GroupedColumns<float> block_;  // right-hand sides of a diagonal block
    AlignedBuffer copied_;         // a block of rows of L
};

void check_square(std::int64_t rows, std::int64_t cols, const char* name) {
    REP_FAST_CHECK(rows == cols, name << " must be square, got " << rows << " x " << cols);
}

void check_inverses(std::int64_t key_dim, std::int64_t rows, std::int64_t cols) {
    REP_FAST_CHECK(rows == key_dim && cols == kSolveBlock,
                   "inverses must be " << key_dim << " x " << kSolveBlock << ", got " << rows << " x " << cols);
}

void check_columns(const MatrixView<const double>& columns, const MatrixView<double>& results, std::int64_t rows) {
    REP_FAST_CHECK(columns.rows == rows && results.rows == rows && columns.cols == results.cols,
                   "columns and results must have " << rows << " rows and as many columns, got " << columns.rows
                                                    << " x " << columns.cols << " and " << results.rows << " x "
                                                    << results.cols);
}

void invert_block(const MatrixView<const float>& lower, std::int64_t block, const MatrixView<float>& inverses) {
    const std::int64_t n = std::min(kSolveBlock, lower.rows - block);
    std::vector<double> inverse(static_cast<std::size_t>(n * n), 0.0);
    for (std::int64_t i = 0; i < n; ++i) {
        double* const row = inverse.data() + i * n;
        row[i] = 1.0;
        for (std::int64_t k = 0; k < i; ++k) {
            const auto factor = static_cast<double>(lower.row(block + i)[block + k]);
            for (std::int64_t j = 0; j <= k; ++j) {
                row[j] -= factor * inverse[static_cast<std::size_t>(k * n + j)];
            }
        }
        const auto diagonal = static_cast<double>(lower.row(block + i)[block + i]);
        float* const out = inverses.row(block + i);
        std::fill_n(out, kSolveBlock, 0.0f);
        for (std::int64_t j = 0; j <= i; ++j) {
            row[j] /= diagonal;
            out[j] = static_cast<float>(-row[j]);
        }
    }
}

// A block of the matrix in float64: widened, or as it is.
Left<double> widened(const SpdSolverKernels& kernels, const MatrixView<const float>& rows, AlignedBuffer& scratch) {
    // twice as many floats: room for doubles
    auto* const copy = reinterpret_cast<double*>(scratch.reserve(2 * kResidualRows * kCopyStride));
    for (std::int64_t i = 0; i < rows.rows; ++i) {
        kernels.widen(rows.row(i), rows.cols, copy + i * kCopyStride);
    }
    return {copy, kCopyStride, 1, rows.rows, rows.cols};
}
Left<double> widened(const SpdSolverKernels&, const MatrixView<const double>& rows, AlignedBuffer&) {
    return {rows.data, rows.row_stride, 1, rows.rows, rows.cols};
}

}  // namespace

void invert_diagonal_blocks(const MatrixView<const float>& lower, const MatrixView<float>& inverses, int n_threads) {
    check_square(lower.rows, lower.cols, "lower");
    check_inverses(lower.rows, inverses.rows, inverses.cols);
    run_blocks((lower.rows + kSolveBlock - 1) / kSolveBlock, n_threads,
               [&](std::int64_t number, int) { invert_block(lower, number * kSolveBlock, inverses); });
}

void cholesky_solve(const CholeskyFactor& factor, const MatrixView<const double>& b, const MatrixView<double>& x,
                    CpuLevel level, int n_threads) {
    const auto& [lower, inverses, scale] = factor;
    check_square(lower.rows, lower.cols, "lower");
    check_inverses(lower.rows, inverses.rows, inverses.cols);
    REP_FAST_CHECK(std::ssize(scale) == lower.rows,
                   "scale must have " << lower.rows << " entries, got " << scale.size());
    check_columns(b, x, lower.rows);
    const SpdSolverKernels& kernels = at_level(spd_solver_table(), level).kernels;
    const std::int64_t share = (b.cols + std::max(n_threads, 1) - 1) / std::max(n_threads, 1);
    const std::int64_t width = std::min((share + kSolveColumns - 1) / kSolveColumns * kSolveColumns, kMostColumns);
    run_blocks(width == 0 ? 0 : (b.cols + width - 1) / width, n_threads, [&](std::int64_t number, int) {
        const std::int64_t col = number * width;
        const std::int64_t n = std::min(width, b.cols - col);
        ColumnSolve(factor, kernels, n)
            .run({b.data + col, b.rows, n, b.row_stride}, {x.data + col, x.rows, n, x.row_stride});
    });
}

template <class T>
void subtract_product(const MatrixView<const T>& matrix, double shift, const MatrixView<const double>& x,
                      const MatrixView<double>& rest, CpuLevel level, int n_threads) {
    check_square(matrix.rows, matrix.cols, "the matrix");
    check_columns(x, rest, matrix.rows);
    const SpdSolverKernels& kernels = at_level(spd_solver_table(), level).kernels;
    const std::vector<Group> groups = groups_of(kernels.float64, x.cols);
    GroupedColumns<double> columns(groups, x.rows);
    const std::int64_t n_blocks = (matrix.rows + kResidualRows - 1) / kResidualRows;
    run_blocks(n_blocks, n_threads, [&](std::int64_t number, int) {
        const std::int64_t first = number * kResidualRows;
        columns.fill(first, std::min(kResidualRows, x.rows - first), x.cols,
                     [&](std::int64_t i, std::int64_t j) { return x.row(i)[j]; });
    });
    run_blocks(n_blocks, n_threads, [&](std::int64_t number, int) {
        const std::int64_t first = number * kResidualRows;
        const std::int64_t n_rows = std::min(kResidualRows, matrix.rows - first);
        AlignedBuffer scratch;
        GroupedColumns<double> products(groups, n_rows);  // negative: subtracted from zero
        products.clear();
        for (std::int64_t k = 0; k < matrix.cols; k += kDepth) {
            const MatrixView<const T> part = {matrix.row(first) + k, n_rows, std::min(kDepth, matrix.cols - k),
                                              matrix.row_stride};
            subtract_block(kernels.float64, widened(kernels, part, scratch), columns, k, products, 0,
                           Ahead<T>(matrix, first, n_rows, k + kDepth, kDepth));
        }
        products.for_each(0, n_rows, x.cols, [&](std::int64_t i, std::int64_t j, double product) {
            rest.row(first + i)[j] += product - shift * x.row(first + i)[j];
        });
    });
}

template void subtract_product(const MatrixView<const float>&, double, const MatrixView<const double>&,
                               const MatrixView<double>&, CpuLevel, int);
template void subtract_product(const MatrixView<const double>&, double, const MatrixView<const double>&,
                               const MatrixView<double>&, CpuLevel, int);

}  // namespace rep_fast
