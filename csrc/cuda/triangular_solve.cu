// Triangular solves and float64 residuals for few columns, for every architecture.
//
// One launch per diagonal block and direction: every block of it solves the diagonal block's 64 rows for up to 64
// columns by a product with the inverse (a quarter of a million multiply-adds, cheaper than waiting for another block)
// and takes their share from 64 further rows, for which it reads its tile of the factor, asked for before the solve.
// Bytes: 2·M² for each direction and 64 columns from memory, as much again for the columns from L2; 2·M / 64 launches.
// Limit: launches up to M of some ten thousand. Registers, occupancy, time: not measured yet on a device.
#include <cuda_runtime.h>

#include <algorithm>
#include <limits>

#include "cuda/eight.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/copy_async.cuh"
#include "cuda/triangular_solve.h"

namespace rep_fast::cuda {
namespace {

constexpr int kBlock = static_cast<int>(kSolveBlock);
constexpr int kColumns = static_cast<int>(kSolveColumns);
constexpr int kThreads = 256;
constexpr int kSide = 16;  // threads along either side of a tile
constexpr int kOwn = 4;    // entries of a thread on either side
static_assert(kSide * kSide == kThreads && kSide * kOwn == kBlock && kBlock == kColumns);
constexpr int kDepth = 16;  // columns of the matrix that a residual takes at a time
// Parts of the rows whose largest entries are found apart; a constant, as the bits need not depend on the device.
constexpr int kParts = 64;
constexpr double kSmallest = std::numeric_limits<double>::min();

struct Lower {
    const float* data;
    std::int64_t stride;
    const float* inverses;
    std::int64_t key_dim;
    bool sixteen_bytes;
};

struct StepShared {
    alignas(16) float tile[kBlock][kBlock];
    float inverse[kBlock][kBlock];
    float right[kBlock][kColumns];
    float solved[kBlock][kColumns];
};

// ---- diagonal blocks ----------------------------------------------------------------------------------------------

struct InversionShared {
    double inverse[kBlock][kBlock];
};

// A block of one thread per column: column j of L_bb⁻¹ from the top down.
__global__ void __launch_bounds__(kBlock)
    invert_kernel(const float* lower, std::int64_t stride, std::int64_t key_dim, float* inverses) {
    auto& shared = shared_as<InversionShared>();
    const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kBlock;
    const int n = key_dim - first < kBlock ? static_cast<int>(key_dim - first) : kBlock;
    const int j = static_cast<int>(threadIdx.x);
    for (int i = 0; i < n; ++i) {
        const float* row = lower + (first + i) * stride + first;
        double sum = i == j ? 1.0 : 0.0;
        for (int k = j; k < i; ++k) {
            sum -= static_cast<double>(row[k]) * shared.inverse[k][j];  // written by this very thread
        }
        shared.inverse[i][j] = j <= i ? sum / static_cast<double>(row[i]) : 0.0;
        inverses[(first + i) * kBlock + j] = static_cast<float>(shared.inverse[i][j]);
    }
}

// ---- columns in and out -------------------------------------------------------------------------------------------

// largest[part, column] = max |b·scale| over the rows of a part; a thread per column.
__global__ void __launch_bounds__(kColumns)
    measure_kernel(const double* b, std::int64_t stride, const double* scale, std::int64_t key_dim,
                   std::int64_t n_columns, double* largest) {
    const std::int64_t column = static_cast<std::int64_t>(blockIdx.y) * kColumns + threadIdx.x;
    if (column >= n_columns) {
        return;
    }
    double size = kSmallest;
    for (std::int64_t row = blockIdx.x; row < key_dim; row += kParts) {
        size = fmax(size, fabs(b[row * stride + column] * scale[row]));
    }
    largest[blockIdx.x * n_columns + column] = size;
}

__device__ inline double size_of(const double* largest, std::int64_t n_columns, std::int64_t column) {
    double size = kSmallest;
    for (int part = 0; part < kParts; ++part) {
        size = fmax(size, largest[part * n_columns + column]);
    }
    return size;
}

// columns [groups, key_dim, kColumns]: b·scale brought to size one, zeros behind the last column. A block per row and
// group.
__global__ void __launch_bounds__(kColumns)
    fill_kernel(const double* b, std::int64_t stride, const double* scale, std::int64_t key_dim, std::int64_t n_columns,
                const double* largest, float* columns) {
    const std::int64_t column = static_cast<std::int64_t>(blockIdx.y) * kColumns + threadIdx.x;
    const double size = column < n_columns ? size_of(largest, n_columns, column) : 1.0;
    float* to = columns + blockIdx.y * key_dim * kColumns + threadIdx.x;
    for (std::int64_t row = blockIdx.x; row < key_dim; row += gridDim.x) {
        const double entry = column < n_columns ? b[row * stride + column] * scale[row] : 0.0;
        to[row * kColumns] = static_cast<float>(entry / size);
    }
}

__global__ void __launch_bounds__(kColumns)
    store_kernel(const float* columns, const double* scale, std::int64_t key_dim, std::int64_t n_columns,
                 const double* largest, double* x, std::int64_t stride) {
    const std::int64_t column = static_cast<std::int64_t>(blockIdx.y) * kColumns + threadIdx.x;
    if (column >= n_columns) {
        return;
    }
    const double size = size_of(largest, n_columns, column);
    const float* from = columns + blockIdx.y * key_dim * kColumns + threadIdx.x;
    for (std::int64_t row = blockIdx.x; row < key_dim; row += gridDim.x) {
        x[row * stride + column] = static_cast<double>(from[row * kColumns]) * size * scale[row];
    }
}

// ---- one step -----------------------------------------------------------------------------------------------------

// Asks for the 64 × 64 entries of L from (row, column) on; what lies outside is zeros.
__device__ inline void fetch_tile(const Lower& lower, std::int64_t row, std::int64_t column,
                                  float (&to)[kBlock][kBlock]) {
    constexpr int kPiece = 4;
    for (int piece = static_cast<int>(threadIdx.x); piece < kBlock * kBlock / kPiece; piece += kThreads) {
        const int i = piece / (kBlock / kPiece), j = piece % (kBlock / kPiece) * kPiece;
        const std::int64_t n_left = row + i < lower.key_dim ? lower.key_dim - (column + j) : 0;
        const float* const begin = lower.data + (row + i) * lower.stride + column + j;
        if (lower.sixteen_bytes) {
            const int n = n_left >= kPiece ? kPiece : n_left > 0 ? static_cast<int>(n_left) : 0;
            ptx::copy_16_async(&to[i][j], n > 0 ? begin : lower.data, n * static_cast<int>(sizeof(float)));
        } else {
            for (int m = 0; m < kPiece; ++m) {
                const bool is_there = m < n_left;
                ptx::copy_4_async(&to[i][j + m], is_there ? begin + m : lower.data,
                                  is_there ? static_cast<int>(sizeof(float)) : 0);
            }
        }
    }
    ptx::commit_copies();
}

// This thread's 4 × 4 entries of left · right, or leftᵀ · right.
template <bool kTransposed>
__device__ inline void multiply(const float (&left)[kBlock][kBlock], const float (&right)[kBlock][kColumns],
                                float (&products)[kOwn][kOwn]) {
    const int row = static_cast<int>(threadIdx.x) / kSide * kOwn, column = static_cast<int>(threadIdx.x) % kSide * kOwn;
#pragma unroll 8
    for (int k = 0; k < kBlock; ++k) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            const float factor = kTransposed ? left[k][row + i] : left[row + i][k];
#pragma unroll
            for (int j = 0; j < kOwn; ++j) {
                products[i][j] = __fmaf_rn(factor, right[k][column + j], products[i][j]);
            }
        }
    }
}

// solved[step's rows] = L_bb⁻¹ rest, or with its transpose backward, and rest −= their share in the tile of rows this
// block owns: forward those below, backward those above.
template <bool kBackward>
__global__ void __launch_bounds__(kThreads) step_kernel(Lower lower, std::int64_t step, float* rest, float* solved) {
    auto& shared = shared_as<StepShared>();
    const std::int64_t first = step * kBlock;
    const std::int64_t own = (kBackward ? blockIdx.x : step + 1 + blockIdx.x) * kBlock;
    const bool has_rows = kBackward ? own < first : own < lower.key_dim;
    if (has_rows) {
        fetch_tile(lower, kBackward ? first : own, kBackward ? own : first, shared.tile);
    }
    rest += blockIdx.y * lower.key_dim * kColumns;
    solved += blockIdx.y * lower.key_dim * kColumns;
    for (int place = static_cast<int>(threadIdx.x); place < kBlock * kBlock; place += kThreads) {
        const int i = place / kBlock, j = place % kBlock;
        const bool is_there = first + i < lower.key_dim;
        shared.inverse[i][j] = is_there ? lower.inverses[(first + i) * kBlock + j] : 0.0f;
        shared.right[i][j] = is_there ? rest[(first + i) * kColumns + j] : 0.0f;
    }
    __syncthreads();
    const int row = static_cast<int>(threadIdx.x) / kSide * kOwn, column = static_cast<int>(threadIdx.x) % kSide * kOwn;
    float products[kOwn][kOwn] = {};
    multiply<kBackward>(shared.inverse, shared.right, products);
    for (int i = 0; i < kOwn; ++i) {
        for (int j = 0; j < kOwn; ++j) {
            shared.solved[row + i][column + j] = products[i][j];
            if (blockIdx.x == 0 && first + row + i < lower.key_dim) {
                solved[(first + row + i) * kColumns + column + j] = products[i][j];
            }
            products[i][j] = 0.0f;
        }
    }
    ptx::wait_for_copies<0>();
    __syncthreads();
    if (!has_rows) {
        return;
    }
    multiply<kBackward>(shared.tile, shared.solved, products);
    for (int i = 0; i < kOwn; ++i) {
        for (int j = 0; j < kOwn; ++j) {
            if (own + row + i < lower.key_dim) {
                rest[(own + row + i) * kColumns + column + j] -= products[i][j];
            }
        }
    }
}

// ---- residual -----------------------------------------------------------------------------------------------------

template <class T>
struct ResidualShared {
    T matrix[kBlock][kDepth + 1];  // one more: rows of a warp lie in different banks
    double x[kDepth][kColumns];
};

template <class T>
__global__ void __launch_bounds__(kThreads) residual_kernel(Residual call) {
    auto& shared = shared_as<ResidualShared<T>>();
    const auto* matrix = static_cast<const T*>(call.matrix);
    const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kBlock;
    const std::int64_t first_column = static_cast<std::int64_t>(blockIdx.y) * kColumns;
    const int thread = static_cast<int>(threadIdx.x);
    const int row = thread / kSide, column = thread % kSide;  // and every kSide-th from there
    double products[kOwn][kOwn] = {};
    for (std::int64_t k = 0; k < call.key_dim; k += kDepth) {
        for (int place = thread; place < kBlock * kDepth; place += kThreads) {
            const std::int64_t i = first + place / kDepth, j = k + place % kDepth;
            const bool is_there = i < call.key_dim && j < call.key_dim;
            shared.matrix[place / kDepth][place % kDepth] = is_there ? matrix[i * call.matrix_stride + j] : T{0};
            const std::int64_t x_row = k + place / kColumns, x_column = first_column + place % kColumns;
            const bool is_entry = x_row < call.key_dim && x_column < call.n_columns;
            shared.x[place / kColumns][place % kColumns] = is_entry ? call.x[x_row * call.x_stride + x_column] : 0.0;
        }
        __syncthreads();
#pragma unroll
        for (int depth = 0; depth < kDepth; ++depth) {
#pragma unroll
            for (int i = 0; i < kOwn; ++i) {
                const auto factor = static_cast<double>(shared.matrix[row + i * kSide][depth]);
#pragma unroll
                for (int j = 0; j < kOwn; ++j) {
                    products[i][j] += factor * shared.x[depth][column + j * kSide];
                }
            }
        }
        __syncthreads();  // both are read before the next ones are written
    }
    for (int i = 0; i < kOwn; ++i) {
        for (int j = 0; j < kOwn; ++j) {
            const std::int64_t r = first + row + i * kSide, c = first_column + column + j * kSide;
            if (r < call.key_dim && c < call.n_columns) {
                const double shifted = products[i][j] + call.shift * call.x[r * call.x_stride + c];
                call.rest[r * call.rest_stride + c] -= shifted;
            }
        }
    }
}

// ---- host ---------------------------------------------------------------------------------------------------------

std::int64_t blocks_of(std::int64_t n) {
    return (n + kBlock - 1) / kBlock;
}

// Bytes of one of the two sets of columns, which lie one behind the other.
std::int64_t column_bytes(const CholeskySolve& call) {
    return blocks_of(call.n_columns) * kColumns * call.key_dim * static_cast<std::int64_t>(sizeof(float));
}

}  // namespace

void invert_diagonal_blocks(const float* lower, std::int64_t lower_stride, std::int64_t key_dim, float* inverses,
                            void* stream) {
    if (key_dim == 0) {
        return;
    }
    launch("invert_blocks", invert_kernel,
           {dim3(static_cast<unsigned>(blocks_of(key_dim))), dim3(kBlock), sizeof(InversionShared),
            static_cast<cudaStream_t>(stream)},
           lower, lower_stride, key_dim, inverses);
}

std::size_t scratch_bytes(const CholeskySolve& call) {
    const auto largest = kParts * call.n_columns * static_cast<std::int64_t>(sizeof(double));
    return static_cast<std::size_t>(2 * column_bytes(call) + largest);
}

void cholesky_solve(const CholeskySolve& call, void* stream) {
    if (call.key_dim == 0 || call.n_columns == 0) {
        return;
    }
    const auto on = static_cast<cudaStream_t>(stream);
    const auto n_groups = static_cast<unsigned>(blocks_of(call.n_columns));
    const std::int64_t n_steps = blocks_of(call.key_dim);
    auto* const columns = static_cast<float*>(call.scratch);
    auto* const others = columns + column_bytes(call) / static_cast<std::int64_t>(sizeof(float));
    auto* const largest = reinterpret_cast<double*>(others + (others - columns));
    const Lower lower = {call.lower, call.lower_stride, call.inverses, call.key_dim,
                         allows_sixteen_bytes(call.lower, call.lower_stride, sizeof(float))};
    const auto n_rows = static_cast<unsigned>(std::min<std::int64_t>(call.key_dim, 1024));
    launch("measure_columns", measure_kernel, {dim3(kParts, n_groups), dim3(kColumns), 0, on}, call.b, call.b_stride,
           call.scale, call.key_dim, call.n_columns, largest);
    launch("fill_columns", fill_kernel, {dim3(n_rows, n_groups), dim3(kColumns), 0, on}, call.b, call.b_stride,
           call.scale, call.key_dim, call.n_columns, largest, columns);
    const auto shape = [&](std::int64_t n_tiles) {
        return LaunchShape{dim3(static_cast<unsigned>(std::max<std::int64_t>(n_tiles, 1)), n_groups), dim3(kThreads),
                           sizeof(StepShared), on};
    };
    for (std::int64_t step = 0; step < n_steps; ++step) {
        launch("solve_forward", step_kernel<false>, shape(n_steps - step - 1), lower, step, columns, others);
    }
    for (std::int64_t step = n_steps - 1; step >= 0; --step) {
        launch("solve_backward", step_kernel<true>, shape(step), lower, step, others, columns);
    }
    launch("store_columns", store_kernel, {dim3(n_rows, n_groups), dim3(kColumns), 0, on}, columns, call.scale,
           call.key_dim, call.n_columns, largest, call.x, call.x_stride);
}

void subtract_product(const Residual& call, void* stream) {
    if (call.key_dim == 0 || call.n_columns == 0) {
        return;
    }
    const dim3 grid(static_cast<unsigned>(blocks_of(call.key_dim)), static_cast<unsigned>(blocks_of(call.n_columns)));
    const auto on = static_cast<cudaStream_t>(stream);
    if (call.is_double) {
        launch("residual", residual_kernel<double>, {grid, dim3(kThreads), sizeof(ResidualShared<double>), on}, call);
    } else {
        launch("residual", residual_kernel<float>, {grid, dim3(kThreads), sizeof(ResidualShared<float>), on}, call);
    }
}

}  // namespace rep_fast::cuda
