// The scan loop of whitened_topk: one block of keys against all queries, in chunks, by the pass that was chosen.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <type_traits>
#include <vector>

#include "core/aligned_buffer.h"
#include "core/error.h"
#include "cpu/candidates.h"
#include "cpu/pass_choice.h"
#include "cpu/query_packings.h"
#include "cpu/running_hits.h"
#include "cpu/whitened_topk.h"
#include "cpu/whitened_topk_kernels.h"

namespace rep_fast {

inline constexpr std::int64_t kBlockKeys = 32 * kTileKeys;  // widened: 209 KiB, stays in L2 while the panels pass
inline constexpr std::int64_t kChunkQueries = 512;          // with kBlockKeys: 384 KiB of partial sums in L2
inline constexpr std::int64_t kInt8Depth = 512;             // four panels of it, 32 KiB, stay in L1
inline constexpr std::int64_t kQuantisedBytes = 1 << 19;    // of a block of quantised keys, which stays in L2

// Keys of one block as the int8 pass multiplies them.
struct QuantisedKeys {
    struct Row {
        bool is_usable = false;  // finite
        Int8Margins margins = {};
    };
    std::vector<std::uint8_t> bytes;
    std::vector<Row> rows;
};

// One thread's hits and scratch.
struct ScanWorker {
    ScanWorker(RunningHits& own_hits, std::int64_t n_padded_queries)
        : hits(own_hits),
          widened(static_cast<std::size_t>(kWidenedStride)),
          bounds(static_cast<std::size_t>(std::min(kChunkQueries, n_padded_queries))),
          survivors(bounds.size()),
          candidates(n_padded_queries, own_hits.k()) {}

    RunningHits& hits;
    std::vector<float> widened;  // one row, or a block in the float32 pass
    AlignedBuffer score_buffer;
    std::vector<std::int32_t> sums;
    QuantisedKeys quantised;
    std::vector<float> bounds;  // of one key and a chunk of queries
    std::vector<std::int32_t> survivors;
    Candidates candidates;
    std::int64_t rows_seen = 0;
    std::int64_t rows_when_watched = 0;  // see watch_share
    std::int64_t rescored_when_watched = 0;
    ScanReport report;
};

template <class T>
class BlockScan {
  public:
    BlockScan(const ScanInput& input, MatrixView<const T> keys, QueryPackings& packings, const PassChoice& choice,
              const WhitenedTopkKernels& kernels, int n_threads)
        : input_(input),
          keys_(keys),
          packings_(packings),
          choice_(choice),
          kernels_(kernels),
          of_key_(kernels.rows.template of<T>()) {
        if (choice.first == ScanPass::kInt8) {
            dithered_ = packings.dithered(input.keys, *kernels.int8_products, input.dither, n_threads);
            const std::int64_t fitting = kQuantisedBytes / quantised_stride() / kTileKeys * kTileKeys;
            block_keys_ = std::clamp(fitting, 4 * kTileKeys, kBlockKeys);
        } else {
            packed_ = packings.packed(choice.first, n_threads);
        }
    }

    std::int64_t n_blocks() const { return (keys_.rows + block_keys_ - 1) / block_keys_; }
    // Scores what waits, once after the last block.
    void rescore(ScanWorker& worker) const {
        worker.candidates.drain(
            [&](const Candidates::Pair& pair, std::int64_t next) { return rescore_pair(pair, next, worker); });
    }
    bool is_finite(std::int64_t query) const {
        return dithered_ != nullptr ? dithered_->is_finite(query) : packed_->is_finite(query);
    }

    void block(std::int64_t number, ScanWorker& worker) {
        const std::int64_t begin = number * block_keys_;
        const std::int64_t n_rows = std::min(block_keys_, keys_.rows - begin);
        const bool gave_up = gave_up_;
        const ScanPass pass = gave_up ? choice_.second : choice_.first;
        const PassReason reason = gave_up ? PassReason::kGaveUp : choice_.reason;
        worker.report.pass_keys[static_cast<std::size_t>(pass)] += n_rows;
        worker.report.reason_keys[static_cast<std::size_t>(reason)] += n_rows;
        if (pass == ScanPass::kInt8) {
            scan_int8(begin, n_rows, worker);
            return;
        }
        // made here when the int8 pass gave up
        const std::shared_ptr<const PackedQueries> packed = pass == choice_.first ? packed_ : packings_.packed(pass, 1);
        if (pass == ScanPass::kFloat64) {
            score_every_pair(begin, n_rows, *packed, worker);
        } else {
            scan_float(begin, n_rows, *packed, worker);
        }
    }

  private:
    std::int64_t n_padded() const { return (input_.queries.rows + kPanelQueries - 1) / kPanelQueries * kPanelQueries; }

    // ---- float64 ----------------------------------------------------------------------------------------------------

    void score_every_pair(std::int64_t begin, std::int64_t n_rows, const PackedQueries& packed,
                          ScanWorker& worker) const {
        for (std::int64_t row = begin; row < begin + n_rows; ++row) {
            if (!is_usable(row, exact_square(row, worker), worker)) {
                continue;
            }
            for (std::int64_t query = 0; query < input_.queries.rows; ++query) {
                if (!packed.is_finite(query)) {
                    continue;
                }
                const Hit hit = exact_hit(row, query, row, worker);
                if (worker.hits.would_take(query, hit) && !is_excluded(input_, row, query)) {
                    worker.hits.take(query, hit);
                }
            }
        }
    }

    // ---- float32 and bfloat16 ---------------------------------------------------------------------------------------

    void scan_float(std::int64_t begin, std::int64_t n_rows, const PackedQueries& packed, ScanWorker& worker) {
        float* const scores = worker.score_buffer.reserve(kBlockKeys * std::ssize(worker.bounds));
        std::vector<double> squares(static_cast<std::size_t>(n_rows));
        std::vector<bool> usable(static_cast<std::size_t>(n_rows));
        for (std::int64_t chunk = 0; chunk < n_padded(); chunk += kChunkQueries) {
            const std::int64_t n_queries = std::min(kChunkQueries, n_padded() - chunk);
            if (packed.pass() == ScanPass::kFloat32) {
                multiply_float32(begin, chunk, n_queries, packed, squares, scores, worker);
            } else if constexpr (std::is_same_v<T, BFloat16>) {
                multiply_bf16(begin, n_rows, chunk, n_queries, packed, scores);
                if (chunk == 0) {
                    bf16_squares(begin, squares, worker);
                }
            } else {
                REP_FAST_CHECK(false, "a bfloat16 pass was chosen for other keys");
            }
            for (std::int64_t row = 0; row < n_rows; ++row) {
                const double square = squares[static_cast<std::size_t>(row)];
                if (chunk == 0) {
                    usable[static_cast<std::size_t>(row)] = is_usable(begin + row, square, worker);
                }
                if (usable[static_cast<std::size_t>(row)]) {
                    const float* const own = scores + row * n_queries;
                    const float norm = packed.key_norm(square);
                    const std::int64_t n = kernels_.float32.select(
                        own, packed.margins() + chunk, worker.hits.thresholds() + chunk, norm, packed.underflow(),
                        n_queries, worker.bounds.data(), worker.survivors.data());
                    collect(begin + row, chunk, n, worker,
                            [&](std::int64_t query) { return packed.least_score(own[query], chunk + query, norm); });
                }
            }
        }
        finish_block(begin, n_rows, worker);
    }

    // squares: Σ k² of the block's rows, added up with the first chunk.
    void multiply_float32(std::int64_t begin, std::int64_t chunk, std::int64_t n_queries, const PackedQueries& packed,
                          std::vector<double>& squares, float* scores, ScanWorker& worker) const {
        const std::int64_t n_rows = std::ssize(squares);
        const std::int64_t n_tiles = (n_rows + kTileKeys - 1) / kTileKeys;
        worker.widened.resize(static_cast<std::size_t>(kBlockKeys * kWidenedStride));
        for (std::int64_t depth = 0; depth < keys_.cols; depth += kBlockDepth) {
            const std::int64_t n = std::min(kBlockDepth, keys_.cols - depth);
            for (std::int64_t row = 0; row < n_rows; ++row) {
                const double square =
                    of_key_.widen(keys_.row(begin + row) + depth, n, worker.widened.data() + row * kWidenedStride);
                if (chunk == 0) {
                    squares[static_cast<std::size_t>(row)] += square;
                }
                fetch(begin + row, depth + kBlockDepth);
            }
            // rows of the last tile beyond n_rows hold what was there before: their scores are not looked at
            kernels_.float32.multiply(worker.widened.data(), n_tiles, packed.panel(chunk / kPanelQueries, depth),
                                      n_queries / kPanelQueries, packed.panel_stride(), n, scores, n_queries,
                                      depth == 0);
        }
    }

    // The k-block of a row that is widened after this one: pieces of many rows are no stream that processors foresee.
    void fetch(std::int64_t row, std::int64_t depth) const {
        constexpr std::int64_t kLine = 64 / static_cast<std::int64_t>(sizeof(T));
        const T* const from = keys_.row(row);
        for (std::int64_t j = depth; j < std::min(depth + kBlockDepth, keys_.cols); j += kLine) {
            __builtin_prefetch(from + j, 0, 2);
        }
    }

    void multiply_bf16(std::int64_t begin, std::int64_t n_rows, std::int64_t chunk, std::int64_t n_queries,
                       const PackedQueries& packed, float* scores) const {
        for (std::int64_t depth = 0; depth < keys_.cols; depth += kBlockDepth) {
            const std::int64_t n = std::min(kBlockDepth, keys_.cols - depth);
            const Bf16Keys block = {.first = keys_.row(begin) + depth,
                                    .stride = keys_.row_stride,
                                    .n_rows = n_rows,
                                    .depth = n,
                                    .n_after = keys_.cols - depth - n};
            kernels_.bf16_products->multiply(block, packed.bf16_panels(chunk / kPanelQueries, depth),
                                             n_queries / kPanelQueries, scores, n_queries, depth == 0);
        }
    }

    // Upper bounds of Σ k², finite exactly when the row is.
    void bf16_squares(std::int64_t begin, std::vector<double>& squares, ScanWorker& worker) const {
        const auto chain = static_cast<double>(keys_.cols / 16 + 8);
        const double flushed = 4.0 * static_cast<double>(keys_.cols) * 0x1p-126;
        for (std::int64_t row = 0; row < std::ssize(squares); ++row) {
            const float rough = kernels_.bf16_products->square(keys_.row(begin + row), keys_.cols);
            squares[static_cast<std::size_t>(row)] =
                std::isfinite(rough) ? static_cast<double>(rough) * (1.0 + chain * 0x1p-23) + flushed
                                     : exact_square(begin + row, worker);  // or its square overflows float32
        }
    }

    // ---- int8 -------------------------------------------------------------------------------------------------------

    // A whole number of cache lines, and an odd one, so that the rows of a tile do not share cache sets.
    std::int64_t quantised_stride() const {
        return ((keys_.cols + kQuantisedMultiple - 1) / kQuantisedMultiple | 1) * kQuantisedMultiple;
    }

    void scan_int8(std::int64_t begin, std::int64_t n_rows, ScanWorker& worker) {
        worker.sums.resize(static_cast<std::size_t>(block_keys_ * std::ssize(worker.bounds)));
        quantise(begin, n_rows, worker);
        for (std::int64_t chunk = 0; chunk < n_padded(); chunk += kChunkQueries) {
            const std::int64_t n_queries = std::min(kChunkQueries, n_padded() - chunk);
            multiply_int8(n_rows, chunk, n_queries, worker);
            for (std::int64_t row = 0; row < n_rows; ++row) {
                const QuantisedKeys::Row& own = worker.quantised.rows[static_cast<std::size_t>(row)];
                if (own.is_usable) {
                    Int8Margins margins = own.margins;
                    margins.of_queries += chunk;
                    margins.query_steps += chunk;
                    const std::int32_t* const sums = worker.sums.data() + row * n_queries;
                    const std::int64_t n =
                        kernels_.int8_products->select(sums, margins, worker.hits.thresholds() + chunk, n_queries,
                                                       worker.bounds.data(), worker.survivors.data());
                    collect(begin + row, chunk, n, worker,
                            [&](std::int64_t query) { return least_score(sums[query], query, margins); });
                }
            }
        }
        finish_block(begin, n_rows, worker);
    }

    void quantise(std::int64_t begin, std::int64_t n_rows, ScanWorker& worker) const {
        const QuantiseKernels<T>& of_key = kernels_.int8_products->rows.template of<T>();
        QuantisedKeys& quantised = worker.quantised;
        quantised.bytes.resize(static_cast<std::size_t>(block_keys_ * quantised_stride()));
        quantised.rows.resize(static_cast<std::size_t>(block_keys_));
        for (std::int64_t row = 0; row < n_rows; ++row) {
            const T* const key = keys_.row(begin + row);
            QuantisedKeys::Row& own = quantised.rows[static_cast<std::size_t>(row)];
            const float largest = of_key.largest(key, dithered_->key_scales(), keys_.cols);
            own.is_usable = std::isfinite(largest);
            if (own.is_usable) {
                const FixedPoint point = fixed_point(largest);
                const std::int64_t square =
                    of_key.quantise(key, dithered_->key_scales(), dithered_->key_dither(), point.per_step, keys_.cols,
                                    quantised.bytes.data() + row * quantised_stride());
                own.margins = dithered_->margins(0, point.step, square);
            } else {  // or finite, and beyond float32 once scaled
                own.is_usable = is_usable(begin + row, exact_square(begin + row, worker), worker);
                own.margins = dithered_->no_margins(0);
            }
        }
    }

    void multiply_int8(std::int64_t n_rows, std::int64_t chunk, std::int64_t n_queries, ScanWorker& worker) const {
        const std::int64_t panel = chunk / kPanelQueries;
        for (std::int64_t depth = 0; depth < keys_.cols; depth += kInt8Depth) {
            const Int8Keys block = {.first = worker.quantised.bytes.data() + depth,
                                    .stride = quantised_stride(),
                                    .n_rows = n_rows,
                                    .depth = std::min(kInt8Depth, (keys_.cols + 3) / 4 * 4 - depth)};
            kernels_.int8_products->multiply(block, dithered_->panel(panel, depth), n_queries / kPanelQueries,
                                             dithered_->panel_stride(), worker.sums.data(), n_queries,
                                             depth == 0 ? dithered_->starts(panel) : nullptr);
        }
    }

    // ---- what survives ----------------------------------------------------------------------------------------------

    // False where the pair, and with it all of lower bounds, cannot enter any more.
    bool rescore_pair(const Candidates::Pair& pair, std::int64_t next, ScanWorker& worker) const {
        if (pair.bound < worker.hits.thresholds()[pair.query]) {
            return false;
        }
        const Hit hit = exact_hit(pair.row, pair.query, next, worker);
        if (worker.hits.would_take(pair.query, hit)) {
            worker.hits.take(pair.query, hit);
        }
        return true;
    }

    // The first n survivors of a row. lower(query of the chunk): not above the pair's score, or NaN.
    template <class Lower>
    void collect(std::int64_t row, std::int64_t chunk, std::int64_t n, ScanWorker& worker, const Lower& lower) const {
        if (worker.candidates.room() < n) {
            make_room(worker);
        }
        for (std::int64_t i = 0; i < n; ++i) {
            const std::int32_t in_chunk = worker.survivors[static_cast<std::size_t>(i)];
            const std::int64_t query = chunk + in_chunk;
            // a NaN bound survives where there is no query, too
            if (query >= input_.queries.rows || !is_finite(query) || is_excluded(input_, row, query)) {
                continue;
            }
            worker.candidates.add(query, row, worker.bounds[static_cast<std::size_t>(in_chunk)]);
            const double least = lower(in_chunk);
            if (!std::isnan(least)) {
                worker.hits.expect(query, round_down(least));
            }
        }
    }

    // Candidates of several blocks wait for each other: the rows of a query's pairs are then read one after the other,
    // its own once, and only those that later pairs have not ruled out. Where margins are wide the scores of the k best
    // rule more out than their bounds do.
    void make_room(ScanWorker& worker) const {
        worker.candidates.drop_below(worker.hits.thresholds());
        if (worker.candidates.is_half_full()) {
            worker.candidates.visit_best(worker.hits.k(), [&](const Candidates::Pair& pair, std::int64_t next) {
                return rescore_pair(pair, next, worker);
            });
            worker.candidates.drop_below(worker.hits.thresholds());
        }
        if (worker.candidates.is_half_full()) {
            rescore(worker);
        }
    }

    void finish_block(std::int64_t begin, std::int64_t n_rows, ScanWorker& worker) {
        worker.rows_seen += n_rows;
        if (worker.report.n_rescored > worker.rescored_when_watched) {
            watch_share(begin + n_rows, worker);
        }
    }

    // Gives the int8 pass up where the other would be faster on the keys that are left. What int8 scores again grows
    // like the number of keys that were among the best when they came, times a factor that changes little as the k-th
    // best rises. Where it rules out less than half, the margin decides and not the k-th best: then the share itself
    // stays.
    void watch_share(std::int64_t n_seen, ScanWorker& worker) {
        const auto scored = static_cast<double>(worker.report.n_rescored - worker.rescored_when_watched);
        const auto seen = static_cast<double>(worker.rows_seen);
        const auto window = static_cast<double>(worker.rows_seen - worker.rows_when_watched);
        const double all = seen * static_cast<double>(keys_.rows) / static_cast<double>(n_seen);  // that it may get
        const double before = expected_entries_until(static_cast<double>(worker.rows_when_watched), worker);
        const double now = expected_entries_until(seen, worker);
        worker.rescored_when_watched = worker.report.n_rescored;
        worker.rows_when_watched = worker.rows_seen;
        if (choice_.second == choice_.first || all <= seen) {
            return;
        }
        const double scored_per_query = scored / static_cast<double>(input_.queries.rows);
        const double entries_left = (expected_entries_until(all, worker) - now) / (all - seen);
        const double left = 2.0 * scored_per_query > window ? scored_per_query / window
                                                            : scored_per_query / (now - before) * entries_left;
        if (left > choice_.largest_survivor_share) {
            gave_up_ = true;
        }
    }

    // Per query, with what the state comes from.
    double expected_entries_until(double n_rows, const ScanWorker& worker) const {
        return expected_entries(choice_.n_keys_before + n_rows, static_cast<double>(worker.hits.k()));
    }

    // next: the row that is scored afterwards.
    Hit exact_hit(std::int64_t row, std::int64_t query, std::int64_t next, ScanWorker& worker) const {
        ++worker.report.n_rescored;
        return {of_key_.exact_score(keys_.row(row), input_.queries.row(query), keys_.cols, keys_.row(next)),
                input_.first_id + row};
    }

    double exact_square(std::int64_t row, ScanWorker& worker) const {
        double square = 0.0;
        for (std::int64_t depth = 0; depth < keys_.cols; depth += kBlockDepth) {
            const std::int64_t n = std::min(kBlockDepth, keys_.cols - depth);
            square += of_key_.widen(keys_.row(row) + depth, n, worker.widened.data());
        }
        return square;
    }

    // Σ k² is finite exactly when the key is: squares of float32 cannot overflow float64. Counts the rows that are not.
    static bool is_usable(std::int64_t row, double square, ScanWorker& worker) {
        if (std::isfinite(square)) {
            return true;
        }
        auto& report = worker.report;
        report.first_nonfinite_key = report.n_nonfinite_keys == 0 ? row : std::min(row, report.first_nonfinite_key);
        ++report.n_nonfinite_keys;
        return false;
    }

    const ScanInput& input_;
    MatrixView<const T> keys_;
    QueryPackings& packings_;
    PassChoice choice_;
    const WhitenedTopkKernels& kernels_;
    const RowKernels<T>& of_key_;
    std::shared_ptr<const PackedQueries> packed_;      // of the first pass
    std::shared_ptr<const DitheredQueries> dithered_;  // where that is int8
    std::int64_t block_keys_ = kBlockKeys;
    std::atomic<bool> gave_up_ = false;
};

}  // namespace rep_fast
