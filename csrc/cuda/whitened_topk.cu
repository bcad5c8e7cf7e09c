// Selection of hits from approximate scores, for every architecture.
//
// One block owns one query, so its running top k lives in shared memory, its threshold rises while it reads, and the
// result is the same whatever the schedule. It reads its row of approximate scores from L2, 4 bytes per pair; what
// survives the threshold (a few per thousand after the first chunk) is scored in float64 by one warp per key, in one
// order of summation. Scores are float32, or int32 sums of quantised rows; what a pair's bound is made of is a type.
// Bytes: 4·S·n from L2, plus 2·M per survivor. Limit: L2 bandwidth. Registers, occupancy: not measured yet on a device.
#include <cuda_runtime.h>

#include <cstddef>
#include <limits>

#include "core/error.h"
#include "cuda/exact_hits.cuh"
#include "cuda/launch.cuh"
#include "cuda/number.cuh"
#include "cuda/warp_sum.cuh"
#include "cuda/whitened_topk.h"

namespace rep_fast::cuda {
namespace {

constexpr int kThreads = kSelectionThreads;
constexpr int kWarps = kSelectionWarps;
constexpr int kScoresPerThread = 4;
constexpr int kTile = kThreads * kScoresPerThread;
static_assert(kCandidates >= 2 * kTile, "room for a whole tile of survivors beside what an earlier tile left");

template <class Key>
__global__ void __launch_bounds__(kThreads)
    measure_keys_kernel(const Key* keys, std::int64_t n_keys, std::int64_t key_dim, std::int64_t row_stride,
                        std::int64_t first_id, KeyNorms norms) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    const std::int64_t row =
        static_cast<std::int64_t>(blockIdx.x) * kWarps + static_cast<std::int64_t>(threadIdx.x) / kLanes;
    if (row >= n_keys) {
        return;  // the whole warp leaves
    }
    const Key* key = keys + row * row_stride;
    double square = 0.0;
    for (std::int64_t j = lane; j < key_dim; j += kLanes) {
        const double value = static_cast<double>(widened(key[j]));
        square += value * value;
    }
    square = warp_sum(square);
    if (lane != 0) {
        return;
    }
    // squares of finite floats do not overflow in double: a sum that is not finite comes from the row
    const bool is_finite = square < kInfinity;
    // (1 + 2⁻²²) covers the rounding of the sum, of the root and of the conversion for every width below 2²⁰
    norms.upper[row] =
        is_finite ? static_cast<float>(sqrt(square) * (1.0 + 0x1p-22)) + 0x1p-149f : static_cast<float>(kInfinity);
    if (!is_finite) {
        atomicAdd(reinterpret_cast<unsigned long long*>(norms.n_nonfinite), 1ull);
        atomicMin(reinterpret_cast<long long*>(norms.first_nonfinite), static_cast<long long>(first_id + row));
    }
}

// Appends this tile's survivors in the order of their rows. Every thread calls it.
__device__ inline void collect(SelectionShared& shared, const bool (&survives)[kScoresPerThread], std::int64_t first) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    const int warp = static_cast<int>(threadIdx.x) / kLanes;
    int own = 0;
    for (int n = 0; n < kScoresPerThread; ++n) {
        own += survives[n] ? 1 : 0;
    }
    int before = own;  // inclusive prefix over the warp
    for (int lanes = 1; lanes < kLanes; lanes *= 2) {
        const int other = __shfl_up_sync(kAllLanes, before, static_cast<unsigned>(lanes));
        before += lane >= lanes ? other : 0;
    }
    if (lane == kLanes - 1) {
        shared.warp_counts[warp] = before;
    }
    __syncthreads();
    int place = shared.n_candidates + before - own;
    for (int other = 0; other < warp; ++other) {
        place += shared.warp_counts[other];
    }
    for (int n = 0; n < kScoresPerThread; ++n) {
        if (survives[n]) {
            shared.candidates[place].row = static_cast<std::int32_t>(first + n);
            ++place;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (const int count : shared.warp_counts) {
            shared.n_candidates += count;
        }
    }
    __syncthreads();
}

// One query's scores and the keys' share of their bounds: whether key j takes part and its score may reach the floor.
// Bounds are made in double, so that the comparison adds no error; a NaN (∞ − ∞, 0 · ∞) tells nothing and survives.
class FloatScores {
  public:
    __device__ FloatScores(const Selection& selection, std::int64_t query)
        : scores_(selection.approximate + query * selection.approximate_stride),
          key_norms_(selection.key_norms),
          margin_(static_cast<double>(selection.query_margins[query])) {}

    __device__ bool survives(std::int64_t key, double floor) const {
        const auto norm = static_cast<double>(key_norms_[key]);
        const double error = norm * margin_;
        const bool is_below = static_cast<double>(scores_[key]) + error < floor;
        return norm < kInfinity && !(is_below && error < static_cast<double>(kLargestError));
    }

  private:
    const float* scores_;
    const float* key_norms_;
    double margin_;
};

class Int8Scores {
  public:
    __device__ Int8Scores(const Selection& selection, std::int64_t query)
        : sums_(selection.int8.sums + query * selection.int8.stride),
          key_steps_(selection.int8.key_steps),
          key_margins_(selection.int8.key_margins),
          step_(static_cast<double>(selection.int8.query_steps[query])),
          margin_(static_cast<double>(selection.query_margins[query])) {}

    __device__ bool survives(std::int64_t key, double floor) const {
        const auto key_margin = static_cast<double>(key_margins_[key]);
        const double by_step = step_ * static_cast<double>(sums_[key]) + margin_;
        return key_margin == key_margin &&
               !(static_cast<double>(key_steps_[key]) * by_step + step_ * key_margin < floor);
    }

  private:
    const std::int32_t* sums_;
    const float* key_steps_;
    const float* key_margins_;
    double step_;
    double margin_;
};

template <class Key, class Scores>
__global__ void __launch_bounds__(kThreads) select_hits_kernel(Selection selection) {
    auto& shared = shared_as<SelectionShared>();
    auto* scores = reinterpret_cast<double*>(&shared + 1);
    auto* ids = reinterpret_cast<std::int64_t*>(scores + selection.k);
    const std::int64_t query = blockIdx.x;
    const float margin = selection.query_margins[query];
    if (margin != margin) {
        return;  // the whole block leaves: this query holds a NaN or infinity
    }
    load_hits(selection, shared, scores, ids, query);
    const Scores own(selection, query);
    for (std::int64_t base = 0; base < selection.keys.n_keys; base += kTile) {
        const std::int64_t first = base + static_cast<std::int64_t>(threadIdx.x) * kScoresPerThread;
        bool survives[kScoresPerThread];
        int n_survivors = 0;
        for (int n = 0; n < kScoresPerThread; ++n) {
            survives[n] = first + n < selection.keys.n_keys && own.survives(first + n, shared.floor);
            n_survivors += survives[n] ? 1 : 0;
        }
        // most tiles have nothing: one barrier tells
        if (__syncthreads_or(n_survivors) == 0) {
            continue;
        }
        collect(shared, survives, first);
        if (shared.n_candidates > kCandidates - kTile) {
            settle<Key>(selection, shared, scores, ids, query);
        }
    }
    settle<Key>(selection, shared, scores, ids, query);
    store_hits(selection, scores, ids, query);
}

template <class Key>
void measure_typed(const KeyChunk& keys, std::int64_t first_id, const KeyNorms& norms, cudaStream_t stream) {
    const auto n_blocks = static_cast<unsigned>((keys.n_keys + kWarps - 1) / kWarps);
    launch("measure_keys", measure_keys_kernel<Key>, {dim3(n_blocks), dim3(kThreads), 0, stream},
           static_cast<const Key*>(keys.data), keys.n_keys, keys.key_dim, keys.row_stride, first_id, norms);
}

template <class Key>
void select_typed(const Selection& selection, std::size_t shared_bytes, cudaStream_t stream) {
    const auto kernel =
        selection.int8.sums == nullptr ? select_hits_kernel<Key, FloatScores> : select_hits_kernel<Key, Int8Scores>;
    launch("select_hits", kernel,
           {dim3(static_cast<unsigned>(selection.n_queries)), dim3(kThreads), shared_bytes, stream}, selection);
}

}  // namespace

void measure_keys(const KeyChunk& keys, std::int64_t first_id, const KeyNorms& norms, void* stream) {
    if (keys.n_keys == 0) {
        return;
    }
    REP_FAST_CHECK(keys.n_keys < std::numeric_limits<std::int32_t>::max(),
                   "a chunk of " << keys.n_keys << " keys is too long; cut it");
    const auto on = static_cast<cudaStream_t>(stream);
    switch (keys.dtype) {
        case DType::kFloat32:
            return measure_typed<float>(keys, first_id, norms, on);
        case DType::kBFloat16:
            return measure_typed<BFloat16>(keys, first_id, norms, on);
        case DType::kFloat16:
            return measure_typed<Float16>(keys, first_id, norms, on);
        default:
            REP_FAST_CHECK(false, "keys must be float32, bfloat16 or float16, got " << dtype_name(keys.dtype));
    }
}

std::int64_t largest_k() {
    return static_cast<std::int64_t>((kLargestShared - sizeof(SelectionShared)) /
                                     (sizeof(double) + sizeof(std::int64_t)));
}

void select_hits(const Selection& selection, void* stream) {
    if (selection.keys.n_keys == 0 || selection.n_queries == 0) {
        return;
    }
    const std::size_t shared_bytes = selection_bytes(selection.k);
    const auto on = static_cast<cudaStream_t>(stream);
    switch (selection.keys.dtype) {
        case DType::kFloat32:
            return select_typed<float>(selection, shared_bytes, on);
        case DType::kBFloat16:
            return select_typed<BFloat16>(selection, shared_bytes, on);
        case DType::kFloat16:
            return select_typed<Float16>(selection, shared_bytes, on);
        default:
            REP_FAST_CHECK(false,
                           "keys must be float32, bfloat16 or float16, got " << dtype_name(selection.keys.dtype));
    }
}

}  // namespace rep_fast::cuda
