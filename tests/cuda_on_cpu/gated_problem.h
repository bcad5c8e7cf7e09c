// Gates, keys and the float64 walk over the adapters that the tests of gated_adapter share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "core/dtype.h"
#include "cuda/gated_adapter.h"
#include "guarded.h"

namespace rep_fast::tests {

inline constexpr double kEps = 0x1p-24;

// A matrix of any of the three types, as the kernels get it and as float64.
struct Matrix {
    std::int64_t rows, cols, stride;
    DType dtype;
    Guarded<unsigned char> bytes;
    std::vector<double> values;

    // is_vector: read element by element, so that it need not begin where a device's allocation does and can end at the
    // guard.
    Matrix(std::int64_t rows_, std::int64_t cols_, std::int64_t stride_, DType dtype_, double scale,
           std::mt19937& random, bool is_vector = false)
        : rows(rows_),
          cols(cols_),
          stride(stride_),
          dtype(dtype_),
          bytes(static_cast<std::size_t>(((rows - 1) * stride + cols) * width()), !is_vector) {
        std::normal_distribution<double> normal(0.0, scale);
        for (std::int64_t i = 0; i < rows * cols; ++i) {
            values.push_back(put(i / cols, i % cols, static_cast<float>(normal(random))));
        }
    }
    [[nodiscard]] std::int64_t width() const { return dtype == DType::kFloat32 ? 4 : 2; }
    [[nodiscard]] double at(std::int64_t i, std::int64_t j) const {
        return values[static_cast<std::size_t>(i * cols + j)];
    }
    void set(std::int64_t i, std::int64_t j, float value) {
        values[static_cast<std::size_t>(i * cols + j)] = put(i, j, value);
    }
    double put(std::int64_t i, std::int64_t j, float value) {
        unsigned char* const place = bytes.data() + (i * stride + j) * width();
        if (dtype == DType::kFloat32) {
            std::memcpy(place, &value, 4);
            return static_cast<double>(value);
        }
        if (dtype == DType::kFloat16) {
            const Float16 half = {
                static_cast<std::uint16_t>(__builtin_bit_cast(std::uint16_t, static_cast<_Float16>(value)))};
            std::memcpy(place, &half, 2);
            return static_cast<double>(to_float(half));
        }
        const BFloat16 half = {static_cast<std::uint16_t>(__builtin_bit_cast(std::uint32_t, value) >> 16)};
        std::memcpy(place, &half, 2);
        return static_cast<double>(to_float(half));
    }
};

struct Adapter {
    Matrix a, b, w1, b1, w2, b2;
    float threshold = 0.0f;

    Adapter(std::int64_t dim, std::int64_t hidden, std::int64_t rank, DType dtype, std::int64_t padding,
            std::mt19937& random)
        : a(rank, dim, dim + padding, dtype, 1.0 / std::sqrt(static_cast<double>(dim)), random),
          b(dim, rank, rank + padding, dtype, 0.5 / std::sqrt(static_cast<double>(rank)), random),
          w1(hidden, dim, dim + padding, dtype, 1.0 / std::sqrt(static_cast<double>(dim)), random),
          b1(1, hidden, hidden, dtype, 0.5, random, true),
          w2(1, hidden, hidden, dtype, 2.0 / std::sqrt(static_cast<double>(hidden)), random, true),
          b2(1, 1, 1, dtype, 0.5, random, true) {}
    cuda::AdapterOnDevice on_device() {
        return {a.bytes.data(),
                b.bytes.data(),
                w1.bytes.data(),
                b1.bytes.data(),
                w2.bytes.data(),
                b2.bytes.data(),
                a.stride,
                b.stride,
                w1.stride,
                static_cast<std::int32_t>(w1.rows),
                static_cast<std::int32_t>(a.rows),
                threshold};
    }
};

struct Case {
    std::int64_t n_tokens, dim;
    std::vector<std::int64_t> hidden, rank;  // per adapter
    DType keys = DType::kFloat32, weights = DType::kFloat32;
    std::int64_t padding = 0;
};

// A key on its way through the adapters, with a bound on what the kernel's arithmetic may add.
struct Moving {
    std::vector<double> key;
    double error = 0.0;  // of each entry
};

inline double norm(const std::vector<double>& values) {
    double square = 0.0;
    for (const double value : values) {
        square += value * value;
    }
    return std::sqrt(square);
}

struct Decision {
    double logit, bound;
};

struct Problem {
    Case shape;
    std::mt19937 random;
    Matrix keys;
    std::vector<Adapter> adapters;

    Problem(const Case& shape_, unsigned seed)
        : shape(shape_),
          random(seed),
          keys(shape.n_tokens, shape.dim, shape.dim + shape.padding, shape.keys, 1.0, random) {
        for (std::size_t i = 0; i < shape.hidden.size(); ++i) {
            adapters.emplace_back(shape.dim, shape.hidden[i], shape.rank[i], shape.weights, shape.padding, random);
            adapters.back().threshold = middle_logit(adapters.back());
        }
    }
    [[nodiscard]] std::size_t n_adapters() const { return adapters.size(); }
    [[nodiscard]] Moving native(std::int64_t token) const {
        const auto begin = keys.values.begin() + token * shape.dim;
        return {{begin, begin + shape.dim}, 0.0};
    }

    // The logit of a gate and the kernel's error: rounding of the products, of GELU (slope below 1.13) and of the sums,
    // and what the key itself carries.
    [[nodiscard]] Decision decide(const Adapter& adapter, const Moving& moving) const {
        const double chain = static_cast<double>(shape.dim) / 256.0 + 40.0;
        double logit = adapter.b2.values[0], bound = 4 * kEps * std::abs(logit);
        for (std::int64_t h = 0; h < adapter.w1.rows; ++h) {
            double hidden = adapter.b1.at(0, h), size = std::abs(hidden), slope = 0.0;
            for (std::int64_t j = 0; j < shape.dim; ++j) {
                const double weight = adapter.w1.at(h, j), key = moving.key[static_cast<std::size_t>(j)];
                hidden += weight * key;
                size += std::abs(weight * key);
                slope += std::abs(weight);
            }
            const double gelu = 0.5 * hidden * std::erfc(-hidden / std::sqrt(2.0));
            logit += adapter.w2.at(0, h) * gelu;
            bound += std::abs(adapter.w2.at(0, h)) *
                     (1.13 * (chain * kEps * size + slope * moving.error) + 20 * kEps * std::abs(hidden));
        }
        return {logit, bound + 2 * kEps * std::abs(logit)};
    }

    void move(const Adapter& adapter, const Moving& source, Moving& target) const {
        std::vector<double> inner(static_cast<std::size_t>(adapter.a.rows), 0.0);
        for (std::int64_t r = 0; r < adapter.a.rows; ++r) {
            for (std::int64_t j = 0; j < shape.dim; ++j) {
                inner[static_cast<std::size_t>(r)] += adapter.a.at(r, j) * source.key[static_cast<std::size_t>(j)];
            }
        }
        const double chain = static_cast<double>(shape.dim) / 32.0 + static_cast<double>(adapter.a.rows) / 32.0 + 20.0;
        const double size = norm(adapter.a.values) * norm(adapter.b.values);
        target.error +=
            size * (std::sqrt(static_cast<double>(shape.dim)) * source.error + chain * kEps * norm(source.key));
        for (std::int64_t j = 0; j < shape.dim; ++j) {
            double& entry = target.key[static_cast<std::size_t>(j)];
            for (std::int64_t r = 0; r < adapter.a.rows; ++r) {
                entry += adapter.b.at(j, r) * inner[static_cast<std::size_t>(r)];
            }
        }
        target.error += 2 * kEps * norm(target.key);
    }

    // Halfway between two tokens' logits, so that about half of them open the gate.
    [[nodiscard]] float middle_logit(const Adapter& adapter) const {
        std::vector<double> logits;
        for (std::int64_t token = 0; token < shape.n_tokens; ++token) {
            logits.push_back(decide(adapter, native(token)).logit);
        }
        std::ranges::sort(logits);
        const std::size_t middle = logits.size() / 2;
        return static_cast<float>(middle == 0 ? logits[0] - 0.5 : (logits[middle - 1] + logits[middle]) / 2);
    }
};

struct Found {
    Guarded<unsigned char> adapted;
    std::vector<float> logits;
    Guarded<bool> opened;
    std::vector<int> tickets;
};

inline cuda::GatedAdapterCall call_for(Problem& problem, cuda::Composition composition,
                                       std::vector<cuda::AdapterOnDevice>& adapters, Found& found) {
    adapters.clear();
    for (Adapter& adapter : problem.adapters) {
        adapters.push_back(adapter.on_device());
    }
    cuda::GatedAdapterCall call;
    call.adapters = adapters;
    call.weight_dtype = problem.shape.weights;
    call.composition = composition;
    call.keys = problem.keys.bytes.data();
    call.key_dtype = problem.shape.keys;
    call.n_tokens = problem.shape.n_tokens;
    call.key_dim = problem.shape.dim;
    call.row_stride = problem.keys.stride;
    call.adapted = found.adapted.data();
    call.logits = found.logits.data();
    call.opened = found.opened.data();
    call.tickets = found.tickets.data();
    return call;
}

inline Found room_for(const Problem& problem) {
    const auto n = static_cast<std::size_t>(problem.shape.n_tokens);
    const std::size_t row = static_cast<std::size_t>(problem.shape.dim * problem.keys.width());
    return {Guarded<unsigned char>(n * row, true), std::vector<float>(problem.n_adapters() * n),
            Guarded<bool>(problem.n_adapters() * n), std::vector<int>(problem.n_adapters() + cuda::kMoreTickets)};
}

// By the kernels' own products, or by given ones as a library would make them. Scratch holds bytes of value
// `left_over`.
inline Found run(Problem& problem, cuda::Composition composition, bool with_products = false, int left_over = 0xff) {
    Found found = room_for(problem);
    std::vector<cuda::AdapterOnDevice> adapters;
    cuda::GatedAdapterCall call = call_for(problem, composition, adapters, found);
    Guarded<unsigned char> scratch(cuda::scratch_bytes(call), true);
    std::memset(scratch.data(), left_over, scratch.size());
    call.scratch = scratch.data();
    if (!with_products) {
        cuda::gated_adapter(call, nullptr);
        EXPECT(std::ranges::count(found.tickets, 0) == std::ssize(found.tickets));
        return found;
    }
    const std::size_t row = static_cast<std::size_t>(call.key_dim * problem.keys.width());
    for (std::int64_t token = 0; token < call.n_tokens; ++token) {
        std::memcpy(found.adapted.data() + static_cast<std::size_t>(token) * row,
                    problem.keys.bytes.data() + token * problem.keys.stride * problem.keys.width(), row);
    }
    for (std::size_t i = 0; i < adapters.size(); ++i) {
        const Adapter& adapter = problem.adapters[i];
        const std::int64_t n_hidden = adapter.w1.rows, stride = n_hidden + 2;
        Guarded<float> products(static_cast<std::size_t>((call.n_tokens - 1) * stride + n_hidden));
        for (std::int64_t token = 0; token < call.n_tokens; ++token) {
            for (std::int64_t h = 0; h < n_hidden; ++h) {
                double product = 0.0;
                for (std::int64_t j = 0; j < call.key_dim; ++j) {
                    product += adapter.w1.at(h, j) * problem.keys.at(token, j);
                }
                products[static_cast<std::size_t>(token * stride + h)] = static_cast<float>(product);
            }
        }
        const std::size_t first = i * static_cast<std::size_t>(call.n_tokens);
        cuda::gate_products({products.data(), call.n_tokens, stride, adapters[i], call.weight_dtype,
                             found.logits.data() + first, found.opened.data() + first},
                            nullptr);
    }
    cuda::apply_open(call, nullptr);
    return found;
}

inline double value_of(const Problem& problem, const Found& found, std::size_t place) {
    const unsigned char* from = found.adapted.data() + place * static_cast<std::size_t>(problem.keys.width());
    if (problem.shape.keys == DType::kFloat32) {
        float value;
        std::memcpy(&value, from, 4);
        return static_cast<double>(value);
    }
    std::uint16_t bits;
    std::memcpy(&bits, from, 2);
    return static_cast<double>(problem.shape.keys == DType::kFloat16 ? to_float(Float16{bits})
                                                                     : to_float(BFloat16{bits}));
}

// Walks a token through the adapters; returns how often it moved.
inline int expect_token(const Problem& problem, const Found& found, cuda::Composition composition, std::int64_t token) {
    const Moving start = problem.native(token);
    Moving current = start;
    std::vector<std::size_t> fired;
    std::vector<double> logits;
    for (std::size_t i = 0; i < problem.n_adapters(); ++i) {
        const Adapter& adapter = problem.adapters[i];
        const Decision decision = problem.decide(adapter, composition == cuda::Composition::kChain ? current : start);
        // a decision that rounding could turn would say nothing
        EXPECT(std::abs(decision.logit - static_cast<double>(adapter.threshold)) > decision.bound);
        const std::size_t place =
            i * static_cast<std::size_t>(problem.shape.n_tokens) + static_cast<std::size_t>(token);
        EXPECT(std::abs(static_cast<double>(found.logits[place]) - decision.logit) <= decision.bound);
        logits.push_back(decision.logit);
        if (decision.logit > static_cast<double>(adapter.threshold)) {
            fired.push_back(i);
            if (composition == cuda::Composition::kChain) {
                const Moving source = current;
                problem.move(adapter, source, current);
            }
        }
    }
    if (composition == cuda::Composition::kArgmax && fired.size() > 1) {
        fired = {*std::ranges::max_element(fired, {}, [&](std::size_t i) { return logits[i]; })};
    }
    if (composition != cuda::Composition::kChain) {
        for (const std::size_t i : fired) {
            problem.move(problem.adapters[i], start, current);
        }
    }
    for (std::size_t i = 0; i < problem.n_adapters(); ++i) {
        const bool opened =
            found.opened[i * static_cast<std::size_t>(problem.shape.n_tokens) + static_cast<std::size_t>(token)];
        EXPECT(opened == (std::ranges::find(fired, i) != fired.end()));
    }
    const double rounding = problem.shape.keys == DType::kFloat32   ? kEps
                            : problem.shape.keys == DType::kFloat16 ? 0x1p-11
                                                                    : 0x1p-8;
    for (std::int64_t j = 0; j < problem.shape.dim; ++j) {
        const double wanted = current.key[static_cast<std::size_t>(j)];
        const double got = value_of(problem, found, static_cast<std::size_t>(token * problem.shape.dim + j));
        const double allowed =
            fired.empty() ? 0.0 : current.error + rounding * (std::abs(wanted) + current.error) + 0x1p-25;
        EXPECT(std::abs(got - wanted) <= allowed);
    }
    return static_cast<int>(fired.size());
}

inline int expect_reference(const Problem& problem, const Found& found, cuda::Composition composition) {
    int most = 0;
    for (std::int64_t token = 0; token < problem.shape.n_tokens; ++token) {
        most = std::max(most, expect_token(problem, found, composition, token));
    }
    return most;
}

}  // namespace rep_fast::tests
