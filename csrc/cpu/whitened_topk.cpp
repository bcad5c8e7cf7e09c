// whitened_topk from the caller's side: sizes, the choice of the pass, threads, the state. The loop is in block_scan.h,
// the products in whitened_topk_<level>.cpp, the choice among them in pass_choice, their error bounds in packed_queries
// and dithered_queries, the hits and what is left out in running_hits.
#include "cpu/whitened_topk.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "core/error.h"
#include "core/gradual_underflow.h"
#include "core/work_queue.h"
#include "cpu/block_scan.h"
#include "cpu/pass_choice.h"
#include "cpu/query_packings.h"
#include "cpu/running_hits.h"
#include "cpu/whitened_topk_kernels.h"

namespace rep_fast {

const DispatchTable<WhitenedTopkKernels>& whitened_topk_table() {
    static const auto table = [] {
        WhitenedTopkKernels wide = avx2::kWhitenedTopk;
        wide.rows = avx512::kRows;
        wide.float32 = avx512::kFloat32Products;
        WhitenedTopkKernels with_bf16 = wide;
        with_bf16.bf16_products = &avx512_bf16::kBf16Products;
        with_bf16.int8_products = &avx512_bf16::kInt8Products;
        return DispatchTable<WhitenedTopkKernels>{{{CpuLevel::kPortable, portable::kWhitenedTopk},
                                                   {CpuLevel::kAvx2, avx2::kWhitenedTopk},
                                                   {CpuLevel::kAvx512, wide},
                                                   {CpuLevel::kAvx512Bf16, with_bf16}}};
    }();
    return table;
}

namespace {

ScanReport merge_reports(const std::vector<ScanWorker>& workers) {
    ScanReport total;
    for (const ScanWorker& worker : workers) {
        const ScanReport& part = worker.report;
        if (part.n_nonfinite_keys > 0) {
            total.first_nonfinite_key = total.n_nonfinite_keys == 0
                                            ? part.first_nonfinite_key
                                            : std::min(total.first_nonfinite_key, part.first_nonfinite_key);
        }
        total.n_nonfinite_keys += part.n_nonfinite_keys;
        total.n_rescored += part.n_rescored;
        for (std::size_t pass = 0; pass < total.pass_keys.size(); ++pass) {
            total.pass_keys[pass] += part.pass_keys[pass];
        }
        for (std::size_t reason = 0; reason < total.reason_keys.size(); ++reason) {
            total.reason_keys[reason] += part.reason_keys[reason];
        }
    }
    return total;
}

bool is_same(const MatrixView<const float>& a, const MatrixView<const float>& b) {
    return a.data == b.data && a.rows == b.rows && a.cols == b.cols && a.row_stride == b.row_stride;
}

void check_sizes(const ScanInput& input, const ScanState& state, std::int64_t n_keys, std::int64_t key_dim) {
    const std::int64_t n_queries = input.queries.rows;
    REP_FAST_CHECK(key_dim == input.queries.cols && key_dim >= 1,
                   "keys are " << key_dim << " wide, queries " << input.queries.cols);
    REP_FAST_CHECK(n_keys <= std::numeric_limits<std::int32_t>::max(),
                   "a block has at most 2³¹ − 1 keys, got " << n_keys << "; feed the stream in several blocks");
    REP_FAST_CHECK(state.scores.cols >= 1 && state.scores.rows == n_queries && state.ids.rows == n_queries &&
                       state.ids.cols == state.scores.cols && std::ssize(state.query_dropped) == n_queries,
                   "the state has " << state.scores.rows << " rows for " << n_queries << " queries");
    const LastTokenRule& rule = input.last_token;
    REP_FAST_CHECK(rule.token_ids.empty() ||
                       (std::ssize(rule.token_ids) == n_keys && std::ssize(rule.last_tokens) == n_queries &&
                        !rule.sequence_starts.empty() && rule.sequence_starts.front() == 0 &&
                        std::is_sorted(rule.sequence_starts.begin(), rule.sequence_starts.end()) && rule.window >= 0),
                   "the last-token rule does not fit " << n_keys << " keys and " << n_queries << " queries");
    const PairRule& pairs = input.pairs;
    REP_FAST_CHECK(pairs.indptr.empty() || (std::ssize(pairs.indptr) == n_keys + 1 && pairs.indptr.front() == 0 &&
                                            pairs.indptr.back() == std::ssize(pairs.subjects) &&
                                            std::is_sorted(pairs.indptr.begin(), pairs.indptr.end())),
                   "the pair rule does not fit " << n_keys << " keys");
}

template <class T>
ScanReport run_scan(BlockScan<T>& scan, const ScanState& state, int n_threads) {
    const std::int64_t n_queries = state.scores.rows;
    for (std::int64_t query = 0; query < n_queries; ++query) {
        state.query_dropped[static_cast<std::size_t>(query)] = !scan.is_finite(query);
    }
    const std::int64_t n_padded = (n_queries + kPanelQueries - 1) / kPanelQueries * kPanelQueries;
    const auto n_workers = std::clamp<std::int64_t>(scan.n_blocks(), 1, std::max(n_threads, 1));
    std::vector<RunningHits> hits(static_cast<std::size_t>(n_workers), RunningHits(state, n_padded));
    std::vector<ScanWorker> workers;
    workers.reserve(hits.size());
    for (RunningHits& own : hits) {
        workers.emplace_back(own, n_padded);
    }
    run_blocks(scan.n_blocks(), n_threads,
               [&](std::int64_t block, int worker) { scan.block(block, workers[static_cast<std::size_t>(worker)]); });
    run_blocks(n_workers, n_threads,
               [&](std::int64_t worker, int) { scan.rescore(workers[static_cast<std::size_t>(worker)]); });
    merge_hits(hits, state);
    return merge_reports(workers);
}

}  // namespace

ScanReport whitened_topk(const ScanInput& input, const ScanState& state, CpuLevel level, int n_threads,
                         QueryPackings* kept) {
    const auto [n_keys, key_dim] =
        std::visit([](const auto& keys) { return std::pair(keys.rows, keys.cols); }, input.keys);
    check_sizes(input, state, n_keys, key_dim);
    const GradualUnderflow exact_subnormals;  // margins and starting thresholds are computed here, outside the queue
    const WhitenedTopkKernels& kernels = at_level(whitened_topk_table(), level).kernels;
    REP_FAST_CHECK(kept == nullptr || is_same(kept->queries(), input.queries), "the packings are of other queries");
    QueryPackings own(input.queries);
    QueryPackings& packings = kept != nullptr ? *kept : own;
    const PassChoice choice = choose_pass(input, state, kernels);
    return std::visit(
        [&](const auto& keys) {
            BlockScan scan(input, keys, packings, choice, kernels, n_threads);
            return run_scan(scan, state, n_threads);
        },
        input.keys);
}

}  // namespace rep_fast
