// Products of keys with the rows of several matrices of weights, cut into tasks that threads take from a queue.
//
// A task is a block of tokens × a group of rows. Where all keys stay in the second-level cache, rows stream by once,
// kStream side by side through all their depth; else a task takes one block of depth at a time.
#pragma once

#include <cstdint>
#include <functional>
#include <span>

#include "core/aligned_buffer.h"
#include "core/key_matrix.h"
#include "cpu/gated_adapter.h"

namespace rep_fast {

// Rows of a task come in panels of this many.
inline constexpr std::int64_t kHiddenPanel = 48;

struct Scratch {
    AlignedBuffer keys;      // [tokens, depth padded]
    AlignedBuffer strip;     // kMaxDotHidden · kDotBytes
    AlignedBuffer products;  // [panels, tokens, kHiddenPanel]
};

// One task: tokens [t0, t0 + n_tokens) × rows [h0, h0 + n_hidden) of one matrix of weights.
struct Task {
    std::size_t matrix;
    std::int64_t t0, n_tokens, h0, n_hidden;
};

// Panel by panel, so that what a strip of rows adds to lies together.
struct Products {
    float* data;
    std::int64_t n_tokens;

    // Row t of the panel that begins with row h of the task, [kHiddenPanel].
    float* row(std::int64_t h, std::int64_t t) const { return data + (h * n_tokens + t * kHiddenPanel); }
};

// Up to kWholeKeys numbers of keys, widened once for all tasks, each row padded: [n_tokens, stride].
template <class K>
struct WholeKeys {
    const K* data = nullptr;
    std::int64_t stride = 0;
};

// The keys as they come, and widened where they are few. Refers to both arguments.
class PackedKeys {
  public:
    PackedKeys(const KeyMatrix& keys, const GatedAdapterKernels& kernels, bool any_float32, bool any_bf16);

    // Products of one task; they stay in `scratch` until the next call.
    Products times(const WeightMatrix& weights, const Task& task, bool in_bf16, Scratch& scratch) const;

    // Whether rows stream by.
    bool streams() const { return float32_.data != nullptr || bf16_.data != nullptr; }

  private:
    template <class K, class T>
    WholeKeys<K> pack(const MatrixView<const T>& keys, AlignedBuffer& buffer) const;

    const KeyMatrix& keys_;
    const GatedAdapterKernels& kernels_;
    AlignedBuffer float32_buffer_;
    AlignedBuffer bf16_buffer_;
    WholeKeys<float> float32_ = {};
    WholeKeys<BFloat16> bf16_ = {};
};

// Calls body(task, scratch) for the tasks of matrices of n_hidden rows each; every task's rows begin with a panel.
void for_each_task(std::int64_t n_tokens, std::span<const std::int64_t> n_hidden, std::int64_t key_dim, int n_threads,
                   bool streams, const std::function<void(const Task&, Scratch&)>& body);

}  // namespace rep_fast
