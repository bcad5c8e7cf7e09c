#include "cpu/gated_adapter.h"

#include <vector>

#include "bindings.h"
#include "cpu/gated_adapter_gradient.h"
#include "cpu/gated_adapter_step.h"
#include "key_arg.h"
#include "tensor_arg.h"

namespace rep_fast::python {
namespace {

// Fills `logits` [gates, tokens]; weights: w1, b1, w2, b2 of each gate, the last three float32. Returns (whether all
// are finite, logits above their threshold).
py::tuple run_gates(const py::object& keys, const py::list& weights, const py::list& thresholds,
                    const py::object& logits, int level, int n_threads, int products) {
    const KeyMatrix key_matrix = key_arg(keys, "keys");
    REP_FAST_CHECK(weights.size() == 4 * thresholds.size(),
                   weights.size() << " weights for " << thresholds.size() << " gates, there must be 4 of each");
    std::vector<Gate> gates;
    for (std::size_t i = 0; i < thresholds.size(); ++i) {
        const auto b2 = TensorArg(weights[4 * i + 3], "b2").vector<const float>();
        REP_FAST_CHECK(b2.size() == 1, "b2 must have 1 entry, got " << b2.size());
        gates.push_back({.w1 = weight_arg(weights[4 * i], "w1"),
                         .b1 = TensorArg(weights[4 * i + 1], "b1").vector<const float>(),
                         .w2 = TensorArg(weights[4 * i + 2], "w2").vector<const float>(),
                         .b2 = b2[0],
                         .threshold = thresholds[i].cast<float>()});
    }
    const auto out = TensorArg(logits, "logits").matrix<float>();
    GateReport report;
    {
        const py::gil_scoped_release unlocked;
        report = gate_logits(key_matrix, gates, out, static_cast<CpuLevel>(level), n_threads,
                             static_cast<GateProducts>(products));
    }
    return py::make_tuple(report.all_finite, report.n_open);
}

// One gate in float32 for training: fills `logits` [1, tokens] and `hidden` [tokens, hidden width].
void run_gate_forward(const py::object& keys, const py::object& w1, const py::object& b1, const py::object& w2,
                      float b2, const py::object& logits, const py::object& hidden, int level, int n_threads) {
    const KeyMatrix key_matrix = TensorArg(keys, "keys").matrix<const float>();
    const Gate gate{.w1 = TensorArg(w1, "w1").matrix<const float>(),
                    .b1 = TensorArg(b1, "b1").vector<const float>(),
                    .w2 = TensorArg(w2, "w2").vector<const float>(),
                    .b2 = b2,
                    .hidden = TensorArg(hidden, "hidden").matrix<float>()};
    const auto out = TensorArg(logits, "logits").matrix<float>();
    const py::gil_scoped_release unlocked;
    gate_logits(key_matrix, {&gate, 1}, out, static_cast<CpuLevel>(level), n_threads);
}

void run_gate_gradient(const py::object& keys, const py::object& hidden, const py::object& w2,
                       const py::object& d_logits, const py::object& d_w1, const py::object& d_b1,
                       const py::object& d_w2, const py::object& d_hidden, int level, int n_threads) {
    const GateGradientInput input{.keys = TensorArg(keys, "keys").matrix<const float>(),
                                  .hidden = TensorArg(hidden, "hidden").matrix<const float>(),
                                  .w2 = TensorArg(w2, "w2").vector<const float>(),
                                  .d_logits = TensorArg(d_logits, "d_logits").vector<const float>()};
    const GateGradient gradient{.w1 = TensorArg(d_w1, "d_w1").matrix<float>(),
                                .b1 = TensorArg(d_b1, "d_b1").vector<float>(),
                                .w2 = TensorArg(d_w2, "d_w2").vector<float>(),
                                .d_hidden = TensorArg(d_hidden, "d_hidden").matrix<float>()};
    const py::gil_scoped_release unlocked;
    gate_gradient(input, gradient, static_cast<CpuLevel>(level), n_threads);
}

// weights and gradients: a, b, w1, b1, w2, b2; returns the loss.
double run_calibrated_step(const py::object& rows, const py::object& entering, const py::object& response,
                           const py::list& weights, const py::list& gradients, double response_target,
                           double response_weight, double shift_weight, double consistency, double negative_weight,
                           int level, int n_threads) {
    REP_FAST_CHECK(weights.size() == 6 && gradients.size() == 6, "an adapter has 6 weights");
    const auto b2 = TensorArg(weights[5], "b2").vector<const float>();
    const auto d_b2 = TensorArg(gradients[5], "d_b2").vector<float>();
    REP_FAST_CHECK(b2.size() == 1 && d_b2.size() == 1, "b2 must have 1 entry, got " << b2.size());
    const StepInput input{.rows = TensorArg(rows, "rows").matrix<const float>(),
                          .entering = TensorArg(entering, "entering").matrix<const float>(),
                          .response = TensorArg(response, "response").vector<const float>(),
                          .adapter = {.a = TensorArg(weights[0], "a").matrix<const float>(),
                                      .b = TensorArg(weights[1], "b").matrix<const float>(),
                                      .w1 = TensorArg(weights[2], "w1").matrix<const float>(),
                                      .b1 = TensorArg(weights[3], "b1").vector<const float>(),
                                      .w2 = TensorArg(weights[4], "w2").vector<const float>(),
                                      .b2 = b2[0]},
                          .weights = {.response_target = response_target,
                                      .response = response_weight,
                                      .shift = shift_weight,
                                      .consistency = consistency,
                                      .negative = negative_weight}};
    const AdapterGradient gradient{.a = TensorArg(gradients[0], "d_a").matrix<float>(),
                                   .b = TensorArg(gradients[1], "d_b").matrix<float>(),
                                   .w1 = TensorArg(gradients[2], "d_w1").matrix<float>(),
                                   .b1 = TensorArg(gradients[3], "d_b1").vector<float>(),
                                   .w2 = TensorArg(gradients[4], "d_w2").vector<float>(),
                                   .b2 = d_b2.data()};
    const py::gil_scoped_release unlocked;
    return calibrated_step(input, gradient, static_cast<CpuLevel>(level), n_threads);
}

void run_products(const py::object& keys, const py::object& weights, const py::object& products, int level,
                  int n_threads) {
    const KeyMatrix left = key_arg(keys, "keys");
    const WeightMatrix right = weight_arg(weights, "weights");
    const auto out = TensorArg(products, "products").matrix<float>();
    const py::gil_scoped_release unlocked;
    dot_products(left, right, out, static_cast<CpuLevel>(level), n_threads);
}

}  // namespace

void bind_gated_adapter(py::module_& m) {
    using namespace py::literals;
    m.def("gate_logits", run_gates, "keys"_a, "weights"_a, "thresholds"_a, "logits"_a, "level"_a, "n_threads"_a,
          "products"_a = static_cast<int>(GateProducts::kAuto));
    m.def("gate_forward", run_gate_forward, "keys"_a, "w1"_a, "b1"_a, "w2"_a, "b2"_a, "logits"_a, "hidden"_a, "level"_a,
          "n_threads"_a);
    m.def("gate_gradient", run_gate_gradient, "keys"_a, "hidden"_a, "w2"_a, "d_logits"_a, "d_w1"_a, "d_b1"_a, "d_w2"_a,
          "d_hidden"_a, "level"_a, "n_threads"_a);
    m.def("calibrated_step", run_calibrated_step, "rows"_a, "entering"_a, "response"_a, "weights"_a, "gradients"_a,
          "response_target"_a, "response_weight"_a, "shift_weight"_a, "consistency"_a, "negative_weight"_a, "level"_a,
          "n_threads"_a);
    m.def("dot_products", run_products, "keys"_a, "weights"_a, "products"_a, "level"_a, "n_threads"_a);
    register_bodies(m, "gated_adapter", gated_adapter_table());
}

}  // namespace rep_fast::python
