#include "cpu/accumulate_moment.h"

#include "bindings.h"
#include "key_arg.h"
#include "tensor_arg.h"

namespace rep_fast::python {
namespace {

void run(const py::object& keys, const py::object& total, int level, int n_threads) {
    const KeyMatrix rows = key_arg(keys, "keys");
    const auto sum = TensorArg(total, "total").matrix<double>();
    const py::gil_scoped_release unlocked;
    accumulate_moment(rows, sum, static_cast<CpuLevel>(level), n_threads);
}

}  // namespace

void bind_accumulate_moment(py::module_& m) {
    using namespace py::literals;
    m.def("accumulate_moment", run, "keys"_a, "total"_a, "level"_a, "n_threads"_a);
    register_bodies(m, "accumulate_moment", accumulate_moment_table());
}

}  // namespace rep_fast::python
