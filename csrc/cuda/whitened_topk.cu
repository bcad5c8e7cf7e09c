// Selection of hits from approximate scores, for every architecture.
//
// One block owns one query, so its running top k lives in shared memory, its threshold rises while it reads, and the
// result is the same whatever the schedule. It reads its row of approximate scores from L2, 4 bytes per pair; what
// survives the threshold (a few per thousand after the first chunk) is scored in float64 by one warp per key, in one
// order of summation.
// Bytes: 4·S·n from L2, plus 2·M per survivor. Limit: L2 bandwidth. Registers, occupancy: not measured yet on a device.
#include <cuda_runtime.h>

#include <cstddef>
#include <limits>

#include "core/error.h"
#include "cuda/launch.cuh"
#include "cuda/number.cuh"
#include "cuda/whitened_topk.h"

namespace rep_fast::cuda {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kLanes = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanes;
constexpr int kScoresPerThread = 4;
constexpr int kTile = kThreads * kScoresPerThread;
// room for a whole tile of survivors beside what an earlier tile left
constexpr int kCandidates = 2 * kTile;
constexpr std::size_t kLargestShared = 160 * 1024;

struct Candidate {
    std::int32_t row;
    std::int32_t is_excluded;
};

// Followed by k doubles and k int64: the query's running top k.
struct SelectionShared {
    double exact[kCandidates];
    Candidate candidates[kCandidates];
    int warp_counts[kWarps];
    int n_candidates;
    double floor;
};
static_assert(sizeof(SelectionShared) % sizeof(double) == 0, "the top k lies behind it");

__device__ inline double warp_sum(double value) {
    // the same tree for every warp: the sum depends on the numbers alone
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
        value += __shfl_xor_sync(kAllLanes, value, lanes);
    }
    return value;
}

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

// The last sequence start that is not behind `row`.
__device__ inline std::int64_t sequence_start(const LastTokens& rule, std::int64_t row) {
    std::int64_t low = 0, high = rule.n_sequences;
    while (high - low > 1) {
        const std::int64_t middle = (low + high) / 2;
        if (rule.sequence_starts[middle] <= row) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return rule.sequence_starts[low];
}

// Asked by a whole warp; every lane gets the answer.
__device__ inline bool is_excluded(const LastTokens& rule, std::int64_t row, std::int64_t query, int lane) {
    if (rule.token_ids == nullptr) {
        return false;
    }
    const std::int64_t token = rule.last_tokens[query];
    const std::int64_t start = sequence_start(rule, row);
    const std::int64_t reach = row - rule.window;
    const std::int64_t begin = start == 0 ? -rule.n_lookback : start;
    const std::int64_t first = reach > begin ? reach : begin;
    bool is_found = false;
    for (std::int64_t position = row - lane; position >= first; position -= kLanes) {
        is_found |= (position >= 0 ? rule.token_ids[position] : rule.lookback[rule.n_lookback + position]) == token;
    }
    return __any_sync(kAllLanes, is_found) != 0;
}

// Asked by a whole warp; every lane gets the answer.
__device__ inline bool is_listed(const ListedPairs& pairs, std::int64_t row, std::int64_t query, int lane) {
    if (pairs.indptr == nullptr) {
        return false;
    }
    bool is_found = false;
    for (std::int64_t place = pairs.indptr[row] + lane; place < pairs.indptr[row + 1]; place += kLanes) {
        is_found |= pairs.subjects[place] == query;
    }
    return __any_sync(kAllLanes, is_found) != 0;
}

__device__ inline bool is_better(double score, std::int64_t id, double other, std::int64_t other_id) {
    return score > other || (score == other && id < other_id);
}

// One thread: the hit takes its place among the k best, which stay in order.
__device__ inline void take(double* scores, std::int64_t* ids, std::int64_t k, double score, std::int64_t id) {
    if (ids[k - 1] >= 0 && !is_better(score, id, scores[k - 1], ids[k - 1])) {
        return;
    }
    std::int64_t place = k - 1;
    while (place > 0 && (ids[place - 1] < 0 || is_better(score, id, scores[place - 1], ids[place - 1]))) {
        scores[place] = scores[place - 1];
        ids[place] = ids[place - 1];
        --place;
    }
    scores[place] = score;
    ids[place] = id;
}

// Below it an approximate score with its margin is out.
__device__ inline double floor_of(const Selection& selection, const double* scores, const std::int64_t* ids,
                                  std::int64_t query) {
    return ids[selection.k - 1] >= 0 ? scores[selection.k - 1] - static_cast<double>(selection.query_slacks[query])
                                     : -kInfinity;
}

// Scores all candidates exactly, one warp each, and lets those that belong there into the top k.
template <class Key>
__device__ void settle(const Selection& selection, SelectionShared& shared, double* scores, std::int64_t* ids,
                       std::int64_t query) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    const int warp = static_cast<int>(threadIdx.x) / kLanes;
    const auto* keys = static_cast<const Key*>(selection.keys.data);
    const float* weights = selection.queries + query * selection.query_stride;
    for (int number = warp; number < shared.n_candidates; number += kWarps) {
        const std::int64_t row = shared.candidates[number].row;
        const bool is_out = is_excluded(selection.last_token, selection.first_row + row, query, lane) ||
                            is_listed(selection.pairs, selection.first_row + row, query, lane);
        double sum = 0.0;
        if (!is_out) {  // the same for all lanes
            const Key* key = keys + row * selection.keys.row_stride;
            for (std::int64_t j = lane; j < selection.keys.key_dim; j += kLanes) {
                sum += static_cast<double>(widened(key[j])) * static_cast<double>(weights[j]);
            }
        }
        sum = warp_sum(sum);
        if (lane == 0) {
            shared.exact[number] = sum;
            shared.candidates[number].is_excluded = is_out ? 1 : 0;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int number = 0; number < shared.n_candidates; ++number) {
            if (shared.candidates[number].is_excluded == 0) {
                const std::int64_t id = selection.first_id + selection.first_row + shared.candidates[number].row;
                take(scores, ids, selection.k, shared.exact[number], id);
            }
        }
        shared.n_candidates = 0;
        shared.floor = floor_of(selection, scores, ids, query);
    }
    __syncthreads();
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

template <class Key>
__global__ void __launch_bounds__(kThreads) select_hits_kernel(Selection selection) {
    auto& shared = shared_as<SelectionShared>();
    auto* scores = reinterpret_cast<double*>(&shared + 1);
    auto* ids = reinterpret_cast<std::int64_t*>(scores + selection.k);
    const std::int64_t query = blockIdx.x;
    const float margin = selection.query_margins[query];
    if (margin != margin) {
        return;  // the whole block leaves: this query holds a NaN or infinity
    }
    for (std::int64_t i = threadIdx.x; i < selection.k; i += kThreads) {
        scores[i] = selection.scores[query * selection.k + i];
        ids[i] = selection.ids[query * selection.k + i];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        shared.n_candidates = 0;
        shared.floor = floor_of(selection, scores, ids, query);
    }
    __syncthreads();
    const float* approximate = selection.approximate + query * selection.approximate_stride;
    for (std::int64_t base = 0; base < selection.keys.n_keys; base += kTile) {
        const std::int64_t first = base + static_cast<std::int64_t>(threadIdx.x) * kScoresPerThread;
        bool survives[kScoresPerThread];
        int n_survivors = 0;
        for (int n = 0; n < kScoresPerThread; ++n) {
            survives[n] = false;
            if (first + n < selection.keys.n_keys) {
                const double norm = static_cast<double>(selection.key_norms[first + n]);
                // in double, so that the comparison adds no error; an approximate NaN (∞ − ∞) survives too
                const double best = static_cast<double>(approximate[first + n]) + norm * static_cast<double>(margin);
                survives[n] = norm < kInfinity && !(best < shared.floor);
            }
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
    for (std::int64_t i = threadIdx.x; i < selection.k; i += kThreads) {
        selection.scores[query * selection.k + i] = scores[i];
        selection.ids[query * selection.k + i] = ids[i];
    }
}

template <class Key>
void measure_typed(const KeyChunk& keys, std::int64_t first_id, const KeyNorms& norms, cudaStream_t stream) {
    const auto n_blocks = static_cast<unsigned>((keys.n_keys + kWarps - 1) / kWarps);
    launch("measure_keys", measure_keys_kernel<Key>, {dim3(n_blocks), dim3(kThreads), 0, stream},
           static_cast<const Key*>(keys.data), keys.n_keys, keys.key_dim, keys.row_stride, first_id, norms);
}

template <class Key>
void select_typed(const Selection& selection, std::size_t shared_bytes, cudaStream_t stream) {
    launch("select_hits", select_hits_kernel<Key>,
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
    const std::size_t shared_bytes =
        sizeof(SelectionShared) + static_cast<std::size_t>(selection.k) * (sizeof(double) + sizeof(std::int64_t));
    REP_FAST_CHECK(shared_bytes <= kLargestShared, "k=" << selection.k << " hits per query do not fit into a block");
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
