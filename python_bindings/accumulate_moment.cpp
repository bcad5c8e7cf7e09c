#include "cpu/accumulate_moment.h"

#include <map>
#include <string>

#include "bindings.h"
#include "core/error.h"
#include "core/huge_pages.h"
#include "key_arg.h"
#include "tensor_arg.h"

namespace rep_fast::python {
namespace {

MomentProducts products_arg(const std::string& name) {
    static const std::map<std::string, MomentProducts> known = {
        {"auto", MomentProducts::kAuto}, {"fp32", MomentProducts::kFloat32}, {"bf16", MomentProducts::kBf16}};
    const auto found = known.find(name);
    REP_FAST_CHECK(found != known.end(), "precision '" << name << "' is unknown");
    return found->second;
}

void run(const py::object& keys, const py::object& total, const std::string& precision, int level, int n_threads) {
    const MomentProducts products = products_arg(precision);
    const KeyMatrix rows = key_arg(keys, "keys");
    const auto sum = TensorArg(total, "total").matrix<double>();
    const py::gil_scoped_release unlocked;
    accumulate_moment(rows, sum, products, static_cast<CpuLevel>(level), n_threads);
}

void make_huge(const py::object& total) {
    const auto sum = TensorArg(total, "total").matrix<double>();
    prefer_huge_pages(sum.data, static_cast<std::size_t>(sum.rows * sum.row_stride) * sizeof(double));
}

}  // namespace

void bind_accumulate_moment(py::module_& m) {
    using namespace py::literals;
    m.def("accumulate_moment", run, "keys"_a, "total"_a, "precision"_a, "level"_a, "n_threads"_a);
    m.def("prefer_huge_pages", make_huge, "total"_a);
    register_bodies(m, "accumulate_moment", accumulate_moment_table());
}

}  // namespace rep_fast::python
