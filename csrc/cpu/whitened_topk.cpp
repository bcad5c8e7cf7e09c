#include "cpu/whitened_topk.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "core/aligned_buffer.h"
#include "core/error.h"
#include "core/gradual_underflow.h"
#include "core/work_queue.h"

namespace rep_fast {
namespace portable {
namespace {

template <class T>
double widen(const T* keys, std::int64_t n, float* widened) {
    double square = 0.0;
    for (std::int64_t j = 0; j < n; ++j) {
        widened[j] = to_float(keys[j]);
        square += static_cast<double>(widened[j]) * static_cast<double>(widened[j]);
    }
    return square;
}

template <class T>
double exact_score(const T* key, const float* query, std::int64_t n) {
    std::array<double, kExactLanes> lanes{};
    std::int64_t j = 0;
    for (; j + kExactLanes <= n; j += kExactLanes) {
        for (std::int64_t lane = 0; lane < kExactLanes; ++lane) {
            lanes[lane] += static_cast<double>(to_float(key[j + lane])) * static_cast<double>(query[j + lane]);
        }
    }
    for (std::int64_t lane = 0; j < n; ++j, ++lane) {
        lanes[lane] += static_cast<double>(to_float(key[j])) * static_cast<double>(query[j]);
    }
    for (std::int64_t half = kExactLanes / 2; half > 0; half /= 2) {
        for (std::int64_t lane = 0; lane < half; ++lane) {
            lanes[lane] += lanes[lane + half];
        }
    }
    return lanes[0];
}

// Four floats, the vector of the baseline instruction set. Written out because the compiler keeps a plain array of sums
// in memory: 2 instead of 17 GFlop/s.
using Float4 [[gnu::vector_size(16)]] = float;
constexpr std::int64_t kPanelVectors = kPanelQueries / 4;

Float4 load4(const float* from) {
    Float4 vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

// Two key rows against one panel: 8 sums, 4 queries and 2 keys fit the 16 baseline registers.
void multiply_rows(const float* keys, const float* panel, std::int64_t depth, float* scores, std::int64_t score_stride,
                   bool first) {
    Float4 sums[2][kPanelVectors] = {};
    for (std::int64_t j = 0; j < depth; ++j) {
#pragma GCC unroll 4
        for (std::int64_t part = 0; part < kPanelVectors; ++part) {
            const Float4 queries = load4(panel + j * kPanelQueries + 4 * part);
            sums[0][part] += keys[j] * queries;
            sums[1][part] += keys[kWidenedStride + j] * queries;
        }
    }
#pragma GCC unroll 2
    for (std::int64_t row = 0; row < 2; ++row) {
#pragma GCC unroll 4
        for (std::int64_t part = 0; part < kPanelVectors; ++part) {
            float* const out = scores + row * score_stride + 4 * part;
            const Float4 total = first ? sums[row][part] : load4(out) + sums[row][part];
            std::memcpy(out, &total, sizeof total);
        }
    }
}

void multiply(const float* keys, std::int64_t n_tiles, const float* panels, std::int64_t n_panels,
              std::int64_t panel_stride, std::int64_t depth, float* scores, std::int64_t score_stride, bool first) {
    static_assert(kTileKeys % 2 == 0);
    for (std::int64_t panel = 0; panel < n_panels; ++panel) {
        for (std::int64_t row = 0; row < n_tiles * kTileKeys; row += 2) {
            multiply_rows(keys + row * kWidenedStride, panels + panel * panel_stride, depth,
                          scores + row * score_stride + panel * kPanelQueries, score_stride, first);
        }
    }
}

std::int64_t select(const float* scores, const float* margins, const float* thresholds, float key_norm, float underflow,
                    std::int64_t n, std::int32_t* survivors) {
    std::int64_t count = 0;
    for (std::int64_t q = 0; q < n; ++q) {
        if (!(scores[q] + (key_norm * margins[q] + underflow) < thresholds[q])) {
            survivors[count++] = static_cast<std::int32_t>(q);
        }
    }
    return count;
}

constexpr WhitenedTopkKernels kWhitenedTopk = {.f32 = {widen<float>, exact_score<float>},
                                               .bf16 = {widen<BFloat16>, exact_score<BFloat16>},
                                               .f16 = {widen<Float16>, exact_score<Float16>},
                                               .multiply = multiply,
                                               .select = select};

}  // namespace
}  // namespace portable

const DispatchTable<WhitenedTopkKernels>& whitened_topk_table() {
    static const auto table = table_up_to_avx2(portable::kWhitenedTopk, avx2::kWhitenedTopk);
    return table;
}

namespace {

constexpr std::int64_t kBlockKeys = 16 * kTileKeys;  // widened: 102 KiB, stays in L2 while the panels pass
constexpr std::int64_t kChunkQueries = 512;          // with kBlockKeys: 192 KiB of partial sums in L2
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kRoundingSlack = 1.0 + 0x1p-20;  // for the rounding of norms and of their float32 products

const KeyKernels<float>& kernels_for(const WhitenedTopkKernels& kernels, const float*) {
    return kernels.f32;
}
const KeyKernels<BFloat16>& kernels_for(const WhitenedTopkKernels& kernels, const BFloat16*) {
    return kernels.bf16;
}
const KeyKernels<Float16>& kernels_for(const WhitenedTopkKernels& kernels, const Float16*) {
    return kernels.f16;
}

float round_down(double value) {
    const auto rounded = static_cast<float>(value);
    return static_cast<double>(rounded) > value ? std::nextafter(rounded, -std::numeric_limits<float>::infinity())
                                                : rounded;
}

float round_up(double value) {
    return -round_down(-value);
}

struct Hit {
    double score;
    std::int64_t id;
};

bool is_better(const Hit& a, const Hit& b) {
    return a.score > b.score || (a.score == b.score && a.id < b.id);
}

// The queries in panels, with what the error bound of the float32 pass needs to know of them.
//
// A float32 score of a chain of c additions differs from the true one by at most γ‖k‖‖w‖ + (underflow), where
// γ = c·2⁻²⁴/(1 − c·2⁻²⁴), by Cauchy–Schwarz on Σ|k_j w_j|.
class PackedQueries {
  public:
    PackedQueries(MatrixView<const float> queries, int n_threads)
        : queries_(queries),
          n_panels_((queries.rows + kPanelQueries - 1) / kPanelQueries),
          panels_(buffer_.reserve(n_panels_ * kPanelQueries * queries.cols)),
          norms_(static_cast<std::size_t>(n_panels_ * kPanelQueries)),
          margins_(norms_.size()) {
        const std::int64_t n_depths = (queries.cols + kBlockDepth - 1) / kBlockDepth;
        // longest chain: a k-block and the sums of blocks; 4 more for a separate product, the margin's own rounding,
        // its addition to the score, and the float64 score
        const double chain = static_cast<double>(std::min(kBlockDepth, queries.cols) + n_depths + 4) * 0x1p-24;
        const double gamma = chain / (1.0 - chain);
        underflow_ = round_up(static_cast<double>(2 * queries.cols + 2 * n_depths + 4) * 0x1p-149);
        run_blocks(n_panels_, n_threads, [this, gamma](std::int64_t panel, int) { pack(panel, gamma); });
        for (const double norm : norms_) {
            largest_norm_ = std::isfinite(norm) ? std::max(largest_norm_, norm) : largest_norm_;
        }
    }

    std::int64_t n_padded() const { return n_panels_ * kPanelQueries; }
    std::int64_t panel_stride() const { return kPanelQueries * queries_.cols; }
    const float* panel(std::int64_t number) const { return panels_ + number * panel_stride(); }
    const float* margins() const { return margins_.data(); }
    float underflow() const { return underflow_; }
    bool is_finite(std::int64_t query) const { return std::isfinite(norms_[static_cast<std::size_t>(query)]); }

    // The key's share of the margin. Infinite (everything survives) where a float32 partial sum might overflow.
    float key_norm(double square) const {
        const double norm = std::sqrt(square) * kRoundingSlack;
        return norm * largest_norm_ < 1e38 ? round_up(norm) : std::numeric_limits<float>::infinity();
    }

  private:
    void pack(std::int64_t panel, double gamma) {
        float* const out = panels_ + panel * panel_stride();
        std::fill(out, out + panel_stride(), 0.0f);
        const std::int64_t first = panel * kPanelQueries;
        const std::int64_t n_queries = std::min(kPanelQueries, queries_.rows - first);
        std::array<double, kPanelQueries> squares{};
        // by k-blocks, so that the part of the panel being filled stays in L1 for all 16 queries
        for (std::int64_t depth = 0; depth < queries_.cols; depth += kBlockDepth) {
            const std::int64_t end = std::min(depth + kBlockDepth, queries_.cols);
            for (std::int64_t q = 0; q < n_queries; ++q) {
                const float* const query = queries_.row(first + q);
                for (std::int64_t j = depth; j < end; ++j) {
                    out[j * kPanelQueries + q] = query[j];
                    squares[static_cast<std::size_t>(q)] +=
                        static_cast<double>(query[j]) * static_cast<double>(query[j]);
                }
            }
        }
        for (std::int64_t q = 0; q < n_queries; ++q) {
            const auto index = static_cast<std::size_t>(first + q);
            norms_[index] = std::sqrt(squares[static_cast<std::size_t>(q)]) * kRoundingSlack;
            margins_[index] = round_up(gamma * norms_[index] * kRoundingSlack);
        }
    }

    MatrixView<const float> queries_;
    std::int64_t n_panels_;
    AlignedBuffer buffer_;
    float* panels_;
    std::vector<double> norms_;
    std::vector<float> margins_;
    float underflow_ = 0.0f;
    double largest_norm_ = 0.0;
};

bool is_excluded(const LastTokenRule& rule, std::int64_t row, std::int64_t query) {
    if (rule.token_ids.empty()) {
        return false;
    }
    const auto after = std::upper_bound(rule.sequence_starts.begin(), rule.sequence_starts.end(), row);
    const std::int64_t start = *(after - 1);
    const std::int64_t token = rule.last_tokens[static_cast<std::size_t>(query)];
    const auto n_lookback = static_cast<std::int64_t>(rule.lookback.size());
    const std::int64_t first = std::max(start == 0 ? -n_lookback : start, row - rule.window);
    for (std::int64_t position = row; position >= first; --position) {
        const std::int64_t here = position >= 0 ? rule.token_ids[static_cast<std::size_t>(position)]
                                                : rule.lookback[static_cast<std::size_t>(n_lookback + position)];
        if (here == token) {
            return true;
        }
    }
    return false;
}

bool is_excluded(const PairRule& rule, std::int64_t row, std::int64_t query) {
    if (rule.indptr.empty()) {
        return false;
    }
    const auto* const begin = rule.subjects.data() + rule.indptr[static_cast<std::size_t>(row)];
    const auto* const end = rule.subjects.data() + rule.indptr[static_cast<std::size_t>(row) + 1];
    return std::find(begin, end, query) != end;
}

// The best k of the keys one worker saw, per query, and its scratch.
class Worker {
  public:
    Worker(const ScanInput& input, const ScanState& state, const PackedQueries& packed)
        : input_(input),
          k_(state.scores.cols),
          floors_(static_cast<std::size_t>(state.scores.rows)),
          hits_(floors_.size()),
          thresholds_(static_cast<std::size_t>(packed.n_padded()), std::numeric_limits<float>::infinity()),
          widened_(static_cast<std::size_t>(kBlockKeys * kWidenedStride)),
          scores_(buffer_.reserve(kBlockKeys * std::min(kChunkQueries, packed.n_padded()))),
          survivors_(static_cast<std::size_t>(kChunkQueries)) {
        for (std::int64_t query = 0; query < state.scores.rows; ++query) {
            const std::int64_t last_id = state.ids.row(query)[k_ - 1];
            // what the state would not take need not be collected: only better hits than its k-th
            floors_[static_cast<std::size_t>(query)] = last_id < 0
                                                           ? Hit{-kInfinity, std::numeric_limits<std::int64_t>::max()}
                                                           : Hit{state.scores.row(query)[k_ - 1], last_id};
            if (packed.is_finite(query)) {
                update_threshold(query);
            }
        }
    }

    bool would_take(std::int64_t query, const Hit& hit) const {
        const auto& hits = hits_[static_cast<std::size_t>(query)];
        return is_better(hit, floors_[static_cast<std::size_t>(query)]) &&
               (std::ssize(hits) < k_ || is_better(hit, hits.front()));
    }

    // Keeps the hits as a heap whose front is the worst.
    void take(std::int64_t query, const Hit& hit) {
        auto& hits = hits_[static_cast<std::size_t>(query)];
        if (std::ssize(hits) == k_) {
            std::pop_heap(hits.begin(), hits.end(), is_better);
            hits.back() = hit;
        } else {
            hits.push_back(hit);
        }
        std::push_heap(hits.begin(), hits.end(), is_better);
        update_threshold(query);
    }

    bool is_excluded_pair(std::int64_t row, std::int64_t query) const {
        return is_excluded(input_.last_token, row, query) || is_excluded(input_.pairs, row, query);
    }

    const std::vector<Hit>& hits(std::int64_t query) const { return hits_[static_cast<std::size_t>(query)]; }
    const float* thresholds() const { return thresholds_.data(); }
    float* widened() { return widened_.data(); }
    float* scores() { return scores_; }
    std::int32_t* survivors() { return survivors_.data(); }
    ScanReport report;

  private:
    void update_threshold(std::int64_t query) {
        const auto& hits = hits_[static_cast<std::size_t>(query)];
        const double floor = floors_[static_cast<std::size_t>(query)].score;
        const double worst = std::ssize(hits) < k_ ? -kInfinity : hits.front().score;
        thresholds_[static_cast<std::size_t>(query)] = round_down(std::max(floor, worst));
    }

    const ScanInput& input_;
    std::int64_t k_;
    std::vector<Hit> floors_;
    std::vector<std::vector<Hit>> hits_;
    std::vector<float> thresholds_;
    std::vector<float> widened_;
    AlignedBuffer buffer_;
    float* scores_;
    std::vector<std::int32_t> survivors_;
};

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
        if (input_.precision == ScanPrecision::kFloat64) {
            score_every_pair(begin, n_rows, worker);
            return;
        }
        for (std::int64_t chunk = 0; chunk < packed_.n_padded(); chunk += kChunkQueries) {
            score_chunk(begin, n_rows, chunk, worker);
        }
    }

  private:
    void score_every_pair(std::int64_t begin, std::int64_t n_rows, Worker& worker) const {
        for (std::int64_t row = begin; row < begin + n_rows; ++row) {
            double square = 0.0;
            for (std::int64_t depth = 0; depth < keys_.cols; depth += kBlockDepth) {
                const std::int64_t n = std::min(kBlockDepth, keys_.cols - depth);
                square += of_key_.widen(keys_.row(row) + depth, n, worker.widened());
            }
            if (!is_usable(row, square, worker, true)) {
                continue;
            }
            for (std::int64_t query = 0; query < input_.queries.rows; ++query) {
                if (!packed_.is_finite(query)) {
                    continue;
                }
                const Hit hit = exact_hit(row, query, worker);
                if (worker.would_take(query, hit) && !worker.is_excluded_pair(row, query)) {
                    worker.take(query, hit);
                }
            }
        }
    }

    void score_chunk(std::int64_t begin, std::int64_t n_rows, std::int64_t chunk, Worker& worker) const {
        const std::int64_t n_queries = std::min(kChunkQueries, packed_.n_padded() - chunk);
        const std::int64_t n_tiles = (n_rows + kTileKeys - 1) / kTileKeys;
        std::array<double, kBlockKeys> squares{};
        for (std::int64_t depth = 0; depth < keys_.cols; depth += kBlockDepth) {
            const std::int64_t n = std::min(kBlockDepth, keys_.cols - depth);
            for (std::int64_t row = 0; row < n_rows; ++row) {
                squares[static_cast<std::size_t>(row)] +=
                    of_key_.widen(keys_.row(begin + row) + depth, n, worker.widened() + row * kWidenedStride);
            }
            // rows of the last tile beyond n_rows hold what was there before: their scores are not looked at
            kernels_.multiply(worker.widened(), n_tiles, packed_.panel(chunk / kPanelQueries) + depth * kPanelQueries,
                              n_queries / kPanelQueries, packed_.panel_stride(), n, worker.scores(), n_queries,
                              depth == 0);
        }
        for (std::int64_t row = 0; row < n_rows; ++row) {
            const double square = squares[static_cast<std::size_t>(row)];
            if (is_usable(begin + row, square, worker, chunk == 0)) {
                rescore_survivors(begin + row, square, worker.scores() + row * n_queries, chunk, n_queries, worker);
            }
        }
    }

    void rescore_survivors(std::int64_t row, double square, const float* scores, std::int64_t chunk,
                           std::int64_t n_queries, Worker& worker) const {
        const std::int64_t n_survivors =
            kernels_.select(scores, packed_.margins() + chunk, worker.thresholds() + chunk, packed_.key_norm(square),
                            packed_.underflow(), n_queries, worker.survivors());
        for (std::int64_t i = 0; i < n_survivors; ++i) {
            const std::int64_t query = chunk + worker.survivors()[i];
            if (query >= input_.queries.rows || !packed_.is_finite(query) || worker.is_excluded_pair(row, query)) {
                continue;
            }
            const Hit hit = exact_hit(row, query, worker);
            if (worker.would_take(query, hit)) {
                worker.take(query, hit);
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

void merge_hits(const std::vector<Worker>& workers, const ScanState& state) {
    const std::int64_t k = state.scores.cols;
    std::vector<Hit> all;
    for (std::int64_t query = 0; query < state.scores.rows; ++query) {
        all.clear();
        for (std::int64_t i = 0; i < k && state.ids.row(query)[i] >= 0; ++i) {
            all.push_back({state.scores.row(query)[i], state.ids.row(query)[i]});
        }
        for (const Worker& worker : workers) {
            all.insert(all.end(), worker.hits(query).begin(), worker.hits(query).end());
        }
        std::sort(all.begin(), all.end(), is_better);
        for (std::int64_t i = 0; i < std::min(k, std::ssize(all)); ++i) {
            state.scores.row(query)[i] = all[static_cast<std::size_t>(i)].score;
            state.ids.row(query)[i] = all[static_cast<std::size_t>(i)].id;
        }
    }
}

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
    const PackedQueries packed(input.queries, n_threads);
    for (std::int64_t query = 0; query < input.queries.rows; ++query) {
        state.query_dropped[static_cast<std::size_t>(query)] = !packed.is_finite(query);
    }
    const std::int64_t n_blocks = (n_keys + kBlockKeys - 1) / kBlockKeys;
    const auto n_workers = std::clamp<std::int64_t>(n_blocks, 1, std::max(n_threads, 1));
    std::vector<Worker> workers;
    workers.reserve(static_cast<std::size_t>(n_workers));
    for (std::int64_t worker = 0; worker < n_workers; ++worker) {
        workers.emplace_back(input, state, packed);
    }
    const WhitenedTopkKernels& kernels = at_level(whitened_topk_table(), level).kernels;
    std::visit(
        [&](const auto& keys) {
            const Scan scan(input, keys, packed, kernels);
            run_blocks(n_blocks, n_threads, [&](std::int64_t block, int worker) {
                scan.block(block, workers[static_cast<std::size_t>(worker)]);
            });
        },
        input.keys);
    merge_hits(workers, state);
    return merge_reports(workers);
}

}  // namespace rep_fast
