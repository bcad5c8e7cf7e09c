// The scan loop of whitened_topk: blocks of keys against chunks of queries. The products are in
// whitened_topk_<level>.cpp, the choice among them in pass_choice, their error bound in packed_queries, the hits and
// what is left out in running_hits.
#include "cpu/whitened_topk.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <type_traits>
#include <vector>

#include "core/aligned_buffer.h"
#include "core/error.h"
#include "core/gradual_underflow.h"
#include "core/work_queue.h"
#include "cpu/packed_queries.h"
#include "cpu/pass_choice.h"
#include "cpu/running_hits.h"

namespace rep_fast {

const DispatchTable<WhitenedTopkKernels>& whitened_topk_table() {
    static const auto table = [] {
        WhitenedTopkKernels wide = avx2::kWhitenedTopk;
        wide.float32 = avx512::kFloat32Products;
        WhitenedTopkKernels with_bf16 = wide;
        with_bf16.bf16_products = &avx512_bf16::kBf16Products;
        return DispatchTable<WhitenedTopkKernels>{{{CpuLevel::kPortable, portable::kWhitenedTopk},
                                                   {CpuLevel::kAvx2, avx2::kWhitenedTopk},
                                                   {CpuLevel::kAvx512, wide},
                                                   {CpuLevel::kAvx512Bf16, with_bf16}}};
    }();
    return table;
}

namespace {

constexpr std::int64_t kBlockKeys = 32 * kTileKeys;  // widened: 209 KiB, stays in L2 while the panels pass
constexpr std::int64_t kChunkQueries = 512;          // with kBlockKeys: 384 KiB of partial sums in L2

const KeyKernels<float>& kernels_for(const WhitenedTopkKernels& kernels, const float*) {
    return kernels.f32;
}
const KeyKernels<BFloat16>& kernels_for(const WhitenedTopkKernels& kernels, const BFloat16*) {
    return kernels.bf16;
}
const KeyKernels<Float16>& kernels_for(const WhitenedTopkKernels& kernels, const Float16*) {
    return kernels.f16;
}

// One thread's hits and scratch.
struct Worker {
    Worker(RunningHits& own_hits, std::int64_t n_padded_queries)
        : hits(own_hits),
          widened(static_cast<std::size_t>(kBlockKeys * kWidenedStride)),
          scores(buffer.reserve(kBlockKeys * std::min(kChunkQueries, n_padded_queries))),
          survivors(static_cast<std::size_t>(kChunkQueries)) {}

    RunningHits& hits;
    std::vector<float> widened;
    AlignedBuffer buffer;
    float* scores;
    std::vector<std::int32_t> survivors;
    ScanReport report;
};

using RowSquares = std::array<double, kBlockKeys>;

template <class T>
class Scan {
  public:
    Scan(const ScanInput& input, MatrixView<const T> keys, const PackedQueries& packed,
         const WhitenedTopkKernels& kernels)
        : input_(input),
          keys_(keys),
          packed_(packed),
          kernels_(kernels),
          of_key_(kernels_for(kernels, static_cast<const T*>(nullptr))) {}

    void block(std::int64_t number, Worker& worker) const {
        const std::int64_t begin = number * kBlockKeys;
        const std::int64_t n_rows = std::min(kBlockKeys, keys_.rows - begin);
        if (packed_.pass() == ScanPass::kFloat64) {
            score_every_pair(begin, n_rows, worker);
            return;
        }
        RowSquares squares{};
        for (std::int64_t chunk = 0; chunk < packed_.n_padded(); chunk += kChunkQueries) {
            score_chunk(begin, n_rows, chunk, squares, worker);
        }
    }

  private:
    void score_every_pair(std::int64_t begin, std::int64_t n_rows, Worker& worker) const {
        for (std::int64_t row = begin; row < begin + n_rows; ++row) {
            double square = 0.0;
            for (std::int64_t depth = 0; depth < keys_.cols; depth += kBlockDepth) {
                const std::int64_t n = std::min(kBlockDepth, keys_.cols - depth);
                square += of_key_.widen(keys_.row(row) + depth, n, worker.widened.data());
            }
            if (!is_usable(row, square, worker, true)) {
                continue;
            }
            for (std::int64_t query = 0; query < input_.queries.rows; ++query) {
                if (!packed_.is_finite(query)) {
                    continue;
                }
                const Hit hit = exact_hit(row, query, worker);
                if (worker.hits.would_take(query, hit) && !is_excluded(input_, row, query)) {
                    worker.hits.take(query, hit);
                }
            }
        }
    }

    // squares: Σ k² of the block's rows, filled with the first chunk.
    void score_chunk(std::int64_t begin, std::int64_t n_rows, std::int64_t chunk, RowSquares& squares,
                     Worker& worker) const {
        const std::int64_t n_queries = std::min(kChunkQueries, packed_.n_padded() - chunk);
        if (packed_.pass() == ScanPass::kFloat32) {
            multiply_float32(begin, n_rows, chunk, n_queries, squares, worker);
        } else if constexpr (std::is_same_v<T, BFloat16>) {
            multiply_bf16(begin, n_rows, chunk, n_queries, worker);
            if (chunk == 0) {
                bf16_squares(begin, n_rows, squares, worker);
            }
        } else {
            REP_FAST_CHECK(false, "a bfloat16 pass was chosen for other keys");
        }
        for (std::int64_t row = 0; row < n_rows; ++row) {
            const double square = squares[static_cast<std::size_t>(row)];
            if (is_usable(begin + row, square, worker, chunk == 0)) {
                rescore_survivors(begin + row, square, worker.scores + row * n_queries, chunk, n_queries, worker);
            }
        }
    }

    void multiply_float32(std::int64_t begin, std::int64_t n_rows, std::int64_t chunk, std::int64_t n_queries,
                          RowSquares& squares, Worker& worker) const {
        const std::int64_t n_tiles = (n_rows + kTileKeys - 1) / kTileKeys;
        for (std::int64_t depth = 0; depth < keys_.cols; depth += kBlockDepth) {
            const std::int64_t n = std::min(kBlockDepth, keys_.cols - depth);
            for (std::int64_t row = 0; row < n_rows; ++row) {
                const double square =
                    of_key_.widen(keys_.row(begin + row) + depth, n, worker.widened.data() + row * kWidenedStride);
                if (chunk == 0) {
                    squares[static_cast<std::size_t>(row)] += square;
                }
            }
            // rows of the last tile beyond n_rows hold what was there before: their scores are not looked at
            kernels_.float32.multiply(worker.widened.data(), n_tiles, packed_.panel(chunk / kPanelQueries, depth),
                                      n_queries / kPanelQueries, packed_.panel_stride(), n, worker.scores, n_queries,
                                      depth == 0);
        }
    }

    void multiply_bf16(std::int64_t begin, std::int64_t n_rows, std::int64_t chunk, std::int64_t n_queries,
                       Worker& worker) const {
        for (std::int64_t depth = 0; depth < keys_.cols; depth += kBlockDepth) {
            const std::int64_t n = std::min(kBlockDepth, keys_.cols - depth);
            const Bf16Keys block = {.first = keys_.row(begin) + depth,
                                    .stride = keys_.row_stride,
                                    .n_rows = n_rows,
                                    .depth = n,
                                    .n_after = keys_.cols - depth - n};
            kernels_.bf16_products->multiply(block, packed_.bf16_panels(chunk / kPanelQueries, depth),
                                             n_queries / kPanelQueries, worker.scores, n_queries, depth == 0);
        }
    }

    // Upper bounds of Σ k², finite exactly when the row is.
    void bf16_squares(std::int64_t begin, std::int64_t n_rows, RowSquares& squares, Worker& worker) const {
        const auto chain = static_cast<double>(keys_.cols / 16 + 8);
        const double flushed = 4.0 * static_cast<double>(keys_.cols) * 0x1p-126;
        for (std::int64_t row = 0; row < n_rows; ++row) {
            const BFloat16* const keys = keys_.row(begin + row);
            const float rough = kernels_.bf16_products->square(keys, keys_.cols);
            double square = static_cast<double>(rough) * (1.0 + chain * 0x1p-23) + flushed;
            if (!std::isfinite(rough)) {  // or its square overflows float32
                square = 0.0;
                for (std::int64_t depth = 0; depth < keys_.cols; depth += kBlockDepth) {
                    const std::int64_t n = std::min(kBlockDepth, keys_.cols - depth);
                    square += of_key_.widen(keys + depth, n, worker.widened.data());
                }
            }
            squares[static_cast<std::size_t>(row)] = square;
        }
    }

    void rescore_survivors(std::int64_t row, double square, const float* scores, std::int64_t chunk,
                           std::int64_t n_queries, Worker& worker) const {
        const std::int64_t n_survivors =
            kernels_.float32.select(scores, packed_.margins() + chunk, worker.hits.thresholds() + chunk,
                                    packed_.key_norm(square), packed_.underflow(), n_queries, worker.survivors.data());
        for (std::int64_t i = 0; i < n_survivors; ++i) {
            const std::int64_t query = chunk + worker.survivors[i];
            if (query >= input_.queries.rows || !packed_.is_finite(query) || is_excluded(input_, row, query)) {
                continue;
            }
            const Hit hit = exact_hit(row, query, worker);
            if (worker.hits.would_take(query, hit)) {
                worker.hits.take(query, hit);
            }
        }
    }

    Hit exact_hit(std::int64_t row, std::int64_t query, Worker& worker) const {
        ++worker.report.n_rescored;
        return {of_key_.exact_score(keys_.row(row), input_.queries.row(query), keys_.cols), input_.first_id + row};
    }

    // Σ k² is finite exactly when the key is: squares of float32 cannot overflow float64.
    static bool is_usable(std::int64_t row, double square, Worker& worker, bool count) {
        if (std::isfinite(square)) {
            return true;
        }
        if (count) {
            auto& report = worker.report;
            report.first_nonfinite_key = report.n_nonfinite_keys == 0 ? row : std::min(row, report.first_nonfinite_key);
            ++report.n_nonfinite_keys;
        }
        return false;
    }

    const ScanInput& input_;
    MatrixView<const T> keys_;
    const PackedQueries& packed_;
    const WhitenedTopkKernels& kernels_;
    const KeyKernels<T>& of_key_;
};

ScanReport merge_reports(const std::vector<Worker>& workers) {
    ScanReport total;
    for (const Worker& worker : workers) {
        const ScanReport& part = worker.report;
        if (part.n_nonfinite_keys > 0) {
            total.first_nonfinite_key = total.n_nonfinite_keys == 0
                                            ? part.first_nonfinite_key
                                            : std::min(total.first_nonfinite_key, part.first_nonfinite_key);
        }
        total.n_nonfinite_keys += part.n_nonfinite_keys;
        total.n_rescored += part.n_rescored;
    }
    return total;
}

void check_sizes(const ScanInput& input, const ScanState& state, std::int64_t n_keys, std::int64_t key_dim) {
    const std::int64_t n_queries = input.queries.rows;
    REP_FAST_CHECK(key_dim == input.queries.cols && key_dim >= 1,
                   "keys are " << key_dim << " wide, queries " << input.queries.cols);
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

}  // namespace

ScanReport whitened_topk(const ScanInput& input, const ScanState& state, CpuLevel level, int n_threads) {
    const auto [n_keys, key_dim] =
        std::visit([](const auto& keys) { return std::pair(keys.rows, keys.cols); }, input.keys);
    check_sizes(input, state, n_keys, key_dim);
    const GradualUnderflow exact_subnormals;  // margins and starting thresholds are computed here, outside the queue
    const WhitenedTopkKernels& kernels = at_level(whitened_topk_table(), level).kernels;
    const ScanPass pass = choose_pass(input, kernels);
    const PackedQueries packed(input.queries, pass, n_threads);
    for (std::int64_t query = 0; query < input.queries.rows; ++query) {
        state.query_dropped[static_cast<std::size_t>(query)] = !packed.is_finite(query);
    }
    const std::int64_t n_blocks = (n_keys + kBlockKeys - 1) / kBlockKeys;
    const auto n_workers = std::clamp<std::int64_t>(n_blocks, 1, std::max(n_threads, 1));
    std::vector<RunningHits> hits(static_cast<std::size_t>(n_workers), RunningHits(state, packed));
    std::vector<Worker> workers;
    workers.reserve(hits.size());
    for (RunningHits& own : hits) {
        workers.emplace_back(own, packed.n_padded());
    }
    std::visit(
        [&](const auto& keys) {
            const Scan scan(input, keys, packed, kernels);
            run_blocks(n_blocks, n_threads, [&](std::int64_t block, int worker) {
                scan.block(block, workers[static_cast<std::size_t>(worker)]);
            });
        },
        input.keys);
    merge_hits(hits, state);
    ScanReport report = merge_reports(workers);
    report.pass = pass;
    return report;
}

}  // namespace rep_fast
