// The gate of REP's key adapter, and the small products of its projection.
//
// logit(t) = w2 · GELU(W1 k_t + b1) + b2 with the exact (erf) GELU, fused: no buffer of tokens × hidden width. The bits
// of a logit depend on its key, the instruction set and the kind of products only, not on the other tokens, on the
// other gates or on the thread count.
#pragma once

#include <cstdint>
#include <span>

#include "core/dispatch.h"
#include "core/key_matrix.h"
#include "cpu/dot_block.h"

namespace rep_fast {

struct Gate {
    WeightMatrix w1;            // [n_hidden, key_dim]
    std::span<const float> b1;  // n_hidden
    std::span<const float> w2;  // n_hidden
    float b2 = 0.0f;
    float threshold = 0.0f;
    MatrixView<float> hidden = {};  // [n_tokens, n_hidden]: if there, filled with W1 k + b1
};

struct GateReport {
    bool all_finite = true;   // no logit is NaN or infinite
    std::int64_t n_open = 0;  // logits above their gate's threshold
};

// kAuto multiplies in bfloat16 where keys and weights have it, the level has the instruction and it is clearly faster
// than float32 here; products are exact either way, bfloat16 only flushes subnormal numbers.
enum class GateProducts { kAuto, kFloat32, kBf16 };

// logits: [n_gates, n_tokens], every gate on the same keys. Throws Error when sizes do not fit together, or where kBf16
// is asked for and cannot be.
GateReport gate_logits(const KeyMatrix& keys, std::span<const Gate> gates, const MatrixView<float>& logits,
                       CpuLevel level, int n_threads, GateProducts products = GateProducts::kAuto);

// products[t, h] = keys[t] · weights[h], [n_tokens, n_hidden], in float32.
void dot_products(const KeyMatrix& keys, const WeightMatrix& weights, const MatrixView<float>& products, CpuLevel level,
                  int n_threads);

// size n: from[0..n) as float32, and zeros up to a multiple of kDotPadding.
template <class T>
using WidenRow = void (*)(const T* from, std::int64_t n, float* to);

struct Bf16Dots {
    void (*dots)(const DotBlock<BFloat16, BFloat16>& block);
    void (*copy)(const BFloat16* from, std::int64_t n, BFloat16* to);  // and zeros, as WidenRow
};

struct GatedAdapterKernels {
    void (*dots_f32)(const DotBlock<float, float>& block);
    void (*dots_bf16)(const DotBlock<float, BFloat16>& block);
    WidenRow<float> widen_f32;
    WidenRow<BFloat16> widen_bf16;
    WidenRow<Float16> widen_f16;
    // size n each: Σ_h w2[h] · GELU(products[h] + b1[h])
    float (*gate_sum)(const float* products, const float* b1, const float* w2, std::int64_t n);
    const Bf16Dots* bf16_dots = nullptr;  // where the level has them
};

const DispatchTable<GatedAdapterKernels>& gated_adapter_table();

namespace avx2 {
extern const GatedAdapterKernels kGatedAdapter;
}
namespace avx512 {
extern const GatedAdapterKernels kGatedAdapter;
}
namespace avx512_bf16 {
extern const Bf16Dots kBf16Dots;
}

}  // namespace rep_fast
