// Driver and portable body of the gate's gradient: slopes panel by panel of the hidden layer, which leaves them packed
// for the product Σ_t (∂L/∂x_t) k_tᵀ, one panel of key columns per task.
#include "cpu/gated_adapter_gradient.h"

#include <algorithm>
#include <vector>

#include "core/aligned_buffer.h"
#include "core/error.h"
#include "core/work_queue.h"
#include "cpu/gelu_slope.h"
#include "cpu/panel_product.h"
#include "cpu/simd_portable.h"

namespace rep_fast {
namespace portable {
namespace {

void slopes(const SlopePanel& panel) {
    slope_panel<Simd>(panel);
}

void product(const float* a, const float* b, std::int64_t depth, std::int64_t n_rows, float* tile, bool first) {
    panel_product<Simd>(a, b, depth, tile, first, n_rows);
}

constexpr GateGradientKernels kGateGradient = {.slopes = slopes, .product = product};

}  // namespace
}  // namespace portable

namespace {

constexpr std::int64_t kTile = kPanel * kPanel;
// Multiply-adds that pay for starting one more thread (tens of microseconds).
constexpr std::int64_t kWorkPerThread = std::int64_t{1} << 21;

void check(const GateGradientInput& input, const GateGradient& gradient) {
    const std::int64_t n_tokens = input.keys.rows;
    const std::int64_t n_hidden = input.hidden.cols;
    REP_FAST_CHECK(input.hidden.rows == n_tokens && std::ssize(input.d_logits) == n_tokens,
                   "hidden and d_logits must be of " << n_tokens << " tokens");
    REP_FAST_CHECK(
        std::ssize(input.w2) == n_hidden && std::ssize(gradient.w2) == n_hidden && std::ssize(gradient.b1) == n_hidden,
        "w2 and the gradients of b1 and w2 must have " << n_hidden << " entries");
    REP_FAST_CHECK(gradient.w1.rows == n_hidden && gradient.w1.cols == input.keys.cols,
                   "the gradient of w1 must be " << n_hidden << " x " << input.keys.cols);
    REP_FAST_CHECK(gradient.d_hidden.rows == n_tokens && gradient.d_hidden.cols == n_hidden,
                   "d_hidden must be " << n_tokens << " x " << n_hidden);
}

// One panel of the hidden layer; `packed` [n_tokens, kPanel] is left for the products.
void do_slopes(const GateGradientKernels& kernels, const GateGradientInput& input, const GateGradient& gradient,
               std::int64_t panel, float* packed) {
    const std::int64_t h = panel * kPanel;
    const std::int64_t n = std::min(kPanel, input.hidden.cols - h);
    alignas(64) float d_b1[kPanel];
    alignas(64) float d_w2[kPanel];
    kernels.slopes({.hidden = input.hidden.data + h,
                    .hidden_stride = input.hidden.row_stride,
                    .n_tokens = input.hidden.rows,
                    .n = n,
                    .w2 = input.w2.data() + h,
                    .d_logits = input.d_logits.data(),
                    .d_hidden = packed,
                    .d_b1 = d_b1,
                    .d_w2 = d_w2});
    std::copy_n(d_b1, n, gradient.b1.data() + h);
    std::copy_n(d_w2, n, gradient.w2.data() + h);
    for (std::int64_t t = 0; t < input.hidden.rows; ++t) {
        std::copy_n(packed + t * kPanel, n, gradient.d_hidden.row(t) + h);
    }
}

// Columns of one panel of `right`, in all rows of out = leftᵀ · right; `left` is packed in panels.
void do_columns(const GateGradientKernels& kernels, const float* left, const MatrixView<const float>& right,
                const MatrixView<float>& out, std::int64_t panel, AlignedBuffer& scratch) {
    const std::int64_t depth = right.rows;
    float* const columns = scratch.reserve(depth * kPanel + kTile);
    float* const tile = columns + depth * kPanel;
    pack_panel(right, 0, depth, panel * kPanel, columns);
    const std::int64_t n_cols = std::min(kPanel, out.cols - panel * kPanel);
    for (std::int64_t p = 0; p < out.rows; p += kPanel) {
        const std::int64_t n_rows = std::min(kPanel, out.rows - p);
        for (std::int64_t t = 0; t < depth; t += kPanelDepth) {
            kernels.product(left + p * depth + t * kPanel, columns + t * kPanel, std::min(kPanelDepth, depth - t),
                            n_rows, tile, t == 0);
        }
        for (std::int64_t row = 0; row < n_rows; ++row) {
            std::copy_n(tile + row * kPanel, n_cols, out.row(p + row) + panel * kPanel);
        }
    }
}

int workers_for(std::int64_t multiply_adds, int n_threads) {
    return static_cast<int>(std::clamp<std::int64_t>(1 + multiply_adds / kWorkPerThread, 1, std::max(n_threads, 1)));
}

void multiply_columns(const GateGradientKernels& kernels, const float* left, const MatrixView<const float>& right,
                      const MatrixView<float>& out, int workers) {
    std::vector<AlignedBuffer> scratch(static_cast<std::size_t>(workers));
    run_blocks(panels_of(right.cols), workers, [&](std::int64_t panel, int worker) {
        do_columns(kernels, left, right, out, panel, scratch[static_cast<std::size_t>(worker)]);
    });
}

}  // namespace

const DispatchTable<GateGradientKernels>& gate_gradient_table() {
    static const auto table = table_up_to_avx512(portable::kGateGradient, avx2::kGateGradient, avx512::kGateGradient);
    return table;
}

void gate_gradient(const GateGradientInput& input, const GateGradient& gradient, CpuLevel level, int n_threads) {
    check(input, gradient);
    const GateGradientKernels& kernels = at_level(gate_gradient_table(), level).kernels;
    const std::int64_t n_tokens = input.keys.rows;
    if (n_tokens == 0) {
        std::ranges::fill(gradient.b1, 0.0f);
        std::ranges::fill(gradient.w2, 0.0f);
        for (std::int64_t h = 0; h < gradient.w1.rows; ++h) {
            std::fill_n(gradient.w1.row(h), gradient.w1.cols, 0.0f);
        }
        return;
    }
    const int workers = workers_for(n_tokens * input.hidden.cols * input.keys.cols, n_threads);
    const std::int64_t n_panels = panels_of(input.hidden.cols);
    AlignedBuffer packed;
    float* const slopes = packed.reserve(n_panels * n_tokens * kPanel);
    run_blocks(n_panels, workers, [&](std::int64_t panel, int) {
        do_slopes(kernels, input, gradient, panel, slopes + panel * n_tokens * kPanel);
    });
    multiply_columns(kernels, slopes, input.keys, gradient.w1, workers);
}

void transposed_product(const MatrixView<const float>& a, const MatrixView<const float>& b,
                        const MatrixView<float>& out, CpuLevel level, int n_threads) {
    REP_FAST_CHECK(a.rows == b.rows && a.rows > 0, "a has " << a.rows << " rows, b " << b.rows);
    REP_FAST_CHECK(out.rows == a.cols && out.cols == b.cols, "out must be " << a.cols << " x " << b.cols);
    AlignedBuffer packed;
    float* const left = packed.reserve(panels_of(a.cols) * a.rows * kPanel);
    for (std::int64_t panel = 0; panel < panels_of(a.cols); ++panel) {
        pack_panel(a, 0, a.rows, panel * kPanel, left + panel * a.rows * kPanel);
    }
    multiply_columns(at_level(gate_gradient_table(), level).kernels, left, b, out,
                     workers_for(a.rows * a.cols * b.cols, n_threads));
}

}  // namespace rep_fast
