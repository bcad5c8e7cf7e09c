#include "cpu/spd_solver.h"

#include "bindings.h"
#include "tensor_arg.h"

namespace rep_fast::python {
namespace {

void invert(const py::object& lower, const py::object& inverses, int n_threads) {
    const auto factor = TensorArg(lower, "lower").matrix<const float>();
    const auto out = TensorArg(inverses, "inverses").matrix<float>();
    const py::gil_scoped_release unlocked;
    invert_diagonal_blocks(factor, out, n_threads);
}

void solve(const py::object& lower, const py::object& inverses, const py::object& scale, const py::object& b,
           const py::object& x, int level, int n_threads) {
    const CholeskyFactor factor = {TensorArg(lower, "lower").matrix<const float>(),
                                   TensorArg(inverses, "inverses").matrix<const float>(),
                                   TensorArg(scale, "scale").vector<const double>()};
    const auto columns = TensorArg(b, "b").matrix<const double>();
    const auto out = TensorArg(x, "x").matrix<double>();
    const py::gil_scoped_release unlocked;
    cholesky_solve(factor, columns, out, static_cast<CpuLevel>(level), n_threads);
}

void subtract(const py::object& matrix, double shift, const py::object& x, const py::object& rest, int level,
              int n_threads) {
    const TensorArg moment(matrix, "matrix");
    const auto columns = TensorArg(x, "x").matrix<const double>();
    const auto out = TensorArg(rest, "rest").matrix<double>();
    const auto run = [&](const auto& view) {
        const py::gil_scoped_release unlocked;
        subtract_product(view, shift, columns, out, static_cast<CpuLevel>(level), n_threads);
    };
    if (moment.dtype() == DType::kFloat32) {
        run(moment.matrix<const float>());
    } else {
        run(moment.matrix<const double>());
    }
}

}  // namespace

void bind_spd_solver(py::module_& m) {
    using namespace py::literals;
    m.def("invert_diagonal_blocks", invert, "lower"_a, "inverses"_a, "n_threads"_a);
    m.def("cholesky_solve", solve, "lower"_a, "inverses"_a, "scale"_a, "b"_a, "x"_a, "level"_a, "n_threads"_a);
    m.def("subtract_product", subtract, "matrix"_a, "shift"_a, "x"_a, "rest"_a, "level"_a, "n_threads"_a);
    m.attr("solve_block") = kSolveBlock;
    register_bodies(m, "spd_solver", spd_solver_table());
}

}  // namespace rep_fast::python
