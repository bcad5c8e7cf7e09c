#include "core/matrix_view.h"
#include "cuda/bindings.h"
#include "cuda/device_args.h"
#include "cuda/triangular_solve.h"

namespace rep_fast::python {
namespace {

void invert(const py::object& lower, const py::object& inverses, std::uintptr_t stream) {
    DeviceArgs args;
    const auto factor = args.take(lower, "lower").matrix<const float>();
    const auto out = args.take(inverses, "inverses").matrix<float>();
    REP_FAST_CHECK(out.rows == factor.rows && out.cols == cuda::kSolveBlock && out.row_stride == out.cols,
                   "inverses must be " << factor.rows << " × " << cuda::kSolveBlock << " and contiguous");
    const Launching launching(args);
    cuda::invert_diagonal_blocks(factor.data, factor.row_stride, factor.rows, out.data, stream_arg(stream));
}

cuda::CholeskySolve call_of(std::int64_t key_dim, std::int64_t n_columns) {
    cuda::CholeskySolve call;
    call.key_dim = key_dim;
    call.n_columns = n_columns;
    return call;
}

std::size_t scratch_of(std::int64_t key_dim, std::int64_t n_columns) {
    return cuda::scratch_bytes(call_of(key_dim, n_columns));
}

void solve(const py::object& lower, const py::object& inverses, const py::object& scale, const py::object& b,
           const py::object& x, const py::object& scratch, std::uintptr_t stream) {
    DeviceArgs args;
    const auto factor = args.take(lower, "lower").matrix<const float>();
    const auto columns = args.take(b, "b").matrix<const double>();
    const auto out = args.take(x, "x").matrix<double>();
    REP_FAST_CHECK(factor.rows == columns.rows && out.rows == columns.rows && out.cols == columns.cols,
                   "the factor has " << factor.rows << " rows, b " << columns.rows << ", x " << out.rows);
    cuda::CholeskySolve call = call_of(columns.rows, columns.cols);
    call.lower = factor.data;
    call.lower_stride = factor.row_stride;
    call.inverses = args.take(inverses, "inverses").matrix<const float>().data;
    call.scale = args.vector<const double>(scale, "scale");
    call.b = columns.data;
    call.b_stride = columns.row_stride;
    call.x = out.data;
    call.x_stride = out.row_stride;
    call.scratch = args.vector<std::int64_t>(scratch, "scratch");
    const Launching launching(args);
    cuda::cholesky_solve(call, stream_arg(stream));
}

template <class T>
void set_matrix(cuda::Residual& call, const TensorArg& matrix) {
    const auto view = matrix.matrix<const T>();
    call.matrix = view.data;
    call.matrix_stride = view.row_stride;
    call.key_dim = view.rows;
}

void subtract(const py::object& matrix, double shift, const py::object& x, const py::object& rest,
              std::uintptr_t stream) {
    DeviceArgs args;
    cuda::Residual call;
    const TensorArg moment = args.take(matrix, "matrix");
    call.is_double = moment.dtype() == DType::kFloat64;
    call.is_double ? set_matrix<double>(call, moment) : set_matrix<float>(call, moment);
    const auto columns = args.take(x, "x").matrix<const double>();
    const auto out = args.take(rest, "rest").matrix<double>();
    REP_FAST_CHECK(columns.rows == call.key_dim && out.rows == call.key_dim && out.cols == columns.cols,
                   "the matrix has " << call.key_dim << " rows, x " << columns.rows << ", rest " << out.rows);
    call.shift = shift;
    call.x = columns.data;
    call.x_stride = columns.row_stride;
    call.rest = out.data;
    call.rest_stride = out.row_stride;
    call.n_columns = columns.cols;
    const Launching launching(args);
    cuda::subtract_product(call, stream_arg(stream));
}

}  // namespace

void bind_cuda_spd_solver(py::module_& m) {
    m.attr("bodies").cast<py::list>().append("spd_solver");
    m.attr("solve_block") = cuda::kSolveBlock;
    m.def("invert_diagonal_blocks", &invert, py::kw_only(), py::arg("lower"), py::arg("inverses"), py::arg("stream"));
    m.def("cholesky_solve_scratch", &scratch_of, py::kw_only(), py::arg("key_dim"), py::arg("n_columns"));
    m.def("cholesky_solve", &solve, py::kw_only(), py::arg("lower"), py::arg("inverses"), py::arg("scale"),
          py::arg("b"), py::arg("x"), py::arg("scratch"), py::arg("stream"));
    m.def("subtract_product", &subtract, py::kw_only(), py::arg("matrix"), py::arg("shift"), py::arg("x"),
          py::arg("rest"), py::arg("stream"));
}

}  // namespace rep_fast::python
