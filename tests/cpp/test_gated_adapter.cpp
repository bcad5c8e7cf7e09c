#include <cmath>
#include <cstring>
#include <numbers>
#include <random>
#include <type_traits>
#include <vector>

#include "check.h"
#include "core/error.h"
#include "cpu/gated_adapter.h"
#include "cpu/gated_adapter_gradient.h"
#include "key_numbers.h"
#include "tests.h"

namespace rep_fast::tests {
namespace {

double gelu(double x) {
    return 0.5 * x * (1.0 + std::erf(x * std::sqrt(0.5)));
}

double gelu_slope(double x) {
    return 0.5 * (1.0 + std::erf(x * std::sqrt(0.5))) + x * std::exp(-0.5 * x * x) / std::sqrt(2.0 * std::numbers::pi);
}

// A gate's weights with buffers of their own.
template <class W>
struct RandomGate {
    RandomGate(std::int64_t n_hidden, std::int64_t key_dim, std::mt19937& generator)
        : rows(n_hidden),
          cols(key_dim),
          w1(random_numbers<W>(n_hidden * key_dim, generator, 1.0f / std::sqrt(static_cast<float>(key_dim)))),
          b1(random_numbers<float>(n_hidden, generator)),
          w2(random_numbers<float>(n_hidden, generator)) {}

    Gate gate() const {
        return {.w1 = MatrixView<const W>{w1.data(), rows, cols, cols}, .b1 = b1, .w2 = w2, .b2 = 0.25f};
    }

    std::int64_t rows, cols;
    std::vector<W> w1;
    std::vector<float> b1, w2;
};

struct Shape {
    std::int64_t n_tokens, n_hidden, key_dim;
};

struct Exact {
    double logit = 0.0;
    double bound = 0.0;
};

// float64, and (M + 8) + (H + 8) roundings of 2⁻²⁴ on the sums of absolute values; |GELU′| ≤ 1.13.
template <class T, class W>
Exact exact_logit(const T* key, const RandomGate<W>& gate) {
    Exact exact{0.25, 1.0};
    for (std::int64_t h = 0; h < gate.rows; ++h) {
        const auto row = static_cast<std::size_t>(h);
        double x = static_cast<double>(gate.b1[row]);
        double size = std::abs(x);
        for (std::int64_t k = 0; k < gate.cols; ++k) {
            const double product = static_cast<double>(to_float(key[k])) *
                                   static_cast<double>(to_float(gate.w1[static_cast<std::size_t>(h * gate.cols + k)]));
            x += product;
            size += std::abs(product);
        }
        const double weight = static_cast<double>(gate.w2[row]);
        exact.logit += weight * gelu(x);
        exact.bound += std::abs(weight) * (1.13 * static_cast<double>(gate.cols + 8) * size +
                                           static_cast<double>(gate.rows + 8) * std::abs(gelu(x)));
    }
    exact.bound *= 0x1p-24;
    return exact;
}

template <class T, class W>
void test_shape(std::int64_t n_tokens, std::int64_t n_hidden, std::int64_t key_dim, CpuLevel level) {
    std::mt19937 generator(static_cast<unsigned>(n_tokens * 31 + key_dim));
    const std::int64_t stride = key_dim + n_tokens % 3;
    const auto keys = random_numbers<T>((n_tokens - 1) * stride + key_dim, generator);
    const RandomGate<W> one(n_hidden, key_dim, generator);
    const RandomGate<W> other(n_hidden + 1, key_dim, generator);
    const KeyMatrix view = MatrixView<const T>{keys.data(), n_tokens, key_dim, stride};
    const Gate gates[] = {one.gate(), other.gate()};
    std::vector<GateProducts> kinds = {GateProducts::kFloat32};
    if (std::is_same_v<T, BFloat16> && std::is_same_v<W, BFloat16> && level == CpuLevel::kAvx512Bf16) {
        kinds.push_back(GateProducts::kBf16);
    }
    for (const GateProducts products : kinds) {
        std::vector<float> logits(static_cast<std::size_t>(2 * n_tokens));
        const MatrixView<float> out{logits.data(), 2, n_tokens, n_tokens};
        EXPECT(gate_logits(view, gates, out, level, 1, products).all_finite);
        for (std::int64_t t = 0; t < n_tokens; ++t) {
            const Exact first = exact_logit(keys.data() + t * stride, one);
            const Exact second = exact_logit(keys.data() + t * stride, other);
            EXPECT(std::abs(static_cast<double>(out.row(0)[t]) - first.logit) <= first.bound);
            EXPECT(std::abs(static_cast<double>(out.row(1)[t]) - second.logit) <= second.bound);
        }
        std::vector<float> threaded(logits.size());
        gate_logits(view, gates, {threaded.data(), 2, n_tokens, n_tokens}, level, 3, products);
        EXPECT(threaded == logits);
        // the last token alone, by the second gate alone
        float alone = 0.0f;
        const KeyMatrix last = MatrixView<const T>{keys.data() + (n_tokens - 1) * stride, 1, key_dim, key_dim};
        gate_logits(last, {gates + 1, 1}, {&alone, 1, 1, 1}, level, 1, products);
        EXPECT(alone == logits.back());
    }
}

void test_gradient(std::int64_t n_tokens, std::int64_t n_hidden, std::int64_t key_dim, CpuLevel level) {
    std::mt19937 generator(static_cast<unsigned>(n_tokens * 7 + n_hidden));
    const auto keys = random_numbers<float>(n_tokens * key_dim, generator);
    const auto d_logits = random_numbers<float>(n_tokens, generator);
    const RandomGate<float> weights(n_hidden, key_dim, generator);
    std::vector<float> hidden(static_cast<std::size_t>(n_tokens * n_hidden)), logits(d_logits.size());
    Gate gate = weights.gate();
    gate.hidden = {hidden.data(), n_tokens, n_hidden, n_hidden};
    const MatrixView<const float> key_view{keys.data(), n_tokens, key_dim, key_dim};
    gate_logits(key_view, {&gate, 1}, {logits.data(), 1, n_tokens, n_tokens}, level, 1);
    std::vector<float> w1(weights.w1.size()), b1(weights.b1.size()), w2(b1.size()), d_hidden(hidden.size());
    const GateGradientInput input{.keys = key_view,
                                  .hidden = {hidden.data(), n_tokens, n_hidden, n_hidden},
                                  .w2 = weights.w2,
                                  .d_logits = d_logits};
    gate_gradient(input,
                  {.w1 = {w1.data(), n_hidden, key_dim, key_dim},
                   .b1 = b1,
                   .w2 = w2,
                   .d_hidden = {d_hidden.data(), n_tokens, n_hidden, n_hidden}},
                  level, 2);
    for (std::int64_t h = 0; h < n_hidden; ++h) {
        double d_b1 = 0.0, d_w2 = 0.0, size = 0.0;
        std::vector<double> d_row(static_cast<std::size_t>(key_dim)), sizes(d_row.size());
        for (std::int64_t t = 0; t < n_tokens; ++t) {
            const auto x = static_cast<double>(hidden[static_cast<std::size_t>(t * n_hidden + h)]);
            const auto d = static_cast<double>(d_logits[static_cast<std::size_t>(t)]);
            const double slope = d * static_cast<double>(weights.w2[static_cast<std::size_t>(h)]) * gelu_slope(x);
            // the slope's own error is absolute: both Φ and x·φ are within 4·2⁻²⁴ of theirs
            const double largest =
                std::abs(slope) + std::abs(d * static_cast<double>(weights.w2[static_cast<std::size_t>(h)]));
            EXPECT(std::abs(static_cast<double>(d_hidden[static_cast<std::size_t>(t * n_hidden + h)]) - slope) <=
                   16.0 * 0x1p-24 * (1.0 + std::abs(x)) * largest);
            d_b1 += slope;
            d_w2 += d * gelu(x);
            size += (largest + std::abs(d)) * (1.0 + std::abs(x));
            for (std::int64_t k = 0; k < key_dim; ++k) {
                const auto key = static_cast<double>(keys[static_cast<std::size_t>(t * key_dim + k)]);
                d_row[static_cast<std::size_t>(k)] += slope * key;
                sizes[static_cast<std::size_t>(k)] += largest * (1.0 + std::abs(x)) * std::abs(key);
            }
        }
        const double depth = static_cast<double>(n_tokens + 16) * 0x1p-24;
        EXPECT(std::abs(static_cast<double>(b1[static_cast<std::size_t>(h)]) - d_b1) <= depth * size);
        EXPECT(std::abs(static_cast<double>(w2[static_cast<std::size_t>(h)]) - d_w2) <= depth * size);
        for (std::int64_t k = 0; k < key_dim; ++k) {
            EXPECT(std::abs(static_cast<double>(w1[static_cast<std::size_t>(h * key_dim + k)]) -
                            d_row[static_cast<std::size_t>(k)]) <= depth * sizes[static_cast<std::size_t>(k)]);
        }
    }
}

void expect_error(const char* part, CpuLevel level, std::int64_t key_dim, GateProducts products) {
    std::mt19937 generator(1);
    const RandomGate<float> weights(3, 4, generator);
    const Gate gate = weights.gate();
    const std::vector<float> keys(static_cast<std::size_t>(2 * key_dim));
    std::vector<float> logits(2);
    try {
        gate_logits(MatrixView<const float>{keys.data(), 2, key_dim, key_dim}, {&gate, 1}, {logits.data(), 1, 2, 2},
                    level, 1, products);
        EXPECT(false);
    } catch (const Error& error) {
        EXPECT(std::strstr(error.what(), part) != nullptr);
    }
}

}  // namespace

void test_gated_adapter(CpuLevel level) {
    // ones, primes, beside the tiles of 3 tokens × 8 rows and 16 or 32 lanes, the block of 768 (1536 in bfloat16)
    constexpr Shape kShapes[] = {{1, 1, 1},     {2, 3, 5},   {3, 8, 31},    {4, 7, 33},   {11, 9, 17},  {13, 49, 65},
                                 {17, 16, 769}, {2, 9, 767}, {49, 17, 130}, {193, 5, 41}, {5, 11, 1537}};
    for (const auto& [n_tokens, n_hidden, key_dim] : kShapes) {
        test_shape<float, float>(n_tokens, n_hidden, key_dim, level);
        test_shape<BFloat16, BFloat16>(n_tokens, n_hidden, key_dim, level);
        test_shape<Float16, float>(n_tokens, n_hidden, key_dim, level);
        test_shape<float, BFloat16>(n_tokens, n_hidden, key_dim, level);
    }
    test_shape<float, float>(400, 19, 700, level);  // keys too many to be widened at once
    test_shape<BFloat16, BFloat16>(197, 17, 1601, level);
    for (const auto& [n_tokens, n_hidden, key_dim] : {kShapes[0], kShapes[4], kShapes[5], kShapes[8]}) {
        test_gradient(n_tokens, n_hidden, key_dim, level);
    }
    expect_error("keys are 5 wide, w1 4", level, 5, GateProducts::kAuto);
    expect_error("products in bfloat16 need", level, 4, GateProducts::kBf16);
}

}  // namespace rep_fast::tests
