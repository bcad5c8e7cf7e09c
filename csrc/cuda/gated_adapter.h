// The gated key adapter on a GPU: k̂ = k + 1[z(k) > threshold]·B(Ak), z(k) = w2 · GELU(W1 k + b1) + b2, exact GELU, for
// E adapters in edit order. See rep_fast/ops/gated_adapter.py for the contract and the compositions.
//
// The host waits for nothing and the launch has a shape that depends on sizes alone, so that calls may be recorded in a
// graph: what is open is decided on the device.
//
// A few tokens: `gated_adapter`, one launch (beside whatever zeroes the counters) that reads every W1 once, decides all
// gates, copies the keys and applies the gates that open. Many tokens: the caller copies the keys to `adapted`,
// multiplies keys and W1 by a library product, hands the products to `gate_products`, adapter by adapter and block by
// block, and calls `apply_open`. No list of the open rows is made: a library's product with them would need their
// number on the host, and the projections' warps pass over closed tokens at 4 bytes each.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/dtype.h"

namespace rep_fast::cuda {

// One adapter's weights on the device, all of the dtype given beside them; element (i, j) is data[i * stride + j].
struct AdapterOnDevice {
    const void* a = nullptr;   // [rank, key_dim]
    const void* b = nullptr;   // [key_dim, rank]
    const void* w1 = nullptr;  // [n_hidden, key_dim]
    const void* b1 = nullptr;  // [n_hidden]
    const void* w2 = nullptr;  // [n_hidden]
    const void* b2 = nullptr;  // [1]
    std::int64_t a_stride = 0;
    std::int64_t b_stride = 0;
    std::int64_t w1_stride = 0;
    std::int32_t n_hidden = 0;
    std::int32_t rank = 0;
    float threshold = 0.0f;  // of the logit; −∞ opens always, +∞ never
};

// Counters of a call beside one per adapter.
inline constexpr std::int64_t kMoreTickets = 5;

enum class Composition { kChain, kArgmax, kSum };

struct GatedAdapterCall {
    std::span<const AdapterOnDevice> adapters;  // on the host; at least one
    DType weight_dtype = DType::kFloat32;       // float32 or bfloat16
    Composition composition = Composition::kChain;
    const void* keys = nullptr;  // [n_tokens, key_dim]
    DType key_dtype = DType::kBFloat16;
    std::int64_t n_tokens = 0;
    std::int64_t key_dim = 0;
    std::int64_t row_stride = 0;
    void* adapted = nullptr;  // [n_tokens, key_dim] contiguous, dtype of the keys, apart from them
    float* logits = nullptr;  // [n_adapters, n_tokens]
    bool* opened = nullptr;   // [n_adapters, n_tokens]
    void* scratch = nullptr;  // scratch_bytes() bytes, aligned to 256
    int* tickets = nullptr;   // [n_adapters + kMoreTickets], zero before the first call; every call leaves them zero
};

// Scratch of a call; needs sizes, dtypes, composition and the adapters' shapes, not the pointers. It grows with tokens
// × hidden rows of all adapters (one byte each, half of one for a single token) and, with several adapters, with 4
// bytes × tokens × width: long inputs are best cut into pieces of a thousand tokens.
std::size_t scratch_bytes(const GatedAdapterCall& call);

// Decides all gates by its own products and applies those that open: `adapted`, `logits` and `opened` are written
// whole. W1 is read once per 8 tokens. Rows without an open gate keep their bits.
void gated_adapter(const GatedAdapterCall& call, void* stream);

// Logits and decisions of the native keys are there (`gate_products` of every adapter) and `adapted` holds the keys:
// applies the gates that are open. With argmax and chain, `opened` is brought up to date.
void apply_open(const GatedAdapterCall& call, void* stream);

// logits[t] = w2 · GELU(products[t] + b1) + b2 and opened[t] for a block of tokens, products[t] = W1 k_t, one gate.
struct GateProductsCall {
    const float* products = nullptr;  // [n_tokens, n_hidden]
    std::int64_t n_tokens = 0;
    std::int64_t row_stride = 0;
    AdapterOnDevice adapter;
    DType weight_dtype = DType::kFloat32;
    float* logits = nullptr;  // [n_tokens]
    bool* opened = nullptr;   // [n_tokens]
};
void gate_products(const GateProductsCall& call, void* stream);

}  // namespace rep_fast::cuda
