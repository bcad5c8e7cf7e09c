// The gate of REP's key adapter, and the small products of its projection.
//
// logit(t) = w2 · GELU(W1 k_t + b1) + b2 with the exact (erf) GELU, fused: no buffer of tokens × hidden width. The bits
// of a logit depend on its key and the instruction set only, not on the other tokens or on the thread count.
#pragma once

#include <cstdint>
#include <span>

#include "core/dispatch.h"
#include "core/key_matrix.h"
#include "cpu/dot_block.h"

namespace rep_fast {

struct GateInput {
    KeyMatrix keys;             // [n_tokens, key_dim]
    WeightMatrix w1;            // [n_hidden, key_dim]
    std::span<const float> b1;  // n_hidden
    std::span<const float> w2;  // n_hidden
    float b2 = 0.0f;
};

struct GateReport {
    std::int64_t first_nonfinite = -1;  // token whose logit is NaN or infinite, or −1
    std::int64_t n_open = 0;            // logits above the threshold
};

// logits: n_tokens. Throws Error when sizes do not fit together.
GateReport gate_logits(const GateInput& input, float threshold, std::span<float> logits, CpuLevel level, int n_threads);

// products[t, h] = keys[t] · weights[h], [n_tokens, n_hidden].
void dot_products(const KeyMatrix& keys, const WeightMatrix& weights, const MatrixView<float>& products, CpuLevel level,
                  int n_threads);

struct GatedAdapterKernels {
    void (*dots_f32)(const DotBlock<float>& block);
    void (*dots_bf16)(const DotBlock<BFloat16>& block);
};

const DispatchTable<GatedAdapterKernels>& gated_adapter_table();

namespace avx2 {
extern const GatedAdapterKernels kGatedAdapter;
}
namespace avx512 {
extern const GatedAdapterKernels kGatedAdapter;
}

}  // namespace rep_fast
