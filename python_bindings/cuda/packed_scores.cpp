#include "cuda/packed_scores.h"

#include "core/matrix_view.h"
#include "cuda/bindings.h"
#include "cuda/device_args.h"

namespace rep_fast::python {
namespace {

cuda::AbsProductCall call_of(std::int64_t n_tokens, std::int64_t n_left, std::int64_t n_right) {
    cuda::AbsProductCall call;
    call.n_tokens = n_tokens;
    call.n_left = n_left;
    call.n_right = n_right;
    return call;
}

std::size_t scratch_of(std::int64_t n_tokens, std::int64_t n_left, std::int64_t n_right) {
    return cuda::scratch_bytes(call_of(n_tokens, n_left, n_right));
}

void run_abs_product_sum(const py::object& a, const py::object& b, const py::object& sums, const py::object& scratch,
                         std::uintptr_t stream) {
    DeviceArgs args;
    const auto left = args.take(a, "a").matrix<const float>();
    const auto right = args.take(b, "b").matrix<const float>();
    REP_FAST_CHECK(left.rows == right.rows, "a has " << left.rows << " tokens, b " << right.rows);
    cuda::AbsProductCall call = call_of(left.rows, left.cols, right.cols);
    call.a = left.data;
    call.a_stride = left.row_stride;
    call.b = right.data;
    call.b_stride = right.row_stride;
    call.sums = args.vector<double>(sums, "sums");
    call.scratch = args.vector<double>(scratch, "scratch");
    const Launching launching(args);
    cuda::abs_product_sum(call, stream_arg(stream));
}

}  // namespace

void bind_cuda_packed_scores(py::module_& m) {
    m.attr("bodies").cast<py::list>().append("packed_scores");
    m.def("abs_product_scratch", &scratch_of, py::kw_only(), py::arg("n_tokens"), py::arg("n_left"),
          py::arg("n_right"));
    m.def("abs_product_sum", &run_abs_product_sum, py::kw_only(), py::arg("a"), py::arg("b"), py::arg("sums"),
          py::arg("scratch"), py::arg("stream"));
}

}  // namespace rep_fast::python
