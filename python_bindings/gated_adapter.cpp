#include "cpu/gated_adapter.h"

#include "bindings.h"
#include "key_arg.h"
#include "tensor_arg.h"

namespace rep_fast::python {
namespace {

// Fills `logits`; returns (first token whose logit is not finite or −1, logits above the threshold).
py::tuple run_gate(const py::object& keys, const py::object& w1, const py::object& b1, const py::object& w2, float b2,
                   float threshold, const py::object& logits, int level, int n_threads) {
    const GateInput input{key_arg(keys, "keys"), weight_arg(w1, "w1"), TensorArg(b1, "b1").vector<const float>(),
                          TensorArg(w2, "w2").vector<const float>(), b2};
    const auto out = TensorArg(logits, "logits").vector<float>();
    GateReport report;
    {
        const py::gil_scoped_release unlocked;
        report = gate_logits(input, threshold, out, static_cast<CpuLevel>(level), n_threads);
    }
    return py::make_tuple(report.first_nonfinite, report.n_open);
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
    m.def("gate_logits", run_gate, "keys"_a, "w1"_a, "b1"_a, "w2"_a, "b2"_a, "threshold"_a, "logits"_a, "level"_a,
          "n_threads"_a);
    m.def("dot_products", run_products, "keys"_a, "weights"_a, "products"_a, "level"_a, "n_threads"_a);
    register_bodies(m, "gated_adapter", gated_adapter_table());
}

}  // namespace rep_fast::python
