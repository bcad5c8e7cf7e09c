#include "cpu/packed_scores.h"

#include "bindings.h"
#include "tensor_arg.h"

namespace rep_fast::python {
namespace {

void run(const py::object& a, const py::object& b, const py::object& sums, int level, int n_threads) {
    const auto left = TensorArg(a, "a").matrix<const float>();
    const auto right = TensorArg(b, "b").matrix<const float>();
    const auto out = TensorArg(sums, "sums").vector<double>();
    const py::gil_scoped_release unlocked;
    abs_product_sum(left, right, out, static_cast<CpuLevel>(level), n_threads);
}

}  // namespace

void bind_packed_scores(py::module_& m) {
    using namespace py::literals;
    m.def("abs_product_sum", run, "a"_a, "b"_a, "sums"_a, "level"_a, "n_threads"_a);
    register_bodies(m, "packed_scores", packed_scores_table());
}

}  // namespace rep_fast::python
