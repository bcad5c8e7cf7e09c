// From candidates to exact hits: the lazy exclusion rules, the float64 score in one order of summation, and the running
// top k, which a block of kSelectionThreads threads keeps in shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <limits>

#include "core/error.h"
#include "cuda/number.cuh"
#include "cuda/warp_sum.cuh"
#include "cuda/whitened_topk.h"

namespace rep_fast::cuda {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();
inline constexpr int kSelectionThreads = 256;
inline constexpr int kSelectionWarps = kSelectionThreads / kLanes;
// that wait for their exact scores at most
inline constexpr int kCandidates = 2048;
// what a block may ask for on every architecture that is served: sm_86, sm_89 and sm_120 have the least
inline constexpr std::size_t kLargestShared = 99 * 1024;
// ‖k‖·margin at which a float32 sum may have overflowed: margins are more than 2⁻²⁴‖w‖, and 2¹⁰⁰·2²⁴ < 2¹²⁷
inline constexpr float kLargestError = 0x1p100f;

struct Candidate {
    std::int32_t row;
    std::int32_t is_excluded;
};

// Followed by k doubles and k int64: the query's running top k.
struct SelectionShared {
    double exact[kCandidates];
    Candidate candidates[kCandidates];
    int warp_counts[kSelectionWarps];
    int n_candidates;
    double floor;
};
static_assert(sizeof(SelectionShared) % sizeof(double) == 0, "the top k lies behind it");

// What a block keeps for a running top k. Throws Error for k > largest_k().
inline std::size_t selection_bytes(std::int64_t k) {
    const std::size_t bytes =
        sizeof(SelectionShared) + static_cast<std::size_t>(k) * (sizeof(double) + sizeof(std::int64_t));
    REP_FAST_CHECK(bytes <= kLargestShared, "k=" << k << " hits per query do not fit into a block");
    return bytes;
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

// Brings the query's top k into shared memory, with no candidate yet. Every thread calls it.
__device__ inline void load_hits(const Selection& selection, SelectionShared& shared, double* scores, std::int64_t* ids,
                                 std::int64_t query) {
    for (std::int64_t i = threadIdx.x; i < selection.k; i += kSelectionThreads) {
        scores[i] = selection.scores[query * selection.k + i];
        ids[i] = selection.ids[query * selection.k + i];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        shared.n_candidates = 0;
        shared.floor = floor_of(selection, scores, ids, query);
    }
    __syncthreads();
}

// Behind a barrier: every thread calls it.
__device__ inline void store_hits(const Selection& selection, const double* scores, const std::int64_t* ids,
                                  std::int64_t query) {
    for (std::int64_t i = threadIdx.x; i < selection.k; i += kSelectionThreads) {
        selection.scores[query * selection.k + i] = scores[i];
        selection.ids[query * selection.k + i] = ids[i];
    }
}

// Scores all candidates exactly, one warp each, and lets those that belong there into the top k.
template <class Key>
__device__ void settle(const Selection& selection, SelectionShared& shared, double* scores, std::int64_t* ids,
                       std::int64_t query) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    const int warp = static_cast<int>(threadIdx.x) / kLanes;
    const auto* keys = static_cast<const Key*>(selection.keys.data);
    const float* weights = selection.queries + query * selection.query_stride;
    for (int number = warp; number < shared.n_candidates; number += kSelectionWarps) {
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
            // finite floats make finite sums in double: another one comes from a row that is not finite
            shared.candidates[number].is_excluded = is_out || !(fabs(sum) < kInfinity) ? 1 : 0;
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

}  // namespace rep_fast::cuda
