// Driver and portable bodies of gated_adapter: tasks are blocks of tokens × panels of weight rows, each done one block
// of depth at a time, so that what a task touches stays in the second-level cache.
#include "cpu/gated_adapter.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "core/aligned_buffer.h"
#include "core/error.h"
#include "core/work_queue.h"
#include "cpu/simd_portable.h"

namespace rep_fast {
namespace portable {
namespace {

void dots_f32(const DotBlock<float>& block) {
    dot_block<Simd>(block);
}

void dots_bf16(const DotBlock<BFloat16>& block) {
    dot_block<Simd>(block);
}

constexpr GatedAdapterKernels kGatedAdapter = {dots_f32, dots_bf16};

}  // namespace
}  // namespace portable

namespace {

constexpr std::int64_t kTokenBlock = 32;
constexpr std::int64_t kHiddenPanel = 48;  // divisible by every kDotHidden
// A strip of 6 weight rows and a tile of 4 keys of this depth (20 KB) stay in the first-level cache.
constexpr std::int64_t kDepthBlock = 512;
// Up to this many tokens the weights are read once anyway: whole rows, no unfinished sums.
constexpr std::int64_t kWholeRowTokens = 4;
// From this many tokens on, 16-bit weights are widened once per panel instead of once per tile of tokens.
constexpr std::int64_t kWidenTokens = 16;
// Multiply-adds that pay for starting one more thread (tens of microseconds).
constexpr std::int64_t kWorkPerThread = std::int64_t{1} << 21;

struct Scratch {
    AlignedBuffer keys;      // [kTokenBlock, depth]
    AlignedBuffer weights;   // [kHiddenPanel, depth]
    AlignedBuffer lanes;     // [kTokenBlock, kHiddenPanel, kMaxLanes]
    AlignedBuffer products;  // [kTokenBlock, kHiddenPanel]
};

// Rows of float32: the matrix itself, or a widened copy of one block of it.
struct Rows {
    const float* data;
    std::int64_t stride;
};

Rows widened(const MatrixView<const float>& matrix, std::int64_t row, std::int64_t, std::int64_t col, std::int64_t,
             AlignedBuffer&) {
    return {matrix.row(row) + col, matrix.row_stride};
}

template <class T>
Rows widened(const MatrixView<const T>& matrix, std::int64_t row, std::int64_t n_rows, std::int64_t col,
             std::int64_t n_cols, AlignedBuffer& scratch) {
    float* const copy = scratch.reserve(n_rows * n_cols);
    for (std::int64_t i = 0; i < n_rows; ++i) {
        const T* const from = matrix.row(row + i) + col;
        float* const to = copy + i * n_cols;
        for (std::int64_t j = 0; j < n_cols; ++j) {
            to[j] = to_float(from[j]);
        }
    }
    return {copy, n_cols};
}

void run_dots(const GatedAdapterKernels& kernels, const DotBlock<float>& block) {
    kernels.dots_f32(block);
}

void run_dots(const GatedAdapterKernels& kernels, const DotBlock<BFloat16>& block) {
    kernels.dots_bf16(block);
}

// One task: tokens [t0, t0 + n_tokens) × rows [h0, h0 + n_hidden).
struct Task {
    std::int64_t t0, n_tokens, h0, n_hidden;
};

// products[n_tokens, product_stride] = keys · weightsᵀ of one task.
template <class K, class W>
void task_dots(const GatedAdapterKernels& kernels, const MatrixView<const K>& keys, const MatrixView<const W>& weights,
               const Task& task, Scratch& scratch, float* products, std::int64_t product_stride) {
    const std::int64_t block_depth = task.n_tokens <= kWholeRowTokens ? keys.cols : kDepthBlock;
    float* const lanes = scratch.lanes.reserve(kTokenBlock * kHiddenPanel * kMaxLanes);
    for (std::int64_t k = 0; k < keys.cols; k += block_depth) {
        const std::int64_t depth = std::min(block_depth, keys.cols - k);
        const bool last = k + depth == keys.cols;
        const Rows key = widened(keys, task.t0, task.n_tokens, k, depth, scratch.keys);
        if (std::is_same_v<W, float> || task.n_tokens >= kWidenTokens) {
            const Rows weight = widened(weights, task.h0, task.n_hidden, k, depth, scratch.weights);
            kernels.dots_f32({key.data, key.stride, task.n_tokens, weight.data, weight.stride, task.n_hidden, depth,
                              lanes, products, product_stride, k == 0, last});
        } else {
            run_dots(kernels,
                     DotBlock<W>{key.data, key.stride, task.n_tokens, weights.row(task.h0) + k, weights.row_stride,
                                 task.n_hidden, depth, lanes, products, product_stride, k == 0, last});
        }
    }
}

// Calls body(task, panel number, scratch) for every task; 16-bit and 32-bit operands alike.
void for_each_task(std::int64_t n_tokens, std::int64_t n_hidden, std::int64_t key_dim, int n_threads,
                   const std::function<void(const Task&, std::int64_t, Scratch&)>& body) {
    const std::int64_t n_panels = (n_hidden + kHiddenPanel - 1) / kHiddenPanel;
    const std::int64_t n_blocks = (n_tokens + kTokenBlock - 1) / kTokenBlock;
    const std::int64_t worthwhile = 1 + n_tokens * n_hidden * key_dim / kWorkPerThread;
    const int workers = static_cast<int>(std::clamp<std::int64_t>(worthwhile, 1, std::max(n_threads, 1)));
    std::vector<Scratch> scratch(static_cast<std::size_t>(workers));
    run_blocks(n_blocks * n_panels, workers, [&](std::int64_t number, int worker) {
        const std::int64_t panel = number % n_panels;
        const std::int64_t t0 = number / n_panels * kTokenBlock;
        const std::int64_t h0 = panel * kHiddenPanel;
        body({t0, std::min(kTokenBlock, n_tokens - t0), h0, std::min(kHiddenPanel, n_hidden - h0)}, panel,
             scratch[static_cast<std::size_t>(worker)]);
    });
}

float gelu(float x) {
    constexpr float kHalfRoot = 0.70710678118654752440f;
    return 0.5f * x * (1.0f + std::erf(x * kHalfRoot));
}

// Adds the panel's part of each token's logit, in double.
void add_gate(const GateInput& input, const Task& task, const float* products, double* partial) {
    for (std::int64_t t = 0; t < task.n_tokens; ++t) {
        double logit = 0.0;
        for (std::int64_t h = 0; h < task.n_hidden; ++h) {
            const auto row = static_cast<std::size_t>(task.h0 + h);
            const float activation = gelu(products[t * kHiddenPanel + h] + input.b1[row]);
            logit += static_cast<double>(activation) * static_cast<double>(input.w2[row]);
        }
        partial[task.t0 + t] = logit;
    }
}

}  // namespace

const DispatchTable<GatedAdapterKernels>& gated_adapter_table() {
    static const auto table = table_up_to_avx512(portable::kGatedAdapter, avx2::kGatedAdapter, avx512::kGatedAdapter);
    return table;
}

GateReport gate_logits(const GateInput& input, float threshold, std::span<float> logits, CpuLevel level,
                       int n_threads) {
    const GatedAdapterKernels& kernels = at_level(gated_adapter_table(), level).kernels;
    std::visit(
        [&](const auto& keys, const auto& w1) {
            const auto n_hidden = static_cast<std::size_t>(w1.rows);
            REP_FAST_CHECK(keys.cols == w1.cols, "keys are " << keys.cols << " wide, w1 " << w1.cols);
            REP_FAST_CHECK(input.b1.size() == n_hidden && input.w2.size() == n_hidden,
                           "b1 and w2 must have " << n_hidden << " entries");
            REP_FAST_CHECK(logits.size() == static_cast<std::size_t>(keys.rows),
                           "logits must have " << keys.rows << " entries, got " << logits.size());
            const std::int64_t n_panels = (w1.rows + kHiddenPanel - 1) / kHiddenPanel;
            // one row per panel, added in panel order at the end: the same bits whichever thread did which
            std::vector<double> partial(static_cast<std::size_t>(n_panels * keys.rows));
            for_each_task(keys.rows, w1.rows, keys.cols, n_threads,
                          [&](const Task& task, std::int64_t panel, Scratch& scratch) {
                              float* const products = scratch.products.reserve(kTokenBlock * kHiddenPanel);
                              task_dots(kernels, keys, w1, task, scratch, products, kHiddenPanel);
                              add_gate(input, task, products, partial.data() + panel * keys.rows);
                          });
            for (std::int64_t t = 0; t < keys.rows; ++t) {
                double logit = static_cast<double>(input.b2);
                for (std::int64_t panel = 0; panel < n_panels; ++panel) {
                    logit += partial[static_cast<std::size_t>(panel * keys.rows + t)];
                }
                logits[static_cast<std::size_t>(t)] = static_cast<float>(logit);
            }
        },
        input.keys, input.w1);
    const auto bad = std::find_if(logits.begin(), logits.end(), [](float logit) { return !std::isfinite(logit); });
    return {.first_nonfinite = bad == logits.end() ? -1 : bad - logits.begin(),
            .n_open = std::count_if(logits.begin(), logits.end(), [=](float logit) { return logit > threshold; })};
}

void dot_products(const KeyMatrix& key_matrix, const WeightMatrix& weight_matrix, const MatrixView<float>& products,
                  CpuLevel level, int n_threads) {
    const GatedAdapterKernels& kernels = at_level(gated_adapter_table(), level).kernels;
    std::visit(
        [&](const auto& keys, const auto& weights) {
            REP_FAST_CHECK(keys.cols == weights.cols, "keys are " << keys.cols << " wide, weights " << weights.cols);
            REP_FAST_CHECK(products.rows == keys.rows && products.cols == weights.rows,
                           "products must be " << keys.rows << " x " << weights.rows);
            for_each_task(keys.rows, weights.rows, keys.cols, n_threads,
                          [&](const Task& task, std::int64_t, Scratch& scratch) {
                              task_dots(kernels, keys, weights, task, scratch, products.row(task.t0) + task.h0,
                                        products.row_stride);
                          });
        },
        key_matrix, weight_matrix);
}

}  // namespace rep_fast
