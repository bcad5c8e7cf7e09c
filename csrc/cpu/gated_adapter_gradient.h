// Gradient of a gate's logits in the gate's weights, for training.
//
// With x = W1 k + b1 and d = ∂L/∂logit: ∂L/∂x = d·w2·GELU′(x), GELU′(x) = Φ(x) + x·φ(x); ∂L/∂W1 = Σ_t (∂L/∂x_t) k_tᵀ,
// ∂L/∂b1 = Σ_t ∂L/∂x_t, ∂L/∂w2 = Σ_t d_t·GELU(x_t). Sums run over tokens in ascending order, in blocks: the bits depend
// on the instruction set only.
#pragma once

#include <cstdint>
#include <span>

#include "core/dispatch.h"
#include "core/matrix_view.h"

namespace rep_fast {

struct GateGradientInput {
    MatrixView<const float> keys;     // [n_tokens, key_dim]
    MatrixView<const float> hidden;   // [n_tokens, n_hidden], x as the forward pass found it
    std::span<const float> w2;        // n_hidden
    std::span<const float> d_logits;  // n_tokens
};

struct GateGradient {
    MatrixView<float> w1;        // [n_hidden, key_dim]
    std::span<float> b1;         // n_hidden
    std::span<float> w2;         // n_hidden
    MatrixView<float> d_hidden;  // [n_tokens, n_hidden], ∂L/∂x
};

// Overwrites `gradient`. Throws Error when sizes do not fit together.
void gate_gradient(const GateGradientInput& input, const GateGradient& gradient, CpuLevel level, int n_threads);

// out[p, q] = Σ_t a[t, p] · b[t, q], over t in ascending order, in blocks; all in float32.
void transposed_product(const MatrixView<const float>& a, const MatrixView<const float>& b,
                        const MatrixView<float>& out, CpuLevel level, int n_threads);

// Columns [0, n) of the hidden layer, n at most kPanel, of all tokens.
struct SlopePanel {
    const float* hidden;
    std::int64_t hidden_stride;
    std::int64_t n_tokens;
    std::int64_t n;
    const float* w2;        // n
    const float* d_logits;  // n_tokens
    float* d_hidden;        // [n_tokens, kPanel], zeros beyond n
    float* d_b1;            // kPanel
    float* d_w2;            // kPanel
};

struct GateGradientKernels {
    void (*slopes)(const SlopePanel& panel);
    // tile[kPanel, kPanel] (+)= the first n_rows rows of aᵀ b, both [depth][kPanel]; `first` overwrites.
    void (*product)(const float* a, const float* b, std::int64_t depth, std::int64_t n_rows, float* tile, bool first);
};

const DispatchTable<GateGradientKernels>& gate_gradient_table();

namespace avx2 {
extern const GateGradientKernels kGateGradient;
}
namespace avx512 {
extern const GateGradientKernels kGateGradient;
}

}  // namespace rep_fast
