#include "cpu/weight_products.h"

#include <algorithm>
#include <type_traits>
#include <variant>
#include <vector>

#include "core/work_queue.h"

namespace rep_fast {
namespace {

// 590 KB of widened keys stay in the second-level cache; a strip widened for them costs 2 % of their products.
constexpr std::int64_t kTokenBlock = 192;
// Panels of a task at most: its keys are widened once for all of them, their products (850 KB) stay in that cache too.
constexpr std::int64_t kGroupPanels = 24;
// Up to this many numbers (1 MB), all keys stay in the second-level cache while rows stream by.
constexpr std::int64_t kWholeKeys = std::int64_t{1} << 18;
// Rows that stream by side by side.
constexpr std::int64_t kStream = kMaxDotHidden;
// Tasks per thread below which they are halved.
constexpr std::int64_t kTasksPerThread = 4;
// Multiply-adds that pay for starting one more thread (tens of microseconds).
constexpr std::int64_t kWorkPerThread = std::int64_t{1} << 21;

std::int64_t rounded_up(std::int64_t n, std::int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

// n elements of K, which may be smaller than the buffer's floats.
template <class K>
K* typed(AlignedBuffer& buffer, std::int64_t n) {
    return reinterpret_cast<K*>(buffer.reserve(n));
}

void widen(const GatedAdapterKernels& kernels, const float* from, std::int64_t n, float* to) {
    kernels.widen_f32(from, n, to);
}
void widen(const GatedAdapterKernels& kernels, const BFloat16* from, std::int64_t n, float* to) {
    kernels.widen_bf16(from, n, to);
}
void widen(const GatedAdapterKernels& kernels, const Float16* from, std::int64_t n, float* to) {
    kernels.widen_f16(from, n, to);
}
void widen(const GatedAdapterKernels& kernels, const BFloat16* from, std::int64_t n, BFloat16* to) {
    kernels.bf16_dots->copy(from, n, to);
}

void run_dots(const GatedAdapterKernels& kernels, const DotBlock<float, float>& block) {
    kernels.dots_f32(block);
}
void run_dots(const GatedAdapterKernels& kernels, const DotBlock<float, BFloat16>& block) {
    kernels.dots_bf16(block);
}
void run_dots(const GatedAdapterKernels& kernels, const DotBlock<BFloat16, BFloat16>& block) {
    kernels.bf16_dots->dots(block);
}

// keys · weightsᵀ of one task, multiplied as K.
template <class K, class T, class W>
class TaskProducts {
  public:
    TaskProducts(const GatedAdapterKernels& kernels, const MatrixView<const T>& keys,
                 const MatrixView<const W>& weights, const Task& task, Scratch& scratch)
        : kernels_(kernels),
          keys_(keys),
          weights_(weights),
          task_(task),
          scratch_(scratch),
          products_{scratch.products.reserve(task.n_tokens * rounded_up(task.n_hidden, kHiddenPanel)), task.n_tokens} {}

    // Rows stream by, kStream at a time, through all their depth.
    Products stream(const WholeKeys<K>& keys) const {
        for (std::int64_t h = 0; h < task_.n_hidden; h += kStream) {
            for (std::int64_t k = 0; k < keys_.cols; k += kDotDepth<K>) {
                const std::int64_t next = k + kDotDepth<K>;
                const W* const ahead = next < keys_.cols ? at(h, next) : at(h + kStream, 0);
                run(h, std::min(kStream, task_.n_hidden - h), k, ahead, keys.data + task_.t0 * keys.stride + k,
                    keys.stride);
            }
        }
        return products_;
    }

    // One block of depth of keys at a time, against all rows of the task.
    Products blocked() const {
        K* const packed = typed<K>(scratch_.keys, task_.n_tokens * kDotDepth<K>);
        for (std::int64_t k = 0; k < keys_.cols; k += kDotDepth<K>) {
            for (std::int64_t t = 0; t < task_.n_tokens; ++t) {
                widen(kernels_, keys_.row(task_.t0 + t) + k, std::min(kDotDepth<K>, keys_.cols - k),
                      packed + t * kDotDepth<K>);
            }
            for (std::int64_t h = 0; h < task_.n_hidden; h += kHiddenPanel) {
                const std::int64_t next = h + kHiddenPanel;
                const W* const ahead = next < task_.n_hidden ? at(next, k) : at(0, k + kDotDepth<K>);
                run(h, std::min(kHiddenPanel, task_.n_hidden - h), k, ahead, packed, kDotDepth<K>);
            }
        }
        return products_;
    }

  private:
    // Rows [h, h + n_hidden), which lie in one panel; `ahead` those that are multiplied next.
    void run(std::int64_t h, std::int64_t n_hidden, std::int64_t k, const W* ahead, const K* keys,
             std::int64_t key_stride) const {
        run_dots(kernels_, DotBlock<K, W>{.keys = keys,
                                          .key_stride = key_stride,
                                          .n_tokens = task_.n_tokens,
                                          .weights = weights_.row(task_.h0 + h) + k,
                                          .weight_stride = weights_.row_stride,
                                          .n_hidden = n_hidden,
                                          .depth = std::min(kDotDepth<K>, keys_.cols - k),
                                          .ahead = ahead,
                                          .strip = typed<K>(scratch_.strip, kMaxDotHidden * kDotDepth<K>),
                                          .products = products_.row(h - h % kHiddenPanel, 0) + h % kHiddenPanel,
                                          .product_stride = kHiddenPanel,
                                          .first = k == 0});
    }

    const W* at(std::int64_t h, std::int64_t k) const {
        return h < task_.n_hidden && k < keys_.cols ? weights_.row(task_.h0 + h) + k : nullptr;
    }

    const GatedAdapterKernels& kernels_;
    const MatrixView<const T>& keys_;
    const MatrixView<const W>& weights_;
    const Task& task_;
    Scratch& scratch_;
    const Products products_;
};

// Tasks over all matrices of n_hidden rows each, group rows at most.
std::vector<Task> tasks_of(std::int64_t n_tokens, std::span<const std::int64_t> n_hidden, std::int64_t group) {
    std::vector<Task> tasks;
    for (std::size_t matrix = 0; matrix < n_hidden.size(); ++matrix) {
        for (std::int64_t t = 0; t < n_tokens; t += kTokenBlock) {
            for (std::int64_t h = 0; h < n_hidden[matrix]; h += group) {
                tasks.push_back(
                    {matrix, t, std::min(kTokenBlock, n_tokens - t), h, std::min(group, n_hidden[matrix] - h)});
            }
        }
    }
    return tasks;
}

}  // namespace

// Rows that are already as they must be stay where they are.
template <class K, class T>
WholeKeys<K> PackedKeys::pack(const MatrixView<const T>& keys, AlignedBuffer& buffer) const {
    if constexpr (std::is_same_v<K, T>) {
        if (keys.cols % kDotPadding == 0) {
            return {keys.data, keys.row_stride};
        }
    }
    const std::int64_t stride = rounded_up(keys.cols, kDotPadding);
    K* const packed = typed<K>(buffer, keys.rows * stride);
    for (std::int64_t t = 0; t < keys.rows; ++t) {
        widen(kernels_, keys.row(t), keys.cols, packed + t * stride);
    }
    return {packed, stride};
}

PackedKeys::PackedKeys(const KeyMatrix& keys, const GatedAdapterKernels& kernels, bool any_float32, bool any_bf16)
    : keys_(keys), kernels_(kernels) {
    std::visit(
        [&](const auto& matrix) {
            if (matrix.rows * rounded_up(matrix.cols, kDotPadding) > kWholeKeys) {
                return;
            }
            if (any_float32) {
                float32_ = pack<float>(matrix, float32_buffer_);
            }
            using T = std::remove_cvref_t<decltype(*matrix.data)>;
            if constexpr (std::is_same_v<T, BFloat16>) {
                if (any_bf16) {
                    bf16_ = pack<BFloat16>(matrix, bf16_buffer_);
                }
            }
        },
        keys);
}

Products PackedKeys::times(const WeightMatrix& weight_matrix, const Task& task, bool in_bf16, Scratch& scratch) const {
    return std::visit(
        [&](const auto& keys, const auto& weights) {
            using T = std::remove_cvref_t<decltype(*keys.data)>;
            using W = std::remove_cvref_t<decltype(*weights.data)>;
            if constexpr (std::is_same_v<T, BFloat16> && std::is_same_v<W, BFloat16>) {
                if (in_bf16) {
                    const TaskProducts<BFloat16, T, W> products(kernels_, keys, weights, task, scratch);
                    return bf16_.data != nullptr ? products.stream(bf16_) : products.blocked();
                }
            }
            const TaskProducts<float, T, W> products(kernels_, keys, weights, task, scratch);
            return float32_.data != nullptr ? products.stream(float32_) : products.blocked();
        },
        keys_, weight_matrix);
}

void for_each_task(std::int64_t n_tokens, std::span<const std::int64_t> n_hidden, std::int64_t key_dim, int n_threads,
                   bool streams, const std::function<void(const Task&, Scratch&)>& body) {
    std::int64_t rows = 0;
    for (const std::int64_t n : n_hidden) {
        rows += n;
    }
    const std::int64_t worthwhile = 1 + n_tokens * rows * key_dim / kWorkPerThread;
    const int workers = static_cast<int>(std::clamp<std::int64_t>(worthwhile, 1, std::max(n_threads, 1)));
    std::int64_t panels = streams ? 1 : kGroupPanels;
    std::vector<Task> tasks = tasks_of(n_tokens, n_hidden, panels * kHiddenPanel);
    while (workers > 1 && std::ssize(tasks) < kTasksPerThread * workers && panels > 1) {
        panels /= 2;
        tasks = tasks_of(n_tokens, n_hidden, panels * kHiddenPanel);
    }
    std::vector<Scratch> scratch(static_cast<std::size_t>(workers));
    run_blocks(std::ssize(tasks), workers, [&](std::int64_t number, int worker) {
        body(tasks[static_cast<std::size_t>(number)], scratch[static_cast<std::size_t>(worker)]);
    });
}

}  // namespace rep_fast
