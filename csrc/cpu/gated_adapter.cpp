// Driver and portable bodies of gated_adapter: GELU, w2 and the threshold where a task's products lie in the cache.
#include "cpu/gated_adapter.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "core/error.h"
#include "cpu/ceilings.h"
#include "cpu/gelu.h"
#include "cpu/simd_portable.h"
#include "cpu/weight_products.h"

namespace rep_fast {
namespace portable {
namespace {

void dots_f32(const DotBlock<float, float>& block) {
    dot_block<Simd>(block);
}

void dots_bf16(const DotBlock<float, BFloat16>& block) {
    dot_block<Simd>(block);
}

template <class T>
void widen(const T* from, std::int64_t n, float* to) {
    widen_row<Simd>(from, n, to);
}

float gate(const float* products, const float* b1, const float* w2, std::int64_t n) {
    return gate_sum<Simd>(products, b1, w2, n);
}

constexpr GatedAdapterKernels kGatedAdapter = {
    .dots_f32 = dots_f32,
    .dots_bf16 = dots_bf16,
    .widen_f32 = widen<float>,
    .widen_bf16 = widen<BFloat16>,
    .widen_f16 = widen<Float16>,
    .gate_sum = gate,
};

}  // namespace
}  // namespace portable

namespace {

// A lead that the noise of a short measurement does not make.
constexpr double kClearLead = 1.1;

std::int64_t n_panels(std::int64_t n_hidden) {
    return (n_hidden + kHiddenPanel - 1) / kHiddenPanel;
}
// How many times as many products of bfloat16 as of float32 this processor does in a second, measured at the first call
// (some milliseconds): 2 on some with AVX-512 BF16, ½ on others.
double bf16_gain() {
    static const double gain = [] {
        constexpr double kSeconds = 3e-3;
        const CpuLevel level = machine_cpu_level();
        const double float32 = product_rate(Product::kFloat32, level, 1, kSeconds);
        return product_rate(Product::kBf16, level, 1, kSeconds) / float32;
    }();
    return gain;
}

bool in_bf16(const KeyMatrix& keys, const WeightMatrix& weights, const GatedAdapterKernels& kernels,
             GateProducts products) {
    const bool can = std::holds_alternative<MatrixView<const BFloat16>>(keys) &&
                     std::holds_alternative<MatrixView<const BFloat16>>(weights) && kernels.bf16_dots != nullptr;
    REP_FAST_CHECK(can || products != GateProducts::kBf16,
                   "products in bfloat16 need keys and weights of it and a processor with AVX-512 BF16; use auto");
    return products == GateProducts::kBf16 || (can && products == GateProducts::kAuto && bf16_gain() >= kClearLead);
}

struct Size {
    std::int64_t rows, cols;
};

template <class Matrix>
Size size_of(const Matrix& matrix) {
    return std::visit([](const auto& view) { return Size{view.rows, view.cols}; }, matrix);
}

void check_gate(const Gate& gate, std::int64_t n_tokens, std::int64_t key_dim) {
    const auto [n_hidden, width] = size_of(gate.w1);
    REP_FAST_CHECK(key_dim == width, "keys are " << key_dim << " wide, w1 " << width);
    REP_FAST_CHECK(std::ssize(gate.b1) == n_hidden && std::ssize(gate.w2) == n_hidden,
                   "b1 and w2 must have " << n_hidden << " entries");
    REP_FAST_CHECK(gate.hidden.data == nullptr || (gate.hidden.rows == n_tokens && gate.hidden.cols == n_hidden),
                   "hidden must be " << n_tokens << " x " << n_hidden);
}

// Per gate and panel of its rows one number for each token: added in panel order at the end, so that the bits do not
// depend on who did which.
class PartialLogits {
  public:
    PartialLogits(std::span<const Gate> gates, std::int64_t n_tokens) : n_tokens_(n_tokens) {
        std::int64_t panels = 0;
        for (const Gate& gate : gates) {
            first_.push_back(panels);
            n_hidden_.push_back(size_of(gate.w1).rows);
            panels += n_panels(n_hidden_.back());
        }
        sums_.resize(static_cast<std::size_t>(panels * n_tokens));
    }

    std::span<const std::int64_t> n_hidden() const { return n_hidden_; }

    void add(const Gate& gate, const Task& task, const Products& products, const GatedAdapterKernels& kernels) {
        for (std::int64_t h = 0; h < task.n_hidden; h += kHiddenPanel) {
            float* const sums = panel(task.matrix, (task.h0 + h) / kHiddenPanel) + task.t0;
            const std::int64_t n = std::min(kHiddenPanel, task.n_hidden - h);
            const float* const b1 = gate.b1.data() + task.h0 + h;
            const float* const w2 = gate.w2.data() + task.h0 + h;
            for (std::int64_t t = 0; t < task.n_tokens; ++t) {
                sums[t] = kernels.gate_sum(products.row(h, t), b1, w2, n);
            }
            if (gate.hidden.data != nullptr) {
                for (std::int64_t t = 0; t < task.n_tokens; ++t) {
                    float* const out = gate.hidden.row(task.t0 + t) + task.h0 + h;
                    std::transform(products.row(h, t), products.row(h, t) + n, b1, out, std::plus<float>());
                }
            }
        }
    }

    float logit(std::size_t gate, float b2, std::int64_t token) {
        auto sum = static_cast<double>(b2);
        for (std::int64_t number = 0; number < n_panels(n_hidden_[gate]); ++number) {
            sum += static_cast<double>(panel(gate, number)[token]);
        }
        return static_cast<float>(sum);
    }

  private:
    float* panel(std::size_t gate, std::int64_t number) { return sums_.data() + (first_[gate] + number) * n_tokens_; }

    std::int64_t n_tokens_;
    std::vector<std::int64_t> first_;  // panel of each gate
    std::vector<std::int64_t> n_hidden_;
    std::vector<float> sums_;
};

}  // namespace

const DispatchTable<GatedAdapterKernels>& gated_adapter_table() {
    static const auto table = [] {
        GatedAdapterKernels with_bf16 = avx512::kGatedAdapter;
        with_bf16.bf16_dots = &avx512_bf16::kBf16Dots;
        return DispatchTable<GatedAdapterKernels>{{{CpuLevel::kPortable, portable::kGatedAdapter},
                                                   {CpuLevel::kAvx2, avx2::kGatedAdapter},
                                                   {CpuLevel::kAvx512, avx512::kGatedAdapter},
                                                   {CpuLevel::kAvx512Bf16, with_bf16}}};
    }();
    return table;
}

GateReport gate_logits(const KeyMatrix& key_matrix, std::span<const Gate> gates, const MatrixView<float>& logits,
                       CpuLevel level, int n_threads, GateProducts products) {
    const GatedAdapterKernels& kernels = at_level(gated_adapter_table(), level).kernels;
    const auto [n_tokens, key_dim] = size_of(key_matrix);
    REP_FAST_CHECK(
        logits.rows == std::ssize(gates) && logits.cols == n_tokens,
        "logits must be " << gates.size() << " x " << n_tokens << ", got " << logits.rows << " x " << logits.cols);
    std::vector<bool> multiplied_in_bf16;
    for (const Gate& gate : gates) {
        check_gate(gate, n_tokens, key_dim);
        multiplied_in_bf16.push_back(in_bf16(key_matrix, gate.w1, kernels, products));
    }
    const bool any_bf16 = std::ranges::find(multiplied_in_bf16, true) != multiplied_in_bf16.end();
    const bool any_float32 = std::ranges::find(multiplied_in_bf16, false) != multiplied_in_bf16.end();
    const PackedKeys keys(key_matrix, kernels, any_float32, any_bf16);
    PartialLogits partial(gates, n_tokens);
    for_each_task(
        n_tokens, partial.n_hidden(), key_dim, n_threads, keys.streams(), [&](const Task& task, Scratch& scratch) {
            const Gate& gate = gates[task.matrix];
            partial.add(gate, task, keys.times(gate.w1, task, multiplied_in_bf16[task.matrix], scratch), kernels);
        });
    GateReport report;
    for (std::size_t gate = 0; gate < gates.size(); ++gate) {
        float* const row = logits.row(static_cast<std::int64_t>(gate));
        for (std::int64_t t = 0; t < n_tokens; ++t) {
            row[t] = partial.logit(gate, gates[gate].b2, t);
            report.all_finite = report.all_finite && std::isfinite(row[t]);
            report.n_open += row[t] > gates[gate].threshold ? 1 : 0;
        }
    }
    return report;
}

void dot_products(const KeyMatrix& key_matrix, const WeightMatrix& weights, const MatrixView<float>& products,
                  CpuLevel level, int n_threads) {
    const auto [n_tokens, key_dim] = size_of(key_matrix);
    const auto [n_hidden, weight_dim] = size_of(weights);
    REP_FAST_CHECK(key_dim == weight_dim, "keys are " << key_dim << " wide, weights " << weight_dim);
    REP_FAST_CHECK(products.rows == n_tokens && products.cols == n_hidden,
                   "products must be " << n_tokens << " x " << n_hidden);
    const PackedKeys keys(key_matrix, at_level(gated_adapter_table(), level).kernels, true, false);
    const std::int64_t rows[] = {n_hidden};
    for_each_task(n_tokens, rows, key_dim, n_threads, keys.streams(), [&](const Task& task, Scratch& scratch) {
        const Products found = keys.times(weights, task, false, scratch);
        for (std::int64_t h = 0; h < task.n_hidden; h += kHiddenPanel) {
            for (std::int64_t t = 0; t < task.n_tokens; ++t) {
                std::copy_n(found.row(h, t), std::min(kHiddenPanel, task.n_hidden - h),
                            products.row(task.t0 + t) + task.h0 + h);
            }
        }
    });
}

}  // namespace rep_fast
