// The steps of gated_adapter.cu's launch: what a block or a warp of it does, whichever share of the work it has.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "cuda/eight.cuh"
#include "cuda/gated_adapter.h"
#include "cuda/number.cuh"
#include "cuda/warp_sum.cuh"

namespace rep_fast::cuda {

inline constexpr int kGateThreads = 256;
inline constexpr int kGateWarps = kGateThreads / kLanes;
inline constexpr float kInfiniteLogit = std::numeric_limits<float>::infinity();
// Adapters that travel with a launch; more of them lie in scratch.
inline constexpr int kFewAdapters = 32;

struct GateEntry {
    AdapterOnDevice adapter;
    std::int32_t first_tile = 0;  // of hidden rows, among those of all adapters
    bool wide_w1 = false;         // allows 16-byte accesses
    bool wide_a = false;
};

struct GateWork {
    GateEntry few[kFewAdapters];
    const GateEntry* many = nullptr;  // where there are more than few
    std::int32_t n_adapters = 0;
    std::int32_t n_tiles = 0;
    std::int32_t max_rank = 0;
    Composition composition = Composition::kChain;
    std::int64_t n_tokens = 0;
    std::int64_t key_dim = 0;
    float* logits = nullptr;
    bool* opened = nullptr;
    int* tickets = nullptr;
    float* partial = nullptr;        // [n_tokens, n_tiles]
    int* acting = nullptr;           // [n_tokens] the adapter whose turn it is with a token, −1: none any more
    int* n_acting = nullptr;         // tokens with whom it is somebody's turn
    std::int64_t* listed = nullptr;  // [n_tokens] which these are
    float* inner = nullptr;          // [n_tokens, max_rank]
    float* values = nullptr;         // [n_tokens, key_dim] adapted keys so far, where a token can move twice
};
static_assert(sizeof(GateWork) + 128 <= 4096, "parameters of a launch are limited to 4 KB before CUDA 12.1");

template <class T>
struct KeyRows {
    const T* data = nullptr;
    std::int64_t row_stride = 0;
    bool sixteen_bytes = false;
};

struct GateShared {
    float sums[kGateWarps][kLanes];
    float gates[kLanes];
    int is_last;
};

__device__ inline const GateEntry& entry_of(const GateWork& work, int adapter) {
    return work.many == nullptr ? work.few[adapter] : work.many[adapter];
}

__device__ inline int adapter_of_tile(const GateWork& work, int tile) {
    int low = 0, high = work.n_adapters;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (entry_of(work, middle).first_tile <= tile) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

// Whether a gate has to decide again: an adapter before it moved the token.
__device__ inline bool is_renewed(const GateWork& work, std::int64_t token, int adapter) {
    return work.acting[token] >= 0 && work.acting[token] < adapter;
}

__device__ inline bool is_open(float logit, float threshold) {
    return logit > threshold || threshold == -kInfiniteLogit;
}

// x·Φ(x); Φ by the complementary error function, which does not cancel for negative x.
__device__ inline float gelu(float x) {
    return x * 0.5f * erfcf(x * -0.70710678f);
}

// sums[row · kTokens + token] += this thread's columns of W1[h0 + row] · key[t0 + token]. Past the last row or token
// the last one stands in, so that nothing is in the way of the loads; nobody uses those sums.
template <int kTokens, int kRows, class Key, class Weight>
__device__ inline void add_products(const GateWork& work, const KeyRows<Key>& keys, const GateEntry& entry, int h0,
                                    std::int64_t t0, float (&sums)[kTokens * kRows]) {
    const auto weight_row = [&](int row) {
        const int h = h0 + row < entry.adapter.n_hidden ? h0 + row : entry.adapter.n_hidden - 1;
        return static_cast<const Weight*>(entry.adapter.w1) + h * entry.adapter.w1_stride;
    };
    const auto key_row = [&](int token) {
        const std::int64_t t = t0 + token < work.n_tokens ? t0 + token : work.n_tokens - 1;
        return keys.data + t * keys.row_stride;
    };
    const std::int64_t n_fast = columns_in_eights(keys.sixteen_bytes && entry.wide_w1, work.key_dim);
    for (std::int64_t first = static_cast<std::int64_t>(threadIdx.x) * kEight; first < n_fast;
         first += kGateThreads * kEight) {
        Eight<Weight> weights[kRows];
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            weights[row] = load_eight(weight_row(row) + first);
        }
#pragma unroll
        for (int token = 0; token < kTokens; ++token) {
            const Eight<Key> key = load_eight(key_row(token) + first);
#pragma unroll
            for (int row = 0; row < kRows; ++row) {
#pragma unroll
                for (int i = 0; i < kEight; ++i) {
                    float& sum = sums[row * kTokens + token];
                    sum = __fmaf_rn(weights[row][i], key[i], sum);
                }
            }
        }
    }
#pragma unroll 1
    for (std::int64_t column = n_fast + threadIdx.x; column < work.key_dim; column += kGateThreads) {
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            const float weight = widened(weight_row(row)[column]);
#pragma unroll
            for (int token = 0; token < kTokens; ++token) {
                float& sum = sums[row * kTokens + token];
                sum = __fmaf_rn(weight, widened(key_row(token)[column]), sum);
            }
        }
    }
}

// A tile of kRows hidden rows' share of the logits, for every token, or for those whose gate decides again.
template <int kTokens, int kRows, class Key, class Weight>
__device__ void gate_tile(const GateWork& work, const KeyRows<Key>& keys, GateShared& shared, int adapter, int tile,
                          bool renews) {
    constexpr int kSums = kTokens * kRows;
    static_assert(kSums <= kLanes, "one fold adds all of a warp's sums");
    const GateEntry& entry = entry_of(work, adapter);
    const int h0 = (tile - entry.first_tile) * kRows;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes;
    for (std::int64_t t0 = 0; t0 < work.n_tokens; t0 += kTokens) {
        bool is_wanted = !renews;
        for (std::int64_t token = t0; token < t0 + kTokens && token < work.n_tokens; ++token) {
            is_wanted = is_wanted || is_renewed(work, token, adapter);
        }
        if (!is_wanted) {  // the same for all threads
            continue;
        }
        float sums[kSums] = {};
        add_products<kTokens, kRows, Key, Weight>(work, keys, entry, h0, t0, sums);
        const float folded = fold_sums(sums);
        shared.sums[thread / kLanes][folded_index<kSums>(lane)] = folded;  // equal in lanes of one index
        __syncthreads();
        if (thread < kSums) {
            const int h = h0 + thread / kTokens;
            float hidden = 0.0f;
            for (int warp = 0; warp < kGateWarps; ++warp) {
                hidden += shared.sums[warp][thread];
            }
            const auto* b1 = static_cast<const Weight*>(entry.adapter.b1);
            const auto* w2 = static_cast<const Weight*>(entry.adapter.w2);
            const bool is_there = h < entry.adapter.n_hidden;
            shared.gates[thread] = is_there ? widened(w2[h]) * gelu(hidden + widened(b1[h])) : 0.0f;
        }
        __syncthreads();
        if (thread < kTokens && t0 + thread < work.n_tokens) {
            float sum = 0.0f;
            for (int row = 0; row < kRows; ++row) {
                sum += shared.gates[row * kTokens + thread];
            }
            work.partial[(t0 + thread) * work.n_tiles + tile] = sum;
        }
    }
}

// Logits and decisions of one adapter from the shares of all its tiles, which `n_tiles` counts; a warp per token.
template <class Weight>
__device__ inline void settle_gate(const GateWork& work, int adapter, int n_tiles, bool renews) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    const GateEntry& entry = entry_of(work, adapter);
    for (std::int64_t token = threadIdx.x / kLanes; token < work.n_tokens; token += kGateWarps) {
        if (renews && !is_renewed(work, token, adapter)) {
            continue;
        }
        double sum = 0.0;
        for (int tile = lane; tile < n_tiles; tile += kLanes) {
            sum += static_cast<double>(work.partial[token * work.n_tiles + entry.first_tile + tile]);
        }
        sum = warp_sum(sum);
        if (lane == 0) {
            const float b2 = widened(static_cast<const Weight*>(entry.adapter.b2)[0]);
            const auto logit = static_cast<float>(static_cast<double>(b2) + sum);
            const std::int64_t place = adapter * work.n_tokens + token;
            work.logits[place] = logit;
            work.opened[place] = is_open(logit, entry.adapter.threshold);
        }
    }
}

// Gates that a thread looks at together: one by one each would wait for memory by itself.
inline constexpr int kGatesTogether = 8;

// The first open gate after `after`, or −1.
__device__ inline int first_open(const GateWork& work, std::int64_t token, int after) {
    for (int base = after + 1; base < work.n_adapters; base += kGatesTogether) {
        int found = -1;
#pragma unroll
        for (int i = kGatesTogether - 1; i >= 0; --i) {
            const int adapter = base + i;
            if (adapter < work.n_adapters && work.opened[adapter * work.n_tokens + token]) {
                found = adapter;
            }
        }
        if (found >= 0) {
            return found;
        }
    }
    return -1;
}

// The open gate of the largest logit, the first of equals, or −1; the others are shut. NaN counts as infinite.
__device__ inline int keep_largest(const GateWork& work, std::int64_t token) {
    float largest = -kInfiniteLogit;
    int best = -1;
#pragma unroll kGatesTogether
    for (int adapter = 0; adapter < work.n_adapters; ++adapter) {
        const std::int64_t place = adapter * work.n_tokens + token;
        const float logit = work.logits[place];
        const float size = logit == logit ? logit : kInfiniteLogit;  // gates without a threshold open on NaN
        if (work.opened[place] && (best < 0 || size > largest)) {
            largest = size;
            best = adapter;
        }
    }
    for (int adapter = 0; adapter < work.n_adapters; ++adapter) {
        work.opened[adapter * work.n_tokens + token] = adapter == best;
    }
    return best;
}

// Whose turn it is with each token, before the first projections or after others; the tokens with whom it is somebody's
// are put on the list, whose order changes nothing. Of `n_threads` threads this is number `thread`; `n_acting` is zero
// before.
__device__ inline void choose_acting(const GateWork& work, bool is_first, std::int64_t thread, std::int64_t n_threads) {
    for (std::int64_t token = thread; token < work.n_tokens; token += n_threads) {
        int acting = is_first ? -1 : work.acting[token];
        if (is_first || acting >= 0) {
            acting =
                work.composition == Composition::kArgmax ? keep_largest(work, token) : first_open(work, token, acting);
        }
        work.acting[token] = acting;
        if (acting >= 0) {
            work.listed[atomicAdd(work.n_acting, 1)] = token;
        }
    }
}

// The same by one block.
__device__ inline void choose_acting_alone(const GateWork& work, bool is_first) {
    if (threadIdx.x == 0) {
        *work.n_acting = 0;
    }
    __syncthreads();
    choose_acting(work, is_first, threadIdx.x, kGateThreads);
}

// This thread's columns of a row of A times a key, eight by eight. Rows that do not allow wide accesses are added up in
// the same order: the bits do not depend on the layout.
template <class Key, class Weight>
__device__ inline float multiply_row(const Weight* weights, const Key* key, bool is_wide, std::int64_t key_dim) {
    float sum = 0.0f;
#pragma unroll 1
    for (std::int64_t first = threadIdx.x * kEight; first < key_dim; first += kGateThreads * kEight) {
        if (is_wide && first + kEight <= key_dim) {
            const Eight<Weight> some_weights = load_eight(weights + first);
            const Eight<Key> some_keys = load_eight(key + first);
#pragma unroll
            for (int i = 0; i < kEight; ++i) {
                sum = __fmaf_rn(some_weights[i], some_keys[i], sum);
            }
            continue;
        }
#pragma unroll 1
        for (std::int64_t column = first; column < first + kEight && column < key_dim; ++column) {
            sum = __fmaf_rn(widened(weights[column]), widened(key[column]), sum);
        }
    }
    return sum;
}

// inner[t] = A key_t of the acting adapter, for the listed tokens; a block per row of A, all blocks of the launch.
template <class Weight, class Key>
__device__ inline void project_inner(const GateWork& work, const KeyRows<Key>& keys, GateShared& shared) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes, warp = static_cast<int>(threadIdx.x) / kLanes;
    const std::int64_t n_items = std::int64_t{*work.n_acting} * work.max_rank;
    for (std::int64_t item = blockIdx.x; item < n_items; item += gridDim.x) {
        const std::int64_t token = work.listed[item / work.max_rank], row = item % work.max_rank;
        const GateEntry& entry = entry_of(work, work.acting[token]);
        if (row >= entry.adapter.rank) {  // the same for all threads
            continue;
        }
        const Weight* const weights = static_cast<const Weight*>(entry.adapter.a) + row * entry.adapter.a_stride;
        const float sum = warp_sum(multiply_row(weights, keys.data + token * keys.row_stride,
                                                keys.sixteen_bytes && entry.wide_a, work.key_dim));
        if (lane == 0) {
            shared.sums[warp][0] = sum;
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            float total = 0.0f;
            for (const auto& of_warp : shared.sums) {
                total += of_warp[0];
            }
            work.inner[token * work.max_rank + row] = total;
        }
        __syncthreads();  // the sums are read before the next ones are written
    }
}

// Rows of B at a time; more of them take the registers that a second block of the multiprocessor needs.
inline constexpr int kOuterRows = kLanes / 4;

// adapted[t] = base_t + B inner_t of the acting adapter, for the listed tokens, kept in float32 where the token can
// move again; a warp per kOuterRows rows of B.
template <class Weight, class Base, class Key>
__device__ inline void project_outer(const GateWork& work, const KeyRows<Base>& bases, Key* adapted, std::int64_t warp,
                                     std::int64_t n_warps) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes, own_row = folded_index<kOuterRows>(lane);
    const std::int64_t n_groups = (work.key_dim + kOuterRows - 1) / kOuterRows;
    const std::int64_t n_items = *work.n_acting * n_groups;
    for (std::int64_t item = warp; item < n_items; item += n_warps) {
        const std::int64_t token = work.listed[item / n_groups], j0 = item % n_groups * kOuterRows;
        const AdapterOnDevice& adapter = entry_of(work, work.acting[token]).adapter;
        const float* inner = work.inner + token * work.max_rank;
        float sums[kOuterRows] = {};
#pragma unroll 1
        for (int r = lane; r < adapter.rank; r += kLanes) {
            const float factor = inner[r];
#pragma unroll
            for (int row = 0; row < kOuterRows; ++row) {
                // past the last row the last one stands in
                const std::int64_t j = j0 + row < work.key_dim ? j0 + row : work.key_dim - 1;
                const Weight weight = static_cast<const Weight*>(adapter.b)[j * adapter.b_stride + r];
                sums[row] = __fmaf_rn(widened(weight), factor, sums[row]);
            }
        }
        const float move = fold_sums(sums);  // the same in the lanes of one row
        const std::int64_t j = j0 + own_row;
        if (j < work.key_dim && lane % (kLanes / kOuterRows) == 0) {
            const float moved = widened(bases.data[token * bases.row_stride + j]) + move;
            if (work.values != nullptr) {
                work.values[token * work.key_dim + j] = moved;
            }
            adapted[token * work.key_dim + j] = narrowed<Key>(moved);
        }
    }
}

}  // namespace rep_fast::cuda
