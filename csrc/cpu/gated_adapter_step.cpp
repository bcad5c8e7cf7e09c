#include "cpu/gated_adapter_step.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/error.h"
#include "cpu/gated_adapter.h"
#include "cpu/gated_adapter_gradient.h"

namespace rep_fast {
namespace {

// A small matrix of its own.
class Matrix {
  public:
    Matrix(std::int64_t rows, std::int64_t cols)
        : rows_(rows), cols_(cols), data_(static_cast<std::size_t>(rows * cols)) {}

    MatrixView<float> view() { return {data_.data(), rows_, cols_, cols_}; }
    MatrixView<const float> read() const { return {data_.data(), rows_, cols_, cols_}; }
    float* row(std::int64_t i) { return data_.data() + i * cols_; }
    const float* row(std::int64_t i) const { return data_.data() + i * cols_; }

  private:
    std::int64_t rows_, cols_;
    std::vector<float> data_;
};

double softplus(double x) {
    return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x)));
}

// Lanes that the compiler can keep in vectors without reordering a sum.
double dot(const float* a, const float* b, std::int64_t n) {
    constexpr std::int64_t kLanes = 16;
    float lanes[kLanes] = {};
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (std::int64_t lane = 0; lane < kLanes; ++lane) {
            lanes[lane] += a[i + lane] * b[i + lane];
        }
    }
    double sum = 0.0;
    for (; i < n; ++i) {
        sum += static_cast<double>(a[i] * b[i]);
    }
    for (const float lane : lanes) {
        sum += static_cast<double>(lane);
    }
    return sum;
}

void check(const StepInput& input, const AdapterGradient& gradient) {
    const AdapterView& adapter = input.adapter;
    const std::int64_t key_dim = input.rows.cols;
    REP_FAST_CHECK(input.entering.rows >= 2 && input.rows.rows > input.entering.rows,
                   "a step needs a positive, the anchor and a negative, got " << input.entering.rows << " rows of "
                                                                              << input.rows.rows);
    REP_FAST_CHECK(input.entering.cols == key_dim && std::ssize(input.response) == key_dim &&
                       adapter.a.cols == key_dim && adapter.b.rows == key_dim && adapter.w1.cols == key_dim,
                   "entering, response, a, b and w1 must be " << key_dim << " wide");
    REP_FAST_CHECK(adapter.b.cols == adapter.a.rows, "a has rank " << adapter.a.rows << ", b " << adapter.b.cols);
    REP_FAST_CHECK(gradient.a.rows == adapter.a.rows && gradient.a.cols == key_dim && gradient.b.rows == key_dim &&
                       gradient.b.cols == adapter.b.cols && gradient.b2 != nullptr,
                   "the gradient must have the shapes of the weights");
}

// What the loss and the gradients of logits and projections are made of, per row of `entering`.
struct Row {
    double gate, retrieved, square, excess, per_square;
};

class Step {
  public:
    Step(const StepInput& input, const AdapterGradient& gradient, CpuLevel level, int n_threads)
        : input_(input),
          gradient_(gradient),
          level_(level),
          n_threads_(n_threads),
          n_positives_(input.entering.rows - 1),
          n_negatives_(input.rows.rows - input.entering.rows),
          rank_(input.adapter.a.rows),
          hidden_(input.rows.rows, input.adapter.w1.rows),
          logits_(1, input.rows.rows),
          d_logits_(1, input.rows.rows),
          p_(input.entering.rows, rank_),
          p_gram_(input.entering.rows, rank_),
          toward_(1, rank_),
          rows_(static_cast<std::size_t>(input.entering.rows)) {}

    double run() {
        Gate gate{.w1 = input_.adapter.w1,
                  .b1 = input_.adapter.b1,
                  .w2 = input_.adapter.w2,
                  .b2 = input_.adapter.b2,
                  .hidden = hidden_.view()};
        gate_logits(input_.rows, {&gate, 1}, logits_.view(), level_, n_threads_);
        project();
        const double loss = find_rows();
        find_d_logits();
        gradient_of_projection();
        Matrix d_hidden(input_.rows.rows, input_.adapter.w1.rows);
        gate_gradient({.keys = input_.rows,
                       .hidden = hidden_.read(),
                       .w2 = input_.adapter.w2,
                       .d_logits = {d_logits_.row(0), static_cast<std::size_t>(input_.rows.rows)}},
                      {.w1 = gradient_.w1, .b1 = gradient_.b1, .w2 = gradient_.w2, .d_hidden = d_hidden.view()}, level_,
                      n_threads_);
        double d_b2 = 0.0;
        for (std::int64_t t = 0; t < input_.rows.rows; ++t) {
            d_b2 += static_cast<double>(d_logits_.row(0)[t]);
        }
        *gradient_.b2 = static_cast<float>(d_b2);
        return loss;
    }

  private:
    void project() {
        dot_products(input_.entering, input_.adapter.a, p_.view(), level_, n_threads_);
        Matrix gram(rank_, rank_);
        transposed_product(input_.adapter.b, input_.adapter.b, gram.view(), level_, n_threads_);
        dot_products(p_.read(), gram.read(), p_gram_.view(), level_, n_threads_);  // the Gram matrix is symmetric
        float* const toward = toward_.row(0);
        for (std::int64_t m = 0; m < input_.adapter.b.rows; ++m) {
            const float* const row = input_.adapter.b.row(m);
            for (std::int64_t j = 0; j < rank_; ++j) {
                toward[j] += row[j] * input_.response[static_cast<std::size_t>(m)];
            }
        }
    }

    double find_rows() {
        const StepWeights& weights = input_.weights;
        const std::int64_t key_dim = input_.rows.cols;
        const auto s = static_cast<double>(n_positives_);
        double loss = 0.0;
        for (std::int64_t t = 0; t <= n_positives_; ++t) {
            const auto logit = static_cast<double>(logits_.row(0)[t]);
            Row& row = rows_[static_cast<std::size_t>(t)];
            row = {.gate = 1.0 / (1.0 + std::exp(-logit)),
                   .retrieved = dot(p_.row(t), toward_.row(0), rank_),
                   .square = dot(p_gram_.row(t), p_.row(t), rank_),
                   .excess = 0.0,
                   .per_square = weights.consistency / static_cast<double>(key_dim)};
            if (t < n_positives_) {
                const float* const key = input_.rows.row(t);
                row.per_square = weights.shift / s / dot(key, key, key_dim);
                row.excess =
                    row.gate * row.retrieved + dot(key, input_.response.data(), key_dim) - weights.response_target;
                loss += weights.response / s * row.excess * row.excess + softplus(-logit) / s;
            }
            loss += row.per_square * row.gate * row.gate * row.square;
        }
        for (std::int64_t t = n_positives_ + 1; t < input_.rows.rows; ++t) {
            loss +=
                weights.negative / static_cast<double>(n_negatives_) * softplus(static_cast<double>(logits_.row(0)[t]));
        }
        return loss;
    }

    double d_excess(const Row& row) const {
        return 2.0 * input_.weights.response / static_cast<double>(n_positives_) * row.excess;
    }

    void find_d_logits() {
        float* const d_logits = d_logits_.row(0);
        for (std::int64_t t = 0; t <= n_positives_; ++t) {
            const Row& row = rows_[static_cast<std::size_t>(t)];
            double d_gate = 2.0 * row.per_square * row.gate * row.square;
            double d_logit = 0.0;
            if (t < n_positives_) {
                d_gate += d_excess(row) * row.retrieved;
                d_logit = (row.gate - 1.0) / static_cast<double>(n_positives_);
            }
            d_logits[t] = static_cast<float>(d_logit + d_gate * row.gate * (1.0 - row.gate));
        }
        for (std::int64_t t = n_positives_ + 1; t < input_.rows.rows; ++t) {
            const double gate = 1.0 / (1.0 + std::exp(-static_cast<double>(logits_.row(0)[t])));
            d_logits[t] = static_cast<float>(gate * input_.weights.negative / static_cast<double>(n_negatives_));
        }
    }

    // ∂L/∂A = Σ (∂L/∂p) kᵀ and ∂L/∂B = response (Σ ∂L/∂(p·toward) p)ᵀ + 2 B Σ ∂L/∂‖Bp‖² p pᵀ.
    void gradient_of_projection() {
        Matrix d_p(n_positives_ + 1, rank_);
        Matrix scaled(n_positives_ + 1, rank_);
        Matrix retrieved(1, rank_);
        for (std::int64_t t = 0; t <= n_positives_; ++t) {
            const Row& row = rows_[static_cast<std::size_t>(t)];
            const auto d_square = static_cast<float>(row.per_square * row.gate * row.gate);
            const auto d_retrieved = static_cast<float>(t < n_positives_ ? d_excess(row) * row.gate : 0.0);
            for (std::int64_t j = 0; j < rank_; ++j) {
                d_p.row(t)[j] = 2.0f * d_square * p_gram_.row(t)[j] + d_retrieved * toward_.row(0)[j];
                scaled.row(t)[j] = d_square * p_.row(t)[j];
                retrieved.row(0)[j] += d_retrieved * p_.row(t)[j];
            }
        }
        transposed_product(d_p.read(), input_.entering, gradient_.a, level_, n_threads_);
        Matrix d_gram(rank_, rank_);
        transposed_product(p_.read(), scaled.read(), d_gram.view(), level_, n_threads_);
        dot_products(input_.adapter.b, d_gram.read(), gradient_.b, level_, n_threads_);
        for (std::int64_t m = 0; m < gradient_.b.rows; ++m) {
            float* const row = gradient_.b.row(m);
            for (std::int64_t j = 0; j < rank_; ++j) {
                row[j] = 2.0f * row[j] + input_.response[static_cast<std::size_t>(m)] * retrieved.row(0)[j];
            }
        }
    }

    const StepInput& input_;
    const AdapterGradient& gradient_;
    const CpuLevel level_;
    const int n_threads_;
    const std::int64_t n_positives_, n_negatives_, rank_;
    Matrix hidden_, logits_, d_logits_, p_, p_gram_, toward_;
    std::vector<Row> rows_;
};

}  // namespace

double calibrated_step(const StepInput& input, const AdapterGradient& gradient, CpuLevel level, int n_threads) {
    check(input, gradient);
    return Step(input, gradient, level, n_threads).run();
}

}  // namespace rep_fast
